"""Settings for a model that nobody has tried: `nmke tune`.

Three stages, each with a share of the budget. Values: which block, learning rate, clamp, decay, steps, without touching a weight
(`values`); they are shared by every method that optimises values. Writes: with the values of the best of these, solved once on the
unedited model, a trial costs the solves of a short stream. Streams: the best few of these edit other facts in earnest.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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
from ...models.arch import ModelView, editing
from ...models.loading import load_model
from ...models.passes import chunks
from ...models.requests import Request
from ...models.updates import model_digest
from ...scores import metrics
from ...scores.kept import own_text
from ...statistics.covariance import SecondMoment, each_moment, moment_files
from ..cluster import Pool, cluster, gpus_of, placed
from ..methods import changed
from .bed import Bed
from .studies import Search, Tried, Watch
from .trials import Trials
from .values import SEARCHED, blocks, starts

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
    file; None: the model's own samples. seconds: the budget. trials: at most so many of values, of writes and in earnest.
    at_a_time: so many are chosen together, by what was measured before; on a cluster they are made side by side."""

    label: str
    base: HyperParams
    directory: Path
    source: str = facts.SOURCE
    text: str | None = None
    seconds: float = 2700.0
    seed: int = 0
    trials: tuple[int | None, int | None, int] = (None, None, BEST)
    at_a_time: int = 1


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


def tune(plan: Plan, tell: Callable[[str, str], None] = lambda stage, note: None, on: str | None = None) -> Outcome:
    """Search until the budget is spent; `tell(stage, note)` is called whenever something is done.

    Ctrl-C ends it with the best so far; the same plan goes on from there. The trials are kept in `plan.directory`, values in the
    user's cache. on: "ray" or "ray:ADDRESS": trials are made, and the text of the covariance is summed, by workers of that cluster
    (see `cluster`), each with a copy of the model; with the same number of trials the same comes of it. ValueError for a method
    without anything to search, a model or records that cannot be used.
    """
    started, outcome = time.monotonic(), Outcome()
    if on:
        gpus_of(plan.base)  # refuses what a worker could not load
    model, tok = load_model(plan.base)
    view, own = ModelView(model), method_of(plan.base)
    space = plan.base.searched(view.depth)
    if not space:
        raise ValueError(
            f"{plan.label} names nothing to search ({type(plan.base).__name__}.searched is empty); edit its file by hand"
        )
    requests, statistics = _requests(plan, view, tok, own.needs_subject), _statistics(plan, view, tok)
    base, text = changed(plan.base, {"model_name": (model, tok), **statistics}), _kept_text(plan)
    with editing(model), ExitStack() as opened:
        bed = Bed(model, tok, requests, text)
        templates = _templates(bed, base) if _has_values(base, space) else []
        kept = _digest(bed, plan, templates) if templates else None
        trials = Trials(bed, base, templates, user_cache() / "tune" / kept if kept else None, tell)
        pool = None
        if on:
            settings, machines = changed(plan.base, {**statistics, **placed(plan.base)}), opened.enter_context(cluster(on))
            make = partial(Trials.elsewhere, settings, requests, text, templates, kept)
            pool = opened.enter_context(machines.pool(make, gpus_of(settings)))
        search = _Tuning(plan, trials, space, outcome, tell, started, pool)
        try:
            search.run()
        except KeyboardInterrupt:
            outcome.interrupted = True
            search.conclude()
    outcome.seconds = time.monotonic() - started
    return outcome


