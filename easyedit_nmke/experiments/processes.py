"""Segments of a comparison side by side, each in a process of its own with its share of the cores."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from .protocol import Event

logger = logging.getLogger(__name__)

Segment = Callable[[], Iterator[Event]]


@dataclass(frozen=True)
class Failure:
    """What another process tells of its error: the pickled exception, None when it cannot be brought over, and its traceback."""

    pickled: bytes | None
    text: str

    def error(self) -> BaseException:
        if self.pickled is None:
            return RuntimeError(f"a process of the comparison failed\n{self.text}")
        error = pickle.loads(self.pickled)
        error.__cause__ = RuntimeError(f"in a process of the comparison\n{self.text}")
        return error


def in_processes(segments: Sequence[Segment], jobs: int) -> Iterator[Event]:
    """The events of all segments, `jobs` of them at a time. The first error ends all processes and is raised, once everything that
    the others had told is passed on."""
    context, threads = multiprocessing.get_context("spawn"), threads_of(jobs)
    waiting, running, error = list(segments), {}, None
    try:
        while running or (waiting and error is None):
            while waiting and error is None and len(running) < jobs:
                reader, process = _start(context, waiting.pop(0), threads)
                running[reader] = process
            for reader in wait(list(running)):
                try:
                    told = reader.recv()
                except (EOFError, OSError):  # it has ended, perhaps in the middle of a message
                    told = None
                if isinstance(told, Event):
                    yield told
                    continue
                process = running.pop(reader)
                reader.close()
                process.join()
                if error is None and (told or process.exitcode):
                    error = told.error() if told else RuntimeError(_ended(process.exitcode))
                    for other in running.values():
                        other.terminate()
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    if error is not None:
        raise error


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(jobs: int) -> int:
    """Threads of each of `jobs` processes: a share of the cores, no more than this process takes alone."""
    return torch.get_num_threads() if jobs == 1 else max(1, min(torch.get_num_threads(), cores() // jobs))


def warn_if_oversubscribed(jobs: int) -> None:
    """Say it in the log when `jobs` processes want more threads than there are cores: they would wait for each other."""
    threads, there = threads_of(jobs), cores()
    if jobs * threads > there:
        logger.warning(
            "%d x %d threads on %d cores: the machine is oversubscribed; fewer jobs, or a smaller OMP_NUM_THREADS, are faster",
            jobs, threads, there,
        )  # fmt: skip


def _ended(code: int) -> str:
    return f"a process of the comparison ended with exit code {code} (out of memory?)"


def _start(context, segment: Segment, threads: int) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(segment, writer, os.getpid(), threads), daemon=True)
    with _environment("OMP_NUM_THREADS", str(threads)):  # read when torch is imported
        process.start()
    writer.close()  # the process holds the only one, so the pipe ends with it
    return reader, process


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for the processes that are started inside."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _work(segment: Segment, writer: Connection, parent: int, threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is told to all of a shell's processes; the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        for event in segment():
            writer.send(event)
    except Exception as error:
        writer.send(Failure(pickled(error), traceback.format_exc()))


def pickled(error: Exception) -> bytes | None:
    """None for an exception that would not come back from a pickle as what it was."""
    try:
        pickled = pickle.dumps(error)
        return pickled if type(pickle.loads(pickled)) is type(error) else None
    except Exception:
        return None


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: whoever starts it again needs the states that it holds."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
