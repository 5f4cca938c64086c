"""Attribution scores of any texts and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...attribution import choose, neuron_scores
from ...methods.keys import attribution_inputs
from ...models.arch import ModelView, evaluating


@torch.no_grad()
def scores(
    view: ModelView, tok, texts: Sequence[str], layers: Sequence[int], strategy: str = "lps", amplification: float = 30.0
) -> Iterator[tuple[int, torch.Tensor]]:
    """(block, scores [texts, F]) of one block after the other: how much each neuron moves the model's own next token after each
    text (Eqs. 2, 3)."""
    with evaluating(view.model):
        seen = attribution_inputs(view, tok, texts, layers)
    readout = view.readout
    for layer in layers:
        coefficients, values = seen.coefficients[layer], view.values(layer)
        device = coefficients.device
        backend, _ = choose("auto", values, readout)
        yield layer, neuron_scores(
            coefficients, seen.residual[layer].to(device), values, readout.to(device), seen.predicted.to(device),
            strategy=strategy, amplification=amplification, final_hidden=seen.final_hidden.to(device), backend=backend,
        )  # fmt: skip
