"""An append-only record on disk of what was done: it survives kills, full disks and damage, and says what it lost.

    header.json         format, library versions, the owner's header, checksum of the base tensors; written once, last of its folder
    base.safetensors    tensors that hold for the whole journal; written once
    index.jsonl         one line per record: its content, size and SHA-256 of its tensors' file, checksum
    edits/000000.safetensors, ...    the tensors of each record
    lock                the writer's process, host and start
    dropped/            what was taken out because it was damaged, never deleted

A record is written in three steps: its tensors to a temporary file, its line to the index, and the file renamed to its place. It
counts when the last step is done. The checksum of a line covers the checksum of the line before, the first one's that of the
header: a lost, doubled or foreign line is noticed like a flipped bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

VERSION = 1
HEADER, BASE, INDEX, EDITS, LOCK, DROPPED = "header.json", "base.safetensors", "index.jsonl", "edits", "lock", "dropped"
LIBRARIES = ("easyedit-nmke", "torch", "transformers", "safetensors", "numpy")

_SEAL = re.compile(rb', "checksum": "([0-9a-f]{64})"}$')
_NAMES = re.compile(rb'"(id|prompt)": ("(?:[^"\\]|\\.)*"|\d+)')
_CHUNK = 1 << 24


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
            raise ValueError(f"{self.path} (record {self.number}) was damaged since the journal was opened; open it again")
        return load(data)


class Journal:
    """The records of one directory. Made by `create` and `open`; one writer at a time, any number of readers.

    After an error of `append` the directory is as after the record before, and a later `append` works.
    """

    def __init__(self, path: Path, sealed: dict, seal: str, lock: Lock | None):
        self.path, self._sealed, self._lock = path, sealed, lock
        self._records: list[Record] = []
        self._seals = [seal]  # the header's, then each record's
        self._end = 0  # bytes of the index that count
        self._index: int | None = None

    @classmethod
    def create(cls, directory: str | Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Journal:
        """Start a journal in a directory that is missing or empty. `header`: what JSON can hold.

        Raises ValueError for a directory that holds a journal or other files, BlockingIOError when another process is at it.
        """
        path = Path(directory)
        data = save(_on_cpu(tensors))
        os.makedirs(path, exist_ok=True)
        lock = Lock(path / LOCK)
        try:
            _check_empty(path)
            sealed = {
                "format": "easyedit_nmke journal", "version": VERSION, "libraries": _libraries(), "header": dict(header),
                "base": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
            }  # fmt: skip
            text, seal = _seal(sealed, "")
            os.makedirs(path / EDITS, exist_ok=True)
            _write(path / BASE, data)
            _write(path / HEADER, text + b"\n")
            journal = cls(path, sealed, seal, lock)
            journal._open_index()
        except BaseException:
            lock.release()
            raise
        return journal

    @classmethod
    def open(cls, directory: str | Path, write: bool = True, repair: bool = False) -> Journal:
        """Open a journal; to write (verifies every checksum), or only to read (no lock; sizes now, checksums when read).

        An incomplete or damaged last record is dropped with a warning that names it. Damage before the last record is a
        ValueError; `repair` takes the damaged record and all after it out, into the folder `dropped`.
        """
        path = Path(directory)
        sealed, seal = _read_header(path)
        lock = Lock(path / LOCK) if write else None
        try:
            journal = cls(path, sealed, seal, lock)
            journal._load(repair)
            if write:
                journal._open_index()
        except BaseException:
            if lock:
                lock.release()
            raise
        return journal

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether `create` was finished there."""
        return (Path(directory) / HEADER).is_file()

    @property
    def header(self) -> dict[str, Any]:
        """What `create` was given, as JSON gives it back."""
        return self._sealed["header"]

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that made the journal."""
        return self._sealed["libraries"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The base tensors, on the CPU. ValueError when their file is not what was written."""
        data = (self.path / BASE).read_bytes() if (self.path / BASE).exists() else b""
        if hashlib.sha256(data).hexdigest() != self._sealed["base"]["sha256"]:
            raise ValueError(
                f"{self.path / BASE} is damaged or missing ({len(data)} of {self._sealed['base']['bytes']} bytes, other contents); "
                "put this file back from a backup: the records cannot be used without it"
            )
        return load(data)

    def __len__(self) -> int:
        return len(self._records)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def records(self, start: int = 0) -> Iterator[Record]:
        """From number `start` on."""
        yield from self._records[start:]

    def close(self) -> None:
        """Let another process write."""
        if self._index is not None:
            os.close(self._index)
        if self._lock:
            self._lock.release()
        self._index = self._lock = None

    def append(self, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a record, durably; with an `id` or `prompt` in `content`, messages name it by them.

        On any error nothing is added; OSError (full disk, read-only directory) says so.
        """
        if self._index is None:
            raise ValueError(f"the journal in {self.path} is not open for writing; open it with write=True")
        number = len(self)
        data = save(_on_cpu(tensors))
        checksum = hashlib.sha256(data).hexdigest()
        line, seal = _seal({"record": number, "content": content, "bytes": len(data), "sha256": checksum}, self._seals[-1])
        place = self._place(number)
        try:
            self._settle()
            _write_all(_temporary(place), data)
            _write_fully(self._index, line + b"\n")
            os.fsync(self._index)
            os.replace(_temporary(place), place)
            _sync_folder(place.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._settle()
            if isinstance(error, OSError):
                raise OSError(error.errno, _not_written(number, self.path, error)) from error
            raise
        self._records.append(Record(number, json.loads(line)["content"], place, checksum))
        self._seals.append(seal)
        self._end += len(line) + 1

    def _place(self, number: int) -> Path:
        return self.path / EDITS / f"{number:06d}.safetensors"

    def _open_index(self) -> None:
        self._index = os.open(self.path / INDEX, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _sync_folder(self.path)

    def _settle(self) -> None:
        """Take away what an unfinished `append` left."""
        place = self._place(len(self))
        for path in (place, _temporary(place)):
            if os.path.lexists(path):
                os.unlink(path)
        if os.fstat(self._index).st_size != self._end:
            os.ftruncate(self._index, self._end)

    def _load(self, repair: bool) -> None:
        """Read the index up to the first line or file that is not as written, and deal with what comes after."""
        index = self.path / INDEX
        lines = (index.read_bytes() if index.exists() else b"").split(b"\n")
        whole, rest = lines[:-1], lines[-1]
        problem = None
        for line in whole:
            problem = self._accept(line)
            if problem:
                break
        files = sorted(int(p.stem) for p in (self.path / EDITS).glob("*.safetensors") if p.stem.isdigit())
        known = len(whole) + bool(rest)
        affected = max([known, *(number + 1 for number in files)]) - len(self)
        if affected == 0:
            return
        number = len(self)
        line = lines[number] if number < known else b""
        problem = problem or (f"its line in {INDEX} is {'incomplete' if line else 'missing'}")
        self._drop(_label(number, line), problem, affected, lines[number:], repair)

    def _accept(self, line: bytes) -> str | None:
        """Take the next record in, or say what is wrong with it."""
        number = len(self)
        body, seal = _open_seal(line, self._seals[-1])
        if body is None:
            return f"line {number + 1} of {INDEX} is damaged"
        place = self._place(number)
        if not place.exists():
            return f"{EDITS}/{place.name} is missing"
        size = place.stat().st_size
        if size != body["bytes"]:
            return f"{EDITS}/{place.name} has {size} bytes instead of {body['bytes']}"
        if self._lock and _digest(place) != body["sha256"]:
            return f"{EDITS}/{place.name} is damaged (its checksum is not the one recorded)"
        self._records.append(Record(number, body["content"], place, body["sha256"]))
        self._seals.append(seal)
        self._end += len(line) + 1
        return None

    def _drop(self, label: str, problem: str, affected: int, lines: list[bytes], repair: bool) -> None:
        """Leave the damaged record and those after it out; with the write lock also take them out of the way."""
        number = len(self)
        if affected > 1 and not repair:
            raise ValueError(
                f"{self.path}: {label} is damaged: {problem}; {affected - 1} later ones build on it. Put the file back from a "
                f"backup, or open with repair=True: it keeps the first {number} records and moves the others to {DROPPED}/"
            )
        where = self._set_aside(lines) if self._lock else None
        kept = f"; what is left of it is in {where}" if where else ""
        what = label if affected == 1 else f"{label} and {affected - 1} later ones"
        logger.warning("%s: dropped %s: %s%s; the journal ends with record %d", self.path, what, problem, kept, number - 1)

    def _set_aside(self, lines: list[bytes]) -> Path | None:
        """Move the files from the current end on to `dropped`, with their lines, last one first; then cut the index."""
        files = sorted((p for p in (self.path / EDITS).iterdir() if p.name >= self._place(len(self)).name), reverse=True)
        where = None
        if any(p.suffix == ".safetensors" for p in files):
            where = self.path / DROPPED / f"{sum(1 for _ in (self.path / DROPPED).glob('*')):03d}"
            os.makedirs(where)
            _write(where / INDEX, b"\n".join(lines))
        for file in files:
            if file.suffix == ".safetensors":
                os.replace(file, where / file.name)
            else:
                os.unlink(file)
        _sync_folder(self.path / EDITS)
        if (self.path / INDEX).exists():
            os.truncate(self.path / INDEX, self._end)
        return where


class Lock:
    """The one writer's lock: it vanishes with the process where the file system has `flock`; elsewhere its text counts."""

    def __init__(self, path: Path):
        """BlockingIOError when another live writer holds it."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = self._holder()
            if not self._take(holder):
                raise BlockingIOError(errno.EWOULDBLOCK, _held(path, holder))
            if holder:
                logger.info("took over the lock of process %s on %s, which is gone", holder.get("pid"), holder.get("host"))
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(mine).encode(), 0)
        except BaseException:
            os.close(self._file)
            raise

    def release(self) -> None:
        """Leave the file, empty: taking it away could take it from under a writer that has just opened it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _holder(self) -> dict:
        try:
            found = json.loads(os.pread(self._file, 4096, 0) or b"{}")
            return found if isinstance(found, dict) else {}
        except ValueError:
            return {}

    def _take(self, holder: dict) -> bool:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError as error:  # a file system without locks
                logger.debug("no flock on %s: %s", self.path, error)
        return not holder or (holder.get("host") == socket.gethostname() and not _running(holder.get("pid")))


def _held(path: Path, holder: dict) -> str:
    if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
        return f"{path.parent} is already open for writing in this process; close() it first"
    who = f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})" if holder else "another process"
    return f"{path.parent} is being written by {who}; wait for it or stop it. If it no longer runs, remove {path}"


