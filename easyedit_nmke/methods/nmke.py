"""NMKE (arXiv 2510.22139): AlphaEdit's update, written into the neurons that attribution chooses; and what goes beyond that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ..attribution import STRATEGIES, AttributionCache, Made, alignment, choose, neuron_scores
from ..attribution.masks import NeuronMask, neuron_mask, shuffled
from ..history.durable import Ground
from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import is_number, report, setting
from ..messages import did_you_mean
from ..models.arch import ModelView
from ..models.prompts import open_end, tokenised_all
from ..models.requests import Request
from ..models.updates import LowRank, Update, accumulate, of_parameter
from ..scores.drift import mask_overlap
from ..statistics.nullspace import RowSpace
from . import alphaedit
from .alphaedit import AlphaEditHyperParams
from .compensated import CompensatedSolver
from .contract import Method
from .keys import attribution_inputs, subject_states
from .located import edit_layers, plain_update
from .solver import NullSpaceSolver, RestrictedSolver

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class NMKEHyperParams(AlphaEditHyperParams):
    """AlphaEdit, and a mask from attribution. Defaults are the published NMKE code's.

    docs/settings.md says which symbol of the paper each one is.
    """

    alg_name: str = setting("NMKE", state=True)
    mom2_update_weight: float = setting(15000.0, above=0, state=True)  # λ of `regularizer: covariance`

    # Beyond the paper
    # "covariance": λ·E[c cᵀ] + L2 instead of a hard null space
    regularizer: str = setting("nullspace", choices=("nullspace", "covariance"), state=True)
    # "auto": L2 times the mean squared norm of a key outside the protected directions, per layer
    l2_scale: str = setting("absolute", choices=("absolute", "auto"), state=True)
    # "full": and mask afterwards; "restricted": for the chosen neurons alone; "compensated": and for what they owe past edits
    solve: str = setting("full", choices=("full", "restricted", "compensated"), state=True)
    key_contexts: str = setting("templates", choices=("templates", "relations"))  # keys' texts; "relations": locality_prompts too
    # what attribution is compared with: "random" neurons as many, "uniform" scaling by as much
    control: str = setting("none", choices=("none", "random", "uniform"))

    # Attribution (Eqs. 2, 3)
    attribution_strategy: str = setting("lps", choices=tuple(STRATEGIES))
    amplification: float = setting(30.0, above=0)
    attribution_target: str = setting("predicted", choices=("predicted", "target_new"))
    attribution_norm: str = setting("frozen", choices=("frozen", "exact"))
    attribution_position: str = setting("last_token", choices=("last_token", "padded_end"))
    attribution_backend: str = setting("auto", choices=("auto", "reference", "fast", "fused", "cached"))

    # Mask (Eqs. 4 to 8)
    neurons: str = setting("both", choices=("both", "general", "specific", "overlap", "non_overlap", "all"), state=True)
    ratio: str = setting("dynamic", choices=("dynamic", "fixed"))
    general_ratio: float = setting(0.5, above=0, most=1)  # used when ratio: fixed
    specific_ratio: float = setting(0.3, above=0, most=1)
    general_bias: float = setting(0.3, least=0, most=1)
    general_scale: float = setting(0.1, least=0, most=1)
    general_power: float = setting(3.0, above=0)
    specific_bias: float = setting(0.3, least=0, most=1)
    specific_scale: float = setting(0.1, least=0, most=1)
    specific_power: float = setting(2.0, above=0)
    temperature: float = setting(30.0, above=0)
    mask: str = setting("binary", choices=("binary", "soft"))
    mask_ties: str = setting("include", choices=("include", "exact"))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """As the other methods'; `preset` names a set of values for whatever `content` leaves out."""
        content = dict(content)
        preset = content.pop("preset", "published")
        if not isinstance(preset, str) or preset not in PRESETS:
            hint = did_you_mean(str(preset), PRESETS)
            raise ValueError(report(source, [f"preset is {preset!r}{hint}; expected one of {', '.join(map(repr, PRESETS))}"]))
        return super().from_dict({**PRESETS[preset], **content}, source)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        """As AlphaEdit; in a soft null space the weight of the covariance, and L2 relative to the keys where it is so. In a hard
        one a relative L2 is searched near the preset's alone: what it is good for, hundreds of edits after each other, a
        search does not see. Of the mask, how many neurons it lets through (not the published rule by which)."""
        found = super().searched(depth)
        if self.regularizer == "covariance":
            found |= {"nullspace_fraction": [0.1, 0.3, 0.5, 0.7], "mom2_update_weight": (0.1, 30000.0), "L2": (0.001, 30.0)}
        elif self.l2_scale == "auto":
            found |= {"nullspace_fraction": [0.5, 0.7, 0.9], "L2": (0.1, 5.0)}
        if self.neurons != "all":
            shares = [0.2, 0.3, 0.5, 0.7]
            found |= {"general_bias": shares, "specific_bias": shares}
        return found

    @property
    def attributes_beforehand(self) -> bool:
        """Whether neurons are attributed, by what the model and the prompts tell without an edit's values."""
        return self.neurons != "all" and self.attribution_strategy != "align"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.solve != "full" and self.mask == "soft":
            found.append(f"solve: {self.solve} chooses neurons and mask: soft weighs all of them; use one of the two")
        if self.solve == "compensated" and self.control == "uniform":
            found.append("solve: compensated makes up for what masks leave out, control: uniform has none; use one of the two")
        if not self.locality_prompts and self.key_contexts == "relations":
            found.append("key_contexts: relations needs locality_prompts; give some, or set key_contexts: templates")
        for kind in ("general", "specific"):
            bias, scale = getattr(self, f"{kind}_bias"), getattr(self, f"{kind}_scale")
            if is_number(bias) and is_number(scale) and bias + scale > 1:
                found.append(f"{kind}_bias + {kind}_scale is {bias + scale}, expected at most 1")
        return found


