"""Roles of FFN neurons over tasks (section 3.1, Figure 2): general, of one domain, of one task; beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import source
from .record import Analysis, Table

KINDS = ("general", "domain", "task", "mixed", "none")  # of roles
TITLES = {"general": "knowledge-general", "domain": "domain-specific", "task": "task-specific", "mixed": "other sets of tasks",
          "none": "on no task"}  # fmt: skip


def task_arguments(sub) -> None:
    source.model_arguments(sub)
    told = 'JSON lines {"question", "choices", "answer"[, "task"]} (default: the embedded model\'s facts)'
    sub.add_argument("--tasks", type=Path, nargs="+", default=(), metavar="FILE", help=told)
    sub.add_argument("--only", metavar="LIST", help="these tasks of the files, a,b,c")
    sub.add_argument("--domains", metavar="LIST", help="biology=a,b;chemistry=c,d (default: tasks that share their last word)")
    sub.add_argument("--limit", type=source.positive, default=20, metavar="N", help="prompts of each task (default 20)")
    sub.add_argument("--layers", type=source.numbers, metavar="LIST", help="blocks, 0,4,8 (default: six of them, evenly)")
    sub.add_argument("--strategy", default="lps", metavar="NAME", help="how neurons are scored: lps, psa, mpc (default lps)")
    sub.add_argument("--threshold", type=float, default=0.0, metavar="Z", help="active above this z-score (default 0)")
    sub.add_argument("--most", type=float, default=0.5, metavar="SHARE",
                     help="active on a task when on more than this share of its prompts (default 0.5)")  # fmt: skip
    source.seed_argument(sub, "the controls")


def asked(args) -> list:
    """The questions that the arguments name."""
    from .questions import ask, domains_of

    if not args.tasks and source.model_of(args) != "atlas":
        raise ValueError(
            "--tasks is missing: give files of multiple-choice questions (the embedded model alone has tasks of its own)"
        )
    only = [name.strip() for name in (args.only or "").split(",") if name.strip()]
    return ask(args.tasks, only, domains_of(args.domains) if args.domains else None, args.limit)


def blocks(args, view) -> tuple[int, ...]:
    layers = args.layers or source.spread(view.depth, 6)
    view.check_layers(layers)
    return layers


def task_settings(args, questions: Sequence, layers: Sequence[int]) -> dict:
    """What the results depend on, but for the model."""
    import hashlib

    text = "\n".join(f"{q.task} {q.prompt} {q.choices} {q.answer}" for q in questions)
    tasks = {question.task: question.domain for question in questions}
    return {
        "name": source.name(args), "tasks": tasks, "questions": len(questions), "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "layers": list(layers), "strategy": args.strategy, "threshold": args.threshold, "most": args.most, "seed": args.seed,
    }  # fmt: skip


def arguments(sub) -> None:
    task_arguments(sub)
    sub.add_argument("--draws", type=source.positive, default=20, metavar="N", help="of the chance control (default 20)")


def run(args, begin) -> None:
    from collections import Counter

    from ...attribution.roles import overlap, roles, shuffled
    from ...models.arch import ModelView
    from .attributing import task_scores

    questions = asked(args)
    model, tok = source.load(args)
    view = ModelView(model)
    layers = blocks(args, view)
    settings = task_settings(args, questions, layers) | {"draws": args.draws}
    notebook = begin(settings, model)
    tasks, domains = list(settings["tasks"]), list(settings["tasks"].values())
    for layer, found in task_scores(view, tok, questions, layers, args.strategy, args.threshold, args.out):
        active = found.active > args.most

        def counted(active=active, answers=found.answers) -> dict:
            drawn = [_counts(roles(shuffled(active, args.seed + i), tasks, domains)) for i in range(args.draws)]
            chance = {role: [draw[role] for draw in drawn] for role in drawn[0]}
            ((often, times),) = Counter(answers.tolist()).most_common(1)
            return {
                "neurons": active.shape[1], "active": active.double().mean(1).tolist(),
                "chance": {role: _spread(values) for role, values in chance.items()},
                "counts": _counts(roles(active, tasks, domains)), "overlap": overlap(active).tolist(),
                "commonest answer": [tok.decode([often]).strip(), times / len(answers)],
            }  # fmt: skip

        notebook.once(layer, make=counted)


def _counts(found: Mapping) -> dict[str, int]:
    return {role: int(mask.sum()) for role, mask in found.items()}


def _spread(values: Sequence[float]) -> tuple[float, float]:
    from statistics import fmean, pstdev

    return fmean(values), pstdev(values)


# ---- what the lines hold


def kind(role: str) -> str:
    return role.split(" ", 1)[0]


def _shares(lines: Sequence[Mapping], which: str) -> dict[str, list[float]]:
    """Kind of role -> its share of each block's neurons."""
    first = (lambda value: value[0]) if which == "chance" else (lambda value: value)
    return {
        name: [sum(first(v) for role, v in line[which].items() if kind(role) == name) / line["neurons"] for line in lines[1:]]
        for name in KINDS
    }


