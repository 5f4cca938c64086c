"""How far edits moved the weights (Figures 5, 9, 11, Table 10): distances, distributions, rows as maps, several runs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import source
from .record import Analysis, Table

BINS = 60


def arguments(sub) -> None:
    told = "edits to compare with the base: a folder of `nmke run`, a delta, a file of parameters, a model's folder"
    sub.add_argument("runs", nargs="+", metavar="[NAME=]PATH", help=told)
    sub.add_argument("--model", metavar="NAME", help="the base model (default: the one that the runs name)")
    sub.add_argument("--device", metavar="NAME", help="cpu, cuda:1, ... (default: a GPU where there is one)")
    sub.add_argument("--dtype", default="float32", metavar="NAME", help="the base's (default float32)")
    sub.add_argument("--rows", type=source.positive, default=300, metavar="N", help="of each matrix in the maps (default 300)")
    source.seed_argument(sub, "the maps, and of which rows")


def run(args, begin) -> None:
    from tqdm import tqdm

    from ...models.arch import ModelView
    from .edited import base_of, down_projections

    runs = _named(args.runs)
    args.model = args.model or next(filter(None, map(base_of, runs.values())), None)
    if args.model is None:
        raise ValueError(f"{args.runs[0]} does not say which model was edited; give the base by --model")
    model, _ = source.load(args)
    view = ModelView(model)
    edited = {label: down_projections(path, view) for label, path in runs.items()}
    layers = sorted({layer for found in edited.values() for layer in found})
    settings = {
        "name": args.model, "runs": {label: _digest(found) for label, found in edited.items()}, "layers": layers,
        "rows": args.rows, "seed": args.seed, "scores": {label: _scores(path) for label, path in runs.items()},
    }  # fmt: skip
    notebook = begin(settings, model)
    for layer in tqdm(layers, desc="drift", unit="block"):
        before = view.w_out(layer).float().cpu()
        there = {label: found[layer].float().cpu() for label, found in edited.items() if layer in found}
        for label, after in there.items():
            notebook.once("change", label, layer, make=lambda b=before, a=after: _change(b, a))
        if layer == layers[-1]:
            notebook.once("distributions", layer, make=lambda b=before, t=there: _distributions(b, t))
            notebook.once("map", layer, make=lambda b=before, t=there: _maps(b, t, args.rows, args.seed))


def _named(runs: Sequence[str]) -> dict[str, Path]:
    """Label -> path: NAME=PATH, or named after the path."""
    found: dict[str, Path] = {}
    for text in runs:
        label, _, path = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        label = label or Path(path).name
        if label in found:
            raise ValueError(f"two runs are called {label!r}; name them, as in one={path}")
        found[label] = Path(path)
    return found


def _digest(found: Mapping) -> str:
    from ...models.updates import hexadecimal

    return hexadecimal({str(layer): weight.contiguous() for layer, weight in found.items()})


def _scores(path: Path) -> dict | None:
    """Rel, Gen and Loc of the last result line in a run's folder."""
    from ..compare import read_lines

    lines = [line for line in read_lines(path / "results.jsonl") if line.get("checkpoint")] if path.is_dir() else []
    if not lines:
        return None
    last = max(lines, key=lambda line: line["checkpoint"])
    return {"edits": last["checkpoint"], **{name: last["scores"].get(name) for name in ("rel", "gen", "loc")}}


def _change(before, after) -> dict:
    from ...scores.drift import row_drift, weight_drift

    found = weight_drift(before, after)
    return {**{name: found[name] for name in ("wasserstein", "frobenius", "norm_before", "norm")}, **row_drift(before, after)}


def _distributions(before, edited: Mapping) -> dict:
    """Histograms of entries and of row norms, of the base and of each run, in bins that they share."""
    import torch

    def histogram(of: Mapping) -> dict:
        low, high = (ends(torch.stack([ends(values) for values in of.values()])).item() for ends in (torch.amin, torch.amax))
        edges = torch.linspace(low, high if high > low else low + 1, BINS + 1, dtype=torch.float64)
        counts = {label: torch.histogram(values.double(), edges).hist.long().tolist() for label, values in of.items()}
        return {"edges": edges.tolist(), "counts": counts}

    weights = {"original": before, **edited}
    wide = 6 * before.std()  # beyond which bins are nearly empty
    inside = lambda values: values[values.abs() <= wide]
    norms = {label: weight.norm(dim=1) for label, weight in weights.items()}
    low, high = torch.cat(list(norms.values())).quantile(torch.tensor([0.005, 0.995]))  # a few rows lie far from all others
    return {
        "entries": histogram({label: inside(weight.flatten()) for label, weight in weights.items()}),
        "norms": histogram({label: values[(values >= low) & (values <= high)] for label, values in norms.items()}),
    }


