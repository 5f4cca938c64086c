"""Settings for a model that nobody has tried: `nmke tune`.

Three stages, each with a share of the budget. Values: which block, learning rate, clamp, decay, steps, without touching a weight
(`values`); they are shared by every method that optimises values. Writes: with the values of the best of these, solved once on the
unedited model, a trial costs the solves of a short stream. Streams: the best few of these edit other facts in earnest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import atlas, data, facts
from ...files import user_cache, write_json
from ...hparams import HyperParams
from ...methods import method_named, method_of, methods
from ...methods.contract import check_requests
from ...methods.located import KeyValueHyperParams
from ...methods.located import templates as context_templates
from ...methods.nmke import NMKEHyperParams, attributed
from ...models.arch import ModelView, editing
from ...models.loading import load_model
from ...models.requests import Request
from ...models.updates import model_digest
from ...scores import metrics
from ...scores.kept import own_text
from ...statistics.covariance import each_moment, moment_files
from ..methods import changed
from .bed import Bed
from .studies import Search
from .values import SEARCHED, Values, blocks, starts

SHARES = {"values": 0.4, "writes": 0.35, "streams": 0.25}  # of the budget
STREAM = 32  # facts of a trial that writes
REAL = 30  # other facts, edited in earnest by the best few
FINALISTS = 2  # blocks whose values go on to the second stage
BEST = 3  # settings that edit in earnest, as far as the time allows
TOKENS_PER_NEURON = 32  # of the text for the covariance
KEPT = 5000  # characters of text on which a trial is compared with the unedited model
ENOUGH = 0.8  # of the best Rel: with less half-way, a trial that writes ends there
WORKED = 0.5  # Rel below it: nothing worked


@dataclass(frozen=True)
class Plan:
    """base: the method's settings but for those that are searched. source: "facts" or a file of records. text: of the covariance, a
    file; None: the model's own samples. seconds: the budget. trials: at most so many of values, of writes and in earnest."""

    label: str
    base: HyperParams
    directory: Path
    source: str = facts.SOURCE
    text: str | None = None
    seconds: float = 2700.0
    seed: int = 0
    trials: tuple[int | None, int | None, int] = (None, None, BEST)


@dataclass
class Outcome:
    """settings: the best, None when nothing was tried to its end. measured: its scores on the facts of the trials and on others.
    streams: (settings, scores) in earnest. interrupted: there was time left."""

    settings: HyperParams | None = None
    trial: dict[str, float] = field(default_factory=dict)
    stream: dict[str, float] = field(default_factory=dict)
    streams: list[dict] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def worked(self) -> bool:
        found = self.stream or self.trial
        return self.settings is not None and found.get("rel", 0.0) >= WORKED

    def lines(self) -> list[dict]:
        return [line for search in self.searches for line in search.lines()] + self.streams


def tune(plan: Plan, tell: Callable[[str, str], None] = lambda stage, note: None) -> Outcome:
    """Search until the budget is spent; `tell(stage, note)` is called whenever something is done.

    Ctrl-C ends it with the best so far; the same plan goes on from there. The trials are kept in `plan.directory`, values in the
    user's cache. ValueError for a method without anything to search, a model or records that cannot be used.
    """
    started, outcome = time.monotonic(), Outcome()
    model, tok = load_model(plan.base)
    view, own = ModelView(model), method_of(plan.base)
    space = plan.base.searched(view.depth)
    if not space:
        raise ValueError(
            f"{plan.label} names nothing to search ({type(plan.base).__name__}.searched is empty); edit its file by hand"
        )
    requests = _requests(plan, view, tok, own.needs_subject)
    base = changed(plan.base, {"model_name": (model, tok), **_statistics(plan, view, tok)})
    with editing(model):
        bed = Bed(model, tok, requests, (atlas.text() if plan.source in atlas.SOURCES else own_text())[:KEPT])
        search = _Tuning(plan, bed, base, space, outcome, tell, started)
        try:
            search.run()
        except KeyboardInterrupt:
            outcome.interrupted = True
            search.conclude()
    outcome.seconds = time.monotonic() - started
    return outcome


