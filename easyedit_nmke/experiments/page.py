"""The report as one HTML file with nothing outside it: figures are embedded, style is inline, there are no scripts. Its text and
look are report.html.j2; here are the numbers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..messages import how_to_install
from ..scores.table import in_report, task_scores
from . import board, figures, report
from .analyses import Analysis, draw, read

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ModuleNotFoundError as missing:
    raise ImportError(f"the report needs {missing.name}: {how_to_install('figures')} brings it") from None

SECTIONS = {
    "curves": (
        "Scores as edits accumulate",
        "At every checkpoint all edits made so far are scored. Lines are means over seeds, bands one standard error.",
    ),
    "frontier": (
        "What an edit costs elsewhere",
        "Rel against Loc: up and to the right is better. Points grow with the number of edits; the last of each method is named.",
    ),
    "retention": (
        "Are old edits forgotten?",
        "The edits in order of age, in tenths, all scored after the last one. A line that rises to the right: old edits are lost.",
    ),
    "drift": (
        "How far the weights have moved",
        "The edited weights against those before the first edit. Top: Frobenius norm of the change, relative to the weights'. "
        "Middle: norm of the weights, relative to before. Bottom: neurons by the change of their value vector v, relative to its "
        "length.",
    ),
    "timing": ("What an edit takes", "Seconds per edit by phase, mean over all edits and seeds."),
}


def write(lines: Sequence[Mapping], notes: Sequence[str], out: Path, found: Sequence[tuple[Analysis, Path]] = ()) -> Path:
    """Write OUT/report.html and its figures as PNG files beside it; returns the page's path. Figures without data are left out.
    found: analyses with the files of their lines (`analyses.in_folder`), a section each; the page may be of these alone."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in _drawn(lines).items() if lines else ():
        target = out / f"{name}.png"
        target.unlink(missing_ok=True)  # one of an earlier report must not stand beside a page without it
        if figure is not None:
            figure.savefig(target, dpi=160)
            pictures[name] = target.read_bytes()
    page = out / "report.html"
    page.write_text(html(lines, notes, pictures, [_section(*pair) for pair in found]), encoding="utf-8")
    return page


def _section(analysis: Analysis, file: Path) -> dict:
    """An analysis' part of the page; its figure, in the folder of its lines, is drawn anew where it is older than they are."""
    lines, picture = read(file), file.with_suffix(".png")
    if not picture.is_file() or picture.stat().st_mtime_ns < file.stat().st_mtime_ns:
        draw(analysis, file)
    return {
        "name": file.stem, "heading": f"{file.stem.capitalize()}: {analysis.summary}", "paper": analysis.paper,
        "reading": analysis.reading, "said": analysis.said(lines), "tables": analysis.tables(lines),
        "command": lines[0].get("command"),
        "data": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
    }  # fmt: skip


def _drawn(lines: Sequence[Mapping]) -> dict:
    data, names, last = report.frame(lines), report.methods(lines), report.shared_checkpoint(lines)
    return {
        "curves": figures.curves(data, names),
        "frontier": figures.frontier(data, names),
        "retention": figures.retention(lines, names, last),
        "drift": figures.drift(lines, names, last),
        "timing": figures.timing(lines, names, last),
    }


