"""Models and tokenizers by name: the embedded one, a folder, a hub name, or a pair that is loaded already."""

from __future__ import annotations

from .. import atlas
from ..hparams import HyperParams
from .device import device_of


def load_model(hparams: HyperParams):
    """(model, tokenizer) for `model_name`: "atlas", a folder or a hub name, in `dtype`; or the (model, tokenizer) tuple,
    on which nothing is set."""
    name = hparams.model_name
    device = None if hparams.model_parallel else device_of(hparams.device)
    if isinstance(name, tuple):
        model, tok = name
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = atlas.DIRECTORY if name == "atlas" else name
        spread = "auto" if hparams.model_parallel and name != "atlas" else None
        try:
            tok = AutoTokenizer.from_pretrained(folder)
            dtype = "float16" if hparams.fp16 else hparams.dtype
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=spread)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"model {name!r} could not be loaded ({reason}); give a folder, a hub name, or 'atlas'") from None
        if tok.pad_token_id is None:  # for the user's own calls; here nothing needs one
            tok.pad_token = tok.eos_token
    return (model if device is None else model.to(device)), tok
