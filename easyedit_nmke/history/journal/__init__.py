"""An append-only record on disk of what was done: it survives kills, full disks and damage, and says what it lost.

    header.json         format, library versions, the owner's header, checksum of the base tensors; written once, last of all
    base.safetensors    tensors that hold for the whole journal; written once
    index.jsonl         one line per record: its content, size and SHA-256 of its tensors' file, checksum
    edits/000000.safetensors, ...    the tensors of each record
    lock, lock.json     the writer's lock; its process, host and start
    dropped/            what was damaged and taken out, never deleted

A record is written in three steps: its tensors to a temporary file, its line to the index, and the file renamed to its place. It
counts when the last step is done. The checksum of a line covers the checksum of the line before, the first one's that of the
header: a lost, doubled or foreign line is noticed like a flipped bit. On disk a record takes its tensors' bytes, its content as
JSON, about 300 bytes of index and about 100 for the name and shape of each tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ...files import BINARY, sync_folder, write_fully, write_new, write_whole
from .disk import explained, seal, temporary, unseal
from .lock import Lock

logger = logging.getLogger(__name__)

FORMAT, VERSION = "easyedit_nmke journal", 2
HEADER, BASE, INDEX, EDITS, LOCK, DROPPED = "header.json", "base.safetensors", "index.jsonl", "edits", "lock", "dropped"
LIBRARIES = ("easyedit-nmke", "torch", "transformers", "safetensors", "numpy")

_NAMES = re.compile(rb'"(id|prompt)": ("(?:[^"\\]|\\.)*"|\d+)')
_FILE = re.compile(r"(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Record:
    """One record: `content` as JSON gives it back, and its tensors, read and verified whenever they are asked for."""

    number: int
    content: dict[str, Any]
    path: Path
    checksum: str

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """On the CPU. ValueError when the file is not what was written."""
        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.checksum:
            raise ValueError(
                f"{self.path} (record {self.number}) is not what was written (other checksum): put this file back from a backup, "
                "or open the journal for writing, which says what can be kept"
            )
        return load(data)


class Journal:
    """The records of one directory. Made by `create` and `open`; one writer at a time, any number of readers.

    After an error of `append` the directory is as after the record before, and a later `append` works.
    """

    def __init__(self, path: Path, about: dict, mark: str, lock: Lock | None):
        self.path, self._about, self._lock = path, about, lock
        self._records: list[Record] = []
        self._marks = [mark]  # the header's checksum, then each line's
        self._end = 0  # bytes of the index that count
        self._index: int | None = None
        self._held = contextlib.ExitStack()
        if lock:
            self._held.callback(lock.release)
        weakref.finalize(self, self._held.close)  # at the latest when the process ends

    @classmethod
    def create(cls, directory: str | Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Journal:
        """Start a journal in a directory that is missing or empty. `header`: what JSON can hold.

        Needs twice the memory of the tensors while it writes them. Raises ValueError for a directory that holds a journal or
        other files, BlockingIOError when another process is at it, OSError when it cannot be written.
        """
        path = Path(directory)
        data = save(_on_cpu(tensors))
        base = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        about = {"format": FORMAT, "version": VERSION, "libraries": installed(), "header": dict(header), "base": base}
        text, mark = seal(about, "")
        with explained(f"no journal could be made in {path}"):
            os.makedirs(path, exist_ok=True)
            journal = cls(path, json.loads(text), mark, Lock(path / LOCK))
            with journal._closed_on_error():
                _check_empty(path)
                write_whole(path / BASE, data, temporary(path / BASE))
                write_whole(path / HEADER, text + b"\n", temporary(path / HEADER))
                journal._open_index()
        return journal

    @classmethod
    def open(cls, directory: str | Path, write: bool = True, repair: bool = False) -> Journal:
        """Open a journal: to write (verifies every checksum), or only to read (no lock; the tensors are verified when read).

        An incomplete or damaged last record is dropped with a warning that names it. Damage before the last record is a
        ValueError, unless `repair`: then the damaged record and all after it are dropped. What was dropped is in `dropped/`.
        Raises ValueError for another format version or a damaged header, BlockingIOError when another process writes.
        """
        path = Path(directory)
        about, mark = _read_header(path)
        with explained(f"the journal in {path} could not be opened" + " for writing (write=False reads it)" * write):
            journal = cls(path, about, mark, Lock(path / LOCK) if write else None)
            with journal._closed_on_error():
                journal._load(repair)
                if write:
                    journal._open_index()
        return journal

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether `create` was finished there."""
        return (Path(directory) / HEADER).is_file()

    @property
    def header(self) -> dict[str, Any]:
        """What `create` was given, as JSON gives it back."""
        return self._about["header"]

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that made the journal."""
        return self._about["libraries"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The base tensors, on the CPU. ValueError when their file is not what was written."""
        file = self.path / BASE
        data = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(data).hexdigest() != self._about["base"]["sha256"]:
            raise ValueError(
                f"{file} is not what was written ({len(data)} bytes, expected {self._about['base']['bytes']} with another "
                "checksum); put this file back from a backup: the records cannot be used without it"
            )
        return load(data)

    def records(self, start: int = 0) -> Iterator[Record]:
        """From number `start` on."""
        yield from self._records[start:]

    def append(self, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a record, durably. `content`: what JSON can hold; an `id` or `prompt` in it is what messages call it by.

        On any error nothing is added; OSError (full disk, read-only directory) says so.
        """
        if self._index is None:
            raise ValueError(f"the journal in {self.path} is not open for writing; open it with write=True")
        number, place = len(self), self._place(len(self))
        data = save(_on_cpu(tensors))
        checksum = hashlib.sha256(data).hexdigest()
        line, mark = seal({"record": number, "content": content, "bytes": len(data), "sha256": checksum}, self._marks[-1])
        record = Record(number, json.loads(line)["content"], place, checksum)
        with explained(f"{_label(number, line)} could not be added to {self.path}, nothing of it counts"):
            try:
                self._settle()
                write_new(temporary(place), data)
                write_fully(self._index, line + b"\n")
                os.fsync(self._index)
                os.replace(temporary(place), place)
                sync_folder(place.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._settle()
                raise
        self._take_in(record, line, mark)

    def close(self) -> None:
        """Let another process write."""
        self._index = self._lock = None
        self._held.close()

    def __len__(self) -> int:
        return len(self._records)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @contextlib.contextmanager
    def _closed_on_error(self):
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _place(self, number: int) -> Path:
        return self.path / EDITS / f"{number:06d}.safetensors"

    def _files(self) -> dict[int, Path]:
        """The records' files that are there, by number."""
        found = ((_FILE.fullmatch(path.name), path) for path in (self.path / EDITS).glob("*"))
        return {int(match[1]): path for match, path in found if match}

    def _take_in(self, record: Record, line: bytes, mark: str) -> None:
        self._records.append(record)
        self._marks.append(mark)
        self._end += len(line) + 1

    def _open_index(self) -> None:
        os.makedirs(self.path / EDITS, exist_ok=True)
        self._index = os.open(self.path / INDEX, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
        self._held.callback(os.close, self._index)
        sync_folder(self.path)
        self._settle()

    def _settle(self) -> None:
        """Take away what an unfinished `append` left."""
        place = self._place(len(self))
        for path in (place, temporary(place)):
            if os.path.lexists(path):
                os.unlink(path)
        if os.fstat(self._index).st_size != self._end:
            os.ftruncate(self._index, self._end)

    def _load(self, repair: bool) -> None:
        """Take in records up to the first whose line or file is not as written; drop that one if it is the last.

        Files are listed before the index is read: a line is written before its file, so under a living writer there can be a
        line too many, never a file.
        """
        last = max(self._files(), default=-1)
        index = self.path / INDEX
        *lines, torn = (index.read_bytes() if index.exists() else b"").split(b"\n")
        problem = next(filter(None, map(self._accept, lines)), f"its line in {INDEX} is {'incomplete' if torn else 'missing'}")
        rest = [*lines, torn][len(self) :]
        affected = max(len(rest) - (not torn), last + 1 - len(self))
        if affected == 0:
            return
        label, count = _label(len(self), rest[0]), len(self)
        if affected > 1 and not repair:
            raise ValueError(
                f"{self.path}: {label} is damaged: {problem}; {affected - 1} more come after it. Put the file back from a backup, "
                f"or open with repair=True: it keeps the {count} records before and moves the others to {DROPPED}/"
            )
        where = self._set_aside(rest) if self._lock else None
        done = "dropped" if self._lock else "left out"
        kept = f", what is left of it is in {where}" if where else ""
        also = f" and the {affected - 1} after it" if affected > 1 else ""
        logger.warning("%s: %s %s%s: %s%s; %d sound records before it", self.path, done, label, also, problem, kept, count)

    def _accept(self, line: bytes) -> str | None:
        """Take the next record in, or say what is wrong with it."""
        place = self._place(len(self))
        body, mark = unseal(line, self._marks[-1])
        if body is None:
            return f"line {len(self) + 1} of {INDEX} is not what was written"
        if not place.exists():
            return f"{EDITS}/{place.name} is missing"
        if place.stat().st_size != body["bytes"]:
            return f"{EDITS}/{place.name} has {place.stat().st_size} bytes instead of {body['bytes']}"
        if self._lock and hashlib.sha256(place.read_bytes()).hexdigest() != body["sha256"]:
            return f"{EDITS}/{place.name} is not what was written (other checksum)"
        self._take_in(Record(len(self), body["content"], place, body["sha256"]), line, mark)
        return None

    def _set_aside(self, lines: list[bytes]) -> Path | None:
        """Move the files from the current end on to `dropped`, with their lines, last one first; None when there are none."""
        files = sorted(((number, path) for number, path in self._files().items() if number >= len(self)), reverse=True)
        if not files:
            return None
        where = next(path for i in itertools.count() if not (path := self.path / DROPPED / f"{i:03d}").exists())
        os.makedirs(where)
        write_whole(where / INDEX, b"\n".join(lines), temporary(where / INDEX))
        for _, path in files:
            os.replace(path, where / path.name)
        return where


def _read_header(path: Path) -> tuple[dict, str]:
    """What `create` wrote, and its checksum. The version is looked at first: another one may be sealed in another way."""
    file = path / HEADER
    if not file.is_file():
        raise ValueError(f"{path} holds no journal ({HEADER} is missing); expected a directory that one was made in")
    text = file.read_bytes()
    try:
        about = json.loads(text)
        found = about["version"] if about["format"] == FORMAT else VERSION
    except (ValueError, KeyError, TypeError):
        found = VERSION
    if found != VERSION:
        raise ValueError(
            f"{file} says format version {found!r}, expected {VERSION}; open it with the release of easyedit_nmke that wrote it, "
            "or start anew in another directory"
        )
    about, mark = unseal(text.removesuffix(b"\n"), "")
    if about is None:
        raise ValueError(f"{file} is damaged; put this file back from a backup: the records cannot be used without it")
    return about, mark


def _check_empty(path: Path) -> None:
    if (path / HEADER).exists():
        raise ValueError(f"{path} already holds a journal; open it, or choose another directory")
    # A `create` that was killed leaves these.
    ours = {LOCK, BASE, temporary(path / BASE).name, temporary(path / HEADER).name}
    others = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(f"{LOCK}."))
    if others:
        raise ValueError(f"{path} is not empty (it holds {', '.join(others[:3])}) and no journal; choose another directory")


def _label(number: int, line: bytes) -> str:
    """What messages call a record: its number, and the first id and prompt in its line, which may be torn."""
    names: dict[str, Any] = {}
    for name, value in _NAMES.findall(line):
        with contextlib.suppress(ValueError):
            names.setdefault(name.decode(), json.loads(value))
    return f"record {number}" + (f" ({', '.join(f'{name} {value!r}' for name, value in names.items())})" if names else "")


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def installed() -> dict[str, str]:
    """Versions of the libraries that edits depend on, as they are here."""
    return {name: found for name, found in versions(*LIBRARIES).items() if found}


def versions(*libraries: str) -> dict[str, str | None]:
    """Of Python and of libraries; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(libraries)}
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
