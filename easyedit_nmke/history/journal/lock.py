"""One writer at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ...files import write_new

logger = logging.getLogger(__name__)

HOLDER = "lock.json"  # beside the lock, which some systems let nobody else read
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


class Lock:
    """The one writer's lock: it vanishes with the process where the file system has locks; elsewhere what HOLDER says counts."""

    def __init__(self, path: Path):
        """BlockingIOError when another live writer holds it."""
        self._lock, self._told, self._process = FileLock(path, thread_local=False), path.with_name(HOLDER), os.getpid()
        holder = self._holder()
        if not self._take(path, holder):
            raise BlockingIOError(errno.EWOULDBLOCK, _held(path, holder))
        try:
            if holder:
                logger.info("took over the lock of process %s on %s, which is gone", holder.get("pid"), holder.get("host"))
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            mine = {"pid": self._process, "host": socket.gethostname(), "started": started}
            write_new(self._told, json.dumps(mine).encode())
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """In the process that took it; one that was forked from it has nothing to give back."""
        if self._process != os.getpid():
            self._lock.release = lambda **_: None  # some versions would call it when the object goes, and unlock it for all
            return
        with contextlib.suppress(OSError):
            os.unlink(self._told)
        self._lock.release()

    def _holder(self) -> dict:
        """Who says that it holds the lock; {} for nobody."""
        try:
            found = json.loads(self._told.read_bytes())
            return found if isinstance(found, dict) else {}
        except (FileNotFoundError, ValueError):
            return {}

    def _take(self, path: Path, holder: dict) -> bool:
        if _acquired(self._lock):
            return True
        # Some versions of filelock do not tell a lock that is held from a file system without any; a lock of its own does.
        probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        other = FileLock(probe)
        try:
            if _acquired(other):
                other.release()
                return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)
        return not holder or (holder.get("host") == socket.gethostname() and not _running(holder.get("pid")))


def _acquired(lock: FileLock) -> bool:
    """False when it is held, or the file system has no locks."""
    try:
        with warnings.catch_warnings():  # some versions warn, and make do with a file that outlives a killed process
            warnings.filterwarnings("error", "flock not supported")
            lock.acquire(timeout=0)
        return True
    except (Timeout, NotImplementedError, UserWarning):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.debug("no locks for %s: %s", lock.lock_file, error)
        return False


def _held(path: Path, holder: dict) -> str:
    if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
        return f"{path.parent} is already open for writing in this process; close() it first"
    who = f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})" if holder else "another process"
    return f"{path.parent} is being written by {who}; wait for it or stop it. If it no longer runs, remove {path} and {HOLDER}"


def _running(pid: Any) -> bool:
    return not isinstance(pid, int) or psutil.pid_exists(pid)
