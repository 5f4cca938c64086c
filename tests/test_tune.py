"""`nmke tune`: the three stages, what they leave, and that the model is as it was."""

import dataclasses
import json
import math
import sys

import pytest
import torch
import yaml

from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import main
from easyedit_nmke.experiments import tune as room
from easyedit_nmke.experiments.tune import Plan, base_settings, tune
from easyedit_nmke.experiments.tune import values as stage
from easyedit_nmke.experiments.tune.bed import Bed, score, unedited_afterwards
from easyedit_nmke.experiments.tune.studies import Search, Tried
from easyedit_nmke.experiments.tune.values import Values, blocks, starts
from easyedit_nmke.methods import read
from easyedit_nmke.methods.nmke import NMKEHyperParams
from easyedit_nmke.models.arch import ModelView, editing
from easyedit_nmke.models.hooks import record, shifted
from easyedit_nmke.models.prompts import pad
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import generation

pytest.importorskip("optuna")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Short stages, their values in a cache of their own; the name of a text for the covariance."""
    for name, value in {"STREAM": 4, "REAL": 3, "TOKENS_PER_NEURON": 2}.items():
        monkeypatch.setattr(room, name, value)
    monkeypatch.setattr(stage, "FACTS", 2)
    monkeypatch.setattr(stage, "AT_A_TIME", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(embedded.corpus(400)), encoding="utf-8")
    return str(text)


@pytest.fixture
def plan(small, tiny, tmp_path):
    """plan(label, trials=(1, 1, 1)) -> a plan for a tiny model and the embedded model's facts; plan.model."""
    model, tok = tiny("llama")

    def make(label, trials=(1, 1, 1)):
        base = base_settings(label, (model, tok), device="cpu")
        return Plan(label, base, tmp_path / "trials", "atlas", small, seconds=0.0, trials=trials)

    make.model = model
    return make


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("label", ["AlphaEdit", "NMKE", "NMKE+", "MEMIT", "ROME", "FT", "KNE", "LocFT-BF", "UltraEdit"])
def test_every_method_is_searched_and_its_file_says_what_was_found(label, plan, tmp_path):
    from easyedit_nmke.bench.machine import surroundings
    from easyedit_nmke.experiments.tune.written import write

    model, asked = plan.model, plan(label)
    before = bits(model)
    outcome = tune(asked)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not hasattr(model, "nmke_state")
    assert 0 <= outcome.trial["score"] <= 1
    assert 0 <= outcome.stream["score"] <= 1
    assert outcome.settings.alg_name == label.removesuffix("+")
    stages = [line["stage"].split(" ")[0] for line in outcome.lines()]
    assert stages == ([] if label in ("FT", "KNE", "LocFT-BF", "UltraEdit") else ["values"]) + [label, "streams"]
    file = tmp_path / "found.yaml"
    write(asked, outcome, file, "nmke tune", surroundings())
    found = read(file).to_dict()
    assert {**found, "model_name": ""} == {**outcome.settings.to_dict(), "model_name": ""}
    assert f"Rel {outcome.stream['rel']:.2f}" in file.read_text()


def test_the_second_trial_of_writes_is_the_middle_of_the_ranges(plan):
    """The published weight of the covariance is that of models of 8B; of a small one it leaves most edits unwritten."""
    outcome = tune(dataclasses.replace(plan("MEMIT", (1, 2, 1)), seconds=600.0))
    first, second = [line["chosen"] for line in outcome.lines() if line["stage"].startswith("MEMIT")]
    low, high = base_settings("MEMIT", "atlas").searched(4)["mom2_update_weight"]
    assert first["mom2_update_weight"] == 15000 and second["mom2_update_weight"] == pytest.approx(math.sqrt(low * high), rel=0.01)
    assert {**first, "mom2_update_weight": 0} == {**second, "mom2_update_weight": 0}


def test_nmke_plus_is_searched_around_its_preset_which_few_edits_cannot_find():
    base = base_settings("NMKE+", "atlas")
    space = base.searched(4)
    low, high = space["L2"]
    assert low < base.L2 < high and base.nullspace_fraction in space["nullspace_fraction"]
    soft = dataclasses.replace(base, regularizer="covariance").searched(4)["L2"]
    assert soft[0] < low and soft[1] > high


def test_an_interrupted_search_keeps_the_best_and_goes_on(plan):
    model, heard = plan.model, []
    before = bits(model)

    def stop(stage, note):
        heard.append(stage)
        if stage == "streams":
            raise KeyboardInterrupt

    outcome = tune(plan("AlphaEdit"), stop)
    assert outcome.interrupted
    assert outcome.settings is not None
    assert not outcome.stream
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    again = tune(plan("AlphaEdit", trials=(None, None, 1)))
    assert not again.interrupted
    assert again.stream
    lines = again.lines()
    assert [line["chosen"] for line in lines[:2]] == [line["chosen"] for line in outcome.lines()[:2]]
    assert len(lines) == 3


