"""The methods that NMKE is compared with, on its engine: AlphaEdit, MEMIT, ROME and FT.

Each has EasyEdit's calling convention and every promise of `edit.apply_method`. `apply_to_model` and `open_state` pick the
method by the hyperparameters' alg_name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.func import functional_call
from torch.nn.functional import log_softmax

from ..history.durable import Ground, opened
from ..history.log import EditReport, Undo, check_undo, standing
from ..history.state import LifelongState
from ..hparams import CLASSES, FTHyperParams, HyperParams, MEMITHyperParams, ROMEHyperParams
from ..models.arch import ModelView
from ..models.prompts import SUBJECT, Request, context_templates, encode, pad, target_tokens
from ..models.updates import Update
from ..models.weights import check_model, edited_parameters
from ..statistics.covariance import moments
from . import nmke as editor
from .contract import Opens, Writes, apply_method, phase, require, settings_of, write
from .keys import Contexts, subject_states
from .nmke import edit_layers
from .solver import CovarianceSolver
from .values import target_values

FT_LOSS_TO_STOP = 1e-2


# ---- MEMIT


def open_memit(model, tok, hparams: MEMITHyperParams, progress: bool = True) -> LifelongState:
    """Context templates, and per layer the covariance of the keys of the model as it is now, times `mom2_update_weight`."""
    return opened(_measure_memit, _build_memit, model, tok, hparams, progress)


def _measure_memit(view: ModelView, tok, hparams: MEMITHyperParams, progress: bool) -> Ground:
    templates = context_templates(view.model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)
    return Ground(templates, _named_by_layer(moments(view, tok, hparams, progress)))


def _build_memit(view: ModelView, ground: Ground, hparams: MEMITHyperParams) -> LifelongState:
    solvers = _covariance_solvers(view, ground, hparams.mom2_update_weight)
    return LifelongState(settings_of(hparams), solvers, ground.templates)


def _named_by_layer(tensors: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(layer): tensor for layer, tensor in tensors.items()}


def _covariance_solvers(view: ModelView, ground: Ground, weight: float = 1.0) -> dict[int, CovarianceSolver]:
    layers = sorted(map(int, ground.statistics))
    return {layer: CovarianceSolver(ground.statistics[str(layer)].to(view.weight(layer).device), weight) for layer in layers}


# ---- ROME


def open_rome(model, tok, hparams: ROMEHyperParams, progress: bool = True) -> LifelongState:
    """Context templates of all lengths in one group, and with `mom2_adjustment` the covariance of keys per layer."""
    return opened(_measure_rome, _build_rome, model, tok, hparams, progress)


def _measure_rome(view: ModelView, tok, hparams: ROMEHyperParams, progress: bool) -> Ground:
    prefixes, texts = hparams.template_prefixes, []
    for number, (length, count) in enumerate(hparams.context_template_length_params if prefixes else []):
        copies = count // len(prefixes)
        texts += context_templates(view.model, tok, prefixes, length, hparams.seed + number, copies=copies)[1]
    known = moments(view, tok, hparams, progress) if hparams.mom2_adjustment else {}
    return Ground([[SUBJECT, *texts]], _named_by_layer(known))


def _build_rome(view: ModelView, ground: Ground, hparams: ROMEHyperParams) -> LifelongState:
    return LifelongState(settings_of(hparams), _covariance_solvers(view, ground), ground.templates)


def edit_rank_one(
    view: ModelView, tok, requests: Sequence[Request], hparams: ROMEHyperParams, state: LifelongState
) -> tuple[dict[int, torch.Tensor], EditReport]:
    """One rank-one update per request and layer, one after the other: w_out += v uᵀ, so that the bare prompt's key k gives z.

    u [F] is the mean key over all templates, preconditioned by the covariance of keys and of length 1; z [D] is what the FFN
    should put out at the subject, and v = (z - its output) / (k · u).
    """
    report = EditReport(len(requests))
    for number, request in enumerate(requests):
        for layer in hparams.layers:
            with phase(report, "values"):
                (value,) = target_values(view, tok, [request], state.flat_templates, layer, hparams, part="ffn")
            with phase(report, "keys"):
                wanted = {"key": (view.down(layer), "input"), "out": (view.down(layer), "output")}
                seen = subject_states(view, tok, [Contexts(state.templates).texts(request)], wanted)
                keys, current = seen["key"][0].double(), seen["out"][0, 0].double()
            with phase(report, "solve"):
                u = keys.mean(0)
                if layer in state.solvers:
                    u = state.solvers[layer].solve(u[:, None])[:, 0]
                u = u / u.norm()
                residual = value.z.to(current) - current
                left, right = (residual / (keys[0] @ u))[:, None].float(), u[None].float()
                write(view.w_out(layer), Update(layer, left, right, number), report, state.masters.get(layer))
            report.density[layer] = 1.0
            report.residual += residual.norm().item() / (len(requests) * len(hparams.layers))
        report.value_loss.append(value.loss)
    return {}, report


# ---- FT


def open_ft(model, tok, hparams: FTHyperParams, progress: bool = True) -> LifelongState:
    """Nothing is kept from edit to edit but the account of them."""
    check_model(ModelView(model), hparams)
    return LifelongState(settings_of(hparams), {}, [[SUBJECT]], factors=False)


def fine_tune(
    view: ModelView, tok, requests: Sequence[Request], hparams: FTHyperParams, state: LifelongState
) -> tuple[dict[int, torch.Tensor], EditReport]:
    """Adam on the edited parameters, `batch_size` requests a step, for `num_steps` rounds or until a round's mean loss is under
    0.01; with `norm_constraint` no weight ends further than that from where it was. The model is written once, at the end.
    """
    report = EditReport(len(requests))
    with phase(report, "values"), _frozen(view.model):
        weights = edited_parameters(view, hparams)
        trained = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        optimiser = torch.optim.Adam(trained.values(), lr=hparams.lr, weight_decay=hparams.weight_decay)
        for _ in range(hparams.num_steps):
            total = 0.0
            for start in range(0, len(requests), hparams.batch_size):
                batch = requests[start : start + hparams.batch_size]
                with torch.enable_grad():
                    loss = _ft_loss(view, tok, batch, trained, hparams.objective_optimization)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss of FT is {loss.item()}; check lr ({hparams.lr}) and the model's weights")
                total += loss.item() * len(batch)
                if loss >= FT_LOSS_TO_STOP:
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                if hparams.norm_constraint:
                    _clamp(trained, weights, hparams.norm_constraint)
            if total / len(requests) < FT_LOSS_TO_STOP:
                break
        report.value_loss = [total / len(requests)]
    with phase(report, "solve"), torch.no_grad():
        if not all(torch.isfinite(new).all() for new in trained.values()):
            raise FloatingPointError("the fine-tuned weights are not finite; the model is left as it was")
        for name, new in trained.items():
            weights[name].copy_(new)
    report.density = dict.fromkeys(hparams.layers, 1.0)
    return {}, report


def _ft_loss(view: ModelView, tok, requests: Sequence[Request], trained: Mapping[str, torch.Tensor], objective: str):
    """Mean over requests of the mean over target tokens of -log p. "prompt_last" (FT-L): all of them from the prompt's last
    token; "target_new" (FT-M): each from the token before it."""
    rows, where = [], []
    for request in requests:
        target = target_tokens(tok, request.prompt, request.target_new)
        full = encode(tok, f"{request.prompt} {request.target_new}")
        before = len(full) - len(target)
        rows.append(full[:before] if objective == "prompt_last" else full[:-1])
        where.append((before - 1, target))
    tokens = pad(rows, tok, view.device)
    logits = functional_call(view.model, dict(trained), (), {**tokens.inputs(), "use_cache": False}).logits
    losses = []
    for row, (last, target) in enumerate(where):
        labels = torch.tensor(target, device=logits.device)
        at = torch.full_like(labels, last) if objective == "prompt_last" else last + torch.arange(len(target), device=logits.device)
        losses.append(-log_softmax(logits[row, at].float(), -1).gather(1, labels[:, None]).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def _clamp(trained: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor], limit: float) -> None:
    for name, weight in trained.items():
        weight.clamp_(originals[name] - limit, originals[name] + limit)


@contextmanager
def _frozen(model) -> Iterator[None]:
    """No parameter of the model takes a gradient; what did before does so again afterwards."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


