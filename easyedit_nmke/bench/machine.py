"""Where and how a measurement is made: the machine, and a clock that counts time and memory by phase."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from ..history.journal import versions
from ..models.device import free_memory, peak_memory, processor, synchronise


@dataclasses.dataclass
class Measured:
    """Seconds and peak memory (MB above what was held before) by phase, and of the whole edit."""

    total: float
    seconds: dict[str, float]
    memory: dict[str, float]
    processor: float  # seconds that all threads together were given
    masks: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}


def busy(results: Sequence[Mapping], device: torch.device) -> list[str]:
    """A note where the process was given less than one core's time: others were at work, and no time is to be trusted."""
    if device.type != "cpu" or not results:
        return []
    share = sum(r["processor"]["median"] for r in results) / sum(r["total"]["median"] for r in results)
    if share > 0.9:
        return []
    return [f"the machine was busy with other work: {share:.0%} of one core's time for this process; measure again when it is not"]


def check_device(device: str, dtype: str) -> None:
    """ValueError for a device or precision that cannot be measured here."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected cpu, cuda or cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but no CUDA device is visible here; use cpu")
    if kind == "cpu" and dtype == "float16":
        raise ValueError("float16 models are not edited on a CPU; use float32 or bfloat16")


def held_memory() -> float:
    """What `peak_memory` is now (MB), and its new start; what earlier edits left in cycles is freed, and given back to the system
    where it takes it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return peak_memory(reset=True)


class Clock:
    """Time and memory of phases that exclude each other: entering one pauses the one around it."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self._held, self._phase, self._processor = held_memory(), None, time.process_time()

    def switch(self, phase: str | None) -> str | None:
        """Begin `phase` (None: nothing); returns what was going on."""
        synchronise()
        now = time.perf_counter()
        before = self._phase
        if before is not None:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self._started
            self.memory[before] = max(self.memory.get(before, 0.0), peak_memory() - self._held)
        peak_memory(reset=True)
        self._phase, self._started = phase, time.perf_counter()
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        around = self.switch(name)
        try:
            yield
        finally:
            self.switch(around)

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def measured(self, masks: Mapping[int, torch.Tensor] | None = None) -> Measured:
        processor = time.process_time() - self._processor
        return Measured(sum(self.seconds.values()), self.seconds, self.memory, processor, masks or {})


# ---- where


def surroundings() -> dict:
    """Hardware and library versions."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware": {
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "free_memory_gb": round(free_memory(torch.device("cpu")) / 1e9, 1),
            "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
        },
        "versions": {
            **versions("easyedit-nmke", "torch", "transformers", "numpy", "triton"),
            "cuda": torch.version.cuda,
        },
    }