def _maps(before, edited: Mapping, rows: int, seed: int) -> dict:
    """Two coordinates of some rows: t-SNE of the rows of base and runs together, PCA of what the runs have added to them."""
    import numpy as np
    import torch

    from ...messages import how_to_install

    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        raise ImportError(f"t-SNE and PCA need scikit-learn: {how_to_install('analyze')} brings it") from None
    chosen = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    weights = {"original": before[chosen].numpy(), **{label: weight[chosen].numpy() for label, weight in edited.items()}}
    stacked = np.concatenate(list(weights.values()))
    perplexity = min(30.0, (len(stacked) - 1) / 3)
    placed = TSNE(random_state=seed, init="pca", perplexity=perplexity).fit_transform(stacked)
    changes = np.concatenate([weight - weights["original"] for label, weight in weights.items() if label != "original"])
    pca = PCA(2, random_state=seed).fit(np.concatenate([changes, -changes]))  # around no change, which is the origin
    size = len(chosen)
    return {
        "tsne": {label: placed[i * size : (i + 1) * size].round(3).tolist() for i, label in enumerate(weights)},
        "pca": {label: pca.transform(changes[i * size : (i + 1) * size]).round(5).tolist() for i, label in enumerate(edited)},
        "explained": pca.explained_variance_ratio_.tolist(), "perplexity": perplexity,
    }  # fmt: skip


# ---- what the lines hold


def _changes(lines: Sequence[Mapping]) -> dict[tuple[str, int], Mapping]:
    return {(line["key"][1], line["key"][2]): line for line in lines[1:] if line["key"][0] == "change"}


def _last(lines: Sequence[Mapping], what: str) -> Mapping | None:
    return next((line for line in lines[1:] if line["key"][0] == what), None)


def tables(lines: Sequence[Mapping]) -> list[Table]:
    head, changes = lines[0]["settings"], _changes(lines)
    rows = [
        (str(layer), label, f"{c['wasserstein']:.5f}", f"{c['cosine_mean']:.4f}", f"{c['cosine_std']:.4f}", f"{c['l2_mean']:.4f}",
         f"{c['l2_std']:.4f}", f"{c['frobenius']:.4f}")
        for (label, layer), c in sorted(changes.items(), key=lambda item: (item[0][1], item[0][0]))
    ]  # fmt: skip
    headings = ("block", "run", "Wasserstein", "cosine mean", "cosine std", "L2 mean", "L2 std", "|ΔW|/|W|")
    found = [Table("The base's down projection against the edited one's, by rows (Table 10)", headings, rows)]
    scored = [
        (label, str(s["edits"]), *(_or(s[name]) for name in ("rel", "gen", "loc"))) for label, s in head["scores"].items() if s
    ]
    return [*found, *([Table("What the runs score", ("run", "edits", "Rel", "Gen", "Loc"), scored)] if scored else [])]