# What `preset` stands for, in NMKE's files. Strengths are relative to the model's keys.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": {},
        "plus": {
            "neurons": "all",
            "l2_scale": "auto",
            "nullspace_fraction": 0.7,
            "L2": 0.8,  # between what suits the two models it was tried on, 1.7 and 0.4
            "write_passes": 3,
            "v_extra_steps": 45,
        },
    }
)


# ---- what is kept from edit to edit


def build(view: ModelView, ground: Ground, hparams: NMKEHyperParams) -> Mapping[int, NullSpaceSolver | RestrictedSolver]:
    last = set(hparams.z_layers)
    return {layer: _solver(alphaedit.row_space(view, ground, layer, hparams), hparams, layer in last) for layer in hparams.layers}


def _solver(space: RowSpace, hparams: NMKEHyperParams, last: bool) -> NullSpaceSolver | RestrictedSolver:
    """last: whether no other block makes up for what this one leaves."""
    soft, relative = hparams.regularizer == "covariance", hparams.l2_scale == "auto"
    if (soft or relative) and not torch.isfinite(space.energy):
        raise ValueError(
            "P_loc names a projector, which tells nothing of the size of keys; "
            "remove it, or set regularizer: nullspace and l2_scale: absolute"
        )
    l2 = hparams.L2 * space.energy.item() if relative else hparams.L2
    strength = hparams.mom2_update_weight * space.eigenvalues if soft else None
    if hparams.solve != "full" and hparams.neurons != "all":
        kind = CompensatedSolver if hparams.solve == "compensated" and last else RestrictedSolver
        return kind(space.basis, l2, strength)
    return NullSpaceSolver(space.basis, l2, strength) if soft else alphaedit.hard_solver(space, l2)


# ---- one edit


