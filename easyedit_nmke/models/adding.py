"""Many columns added to a matrix in one launch: a Triton kernel for `updates.accumulate` on a GPU.

Importing this file needs Triton; TRITON_INTERPRET=1, set before the import, runs the kernel on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import current

TALL, WIDE = 16, 128  # of the tile that one program sums


@triton.jit
def _kernel(total, left, right, R, C, K, TALL: tl.constexpr, WIDE: tl.constexpr):
    r = tl.program_id(0) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    inside = (r < R)[:, None] & (c < C)[None, :]
    found = tl.load(total + at, mask=inside, other=0)
    for k in range(K):
        a = tl.load(left + r.to(tl.int64) * K + k, mask=r < R, other=0)
        b = tl.load(right + tl.cast(k, tl.int64) * C + c, mask=c < C, other=0)
        found += a[:, None] * b[None, :]
    tl.store(total + at, found, mask=inside)


def add_columns(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total [R, C] += left [R, K] · right [K, C], column after column, all of one type and `total` contiguous: each product and
    each sum is rounded on its own, so nothing is fused."""
    (rows, width), columns = total.shape, left.shape[1]
    with current(total.device):
        _kernel[(triton.cdiv(rows, TALL), triton.cdiv(width, WIDE))](
            total, left.contiguous(), right.contiguous(), rows, width, columns, TALL, WIDE, enable_fp_fusion=False
        )
