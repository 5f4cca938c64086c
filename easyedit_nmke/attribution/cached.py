"""U = W_U·diag(g)·w_out of the edited layers, kept: an edit changes w_out by a low-rank Δ, and U by W_U·diag(g)·Δ.

Scoring is then bound by memory. What was added since U was last computed is kept beside it as float32 factors, so that small
changes are not rounded away; after `REFRESH_EVERY` edits U is computed anew. It is told what the weights are made of (`Made`), and
U's bits depend on that alone, not on when it was asked for: a run that is taken up again, or goes on after an undone edit, scores
with the same bits. Nothing is trusted: some words' rows are compared with exact ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..models.device import free_memory, total_memory
from ..models.products import exact_products, linear
from ..models.updates import LowRank
from .linear import project

logger = logging.getLogger(__name__)

REFRESH_EVERY = 32  # edits; a pending column costs a pass as much as 1/D of computing U
SAMPLED_WORDS = 16
# Largest relative error of a neuron's sampled projections: bfloat16 storage alone makes 0.0017 (measured, as its rounding says).
DRIFT = {torch.bfloat16: 0.008, torch.float32: 1e-4, torch.float64: 1e-4}
WORDS_AT_A_TIME = 4096


# Of the device's whole memory, what `attribution_backend: auto` gives a cache: not of what is free, which is another time another.
CPU_SHARE, CUDA_SHARE = 0.1, 0.25


@dataclass(frozen=True)
class Made:
    """What a layer's values [D, N] are made of: the weights `base` before all of the `updates`, these in order, what `scaled` makes
    of outputs [D, k] in the stream, and the values `after` the first n of them."""

    base: torch.Tensor
    updates: Sequence[LowRank]
    scaled: Callable[[torch.Tensor], torch.Tensor]
    after: Callable[[int], torch.Tensor]

    @classmethod
    def of(cls, w_out: torch.Tensor) -> Made:
        """Values [D, N] that nothing was added to."""
        return cls(w_out, (), lambda left: left, lambda count: w_out)

    def start(self, refresh_every: int, columns: int) -> int:
        """How many updates U itself has seen: so many that never more than `refresh_every`, or `columns` of theirs, are pending."""
        start = pending = 0
        for count, update in enumerate(self.updates, 1):
            pending += update.left.shape[1]
            if count - start >= refresh_every or pending > columns:
                start, pending = count, 0
        return start

    def agrees(self, other: Made | None, count: int) -> bool:
        """Whether another's values after the first `count` updates are the same."""
        if other is None or len(other.updates) < count or not _same(self.base, other.base):
            return False
        return all(map(_same_update, self.updates[:count], other.updates[:count]))


