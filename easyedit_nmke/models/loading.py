"""Models and tokenizers by name: the embedded one, a packaged one, a folder, a GGUF file, a hub name, or a pair that is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import atlas
from ..hparams import HyperParams
from . import gguf
from .arch import MERGE, check_no_adapter
from .device import device_of
from .weights import quantisation


def load_model(hparams: HyperParams):
    """(model, tokenizer) for `model_name`: "atlas", a name in `gguf.PACKAGED`, a folder, a GGUF file or a hub name (there at
    `revision`), in `dtype`; or the (model, tokenizer) tuple, on which nothing is set.

    A GGUF file is dequantised by the first load of it. ValueError for what cannot be loaded, and for a base with an adapter on it.
    """
    name = hparams.model_name
    device = None if hparams.model_parallel else device_of(hparams.device)
    if isinstance(name, tuple):
        model, tok = name
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = atlas.DIRECTORY if name == "atlas" else gguf.plain_folder(name) if gguf.find(name) else name
        if (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"model {name!r} is the folder of a PEFT adapter: {MERGE}")
        spread = "auto" if hparams.model_parallel and name != "atlas" else None
        at = {"revision": hparams.revision} if hparams.revision else {}
        try:
            tok = AutoTokenizer.from_pretrained(folder, **at)
            dtype = "float16" if hparams.fp16 else hparams.dtype
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=spread, **at)
        except (OSError, ValueError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if isinstance(error, SafetensorError):
                reason += "; a weight file is torn, or what git-lfs has in its place: fetch it again"
            known = ", ".join(map(repr, ("atlas", *gguf.PACKAGED)))
            raise ValueError(
                f"model {name!r} could not be loaded ({reason}); give a folder, a GGUF file, a hub name, or one of {known}"
            ) from None
        if tok.pad_token_id is None:  # for the user's own calls; here nothing needs one
            tok.pad_token = tok.eos_token
    check_no_adapter(model)
    return (model if device is None or _stays(model) else model.to(device)), tok


def _stays(model) -> bool:
    """Whether a model is where it has to be: spread over devices, or quantised (which `check_model` refuses)."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places or quantisation(model) is not None


def base_folder(name: str, revision: str | None = None) -> Path | None:
    """Where the files lie of a model that `load_model` opens by `name`: a folder, what a GGUF file was dequantised to, or a
    snapshot in the hub's cache. None when they are not on this machine; nothing is downloaded or dequantised."""
    if name == "atlas":
        return atlas.DIRECTORY
    try:
        source = gguf.find(name)
    except ValueError:  # not installed (any more), or one of many
        return None
    if source:
        folder = gguf.cached_folder(source)
        return folder if folder.is_dir() else None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not even a name
        return None


def load_again(folder: str | Path, model):
    """(model, tokenizer) from a folder's files alone, in the dtype and with the attention of `model`, and on its device when there
    is room for a second one, else on the CPU; in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = getattr(model.config, "_attn_implementation", None)
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation=attention, local_files_only=True)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) == 1:
        try:
            fresh = fresh.to(devices.pop())
        except torch.OutOfMemoryError:
            fresh = fresh.cpu()
    return fresh.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
