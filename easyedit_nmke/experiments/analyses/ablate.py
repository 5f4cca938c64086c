"""What is lost when neurons of a role are silenced (Figure 2 right, Table 5), beside as many random ones and the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from . import source
from .record import Analysis, Table
from .roles import KINDS, TITLES, asked, blocks, kind, task_arguments, task_settings

ROWS = {**{name: TITLES[name] for name in KINDS[:3]}, "largest": "largest |c|·||v||", "random": "random"}


def arguments(sub) -> None:
    task_arguments(sub)
    sub.add_argument("--top", type=source.numbers, default=(10, 50), metavar="LIST", help="how many are silenced (default 10,50)")
    sub.add_argument("--roles", metavar="LIST", help="general, domain NAME, task NAME (default: all that have as many neurons)")
    sub.add_argument("--draws", type=source.positive, default=5, metavar="N", help="of the random control (default 5)")
    sub.add_argument("--also", type=Path, nargs="+", default=(), metavar="FILE",
                     help="other tasks, each choice asked in full: arc_easy.jsonl piqa.jsonl")  # fmt: skip
    sub.add_argument("--also-limit", type=source.positive, default=50, metavar="N", help="questions of each (default 50)")


def run(args, begin) -> None:
    from tqdm import tqdm

    from ...models.arch import ModelView
    from ...models.hooks import silenced
    from ...scores.kept import KeptText
    from .attributing import task_scores
    from .questions import ask, judged

    if 0 in args.top:
        raise ValueError("--top holds 0, but something has to be silenced; give numbers of 1 or more")
    questions = asked(args)
    also = [question for file in args.also for question in ask([file], limit=args.also_limit, letters=False, least=1)]
    model, tok = source.load(args)
    view = ModelView(model)
    layers = blocks(args, view)
    settings = task_settings(args, questions, layers) | {
        "top": list(args.top), "draws": args.draws, "roles": args.roles,
        "also": [f"{file.name}, {args.also_limit}" for file in args.also],
    }  # fmt: skip
    notebook = begin(settings, model)
    found = dict(task_scores(view, tok, questions, layers, args.strategy, args.threshold, args.out))
    sets = _sets(args, settings["tasks"], found)
    kept = KeptText(model, tok)

    def measured(chosen: Sequence[tuple[int, int]]) -> dict:
        import torch

        inputs = {view.down(layer): torch.tensor([n for at, n in chosen if at == layer]) for layer in {at for at, _ in chosen}}
        with silenced(inputs):
            said = kept.score(model, tok)
            return {"tasks": judged(view, tok, questions), "also": judged(view, tok, also), **said, "blocks": _by_block(chosen)}

    for key, chosen in tqdm(sets.items(), desc="ablation", unit="set"):
        notebook.once(*key, make=lambda chosen=chosen: measured(chosen))


def _by_block(chosen: Sequence[tuple[int, int]]) -> dict[str, int]:
    return {str(layer): sum(at == layer for at, _ in chosen) for layer in sorted({at for at, _ in chosen})}


def _sets(args, tasks: Mapping[str, str], found: Mapping) -> dict[tuple, list[tuple[int, int]]]:
    """(what, how many[, draw]) -> neurons as (block, number): nothing; the roles' best; the largest; random ones, as many in each
    block as the general ones have there. ValueError for a role that has too few."""
    ranked = _ranked(args, tasks, found)
    wanted = [name.strip() for name in args.roles.split(",")] if args.roles else None
    if unknown := [role for role in wanted or () if role not in ranked]:
        raise ValueError(f"there is no role {unknown[0]!r}; roles are {', '.join(ranked)}")
    for role in wanted or ["general"]:
        if len(ranked[role]) < max(args.top):
            raise ValueError(
                f"{role} has {len(ranked[role])} neurons in these blocks, fewer than the {max(args.top)} of --top; ask for "
                "fewer, or for more blocks"
            )
    sets: dict[tuple, list[tuple[int, int]]] = {("nothing", 0): []}
    for top in args.top:
        roles = wanted or [role for role, neurons in ranked.items() if len(neurons) >= top]
        sets |= {(role, top): ranked[role][:top] for role in roles}
        sets["largest", top] = _largest(found, top)
        for draw in range(args.draws):
            sets["random", top, draw] = _random(found, _by_block(sets[roles[0], top]), args.seed + draw)
    return sets


def _ranked(args, tasks: Mapping[str, str], found: Mapping) -> dict[str, list[tuple[int, int]]]:
    """Role -> its neurons of all blocks, the highest mean attribution over the role's tasks first."""
    from ...attribution.roles import roles

    names, domains = list(tasks), list(tasks.values())
    pools: dict[str, list[tuple[float, int, int]]] = {}
    for layer, measured in found.items():
        for role, mask in roles(measured.active > args.most, names, domains).items():
            if kind(role) in KINDS[:3]:
                score = measured.score[[i for i, task in enumerate(names) if _is_of(role, task, tasks)]].mean(0)
                pools.setdefault(role, []).extend((score[i].item(), layer, i) for i in mask.nonzero()[:, 0].tolist())
    return {role: [(layer, i) for _, layer, i in sorted(pool, reverse=True)] for role, pool in pools.items()}


