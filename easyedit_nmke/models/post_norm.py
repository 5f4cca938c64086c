"""A norm behind the FFN (Gemma 2 and 3, OLMo 2): what it makes of the FFN's output, and how that output moves the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_STEPS = 12  # of Newton's method, to float64's digits; a fixed number, so that a GPU is not waited for


@dataclass(frozen=True)
class PostNorm:
    """From an FFN's output y [.., D] the stream gets g ⊙ y / σ with σ = sqrt(mean y² + eps); scale g [D], float32."""

    scale: torch.Tensor
    eps: float

    def statistic(self, states: torch.Tensor) -> torch.Tensor:
        """σ of states [.., D]: [..], float32 or better."""
        return (states.to(torch.promote_types(states.dtype, torch.float32)).pow(2).mean(-1) + self.eps).sqrt()

    def change(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The change of y = `states` [.., D] that moves the stream by `wanted` [.., D]; float64.

        wanted·σ/g, as if σ stayed as it is, while y + change keeps to the length σ·sqrt(D). The norm has one size: what it puts out
        lies on the ellipsoid ||s/g||² = D, so that the stream cannot move by more than 2·sqrt(D)·max|g|. Beyond the length, the
        nearest point of that ellipsoid is aimed at, which keeps σ: entries of small g, where a step costs the most length, give
        way first. Within it the norm lengthens what it is given, by σ over the statistic afterwards.
        """
        states, scale = states.double(), self.scale.double().to(states.device)
        statistic = self.statistic(states)[..., None]
        target = scale * (scale * states / statistic + wanted.to(states))
        return statistic * target / _weights(scale, _damping(scale, target)) - states


def _weights(scale: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    return (scale.square() + damping).clamp(min=torch.finfo(scale.dtype).tiny)  # a scale of 0 moves nothing


def _damping(scale: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The least μ >= 0 [.., 1] for which u = target / (g² + μ) has a mean square of 1 or less: u is then the point of that ball
    with g ⊙ u nearest to target / g.

    Newton's method for 1/|u| = 1, which is concave in μ and nearly straight: from below it never steps beyond the root."""
    damping = torch.zeros_like(target[..., :1])
    for _ in range(_STEPS):
        weights = _weights(scale, damping)
        squares = (target / weights).square()
        size = squares.mean(-1, keepdim=True)
        step = size * (size.sqrt() - 1) / (squares / weights).mean(-1, keepdim=True)
        damping = torch.where(size > 1, damping + step, damping)
    return damping
