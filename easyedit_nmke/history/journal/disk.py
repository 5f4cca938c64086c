"""What lies in a journal's folder and how to tell that it is what was written; errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
from pathlib import Path

FORMAT, VERSION = "easyedit_nmke journal", 2
HEADER, BASE, INDEX, EDITS, LOCK, DROPPED = "header.json", "base.safetensors", "index.jsonl", "edits", "lock", "dropped"

_FILE = re.compile(r"(\d{6,})\.safetensors")
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
    try:
        return (json.loads(text), mark) if mark.encode() == found[1] else (None, "")
    except (ValueError, RecursionError):  # sealed by somebody else
        return None, ""


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
    """Where a file of the journal is written first; the one writer's, so that the next one writes over what was left."""
    return path.with_name(path.name + ".tmp")


def place(path: Path, number: int) -> Path:
    """Where the tensors of a record lie."""
    return path / EDITS / f"{number:06d}.safetensors"


def record_files(path: Path) -> dict[int, Path]:
    """The records' files that are there, by number."""
    found = ((_FILE.fullmatch(file.name), file) for file in (path / EDITS).glob("*"))
    return {int(match[1]): file for match, file in found if match}


def file_problem(file: Path, written: dict, contents: bool = True) -> str | None:
    """What is wrong with a file of which `written` tells "bytes" and "sha256"; not `contents`: by its size alone."""
    if not file.exists():
        return "is missing"
    if file.stat().st_size != written["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {written['bytes']}"
    if contents and hashlib.sha256(file.read_bytes()).hexdigest() != written["sha256"]:
        return "is not what was written (other checksum)"
    return None


def read_header(path: Path) -> tuple[dict, str]:
    """What `create` wrote, and its checksum. ValueError, that says what to do, when it cannot be used."""
    about, mark = unseal(header_text(path), "")
    if about is None:
        damaged = f"{path / HEADER} is damaged; put this file back from a backup: the records cannot be used without it"
        raise ValueError(damaged)
    return about, mark


def header_text(path: Path) -> bytes:
    """As it is there, sound or not. ValueError where there is none, or of another version, which may be sealed in another way."""
    file = path / HEADER
    if not file.is_file():
        raise ValueError(f"{path} holds no journal ({HEADER} is missing); expected a directory that one was made in")
    text = file.read_bytes()
    try:
        about = json.loads(text)
        found = about["version"] if about["format"] == FORMAT else VERSION
    except (ValueError, KeyError, TypeError, RecursionError):
        found = VERSION
    if found != VERSION:
        raise ValueError(
            f"{file} says format version {found!r}, expected {VERSION}; open it with the release of easyedit_nmke that wrote it, "
            "or start anew in another directory"
        )
    return text.removesuffix(b"\n")
