"""Causal tracing (ROME, arXiv 2202.05262): which state of a noised run, put back to what it was, brings the answer back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..models.arch import ModelView, Readout, evaluating
from ..models.hooks import altered, record, record_calls, repeated
from ..models.passes import chunks
from ..models.products import frozen

ROWS_AT_A_TIME = 96


@dataclass(frozen=True)
class Trace:
    """answer: the traced token. clean: its probability; noised [R]: for each draw, with the subject noised. state, ffn [R, T, L]:
    with the output of block l (or the FFN outputs of the `window` blocks around it) put back at token t."""

    answer: int
    clean: float
    noised: torch.Tensor
    state: torch.Tensor
    ffn: torch.Tensor


def subject_noise(view: ModelView, rows: Sequence[Sequence[int]]) -> float:
    """Three standard deviations of the entries of the embeddings of some tokens: what ROME noises subjects with."""
    ids = torch.tensor(sorted({i for row in rows for i in row}))
    embed = view.model.get_input_embeddings()
    return 3 * embed(ids.to(embed.weight.device)).float().std().item()


@torch.no_grad()
def trace(
    view: ModelView, ids: Sequence[int], subject: range, noise: float, draws: int, seed: int, window: int, answer: int | None = None
) -> Trace:
    """Of a prompt `ids` [T] with its subject's tokens: the probability of `answer` (None: the model's own next token) with the
    subject's embeddings noised, for `draws` draws, and again with each state put back, one token and block at a time.

    noise: standard deviation. window: so many blocks' FFN outputs are put back together. A block's run begins above what it puts
    back. The model is left as it was found; weights are only read.
    """
    tokens = torch.tensor([list(ids)], device=view.device)
    wanted = {f"s{layer}": (view.blocks[layer], "output") for layer in range(view.depth)}
    wanted |= {f"f{layer}": (view.addend(layer), "output") for layer in range(view.depth)}
    with evaluating(view.model), frozen(view.model):
        with record({**wanted, "final": (view.norm, "input")}) as clean:
            view.model.base_model(input_ids=tokens, use_cache=False)
        said = torch.log_softmax(_logits(view.readout, clean["final"]), -1)[0]
        answer = int(said.argmax()) if answer is None else answer
        clean_probability = said[answer].exp().item()
        width = view.model.get_input_embeddings().weight.shape[1]
        drawn = torch.randn(draws, len(subject), width, generator=torch.Generator().manual_seed(seed)) * noise
        found = torch.zeros(2, draws, len(ids), view.depth)
        for at in chunks(range(len(ids)), max(1, ROWS_AT_A_TIME // draws)):
            run = _Noised(view, tokens, subject, drawn, answer, at)
            for layer in range(view.depth):
                found[0][:, at, layer] = run.with_state(layer, clean[f"s{layer}"])
                span = range(max(0, layer - (window - 1) // 2), min(view.depth, layer + window // 2 + 1))
                found[1][:, at, layer] = run.with_ffn(span, {i: clean[f"f{i}"] for i in span})
    return Trace(answer, clean_probability, run.probability[:, 0], found[0], found[1])


class _Noised:
    """A noised batch [draws · tokens of `at`] kept block by block, so that what is put back at a block costs those above it."""

    def __init__(self, view: ModelView, tokens: torch.Tensor, subject: range, drawn: torch.Tensor, answer: int, at: Sequence[int]):
        self.view, self.readout, self.answer, self.shape = view, view.readout, answer, (len(drawn), len(at))
        self.places = torch.arange(len(drawn) * len(at)), torch.tensor(list(at) * len(drawn))
        added = drawn.repeat_interleave(len(at), 0)

        def noised(embedded: torch.Tensor) -> torch.Tensor:
            embedded = embedded.clone()
            embedded[:, subject.start : subject.stop] += added.to(embedded)
            return embedded

        wanted = {f"i{layer}": (block, "input") for layer, block in enumerate(view.blocks)}
        wanted["final"] = (view.norm, "input")
        noise = altered({view.model.get_input_embeddings(): noised})
        with noise, record(wanted) as self.seen, record_calls(view.blocks) as self.calls:
            view.model.base_model(input_ids=tokens.expand(len(added), -1), use_cache=False)
        self.probability = self._read(self.seen["final"])

    def with_state(self, layer: int, clean: torch.Tensor) -> torch.Tensor:
        """Probabilities [draws, tokens] with the output of a block put back."""
        last = layer == self.view.depth - 1
        hidden = self.seen["final"] if last else self.seen[f"i{layer + 1}"]
        return self._above(layer + 1, self._put(hidden, clean))

    def with_ffn(self, layers: range, clean: dict[int, torch.Tensor]) -> torch.Tensor:
        """Probabilities [draws, tokens] with what some blocks' FFNs add to the stream put back."""
        with altered({self.view.addend(layer): partial(self._put, clean=clean[layer]) for layer in layers}):
            return self._above(layers.start, self.seen[f"i{layers.start}"])

    def _put(self, hidden: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The clean run's states [1, T, D] in each row's own token."""
        (rows, columns), hidden = self.places, hidden.clone()
        hidden[rows.to(hidden.device), columns.to(hidden.device)] = clean[0][columns.to(clean.device)].to(hidden)
        return hidden

    def _above(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        for output in repeated(self.view.blocks[layer:], hidden, self.calls[layer:]):
            hidden = output
        return self._read(hidden)

    def _read(self, final: torch.Tensor) -> torch.Tensor:
        said = torch.softmax(_logits(self.readout, final), -1)[:, self.answer]
        return said.view(self.shape).float().cpu()


def _logits(readout: Readout, final: torch.Tensor) -> torch.Tensor:
    """Of the last token [rows, V], from states [rows, T, D]."""
    return readout.logits(final[:, -1].to(readout.head.device, readout.head.dtype)).double()
