"""Writing that survives: whole files or none, text that carries its checksum, errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path

_SEAL = re.compile(rb', "checksum": "([0-9a-f]{64})"}\Z')
_ADVICE = {
    errno.ENOSPC: "make room there and repeat", errno.EDQUOT: "make room there and repeat",
    errno.EROFS: "make it writable and repeat", errno.EACCES: "make it writable and repeat",
}  # fmt: skip


def seal(content: dict, previous: str) -> tuple[bytes, str]:
    """JSON text on one line that ends with a checksum of itself and of the checksum before it; and that checksum."""
    body = json.dumps(content)[:-1].encode()
    mark = hashlib.sha256(previous.encode() + body).hexdigest()
    return body + f', "checksum": "{mark}"}}'.encode(), mark


def unseal(text: bytes, previous: str) -> tuple[dict | None, str]:
    """The content and the checksum of what `seal` made; None for any other bytes."""
    found = _SEAL.search(text)
    if not found:
        return None, ""
    mark = hashlib.sha256(previous.encode() + text[: found.start()]).hexdigest()
    return (json.loads(text), mark) if mark.encode() == found[1] else (None, "")


@contextlib.contextmanager
def explained(what: str):
    """An operating system's error that says what could not be done, and what to do; of the same kind."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno, "mend that and repeat")
        raise OSError(error.errno, f"{what}: {error.strerror}; {advice}") from error


def temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    try:
        write_new(temporary(path), data)
        os.replace(temporary(path), path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary(path))
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """All of it on the disk, or OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_fully(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def write_fully(file: int, data: bytes) -> None:
    """A write may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync_folder(path: Path) -> None:
    """A renamed file is in its place for good only after this."""
    if os.name != "posix":  # a folder cannot be opened there
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
