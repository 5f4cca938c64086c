"""The blocks above a target value, run on what depends on it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..models.arch import ModelView
from ..models.hooks import only_at, record, record_calls, repeated
from .value_texts import Batch

# Tokens up to which a GPU's products take as long as reading the weights: leaving some out costs launches and saves nothing.
FEW = 256


def few_on(device: torch.device) -> int:
    """Tokens of a step, up to which every FFN is computed for all of them."""
    return FEW if device.type == "cuda" else 0


class Above:
    """The blocks above `z_layer`, run again and again on the columns from `batch.start` on with another value at the subject.

    A first forward pass keeps block `z_layer`'s output, its FFN's, the attention keys and values of the columns before, and
    what each later block is called with besides its hidden states (masks, positions); none of it depends on the value.
    """

    def __init__(self, view: ModelView, batch: Batch, z_layer: int):
        self.view, self.z_layer, self.blocks = view, z_layer, list(view.blocks)[z_layer + 1 :]
        wanted = {"block": (view.blocks[z_layer], "output"), "ffn": (view.addend(z_layer), "output")}
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        first = self._first(batch) if batch.start else {}
        with torch.no_grad(), only_at(first), record(wanted) as seen, record_calls(self.blocks) as calls:
            view.model.base_model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        before = _Before({i: (kv.keys, kv.values) for i, kv in enumerate(cache.layers) if i > z_layer}, batch.start)
        self.lookups = {name: states[:, batch.lookup].float() for name, states in seen.items()}
        self.below, self.before = seen["block"][:, batch.start :], before

        def known(value):
            return before if value is cache else value

        self.recorded = [(tuple(map(known, args)), {name: known(v) for name, v in kwargs.items()}) for args, kwargs in calls]
        self._set(batch)

    def start(self, part: str) -> dict[int, torch.Tensor]:
        """z0 [D] of the requests whose bare prompt is here."""
        return {owner: self.lookups[part][row] for row, owner in self.batch.bare}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(rows, device=self.below.device)
        batch = self.batch.some(rows)
        self.below = self.below.index_select(0, index)[:, : batch.columns]
        self.before.keep(index)

        def some(value, name: str = ""):
            if name == "position_embeddings":
                return tuple(map(some, value))
            rows = torch.is_tensor(value) and name != "cache_position" and value.dim() > 1 and len(value) == len(self.batch.rows)
            return value.index_select(0, index.to(value.device)) if rows else value

        self.recorded = [(tuple(map(some, args)), {name: some(v, name) for name, v in kw.items()}) for args, kw in self.recorded]
        self._set(batch)

    def _set(self, batch: Batch) -> None:
        self.batch, columns = batch, slice(batch.start, batch.width)

        def later(value, name: str = ""):
            """What a call with all columns passes, for those that run."""
            if name == "position_embeddings":
                return tuple(part[:, columns] for part in value)
            if name == "position_ids":
                return value[:, columns]
            if name == "cache_position":
                return value[columns]
            mask = torch.is_tensor(value) and value.dim() == 4
            return value[:, :, columns, : batch.width] if mask else value

        self.calls = [(tuple(map(later, args)), {name: later(v, name) for name, v in kw.items()}) for args, kw in self.recorded]
        self.places = {} if batch.whole_texts else self._places(batch)

    def _first(self, batch: Batch) -> dict:
        """Where the first pass needs each FFN (see `only_at`): for the last block's attention, only what comes before."""
        before = batch.mask.clone()
        before[:, batch.start :] = 0
        whole, before = (part.flatten().nonzero()[:, 0] for part in (batch.mask, before))
        last = self.view.depth - 1
        return {
            self.view.ffn(layer): whole if layer <= self.z_layer else before[:0] if layer == last else before
            for layer in range(self.view.depth)
        }

    def _places(self, batch: Batch) -> dict:
        """Where a step needs each FFN; those that it needs everywhere are left out, and all where there are few tokens."""
        everywhere = len(batch.rows) * batch.columns
        if everywhere <= few_on(self.view.device):
            return {}
        real, read = batch.mask[:, batch.start :].flatten().nonzero()[:, 0], batch.read.sort().values
        last = self.view.depth - 1
        found = {layer: read if layer == last else real for layer in range(self.z_layer + 1, self.view.depth)}
        return {self.view.ffn(layer): where for layer, where in found.items() if len(where) < everywhere}

    def __call__(self, delta: torch.Tensor) -> list[torch.Tensor]:
        """Outputs [B, columns from start on, D] of block z_layer (with δ [R, D] added at the subject) and of every block above,
        right where they are needed."""
        batch, column = self.batch, self.batch.lookup - self.batch.start
        value = delta[batch.owner.to(delta.device)].to(self.below)
        hidden = self.below + pad(value[:, None], (0, 0, column, batch.columns - column - 1))
        with only_at(self.places):
            return [hidden, *repeated(self.blocks, hidden, self.calls)]


class _Before:
    """Stands for the cache that attention asks: the kept keys and values of earlier columns, then the new ones; nothing stays."""

    def __init__(self, kept: Mapping[int, tuple[torch.Tensor, torch.Tensor]], start: int):
        self.kept = {layer: (keys[:, :, :start], values[:, :, :start]) for layer, (keys, values) in kept.items()}

    def keep(self, rows: torch.Tensor) -> None:
        self.kept = {layer: tuple(kv.index_select(0, rows.to(kv.device)) for kv in pair) for layer, pair in self.kept.items()}

    def update(self, keys, values, layer: int, *_args, **_kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.kept[layer]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
