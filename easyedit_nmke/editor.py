"""One NMKE edit on one page: values, masks, closed-form updates, state."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from copy import deepcopy

import torch

from .arch import ModelView
from .attribution import neuron_scores
from .hparams import NMKEHyperParams
from .keys import attribution_inputs, key_and_value, keys_of
from .masks import NeuronMask, neuron_mask
from .nullspace import row_spaces
from .prompts import Request, context_templates, encode, target_tokens
from .solver import NullSpaceSolver
from .state import EditReport, LifelongState
from .values import target_value

logger = logging.getLogger(__name__)

_ATTRIBUTE = "nmke_state"  # where a model carries its state between calls that pass none (EasyEdit passes none)
_STATE_SETTINGS = (
    "layers", "L2", "nullspace_threshold", "nullspace_fraction", "mom2_dataset", "mom2_n_samples", "P_loc", "seed",
    "template_prefixes", "template_length",
)  # fmt: skip


def apply_nmke_to_model(
    model,
    tok,
    requests: Sequence[Mapping | Request],
    hparams: NMKEHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    state: LifelongState | None = None,
    **kwargs,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write `requests` into the model by one NMKE update; EasyEdit's calling convention.

    requests: EasyEdit's dictionaries or `Request`s. copy: edit a deep copy. return_orig_weights: also return the edited
    parameters as they were before this call, by name. state: past keys and projector; by default the one that the model
    carries from its last edit with the same settings, or a new one. Other keywords of EasyEdit's convention change nothing.

    Raises ValueError, before anything changes, for requests, hyperparameters or models that cannot be edited. When anything
    fails on the way, weights and state are as before the call, bit for bit.
    """
    hparams = shallow_copy(hparams)
    hparams.validate()
    view = ModelView(model)
    requests = [r if isinstance(r, Request) else Request.from_dict(r) for r in requests]
    check_model(view, hparams)
    check_requests(view, tok, requests)
    if copy:
        model = deepcopy(model)
        view = ModelView(model)
    with _evaluating(model), _unchanged_on_error(view, hparams.layers) as originals:
        if state is None:
            state = _carried_state(view, tok, hparams)
        elif state.settings != _settings(hparams):
            raise ValueError(_different_state(state, hparams))
        check_requests(view, tok, requests, state.flat_templates)
        weights = {layer: view.weight(layer) for layer in hparams.layers}
        state.follow(weights)
        keys, report = _edit(view, tok, requests, hparams, state)
        state.advance(weights, keys, report)
    setattr(model, _ATTRIBUTE, state)
    names = {view.weight_name(layer): originals[layer] for layer in hparams.layers}
    return model, names if return_orig_weights else {}


def open_state(model, tok, hparams: NMKEHyperParams, progress: bool = True) -> LifelongState:
    """A new state: context templates, and one solver per layer with the projector of the model as it is now."""
    view = ModelView(model)
    check_model(view, hparams)
    with _evaluating(model):
        templates = context_templates(model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)
        bases = row_spaces(view, tok, hparams, progress)
    solvers = {layer: NullSpaceSolver(basis, hparams.L2) for layer, basis in bases.items()}
    return LifelongState(_settings(hparams), solvers, templates)


def _edit(view: ModelView, tok, requests, hparams, state: LifelongState) -> tuple[dict[int, torch.Tensor], EditReport]:
    """Compute and write the update layer by layer; returns the keys of the edited model and what was done."""
    report, z_layer = EditReport(len(requests)), hparams.layers[-1]
    flat = state.flat_templates
    with _phase(report, "values"):
        values = [target_value(view, tok, request, flat, z_layer, hparams) for request in requests]
        report.value_loss = [value.loss for value in values]
        z = torch.stack([value.z for value in values], 1)
    with _phase(report, "attribution"):
        masks = neuron_masks(view, tok, requests, flat, hparams)
    for index, layer in enumerate(hparams.layers):
        with _phase(report, "keys"):
            keys, current = key_and_value(view, tok, requests, state.templates, layer, z_layer)
        residual = (z - current.to(z)) / (len(hparams.layers) - index)
        if index == 0:
            report.residual = residual.norm(dim=0).mean().item() * len(hparams.layers)
        with _phase(report, "solve"):
            weight = view.w_out(layer)
            mask = masks[layer].mask.to(weight.device) if layer in masks else None
            changed = weight + state.solvers[layer].update(keys, residual.to(weight.device), mask).to(weight.dtype)
            if not torch.isfinite(changed).all():
                raise FloatingPointError(f"the update of layer {layer} is not finite; the model is left as it was")
            weight.copy_(changed)
        report.density[layer] = masks[layer].density if layer in masks else 1.0
        if layer in masks:
            report.ratios[layer] = (masks[layer].general_ratio, masks[layer].specific_ratio)
    with _phase(report, "keys"):
        return keys_of(view, tok, requests, state.templates, hparams.layers), report


