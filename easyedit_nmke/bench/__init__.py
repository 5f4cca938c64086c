"""What an edit costs: time and peak memory by phase of this engine, the plain equations and EasyEdit's functions, side by side.

`measure` edits the same requests on the same model with every engine in turn, each time from the same weights with the same
number of past keys, and compares what they wrote. `parts` measures the update and the attribution alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..attribution import BACKENDS
from ..methods.solver import NullSpaceSolver
from ..models.device import peak_memory
from ..models.requests import Request
from . import parts, predict
from .engines import CANNOT_RUN, REFERENCE_WORK, EasyEdit, Ours, Plain, Together, covariance_solvers
from .machine import Clock, Measured, busy, check_device, spread, surroundings
from .shapes import SHAPES, Bed, build, shape_named

__all__ = ["PHASES", "SHAPES", "Plan", "build", "engines_for", "measure", "parts", "predict", "rows", "shape_named", "surroundings"]

PHASES = ("values", "keys", "attribution", "solve", "apply", "rest", "evaluate")
BASELINE = "EasyEdit's AlphaEdit"
SURE = 0.95  # probability of the target in every template at which a value may stop
LARGER = 4  # times the learning rate of values; with both they take half as many steps on SmolLM2


@dataclass(frozen=True)
class Plan:
    """What to measure. edits: repetitions (requests) at each of `at`, numbers of past edits, in increasing order; layers: blocks
    of the model, None for all; batch: also so many requests at once."""

    shape: str = "atlas"
    edits: int = 3
    at: tuple[int, ...] = (1, 500)
    layers: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    batch: int | None = None

    def __post_init__(self):
        shape_named(self.shape)
        if list(self.at) != sorted(set(self.at)) or not self.at or self.at[0] < 0:
            raise ValueError(f"at is {self.at!r}, expected numbers of past edits, 0 or more, in increasing order")
        if self.edits < 1:
            raise ValueError(f"edits is {self.edits}, expected 1 or more")
        check_device(self.device, self.dtype)


def measure(plan: Plan, said: Callable[[str], None] = lambda _: None) -> dict:
    """Everything the plan asks for, as plain data (see `rows` for the table). `said` is told what begins."""
    said(f"building {plan.shape}")
    bed = build(plan.shape, max(plan.edits, plan.batch or 1), plan.layers, plan.device, getattr(torch, plan.dtype), plan.seed)
    engines, notes = engines_for(bed, said, plan.batch)
    results, failed = _results(bed, engines, plan, said)
    if not results:
        raise ValueError("; ".join(["nothing could be measured", *bed.notes, *notes, *failed]))
    return {
        **surroundings(),
        "plan": {**vars(plan), "at": list(plan.at)},
        "what": _what(plan, bed),
        "model": _model(bed),
        "notes": [*bed.notes, *notes, *failed, *busy(results, bed.device)],
        "once": {"templates": _templates(bed, engines)},
        "results": results,
    }


def engines_for(bed: Bed, said: Callable[[str], None] = lambda _: None, batch: int | None = None) -> tuple[list, list[str]]:
    """(engines that can run here, warmed up; why the others cannot). The first of a method is this package's."""
    if batch is not None and len(bed.requests) < batch:
        raise ValueError(f"a batch of {batch} was asked for, but there are {len(bed.requests)} requests")
    shared = {layer: NullSpaceSolver(bed.bases[layer], bed.l2) for layer in bed.layers}
    ours = {f"NMKE, {backend}": {"attribution_backend": backend} for backend in BACKENDS if backend != "reference"}
    ours["AlphaEdit"] = {}
    if bed.trained:  # random weights never come to expect a target
        stops, v_lr = {"v_stop_probability": SURE}, bed.hparams("AlphaEdit").v_lr
        ours[f"AlphaEdit, stops at {SURE}"] = stops
        ours[f"AlphaEdit, stops at {SURE}, v_lr x{LARGER}"] = {**stops, "v_lr": LARGER * v_lr}
    made: list[tuple[str, Callable]] = [
        (name, lambda name=name, settings=settings: Ours(bed, name.partition(",")[0], shared, name, **settings))
        for name, settings in ours.items()
    ]
    made.append(("MEMIT", lambda: Ours(bed, "MEMIT", covariance_solvers(bed))))
    if batch is not None:
        made += [(f"{batch} at once", lambda alone=alone: Together(bed, shared, batch, alone)) for alone in (False, True)]
    made += [(f"{method}, plain", lambda method=method: _plain(bed, method)) for method in ("NMKE", "AlphaEdit")]
    made += [(f"EasyEdit's {method}", lambda method=method: EasyEdit(bed, method)) for method in ("AlphaEdit", "MEMIT")]
    engines, notes = [], []
    for name, make in made:
        said(f"first edit: {name}")
        try:
            engine = make()
            engine.prepare(0)
            if not isinstance(engine, Plain | Together):
                _edit(bed, engine, bed.requests[0])
            engines.append(engine)
        except CANNOT_RUN as error:
            notes.append(f"without {name}: {error}")
    return engines, notes


