"""`nmke report`, and the table that `nmke compare` ends with."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..scores.table import in_report, task_scores
from .verb import Verb, task_table


def _arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", type=Path, metavar="DIR", help="where `nmke compare` or `nmke analyze` wrote results")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.html and its figures go (default DIR/report)")
    report.add_argument("--markdown", action="store_true", help="only print the table, as Markdown")


def _report(args, console: Console) -> int:
    from ..experiments import board, report
    from ..experiments.analyses import in_folder
    from ..experiments.page import write

    found, here = in_folder(args.folder), (args.folder / "results.jsonl").is_file()
    models = [] if found or here else sorted(file.parent for file in args.folder.glob("*/results.jsonl"))
    for folder in models or [args.folder]:
        alone = found and not args.markdown and not here
        lines, notes = ([], []) if alone else report.read(folder)
        if args.markdown:
            last = report.shared_checkpoint(lines)
            said = f"{report.markdown(lines, last)}\n\n{board.markdown(lines, last)}".rstrip()
            print(f"**{folder.name}**\n\n{said}\n" if models else said)
            continue
        if lines:
            comparison(lines, notes, console)
        out = args.out / folder.name if args.out and models else args.out or folder / "report"
        console.print(f"Report: {write(lines, notes, out, found)}", highlight=False, markup=False, soft_wrap=True)
    return 0


def comparison(lines: list[dict], notes: list[str], console: Console) -> None:
    """The tables of the last checkpoint that all methods have reached, and what they say in words."""
    from ..experiments import board, report

    last = report.shared_checkpoint(lines)
    headings, body = report.rows(lines, last)
    title, left_out = f"Scores after {report.count(last, 'edit')}", []
    title += f" of {name}" if (name := report.model_name(lines)) else ""
    optional = [f"{row.column} {row.arrow}" for name, row in in_report().items() if row.optional and name != "seconds"]
    optional = [heading for heading in optional if heading in headings]
    anywhere = console.options.update(max_width=10_000)  # a measure is cut to the width that there is
    while optional and Measurement.get(console, anywhere, _table(title, headings, body)).minimum > console.width:
        place = headings.index(optional.pop())
        left_out.append(headings[place].rsplit(" ", 1)[0])
        headings = headings[:place] + headings[place + 1 :]
        body = [(label, cells[:place] + cells[place + 1 :]) for label, cells in body]
    console.print(_table(title, headings, body))
    spent, rows = board.costs(lines, last)
    if spent:
        console.print(_table("Costs", spent, rows))
    if asked := task_scores(lines, last):
        console.print(task_table(asked))
    said = [report.caption(lines, last), *report.headline(lines, last), *notes, *report.gaps(lines), *report.failures(lines)]
    if left_out:
        said.append(f"Left out of this table, which would be too wide: {', '.join(left_out)}.")
    for sentence in said:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, headings: list[str], body: list) -> Table:
    """`report.rows` for the terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0)
    words = [len(word) for label, _ in body for word in label.split()]
    table.add_column("Method", overflow="fold", min_width=min(max(words), 12))
    for heading in headings:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    styles = {"best": "bold green", "close": "green", "": ""}
    for label, cells in body:
        table.add_row(Text(label), *(Text(text.replace(" ± ", "\n±"), styles[mark]) for text, mark in cells))
    return table


VERB = Verb(
    "report",
    "tables and figures of a comparison and of analyses in a folder, as one HTML page",
    "nmke report results",
    _report,
    _arguments,
    needs_arguments=True,
)
