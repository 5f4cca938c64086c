"""The same numbers from one product per block of the vocabulary, shared by all prompts.

With σ the norm's statistic, g its scale, x and v centred where the norm centres, and h = head·shift + bias, a logit is linear in
the perturbation before the norm divides:

    logit(x + λ c v) = (A + λ c U) / σ + h,   A = W_U(g⊙x) [P, V],   U = W_U·diag(g)·w_out [V, N]

U does not depend on the prompt. The exact norm needs one more scalar per neuron: σ² + eps from ||x||², x·v and ||v||².
Neither U nor [P, N, V] logits ever exist whole: blocks of neurons and vocabulary are folded into a running log-sum-exp.
"""

from __future__ import annotations

import torch

NEURON_BLOCK = 512
VOCABULARY_BLOCK = 8192


def perturbed_log_probs(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    amplification: float,
    final_hidden: torch.Tensor | None,
    budget: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.perturbed_log_probs`, in float32 (float64 for float64 input), with at most about `budget` bytes of scratch
    (default 2 MB on CPU, where a block should stay in cache, 2 GB on CUDA)."""
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    values, x, scale = w_out.to(dtype), residual.to(dtype), readout.scale.to(dtype)
    if readout.norm == "layer":
        values, x = values - values.mean(0), x - x.mean(1, keepdim=True)
    steps = amplification * coefficients.to(dtype)  # λc [P, N]
    if final_hidden is None:
        own = readout.statistic(x)
        squares = (x.pow(2).sum(1, keepdim=True) + 2 * steps * (x @ values) + steps.pow(2) * values.pow(2).sum(0)) / x.shape[1]
        inverse = (squares.clamp(min=0) + readout.eps).rsqrt()
    else:
        own = readout.statistic(final_hidden.to(dtype))
        inverse = (1 / own)[:, None]
    scaled, head, constant = values * scale[:, None], readout.head, _constant(readout, dtype)
    base = _words(x * scale, head)  # A [P, V]
    totals = _log_sum_exp(base, scaled, head, constant, steps * inverse, inverse, readout.softcap, budget)
    rows = torch.arange(len(x), device=x.device)
    target = (base[rows, target_ids][:, None] + steps * (head[target_ids].to(dtype) @ scaled)) * inverse
    after = _cap(target + constant[target_ids][:, None], readout.softcap) - totals
    unperturbed = _cap(base / own[:, None] + constant, readout.softcap)
    return after, torch.log_softmax(unperturbed, 1)[rows, target_ids]


def _words(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """states [P, D] · headᵀ in the states' dtype, [P, V]; a half-precision head is widened block by block, never as a whole."""
    return torch.cat([states @ block.to(states.dtype).T for block in head.split(VOCABULARY_BLOCK)], 1)


def _constant(readout, dtype: torch.dtype) -> torch.Tensor:
    """The part of the logits that no state changes: head·shift + bias, [V]."""
    constant = readout.head.new_zeros(len(readout.head), dtype=dtype)
    if readout.shift is not None:
        constant = constant + _words(readout.shift.to(dtype)[None], readout.head)[0]
    return constant if readout.head_bias is None else constant + readout.head_bias.to(dtype)


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _log_sum_exp(base, scaled, head, constant, slopes, inverse, softcap, budget) -> torch.Tensor:
    """log Σ_v exp logit [P, N]; slopes = λc/σ [P, N] and inverse = 1/σ, [P, N] or [P, 1] where the norm is frozen."""
    prompts, neurons = slopes.shape
    if budget is None:
        budget = 2 << 30 if base.is_cuda else 2 << 20
    columns = min(neurons, NEURON_BLOCK if not base.is_cuda else 8 * NEURON_BLOCK)
    rows = max(64, budget // (3 * columns * base.element_size()))
    shared = inverse.shape[1] == 1
    totals = slopes.new_full((prompts, neurons), -torch.inf)
    for first in range(0, neurons, columns):
        chosen = slice(first, first + columns)
        for start in range(0, len(head), rows):
            words = slice(start, start + rows)
            product = head[words].to(scaled.dtype) @ scaled[:, chosen]  # U, [words, neurons]
            for b in range(prompts):
                unperturbed = constant[words, None] + base[b, words, None] * inverse[b, slice(None) if shared else chosen]
                logits = _cap(torch.addcmul(unperturbed, product, slopes[b, chosen]), softcap)
                highest = logits.amax(0)
                # exp(-80) is nothing beside the largest term, and exp of anything that underflows is 10 to 30 times slower on a CPU
                part = logits.sub_(highest).clamp_(min=-80).exp_().sum(0).log_().add_(highest)
                totals[b, chosen] = torch.logaddexp(totals[b, chosen], part)
    return totals
