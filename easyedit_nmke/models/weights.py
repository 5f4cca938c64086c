"""Which parameters an edit writes, and whether a model's weights can be edited at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..hparams import HyperParams
from .arch import ModelView


def edited_parameters(view: ModelView, hparams: HyperParams) -> dict[str, torch.nn.Parameter]:
    """The parameters that an edit writes, by name: the output projection of every edited layer. FT also trains its bias, where
    the architecture has one (GPT-2, GPT-J), as EasyEdit's does."""
    if hparams.alg_name != "FT":
        return {view.weight_name(layer): view.weight(layer) for layer in hparams.layers}
    prefixes = {layer: view.weight_name(layer).removesuffix("weight") for layer in hparams.layers}
    return {prefixes[layer] + name: p for layer in hparams.layers for name, p in view.down(layer).named_parameters()}


class DownProjections(Mapping):
    """layer -> w_out [D, F] of a model as it is at the moment, wherever it has been moved to."""

    def __init__(self, view: ModelView, layers: Sequence[int]):
        self.view, self.layers = view, tuple(layers)

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.view.w_out(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def followed(view: ModelView, hparams: HyperParams) -> Mapping:
    """What a state follows: the edited down projections, by layer; of FT, which has no log to replay, all that it trains."""
    return edited_parameters(view, hparams) if hparams.alg_name == "FT" else DownProjections(view, hparams.layers)


def check_model(view: ModelView, hparams: HyperParams) -> None:
    """ValueError for a model that cannot be edited with these hyperparameters."""
    view.check_layers(hparams.layers)
    loss_layer = getattr(hparams, "v_loss_layer", None)
    if loss_layer is not None and loss_layer >= view.depth:
        raise ValueError(f"v_loss_layer is {loss_layer}, but the model's last block is {view.depth - 1}")
    for layer in hparams.layers:
        weight = view.weight(layer)
        if not weight.is_floating_point():
            raise ValueError(
                f"{view.weight_name(layer)} is {weight.dtype}: quantised weights cannot be edited; "
                "load the model in bfloat16 or float32"
            )
        if weight.dtype == torch.float16 and weight.device.type == "cpu":
            raise ValueError("the model is in float16 on a CPU; load it in float32 or bfloat16 (or move it to a GPU)")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{view.weight_name(layer)} holds NaN or infinite values; load a sound copy of the model")


def check_finite(model) -> None:
    """ValueError when any parameter holds NaN or infinite values; reads the whole model, so once per state."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite values; load a sound copy of the model")
