"""Edited down projections wherever they are kept: a run's state, a delta, a file of parameters, a folder of a whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...history.delta import FILE, load_delta
from ...history.durable import find, history
from ...history.journal import Journal
from ...history.log import changes_of
from ...models.arch import ModelView
from ...models.updates import accumulate, hexadecimal, of_parameter


def base_of(path: Path) -> str | None:
    """The name of the model that was edited, as what is kept tells it; None where it does not."""
    if (file := _delta(path)) is not None:
        return json.loads(_metadata(file)["delta"]).get("base")
    with suppress(ValueError), Journal.open(find(path), write=False) as journal:
        return journal.header["hparams"]["model_name"]
    return None


@torch.no_grad()
def down_projections(path: Path, view: ModelView) -> dict[int, torch.Tensor]:
    """Block -> the edited down projection [D, F], of those that are not as in the base model of `view`; which is as before when
    this returns. ValueError for what holds no edited weights, or those of another model."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if (file := _delta(path)) is not None:
        found = _of_delta(file, view)
    elif path.is_file():
        found = _of_files([path], view)
    elif (path / "config.json").is_file():
        found = _of_files(sorted(path.glob("*.safetensors")), view)
    else:
        found = _of_state(find(path), view)
    changed = {layer: weight for layer, weight in found.items() if not torch.equal(weight, view.w_out(layer))}
    if not changed:
        raise ValueError(f"{path} holds no down projection that differs from the base model's")
    return changed


def _delta(path: Path) -> Path | None:
    file = path / FILE if path.is_dir() else path
    return file if file.is_file() and "delta" in _metadata(file) else None


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error})") from None


def _names(view: ModelView) -> dict[str, int]:
    return {view.weight_name(layer): layer for layer in range(view.depth)}


def _of_state(folder: Path, view: ModelView) -> dict[int, torch.Tensor]:
    with Journal.open(folder, write=False) as journal:
        known: Mapping[str, str] = journal.header["model"]["weights"]
        updates, names, found = changes_of(history(journal)[0]), _names(view), {}
    for name in sorted({update.parameter for update in updates} & set(names), key=names.__getitem__):
        if known.get(name) != hexadecimal({name: view.model.get_parameter(name)}):
            raise ValueError(f"{folder} holds edits of another model ({name} differs); give its base model by --model")
        found[names[name]] = torch.empty_like(view.matrix(name))
        accumulate(found[names[name]], view.matrix(name), of_parameter(updates, name))
    if not found and any(name not in known for name in names):
        raise ValueError(f"{folder} holds edits of another model (of other blocks); give its base model by --model")
    return found


def _of_delta(file: Path, view: ModelView) -> dict[int, torch.Tensor]:
    originals, names = load_delta(view.model, file), _names(view)
    try:
        return {names[name]: view.w_out(names[name]).clone() for name in originals if name in names}
    finally:
        for name, original in originals.items():
            view.model.get_parameter(name).data.copy_(original)


def _of_files(files: list[Path], view: ModelView) -> dict[int, torch.Tensor]:
    names, found = _names(view), {}
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in set(stored.keys()) & set(names):
                weight = view.oriented(name, stored.get_tensor(name))
                if weight.shape != view.w_out(names[name]).shape:
                    raise ValueError(f"{file} is of another model: {name} is {list(weight.shape)}, the base's is "
                                     f"{list(view.w_out(names[name]).shape)}")  # fmt: skip
                found[names[name]] = weight.to(view.w_out(names[name]).device)
    return dict(sorted(found.items()))