# ---- all of them

METHODS: dict[str, tuple[Opens, Writes]] = {
    "NMKE": (editor.open_state, edit_layers),
    "AlphaEdit": (editor.open_state, edit_layers),
    "MEMIT": (open_memit, edit_layers),
    "ROME": (open_rome, edit_rank_one),
    "FT": (open_ft, fine_tune),
}


def apply_to_model(
    model,
    tok,
    requests: Sequence[Mapping | Request],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    state: LifelongState | None = None,
    **kwargs,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write `requests` into the model by the method that `hparams` are of; arguments and promises of `apply_nmke_to_model`."""
    require(hparams, HyperParams)
    hparams.validate()
    opens, writes = METHODS[hparams.alg_name]
    return apply_method(opens, writes, model, tok, requests, hparams, copy, return_orig_weights, state)


def open_state(model, tok, hparams: HyperParams, progress: bool = True) -> LifelongState:
    """A new state for the method that `hparams` are of, with the statistics of the model as it is now."""
    return METHODS[hparams.alg_name][0](model, tok, hparams, progress)


def undo(model, tok, hparams: HyperParams, state: LifelongState, edit: int, resolve: bool = False) -> None:
    """Take edit `edit` out of the model: `LifelongState.undo`. With `resolve`, later edits are solved again without it, from
    their recorded values z; they are made anew, so their numbers move up. All or nothing, also on disk."""
    if not resolve:
        state.undo(edit)
        return
    opens, writes = METHODS[hparams.alg_name]
    if writes is not edit_layers:
        raise ValueError(f"edits of {hparams.alg_name} cannot be solved again from their values; undo them without resolve")
    place = check_undo(state.events, edit)
    later, now = state.events[place:], standing(state.events)
    with state.together():
        state.rewind(place)
        for event in later:
            if isinstance(event, Undo):
                if event.edit < later[0].first:
                    state.undo(event.edit)
                continue
            kept = [i for i, number in enumerate(event.ids) if number != edit and now[number] != "undone"]
            if kept:
                requests = [event.requests[i] for i in kept]
                again = partial(edit_layers, z=event.z[:, kept])
                apply_method(opens, again, model, tok, requests, hparams, state=state)


def _named(name: str, method: str) -> Callable:
    def apply(model, tok, requests, hparams, *args, **kwargs):
        require(hparams, CLASSES[method])
        return apply_to_model(model, tok, requests, hparams, *args, **kwargs)

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = f"Write `requests` into the model by {method}; arguments and promises of `apply_nmke_to_model`."
    return apply


apply_alphaedit_to_model = _named("apply_alphaedit_to_model", "AlphaEdit")
apply_memit_to_model = _named("apply_memit_to_model", "MEMIT")
apply_rome_to_model = _named("apply_rome_to_model", "ROME")
apply_ft_to_model = _named("apply_ft_to_model", "FT")