def _is_of(role: str, task: str, tasks: Mapping[str, str]) -> bool:
    return role in ("general", f"task {task}", f"domain {tasks[task]}")


def _largest(found: Mapping, top: int) -> list[tuple[int, int]]:
    sizes = sorted(((size, layer, i) for layer, m in found.items() for i, size in enumerate(m.size.mean(0).tolist())), reverse=True)
    return [(layer, i) for _, layer, i in sizes[:top]]


def _random(found: Mapping, counts: Mapping[str, int], seed: int) -> list[tuple[int, int]]:
    import random

    rng = random.Random(seed)
    return [(int(layer), i) for layer, n in counts.items() for i in rng.sample(range(found[int(layer)].size.shape[1]), n)]


# ---- what the lines hold


def _losses(lines: Sequence[Mapping], top: int) -> dict[str, list[dict]]:
    """Row of the figure -> for each of its sets what it lost: log-probability of the right choice on its own tasks and on the
    others, accuracy, KL on kept text, both on other files. A set that is of no task has all for its own, and for others."""
    found: dict[str, list[dict]] = {row: [] for row in ROWS}
    for line in lines[1:]:
        what, size, *_ = line["key"]
        if size == top:
            found[kind(what)].append(_lost(lines, line, what))
    return {row: sets for row, sets in found.items() if sets}


def _control(lines: Sequence[Mapping], top: int, row: str) -> list[dict]:
    """Draw of random neurons -> what it lost on the tasks of a row's sets, mean over these."""
    names = [line["key"][0] for line in lines[1:] if line["key"][1] == top and kind(line["key"][0]) == row]
    found = []
    for line in lines[1:]:
        if line["key"][:2] == ["random", top]:
            sets = [_lost(lines, line, name) for name in names]
            known = {score: [each[score] for each in sets if each[score] is not None] for score in COLUMNS}
            found.append({score: fmean(values) if values else None for score, values in known.items()})
    return found


def _lost(lines: Sequence[Mapping], line: Mapping, what: str) -> dict[str, float | None]:
    """By the silenced neurons of a line, on the tasks of the set `what`."""
    tasks = lines[0]["settings"]["tasks"]
    base = next(line for line in lines[1:] if line["key"][0] == "nothing")
    own = [task for task in tasks if what in ("largest", "random") or _is_of(what, task, tasks)]
    others = list(tasks) if what in ("largest", "random") else [task for task in tasks if task not in own]
    return {
        "own": _change(line, base, own, "log_prob"), "others": _change(line, base, others, "log_prob"),
        "accuracy": _change(line, base, own, "accuracy"), "kept_kl": line["kept_kl"],
        "also": _change(line, base, list(base["also"]), "log_prob", "also"),
        "also accuracy": _change(line, base, list(base["also"]), "accuracy", "also"),
    }  # fmt: skip


