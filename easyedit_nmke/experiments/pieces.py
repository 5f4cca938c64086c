"""Segments on a cluster, whose machines share no disk: each keeps its state in a worker's scratch and sends back, with every
result, the files that have changed. A lost worker or node costs what it did since its last result; another goes on from there."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import sync_folder, whole_folder, write_new, write_whole
from .cluster import Cluster, check_lost
from .processes import Failure, pickled
from .protocol import Event, Progress, Result

GIVEN = "given"  # where a worker finds the files that the driver gave it
WRITERS = ("lock", "lock.json")  # of a journal: tell who writes it, on one machine
UNTIL_STOPPED = 10  # seconds in which a worker that is asked to stop may remove its scratch

Files = Mapping[str, bytes | None]  # a folder by relative names; None: as the other side has it


@dataclass(frozen=True)
class Piece:
    """A segment for a cluster. run(folder): its events; everything that it keeps is in the folder, which is `directory` for the
    driver. state: the part of it that it goes on from, a folder by its relative name. files: of the driver's, copied to
    folder/GIVEN. added: JSON-lines files of the driver's, copied to the folder; lines that are new there are added to them."""

    run: Callable[[Path], Iterator[Event]]
    directory: Path
    state: str
    files: tuple[Path, ...] = ()
    added: tuple[Path, ...] = ()


def on_cluster(cluster: Cluster, pieces: Sequence[Piece], gpus: int) -> Iterator[Event]:
    """The events of all pieces, as many at a time as there is room for. What a result stands on is in the driver's folder before
    it is told. The first error ends all of them and is raised."""
    ray = cluster.ray
    cluster.room(gpus)
    task = ray.remote(_at_work).options(**cluster.options(gpus), max_retries=0, num_returns="streaming")
    given = {files: ray.put({f"{GIVEN}/{file.name}": file.read_bytes() for file in files}) for files in {p.files for p in pieces}}
    running = {}

    def begin(course: _Course) -> None:
        running[task.remote(course.piece, _kept(course.piece), given[course.piece.files], cluster.threads)] = course

    try:
        for piece in pieces:
            begin(_Course(piece))
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            course = running[ready]
            try:
                told, files = cluster.got(next(ready))
            except ray.exceptions.RayError as error:
                del running[ready]
                course.lose(error)
                begin(course)
                continue
            if files is not None:
                _take(course.piece, files)
            if told is None:
                del running[ready]
            else:
                yield course.counted(told)
    finally:
        _stop(ray, list(running))


def records(source: str, folder: Path) -> str:
    """Where a worker finds the records that the driver has sent; anybody else, where `source` says."""
    given = folder / GIVEN / Path(source).name
    return str(given) if given.is_file() else source


def _kept(piece: Piece) -> Files:
    """What the driver has of a piece, for a worker to go on with."""
    _mend(piece.directory / piece.state)
    state = {f"{piece.state}/{name}": content for name, content in _files(piece.directory / piece.state, {}).items()}
    return state | {file.name: file.read_bytes() for file in piece.added if file.is_file()}


def _stop(ray, streams: Sequence) -> None:
    """Interrupt what runs, and give it the time to remove its scratch."""
    with suppress(ray.exceptions.RayError):
        for stream in streams:
            ray.cancel(stream)
        if streams:
            ray.wait([stream.completed() for stream in streams], num_returns=len(streams), timeout=UNTIL_STOPPED)


@dataclass
class _Course:
    """How far a piece has come: edits that were told of, at its last loss, and again since then; losses since a result after new
    edits."""

    piece: Piece
    told: int = 0
    reached: int = -1
    again: int = 0
    lost: int = 0

    def counted(self, event: Event) -> Event:
        """The event, without the edits that were told before its worker was lost."""
        if isinstance(event, Result):
            self.lost = self.lost if self.told == self.reached else 0
            return event
        before = min(event.more, self.told - self.again)
        self.again += event.more
        self.told = max(self.told, self.again)
        return Progress(event.more - before)

    def lose(self, error: Exception) -> None:
        self.lost = check_lost(self.lost + 1, self.piece.state, error)
        self.reached, self.again = self.told, 0


# ---- in a worker


def _at_work(piece: Piece, files: Files, given: Files, threads: int) -> Iterator[tuple[Event | None, Files | None] | Failure]:
    """Each event and, with results and at the end, the files that have changed; at last None, or the error."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="easyedit_nmke-") as scratch:
        folder, seen = Path(scratch), {}
        _write(folder, {**files, **given})
        _files(folder, seen)
        try:
            for event in piece.run(folder):
                yield event, _changed(folder, seen) if isinstance(event, Result) else None
            yield None, _changed(folder, seen)
        except Exception as error:
            yield Failure(pickled(error), traceback.format_exc())


# ---- folders as files


def _files(folder: Path, seen: dict[str, tuple[int, int]]) -> dict[str, bytes | None]:
    """All files of a folder; None for those that are as they were when `seen` was told."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in WRITERS and not name.startswith(f"{GIVEN}/"):
            mark = path.stat().st_size, path.stat().st_mtime_ns
            found[name] = None if seen.get(name) == mark else path.read_bytes()
            seen[name] = mark
    return found


def _changed(folder: Path, seen: dict[str, tuple[int, int]]) -> Files | None:
    """As `_files`; None when nothing has changed."""
    before = set(seen)
    found = _files(folder, seen)
    return None if before == set(found) and not any(content is not None for content in found.values()) else found


def _write(folder: Path, files: Files, earlier: Path | None = None) -> None:
    """Files into a new folder; those that are None are `earlier`'s."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            write_new(path, content, durable=False)
            continue
        try:
            os.link(earlier / name, path)
        except OSError:  # a file system without links
            shutil.copy2(earlier / name, path)


def _take(piece: Piece, files: Files) -> None:
    """A worker's files into the driver's folder; the state as a whole, or not at all."""
    folder, inside = piece.directory / piece.state, f"{piece.state}/"
    state = {name.removeprefix(inside): content for name, content in files.items() if name.startswith(inside)}
    if state:
        fresh, old = _beside(folder)
        with whole_folder(fresh) as temporary:
            _write(temporary, state, folder)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    for name, content in files.items():
        if content is None or name.startswith(inside):
            continue
        added = next((file for file in piece.added if file.name == name), None)
        if added:
            _add_lines(added, content)
        else:
            write_whole(piece.directory / name, content)


def _add_lines(file: Path, content: bytes) -> None:
    known = set(file.read_bytes().splitlines()) if file.is_file() else set()
    with file.open("ab") as out:
        out.writelines(line + b"\n" for line in content.splitlines() if line not in known)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a folder is while it is made, and while another takes its place."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _mend(folder: Path) -> None:
    """Finish, or forget, what a driver that was killed in `_take` has left."""
    fresh, old = _beside(folder)
    if fresh.is_dir() and not folder.exists():
        os.replace(fresh, folder)
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
