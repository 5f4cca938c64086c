"""Coefficients of the strongest neurons at an early, a middle and a late block across prompts (Figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import source
from .record import Analysis, Table

GROUPS = 8  # of prompts


def arguments(sub) -> None:
    source.model_arguments(sub)
    sub.add_argument("--tasks", type=Path, nargs="+", default=(), metavar="FILE", help="questions in place of facts, by their task")
    sub.add_argument("--each", type=source.positive, default=5, metavar="N", help="prompts of each task or relation (default 5)")
    sub.add_argument("--neurons", type=source.positive, default=24, metavar="N", help="the strongest of a block (default 24)")
    sub.add_argument("--layers", type=source.numbers, metavar="LIST", help="blocks (default: an early, a middle and a late one)")


def run(args, begin) -> None:
    from ...methods.keys import attribution_inputs
    from ...models.arch import ModelView, evaluating

    prompts = _prompts(args)
    model, tok = source.load(args)
    view = ModelView(model)
    layers = args.layers or tuple(sorted({min(1, view.depth - 1), view.depth // 2, max(view.depth - 2, 0)}))
    view.check_layers(layers)
    settings = {"name": source.name(args), "prompts": prompts, "layers": list(layers), "neurons": args.neurons}
    notebook = begin(settings, model)
    with evaluating(model):
        seen = attribution_inputs(view, tok, [text for _, text in prompts], layers)
    for layer in layers:
        notebook.once(layer, make=lambda layer=layer: _strongest(seen.coefficients[layer], view.values(layer), args.neurons))


def _prompts(args) -> list[tuple[str, str]]:
    """(group, text): questions by task, or facts by relation."""
    from ... import facts as known
    from .questions import ask

    if args.tasks or source.model_of(args) == "atlas":
        found = [(question.task, question.prompt) for question in ask(args.tasks, least=1)]
    else:
        found = [(fact.relation.replace("_", " "), fact.prompt(0)) for fact in known.facts()]
    groups: dict[str, list[str]] = {}
    for group, text in found:
        groups.setdefault(group, []).append(text)
    return [(group, text) for group, texts in list(groups.items())[:GROUPS] for text in texts[: args.each]]


def _strongest(coefficients, values, count: int) -> dict:
    """coefficients [P, F], values [D, F] of one block."""
    c = coefficients.float()
    size = c.abs().mean(0) * values.float().norm(dim=0).to(c.device)
    best = size.topk(min(count, c.shape[1])).indices
    top = c[:, best]
    steady = top.mean(0).abs() > top.std(0, unbiased=False)
    return {
        "neurons": best.tolist(), "coefficients": [[round(v, 4) for v in row] for row in top.T.tolist()],
        "amplitude": top.abs().mean().item(), "spread": top.std(0, unbiased=False).mean().item(),
        "steady": steady.double().mean().item(),
        "amplitude, all": c.abs().mean().item(), "spread, all": c.std(0, unbiased=False).mean().item(),
        "share": (size[best].sum() / size.sum()).item(),
    }  # fmt: skip


# ---- what the lines hold


def tables(lines: Sequence[Mapping]) -> list[Table]:
    rows = [
        (str(line["key"][0]), f"{line['amplitude']:.2f}", f"{line['spread']:.2f}", f"{line['steady']:.0%}",
         f"{line['amplitude, all']:.3f}", f"{line['spread, all']:.3f}", f"{line['share']:.0%}")
        for line in lines[1:]
    ]  # fmt: skip
    headings = ("block", "|c|", "spread over prompts", "steady", "|c|, all neurons", "spread, all", "share of Σ|c|·||v||")
    return [Table(f"The {lines[0]['settings']['neurons']} strongest neurons of a block, and all of them", headings, rows)]


def said(lines: Sequence[Mapping]) -> list[str]:
    head = lines[0]["settings"]
    first, last = lines[1], lines[-1]
    grows = last["amplitude, all"] > first["amplitude, all"]
    return [
        f"{head['name']}, {len(head['prompts'])} prompts: from block {first['key'][0]} to block {last['key'][0]} the mean |c| "
        f"of all neurons "
        f"goes from {first['amplitude, all']:.3f} to {last['amplitude, all']:.3f}, {'as' if grows else 'not as'} the paper "
        f"tells it, and its spread "
        f"over prompts from {first['spread, all']:.3f} to {last['spread, all']:.3f}.",
        f"Of the strongest in block {last['key'][0]}, {last['steady']:.0%} are steady (their mean exceeds their spread over "
        f"prompts), in block "
        f"{first['key'][0]} {first['steady']:.0%}.",
    ]


def figure(lines: Sequence[Mapping]):
    """A heat map for each block: neurons by prompts, which stand in groups."""
    from itertools import groupby

    from .drawing import figure as made
    from .drawing import headline, heat, np

    prompts = lines[0]["settings"]["prompts"]
    groups = [(name, len(list(members))) for name, members in groupby(group for group, _ in prompts)]
    ends = np.cumsum([size for _, size in groups])
    drawn = made(4.9)
    for ax, line in zip(np.atleast_1d(drawn.subplots(1, len(lines) - 1)), lines[1:], strict=True):
        values = np.asarray(line["coefficients"])
        high = np.quantile(np.abs(values), 0.99)
        image = heat(ax, values, list(map(str, line["neurons"])), [""] * len(prompts), cmap="RdBu_r", low=-high, high=high)
        ax.set_xticks(ends - np.asarray([size for _, size in groups]) / 2 - 0.5, [source.at_most([name.replace("_", " ")], 18)
                      for name, _ in groups], rotation=40, ha="right", fontsize=8)  # fmt: skip
        for end in ends[:-1]:
            ax.axvline(end - 0.5, color="black", linewidth=0.5)
        ax.tick_params(axis="y", labelsize=6.5)
        ax.set_title(f"block {line['key'][0]}")
        drawn.colorbar(image, ax=ax, shrink=0.6, pad=0.02)
    drawn.axes[0].set_ylabel("neuron, the strongest first")
    steady = ", ".join(f"{line['steady']:.0%} in block {line['key'][0]}" for line in lines[1:])
    headline(drawn, f"{lines[0]['settings']['name']}: of the strongest neurons, steady over all prompts are {steady}")
    return drawn


ANALYSIS = Analysis(
    "activations",
    "coefficients of the strongest neurons across prompts, at an early, a middle and a late block",
    "nmke analyze activations --model smollm2 --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "In layers 1, 15 and 30, activations are low and noisy early, larger and more varied later, and several neurons of layer "
    "30 are "
    "strong on every prompt (Figure 8).",
    "A row is a neuron, a column a prompt, at its last token. A row of one colour: active whatever is asked. A row with a few dark "
    "fields: active on those prompts alone. Each block has a scale of its own.",
)
