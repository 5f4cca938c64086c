"""A state on disk: an edit counts when its record is there, and another process goes on from the last one, bit for bit.

The journal's header holds what the method measured on the unedited model (templates, projector), the model's fingerprints and
the hyperparameters; its records are edits, undone edits, consolidations, rollbacks and a driver's notes, only ever appended.
Records between "begin" and "commit" count together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hparams import HyperParams
from ..models.arch import down_projection
from ..models.updates import KINDS, LowRank, Update, hexadecimal, tensors_of
from ..models.weights import Matrices
from .journal import Journal, Record, installed
from .log import Consolidation, Edit, EditReport, Event, Undo, check_alone, check_undo
from .state import LifelongState, ValueNorm

logger = logging.getLogger(__name__)

# Hyperparameters that a state may be continued with whatever they are.
FREE = ("model_name", "device", "model_parallel", "stats_dir", "dtype", "fp16")  # the weights' bits are compared themselves


@dataclass(frozen=True)
class Ground:
    """What a method measures once, on the unedited model: context templates, statistics by name, norms of values by layer. files:
    those statistics that stand in a file of their own, and are not written once more, by the end of their names ("4"): what the
    method needs to find them again. seconds: that each part took to be made, also where it comes from the cache (None: not
    known)."""

    templates: list[list[str]]
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    value_norms: Mapping[int, ValueNorm] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seconds: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def unfiled(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.statistics.items() if name.rpartition(".")[2] not in self.files}


def begun(state: LifelongState, ground: Ground, weights: Matrices, hparams: HyperParams) -> LifelongState:
    """`state`, of the model as it is now, kept in `hparams.state_dir` from here on."""
    model = weights.view.model
    dtype = str(model.dtype).removeprefix("torch.")  # the model's own, however it came: who opens the folder loads it so
    kind = {"dtype": dtype, "fp16": False} if dtype in ("float32", "bfloat16", "float16") else {}
    header = {
        "hparams": {**hparams.to_dict(), **kind}, "templates": ground.templates, "value_norm": ground.value_norms or None,
        "startup": state.startup,
        "model": {"type": model.config.model_type, "weights": _fingerprints(model)},
    }  # fmt: skip
    if ground.files:
        header["files"] = ground.files
    state.follow(weights)
    state.book = Book(Journal.create(hparams.state_dir, header, ground.unfiled))
    return state


def continued(
    build: Callable[[Ground], LifelongState], weights: Matrices, hparams: HyperParams, write: bool = True
) -> LifelongState:
    """The state that is kept in `hparams.state_dir`, and the unedited model brought to its last edit. build: makes the state that
    was begun there. write: whether what becomes of the state is kept there too; without it no byte of the folder changes, also when
    another process writes it.

    Raises ValueError, and leaves the model as it was, when that state is of another model or of other hyperparameters; OSError when
    it is to be written and another process does so.
    """
    book = Book(Journal.open(hparams.state_dir, write), write)
    try:
        book.check(hparams)
        book.check_model(weights)
        header = book.journal.header
        ground = Ground(
            header["templates"], book.journal.tensors(), _value_norms(header), header.get("files", {}), header.get("startup", {})
        )
        state = build(ground)
        state.follow(weights)
        state.replay(*history(book.journal))
    except BaseException:
        book.close()
        raise
    if write:
        state.book = book
    if state.events:
        logger.info("the model was brought to edit %d of the state in %s", state.last, book.directory)
    return state


def _value_norms(header: Mapping[str, Any]) -> dict[int, ValueNorm]:
    """By layer; an old header has the mean alone, of the last one."""
    found = header["value_norm"]
    if isinstance(found, (int, float)):
        return {header["hparams"]["layers"][-1]: ValueNorm(found)}
    return {int(layer): ValueNorm(*norm) for layer, norm in (found or {}).items()}


class Book:
    """The journal of one state. Whatever is raised here, nothing was added."""

    def __init__(self, journal: Journal, write: bool = True):
        self.journal, self.directory, self.libraries = journal, journal.path, installed()
        self._grouped = False
        groups = [kind for record in journal.records() if (kind := record.content["kind"]) in ("begin", "commit", "abandon")]
        if write and groups and groups[-1] == "begin":  # a process was stopped within it
            self.journal.append({"kind": "abandon"}, {})

    def __deepcopy__(self, memo) -> None:
        """A copy of a model is not the one that the journal is of."""

    def edit(self, edit: Edit) -> None:
        try:
            packed = [_pack(update, edit.masks) for update in edit.updates]
            self.journal.append({**_content(edit, packed), "libraries": self.libraries}, _tensors(edit, packed))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}. The model is as it was before this edit") from error

    def consolidation(self, event: Consolidation) -> None:
        packed = [_pack(update, {}) for update in event.updates]
        about = {
            "last": event.last,
            "edits": list(event.edits),
            "seconds": event.seconds,
            "made": event.made,
            "digest": event.digest,
        }
        updates = [content for content, _ in packed]
        self.journal.append({"kind": CONSOLIDATION, **about, "updates": updates}, _key_tensors(event.keys) | _parts(packed))

    def undo(self, event: Undo) -> None:
        self.journal.append({"kind": "undo", "edit": event.edit, "digest": event.digest}, {})

    def rollback(self, events: int) -> None:
        """Only the first `events` events count from now on."""
        self.journal.append({"kind": "rollback", "events": events}, {})

    def note(self, content: Mapping[str, Any]) -> None:
        self.journal.append({"kind": "note", "note": dict(content)}, {})

    @contextmanager
    def together(self) -> Iterator[None]:
        """Records made inside it count when it has ended well, all of them or none; a group within another is part of it."""
        if self._grouped:
            yield
            return
        self.journal.append({"kind": "begin"}, {})
        self._grouped = True
        try:
            yield
            self.journal.append({"kind": "commit"}, {})
        except BaseException:
            try:
                self.journal.append({"kind": "abandon"}, {})
            except OSError:  # what would be added now would not count
                self.close()
            raise
        finally:
            self._grouped = False

    def close(self) -> None:
        self.journal.close()

    def check(self, hparams: HyperParams) -> None:
        """ValueError that lists what is not as the state was opened with; a setting that was not there yet had its default."""
        changed = hparams.differences(self.journal.header["hparams"], free=FREE)
        if changed:
            raise ValueError(
                f"the state in {self.directory} was opened with other hyperparameters ({'; '.join(changed)}); "
                "go on with those, or give another state_dir"
            )

    def check_model(self, weights: Matrices) -> None:
        """ValueError when the state is of another model than this one, unedited."""
        model = weights.view.model
        was, kind = self.journal.header["model"], model.config.model_type
        now = _fingerprints(model) if kind == was["type"] else {}
        differ = [name for name in {**was["weights"], **now} if was["weights"].get(name) != now.get(name)]
        if not differ:
            return
        what = (
            f"{kind} instead of {was['type']}"
            if not now
            else f"{len(differ)} of {len(now)} weights differ: {', '.join(differ[:3])}"
        )
        hint = (
            "it has been edited already: load the unedited model"
            if set(differ) <= set(weights)
            else "load that model, or give another state_dir"
        )
        raise ValueError(f"the state in {self.directory} is of another model ({what}); {hint}")


def find(folder: str | Path) -> Path:
    """The folder of the state that is in `folder` or below it. ValueError when there is none, or more than one."""
    folder = Path(folder)
    found = sorted(path.parent for path in folder.rglob("header.json") if Journal.exists(path.parent)) if folder.is_dir() else []
    if len(found) != 1:
        what = f"{len(found)} states ({', '.join(map(str, found[:5]))}); give one of them" if found else "no state of edits"
        raise ValueError(f"{folder} holds {what}" + ("" if found else "; give the --out of `nmke run`, or a state_dir"))
    return found[0]


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
        elif content["kind"] in (EDIT, OLD_EDIT):
            events.append(_edit(record, journal.header, tensors))
        elif content["kind"] == CONSOLIDATION:
            events.append(_consolidation(record, journal.header, tensors))
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
    return before or (events, notes)  # a group that is not complete does not count


def undo(directory: str | Path, edit: int) -> None:
    """Take one edit out of the state in `directory`, with no model at hand: who opens it next finds the model without it."""
    with Journal.open(directory) as journal:
        events, _ = history(journal, tensors=False)
        check_undo(events, edit)
        check_alone(events, edit)
        Book(journal).undo(Undo(edit))


def _fingerprints(model) -> dict[str, str]:
    return {name: hexadecimal({name: parameter}) for name, parameter in model.named_parameters()}


# ---- records

CONSOLIDATION = "consolidation"
EDIT, OLD_EDIT = "edit:2", "edit"  # the old one names an update by its layer, and knows low-rank ones alone


def _content(edit: Edit, packed: Sequence[tuple[dict, dict]]) -> dict:
    asked = json.dumps(edit.asked, ensure_ascii=False)
    return {
        "kind": EDIT,
        "id": edit.first,
        "made": edit.made,
        "requests": list(edit.requests),
        "hash": hashlib.sha256(asked.encode()).hexdigest(),
        "supersedes": edit.supersedes,
        "updates": [content for content, _ in packed],
        "masks": {layer: len(mask) for layer, mask in edit.masks.items()},
        "report": edit.report.to_dict(),
        "digest": edit.digest,
    }


def _tensors(edit: Edit, packed: Sequence[tuple[dict, dict]]) -> dict[str, torch.Tensor]:
    """Updates, masks as bits or indices, keys and z."""
    tensors = _key_tensors(edit.keys)
    tensors |= {f"mask.{layer}": _packed(mask) for layer, mask in edit.masks.items()}
    if edit.z is not None:
        tensors["z"] = edit.z
    return tensors | _parts(packed)


def _key_tensors(keys: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"key.{layer}": columns for layer, columns in keys.items()}


def _parts(packed: Sequence[tuple[dict, dict]]) -> dict[str, torch.Tensor]:
    return {f"{name}.{i}": tensor for i, (_, parts) in enumerate(packed) for name, tensor in parts.items()}


def _pack(update: Update, masks: Mapping[int, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """(content, tensors) of an update. Of a low-rank one without the neurons that a mask of this edit leaves out."""
    content = {"parameter": update.parameter, "kind": type(update).__name__.lower(), "first": update.first}
    tensors = tensors_of(update)
    if not isinstance(update, LowRank):
        return {**content, "requests": update.requests}, tensors
    fitting = [i for i, mask in masks.items() if len(mask) == update.right.shape[1] and not update.right[:, ~mask].any()]
    if fitting:
        layer = min(fitting, key=lambda i: int(masks[i].sum()))
        return {**content, "mask": layer}, {**tensors, "right": update.right[:, masks[layer]]}
    return content, tensors


def _unpack(content: Mapping, tensors: dict[str, torch.Tensor], masks: Mapping[int, torch.Tensor]) -> Update:
    if content.get("mask") is not None:
        narrow, mask = tensors["right"], masks[content["mask"]]
        tensors["right"] = narrow.new_zeros(len(narrow), len(mask))
        tensors["right"][:, mask] = narrow
    numbers = {name: content[name] for name in ("first", "requests") if name in content}
    return KINDS[content["kind"]](content["parameter"], **tensors, **numbers)


def _edit(record: Record, header: Mapping, with_tensors: bool) -> Edit:
    content = record.content
    stored = record.tensors if with_tensors else {}
    masks = {int(layer): _unpacked(stored[f"mask.{layer}"], n) for layer, n in content["masks"].items()} if stored else {}
    updates, keys = _updates(content, stored, masks, header), _keys(stored)
    supersedes = {int(new): tuple(olds) for new, olds in content["supersedes"].items()}
    report = EditReport.from_dict(content["report"])
    apart = content["kind"] == OLD_EDIT or all(made["kind"] == "lowrank" for made in content["updates"])
    return Edit(
        content["id"], tuple(content["requests"]), tuple(updates), keys, stored.get("z"), masks, report, supersedes,
        content["digest"], content["made"], apart,
    )  # fmt: skip


def _updates(
    content: Mapping, stored: Mapping[str, torch.Tensor], masks: Mapping[int, torch.Tensor], header: Mapping
) -> list[Update]:
    updates = []
    for i, made in enumerate(content["updates"] if stored else ()):
        about = _old_update(made, header, masks, stored[f"right.{i}"]) if content["kind"] == OLD_EDIT else made
        parts = {name: stored[f"{name}.{i}"] for name in KINDS[about["kind"]]._fields if f"{name}.{i}" in stored}
        updates.append(_unpack(about, parts, masks))
    return updates


def _keys(stored: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {int(name.removeprefix("key.")): keys for name, keys in stored.items() if name.startswith("key.")}


def _consolidation(record: Record, header: Mapping, with_tensors: bool) -> Consolidation:
    content, stored = record.content, record.tensors if with_tensors else {}
    return Consolidation(
        content["last"], tuple(content["edits"]), tuple(_updates(content, stored, {}, header)), _keys(stored), content["seconds"],
        content["made"], content["digest"],
    )  # fmt: skip


def _old_update(made: Sequence[int], header: Mapping, masks: Mapping, right: torch.Tensor) -> dict:
    """What an old record says of its update, as one says now: of a layer's down projection, narrow where its mask left out some."""
    layer, first = made
    narrow = layer in masks and right.shape[1] < len(masks[layer])
    name = down_projection(header["model"]["type"], layer)
    return {"parameter": name, "kind": "lowrank", "first": first, "mask": layer if narrow else None}


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