def _change(line: Mapping, base: Mapping, tasks: Sequence[str], score: str, of: str = "tasks") -> float | None:
    return fmean(line[of][task][score] - base[of][task][score] for task in tasks) if tasks else None


def _mean(sets: Sequence[Mapping], name: str) -> tuple[float, float] | None:
    """Mean over sets and its spread (standard deviation)."""
    values = [entry[name] for entry in sets if entry[name] is not None]
    return (fmean(values), pstdev(values)) if values else None


COLUMNS = {"own": "log p, own tasks", "others": "log p, other tasks", "accuracy": "accuracy, own", "kept_kl": "KL, kept text",
           "also": "log p, other files", "also accuracy": "accuracy, other files"}  # fmt: skip
PANELS = {
    "own": "log p(right choice)\nof its own tasks", "others": "log p(right choice)\nof the other tasks",
    "also": "log p(right choice)\nof other files", "accuracy": "accuracy on its\nown tasks", "kept_kl": "KL on kept text",
}  # fmt: skip


def tables(lines: Sequence[Mapping]) -> list[Table]:
    base = next(line for line in lines[1:] if line["key"][0] == "nothing")
    rows = []
    for top in lines[0]["settings"]["top"]:
        for row, sets in _losses(lines, top).items():
            cells = [_mean(sets, name) for name in COLUMNS]
            shown = ["-" if cell is None else f"{cell[0]:+.3f}" + (f" ± {cell[1]:.3f}" if len(sets) > 1 else "") for cell in cells]
            rows.append((f"{top} {ROWS[row]}", str(len(sets)), *shown))
    asked = {**base["tasks"], **base["also"]}
    plain = [(task, f"{said['accuracy']:.2f}", f"{said['log_prob']:.3f}") for task, said in asked.items()]
    return [
        Table("Change by silencing; ± is the spread over sets", ("silenced", "sets", *COLUMNS.values()), rows),
        Table("With nothing silenced", ("task", "accuracy", "log p of the right choice"), plain),
    ]


def said(lines: Sequence[Mapping]) -> list[str]:
    top, text = _top(lines), []
    found = _losses(lines, top)
    if "random" not in found:
        return ["Not finished: random neurons, without which the others say nothing, are yet to be silenced."]
    for row in KINDS[:3]:
        if row in found:
            (mean, _), random = _mean(found[row], "own"), _control(lines, top, row)
            chance = _mean(random, "own")
            far = abs(mean - chance[0]) > 2 * chance[1] + 1e-9
            where = "outside" if far else "inside"
            text.append(
                f"The top {top} {TITLES[row]} neurons change the log-probability of the right choice by {mean:+.3f} on their "
                f"own tasks, {where} two spreads of as many random ones there ({chance[0]:+.3f} ± {chance[1]:.3f}), kept text by a "
                f"KL of {_mean(found[row], 'kept_kl')[0]:.3f} (random {_mean(random, 'kept_kl')[0]:.3f})."
            )
    if "largest" in found:
        mean, _ = _mean(found["largest"], "own")
        text.append(
            f"The {top} with the largest |c|·||v||, chosen without attribution, change it by {mean:+.3f} and kept text by "
            f"{_mean(found['largest'], 'kept_kl')[0]:.3f}."
        )
    missing = [row for row in KINDS[:3] if row not in found]
    if missing:
        text.append(
            f"Roles with fewer than {top} neurons are left out: no {' and no '.join(TITLES[row] for row in missing)} set is "
            f"large enough."
        )
    return text


def _top(lines: Sequence[Mapping]) -> int:
    """The largest number of neurons that was silenced of most kinds of sets."""
    return max(lines[0]["settings"]["top"], key=lambda top: (len(_losses(lines, top)), top))


def _headline(lines: Sequence[Mapping]) -> str:
    top = _top(lines)
    found = _losses(lines, top)
    told = []
    for row, sets in found.items():
        if row != "random":
            mean, spread = _mean(_control(lines, top, row), "own")
            told.append(f"{ROWS[row]} {_mean(sets, 'own')[0]:+.3f} (random {mean:+.3f} ± {spread:.3f})")
    name = lines[0]["settings"]["name"]
    return f"{name}, {top} neurons silenced, change of log p(right choice) of their tasks: {', '.join(told)}"


