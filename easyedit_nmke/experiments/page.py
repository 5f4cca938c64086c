"""The report as one HTML file with nothing outside it: figures are embedded, style is inline, there are no scripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from . import figures, report

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1b1f24; background: #fff;
       max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; }
h2 { font-size: 1.15em; margin: 2.4em 0 .3em; border-top: 1px solid #d9dde2; padding-top: 1em; }
p { margin: .3em 0 .7em; max-width: 62em; }
.lead { font-size: 1.12em; }
.dim { color: #59636e; font-size: .9em; }
.notes { border-left: 4px solid #e69f00; background: #fff8e6; padding: .4em .8em; margin: .8em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5em 0; }
th, td { padding: .3em .5em; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
thead th { border-bottom: 2px solid #59636e; vertical-align: bottom; white-space: normal; }
th:first-child, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
tbody th { font-weight: 600; }
tr.unedited > * { color: #59636e; font-weight: 400; font-style: italic; }
td small { display: inline-block; min-width: 3.1em; text-align: left; font-size: .8em; color: #59636e; font-weight: 400; }
td.best { font-weight: 700; background: #cfe8dd; }
td.close { background: #eef7f3; }
#frontier { max-width: 760px; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; margin: .4em 0; }
pre { background: #f5f6f8; padding: .7em; overflow-x: auto; font-size: .85em; }
details { margin: .5em 0; }
summary { cursor: pointer; }
@media print {
  body { margin: 0; max-width: none; font-size: 10px; }
  * { print-color-adjust: exact; }
  figure, table { break-inside: avoid; }
  h2, h2 + p { break-after: avoid; }
  th, td { padding: .2em .3em; }
  pre { white-space: pre-wrap; }
}
"""
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


def write(lines: Sequence[Mapping], notes: Sequence[str], out: Path) -> Path:
    """Write OUT/report.html and its figures as PNG files beside it; returns the page's path. Figures without data are left out."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in _drawn(lines).items():
        target = out / f"{name}.png"
        target.unlink(missing_ok=True)  # one of an earlier report must not stand beside a page without it
        if figure is not None:
            figure.savefig(target, dpi=160)
            pictures[name] = target.read_bytes()
    page = out / "report.html"
    page.write_text(html(lines, notes, pictures), encoding="utf-8")
    return page


def _drawn(lines: Sequence[Mapping]) -> dict:
    data, names, last = report.frame(lines), report.methods(lines), report.shared_checkpoint(lines)
    return {
        "curves": figures.curves(data, names),
        "frontier": figures.frontier(data, names),
        "retention": figures.retention(lines, names, last),
        "drift": figures.drift(lines, names, last),
        "timing": figures.timing(lines, names, last),
    }


def html(lines: Sequence[Mapping], notes: Sequence[str], pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures`: PNG bytes by figure name."""
    last, names = report.shared_checkpoint(lines), report.methods(lines)
    others = [t for t in report.checkpoints(lines) if t != last]
    title = f"{report.count(len(names), 'method')}, {report.count(last, 'edit')}: {_data_name(lines)}"
    first, *rest = report.headline(lines, last)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead"><b>{escape(first)}</b> {escape(" ".join(rest))}</p>',
        _notes([*notes, *report.gaps(lines)]),
        _scores(lines, last),
        _legend(lines, last),
        *(f"<details><summary>After {report.count(t, 'edit')}</summary>{_scores(lines, t)}</details>" for t in others),
        *(_picture(name, *SECTIONS[name], picture) for name, picture in pictures.items()),
        _cost(lines, last),
        _protocol(lines),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(filter(None, sections))
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n'


def _scores(lines: Sequence[Mapping], checkpoint: int) -> str:
    headings, body = report.rows(lines, checkpoint)
    names, rows = report.methods(lines), []
    errors = any(" ± " in text for _, cells in body for text, _ in cells)
    for label, cells in body:
        dot = f'<span class="dot" style="background:{figures.style(names.index(label))["color"]}"></span>' if label in names else ""
        marked = "".join(f"<td{f' class={mark}' if mark else ''}>{_spread(text) if errors else text}</td>" for text, mark in cells)
        rows.append(f"<tr{'' if label in names else ' class=unedited'}><th>{dot}{escape(label)}</th>{marked}</tr>")
    return _table(headings, rows) + f'<p class="dim">{escape(report.caption(lines, checkpoint))}</p>'


