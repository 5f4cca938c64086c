"""A state on disk: an edit counts when its record is there, and another process goes on from the last one, bit for bit.

The journal's header holds what the method measured on the unedited model (templates, projector), the model's fingerprints and
the hyperparameters; its records are edits, undone edits, rollbacks and a driver's notes, only ever appended. Records between
"begin" and "commit" count together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hparams import HyperParams
from ..models.arch import ModelView, editing
from ..models.updates import Update, fingerprint
from ..models.weights import check_model, followed
from .journal import Journal, Record, installed
from .log import Edit, EditReport, Event, Undo, check_undo
from .state import LifelongState

logger = logging.getLogger(__name__)

# Hyperparameters that a state may be continued with whatever they are.
FREE = ("model_name", "device", "model_parallel", "stats_dir")


@dataclass(frozen=True)
class Ground:
    """What a method measures once, on the unedited model: context templates, statistics of keys by name, the norm of values."""

    templates: list[list[str]]
    statistics: Mapping[str, torch.Tensor]
    value_norm: float | None = None


Measures = Callable[[ModelView, object, HyperParams, bool], Ground]
Builds = Callable[[ModelView, Ground, HyperParams], LifelongState]


def opened(measure: Measures, build: Builds, model, tok, hparams: HyperParams, progress: bool = True) -> LifelongState:
    """A new state of a model; with `hparams.state_dir` the one that is kept there, and the model brought to its last edit.

    Raises ValueError, and leaves the model as it was, when that state is of another model or of other hyperparameters; OSError when
    the folder cannot be written, or another process writes it.
    """
    view = ModelView(model)
    check_model(view, hparams)
    kept = hparams.state_dir is not None
    if kept and Journal.exists(hparams.state_dir):
        return _continued(build, view, hparams)
    with editing(model):
        ground = measure(view, tok, hparams, progress)
    state = build(view, ground, hparams)
    if kept:
        header = {
            "hparams": hparams.to_dict(), "templates": ground.templates, "value_norm": ground.value_norm,
            "model": {"type": model.config.model_type, "weights": _fingerprints(model)},
        }  # fmt: skip
        state.follow(followed(view, hparams))
        state.book = Book(Journal.create(hparams.state_dir, header, ground.statistics))
    return state


def _continued(build: Builds, view: ModelView, hparams: HyperParams) -> LifelongState:
    book = Book(Journal.open(hparams.state_dir))
    try:
        book.check(hparams)
        book.check_model(view.model, hparams)
        header = book.journal.header
        ground = Ground(header["templates"], book.journal.tensors(), header["value_norm"])
        state = build(view, ground, hparams)
        state.follow(followed(view, hparams))
        state.replay(*history(book.journal))
    except BaseException:
        book.close()
        raise
    state.book = book
    if state.events:
        logger.info("the model was brought to edit %d of the state in %s", state.last, book.directory)
    return state


class Book:
    """The journal of one state. Whatever is raised here, nothing was added."""

    def __init__(self, journal: Journal):
        self.journal, self.directory, self.libraries = journal, journal.path, installed()
        groups = [kind for record in journal.records() if (kind := record.content["kind"]) in ("begin", "commit", "abandon")]
        if groups and groups[-1] == "begin":  # a process was stopped within it
            self.journal.append({"kind": "abandon"}, {})

    def __deepcopy__(self, memo) -> None:
        """A copy of a model is not the one that the journal is of."""

    def edit(self, edit: Edit) -> None:
        try:
            self.journal.append({**_content(edit), "libraries": self.libraries}, _tensors(edit))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}. The model is as it was before this edit") from error

    def undo(self, event: Undo) -> None:
        self.journal.append({"kind": "undo", "edit": event.edit, "digest": event.digest}, {})

    def rollback(self, events: int) -> None:
        """Only the first `events` events count from now on."""
        self.journal.append({"kind": "rollback", "events": events}, {})

    def note(self, content: Mapping[str, Any]) -> None:
        self.journal.append({"kind": "note", "note": dict(content)}, {})

    @contextmanager
    def together(self) -> Iterator[None]:
        """Records made inside it count when it has ended well, all of them or none."""
        self.journal.append({"kind": "begin"}, {})
        try:
            yield
            self.journal.append({"kind": "commit"}, {})
        except BaseException:
            try:
                self.journal.append({"kind": "abandon"}, {})
            except OSError:  # what would be added now would not count
                self.close()
            raise

    def close(self) -> None:
        self.journal.close()

    def check(self, hparams: HyperParams) -> None:
        """ValueError that lists what is not as the state was opened with."""
        was, now = self.journal.header["hparams"], json.loads(json.dumps(hparams.to_dict()))
        changed = [f"{name} {was.get(name)!r} -> {now[name]!r}" for name in now if name not in FREE and was.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"the state in {self.directory} was opened with other hyperparameters ({'; '.join(changed)}); "
                "go on with those, or give another state_dir"
            )

    def check_model(self, model, hparams: HyperParams) -> None:
        """ValueError when the state is of another model than this one, unedited."""
        was, kind = self.journal.header["model"], model.config.model_type
        now = _fingerprints(model) if kind == was["type"] else {}
        differ = [name for name in {**was["weights"], **now} if was["weights"].get(name) != now.get(name)]
        if not differ:
            return
        edited = {ModelView(model).weight_name(layer) for layer in hparams.layers}
        what = (
            f"{kind} instead of {was['type']}"
            if not now
            else f"{len(differ)} of {len(now)} weights differ: {', '.join(differ[:3])}"
        )
        hint = (
            "it has been edited already: load the unedited model"
            if set(differ) <= edited
            else "load that model, or give another state_dir"
        )
        raise ValueError(f"the state in {self.directory} is of another model ({what}); {hint}")


def history(journal: Journal, tensors: bool = True) -> tuple[list[Event], list[tuple[int, dict]]]:
    """(events, notes with the number of events before each) that count, of a journal. tensors: with what replays need."""
    events: list[Event] = []
    notes: list[tuple[int, dict]] = []
    before = None  # while a group is not complete
    for record in journal.records():
        content = record.content
        if content["kind"] == "begin":
            before = list(events), list(notes)
        elif content["kind"] == "commit":
            before = None
        elif content["kind"] == "abandon":
            (events, notes), before = before, None
        elif content["kind"] == "edit":
            events.append(_edit(record, tensors))
        elif content["kind"] == "undo":
            events.append(Undo(content["edit"], content["digest"]))
        elif content["kind"] == "note":
            notes.append((len(events), content["note"]))
        elif content["kind"] == "rollback":
            del events[content["events"] :]
            notes = [note for note in notes if note[0] <= len(events)]
        else:
            raise ValueError(
                f"{journal.path} holds a record of kind {content['kind']!r}; a newer release of easyedit_nmke wrote it"
            )
    return events, notes


def undo(directory: str | Path, edit: int) -> None:
    """Take one edit out of the state in `directory`, with no model at hand: who opens it next finds the model without it."""
    with Journal.open(directory) as journal:
        check_undo(history(journal, tensors=False)[0], edit)
        Book(journal).undo(Undo(edit))


def _fingerprints(model) -> dict[str, str]:
    return {name: f"{fingerprint({name: parameter}):016x}" for name, parameter in model.named_parameters()}


# ---- records


def _content(edit: Edit) -> dict:
    asked = json.dumps(edit.asked, ensure_ascii=False)
    return {
        "kind": "edit",
        "id": edit.first,
        "made": edit.made,
        "requests": list(edit.requests),
        "hash": hashlib.sha256(asked.encode()).hexdigest(),
        "supersedes": edit.supersedes,
        "updates": [[update.layer, update.first] for update in edit.updates],
        "masks": {layer: len(mask) for layer, mask in edit.masks.items()},
        "report": edit.report.to_dict(),
        "digest": edit.digest,
    }


def _tensors(edit: Edit) -> dict[str, torch.Tensor]:
    """Factors without the neurons that the mask leaves out, masks as bits or indices, keys and z."""
    tensors = {f"key.{layer}": keys for layer, keys in edit.keys.items()}
    tensors |= {f"mask.{layer}": _packed(mask) for layer, mask in edit.masks.items()}
    if edit.z is not None:
        tensors["z"] = edit.z
    for i, update in enumerate(edit.updates):
        mask, right = edit.masks.get(update.layer), update.right
        if mask is not None and not right[:, ~mask].any():
            right = right[:, mask]
        tensors |= {f"left.{i}": update.left, f"right.{i}": right}
    return tensors


def _edit(record: Record, with_tensors: bool) -> Edit:
    content = record.content
    stored = record.tensors if with_tensors else {}
    masks = {int(layer): _unpacked(stored[f"mask.{layer}"], n) for layer, n in content["masks"].items()} if stored else {}
    updates = []
    for i, (layer, first) in enumerate(content["updates"] if stored else ()):
        right, mask = stored[f"right.{i}"], masks.get(layer)
        if mask is not None and right.shape[1] < len(mask):
            narrow, right = right, right.new_zeros(len(right), len(mask))
            right[:, mask] = narrow
        updates.append(Update(layer, stored[f"left.{i}"], right, first))
    keys = {int(name.removeprefix("key.")): keys for name, keys in stored.items() if name.startswith("key.")}
    supersedes = {int(new): tuple(olds) for new, olds in content["supersedes"].items()}
    report = EditReport.from_dict(content["report"])
    return Edit(
        content["id"], tuple(content["requests"]), tuple(updates), keys, stored.get("z"), masks, report, supersedes,
        content["digest"], content["made"],
    )  # fmt: skip


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """The chosen neurons [F] bool as int32 indices, or as bits (uint8) where that is less."""
    indices = mask.nonzero()[:, 0].int()
    if 4 * len(indices) < len(mask) / 8:
        return indices
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def _unpacked(packed: torch.Tensor, neurons: int) -> torch.Tensor:
    if packed.dtype == torch.int32:
        mask = torch.zeros(neurons, dtype=torch.bool)
        mask[packed.long()] = True
        return mask
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=neurons, bitorder="little")).bool()