def edit(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    hparams: NMKEHyperParams,
    state: LifelongState,
    z: torch.Tensor | None = None,
    scores: Mapping[int, torch.Tensor] | None = None,
    masks: Mapping[int, torch.Tensor] | None = None,
) -> EditReport:
    """`edit_layers` with masks. scores: layer -> what attribution gave before (`attributed`). masks: layer -> mask [F] bool."""

    def chosen(report: EditReport, values: torch.Tensor) -> Mapping[int, torch.Tensor]:
        if masks is not None:
            return masks
        if scores is None:
            found = neuron_masks(view, tok, requests, state.flat_templates, hparams, state, report, values)
        else:
            found = {layer: neuron_mask(scores[layer], hparams) for layer in hparams.layers if hparams.neurons != "all"}
        if hparams.control == "random":
            found = {layer: shuffled(mask, f"{hparams.seed} {state.edits} {layer}") for layer, mask in found.items()}
        _note(found, state, report)
        return {layer: mask.mask for layer, mask in found.items()}

    prompts = hparams.locality_prompts if hparams.key_contexts == "relations" else ()
    update = _uniform if hparams.control == "uniform" else _compensated if hparams.solve == "compensated" else plain_update
    return edit_layers(view, tok, requests, hparams, state, z, prompts, chosen, update)


def _note(masks: Mapping[int, NeuronMask], state: LifelongState, report: EditReport) -> None:
    for layer, mask in masks.items():
        chosen = mask.mask != 0
        report.ratios[layer] = (mask.general_ratio, mask.specific_ratio)
        if layer in state.masks:
            report.overlap[layer] = mask_overlap(state.masks[layer], chosen)
        report.masks[layer] = chosen


def _uniform(view, state, layer: int, keys: torch.Tensor, left: torch.Tensor, mask: torch.Tensor | None, again: bool):
    """`plain_update` unmasked, each direction scaled to the norm of the masked one."""
    solver = state.solvers[layer]
    masked, whole = solver.directions(keys, mask), solver.directions(keys)
    right = whole * (masked.norm(dim=0) / whole.norm(dim=0).clamp(min=1e-30))
    return LowRank(view.weight_name(layer), left, right.T.float().contiguous()), keys


def _compensated(view, state, layer: int, keys: torch.Tensor, left: torch.Tensor, mask: torch.Tensor | None, again: bool):
    """`plain_update`, and in a block that no other makes up for, what past edits are owed; that is the last request's. They are
    paid once an edit: to a later pass what this edit wrote would look like a debt, since its own key is not remembered yet."""
    solver = state.solvers[layer]
    if again or not isinstance(solver, CompensatedSolver):
        return plain_update(view, state, layer, keys, left, mask)
    name, requests = view.weight_name(layer), left.shape[1]
    change = state.weights.change(name)
    right, outputs, owed = solver.compensated(keys, change, mask)
    sides = torch.cat([left, outputs.float()], 1), torch.cat([right, owed], 1).T.float().contiguous()
    owner = torch.arange(len(sides[1]), device=left.device).clamp(max=requests - 1)
    return LowRank(name, *sides, owner=owner), solver.remembered(keys, left, change)


def neuron_masks(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str],
    hparams: NMKEHyperParams,
    state: LifelongState | None = None,
    report: EditReport | None = None,
    z: torch.Tensor | None = None,
) -> dict[int, NeuronMask]:
    """The mask of every edited layer for one edit; empty when `neurons: all` leaves nothing to attribute. `state` keeps what
    attribution can use again, `report` takes note of how it was done. z [D, requests]: the edit's values, for `align` alone (with
    `blue` those of one layer over those of the other)."""
    if hparams.neurons == "all":
        return {}
    found = attributed(view, tok, requests, templates, hparams, state, report, z)
    return {layer: neuron_mask(scores, hparams) for layer, scores in found.items()}


