"""A base model's folder with edited tensors in the place of its own, and nothing else changed: a checkpoint that whatever opens the
base opens too, in any version of any library.

Files that hold no weights are copied byte for byte; so are the shards without an edit. Of the others every byte is kept but those
of the edited tensors. Pickled weights (`pytorch_model.bin`) become safetensors with the same tensors.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..models.arch import ModelView
from ..models.loading import base_folder
from .delta import short

_FORMATS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them, with their indices
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of safetensors
_CHUNK = 1 << 24


class ModelReport(NamedTuple):
    """What rounding an edited model to its file's dtype leaves out of the edits (||lost|| / ||whole||, Frobenius), by layer and in
    all; tensors outside the blocks by name. dtype: of the edited tensors, the widest. shards: files written anew, and all."""

    dtype: str
    errors: dict[int | str, float]
    total: float
    shards: tuple[int, int]

    def __str__(self) -> str:
        place = ", ".join(f"{'layer ' if isinstance(name, int) else ''}{name} {error:.2%}" for name, error in self.errors.items())
        return f"Rounding to {self.dtype} leaves out {self.total:.2%} of the edits (Frobenius norm): {place or 'there are none'}"


@dataclass(frozen=True)
class Base:
    """The weights in a folder. places: tensor -> the file that holds it; index: the name of the file that says so, if one does."""

    folder: Path
    places: Mapping[str, str]
    index: str | None
    pickled: bool

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Base | None:
        """Of the model that `load_model` opens by `name` (of a hub name: at `revision`); None when its weights are not on this
        machine, or in another format."""
        folder = base_folder(name, revision)
        return cls.find(folder) if folder else None

    @classmethod
    def find(cls, folder: Path) -> Base | None:
        """The weights that transformers would load; None when they are in another format."""
        for name in _FORMATS:
            pickled, index = name.endswith(".bin"), f"{name}.index.json"
            if (folder / name).is_file():
                with _opened(folder / name) as (names, _):
                    return cls(folder, dict.fromkeys(names, name), None, pickled)
            if (folder / index).is_file():
                return cls(folder, _json(folder / index)["weight_map"], index, pickled)
        return None

    def owners(self, model) -> dict[str, str]:
        """Tensor of a file -> the model's parameter that it is. By name, else where the one name ends with the other ("h.0.ln.bias"
        is "transformer.h.0.ln.bias"). ValueError for a parameter that no tensor, or more than one, may be."""
        found, groups = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        for names in groups.values():  # more than one where weights are tied
            owned = [name for name in names if name in self.places]
            if not owned:
                near = [place for place in self.places if any(_ends(place, name) for name in names)]
                if len(near) != 1 or near[0] in found:
                    raise ValueError(
                        f"{names[0]} is {'none' if not near else 'more than one'} of the tensors in {self.folder}, so it "
                        "cannot be written there; export the edits alone (--to delta or --to lora)"
                    )
                owned = near
            found |= dict.fromkeys(owned, names[0])
        return found


@torch.no_grad()
def write_checkpoint(
    model, base: Base, into: Path, masters: Mapping[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None
) -> tuple[ModelReport, dict[str, torch.Tensor]]:
    """Write a copy of the base's folder in which the parameters that are no longer the base's are the model's; returns what
    rounding cost, and the edited parameters as written, by name.

    masters: name -> matrix [out, in] float32, where the model's own weights are these, rounded. dtype: of the edited tensors, by
    default that of the base's. ValueError when it cannot hold the base's, and for parameters that are not in the base's files.
    """
    view, owners = ModelView(model), base.owners(model)
    exact = {name: view.oriented(name, master) for name, master in (masters or {}).items()}
    written, lost, whole, anew = {}, {}, {}, 0
    files, sizes = sorted(set(base.places.values())), 0
    for file in files:
        changed = {}
        with _opened(base.folder / file) as (names, read):
            for name in names:
                if name not in owners or (parameter := model.get_parameter(owners[name])).is_meta:
                    continue
                old, now = read(name), exact.get(owners[name], parameter.detach()).cpu()
                new = _edited(old, now, parameter.dtype, dtype, name)
                if new is not None:
                    changed[name] = written[owners[name]] = new.to(dtype or old.dtype)
                    place = _place(view, owners[name])
                    lost[place] = math.hypot(lost.get(place, 0.0), _distance(new, changed[name]))
                    whole[place] = math.hypot(whole.get(place, 0.0), _distance(new, old))
            anew += bool(changed)
            target = into / _renamed(file)
            if base.pickled:
                save_file({name: changed.get(name, read(name)).contiguous().clone() for name in names}, target, {"format": "pt"})
            elif changed:
                replace_tensors(base.folder / file, target, changed)
            else:
                shutil.copyfile(base.folder / file, target)
            sizes += _bytes(target)
    kind = reduce(torch.promote_types, {tensor.dtype for tensor in written.values()}) if written else model.dtype
    _copy_others(base, into, sizes, dtype if written else None)
    errors = {place: lost[place] / whole[place] if lost[place] else 0.0 for place in lost}
    total = math.hypot(*lost.values()) / math.hypot(*whole.values()) if any(lost.values()) else 0.0
    return ModelReport(short(kind), errors, total, (anew, len(files))), written


def replace_tensors(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A copy of a safetensors file with other values for some of its tensors, of the same shapes; all else byte for byte. Where no
    dtype changes, the header is the same, too. Scratch: 16 MB and one tensor."""
    with open(source, "rb") as old, open(target, "wb") as new:
        head = old.read(int.from_bytes(old.read(8), "little"))
        content = json.loads(head)
        entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
        places = {name: entry["data_offsets"] for name, entry in entries.items()}
        codes = {name: _CODES[tensor.dtype] for name, tensor in tensors.items()}
        order = sorted(places, key=places.__getitem__)
        if any(entries[name]["dtype"] != code for name, code in codes.items()):
            # Every tensor lies at a multiple of its element's size if the wide ones come first.
            order.sort(key=lambda name: -tensors[name].element_size() if name in tensors else -_width(entries[name]))
            end = 0
            for name in order:
                start, end = end, end + (tensors[name].nbytes if name in tensors else places[name][1] - places[name][0])
                content[name] = {**entries[name], "dtype": codes.get(name, entries[name]["dtype"]), "data_offsets": [start, end]}
            text = json.dumps(content, separators=(",", ":")).encode()
            head, begin = text + b" " * (-len(text) % 8), 8 + len(head)
        else:
            begin = 8 + len(head)
        new.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            if name in tensors:
                new.write(tensors[name].contiguous().view(torch.uint8).reshape(-1).numpy())
                continue
            old.seek(begin + places[name][0])
            left = places[name][1] - places[name][0]
            while left:
                left -= new.write(old.read(min(left, _CHUNK)))


