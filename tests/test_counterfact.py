"""CounterFact in its original form, and its own scores against MEMIT's definitions written out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from easyedit_nmke import atlas
from easyedit_nmke.data import load
from easyedit_nmke.experiments.protocol import Scorer
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import metrics, table
from easyedit_nmke.scores.counterfact import compared, counterfact, fits

DATA = Path(__file__).parent / "data"
SAMPLE = DATA / "counterfact_original.json"


def plain(model, tok, records):
    """MEMIT's evaluation of each record and its summary: an answer's mean negative log-likelihood after each prompt, one text at a
    time, then means over prompts and over records, in percent, and scipy's `hmean`."""

    def nll(prompt, answer):
        ids, start = tok(f"{prompt} {answer}")["input_ids"], len(tok(prompt)["input_ids"])
        with torch.no_grad():
            probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        return float(np.mean([-probs[at - 1, ids[at]].item() for at in range(start, len(ids))]))

    sums = {f"{side}_{kind}": [] for side in ("rewrite", "paraphrase", "neighborhood") for kind in ("success", "diff")}
    for record in records:
        rewrite = record["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        prompts = {
            "rewrite": [rewrite["prompt"].format(rewrite["subject"])],
            "paraphrase": record["paraphrase_prompts"],
            "neighborhood": record["neighborhood_prompts"],
        }
        for side, some in prompts.items():
            both = [(nll(prompt, new), nll(prompt, true)) for prompt in some]
            if side == "neighborhood":
                sums[f"{side}_success"].append(np.mean([true < new for new, true in both]))
                sums[f"{side}_diff"].append(np.mean([np.exp(-true) - np.exp(-new) for new, true in both]))
            else:
                sums[f"{side}_success"].append(np.mean([true > new for new, true in both]))
                sums[f"{side}_diff"].append(np.mean([np.exp(-new) - np.exp(-true) for new, true in both]))
    means = {name: np.mean(values) for name, values in sums.items()}
    three = np.array([means[f"{side}_success"] for side in ("rewrite", "paraphrase", "neighborhood")])
    return means, 0.0 if not three.all() else 3 / (1 / three).sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_memits(tiny, kind, seed):
    model, tok = tiny(kind, seed)
    records = json.loads(SAMPLE.read_text())
    found = counterfact(model, tok, load(SAMPLE).requests)
    means, score = plain(model, tok, records)
    names = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}
    for theirs, ours in names.items():
        assert found[f"{ours}_success"] == pytest.approx(means[f"{theirs}_success"], abs=1e-12)
        assert found[f"{ours}_magnitude"] == pytest.approx(means[f"{theirs}_diff"], rel=1e-4, abs=1e-9)
        assert abs(means[f"{theirs}_diff"]) > 1e-6
    assert found["counterfact_score"] == pytest.approx(score, abs=1e-12)


def test_the_samples_models_tell_the_scores_apart(tiny):
    """The comparison above is of successes that differ from side to side, and from model to model."""
    found = [counterfact(*tiny("llama", seed), load(SAMPLE).requests) for seed in range(3)]
    assert len({tuple(scores.values()) for scores in found}) == 3
    assert any(len({scores[f"{side}_success"] for side in ("efficacy", "paraphrase", "neighborhood")}) > 1 for scores in found)


def test_they_are_scores_of_counterfacts_records_alone(tiny):
    model, tok = tiny("llama")
    requests = load(SAMPLE).requests
    assert fits(requests) and fits(load(DATA / "counterfact_100.json").requests)
    embedded = [Request.from_dict(record) for record in atlas.requests(2)]
    assert not fits(embedded) and not fits(load(DATA / "zsre_100.json").requests)
    assert not fits(load(DATA / "knowedit_wiki.json").requests) and not fits([])
    scores = Scorer(model, tok, requests).unedited(model, tok)
    assert {name: scores[name] for name in counterfact(model, tok, requests)} == counterfact(model, tok, requests)
    assert scores["attribute"] == 1.0
    other = load(DATA / "zsre_100.json").requests[:1]
    assert "efficacy_success" not in Scorer(model, tok, [*requests, *other]).unedited(model, tok)


def test_tables_have_the_columns_of_data_that_bring_them():
    brought = {"efficacy_success": "ES", "paraphrase_success": "PS", "neighborhood_success": "NS", "counterfact_score": "S"}
    assert not set(brought) & set(table.in_shell()) and brought.items() <= table.in_shell(set(brought)).items()
    last = [row.column for row in table.in_report().values()][-15:]
    assert {"ES", "EM", "PS", "PM", "NS", "NM", "S", "Multi-hop"} < set(last)


def test_a_side_without_prompts_has_no_score(tiny):
    requests = [Request("a b", "a", "c", "d", locality={"neighborhood": (("e f", "d"),)})]
    scores = counterfact(*tiny("llama"), requests)
    assert scores["paraphrase_success"] is scores["paraphrase_magnitude"] is scores["counterfact_score"] is None
    assert scores["efficacy_success"] in (0.0, 1.0)


def test_attribute_prompts_are_locality_but_not_in_loc():
    (request, _) = load(SAMPLE).requests
    assert request.locality["attribute"] == (("Lily Laskine plays the", "harp"), ("Nicanor Zabaleta, who plays the", "harp"))
    before = [{"rewrite_acc": [0.0], "locality": {"neighborhood_output": [[1]], "attribute_output": [[1, 2]]}, "portability": {}}]
    after = [{"rewrite_acc": [0.0], "locality": {"neighborhood_output": [[1]], "attribute_output": [[1, 0]]}, "portability": {}}]
    assert metrics.summary(before, after)["loc"] == 1.0 and metrics.by_kind(before, after)["attribute"] == 0.5


def test_a_broken_record_is_refused_with_its_number(tmp_path):
    whole, broken = json.loads(SAMPLE.read_text())
    del broken["requested_rewrite"]["target_new"]
    (tmp_path / "facts.json").write_text(json.dumps([whole, broken]))
    assert [str(refusal) for refusal in load(tmp_path / "facts.json").refused] == [
        "record 1: field 'requested_rewrite.target_new.str' (new target) is missing"
    ]


def test_all_pairs_that_are_compared_are_known_beforehand(tiny, monkeypatch):
    asked, seen = load(SAMPLE).requests, []
    monkeypatch.setattr(
        "easyedit_nmke.scores.counterfact.target_log_probs", lambda m, t, pairs, **_: seen.extend(pairs) or [0.0] * len(pairs)
    )
    counterfact(None, None, asked)
    known = {pair for request in asked for *_, pair in metrics._slots(request)}
    assert set(seen) <= known | {pair for request in asked for pair in compared(request)}
    assert not set(seen) <= known
