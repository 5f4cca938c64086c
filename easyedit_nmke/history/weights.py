"""Edited weights that can be had again: the originals, the updates, and float32 masters of 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..models.updates import HALF, Update, accumulate, fingerprint, of_parameter
from .log import Event, changes_of


class EditedWeights:
    """Parameters by name, as matrices [out, in], always in one order: the weights after any edit are the originals plus the updates
    in order (`updates.accumulate`), to the bit.

    16-bit weights have float32 masters on their device, to which updates are added; each weight is its master, rounded. With
    `replays` false nothing is kept to go back to, but with `originals` the weights before the first edit. Memory at 8B with 5
    layers in bfloat16: masters 1.2 GB, originals 0.6 GB.
    """

    def __init__(self, replays: bool = True, originals: bool = False):
        self.replays, self.originals = replays, originals
        self.now: Mapping[str, torch.Tensor] = {}  # of the live model
        self.masters: dict[str, torch.Tensor] = {}  # [out, in] float32
        # (events before it, digest, weights): where a replay may start, the originals first
        self.bases: list[tuple[int, int, dict[str, torch.Tensor]]] = []

    def digest(self) -> int:
        """Of all bits as they are now."""
        return fingerprint(self.now)

    def begin(self, events: int, digest: int) -> None:
        """Replays start from the weights as they are now, after so many events."""
        kept: dict[str, torch.Tensor] = {}
        if self.replays or self.originals:
            kept = {name: weight.detach().to("cpu", copy=True) for name, weight in self.now.items()}
        if self.replays:
            self.masters = {name: weight.float() for name, weight in self.now.items() if weight.dtype in HALF}
        self.bases.append((events, digest, kept))

    def follow_devices(self) -> None:
        """Masters go where the model has gone."""
        self.masters = {name: master.to(self.now[name].device) for name, master in self.masters.items()}

    def write(self, update: Update, earlier: Sequence[Update]) -> Update:
        """Add one update of an edit in hand to its weight, in place; returns it as it was added and is to be recorded. `earlier`:
        those that this edit has added already.

        A weight with a master is set to the master plus all of the edit's updates, rounded once; the master itself waits for
        `settle`. FloatingPointError when the sum is not finite; the caller puts the weight back.
        """
        weight = self.now[update.parameter]
        update = update.rounded(weight.dtype)
        master = self.masters.get(update.parameter)
        if master is None:
            accumulate(weight, weight, [update])
        else:
            accumulate(weight, master, [*of_parameter(earlier, update.parameter), update])
        if not torch.isfinite(weight).all():
            raise FloatingPointError(f"the update of {update.parameter} is not finite; the model is left as it was")
        return update

    def settle(self, updates: Sequence[Update]) -> None:
        """A finished edit's updates become part of the masters."""
        for name, master in self.masters.items():
            accumulate(master, master, of_parameter(updates, name))

    def changes(self, events: Sequence[Event]) -> tuple[dict[str, torch.Tensor], list[Update]]:
        """What the weights after `events` are made of: (name -> [out, in] on the CPU, updates added to it).

        Up to a consolidation these are its updates alone."""
        count, _, base = [base for base in self.bases if base[0] <= len(events)][-1]
        return base, changes_of(events, count)

    @torch.no_grad()
    def set_to(self, events: Sequence[Event], masters: bool = True) -> None:
        """Make weights (and masters) what `events` made of them."""
        base, made = self.changes(events)
        for name, weight in self.now.items():
            updates = of_parameter(made, name)
            if masters and name in self.masters:
                accumulate(self.masters[name], base[name], updates)
                weight.copy_(self.masters[name])
            else:
                accumulate(weight, base[name], updates)

    def change(self, name: str) -> torch.Tensor:
        """By what edits have changed a parameter [out, in] so far, float64. ValueError when something else changed it, too."""
        if len(self.bases) > 1:
            raise ValueError(f"{name} was changed by something else between edits, so what edits changed is not known")
        now = self.masters.get(name, self.now[name])
        return now.double() - self.bases[0][2][name].to(now.device, torch.float64)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside it the weights may be anything; afterwards they are what they were."""
        before = {name: weight.clone() for name, weight in self.now.items()}
        try:
            yield
        finally:
            for name, weight in before.items():
                self.now[name].copy_(weight)
