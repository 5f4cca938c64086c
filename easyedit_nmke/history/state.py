"""What edits leave behind, as one object: the log of their updates, weights that can be had again, and past keys."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch

from ..models.updates import HALF, Update, moved
from .log import Consolidation, Edit, EditReport, Event, Log, Undo, asked, check_alone, check_undo, consolidated, counting, standing
from .memory import Memory
from .weights import EditedWeights

logger = logging.getLogger(__name__)


class ValueNorm(NamedTuple):
    """How long the values of a layer are made: their mean norm on the unedited model (times `value_norm_factor`), that mean's
    standard error (None: not known), and over how many values it was taken."""

    mean: float
    error: float | None = None
    values: int = 0


class LifelongState:
    """A log of edits, the weights they made, past keys (a solver for each layer), and context templates.

    `settings` are the hyperparameters that the state depends on; a call with others needs a state of its own. value_norms: of the
    values solved for a layer; those of others stay as they are. replays: the log holds the updates, so every earlier state of the
    weights can be had again; an edit then takes 0.4 MB on the CPU at 8B with 5 layers in bfloat16 (a dense one 1.2 GB). originals:
    the weights before the first edit are kept even if updates are not. startup: seconds that went by before the first edit, by what
    was made (`durable.Ground`).
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        solvers: Mapping[int, Any],
        templates: list[list[str]],
        value_norms: Mapping[int, ValueNorm] | None = None,
        replays: bool = True,
        originals: bool = False,
        startup: Mapping[str, float | None] | None = None,
    ):
        self.settings, self.templates, self.value_norms = dict(settings), templates, dict(value_norms or {})
        self.log, self.weights, self.memory = Log(), EditedWeights(replays, originals), Memory(solvers)
        self.masks: Mapping[int, torch.Tensor] = {}  # of the last edit, [F] bool
        self.attribution_cache: Any = None  # `attribution.AttributionCache`, made when first asked for; no part of the log
        self.startup = {} if startup is None else startup
        self.book = None  # where the log is also kept on disk
        self._replaces: dict[int, list[int]] = {}  # by the edit in hand

    @property
    def solvers(self) -> Mapping[int, Any]:
        """Layer -> what finds its update, and remembers past keys."""
        return self.memory.solvers

    @property
    def events(self) -> list[Event]:
        """Edits, undone edits and consolidations, in order."""
        return self.log.events

    @property
    def notes(self) -> list[tuple[int, dict]]:
        """(events before it, content) of what drivers noted."""
        return self.log.notes

    @property
    def reports(self) -> list[EditReport]:
        """Of every call, in order."""
        return [edit.report for edit in self.log]

    @property
    def edits(self) -> int:
        """Calls in the log."""
        return len(self.reports)

    @property
    def last(self) -> int:
        """The last edit (see `Log.last`)."""
        return self.log.last

    @property
    def claimed(self) -> int:
        """The last edit that this process knows of (see `Log.claimed`)."""
        return self.log.claimed

    @property
    def counting(self) -> list[tuple[int, Edit]]:
        """(edit, the call that made it) of all edits that count now (see `log.counting`)."""
        return counting(self.events, self.last)

    @property
    def consolidation(self) -> Consolidation | None:
        """The last one, whose updates are part of the weights."""
        return consolidated(self.events)

    @property
    def value_norm(self) -> float | None:
        """Of the values of the last layer that has them; None: they are as they are."""
        return self.value_norms[max(self.value_norms)].mean if self.value_norms else None

    @property
    def flat_templates(self) -> list[str]:
        """All context templates, the bare prompt first."""
        return [template for group in self.templates for template in group]

    # ---- editing

    def base(self) -> tuple[Mapping[str, torch.Tensor], list[Mapping[str, Any]]]:
        """(the weights that the log begins with, name -> [out, in] on the CPU; what the edits since then ask for: those in effect,
        in order, that the edit in hand does not supersede). For methods that learn everything anew."""
        count, _, weights = self.weights.bases[-1]
        now, replaced = standing(self.events), {old for olds in self._replaces.values() for old in olds}
        made = [event for event in self.events[count:] if isinstance(event, Edit)]
        asked = [(i, request) for edit in made for i, request in zip(edit.ids, edit.requests, strict=True)]
        return weights, [request for i, request in asked if now[i] == "effective" and i not in replaced]

    def follow(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take note of what happened to `weights` (name -> matrix [out, in], always in one order) since the last call.

        Weights put back to what they were after an earlier call (EasyEdit does so after a non-sequential edit) take the log, the
        masters and the past keys back with them. Weights changed in another way keep them, with a warning: what lies before
        can no longer be undone. With a state on disk that is a ValueError.
        """
        self.weights.now = weights
        now, bases = self.weights.digest(), self.weights.bases
        digests = [bases[0][1] if bases else now, *(event.digest for event in self.events)]
        for count, digest, _ in bases:
            digests[count] = digest  # an outside change took the place of what was there
        if now in digests:
            step = len(digests) - 1 - digests[::-1].index(now)
            if not bases:
                self.weights.begin(0, now)
            elif step < len(self.events):
                if self.book:  # first: when it cannot be written, it is tried again the next time
                    self.book.rollback(step)
                self._drop(step)
                if self.weights.masters:
                    self.weights.set_to(self.events)
                logger.debug("weights were put back to edit %d; so were the past keys", self.last)
            self.weights.follow_devices()
            return
        if self.book:
            raise ValueError(
                f"the edited weights were changed by something else since edit {self.last}, of which the state in "
                f"{self.book.directory} knows nothing; load the model anew"
            )
        logger.warning("the edited weights were changed by something else since edit %d; past keys are kept", self.last)
        self.weights.begin(len(self.events), now)

    @contextmanager
    def superseding(self, requests: Sequence[Any]) -> Iterator[None]:
        """Inside it, an edit of `requests` is solved and recorded without the keys of earlier edits of the same facts; they come
        back when it fails."""
        self._replaces = self.log.superseded([vars(request) for request in requests])
        before = vars(self.memory).copy()
        try:
            self.memory.forget([old for olds in self._replaces.values() for old in olds])
            yield
        except BaseException:
            vars(self.memory).update(before)
            raise
        finally:
            self._replaces = {}

    def write(self, update: Update, report: EditReport) -> None:
        """Add an update of the edit in hand to its weight, and note it in the report as it was added (`EditedWeights.write`)."""
        report.updates.append(self.weights.write(update, report.updates))

    def advance(self, report: EditReport, requests: Sequence[Any] = ()) -> None:
        """Record one finished call. The report's keys become past keys; keys, masks, updates and z are the log's from now on."""
        updates, keys = self._kept(report)
        z = None if report.z is None else report.z.float().cpu()
        masks = {layer: mask.cpu() for layer, mask in report.masks.items()}
        told = replace(report, masks={}, updates=[], keys={}, z=None)
        edit = Edit(
            self.last + 1, tuple(request.to_dict() for request in requests), updates, keys, z, masks, told, self._replaces,
            self.weights.digest(), _now(),
        )  # fmt: skip
        with self.memory.unchanged_on_error():
            try:
                self.memory.append(edit.ids, keys)
                self.weights.settle(updates)
                if self.book:
                    self.book.edit(edit)
            except BaseException:
                if self.weights.masters:
                    self.weights.set_to(self.events)
                raise
        self.events.append(edit)
        self.masks = masks

    def _kept(self, report: EditReport) -> tuple[tuple[Update, ...], dict[int, torch.Tensor]]:
        """The report's updates and keys, as the log has them."""
        dtype = next((weight.dtype for weight in self.weights.now.values() if weight.dtype in HALF), torch.float32)
        exact = {layer for layer, solver in self.solvers.items() if getattr(solver, "exact", False)}
        keys = {layer: (k if layer in exact else k.to(dtype)).cpu() for layer, k in report.keys.items()}
        return tuple(moved(update, "cpu") for update in report.updates) if self.weights.replays else (), keys

    def consolidate(self, solve: Callable[[list[tuple[int, Edit]]], EditReport], undone: int | None = None) -> None:
        """Put one solution of all edits that count in the place of all updates so far; its keys become the past keys.

        solve: called with the edits (and the call of each) on the original weights and without past keys, writes them. undone: take
        out this edit, which a consolidation holds, and make that one anew without it; later edits stay as they were solved. All or
        nothing, also on disk. ValueError when there is nothing to consolidate.
        """
        self._check_replays()
        if undone is not None:
            check_undo(self.events, undone)
        if len(self.weights.bases) > 1:
            raise ValueError("the edited weights were changed by something else between edits, which a consolidation would undo")
        whole = self.consolidation
        last = self.last if whole is None or undone is None else whole.last
        if undone is None and (not self.last or self.events[-1] is whole or not self.counting):
            raise ValueError("there are no edits" if not self.counting else f"edits up to {whole.last} are consolidated already")
        started, group = time.perf_counter(), self.book.together() if self.book and undone is not None else nullcontext()
        with self._unchanged_on_error(), group:
            if undone is not None:
                self.events.append(Undo(undone))
                if self.book:
                    self.book.undo(self.events[-1])
            edits = counting(self.events, last)
            self.weights.set_to([])
            self.memory.truncate(0)
            updates, keys = self._kept(solve(edits)) if edits else ((), {})
            seconds = time.perf_counter() - started
            self.events.append(Consolidation(last, tuple(i for i, _ in edits), updates, keys, seconds, _now()))
            self.weights.set_to(self.events)
            self.memory.recall(self.events)
            self.events[-1] = replace(self.events[-1], digest=self.weights.digest())
            if self.book:
                self.book.consolidation(self.events[-1])

    def note(self, content: Mapping[str, Any]) -> None:
        """Keep what a driver has to know when it goes on, with the log as it is now. Edits so far are then known to it."""
        if self.book:
            self.book.note(content)
        self.log.note(content)

    def claim(self, requests: Sequence[Any]) -> bool:
        """Whether the log on disk holds the edit of `requests` already, made by an earlier process and in effect. Once for each."""
        return self.log.claim(asked([vars(request) for request in requests]))

    # ---- going back

    def rollback(self, to: int) -> None:
        """Bring the weights and the past keys to what they were after edit `to` (0: before the first), bit for bit.

        What came later, undone edits among it, is as if it had never been.
        """
        step = self.log.step(to)
        self._check_replays()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """`rollback` to the first `step` events of the log."""
        if step == len(self.events):
            return
        with self._unchanged_on_error():
            self._drop(step)
            self.weights.set_to(self.events)
            if self.book:
                self.book.rollback(step)

    def undo(self, edit: int) -> None:
        """Take one edit out, wherever it lies: the weights become the originals plus all other updates, the past keys lose its own.

        The other updates stay as they were solved. An edit that superseded another brings that one back. Errors are ValueErrors.
        What a consolidation holds is taken out by `consolidate`.
        """
        place = check_undo(self.events, edit)
        check_alone(self.events, edit)
        self._check_replays()
        if self.weights.bases and place < self.weights.bases[-1][0]:
            raise ValueError("the edited weights were changed by something else after that edit, so it cannot be taken out of them")
        with self._unchanged_on_error():
            self.events.append(Undo(edit))
            self.weights.set_to(self.events)
            self.memory.take(self.events)
            self.events[-1] = Undo(edit, self.weights.digest())
            if self.book:
                self.book.undo(self.events[-1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes inside it are made, and recorded, all or none."""
        with self._unchanged_on_error(), self.book.together() if self.book else nullcontext(), self.log.nothing_to_claim():
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside it every edit is made, and none is kept on disk: for those that are taken back before it ends."""
        book, self.book = self.book, None
        try:
            with self.log.nothing_to_claim():
                yield
        finally:
            self.book = book

    @contextmanager
    def as_of(self, edit: int) -> Iterator[None]:
        """Inside it, the weights are as when the next edit after `edit` was made; no editing there."""
        if edit == self.last:
            yield
            return
        step = self.log.step(edit)
        step = next(place for place in range(step, len(self.events)) if isinstance(self.events[place], Edit))
        self._check_replays()
        with self.weights.lent():
            self.weights.set_to(self.events[:step], masters=False)
            yield

    def replay(self, events: Sequence[Event], notes: Sequence[tuple[int, dict]]) -> None:
        """Take the place of the state that left `events`: one opened on the same unedited model. ValueError when the weights do not
        become those that it left."""
        self.log.read(events, notes)
        self.weights.set_to(self.events)
        self.memory.recall(self.events)
        if self.events and self.events[-1].digest not in (None, self.weights.digest()):
            raise ValueError(f"the updates up to edit {self.last} do not give the weights that were recorded")
        if self.events:
            self.events[-1] = replace(self.events[-1], digest=self.weights.digest())
        self.masks = self._last_masks()

    def _last_masks(self) -> Mapping[int, torch.Tensor]:
        return next((event.masks for event in reversed(self.events) if isinstance(event, Edit)), {})

    def changes(self) -> tuple[dict[str, torch.Tensor], list[Update]]:
        """What the weights are made of (see `EditedWeights.changes`)."""
        return self.weights.changes(self.events)

    def _check_replays(self) -> None:
        if not self.weights.replays:
            name = self.settings.get("alg_name")
            raise ValueError(f"the updates of {name} are not kept, they are as large as the weights; set keep_updates: true")

    def _drop(self, step: int) -> None:
        """Forget all but the first `step` events, past keys included."""
        gone = self.log.truncate(step)
        self.weights.bases = [base for base in self.weights.bases if base[0] <= step]
        self.masks = self._last_masks()
        if any(not isinstance(event, Edit) or event.supersedes for event in gone):
            self.memory.recall(self.events)
        else:
            self.memory.truncate(len(self.memory.columns) - sum(len(event.ids) for event in gone if event.keys))

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        log = {name: value.copy() for name, value in vars(self.log).items()}
        masks, bases = self.masks, self.weights.bases.copy()
        try:
            yield
        except BaseException:
            vars(self.log).update(log)
            self.masks, self.weights.bases = masks, bases
            self.weights.set_to(self.events)
            self.memory.recall(self.events)
            raise


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
