"""Edits as one small file: the factors of every update, to be written into the base model again, to the bit.

Factors are those of `updates.Update`: w_out [D, F] of a layer += left [D, k] · right [k, F], one update after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.arch import ModelView
from ..models.updates import Update, accumulate, fingerprint

FILE = "delta.safetensors"
_FORMAT = "easyedit_nmke delta 1"


def joined(updates: Sequence[Update]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """layer -> (left [D, R], right [R, F]) of all its updates, on the CPU; their product is the layer's whole change.

    ValueError when there are none.
    """
    if not updates:
        raise ValueError(
            "there are no update factors to export: no edit was made, or the method trains the weights themselves (FT); "
            "export the whole model (--to model)"
        )
    by_layer: dict[int, list[Update]] = {}
    for update in updates:
        by_layer.setdefault(update.layer, []).append(update)
    return {
        layer: (torch.cat([u.left for u in mine], 1).cpu(), torch.cat([u.right for u in mine]).cpu())
        for layer, mine in sorted(by_layer.items())
    }


def save_delta(
    file: Path, model, updates: Sequence[Update], originals: Mapping[int, torch.Tensor], about: Mapping[str, object]
) -> None:
    """The factors of all updates, masked neurons left out, for `load_delta`.

    model: as edited. updates: as they were added. originals: layer -> w_out [D, F] before the first of them. about: plain data that
    the file carries along; its "base" names the base model.
    """
    view, tensors, layers = ModelView(model), {}, {}
    for layer, (left, right) in joined(updates).items():
        tensors |= {f"{layer}.left": left, **_packed(layer, right)}
        layers[layer] = {
            "parameter": view.weight_name(layer),
            "shape": list(originals[layer].shape),
            "dtype": short(originals[layer].dtype),
            "before": _hash(originals[layer]),
            "after": _hash(view.w_out(layer)),
        }
    hashes = {name: _hash(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": _FORMAT, **about, "layers": layers, "tensors": hashes})
    save_file(tensors, file, metadata={"delta": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


@torch.no_grad()
def load_delta(model, path: str | Path) -> dict[str, torch.Tensor]:
    """Write an exported delta into its base model: the bits of the edited one. Returns the parameters as they were, by name.

    path: the exported folder, or its `delta.safetensors`. ValueError, before anything changes, for a file that is none or is
    damaged, and for a model whose parameters are not those that were edited. When anything fails, the model is as it was.
    """
    view, (content, updates) = ModelView(model), _read(Path(path))
    layers = {int(layer): entry for layer, entry in content["layers"].items()}
    problems = [problem for layer, entry in layers.items() if (problem := _mismatch(view, layer, entry))]
    if problems:
        raise ValueError(f"{path} does not belong to this model (it was made from {content['base']}):\n  " + "\n  ".join(problems))
    changed = {}
    for layer, entry in layers.items():
        changed[layer] = torch.empty_like(view.w_out(layer))
        accumulate(changed[layer], view.w_out(layer), [updates[layer]])
        if (got := _hash(changed[layer])) != entry["after"]:
            raise ValueError(f"{path}: its updates give {entry['parameter']} the fingerprint {got}, expected {entry['after']}")
    originals = {entry["parameter"]: view.weight(layer).detach().clone() for layer, entry in layers.items()}
    for layer, weight in changed.items():
        view.w_out(layer).copy_(weight)
    return originals


def short(dtype: torch.dtype) -> str:
    """Without the "torch."."""
    return str(dtype).removeprefix("torch.")


def _hash(tensor: torch.Tensor) -> str:
    return f"{fingerprint({0: tensor}):016x}"


def _read(path: Path) -> tuple[dict, dict[int, Update]]:
    """The description of a delta, and all updates of each layer as one."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no delta at {path}; give the folder that `nmke export --to delta` made")
    try:
        with safe_open(path, "pt") as file:
            text, digest = (file.metadata()[name] for name in ("delta", "sha256"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no delta ({error})") from None
    content = json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == digest else {}
    if content.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{path} has the format {content['format']!r}, expected {_FORMAT!r}; export it with this version")
    if not content or content["tensors"] != {name: _hash(tensor) for name, tensor in tensors.items()}:
        raise ValueError(f"{path} is damaged: it does not hold what was written; copy it again")
    layers = {int(layer): entry["shape"][1] for layer, entry in content["layers"].items()}
    return content, {i: Update(i, tensors[f"{i}.left"], _unpacked(i, tensors, neurons)) for i, neurons in layers.items()}


def _mismatch(view: ModelView, layer: int, entry: Mapping) -> str | None:
    """Why this layer's parameter is not the one that was edited, in words."""
    name, kind = entry["parameter"], entry["dtype"]
    if layer >= view.depth or view.weight_name(layer) != name:
        return f"{name}: the model has no such parameter"
    weight = view.w_out(layer)
    if list(weight.shape) != entry["shape"]:
        return f"{name}: shape {list(weight.shape)}, expected {entry['shape']}"
    if short(weight.dtype) != kind:
        return f"{name}: {short(weight.dtype)}, expected {kind}; load the model with dtype=torch.{kind}, cast it afterwards"
    got = _hash(weight)
    if got == entry["before"]:
        return None
    return f"{name}: " + ("these edits are in it" if got == entry["after"] else f"fingerprint {got}, expected {entry['before']}")


def _packed(layer: int, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """right [R, F] as the entries that are not +0.0 and a bit for each place, where that is smaller: an edit has up to half of its
    neurons masked. Lists of indices would only be smaller for masks that keep less than 1 neuron in 32."""
    kept = right.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[right.element_size()]) != 0
    values = right[kept]
    if values.nbytes + kept.numel() // 8 >= right.nbytes:
        return {f"{layer}.right": right}
    return {f"{layer}.values": values, f"{layer}.mask": torch.from_numpy(np.packbits(kept.numpy(), axis=1))}


def _unpacked(layer: int, tensors: Mapping[str, torch.Tensor], neurons: int) -> torch.Tensor:
    if f"{layer}.right" in tensors:
        return tensors[f"{layer}.right"]
    kept = torch.from_numpy(np.unpackbits(tensors[f"{layer}.mask"].numpy(), axis=1, count=neurons)).bool()
    values = tensors[f"{layer}.values"]
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)