def html(lines: Sequence[Mapping], notes: Sequence[str], pictures: Mapping[str, bytes], sections: Sequence[Mapping] = ()) -> str:
    """The page. `pictures`: PNG bytes by figure name; sections: of analyses."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.j2")
    if not lines:
        return template.render(title="Analyses", sections=sections, table=None)
    last, names = report.shared_checkpoint(lines), report.methods(lines)
    protocols = [line["protocol"] for line in lines if line.get("protocol")]
    return template.render(
        title=f"{_on(lines)}{report.count(len(names), 'method')}, {report.count(last, 'edit')}: {_data_name(protocols)}",
        headline=report.headline(lines, last),
        notes=[*notes, *report.gaps(lines), *report.failures(lines)],
        methods=names,
        colours={name: figures.style(i)["color"] for i, name in enumerate(names)},
        leaders=board.leaders(lines) if len(names) > 1 else None,
        balances=list(report.BALANCES),
        sides=board.side_by_side(lines, last),
        costs=board.costs(lines, last),
        sections=sections,
        table=_scores(lines, last),
        legend=_legend(lines, last),
        questions=_questions(lines, last),
        others=[_scores(lines, t) for t in report.checkpoints(lines) if t != last],
        pictures=[_picture(name, picture) for name, picture in pictures.items()],
        masks=_masks(lines, last),
        commands=_distinct(protocol.get("command") for protocol in protocols),
        facts=_facts(lines, protocols),
        hparams=_hparams(lines),
    )


def _scores(lines: Sequence[Mapping], checkpoint: int) -> dict:
    """The table of scores at a checkpoint, cell by cell."""
    headings, body = report.rows(lines, checkpoint)
    names, rows = report.methods(lines), []
    for label, cells in body:
        colour = figures.style(names.index(label))["color"] if label in names else None
        split = [(*text.partition(" ± ")[::2], mark) for text, mark in cells]
        rows.append(
            {"label": label, "colour": colour, "cells": [dict(zip(("mean", "error", "mark"), c, strict=True)) for c in split]}
        )
    return {
        "after": report.count(checkpoint, "edit"),
        "headings": [heading.rsplit(" ", 1) for heading in headings],
        "rows": rows,
        "errors": any(cell["error"] for row in rows for cell in row["cells"]),
        "caption": report.caption(lines, checkpoint),
    }


def _legend(lines: Sequence[Mapping], checkpoint: int) -> str:
    """What the columns of the table are."""
    headings, _ = report.rows(lines, checkpoint)
    shown = (row for row in in_report().values() if f"{row.column} {row.arrow}" in headings)
    return ". ".join(f"{row.column}: {row.what}" for row in shown if row.what)


def _questions(lines: Sequence[Mapping], checkpoint: int) -> list[tuple[str, str, list[str]]]:
    """Questions from files, as `task_scores`, in text."""
    rows = task_scores(lines, checkpoint)
    return [(task, method, ["-" if value is None else f"{value:.3f}" for value in values]) for task, method, values in rows]


def _picture(name: str, picture: bytes) -> dict:
    heading, text = SECTIONS[name]
    return {"name": name, "heading": heading, "text": text, "data": base64.b64encode(picture).decode()}


def _masks(lines: Sequence[Mapping], checkpoint: int) -> dict | None:
    """Memory and masks as a table."""
    found = report.memory_and_masks(lines, checkpoint)
    if found.empty:
        return None
    rows = []
    for label, row in found.iterrows():
        cells = ["-" if value != value else f"{value:.0f}" if "MB" in name else f"{value:.2f}" for name, value in row.items()]
        rows.append((label, cells))
    return {"headings": list(found), "rows": rows}


def _facts(lines: Sequence[Mapping], protocols: Sequence[Mapping]) -> list[tuple[str, list[str]]]:
    """What the results depend on, every value that occurs."""
    facts: dict[str, list[str]] = {"methods": report.methods(lines), "seeds": _distinct(line["seed"] for line in lines)}
    for name in ("protocol", "data", "model", "device", "batch_size", "scored_with", "versions"):
        values = [protocol[name] for protocol in protocols if protocol.get(name) is not None]
        if any(isinstance(value, Mapping) for value in values):
            for key in dict.fromkeys(key for value in values for key in value):
                facts[f"{name}: {key}"] = _distinct(value.get(key) for value in values)
        elif values:
            facts[name] = _distinct(values)
    return list(facts.items())


def _hparams(lines: Sequence[Mapping]) -> list[tuple[str, str]]:
    settings = {line["method"]: report.stamp(line).get("hparams") for line in lines if line["method"] != figures.UNEDITED}
    return [(name, json.dumps(values, indent=1, ensure_ascii=False)) for name, values in settings.items() if values]


def _on(lines: Sequence[Mapping]) -> str:
    return f"{name}: " if (name := report.model_name(lines)) else ""


def _distinct(values: Iterable) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _data_name(protocols: Sequence[Mapping]) -> str:
    names = _distinct((protocol.get("data") or {}).get("name") for protocol in protocols)
    return ", ".join(names) or "unnamed data"
