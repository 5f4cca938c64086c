"""What is known of every edit: its report, the updates it made, the keys it left, and what has become of it; and consolidations,
whose updates stand for those of many edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..models.updates import LowRank, Update, tensors_of


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
    skipped: list[int] = field(default_factory=list)  # requests, from 0, that were not written (`value_norm: nas`)
    # These are taken over by the state:
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # [F] bool
    updates: list[Update] = field(default_factory=list)  # what was added to the weights, in order
    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # [F, requests], to be remembered
    z: torch.Tensor | None = None  # [D, requests] float32, the values that the updates write

    TENSORS = ("masks", "updates", "keys", "z")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EditReport:
        """From `to_dict`, also after JSON made texts of the layers' numbers."""
        by_layer = ("density", "ratios", "overlap")
        values = {k: {int(i): x for i, x in v.items()} if k in by_layer else v for k, v in content.items()}
        return cls(**{**values, "ratios": {layer: tuple(pair) for layer, pair in values["ratios"].items()}})

    def to_dict(self) -> dict:
        """Everything but the tensors."""
        return {name: value for name, value in vars(self).items() if name not in self.TENSORS}


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
    apart: bool | None = None  # of one from disk, whose updates may not be read: whether they are low-rank ones

    def __deepcopy__(self, memo) -> Edit:
        return self  # nobody changes it

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.report.requests)

    @property
    def last(self) -> int:
        return self.ids[-1]

    @cached_property
    def facts(self) -> dict[int, tuple[str, str]]:
        """Edit -> what it is about."""
        return {i: fact(request) for i, request in zip(self.ids, self.requests, strict=False)}

    @property
    def bytes(self) -> int:
        """Of the tensors that are kept of it."""
        of_updates = (tensor for update in self.updates for tensor in tensors_of(update).values())
        others = (*self.keys.values(), *self.masks.values(), *([] if self.z is None else [self.z]))
        return sum(tensor.nbytes for tensor in (*of_updates, *others))

    @property
    def separable(self) -> bool:
        """Whether one request can be taken out of it."""
        apart = all(isinstance(update, LowRank) for update in self.updates) if self.apart is None else self.apart
        return self.report.requests == 1 or apart

    def updates_without(self, undone: set[int]) -> list[Update]:
        """What is left of its updates when some edits are taken out."""
        kept = (update.without({i - self.first for i in undone}) for update in self.updates)
        return [update for update in kept if update is not None]

    @property
    def asked(self) -> list[tuple[str, ...]]:
        """What the update depends on; requests that differ in their probes alone ask for the same."""
        return asked(self.requests)


@dataclass(frozen=True)
class Undo:
    """Edit `edit` was taken out. digest: of the weights after that; None where no model was at hand."""

    edit: int
    digest: int | None = None


@dataclass(frozen=True, eq=False)
class Consolidation:
    """The `edits` that counted among those up to edit `last`, solved at once: its updates, of the weights that the log begins with,
    take the place of all that was added up to then. Tensors are on the CPU.

    Keys are layer -> [F, edits]; request i of a (low-rank) update is edits[i]. digest: of the weights after it.
    """

    last: int
    edits: tuple[int, ...]
    updates: tuple[LowRank, ...]
    keys: Mapping[int, torch.Tensor]
    seconds: float
    made: str  # when, UTC
    digest: int | None = None

    def __deepcopy__(self, memo) -> Consolidation:
        return self  # nobody changes it

    def updates_without(self, undone: set[int]) -> list[Update]:
        """What is left of its updates when some edits are taken out."""
        places = {place for place, edit in enumerate(self.edits) if edit in undone}
        kept = (update.without(places) for update in self.updates)
        return [update for update in kept if update is not None]


Event = Edit | Undo | Consolidation


def fact(request: Mapping[str, Any]) -> tuple[str, str]:
    """Subject and prompt, whatever the spaces: two requests that share them are about one fact."""
    return " ".join(request["subject"].split()), " ".join(request["prompt"].split())


