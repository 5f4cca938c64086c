"""One NMKE edit on one page: values, masks, closed-form updates, state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..attribution import AttributionCache, choose, neuron_scores
from ..attribution.masks import NeuronMask, neuron_mask, shuffled
from ..history.durable import Ground, opened
from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import AlphaEditHyperParams, NMKEHyperParams
from ..models.arch import ModelView
from ..models.prompts import Request, context_templates, target_tokens
from ..models.updates import Update
from ..scores.drift import mask_overlap
from ..statistics.nullspace import RowSpace, check_protection, row_spaces
from .contract import apply_method, phase, require, settings_of, write
from .keys import Ascent, Contexts, attribution_inputs
from .solver import NullSpaceSolver, RestrictedSolver
from .values import reference_norm, target_values


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
    require(hparams, NMKEHyperParams)
    return apply_method(open_state, edit_layers, model, tok, requests, hparams, copy, return_orig_weights, state)


def open_state(model, tok, hparams: AlphaEditHyperParams, progress: bool = True) -> LifelongState:
    """A new state: context templates, and one solver per layer with the projector of the model as it is now; with `state_dir` the
    one that is kept there (see `durable.opened`)."""
    return opened(_measure, _build, model, tok, hparams, progress)


def _measure(view: ModelView, tok, hparams: AlphaEditHyperParams, progress: bool) -> Ground:
    templates = context_templates(view.model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)
    spaces, norm = row_spaces(view, tok, hparams, progress), None
    check_protection(spaces, hparams)
    if hparams.value_norm == "anchored":
        flat = [template for group in templates for template in group]
        norm = hparams.value_norm_factor * reference_norm(view, tok, flat, hparams.layers[-1], hparams)
    statistics = {f"{part}.{layer}": t for layer, space in spaces.items() for part, t in space._asdict().items()}
    return Ground(templates, statistics, norm)


def _build(view: ModelView, ground: Ground, hparams: AlphaEditHyperParams) -> LifelongState:
    def space(layer: int) -> RowSpace:
        return RowSpace(*(ground.statistics[f"{part}.{layer}"].to(view.weight(layer).device) for part in RowSpace._fields))

    solvers = {layer: _solver(space(layer), hparams) for layer in hparams.layers}
    return LifelongState(settings_of(hparams), solvers, ground.templates, ground.value_norm)


def _solver(space: RowSpace, hparams: AlphaEditHyperParams) -> NullSpaceSolver | RestrictedSolver:
    soft, relative = hparams.regularizer == "covariance", hparams.l2_scale == "auto"
    if (soft or relative) and not torch.isfinite(space.energy):
        raise ValueError(
            "P_loc names a projector, which tells nothing of the size of keys; "
            "remove it, or set regularizer: nullspace and l2_scale: absolute"
        )
    l2 = hparams.L2 * space.energy.item() if relative else hparams.L2
    strength = hparams.mom2_update_weight * space.eigenvalues if soft else None
    if hparams.solve == "restricted" and hparams.neurons != "all":
        return RestrictedSolver(space.basis, l2, strength)
    if space.null.shape[1] and not soft:
        return NullSpaceSolver(space.null, l2, null=True)
    return NullSpaceSolver(space.basis, l2, strength)


def edit_layers(
    view: ModelView, tok, requests, hparams, state: LifelongState, z: torch.Tensor | None = None
) -> tuple[dict[int, torch.Tensor], EditReport]:
    """Compute and write the update layer by layer; returns the keys of the edited model, if they are to be remembered, and what
    was done. The solvers of `state` make it NMKE, AlphaEdit or MEMIT. z [D, requests]: values that were found before.

    A layer's keys depend on the layers below it alone, which are edited by then: those it was solved with are the edited model's.
    """
    report, z_layer = EditReport(len(requests)), hparams.layers[-1]
    flat = state.flat_templates
    contexts = Contexts(state.templates, hparams.locality_prompts if hparams.key_contexts == "relations" else ())
    with phase(report, "values"):
        if z is None:
            values = target_values(view, tok, requests, flat, z_layer, hparams)
            report.value_loss = [value.loss for value in values]
            z = torch.stack([value.z for value in values], 1)
            if state.value_norm is not None:
                z = z * (state.value_norm / z.norm(dim=0))
        report.z = z = z.to(view.weight(z_layer).device)
    with phase(report, "attribution"):
        masks = neuron_masks(view, tok, requests, flat, hparams, state, report)
        if masks and hparams.control == "random":
            masks = {layer: shuffled(mask, f"{hparams.seed} {state.edits} {layer}") for layer, mask in masks.items()}
    ascent, found = Ascent(view, tok, requests, contexts, z_layer), {}
    for index, layer in enumerate(hparams.layers):
        with phase(report, "keys"):
            found[layer], current = ascent(layer)
        residual = (z - current.to(z)) / (len(hparams.layers) - index)
        if index == 0:
            report.residual = residual.norm(dim=0).mean().item() * len(hparams.layers)
        with phase(report, "solve"):
            weight = view.w_out(layer)
            mask = masks[layer].mask.to(weight.device) if layer in masks else None
            right = _directions(state.solvers[layer], found[layer], mask, hparams).T.float().contiguous()
        with phase(report, "apply"):
            write(weight, Update(layer, residual.to(weight.device).float(), right), report, state.masters.get(layer))
        report.density[layer] = masks[layer].density if layer in masks else 1.0
        if layer in masks:
            chosen = masks[layer].mask != 0
            report.ratios[layer] = (masks[layer].general_ratio, masks[layer].specific_ratio)
            if layer in state.masks:
                report.overlap[layer] = mask_overlap(state.masks[layer], chosen)
            report.masks[layer] = chosen
    if state.attribution_cache is not None:
        with phase(report, "attribution"):
            w_out = {layer: view.w_out(layer) for layer in hparams.layers}
            state.attribution_cache.follow(report.updates, w_out, view.readout)
    remembers = all(hasattr(solver, "append") for solver in state.solvers.values())
    return found if remembers else {}, report


def _directions(solver, keys: torch.Tensor, mask: torch.Tensor | None, hparams) -> torch.Tensor:
    """The solver's; for the control "uniform" the unmasked ones, each scaled to the norm of the masked one."""
    masked = solver.directions(keys, mask)
    if mask is None or hparams.control != "uniform":
        return masked
    whole = solver.directions(keys)
    return whole * (masked.norm(dim=0) / whole.norm(dim=0).clamp(min=1e-30))


