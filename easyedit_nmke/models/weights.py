"""Which parameters an edit writes, and whether a model's weights can be edited at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..hparams import HyperParams
from .arch import ModelView


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
