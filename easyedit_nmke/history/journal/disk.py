"""What the journal writes: text that carries its checksum, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
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
    """Where a file of the journal is written first; the one writer's, so that the next one writes over what was left."""
    return path.with_name(path.name + ".tmp")
