"""The same numbers from one product per layer, shared by all prompts, in blocks of neurons and vocabulary (torch, any device).

Neither U = W_U·diag(g)·w_out [N, V] nor [P, N, V] logits ever exist whole: each block of U is folded into a running log-sum-exp of
every prompt. Logits are in base 2, because exp2 is four times as fast as exp on a CPU.
"""

from __future__ import annotations

import math

import torch

from ..models.products import linear
from .linear import LOG2E, Perturbation, cap, columns, constant, perturbation, project

CPU_BUDGET, CUDA_BUDGET = 256 << 20, 2 << 30
# Products of blocks of this size are as fast as any (a quarter of that from 512 x 341), and the third-level cache still holds them.
CPU_BLOCK, CUDA_BLOCK = (1024, 2048), (4096, 8192)  # neurons, words
CPU_ROWS = 128  # neurons that all prompts are summed for at a time, while what they read is in the second-level cache
FAR = 60.0  # exp2 of a number this far from the block's largest unperturbed logit is safe in float32, and so is a sum of them
GONE = -120.0  # exp2 of less is denormal or 0, slow on a CPU, and nothing beside the other words


@torch.no_grad()
def perturbed_log_probs(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    amplification: float,
    final_hidden: torch.Tensor | None,
    budget: int | None = None,
    projection=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.perturbed_log_probs`: products and exponentials in float32 (float64 for float64 input), the sums over blocks
    and the result in float64.

    budget: bytes of scratch memory that are never exceeded (default 256 MB on CPU, 2 GB on CUDA); ValueError when it is too small
    for the smallest blocks. projection: `cached.Projection` to read U from, instead of computing it.
    """
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    after = torch.empty(coefficients.shape, dtype=torch.float64, device=w_out.device)
    before = torch.empty(len(coefficients), dtype=torch.float64, device=w_out.device)
    if budget is None:
        budget = CUDA_BUDGET if w_out.is_cuda else CPU_BUDGET
    group, block = _blocks(*coefficients.shape, w_out, readout, dtype, budget, projection)
    for first in range(0, len(coefficients), group):
        some = slice(first, first + group)
        hidden = None if final_hidden is None else final_hidden[some]
        prompts = perturbation(coefficients[some], residual[some], w_out, readout, amplification, hidden, block[0])
        target, base = _target_logits(prompts, w_out, readout, target_ids[some], projection, block[0])
        totals, unperturbed = _log_sums(prompts, w_out, readout, block, projection)
        after[some] = target - totals / LOG2E
        before[some] = base - unperturbed / LOG2E
    return after, before


def _blocks(prompts, neurons, w_out, readout, dtype, budget, projection) -> tuple[int, tuple[int, int]]:
    """(prompts at a time, (neurons, words) of a block) whose scratch fits the budget."""
    hidden, size = w_out.shape[0], dtype.itemsize
    width = min(neurons, (CUDA_BLOCK if w_out.is_cuda else CPU_BLOCK)[0])
    words = min(len(readout.head), (CUDA_BLOCK if w_out.is_cuda else CPU_BLOCK)[1])
    group = prompts

    def need() -> int:
        # steps, slopes, tilt, totals and their temporaries; A, base and theirs; x
        per_prompt = 14 * neurons + 8 * words + 4 * hidden
        values = 3 * hidden * width
        head = 2 * words * hidden + (0 if projection is None else projection.width * (words + width))
        return size * (group * per_prompt + values + head + 4 * width * words)

    while need() > budget:
        if group > 16:
            group //= 2
        elif max(width, words) > 64:
            width, words = (width, words // 2) if words >= width else (width // 2, words)
        elif group > 1:
            group //= 2
        else:
            raise ValueError(f"attribution needs {need()} bytes of scratch even in its smallest blocks, the budget is {budget}")
    return group, (width, words)


def _target_logits(prompts: Perturbation, w_out, readout, target_ids, projection, width) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' logits: perturbed [P, N] and unperturbed [P]."""
    dtype = prompts.x.dtype
    head = readout.head[target_ids].to(dtype, copy=True)
    h = constant(target_ids, readout, head)
    head = project(head, readout)
    base = (prompts.x * head).sum(1)
    if projection is None:
        own = torch.empty_like(prompts.steps)
        for chosen, values in columns(w_out, readout, dtype, width):
            own[:, chosen] = head @ values
    else:
        own = projection.words(target_ids).to(dtype)
    logits = prompts.steps * own + base[:, None]
    logits = logits * prompts.inverse[:, None] if prompts.tilt is None else logits * (prompts.inverse[:, None] + prompts.tilt)
    unperturbed = base * prompts.inverse
    if h is not None:
        logits, unperturbed = logits + h[:, None], unperturbed + h
    return cap(logits, readout.softcap), cap(unperturbed, readout.softcap)


def _log_sums(prompts: Perturbation, w_out, readout, block, projection) -> tuple[torch.Tensor, torch.Tensor]:
    """log2 Σ_v 2^logit of all perturbed states [P, N] and of the unperturbed ones [P]; logits in base 2."""
    width, words = block
    dtype, neurons = prompts.x.dtype, w_out.shape[1]
    scratch = prompts.x.new_empty(min(width, neurons) * min(words, len(readout.head)))
    rows = None if projection is not None else prompts.x.new_empty((min(words, len(readout.head)), w_out.shape[0]))
    scaled = prompts.x * readout.scale.to(dtype)
    softcap = None if readout.softcap is None else readout.softcap * LOG2E
    totals = prompts.steps.new_full(prompts.steps.shape, -torch.inf, dtype=torch.float64)
    unperturbed = totals.new_full((len(totals),), -torch.inf)
    slopes, tilt = prompts.slopes.mul_(LOG2E), None if prompts.tilt is None else prompts.tilt * LOG2E
    for start in range(0, len(readout.head), words):
        chosen = slice(start, min(start + words, len(readout.head)))
        head = readout.head[chosen].to(dtype) if rows is None else rows[: chosen.stop - start].copy_(readout.head[chosen])
        h = constant(chosen, readout, head)
        lean = scaled @ head.T  # A [P, words]; x is centred where W_U·diag(g) would be
        base = lean * (prompts.inverse[:, None] * LOG2E)
        base = base if h is None else base.add_(h, alpha=LOG2E)
        unperturbed = torch.logaddexp2(
            unperturbed, torch.logsumexp(cap(base.to(torch.float64, copy=True), softcap) / LOG2E, 1) * LOG2E
        )
        head = head if rows is None else project(head, readout)
        for first in range(0, neurons, width):
            some = slice(first, min(first + width, neurons))
            values = w_out[:, some].to(dtype)
            product = linear(values.T, head) if projection is None else projection.block(some, chosen)  # U [n, words]
            logits = scratch[: product.numel()].view(product.shape)
            part = _fold(product, base, lean, slopes[:, some], None if tilt is None else tilt[:, some], softcap, logits)
            totals[:, some] = torch.logaddexp2(totals[:, some], part)
            del product  # before the next one is made
    return totals, unperturbed


def _fold(product, base, lean, slopes, tilt, softcap, logits) -> torch.Tensor:
    """log2 of each prompt's sum over one block [P, n]: product = U [n, words]; base, lean [P, words]; slopes, tilt [P, n].

    Where no logit strays further than FAR from the unperturbed ones, sums are taken relative to the largest of those: no search
    for each neuron's own largest. `logits` is scratch of product's shape.
    """
    highest, lowest = base.amax(1), base.amin(1)
    reach = slopes.abs() * torch.maximum(product.amax(1), -product.amin(1))
    if tilt is not None:
        reach += tilt.abs() * lean.abs().amax(1, keepdim=True)
    if softcap is not None:
        reach.fill_(0 if softcap <= FAR else math.inf)
        highest, lowest = torch.zeros_like(highest), torch.full_like(lowest, -softcap)
    furthest = reach.amax(1)
    bounds = torch.stack([furthest, lowest - highest - furthest]).tolist()
    part = torch.empty_like(slopes, dtype=torch.float64)
    rows = len(product) if product.is_cuda else CPU_ROWS
    for first in range(0, len(product), rows):
        some = slice(first, first + rows)
        near = product[some]
        out = logits[: len(near)]
        for b, (_, low) in enumerate(zip(*bounds, strict=True)):
            leaning = None if tilt is None else (lean[b], tilt[b, some])
            offset = base[b] if softcap is not None else base[b] - highest[b]
            _logits(near, offset, slopes[b, some], leaning, softcap, out)
            if low < GONE:
                out.clamp_(min=GONE)
            part[b, some] = out.exp2_().sum(1).double().log2_().add_(highest[b])
    for b, (far, _) in enumerate(zip(*bounds, strict=True)):
        if not far <= FAR:
            wide = (~(reach[b] <= FAR)).nonzero()[:, 0]
            leaning = None if tilt is None else (lean[b], tilt[b, wide])
            out = logits.view(-1)[: len(wide) * logits.shape[1]].view(len(wide), -1)
            _logits(product[wide], base[b], slopes[b, wide], leaning, softcap, out)
            largest = out.amax(1)
            part[b, wide] = out.sub_(largest[:, None]).clamp_(min=GONE).exp2_().sum(1).double().log2_().add_(largest)
    return part


def _logits(product, base, slopes, leaning, softcap, out) -> torch.Tensor:
    """base [words] + slopes [n]·product [n, words], and A·tilt where the norm is exact -> out."""
    torch.addcmul(base, product, slopes[:, None], out=out)
    if leaning is not None:
        out.addcmul_(leaning[0], leaning[1][:, None])
    return cap(out, softcap)