def tables(lines: Sequence[Mapping]) -> list[Table]:
    seen, chance = _shares(lines, "counts"), _shares(lines, "chance")
    rows = [
        (str(line["key"][0]), *(f"{seen[name][i]:.1%} ({chance[name][i]:.1%})" for name in KINDS))
        for i, line in enumerate(lines[1:])
    ]
    roles = dict.fromkeys(role for line in lines[1:] for role in line["counts"])
    each = [
        (role, str(sum(line["counts"][role] for line in lines[1:])), f"{sum(line['chance'][role][0] for line in lines[1:]):.0f}")
        for role in roles
    ]
    return [
        Table("Shares of each block's neurons, in brackets those of the chance control", ("block", *TITLES.values()), rows),
        Table("Neurons of each role, all blocks", ("role", "neurons", "by chance"), each),
    ]


def _total(lines: Sequence[Mapping], which: str) -> dict[str, float]:
    """Kind of role -> its share of the neurons of all blocks."""
    sizes = [line["neurons"] for line in lines[1:]]
    return {
        name: sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
        for name, shares in _shares(lines, which).items()
    }


def said(lines: Sequence[Mapping]) -> list[str]:
    head = lines[0]["settings"]
    seen, chance = _total(lines, "counts"), _total(lines, "chance")
    order = sorted(KINDS[:3], key=lambda name: -seen[name])
    told = ", ".join(f"{TITLES[name]} {seen[name]:.1%} (by chance {chance[name]:.1%})" for name in order)
    as_told = "as" if order == list(KINDS[:3]) else "not as"
    tasks = head["tasks"]
    pairs = [(a, b) for i, a in enumerate(tasks) for b in list(tasks)[:i]]
    within = [_overlap(lines, *pair) for pair in pairs if tasks[pair[0]] == tasks[pair[1]]]
    across = [_overlap(lines, *pair) for pair in pairs if tasks[pair[0]] != tasks[pair[1]]]
    text = [
        f"{head['name']}, {len(tasks)} tasks, {head['questions']} prompts, blocks {', '.join(map(str, head['layers']))}: {told}.",
        f"The order general, domain, task is {as_told} the paper tells it; general neurons are "
        f"{seen['general'] / max(chance['general'], 1e-4):.1f} times as many as tasks without anything in common would give.",
    ]
    answer, share = lines[1].get("commonest answer", ("", 0))
    if share > 0.5:
        text.append(f"The model answers {answer!r} to {share:.0%} of the prompts, so general may be what makes it say that.")
    if within and across:
        text.append(
            f"Two tasks of one domain share {sum(within) / len(within):.2f} of their active neurons, two of different domains "
            f"{sum(across) / len(across):.2f} (Jaccard)."
        )
    return text


def _overlap(lines: Sequence[Mapping], one: str, other: str) -> float:
    names = list(lines[0]["settings"]["tasks"])
    values = [line["overlap"][names.index(one)][names.index(other)] for line in lines[1:]]
    return sum(values) / len(values)


def figure(lines: Sequence[Mapping]):
    """Shares of the roles by block, as dots those of chance; the overlap of the tasks."""
    from .drawing import COLOURS, headline, heat, np
    from .drawing import figure as made

    names = list(lines[0]["settings"]["tasks"])
    seen, chance = _shares(lines, "counts"), _shares(lines, "chance")
    drawn = made(max(3.8, 0.24 * len(names) + 1.6))
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    places, width = np.arange(len(lines) - 1), 0.27
    for i, (name, colour) in enumerate(zip(KINDS[:3], COLOURS, strict=False)):
        left.bar(places + (i - 1) * width, seen[name], width * 0.92, color=colour, label=TITLES[name])
        left.scatter(places + (i - 1) * width, chance[name], 22, color="black", zorder=3, label=None if i else "by chance")
    left.set_xticks(places, [str(line["key"][0]) for line in lines[1:]])
    left.set(xlabel="block", ylabel="share of the block's neurons", title="neurons by role")
    left.grid(axis="x", visible=False)
    left.set_ylim(0, 1.28 * max(max(seen[name] + chance[name]) for name in KINDS[:3]))
    left.legend(ncols=2, fontsize=8, loc="upper left")
    mean = np.mean([line["overlap"] for line in lines[1:]], 0)
    short = [name.replace("_", " ") for name in names]
    image = heat(right, np.where(np.eye(len(names), dtype=bool), np.nan, mean), short, short, rotate=40, low=0, high=1)
    if len(names) <= 8:
        for i in range(len(names)):
            for j in range(len(names)):
                if i != j:
                    colour = "white" if mean[i, j] > 0.55 else "black"
                    right.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    drawn.colorbar(image, ax=right, shrink=0.9)
    right.set_title("active neurons that two tasks share (Jaccard)")
    total, by_chance = _total(lines, "counts"), _total(lines, "chance")
    told = ", ".join(f"{total[name]:.0%} {TITLES[name]} (by chance {by_chance[name]:.0%})" for name in KINDS[:3])
    headline(drawn, f"{lines[0]['settings']['name']}, neurons of all blocks: {told}")
    return drawn


ANALYSIS = Analysis(
    "roles",
    "which neurons are active on all tasks, on one domain, on one task",
    "nmke analyze roles --model smollm2 --tasks mmlu.jsonl --only college_biology,college_chemistry --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "On LLaMA2-7B and four MMLU tasks, knowledge-general neurons occur most often, domain-specific ones less, task-specific ones "
    "least (section 3.1, Figure 2).",
    "Bars: the share of a block's neurons with a role. Dots: what it would be if each task had as many active neurons, but "
    "drawn at "
    "random. Only what stands above its dot is shared by the tasks for a reason.",
)
