"""Edits as one small file: every update, to be written into the base model again, to the bit.

Updates are those of `models.updates`, of parameters as matrices [out, in], added one after the other. Neighbouring low-rank ones of
a parameter are stored as one.
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
from ..models.updates import KINDS, LowRank, Update, accumulate, hexadecimal, moved, of_parameter, tensors_of

FILE = "delta.safetensors"
_FORMAT, _OLD_FORMAT = "easyedit_nmke delta 2", "easyedit_nmke delta 1"  # the old one has one low-rank update for each layer


def joined(updates: Sequence[Update]) -> list[Update]:
    """The same changes by fewer updates, on the CPU: parameter after parameter, neighbouring low-rank ones as one. ValueError when
    there are none."""
    if not updates:
        raise ValueError(
            "there are no updates to export: no edit was made, or they were not kept (FT without keep_updates: true); "
            "export the whole model (--to model)"
        )
    found: list[Update] = []
    for name in sorted({update.parameter for update in updates}, key=_natural):
        run: list[Update] = []
        for update in (moved(update, "cpu") for update in of_parameter(updates, name)):
            if run and isinstance(update, LowRank) and isinstance(run[-1], LowRank):
                last = run.pop()
                left, right = torch.cat([last.left, update.left], 1), torch.cat([last.right, update.right])
                update = LowRank(name, left, right)
            run.append(update._replace(first=0))
        found += run
    return found


def save_delta(
    file: Path, model, updates: Sequence[Update], originals: Mapping[str, torch.Tensor], about: Mapping[str, object]
) -> None:
    """All updates, masked neurons left out, for `load_delta`.

    model: as edited. updates: as they were added. originals: name -> matrix [out, in] before the first of them. about: plain data
    that the file carries along; its "base" names the base model.
    """
    view, tensors, parts = ModelView(model), {}, joined(updates)
    for i, update in enumerate(parts):
        stored = tensors_of(update)
        if isinstance(update, LowRank):
            stored = {"left": update.left, **_packed(update.right)}
        tensors |= {f"{i}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    weights = {
        name: {
            "shape": list(originals[name].shape),
            "dtype": short(originals[name].dtype),
            "before": _hash(originals[name]),
            "after": _hash(view.matrix(name)),
        }
        for name in dict.fromkeys(update.parameter for update in parts)
    }
    made = [{"parameter": update.parameter, "kind": type(update).__name__.lower()} for update in parts]
    hashes = {name: _hash(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": _FORMAT, **about, "parameters": weights, "updates": made, "tensors": hashes})
    save_file(tensors, file, metadata={"delta": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


@torch.no_grad()
def load_delta(model, path: str | Path) -> dict[str, torch.Tensor]:
    """Write an exported delta into its base model: the bits of the edited one. Returns the parameters as they were, by name.

    path: the exported folder, or its `delta.safetensors`. ValueError, before anything changes, for a file that is none or is
    damaged, and for a model whose parameters are not those that were edited. When anything fails, the model is as it was.
    """
    view, (content, updates) = ModelView(model), _read(Path(path))
    weights = content["parameters"]
    problems = [problem for name, entry in weights.items() if (problem := _mismatch(view, name, entry))]
    if problems:
        raise ValueError(f"{path} does not belong to this model (it was made from {content['base']}):\n  " + "\n  ".join(problems))
    changed = {}
    for name, entry in weights.items():
        changed[name] = torch.empty_like(view.matrix(name))
        accumulate(changed[name], view.matrix(name), of_parameter(updates, name))
        if (got := _hash(changed[name])) != entry["after"]:
            raise ValueError(f"{path}: its updates give {name} the fingerprint {got}, expected {entry['after']}")
    originals = {name: model.get_parameter(name).detach().clone() for name in weights}
    for name, weight in changed.items():
        view.matrix(name).copy_(weight)
    return originals


def short(dtype: torch.dtype) -> str:
    """Without the "torch."."""
    return str(dtype).removeprefix("torch.")


def _natural(name: str) -> list:
    """Layer 9 before layer 10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _hash(tensor: torch.Tensor) -> str:
    return hexadecimal({0: tensor})


def _read(path: Path) -> tuple[dict, list[Update]]:
    """The description of a delta, and its updates."""
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
    if content.get("format", _FORMAT) not in (_FORMAT, _OLD_FORMAT):
        raise ValueError(f"{path} has the format {content['format']!r}, expected {_FORMAT!r}; export it with this version")
    if not content or content["tensors"] != {name: _hash(tensor) for name, tensor in tensors.items()}:
        raise ValueError(f"{path} is damaged: it does not hold what was written; copy it again")
    if content["format"] == _OLD_FORMAT:
        content |= _renewed(content["layers"])
    updates = []
    for i, made in zip(content.get("numbers") or range(len(content["updates"])), content["updates"], strict=True):
        parts = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(i)}
        if made["kind"] == "lowrank":
            parts = {"left": parts["left"], "right": _unpacked(parts, content["parameters"][made["parameter"]]["shape"][1])}
        updates.append(KINDS[made["kind"]](made["parameter"], **parts))
    return content, updates


def _renewed(layers: Mapping[str, Mapping]) -> dict:
    """What the old format says by layers, as the new one says it; `numbers` are those of the tensors."""
    made = [{"parameter": entry["parameter"], "kind": "lowrank"} for entry in layers.values()]
    return {"parameters": {entry["parameter"]: entry for entry in layers.values()}, "updates": made, "numbers": list(layers)}


def _mismatch(view: ModelView, name: str, entry: Mapping) -> str | None:
    """Why this parameter is not the one that was edited, in words."""
    kind = entry["dtype"]
    if name not in dict(view.model.named_parameters()):
        return f"{name}: the model has no such parameter"
    weight = view.matrix(name)
    if list(weight.shape) != entry["shape"]:
        return f"{name}: shape {list(weight.shape)}, expected {entry['shape']}"
    if short(weight.dtype) != kind:
        return f"{name}: {short(weight.dtype)}, expected {kind}; load the model with dtype=torch.{kind}, cast it afterwards"
    got = _hash(weight)
    if got == entry["before"]:
        return None
    return f"{name}: " + ("these edits are in it" if got == entry["after"] else f"fingerprint {got}, expected {entry['before']}")


def _packed(right: torch.Tensor) -> dict[str, torch.Tensor]:
    """right [R, F] as the entries that are not +0.0 and a bit for each place, where that is smaller: an edit has up to half of its
    neurons masked. Lists of indices would only be smaller for masks that keep less than 1 neuron in 32."""
    kept = right.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[right.element_size()]) != 0
    values = right[kept]
    if values.nbytes + kept.numel() // 8 >= right.nbytes:
        return {"right": right}
    return {"values": values, "mask": torch.from_numpy(np.packbits(kept.numpy(), axis=1))}


def _unpacked(tensors: Mapping[str, torch.Tensor], neurons: int) -> torch.Tensor:
    if "right" in tensors:
        return tensors["right"]
    kept = torch.from_numpy(np.unpackbits(tensors["mask"].numpy(), axis=1, count=neurons)).bool()
    values = tensors["values"]
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)
