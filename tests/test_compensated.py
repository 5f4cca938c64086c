"""Updates of masked neurons that make up for what masks left out: by dense equations, beside the other forms, in a model."""

import pytest
import torch
from test_solver_options import normal, space

from easyedit_nmke import LifelongEditor
from easyedit_nmke.attribution.masks import NeuronMask
from easyedit_nmke.methods import compensated, nmke
from easyedit_nmke.methods.compensated import CompensatedSolver
from easyedit_nmke.methods.keys import Contexts, key_and_value
from easyedit_nmke.methods.solver import NullSpaceSolver, RestrictedSolver
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import of_parameter

NEURONS, HIDDEN, EDITS, L2 = 60, 5, 30, 3.0


def made(solver, masks, keys, wanted):
    """(D [D, N] after all edits, J after each): every edit of one key asks for `wanted` there, as z - current z does."""
    change, lengths = torch.zeros(HIDDEN, NEURONS, dtype=torch.float64), []
    for t, mask in enumerate(masks):
        key = keys[:, t, None]
        residual = wanted[:, t, None] - change @ key
        if isinstance(solver, CompensatedSolver):
            right, outputs, owed = solver.compensated(key, change, mask)
            solver.append(solver.remembered(key, residual, change))
            change = change + residual @ right.T + outputs @ owed.T
        else:
            right = solver.directions(key, mask)
            solver.append(key)
            change = change + residual @ right.T
        lengths.append(objective(solver, change, keys[:, : t + 1], wanted[:, : t + 1]))
    return change, lengths


def objective(solver, change, keys, wanted):
    basis = getattr(solver, "basis", getattr(solver, "row_space", None))
    soft = 0 if solver.strength is None else (change @ basis * solver.strength.sqrt()).square().sum()
    return ((change @ keys - wanted).square().sum() + L2 * change.square().sum() + soft).item()


@pytest.fixture(params=["hard", "soft"])
def case(request):
    """(basis, strength or None, keys that resemble each other, wanted, masks of 60 % of the neurons)."""
    basis, strength = space(NEURONS, 12, spread=2.0)
    keys = 0.6 * normal(NEURONS, 1, seed=3) + normal(NEURONS, EDITS, seed=4)
    masks = torch.rand(EDITS, NEURONS, generator=torch.Generator().manual_seed(6)) < 0.6
    return basis, strength if request.param == "soft" else None, keys, normal(HIDDEN, EDITS, seed=5), masks.double()


def test_the_update_is_the_least_that_its_neurons_reach(case, monkeypatch):
    """Against the equation in the module's words, with all of the stream's directions made up for."""
    monkeypatch.setattr(compensated, "CARRIED", HIDDEN)
    basis, strength, keys, wanted, masks = case
    solver = CompensatedSolver(basis, L2, strength)
    before, _ = made(solver, masks[:-1], keys[:, :-1], wanted[:, :-1])
    rows, key = masks[-1] != 0, keys[:, -1:]
    right, outputs, owed = solver.compensated(key, before, masks[-1])
    residual = wanted[:, -1:] - before @ key
    found = residual @ right.T + outputs @ owed.T
    weight = L2 * torch.eye(NEURONS) if strength is None else L2 * torch.eye(NEURONS) + basis * strength @ basis.T
    q = torch.linalg.qr(basis[rows]).Q if strength is None else basis[rows][:, :0]
    p = torch.eye(int(rows.sum())) - q @ q.T
    owing = residual @ key[rows].T + (wanted - before @ keys)[:, :-1] @ keys[rows, :-1].T - (before @ weight.double())[:, rows]
    gram = keys[rows] @ keys[rows].T
    expected = torch.linalg.solve(p @ gram @ p + weight[rows][:, rows].double(), p @ owing.T).T
    assert (found[:, rows] - expected).norm() < 1e-6 * expected.norm() and not found[:, ~rows].any()
    assert not torch.allclose(expected, (residual @ right.T)[:, rows], rtol=0.05)  # the history is no small part
    if strength is None:
        assert ((before + found) @ basis).norm() < 1e-6


def test_with_all_neurons_every_form_is_alphaedits(case):
    basis, strength, keys, wanted, _ = case
    masks = torch.ones(EDITS, NEURONS, dtype=torch.float64)
    kinds = (NullSpaceSolver, RestrictedSolver, CompensatedSolver)
    whole, *others = (made(kind(basis, L2, strength), masks, keys, wanted)[0] for kind in kinds)
    assert all((other - whole).norm() < 1e-6 * whole.norm() for other in others)
    at_once = wanted @ NullSpaceSolver(basis, L2, strength).directions(keys).T
    assert (at_once - whole).norm() < 1e-6 * whole.norm()


def test_past_values_come_nearer_to_their_targets_than_by_other_forms(case):
    basis, strength, keys, wanted, masks = case
    forms = {"published": NullSpaceSolver, "restricted": RestrictedSolver, "compensated": CompensatedSolver}
    ends = {name: made(kind(basis, L2, strength), masks, keys, wanted) for name, kind in forms.items()}
    misses = {name: (change @ keys - wanted).norm().item() for name, (change, _) in ends.items()}
    whole, _ = made(NullSpaceSolver(basis, L2, strength), torch.ones_like(masks), keys, wanted)
    assert misses["compensated"] < 0.8 * misses["restricted"] and misses["compensated"] < 0.8 * misses["published"], misses
    far = {name: (change - whole).norm().item() for name, (change, _) in ends.items()}
    assert far["compensated"] < 0.8 * min(far["restricted"], far["published"]), far
    made_up = [b - a for a, b in zip(*(ends[name][1] for name in ("compensated", "restricted")), strict=True)]
    assert min(made_up) > -1e-9 and made_up[-1] > 0  # J is never above


