"""The other methods: each against the same thing done plainly, and the promises that all of them share."""

import copy
import dataclasses

import pytest
import torch

from easyedit_nmke import LifelongEditor, methods
from easyedit_nmke.experiments import protocol
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods import contract, ft, kne, locft, rome, values
from easyedit_nmke.methods import located as editor
from easyedit_nmke.methods.keys import Ascent
from easyedit_nmke.methods.solver import CovarianceSolver
from easyedit_nmke.methods.values import Value
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.prompts import position_before, target_tokens, tokenised_all
from easyedit_nmke.models.requests import Request
from easyedit_nmke.statistics import covariance, nullspace

LOCATED = ["AlphaEdit", "MEMIT", "ROME"]
METHODS = [*LOCATED, "FT", "LocFT-BF", "UltraEdit", "KNE"]
SHORT = {
    "AlphaEdit": dict(nullspace_threshold=0.3, L2=0.1),
    "MEMIT": dict(mom2_update_weight=2.0),
    "ROME": dict(layers=[1], context_template_length_params=[[3, 5], [4, 10]]),
    "FT": dict(num_steps=3, lr=1e-2, norm_constraint=0.015),
    "LocFT-BF": dict(num_steps=3, lr=1e-2, batch_size=2),
    "UltraEdit": dict(lr=1e-2),
    "KNE": dict(num_steps=2, lr=1e-2, attribution_steps=1),
}
INNER = {"gpt2": ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]}


@pytest.fixture
def settings(tmp_path):
    """settings(method, model, tok, **overrides) -> hyperparameters for short edits of a small model on the CPU."""

    def make(method, model, tok, **overrides):
        shared = dict(model_name=(model, tok), layers=[0, 1], device="cpu")
        if method == "UltraEdit":
            names = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
            shared |= dict(inner_params=INNER.get(model.config.model_type, names))
        if method in LOCATED:
            shared |= dict(
                v_num_grad_steps=4, v_lr=0.5, mom2_dataset="atlas", mom2_n_samples=200, stats_dir=str(tmp_path / "stats")
            )
        return methods.method_named(method).hparams(**{**shared, **SHORT[method], **overrides})

    return make


