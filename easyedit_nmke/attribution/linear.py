"""Every logit of every perturbed state as a linear function of one product that no prompt changes.

With σ the norm's statistic, g its scale, x and v centred where the norm centres, and h = head·shift + bias:

    logit(x + λ c v) = (A + λ c U) / σ + h,   A = W_U(g⊙x) [P, V],   U = W_U·diag(g)·w_out [V, N]

The frozen norm has one σ per prompt. The exact norm has one per prompt and neuron, from ||x||², x·v and ||v||²; then with σ₀ that
of x itself, 1/σ = 1/σ₀ + tilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634
NEURONS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Perturbation:
    """What P prompts do to the logits: (A + λ c U)·(inverse + tilt) + h, all but U and h.

    x [P, D], centred where the norm centres; steps = λc [P, N]; inverse = 1/σ₀ [P]; tilt = 1/σ - 1/σ₀ [P, N], None where the norm
    is frozen; all in float32, or float64 for float64 input.
    """

    x: torch.Tensor
    steps: torch.Tensor
    inverse: torch.Tensor
    tilt: torch.Tensor | None

    @property
    def slopes(self) -> torch.Tensor:
        """λc/σ [P, N], the factor of U."""
        return self.steps * (self.inverse[:, None] if self.tilt is None else self.inverse[:, None] + self.tilt)

    def part(self, prompts: slice, neurons: slice = slice(None)) -> Perturbation:
        """The same for some of the prompts and neurons."""
        tilt = None if self.tilt is None else self.tilt[prompts, neurons]
        return Perturbation(self.x[prompts], self.steps[prompts, neurons], self.inverse[prompts], tilt)


def perturbation(
    coefficients, residual, w_out, readout, amplification, final_hidden, size: int = NEURONS_AT_A_TIME
) -> Perturbation:
    """From `neuron_scores`' arguments; `final_hidden` [P, D] freezes the norm, None recomputes it. size: neurons at a time."""
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    x = residual.to(dtype)
    if readout.norm == "layer":
        x = x - x.mean(1, keepdim=True)
    steps = amplification * coefficients.to(dtype)
    if final_hidden is not None:
        return Perturbation(x, steps, 1 / readout.statistic(final_hidden.to(dtype)), None)
    own, tilt = 1 / readout.statistic(x), torch.empty_like(steps)
    for chosen, values in columns(w_out, readout, dtype, size):
        step = steps[:, chosen]
        squares = x.pow(2).sum(1, keepdim=True) + 2 * step * (x @ values) + step.pow(2) * values.pow(2).sum(0)
        tilt[:, chosen] = ((squares / x.shape[1]).clamp(min=0) + readout.eps).rsqrt() - own[:, None]
    return Perturbation(x, steps, own, tilt)


def columns(w_out, readout, dtype, size: int = NEURONS_AT_A_TIME) -> Iterator[tuple[slice, torch.Tensor]]:
    """(neurons, their values [D, size]) block by block, centred where the norm centres."""
    for first in range(0, w_out.shape[1], size):
        chosen = slice(first, first + size)
        values = w_out[:, chosen].to(dtype)
        yield chosen, values - values.mean(0) if readout.norm == "layer" else values


def project(head: torch.Tensor, readout) -> torch.Tensor:
    """Rows of W_U [R, D], widened to a float type of their own, in place -> W_U·diag(g), centred where the norm centres."""
    head.mul_(readout.scale.to(head.dtype))
    return head.sub_(head.mean(1, keepdim=True)) if readout.norm == "layer" else head


def constant(words, readout, rows: torch.Tensor) -> torch.Tensor | None:
    """h = head·shift + bias for some words, whose rows of W_U [R, D] are given before `project`; None where there is neither."""
    bias = None if readout.head_bias is None else readout.head_bias[words].to(rows.dtype)
    if readout.shift is None:
        return bias
    moved = rows @ readout.shift.to(rows.dtype)
    return moved if bias is None else moved + bias


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap·tanh(logits/softcap), in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
