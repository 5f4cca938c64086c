"""The machines of a Ray cluster: how one is reached, what room it has, and calls of an object that each worker makes for itself (a
model, loaded once). A lost worker or node costs the call that it was at, which another makes again."""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..hparams import HyperParams
from ..messages import how_to_install
from .processes import Failure, pickled

logger = logging.getLogger(__name__)

ANSWERS = 10  # seconds in which a cluster that is up answers
LOST = 3  # times in a row that a piece of work is begun again because its worker or node was lost


@contextmanager
def cluster(on: str) -> Iterator[Cluster]:
    """The Ray cluster that `on` names: "ray:HOST:PORT", the one at the address; "ray", the one of RAY_ADDRESS or of this machine,
    and where there is none, one of this machine's cores and GPUs that ends with the block. ValueError when none answers,
    ImportError when Ray is not installed."""
    name, _, address = on.partition(":")
    if name != "ray" or "://" in address:
        raise ValueError(
            f"--on is {on!r}, expected ray, or ray:HOST:PORT with a cluster's own address (started on one of its nodes)"
        )
    try:
        import ray
    except ImportError:
        raise ImportError(f"--on ray needs Ray: {how_to_install('ray')} brings it") from None
    if ray.is_initialized():
        yield Cluster(ray)
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    try:
        if address not in ("", "auto", "local"):  # Ray itself waits for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWERS).close()
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ValueError(
            f"no Ray cluster answers at {address or 'this machine'} ({reason}); start one by `ray start --head`, and run this on "
            "one of its nodes"
        ) from None
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def gpus_of(settings: HyperParams) -> int:
    """GPUs that work with these settings takes, on whichever machine. ValueError for what another machine cannot load."""
    if isinstance(settings.model_name, tuple):
        raise ValueError("model_name is a model in this process, which other machines cannot load; give its name or folder")
    if settings.model_parallel:
        raise ValueError(
            "model_parallel spreads a model over GPUs, but a worker of a cluster has one; set it to false, or leave out --on"
        )
    device = str(settings.device)
    return int(device.isdigit() or device.startswith("cuda") or (settings.device is None and torch.cuda.is_available()))


def placed(settings: HyperParams) -> dict[str, Any]:
    """What differs in a worker's settings: the one GPU that it sees is its first."""
    return {"device": 0} if gpus_of(settings) else {}


class Cluster:
    """A cluster that this process is connected to. Each piece of work has as many threads as this process, and so the same bits."""

    def __init__(self, ray):
        self.ray, self.threads = ray, torch.get_num_threads()

    def room(self, gpus: int) -> int:
        """Pieces of work that the nodes take at a time; a warning where that is none."""
        there = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fit = [int(min(node.get("CPU", 0) // self.threads, node.get("GPU", 0) // gpus if gpus else 1 << 30)) for node in there]
        if not sum(fit):
            wanted = f"{self.threads} CPUs" + (" and a GPU" if gpus else "")
            logger.warning("no node of the cluster has %s: work waits for one (OMP_NUM_THREADS sets the CPUs of a worker)", wanted)
        return sum(fit)

    def options(self, gpus: int) -> dict[str, Any]:
        """Of a task or an actor."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return {"num_cpus": self.threads, "num_gpus": gpus, "runtime_env": {"env_vars": threads}}

    def got(self, reference) -> Any:
        """What a worker's call or stream has given: an error of its own is raised here. RayError when the worker was lost."""
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # of what comes before the work: a package that a node lacks
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"a worker of the cluster cannot do its work: {reason}") from error
        if isinstance(found, Failure):
            raise found.error()
        return found

    @contextmanager
    def pool(self, make: Callable[[], Any], gpus: int) -> Iterator[Pool]:
        """As many workers as there is room for, each with an object of its own that `make()` gives on its first call."""
        found = Pool(self, make, gpus)
        try:
            yield found
        finally:
            found.close()


class Pool:
    """Calls of an object that every worker has made for itself."""

    def __init__(self, cluster: Cluster, make: Callable[[], Any], gpus: int):
        self.cluster, self.make, self.gpus = cluster, make, gpus
        self.workers: list = []

    def map(self, name: str, calls: Iterable[tuple]) -> Iterator[Any]:
        """What the method `name` returns for each of the calls' arguments, in their order. A call whose worker is lost is made
        again by another. The first error is raised."""
        ray, numbered = self.cluster.ray, enumerate(calls)
        again, running, done, following, lost = [], {}, {}, 0, 0
        self._fill()
        free = list(self.workers)
        while True:
            while free and (call := again.pop() if again else next(numbered, None)):
                worker = free.pop()
                running[worker.call.remote(name, call[1])] = call, worker
            while following in done:
                yield done.pop(following)
                following += 1
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            call, worker = running.pop(ready)
            try:
                done[call[0]] = self.cluster.got(ready)
            except ray.exceptions.RayError as error:
                lost = check_lost(lost + 1, "a call", error)
                self.workers.remove(worker)
                again.append(call)
                if not self.workers:
                    self._fill(1)
                    free = list(self.workers)
                continue
            lost = 0
            free.append(worker)

    def each(self, name: str, *arguments) -> None:
        """Call a method of every worker's object. Workers that come later, in the place of lost ones, do without."""
        self._fill()
        sent = self.cluster.ray.put(arguments)
        for worker, call in [(worker, worker.call.remote(name, sent)) for worker in self.workers]:
            try:
                self.cluster.got(call)
            except self.cluster.ray.exceptions.RayError:
                self.workers.remove(worker)

    def _fill(self, most: int | None = None) -> None:
        """As many workers as there is room for now, or `most` where that is less; one at least."""
        room = max(self.cluster.room(self.gpus), 1)
        kind = self.cluster.ray.remote(_Worker).options(**self.cluster.options(self.gpus))
        while len(self.workers) < min(most or room, room):
            self.workers.append(kind.remote(self.make, self.cluster.threads))

    def close(self) -> None:
        with suppress(self.cluster.ray.exceptions.RayError):
            for worker in self.workers:
                self.cluster.ray.kill(worker)


def check_lost(times: int, what: str, error: Exception) -> int:
    """How many times in a row the worker of something was lost; RuntimeError when that is too often."""
    if times > LOST:
        raise RuntimeError(f"the worker of {what} was lost {times} times; the last: {first_line(error)}") from error
    logger.warning("the worker of %s was lost (%s); another goes on", what, first_line(error))
    return times


def first_line(error: Exception) -> str:
    """The first line of an error of Ray's."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass
class _Worker:
    """Holds one object for its calls."""

    make: Callable[[], Any]
    threads: int

    @cached_property
    def made(self) -> Any:
        torch.set_num_threads(self.threads)
        return self.make()

    def call(self, name: str, arguments: tuple) -> Any:
        try:
            return getattr(self.made, name)(*arguments)
        except Exception as error:
            return Failure(pickled(error), traceback.format_exc())