def neuron_masks(view: ModelView, tok, requests: Sequence[Request], templates: Sequence[str], hparams) -> dict[int, NeuronMask]:
    """The mask of every edited layer for one edit; empty when `neurons: all` leaves nothing to attribute."""
    if hparams.neurons == "all":
        return {}
    filled = [(request, request.fill(template)[0]) for request in requests for template in templates]
    texts = [text for _, text in filled]
    seen = attribution_inputs(view, tok, texts, hparams.layers, hparams.attribution_position)
    targets = seen.predicted
    if hparams.attribution_target == "target_new":
        targets = torch.tensor([target_tokens(tok, text, request.target_new)[0] for request, text in filled])
    masks, readout = {}, view.readout
    for layer in hparams.layers:
        coefficients = seen.coefficients[layer]
        device = coefficients.device
        scores = neuron_scores(
            coefficients, seen.residual[layer].to(device), view.w_out(layer), readout.to(device), targets.to(device),
            strategy=hparams.attribution_strategy, amplification=hparams.amplification, norm=hparams.attribution_norm,
            final_hidden=seen.final_hidden.to(device), backend=hparams.attribution_backend,
        )  # fmt: skip
        masks[layer] = neuron_mask(scores, hparams)
    return masks


def check_model(view: ModelView, hparams: NMKEHyperParams) -> None:
    """ValueError for a model that cannot be edited with these hyperparameters."""
    view.check_layers(hparams.layers)
    if hparams.v_loss_layer is not None and hparams.v_loss_layer >= view.depth:
        raise ValueError(f"v_loss_layer is {hparams.v_loss_layer}, but the model's last block is {view.depth - 1}")
    for layer in hparams.layers:
        weight = view.weight(layer)
        if not weight.is_floating_point():
            raise ValueError(
                f"{view.weight_name(layer)} is {weight.dtype}: quantised weights cannot be edited; "
                "load the model in bfloat16 or float32"
            )
        if weight.dtype == torch.float16 and weight.device.type == "cpu":
            raise ValueError("the model is in float16 on a CPU; load it in float32 or bfloat16 (or move it to a GPU)")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{view.weight_name(layer)} holds NaN or infinite values; load a sound copy of the model")


def check_requests(view: ModelView, tok, requests: Sequence[Request], templates: Sequence[str] = ("{}",)) -> None:
    """ValueError for a batch that cannot be edited: empty, contradictory, or longer in some template than the model's context."""
    if not requests:
        raise ValueError("there is no request to edit")
    targets: dict[str, str] = {}
    for request in requests:
        other = targets.setdefault(request.prompt, request.target_new)
        if other != request.target_new:
            raise ValueError(
                f"one batch asks for two answers to {request.prompt!r}: {other!r} and {request.target_new!r}; keep one of them"
            )
        longest = max(len(encode(tok, f"{request.fill(template)[0]} {request.target_new}")) for template in templates)
        if view.context_length and longest > view.context_length:
            raise ValueError(
                f"the prompt {request.prompt[:60]!r}... with its target and context is {longest} tokens, "
                f"the model's context {view.context_length}"
            )
        if not target_tokens(tok, request.prompt, request.target_new):
            raise ValueError(f"the target {request.target_new!r} of {request.prompt!r} has no tokens of its own")


def _settings(hparams: NMKEHyperParams) -> dict:
    return {name: deepcopy(getattr(hparams, name)) for name in _STATE_SETTINGS}


def _different_state(state: LifelongState, hparams: NMKEHyperParams) -> str:
    wanted = _settings(hparams)
    changed = [
        f"{name} {state.settings.get(name)!r} -> {wanted[name]!r}" for name in wanted if state.settings.get(name) != wanted[name]
    ]
    return f"the state was opened with other settings ({', '.join(changed)}); open a new one with open_state"


def _carried_state(view: ModelView, tok, hparams: NMKEHyperParams) -> LifelongState:
    state = getattr(view.model, _ATTRIBUTE, None)
    if state is not None and state.settings == _settings(hparams):
        return state
    if state is not None and state.edits:
        logger.warning("%s; past keys are forgotten", _different_state(state, hparams).split(";")[0])
    return open_state(view.model, tok, hparams)


@contextmanager
def _unchanged_on_error(view: ModelView, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yield copies of the layers' weights; whatever is raised inside puts them back."""
    originals = {layer: view.weight(layer).detach().clone() for layer in layers}
    try:
        yield originals
    except BaseException:
        with torch.no_grad():
            for layer, original in originals.items():
                view.weight(layer).copy_(original)
        raise


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Dropout off; modes are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _phase(report: EditReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - started
