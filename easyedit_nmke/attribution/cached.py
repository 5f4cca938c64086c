"""U = W_U·diag(g)·w_out of the edited layers, kept: an edit changes w_out by a low-rank Δ, and U by W_U·diag(g)·Δ.

Scoring is then bound by memory. What was added since U was last computed is kept beside it as float32 factors, so that small
changes are not rounded away; after `REFRESH_EVERY` edits U is computed anew. Nothing is trusted: before each use the digest of the
weights says whether they are what the edits told of made them, and some words' rows are compared with exact ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from ..models.device import free_memory
from ..models.products import exact_products, linear
from ..models.updates import LowRank, fingerprint
from .linear import project

logger = logging.getLogger(__name__)

REFRESH_EVERY = 32  # edits; a pending column costs a pass as much as 1/D of computing U
SAMPLED_WORDS = 16
# Largest relative error of a neuron's sampled projections: bfloat16 storage alone makes 0.0017 (measured, as its rounding says).
DRIFT = {torch.bfloat16: 0.008, torch.float32: 1e-4, torch.float64: 1e-4}
WORDS_AT_A_TIME = 4096


class Projection:
    """One layer's U as stored [N, V] + (left [V, K]·right [K, N])ᵀ, K = `width` pending columns."""

    def __init__(self, w_out: torch.Tensor, readout):
        half = w_out.dtype in (torch.bfloat16, torch.float16)
        shape = (w_out.shape[1], len(readout.head))
        self.stored = torch.empty(shape, dtype=torch.bfloat16 if half else w_out.dtype, device=w_out.device)
        self.refreshes = 0
        self.refresh(w_out, readout, "first use")

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
        """U of some neurons and words [n, words]."""
        block = self.stored[neurons, words].to(self.dtype, copy=True)
        return block.addmm_(self.right[:, neurons].T, self.left[words].T) if self.width else block

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
        self.history = [(_digest(w_out), 0)]  # (digest of the weights, columns pending) since the refresh
        self.synced = True
        self.refreshes, self.reason, self.drift = self.refreshes + 1, reason, 0.0
        logger.debug("projections computed anew: %s", reason)

    def follow(self, updates: Sequence[LowRank], w_out: torch.Tensor, readout) -> None:
        """All that one edit added to w_out, as it is now."""
        if not self.synced:  # whatever else happened since the last use has not been looked at: there is nothing to follow from
            self.history = []
            return
        left = torch.cat([update.left.to(self.right) for update in updates], 1)
        right = torch.cat([update.right.to(self.right) for update in updates])
        starts = range(0, len(readout.head), WORDS_AT_A_TIME)
        change = torch.cat([self._head(slice(start, start + WORDS_AT_A_TIME), readout) @ left for start in starts])
        self.left, self.right = torch.cat([self.left, change], 1), torch.cat([self.right, right])
        self.history.append((_digest(w_out), self.width))
        self.synced = False

    def sync(self, w_out: torch.Tensor, readout, refresh_every: int, bound: float | None, step: int) -> None:
        """Make U that of w_out: drop what was taken back, compute it anew when anything else happened."""
        digest, self.synced = _digest(w_out), True
        known = [i for i, (seen, _) in enumerate(self.history) if seen == digest]
        if not known:
            return self.refresh(w_out, readout, "the weights were changed by something else")
        del self.history[known[-1] + 1 :]
        columns = self.history[-1][1]
        self.left, self.right = self.left[:, :columns].contiguous(), self.right[:columns].contiguous()
        if len(self.history) > refresh_every or columns > w_out.shape[0] // 4:
            return self.refresh(w_out, readout, f"{len(self.history) - 1} edits since the last time")
        self.drift = self.measure(w_out, readout, step)
        bound = DRIFT[self.stored.dtype] if bound is None else bound
        if not self.drift <= bound:
            self.refresh(w_out, readout, f"drift {self.drift:.2g} > {bound:.2g}")

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
        self.uses = 0  # edits that attributed with this cache at hand, whichever backend they used

    def __deepcopy__(self, _memo) -> AttributionCache:
        return AttributionCache(self.memory, self.refresh_every, self.drift)

    @exact_products()
    def projection(self, layer: int, w_out: torch.Tensor, readout) -> Projection:
        """U of the layer's w_out [D, N] as it is now; MemoryError when it does not fit."""
        found = self.layers.get(layer)
        if found is None or found.stored.shape != (w_out.shape[1], len(readout.head)) or found.stored.device != w_out.device:
            self.layers.pop(layer, None)
            self.check(1, w_out, readout)
            self.layers[layer] = Projection(w_out, readout)
        else:
            found.sync(w_out, readout, self.refresh_every, self.drift, self.uses)
        return self.layers[layer]

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

    @exact_products()
    def follow(self, updates: Mapping[int, Sequence[LowRank]], weights: Mapping[int, torch.Tensor], readout) -> None:
        """`updates` of each layer were written; weights: layer -> its w_out as it is now."""
        for layer in set(updates) & set(self.layers):
            self.layers[layer].follow(updates[layer], weights[layer], readout.to(weights[layer].device))


def _digest(w_out: torch.Tensor) -> int:
    return fingerprint({0: w_out if w_out.is_contiguous() else w_out.T})
