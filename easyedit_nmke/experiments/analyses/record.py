"""What an analysis is, and the file that its results are kept in. Imports no torch: the shell reads every record for its help."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import whole


@dataclass(frozen=True)
class Table:
    """Rows of texts under headings, for the shell and the report."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers."""
        return [all(cell[:1] in "+-.0123456789" for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Analysis:
    """`nmke analyze NAME`. summary: a line of help; example: a whole command line.

    run(args, begin): does the work. `begin(settings, model)` opens the file of its results, a `Notebook`, once everything that they
    depend on is known; each result is a line of it, made by `Notebook.once`, so that the same command goes on where it was stopped.
    figure(lines): matplotlib's, of those lines; None where they hold nothing to draw. tables(lines), said(lines): numbers and
    sentences for the shell and the report, made of the lines alone. paper: what the method's paper shows; reading: how to read
    the figure. stem(args): the name of its files in the folder. Whatever takes long to import is imported when it runs.

    A package adds one by an entry point of the group easyedit_nmke.analyses: its name, and its `Analysis`.
    """

    name: str
    summary: str
    example: str
    run: Callable[[argparse.Namespace, Callable[..., Notebook]], None]
    figure: Callable[[Sequence[Mapping]], Any]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    tables: Callable[[Sequence[Mapping]], list[Table]] = lambda lines: []
    said: Callable[[Sequence[Mapping]], list[str]] = lambda lines: []
    paper: str = ""
    reading: str = ""
    stem: Callable[[argparse.Namespace], str] | None = None


@dataclass
class Notebook:
    """The lines of one analysis: `head` (what they depend on) and one for each key, in a file that only grows."""

    file: Path
    head: Mapping[str, Any]
    found: dict[tuple, dict] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, head: Mapping[str, Any]) -> Notebook:
        """The file's lines, of an earlier run of the same command, or none. ValueError when they are of something else."""
        head = json.loads(json.dumps(head))
        earlier = read(file) if file.is_file() else None
        lines = earlier[1:] if earlier else []
        if earlier and (differ := _differences(earlier[0], head)):
            raise ValueError(f"{file} holds results of something else ({'; '.join(differ)}); give another folder, or remove it")
        with whole(file) as temporary:  # without what was torn
            temporary.write_text("".join(map(_text, [head, *lines])), encoding="utf-8")
        return cls(file, head, {tuple(line["key"]): line for line in lines})

    def once(self, *key, make: Callable[[], Mapping[str, Any]]) -> dict:
        """The line of a key: as it was found, or made now and on the disk when this returns."""
        if key not in self.found:
            line = json.loads(json.dumps({"key": list(key), **make()}))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_text(line))
                file.flush()
                os.fsync(file.fileno())
            self.found[key] = line
        return self.found[key]


def read(file: Path) -> list[dict]:
    """The head and the lines of a file; a torn last one is left out. ValueError for a file that is no analysis'."""
    lines = []
    written = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a text may hold other ends of lines
    for number, text in enumerate(written, 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(written):
                raise ValueError(f"line {number} of {file} is no result; remove it and try again") from None
    if not lines or not isinstance(lines[0], dict) or "analysis" not in lines[0] or not all("key" in line for line in lines[1:]):
        raise ValueError(f"{file} holds no analysis; remove it, or give another folder")
    return lines


def _text(line: Mapping) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _differences(one: Mapping, other: Mapping) -> list[str]:
    """What two heads' results depend on and do not share."""
    if one["analysis"] != other["analysis"]:
        return [f"analysis {one['analysis']!r} -> {other['analysis']!r}"]
    pairs = {**one["settings"], **other["settings"]}
    found = [(name, one["settings"].get(name), other["settings"].get(name)) for name in pairs]
    found.append(("model", one.get("model"), other.get("model")))
    return [f"{name} {was!r} -> {now!r}" for name, was, now in found if was != now]
