"""Past keys: a solver for each layer that keeps the outputs at them, and which edit each key is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .log import Consolidation, Edit, Event, consolidated, standing


class Memory:
    """solvers: layer -> an object with `append`, `truncate`, `without` and `count` (methods/solver.py), and `exact` where its keys
    are no states of the model and must not be rounded to its dtype; columns: the edit of every past key, in the solvers' order."""

    def __init__(self, solvers: Mapping[int, Any]):
        self.solvers, self.columns = dict(solvers), []

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Whatever is raised inside takes the keys back that were appended there."""
        counts, columns = {layer: solver.count for layer, solver in self.solvers.items()}, self.columns
        try:
            yield
        except BaseException:
            self.columns = columns
            for layer, count in counts.items():
                self.solvers[layer].truncate(count)
            raise

    def append(self, ids: Sequence[int], keys: Mapping[int, torch.Tensor]) -> None:
        """Remember keys [F, ids] of each layer."""
        for layer in keys:
            self.solvers[layer].append(keys[layer])
        self.columns = [*self.columns, *(ids if keys else ())]

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` keys."""
        self.columns = self.columns[:count]
        for solver in self.solvers.values():
            solver.truncate(count)

    def forget(self, ids: Sequence[int]) -> None:
        """Go on with solvers that have not seen the keys of some edits; those in use until now stay as they are."""
        places = [place for place, edit in enumerate(self.columns) if edit in ids]
        if places:
            self.solvers = {layer: solver.without(places) for layer, solver in self.solvers.items()}
            self.columns = [edit for edit in self.columns if edit not in ids]

    def recall(self, events: Sequence[Event]) -> None:
        """The keys that a log leaves, appended and taken out in the order in which they were; from its last consolidation on."""
        self.truncate(0)
        whole = consolidated(events)
        for number in range(0 if whole is None else events.index(whole), len(events)):
            self.take(events[: number + 1])

    def take(self, events: Sequence[Event]) -> None:
        """What the last of `events` did to the keys. A consolidation leaves its own, and after them those of later edits."""
        event = events[-1]
        if isinstance(event, Edit):
            self.forget([old for olds in event.supersedes.values() for old in olds])
            self.append(event.ids, event.keys)
            return
        calls = {i: made for made in events if isinstance(made, Edit) for i in made.ids}
        if isinstance(event, Consolidation):
            self.truncate(0)
            later, now = (i for i, made in calls.items() if made.first > event.last), standing(events)
            back = [i for i in (*event.edits, *later) if now[i] == "effective"]
        else:
            self.forget([event.edit])
            back = calls[event.edit].supersedes.get(event.edit, ())
        whole = consolidated(events)
        for edit in back:
            anew = whole is not None and edit in whole.edits
            keys, place = (whole.keys, whole.edits.index(edit)) if anew else (calls[edit].keys, edit - calls[edit].first)
            self.append([edit], {layer: columns[:, place, None] for layer, columns in keys.items()})
