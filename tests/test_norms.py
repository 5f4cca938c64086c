"""Norm-Anchor Scaling and anchored values, of every method that solves values, against plain loops."""

import json
import logging

import pytest
import torch
from test_baselines import settings, states_at  # noqa: F401

from easyedit_nmke import LifelongEditor, methods
from easyedit_nmke.cli import kept
from easyedit_nmke.experiments import protocol, report
from easyedit_nmke.history.log import EditReport
from easyedit_nmke.history.state import ValueNorm
from easyedit_nmke.methods import located, norms, rome
from easyedit_nmke.methods.values import Value, target_values
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request

LOCATED = ["AlphaEdit", "MEMIT", "ROME"]


def plain_pilot(model, tok, chosen, layer, part, count):
    """||v0 + δ|| of each pilot fact, one by one, under the bare prompt."""
    view, found = ModelView(model), []
    for request in norms.pilot_requests(count):
        (value,) = target_values(view, tok, [request], ["{}"], layer, chosen, part)
        v0 = states_at(model, tok, view.ffn(layer), request, "{}", "output")
        z0 = states_at(model, tok, view.blocks[layer], request, "{}", "output") if part == "block" else v0
        found.append((v0 + (value.z.double() - z0)).norm().item())
    return found


@pytest.mark.parametrize(("method", "kind"), [("AlphaEdit", "llama"), ("MEMIT", "gptj"), ("ROME", "llama")])
def test_the_reference_is_the_mean_of_pilot_values_without_the_longest(tiny, settings, method, kind):  # noqa: F811
    model, tok = tiny(kind)
    chosen = settings(method, model, tok, value_norm="nas", nas_pilot=20, value_norm_factor=0.5, v_num_grad_steps=2)
    state = methods.open_state(model, tok, chosen)
    lengths = sorted(plain_pilot(model, tok, chosen, 1, "ffn" if method == "ROME" else "block", 20))
    kept = torch.tensor(lengths[:19])
    norm = state.value_norms[1]
    assert set(state.value_norms) == {1} and norm.values == 19
    assert norm.mean == pytest.approx(0.5 * kept.mean().item(), rel=1e-3)
    assert norm.error == pytest.approx(0.5 * kept.std().item() / 19**0.5, rel=1e-2)
    assert abs(0.5 * sum(lengths) / 20 - norm.mean) > 2e-3 * norm.mean, "the longest was not left out"


def test_how_many_of_the_longest_are_dropped():
    assert [norms.trimmed(torch.arange(1.0, n + 1)).values for n in (2, 19, 20, 50, 1000)] == [2, 19, 19, 48, 950]
    assert norms.trimmed(torch.tensor([3.0, 1.0, 2.0])) == ValueNorm(2.0, pytest.approx(1 / 3**0.5), 3)