def figure(lines: Sequence[Mapping]):
    """For each kind of set, by its size: what the right choice loses on its own and on other tasks, and kept text; on each bar what
    as many random ones lose. None before all has been measured."""
    from matplotlib.ticker import MaxNLocator

    from .drawing import COLOURS, headline, np
    from .drawing import figure as made

    tops = lines[0]["settings"]["top"]
    found = {top: _losses(lines, top) for top in tops}
    if not all("random" in sets for sets in found.values()):
        return None
    rows = [row for row in ROWS if any(row in sets for sets in found.values())]
    panels = [name for name in PANELS if any(_mean(sets, name) for of in found.values() for sets in of.values())]
    drawn = made(0.5 * len(rows) + 1.9)
    for ax, name in zip(drawn.subplots(1, len(panels), sharey=True), panels, strict=True):
        places, width = np.arange(len(rows)), 0.8 / len(tops)
        for i, top in enumerate(tops):
            cells = [_mean(found[top].get(row, []), name) for row in rows]
            at = places + (i - (len(tops) - 1) / 2) * width
            heights = [cell[0] if cell else 0 for cell in cells]
            ax.barh(at, heights, width * 0.92, color=COLOURS[i % len(COLOURS)], label=f"{top} neurons", alpha=0.9)
            several = [len(found[top].get(row, [])) > 1 for row in rows]
            errors = [cell[1] if cell and more else np.nan for cell, more in zip(cells, several, strict=True)]
            ax.errorbar(heights, at, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
            beside = {place: row for place, row, cell in zip(at, rows, cells, strict=True) if cell and row != "random"}
            means, spreads = np.array([_mean(_control(lines, top, row), name) for row in beside.values()]).reshape(-1, 2).T
            lows = np.maximum(means - 2 * spreads, 0 if name == "kept_kl" else -np.inf)
            ax.barh(list(beside), means + 2 * spreads - lows, width * 0.92, left=lows, color="#bbbbbb", edgecolor="#666666",
                    linewidth=0.8, alpha=0.75, label="as many random ones, ± 2 spreads" if top == tops[-1] else None)  # fmt: skip
        if not any(_mean(sets, name)[0] for of in found.values() for sets in of.values() if _mean(sets, name)):
            ax.text(0.5, 0.5, "no change", transform=ax.transAxes, ha="center", va="center", color="#666666")
        ax.axvline(0, color="#666666", linewidth=0.8)
        ax.set_yticks(places, [ROWS[row] for row in rows])
        ax.grid(axis="y", visible=False)
        ax.set_title(PANELS[name], fontsize=8.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        low, high = ax.dataLim.intervalx
        ax.set_xlim(min(1.1 * low, -0.05 if name != "kept_kl" else 0), max(1.1 * high, 0.05))  # no magnified nothing
    drawn.axes[0].invert_yaxis()
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(tops) + 1)
    headline(drawn, _headline(lines))
    return drawn


ANALYSIS = Analysis(
    "ablate",
    "what is lost when the neurons of a role are silenced, beside random ones",
    "nmke analyze ablate --model smollm2 --tasks mmlu.jsonl --only college_biology,college_chemistry --also piqa.jsonl --out "
    "results",
    run,
    figure,
    arguments,
    tables,
    said,
    "On LLaMA2-7B, silencing the top 10 or 50 general neurons takes accuracy from 37.5 % to 4.2 % or .7 %; task-specific ones cost "
    "2 % to 6 % (Figure 2), on high school chemistry 14 % (Table 5). The paper has no control of random neurons.",
    "Bars to the left: the right choice became less likely. Black lines: the spread over sets of the same kind. Grey boxes: "
    "as many random neurons on the same tasks, within two spreads; a bar that ends in its box says nothing about the role.",
)