def test_columns_without_what_was_wanted_are_refused():
    solver = CompensatedSolver(space(7, 3)[0], 0.3)
    with pytest.raises(ValueError, match=r"columns must be \[more than 7, k\]"):
        solver.append(normal(7, 2, seed=1))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        solver.append(torch.full((9, 1), torch.nan))


def missed(editor):
    """(mean ||V - D K|| over the edits' keys in the last block, mean ||V||, ||D||), all by what the log says."""
    name = ModelView(editor.model).weight_name(editor.hparams.layers[-1])
    whole, done, wanted = editor.state.weights.change(name), 0, []
    keys = torch.cat([call.keys[1][:96] for call in editor.state.log], 1).double()
    for call, key in zip(editor.state.log, keys.T, strict=True):
        (update,) = of_parameter(call.updates, name)
        wanted.append(update.left[:, 0].double() + done @ key if len(wanted) else update.left[:, 0].double())
        done = done + update.left.double() @ update.right.double()
    assert (whole - done).norm() < 1e-5 * whole.norm()
    wanted = torch.stack(wanted, 1)
    return (whole @ keys - wanted).norm(dim=0).mean().item(), wanted.norm(dim=0).mean().item(), whole.norm().item()


def test_in_a_model_the_values_of_past_keys_are_nearer_to_their_targets(tiny, nmke_hparams, requests):
    records, ends = requests(10), {}
    chosen = {"L2": 0.3, "regularizer": "covariance", "mom2_update_weight": 10.0}
    for solve in ("full", "restricted", "compensated", "all"):
        model, tok = tiny("llama")
        values = {"neurons": "all"} if solve == "all" else {"solve": solve, "control": "random", "ratio": "fixed"}
        editor = LifelongEditor.from_hparams(nmke_hparams(
            model, tok, **values, **chosen, nullspace_threshold=1.0, attribution_strategy="mpc", mask_ties="exact",
            v_num_grad_steps=2,
        ))  # fmt: skip
        for record in records:
            editor.apply([record])
        ends[solve] = missed(editor)
        columns = [len(update.right) for update in editor.state.events[-1].updates]
        assert columns == [1, 1 + compensated.CARRIED if solve == "compensated" else 1]
    misses = {solve: miss / wanted for solve, (miss, wanted, _) in ends.items()}
    assert misses["compensated"] < 0.7 * misses["restricted"] and misses["compensated"] < 0.5 * misses["full"], misses
    assert misses["compensated"] < 2 * misses["all"], misses
    assert ends["compensated"][2] < ends["restricted"][2]  # by a smaller change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_later_pass_writes_what_is_left_and_pays_no_debt_again(tiny, nmke_hparams, requests, dtype):
    """The second pass has the columns of its requests alone; each edit's value is nearer by it, and the change hardly larger."""
    chosen = {
        "solve": "compensated",
        "attribution_strategy": "mpc",
        "regularizer": "covariance",
        "mom2_update_weight": 10.0,
        "L2": 3.0,
    }
    left, sizes = {}, {}
    for passes in (1, 2):
        model, tok = tiny("llama")
        model.to(dtype)
        hparams = nmke_hparams(model, tok, **chosen, nullspace_threshold=1.0, ratio="fixed", mask_ties="exact", write_passes=passes)
        editor, left[passes] = LifelongEditor.from_hparams(hparams), []
        view = ModelView(model)
        for record in requests(6):
            editor.apply([record])
            (edit,) = editor.state.events[-1:]
            asked = [Request.from_dict(record)]
            _, now = key_and_value(view, tok, asked, Contexts([["{}"]]), 1, 1)
            left[passes].append((edit.z - now).norm().item())
        columns = [len(update.right) for update in of_parameter(edit.updates, view.weight_name(1))]
        assert columns == [1 + compensated.CARRIED, 1][:passes], columns
        sizes[passes] = editor.state.weights.change(view.weight_name(1)).norm().item()
    assert sum(left[2]) < 0.4 * sum(left[1]), left
    assert sizes[2] < 1.2 * sizes[1], sizes


def test_without_a_mask_the_model_gets_alphaedits_weights(tiny, nmke_hparams, requests, monkeypatch):
    ends = []
    for solve in ("full", "restricted", "compensated"):
        model, tok = tiny("llama")
        monkeypatch.setattr(nmke, "neuron_masks", lambda *_: dict.fromkeys((0, 1), EVERY))
        editor = LifelongEditor.from_hparams(nmke_hparams(model, tok, solve=solve, v_num_grad_steps=2))
        for record in requests(4):
            editor.apply([record])
        ends.append([change(editor, layer) for layer in (0, 1)])
    model, tok = tiny("llama")
    editor = LifelongEditor.from_hparams(nmke_hparams(model, tok, neurons="all", v_num_grad_steps=2))
    for record in requests(4):
        editor.apply([record])
    for layer in (0, 1):
        whole = change(editor, layer)
        assert all((end[layer] - whole).norm() < 1e-4 * whole.norm() for end in ends)


EVERY = NeuronMask(torch.ones(96), torch.ones(96, dtype=torch.bool), torch.ones(96, dtype=torch.bool), 1.0, 1.0)


def change(editor, layer):
    return editor.state.weights.change(ModelView(editor.model).weight_name(layer))