class Projection:
    """One layer's U as stored [N, V] + (left [V, K]·right [K, N])ᵀ, K = `width` pending columns."""

    def __init__(self, w_out: torch.Tensor, readout):
        half = w_out.dtype in (torch.bfloat16, torch.float16)
        shape = (w_out.shape[1], len(readout.head))
        self.stored = torch.empty(shape, dtype=torch.bfloat16 if half else w_out.dtype, device=w_out.device)
        self.refreshes, self.made, self.start = 0, None, 0

    @staticmethod
    def bytes(w_out: torch.Tensor, readout) -> int:
        """Memory that a layer needs."""
        return w_out.shape[1] * len(readout.head) * (w_out.dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """In which factors are kept and products summed."""
        return torch.promote_types(self.stored.dtype, torch.float32)

    @property
    def width(self) -> int:
        return self.right.shape[0]

    def block(self, neurons: slice, words: slice) -> torch.Tensor:
        """U of some neurons and words [n, words], to be read only: what is stored where nothing is pending."""
        block = self.stored[neurons, words].to(self.dtype)
        return torch.addmm(block, self.right[:, neurons].T, self.left[words].T) if self.width else block

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """U of some words [ids, N]."""
        return self.stored[:, ids].T.to(self.dtype) + self.left[ids] @ self.right

    def refresh(self, w_out: torch.Tensor, readout, reason: str) -> None:
        """Compute U of w_out [D, N] exactly."""
        for start in range(0, len(readout.head), WORDS_AT_A_TIME):
            words = slice(start, start + WORDS_AT_A_TIME)
            head = self._head(words, readout)
            for first in range(0, w_out.shape[1], WORDS_AT_A_TIME):
                some = slice(first, first + WORDS_AT_A_TIME)
                self.stored[some, words] = linear(w_out[:, some].to(self.dtype).T, head)
        self.left = self.stored.new_empty((len(readout.head), 0), dtype=self.dtype)
        self.right = self.stored.new_empty((0, w_out.shape[1]), dtype=self.dtype)
        self.refreshes, self.reason, self.drift = self.refreshes + 1, reason, 0.0
        logger.debug("projections computed anew: %s", reason)

    def become(self, made: Made, w_out: torch.Tensor, readout, refresh_every: int, bound: float | None) -> None:
        """Make U that of w_out as `made` says, to the same bits from wherever it was."""
        start = made.start(refresh_every, w_out.shape[0] // 4)
        if self.start != start or not made.agrees(self.made, start):
            self.refresh(made.after(start), readout, f"as after {start} updates" if start else "first use")
            self.start, self.made = start, None
        pending, known = made.updates[start:], () if self.made is None else self.made.updates[start:]
        kept = 0
        while kept < min(len(pending), len(known)) and _same_update(pending[kept], known[kept]):
            kept += 1
        columns = sum(update.left.shape[1] for update in pending[:kept])
        self._forget(columns)
        for update in pending[kept:]:
            self._add(made.scaled(update.left.to(w_out.device)), update.right, readout)
        self.made = made
        self.drift = self.measure(w_out, readout, len(made.updates))
        bound = DRIFT[self.stored.dtype] if bound is None else bound
        if not self.drift <= bound:
            self.refresh(w_out, readout, f"drift {self.drift:.2g} > {bound:.2g}")
            self.made = None

    def _add(self, left: torch.Tensor, right: torch.Tensor, readout) -> None:
        starts = range(0, len(readout.head), WORDS_AT_A_TIME)
        change = torch.cat([self._head(slice(start, start + WORDS_AT_A_TIME), readout) @ left.to(self.right) for start in starts])
        self.left, self.right = torch.cat([self.left, change], 1), torch.cat([self.right, right.to(self.right)])

    def _forget(self, columns: int) -> None:
        """All but the first pending columns."""
        self.left, self.right = self.left[:, :columns].contiguous(), self.right[:columns].contiguous()

    def measure(self, w_out: torch.Tensor, readout, seed: int = 0) -> float:
        """Largest error of a neuron's projections on sampled words, relative to their norm or the neurons' mean norm."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(readout.head), (SAMPLED_WORDS,), generator=generator).to(w_out.device)
        head = self._head(ids, readout)
        exact = torch.cat([head @ values.to(self.dtype) for values in w_out.split(WORDS_AT_A_TIME, 1)], 1)
        size = exact.norm(dim=0)
        return float(((self.words(ids) - exact).norm(dim=0) / size.clamp(min=size.mean().clamp(min=1e-30))).max())

    def _head(self, words, readout) -> torch.Tensor:
        return project(readout.head[words].to(self.dtype, copy=True), readout)


class AttributionCache:
    """The projections of the edited layers, which live as long as the object. A copy starts empty.

    memory: bytes it may hold, None: half of what is free when a layer is first asked for. refresh_every: edits after which U is
    computed anew. drift: bound of the measured relative error, above which it is computed anew earlier; None: by storage type.
    """

    def __init__(self, memory: int | None = None, refresh_every: int = REFRESH_EVERY, drift: float | None = None):
        self.memory, self.refresh_every, self.drift = memory, refresh_every, drift
        self.layers: dict[int, Projection] = {}

    def __deepcopy__(self, _memo) -> AttributionCache:
        return AttributionCache(self.memory, self.refresh_every, self.drift)

    @exact_products()
    def projection(self, layer: int, w_out: torch.Tensor, readout, made: Made) -> Projection:
        """U of the layer's w_out [D, N] as it is now, which is as `made` says; MemoryError when it does not fit."""
        found = self.layers.get(layer)
        if found is None or found.stored.shape != (w_out.shape[1], len(readout.head)) or found.stored.device != w_out.device:
            self.layers.pop(layer, None)
            self.check(1, w_out, readout)
            found = self.layers[layer] = Projection(w_out, readout)
        found.become(made, w_out, readout, self.refresh_every, self.drift)
        return found

    def suits(self, layers: int, w_out: torch.Tensor, readout) -> bool:
        """Whether so many layers like this one take a small part of the device's memory, whatever else it holds, and fit."""
        share = CUDA_SHARE if w_out.is_cuda else CPU_SHARE
        most = total_memory(w_out.device) * share if self.memory is None else self.memory
        if layers * Projection.bytes(w_out, readout) > most:
            return False
        try:
            self.check(layers - len(self.layers), w_out, readout)
        except MemoryError as error:
            logger.info("%s", error)
            return False
        return True

    def check(self, layers: int, w_out: torch.Tensor, readout) -> None:
        """MemoryError when so many more layers like this one do not fit."""
        need = layers * Projection.bytes(w_out, readout)
        held = sum(projection.stored.nbytes for projection in self.layers.values())
        room = free_memory(w_out.device) / 2 if self.memory is None else self.memory - held
        if need > room:
            raise MemoryError(
                f"cached attribution needs {need / 1e9:.2f} GB more for {layers} layer(s), {room / 1e9:.2f} GB may be used; "
                "choose another attribution_backend"
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


def _same_update(one: LowRank, other: LowRank) -> bool:
    return one is other or (_same(one.left, other.left) and _same(one.right, other.right))
