"""An append-only record on disk of what was done: it survives kills, full disks and damage, and says what it lost.

    header.json         format, library versions, the owner's header, checksum of the base tensors; written once, last of all
    base.safetensors    tensors that hold for the whole journal; written once
    index.jsonl         one line per record: its content, size and SHA-256 of its tensors' file, checksum
    edits/000000.safetensors, ...    the tensors of each record
    lock, lock.json     the writer's lock; its process, host and start
    dropped/            what was damaged and taken out, never deleted
    verified.json       when `verify` last read every file, and what it found

A record is written in three steps: its tensors to a temporary file, its line to the index, and the file renamed to its place. It
counts when the last step is done. The checksum of a line covers the checksum of the line before, the first one's that of the
header: a lost, doubled or foreign line is noticed like a flipped bit. On disk a record takes its tensors' bytes, its content as
JSON, about 300 bytes of index and about 100 for the name and shape of each tensor.

Files and not sqlite3: a record is megabytes of tensors and a line of text, is never changed, and is read in order, so a database's
pages, indexes and queries would serve nothing. What has to be guarded against is damage, and sqlite3 has no checksums: a flipped
bit in a tensor is returned as it is, one in a page's head takes other records along, and here both cost one named file. sqlite3's
locks and write-ahead log are not safe on the network file systems that clusters keep such folders on; renames and appends are. A
backup copies the new files and no others, and every part is read without this package: by `safetensors`, or by eye.
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
from .disk import (
    BASE,
    DROPPED,
    EDITS,
    FORMAT,
    HEADER,
    INDEX,
    LOCK,
    VERSION,
    explained,
    file_problem,
    place,
    read_header,
    record_files,
    seal,
    temporary,
    unseal,
)
from .lock import Lock
from .verification import Problem, Verification, last_verified, verify

__all__ = ["Journal", "Problem", "Record", "Verification", "installed", "last_verified", "verify", "versions"]

logger = logging.getLogger(__name__)

LIBRARIES = ("easyedit-nmke", "torch", "transformers", "safetensors", "numpy")

_NAMES = re.compile(rb'"(id|prompt)": ("(?:[^"\\]|\\.)*"|\d+)')


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
        about, mark = read_header(path)
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
        number, where = len(self), self._place(len(self))
        data = save(_on_cpu(tensors))
        checksum = hashlib.sha256(data).hexdigest()
        line, mark = seal({"record": number, "content": content, "bytes": len(data), "sha256": checksum}, self._marks[-1])
        record = Record(number, json.loads(line)["content"], where, checksum)
        with explained(f"{_label(number, line)} could not be added to {self.path}, nothing of it counts"):
            try:
                self._settle()
                write_new(temporary(where), data)
                write_fully(self._index, line + b"\n")
                os.fsync(self._index)
                os.replace(temporary(where), where)
                sync_folder(where.parent)
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
        return place(self.path, number)

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
        where = self._place(len(self))
        for path in (where, temporary(where)):
            if os.path.lexists(path):
                os.unlink(path)
        if os.fstat(self._index).st_size != self._end:
            os.ftruncate(self._index, self._end)

    def _load(self, repair: bool) -> None:
        """Take in records up to the first whose line or file is not as written; drop that one if it is the last.

        Files are listed before the index is read: a line is written before its file, so under a living writer there can be a
        line too many, never a file.
        """
        last = max(record_files(self.path), default=-1)
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
        where = self._place(len(self))
        body, mark = unseal(line, self._marks[-1])
        if body is None:
            return f"line {len(self) + 1} of {INDEX} is not what was written"
        if problem := file_problem(where, body, contents=self._lock is not None):
            return f"{EDITS}/{where.name} {problem}"
        self._take_in(Record(len(self), body["content"], where, body["sha256"]), line, mark)
        return None

    def _set_aside(self, lines: list[bytes]) -> Path | None:
        """Move the files from the current end on to `dropped`, with their lines, last one first; None when there are none."""
        files = sorted(((number, path) for number, path in record_files(self.path).items() if number >= len(self)), reverse=True)
        if not files:
            return None
        where = next(path for i in itertools.count() if not (path := self.path / DROPPED / f"{i:03d}").exists())
        os.makedirs(where)
        write_whole(where / INDEX, b"\n".join(lines), temporary(where / INDEX))
        for _, path in files:
            os.replace(path, where / path.name)
        return where


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
