"""BLUE: a value at each boundary block, whole residuals, the second solved after the first is written; against dense equations."""

import copy

import pytest
import torch
from test_baselines import relative, settings, states_at  # noqa: F401

from easyedit_nmke import LifelongEditor, NMKEHyperParams, methods
from easyedit_nmke.methods import located
from easyedit_nmke.methods.memit import MEMITHyperParams
from easyedit_nmke.methods.values import Value
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.statistics import covariance
from easyedit_nmke.statistics.nullspace import row_spaces

BLOCKS = [0, 2]


def some_values(view, tok, requests, templates, layer, hparams):
    """In place of solved ones, which follow rounding: each a step of its own from where the model, as it is, has the subject."""
    now = [states_at(view.model, tok, view.blocks[layer], request, "{}", "output").float() for request in requests]
    draws = [torch.Generator().manual_seed(len(request.prompt) + layer) for request in requests]
    return [Value(z0 + torch.randn(32, generator=draw), 0.5, 1) for z0, draw in zip(now, draws, strict=True)]


def plainly(model, tok, batches, chosen, state, part_of_norm):
    """Both blocks of each batch in float64, with values solved on the model as it is by then; no memory but AlphaEdit's."""
    view, past = ModelView(model), {layer: [] for layer in BLOCKS}
    for batch in batches:
        for layer in BLOCKS:
            z = []
            for request in batch:
                (value,) = some_values(view, tok, [request], state.flat_templates, layer, chosen)
                z.append(part_of_norm(view, request, layer, value.z.double()))
            keys = []
            for request in batch:
                groups = [
                    [states_at(model, tok, view.down(layer), request, t, "input") for t in group] for group in state.templates
                ]
                keys.append(torch.stack([torch.stack(group).mean(0) for group in groups]).mean(0))
            k = torch.stack(keys, 1)
            r = torch.stack(z, 1) - torch.stack(
                [states_at(model, tok, view.blocks[layer], request, "{}", "output") for request in batch], 1
            )
            view.w_out(layer).add_(solve(view, tok, chosen, layer, k, r, past[layer]).float())
            past[layer].append(k)


def solve(view, tok, chosen, layer, k, r, past):
    if chosen.alg_name == "MEMIT":
        left = chosen.mom2_update_weight * plainly.moments[layer].double() + k @ k.T
        return r @ torch.linalg.solve(left, k).T
    u = plainly.spaces[layer].basis.double()
    p = torch.eye(len(u)) - u @ u.T
    c = sum((old @ old.T for old in past), torch.zeros(len(u), len(u), dtype=torch.float64))
    return torch.linalg.solve(p @ (k @ k.T + c) + chosen.L2 * torch.eye(len(u)), p @ k @ r.T).T


@pytest.mark.parametrize("norm", ["free", "nas"])
@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_blue_writes_two_blocks_with_a_value_each(tiny, settings, requests, monkeypatch, method, norm):  # noqa: F811
    model, tok = tiny("llama")
    chosen = settings(method, model, tok, layers=BLOCKS, blue=True, value_norm=norm, nas_pilot=2)
    state = methods.open_state(model, tok, chosen)
    plainly.moments = covariance.moments(ModelView(model), tok, chosen)
    plainly.spaces = row_spaces(ModelView(model), tok, chosen) if method == "AlphaEdit" else None
    assert set(state.value_norms) == (set() if norm == "free" else {0, 2})
    other, start = copy.deepcopy(model), ModelView(copy.deepcopy(model))

    def part_of_norm(view, request, layer, z):
        if norm == "free":
            return z
        v0 = states_at(other, tok, view.ffn(layer), request, "{}", "output")
        stream = states_at(other, tok, view.blocks[layer], request, "{}", "output") - v0
        v, mean = z - stream, state.value_norms[layer].mean
        return stream + (v0 if v.norm() > 2 * mean else v * mean / v.norm())

    monkeypatch.setattr(located, "target_values", some_values)
    every = [Request.from_dict(r) for r in requests(3)]
    batches = [every[:2], every[2:]]
    plainly(other, tok, batches, chosen, state, part_of_norm)
    for batch in batches:
        methods.apply_to_model(model, tok, batch, chosen, state=state)
    for layer in BLOCKS:
        assert relative(ModelView(model).w_out(layer), ModelView(other).w_out(layer), start.w_out(layer)) < 1e-4
    assert torch.equal(ModelView(model).w_out(1), start.w_out(1)) and state.reports[0].value_loss[3] > 0
    spread = copy.deepcopy(start.model)
    methods.apply_to_model(spread, tok, batches[0], settings(method, spread, tok, layers=BLOCKS))
    assert not torch.allclose(ModelView(spread).w_out(0), ModelView(model).w_out(0), atol=1e-3), "not merely two blocks"


def test_a_file_for_several_layers_becomes_one_of_the_two_outer_ones():
    content = {"layers": [4, 5, 6, 7, 8], "model_name": "atlas"}
    for kind in (MEMITHyperParams, NMKEHyperParams):
        assert kind.from_dict({**content, "blue": True}).layers == [4, 8] and kind.from_dict(content).layers == content["layers"]
        assert kind.from_dict({**content, "blue": True, "layers": [3]}).z_layers == [3]
    with pytest.raises(ValueError, match=r"blue writes two layers, .*layers is \[4, 5, 6, 7, 8\]; give these two"):
        MEMITHyperParams(**content, blue=True)
    assert MEMITHyperParams(**content).z_layers == [8]


@pytest.mark.parametrize("method", ["MEMIT", "NMKE"])
def test_its_edits_are_undone_and_solved_again_from_both_values(tiny, settings, nmke_hparams, requests, method):  # noqa: F811
    model, tok = tiny("llama")
    make = nmke_hparams if method == "NMKE" else lambda *args, **kwargs: settings("MEMIT", *args, **kwargs)
    chosen = make(model, tok, layers=BLOCKS, blue=True, batch_size=2)
    edited, start = LifelongEditor.from_hparams(chosen), copy.deepcopy(model)
    edited.apply(requests(2))
    edited.apply(requests(3)[2:])
    first = next(iter(edited.state.log))
    assert first.z.shape == (64, 2)
    edited.undo(1, resolve=True)
    kept = [edit.z for edit in edited.state.log]
    assert torch.equal(kept[0], first.z[:, 1:])
    edited.state.rollback(0)
    assert all(torch.equal(p, start.get_parameter(n)) for n, p in model.named_parameters())
