"""Old knowledge: the covariance of keys over a text (MEMIT, ROME), its row space (AlphaEdit, NMKE), and a cache on disk.

Memory: one [F, F] float32 covariance per layer on the layer's device (14336 neurons: 822 MB each).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from . import atlas
from .arch import ModelView
from .hooks import record
from .prompts import encode, pad
from .updates import fingerprint

logger = logging.getLogger(__name__)

LONGEST_TEXT = 512
TOKENS_AT_A_TIME = 4096


class RowSpace(NamedTuple):
    """Where old keys lie: eigenvectors U [F, r] of E[c cᵀ], their eigenvalues [r], and E||P c||² = the sum of the other
    eigenvalues, P = I - U Uᵀ. Eigenvalues and energy are NaN where only a projector is known."""

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    energy: torch.Tensor


def row_spaces(view: ModelView, tok, hparams, progress: bool = True) -> dict[int, RowSpace]:
    """layer -> what updates must not touch, or not lightly.

    From EasyEdit's projector file when `P_loc` exists, else (with a warning where P_loc names none) from the covariance of keys
    over `mom2_dataset`, cached on disk.
    """
    if hparams.P_loc is not None and Path(hparams.P_loc).is_file():
        return _from_projector(view, hparams)
    if hparams.P_loc is not None:
        logger.warning("P_loc %s does not exist: the null space is computed from %s instead", hparams.P_loc, hparams.mom2_dataset)
    threshold, fraction = hparams.nullspace_threshold, hparams.nullspace_fraction

    def compute():
        kept = _cache_file("moment", view, hparams).is_file()  # by MEMIT or ROME; too large to keep for this alone
        known = (moments if kept else _covariances)(view, tok, hparams, progress)
        spaces = {layer: row_space(moment, threshold, fraction) for layer, moment in known.items()}
        return {f"{part}_{layer}": tensor for layer, space in spaces.items() for part, tensor in space._asdict().items()}

    stored = _cached(_cache_file("eigenvectors", view, hparams, threshold, fraction), compute)

    def on_device(layer: int) -> RowSpace:
        return RowSpace(*(stored[f"{part}_{layer}"].to(view.weight(layer).device) for part in RowSpace._fields))

    return {layer: on_device(layer) for layer in hparams.layers}


def moments(view: ModelView, tok, hparams, progress: bool = True) -> dict[int, torch.Tensor]:
    """layer -> E[c cᵀ] [F, F] float32 over `mom2_dataset`, of the model as it is now (cached on disk: F·F·4 bytes a layer)."""
    file = _cache_file("moment", view, hparams)
    stored = _cached(file, lambda: {str(layer): m for layer, m in _covariances(view, tok, hparams, progress).items()})
    return {layer: stored[str(layer)].to(view.weight(layer).device) for layer in hparams.layers}


def _covariances(view: ModelView, tok, hparams, progress: bool) -> dict[int, torch.Tensor]:
    texts = corpus(hparams.mom2_dataset, hparams.mom2_n_samples)
    if progress:
        texts = tqdm(texts, desc="covariance of keys", unit=" texts", leave=False)
    return covariances(view, tok, texts, hparams.layers)


def row_space(moment: torch.Tensor, threshold: float, fraction: float | None = None) -> RowSpace:
    """The eigenvectors of E[c cᵀ] [F, F] whose eigenvalues are at least `threshold`; with `fraction`, those of the largest
    (1 - fraction)·F eigenvalues, which suits layers whose keys are of different sizes."""
    values, vectors = torch.linalg.eigh(moment)  # ascending
    first = int((values < threshold).sum()) if fraction is None else round(fraction * len(values))
    return RowSpace(vectors[:, first:].contiguous(), values[first:].clamp(min=0), values[:first].clamp(min=0).sum())


@torch.no_grad()
def covariances(view: ModelView, tok, texts: Iterable[str], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """layer -> E[c cᵀ] [F, F] float32 over all tokens of `texts`; one pass serves all layers."""
    limit = min(view.context_length or LONGEST_TEXT, LONGEST_TEXT)
    wanted = {str(layer): (view.down(layer), "input") for layer in layers}
    sums: dict[int, torch.Tensor] = {}
    count = 0
    for batch in _batches(encode(tok, text)[:limit] for text in texts if text.strip()):
        tokens = pad(batch, tok, view.device)
        with record(wanted, stop=True) as seen:
            view.model.base_model(**tokens.inputs(), use_cache=False)
        for layer in layers:
            states = seen[str(layer)]
            keys = states[tokens.mask.bool().to(states.device)].float()
            if layer not in sums:
                sums[layer] = keys.new_zeros((keys.shape[1], keys.shape[1]))
            sums[layer].addmm_(keys.T, keys)
        count += int(tokens.mask.sum())
    if not count:
        raise ValueError("the text for the covariance of keys is empty; give mom2_dataset a file with text in it")
    return {layer: total / count for layer, total in sums.items()}


def _batches(rows: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in rows:
        widest = max(map(len, [*batch, row]))
        if batch and widest * (len(batch) + 1) > TOKENS_AT_A_TIME:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def corpus(source: str, samples: int) -> Iterable[str]:
    """Up to `samples` texts: "atlas" or "atlas-large", a text file (one per line), a JSON-lines file with a "text" field, or a
    Hugging Face dataset by name ("wikipedia", "wikitext", or a hub path)."""
    if source in atlas.SOURCES:
        return atlas.corpus(samples, world=atlas.SOURCES[source])
    path = Path(source)
    if path.is_file():
        return itertools.islice(_lines(path), samples)
    return itertools.islice(_hub_texts(source), samples)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)["text"] if path.suffix == ".jsonl" else line.strip()


def _hub_texts(source: str) -> Iterator[str]:
    known = {"wikipedia": ("wikimedia/wikipedia", "20231101.en"), "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1")}
    name, config = known.get(source, (source, None))
    advice = "set mom2_dataset to a text file, or P_loc to EasyEdit's null_space_project.pt"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"mom2_dataset is {source!r}: no such file, and reading it from the hub needs `pip install datasets`; or {advice}"
        ) from None
    try:
        rows = load_dataset(name, config, split="train", streaming=True)
    except Exception as error:
        raise ValueError(
            f"mom2_dataset {source!r} is neither a file nor a dataset that can be reached ({error}); {advice}"
        ) from None
    return (row["text"] for row in rows)


def _from_projector(view: ModelView, hparams) -> dict[int, RowSpace]:
    """EasyEdit's `null_space_project.pt`: P [layers, F, F]."""
    projectors = torch.load(hparams.P_loc, map_location="cpu", weights_only=True)
    neurons = view.w_out(hparams.layers[0]).shape[1]
    expected = (len(hparams.layers), neurons, neurons)
    if not isinstance(projectors, torch.Tensor) or tuple(projectors.shape) != expected:
        shape = tuple(getattr(projectors, "shape", ()))
        raise ValueError(f"{hparams.P_loc} holds shape {shape}, expected {expected}: one projector per layer in {hparams.layers}")
    bases = {}
    for layer, projector in zip(hparams.layers, projectors, strict=True):
        device = view.weight(layer).device
        values, vectors = torch.linalg.eigh(torch.eye(neurons, device=device) - projector.float().to(device))
        basis = vectors[:, values > 0.5].contiguous()
        bases[layer] = RowSpace(basis, basis.new_full(basis.shape[1:], torch.nan), basis.new_tensor(torch.nan))
    return bases


