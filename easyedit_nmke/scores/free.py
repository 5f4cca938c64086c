"""Free generation over requests: what the model says to their prompts by itself, scored by its text and by a judge.

Two ends of a text: the answer's (the first end of a sentence or line after it: `answers.says`), and the model's own, an end token
(natural stop). Means are over each request's prompts, then over requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from ..models.chat import special_texts
from ..models.requests import ATTRIBUTE, Request
from . import generation
from .answers import answer, only, says
from .metrics import SAME_SUBJECT

# (prompt, the answers of which any counts, what was said) -> whether that gives one of them; see judge.py.
Judge = Callable[[Sequence[tuple[str, Sequence[str], str]]], list[bool]]


class Asked(NamedTuple):
    """A prompt and the answers of which any counts; owner: the number of the request that it belongs to."""

    owner: int
    prompt: str
    truths: tuple[str, ...]


def said(
    model, tok, name: str, asked: Sequence[Asked], separator: str | None = None, judge: Judge | None = None
) -> dict[str, dict[int, float]]:
    """By score, owner -> mean over its prompts. `<name>_exact` and `<name>_contains`: as `generation.judge`. Of what the model says
    until an end token, or for STOP_TOKENS tokens (two more than a longer truth has): `<name>_natural_exact`, all of it is a truth;
    `<name>_natural_contains`, a truth is in it as whole words; `<name>_judged`, where there is a judge: it finds a truth in it."""
    truths = [(prompt, truths) for _, prompt, truths in asked]
    verdicts = generation.judge(model, tok, truths, separator=separator, go_on=generation.STOP_TOKENS)
    found = {
        "exact": [verdict.exact for verdict in verdicts],
        "contains": [verdict.contains for verdict in verdicts],
        "natural_exact": [only(verdict.whole, one.truths) for verdict, one in zip(verdicts, asked, strict=True)],
        "natural_contains": [says(verdict.whole, one.truths)[1] for verdict, one in zip(verdicts, asked, strict=True)],
    }
    if judge is not None:
        found["judged"] = judge([(plain(tok, p), t, v.whole) for (_, p, t), v in zip(asked, verdicts, strict=True)])
    owners = [one.owner for one in asked]
    return {f"{name}_{kind}": by_request(owners, values) for kind, values in found.items()}


class Kept:
    """What the unedited model says until it stops to prompts about other subjects, the first of each type that counts as Loc; and
    how much of that an edited one says."""

    def __init__(self, model, tok, requests: Sequence[Request], separator: str | None = None):
        self.separator = separator
        kinds = [(i, kind, pairs) for i, request in enumerate(requests) for kind, pairs in request.locality.items()]
        self.asked = [(i, pairs[0][0]) for i, kind, pairs in kinds if pairs and kind not in (SAME_SUBJECT, ATTRIBUTE)]
        self.before = generation.natural_texts(model, tok, [prompt for _, prompt in self.asked], separator=separator)

    def score(self, model, tok, edits: int, judge: Judge | None = None) -> dict[str, float | None]:
        """Of the first `edits` requests. `loc_natural_exact`: the text is the unedited model's; `loc_natural_contains`: the
        unedited model's answer, up to the first end of a sentence or line, is in it as whole words; `loc_judged`: the judge finds
        that answer in it. Where the unedited model gives none, the last two are as the first."""
        count = sum(owner < edits for owner, _ in self.asked)
        prompts = [prompt for _, prompt in self.asked[:count]]
        texts = generation.natural_texts(model, tok, prompts, separator=self.separator)
        old = [answer(text) for text in self.before[:count]]
        same = [only(text, before) for text, before in zip(texts, self.before, strict=False)]
        answered = [i for i, truth in enumerate(old) if truth]
        found = {"natural_exact": same, "natural_contains": list(same)}
        for i in answered:
            found["natural_contains"][i] = says(texts[i], old[i])[1]
        if judge is not None:
            found["judged"] = list(same)
            verdicts = judge([(plain(tok, prompts[i]), (old[i],), texts[i]) for i in answered])
            for i, verdict in zip(answered, verdicts, strict=True):
                found["judged"][i] = verdict
        owners = [owner for owner, _ in self.asked[:count]]
        return {f"loc_{kind}": mean_by_request(owners, values) for kind, values in found.items()}


def plain(tok, prompt: str) -> str:
    """The prompt without the special tokens of a chat format: what another model may be shown."""
    for mark in special_texts(tok):
        prompt = prompt.replace(mark, "")
    return prompt.strip()


def mean_by_request(owners: Sequence[int], values: Sequence[float]) -> float | None:
    """Mean over each request's values, then over requests; None without any."""
    return mean(by_request(owners, values))


def by_request(owners: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """Owner -> the mean of its values."""
    found: dict[int, list[float]] = {}
    for owner, value in zip(owners, values, strict=True):
        found.setdefault(owner, []).append(value)
    return {owner: fmean(some) for owner, some in found.items()}


def mean(of_requests: Mapping[int, float]) -> float | None:
    """None without any."""
    return fmean(of_requests.values()) if of_requests else None
