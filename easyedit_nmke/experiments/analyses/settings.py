"""A dozen settings of NMKE beside the default (Figures 6, 7, Tables 2 to 4): target values and attributions are found once, on the
unedited model, and shared, so that a setting costs a solve."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from types import MappingProxyType
from typing import Any

from . import source
from .record import Analysis, Table

DEFAULT = "default"
# Label -> what differs from the file.
SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        DEFAULT: {},
        "PSA": {"attribution_strategy": "psa"},
        "MPC": {"attribution_strategy": "mpc"},
        "ALIGN": {"attribution_strategy": "align"},
        "general only": {"neurons": "general"},
        "specific only": {"neurons": "specific"},
        "overlap": {"neurons": "overlap"},
        "non-overlap": {"neurons": "non_overlap"},
        "fixed ratio .3": {"ratio": "fixed", "general_ratio": 0.3, "specific_ratio": 0.3},
        "bias .1": {"general_bias": 0.1, "specific_bias": 0.1},
        "bias .5": {"general_bias": 0.5, "specific_bias": 0.5},
        "scale .4": {"general_scale": 0.4, "specific_scale": 0.4},
        "temperature 3": {"temperature": 3.0},
        "temperature 100": {"temperature": 100.0},
        "amplification 3": {"amplification": 3.0},
        "amplification 100": {"amplification": 100.0},
        "soft mask": {"mask": "soft"},
        "random mask": {"control": "random"},
        "no mask (AlphaEdit)": {"neurons": "all"},
    }
)
CLAIMED = ("general only", "fixed ratio .3", "overlap", "soft mask")  # whose effects the paper tells in words
SCORES = {"rel": "Rel ↑", "gen": "Gen ↑", "loc": "Loc ↑", "kept_kl": "KL, kept text ↓", "density": "neurons", "seconds": "s/edit ↓"}
SELDOM = ("attribution_target", "attribution_norm", "attribution_position")
AT_A_TIME = 4  # requests, between two writes


def arguments(sub) -> None:
    sub.add_argument("--hparams", default="NMKE/atlas", metavar="FILE", help="NMKE's settings for the model (default NMKE/atlas)")
    sub.add_argument("--model", metavar="NAME", help="instead of the file's model_name")
    sub.add_argument("--device", metavar="NAME", help="instead of the file's device")
    sub.add_argument("--data", metavar="FILE", help="records to edit; or atlas, facts (default: what fits the model)")
    sub.add_argument("--edits", type=source.positive, metavar="T", help="facts to edit (default 200 of atlas, else 50)")
    sub.add_argument("--seeds", type=source.positive, metavar="N", help="streams of facts (default 3 of atlas, else 1)")
    sub.add_argument("--only", metavar="LIST", help=f"of {', '.join(SETTINGS)}; and your own, [name=value; name=value]")
    source.on_argument(sub)


def run(args, begin) -> None:
    from tqdm import tqdm

    from ...editor import LifelongEditor
    from ...methods import read
    from ...methods.nmke import NMKEHyperParams
    from ..methods import changed
    from ..protocol import Progress

    given = {"model_name": args.model, "device": args.device}
    base = changed(read(args.hparams), {name: value for name, value in given.items() if value is not None})
    if not isinstance(base, NMKEHyperParams):
        raise ValueError(f"{args.hparams} is of {base.alg_name}, and the settings are NMKE's; give one of its files")
    if base.blue or base.value_norm != "free":
        raise ValueError(
            f"{args.hparams} has blue: {base.blue} and value_norm: {base.value_norm}, by which values depend on edits before them, "
            "and here they are found once for all; set blue: false and value_norm: free"
        )
    hparams = _settings(base, args.only)
    small = base.model_name == "atlas"
    edits, seeds = args.edits or (200 if small else 50), args.seeds or (3 if small else 1)
    data = args.data or ("atlas" if small else "facts")
    editor = LifelongEditor.from_hparams(base)
    content = {name: value for name, value in base.to_dict().items() if name not in ("device", "stats_dir")}
    settings = {"name": content["model_name"], "hparams": content, "edits": edits, "seeds": seeds, "data": data}
    notebook = begin(settings, editor.model)
    todo = {seed: [name for name in hparams if (name, seed) not in notebook.found] for seed in range(seeds)}
    left = [(base, hparams, data, edits, seed, names) for seed, names in todo.items() if names]
    events = _on_cluster(args, left) if args.on else (event for each in left for event in _seed(*each, args.out, editor))
    total, there = seeds * len(hparams) * edits, sum(len(hparams) - len(names) for names in todo.values())
    with tqdm(total=total, initial=there * edits, desc="settings", unit="edit", smoothing=0.02) as bar, closing(events):
        for event in events:
            if isinstance(event, Progress):
                bar.update(event.more)
            else:
                name, seed = event.line["key"]
                bar.set_postfix_str(name)
                notebook.once(name, seed, make=lambda event=event: event.line)


def _settings(base, only: str | None) -> dict[str, Any]:
    """Label -> `base` with what a list of SETTINGS and of [name=value; name=value] changes, the default first. ValueError for what
    cannot be read, and for settings that values depend on, which are solved once for all."""
    from ...methods.located import KeyValueHyperParams
    from ..methods import changed, named, separate

    found = {DEFAULT: base}
    shared = {field.name for field in fields(KeyValueHyperParams)} - {"batch_size"} | {"blue"}
    for label in separate(only) if only else SETTINGS:
        name, changes = named(DEFAULT + label if label.startswith("[") else label)
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name!r}; settings are {', '.join(SETTINGS)}, and your own, [name=value]")
        if fixed := shared & changes.keys():
            given = ", ".join(sorted(fixed))
            raise ValueError(
                f"{label!r} changes {given}, and all settings write the same values; change it in the file of --hparams"
            )
        found[label] = changed(base, {**SETTINGS[name], **changes}, f"setting {label}")
    return found


def _on_cluster(args, left: Sequence[tuple]):
    """A task for each seed."""
    from ..cluster import cluster, gpus_of, placed
    from ..methods import changed
    from ..pieces import Piece, on_cluster

    pieces, gpus = [], 0
    for base, hparams, data, edits, seed, names in left:
        gpus, where = gpus_of(base), placed(base)
        own = {name: changed(setting, where) for name, setting in hparams.items()}
        run = partial(_seed, changed(base, where), own, data, edits, seed, names)
        pieces.append(Piece(run, args.out, f"found/seed-{seed}", (Path(data),) if Path(data).is_file() else ()))
    if pieces:
        with cluster(args.on) as machines:
            yield from on_cluster(machines, pieces, gpus)


def _seed(base, hparams: Mapping[str, Any], data: str, edits: int, seed: int, names: Sequence[str], folder: Path, editor=None):
    """The events of one stream: a result for each of `names`, settings that were not tried on it yet. editor: opened already; a
    worker of a cluster opens its own, and keeps the results for who goes on when it is lost."""
    from ...editor import LifelongEditor
    from ...files import write_json
    from ..pieces import records
    from ..protocol import Progress, Result

    found, keeps = folder / "found" / f"seed-{seed}", editor is None
    editor = editor or LifelongEditor.from_hparams(base)
    stream = _Stream(editor, records(data, folder), edits, seed, found, hparams.values())
    earlier = keeps and (found / "lines.json").is_file()
    lines = json.loads((found / "lines.json").read_text(encoding="utf-8")) if earlier else {}
    for name in names:
        if name in lines:
            yield Progress(len(stream.requests))
        else:
            lines[name] = yield from stream.edited(hparams[name])
            if keeps:
                write_json(found / "lines.json", lines)
        yield Result({"key": [name, seed], **lines[name]})


class _Stream:
    """The requests of one seed, and what the unedited model makes of them: scores, values, attributions by every strategy that the
    settings ask for. The latter two are kept in `folder` as they are found."""

    def __init__(self, editor, data: str, edits: int, seed: int, folder: Path, settings: Iterable):
        from ...models.arch import ModelView
        from ...scores import metrics
        from ...scores.kept import KeptText
        from ..stream import stream

        self.editor, self.view, self.folder = editor, ModelView(editor.model), folder
        self.requests = stream(editor, data, edits, seed).requests
        self.separator = editor.hparams.target_separator
        self.before = metrics.quality(editor.model, editor.tok, self.requests, separator=self.separator)
        self.kept = KeptText(editor.model, editor.tok)
        self.values = self._found("values", {}, lambda some: {"z": self._values(some)})
        editor.state.follow(editor.method.matrices(editor.model, editor.hparams))
        asked = {key: hparams for hparams in settings if (key := _strategy(hparams)) is not None}
        self.attributions = {
            key: self._found("-".join(key), {"strategy": key}, lambda some, hparams=hparams: self._scores(some, hparams))
            for key, hparams in asked.items()
        }

    def _values(self, some: Sequence):
        """z of some requests, [requests, D]."""
        import torch

        from ...methods.values import target_values
        from ...models.arch import editing

        hparams, templates = self.editor.hparams, self.editor.state.flat_templates
        with editing(self.editor.model):
            values = target_values(self.view, self.editor.tok, some, templates, hparams.layers[-1], hparams)
        return torch.stack([value.z for value in values])

    def _scores(self, some: Sequence, hparams) -> dict:
        """Layer, as a text -> scores [requests, templates, F]."""
        from ...methods.nmke import attributed
        from ...models.arch import editing

        editor, templates = self.editor, self.editor.state.flat_templates
        with editing(editor.model):
            found = attributed(self.view, editor.tok, some, templates, hparams, editor.state)
        return {str(layer): scores.view(len(some), len(templates), -1) for layer, scores in found.items()}

    def _found(self, name: str, more: Mapping, make: Callable[[Sequence], Mapping]) -> dict:
        """Tensors [requests, ...] by name, made of a few requests at a time; "seconds": what that took."""
        import time

        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file
        from tqdm import tqdm

        from ...files import whole
        from ...models.passes import chunks
        from .attributing import holds

        parts = []
        for number, some in enumerate(tqdm(list(chunks(self.requests, AT_A_TIME)), desc=name, unit="batch", leave=False)):
            file, mark = self.folder / name / f"{number:04}.safetensors", self._mark(some, more)
            if not holds(file, mark):
                started = time.perf_counter()
                made = {key: tensor.float().cpu().contiguous() for key, tensor in make(some).items()}
                made["seconds"] = torch.tensor([time.perf_counter() - started])
                with whole(file) as temporary:
                    save_file(made, temporary, metadata={"of": mark})
            with safe_open(file, "pt") as stored:
                parts.append({key: stored.get_tensor(key) for key in tuple(stored.keys())})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _mark(self, requests: Sequence, more: Mapping) -> str:
        """What is found depends on this."""
        import hashlib

        from ...models.updates import model_digest

        hparams = {name: value for name, value in self.editor.hparams.to_dict().items() if name not in ("device", "stats_dir")}
        asked = [(request.prompt, request.subject, request.target_new) for request in requests]
        return hashlib.sha256(json.dumps([hparams, more, asked, model_digest(self.editor.model)]).encode()).hexdigest()

    def edited(self, hparams) -> Generator[Any, None, dict]:
        """Scores after all edits with one setting; the model is put back. Yields its progress."""
        from ...methods import open_state
        from ...methods.contract import apply_method
        from ...scores import metrics
        from ..protocol import Progress
        from ..tune.bed import unedited_afterwards

        editor, method = self.editor, self.editor.method
        state = open_state(editor.model, editor.tok, hparams, progress=False)
        with unedited_afterwards(editor.model, method.matrices(editor.model, hparams)):
            for start in range(0, len(self.requests), hparams.batch_size):
                some = slice(start, start + hparams.batch_size)
                replay = partial(method.replay, z=self.values["z"][some].T, scores=self.scores(hparams, some))
                apply_method(method, editor.model, editor.tok, self.requests[some], hparams, state=state, edit=replay)
                yield Progress(len(self.requests[some]))
            after = metrics.quality(editor.model, editor.tok, self.requests, separator=self.separator)
            kept = self.kept.score(editor.model, editor.tok)
        reports, attributing = state.reports, self.attributions.get(_strategy(hparams))
        seconds = {phase: sum(r.seconds.get(phase, 0.0) for r in reports) / len(self.requests) for phase in reports[0].seconds}
        if attributing is not None:
            seconds["attribution"] = attributing["seconds"].sum().item() / len(self.requests)
        scores = {name: value for name, value in metrics.summary(self.before, after).items() if value is not None}
        density = fmean(share for report in reports for share in report.density.values())
        solving = sum(seconds.values()) - seconds.get("values", 0.0)
        return {**scores, **kept, "density": density, "phases": seconds, "seconds": solving}

    def scores(self, hparams, some: slice) -> dict | None:
        """Layer -> scores [requests x templates, F] of the setting's strategy; None where none were found beforehand."""
        device, found = self.view.device, self.attributions.get(_strategy(hparams))
        if found is None:
            return None
        return {int(layer): scores[some].flatten(0, 1).to(device) for layer, scores in found.items() if layer != "seconds"}