def cache_directory(hparams) -> Path:
    """`stats_dir`, else the user's cache."""
    if hparams.stats_dir:
        return Path(hparams.stats_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "easyedit_nmke"


def _cache_file(kind: str, view: ModelView, hparams, *limits: float | None) -> Path:
    """Named by everything that the statistics depend on: weights up to the last layer, text, samples, layers, and `limits`."""
    top = view.blocks[hparams.layers[-1]]
    below = {"embedding": view.model.get_input_embeddings().weight}
    for block in itertools.takewhile(lambda b: b is not top, view.blocks):
        below.update({f"{id(block)}.{name}": p for name, p in block.named_parameters()})
    below.update(dict(top.named_parameters()))
    source = Path(hparams.mom2_dataset)
    text = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else hparams.mom2_dataset
    parts = [fingerprint(below), text, list(hparams.layers), hparams.mom2_n_samples, *limits, LONGEST_TEXT]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return cache_directory(hparams) / f"{kind}_{name}.safetensors"


def _cached(file: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by name from `file` when it exists, else computed and kept there."""
    if file.is_file():
        return load_file(file)
    tensors = compute()
    _save(file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return tensors


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """All or nothing; a cache that cannot be written is only a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the statistics of keys were not cached in %s: %s", path.parent, error)