def attributed(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str],
    hparams: NMKEHyperParams,
    state: LifelongState | None = None,
    report: EditReport | None = None,
    z: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """layer -> scores [requests x templates, F] (Eqs. 2, 3; of `align`, which wants z [D, requests], see `alignment`)."""
    if hparams.attribution_strategy == "align":
        return _aligned(view, tok, requests, templates, hparams, report, z)
    cache, backend = _attribution_backend(view, hparams, state, report)
    filled = [(request, request.fill(template, tok)[0]) for request in requests for template in templates]
    texts = [open_end(text, hparams.target_separator, tok)[0] for _, text in filled]
    seen = attribution_inputs(view, tok, texts, hparams.layers, hparams.attribution_position)
    targets = seen.predicted
    if hparams.attribution_target == "target_new":
        read = tokenised_all(tok, [(text, None, request.target_new) for request, text in filled], hparams.target_separator)
        targets = torch.tensor([found.labels[0] for found in read])
    found, device = {}, view.readout.head.device
    readout, log = view.readout.to(device), state.changes() if backend == "cached" else None
    for layer in hparams.layers:
        w_out = view.values(layer).to(device)  # the values go to the head, which is many times as large
        found[layer] = neuron_scores(
            seen.coefficients[layer].to(device), seen.residual[layer].to(device), w_out, readout, targets.to(device),
            strategy=hparams.attribution_strategy, amplification=hparams.amplification, norm=hparams.attribution_norm,
            final_hidden=seen.final_hidden.to(device), backend=backend,
            projection=cache.projection(layer, w_out, readout, _made(view, layer, *log)) if backend == "cached" else None,
        )  # fmt: skip
    return found


def _aligned(view, tok, requests, templates, hparams, report: EditReport | None, z: torch.Tensor | None) -> dict[int, torch.Tensor]:
    """`attributed` by `alignment`, at the subject's last token of each template; with `blue` all by the first value."""
    if z is None:
        raise ValueError("attribution_strategy: align compares neurons with target values, and none are given; choose another")
    wanted = {"value": (view.blocks[hparams.z_layers[0]], "output")}
    for layer in hparams.layers:
        wanted[f"c{layer}"] = (view.down(layer), "input")
        if view.family.post_norm:
            wanted[f"y{layer}"] = (view.down(layer), "output")
    texts = [[request.fill(template, tok) for template in templates] for request in requests]
    seen = {name: states.flatten(0, 1) for name, states in subject_states(view, tok, texts, wanted).items()}
    first = z[: seen["value"].shape[1]].T.to(seen["value"])
    toward = first.repeat_interleave(len(templates), 0) - seen["value"]
    found = {}
    for layer in hparams.layers:
        coefficients = seen[f"c{layer}"]
        if view.family.post_norm:
            coefficients = coefficients / view.post_norm(layer).statistic(seen[f"y{layer}"])[:, None]
        found[layer] = alignment(coefficients, view.values(layer), toward.to(coefficients.device))
    if report is not None:
        report.attribution = "align: target values, no vocabulary"
    return found


def _made(view: ModelView, layer: int, bases: Mapping[str, torch.Tensor], changes: Sequence[Update]) -> Made:
    """What the log (`LifelongState.changes`) says a layer's values are made of."""
    name, device = view.weight_name(layer), view.readout.head.device
    updates = of_parameter(changes, name)

    def after(count: int) -> torch.Tensor:
        if count == len(updates):
            return view.values(layer).to(device)
        weight = torch.empty_like(view.w_out(layer))
        accumulate(weight, bases[name], updates[:count])
        return view.scaled(layer, weight).to(device)

    return Made(bases[name], updates, partial(view.scaled, layer), after)


def _attribution_backend(view: ModelView, hparams, state, report) -> tuple[AttributionCache | None, str]:
    """(cache, backend) of this edit's attribution; the report says why."""
    strategy = STRATEGIES[hparams.attribution_strategy]
    if strategy.gain is None:
        backend, reason = hparams.attribution_backend.replace("cached", "auto"), f"{strategy.label} needs no vocabulary"
        cache = None
    else:
        if state is not None and state.attribution_cache is None:
            state.attribution_cache = AttributionCache()
        cache = None if state is None else state.attribution_cache
        w_out = view.w_out(hparams.layers[0])
        backend, reason = choose(hparams.attribution_backend, w_out, view.readout, len(hparams.layers), cache)
    if report is not None:
        report.attribution = f"{backend}: {reason}"
    return cache, backend


METHOD = Method("NMKE", NMKEHyperParams, edit, alphaedit.measure, build, replay=edit)
