"""What `nmke compare` wrote to results.jsonl: means and standard errors over seeds, as tables and in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean, harmonic_mean, stdev

from ..messages import how_to_install
from ..scores import table as scores
from .lines import wrong
from .protocol import failed_edits, models_differ
from .stream import source_of

try:
    import pandas as pd

    from .figures import UNEDITED
except ModuleNotFoundError as missing:
    raise ImportError(f"the report needs {missing.name}: {how_to_install('figures')} brings it") from None


# What a method is ranked by: the harmonic mean of these. Free generation first.
BALANCES: Mapping[str, tuple[str, ...]] = {
    "Free generation": ("rel_exact", "gen_exact", "loc"),
    "Teacher forcing": ("rel", "gen", "loc"),
}
# What is compared by pairs over records.
PAIRS: Mapping[str, tuple[str, ...]] = {
    "what the model says until it stops, and Loc": ("rel_natural_contains", "gen_natural_contains", "loc"),
    "by tokens": ("rel", "gen", "loc"),
}


def read(directory: Path) -> tuple[list[dict], list[str]]:
    """(lines, notes) of DIR/results.jsonl: one line per (method, seed, checkpoint), the last where there are several.

    A last line that is cut short is left out, with a note. ValueError for any other line that cannot be read or holds what is no
    result (see `lines.wrong`), and where no edited model has a result.
    """
    path, found, notes = Path(directory) / "results.jsonl", {}, []
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder that `nmke compare` wrote its results to")
    written = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, text in enumerate(written, 1):
        try:
            line = json.loads(text)
            problem = wrong(line)
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
    different = next((line for line in found.values() if models_differ(stamp(next(iter(found.values()))), stamp(line))), None)
    if different:
        raise ValueError(
            f"{path} holds results of different models ({different['method']}'s is another than that of the first line); "
            "a table is of one model, so give each a folder of its own"
        )
    if all(method == UNEDITED for method, *_ in found):
        raise ValueError(f"{path} has no result of an edited model yet")
    return list(found.values()), notes


def stamp(line: Mapping) -> Mapping:
    """What a line depends on, as far as it tells."""
    return line.get("protocol") or {}


def methods(lines: Iterable[Mapping]) -> list[str]:
    """The edited methods, in the order in which they first appear."""
    return [name for name in dict.fromkeys(line["method"] for line in lines) if name != UNEDITED]


def checkpoints(lines: Iterable[Mapping]) -> list[int]:
    """Numbers of edits after which any method was scored, ascending."""
    return sorted({line["checkpoint"] for line in lines if line["method"] != UNEDITED})


def batch_size(lines: Iterable[Mapping], method: str) -> int:
    """How many of a method's edits shared one update; where no line tells, 1."""
    return next((stamp(line).get("batch_size", 1) for line in lines if line["method"] == method), 1)


def model_name(lines: Sequence[Mapping]) -> str:
    """Of the edited model, as the settings name it, without the folders before it; "" where they do not."""
    settings = next((found for line in lines if (found := stamp(line).get("hparams")) and line["method"] != UNEDITED), {})
    return str(settings.get("model_name") or "").rstrip("/").rpartition("/")[2]


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
    marked = {name: marks(found[name], name, column) for name, column in columns.items()}
    body = []
    for label in found.index:
        cells = [(cell(name, *found.loc[label, name], row.digits), marked[name].get(label, "")) for name, row in columns.items()]
        body.append((label, cells))
    return [f"{column.column} {column.arrow}" for column in columns.values()], body


def marks(score: pd.DataFrame, name: str, row: scores.Metric) -> dict[str, str]:
    """Label -> "best" or "close", as in `rows`, of one score's (mean, sem)."""
    found = score.drop(index=UNEDITED, errors="ignore").dropna(subset="mean")
    if len(found) < 2:
        return {}
    best = found.loc[found["mean"].idxmin() if row.better == "lower" else found["mean"].idxmax()]
    close = (found["mean"] - best["mean"]).abs() <= (found["sem"] ** 2 + best["sem"] ** 2) ** 0.5
    marked, printed = {label: "close" for label in found.index[close]}, cell(name, best["mean"], nan, row.digits)
    return marked | {label: "best" for label, mean in found["mean"].items() if cell(name, mean, nan, row.digits) == printed}