def neuron_masks(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str],
    hparams,
    state: LifelongState | None = None,
    report: EditReport | None = None,
) -> dict[int, NeuronMask]:
    """The mask of every edited layer for one edit; empty when `neurons: all` leaves nothing to attribute. `state` keeps what
    attribution can use again, `report` takes note of how it was done."""
    if hparams.neurons == "all":
        return {}
    cache, backend = _attribution_backend(view, hparams, state, report)
    filled = [(request, request.fill(template)[0]) for request in requests for template in templates]
    texts = [text for _, text in filled]
    seen = attribution_inputs(view, tok, texts, hparams.layers, hparams.attribution_position)
    targets = seen.predicted
    if hparams.attribution_target == "target_new":
        targets = torch.tensor([target_tokens(tok, text, request.target_new)[0] for request, text in filled])
    masks, readout = {}, view.readout
    for layer in hparams.layers:
        coefficients = seen.coefficients[layer]
        device, w_out = coefficients.device, view.w_out(layer)
        here = readout.to(device)
        scores = neuron_scores(
            coefficients, seen.residual[layer].to(device), w_out, here, targets.to(device),
            strategy=hparams.attribution_strategy, amplification=hparams.amplification, norm=hparams.attribution_norm,
            final_hidden=seen.final_hidden.to(device), backend=backend,
            projection=cache.projection(layer, w_out, here) if backend == "cached" else None,
        )  # fmt: skip
        masks[layer] = neuron_mask(scores, hparams)
    return masks


def _attribution_backend(view: ModelView, hparams, state, report) -> tuple[AttributionCache | None, str]:
    """(cache, backend) of this edit's attribution; the state's cache counts it, the report says why."""
    if hparams.attribution_strategy == "mpc":
        backend, reason = hparams.attribution_backend.replace("cached", "auto"), "MPC needs no vocabulary"
        cache = None
    else:
        if state is not None and state.attribution_cache is None:
            state.attribution_cache = AttributionCache()
        cache = None if state is None else state.attribution_cache
        w_out = view.w_out(hparams.layers[0])
        backend, reason = choose(hparams.attribution_backend, w_out, view.readout, len(hparams.layers), cache)
        if cache is not None:
            cache.uses += 1
    if report is not None:
        report.attribution = f"{backend}: {reason}"
    return cache, backend