def _plain(bed: Bed, method: str) -> Plain:
    work, most = Plain.work(bed, method), REFERENCE_WORK[bed.device.type]
    if work > most:
        raise ValueError(f"an edit takes {work:.0e} operations in float64, more than {most:.0e}")
    return Plain(bed, method)


def _templates(bed: Bed, engines: Sequence) -> dict:
    """Seconds and peak memory of making the context templates, which happens once for a model."""
    found = {"this package": {"seconds": bed.once.seconds["templates"], "memory_mb": bed.once.peak_memory["templates"]}}
    for engine in engines:
        if engine.name == BASELINE:
            theirs = engine.templates()
            found[BASELINE] = {"seconds": theirs.total, "memory_mb": theirs.memory["templates"]}
    return found


# ---- edits


def _results(bed: Bed, engines: Sequence, plan: Plan, said: Callable[[str], None]) -> tuple[list[dict], list[str]]:
    """(one result for each number of past edits and engine, what went wrong). Those that past edits do not concern are measured at
    the first only; one that fails is left out from there on."""
    results, notes, left = [], [], list(engines)
    for count in plan.at:
        runs: dict[str, list[Measured]] = {engine.name: [] for engine in engines}
        differences: dict[str, list[dict]] = {engine.name: [] for engine in engines}
        chosen = [e for e in left if count == plan.at[0] or (e.needs_past and e.every)]
        for number, request in enumerate(bed.requests[: plan.edits]):
            ours: dict[str, tuple[dict, Mapping]] = {}
            for engine in [e for e in chosen if e in left and (e.limit is None or number < e.limit)]:
                said(f"{count} past edits, request {number + 1}: {engine.name}")
                try:
                    if number == 0:
                        engine.prepare(count)
                    run, update = _edit(bed, engine, request)
                except CANNOT_RUN as error:
                    notes.append(f"{engine.name} failed with {count} past edits: {error}")
                    left.remove(engine)
                    continue
                runs[engine.name].append(run)
                first = ours.setdefault(engine.method, (update, run.masks))
                if first[0] is not update:
                    differences[engine.name].append(_compare(first, (update, run.masks)))
        results += [_result(e, count, runs[e.name], differences[e.name]) for e in chosen if runs[e.name]]
    for result in results:
        name = "EasyEdit's MEMIT" if result["method"] == "MEMIT" else BASELINE
        base = next((r for r in results if r["engine"] == name and r["at"] == result["at"]), None)
        result["times_faster"] = base["total"]["median"] / result["total"]["median"] if base else None
    return results, notes


@torch.no_grad()
def _edit(bed: Bed, engine, request: Request) -> tuple[Measured, dict[int, torch.Tensor]]:
    """One edit, scored and taken back: (its cost, its update of each layer [D, F], on the CPU)."""
    bed.model.requires_grad_(True)  # as a model is loaded; EasyEdit's functions switch it off
    before = {layer: bed.view.w_out(layer).clone() for layer in bed.layers}
    try:
        with torch.enable_grad():
            run = engine.edit(request)
        clock = Clock()
        with clock.phase("evaluate"):
            engine.evaluate(request)
        run.seconds["evaluate"], run.memory["evaluate"] = clock.seconds["evaluate"], clock.memory["evaluate"]
        update = {layer: (bed.view.w_out(layer) - before[layer]).float().cpu() for layer in bed.layers}
        if not all(torch.isfinite(change).all() for change in update.values()):
            raise FloatingPointError("the edited weights are not finite")
    finally:
        for layer, weight in before.items():
            bed.view.w_out(layer).copy_(weight)
    return run, update


