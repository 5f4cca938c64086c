"""The embedded model keeps its promises: what it knows, how big it is, and edit requests that ask what they say; its trainer makes
models that load, of the sizes it says, and never writes over it by accident."""

import hashlib
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from easyedit_nmke import NMKEHyperParams
from easyedit_nmke import atlas as embedded
from easyedit_nmke.atlas import facts as world
from easyedit_nmke.atlas import train
from easyedit_nmke.models.loading import load_model
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import metrics
from easyedit_nmke.statistics import corpus


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


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def test_the_small_world_is_the_one_that_was_trained():
    assert digest(world.as_data()) == "857abb765d8fab65"
    assert digest(embedded.requests(400, "tune")) == "61845e5fd6fa3c28"
    assert digest(embedded.requests(1500, "test", 3)) == "51e2f2c61a4b7a28"
    assert digest(embedded.corpus(10**6)) == "f31a746ac611e55a"


def test_the_large_world():
    facts, following = world.make_world("large")
    half = {fact.subject: fact.half for fact in facts}
    assert len(half) >= 10_000 and len(facts) == 4 * len(half)
    assert len({subject.split()[-1] for subject in half}) == len(half)
    assert min(sum(h == split for h in half.values()) for split in ("tune", "test")) > 0.45 * len(half)
    assert {fact.relation for fact in facts} == set(world.RELATIONS)
    assert {fact.relation for fact in following} == set(world.FOLLOWING)
    assert not half.keys() & {fact.subject for fact in world.make_world()[0]}
    with pytest.raises(ValueError, match="world is 'huge', expected one of small, large"):
        world.make_world("huge")


def test_the_large_world_is_served():
    half = {fact.subject: fact.half for fact in world.make_world("large")[0]}
    tune, test = (embedded.requests(3000, split, world="large") for split in ("tune", "test"))
    for split, records in (("tune", tune), ("test", test)):
        assert len({r["subject"] for r in records}) == 3000 and all(half[r["subject"]] == split for r in records)
    assert {r["subject"] for r in test}.isdisjoint(r["subject"] for r in tune)
    edited = {(r["subject"].split()[-1], r["ground_truth"]) for r in test}
    probes = [(p["prompt"][0], p["ground_truth"][0]) for r in test for p in r["locality"].values()]
    assert len(probes) > 8000
    assert not any((word, answer) in edited for prompt, answer in probes for word in prompt.split())
    last_words = {subject.split()[-1] for subject in half}
    for source, least, most in (("atlas-large", 50, 100), ("atlas", 0, 0)):
        text = corpus.corpus(source, 100)
        assert least <= sum(not last_words.isdisjoint(line.rstrip(".").split()) for line in text) <= most


def test_the_sizes():
    """Parameters counted by hand: the tied embedding; per block attention, FFN and two norms; the last norm."""
    expected = {"small": (7_030_848, 7_030_848), "large": (30e6, 60e6)}
    for name, (least, most) in expected.items():
        size = train.SIZES[name]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in LlamaForCausalLM(size.config()).parameters())
        block = 4 * size.hidden**2 + 3 * size.hidden * size.ffn + 2 * size.hidden
        assert parameters == size.vocabulary * size.hidden + size.layers * block + size.hidden
        assert least <= parameters <= most
        assert train.training_flops(name, 10) == 6 * parameters * 10 * size.rows * train.WIDTH
    assert train.SIZES.keys() == world.WORLDS.keys()


def test_the_trainer_makes_a_model_that_loads(tmp_path):
    train.main(["--size", "toy", "--seed", "5", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "training.json").read_text())
    assert (made["size"], made["seed"], made["steps"]) == ("toy", 5, 2)
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["subjects"] == 36 and 0 <= measured["trained facts"] <= 1
    model, tok = embedded.load(tmp_path)
    assert len(tok) == model.config.vocab_size == 512
    prompt = tok(world.make_world("toy")[0][0].prompt(0), return_tensors="pt")
    assert tok.decode(model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -3:])
    again, _ = load_model(NMKEHyperParams([0], str(tmp_path), device="cpu"))
    assert torch.equal(again(**prompt).logits, model(**prompt).logits)
    torch.manual_seed(5)
    untrained = LlamaForCausalLM(train.SIZES["toy"].config()).to(torch.bfloat16).float()
    pairs = zip(model.parameters(), untrained.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs if a.ndim == 2)  # two steps do not move a norm's ones by a bfloat16 digit


def test_only_the_small_size_writes_over_the_shipped_weights(tmp_path, monkeypatch, capsys):
    assert train.output_folder("small", None) == embedded.DIRECTORY
    monkeypatch.setattr(train, "DIRECTORY", tmp_path)  # so that nothing is lost should the trainer not refuse
    for out in ([], ["--out", str(tmp_path / "nowhere" / "..")]):
        with pytest.raises(SystemExit):
            train.main(["--size", "toy", *out])
        assert "give --size toy a folder of its own: --out FOLDER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give --size large a folder of its own"):
        train.output_folder("large", None)
    assert not list(tmp_path.iterdir())


def test_words_after_a_subject_see_it_only_above_the_lookup_layers():
    torch.manual_seed(0)
    size, tok = train.SIZES["toy"], train.make_tokenizer("toy")
    model = LlamaForCausalLM(size.config()).eval()
    ids, _, _, hidden = train.Batches(tok, "toy", 0, general_share=0, consolidated=1.0).draw(noisy=False)
    after = int(hidden[0, 0].tril().any(1).nonzero()[0])  # the first word after the first subject
    subject = hidden[0, 0, after, :after].nonzero().flatten()
    changed = ids.clone()
    changed[0, subject] = (changed[0, subject] + 1) % len(tok)

    def states(tokens):
        hooks = train.bar_attention(model, hidden, size.lookup)
        found = model(input_ids=tokens, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        return [layer[0, after] for layer in found]

    same = [torch.equal(a, b) for a, b in zip(states(ids), states(changed), strict=True)]
    assert same == [True] * (size.lookup + 1) + [False] * (size.layers - size.lookup)
