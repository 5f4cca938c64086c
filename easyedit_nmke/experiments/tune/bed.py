"""What all trials of a search share: a model that stays unedited, the facts that are edited, and how a trial is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean, harmonic_mean

import torch

from ...hparams import HyperParams
from ...methods import method_of
from ...methods.contract import HANDLE, apply_method
from ...models.arch import ModelView
from ...models.passes import chunks
from ...models.requests import Request
from ...scores import generation, metrics
from ...scores.kept import KeptText
from ..protocol import WORN_OUT

# Whether to go on, asked half-way with the Rel so far.
Watch = Callable[[float], bool]


class Bed:
    """The unedited model, `requests`, and what the model says of them; each trial puts its weights back."""

    def __init__(self, model, tok, requests: Sequence[Request], text: str | None = None):
        self.model, self.tok, self.view, self.requests = model, tok, ModelView(model), list(requests)
        self.before = metrics.quality(model, tok, self.requests)
        self.kept = KeptText(model, tok, text)

    def part(self, start: int, stop: int) -> Part:
        return Part(self, self.requests[start:stop], self.before[start:stop])


class Part:
    """Some of a bed's requests, edited as one stream."""

    def __init__(self, bed: Bed, requests: Sequence[Request], before: Sequence[dict]):
        self.bed, self.requests, self.before = bed, list(requests), list(before)

    def edited(
        self,
        settings: HyperParams,
        z: torch.Tensor | None = None,
        scores: Sequence[Mapping[int, torch.Tensor]] | None = None,
        watch: Watch = lambda rel: True,
    ) -> dict[str, float | None] | None:
        """Scores after the last edit of the stream, all of it written by `settings`, from the values z [D, requests] and the
        attribution scores of each request where they are given. None when `watch` ends it half-way. A model that is worn out by
        its edits scores 0."""
        bed, method = self.bed, method_of(settings)
        with unedited_afterwards(bed.model, method.matrices(bed.model, settings)):
            try:
                state = method.open(bed.model, bed.tok, settings, progress=False)
                for batch in chunks(range(len(self.requests)), settings.batch_size):
                    edit = None
                    if z is not None:
                        more = {} if scores is None else {"scores": _together([scores[i] for i in batch])}
                        edit = partial(method.replay, z=z[:, batch[0] : batch[-1] + 1], **more)
                    asked = self.requests[batch[0] : batch[-1] + 1]
                    apply_method(method, bed.model, bed.tok, asked, settings, state=state, edit=edit)
                    done, half = batch[-1] + 1, len(self.requests) // 2
                    if batch[0] < half <= done < len(self.requests) and not watch(self._rel(done)):
                        return None
                return self._scores()
            except WORN_OUT:
                return {"score": 0.0, "rel": 0.0}

    def _rel(self, count: int) -> float:
        asked = [(request.prompt, request.target_new) for request in self.requests[:count]]
        return fmean(metrics.token_accuracy(self.bed.model, self.bed.tok, asked))

    def _scores(self) -> dict[str, float | None]:
        model, tok = self.bed.model, self.bed.tok
        after = metrics.quality(model, tok, self.requests)
        found = metrics.summary(self.before, after)
        asked = [(prompt, (r.target_new, *r.aliases)) for r in self.requests for prompt in r.rephrase_prompts]
        said = [verdict.contains for verdict in generation.judge(model, tok, asked)]
        found = {**found, "gen_contains": fmean(said) if said else None, **self.bed.kept.score(model, tok)}
        return {**found, "score": score(found)}


def _together(scores: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {layer: torch.cat([one[layer] for one in scores]) for layer in scores[0]}


def score(found: Mapping[str, float | None]) -> float:
    """One number of a stream's scores, 0 to 1: the harmonic mean of Rel, Gen (the mean of the tokens that are right and of the
    answers that contain the target), Loc and exp(-KL) on kept text; of those that there are."""
    said = [found[name] for name in ("gen", "gen_contains") if found.get(name) is not None]
    kept = found.get("kept_kl")  # None where a method has written to the head
    parts = [found.get("rel"), fmean(said) if said else None, found.get("loc"), None if kept is None else math.exp(-kept)]
    return harmonic_mean([max(part, 0.0) if part == part else 0.0 for part in parts if part is not None])


@contextmanager
def unedited_afterwards(model, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put the weights back to what they are now, bit for bit, whatever happens inside; no state stays on the model."""
    originals = {name: model.get_parameter(name).detach().clone() for name in weights}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                model.get_parameter(name).copy_(original)
        if hasattr(model, HANDLE):
            delattr(model, HANDLE)
