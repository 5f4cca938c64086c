"""Old knowledge: the row space of the covariance of keys (AlphaEdit, NMKE), cached, or from EasyEdit's projector file.

Memory: `eigh` of F neurons needs 4·F² numbers (the matrix, its eigenvectors, LAPACK's or cuSOLVER's workspace of 2·F²): 3.3 GB
at 14336 in float32, one layer at a time; each layer's file is written before the next is begun.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..models.arch import ModelView
from ..models.updates import hexadecimal
from .covariance import cache_directory, each_moment, moment_files, own_file, save
from .making import Making, making_of, seconds_of

logger = logging.getLogger(__name__)


class RowSpace(NamedTuple):
    """Where old keys lie: eigenvectors U [F, r] of E[c cᵀ], their eigenvalues [r], and E||P c||² = the sum of the other
    eigenvalues, P = I - U Uᵀ. Eigenvalues and energy are NaN where only a projector is known. null: the other eigenvectors V
    [F, F - r], P = V Vᵀ, where they are fewer; else [F, 0]."""

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    energy: torch.Tensor
    null: torch.Tensor


def row_spaces(
    view: ModelView, tok, hparams, progress: bool = True, spent: MutableMapping[str, float | None] | None = None
) -> dict[int, RowSpace]:
    """layer -> what updates must not touch, or not lightly.

    From EasyEdit's projector file when `P_loc` exists, else (with a warning where P_loc names none) from the covariance of keys
    over `mom2_dataset`, cached on disk with all its eigenvectors, so that another threshold or fraction needs no `eigh`. The log
    tells how many directions of each layer that protects. spent: told the seconds of the "covariance" and the "null space", as they
    were when these were made; None where that is not known.
    """
    spent = {} if spent is None else spent
    if hparams.P_loc is not None and Path(hparams.P_loc).is_file():
        spent["null space"] = None
        return _told(_from_projector(view, hparams))
    if hparams.P_loc is not None:
        logger.warning("P_loc %s does not exist: the null space is computed from %s instead", hparams.P_loc, hparams.mom2_dataset)
    moments = moment_files(view, tok, hparams)
    files = {layer: _eigen_file(layer, file, hparams) for layer, file in moments.items()}
    missing = {layer: moments[layer] for layer, file in files.items() if not file.is_file()}
    unsaved: dict[int, dict[str, torch.Tensor]] = {}
    summed = {layer: making_of(file) for layer, file in moments.items()}
    cut = {layer: making_of(file) for layer, file in files.items()}
    for layer, moment in each_moment(view, tok, hparams, missing, progress, summed):
        kept, cut[layer] = _decompose(moment, files[layer])
        if kept:
            unsaved[layer] = kept
    spent.update({"covariance": seconds_of(summed.values()), "null space": seconds_of(cut.values())})
    spaces = {}
    for layer in hparams.layers:
        found = _cut(unsaved.pop(layer), hparams) if layer in unsaved else _cached(files[layer], hparams)
        spaces[layer] = RowSpace(*(tensor.to(view.weight(layer).device) for tensor in found))
    return _told(spaces)


def row_space_files(view: ModelView, tok, hparams) -> dict[int, Path]:
    """layer -> the file that `row_spaces` has read, or left: none with a projector, nor where the cache could not be written."""
    if hparams.P_loc is not None and Path(hparams.P_loc).is_file():
        return {}
    files = {layer: _eigen_file(layer, file, hparams) for layer, file in moment_files(view, tok, hparams).items()}
    return {layer: file for layer, file in files.items() if file.is_file()}


def read_row_space(file: Path, digest: str, hparams) -> RowSpace:
    """From one of `row_space_files`, wherever `stats_dir` is now. ValueError when it is not there, or `space_digest` is another."""
    found = next((place for place in (file, cache_directory(hparams) / file.name) if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"{file}, which this state of edits was begun with, is not there; put it back, or set stats_dir to its folder"
        )
    try:
        space = _read(found, hparams)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{found} cannot be read ({error}); put back the file that this state of edits was begun with") from None
    if space_digest(space) != digest:
        raise ValueError(f"{found} is not the file that this state of edits was begun with; put that back")
    return space


def space_digest(space: RowSpace) -> str:
    """Of its bits, in hexadecimal."""
    return hexadecimal(space._asdict())


def _told(spaces: dict[int, RowSpace]) -> dict[int, RowSpace]:
    for layer, space in spaces.items():
        logger.info("layer %d: %d of %d directions protected", layer, *reversed(space.basis.shape))
    return spaces


def check_protection(spaces: Mapping[int, RowSpace], hparams) -> None:
    """ValueError where edits could write nothing (a hard null space that protects every direction) or nothing is protected."""
    given = hparams.P_loc is not None and Path(hparams.P_loc).is_file()
    soft = getattr(hparams, "regularizer", None) == "covariance"
    if given and (soft or getattr(hparams, "l2_scale", None) == "auto"):
        return  # neither works with a projector at all, whatever it protects
    name = "P_loc" if given else "nullspace_threshold" if hparams.nullspace_fraction is None else "nullspace_fraction"
    for layer, space in spaces.items():
        neurons, protected = space.basis.shape
        if 0 < protected < neurons or (protected and soft):
            continue
        what = "an edit could write nothing" if protected else "an edit could change all that the model knows"
        advice = f"{'raise' if protected else 'lower'} nullspace_threshold, or set nullspace_fraction to the share to leave free"
        raise ValueError(
            f"layer {layer}: {protected} of {neurons} directions are protected ({name} {getattr(hparams, name)}), so {what}; "
            + (f"remove P_loc, and {advice}" if given else advice)
        )


def row_space(moment: torch.Tensor, threshold: float, fraction: float | None = None) -> RowSpace:
    """The eigenvectors of E[c cᵀ] [F, F] whose eigenvalues are at least `threshold`; with `fraction`, those of the largest
    (1 - fraction)·F eigenvalues, which suits layers whose keys are of different sizes."""
    values, vectors = torch.linalg.eigh(moment)  # ascending
    first = _first(values, threshold, fraction)
    return _above(values, vectors[:, first:], vectors[:, : _fewer(first, len(values))], first)


def _decompose(moment: torch.Tensor, file: Path) -> tuple[dict[str, torch.Tensor], Making]:
    """Write the eigenvalues, ascending [F], and the eigenvectors in rows [F, F]; they are returned only if that failed.

    In float32 whatever `mom2_dtype` is: float64 would need 6.6 GB at 14336 neurons.
    """
    started = time.perf_counter()
    values, vectors = torch.linalg.eigh(moment.float())
    making = Making.since(started)
    tensors = {"eigenvalues": values.cpu(), "eigenvectors": vectors.T.contiguous().cpu()}
    return {} if save(file, tensors, making.metadata()) else tensors, making


def _first(values: torch.Tensor, threshold: float, fraction: float | None) -> int:
    """Index of the first protected eigenvalue."""
    return int((values < threshold).sum()) if fraction is None else round(fraction * len(values))


def _fewer(first: int, count: int) -> int:
    """How many eigenvectors of the null space to keep: all `first` where they are fewer than the others, else none."""
    return first if first < count - first else 0


def _above(values: torch.Tensor, basis: torch.Tensor, null: torch.Tensor, first: int) -> RowSpace:
    energy = values[:first].clamp(min=0).sum()
    return RowSpace(basis.contiguous(), values[first:].clamp(min=0), energy, null.contiguous())


def _cut(stored: Mapping, hparams) -> RowSpace:
    """From `_decompose`'s tensors, or from slices of its file, of which only the rows asked for are read."""
    values, rows = stored["eigenvalues"][:], stored["eigenvectors"]
    first = _first(values, hparams.nullspace_threshold, hparams.nullspace_fraction)
    return _above(values, rows[first:].T, rows[: _fewer(first, len(values))].T, first)


def _cached(file: Path, hparams) -> RowSpace:
    try:
        return _read(file, hparams)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{file} holds no eigenvectors of a covariance ({error}); delete it, and it will be made again") from None


def _read(file: Path, hparams) -> RowSpace:
    with safe_open(file, "pt") as content:
        return _cut({name: content.get_slice(name) for name in content.keys()}, hparams)  # noqa: SIM118


def _eigen_file(layer: int, moment: Path, hparams) -> Path:
    """Named by the covariance that it is of: of ours the name tells all, of EasyEdit's its place, size and time."""
    parts = [moment.name]
    if moment.suffix == ".npz":
        parts = [str(moment.resolve()), moment.stat().st_size, moment.stat().st_mtime_ns]
    return own_file("eigenvectors", layer, parts, hparams)


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
        first = int((values <= 0.5).sum())
        space = _above(values, vectors[:, first:], vectors[:, : _fewer(first, neurons)], first)
        unknown = {name: torch.full_like(getattr(space, name), torch.nan) for name in ("eigenvalues", "energy")}
        bases[layer] = space._replace(**unknown)
    return bases
