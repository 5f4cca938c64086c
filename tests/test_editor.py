"""One edit: what it writes, what it leaves alone, and what it refuses before anything changes."""

import copy
import dataclasses

import pytest
import torch

from easyedit_nmke import LifelongEditor, apply_nmke_to_model, facts, methods
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods import located as editor
from easyedit_nmke.methods import nmke
from easyedit_nmke.methods.keys import Ascent, Contexts, key_and_value, keys_of
from easyedit_nmke.methods.solver import NullSpaceSolver
from easyedit_nmke.methods.values import Value, target_values
from easyedit_nmke.models.arch import FAMILIES, ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.statistics import covariance


def fingerprints(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_writes_the_masked_rows_of_the_edited_layers_only(tiny, nmke_hparams, requests, kind):
    model, tok = tiny(kind)
    settings = nmke_hparams(model, tok)
    before = fingerprints(model)
    edited, originals = apply_nmke_to_model(model, tok, requests(1), settings, return_orig_weights=True)
    assert edited is model
    view = ModelView(model)
    masks = nmke.neuron_masks  # the mask of the edit is that of the unedited model
    fresh = tiny(kind)[0]
    flat = [t for group in model.nmke_state.templates for t in group]
    expected = masks(ModelView(fresh), tok, [Request.from_dict(r) for r in requests(1)], flat, settings)
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (name in originals), name
    for layer in settings.layers:
        assert torch.equal(originals[view.weight_name(layer)], before[view.weight_name(layer)])
        difference = view.w_out(layer) - ModelView(fresh).w_out(layer)
        assert torch.equal(difference.abs().sum(0) > 0, expected[layer].mask.bool())
        assert 0.3 < expected[layer].density < 1


@pytest.mark.parametrize("limits", [{}, {"nullspace_fraction": 0.3}], ids=["row space", "null basis"])
def test_the_update_is_the_dense_equation_with_the_mask(tiny, nmke_hparams, requests, monkeypatch, limits):
    """Three edits in a row against AlphaEdit's formula, solved densely in float64, layer by layer."""
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok, **limits)
    state = methods.open_state(model, tok, settings)
    other = copy.deepcopy(model)
    z = torch.randn(32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(editor, "target_values", lambda *_: [Value(z, 0.0, 1)])
    past = {layer: torch.zeros(96, 0, dtype=torch.float64) for layer in settings.layers}
    for record in requests(3):
        request = [Request.from_dict(record)]
        view = ModelView(other)
        masks = nmke.neuron_masks(view, tok, request, [t for g in state.templates for t in g], settings)
        for index, layer in enumerate(settings.layers):
            keys, current = key_and_value(view, tok, request, Contexts(state.templates), layer, settings.layers[-1])
            basis = state.solvers[layer].basis.double()
            assert state.solvers[layer].null == bool(limits)
            projector = basis @ basis.T if state.solvers[layer].null else torch.eye(96, dtype=torch.float64) - basis @ basis.T
            k, r = keys.double(), (z[:, None] - current).double() / (len(settings.layers) - index)
            left = projector @ (k @ k.T + past[layer] @ past[layer].T) + settings.L2 * torch.eye(96, dtype=torch.float64)
            update = torch.linalg.solve(left, projector @ k @ r.T)
            view.w_out(layer).add_((masks[layer].mask.double()[:, None] * update).T.float())
        for layer, keys in keys_of(view, tok, request, Contexts(state.templates), settings.layers).items():
            past[layer] = torch.cat([past[layer], keys.double()], 1)
        apply_nmke_to_model(model, tok, request, settings, state=state)
    for layer in settings.layers:
        found, expected = ModelView(model).w_out(layer), ModelView(other).w_out(layer)
        start = ModelView(tiny("llama")[0]).w_out(layer)
        assert (found - expected).norm() < 1e-5 * (expected - start).norm()


def test_copy_edits_a_copy_and_both_can_be_edited_on(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok)
    before = fingerprints(model)
    first, _ = apply_nmke_to_model(model, tok, requests(1), settings, copy=True)
    assert_same_bits(model, before)
    assert not torch.equal(ModelView(first).weight(0), ModelView(model).weight(0))
    second, _ = apply_nmke_to_model(first, tok, requests(2)[1:], settings, copy=True)
    assert (first.nmke_state.edits, second.nmke_state.edits) == (1, 2)


def test_a_copy_is_not_kept_on_disk(tiny, nmke_hparams, requests, tmp_path):
    """Refused before anything: no folder is made, the journal of the model itself is not touched, and it can be edited on."""
    model, tok = tiny("llama")
    before, kept = fingerprints(model), nmke_hparams(model, tok, state_dir=str(tmp_path / "state"))
    with pytest.raises(ValueError, match="copy=True cannot be had with edits that are kept on disk"):
        apply_nmke_to_model(model, tok, requests(1), kept, copy=True)
    assert_same_bits(model, before)
    assert not (tmp_path / "state").exists() and not hasattr(model, "nmke_state")
    apply_nmke_to_model(model, tok, requests(1), kept)
    before, files = fingerprints(model), {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    for state in (None, model.nmke_state):
        with pytest.raises(ValueError, match="copy=True cannot be had"):
            apply_nmke_to_model(model, tok, requests(2)[1:], kept, copy=True, state=state)
    assert_same_bits(model, before)
    assert files == {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    apply_nmke_to_model(model, tok, requests(2)[1:], kept)
    assert model.nmke_state.edits == 2
    model.nmke_state.book.close()


def test_weights_put_back_leave_no_trace(tiny, nmke_hparams, requests, weights):
    one, two = requests(2)
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok)
    _, originals = apply_nmke_to_model(model, tok, [one], settings, return_orig_weights=True)
    with torch.no_grad():
        for name, value in originals.items():
            model.get_parameter(name).copy_(value)
    apply_nmke_to_model(model, tok, [two], settings)
    fresh, _ = tiny("llama")
    apply_nmke_to_model(fresh, tok, [two], nmke_hparams(fresh, tok))
    for layer in settings.layers:
        assert torch.equal(weights(model, settings)[layer], weights(fresh, settings)[layer])
    assert model.nmke_state.edits == 1


def test_two_models_do_not_disturb_each_other(tiny, nmke_hparams, requests, weights):
    records = requests(4)
    (a, tok), (b, _) = tiny("llama", seed=0), tiny("qwen2", seed=1)
    for record in records:
        apply_nmke_to_model(a, tok, [record], nmke_hparams(a, tok))
        apply_nmke_to_model(b, tok, [record], nmke_hparams(b, tok))
    for kind, seed, model in (("llama", 0, a), ("qwen2", 1, b)):
        alone, _ = tiny(kind, seed=seed)
        for record in records:
            apply_nmke_to_model(alone, tok, [record], nmke_hparams(alone, tok))
        expected, found = weights(alone, nmke_hparams(alone, tok)), weights(model, nmke_hparams(model, tok))
        assert all(torch.equal(expected[layer], found[layer]) for layer in expected)


@pytest.mark.parametrize("point", ["values", "second layer", "memory"])
def test_a_failure_anywhere_leaves_weights_and_state_as_they_were(tiny, nmke_hparams, requests, monkeypatch, point):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok)
    apply_nmke_to_model(model, tok, requests(1), settings)
    before, state = fingerprints(model), model.nmke_state
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if point == "second layer" and len(calls) == 1:
            return passes(*args, **kwargs)
        raise MemoryError("out of memory")

    passes = Ascent.__call__
    places = {"values": (editor, "target_values"), "second layer": (Ascent, "__call__"), "memory": (NullSpaceSolver, "append")}
    monkeypatch.setattr(*places[point], fail)
    with pytest.raises(MemoryError):
        apply_nmke_to_model(model, tok, requests(2)[1:], settings)
    assert_same_bits(model, before)
    assert (state.edits, state.solvers[0].count) == (1, 1)
    monkeypatch.undo()
    apply_nmke_to_model(model, tok, requests(2)[1:], settings)
    assert state.edits == 2


@pytest.mark.parametrize("changes", [{}, {"solve": "restricted"}, {"regularizer": "covariance"}], ids=["full", "own", "soft"])
def test_a_cholesky_that_fails_leaves_weights_and_state_bit_for_bit(tiny, nmke_hparams, requests, monkeypatch, changes):
    """In the second layer, when the first is written already, and a second time when the past keys are to grow."""
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok, neurons="both", L2=30.0, **changes)
    apply_nmke_to_model(model, tok, requests(1), settings)
    before, state = fingerprints(model), model.nmke_state
    memory = {(i, name): t.clone() for i, solver in state.solvers.items() for name, t in solver.memory().items()}
    real, calls = torch.linalg.cholesky_ex, []
    for failing in (2, 3) if "solve" not in changes else (2,):

        def failed(matrix, failing=failing):
            calls.append(1)
            return real(-matrix if len(calls) == failing else matrix)

        calls.clear()
        monkeypatch.setattr(torch.linalg, "cholesky_ex", failed)
        with pytest.raises(FloatingPointError, match="no digits are left; raise L2"):
            apply_nmke_to_model(model, tok, requests(2)[1:], settings)
        assert len(calls) == failing
        assert_same_bits(model, before)
        assert state.edits == 1 and model.nmke_state is state
        now = {(i, name): t for i, solver in state.solvers.items() for name, t in solver.memory().items()}
        assert now.keys() == memory.keys() and all(torch.equal(now[key], memory[key]) for key in memory)
    monkeypatch.undo()
    apply_nmke_to_model(model, tok, requests(2)[1:], settings)
    assert state.edits == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_not_written(tiny, nmke_hparams, requests, monkeypatch, bad):
    model, tok = tiny("llama")
    before = fingerprints(model)
    directions = NullSpaceSolver.directions
    monkeypatch.setattr(NullSpaceSolver, "directions", lambda *args: directions(*args).index_fill(0, torch.tensor([2]), bad))
    with pytest.raises(FloatingPointError, match=r"layers\.0\.mlp\.down_proj\.weight is not finite"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert_same_bits(model, before)


def test_modes_gradients_and_random_state_are_left_alone(tiny, nmke_hparams, requests):
    model, tok = tiny("gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_padding_side_changes_nothing(tiny, nmke_hparams, requests, weights):
    results = []
    for side in ("left", "right"):
        model, tok = tiny("gpt2")
        tok.padding_side = side
        apply_nmke_to_model(model, tok, requests(2), nmke_hparams(model, tok))
        results.append(weights(model, nmke_hparams(model, tok)))
        assert tok.padding_side == side
    assert all(torch.equal(results[0][layer], results[1][layer]) for layer in results[0])


@pytest.mark.parametrize(
    "changes",
    [
        dict(attribution_strategy="psa"), dict(attribution_strategy="mpc"), dict(attribution_strategy="align"),
        dict(attribution_target="target_new"),
        dict(attribution_norm="exact"), dict(attribution_position="padded_end"), dict(neurons="general"), dict(neurons="specific"),
        dict(neurons="overlap"), dict(neurons="non_overlap"), dict(neurons="all"), dict(ratio="fixed"), dict(mask="soft"),
        dict(mask_ties="exact"), dict(attribution_backend="reference", attribution_norm="exact"),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)  # fmt: skip
def test_every_option_edits_and_differs_from_the_default(tiny, nmke_hparams, requests, weights, changes):
    results = []
    for some in ({}, changes):
        model, tok = tiny("llama")
        settings = nmke_hparams(model, tok, **some)
        apply_nmke_to_model(model, tok, requests(1), settings)
        results.append(torch.cat([w.flatten() for w in weights(model, settings).values()]))
    assert torch.isfinite(results[1]).all() and not torch.equal(results[0], results[1])


def test_the_reference_backend_gives_the_same_weights(tiny, nmke_hparams, requests, weights):
    results = []
    for backend in ("fast", "reference"):
        model, tok = tiny("qwen3")
        settings = nmke_hparams(model, tok, attribution_backend=backend)
        for record in requests(2):
            apply_nmke_to_model(model, tok, [record], settings)
        results.append(weights(model, settings))
    assert all(torch.equal(results[0][layer], results[1][layer]) for layer in results[0])


REFUSED = {
    "subject not in the prompt": (dict(subject="Nobody"), "not in the prompt"),
    "subject twice": (dict(prompt="Mara Vosk and Mara Vosk are", subject="Mara Vosk"), "2 times in"),
    "empty target": (dict(target_new=" "), "is empty"),
    "too long": (dict(prompt="Mara Vosk " + "is here and " * 60 + "is", subject="Mara Vosk"), "the model's context 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_before_anything_changes(tiny, nmke_hparams, requests, case):
    changes, message = REFUSED[case]
    model, tok = tiny("llama")
    before = fingerprints(model)
    with pytest.raises(ValueError, match=message):
        apply_nmke_to_model(model, tok, [requests(1)[0], {**requests(2)[1], **changes}], nmke_hparams(model, tok))
    assert_same_bits(model, before)
    assert not hasattr(model, "nmke_state")


def test_two_answers_to_one_prompt_in_a_batch_are_refused(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    one = requests(1)[0]
    with pytest.raises(ValueError, match=r"two answers to .* keep one of them"):
        apply_nmke_to_model(model, tok, [one, {**one, "target_new": "something else"}], nmke_hparams(model, tok))
    with pytest.raises(ValueError, match="no request"):
        apply_nmke_to_model(model, tok, [], nmke_hparams(model, tok))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_wherever_they_are(tiny, nmke_hparams, requests, name):
    model, tok = tiny("llama")
    with torch.no_grad():
        model.get_parameter(name)[3, 3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny, nmke_hparams, requests, value):
    model, tok = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))


def test_models_that_cannot_be_edited_are_refused(tiny, nmke_hparams, requests, monkeypatch):
    model, tok = tiny("llama")
    with pytest.raises(ValueError, match="float16 on a CPU"):
        apply_nmke_to_model(copy.deepcopy(model).half(), tok, requests(1), nmke_hparams(model, tok))
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok, layers=[0, 7]))
    with pytest.raises(ValueError, match="v_loss_layer is 9"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok, v_loss_layer=9))
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        apply_nmke_to_model(model.model, tok, requests(1), nmke_hparams(model, tok))
    with pytest.raises(ValueError, match="known types: llama"):
        apply_nmke_to_model(torch.nn.Linear(2, 2), tok, requests(1), nmke_hparams(model, tok))
    changed = nmke_hparams(model, tok)
    changed.neurons = "some"
    with pytest.raises(ValueError, match="neurons is 'some'"):
        apply_nmke_to_model(model, tok, requests(1), changed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        LifelongEditor.from_hparams(nmke_hparams(model, tok, device=0))


def test_a_state_of_other_settings_is_refused_and_a_carried_one_is_replaced(tiny, nmke_hparams, requests, caplog):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok)
    apply_nmke_to_model(model, tok, requests(1), settings)
    other = dataclasses.replace(settings, L2=5.0)
    with pytest.raises(ValueError, match=r"L2 0.1 -> 5.0"):
        apply_nmke_to_model(model, tok, requests(1), other, state=model.nmke_state)
    apply_nmke_to_model(model, tok, requests(2)[1:], other)
    assert "past keys are forgotten" in caplog.text and model.nmke_state.edits == 1


def test_bfloat16_models_are_edited(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    model = model.to(torch.bfloat16)
    before = fingerprints(model)
    apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert ModelView(model).weight(0).dtype == torch.bfloat16
    assert not torch.equal(ModelView(model).weight(0), before[ModelView(model).weight_name(0)])


@pytest.mark.parametrize("control", ["none", "random", "uniform"])
def test_controls_have_the_masks_density_or_the_masked_updates_norm(tiny, nmke_hparams, requests, weights, control):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok, control=control, mask_ties="exact")
    before = weights(model, settings)
    apply_nmke_to_model(model, tok, requests(1), settings)
    (report,) = model.nmke_state.reports
    reference, _ = tiny("llama")
    methods.apply_nmke_to_model(reference, tok, requests(1), nmke_hparams(reference, tok, mask_ties="exact"))
    layer = settings.layers[0]  # from the second on, the residual depends on the first
    change = weights(model, settings)[layer] - before[layer]
    masked = weights(reference, settings)[layer] - before[layer]
    touched, real = change.abs().sum(0) > 0, masked.abs().sum(0) > 0
    assert report.density[layer] == reference.nmke_state.reports[0].density[layer] < 1
    if control == "none":
        assert torch.equal(change, masked)
    elif control == "random":
        assert touched.sum() == real.sum() and not torch.equal(touched, real)
    else:
        assert touched.all() and change.norm() == pytest.approx(masked.norm().item(), rel=1e-3)


def test_a_soft_null_space_is_the_solution_of_its_equation(tiny, nmke_hparams, requests, monkeypatch):
    """One edit against (λ·U s Uᵀ + L2·E||Pc||²·I + K Kᵀ)⁻¹ K rᵀ, dense in float64, from the statistics themselves."""
    model, tok = tiny("llama")
    soft = dict(neurons="all", regularizer="covariance", l2_scale="auto", nullspace_fraction=0.25, mom2_update_weight=40.0)
    settings = nmke_hparams(model, tok, layers=[1], L2=2.0, **soft)
    view = ModelView(model)
    moment = covariance.moments(view, tok, settings)[1].double()
    values, vectors = torch.linalg.eigh(moment)
    kept = vectors[:, 24:]
    z = torch.randn(32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(editor, "target_values", lambda *_: [Value(z, 0.0, 1)])
    state = methods.open_state(model, tok, settings)
    request = [Request.from_dict(r) for r in requests(1)]
    keys, current = key_and_value(view, tok, request, Contexts(state.templates), 1, 1)
    keys, residual = keys.double(), (z - current[:, 0]).double()
    left = 40.0 * kept @ torch.diag(values[24:]) @ kept.T + 2.0 * values[:24].sum() * torch.eye(96) + keys @ keys.T
    expected = torch.outer(residual, torch.linalg.solve(left, keys[:, 0]))
    start = view.w_out(1).clone()
    apply_nmke_to_model(model, tok, request, settings, state=state)
    assert torch.allclose((view.w_out(1) - start).double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    with pytest.raises(ValueError, match="P_loc names a projector"):
        torch.save(torch.stack([torch.eye(96)]), settings.stats_dir + "/P.pt")
        methods.open_state(
            model, tok, nmke_hparams(model, tok, layers=[1], regularizer="covariance", P_loc=settings.stats_dir + "/P.pt")
        )


def test_anchored_values_have_the_norm_that_the_unedited_model_gives_them(tiny, nmke_hparams, requests, monkeypatch):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok, neurons="all", value_norm="anchored", value_norm_factor=0.5)
    view, state = ModelView(model), methods.open_state(model, tok, settings)
    solved = [
        target_values(view, tok, [Request(prompt, subject, new)], state.flat_templates, 1, settings)[0].z.norm()
        for prompt, subject, new in facts.calibration()
    ]
    assert state.value_norm == pytest.approx(0.5 * torch.stack(solved).mean().item(), rel=1e-3)
    seen, write = [], LifelongState.write

    def watch(state, update, report):
        seen.append(update.left)
        write(state, update, report)

    monkeypatch.setattr(LifelongState, "write", watch)
    request = [Request.from_dict(r) for r in requests(1)]
    _, current = key_and_value(view, tok, request, Contexts(state.templates), 0, 1)
    (free,) = target_values(view, tok, request, state.flat_templates, 1, settings)
    apply_nmke_to_model(model, tok, request, settings, state=state)
    wanted = free.z * (state.value_norm / free.z.norm())
    assert torch.allclose(seen[0][:, 0], (wanted - current[:, 0]) / 2, rtol=1e-3, atol=1e-4)