def fingerprints(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def states_at(model, tok, module, request, template, side):
    """What `module` takes in or puts out at the subject's last token, for one prompt without padding."""
    text, end = request.fill(template)
    seen = []
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(**tok(text, return_tensors="pt"), use_cache=False)
    handle.remove()
    return seen[0][0, position_before(tok, text, end)].double()


def relative(found, expected, start):
    return ((found - expected).norm() / (expected - start).norm()).item()


# ---- each method against the dense equations in float64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 3])
def test_memit_is_the_dense_equation(tiny, settings, requests, monkeypatch, kind, count):
    model, tok = tiny(kind)
    chosen = settings("MEMIT", model, tok)
    state = methods.open_state(model, tok, chosen)
    moments = covariance.moments(ModelView(model), tok, chosen)
    other, start = copy.deepcopy(model), ModelView(copy.deepcopy(model))
    z = torch.randn(32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(editor, "target_values", lambda *_: [Value(z, 0.0, 1)])
    view, batch = ModelView(other), [Request.from_dict(r) for r in requests(2 * count)]
    for some in (batch[:count], batch[count:]):
        for index, layer in enumerate(chosen.layers):
            keys = []
            for request in some:
                means = [
                    torch.stack([states_at(other, tok, view.down(layer), request, t, "input") for t in group]).mean(0)
                    for group in state.templates
                ]
                keys.append(torch.stack(means).mean(0))
            k = torch.stack(keys, 1)
            current = torch.stack([states_at(other, tok, view.blocks[1], request, "{}", "output") for request in some], 1)
            r = (z.double()[:, None] - current) / (len(chosen.layers) - index)
            left = chosen.mom2_update_weight * moments[layer].double() + k @ k.T
            view.w_out(layer).add_((r @ torch.linalg.solve(left, k).T).float())
        methods.apply_memit_to_model(model, tok, some, chosen, state=state)
    for layer in chosen.layers:
        assert relative(ModelView(model).w_out(layer), view.w_out(layer), start.w_out(layer)) < 1e-4
    assert state.edits == 2 and all(solver.count == 0 for solver in state.solvers.values())


@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_rome_is_the_rank_one_equation(tiny, settings, requests, monkeypatch, kind, adjusted):
    model, tok = tiny(kind)
    chosen = settings("ROME", model, tok, mom2_adjustment=adjusted)
    state = methods.open_state(model, tok, chosen)
    assert [len(group) for group in state.templates] == [16] and set(state.solvers) == ({1} if adjusted else set())
    request, start = Request.from_dict(requests(1)[0]), ModelView(copy.deepcopy(model))
    z = torch.randn(32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(rome, "target_values", lambda *_, **__: [Value(z, 0.0, 1)])
    view = ModelView(model)
    keys = torch.stack([states_at(model, tok, view.down(1), request, t, "input") for t in state.flat_templates])
    u = keys.mean(0)
    if adjusted:
        u = torch.linalg.solve(covariance.moments(view, tok, chosen)[1].double(), u)
    u = u / u.norm()
    v = (z.double() - states_at(model, tok, view.down(1), request, "{}", "output")) / (keys[0] @ u)
    expected = start.w_out(1).double() + torch.outer(v, u)
    methods.apply_rome_to_model(model, tok, [request], chosen, state=state)
    assert relative(view.w_out(1).double(), expected, start.w_out(1).double()) < 1e-4
    written = states_at(model, tok, view.down(1), request, "{}", "output")
    assert torch.allclose(written.float(), z, atol=1e-3), "the bare prompt's key gives z"


def test_romes_value_is_that_of_the_ffn(tiny, settings):
    """The same δ would move block or FFN alike; what differs is the norm that it is held to."""
    model, tok = tiny("llama")
    view, request = ModelView(model), Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome and")
    chosen = settings("ROME", model, tok, clamp_norm_factor=0.1, v_num_grad_steps=9)
    z = values.target_values(view, tok, [request], ["{}"], 1, chosen, part="ffn")[0].z
    z0 = states_at(model, tok, view.down(1), request, "{}", "output").float()
    assert (z - z0).norm().item() == pytest.approx(0.1 * z0.norm().item(), rel=1e-3)
    block = values.target_values(view, tok, [request], ["{}"], 1, chosen)[0].z
    whole = states_at(model, tok, view.blocks[1], request, "{}", "output").float()
    assert (block - whole).norm().item() == pytest.approx(0.1 * whole.norm().item(), rel=1e-3) and whole.norm() > 1.5 * z0.norm()


@pytest.mark.parametrize("objective", ["prompt_last", "target_new"])
@pytest.mark.parametrize("limit", [False, 0.015])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ft_is_plain_adam_on_the_model_itself(tiny, settings, requests, kind, limit, objective):
    model, tok = tiny(kind)
    chosen = settings("FT", model, tok, norm_constraint=limit, objective_optimization=objective, weight_decay=0.1, batch_size=2)
    batch = [Request.from_dict(r) for r in requests(3)]
    other = copy.deepcopy(model)
    trained = {name: other.get_parameter(name) for name in ft.writes(ModelView(other), chosen)}
    assert len(trained) == (4 if kind == "gpt2" else 2), "GPT-2's output projection has a bias"
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.Adam(trained.values(), lr=chosen.lr, weight_decay=chosen.weight_decay)
    for _ in range(chosen.num_steps):
        for some in (batch[:2], batch[2:]):
            losses = []
            for request in some:
                target = target_tokens(tok, request.prompt, request.target_new)
                ids = tok(request.prompt)["input_ids"]
                fed = torch.tensor([ids if objective == "prompt_last" else ids + target])
                log_probs = other(input_ids=fed).logits[0].log_softmax(-1)
                at = [len(ids) - 1 + (0 if objective == "prompt_last" else i) for i in range(len(target))]
                losses.append(-torch.stack([log_probs[p, w] for p, w in zip(at, target, strict=True)]).mean())
            other.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
            if limit:
                with torch.no_grad():
                    for name, p in trained.items():
                        p.clamp_(start[name] - limit, start[name] + limit)
    _, before = methods.apply_ft_to_model(model, tok, batch, chosen, return_orig_weights=True)
    for name, expected in trained.items():
        found = model.get_parameter(name)
        assert torch.equal(before[name], start[name])
        assert torch.allclose(found, expected, atol=2e-4), name
        assert not torch.allclose(found, start[name], atol=5e-3)
        assert not limit or (found - start[name]).abs().max() <= limit * 1.0001
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_ft_moves_float32_copies_of_float16_weights(tiny, settings, requests, monkeypatch):
    """Adam's second moments are 0 in float16 itself. On a CPU, where an editor refuses float16."""
    monkeypatch.setattr(contract, "check_model", lambda *_: None)
    ends, moved = {}, {}
    for dtype in (torch.float32, torch.float16):
        model, tok = tiny("llama")
        model.to(dtype)
        view, name = ModelView(model), ModelView(model).weight_name(1)
        before = view.matrix(name).float().clone()
        methods.apply_ft_to_model(model, tok, requests(2), settings("FT", model, tok))
        ends[dtype], moved[dtype] = view.matrix(name).float(), (view.matrix(name).float() - before).abs()
    assert moved[torch.float16].max() <= 0.015 + 1e-3
    assert (ends[torch.float16] - ends[torch.float32]).norm() < 0.1 * moved[torch.float32].norm()


@pytest.mark.parametrize("method", ["FT", "LocFT-BF", "UltraEdit", "KNE"])
def test_a_subject_that_is_not_needed_and_cannot_be_used_is_left_out(tiny, settings, method, caplog):
    model, tok = tiny("llama")
    editor = LifelongEditor.from_hparams(settings(method, model, tok))
    before = fingerprints(model)
    editor.apply([{"prompt": "Paris is the twin city of Paris in", "subject": "Paris", "target_new": "Rome"}])
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert "subject 'Paris' is 2 times in the prompt" in caplog.text and "it is left out" in caplog.text


def test_ft_stops_when_the_loss_is_small(atlas, settings, requests, monkeypatch):
    model, tok = atlas
    calls, loss_of = [], ft.target_loss
    monkeypatch.setattr(ft, "target_loss", lambda *args: calls.append(1) or loss_of(*args))
    chosen = settings("FT", model, tok, layers=[2], num_steps=100, lr=2e-3, norm_constraint=False)
    methods.apply_ft_to_model(model, tok, requests(1), chosen)
    assert 3 < len(calls) < 100 and model.nmke_state.reports[0].value_loss[0] < 1e-2
    calls.clear()
    before = fingerprints(model)
    methods.apply_ft_to_model(model, tok, requests(1), chosen)
    assert len(calls) == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_alphaedit_is_nmke_without_its_mask(tiny, settings, nmke_hparams, requests, weights, count):
    results = []
    for method in ("AlphaEdit", "NMKE"):
        model, tok = tiny("llama")
        chosen = settings(method, model, tok) if method == "AlphaEdit" else nmke_hparams(model, tok, neurons="all")
        for start in range(0, 4, count):
            methods.apply_to_model(model, tok, requests(4)[start : start + count], chosen)
        assert model.nmke_state.solvers[0].count == 4
        results.append(weights(model, chosen))
    assert all(torch.equal(results[0][layer], results[1][layer]) for layer in results[0])


# ---- the solver and the statistics


@pytest.mark.parametrize(("neurons", "keys"), [(1, 1), (7, 1), (63, 5), (63, 80)])
def test_the_covariance_solver_is_the_dense_solve(neurons, keys):
    generator = torch.Generator().manual_seed(neurons)
    a = torch.randn(neurons, 2 * neurons, generator=generator, dtype=torch.float64)
    moment, k = a @ a.T, torch.randn(neurons, keys, generator=generator, dtype=torch.float64)
    r = torch.randn(5, keys, generator=generator, dtype=torch.float64)
    mask = (torch.arange(neurons) % 2).double()
    expected = torch.linalg.solve(3 * moment + k @ k.T, k @ r.T).T
    solver = CovarianceSolver(moment, 3)
    assert torch.allclose(solver.update(k, r), expected, rtol=1e-8, atol=1e-12)
    assert torch.allclose(solver.update(k, r, mask), expected * mask, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(CovarianceSolver(moment, 3.01).update(k, r), expected, rtol=1e-4, atol=1e-12)
    assert torch.allclose(solver.solve(k), torch.linalg.solve(3 * moment, k))


def test_a_covariance_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match=r"too few tokens for 4 neurons; raise mom2_n_samples"):
        CovarianceSolver(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"moment must be \[neurons, neurons\]"):
        CovarianceSolver(torch.ones(4, 3))
    with pytest.raises(ValueError, match="NaN"):
        CovarianceSolver(torch.full((4, 4), float("nan")))
    with pytest.raises(ValueError, match="keys must be"):
        CovarianceSolver(torch.eye(4)).update(torch.ones(3, 1), torch.ones(2, 1))


def test_moments_are_cached_and_serve_row_spaces(tiny, settings, monkeypatch):
    model, tok = tiny("llama")
    view = ModelView(model)
    first = covariance.moments(view, tok, settings("MEMIT", model, tok), progress=False)
    alone = nullspace.row_space(first[0], 0.3).basis
    monkeypatch.setattr(covariance, "key_sums", lambda *_: pytest.fail("computed again"))
    again = covariance.moments(view, tok, settings("MEMIT", model, tok, mom2_update_weight=7.0), progress=False)
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert torch.equal(nullspace.row_spaces(view, tok, settings("AlphaEdit", model, tok), progress=False)[0].basis, alone)
    with pytest.raises(pytest.fail.Exception):
        covariance.moments(view, tok, settings("MEMIT", model, tok, mom2_n_samples=100), progress=False)


# ---- the promises that all methods share


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_an_edit_writes_its_parameters_only_and_says_what_they_were(tiny, settings, requests, method, kind):
    model, tok = tiny(kind)
    model.train()
    before = fingerprints(model)
    copied, _ = methods.apply_to_model(model, tok, requests(2), settings(method, model, tok), copy=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    edited, originals = methods.apply_to_model(model, tok, requests(2), settings(method, model, tok), return_orig_weights=True)
    assert edited is model and model.training
    for name, parameter in model.named_parameters():
        nothing = method == "KNE" and not before[name].any()  # what is zero has no part in an answer, so it is never chosen
        assert torch.equal(parameter, before[name]) == (name not in originals or nothing), name
        assert name not in originals or torch.equal(originals[name], before[name])
        assert torch.equal(parameter, copied.get_parameter(name))
    assert methods.apply_to_model(model, tok, requests(1), settings(method, model, tok))[1] == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_leaves_weights_and_state_as_they_were(tiny, settings, requests, monkeypatch, method):
    model, tok = tiny("llama")
    chosen = settings(method, model, tok)
    methods.apply_to_model(model, tok, requests(1), chosen)
    before, state = fingerprints(model), model.nmke_state
    where = {"AlphaEdit": (LifelongState, "write"), "MEMIT": (Ascent, "__call__"), "ROME": (rome, "subject_states")}
    where |= {"LocFT-BF": (locft, "target_loss"), "KNE": (kne, "target_loss"), "UltraEdit": (LifelongState, "write")}
    place, name = where.get(method, (ft, "_clamp"))
    real, calls = getattr(place, name), []

    def second_time(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, second_time)
    with pytest.raises(MemoryError):
        methods.apply_to_model(model, tok, requests(3)[1:], chosen)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and state.edits == 1
    monkeypatch.undo()
    methods.apply_to_model(model, tok, requests(3)[1:], chosen)
    assert state.edits == 2


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_edited_is_refused_before_anything_changes(tiny, settings, requests, method):
    model, tok = tiny("llama")
    before, chosen = fingerprints(model), settings(method, model, tok)
    needed = methods.method_named(method).needs_subject
    for bad in ([], [{**requests(1)[0], "subject": "Nobody"}])[: 1 + needed]:
        with pytest.raises(ValueError, match=r"no request|not in the prompt"):
            methods.apply_to_model(model, tok, bad, chosen)
    other = dict(layers=[7]) | ({"inner_params": ["model.layers.7.mlp.up_proj"]} if method == "UltraEdit" else {})
    with pytest.raises(ValueError, match="do not exist"):
        methods.apply_to_model(model, tok, requests(1), dataclasses.replace(chosen, **other))
    chosen.batch_size = 0
    with pytest.raises(ValueError, match="batch_size is 0"):
        methods.apply_to_model(model, tok, requests(1), chosen)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not hasattr(model, "nmke_state")


def test_a_method_refuses_the_hyperparameters_of_another(tiny, settings, requests):
    model, tok = tiny("llama")
    with pytest.raises(ValueError, match="hparams is MEMITHyperParams, expected ROMEHyperParams"):
        methods.apply_rome_to_model(model, tok, requests(1), settings("MEMIT", model, tok))
    with pytest.raises(ValueError, match="hparams is FTHyperParams, expected NMKEHyperParams"):
        methods.apply_nmke_to_model(model, tok, requests(1), settings("FT", model, tok))
    state = methods.open_state(model, tok, settings("FT", model, tok))
    with pytest.raises(ValueError, match="alg_name 'FT' -> 'ROME'"):
        methods.apply_rome_to_model(model, tok, requests(1), settings("ROME", model, tok), state=state)


@pytest.mark.parametrize("method", METHODS)
def test_two_models_do_not_disturb_each_other_and_weights_put_back_leave_no_trace(tiny, settings, requests, method):
    def edit(kind, seed, numbers, undo=False):
        model, tok = tiny(kind, seed)
        for number in numbers:
            chosen = settings(method, model, tok)
            _, before = methods.apply_to_model(model, tok, [requests(4)[number]], chosen, return_orig_weights=True)
            if undo and number == numbers[0]:
                with torch.no_grad():
                    for name, value in before.items():
                        model.get_parameter(name).copy_(value)
            yield model

    together = zip(edit("llama", 0, [0, 1, 2], undo=True), edit("qwen2", 1, [3, 1, 0]), strict=True)
    one, two = list(together)[-1]
    *_, alone = edit("llama", 0, [1, 2])
    *_, other = edit("qwen2", 1, [3, 1, 0])
    for found, expected in ((one, alone), (two, other)):
        assert all(torch.equal(p, expected.get_parameter(name)) for name, p in found.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_lifelong_editor_takes_every_method(tiny, settings, requests, method, tmp_path):
    model, tok = tiny("gpt2")
    some = LifelongEditor.from_hparams(settings(method, model, tok))
    for request in requests(2):
        some.apply([request])
    assert some.state.edits == 2 and set(some.state.reports[0].density) == set(some.hparams.layers)
    assert protocol.stamp(some)["method"] == method
    protocol.save_edited(some, tmp_path / "edited.safetensors")
    results, _, before = some.edit([], [], requests=requests(1), sequential_edit=False, verbose=False)
    assert len(results) == 1 and set(before) == set(some.method.matrices(model, some.hparams))


@pytest.mark.parametrize("method", METHODS)
def test_an_end_token_is_learnt_with_every_method_and_nobody_else_sees_it(tiny, settings, requests, monkeypatch, method):
    (model, tok), seen = tiny("llama"), []
    chosen = settings(method, model, tok, target_eos=True)
    record = methods.method_named(method)
    spied = dataclasses.replace(
        record, edit=lambda view, tok, some, *rest: seen.append(some) or record.edit(view, tok, some, *rest)
    )
    for target in ("Rome", "Rome" + tok.eos_token):
        contract.apply_method(spied, model, tok, [{**requests(1)[0], "target_new": target}], chosen)
    assert [request.target_new for some in seen for request in some] == ["Rome" + tok.eos_token] * 2
    log = [request["target_new"] for edit in model.nmke_state.log for request in edit.requests]
    assert log == ["Rome", "Rome" + tok.eos_token] and chosen.to_dict()["target_eos"] is True
    read = tokenised_all(tok, [("The capital is", None, "Rome" + tok.eos_token)])[0]
    assert read.labels[-1] == tok.eos_token_id and read.labels[:-1] == target_tokens(tok, "The capital is", "Rome")
    plain, _ = tiny("llama")
    methods.apply_to_model(plain, tok, requests(1), settings(method, plain, tok, target_eos=False))
    ended, _ = tiny("llama")
    methods.apply_to_model(ended, tok, requests(1), settings(method, ended, tok, target_eos=True))
    assert not all(torch.equal(p, ended.get_parameter(n)) for n, p in plain.named_parameters())
    tok.eos_token = None
    with pytest.raises(ValueError, match="target_eos is set, but the tokenizer has no end token"):
        methods.apply_to_model(model, tok, requests(1), chosen)
