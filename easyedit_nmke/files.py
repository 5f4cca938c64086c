"""Files and folders that are there whole or not at all, whenever the process is killed or the power goes.

What is new is written beside its place, forced to the disk, and renamed: nobody ever reads a half of it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

BINARY = getattr(os, "O_BINARY", 0)  # Windows would write each \n as two bytes


def user_cache() -> Path:
    """Where what is made once for every run is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "easyedit_nmke"


@contextmanager
def whole(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    temporary: a sibling of `path`, by default one that no other process uses. Who writes alone gives a fixed one, and so writes
    over what a killed process left. Missing folders are made.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.makedirs(path.parent, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        _as_os_error(error, path)
        raise
    sync_folder(path.parent)


def _as_os_error(error: BaseException, path: Path) -> None:
    """What safetensors raises on a full disk is no OSError."""
    if isinstance(error, SafetensorError):
        raise OSError(f"{path} could not be written ({error})") from error


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not. What an earlier attempt that
    was killed has left is removed. Errors as `check_new`."""
    path = check_new(path)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            sync_folder(inside) if inside.is_dir() else sync(inside)
        sync_folder(temporary)
        if os.name == "nt" and path.exists():  # which replaces no folder, not even an empty one
            path.rmdir()
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _as_os_error(error, path)
        raise
    sync_folder(path.parent)


def check_new(folder: str | Path) -> Path:
    """Its full path. ValueError when it is a file, or a folder that holds anything."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder; give another name, or remove it")
    return folder


def write_whole(path: str | Path, data: bytes, temporary: Path | None = None) -> None:
    """As `whole`, of bytes."""
    with whole(path, temporary) as file:
        write_new(file, data, durable=False)


def write_json(path: str | Path, content) -> None:
    """As `whole`, of what JSON can hold."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_new(path: Path, data: bytes, durable: bool = True) -> None:
    """All of it, or OSError; durable: on the disk when this returns."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
    try:
        write_fully(file, data)
        if durable:
            os.fsync(file)
    finally:
        os.close(file)


def write_fully(file: int, data: bytes) -> None:
    """A write may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync(path: Path) -> None:
    """Force a file to the disk."""
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what can be written
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """A renamed file is in its place for good only after this. Nothing where the system cannot: Windows opens no folders, and some
    network file systems sync none."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)