class _Tuning:
    """The stages, in order, on one bed."""

    def __init__(self, plan: Plan, bed: Bed, base: HyperParams, space: Mapping[str, Any], outcome: Outcome, tell, started: float):
        self.plan, self.bed, self.base, self.space, self.outcome = plan, bed, base, dict(space), outcome
        self.tell, self.started = tell, started
        self.has_values = isinstance(base, KeyValueHyperParams) and "blocks" in space
        self.replays = self.has_values and method_of(base).replay is not None
        self.values: Values | None = None
        self.first: dict[str, Any] | None = None  # the published starting point of values
        self.scores: list[dict[int, torch.Tensor]] = [{} for _ in range(STREAM)]
        self.writes: Search | None = None

    def run(self) -> None:
        best = self._values() if self.has_values else []
        self._writes(best)
        self._streams()
        self.conclude()

    # ---- values

    def _values(self) -> list[dict[str, Any]]:
        """The settings of values that go on: the best of each of the FINALISTS best blocks, and the first start."""
        bed, plan = self.bed, self.plan
        templates = _templates(bed, self.base)
        folder = user_cache() / "tune" / _digest(bed, plan, templates)
        self.values = Values(bed, templates, folder)
        tried, depth = blocks(bed.view.depth), bed.view.depth
        first = [start for start in starts(depth) if start["block"] in tried]
        search = Search(folder / "values.db", "values", {"block": tried, **SEARCHED}, plan.seed, first, prune=True)
        self.outcome.searches.append(search)
        budget = SHARES["values"] * plan.seconds - search.seconds
        if (budget > 0 and plan.trials[0] is None) or not search.done() or plan.trials[0]:

            def measure(chosen: dict, go_on) -> dict | None:
                def told(score: float, step: int) -> bool:
                    self.tell("values", f"block {chosen['block']}, {score:.2f}")
                    return go_on(score, step)

                return self.values.tried(chosen, told)

            search.run(measure, time.monotonic() + max(budget, 0), plan.trials[0])
        ranked = [chosen for chosen, _ in search.done()]
        found: dict[int, dict] = {}
        for chosen in ranked:
            if len(found) < FINALISTS:
                found.setdefault(chosen["block"], chosen)
        finalists = list(found.values())
        self.first = first[0] if first else finalists[0]
        return finalists + [start for start in first[:1] if start not in finalists]

    # ---- writes

    def _writes(self, finalists: Sequence[Mapping[str, Any]]) -> None:
        plan, space, part = self.plan, dict(self.space), self.bed.part(0, STREAM)
        if finalists:
            space = {"values": [dict(chosen) for chosen in finalists], **space}
        begun = time.monotonic()
        start = {"values": self.first, "blocks": 5} | {name: getattr(self.base, name) for name in self.space if name != "blocks"}
        name = f"{plan.label} {_hash([plan.base.to_dict(), space])}"
        search = self.writes = Search(plan.directory / "trials.db", name, space, plan.seed, [start])
        self.outcome.searches.append(search)
        budget = SHARES["writes"] * plan.seconds - search.seconds
        self._covariances(finalists)

        def measure(chosen: dict, go_on) -> dict | None:
            settings = self._settings(chosen)
            z = scores = None
            if self.replays:
                values = {name: value for name, value in chosen["values"].items()}
                z = self.values.of(values, settings, STREAM, lambda: self.tell("writes", "values"))
                scores = self._attributed(settings)
            best = max((measured["rel"] for _, measured in search.done()), default=0.0)
            found = part.edited(settings, z, scores, lambda rel: rel >= ENOUGH * best)
            self.tell("writes", "a trial fell behind" if found is None else f"{found['score']:.2f}")
            return found

        search.run(measure, begun + max(budget, 0), plan.trials[1])

    def _covariances(self, finalists: Sequence[Mapping[str, Any]]) -> None:
        """Made in one pass over the text for all blocks that a trial may edit, and cached."""
        if not self.has_values:
            return
        most = max(self.space["blocks"])
        layers = sorted({layer for chosen in finalists for layer in range(max(chosen["block"] + 1 - most, 0), chosen["block"] + 1)})
        settings = changed(self.base, {"layers": layers})
        self.tell("writes", "covariance of keys")
        for layer, _ in each_moment(self.bed.view, self.bed.tok, settings, moment_files(self.bed.view, self.bed.tok, settings)):
            self.tell("writes", f"covariance of keys, block {layer}")

    def _settings(self, chosen: Mapping[str, Any]) -> HyperParams:
        """The base with what a trial has chosen."""
        values, own = dict(chosen.get("values") or {}), {k: v for k, v in chosen.items() if k not in ("values", "blocks")}
        if values:
            block = values.pop("block")
            own["layers"] = list(range(max(block + 1 - chosen["blocks"], 0), block + 1))
        return changed(self.base, {**own, **values})

    def _attributed(self, settings: HyperParams) -> list[dict[int, torch.Tensor]] | None:
        """Each request's attribution scores on the unedited model, of the settings' layers; made once for all trials."""
        if not isinstance(settings, NMKEHyperParams) or settings.neurons == "all":
            return None
        missing = [layer for layer in settings.layers if layer not in self.scores[0]]
        templates = self.values.templates
        for layer in missing:
            asked = changed(settings, {"layers": [layer]})
            found = attributed(self.bed.view, self.bed.tok, self.bed.requests[:STREAM], templates, asked)[layer]
            for known, own in zip(self.scores, found.split(len(templates)), strict=True):
                known[layer] = own
            self.tell("writes", f"attribution, block {layer}")
        return self.scores

    # ---- in earnest

    def _streams(self) -> None:
        plan, kept = self.plan, self.plan.directory / "streams.json"
        self.outcome.streams = known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
        part = self.bed.part(STREAM, STREAM + REAL)
        deadline = self.started + plan.seconds
        longest = 0.0
        for chosen, measured in self.writes.done()[: plan.trials[2]]:
            if any(line["chosen"] == chosen and line["space"] == self.writes.study.study_name for line in known):
                continue
            begun = time.monotonic()
            if longest and begun + longest > deadline:
                break
            self.tell("streams", f"{REAL} edits")
            found = part.edited(self._settings(chosen), watch=lambda rel: self.tell("streams", f"Rel {rel:.2f}") or True)
            longest = max(longest, time.monotonic() - begun)
            line = {"stage": "streams", "space": self.writes.study.study_name, "chosen": chosen, "measured": found}
            known.append({**line, "trial_score": measured["score"], "seconds": round(time.monotonic() - begun, 2)})
            write_json(kept, known)

    def conclude(self) -> None:
        """The best by the mean of both scores where there are two, else by the trial's; nothing without a whole trial."""
        done = self.writes.done() if self.writes else []
        if not done:
            return
        name = self.writes.study.study_name
        real = {json.dumps(line["chosen"]): line["measured"] for line in self.outcome.streams if line["space"] == name}
        ranked = [(chosen, measured, real[json.dumps(chosen)]) for chosen, measured in done if json.dumps(chosen) in real]
        chosen, self.outcome.trial, self.outcome.stream = (
            max(ranked, key=lambda one: one[1]["score"] + one[2]["score"]) if ranked else (*done[0], {})
        )
        self.outcome.settings = self._settings(chosen)


