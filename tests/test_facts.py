"""The facts of the real world: what the file holds, the requests and sentences made of it, and who uses them."""

import json
import re
from collections import Counter

import pytest

from easyedit_nmke import facts as world
from easyedit_nmke.experiments.stream import stream
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.subjects import find_subject

FACTS = world.facts()
STORED = json.loads(world.FILE.read_text(encoding="utf-8"))


def stands_in(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def test_there_are_enough_of_them():
    each = Counter(fact.subject for fact in FACTS)
    assert len(FACTS) >= 400 and len(each) >= 200 and sum(count > 1 for count in each.values()) >= 100
    assert len(set(fact.relation for fact in FACTS)) >= 20
    assert len({(fact.subject, fact.relation) for fact in FACTS}) == len(FACTS)


def test_no_name_is_written_twice_in_the_file():
    """JSON's later entry would win in silence."""

    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), Counter(name for name, _ in pairs).most_common(1)
        return dict(pairs)

    json.loads(world.FILE.read_text(encoding="utf-8"), object_pairs_hook=unique)


def test_every_relation_has_three_wordings_with_a_place_for_the_subject():
    assert set(STORED["relations"]) == {fact.relation for fact in FACTS}
    for wordings in STORED["relations"].values():
        assert len(set(wordings)) == 3 and all(wording.count("{}") == 1 for wording in wordings)


def test_every_subject_is_found_and_no_wording_gives_the_object_away():
    for fact in FACTS:
        for wording in range(3):
            prompt = fact.prompt(wording)
            start, end = find_subject(prompt, fact.subject)
            assert prompt[start:end] == fact.subject
            assert not stands_in(fact.wordings[wording], fact.object), prompt
        assert not stands_in(fact.subject, fact.object) and fact.object == fact.object.strip()


def test_new_objects_are_of_the_relation_and_false():
    objects = {relation: {fact.object for fact in FACTS if fact.relation == relation} for relation in STORED["relations"]}
    for fact in FACTS:
        assert fact.others and fact.object not in fact.others and set(fact.others) < objects[fact.relation]
    for relation, also in STORED["also"].items():
        for fact in FACTS:
            if fact.relation == relation:
                assert not set(fact.others) & set(also.get(fact.subject, ()))
        assert all(relation in STORED["subjects"][subject] for subject in also)


def test_requests_can_be_read_and_say_what_they_edit():
    truth = {(fact.subject, prompt): fact for fact in FACTS for prompt in map(fact.prompt, range(3))}
    for record in world.requests(150, seed=3):
        request, fact = Request.from_dict(record), truth[record["subject"], record["prompt"]]
        assert request.ground_truth == fact.object and request.target_new in fact.others
        assert record["rephrase_prompt"] != record["prompt"]
        assert truth[record["subject"], record["rephrase_prompt"]] is fact
        assert "unrelated" in request.locality


def test_probes_are_true_unedited_and_of_their_kind():
    records = world.requests(100, "test")
    by_prompt = {fact.prompt(wording): fact for fact in FACTS for wording in range(3)}
    edited = [by_prompt[record["prompt"]] for record in records]
    seen = Counter()
    for record, own in zip(records, edited, strict=True):
        for kind, probe in record["locality"].items():
            other = by_prompt[probe["prompt"][0]]
            assert probe["ground_truth"] == [other.object] and other not in edited
            assert (other.subject == own.subject) == (kind == "same_subject")
            assert (other.relation == own.relation) == (kind == "neighborhood")
            assert kind != "neighborhood" or other.object == own.object
            seen[kind] += 1
    assert seen["unrelated"] == 100 and seen["neighborhood"] >= 40 and seen["same_subject"] >= 40


def test_the_halves_share_no_subject_and_are_all():
    halves = {split: {record["subject"] for record in world.requests(split=split)} for split in ("all", "tune", "test")}
    assert not halves["tune"] & halves["test"] and halves["tune"] | halves["test"] == halves["all"]
    assert min(len(halves["tune"]), len(halves["test"])) >= 0.4 * len(halves["all"])
    assert len(world.requests(split="all")) == len(FACTS)


def test_a_seed_decides_and_subjects_take_turns():
    assert world.requests(50, seed=1) == world.requests(50, seed=1) != world.requests(50, seed=2)
    subjects = len({fact.subject for fact in FACTS})
    assert len({record["subject"] for record in world.requests(subjects)}) == subjects


@pytest.mark.parametrize(("arguments", "said"), [((0,), "0 requests"), ((10**6,), "1000000 requests"), ((1, "train"), "split is")])
def test_what_cannot_be_asked_for(arguments, said):
    with pytest.raises(ValueError, match=said):
        world.requests(*arguments)


def test_sentences_are_the_facts_in_all_wordings():
    sentences = world.texts()
    assert len(set(sentences)) == 3 * len(FACTS) and sentences == world.texts(0) != world.texts(1)
    assert "The capital of France is Paris." in sentences


def test_any_subject_stands_in_the_generic_wordings():
    prompts = world.relation_prompts(5)
    assert prompts == world.relation_prompts(5) != world.relation_prompts(6) and len(set(prompts)) == len(prompts) >= 20
    for subject in STORED["subjects"]:
        for prompt in prompts:
            find_subject(prompt.format(subject), subject)


def test_the_calibration_set_is_a_dozen_false_facts_of_a_dozen_relations():
    assert len(world.calibration()) == 12 == len({relation for _, relation, _ in world.CALIBRATION})
    known = {(fact.subject, fact.relation): fact for fact in FACTS}
    for subject, relation, new in world.CALIBRATION:
        assert new in known[subject, relation].others
    for prompt, subject, _ in world.calibration():
        find_subject(prompt, subject)


def test_a_stream_of_the_test_half(tiny, nmke_hparams):
    class Editor:
        model, tok = tiny("llama")
        hparams = nmke_hparams(model, tok)

    streamed = stream(Editor, "facts", 20, 1)
    half = {fact.subject for fact in FACTS if fact.half == "test"}
    assert {request.subject for request in streamed.requests} <= half and streamed.records == list(range(20))
    assert streamed.facts == {"name": "facts, test half", "edits": 20} and not streamed.refused
