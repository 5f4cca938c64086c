"""One writer at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)


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
            mine = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
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
