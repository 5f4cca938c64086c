"""`nmke analyze`: the paper's analyses on the model in hand."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from textwrap import fill

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..experiments.analyses import analyses, conduct
from .verb import Verb, quiet_libraries


def _arguments(analyze: argparse.ArgumentParser) -> None:
    known = analyses()
    analyze.epilog = "for example:\n" + "\n".join(f"  {each.example}" for each in known.values())
    parsers = analyze.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, each in known.items():
        sub = parsers.add_parser(
            name, help=each.summary, description=each.summary, epilog=f"for example:\n  {each.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        each.arguments(sub)
        sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="where results and figures go (made if missing)")


def _analyze(args, console: Console) -> int:
    quiet_libraries(args)
    analysis = analyses()[args.what]
    lines, files = conduct(analysis, args)
    for table in analysis.tables(lines):
        console.print(table.title, highlight=False, markup=False, soft_wrap=True)
        shown = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        narrow = [_narrow if numeric else str for numeric in table.numeric]
        rows = [[fit(cell) for fit, cell in zip(narrow, row, strict=True)] for row in table.rows]
        for i, (heading, numeric) in enumerate(zip(table.headings, table.numeric, strict=True)):
            if numeric:
                parts = [*re.split("[ -]", heading), *(line for row in rows for line in row[i].split("\n"))]
                heading = fill(heading, max(map(len, parts)))
            shown.add_column(heading, overflow="fold", justify="right" if numeric else "left")
        for row in rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    for sentence in [*analysis.said(lines), f"Results: {', '.join(map(str, files))}"]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return 0


def _narrow(cell: str) -> str:
    """A number's spread, or its control, under it."""
    return cell.replace(" ± ", "\n±").replace(" (", "\n(")


VERB = Verb(
    "analyze",
    "the method's paper explains itself by these analyses; here of the model in hand, before or after edits",
    "nmke analyze trace --model smollm2 --out results",
    _analyze,
    _arguments,
    needs_arguments=True,
    goes_on=True,
)
