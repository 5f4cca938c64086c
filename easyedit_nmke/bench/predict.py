"""What edits will cost on devices that are not at hand, and whether a model fits: `formulas` at the figures of `cards`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..attribution.cached import CPU_SHARE, CUDA_SHARE
from ..statistics.covariance import STRIPS, SUMS
from .cards import HERE, Card, card_named
from .formulas import PHASES, Edit, Model, Texts, Work
from .machine import check_device
from .shapes import RANK, Shape, configuration, settings_of, shape_named

SHAPES = ("llama3-8b", "llama3-70b", "qwen2.5-7b", "gpt2-xl")
KEPT_FREE = 1e9  # bytes of a GPU's memory for its context and what allocation leaves unused
TOKENS_OF_A_TEXT = 175  # mean of the paragraphs that covariances are made of; SmolLM2's tokens


def predict(shapes: Sequence[str], cards: Sequence[str], past: int, dtype: str | None = None, device: str = "cpu") -> dict:
    """For each shape and card (`cards.card_named`) a result for every engine: NMKE with the attribution of either kind, AlphaEdit.
    past: edits made before; `thousand` are the first thousand. dtype: of the weights; by default bfloat16, and float32 on a CPU."""
    if dtype is not None:
        check_device("cpu", dtype if dtype != "float16" else "bfloat16")
    if HERE in cards:
        check_device(device, dtype or "float32")
    known = {name: card_named(name, device) for name in cards}
    results = []
    for name, shape in {name: shape_named(name) for name in shapes}.items():
        plain, samples = edit_of(shape, past, dtype or "bfloat16", None, True), settings_of(shape)["mom2_n_samples"]
        for short, card in known.items():
            cuda = short != HERE or device.startswith("cuda")
            edit = replace(plain, cuda=cuda, dtype=dtype or ("bfloat16" if cuda else "float32"))
            results += [{"shape": name, "card": short, **r} for r in _engines(edit, samples, card)]
    return {
        "what": f"predicted, not measured: one request an edit, {past} past edits, {RANK:.0%} of directions protected",
        "cards": {name: _told(card) for name, card in known.items()},
        "notes": [],
        "results": results,
    }


def edit_of(shape: Shape, past: int, dtype: str, backend: str | None, cuda: bool, texts: Texts | None = None) -> Edit:
    """An edit of a shape, with the settings of its file."""
    model = Model.of(configuration(shape))
    steps, rank = settings_of(shape)["v_num_grad_steps"], round(RANK * model.neurons)
    return Edit(model, texts or Texts.usual(), shape.layers, steps, past, rank, dtype, backend, cuda)


def _engines(plain: Edit, samples: int, card: Card) -> list[dict]:
    """What AlphaEdit's edit and NMKE's take on a card."""
    covariance = sum(part.seconds(card) for part in _covariance(plain, samples))
    room = card.memory - (KEPT_FREE if plain.cuda else 0)
    found = []
    for name, backend in (
        ("NMKE, fused" if plain.cuda else "NMKE, fast", "fused"),
        ("NMKE, cached", "cached"),
        ("AlphaEdit", None),
    ):
        edit = replace(plain, backend=backend)
        if backend == "cached" and len(edit.layers) * edit.cached() > (CUDA_SHARE if edit.cuda else CPU_SHARE) * card.memory:
            continue  # `attribution_backend: auto` does not choose it
        work = edit.work()
        seconds = {phase: part.seconds(card) for phase, part in work.items()}
        ends = [sum(part.seconds(card) for part in replace(edit, past=past).work().values()) for past in (0, 1000)]
        found.append(
            {
                "engine": name, "dtype": edit.dtype, "at": edit.past, "total": sum(seconds.values()), "seconds": seconds,
                "thousand": 500 * sum(ends), "work": {phase: vars(part) for phase, part in work.items()},
                "held": edit.held(), "memory": edit.memory(), "peak": edit.peak(), "devices": math.ceil(edit.peak() / room),
                "covariance": covariance,
            }
        )  # fmt: skip
    return found


def _covariance(edit: Edit, samples: int) -> list[Work]:
    """Of the texts' passes through the model, as many as its sums need, and of the sums of keys: in float32, which
    multiplies as TF32 what was 16-bit."""
    m, tokens = edit.model, samples * TOKENS_OF_A_TEXT
    share = (1 + 1 / STRIPS) / 2
    passes = math.ceil(len(edit.layers) * share * 4 * m.neurons**2 / SUMS)
    through = 2 * tokens * passes * (edit.layers[-1] + 1) * (m.attention + m.ffn)
    precision = "float32" if edit.dtype == "float32" else "tf32"
    return [Work(edit.dtype, through), Work(precision, len(edit.layers) * 2 * share * tokens * m.neurons**2)]


def _told(card: Card) -> dict:
    return {**vars(card), "rates": dict(card.rates)}


LEGEND = (
    "Predicted from counts, not measured. cards: how many hold the model and its edits (they compute one after the other). "
    "GB: most memory, all cards together. 1000 edits: the first thousand, one after the other, without scoring. covariance: of the "
    "keys, once for a model (eigenvectors not counted)."
)  # fmt: skip


def rows(content: Mapping) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of what `predict` gives."""
    headings = ["shape", "card", "engine", "cards", "GB", "edit ms", "1000 edits", *PHASES, "covariance"]
    body = []
    for r in content["results"]:
        cells = [r["shape"], content["cards"][r["card"]]["name"], r["engine"], str(r["devices"]), f"{r['peak'] / 1e9:.1f}"]
        cells += [f"{1000 * r['total']:.0f}", _duration(r["thousand"])]
        cells += [f"{1000 * r['seconds'][name]:.1f}" if name in r["seconds"] else "-" for name in PHASES]
        body.append([*cells, _duration(r["covariance"])])
    return headings, body


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