def test_values_are_shared_by_methods(plan, monkeypatch):
    solved = []
    plain = stage.target_values
    monkeypatch.setattr(
        stage, "target_values", lambda view, tok, some, *rest: solved.append(len(some)) or plain(view, tok, some, *rest)
    )
    tune(plan("AlphaEdit", trials=(1, 1, 0)))
    assert sum(solved) == 4  # two for the trial of values, two more for the stream
    tune(plan("MEMIT", trials=(None, 1, 0)))
    assert sum(solved) == 4


def test_a_search_that_finds_nothing_writes_no_file(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "WORKED", 1.1)
    out = tmp_path / "hparams" / "found.yaml"
    argv = ["tune", "--model", "atlas", "--method", "FT", "--data", "atlas", "--text", small, "--budget", "1s", "--out", str(out)]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "nothing worked: the best Rel is" in said
    assert not out.exists()
    assert json.loads((tmp_path / "hparams" / "found.tune" / "trials.jsonl").read_text().splitlines()[0])["stage"].startswith("FT")


def test_the_shell_writes_file_trials_and_figure(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "WORKED", 0.0)
    out = tmp_path / "found.yaml"
    assert main(["tune", "--model", "atlas", "--method", "FT", "--data", "atlas", "--budget", "1s", "--out", str(out)]) == 0
    assert yaml.safe_load(out.read_text())["alg_name"] == "FT"
    assert (tmp_path / "found.tune" / "trials.png").stat().st_size > 1000
    assert "after 3 edits of other facts" in capsys.readouterr().out


def test_what_cannot_be_searched_is_refused(plan, requests, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="did you mean 'AlphaEdit'"):
        base_settings("AlfaEdit", "atlas")
    few = tmp_path / "few.json"
    few.write_text(json.dumps(requests(2)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"few.json has 2 records that this model can be edited with.*needs 7"):
        tune(dataclasses.replace(plan("FT"), source=str(few)))
    assert main(["tune", "--model", "atlas", "--out", str(tmp_path / "found")]) == 1
    assert "ends in .yaml" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"\[tune\]"):
        Search(tmp_path / "x.db", "x", {}, 0)


# ---- values


def bed_of(model, tok, requests):
    """A bed that scores little kept text."""
    return Bed(model, tok, [Request.from_dict(record) for record in requests])


def test_a_values_effect_is_what_the_model_says_with_it(atlas, requests, tmp_path):
    model, tok = atlas
    bed = bed_of(model, tok, requests(3))
    values, block = Values(bed, ["{}"], tmp_path), 1
    view = bed.view
    with editing(model):
        states = [
            stage.subject_states(view, tok, [[r.fill("{}", tok)]], {"z": (view.blocks[block], "output")}) for r in bed.requests
        ]
        z0 = torch.cat([state["z"][:, 0] for state in states])
        nothing = values.effect(bed.requests, z0, block)
        pairs = [(r.prompt, r.target_new) for r in bed.requests]
        said = generation.target_log_probs(model, tok, pairs)
        assert nothing["own"] == pytest.approx(-sum(said) / 3, abs=1e-4)
        assert nothing["others"] == pytest.approx(0, abs=1e-6)
        far = values.effect(bed.requests, z0 + 3 * z0.roll(1, 0), block)
    assert far["others"] > 0.01
    assert abs(far["own"] - nothing["own"]) > 0.01
    assert far["wordings"] != far["own"]


def test_values_of_a_method_with_an_end_token_have_it_too(atlas, requests, tmp_path):
    model, tok = atlas
    values = Values(bed_of(model, tok, requests(2)), ["{}"], tmp_path)
    chosen = {"block": 1, "v_lr": 0.5, "v_num_grad_steps": 3}
    with editing(model):
        plain, ended = (
            values.of(chosen, NMKEHyperParams(layers=[1], model_name=(model, tok), target_eos=eos), 2, lambda: None)
            for eos in (False, True)
        )
    assert not torch.equal(plain, ended) and len(list(tmp_path.iterdir())) == 2


def test_shifted_moves_one_token_of_each_row(atlas):
    model, _ = atlas
    view = ModelView(model)
    batch, columns = pad([[5, 6, 7, 8], [9, 10, 11]], view.device), torch.tensor([2, 1])
    delta = torch.randn(2, model.config.hidden_size)

    def seen():
        with record({"out": (view.blocks[1], "output")}) as states, torch.no_grad():
            model(**batch.inputs())
        return states["out"]

    before = seen()
    with shifted(view.blocks[1], columns, delta):
        after = seen()
    moved = torch.zeros_like(before)
    moved[torch.arange(2), columns] = delta
    assert torch.allclose(after, before + moved)
    assert torch.equal(seen(), before)


