"""The embedded model keeps its promises: what it knows, how big it is, and edit requests that ask what they say."""

import json

import pytest

from easyedit_nmke import atlas as embedded
from easyedit_nmke import metrics
from easyedit_nmke.atlas import facts as world
from easyedit_nmke.prompts import Request


def test_measured_quality_and_size():
    measured = json.loads((embedded.DIRECTORY / "measured.json").read_text())
    assert measured["trained facts"] >= 0.95 and measured["held-out wordings"] >= 0.95
    assert measured["held-out exercises (mean of tasks)"] >= 0.9
    assert sum(file.stat().st_size for file in embedded.DIRECTORY.iterdir()) <= 20e6


def test_the_world():
    facts, _ = world.make_world()
    subjects = {fact.subject for fact in facts}
    assert len(subjects) >= 600 and len(facts) == 4 * len(subjects)
    assert len({subject.split()[-1] for subject in subjects}) == len(subjects)
    assert all(len(relation.templates) == 8 for relation in world.RELATIONS)
    for fact in facts[::97]:
        assert len(fact.sentences()) == 7
        assert all(prompt.count(fact.subject) == 1 for prompt, _ in fact.sentences())
        assert fact.prompt(fact.held_out) not in dict(fact.sentences())
    exercises = world.make_exercises()
    assert 0.08 < sum(e.held_out for e in exercises) / len(exercises) < 0.12
    assert not {e.prompt for e in exercises if e.held_out} & {e.prompt for e in exercises if not e.held_out}


def test_the_facts_are_shipped_as_data():
    stored = json.loads((embedded.DIRECTORY.parent / "facts.json").read_text())
    assert stored == json.loads(json.dumps(world.as_data()))
    assert len(stored["facts"]) == sum(map(len, world.make_world()))


def test_the_model_answers_a_sample_of_each(atlas):
    model, tok = atlas
    facts, _ = world.make_world()
    trained = [pair for fact in facts[::40] for pair in fact.sentences()]
    unseen = [(fact.prompt(fact.held_out), fact.object) for fact in facts[::8]]
    for pairs, bar in ((trained, 0.95), (unseen, 0.95), (embedded.exercises(), 0.88)):
        right = metrics.exact_match(model, tok, pairs)
        assert sum(right) / len(right) >= bar


@pytest.mark.parametrize("split", ["tune", "test"])
def test_requests_ask_what_they_say(atlas, split):
    model, tok = atlas
    records = embedded.requests(200, split)
    assert records == embedded.requests(200, split)
    assert records != embedded.requests(200, split, seed=1)
    asked = [Request.from_dict(record) for record in records]
    facts, _ = world.make_world()
    half = {fact.subject: fact.half for fact in facts}
    assert len({r.subject for r in asked}) == 200 and all(half[r.subject] == split for r in asked)
    assert all(r.target_new != r.ground_truth for r in asked)
    assert any(r.portability for r in asked) and all("unrelated" in r.locality for r in asked)
    edited = {r.prompt for r in asked}
    for request in asked:
        for kind, pairs in request.locality.items():
            for prompt, _ in pairs:
                assert prompt not in edited
                assert (request.subject in prompt) == (kind == "same_subject")
    probes = [pair for r in asked for pairs in r.locality.values() for pair in pairs]
    right = metrics.exact_match(model, tok, probes)
    assert sum(right) / len(right) >= 0.95
    before = metrics.quality(model, tok, asked)
    assert metrics.summary(before, before)["rel"] < 0.1


def test_the_halves_share_no_subject_and_have_enough_for_long_runs():
    tune, test = (embedded.requests(400, split) for split in ("tune", "test"))
    assert not {r["subject"] for r in tune} & {r["subject"] for r in test}
    with pytest.raises(ValueError, match="the test half has"):
        embedded.requests(100000, "test")
    with pytest.raises(ValueError, match="expected 'tune' or 'test'"):
        embedded.requests(1, "all")


def test_the_corpus_holds_nothing_that_was_held_out():
    facts, _ = world.make_world()
    text = set(embedded.corpus(10**6))
    assert not text & {f"{fact.prompt(fact.held_out)} {fact.object}." for fact in facts}
    assert not text & {f"{prompt} {answer}." for prompt, answer in embedded.exercises(10**6)}
    assert embedded.corpus(5) == embedded.corpus(5) and len(embedded.corpus(5)) == 5
