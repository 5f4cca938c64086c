"""What should follow from an edit, or stay as it was, asked freely: RippleEdits' criteria, and questions of several hops.

A query is answered rightly when the first sentence of the greedy text after it contains each of its answers, in any spelling, as
whole words. What a model that does not stop goes on to say is about something else, and in 32 tokens often names the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..models.arch import context_length
from ..models.prompts import encode, open_end
from ..models.requests import MULTI_HOP, Query, Request
from .answers import answer, says
from .free import mean_by_request
from .generation import STOP_TOKENS, greedy_texts


class Ripples:
    """The tests of a stream of requests, and which of them count: those whose conditions `model`, the unedited one, answers
    rightly."""

    def __init__(self, model, tok, requests: Sequence[Request], separator: str | None = None):
        check(model, tok, requests, separator)
        tests = [(i, kind, test) for i, request in enumerate(requests) for kind, some in request.ripple.items() for test in some]
        right = answered(model, tok, (query for *_, test in tests for query in test.conditions), separator)
        self.separator = separator
        self._kinds = dict.fromkeys(kind for _, kind, _ in tests)
        self._tests = [(i, kind, test, all(right[query] for query in test.conditions)) for i, kind, test in tests]

    def score(self, model, tok, edits: int) -> dict[str, float | None]:
        """{"ripple:<type>" or "multi_hop": share of the tests that count which the model passes, "ripple_counted": share of all
        tests that count}, of the first `edits` requests; {} where no request has tests.

        Means over a request's tests, then over the requests that have some (RippleEdits' own); None where no test counts.
        """
        if not self._tests:
            return {}
        there = [(i, kind, test, counts) for i, kind, test, counts in self._tests if i < edits]
        asked = [(i, kind, test) for i, kind, test, counts in there if counts]
        right = answered(model, tok, (query for *_, test in asked for query in test.queries), self.separator)
        owners, passed = ({kind: [] for kind in self._kinds} for _ in range(2))
        for i, kind, test in asked:
            results = [right[query] for query in test.queries]
            owners[kind].append(i)
            passed[kind].append(all(results) if test.every else any(results))
        scores = {_name(kind): mean_by_request(owners[kind], passed[kind]) for kind in self._kinds}
        return {**scores, "ripple_counted": len(asked) / len(there) if there else None}


def answered(model, tok, queries: Iterable[Query], separator: str | None = None) -> dict[Query, bool]:
    """Whether the model answers each query rightly; a prompt is gone on from once."""
    queries = dict.fromkeys(queries)
    prompts = list(dict.fromkeys(query.prompt for query in queries))
    said = dict(zip(prompts, greedy_texts(model, tok, prompts, STOP_TOKENS, separator=separator), strict=True))
    return {query: all(_says(said[query.prompt], names) for names in query.answers) for query in queries}


def _says(text: str, names: Sequence[str]) -> bool:
    return says(answer(text, names), names)[1]


def check(model, tok, requests: Sequence[Request], separator: str | None = None) -> None:
    """ValueError when a query leaves no room for an answer in the model's context."""
    context = context_length(model)
    tests = [test for request in requests for some in request.ripple.values() for test in some]
    for prompt in dict.fromkeys(query.prompt for test in tests for query in (*test.queries, *test.conditions)):
        count = len(encode(tok, open_end(prompt, separator, tok)[0]))
        if context is not None and count + STOP_TOKENS > context:
            size = f"{count} tokens and needs {STOP_TOKENS} more"
            raise ValueError(f"the query {prompt[:60]!r} has {size}, the model's context is {context}")


def _name(kind: str) -> str:
    return kind if kind == MULTI_HOP else f"ripple:{kind}"
