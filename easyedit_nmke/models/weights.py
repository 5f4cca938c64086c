"""Which parameters an edit writes, and whether a model's weights can be edited at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..hparams import HyperParams
from .arch import ModelView, check_no_adapter


def down_projections(view: ModelView, hparams: HyperParams) -> list[str]:
    """Names of the output projections of every edited layer: what most methods write."""
    return [view.weight_name(layer) for layer in hparams.layers]


class Matrices(Mapping):
    """Name -> parameter as a matrix [out, in] (see `ModelView.matrix`), of a model as it is at the moment, wherever it has been
    moved to. Writing to one edits the model."""

    def __init__(self, view: ModelView, names: Sequence[str]):
        self.view, self.names = view, tuple(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.view.matrix(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


EDITABLE = (torch.float32, torch.bfloat16, torch.float64)  # and float16 on CUDA


def check_model(view: ModelView, hparams: HyperParams) -> None:
    """ValueError for a model that cannot be edited with these hyperparameters: what can is plain weights in EDITABLE types (float16
    on CUDA), in memory, without adapters, outside inference mode. Reads the edited weights alone."""
    _check_kind(view.model)
    view.check_layers(hparams.layers)
    loss_layer = getattr(hparams, "v_loss_layer", None)
    if loss_layer is not None and loss_layer >= view.depth:
        raise ValueError(f"v_loss_layer is {loss_layer}, but the model's last block is {view.depth - 1}")
    edited = {view.weight_name(layer): getattr(view.down(layer), "weight", None) for layer in hparams.layers}
    for name, weight in edited.items():
        if type(weight) is not torch.nn.Parameter or weight.dim() != 2:
            what = "missing" if weight is None else f"{type(weight).__name__} of {weight.dim()} dimensions"
            raise ValueError(f"{name} is {what}, expected a plain matrix: {_UNQUANTISED}")
    for name, weight in {**edited, **dict(view.model.named_parameters())}.items():
        _check_weight(name, weight)
    _check_finite(edited)


_UNQUANTISED = "quantised weights cannot be edited; load the model in bfloat16 or float32"


def _check_kind(model) -> None:
    """What a whole model may not be."""
    if torch.is_inference_mode_enabled():
        raise ValueError("edits need gradients, which torch.inference_mode() forbids; call this outside of it")
    check_no_adapter(model)
    if (kind := quantisation(model)) is not None:
        raise ValueError(f"the model is quantised ({kind}): {_UNQUANTISED}")
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        raise ValueError(_elsewhere("a part of the model is offloaded (to the CPU or to disk, by accelerate)"))


def quantisation(model) -> str | None:
    """The name of the method that a model is quantised by; None when it is not."""
    method = getattr(model, "hf_quantizer", None) or getattr(getattr(model, "config", None), "quantization_config", None)
    if method is None:
        return None
    method = getattr(method, "quantization_config", method)
    name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    return getattr(name, "value", name) or type(method).__name__


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if weight.device.type == "meta":
        raise ValueError(_elsewhere(f"{name} is on the meta device: its values are on disk or nowhere"))
    if weight.is_inference():
        raise ValueError(f"{name} was made in torch.inference_mode(), so it cannot be edited; load the model outside of it")
    if weight.dtype == torch.float16:
        if weight.device.type != "cuda":
            where = weight.device.type.upper()
            raise ValueError(f"the model is in float16 on a {where}; load it in float32 or bfloat16 (or move it to a GPU)")
    elif weight.dtype not in EDITABLE:
        raise ValueError(f"{name} is {weight.dtype}: {_UNQUANTISED}")


def _elsewhere(what: str) -> str:
    return f"{what}; load the whole model into memory (without device_map, or with devices it fits on) to edit it"


def check_finite(model) -> None:
    """ValueError when any parameter holds NaN or infinite values; reads the whole model, so once per state."""
    _check_finite(dict(model.named_parameters()))


def _check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"{name} holds NaN or infinite values; load a sound copy of the model")
