"""What it took to make what is cached: the files tell it, so that a run that only reads them knows what it was spared."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ..models.device import synchronise


class Making(NamedTuple):
    """A piece of work, by when it ended (ns); files that were made together share it."""

    ended: int
    seconds: float

    @classmethod
    def since(cls, started: float) -> Making:
        """Of what began at `time.perf_counter()` = started and ends now."""
        synchronise()
        return cls(time.time_ns(), time.perf_counter() - started)

    def metadata(self) -> dict[str, str]:
        """For a safetensors file."""
        return {name: str(value) for name, value in self._asdict().items()}


def making_of(file: Path) -> Making | None:
    """What a cached file says; None where it is not there or says nothing (older ones, EasyEdit's)."""
    try:
        with safe_open(file, "pt") as content:
            said = content.metadata() or {}
        return Making(int(said["ended"]), float(said["seconds"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def seconds_of(makings: Iterable[Making | None]) -> float | None:
    """Of all of them, each piece of work once; None when one is not known."""
    found = set(makings)
    return None if None in found else sum(making.seconds for making in found if making)
