"""Changes of single parameters, to the bit: how they are rounded, added, kept, and told apart by a fingerprint.

A parameter is seen as a matrix [out, in] here (`weights.Matrices`), whatever way round the model stores it; a vector as [n, 1].
An update is low-rank, sparse or dense. Its `first` and following edits share it: a low-rank one has a column for each, several or
none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from .device import triton_problem

HALF = (torch.bfloat16, torch.float16)

_CHUNK = 1 << 22
_BLOCK = 1 << 20  # elements of a weight that are summed at a time, in a CPU's cache: 4 MB
_CUDA_BLOCK = 1 << 22  # in a GPU's second-level cache, where without Triton each column of each block is two launches: 16 MB
_WRAP = (1 << 64) - 1


class LowRank(NamedTuple):
    """+= left [out, k] · right [k, in]; column i belongs to request `first` + i, or where requests have several to `first` +
    owner[i] (int64 [k], from 0)."""

    parameter: str
    left: torch.Tensor
    right: torch.Tensor
    first: int = 0
    owner: torch.Tensor | None = None

    @property
    def requests(self) -> int:
        """Up to the last one that has a column."""
        return self.left.shape[1] if self.owner is None else int(self.owner.max()) + 1

    def rounded(self, dtype: torch.dtype) -> LowRank:
        """What is added and recorded for weights of `dtype`: float32, and for 16-bit weights `right` in their own dtype, its rows
        scaled to a largest entry of 1 with the scales in `left`. No zero has a sign, so that zeros need not be kept."""
        left, right = self.left.float(), self.right.float()
        if dtype in HALF:
            scale = right.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
            left, right = left * scale, (right / scale[:, None]).to(dtype)
        return self._replace(left=left, right=right + 0)

    def without(self, requests: set[int]) -> LowRank | None:
        """Only the columns of the other requests; None when there is none."""
        owners = range(self.left.shape[1]) if self.owner is None else self.owner.tolist()
        kept = [i for i, owner in enumerate(owners) if self.first + owner not in requests]
        return self._only(kept) if kept else None

    def without_zeros(self) -> LowRank:
        """Only the columns that write something, one at least."""
        return self._only(self.left.any(0).nonzero().flatten().tolist() or [0])

    def _only(self, columns: list[int]) -> LowRank:
        if len(columns) == self.left.shape[1]:
            return self
        owner = torch.arange(self.left.shape[1], device=self.left.device) if self.owner is None else self.owner
        return self._replace(left=self.left[:, columns], right=self.right[columns], owner=owner[columns])

    def added_to(self, total: torch.Tensor, rows: slice) -> None:
        """Add these rows of the change to `total` [rows, in]: column after column, each product and each sum rounded on its own.
        On a GPU with Triton in one launch."""
        if total.is_cuda and triton_problem(total.device) is None:
            from .adding import add_columns

            add_columns(total, self.left[rows], self.right)
            return
        for column in range(self.left.shape[1]):
            total += self.left[rows, column, None] * self.right[column]


class Sparse(NamedTuple):
    """+= values [n] at `indices` [n] (int64, increasing) into the matrix, row after row; of `requests` requests from `first` on."""

    parameter: str
    indices: torch.Tensor
    values: torch.Tensor
    first: int = 0
    requests: int = 1

    def rounded(self, dtype: torch.dtype) -> Sparse:
        """What is added and recorded: float32, no zero with a sign, nothing for indices out of order (ValueError)."""
        if self.indices.shape != self.values.shape or (len(self.indices) > 1 and not (self.indices.diff() > 0).all()):
            raise ValueError(f"a sparse update of {self.parameter} needs a value for each of its indices, which must increase")
        return self._replace(indices=self.indices.long(), values=self.values.float() + 0)

    def without(self, requests: set[int]) -> Sparse | None:
        """None when all of its requests are among `requests`; it cannot be shared out."""
        return None if set(range(self.first, self.first + self.requests)) <= requests else self

    def added_to(self, total: torch.Tensor, rows: slice) -> None:
        """As `LowRank.added_to`."""
        start, width = rows.start * total.shape[1], total.shape[1]
        bounds = torch.searchsorted(self.indices, torch.tensor([start, start + len(total) * width], device=self.indices.device))
        inside = slice(*bounds.tolist())
        total.view(-1).index_add_(0, self.indices[inside] - start, self.values[inside])


class Dense(NamedTuple):
    """+= difference [out, in]; of `requests` requests from `first` on."""

    parameter: str
    difference: torch.Tensor
    first: int = 0
    requests: int = 1

    def rounded(self, dtype: torch.dtype) -> Dense:
        """What is added and recorded: float32, no zero with a sign."""
        return self._replace(difference=self.difference.float() + 0)

    without = Sparse.without

    def added_to(self, total: torch.Tensor, rows: slice) -> None:
        """As `LowRank.added_to`."""
        total += _matrix(self.difference)[rows]


Update = LowRank | Sparse | Dense
KINDS = {kind.__name__.lower(): kind for kind in (LowRank, Sparse, Dense)}


def tensors_of(update: Update) -> dict[str, torch.Tensor]:
    """Field -> tensor."""
    return {name: value for name, value in update._asdict().items() if torch.is_tensor(value)}


def moved(update: Update, *args, **kwargs) -> Update:
    """With its numbers as torch.Tensor.to would make them, indices only moved."""
    device = torch.empty(0).to(*args, **kwargs).device
    return update._replace(
        **{name: t.to(*args, **kwargs) if t.is_floating_point() else t.to(device) for name, t in tensors_of(update).items()}
    )


def of_parameter(updates: Iterable[Update], name: str) -> list[Update]:
    """Those that change it, in order."""
    return [update for update in updates if update.parameter == name]


@torch.no_grad()
def accumulate(into: torch.Tensor, start: torch.Tensor, updates: Sequence[Update]) -> None:
    """into [out, in] = start + Σ updates, one after the other, in float32 (for float64 weights in float64); rounded to `into` once.

    Every product and every sum is rounded on its own, so the bits depend on the numbers and their order alone: not on the
    device, its threads, or what was added together. `into` may be `start`. Scratch: two blocks and the updates.
    """
    exact = torch.promote_types(start.dtype, torch.float32)
    changes = [moved(update, into.device, exact) for update in _joined(updates)]
    into, start = _matrix(into), _matrix(start)
    rows = block_rows(start.shape[1], into.is_cuda)
    for first in range(0, len(start), rows):
        block = slice(first, first + rows)
        total = start[block].to(into.device, exact, copy=True).contiguous()
        for change in changes:
            change.added_to(total, block)
        into[block] = total


def _joined(updates: Iterable[Update]) -> Iterator[Update]:
    """Low-rank updates that follow one another as one, whose columns are added in the same order."""
    for place, some in itertools.groupby(updates, lambda update: isinstance(update, LowRank) and update.left.device):
        some = list(some)
        if place and len(some) > 1:
            left, right = (torch.cat([getattr(update, name) for update in some], dim) for name, dim in (("left", 1), ("right", 0)))
            some = [some[0]._replace(left=left, right=right)]
        yield from some


def block_rows(width: int, cuda: bool) -> int:
    """Rows of a weight so wide that are summed at a time."""
    return max(1, (_CUDA_BLOCK if cuda else _BLOCK) // width)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A vector as [n, 1]; its own memory."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def fingerprint(tensors: Mapping[Any, torch.Tensor]) -> int:
    """A 64-bit digest of the bits of some tensors: the same bits give the same digest, a changed bit changes it.

    Reads the tensors once, and waits once for each device that they are on, one after the other; scratch is 64 MB.
    """
    digest, parts = 0, []
    for bits in map(_words, tensors.values()):
        for chunk in bits.split(_CHUNK):
            part = (chunk * _weights(_CHUNK, bits.device)[: len(chunk)]).sum()
            if parts and parts[-1].device != part.device:
                digest, parts = _folded(digest, parts), []
            parts.append(part)
    return _folded(digest, parts) if parts else digest


def chunks_of(size: int, whole: bool = False) -> int:
    """How many chunks so many bytes are read in; `whole`: how many words the longest has."""
    words = -(-size // 8)
    return min(words, _CHUNK) if whole else -(-words // _CHUNK)


def _folded(digest: int, parts: Sequence[torch.Tensor]) -> int:
    """The digest after some chunks' sums, which are on one device."""
    for part in torch.stack(parts).tolist():
        digest = (digest * 6364136223846793005 + part + 1442695040888963407) & _WRAP
    return digest


@cache
def _weights(length: int, device: torch.device) -> torch.Tensor:
    """The odd numbers [length] int64 by which words are weighed: constants, drawn once for each device (32 MB)."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-(1 << 62), 1 << 62, (length,), generator=generator, dtype=torch.int64) | 1).to(device)


def hexadecimal(tensors: Mapping[Any, torch.Tensor]) -> str:
    """`fingerprint`, as files tell it."""
    return f"{fingerprint(tensors):016x}"


def model_digest(model: torch.nn.Module) -> str:
    """`fingerprint` of all parameters of a model, in hexadecimal."""
    return hexadecimal(dict(model.named_parameters()))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as int64 [words], with zeros up to the last one's end; its own memory where that is possible."""
    flat = tensor.detach().reshape(-1)
    share = 8 // flat.element_size()
    if len(flat) % share or flat.storage_offset() % share:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % share)).clone()
    return flat.view(torch.int64)