def _strategy(hparams) -> tuple[str, ...] | None:
    """What its attributions depend on, of what settings change; of SELDOM, what is not as published. None for a setting without
    any, and for ALIGN: an edit finds it by itself, of the values and the model that it has before it."""
    if not hparams.attributes_beforehand:
        return None
    seldom = [(getattr(hparams, field.name), field.default) for field in fields(hparams) if field.name in SELDOM]
    unusual = [value for value, published in seldom if value != published]
    return hparams.attribution_strategy, f"{hparams.amplification:g}", *unusual


# ---- what the lines hold


def _scored(lines: Sequence[Mapping]) -> dict[str, dict[str, list[float]]]:
    """Setting -> score -> its values, a seed each."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines[1:]:
        for name in SCORES:
            if line.get(name) is not None:
                found.setdefault(line["key"][0], {}).setdefault(name, []).append(line[name])
    return found


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


def tables(lines: Sequence[Mapping]) -> list[Table]:
    head = lines[0]["settings"]
    rows = [(label, *(_cell(scores.get(name)) for name in SCORES)) for label, scores in _scored(lines).items()]
    title = f"{head['name']} after {head['edits']} edits of {head['data']}, the same values written; s/edit without the values"
    return [Table(title, ("setting", *SCORES.values()), rows)]


def _against(lines: Sequence[Mapping], label: str, name: str) -> tuple[float, float | None]:
    """Mean difference to the default over seeds, and its standard error."""
    of = {(line["key"][0], line["key"][1]): line.get(name) for line in lines[1:]}
    pairs = [of[at, seed] - of[DEFAULT, seed] for at, seed in of if at == label and (DEFAULT, seed) in of]
    return fmean(pairs), stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None


def _balance(lines: Sequence[Mapping]) -> dict[str, float]:
    """Setting -> the harmonic mean of its Rel, Gen and Loc, the highest first."""
    means = {
        label: 3 / sum(1 / max(fmean(scores[name]), 1e-9) for name in ("rel", "gen", "loc"))
        for label, scores in _scored(lines).items()
        if all(name in scores for name in ("rel", "gen", "loc"))
    }
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


def _differences(lines: Sequence[Mapping], label: str) -> str:
    """Of Rel, Gen and Loc to the default's."""
    told = []
    there = _scored(lines)[label]
    for name in (name for name in ("rel", "gen", "loc") if name in there):
        mean, error = _against(lines, label, name)
        told.append(f"{SCORES[name].split()[0]} {mean:+.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    return ", ".join(told)


def said(lines: Sequence[Mapping]) -> list[str]:
    found, text, balance = _scored(lines), [], _balance(lines)
    if balance:
        best = next(iter(balance))
        others = "" if best == DEFAULT else f"; the default's {balance[DEFAULT]:.3f}"
        text.append(f"The highest harmonic mean of Rel, Gen and Loc is that of {best}: {balance[best]:.3f}{others}.")
    if "random mask" in found:
        text.append(f"The random mask of the same density, against the default: {_differences(lines, 'random mask')}.")
    if told := [f"{label}: {_differences(lines, label)}" for label in CLAIMED if label in found]:
        text.append(f"What the paper tells apart, against the default: {'; '.join(told)}.")
    times = {label: fmean(found[label]["seconds"]) for label in (DEFAULT, "PSA", "MPC", "no mask (AlphaEdit)") if label in found}
    text.append(f"Seconds an edit without the values: {', '.join(f'{label} {value:.2f}' for label, value in times.items())}.")
    if lines[0]["settings"]["seeds"] == 1:
        text.append("One stream cannot tell a difference from chance.")
    return text


def figure(lines: Sequence[Mapping]):
    """A row for each setting, a panel for each score; the default as a line."""
    from .drawing import COLOURS, headline, np
    from .drawing import figure as made

    found = _scored(lines)
    if DEFAULT not in found:
        return None
    labels = {label: fill(label, 32) for label in found}
    drawn = made(0.27 * sum(text.count("\n") + 1 for text in labels.values()) + 1.3)
    scores = {name: title for name, title in SCORES.items() if name in found[DEFAULT]}  # data may bring no paraphrases
    for ax, (name, title) in zip(drawn.subplots(1, len(scores), sharey=True), scores.items(), strict=True):
        for place, label in enumerate(labels):
            values = found[label].get(name)
            if values:
                error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
                control = label in ("random mask", "no mask (AlphaEdit)")
                colour = COLOURS[6] if label == DEFAULT else COLOURS[1] if control else COLOURS[0]
                ax.errorbar([fmean(values)], [place], xerr=[error], fmt="o", color=colour, markersize=4.5, capsize=2)
        ax.axvline(fmean(found[DEFAULT][name]), color="#999999", linewidth=1, zorder=0)
        ax.set_yticks(np.arange(len(labels)), labels.values())
        ax.set_title(title)
        ax.margins(x=0.15)
    drawn.axes[0].invert_yaxis()
    head = lines[0]["settings"]
    balance = _balance(lines)
    shown = dict.fromkeys(label for label in [next(iter(balance), None), DEFAULT, "random mask"] if label in balance)
    told = ", ".join(f"{label} {balance[label]:.2f}" for label in shown)
    headline(drawn, f"{head['name']} after {head['edits']} edits, harmonic mean of Rel, Gen and Loc: {told} (line: the default; "
                    "orange: controls)")  # fmt: skip
    return drawn


ANALYSIS = Analysis(
    "settings",
    "a dozen settings beside the default, sharing target values and attributions, so that each costs a solve",
    "nmke analyze settings --hparams NMKE/atlas --edits 200 --seeds 3 --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "After 2000 edits, the dynamic ratio is best on Rel and Gen, general neurons alone on locality (Figure 6); overlapping neurons "
    "alone keep most and write least (Table 3); a soft mask loses locality (Table 4); LPS, PSA and MPC differ little, MPC costs "
    "almost nothing (Table 2).",
    "Grey line: the default. Dots on its other side than the arrow points are worse. Orange: a random mask of the same "
    "density and no "
    "mask at all; a setting that does not beat the random mask has not shown that the neurons it chose matter.",
)
