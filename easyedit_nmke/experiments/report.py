"""What `nmke compare` wrote to results.jsonl: means and standard errors over seeds, as tables and in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from ..hparams import is_int, is_number
from ..messages import how_to_install
from ..models.requests import called
from ..scores import table as scores
from .protocol import failed_edits

try:
    import pandas as pd

    from .figures import UNEDITED
except ModuleNotFoundError as missing:
    raise ImportError(f"the report needs {missing.name}: {how_to_install('figures')} brings it") from None


def read(directory: Path) -> tuple[list[dict], list[str]]:
    """(lines, notes) of DIR/results.jsonl: one line per (method, seed, checkpoint), the last where there are several.

    A last line that is cut short is left out, with a note. ValueError for any other line that cannot be read or holds what is no
    result (see `_wrong`), and where no edited model has a result.
    """
    path, found, notes = Path(directory) / "results.jsonl", {}, []
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder that `nmke compare` wrote its results to")
    written = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, text in enumerate(written, 1):
        try:
            line = json.loads(text)
            problem = _wrong(line)
        except (ValueError, RecursionError) as error:
            if number == len(written) and isinstance(error, ValueError):
                notes.append(
                    f"The last line of {path.name} is cut short and was left out: that run is still going, or was stopped."
                )
                continue
            problem = "it is nested too deep" if isinstance(error, RecursionError) else f"it is not JSON: {error}"
        if problem:
            raise ValueError(f"line {number} of {path} is no result ({problem}); remove it and try again")
        found[line["method"], line["seed"], line["checkpoint"]] = line
    if all(method == UNEDITED for method, *_ in found):
        raise ValueError(f"{path} has no result of an edited model yet")
    return list(found.values()), notes


def _wrong(line) -> str:
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
    return isinstance(value, dict) and isinstance(value.get("data") or {}, dict)


_NEEDED = ("method", "seed", "checkpoint", "scores")
_SHAPES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("method", lambda value: isinstance(value, str), "a text"),
    ("seed", is_int, "a whole number"),
    ("checkpoint", lambda value: is_int(value) and 0 <= value < 2**63, "a whole number of edits"),
    ("scores", _named(_number), "numbers by name"),
    ("seconds", _named(_number), "numbers by name"),
    ("peak_memory_mb", _named(_number), "numbers by name"),
    ("mask", _named(lambda value: value is None or _named(_number)(value)), "numbers by layer, by name"),
    ("retention", _named(lambda value: value is None or _list(_number)(value)), "lists of numbers by name"),
    ("drift", _named(_layer), "numbers and a histogram by layer"),
    ("protocol", _protocol, "an object"),
    ("failed", lambda value: is_int(value) or _list(is_int)(value), "a list of edits"),
)


def methods(lines: Iterable[Mapping]) -> list[str]:
    """The edited methods, in the order in which they first appear."""
    return [name for name in dict.fromkeys(line["method"] for line in lines) if name != UNEDITED]


def checkpoints(lines: Iterable[Mapping]) -> list[int]:
    """Numbers of edits after which any method was scored, ascending."""
    return sorted({line["checkpoint"] for line in lines if line["method"] != UNEDITED})


def shared_checkpoint(lines: Sequence[Mapping]) -> int:
    """The largest checkpoint that all methods have; where there is none, the largest of those that most methods have."""
    reached = {(line["method"], line["checkpoint"]) for line in lines}
    return max(checkpoints(lines), key=lambda t: (sum((name, t) in reached for name in methods(lines)), t))


def frame(lines: Iterable[Mapping]) -> pd.DataFrame:
    """A row per line: method, seed, checkpoint, every known score (NaN for null), and `seconds` per edit."""
    rows, names = [], scores.table()
    for line in lines:
        known = {name: line["scores"].get(name) for name in names}
        known |= {name: score for name, score in line["scores"].items() if name.startswith(("harness.", "tasks."))}
        total, edits = (line.get("seconds") or {}).get("total"), line["checkpoint"]
        rows.append({"method": line["method"], "seed": line["seed"], "checkpoint": edits, **known})
        rows[-1]["seconds"] = total / edits if total is not None and edits else None
    data = pd.DataFrame(rows)
    return data.astype({name: float for name in data.columns[3:]})


def table(lines: Sequence[Mapping], checkpoint: int) -> pd.DataFrame:
    """Mean and standard error over seeds at a checkpoint (standard error NaN for one seed).

    Rows: the unedited model where there is one, then methods in their order. Columns: (score, "mean" or "sem"), ("seed", "count").
    """
    data = frame(lines)
    data = data[(data.checkpoint == checkpoint) | (data.method == UNEDITED)]
    found = data.groupby("method")[list(scores.in_report())].agg(["mean", "sem"])
    found["seed", "count"] = data.groupby("method").size()
    return found.reindex([name for name in (UNEDITED, *methods(lines)) if name in found.index])


def rows(lines: Sequence[Mapping], checkpoint: int) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """(headings, [(method, [(text, mark), ...]), ...]) of `table`, for every printed form of it, without scores that nothing has.

    mark: "best" (as printed, so ties share it), "close" (the distance to the best is within its own standard error) or "".
    """
    found = table(lines, checkpoint)
    columns = {name: column for name, column in scores.in_report().items() if found[name, "mean"].notna().any()}
    marks = {name: _marks(found[name], name, column.better) for name, column in columns.items()}
    body = []
    for label in found.index:
        cells = [(_cell(name, *found.loc[label, name]), marks[name].get(label, "")) for name in columns]
        body.append((label, cells))
    return [f"{column.column} {column.arrow}" for column in columns.values()], body


def _marks(score: pd.DataFrame, name: str, better: str) -> dict[str, str]:
    found = score.drop(index=UNEDITED, errors="ignore").dropna(subset="mean")
    if len(found) < 2:
        return {}
    best = found.loc[found["mean"].idxmin() if better == "lower" else found["mean"].idxmax()]
    close = (found["mean"] - best["mean"]).abs() <= (found["sem"] ** 2 + best["sem"] ** 2) ** 0.5
    marks = {label: "close" for label in found.index[close]}
    return marks | {
        label: "best" for label, mean in found["mean"].items() if _cell(name, mean, nan) == _cell(name, best["mean"], nan)
    }


def _cell(name: str, mean: float, error: float) -> str:
    if isnan(mean):
        return "-"
    digits = 3 if name == "seconds" and mean < 0.1 else scores.table()[name].digits if name else 2
    return f"{mean:.{digits}f}" + ("" if isnan(error) else f" ± {error:.{digits}f}")


def caption(lines: Sequence[Mapping], checkpoint: int) -> str:
    """What the numbers of a table are means of."""
    counts = table(lines, checkpoint)["seed", "count"].drop(index=UNEDITED, errors="ignore")
    few, many = int(counts.min()), int(counts.max())
    over = f"mean ± standard error over {many} seeds" if many > 1 else "one seed, so no standard errors"
    fewer = f" ({', '.join(f'{name}: {n}' for name, n in counts.items() if n < many)})" if few < many else ""
    return f"T = {count(checkpoint, 'edit')}, all scored after the last; {over}{fewer}."


def markdown(lines: Sequence[Mapping], checkpoint: int) -> str:
    """`table` as Markdown: the best in bold, what is within one standard error of it in italics."""
    headings, body = rows(lines, checkpoint)
    marked = {"best": "**{}**", "close": "*{}*", "": "{}"}
    written = [["", *headings], ["---"] + ["---:"] * len(headings)]
    written += [[label.replace("|", "\\|"), *(marked[mark].format(text) for text, mark in cells)] for label, cells in body]
    return "\n".join(f"| {' | '.join(row)} |" for row in written) + "\n\n" + caption(lines, checkpoint)


def costs(lines: Sequence[Mapping], checkpoint: int) -> pd.DataFrame:
    """Peak memory in MB, and density and overlap of the masks by layer, at a checkpoint: means over seeds, a row per method."""
    found = []
    for line in lines:
        if line["checkpoint"] == checkpoint and line["method"] != UNEDITED:
            row = {f"peak MB, {phase}": value for phase, value in (line.get("peak_memory_mb") or {}).items()}
            for kind in ("density", "overlap"):
                values = ((line.get("mask") or {}).get(kind) or {}).items()
                row |= {f"mask {kind}, layer {layer}": value for layer, value in values}
            found.append({"method": line["method"], **row})
    data = pd.DataFrame(found).set_index("method").astype(float).dropna(axis=1, how="all")
    return data.groupby(level=0, sort=False).mean()


def gaps(lines: Sequence[Mapping]) -> list[str]:
    """A sentence for every method that lacks some of the seeds and checkpoints that are in the file."""
    reached = {(line["method"], line["seed"], line["checkpoint"]) for line in lines}
    wanted, notes = checkpoints(lines), []
    for name in methods(lines):
        said = []
        for seed in sorted({line["seed"] for line in lines}):
            missing = [t for t in wanted if (name, seed, t) not in reached]
            if missing:
                said.append(f"seed {seed}" if missing == wanted else f"seed {seed} at T = {', '.join(map(str, missing))}")
        if said:
            notes.append(f"{name} is incomplete: nothing of {'; '.join(said)}.")
    return notes


def failures(lines: Sequence[Mapping]) -> list[str]:
    """A sentence for every method and seed some of whose edits could not be written, or were skipped, with their numbers."""
    last = {(line["method"], line["seed"]): line for line in sorted(lines, key=lambda line: line["checkpoint"])}
    notes = []
    for (method, seed), line in last.items():
        skipped = line.get("skipped") or []
        for lost, numbers, what in (
            (failed_edits(line), line.get("failed"), "could not be written"),
            (len(skipped), skipped, "skipped by the method, whose values were too long"),
        ):
            if lost:
                numbers = numbers if isinstance(numbers, list) else []
                shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
                notes.append(f"{method}, seed {seed}: {count(lost, 'edit')} {what}{f' ({shown})' if shown else ''}.")
    return notes


def headline(lines: Sequence[Mapping], checkpoint: int) -> list[str]:
    """What came out at a checkpoint, in a few sentences made of the numbers alone.

    Methods are ranked by the harmonic mean of Rel, Gen and Loc (of those that all methods have), taken per seed.
    """
    data = frame(lines)
    now = data[(data.checkpoint == checkpoint) & (data.method != UNEDITED)]
    parts = [name for name in ("rel", "gen", "loc") if now.groupby("method")[name].count().all()]
    balance = len(parts) / (1 / now[parts]).sum(axis=1, skipna=False)
    ranked = balance.groupby(now.method).agg(["mean", "sem", "count"]).sort_values("mean", ascending=False).dropna(subset="mean")
    if "rel" not in parts or ranked.empty:
        return [f"After {count(checkpoint, 'edit')} not every method has a Rel, so nothing is ranked."]
    lead = ranked.index[0]
    sentences = {name: row.said for name, row in scores.table().items() if row.said}
    its = now[now.method == lead][list(sentences)].mean()
    said = [sentence.format(its[name]) for name, sentence in sentences.items() if pd.notna(its[name])]
    text = [_ranking(ranked, _listed([scores.OWN[name].title for name in parts]), checkpoint), f"{lead} {_listed(said)}."]
    unedited = data[data.method == UNEDITED].general.mean()
    general = now[now.method == lead].general.mean()
    if pd.notna(unedited) and pd.notna(general):
        text.append(f"The unedited model's general score is {unedited:.2f}, that of {lead} {general:.2f}.")
    return text


def _ranking(ranked: pd.DataFrame, parts: str, checkpoint: int) -> str:
    """First and second, whether their distance exceeds its standard error, and where there is none."""
    said = {name: _cell("", row["mean"], row["sem"]) for name, row in ranked.iterrows()}
    best, after = ranked.iloc[0], f"After {count(checkpoint, 'edit')}"
    over = count(int(best["count"]), "seed")
    if len(ranked) == 1:
        return f"{after} {best.name} has a harmonic mean of {parts} of {said[best.name]} ({over})."
    text = f"{after} {best.name} has the highest harmonic mean of {parts}: {said[best.name]} ({over})"
    others = ranked.iloc[1:]
    near = list(others.index[best["mean"] - others["mean"] <= (best["sem"] ** 2 + others["sem"] ** 2) ** 0.5])
    if near:
        text += f", but within one standard error of {_listed([f'{name} ({said[name]})' for name in near])}."
    else:
        text += f"; next is {ranked.index[1]} with {said[ranked.index[1]]}."
    alone = list(ranked.index[ranked["count"] == 1])
    if alone:
        text += f" One seed{'' if len(alone) == len(ranked) else f' ({_listed(alone)})'} cannot tell a difference from chance."
    return text


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