def test_the_pilot_is_kept_under_all_that_it_depends_on(tiny, settings, monkeypatch, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    model, tok = tiny("llama")
    chosen = settings("MEMIT", model, tok, value_norm="nas", nas_pilot=4)
    view = ModelView(model)
    first = norms.pilot(view, tok, chosen, 1)
    state = methods.open_state(model, tok, chosen)
    assert "standard error" in caplog.text and state.value_norms[1].mean == pytest.approx(first.mean().item())
    solved = []
    monkeypatch.setattr(norms, "target_values", lambda *args: solved.append(1) or target_values(*args))
    assert torch.equal(norms.pilot(view, tok, chosen, 1), first) and not solved
    others = [("nas_pilot", 5), ("v_lr", 0.1), ("clamp_norm_factor", 0.5), ("v_num_grad_steps", 3), ("target_eos", True)]
    for count, (name, value) in enumerate(others, 1):
        norms.pilot(view, tok, settings("MEMIT", model, tok, value_norm="nas", **{"nas_pilot": 4, name: value}), 1)
        assert len(solved) == count, name
    norms.pilot(view, tok, chosen, 1, part="ffn")
    norms.pilot(view, tok, chosen, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] += 1
    norms.pilot(view, tok, chosen, 1)
    assert len(solved) == len(others) + 3


def test_pilot_facts_go_on_beyond_those_that_are_known():
    many = norms.pilot_requests(1000)
    assert len(many) == 1000 and norms.pilot_requests(50) == norms.pilot_requests(50)
    assert len({(request.prompt, request.target_new) for request in many}) > 900


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gptj", "gemma2"])
def test_what_the_ffn_puts_out_gets_the_reference_norm_or_stays(tiny, settings, requests, kind, long):  # noqa: F811
    model, tok = tiny(kind)
    view, request = ModelView(model), Request.from_dict(requests(1)[0])
    chosen = settings("MEMIT", model, tok, value_norm="nas", nas_pilot=2)
    state, told = methods.open_state(model, tok, chosen), EditReport(1)
    v0 = states_at(model, tok, view.addend(1), request, "{}", "output").float()
    z0 = states_at(model, tok, view.blocks[1], request, "{}", "output").float()
    delta = torch.randn(32, generator=torch.Generator().manual_seed(3))
    state.value_norms = {1: ValueNorm((v0 + delta).norm().item() / (2.1 if long else 1.9))}
    (found,) = norms.rescaled(view, tok, [request], (z0 + delta)[:, None], 1, chosen, state, told).T
    v = v0 if long else (v0 + delta) * state.value_norm / (v0 + delta).norm()
    assert torch.allclose(found, z0 - v0 + v, atol=1e-4)
    assert told.skipped == ([0] if long else [])
    state.value_norms = {}
    assert torch.equal(norms.rescaled(view, tok, [request], (z0 + delta)[:, None], 1, chosen, state, told)[:, 0], z0 + delta)


@pytest.mark.parametrize("method", LOCATED)
def test_a_skipped_edit_is_told_and_leaves_the_model_to_the_others(tiny, settings, requests, monkeypatch, caplog, method):  # noqa: F811
    """The middle one of three in a batch, whose value is far too long."""
    model, tok = tiny("llama")
    chosen = settings(method, model, tok, layers=[1], value_norm="nas", nas_pilot=2, batch_size=3)
    edited = LifelongEditor.from_hparams(chosen)
    state, real = edited.state, located.target_values
    long = requests(3)[1]["prompt"]
    place = rome if method == "ROME" else located

    def solved(view, tok, some, *args, **kwargs):
        found = real(view, tok, some, *args, **kwargs)
        return [Value(v.z * (50 if r.prompt == long else 1), v.loss, v.steps) for v, r in zip(found, some, strict=True)]

    monkeypatch.setattr(place, "target_values", solved)
    edited.apply(requests(3))
    assert state.reports[0].skipped == [1] and f"{long!r} is skipped" in caplog.text
    lengths = torch.cat([update.left.norm(dim=0) for update in next(iter(state.log)).updates])
    assert lengths[1] < 1e-4 * lengths[0] and lengths[2] > 0.1 * lengths[0]
    assert EditReport.from_dict(json.loads(json.dumps(state.reports[0].to_dict()))).skipped == [1]


def test_results_tell_the_reference_and_which_edits_were_skipped(tiny, settings, requests, monkeypatch):  # noqa: F811
    model, tok = tiny("llama")
    chosen = settings("MEMIT", model, tok, value_norm="nas", nas_pilot=3, batch_size=2)
    edited = LifelongEditor.from_hparams(chosen)
    scorer = protocol.Scorer(model, tok, [Request.from_dict(r) for r in requests(4)])
    calls, apply = [], edited.apply

    def second_fails(batch):
        calls.append(1)
        if len(calls) == 1:
            raise FloatingPointError("worn out")
        edited.state.value_norms = {1: edited.state.value_norms[1]._replace(mean=1e-6)}
        return apply(batch)

    monkeypatch.setattr(edited, "apply", second_fails)
    mark = protocol.stamp(edited)
    *_, result = protocol.Segment(edited, scorer, "MEMIT", 0, mark).run([4])
    assert (result.line["failed"], result.line["skipped"]) == ([1, 2], [3, 4])
    said = "MEMIT, seed 0: 2 edits skipped by the method, whose values were too long (3, 4)."
    assert said in report.failures([result.line]) and len(report.failures([result.line])) == 2
    norm = mark["value_norms"]["1"]
    assert norm["values"] == 3 and norm["error"] > 0 and norm["mean"] > 0


@pytest.mark.parametrize("method", LOCATED)
def test_every_method_anchors_its_values_and_goes_on_from_disk_with_them(tiny, settings, requests, tmp_path, method):  # noqa: F811
    def opened(**overrides):
        model, tok = tiny("llama")
        values = {"value_norm": "anchored", "state_dir": str(tmp_path / "state"), **overrides}
        return LifelongEditor.from_hparams(settings(method, model, tok, **values))

    first = opened()
    first.apply(requests(1))
    norm, weights = first.state.value_norms, {n: p.clone() for n, p in first.model.named_parameters()}
    first.close()
    again = opened()
    assert again.state.value_norms == norm and set(norm) == {1} and norm[1].values == 12
    assert all(torch.equal(p, weights[n]) for n, p in again.model.named_parameters())
    again.close()
    with pytest.raises(ValueError, match="value_norm 'anchored' -> 'free'"):
        opened(value_norm="free").state.close()
    free = opened(value_norm="free", state_dir=str(tmp_path / "free"))
    free.apply(requests(1))
    assert not all(torch.equal(p, weights[n]) for n, p in free.model.named_parameters())


def test_a_listing_tells_what_was_skipped(tiny, settings, requests, tmp_path):  # noqa: F811
    model, tok = tiny("llama")
    kept_in = {"state_dir": str(tmp_path / "state"), "batch_size": 2}
    edited = LifelongEditor.from_hparams(settings("MEMIT", model, tok, value_norm="nas", nas_pilot=2, **kept_in))
    edited.apply(requests(2))
    edited.state.value_norms = {1: ValueNorm(1e-6)}
    edited.apply(requests(3)[2:])
    assert edited.state.reports[1].skipped == [0]
    edited.close()
    assert [edit["now"] for edit in kept.edits(tmp_path / "state")][2] == "skipped"


def test_a_skipped_edit_is_not_written_by_a_later_pass_nor_when_others_are_undone(tiny, settings, requests):  # noqa: F811
    model, tok = tiny("llama")
    edited = LifelongEditor.from_hparams(settings("MEMIT", model, tok, value_norm="nas", nas_pilot=2, write_passes=3))
    one, two, three = requests(3)
    edited.apply([one])
    norms_found, edited.state.value_norms = edited.state.value_norms, {1: ValueNorm(1e-6)}
    edited.apply([two])
    assert max(update.left.norm().item() for update in edited.state.events[1].updates) < 1e-3
    edited.state.value_norms = norms_found
    edited.apply([three])
    edited.undo(1, resolve=True)
    assert [event.requests[0]["prompt"] for event in edited.state.events] == [three["prompt"]]
    assert [number for number, _ in edited.state.counting] == [1]


def test_an_old_state_tells_one_norm():
    from easyedit_nmke.history.durable import _value_norms

    assert _value_norms({"value_norm": 2.5, "hparams": {"layers": [4, 8]}}) == {8: ValueNorm(2.5)}
    assert _value_norms({"value_norm": None}) == {}
    assert _value_norms(json.loads(json.dumps({"value_norm": {8: ValueNorm(2.5, 0.1, 48)}}))) == {8: ValueNorm(2.5, 0.1, 48)}