def _spread(text: str) -> str:
    """A mean with its standard error in small print, for which room is kept where there is none, so that means line up."""
    mean, plus_minus, error = text.partition(" ± ")
    return f"{mean} <small>{plus_minus.strip()} {error}</small>"


def _table(headings: Iterable[str], rows: Iterable[str]) -> str:
    top = "".join(
        f"<th>{escape(heading).replace(' ↑', '&nbsp;↑')}</th>" for heading in headings
    )  # an arrow alone in a line is lost
    return f'<div class="scroll"><table><thead><tr><th></th>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _legend(lines: Sequence[Mapping], checkpoint: int) -> str:
    """How to read the table of scores."""
    headings, _ = report.rows(lines, checkpoint)
    said = [f"{name}: {what}" for name, arrow, what in report.COLUMNS.values() if f"{name} {arrow}" in headings]
    key = "<b>Bold</b>: the best method. Lightly shaded: its distance to the best is within the standard error of that distance. "
    compared = len(report.methods(lines)) > 1
    return f'<p class="dim">{key if compared else ""}{escape(". ".join(said))}.</p>'


def _notes(notes: Sequence[str]) -> str:
    return f'<div class="notes">{"<br>".join(map(escape, notes))}</div>' if notes else ""


def _picture(name: str, heading: str, text: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    image = f'<img id="{name}" alt="{heading}" src="data:image/png;base64,{data}">'
    return f"<h2>{heading}</h2><p>{text}</p><figure>{image}</figure>"


def _cost(lines: Sequence[Mapping], checkpoint: int) -> str:
    """Memory and masks as a table."""
    found = report.costs(lines, checkpoint)
    if found.empty:
        return ""
    rows = []
    for label, row in found.iterrows():
        cells = ["-" if value != value else f"{value:.0f}" if "MB" in name else f"{value:.2f}" for name, value in row.items()]
        rows.append(f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    text = (
        f"After {report.count(checkpoint, 'edit')}, means over seeds. Density: the share of neurons that an edit may change. "
        "Overlap: of the neurons that either of two consecutive edits may change, the share that both may (Jaccard)."
    )
    return f"<h2>Memory and masks</h2><p>{text}</p>{_table(found, rows)}"


def _protocol(lines: Sequence[Mapping]) -> str:
    """What the results depend on, and the commands that make them again."""
    facts: dict[str, list[str]] = {"methods": report.methods(lines), "seeds": _distinct(line["seed"] for line in lines)}
    protocols = [line["protocol"] for line in lines if line.get("protocol")]
    for name in ("protocol", "data", "model", "device", "batch_size", "versions"):
        values = [protocol[name] for protocol in protocols if protocol.get(name) is not None]
        if any(isinstance(value, Mapping) for value in values):
            for key in dict.fromkeys(key for value in values for key in value):
                facts[f"{name}: {key}"] = _distinct(value.get(key) for value in values)
        elif values:
            facts[name] = _distinct(values)
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(', '.join(values))}</td></tr>" for name, values in facts.items())
    commands = _distinct(protocol.get("command") for protocol in protocols)
    again = f"<p>To make these results again:</p><pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    return f'<h2>Protocol</h2>{again}<table class="words"><tbody>{rows}</tbody></table>{_hparams(lines)}'


def _hparams(lines: Sequence[Mapping]) -> str:
    settings = {line["method"]: (line.get("protocol") or {}).get("hparams") for line in lines if line["method"] != figures.UNEDITED}
    blocks = {name: json.dumps(values, indent=1, ensure_ascii=False) for name, values in settings.items() if values}
    return "".join(
        f"<details><summary>Hyperparameters of {escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in blocks.items()
    )


def _distinct(values: Iterable) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _data_name(lines: Sequence[Mapping]) -> str:
    names = _distinct(((line.get("protocol") or {}).get("data") or {}).get("name") for line in lines)
    return ", ".join(names) or "unnamed data"
