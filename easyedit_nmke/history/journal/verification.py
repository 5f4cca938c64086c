"""Whether every byte of a journal is what was written: without its lock, beside a living writer, and past the first damage."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from json import loads
from pathlib import Path

from ...files import write_json
from .disk import BASE, EDITS, HEADER, INDEX, file_problem, header_text, place, record_files, temporary, unseal

logger = logging.getLogger(__name__)

VERIFIED = "verified.json"
_MARK = slice(-66, -2)  # where the checksum stands that ends a line
_BODY = slice(None, -81)


@dataclass(frozen=True)
class Problem:
    """record: its number, None for what belongs to the whole journal. file: within the journal's folder."""

    record: int | None
    file: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found among so many records, and when (UTC, ISO 8601)."""

    made: str
    records: int
    problems: tuple[Problem, ...]


def verify(directory: str | Path) -> Verification:
    """Read every file and check every checksum; all problems, in the order of the records. It is remembered in the journal's
    folder, where that can be written. A record that is being written, or was when its process was killed, is none yet.

    ValueError when there is no journal, or one of another format version.
    """
    path = Path(directory)
    text = header_text(path)
    about, mark = unseal(text, "")
    if about is None:
        reason = f"is not what was written (other checksum); without it {BASE} cannot be checked"
        problems = [Problem(None, HEADER, reason)]
    else:
        problem = file_problem(path / BASE, about["base"])
        problems = [Problem(None, BASE, problem)] if problem else []
    files = record_files(path)  # before the index: a line is written before its file
    lines = _lines(path)
    checked, numbers = _check(path, lines, {mark} if about is not None else _marks(text, {""}))
    lost = [Problem(n, f"{EDITS}/{file.name}", f"has no line in {INDEX}") for n, file in files.items() if n not in numbers]
    problems += sorted(checked + lost, key=lambda problem: problem.record)
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = Verification(made, len(lines), tuple(problems))
    try:
        write_json(path / VERIFIED, asdict(found))
    except OSError as error:
        logger.info("%s could not be written (%s): that the journal was verified is not remembered", path / VERIFIED, error)
    return found


def last_verified(directory: str | Path) -> Verification | None:
    """What the last `verify` found; None when there was none that could be remembered."""
    try:
        found = loads((Path(directory) / VERIFIED).read_bytes())
        return Verification(found["made"], found["records"], tuple(Problem(**problem) for problem in found["problems"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lines(path: Path) -> list[bytes]:
    """Of the index, with their ends; the last one may be cut off, unless a writer is at it."""
    index = path / INDEX
    while True:
        data = index.read_bytes() if index.exists() else b""
        *lines, torn = data.split(b"\n")
        lines = [line + b"\n" for line in lines]
        if not torn or temporary(place(path, len(lines))).exists():
            return lines
        if index.read_bytes() == data:  # else it has just been finished
            return [*lines, torn]


def _check(path: Path, lines: list[bytes], marks: set[str]) -> tuple[list[Problem], set[int]]:
    """(what is wrong with the lines and their files, the numbers of the records that have lines). marks: those that the first line
    may be sealed over."""
    problems, numbers = [], set()
    for count, line in enumerate(lines):
        text = line.removesuffix(b"\n")
        sound, mark = next((found for before in marks if (found := unseal(text, before))[0] is not None), (None, ""))
        marks = _marks(text, marks) if sound is None else {mark}
        if sound is None or text == line:
            number = max(numbers, default=-1) + 1
            reason = f"line {count + 1} is not what was written, or not after what it was written after; its file cannot be checked"
            problems.append(Problem(number, INDEX, reason))
        else:
            number = sound["record"]
            where = place(path, number)
            unfinished = count + 1 == len(lines) and not where.exists() and temporary(where).exists()
            if not unfinished and (problem := file_problem(where, sound)):
                problems.append(Problem(number, f"{EDITS}/{where.name}", problem))
        numbers.add(number)
    return problems, numbers


def _marks(line: bytes, before: set[str]) -> set[str]:
    """The checksums that the next line may be sealed over: the one that stands in this line, and the one that is its own; damage
    in one place leaves one of them."""
    return {hashlib.sha256(mark.encode() + line[_BODY]).hexdigest() for mark in before} | {line[_MARK].decode(errors="replace")}
