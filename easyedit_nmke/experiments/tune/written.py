"""What a search leaves: a YAML file with what was measured as comments, the trials as JSON lines, a figure of what mattered."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ...files import whole, write_whole
from ...hparams import HyperParams
from ..figures import COLOURS, RC
from . import REAL, STREAM, Outcome, Plan
from .studies import Search

_SHOWN = {"rel": "Rel", "gen": "Gen", "gen_contains": "Gen by free answers", "loc": "Loc", "same_subject": "Same subject"}


def write(plan: Plan, outcome: Outcome, file: Path, command: str, surroundings: Mapping) -> None:
    """The YAML file, whole or not at all."""
    settings, base = outcome.settings, plan.base
    content = {"alg_name": settings.alg_name}
    if plan.label == "NMKE+":
        content["preset"] = "plus"
    content |= {
        "model_name": base.to_dict()["model_name"],
        "device": base.device,
        "dtype": base.dtype,
        "layers": list(settings.layers),
    }
    defaults = type(base).from_dict({**content, "layers": [0]})
    same = {f.name for f in dataclasses.fields(base) if getattr(settings, f.name) == getattr(defaults, f.name)}
    named = {name: value for name, value in settings.to_dict().items() if name not in same and name not in content}
    named |= {name: getattr(settings, name) for name in _value_settings(settings)}
    told = yaml.safe_dump({**content, **named}, sort_keys=False, default_flow_style=None, allow_unicode=True)
    lines = [*_comments(plan, outcome, file, command, surroundings), told]
    write_whole(file, "\n".join(lines).encode())


def _value_settings(settings: HyperParams) -> list[str]:
    from .values import SEARCHED

    return [name for name in SEARCHED if hasattr(settings, name)]


def _comments(plan: Plan, outcome: Outcome, file: Path, command: str, surroundings: Mapping) -> list[str]:
    hardware, made = surroundings["hardware"], surroundings["versions"]
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
    machine = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or f"{threads} of {hardware['cpu']}"
    counted = {search.study.study_name.split(" ")[0]: len(search.lines()) for search in outcome.searches}
    counts = ", ".join(f"{count} trials of {name}" for name, count in counted.items())
    spent = sum(search.seconds for search in outcome.searches) + sum(line["seconds"] for line in outcome.streams)
    found = [
        f"# nmke run --hparams {file} --data requests.json --out results",
        f"# Found by: {command}",
        f"# {counts}, {len(outcome.streams)} streams in earnest; {spent / 60:.0f} minutes on {machine}",
        "# " + ", ".join(f"{name} {version}" for name, version in made.items() if version),
    ]
    for what, scores in (
        (f"{STREAM} facts of the trials{', values of the unedited model' if 'values' in counted else ''}", outcome.trial),
        (f"{REAL} other facts, edited {'one after the other' if outcome.settings.batch_size == 1 else 'at once'}", outcome.stream),
    ):
        if scores:
            said = [f"{title} {scores[name]:.2f}" for name, title in _SHOWN.items() if scores.get(name) is not None]
            kept = f"kept text {scores['kept_kl']:.3f} nats a token" if scores.get("kept_kl") is not None else ""
            found.append(f"# {what}: {', '.join(filter(None, [*said, kept]))}")
    return found


def write_lines(file: Path, lines: Sequence[Mapping]) -> None:
    with whole(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@rc_context(RC)
def figure(searches: Sequence[Search]) -> Figure | None:
    """A row for each stage: its trials' scores against every setting, what matters most first. Hollow: trials that fell behind,
    with the score they had then; the best one is a star."""
    rows = [(search, names) for search in searches if (names := _ordered(search)) and search.done()]
    if not rows:
        return None
    width = max(len(names) for _, names in rows)
    drawn = Figure((2.3 * width + 0.4, 2.5 * len(rows) + 0.3), layout="constrained")
    axes = drawn.subplots(len(rows), width, squeeze=False, sharey="row")
    for (search, names), places in zip(rows, axes, strict=True):
        matters, points = search.importances(), search.points()
        for ax, name in zip(places, names, strict=False):
            _against(ax, points, name, isinstance(search.space[name], tuple))
            ax.set_title(f"{name} ({matters[name]:.0%})" if name in matters else name, fontsize=8)
        for ax in places[len(names) :]:
            ax.remove()
        places[0].set_ylabel(f"{search.study.study_name.split(' ')[0]}: score")
    return drawn


def _ordered(search: Search) -> list[str]:
    matters = search.importances()
    return sorted((name for name in search.space), key=lambda name: -matters.get(name, 0.0))


def _against(ax, points: Sequence[tuple[Mapping, float, bool]], name: str, logarithmic: bool) -> None:
    values = [chosen[name] for chosen, *_ in points]
    if logarithmic:
        ax.set_xscale("log")
        few = max(values) > 1000 * min(values)  # decades alone have room
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 3), numticks=6))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params("x", labelsize=7)
        places = values
    else:
        labels = sorted({json.dumps(value) for value in values}, key=_order)
        places = [labels.index(json.dumps(value)) for value in values]
        ax.set_xticks(range(len(labels)), [_short(json.loads(label)) for label in labels], fontsize=7)
        ax.set_xlim(-0.5, max(len(labels) - 0.5, 0.5))
    for complete, face in ((False, "none"), (True, COLOURS[0])):
        drawn = [(place, score) for place, (_, score, ended) in zip(places, points, strict=True) if ended == complete]
        ax.scatter(*zip(*drawn, strict=True) if drawn else ([], []), s=14, facecolors=face, edgecolors=COLOURS[0], linewidths=0.8)
    place, (_, score, _) = max(zip(places, points, strict=True), key=lambda one: (one[1][2], one[1][1]))
    ax.scatter([place], [score], s=70, marker="*", color=COLOURS[1], zorder=3)


def _order(label: str) -> tuple:
    value = json.loads(label)
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.inf
    return (number, label)


def _short(value) -> str:
    if isinstance(value, dict):
        return f"{value['block']}\n{value['v_lr']:g}\n{value['clamp_norm_factor']:g}"
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