def cell(name: str, mean: float, error: float, digits: int = 2) -> str:
    """A score as every table prints it."""
    if isnan(mean):
        return "-"
    digits = 3 if name == "seconds" and mean < 0.1 else digits
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
    return written(*rows(lines, checkpoint)) + "\n\n" + caption(lines, checkpoint)


def written(headings: Sequence[str], body: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Headings and rows of (label, [(text, mark), ...]) in Markdown."""
    marked = {"best": "**{}**", "close": "*{}*", "": "{}"}
    found = [["", *headings], ["---"] + ["---:"] * len(headings)]
    found += [[label.replace("|", "\\|"), *(marked[mark].format(text) for text, mark in cells)] for label, cells in body]
    return "\n".join(f"| {' | '.join(row)} |" for row in found)


def memory_and_masks(lines: Sequence[Mapping], checkpoint: int) -> pd.DataFrame:
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
    """A sentence for every method that lacks some of the seeds and checkpoints that are in the file; of one that edits in batches,
    also which checkpoints do not end one."""
    reached = {(line["method"], line["seed"], line["checkpoint"]) for line in lines}
    wanted, notes, batched = checkpoints(lines), [], {}
    for name in methods(lines):
        said, size = [], batch_size(lines, name)
        scored = {t for method, _, t in reached if method == name}
        inside = [t for t in wanted[:-1] if t % size and t not in scored]  # see `Plan.due`
        if inside:
            batched.setdefault((size, tuple(inside)), []).append(name)
        for seed in sorted({line["seed"] for line in lines}):
            missing = [t for t in wanted if t not in inside and (name, seed, t) not in reached]
            if missing:
                whole = len(missing) == len(wanted) - len(inside)
                said.append(f"seed {seed}" if whole else f"seed {seed} at T = {', '.join(map(str, missing))}")
        if said:
            notes.append(f"{name} is incomplete: nothing of {'; '.join(said)}.")
    for (size, inside), names in batched.items():
        notes.append(f"Not scored at T = {', '.join(map(str, inside))}, where no batch of {size} ends: {_listed(names)}.")
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
    """What came out at a checkpoint, in a few sentences made of the numbers alone: who leads by free generation, then by teacher
    forcing (see `ranking`), and what the first of these does."""
    data = frame(lines)
    found = {protocol: ranking(data, checkpoint, protocol) for protocol in BALANCES}
    found = {protocol: (parts, ranked) for protocol, (parts, ranked) in found.items() if not ranked.empty}
    if not found:
        return [f"After {count(checkpoint, 'edit')} not every method has a Rel, so nothing is ranked."]
    text = [
        _ranking(ranked, _listed(parts) + (f" by {protocol.lower()}" if len(found) > 1 else ""), checkpoint)
        for protocol, (parts, ranked) in found.items()
    ]
    lead = next(iter(found.values()))[1].index[0]
    now = data[(data.checkpoint == checkpoint) & (data.method != UNEDITED)]
    sentences = {name: row.said for name, row in scores.table().items() if row.said}
    its = now[now.method == lead][list(sentences)].mean()
    said = [sentence.format(its[name]) for name, sentence in sentences.items() if pd.notna(its[name])]
    text.append(f"{lead} {_listed(said)}.")
    text += _paired(lines, checkpoint)
    unedited = data[data.method == UNEDITED].general.mean()
    general = now[now.method == lead].general.mean()
    if pd.notna(unedited) and pd.notna(general):
        text.append(f"The unedited model's general score is {unedited:.2f}, that of {lead} {general:.2f}.")
    return text


def ranking(data: pd.DataFrame, checkpoint: int, protocol: str) -> tuple[list[str], pd.DataFrame]:
    """(titles, methods by "mean", "sem", "count", the best first): the harmonic mean of those scores of BALANCES that all methods
    of a `frame` have at a checkpoint, taken per seed; no rows where the first is not among them."""
    names = BALANCES[protocol]
    now = data[(data.checkpoint == checkpoint) & (data.method != UNEDITED)]
    parts = [name for name in names if len(now) and now.groupby("method")[name].count().all()]
    balance = len(parts) / (1 / now[parts]).sum(axis=1, skipna=False)
    ranked = balance.groupby(now.method).agg(["mean", "sem", "count"]).sort_values("mean", ascending=False).dropna(subset="mean")
    titles = [scores.OWN[name].title.partition(",")[0] for name in parts]
    return titles, ranked if names[0] in parts else ranked.iloc[:0]


def pairs(lines: Sequence[Mapping], checkpoint: int, names: Sequence[str]) -> list[tuple[str, float, float, int]]:
    """The method with the highest harmonic mean of the scores `names` over all records of all seeds at a checkpoint, and every
    other one that has the same records: (method, its mean - the first's, standard error of that over the n records, n); the first
    with zeros. Empty where less than two methods tell of each record. Of another file, or where another number of records was
    refused, they are others.

    The error is that of the mean of the records' shares in the harmonic mean h of k means m: h²/k · sum (x - m) / m².
    """
    values: dict[str, list[list[float]]] = {}
    asked: dict[str, list] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        told = [(line.get("records") or {}).get(name) or [] for name in names]
        whole = line["checkpoint"] == checkpoint and line["method"] != UNEDITED and len(set(map(len, told))) == 1
        kept = [(i, row) for i, row in enumerate(zip(*told, strict=True)) if None not in row] if whole else []
        if kept:
            told = stamp(line).get("data") or {}
            of = source_of(told), told.get("refused"), line["seed"]
            values.setdefault(line["method"], []).extend(list(row) for _, row in kept)
            asked.setdefault(line["method"], []).extend((*of, i) for i, _ in kept)
    shares = {}
    for method, rows in values.items():
        means = [fmean(column) for column in zip(*rows, strict=True)]
        h = harmonic_mean(means)
        weights = [h**2 / len(means) / m**2 if h else 0.0 for m in means]
        each = [h + sum(w * (x - m) for w, x, m in zip(weights, row, means, strict=True)) for row in rows]
        shares[method] = h, each
    if len(shares) < 2:
        return []
    best = max(shares, key=lambda method: shares[method][0])
    found = [(best, 0.0, 0.0, len(shares[best][1]))]
    for method, (_, each) in sorted(shares.items(), key=lambda item: -item[1][0]):
        if method != best and asked[method] == asked[best]:
            apart = [mine - first for mine, first in zip(each, shares[best][1], strict=True)]
            found.append((method, fmean(apart), stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else nan, len(apart)))
    return found


def near(ranked: pd.DataFrame) -> list[str]:
    """Those of a `ranking` whose distance to the first is within its standard error."""
    if ranked.empty:
        return []
    best, others = ranked.iloc[0], ranked.iloc[1:]
    return list(others.index[best["mean"] - others["mean"] <= (best["sem"] ** 2 + others["sem"] ** 2) ** 0.5])


def _ranking(ranked: pd.DataFrame, parts: str, checkpoint: int) -> str:
    """First and second, whether their distance exceeds its standard error, and where there is none."""
    said = {name: cell("", row["mean"], row["sem"]) for name, row in ranked.iterrows()}
    best, after = ranked.iloc[0], f"After {count(checkpoint, 'edit')}"
    over = count(int(best["count"]), "seed")
    if len(ranked) == 1:
        return f"{after} {best.name} has a harmonic mean of {parts} of {said[best.name]} ({over})."
    text = f"{after} {best.name} has the highest harmonic mean of {parts}: {said[best.name]} ({over})"
    if close := near(ranked):
        text += f", but within one standard error of {_listed([f'{name} ({said[name]})' for name in close])}."
    else:
        text += f"; next is {ranked.index[1]} with {said[ranked.index[1]]}."
    alone = list(ranked.index[ranked["count"] == 1])
    if alone:
        text += f" One seed{'' if len(alone) == len(ranked) else f' ({_listed(alone)})'} cannot tell a difference from chance."
    return text


def _paired(lines: Sequence[Mapping], checkpoint: int) -> list[str]:
    """A sentence for each way of PAIRS: how far behind the first the others are, record by record."""
    text = []
    for what, names in PAIRS.items():
        best, *others = pairs(lines, checkpoint, names) or [None]
        if others:
            said = [f"{name} {behind:+.3f} ± {error:.3f}" for name, behind, error, _ in others]
            text.append(f"By pairs over {count(best[3], 'record')}, {what}: {best[0]} first, then {_listed(said)}.")
    return text


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
