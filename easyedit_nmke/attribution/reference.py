"""Eqs. 2 and 3 as they stand, in float64: slow, and what every other path is measured against."""

from __future__ import annotations

import torch

NEURONS_AT_A_TIME = 32


def perturbed_log_probs(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    amplification: float,
    final_hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(w|x + λ c_n v_n) [P, N], log p(w|x) [P]) in float64; `final_hidden` [P, D] freezes the norm, None recomputes it."""
    prompts, neurons = coefficients.shape
    readout = readout.to(torch.float64)
    values = w_out.double()
    after = coefficients.new_empty((prompts, neurons), dtype=torch.float64)
    before = coefficients.new_empty(prompts, dtype=torch.float64)
    for b in range(prompts):
        x, target = residual[b].double(), int(target_ids[b])
        frozen = None if final_hidden is None else readout.statistic(final_hidden[b].double())
        before[b] = torch.log_softmax(readout.logits(x, frozen), -1)[target]
        for start in range(0, neurons, NEURONS_AT_A_TIME):
            block = slice(start, start + NEURONS_AT_A_TIME)
            c = coefficients[b, block].double()
            y = x + amplification * c[:, None] * values[:, block].T
            statistic = None if frozen is None else frozen.expand(len(y))
            after[b, block] = torch.log_softmax(readout.logits(y, statistic), -1)[:, target]
    return after, before