class _Tuning:
    """The stages, in order: trials are made here or by a pool of workers."""

    def __init__(
        self, plan: Plan, trials: Trials, space: Mapping[str, Any], outcome: Outcome, tell, started: float, pool: Pool | None
    ):
        self.plan, self.trials, self.space, self.outcome = plan, trials, dict(space), outcome
        self.bed, self.base, self.tell, self.started, self.pool = trials.bed, trials.base, tell, started, pool
        self.first: dict[str, Any] | None = None  # the published starting point of values
        self.writes: Search | None = None

    def run(self) -> None:
        best = self._values() if self.trials.values else []
        self._writes(best)
        self._streams()
        self.conclude()

    def _tried(self, stage: str, calls: Sequence[tuple]) -> Iterator[Tried]:
        """Of a method of `Trials`, what comes of each call, in order."""
        calls = [(stage, *call) for call in calls]
        if self.pool is None:
            yield from (self.trials.tried(*call) for call in calls)
            return
        for made in self.pool.map("tried", calls):
            score = made.found["score"] if made.found else None
            self.tell(
                {"value": "values", "written": "writes"}.get(stage, "streams"),
                "a trial fell behind" if score is None else f"{score:.2f}",
            )
            yield made

    # ---- values

    def _values(self) -> list[dict[str, Any]]:
        """The settings of values that go on: the best of each of the FINALISTS best blocks, and the first start."""
        bed, plan, folder = self.bed, self.plan, self.trials.values.folder
        tried, depth = blocks(bed.view.depth), bed.view.depth
        first = [start for start in starts(depth) if start["block"] in tried]
        search = Search(folder / "values.db", "values", {"block": tried, **SEARCHED}, plan.seed, first, prune=True)
        self.outcome.searches.append(search)
        budget = SHARES["values"] * plan.seconds - search.seconds
        if (budget > 0 and plan.trials[0] is None) or not search.done() or plan.trials[0]:
            until = time.monotonic() + max(budget, 0)
            search.run(lambda asked: self._tried("value", asked), until, plan.trials[0], plan.at_a_time)
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
        plan, space = self.plan, dict(self.space)
        if finalists:
            space = {"values": [dict(chosen) for chosen in finalists], **space}
        begun = time.monotonic()
        start = {"values": self.first, "blocks": 5} | {name: getattr(self.base, name) for name in self.space if name != "blocks"}
        asked, text = [request.to_dict() for request in self.bed.requests], getattr(self.base, "mom2_dataset", None)
        name = f"{plan.label} {_hash([plan.base.to_dict(), space, asked, text, plan.seed])}"
        search = self.writes = Search(plan.directory / "trials.db", name, space, plan.seed, [start, *_middle(start, space)])
        self.outcome.searches.append(search)
        budget = SHARES["writes"] * plan.seconds - search.seconds
        self._covariances(finalists)

        def measure(asked: Sequence[tuple[dict, Watch]]) -> Iterator[Tried]:
            best = max((measured["rel"] for _, measured in search.done()), default=0.0)
            return self._tried("written", [(*each, STREAM, ENOUGH * best) for each in asked])

        search.run(measure, begun + max(budget, 0), plan.trials[1], plan.at_a_time)

    def _covariances(self, finalists: Sequence[Mapping[str, Any]]) -> None:
        """Made in one pass over the text for all blocks that a trial may edit, and cached; workers are given the files."""
        if not self.trials.values:
            return
        most = max(self.space["blocks"])
        layers = sorted({layer for chosen in finalists for layer in range(max(chosen["block"] + 1 - most, 0), chosen["block"] + 1)})
        settings = changed(self.base, {"layers": layers})
        self.tell("writes", "covariance of keys")
        files = moment_files(self.bed.view, self.bed.tok, settings)
        for layer, _ in each_moment(self.bed.view, self.bed.tok, settings, files, elsewhere=self._sums if self.pool else None):
            self.tell("writes", f"covariance of keys, block {layer}")
        for file in files.values() if self.pool else ():
            if file.is_file():
                self.pool.each("keep", file.name, file.read_bytes())

    def _sums(self, shards: Iterable[list[str]], layers: Sequence[int], dtype: torch.dtype) -> Iterator[dict[int, SecondMoment]]:
        return self.pool.map("sums", ((shard, layers, dtype) for shard in shards))

    # ---- in earnest

    def _streams(self) -> None:
        plan, kept = self.plan, self.plan.directory / "streams.json"
        self.outcome.streams = known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
        name, deadline, longest = self.writes.study.study_name, self.started + plan.seconds, 0.0
        there = [line["chosen"] for line in known if line["space"] == name]
        todo = [(chosen, measured) for chosen, measured in self.writes.done()[: plan.trials[2]] if chosen not in there]
        for some in chunks(todo, plan.at_a_time):
            if longest and time.monotonic() + longest > deadline:
                break
            calls = [(chosen, Watch(), STREAM, STREAM + REAL) for chosen, _ in some]
            for (chosen, measured), made in zip(some, self._tried("streamed", calls), strict=True):
                longest = max(longest, made.seconds)
                line = {"stage": "streams", "space": name, "chosen": chosen, "measured": made.found}
                known.append({**line, "trial_score": measured["score"], "seconds": made.seconds})
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
        self.outcome.settings = self.trials.settings(chosen)


# ---- what a search begins with


def _middle(start: Mapping[str, Any], space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The start with the middle of every range, where there is one: weights as published are those of models of 8B."""
    middle = {name: math.sqrt(what[0] * what[1]) for name, what in space.items() if isinstance(what, tuple)}
    return [{**start, **middle}] if middle else []


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


def _has_values(base: HyperParams, space: Mapping[str, Any]) -> bool:
    """Whether the method solves target values, at blocks that are searched."""
    return isinstance(base, KeyValueHyperParams) and "blocks" in space


def _kept_text(plan: Plan) -> str:
    return (atlas.text() if plan.source in atlas.SOURCES else own_text())[:KEPT]


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