def _running(pid: Any) -> bool:
    if os.name != "posix" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _seal(content: dict, previous: str) -> tuple[bytes, str]:
    """JSON text on one line that ends with the checksum of itself and of the text before it; and that checksum."""
    body = json.dumps(content)[:-1].encode()
    seal = hashlib.sha256(previous.encode() + body).hexdigest()
    return body + f', "checksum": "{seal}"}}'.encode(), seal


def _open_seal(line: bytes, previous: str) -> tuple[dict | None, str]:
    found = _SEAL.search(line)
    if not found:
        return None, ""
    seal = hashlib.sha256(previous.encode() + line[: found.start()]).hexdigest()
    return (json.loads(line), seal) if seal.encode() == found[1] else (None, "")


def _read_header(path: Path) -> tuple[dict, str]:
    file = path / HEADER
    if not file.is_file():
        raise ValueError(f"{path} holds no journal ({HEADER} is missing); expected a directory that `create` made")
    text = file.read_bytes()
    try:
        found = json.loads(text)["version"]
    except (ValueError, KeyError, TypeError):
        found = None
    if isinstance(found, int) and found != VERSION:
        raise ValueError(
            f"{path} has format version {found}, expected {VERSION}; use the release of easyedit_nmke that wrote it"
            + (" or a newer one" if found > VERSION else ", or start anew in another directory")
        )
    sealed, seal = _open_seal(text.rstrip(b"\n"), "")
    if sealed is None:
        raise ValueError(f"{file} is damaged; put this file back from a backup: the records cannot be used without it")
    return sealed, seal


