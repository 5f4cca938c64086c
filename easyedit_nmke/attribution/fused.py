"""Product and log-sum-exp in one Triton kernel: neither U nor logits are ever written to memory.

One program multiplies one tile of U = (diag(g)·w_out)ᵀ·W_Uᵀ [neurons, words] and, while it is in registers, reduces it over its
words for every prompt. What it writes is one number per prompt and neuron; those of all tiles of the vocabulary are summed by a
second pass, so every tile of the vocabulary is a program of its own (split-V) and small layers fill the GPU too. Neurons lie along
the rows of a tile, so that a reduction over words stays within a thread and its three neighbours.

Importing this file needs Triton (extra `cuda`); TRITON_INTERPRET=1, set before the import, runs the kernel on a CPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ..models.device import current
from .linear import LOG2E, NEURONS_AT_A_TIME, Perturbation, cap, columns, perturbation

PRECISIONS = {"bf16": (torch.bfloat16, "tf32"), "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee")}
PROMPTS_AT_A_TIME = 64  # from here on a prompt's own exponentials cost more than its share of the product
BUDGET = 2 << 30
PENDING = 16  # of a cache's pending columns, the number is a multiple
UNIT = 128  # words per written number: the smallest tile's, so that the result's shape does not depend on the tile
WORDS_AT_A_TIME = 4096
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """What one program multiplies (neurons x words, so much of `hidden` at a time), and with how many warps and stages."""

    neurons: int
    words: int
    hidden: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, prompts: int, started: bool, capability: tuple[int, int]) -> Tile:
    """The tile for operands of this type on a GPU of this compute capability. A table, not a measurement: the order of summing
    depends on the tile, and a run that is taken up again has to sum in the same order.

    128 x 256 reads the fewest bytes per product but leaves one program per multiprocessor, which multiplies nothing while it
    sums; of 128 x 128 two fit, and one multiplies while the other sums, which wins with many prompts and where the larger one
    does not fit the registers (8.0). 64 x 128 is for the cache's few pending columns, and for float32 on consumer cards.
    """
    if INTERPRETED:
        return Tile(32, 128, 32, 4, 1)
    roomy = capability in ((8, 0), (9, 0), (10, 0), (10, 3))  # data center cards: 164 KB of shared memory or more, others 100
    if started or (dtype == torch.float32 and not roomy):
        return Tile(64, 128, 32, 4, 3)
    if dtype == torch.float32 or not roomy:
        return Tile(128, 128, 32, 8, 3)
    return Tile(128, 128 if capability == (8, 0) or prompts > 16 else 256, 64, 8, 3)


@triton.jit
def _kernel(
    weight, head, start, base, lean, slopes, tilt, out, N, V, D, P, softcap,
    STARTED: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDENED: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [V / UNIT, P, N] = log2 Σ_v 2^logit over a tile's words; weight [N, D], head [V, D], start [N, V], base and lean [P, V],
    slopes and tilt [P, N], all contiguous; what is not used is any pointer."""
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    # Eight tiles of neurons share a tile of the head while it is in the second-level cache.
    group = tl.program_id(0) // (8 * tiles_v)
    inside = tl.program_id(0) % (8 * tiles_v)
    size = min(tiles_n - group * 8, 8)
    tile_n, tile_v = group * 8 + inside % size, inside // size
    n, v = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_n, in_v = n < N, v < V
    rows_n, rows_v = (n % N).to(tl.int64), (v % V).to(tl.int64)
    if STARTED:
        where = in_n[:, None] & in_v[None, :]
        product = tl.load(start + rows_n[:, None] * V + rows_v[None, :], mask=where, other=0).to(tl.float32)
    else:
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    d = tl.arange(0, BLOCK_D)
    left = weight + rows_n[:, None] * D + d[None, :]
    right = head + rows_v[None, :] * D + d[:, None]
    for k in range(0, D, BLOCK_D):
        a = tl.load(left + k, mask=(d < D - k)[None, :], other=0)
        b = tl.load(right + k, mask=(d < D - k)[:, None], other=0)
        b = b.to(a.dtype)
        if WIDENED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    for p in range(P):
        offset = tl.load(base + p * V + v, mask=in_v, other=-float("inf"))
        slope = tl.load(slopes + p * N + n, mask=in_n, other=0)
        logits = product * slope[:, None] + offset[None, :]
        if TILTED:
            bend = tl.load(tilt + p * N + n, mask=in_n, other=0)
            logits += bend[:, None] * tl.load(lean + p * V + v, mask=in_v, other=0)[None, :]
        if CAPPED:
            # tanh by exp2; the padding's -inf must stay
            logits = softcap - 2 * softcap / (1 + tl.exp2(logits * (2.8853900817779268 / softcap)))
            logits = tl.where(in_v[None, :], logits, -float("inf"))
        largest = tl.max(logits, 1)
        total = largest + tl.log2(tl.sum(tl.exp2(logits - largest[:, None]), 1))
        slot = tile_v * (BLOCK_V // UNIT)
        at = out + (slot.to(tl.int64) * P + p) * N + n
        tl.store(at, total, mask=in_n)
        for extra in tl.static_range(1, BLOCK_V // UNIT):
            empty = in_n & (slot + extra < tl.cdiv(V, UNIT))
            tl.store(at + tl.cast(extra, tl.int64) * P * N, tl.zeros_like(total) - float("inf"), mask=empty)


@torch.no_grad()
def perturbed_log_probs(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    amplification: float,
    final_hidden: torch.Tensor | None,
    budget: int = BUDGET,
    projection=None,
    precision: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.perturbed_log_probs`, in float32.

    precision of the products, summed in float32: "bf16", "tf32", "fp32"; "auto" is bf16 for a bfloat16 head, else fp32. budget:
    bytes of scratch memory; prompts and neurons are taken in parts to stay within it. projection: `cached.Projection` to read U
    from, instead of computing it.
    """
    rounding = _precision(precision, readout, projection)
    after = torch.empty(coefficients.shape, dtype=torch.float32, device=w_out.device)
    before = torch.empty(len(coefficients), dtype=torch.float32, device=w_out.device)
    group, width = _parts(*coefficients.shape, readout.head, rounding[0], budget)
    for first in range(0, len(coefficients), group):
        some = slice(first, first + group)
        hidden = None if final_hidden is None else final_hidden[some].float()
        states = perturbation(coefficients[some].float(), residual[some].float(), w_out, readout, amplification, hidden)
        ids, rows = target_ids[some], torch.arange(len(states.x), device=w_out.device)
        lean, h = _words(states.x, readout)
        base = lean * states.inverse[:, None] + h
        before[some] = torch.log_softmax(cap(base.clone(), readout.softcap), 1)[rows, ids]
        base.mul_(LOG2E)
        for start in range(0, coefficients.shape[1], width):
            neurons = slice(start, start + width)
            part = states.part(slice(None), neurons)
            weight, head, stored, own = _operands(w_out, neurons, readout, ids, projection, rounding[0])
            target = part.slopes * own + base[rows, ids][:, None] / LOG2E
            if part.tilt is not None:
                target += part.tilt * lean[rows, ids][:, None]
            totals = _log_sums(part, weight, head, stored, base, lean, readout.softcap, rounding[1])
            after[some, neurons] = cap(target, readout.softcap) - totals / LOG2E
    return after, before


def _precision(precision: str, readout, projection) -> tuple[torch.dtype, str]:
    """(dtype of the operands, input_precision of the product)."""
    if precision == "auto":
        half = (readout.head if projection is None else projection.stored).dtype == torch.bfloat16
        precision = ("bf16" if projection is None else "tf32") if half else "fp32"  # a cache's few pending columns stay in float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected 'auto' or one of {', '.join(map(repr, PRECISIONS))}")
    return PRECISIONS[precision]


def _parts(prompts: int, neurons: int, head: torch.Tensor, dtype: torch.dtype, budget: int) -> tuple[int, int]:
    """(prompts, neurons) at a time."""
    vocabulary, hidden = head.shape
    group, width = min(prompts, PROMPTS_AT_A_TIME), neurons

    def need() -> int:
        sums = 8 * triton.cdiv(vocabulary, UNIT) * group * width  # what the kernel writes, and one temporary
        states = 4 * group * (5 * vocabulary + 8 * neurons + 4 * hidden)
        values = width * hidden * dtype.itemsize + 12 * min(width, NEURONS_AT_A_TIME) * hidden
        return sums + states + values + 4 * min(vocabulary, WORDS_AT_A_TIME) * hidden

    while need() > budget:
        if width > 1024 or (group == 1 and width > 64):
            width //= 2
        elif group > 1:
            group //= 2
        else:
            raise ValueError(f"fused attribution needs {need()} bytes of scratch for one prompt, the budget is {budget}")
    return group, width


def _words(x: torch.Tensor, readout) -> tuple[torch.Tensor, torch.Tensor]:
    """A = W_U(g⊙x) [P, V] and h = head·shift + bias [V] in float32, from one pass over the head."""
    rows = x * readout.scale.float()
    shift = torch.zeros_like(rows[:1]) if readout.shift is None else readout.shift.float()[None]
    rows = torch.cat([rows, shift])
    both = torch.cat([rows @ block.float().T for block in readout.head.split(WORDS_AT_A_TIME)], 1)
    return both[:-1], both[-1] if readout.head_bias is None else both[-1] + readout.head_bias.float()


def _operands(w_out, neurons: slice, readout, ids, projection, dtype):
    """(weight [n, D], head [V, D], start [n, V] or None) with U = start + weight·headᵀ, and U of the target words [P, n].

    The targets' are made from the rounded operands too, so that a word's rounding is the same above and below the fraction line.
    """
    if projection is not None:
        more = (0, -projection.width % PENDING)  # columns of zeros: for another width the kernel would be compiled anew
        right, left = pad(projection.right[:, neurons].T, more).contiguous(), pad(projection.left, more)
        return right, left, projection.stored[neurons], projection.words(ids)[:, neurons]
    values = w_out[:, neurons]
    weight = torch.empty(values.shape[::-1], dtype=dtype, device=w_out.device)
    for chosen, block in columns(values, readout, torch.float32):
        weight[chosen] = (block * readout.scale.float()[:, None]).T
    head = readout.head.contiguous()
    rows = head[ids].to(dtype).float()
    own = torch.cat([rows @ block.float().T for block in weight.split(NEURONS_AT_A_TIME)], 1)
    return weight, head, None, own


def _log_sums(part: Perturbation, weight, head, stored, base, lean, softcap, rounding: str) -> torch.Tensor:
    """log2 Σ_v 2^logit [P, n]; logits in base 2."""
    (neurons, hidden), vocabulary, prompts = weight.shape, len(head), len(base)
    out = torch.empty((triton.cdiv(vocabulary, UNIT), prompts, neurons), dtype=torch.float32, device=weight.device)
    slopes = part.slopes.mul_(LOG2E).contiguous()
    tilt = slopes if part.tilt is None else (part.tilt * LOG2E).contiguous()
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (0, 0)
    chosen = tile(weight.dtype, prompts, stored is not None, capability)
    programs = triton.cdiv(neurons, chosen.neurons) * triton.cdiv(vocabulary, chosen.words)
    with current(weight.device):
        _kernel[(programs,)](
            weight, head, weight if stored is None else stored, base, lean, slopes, tilt, out,
            neurons, vocabulary, hidden, prompts, 0.0 if softcap is None else softcap * LOG2E,
            STARTED=stored is not None, TILTED=part.tilt is not None, CAPPED=softcap is not None, PRECISION=rounding,
            WIDENED=INTERPRETED and weight.dtype == torch.bfloat16,  # whose bits it would multiply as whole numbers
            UNIT=UNIT, BLOCK_N=chosen.neurons, BLOCK_V=chosen.words, BLOCK_D=chosen.hidden,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    largest = out.amax(0)
    return out.sub_(largest).exp2_().sum(0).log2_().add_(largest)


def throughput(neurons=14336, hidden=4096, vocabulary=128256, prompts=6, dtype=torch.bfloat16, device="cuda") -> dict[str, float]:
    """What the kernel and a plain matrix product of the same shape and dtype reach, in TFLOP/s, and the kernel's seconds; needs a
    GPU. The kernel's include the exponentials, which are not counted as operations."""
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device)
    weight, head = normal(neurons, hidden).to(dtype) / 64, normal(vocabulary, hidden).to(dtype) / 64
    part = Perturbation(normal(prompts, hidden), normal(prompts, neurons), torch.ones(prompts, device=device), None)
    base = normal(prompts, vocabulary)
    rounding = "ieee" if dtype == torch.float32 else "tf32"
    flops = 2e-12 * neurons * hidden * vocabulary
    some = head[: min(vocabulary, 16384)]
    with current(weight.device):
        kernel = triton.testing.do_bench(lambda: _log_sums(part, weight, head, None, base, base, None, rounding)) / 1e3
        plain = triton.testing.do_bench(lambda: weight @ some.T) / 1e3 * vocabulary / len(some)
    return {"seconds": kernel, "tflops": flops / kernel, "matmul_tflops": flops / plain}
