"""What the published code computes, prompt by prompt with full logits, in float32: what the other backends are timed against."""

from __future__ import annotations

import torch

NEURONS_AT_A_TIME = 128


@torch.no_grad()
def perturbed_log_probs(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    amplification: float,
    final_hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.perturbed_log_probs`, in float32: a product with the whole head for every prompt and block of neurons."""
    readout, values = readout.to(torch.float32), w_out.float()
    after = torch.empty(coefficients.shape, dtype=torch.float32, device=w_out.device)
    before = torch.empty(len(coefficients), dtype=torch.float32, device=w_out.device)
    for b, target in enumerate(target_ids.tolist()):
        x = residual[b].float()
        frozen = None if final_hidden is None else readout.statistic(final_hidden[b].float())
        before[b] = torch.log_softmax(readout.logits(x, frozen), -1)[target]
        for start in range(0, coefficients.shape[1], NEURONS_AT_A_TIME):
            block = slice(start, start + NEURONS_AT_A_TIME)
            y = x + amplification * coefficients[b, block, None].float() * values[:, block].T
            statistic = None if frozen is None else frozen.expand(len(y))
            after[b, block] = torch.log_softmax(readout.logits(y, statistic), -1)[:, target]
    return after, before
