"""Columns that came before, and (L2·I + sum of b·bᵀ over them and the new ones)⁻¹ applied to new ones, column after column.

Up to SWITCH·d of d-dimensional columns B = [b1 … bt] this is done in the dual: of M = BᵀB + L2·I only the inverse of its Cholesky
factor is kept and grown, O(t² + t·d) a column. Beyond, in the primal: H = L2·(B_a B_aᵀ + L2·I)⁻¹ [d, d] over the first a columns
takes the place of the identity, M = B_rᵀ H B_r + L2·I over the rest, O(d²) a column. H is made anew from the columns after every
STEP·d more of them instead of being followed by rank-one changes, so it never drifts; its residual is measured and logged.

Precision. Columns are kept in float32 (float64 for a float64 basis); everything made of them is float64. Error of the result
against float64 throughout, columns of cosine 0.9, d 3072, t 2000, L2 0.01 times their mean energy (a larger L2 lessens all but the
projection's): columns kept in float32 1.4e-7; the products BᵀB in float32 8e-4, the Cholesky factor 4e-4, H 3e-6, B·w 3e-6; the
projection onto the null space 2e-6, and 2e-5 where ||P k|| is a tenth of ||k||. In blocks that stay in the cache, float64 products
with float32 columns take no longer than with float64 ones.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

SWITCH, STEP = 0.5, 0.125  # columns per dimension; at d 3072, t = d/2 an edit takes 14 ms in the dual and 15 in the primal (CPU)
PANEL = 64  # columns that are factored together once there are so many: their factor no longer tells how they came
SCRATCH = 1 << 19  # float64 numbers in a block that is converted and used while it is in a CPU's cache
CUDA_SCRATCH = 1 << 25  # on a GPU, where each block is two launches: 268 MB
RESIDUAL = 1e-8  # of H; beyond it the update loses more than float32 would


class Unsolvable(FloatingPointError, ValueError):
    """An update that floating point cannot give: a worn-out model's keys or residuals are not finite, or L2 is too small for them.
    As a FloatingPointError it is a failed edit, after which a run goes on."""


def cholesky(matrix: torch.Tensor, what: str | Callable[[], str]) -> torch.Tensor:
    """The lower Cholesky factor; `Unsolvable`, with `what` to say, where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise Unsolvable(what if isinstance(what, str) else what())
    return factor


