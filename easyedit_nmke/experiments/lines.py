"""What a line of results.jsonl may hold, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hparams import is_int, is_number
from ..models.requests import called


def wrong(line) -> str:
    """Why a line's content is no result, in words; "" where it is one. What is not known here may be anything."""
    if not isinstance(line, dict):
        return f"it is {called(line)}, not an object"
    for name, fits, expected in _SHAPES:
        if name not in line and name in _NEEDED:
            return f"{name} is missing"
        value = line.get(name)
        if not fits(value) and (value is not None or name in _NEEDED):
            return f"{name} is not {expected}"
    return ""


def _number(value) -> bool:
    """None: nothing was measured. A whole number may be too large for what comes after."""
    return value is None or (is_number(value) and not (is_int(value) and value.bit_length() > 1023))


def _named(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _layer(value) -> bool:
    """Of `drift`: numbers by name, and how many neurons changed by how much."""
    histogram = value.get("histogram") if isinstance(value, dict) else None
    numbers = isinstance(value, dict) and all(_number(entry) for name, entry in value.items() if name != "histogram")
    return numbers and (histogram is None or (_named(_list(is_number))(histogram) and {"edges", "counts"} <= set(histogram)))


def _protocol(value) -> bool:
    parts = (value.get("data"), value.get("model")) if isinstance(value, dict) else ("",)
    size = value.get("batch_size", 1) if isinstance(value, dict) else 0
    return all(isinstance(part or {}, dict) for part in parts) and is_int(size) and size > 0


_NEEDED = ("method", "seed", "checkpoint", "scores")
_SHAPES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("method", lambda value: isinstance(value, str), "a text"),
    ("seed", is_int, "a whole number"),
    ("checkpoint", lambda value: is_int(value) and 0 <= value < 2**63, "a whole number of edits"),
    ("scores", _named(_number), "numbers by name"),
    ("seconds", _named(_number), "numbers by name"),
    ("startup_seconds", _named(_number), "numbers by name"),
    ("kept_bytes", _number, "a number"),
    ("peak_memory_mb", _named(_number), "numbers by name"),
    ("mask", _named(lambda value: value is None or _named(_number)(value)), "numbers by layer, by name"),
    ("retention", _named(lambda value: value is None or _list(_number)(value)), "lists of numbers by name"),
    ("records", _named(lambda value: value is None or _list(_number)(value)), "lists of numbers by name"),
    ("drift", _named(_layer), "numbers and a histogram by layer"),
    ("protocol", _protocol, "an object"),
    ("failed", lambda value: is_int(value) or _list(is_int)(value), "a list of edits"),
)
