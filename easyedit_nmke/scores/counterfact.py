"""CounterFact's own scores, as MEMIT's evaluation and its summary define them.

With p(a) = exp of the mean log-probability of an answer's tokens after a prompt, new and true answer side by side:

    efficacy       success  p(new) > p(true)   magnitude  p(new) - p(true)   on the edited prompt
    paraphrase     the same                                                  on its paraphrases
    neighbourhood  success  p(true) > p(new)   magnitude  p(true) - p(new)   on prompts of other subjects with the true answer

Means over a record's prompts, then over records; the score is the harmonic mean of the three successes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean, harmonic_mean

from ..models.requests import ATTRIBUTE, NEIGHBORHOOD, Request
from .generation import target_log_probs
from .metrics import Pair

SIDES = ("efficacy", "paraphrase", "neighborhood")


def fits(requests: Sequence[Request]) -> bool:
    """Whether these are CounterFact's records: each with a true answer, neighbours that have the same one, and no other locality
    than CounterFact's."""
    return bool(requests) and all(map(_fits, requests))


def _fits(request: Request) -> bool:
    answers = {answer for _, answer in request.locality.get(NEIGHBORHOOD, ())}
    return set(request.locality) <= {NEIGHBORHOOD, ATTRIBUTE} and answers == {request.ground_truth}


def compared(request: Request) -> list[Pair]:
    """Prompts with the answers that are held against those it is scored on: the old one, and the new one for a neighbour's."""
    old = [(prompt, request.ground_truth) for prompt in (request.prompt, *request.rephrase_prompts) if request.ground_truth]
    near = request.locality[NEIGHBORHOOD] if _fits(request) else ()
    return old + [(prompt, request.target_new) for prompt, _ in near]


def counterfact(model, tok, requests: Sequence[Request], separator: str | None = None) -> dict[str, float | None]:
    """{"<side>_success", "<side>_magnitude" of SIDES, "counterfact_score"} of requests that are CounterFact's (`fits`); None for a
    side without prompts, and for the score then."""
    asked = [
        (request, ((request.prompt,), request.rephrase_prompts, [prompt for prompt, _ in request.locality[NEIGHBORHOOD]]))
        for request in requests
    ]
    pairs = [
        (prompt, answer)
        for request, sides in asked
        for prompts in sides
        for prompt in prompts
        for answer in (request.target_new, request.ground_truth)
    ]
    found = (exp(value) for value in target_log_probs(model, tok, pairs, separator=separator))
    records = [[[(next(found), next(found)) for _ in prompts] for prompts in sides] for _, sides in asked]
    scores: dict[str, float | None] = {}
    for place, side in enumerate(SIDES):
        sign = -1 if side == "neighborhood" else 1  # where the true answer should be the likelier one
        compared = [[sign * (new - true) for new, true in record[place]] for record in records if record[place]]
        scores[f"{side}_success"] = fmean(fmean(p > 0 for p in record) for record in compared) if compared else None
        scores[f"{side}_magnitude"] = fmean(map(fmean, compared)) if compared else None
    three = [scores[f"{side}_success"] for side in SIDES]
    return {**scores, "counterfact_score": None if None in three else harmonic_mean(three)}