class Ridge:
    """Past columns of `width` d, kept in `like`'s dtype and on its device, and l2 > 0.

    What it holds is a function of the columns and their order alone, bit for bit: not of how they were grouped when appended, nor
    of others that were dropped. Memory: t·d·4 bytes of columns and t²·8 of factor, each in a buffer of the next power of two
    (14336 neurons, 2000 edits: 117 MB + 34 MB); in the primal also d²·8, and three times that while it is made.
    """

    def __init__(self, width: int, l2: float, like: torch.Tensor):
        self.width, self.l2, self.count = width, l2, 0
        self._columns = like.new_zeros((0, width), dtype=torch.promote_types(like.dtype, torch.float32))
        self._factor = like.new_zeros((0, 0), dtype=torch.float64)  # inverse of the Cholesky factor, of the columns from _base on
        self._base, self._metric = 0, None  # how many columns H is made of, and H

    def solve(self, new: torch.Tensor) -> torch.Tensor:
        """(L2·I + B Bᵀ + new·newᵀ)⁻¹ new [d, k], float64; new [d, k] float64."""
        weights, schur = self._border(new)
        past = self._columns[self._base : self.count]
        return torch.cholesky_solve(self._weigh(new - transposed_times(past, weights)).T, schur).T

    def append(self, new: torch.Tensor) -> None:
        """Keep `new` [d, k] too. When this fails (`Unsolvable`), nothing has changed."""
        start, stop = self.count, self.count + new.shape[1]
        with self._unchanged_on_error(start):
            self._columns = _fit(self._columns, start, stop)
            self._columns[start:stop] = new.T
            self._extend(stop)

    def truncate(self, count: int) -> None:
        """Keep the first `count` columns only. When this fails, nothing has changed."""
        if not 0 <= count <= self.count:
            raise ValueError(f"count must be from 0 to {self.count}, got {count}")
        with self._unchanged_on_error(count):
            self._restart(count)
            self._extend(count)
            self._columns = _fit(self._columns, count, count)

    def without(self, columns: Sequence[int]) -> Ridge:
        """A new one that holds all columns but those numbered `columns` (from 0), bit for bit as if they had never come.

        O((t - first)·t·d), in products of PANEL columns: seconds at 14336 neurons and 2000 edits on a CPU.
        """
        kept = kept_columns(self.count, columns)
        twin, first = copy.copy(self), min(columns, default=self.count)
        twin._columns = _fit(self._columns[kept], len(kept), len(kept))
        twin._factor = self._factor.clone()
        twin._restart(first)
        twin._extend(len(kept))
        return twin

    def memory(self) -> dict[str, torch.Tensor]:
        """All that `append` has left but H, which `remember` makes anew."""
        rest = self.count - self._base
        return {"keys": self._columns[: self.count], "factor": self._factor[:rest, :rest]}

    def remember(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Take the place of the one that `memory` comes from."""
        columns, factor = memory["keys"], memory["factor"]
        count, rest = len(columns), len(columns) - self._base_of(len(columns))
        if columns.shape[1:] != (self.width,) or factor.shape != (rest, rest):
            raise ValueError(
                f"past keys are of shape {tuple(columns.shape)} with a factor {tuple(factor.shape)}, expected [keys, {self.width}] "
                f"with ({rest}, {rest}): they come from another null space or an older version; start a new state"
            )
        self._columns = _fit(self._columns[:0], 0, count)
        self._columns[:count] = columns
        self._absorb(count - rest)
        self._factor = _fit(self._factor[:0, :0], 0, rest, square=True)
        self._factor[:rest, :rest] = factor
        self.count = count

    @contextmanager
    def _unchanged_on_error(self, count: int) -> Iterator[None]:
        """For a change of nothing but columns from `count` on; of the others, only the last panel is factored anew in place."""
        before = dict(vars(self))
        panel = slice(max(self._panel(count) - self._base, 0), max(count - self._base, 0))
        rows = self._factor[panel].clone()
        try:
            yield
        except BaseException:
            vars(self).update(before)
            self._factor[panel] = rows
            raise

    def _border(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of past columns M⁻¹Bᵀ·H·new [t, k], and the Cholesky factor of the Schur complement [k, k]."""
        rest = self.count - self._base
        inverse, weighed = self._factor[:rest, :rest], self._weigh(new)
        overlap = inverse @ times(self._columns[self._base : self.count], weighed)
        identity = torch.eye(new.shape[1], dtype=new.dtype, device=new.device)

        def what() -> str:
            energy = new.square().sum(0).max().item()
            return f"L2 {self.l2:.3g} is too small for keys of energy {energy:.3g}: no digits are left; raise L2"

        return inverse.T @ overlap, cholesky(new.T @ weighed + self.l2 * identity - overlap.T @ overlap, what)

    def _weigh(self, new: torch.Tensor) -> torch.Tensor:
        return new if self._metric is None else self._metric @ new

    def _extend(self, count: int) -> None:
        """Factor the columns up to `count`: complete panels at once, also where some of their columns were factored one by one."""
        if self._panel(count) > self.count:
            self.count = self._panel(self.count)
            self._factor = _fit(self._factor, self.count - self._base, self.count - self._base, square=True)
        while self.count < count:
            if self._base != self._base_of(self.count):
                self._absorb(self.count)
            whole = self.count == self._panel(self.count) and self.count + PANEL <= count
            self._factor_next(PANEL if whole else 1)
        if self._base != self._base_of(self.count):
            self._absorb(self.count)

    def _factor_next(self, width: int) -> None:
        rest, stop = self.count - self._base, self.count - self._base + width
        weights, schur = self._border(self._columns[self.count : self.count + width].double().T)
        identity = torch.eye(width, dtype=schur.dtype, device=schur.device)
        inverse = torch.linalg.solve_triangular(schur, identity, upper=False).tril()
        self._factor = _fit(self._factor, rest, stop, square=True)
        self._factor[rest:stop, :rest] = -inverse @ weights.T
        self._factor[rest:stop, rest:stop] = inverse
        self.count += width

    def _restart(self, count: int) -> None:
        """Forget the factor from column `count` on; from its panel on, if that was complete."""
        start = count if self._panel(count) == self._panel(self.count) else self._panel(count)
        base = self._base_of(start)
        if base != self._base:
            self._absorb(base)
            start = base
        self._factor = _fit(self._factor, start - base, start - base, square=True)
        self.count = start

    def _panel(self, count: int) -> int:
        return count - count % PANEL

    def _base_of(self, count: int) -> int:
        """How many of `count` columns belong in H."""
        first, step = (PANEL * max(1, math.ceil(share * self.width / PANEL)) for share in (SWITCH, STEP))
        return 0 if count < first else count - (count - first) % step

    def _absorb(self, count: int) -> None:
        """H over the first `count` columns; none of the others are factored."""
        metric = None
        if count:
            metric = self.l2 * torch.eye(self.width, dtype=torch.float64, device=self._factor.device)
            for columns in self._columns[:count].split(512):
                columns = columns.double()
                metric.addmm_(columns.T, columns)
            what = f"L2 {self.l2:.3g} is too small for these keys: their covariance cannot be inverted; raise L2"
            metric = torch.cholesky_inverse(cholesky(metric, what)).mul_(self.l2)
            self._log(metric, count)
        self._metric, self._base, self._factor = metric, count, self._factor.new_zeros((0, 0))

    def _log(self, metric: torch.Tensor, count: int) -> None:
        columns = self._columns[:count]
        new = columns[-1:].double().T
        found = metric @ new
        residual = (found + transposed_times(columns, times(columns, found)) / self.l2 - new).norm() / new.norm().clamp(min=1e-30)
        level = logging.INFO if residual <= RESIDUAL else logging.WARNING
        advice = "" if residual <= RESIDUAL else f", more than {RESIDUAL:.0e}: raise L2"
        verb = "refactored" if self._base else "switched to the primal"
        message = "%s at %d past keys in %d dimensions, relative residual %.1e%s"
        logger.log(level, message, verb, count, self.width, residual.item(), advice)


def kept_columns(count: int, dropped: Sequence[int]) -> list[int]:
    """The numbers below `count` that are not `dropped`."""
    if wrong := sorted(column for column in dropped if not 0 <= column < count):
        raise ValueError(f"there are {count} past keys, numbered from 0; got {wrong[:5]}")
    dropped = set(dropped)
    return [column for column in range(count) if column not in dropped]


def times(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix [m, n] · columns [n, k], float64 of a matrix in any precision without a float64 copy of it."""
    out = columns.new_zeros((len(matrix), columns.shape[1]))
    for rows, block in _blocks(matrix, columns):
        out[rows] = block @ columns
    return out


def transposed_times(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrixᵀ · columns for matrix [m, n], columns [m, k], float64."""
    out = columns.new_zeros((matrix.shape[1], columns.shape[1]))
    for rows, block in _blocks(matrix, columns):
        out.addmm_(block.T, columns[rows])
    return out


def block_height(width: int, cuda: bool) -> int:
    """Rows of a matrix so wide that are converted at a time."""
    return max(1, (CUDA_SCRATCH if cuda else SCRATCH) // max(1, width))


def _blocks(matrix: torch.Tensor, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, these rows in like's dtype), each valid until the next: on a CPU the one buffer stays in the cache."""
    height = block_height(matrix.shape[1], matrix.is_cuda)
    buffer = like.new_empty((min(height, len(matrix)), matrix.shape[1]))
    for start in range(0, len(matrix), height):
        part = matrix[start : start + height]
        yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


def _fit(buffer: torch.Tensor, kept: int, count: int, square: bool = False) -> torch.Tensor:
    """The first `kept` rows of `buffer` with room for `count`: the size depends on `count` alone, as products of wider buffers may
    round otherwise."""
    room = 0 if count == 0 else max(16, 1 << (count - 1).bit_length())
    if room == len(buffer):
        return buffer
    fitted = buffer.new_zeros((room, room if square else buffer.shape[1]))
    kept = min(kept, room)
    fitted[:kept, : kept if square else None] = buffer[:kept, : kept if square else None]
    return fitted
