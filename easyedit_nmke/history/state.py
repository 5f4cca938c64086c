"""What edits leave behind: a log of their updates, past keys, projector and templates; held by an object, never by a module."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch

from ..models.updates import HALF, Update, accumulate, fingerprint
from .log import Edit, EditReport, Event, Undo, check_undo, fact, standing

logger = logging.getLogger(__name__)


class LifelongState:
    """Solvers (statistics of old knowledge and past keys, one per layer), context templates, and the log of edits.

    `settings` are the hyperparameters that the state depends on; a call with others needs a state of its own.

    The weights after any edit are the originals plus the updates in order (`updates.accumulate`), so the log gives them back to the
    bit. 16-bit weights have float32 masters on their device, to which updates are added; each weight is its master, rounded.
    Memory at 8B with 5 layers in bfloat16: masters 1.2 GB, originals 0.6 GB and 0.4 MB per edit on the CPU.

    factors: the method's updates are low-rank, so the log holds them; FT's are not, and nothing of it can be replayed.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        solvers: Mapping[int, Any],
        templates: list[list[str]],
        value_norm: float | None = None,
        factors: bool = True,
    ):
        self.settings, self.solvers, self.templates = dict(settings), dict(solvers), templates
        self.value_norm, self.factors = value_norm, factors  # norm of every z; None: as they are
        self.masks: Mapping[int, torch.Tensor] = {}  # of the last edit, [F] bool
        self.masters: dict[int, torch.Tensor] = {}  # [D, F] float32
        self.events: list[Event] = []
        self.notes: list[tuple[int, dict]] = []  # (events before it, content)
        self.attribution_cache: Any = None  # `attribution.AttributionCache`, made when first asked for; no part of the log
        self.book = None  # where the log is also kept on disk
        self._weights: Mapping[Any, torch.Tensor] = {}
        # (events before it, digest, weights): where a replay may start, the originals first
        self._bases: list[tuple[int, int, dict[Any, torch.Tensor]]] = []
        self._columns: list[int] = []  # the edit of every past key
        self._replaces: dict[int, list[int]] = {}  # by the edit in hand
        self._unclaimed: list[Edit] = []  # read from disk, and not asked for again in this process

    @property
    def reports(self) -> list[EditReport]:
        """Of every call, in order."""
        return [event.report for event in self.events if isinstance(event, Edit)]

    @property
    def edits(self) -> int:
        """Calls in the log."""
        return sum(isinstance(event, Edit) for event in self.events)

    @property
    def last(self) -> int:
        """The last edit; 0 before the first. Edits are counted from 1, every request of a call is one."""
        return max((event.ids[-1] for event in self.events if isinstance(event, Edit)), default=0)

    @property
    def claimed(self) -> int:
        """The last edit that this process knows of; later ones were read from disk (see `claim`)."""
        return self._unclaimed[0].first - 1 if self._unclaimed else self.last

    @property
    def flat_templates(self) -> list[str]:
        """All context templates, the bare prompt first."""
        return [template for group in self.templates for template in group]

    # ---- editing

    def follow(self, weights: Mapping[Any, torch.Tensor]) -> None:
        """Take note of what happened to `weights` (layer -> w_out [D, F], always in one order) since the last call.

        Weights put back to what they were after an earlier call (EasyEdit does so after a non-sequential edit) take the log, the
        masters and the past keys back with them. Weights changed in another way keep them, with a warning: what lies before
        can no longer be undone. With a state on disk that is a ValueError.
        """
        now, self._weights = fingerprint(weights), weights
        digests = [self._bases[0][1] if self._bases else now, *(event.digest for event in self.events)]
        for count, digest, _ in self._bases:
            digests[count] = digest  # an outside change took the place of what was there
        if now in digests:
            step = len(digests) - 1 - digests[::-1].index(now)
            if not self._bases:
                self._begin(now)
            elif step < len(self.events):
                self._drop(step)
                if self.masters:
                    self._write()
                if self.book:
                    self.book.rollback(step)
                logger.debug("weights were put back to edit %d; so were the past keys", self.last)
            self.masters = {layer: master.to(weights[layer].device) for layer, master in self.masters.items()}
            return
        if self.book:
            raise ValueError(
                f"the edited weights were changed by something else since edit {self.last}, of which the state in "
                f"{self.book.directory} knows nothing; load the model anew"
            )
        logger.warning("the edited weights were changed by something else since edit %d; past keys are kept", self.last)
        self._begin(now)

    def _begin(self, digest: int) -> None:
        """Replays start from the weights as they are now."""
        kept: dict[Any, torch.Tensor] = {}
        if self.factors:
            kept = {layer: weight.detach().to("cpu", copy=True) for layer, weight in self._weights.items()}
            self.masters = {layer: weight.float() for layer, weight in self._weights.items() if weight.dtype in HALF}
        self._bases.append((len(self.events), digest, kept))

    @contextmanager
    def superseding(self, requests: Sequence[Any]) -> Iterator[None]:
        """Inside it, an edit of `requests` is solved and recorded without the keys of earlier edits of the same facts; they come
        back when it fails."""
        facts = {fact(vars(request)): self.last + 1 + i for i, request in enumerate(requests)}
        known = {i: f for event in self.events if isinstance(event, Edit) for i, f in event.facts.items() if f in facts}
        now = standing(self.events) if known else {}
        self._replaces = {}
        for old, about in known.items():
            if now[old] == "effective":
                self._replaces.setdefault(facts[about], []).append(old)
        before = self.solvers, self._columns
        try:
            self._forget([old for olds in self._replaces.values() for old in olds])
            yield
        except BaseException:
            self.solvers, self._columns = before
            raise
        finally:
            self._replaces = {}

    def advance(
        self,
        weights: Mapping[Any, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
        report: EditReport,
        requests: Sequence[Any] = (),
    ) -> None:
        """Record one finished call: keys [F, requests] of each layer become past keys (none, for methods without a memory)."""
        keys = {
            layer: k.to(weights[layer].dtype if weights[layer].dtype in HALF else torch.float32).cpu() for layer, k in keys.items()
        }
        updates = tuple(u._replace(left=u.left.cpu(), right=u.right.cpu()) for u in report.updates)
        z = None if report.z is None else report.z.float().cpu()
        masks = {layer: mask.cpu() for layer, mask in report.masks.items()}
        told = replace(report, masks={}, updates=[], z=None)
        asked = tuple(request.to_dict() for request in requests)
        made = datetime.now(timezone.utc).isoformat(timespec="seconds")
        edit = Edit(self.last + 1, asked, updates, keys, z, masks, told, self._replaces, fingerprint(weights), made)
        counts, known = {layer: self.solvers[layer].count for layer in keys}, len(self._columns)
        try:
            self._append(edit.ids, keys)
            for layer, master in self.masters.items():
                accumulate(master, master, [update for update in updates if update.layer == layer])
            if self.book:
                self.book.edit(edit)
        except BaseException:
            for layer, count in counts.items():
                self.solvers[layer].truncate(count)
            del self._columns[known:]
            if self.masters:
                self._write()
            raise
        self.events.append(edit)
        self.masks = masks

    def note(self, content: Mapping[str, Any]) -> None:
        """Keep what a driver has to know when it goes on, with the log as it is now. Edits so far are then known to it."""
        if self.book:
            self.book.note(content)
        self._unclaimed = []
        self.notes.append((len(self.events), dict(content)))

    def claim(self, requests: Sequence[Any]) -> bool:
        """Whether the log on disk holds the edit of `requests` already, made by an earlier process and in effect. Once for each."""
        if not self._unclaimed:
            return False
        wanted = [(*fact(vars(request)), request.target_new) for request in requests]
        now = standing(self.events)
        for edit in self._unclaimed:
            if edit.asked == wanted and all(now[i] == "effective" for i in edit.ids):
                self._unclaimed.remove(edit)
                return True
        return False

    # ---- going back

    def rollback(self, to: int) -> None:
        """Bring the weights and the past keys to what they were after edit `to` (0: before the first), bit for bit.

        What came later, undone edits among it, is as if it had never been.
        """
        self.rewind(self._step(to))

    def rewind(self, step: int) -> None:
        """`rollback` to the first `step` events of the log."""
        if step == len(self.events):
            return
        with self._unchanged_on_error():
            self._drop(step)
            self._write()
            if self.book:
                self.book.rollback(step)

    def undo(self, edit: int) -> None:
        """Take one edit out, wherever it lies: the weights become the originals plus all other updates, the past keys lose its own.

        The other updates stay as they were solved. An edit that superseded another brings that one back. Errors are ValueErrors.
        """
        self._check_replays(check_undo(self.events, edit))
        with self._unchanged_on_error():
            self.events.append(Undo(edit))
            self._write()
            self._retake(self.events[-1])
            self.events[-1] = Undo(edit, self._digest())
            if self.book:
                self.book.undo(self.events[-1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes inside it are made, and recorded, all or none."""
        with self._unchanged_on_error(), self.book.together() if self.book else nullcontext():
            unclaimed, self._unclaimed = self._unclaimed, []
            yield
            self._unclaimed = [edit for edit in unclaimed if edit in self.events]

    @contextmanager
    def as_of(self, edit: int) -> Iterator[None]:
        """Inside it, the weights are as after edit `edit`; no editing there."""
        if edit == self.last:
            yield
            return
        step = self._step(edit)
        now = {layer: weight.clone() for layer, weight in self._weights.items()}
        try:
            self._write(self.events[:step], masters=False)
            yield
        finally:
            for layer, weight in now.items():
                self._weights[layer].copy_(weight)

    def replay(self, events: Sequence[Event], notes: Sequence[tuple[int, dict]]) -> None:
        """Take the place of the state that left `events`: one opened on the same unedited model. ValueError when the weights do not
        become those that it left."""
        self.events, self.notes = list(events), list(notes)
        noted = max((count for count, _ in notes), default=0)
        self._unclaimed = [event for event in self.events[noted:] if isinstance(event, Edit)]
        self._write()
        self._recall()
        if self.events and self.events[-1].digest not in (None, self._digest()):
            raise ValueError(f"the updates up to edit {self.last} do not give the weights that were recorded")
        if self.events:
            self.events[-1] = replace(self.events[-1], digest=self._digest())
        self.masks = next((event.masks for event in reversed(self.events) if isinstance(event, Edit)), {})

    def changes(self, events: Sequence[Event] | None = None) -> tuple[dict[Any, torch.Tensor], list[Update]]:
        """What the weights after `events`, by default all, are made of: (layer -> w_out [D, F] on the CPU, updates added to it)."""
        events = self.events if events is None else events
        count, _, base = [base for base in self._bases if base[0] <= len(events)][-1]
        undone = {event.edit for event in events if isinstance(event, Undo)}
        made = [
            update.without({i - event.first for i in undone})
            for event in events[count:]
            if isinstance(event, Edit)
            for update in event.updates
        ]
        return base, made

    def _step(self, edit: int) -> int:
        """How many events there are up to `edit`; ValueError when weights at it cannot be had."""
        ends = {0: 0, **{event.ids[-1]: i + 1 for i, event in enumerate(self.events) if isinstance(event, Edit)}}
        if edit not in ends:
            whole = next((event.ids for event in self.events if isinstance(event, Edit) and edit in event.ids), None)
            if whole is None:
                raise ValueError(f"there is no edit {edit}; edits are 1 to {self.last}, 0 is before the first")
            raise ValueError(
                f"edits {whole[0]} to {whole[-1]} share one update; go to {whole[0] - 1} or {whole[-1]}, or undo single ones"
            )
        self._check_replays(ends[edit], going=True)
        return ends[edit]

    def _check_replays(self, place: int, going: bool = False) -> None:
        if not self.factors:
            raise ValueError(f"the updates of {self.settings.get('alg_name')} are not kept: they are as large as the weights")
        if not going and self._bases and place < self._bases[-1][0]:
            raise ValueError("the edited weights were changed by something else after that edit, so it cannot be taken out of them")

    def _digest(self) -> int:
        return fingerprint(self._weights)

    @torch.no_grad()
    def _write(self, events: Sequence[Event] | None = None, masters: bool = True) -> None:
        """Set weights (and masters) to what `events`, by default all, made of them."""
        base, made = self.changes(events)
        for layer, weight in self._weights.items():
            updates = [update for update in made if update.layer == layer]
            if masters and layer in self.masters:
                accumulate(self.masters[layer], base[layer], updates)
                weight.copy_(self.masters[layer])
            else:
                accumulate(weight, base[layer], updates)

    def _drop(self, step: int) -> None:
        """Forget all but the first `step` events, past keys included."""
        gone = self.events[step:]
        self.events = self.events[:step]
        self._bases = [base for base in self._bases if base[0] <= step]
        self.notes = [note for note in self.notes if note[0] <= step]
        self._unclaimed = [edit for edit in self._unclaimed if edit in self.events]
        self.masks = {}
        if any(isinstance(event, Undo) or event.supersedes for event in gone):
            self._recall()
        else:
            kept = len(self._columns) - sum(len(event.ids) for event in gone if event.keys)
            del self._columns[kept:]
            for solver in self.solvers.values():
                solver.truncate(kept)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        before = {name: getattr(self, name) for name in ("events", "notes", "masks", "_bases", "_unclaimed")}
        before = {name: value.copy() if hasattr(value, "copy") else value for name, value in before.items()}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            self._write()
            self._recall()
            raise

    # ---- past keys

    def _recall(self) -> None:
        """The past keys that the log leaves, appended and taken out in the order in which they were."""
        events, self._columns = self.events, []
        for solver in self.solvers.values():
            solver.truncate(0)
        for event in events:
            self._retake(event)

    def _retake(self, event: Event) -> None:
        if isinstance(event, Edit):
            self._forget([old for olds in event.supersedes.values() for old in olds])
            self._append(event.ids, event.keys)
            return
        self._forget([event.edit])
        edits = self._by_id()
        for old in edits[event.edit].supersedes.get(event.edit, ()):
            self._append([old], self._keys(edits, [old]))

    def _forget(self, ids: Sequence[int]) -> None:
        """Go on with solvers that have not seen the keys of some edits; those in use until now stay as they are."""
        places = [place for place, edit in enumerate(self._columns) if edit in ids]
        if places:
            self.solvers = {layer: solver.without(places) for layer, solver in self.solvers.items()}
            self._columns = [edit for edit in self._columns if edit not in ids]

    def _append(self, ids: Sequence[int], keys: Mapping[int, torch.Tensor]) -> None:
        for layer in keys:
            self.solvers[layer].append(keys[layer])
        self._columns += ids if keys else []

    def _by_id(self) -> dict[int, Edit]:
        return {i: event for event in self.events if isinstance(event, Edit) for i in event.ids}

    @staticmethod
    def _keys(edits: Mapping[int, Edit], ids: Sequence[int]) -> dict[int, torch.Tensor]:
        """layer -> [F, ids]"""
        return {layer: torch.stack([edits[i].keys[layer][:, i - edits[i].first] for i in ids], 1) for layer in edits[ids[0]].keys}
