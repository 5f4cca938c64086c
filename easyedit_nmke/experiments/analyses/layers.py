"""Neurons chosen per block over the edits of a run (Figure 11 right, Table 9): general, specific, both, mask; what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from . import source
from .record import Analysis, Table

PAPER = 0.42, 0.51  # of a block's neurons in a mask (Table 9)
SHARES = {"general": "general", "specific": "specific", "both": "general and specific", "mask": "mask"}


def arguments(sub) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR", help="where `nmke run` keeps NMKE's edits, or a state_dir")
    sub.add_argument("--at", type=source.positive, default=20, metavar="N", help="edits that are looked at, evenly (default 20)")
    sub.add_argument("--model", metavar="NAME", help="where the base model lies now, if it was moved")
    sub.add_argument("--device", metavar="NAME", help="instead of the one that the edits were made on")


def run(args, begin) -> None:
    from dataclasses import replace

    from tqdm import tqdm

    from ...editor import LifelongEditor
    from ...history.log import Edit
    from ...methods.nmke import NMKEHyperParams
    from ...models.arch import editing

    editor = LifelongEditor.of_folder(args.folder, args.model, args.device, write=False)
    hparams, events = editor.hparams, editor.state.events
    if not isinstance(hparams, NMKEHyperParams) or hparams.neurons == "all":
        made = f"{editor.alg_name} with neurons: all" if isinstance(hparams, NMKEHyperParams) else editor.alg_name
        raise ValueError(f"the edits in {args.folder} were made by {made}, which chooses no neurons; give those of NMKE")
    places = [place for place, event in enumerate(events) if isinstance(event, Edit)]
    if not places:
        raise ValueError(f"there is no edit in {args.folder} yet")
    if hparams.attribution_backend == "cached":
        hparams = replace(hparams, attribution_backend="auto")
    chosen = [places[i] for i in source.spread(len(places), args.at)]
    settings = {
        "name": str(editor.hparams.to_dict()["model_name"]), "edits": editor.state.last, "layers": list(hparams.layers),
        "looked at": [events[place].first for place in chosen], "last": str(events[-1].digest),
    }  # fmt: skip
    notebook = begin(settings)
    with editing(editor.model), editor.state.weights.lent():
        for place in tqdm(chosen, desc="layers", unit="edit"):
            notebook.once(events[place].first, make=lambda place=place: _chosen(editor, hparams, place))


def _chosen(editor, hparams, place: int) -> dict:
    """What the edit chose, found again on the weights as they were before it."""
    from ...methods.nmke import neuron_masks
    from ...models.arch import ModelView
    from ...models.requests import Request

    state, view = editor.state, ModelView(editor.model)
    event = state.events[place]
    state.weights.set_to(state.events[:place], masters=False)
    requests = [Request.from_dict(request) for request in event.requests]
    masks = neuron_masks(view, editor.tok, requests, state.flat_templates, hparams, z=event.z)
    prompts = len(requests) * len(state.flat_templates)
    return {"blocks": {str(layer): _of_block(view, event, layer, mask, prompts) for layer, mask in masks.items()}}


def _of_block(view, event, layer: int, mask, prompts: int) -> dict:
    from ...models.updates import of_parameter, tensors_of

    neurons, size = len(mask.mask), mask.mask.element_size()
    updates = [t for u in of_parameter(event.updates, view.weight_name(layer)) for t in tensors_of(u).values()]
    keys = event.keys.get(layer)
    kept = event.masks.get(layer)
    return {
        "neurons": neurons, "general": mask.general.double().mean().item(), "specific": mask.specific.double().mean().item(),
        "both": (mask.general & mask.specific).double().mean().item(), "mask": mask.density,
        "resonance": mask.general_ratio, "burst": mask.specific_ratio,
        "as kept": None if kept is None else bool((kept == (mask.mask != 0).cpu()).double().mean() > 0.999),
        "bytes": {
            "coefficients": prompts * neurons * 4, "mask": neurons * size,
            "update": sum(t.numel() * t.element_size() for t in updates),
            "key": 0 if keys is None else keys.numel() * keys.element_size(),
        },
    }  # fmt: skip


# ---- what the lines hold


def _of(lines: Sequence[Mapping], layer: int, name: str) -> list[float]:
    return [line["blocks"][str(layer)][name] for line in lines[1:]]


def tables(lines: Sequence[Mapping]) -> list[Table]:
    layers, rows, sizes = lines[0]["settings"]["layers"], [], []
    for layer in layers:
        means = {name: fmean(_of(lines, layer, name)) for name in (*SHARES, "resonance", "burst")}
        neurons = lines[1]["blocks"][str(layer)]["neurons"]
        cells = [f"{means[name]:.2f} ± {pstdev(_of(lines, layer, name)):.2f}" for name in SHARES]
        chance = means["general"] * means["specific"]
        rows.append((str(layer), *cells, f"{chance:.2f}", f"{means['mask'] * neurons:.0f} of {neurons}",
                     f"{means['resonance']:.2f}", f"{means['burst']:.2f}"))  # fmt: skip
        held = _of(lines, layer, "bytes")
        sizes.append((str(layer), *(f"{fmean(of[name] for of in held) / 1e6:.3f}" for name in held[0])))
    headings = ("block", *SHARES.values(), "both, by chance", "chosen", "resonance ratio", "burst ratio")
    return [
        Table("Share of a block's neurons, mean and spread over edits (Table 9)", headings, rows),
        Table("MB held per edit and block", ("block", "coefficients", "mask", "update, kept", "key, kept"), sizes),
    ]


def said(lines: Sequence[Mapping]) -> list[str]:
    head = lines[0]["settings"]
    mean = {name: {layer: fmean(_of(lines, layer, name)) for layer in head["layers"]} for name in SHARES}
    density = fmean(mean["mask"].values())
    chance = fmean(mean["general"][layer] * mean["specific"][layer] for layer in head["layers"])
    most = {name: max(mean[name], key=mean[name].__getitem__) for name in ("general", "specific", "both")}
    text = [
        f"{head['name']}, {len(lines) - 1} of {head['edits']} edits: the mask keeps {density:.0%} of the neurons (the paper: "
        f"42 % to 51 %); "
        f"both general and specific are {fmean(mean['both'].values()):.0%}, {chance:.0%} if the two had nothing to do with "
        f"each other.",
        f"Most general neurons are in block {most['general']}, most specific ones in block {most['specific']}, most of both "
        f"in block "
        f"{most['both']} (the paper: the top, evenly thinning out, the middle).",
    ]
    differ = sum(line["blocks"][str(layer)]["as kept"] is False for line in lines[1:] for layer in head["layers"])
    if differ:
        text.append(f"{differ} of the masks found again are not those that were kept (a control, another backend or device).")
    return text


def figure(lines: Sequence[Mapping]):
    """Shares by block, the mask over edits, and the ratios that the entropies give."""
    from .drawing import COLOURS, headline, np
    from .drawing import figure as made

    layers = lines[0]["settings"]["layers"]
    drawn = made(3.6)
    left, middle, right = drawn.subplots(1, 3, width_ratios=(1.3, 1.2, 1))
    places, width = np.arange(len(layers)), 0.2
    for i, (name, title) in enumerate(SHARES.items()):
        values = [_of(lines, layer, name) for layer in layers]
        at = places + (i - 1.5) * width
        left.bar(at, [fmean(v) for v in values], width * 0.92, yerr=_errors(values), color=COLOURS[i], label=title,
                 error_kw={"elinewidth": 1})  # fmt: skip
        if name == "both":
            chance = [fmean(_of(lines, layer, "general")) * fmean(_of(lines, layer, "specific")) for layer in layers]
            left.scatter(at, chance, 18, color="black", zorder=3, label="both, by chance")
    left.set_xticks(places, list(map(str, layers)))
    left.set(xlabel="block", title="share of the neurons", ylim=(0, 1.35), yticks=np.linspace(0, 1, 6))
    left.grid(axis="x", visible=False)
    left.legend(fontsize=7.5, ncols=2, loc="upper left")
    edits = [line["key"][0] for line in lines[1:]]
    for i, layer in enumerate(layers):
        middle.plot(edits, _of(lines, layer, "mask"), color=COLOURS[i % len(COLOURS)], label=f"block {layer}")
    middle.axhspan(*PAPER, color="#999999", alpha=0.35, linewidth=0, zorder=0, label="the paper")
    middle.set(xlabel="edit", title="share in the mask, over the edits", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    middle.legend(fontsize=7.5, ncols=3, loc="upper left")
    for i, (name, title) in enumerate((("resonance", "resonance (general)"), ("burst", "burst (specific)"))):
        values = [_of(lines, layer, name) for layer in layers]
        means, spreads = list(map(fmean, values)), list(map(pstdev, values))
        right.errorbar(places, means, spreads, color=COLOURS[i], marker="o", label=title, capsize=2)
    right.set_xticks(places, list(map(str, layers)))
    right.set(xlabel="block", title="ratios from the entropies", ylim=(0, 0.6))
    right.legend(fontsize=7.5)
    kept = [share for layer in layers for share in _of(lines, layer, "mask")]
    headline(drawn, f"{lines[0]['settings']['name']}: a mask keeps {fmean(kept):.0%} of a block's neurons, from {min(kept):.0%} to "
                    f"{max(kept):.0%}")  # fmt: skip
    return drawn


def _errors(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """One spread down and up, as far as shares go."""
    means, spreads = list(map(fmean, values)), list(map(pstdev, values))
    pairs = list(zip(means, spreads, strict=True))
    return [min(spread, mean) for mean, spread in pairs], [min(spread, 1 - mean) for mean, spread in pairs]


ANALYSIS = Analysis(
    "layers",
    "which share of each block's neurons an edit chooses: general, specific, both, mask",
    "nmke analyze layers results --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "In LLaMA3-8B, general neurons are concentrated in the top block of 4 to 8, specific ones thin out with depth, and most "
    "neurons "
    "that are both are in the middle (Figure 11); a mask keeps 6,072 to 7,320 of 14,336 neurons, ratios are .30 to .33 and "
    ".24 to .28 "
    "(Table 9).",
    "Bars: means over edits, lines their spread. The dot is the share that would be both by chance. The ratios are what Eqs. "
    "6 and 7 "
    "ask for; the bars can be larger, because a quantile keeps every tie.",
)
