"""A report's first tables: who leads after how many edits, batch sizes side by side, and what each method costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from ..methods import methods as editing_methods
from ..scores.table import table as metrics
from . import report

# Of the table that sets batch sizes side by side: its groups, and the scores of each with their headings.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "Free generation": {"rel_exact": "Rel", "gen_exact": "Gen"},
    "Teacher forcing": {"rel": "Rel", "gen": "Gen"},
    "As before": {"loc": "Loc"},
    "Cost": {"seconds": "s/edit"},
}
IMPOSSIBLE, UNKNOWN = "×", "?"


class Cell(NamedTuple):
    """mark: as `report.rows` marks."""

    text: str
    mark: str = ""


def batch_sizes(lines: Sequence[Mapping]) -> dict[str, int]:
    """Method -> how many edits shared one update; what tells none had 1."""
    return {name: report.batch_size(lines, name) for name in report.methods(lines)}


def without_size(label: str) -> str:
    """ "AlphaEdit@100" -> "AlphaEdit"."""
    return re.sub(r"\s*@\s*\d+\s*(?=\[|$)", "", label)


def leaders(lines: Sequence[Mapping]) -> tuple[list[tuple[str, int]], list[tuple[int, list[list[tuple[str, str]]]]]]:
    """([(protocol, batch size), ...], [(edits, a cell for each), ...]). A cell: the methods in order that share the highest
    harmonic mean within its standard error, or the first and the next, each with the mean as text; empty where nothing is
    ranked."""
    sizes, data = batch_sizes(lines), report.frame(lines)
    columns = [(protocol, size) for protocol in report.BALANCES for size in sorted(set(sizes.values()))]
    rows = []
    for edits in report.checkpoints(lines):
        cells = []
        for protocol, size in columns:
            some = data[data.method.map(sizes.get) == size]
            _, ranked = report.ranking(some, edits, protocol)
            shown = [*ranked.index[:1], *(report.near(ranked) or ranked.index[1:2])]
            cells.append([(name, f"{ranked['mean'][name]:.2f}") for name in shown])
        rows.append((edits, cells))
    found = [i for i in range(len(columns)) if any(cells[i] for _, cells in rows)]
    return [columns[i] for i in found], [(edits, [cells[i] for i in found]) for edits, cells in rows]


def side_by_side(lines: Sequence[Mapping], checkpoint: int) -> dict | None:
    """Batch sizes beside each other at a checkpoint: {"sizes", "groups": {group: headings}, "rows": [(method, [Cell, ...])],
    "impossible": methods that know no single edits}; a row's cells are by group, by score, by size. None for one size."""
    sizes, found = batch_sizes(lines), report.table(lines, checkpoint)
    shown = sorted(set(sizes.values()))
    if len(shown) < 2:
        return None
    groups = {
        group: {name: said for name, said in some.items() if found[name, "mean"].notna().any()} for group, some in GROUPS.items()
    }
    known = {name: metrics()[name] for some in groups.values() for name in some}
    marks = {name: report.marks(found[name], name, row) for name, row in known.items()}
    labels: dict[str, dict[int, str]] = {}
    for label, size in sizes.items():
        base = without_size(label)
        labels.setdefault(label if size in labels.get(base, {}) else base, {})[size] = label
    single = {label: _knows_single_edits(lines, label) for label in sizes}
    rows, impossible = [], []
    for base, of_size in labels.items():
        barred = 1 not in of_size and not any(single[label] for label in of_size.values())
        impossible += [base] if barred else []
        cells = []
        for name, row in known.items():
            for size in shown:
                label = of_size.get(size)
                if label not in found.index:
                    cells.append(Cell(IMPOSSIBLE if barred and size == 1 else ""))
                else:
                    cells.append(Cell(report.cell(name, *found.loc[label, name], row.digits), marks[name].get(label, "")))
        rows.append((base, cells))
    headings = {group: list(some.values()) for group, some in groups.items() if some}
    return {"sizes": shown, "groups": headings, "rows": rows, "impossible": impossible}


def _knows_single_edits(lines: Sequence[Mapping], label: str) -> bool:
    name = next((report.stamp(line).get("method") for line in lines if line["method"] == label), None)
    method = editing_methods().get(name)
    return method is None or method.hparams.single_edits


# ---- costs


def costs(lines: Sequence[Mapping], checkpoint: int) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """(headings, [(method, cells), ...]) at a checkpoint, means over seeds; the lowest of a column is its best. Columns without a
    value are left out."""
    now = [line for line in lines if line["checkpoint"] == checkpoint and checkpoint]
    names = [name for name in report.methods(lines) if any(line["method"] == name for line in now)]
    columns: dict[str, tuple[Callable[[Mapping], float | None], Callable[[float], str]]] = {
        "Batch": (lambda line: report.stamp(line).get("batch_size"), "{:.0f}".format),
        "Start-up": (_startup, _time),
        "An edit": (lambda line: _total(line, 1 / checkpoint), _time),
        f"{report.count(checkpoint, 'edit')}": (_total, _time),
        "Peak memory": (lambda line: (line.get("peak_memory_mb") or {}).get("edit"), _size),
        "Kept an edit": (lambda line: _scaled(line.get("kept_bytes"), 1e-6 / checkpoint), _size),
    }
    told = {}
    for heading, (read, said) in columns.items():
        values = {name: [read(line) for line in now if line["method"] == name] for name in names}
        if any(value is not None for some in values.values() for value in some):
            told[heading] = _column(values, said, heading != "Batch", UNKNOWN if heading == "Start-up" else "-")
    return list(told), [(name, [column[name] for column in told.values()]) for name in names]


def markdown(lines: Sequence[Mapping], checkpoint: int) -> str:
    """`costs` as Markdown; nothing where none are known."""
    spent, rows = costs(lines, checkpoint)
    return report.written(spent, rows) if spent else ""


def _column(
    values: Mapping[str, Sequence[float | None]], said: Callable[[float], str], ranked: bool, unknown: str
) -> dict[str, Cell]:
    means = {name: fmean(some) for name, some in values.items() if some and None not in some}
    differ = ranked and len({said(mean) for mean in means.values()}) > 1
    best = said(min(means.values())) if differ else None
    texts = {name: said(means[name]) if name in means else unknown for name in values}
    return {name: Cell(text, "best" if text == best else "") for name, text in texts.items()}


def _startup(line: Mapping) -> float | None:
    """None where a part of it is not known."""
    parts = (line.get("startup_seconds") or {"": None}).values()
    return None if None in parts else sum(parts)


def _total(line: Mapping, factor: float = 1.0) -> float | None:
    return _scaled((line.get("seconds") or {}).get("total"), factor)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def _size(megabytes: float) -> str:
    if megabytes >= 1000:
        return f"{megabytes / 1000:.1f} GB"
    return f"{megabytes:.0f} MB" if megabytes >= 10 else f"{megabytes:.2g} MB" if megabytes >= 0.1 else f"{1000 * megabytes:.0f} kB"
