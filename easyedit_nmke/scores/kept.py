"""Kept text: how far a model has moved from its unedited self on ordinary text, and how well it still predicts that text."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

import torch
from torch.nn.functional import nll_loss

from ..models.arch import context_length, evaluating
from ..models.passes import body_and_head, input_device
from ..models.products import frozen
from ..models.prompts import encode, pad
from ..models.updates import fingerprint
from .metrics import logits_at, softcapped

logger = logging.getLogger(__name__)

OWN = Path(__file__).with_name("kept.txt")  # written for this package: nothing in it is a fact of the world that one might edit
WINDOW = 256  # tokens that are read together
TOKENS = 16_384  # of a text that are used: 130 MB of states at Llama-3-8B's size in bfloat16
ROWS = 32  # positions compared at once: a few blocks of 32 x 262k words in float32, 34 MB each


class KeptText:
    """What the unedited model says to a text, to be compared with what an edited one says to it.

    The text (its first TOKENS tokens) is cut into windows of at most WINDOW tokens, or the model's context, each begun with the
    tokenizer's special tokens and read by itself, always in the same way, so that an unedited model has a KL of 0. Kept are the
    final hidden states [tokens, D] and a reference to the head; logits never exist for more than one window.

    `model` is the unedited one, with a body and a head; later ones may be wrappers with a forward pass and nothing else. text:
    None for the package's own 2,300 words. ValueError when the text is too short to predict a token of it.
    """

    def __init__(self, model, tok, text: str | None = None):
        parts = body_and_head(model)
        if parts is None:
            raise ValueError(f"{type(model).__name__} has no body and head to keep the unedited model's states of; unwrap it")
        text = own_text() if text is None else text
        body, self._head = parts
        self._softcap, self._head_bits = getattr(model.config, "final_logit_softcapping", None), self._fingerprint()
        self.sha256 = digest(text)
        self._windows, self._start = _windows(tok, text, context_length(model))
        if not self._windows:
            raise ValueError(f"the text {text[:40]!r} has no token to predict; give a longer one")
        self._states: list[torch.Tensor] = []
        with evaluating(model), torch.no_grad(), frozen(model):
            for ids in self._windows:
                tokens = pad([ids], input_device(model))
                hidden = body(**tokens.inputs(), use_cache=False).last_hidden_state[0]
                self._states.append(hidden[self._start - 1 : -1].cpu())

    def score(self, model, tok=None) -> dict[str, float | None]:
        """{"kept_kl": mean KL(unedited || model) in nats a token, "perplexity": of the model as it is}, over the text's tokens.

        Infinite for a model whose logits are not finite. The KL is None, with a warning, when the unedited head itself has been
        written to: what the unedited model said is lost then. `tok` is not needed: the tokens are those of the beginning.
        """
        known = self._fingerprint() == self._head_bits
        if not known:
            logger.warning("the output head was edited, so the unedited model's probabilities cannot be told; no kept_kl")
        total = torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), frozen(model):
            for ids, states in zip(self._windows, self._states, strict=True):
                total += self._window(model, ids, states if known else None)
        kl, nll = (total / sum(map(len, self._states))).tolist()
        perplexity = math.exp(nll) if nll < math.log(1e300) else math.inf  # which no nan is below either
        return {"kept_kl": (max(kl, 0.0) if math.isfinite(kl) else math.inf) if known else None, "perplexity": perplexity}

    def _window(self, model, ids: list[int], states: torch.Tensor | None) -> torch.Tensor:
        """[2] sums over a window's predicted tokens: KL (0 without `states`) and NLL."""
        tokens, places = pad([ids], input_device(model)), torch.arange(self._start - 1, len(ids) - 1)
        (now,) = logits_at(model, tokens, torch.zeros_like(places), places)
        before = None if states is None else softcapped(self._head(states.to(self._head.weight.device)), self._softcap)
        labels, total = torch.tensor(ids[self._start :], device=now.device), torch.zeros(2, dtype=torch.float64)
        for part in torch.arange(len(labels)).split(ROWS):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            said = now[rows].float().log_softmax(-1)
            total[1] += nll_loss(said, labels[rows], reduction="none").double().sum().cpu()
            if before is not None:
                total[0] += divergence(before[rows].float().log_softmax(-1).to(said.device), said).double().sum().cpu()
        return total

    def _fingerprint(self) -> int:
        return fingerprint(dict(self._head.named_parameters()))


def divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before || after) in nats, of log-probabilities [..., V] -> [...]; a word that `before` rules out counts nothing."""
    return torch.where(before > -math.inf, before.exp() * (before - after), 0.0).sum(-1)


def own_text() -> str:
    """The package's text: a story, a recipe, a letter, an explanation, a conversation, instructions, a report and an opinion."""
    return OWN.read_text(encoding="utf-8")


def read(file: Path) -> str:
    """A text file. ValueError, in one sentence, when it is not there, not UTF-8 or empty."""
    if not file.is_file():
        raise ValueError(f"there is no text file {file} to see how far the model moves on")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8 ({error})") from None
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    return text


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _windows(tok, text: str, context: int | None) -> tuple[list[list[int]], int]:
    """(token ids of each window, special tokens in front included; the index of the first token that is predicted)."""
    front, ids = encode(tok, ""), encode(tok, text)
    body = ids[len(front) :] if ids[: len(front)] == front else ids  # a text with special tokens of its own is given none
    body, start = body[:TOKENS], max(len(front), 1)
    step = min(WINDOW, context or WINDOW) - len(front)
    windows = [front + body[i : i + step] for i in range(0, len(body), step)]
    return [window for window in windows if len(window) > start], start