def _compare(first: tuple[dict, Mapping], other: tuple[dict, Mapping]) -> dict:
    """{"weights": ||X - X'|| / ||X'|| of the worst layer, "masked": the same over the neurons that both masks agree on, "masks":
    share of neurons that they do not agree on}."""
    (ours, masks), (theirs, others) = first, other
    found = {"weights": 0.0, "masked": 0.0, "masks": 0.0}
    for layer, update in theirs.items():
        same = slice(None)
        if layer in masks and layer in others:
            same = masks[layer].cpu() == others[layer].cpu()
            found["masks"] = max(found["masks"], 1 - same.float().mean().item())
        for name, columns in (("weights", slice(None)), ("masked", same)):
            size = update[:, columns].norm().clamp(min=1e-30)
            found[name] = max(found[name], ((ours[layer] - update)[:, columns].norm() / size).item())
    return found


def _result(engine, count: int, runs: Sequence[Measured], differences: Sequence[Mapping]) -> dict:
    names = [phase for phase in PHASES if any(phase in run.seconds for run in runs)]
    return {
        "engine": engine.name,
        "method": engine.method,
        "at": count if engine.needs_past else None,
        "edits": len(runs),
        "total": spread([run.total for run in runs]),
        "processor": spread([run.processor for run in runs]),
        "seconds": {name: spread([run.seconds.get(name, 0.0) for run in runs]) for name in names},
        "memory_mb": {name: max(run.memory.get(name, 0.0) for run in runs) for name in names},
        "difference": {name: max(d[name] for d in differences) for name in differences[0]} if differences else None,
    }


def _model(bed: Bed) -> dict:
    hidden, neurons = bed.view.w_out(bed.layers[0]).shape
    return {
        "type": bed.model.config.model_type, "blocks": bed.view.depth, "edited": bed.layers, "hidden": hidden, "neurons": neurons,
        "words": len(bed.view.head.weight), "prompts": len(bed.flat_templates), "protected": bed.bases[bed.layers[0]].shape[1],
        "l2": bed.l2, "value_steps": bed.settings["v_num_grad_steps"], "held_mb": peak_memory(reset=True),
    }  # fmt: skip


def _what(plan: Plan, bed: Bed) -> str:
    """What was measured, in a line."""
    model = _model(bed)
    return (
        f"{plan.shape} ({plan.dtype}, {plan.device}): D {model['hidden']}, F {model['neurons']}, V {model['words']}, "
        f"{model['blocks']} blocks, edited {', '.join(map(str, bed.layers))}; {model['prompts']} templates, "
        f"{model['value_steps']} steps for z"
    )


# ---- table

LEGEND = (
    "ms: median over the edits; each starts from the unedited weights with so many past keys. x: times as fast as EasyEdit's "
    "AlphaEdit (MEMIT: its MEMIT). rest: checks and the account of the edit. peak MB: above what was held before. weights: largest "
    "relative difference of an update to this package's (NMKE: to its first backend's, where both masks agree; mask: share of "
    "neurons where they do not). at once: AlphaEdit of so many requests in one batch, ms an edit; the same with values solved one "
    "by one has its weights compared."
)


def rows(content: Mapping) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of what `measure` gives: a row for each engine and number of past edits, seconds by phase (ms), peak
    memory, speed against EasyEdit's AlphaEdit, and difference to this package's update."""
    phases = [phase for phase in PHASES if any(phase in result["seconds"] for result in content["results"])]
    headings = ["engine", "past", "edit ms", "min..max", "x", *phases, "peak MB", "weights", "mask"]
    body = []
    for result in content["results"]:
        cells = [result["engine"], "any" if result["at"] is None else str(result["at"]), _ms(result["total"]["median"])]
        cells.append(f"{_ms(result['total']['min'])}..{_ms(result['total']['max'])}")
        cells.append("-" if result["times_faster"] is None else f"{result['times_faster']:.1f}")
        cells += [_ms(result["seconds"][phase]["median"]) if phase in result["seconds"] else "-" for phase in phases]
        cells.append(f"{max(mb for phase, mb in result['memory_mb'].items() if phase != 'evaluate'):.0f}")
        difference = result["difference"]
        cells.append("-" if difference is None else f"{difference['masked']:.0e}")
        cells.append("-" if not (difference and result["method"] == "NMKE") else f"{difference['masks']:.2%}")
        body.append(cells)
    return headings, body


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.1f}"