def _check_empty(path: Path) -> None:
    if (path / HEADER).exists():
        raise ValueError(f"{path} already holds a journal; open it, or choose another directory")
    # A `create` that was killed leaves these.
    ours = {LOCK, EDITS, BASE, f"{BASE}.tmp", f"{HEADER}.tmp"}
    others = sorted(p.name for p in path.iterdir() if p.name not in ours)
    others += [f"{EDITS}/{p.name}" for p in (path / EDITS).glob("*")]
    if others:
        raise ValueError(f"{path} is not empty (it holds {', '.join(others[:3])}) and no journal; choose another directory")


def _label(number: int, line: bytes) -> str:
    names = []
    for name, value in dict(_NAMES.findall(line)).items():
        with contextlib.suppress(ValueError):
            names.append(f"{name.decode()} {json.loads(value)!r}")
    return f"record {number}" + (f" ({', '.join(names)})" if names else "")


def _not_written(number: int, path: Path, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "make room",
        errno.EDQUOT: "make room",
        errno.EROFS: "make it writable",
        errno.EACCES: "make it writable",
    }
    todo = advice.get(error.errno, "mend it")
    return (
        f"record {number} could not be written to {path}: {error.strerror}; nothing of it is kept. {todo.capitalize()} and repeat"
    )


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    _write_all(_temporary(path), data)
    os.replace(_temporary(path), path)
    _sync_folder(path.parent)


def _write_all(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_fully(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _write_fully(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
