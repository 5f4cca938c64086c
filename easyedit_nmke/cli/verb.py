"""A verb of the shell, and what verbs share: kinds of arguments, silence, tables of scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..experiments.analyses.source import positive
from ..scores.table import table as metrics


@dataclass(frozen=True)
class Verb:
    """`nmke NAME`. summary: a line of help; example: a whole command line.

    run(args, console) does the work and returns the exit code; a ValueError, FloatingPointError, OSError, ImportError or
    RuntimeError becomes one sentence on stderr and exit code 1. `args` holds what `add_arguments` asks for, and `verb`, `command`
    (the whole command line) and `verbose`. Whatever takes long to import (torch, transformers, experiments) is imported in `run`.
    needs_arguments: `nmke VERB` alone prints its help. goes_on: interrupted, the same command goes on from there.

    A package adds one by an entry point of the group easyedit_nmke.verbs: the verb's name, and its `Verb`.
    """

    name: str
    summary: str
    example: str
    run: Callable[[argparse.Namespace, Console], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    needs_arguments: bool = False
    goes_on: bool = False


def numbers(text: str) -> tuple[int, ...]:
    """Different ones of 1 or more, ascending: 1,100,400."""
    return tuple(sorted({positive(part.strip()) for part in text.split(",")}))


def check_file(out: Path | None) -> None:
    """ValueError for an --out that is a folder; before anything is done."""
    if out and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")


def quiet_libraries(args: argparse.Namespace) -> None:
    """No warnings and progress bars of transformers, unless the verb is verbose; before a model is loaded."""
    if not args.verbose:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def print_scores(headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """A table of scores, a row's name first; turned, a score a row, where that many columns would lose digits. Where even those
    would, it is wider than the console."""
    table = _table(headings, rows)
    if _least(table, console) > console.width:
        first, *names = zip(headings, *rows, strict=True)
        table = _table(first, names)
    width, console.width = console.width, max(console.width, _least(table, console))
    console.print(table)
    console.width = width


def _least(table: Table, console: Console) -> int:
    anywhere = console.options.update(max_width=10_000)  # a measure is cut to the width that there is
    return Measurement.get(console, anywhere, table).minimum


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title="Scores after all edits", title_justify="left", padding=(0, 1, 0, 0))
    for place, column in enumerate(zip(headings, *rows, strict=True)):
        longest = max(len(word) for text in column for word in text.split())
        table.add_column(column[0], justify="right" if place else "left", width=longest if place else None)
    for row in rows:
        table.add_row(*row)
    return table


def cells(headings: Mapping[str, str], scores: Mapping[str, float | None]) -> list[str]:
    """The scores under the headings."""
    digits = {name: row.digits for name, row in metrics().items()}
    return ["-" if scores.get(name) is None else f"{scores[name]:.{digits[name]}f}" for name in headings]


def task_table(rows: Sequence[tuple[str, str, Sequence[float | None]]]) -> Table:
    """`scores.table.task_scores` as a table."""
    table = Table(title="Questions from files", title_justify="left")
    for name in ("Task", "Method"):
        table.add_column(name)
    for name in ("Right", "Right by length", "As unedited"):
        table.add_column(name, justify="right")
    for task, method, values in rows:
        table.add_row(Text(task), Text(method), *("-" if value is None else f"{value:.3f}" for value in values))
    return table