def test_the_blocks_that_are_tried():
    assert blocks(30) == list(range(3, 16))
    assert blocks(5) == [0, 1, 2]
    assert starts(30)[0] == {"block": 8, "v_lr": 0.5, "clamp_norm_factor": 4.0, "v_weight_decay": 0.001, "v_num_grad_steps": 25}


# ---- trials


def test_the_score_is_the_harmonic_mean_of_what_there_is():
    found = {"rel": 1.0, "gen": 0.4, "gen_contains": 0.6, "loc": 0.5, "kept_kl": 0.0}
    assert score(found) == pytest.approx(4 / (1 + 2 + 2 + 1))
    assert score({**found, "loc": None}) == pytest.approx(3 / (1 + 2 + 1))
    assert score({**found, "kept_kl": math.log(2)}) == pytest.approx(4 / (1 + 2 + 2 + 2))
    assert score({**found, "gen": 0.0, "gen_contains": 0.0}) == 0.0
    assert score({**found, "kept_kl": math.inf}) == 0.0
    assert score({**found, "kept_kl": None}) == pytest.approx(3 / (1 + 2 + 2))


def test_a_worn_out_model_scores_nothing_and_is_put_back(atlas, requests, nmke_hparams, monkeypatch):
    model, tok = atlas
    bed, before = bed_of(model, tok, requests(2)), bits(model)

    def fail(*args, **kwargs):
        model.get_parameter("model.layers.0.mlp.down_proj.weight").data.add_(1.0)
        raise FloatingPointError("worn out")

    monkeypatch.setattr("easyedit_nmke.experiments.tune.bed.apply_method", fail)
    assert bed.part(0, 2).edited(nmke_hparams(model, tok)) == {"score": 0.0, "rel": 0.0}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_weights_are_put_back_whatever_happens(atlas):
    model, _ = atlas
    name = "model.layers.0.mlp.down_proj.weight"
    before = model.get_parameter(name).detach().clone()
    with pytest.raises(KeyboardInterrupt), unedited_afterwards(model, {name: None}):
        model.get_parameter(name).data.zero_()
        raise KeyboardInterrupt
    assert torch.equal(model.get_parameter(name), before)


def test_a_start_whose_trial_was_cut_off_is_tried_again(tmp_path):
    space, starts = {"x": (0.01, 10.0)}, [{"x": 1.0}, {"x": 0.5}]

    def cut_off(asked):
        raise KeyboardInterrupt

    search = Search(tmp_path / "trials.db", "x", space, 0, starts)
    with pytest.raises(KeyboardInterrupt):
        search.run(cut_off, math.inf, 1)
    search = Search(tmp_path / "trials.db", "x", space, 0, starts)
    search.run(lambda asked: (Tried({"score": chosen["x"]}, (), 0.0) for chosen, _ in asked), math.inf, 2)
    assert sorted(chosen["x"] for chosen, _ in search.done()) == [0.5, 1.0]
    waiting = Search(tmp_path / "trials.db", "x", space, 0, starts).study.trials
    assert len(waiting) == 3 and [trial.state.name for trial in waiting].count("FAIL") == 1


def test_other_facts_or_another_seed_are_another_search(plan):
    first = plan("FT")
    names = {tune(one).searches[-1].study.study_name for one in (first, first, dataclasses.replace(first, seed=1))}
    assert len(names) == 2


def test_a_search_goes_on_from_its_database_and_prunes(tmp_path):
    space = {"x": (0.01, 10.0), "kind": [None, [1, 2], "word"]}

    def measure(asked):
        for chosen, watch in asked:
            value = 1 / (1 + abs(math.log(chosen["x"]))) * (1.0 if chosen["kind"] == [1, 2] else 0.5)
            yield Tried({"score": value} if watch(value, 0) else None, watch.reports, 0.0)

    search = Search(tmp_path / "a" / "trials.db", "x", space, 0, [{"x": 1.0, "kind": [1, 2]}], prune=True)
    search.run(measure, 0.0, 8)
    lines = search.lines()
    assert lines[0]["chosen"] == {"x": 1.0, "kind": [1, 2]}
    assert search.done()[0] == ({"x": 1.0, "kind": [1, 2]}, {"score": 1.0})
    assert len(lines) == 1  # no time
    search.run(measure, math.inf, 16)
    again = Search(tmp_path / "a" / "trials.db", "x", space, 0, [{"x": 1.0, "kind": [1, 2]}])
    assert again.lines() == search.lines()
    assert {"complete", "pruned"} == {line["state"] for line in again.lines()}
    assert set(again.importances()) == {"x", "kind"}
    assert len(again.points()) == 17
