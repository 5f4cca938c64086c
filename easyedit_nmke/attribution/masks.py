"""From attribution scores to a neuron mask: entropy-guided ratios and two kinds of knowledge neurons (Eqs. 4 to 8)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class NeuronMask:
    """What one layer's update is multiplied with. mask [N] float; general, specific [N] bool; the ratios that made them."""

    mask: torch.Tensor
    general: torch.Tensor
    specific: torch.Tensor
    general_ratio: float
    specific_ratio: float

    @property
    def density(self) -> float:
        """Share of neurons that the update may touch."""
        return (self.mask != 0).double().mean().item()


def neuron_mask(scores: torch.Tensor, hparams) -> NeuronMask:
    """Select neurons from `scores` [P, N] (P prompts of the edit, N neurons of the layer).

    `hparams` gives neurons, ratio, mask, mask_ties, temperature and the general_/specific_ ratio, bias, scale and power.
    Raises ValueError for scores that are not a finite matrix or settings that are unknown.
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [prompts, neurons], got shape {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinite values; the model's weights or activations are not finite")
    scores = scores.double()
    counts, peaks = general_count(scores), scores.max(0).values
    if hparams.ratio == "dynamic":
        general_ratio, specific_ratio = dynamic_ratios(scores, hparams)
    elif hparams.ratio == "fixed":
        general_ratio, specific_ratio = hparams.general_ratio, hparams.specific_ratio
    else:
        raise ValueError(f"ratio is {hparams.ratio!r}, expected 'dynamic' or 'fixed'")
    general = _top(counts, general_ratio, scores, hparams.mask_ties)
    specific = _top(peaks, specific_ratio, scores, hparams.mask_ties)
    chosen = _select(general, specific, hparams.neurons)
    if hparams.mask == "binary" or hparams.neurons == "all":
        mask = chosen.double()
    elif hparams.mask == "soft":
        mask = _soft(scores)
    else:
        raise ValueError(f"mask is {hparams.mask!r}, expected 'binary' or 'soft'")
    return NeuronMask(mask.float(), general, specific, general_ratio, specific_ratio)


def shuffled(mask: NeuronMask, seed: str) -> NeuronMask:
    """The control of attribution: the same mask values on neurons drawn at random, the same for the same `seed`."""
    order = list(range(len(mask.mask)))
    random.Random(seed).shuffle(order)
    return replace(mask, mask=mask.mask[order])


def general_count(scores: torch.Tensor) -> torch.Tensor:
    """R [N] (Eq. 4): for how many prompts a neuron's score lies above that prompt's mean."""
    if scores.shape[1] == 1:
        return torch.zeros_like(scores[0])
    standardised = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    return (standardised > 0).to(scores).sum(0)


def dynamic_ratios(scores: torch.Tensor, hparams) -> tuple[float, float]:
    """(ρ general, ρ specific) from the entropies H of Eqs. 6 and 7: bias + scale · H^power."""
    shifted = scores - scores.max(1, keepdim=True).values
    general = entropy(torch.softmax(hparams.temperature * shifted, 1)).mean().item()
    positive = scores.max(0).values.clamp(min=0)
    total = positive.sum().item()
    specific = entropy(positive / total).item() if total >= 1e-8 else 0.0
    return (
        hparams.general_bias + hparams.general_scale * general**hparams.general_power,
        hparams.specific_bias + hparams.specific_scale * specific**hparams.specific_power,
    )


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy over the last dimension divided by its largest value, log N: in [0, 1], and 0 for N = 1."""
    n = probabilities.shape[-1]
    if n == 1:
        return torch.zeros_like(probabilities[..., 0])
    return (torch.special.entr(probabilities).sum(-1) / math.log(n)).clamp(0, 1)


def _top(values: torch.Tensor, ratio: float, scores: torch.Tensor, ties: str) -> torch.Tensor:
    """The neurons whose `values` [N] reach the (1 - ratio) quantile, or exactly ratio·N of them."""
    if ties == "include":
        return values >= torch.quantile(values, 1 - ratio)
    if ties != "exact":
        raise ValueError(f"mask_ties is {ties!r}, expected 'include' or 'exact'")
    keep = max(1, round(ratio * len(values)))
    order = torch.argsort(scores.mean(0), descending=True, stable=True)
    order = order[torch.argsort(values[order], descending=True, stable=True)]
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order[:keep]] = True
    return chosen


def _select(general: torch.Tensor, specific: torch.Tensor, neurons: str) -> torch.Tensor:
    selections = {
        "both": lambda: general | specific,
        "general": lambda: general,
        "specific": lambda: specific,
        "overlap": lambda: general & specific,
        "non_overlap": lambda: general ^ specific,
        "all": lambda: torch.ones_like(general),
    }
    if neurons not in selections:
        raise ValueError(f"neurons is {neurons!r}, expected one of {', '.join(selections)}")
    return selections[neurons]()


def _soft(scores: torch.Tensor) -> torch.Tensor:
    """Every neuron's mean score, scaled to [0, 1] over the layer: the update stays dense."""
    mean = scores.mean(0)
    low, high = mean.min(), mean.max()
    return torch.ones_like(mean) if low == high else (mean - low) / (high - low)