def _or(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _least_first(lines: Sequence[Mapping]) -> str:
    """|ΔW|/|W| of each run over the edited blocks together, with its Rel."""
    head, changes = lines[0]["settings"], _changes(lines)
    totals = {
        label: (
            sum(c["frobenius"] ** 2 * c["norm_before"] ** 2 for (of, _), c in changes.items() if of == label)
            / sum(c["norm_before"] ** 2 for (of, _), c in changes.items() if of == label)
        )
        ** 0.5
        for label in dict.fromkeys(label for label, _ in changes)
    }
    told = []
    for label in sorted(totals, key=totals.__getitem__):
        scored = head["scores"].get(label)
        told.append(
            f"{label} {totals[label]:.3f}" + (f" (Rel {_or(scored['rel'])} after {scored['edits']} edits)" if scored else "")
        )
    return ", ".join(told)


def said(lines: Sequence[Mapping]) -> list[str]:
    head = lines[0]["settings"]
    text = [f"{head['name']}: |ΔW|/|W| over the edited blocks together, least first: {_least_first(lines)}."]
    rels = [scored["rel"] for scored in head["scores"].values() if scored]
    if len(rels) == len(head["runs"]) > 1 and max(rels) - min(rels) > 0.02 + 1e-9:
        text.append("Their Rel differ by more than .02, so less drift may only mean that less was written.")
    if (maps := _last(lines, "map")) is not None:
        text.append(f"The two directions of the PCA hold {sum(maps['explained']):.0%} of the change of block {head['layers'][-1]}.")
    return text


def figure(lines: Sequence[Mapping]):
    """Distances by block; entries and row norms of the last block; t-SNE of its rows, and PCA of what was added to them."""
    from itertools import cycle

    from .drawing import COLOURS, headline, np
    from .drawing import figure as made

    head, changes = lines[0]["settings"], _changes(lines)
    labels, layers = list(head["runs"]), head["layers"]
    colours = {"original": "#999999", **dict(zip(labels, cycle(COLOURS), strict=False))}
    drawn = made(7.6)
    grid = drawn.subplots(2, 3)
    for ax, name, title in (
        (grid[0, 0], "frobenius", "|ΔW| / |W|"),
        (grid[0, 1], "cosine_mean", "1 - cosine of a row with what it was"),
    ):
        width = 0.8 / len(labels)
        for i, label in enumerate(labels):
            values = [changes[label, layer][name] if (label, layer) in changes else np.nan for layer in layers]
            heights = np.asarray(values) if name == "frobenius" else 1 - np.asarray(values)
            ax.bar(
                np.arange(len(layers)) + (i - (len(labels) - 1) / 2) * width,
                heights,
                width * 0.92,
                color=colours[label],
                label=label,
            )
        ax.set_xticks(range(len(layers)), list(map(str, layers)))
        ax.set(xlabel="block", title=f"{title} ↓")
        ax.grid(axis="x", visible=False)
    if (spread := _last(lines, "distributions")) is not None:
        for ax, name, title in ((grid[0, 2], "norms", "norm of a row"), (grid[1, 0], "entries", "entries of the matrix")):
            edges = np.asarray(spread[name]["edges"])
            for label, counts in spread[name]["counts"].items():
                ax.stairs(np.asarray(counts) / sum(counts), edges, color=colours[label], linewidth=1.3, fill=label == "original",
                          alpha=0.45 if label == "original" else 1, label=label)  # fmt: skip
            ax.set(title=f"{title}, block {layers[-1]}", ylabel="share")
        grid[1, 0].set_yscale("log")
    if (maps := _last(lines, "map")) is not None:
        for i, (label, points) in enumerate(maps["tsne"].items()):  # rings in rings, the last a dot: rows may lie on each other
            x, y = np.asarray(points).T
            if i in (0, len(labels)):
                grid[1, 1].scatter(x, y, 5 if i else 60, color=colours[label], alpha=1 if i else 0.5, linewidths=0, label=label)
            else:
                size = 28 * (1 - (i - 1) / len(labels))
                grid[1, 1].scatter(x, y, size, facecolors="none", edgecolors=colours[label], linewidths=0.9, label=label)
        for label, points in maps["pca"].items():
            grid[1, 2].scatter(*np.asarray(points).T, 7, color=colours[label], alpha=0.7, linewidths=0)
        grid[1, 2].scatter([0], [0], 60, color="black", marker="+", zorder=3)
        grid[1, 1].set(title=f"t-SNE of rows, block {layers[-1]}", xticks=[], yticks=[])
        first, second = maps["explained"]
        grid[1, 2].set(title="PCA of what was added (+: nothing)", xlabel=f"{first:.0%} of the variance", ylabel=f"{second:.0%}")
    handles = {label: handle for ax in grid.flat[:3] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=len(handles))
    headline(drawn, f"{head['name']}: how far the edited weights have moved, |ΔW|/|W|: {_least_first(lines)}")
    return drawn


ANALYSIS = Analysis(
    "drift",
    "edited weights against the original ones: distances, distributions, rows as maps",
    "nmke analyze drift NMKE=results-nmke AlphaEdit=results-alphaedit --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "After 2000 edits of LLaMA3-8B, NMKE's weights are nearer to the original ones than AlphaEdit's in Wasserstein distance, "
    "cosine "
    "and L2 (Table 10: block 8, cosine .89 against .64, L2 .60 against 1.29), and its t-SNE looks like the original's (Figure 5).",
    "Lower bars: less was changed. t-SNE keeps neighbours, not distances: a row that stays on its original (grey) has moved "
    "less than "
    "the distance to its neighbours, and a map that looks different need not be worse. The PCA beside it shows what was added, to "
    "scale: points far from the cross are rows that moved far.",
)
