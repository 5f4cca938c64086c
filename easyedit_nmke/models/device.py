"""Where models run: devices by name, their memory, and waiting for them."""

from __future__ import annotations

import importlib.util
import platform
import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import psutil
import torch

from ..messages import how_to_install


def synchronise() -> None:
    """Wait until the GPUs have done what they were given, so that its time is counted where it was caused."""
    for device in _in_use():
        torch.cuda.synchronize(device)


@contextmanager
def timed(seconds: MutableMapping[str, float | None], name: str) -> Iterator[None]:
    """Add the seconds that the block takes, the GPUs' work in it included, to `seconds`."""
    synchronise()
    started = time.perf_counter()
    yield
    synchronise()
    seconds[name] = (seconds.get(name) or 0.0) + time.perf_counter() - started


def peak_memory(reset: bool = False) -> float:
    """Most memory in MB since the last reset: allocated on the GPUs in use, else held by the process. Linux alone can reset the
    latter: elsewhere it is the most since the process began (Windows), or what it holds now."""
    if devices := _in_use():
        if reset:
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) / 1e6
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 / 1e6
    except (OSError, TypeError):
        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", held.rss) / 1e6


def free_memory(device: torch.device) -> float:
    """Bytes that new tensors may take: free on a GPU, or held there by torch and unused; else available to processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return float(psutil.virtual_memory().available)


@cache
def processor() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def total_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total)


def current(device: torch.device) -> AbstractContextManager:
    """Inside it kernels that are launched without torch run on `device`: by themselves they run on GPU 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _in_use() -> list[int]:
    """The GPUs on which torch has held memory since the last reset. Its own books are asked and not the GPUs, where a question
    opens a context of some hundred MB."""
    if not torch.cuda.is_initialized():
        return []
    return [device for device in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(device)]


def device_of(wanted) -> torch.device:
    numbered = isinstance(wanted, int) or (isinstance(wanted, str) and wanted.isdigit())
    name = f"cuda:{wanted}" if numbered else wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {wanted!r}, expected a CUDA index (0), 'cpu', 'cuda:1' or another torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {wanted!r} (CUDA), but no CUDA device is visible here; set `device: cpu`")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {wanted!r}, but there are {count} CUDA devices here, numbered from 0")
    return device


def triton_problem(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a CUDA device, in words; of another device, whether Triton is missing alone."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed ({how_to_install('cuda')} brings it)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability 8.0 is needed, {torch.cuda.get_device_name(device)} has less"
    return None