def _edited(old: torch.Tensor, now: torch.Tensor, held: torch.dtype, dtype: torch.dtype | None, name: str) -> torch.Tensor | None:
    """The base's tensor with the edits, in float64; None when it is unedited. now: the model's values, held in `held` (masters:
    in float32). Where that is coarser than the base, the difference that edits made is added to the base's own values."""
    if old.shape != now.shape:
        raise ValueError(f"{name} has the shape {list(old.shape)} in the base's files and {list(now.shape)} in the model")
    start = old.to(held)
    if torch.equal(start.to(now.dtype), now):
        return None
    if old.dtype not in _CODES:
        raise ValueError(f"{name} is edited, and stored as {short(old.dtype)}; export the edits alone (--to delta or --to lora)")
    if dtype is not None and torch.promote_types(old.dtype, dtype) != dtype:
        wider = short(torch.promote_types(old.dtype, dtype))
        raise ValueError(f"dtype is {short(dtype)}, which cannot hold the base's {short(old.dtype)}; give {wider}")
    old, start, now = old.double(), start.double(), now.double()
    return now if torch.equal(old, start) else old + (now - start)


def _copy_others(base: Base, into: Path, size: int, dtype: torch.dtype | None) -> None:
    """What is no weight. size: of all tensors in bytes. dtype: what config.json has to name instead of its own."""
    for file in sorted(base.folder.iterdir()):
        index = file.name.endswith(".index.json")
        if file.is_file() and not file.name.startswith(".") and file.suffix not in _WEIGHTS and not index:
            shutil.copyfile(file, into / ("README.base.md" if file.name == "README.md" else file.name))
    if (base.folder / "additional_chat_templates").is_dir():
        shutil.copytree(base.folder / "additional_chat_templates", into / "additional_chat_templates")
    if base.index:
        content = _json(base.folder / base.index)
        if base.pickled or dtype is not None:
            content["metadata"] = {**content.get("metadata", {}), "total_size": size}
            content["weight_map"] = {name: _renamed(file) for name, file in content["weight_map"].items()}
            _write_json(into / _renamed(base.index), content)
        else:
            shutil.copyfile(base.folder / base.index, into / base.index)
    if dtype is not None:
        config = _json(into / "config.json")
        known = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        if any(config.get(name) != short(dtype) for name in known):
            _write_json(into / "config.json", config | dict.fromkeys(known, short(dtype)))


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], object]]:
    """(names, name -> tensor) of a file of weights; what is not asked for is not read."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        yield list(tensors), tensors.__getitem__
        return
    with safe_open(file, "pt") as handle:
        yield list(handle.keys()), handle.get_tensor


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, content: Mapping) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(file: str) -> str:
    """The name of a safetensors file, or of an index of such, that takes the place of `file`."""
    return re.sub(r"^pytorch_model(.*)\.bin", r"model\1.safetensors", file)


def _ends(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _place(view: ModelView, name: str) -> int | str:
    """The block that a parameter lies in, else its name."""
    inside = re.match(rf"{re.escape(view.family.blocks)}\.(\d+)\.", name)
    return int(inside[1]) if inside else name


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).norm().item()


def _width(entry: Mapping) -> int:
    """Bytes of one element."""
    start, end = entry["data_offsets"]
    return (end - start) // max(1, math.prod(entry["shape"]))


def _bytes(file: Path) -> int:
    """Of all tensors in a safetensors file."""
    with open(file, "rb") as handle:
        return file.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")