# ---- what a search begins with


def base_settings(label: str, model_name: Any, **rest: Any) -> HyperParams:
    """A method's published settings for a model; "NMKE+" is NMKE's preset "plus". ValueError for a label that is no method's."""
    name, preset = ("NMKE", {"preset": "plus"}) if label == "NMKE+" else (label, {})
    kind = method_named(name, "--method").hparams
    return kind.from_dict({"layers": [0], "model_name": model_name, **preset, **rest}, source=f"--method {label}")


def _requests(plan: Plan, view: ModelView, tok, needs_subject: bool) -> list[Request]:
    """STREAM + REAL facts that the model can be edited with and scored on."""
    if plan.source == facts.SOURCE:
        found = [Request.from_dict(record) for record in facts.requests(2 * (STREAM + REAL), "tune", plan.seed)]
    elif plan.source in atlas.SOURCES:
        records = atlas.requests(2 * (STREAM + REAL), "tune", plan.seed, atlas.SOURCES[plan.source])
        found = [Request.from_dict(record) for record in records]
    else:
        found = list(data.load(Path(plan.source), needs_subject=needs_subject).requests)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(plan.seed)).tolist()
        found = [found[i] for i in order]
    usable: dict[str, Request] = {}
    for request in found:
        try:
            check_requests(view, tok, [request])
            metrics.check(view.model, tok, [request])
        except ValueError:
            continue
        if request.rephrase_prompts and request.locality:
            usable.setdefault(request.prompt, request)
        if len(usable) == STREAM + REAL:
            return list(usable.values())
    raise ValueError(
        f"{plan.source} has {len(usable)} records that this model can be edited with, with a rephrase and locality prompts each; "
        f"a search needs {STREAM + REAL}"
    )


def _statistics(plan: Plan, view: ModelView, tok) -> dict[str, Any]:
    """Which text the covariance is of, and how much of it: TOKENS_PER_NEURON."""
    if not hasattr(plan.base, "mom2_dataset"):
        return {}
    tokens = TOKENS_PER_NEURON * view.w_out(0).shape[1]
    if plan.text is None:
        return {"mom2_dataset": "self", "mom2_n_samples": -(-tokens // 12800) * 100}
    count = total = 0
    with Path(plan.text).open(encoding="utf-8") as lines:
        for line in lines:
            if total >= tokens:
                break
            if line.strip():
                count, total = count + 1, total + min(len(tok(line)["input_ids"]), 512)
    return {"mom2_dataset": plan.text, "mom2_n_samples": max(count, 1)}


def _templates(bed: Bed, base: HyperParams) -> list[str]:
    settings = changed(base, {"layers": [0]})
    if not hasattr(settings, "template_length"):  # ROME, which has many: values are compared under the others'
        settings = methods()["AlphaEdit"].hparams.from_dict({"layers": [0], "model_name": base.model_name, "seed": base.seed})
    return [template for group in context_templates(bed.view, bed.tok, settings) for template in group]


def _digest(bed: Bed, plan: Plan, templates: Sequence[str]) -> str:
    """Names what values depend on: weights, facts, templates, seed."""
    return _hash([model_digest(bed.model), [request.to_dict() for request in bed.requests], list(templates), plan.seed, SEARCHED])


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