def asked(requests: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Subject, prompt and target of each request."""
    return [(*fact(request), request["target_new"]) for request in requests]


def standing(events: Iterable[Event]) -> dict[int, str]:
    """Every edit of a log in order, and what has become of it: "effective", "undone", or "superseded by 7"."""
    found: dict[int, str] = {}
    replaced: dict[int, Sequence[int]] = {}
    for event in events:
        if isinstance(event, Undo):
            found[event.edit] = "undone"
            found.update(dict.fromkeys(replaced.pop(event.edit, ()), "effective"))
        elif isinstance(event, Edit):
            for new, olds in event.supersedes.items():
                found.update(dict.fromkeys(olds, f"superseded by {new}"))
            replaced.update(event.supersedes)
            found.update(dict.fromkeys(event.ids, "effective"))
    return found


def consolidated(events: Sequence[Event]) -> Consolidation | None:
    """The consolidation whose updates are part of the weights after `events`: the last."""
    return next((event for event in reversed(events) if isinstance(event, Consolidation)), None)


def counting(events: Sequence[Event], last: int) -> list[tuple[int, Edit]]:
    """(edit, the call that made it) of the edits up to `last` that count, as if no later one had been made: not undone, superseded
    or skipped."""
    calls = {i: event for event in events if isinstance(event, Edit) for i in event.ids if i <= last}
    made = (event for event in events if (event.edit if isinstance(event, Undo) else event.last) <= last)
    now = standing(made)
    return [(i, call) for i, call in calls.items() if now[i] == "effective" and i - call.first not in call.report.skipped]


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
    place = next(i for i, event in enumerate(events) if isinstance(event, Edit) and edit in event.ids)
    if not events[place].separable:
        first, last = events[place].ids[0], events[place].ids[-1]
        raise ValueError(
            f"edits {first} to {last} share one update that cannot be told apart; go back to {first - 1} with rollback"
        )
    return place


def held(events: Sequence[Event], edit: int) -> bool:
    """Whether a consolidation stands for an edit's update, so that undoing the edit means solving the consolidation anew."""
    whole = consolidated(events)
    return whole is not None and edit <= whole.last


def check_alone(events: Sequence[Event], edit: int) -> None:
    """ValueError for an edit that a consolidation holds."""
    if held(events, edit):
        raise ValueError(
            f"edit {edit} was consolidated with those up to {consolidated(events).last}, which have to be solved anew without it; "
            "undo it by `LifelongEditor.undo` or `nmke undo`"
        )


def changes_of(events: Sequence[Event], start: int = 0) -> list[Update]:
    """The updates of the events from number `start` on, in order, without those of edits that any of `events` takes out; those of
    the last consolidation in the place of what it stands for."""
    undone, whole = {event.edit for event in events if isinstance(event, Undo)}, consolidated(events[start:])
    last = 0 if whole is None else whole.last
    later = [event for event in events[start:] if isinstance(event, Edit) and event.first > last]
    made = (update for event in [whole, *later][whole is None :] for update in event.updates_without(undone))
    return list(made)


class Log:
    """All events in order, notes of a driver beside them, and which edits this process has not asked for yet."""

    def __init__(self):
        self.events: list[Event] = []
        self.notes: list[tuple[int, dict]] = []  # (events before it, content)
        self._unclaimed: list[Edit] = []  # read from disk, and not asked for again in this process

    def __iter__(self) -> Iterator[Edit]:
        return (event for event in self.events if isinstance(event, Edit))

    @property
    def last(self) -> int:
        """The last edit; 0 before the first. Edits are counted from 1, every request of a call is one."""
        return next((event.ids[-1] for event in reversed(self.events) if isinstance(event, Edit)), 0)

    @property
    def claimed(self) -> int:
        """The last edit that this process knows of; later ones were read from disk (see `claim`)."""
        return self._unclaimed[0].first - 1 if self._unclaimed else self.last

    def read(self, events: Sequence[Event], notes: Sequence[tuple[int, dict]]) -> None:
        """Take the place of the log that left `events`; the edits after its last note are to be claimed."""
        self.events, self.notes = list(events), list(notes)
        noted = max((count for count, _ in notes), default=0)
        self._unclaimed = [event for event in self.events[noted:] if isinstance(event, Edit)]

    def note(self, content: Mapping[str, Any]) -> None:
        """What a driver has to know when it goes on. Edits so far are then known to it."""
        self._unclaimed = []
        self.notes.append((len(self.events), dict(content)))

    def claim(self, asked: Sequence[tuple[str, ...]]) -> bool:
        """Whether an edit of what is `asked` (see `Edit.asked`) was read from disk and is in effect, or was until one that is still
        to be asked for took its place. Once for each."""
        now = standing(self.events) if self._unclaimed else {}
        counts = {"effective", *(f"superseded by {i}" for edit in self._unclaimed for i in edit.ids)}
        for edit in self._unclaimed:
            if edit.asked == list(asked) and all(now[i] in counts for i in edit.ids):
                self._unclaimed.remove(edit)
                return True
        return False

    @contextmanager
    def nothing_to_claim(self) -> Iterator[None]:
        """Inside it every edit is made; afterwards those that are still in the log can be claimed again."""
        unclaimed, self._unclaimed = self._unclaimed, []
        try:
            yield
        finally:
            self._unclaimed = [edit for edit in unclaimed if edit in self.events]

    def truncate(self, step: int) -> list[Event]:
        """Forget all but the first `step` events; returns the others."""
        gone, self.events = self.events[step:], self.events[:step]
        self.notes = [note for note in self.notes if note[0] <= step]
        self._unclaimed = [edit for edit in self._unclaimed if edit in self.events]
        return gone

    def step(self, edit: int) -> int:
        """How many events there are up to `edit`; ValueError when it is none, or not the last of a call."""
        ends = {0: 0, **{event.ids[-1]: i + 1 for i, event in enumerate(self.events) if isinstance(event, Edit)}}
        if edit in ends:
            return ends[edit]
        whole = next((made.ids for made in self if edit in made.ids), None)
        if whole is None:
            raise ValueError(f"there is no edit {edit}; edits are 1 to {self.last}, 0 is before the first")
        raise ValueError(
            f"edits {whole[0]} to {whole[-1]} share one update; go to {whole[0] - 1} or {whole[-1]}, or undo single ones"
        )

    def superseded(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
        """Edit -> the earlier edits in effect of the same facts, for `requests` that are to be the next edits."""
        facts = {fact(request): self.last + 1 + i for i, request in enumerate(requests)}
        known = {i: about for edit in self for i, about in edit.facts.items() if about in facts}
        now = standing(self.events) if known else {}
        found: dict[int, list[int]] = {}
        for old, about in known.items():
            if now[old] == "effective":
                found.setdefault(facts[about], []).append(old)
        return found
