"""Low-rank changes of weights, to the bit: how they are rounded, added, and told apart by a fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)

_CHUNK = 1 << 22
_BLOCK = 1 << 20  # elements of a weight that are summed at a time: 4 MB
_WRAP = (1 << 64) - 1


class Update(NamedTuple):
    """One low-rank change of a layer's w_out [D, F]: left [D, k] · right [k, F]; column i belongs to request `first` + i."""

    layer: int
    left: torch.Tensor
    right: torch.Tensor
    first: int = 0

    def rounded(self, dtype: torch.dtype) -> Update:
        """What is added and recorded for weights of `dtype`: float32, and for 16-bit weights `right` in their own dtype, its rows
        scaled to a largest entry of 1 with the scales in `left`. No zero has a sign, so that zeros need not be kept."""
        left, right = self.left.float(), self.right.float()
        if dtype in HALF:
            scale = right.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
            left, right = left * scale, (right / scale[:, None]).to(dtype)
        return self._replace(left=left, right=right + 0)

    def without(self, requests: set[int]) -> Update:
        """Only the columns of the other requests."""
        kept = [i for i in range(self.left.shape[1]) if self.first + i not in requests]
        return self if len(kept) == self.left.shape[1] else self._replace(left=self.left[:, kept], right=self.right[kept])


@torch.no_grad()
def accumulate(into: torch.Tensor, start: torch.Tensor, updates: Sequence[Update]) -> None:
    """into [D, F] = start + Σ left·right, column after column, in float32 (for float64 weights in float64); rounded to `into` once.

    Every product and every sum is rounded on its own, so the bits depend on the numbers and their order alone: not on the
    device, its threads, or what was added together. `into` may be `start`. Scratch: 8 MB and the factors.
    """
    exact = torch.promote_types(start.dtype, torch.float32)
    left = [update.left.to(into.device, exact) for update in updates]
    right = [update.right.to(into.device, exact) for update in updates]
    rows = max(1, _BLOCK // start.shape[1])
    for first in range(0, len(start), rows):
        block = slice(first, first + rows)
        total = start[block].to(into.device, exact, copy=True)
        for one, other in zip(left, right, strict=True):
            for column in range(one.shape[1]):
                total += one[block, column, None] * other[column]
        into[block] = total


def fingerprint(tensors: Mapping[Any, torch.Tensor]) -> int:
    """A 64-bit digest of the bits of some tensors: the same bits give the same digest, a changed bit changes it.

    Reads the tensors once; scratch is 64 MB.
    """
    digest, words = 0, {name: _words(tensor) for name, tensor in tensors.items()}
    longest = max(map(len, words.values()), default=0)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(1 << 62), 1 << 62, (min(_CHUNK, longest),), generator=generator, dtype=torch.int64) | 1
    for bits in words.values():
        weights = drawn.to(bits.device)
        for chunk in bits.split(_CHUNK):
            part = int((chunk * weights[: len(chunk)]).sum().item())
            digest = (digest * 6364136223846793005 + part + 1442695040888963407) & _WRAP
    return digest


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as int64 [words], with zeros up to the last one's end; its own memory where that is possible."""
    flat = tensor.detach().reshape(-1)
    share = 8 // flat.element_size()
    if len(flat) % share or flat.storage_offset() % share:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % share)).clone()
    return flat.view(torch.int64)
