"""Trials on one unedited model, in the process that searches or in each worker of a cluster: the same numbers come of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files import user_cache, write_whole
from ...hparams import HyperParams
from ...methods import method_of
from ...methods.nmke import NMKEHyperParams, attributed
from ...models.arch import editing
from ...models.loading import load_model
from ...models.requests import Request
from ...statistics.covariance import SecondMoment, cache_directory, shard_sums
from ..methods import changed
from .bed import Bed
from .studies import Tried, Watch
from .values import Values

Tell = Callable[[str, str], None]


class Trials:
    """base: settings but for those that a trial chooses, with the bed's model. folder: where target values are kept; None for a
    method without any. tell(stage, note) is called whenever something is done."""

    def __init__(
        self, bed: Bed, base: HyperParams, templates: Sequence[str], folder: Path | None, tell: Tell = lambda stage, note: None
    ):
        self.bed, self.base, self.tell = bed, base, tell
        self.values = Values(bed, templates, folder) if folder else None
        self.replays = folder is not None and method_of(base).replay is not None
        self.scores: list[dict[int, torch.Tensor]] = [{} for _ in bed.requests]

    @classmethod
    def elsewhere(
        cls, base: HyperParams, requests: Sequence[Request], text: str, templates: Sequence[str], kept: str | None
    ) -> Trials:
        """In a worker, which loads the model and keeps values in its own cache, in a folder of the name `kept`."""
        model, tok = load_model(base)
        folder = user_cache() / "tune" / kept if kept else None
        with editing(model):
            bed = Bed(model, tok, requests, text)
        return cls(bed, changed(base, {"model_name": (model, tok)}), templates, folder)

    def tried(self, stage: str, chosen: Mapping[str, Any], watch: Watch, *rest) -> Tried:
        """One trial of a stage: what was measured, what was asked of `watch`, and the seconds."""
        started = time.monotonic()
        with editing(self.bed.model):
            found = getattr(self, stage)(chosen, watch, *rest)
        return Tried(found, watch.reports, round(time.monotonic() - started, 2))

    def value(self, chosen: Mapping[str, Any], watch: Watch) -> dict | None:
        def told(score: float, step: int) -> bool:
            self.tell("values", f"block {chosen['block']}, {score:.2f}")
            return watch(score, step)

        return self.values.tried(chosen, told)

    def written(self, chosen: Mapping[str, Any], watch: Watch, count: int, enough: float) -> dict | None:
        """The first `count` facts written with the values of the unedited model; None where Rel is below `enough` half-way."""
        settings, z, scores = self.settings(chosen), None, None
        if self.replays:
            z = self.values.of(dict(chosen["values"]), settings, count, lambda: self.tell("writes", "values"))
            scores = self._attributed(settings, count)
        found = self.bed.part(0, count).edited(settings, z, scores, lambda rel: rel >= enough)
        self.tell("writes", "a trial fell behind" if found is None else f"{found['score']:.2f}")
        return found

    def streamed(self, chosen: Mapping[str, Any], watch: Watch, start: int, stop: int) -> dict | None:
        """Other facts, edited in earnest."""
        self.tell("streams", f"{stop - start} edits")
        part = self.bed.part(start, stop)
        return part.edited(self.settings(chosen), watch=lambda rel: self.tell("streams", f"Rel {rel:.2f}") or True)

    def settings(self, chosen: Mapping[str, Any]) -> HyperParams:
        """The base with what a trial has chosen."""
        values, own = dict(chosen.get("values") or {}), {k: v for k, v in chosen.items() if k not in ("values", "blocks")}
        if values:
            block = values.pop("block")
            own["layers"] = list(range(max(block + 1 - chosen["blocks"], 0), block + 1))
        return changed(self.base, {**own, **values})

    def _attributed(self, settings: HyperParams, count: int) -> list[dict[int, torch.Tensor]] | None:
        """Each request's attribution scores on the unedited model, of the settings' layers; made once for all trials. None where an
        edit needs none, or its own: `align` depends on values, which differ from trial to trial."""
        if not isinstance(settings, NMKEHyperParams) or not settings.attributes_beforehand:
            return None
        missing = [layer for layer in settings.layers if layer not in self.scores[0]]
        templates = self.values.templates
        for layer in missing:
            asked = changed(settings, {"layers": [layer]})
            found = attributed(self.bed.view, self.bed.tok, self.bed.requests[:count], templates, asked)[layer]
            for known, own in zip(self.scores, found.split(len(templates)), strict=False):
                known[layer] = own
            self.tell("writes", f"attribution, block {layer}")
        return self.scores[:count]

    # ---- of workers alone

    def sums(self, shard: Sequence[str], layers: Sequence[int], dtype: torch.dtype) -> dict[int, SecondMoment]:
        """Of the covariance of keys, in main memory."""
        with editing(self.bed.model):
            found = shard_sums(self.bed.view, self.bed.tok, shard, layers, dtype)
        return {layer: moment.cpu() for layer, moment in found.items()}

    def keep(self, name: str, content: bytes) -> None:
        """A file of statistics, in the cache, unless it is there."""
        file = cache_directory(self.base) / name
        if not file.is_file():
            write_whole(file, content)
