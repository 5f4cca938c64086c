"""Past keys: a solver for each layer that keeps the outputs at them, and which edit each key is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .log import Edit, Event


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
        """The keys that a log leaves, appended and taken out in the order in which they were."""
        self.truncate(0)
        for number in range(len(events)):
            self.take(events[: number + 1])

    def take(self, events: Sequence[Event]) -> None:
        """What the last of `events` did to the keys."""
        event = events[-1]
        if isinstance(event, Edit):
            self.forget([old for olds in event.supersedes.values() for old in olds])
            self.append(event.ids, event.keys)
            return
        self.forget([event.edit])
        edits = {i: made for made in events if isinstance(made, Edit) for i in made.ids}
        for old in edits[event.edit].supersedes.get(event.edit, ()):
            made = edits[old]
            self.append([old], {layer: keys[:, old - made.first, None] for layer, keys in made.keys.items()})
