"""Every score by name: what it is called in the shell, the report and its curves, and which direction is better.

A package adds one by an entry point of the group easyedit_nmke.metrics: the score's name, and a `Metric` whose `measure` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from ..extensions import with_extensions

# measure(model, tok, requests, before) -> a number, or None where there is nothing to measure; see `Metric.measure`.
Measure = Callable[[Any, Any, Sequence[Any], Sequence[dict]], "float | None"]


@dataclass(frozen=True)
class Metric:
    """One score of a result line's "scores", the mean over its requests.

    title: above its curve and in its place in the legend. short: its heading in the shell's tables, column: in the report's; None
    leaves it out there, and curve=False out of the figures. what: what the number is, under the report's table. said: what the
    leading method does, in the report's first lines; a format of the number, "gets {:.0%} of them right". share: it lies between
    0 and 1. baseline: the unedited model's is drawn beside the curves.

    measure(model, tok, requests, before), for scores that others add, is called at every checkpoint for the `requests` edited so
    far (a list of `Request`), and for all of them on the unedited model; `before` is `metrics.quality` of the same requests on the
    unedited model. It gives a number, or None where there is nothing to measure, and leaves the model as it was.
    """

    title: str
    short: str | None = None
    column: str | None = None
    what: str = ""
    better: Literal["higher", "lower"] = "higher"
    curve: bool = True
    said: str | None = None
    share: bool = True
    baseline: bool = True
    measure: Measure | None = None

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "higher" else "↓"


# In rows of four curves: the edited prompt, its paraphrases, what should have stayed, what follows and what else the model can do.
# Of new answers the unedited model knows nothing: its line at 0 would only flatten their curves.
OWN: Mapping[str, Metric] = MappingProxyType(
    {
        "rel": Metric(
            "Rel", "Rel", "Rel", "share of the new answer's tokens that the edited prompt gets right", baseline=False,
            said="gets {:.0%} of the new answers' tokens right on the edited prompts",
        ),
        "rel_exact": Metric(
            "Rel, generated: exact", column="Generated exact", baseline=False,
            what="edited prompts that greedy free generation answers with exactly the new answer",
            said="gives exactly the new answer to {:.0%} of them when it generates freely",
        ),
        "rel_contains": Metric("Rel, generated: contains", baseline=False),
        "rel_preferred": Metric("Rel: new over old answer", baseline=False),
        "gen": Metric(
            "Gen", "Gen", "Gen", "the same for a paraphrase of the prompt", baseline=False,
            said="gets {:.0%} of the tokens right on paraphrases",
        ),
        "gen_exact": Metric("Gen, generated: exact", baseline=False),
        "gen_contains": Metric("Gen, generated: contains", baseline=False),
        "gen_preferred": Metric("Gen: new over old answer", baseline=False),
        "loc": Metric(
            "Loc", "Loc", "Loc", "share of outputs to prompts about other subjects that are still the unedited model's",
            said="leaves {:.0%} of the outputs about other subjects as they were",
        ),
        "neighborhood": Metric("Loc: neighborhood"),
        "unrelated": Metric("Loc: unrelated"),
        "same_subject": Metric("Same subject", "Same", "Same subject", "the same for other facts of the edited subject"),
        "portability": Metric("Portability", "Port", "Port", "portability, the same for what follows from the new answer"),
        "general": Metric("General", "General", "General", "held-out exercises answered exactly"),
        "fluency": Metric(
            "Fluency (bits)", column="Fluency", what="entropy of the n-grams of generated text, in bits", share=False
        ),
        "immediate": Metric("Rel right after each edit"),
        "seconds": Metric(
            "Seconds per edit", column="s/edit", what="seconds per edit", better="lower", curve=False, share=False, baseline=False
        ),
    }
)  # fmt: skip


def table() -> dict[str, Metric]:
    """Every score by name: this package's, then those that others add. ValueError for what is no `Metric`."""
    rows = with_extensions("metrics", OWN)
    for name, row in rows.items():
        if not isinstance(row, Metric):
            raise ValueError(
                f"the metric {name!r} of an installed package is {row!r}, expected an easyedit_nmke.scores.table.Metric"
            )
    return rows


def in_shell() -> dict[str, str]:
    """{name: heading} of the shell's tables."""
    return {name: row.short for name, row in table().items() if row.short}


def in_report() -> dict[str, Metric]:
    """The columns of the report's table: what the shell shows too comes first."""
    found = {name: row for name, row in table().items() if row.column}
    return dict(sorted(found.items(), key=lambda item: item[1].short is None))


def measured(model, tok, requests: Sequence, before: Sequence[dict]) -> dict[str, float | None]:
    """The scores that bring their own `measure`. ValueError, naming the score, when one gives something else than a number."""
    scores = {}
    for name, row in table().items():
        if row.measure is not None:
            value = row.measure(model, tok, requests, before)
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"the metric {name!r} measured {value!r}, expected a number or None")
            scores[name] = None if value is None else float(value)
    return scores
