"""Harder readings of an edit, each when it is asked for: the edited prompt behind other text, and the edited sentence before a
neighbour's prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..messages import did_you_mean
from ..models.chat import framed_words
from ..models.prompts import SUBJECT, joined
from ..models.requests import Request
from . import free, metrics
from .metrics import SAME_SUBJECT

PREFIX, OVEREDIT = "prefix", "overedit"
READINGS = (PREFIX, OVEREDIT)
# Of everyday things and nobody in particular, so that nothing anyone would edit is told.
SENTENCES = (
    "The kettle began to hum.", "Rain ran down the window.", "Somebody had left a ladder by the wall.",
    "The soup was still too hot.", "A dog slept in the shade.", "The last bus was late again.",
    "Two children drew lines in the sand.", "The door would not close.", "Fresh bread lay on the table.",
    "The old clock had stopped.", "A letter came in the morning.", "The path was covered with leaves.",
    "They counted the chairs twice.", "The lamp gave little light.", "A blue coat hung on the hook.",
    "The garden needed water.", "He lost his gloves on the way.", "The radio played in the next room.",
    "She folded the map and smiled.", "The wind turned after lunch.", "Nobody had fed the cat.",
    "The stairs were freshly painted.", "A train passed far away.", "We waited until the snow had melted.",
)  # fmt: skip


def readings(names: str) -> tuple[str, ...]:
    """Those that a list such as "prefix, overedit" asks for. ValueError for others."""
    asked = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in asked:
        if name not in READINGS:
            raise ValueError(
                f"{name!r} is no further reading of an edit{did_you_mean(name, READINGS)}; known: {', '.join(READINGS)}"
            )
    return asked


class Harder:
    """The further readings `asked` for of a stream of requests, and what the unedited model says to them. ValueError for one that
    is too long for the model."""

    def __init__(self, model, tok, requests: Sequence[Request], asked: Sequence[str], separator: str | None):
        self.asked, self.separator = tuple(asked), separator
        self.requests = [harder(request, asked, tok, separator) for request in requests] if asked else []
        metrics.check(model, tok, self.requests, separator)
        self.before = metrics.quality(model, tok, self.requests, separator=separator)

    def score(self, model, tok, edits: int, judge: free.Judge | None = None) -> dict[str, float | None]:
        """Of the first `edits` requests. "prefix": as Rel, and as free generation ("prefix_exact" ...: `free.said`); "overedit": as
        Loc, against what the unedited model says to the same text. Nothing that was not asked for."""
        requests = self.requests[:edits]
        after = metrics.quality(model, tok, requests, separator=self.separator)
        found, scores = metrics.summary(self.before[: len(requests)], after), {}
        if PREFIX in self.asked:
            said = [free.Asked(i, r.prompt, (r.target_new, *r.aliases)) for i, r in enumerate(requests)]
            told = free.said(model, tok, PREFIX, said, self.separator, judge)
            scores |= {PREFIX: found["rel"], **{name: free.mean(values) for name, values in told.items()}}
        if OVEREDIT in self.asked:
            scores[OVEREDIT] = found["loc"]
        return scores


def harder(request: Request, asked: Sequence[str], tok, separator: str | None = None) -> Request:
    """The request as it is read again. With "prefix" its prompt stands behind three of SENTENCES, drawn by the prompt, so the same
    in every run. With "overedit" the prompts about other subjects (those of Loc) stand behind the edited sentence; else there are
    none. There are no rephrases and no portability."""
    prompt, locality = request.prompt, {}
    if PREFIX in asked:
        drawn = random.Random(_words(request, tok)).sample(SENTENCES, 3)
        prompt, _ = request.fill(f"{' '.join(drawn)} {SUBJECT}", tok)
    if OVEREDIT in asked:
        kinds = {kind: pairs for kind, pairs in request.locality.items() if kind != SAME_SUBJECT}
        first = sentence(request, tok, separator)
        locality = {kind: tuple((behind(first, p, tok), answer) for p, answer in pairs) for kind, pairs in kinds.items()}
    return replace(request, prompt=prompt, locality=locality, rephrase_prompts=(), portability={})


def sentence(request: Request, tok, separator: str | None = None) -> str:
    """The edited prompt, joined with its new answer, and a full stop."""
    return joined(_words(request, tok), request.target_new, separator, tok).strip().removesuffix(".") + "."


def _words(request: Request, tok) -> str:
    return request.prompt[slice(*framed_words(tok, request.prompt))]


def behind(text: str, prompt: str, tok) -> str:
    """The prompt behind other text; in a chat format that comes first in what the user says."""
    start, _ = framed_words(tok, prompt)
    return f"{prompt[:start]}{text} {prompt[start:]}"
