"""Where models run: devices by name, their memory, and waiting for them."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def synchronise() -> None:
    """Wait until the GPUs have done what they were given, so that its time is counted where it was caused."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def peak_memory(reset: bool = False) -> float:
    """Most memory in MB since the last reset: allocated on the GPUs, else held by the process (0 where that cannot be read, which
    is anywhere but on Linux)."""
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
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
        return 0.0


def device_of(wanted) -> torch.device:
    numbered = isinstance(wanted, int) or (isinstance(wanted, str) and wanted.isdigit())
    name = f"cuda:{wanted}" if numbered else wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {wanted!r}, expected a CUDA index (0), 'cpu', 'cuda:1' or another torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {wanted!r} (CUDA), but no CUDA device is visible here; set `device: cpu`")
    return device
