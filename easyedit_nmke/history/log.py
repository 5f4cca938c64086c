"""What is known of every edit: its report, the update it made, the keys it left, and what has become of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..models.updates import Update


@dataclass
class EditReport:
    """What one call did: requests, mask density and ratios per layer, loss of the values, seconds by phase."""

    requests: int
    density: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, tuple[float, float]] = field(default_factory=dict)
    value_loss: list[float] = field(default_factory=list)
    residual: float = 0.0  # mean norm of z - current z before the update
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)  # MB by phase: of the process, on a GPU of its allocations
    attribution: str = ""  # the backend that scored neurons, and why it was taken
    overlap: dict[int, float] = field(default_factory=dict)  # Jaccard overlap of each layer's mask with the last edit's
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # [F] bool; these three are taken over by the state
    updates: list[Update] = field(default_factory=list)  # what was added to the weights, in order
    z: torch.Tensor | None = None  # [D, requests] float32, the values that the updates write

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EditReport:
        """From `to_dict`, also after JSON made texts of the layers' numbers."""
        by_layer = ("density", "ratios", "overlap")
        values = {k: {int(i): x for i, x in v.items()} if k in by_layer else v for k, v in content.items()}
        return cls(**{**values, "ratios": {layer: tuple(pair) for layer, pair in values["ratios"].items()}})

    def to_dict(self) -> dict:
        """Everything but the tensors."""
        return {name: value for name, value in vars(self).items() if name not in ("masks", "updates", "z")}


@dataclass(frozen=True, eq=False)
class Edit:
    """One call: edits `first` to `first` + requests - 1. Tensors are on the CPU.

    keys: layer -> [F, requests], what the past keys have grown by. supersedes: edit -> earlier edits of the same fact, whose
    keys its own stand for. digest: of the weights after it.
    """

    first: int
    requests: tuple[Mapping[str, Any], ...]  # EasyEdit's dictionaries
    updates: tuple[Update, ...]
    keys: Mapping[int, torch.Tensor]
    z: torch.Tensor | None
    masks: Mapping[int, torch.Tensor]
    report: EditReport
    supersedes: Mapping[int, Sequence[int]]
    digest: int
    made: str  # when, UTC

    def __deepcopy__(self, memo) -> Edit:
        return self  # nobody changes it

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.report.requests)

    @cached_property
    def facts(self) -> dict[int, tuple[str, str]]:
        """Edit -> what it is about."""
        return {i: fact(request) for i, request in zip(self.ids, self.requests, strict=False)}

    @property
    def asked(self) -> list[tuple[str, ...]]:
        """What the update depends on; requests that differ in their probes alone ask for the same."""
        return [(*fact(request), request["target_new"]) for request in self.requests]


@dataclass(frozen=True)
class Undo:
    """Edit `edit` was taken out. digest: of the weights after that; None where no model was at hand."""

    edit: int
    digest: int | None = None


Event = Edit | Undo


def fact(request: Mapping[str, Any]) -> tuple[str, str]:
    """Subject and prompt, whatever the spaces: two requests that share them are about one fact."""
    return " ".join(request["subject"].split()), " ".join(request["prompt"].split())


def standing(events: Iterable[Event]) -> dict[int, str]:
    """Every edit of a log in order, and what has become of it: "effective", "undone", or "superseded by 7"."""
    found: dict[int, str] = {}
    replaced: dict[int, Sequence[int]] = {}
    for event in events:
        if isinstance(event, Undo):
            found[event.edit] = "undone"
            found.update(dict.fromkeys(replaced.pop(event.edit, ()), "effective"))
            continue
        for new, olds in event.supersedes.items():
            found.update(dict.fromkeys(olds, f"superseded by {new}"))
        replaced.update(event.supersedes)
        found.update(dict.fromkeys(event.ids, "effective"))
    return found


def check_undo(events: Sequence[Event], edit: int) -> int:
    """Which of the events made `edit`; ValueError for one that cannot be taken out."""
    now = standing(events)
    if edit not in now:
        raise ValueError(
            f"there is no edit {edit}; " + (f"edits are {min(now)} to {max(now)}" if now else "nothing has been edited")
        )
    if now[edit] == "undone":
        raise ValueError(f"edit {edit} is undone already")
    if now[edit] != "effective":
        newer = now[edit].split()[-1]
        raise ValueError(f"edit {edit} is {now[edit]}; undo {newer} first, which brings {edit} back")
    return next(i for i, event in enumerate(events) if isinstance(event, Edit) and edit in event.ids)
