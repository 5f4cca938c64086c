"""Every score by name: what it is called in the shell, the report and its curves, and which direction is better.

A package adds one by an entry point of the group easyedit_nmke.metrics: the score's name, and a `Metric` whose `measure` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
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
    0 and 1. baseline: the unedited model's is drawn beside the curves. digits: behind the point, in tables.
    asked: only runs that ask for it have it, or data that bring it.

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
    digits: int = 2
    measure: Measure | None = None
    asked: bool = False

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
        "rel_natural_exact": Metric(
            "Rel, natural stop: exact", column="Natural exact", baseline=False,
            what="edited prompts to which the model says the new answer, nothing more, and stops by itself",
        ),
        "rel_natural_contains": Metric(
            "Rel, natural stop: contains", column="Natural", baseline=False,
            what="edited prompts with the new answer in all that the model says until it stops",
        ),
        "gen_natural_exact": Metric("Gen, natural stop: exact", baseline=False),
        "gen_natural_contains": Metric(
            "Gen, natural stop: contains", column="Gen natural", what="Natural for a paraphrase of the prompt", baseline=False
        ),
        "rel_judged": Metric(
            "Rel, judged", "Judged", "Judged", "edited prompts where the judge finds the new answer in it", baseline=False,
            asked=True,
        ),
        "gen_judged": Metric(
            "Gen, judged", column="Gen judged", what="Judged for a paraphrase", baseline=False, asked=True
        ),
        "prefix": Metric(
            "Prefix", "Prefix", "Prefix", "Rel when three unrelated sentences come first", baseline=False, asked=True
        ),
        "prefix_exact": Metric("Prefix, generated: exact", curve=False, asked=True),
        "prefix_contains": Metric("Prefix, generated: contains", curve=False, asked=True),
        "prefix_natural_exact": Metric("Prefix, natural stop: exact", curve=False, asked=True),
        "prefix_natural_contains": Metric("Prefix, natural stop: contains", baseline=False, asked=True),
        "prefix_judged": Metric("Prefix, judged", baseline=False, asked=True),
        "loc": Metric(
            "Loc", "Loc", "Loc", "share of outputs to prompts about other subjects that are still the unedited model's",
            said="leaves {:.0%} of the outputs about other subjects as they were",
        ),
        "neighborhood": Metric("Loc: neighborhood"),
        "unrelated": Metric("Loc: unrelated"),
        "same_subject": Metric("Same subject", "Same", "Same subject", "the same for other facts of the edited subject"),
        "loc_natural_exact": Metric("Loc, natural stop: exact"),
        "loc_natural_contains": Metric(
            "Loc, natural stop: contains", column="Loc natural",
            what="prompts about other subjects with the unedited model's answer in all that the model says",
        ),
        "loc_judged": Metric("Loc, judged", column="Loc judged", what="those where the judge finds it", asked=True),
        "overedit": Metric("Over-editing", "Overedit", "Overedit", "Loc when the edited sentence comes first", asked=True),
        "portability": Metric("Portability", "Port", "Port", "portability, the same for what follows from the new answer"),
        "general": Metric("General", "General", "General", "held-out exercises answered exactly"),
        "kept_kl": Metric(
            "Kept text: KL", "KL", "Kept KL", "how far the model has moved on other text, in nats a token",
            better="lower", share=False, digits=3,
        ),
        "perplexity": Metric("Kept text: perplexity", better="lower", share=False, digits=1),
        "fluency": Metric(
            "Fluency (bits)", column="Fluency", what="entropy of the n-grams of generated text, in bits", share=False
        ),
        "immediate": Metric("Rel right after each edit"),
        "seconds": Metric(
            "Seconds per edit", column="s/edit", what="seconds per edit", better="lower", curve=False, share=False, baseline=False
        ),
    }
)  # fmt: skip

# What data may bring: CounterFact's own scores, and what should follow from edits.
_PASSED = "share of ripple tests that free answers pass, of"


def _brought(title: str, short: str | None = None, column: str | None = None, what: str = "", **more) -> Metric:
    return Metric(title, short, column or short, what, asked=True, **more)


OF_DATA: Mapping[str, Metric] = MappingProxyType(
    {
        "efficacy_success": _brought(
            "Efficacy success", "ES", what="share of edited prompts after which the new answer is likelier than the true one"
        ),
        "paraphrase_success": _brought("Paraphrase success", "PS", what="ES of paraphrases"),
        "neighborhood_success": _brought(
            "Neighbourhood success", "NS", what="share of neighbours' prompts after which the true answer is the likelier one"
        ),
        "counterfact_score": _brought("CounterFact's score", "S", what="harmonic mean of ES, PS and NS"),
        "efficacy_magnitude": _brought("Efficacy magnitude", None, "EM", "mean of p(new) - p(true)", curve=False, share=False),
        "paraphrase_magnitude": _brought("Paraphrase magnitude", None, "PM", "EM of paraphrases", curve=False, share=False),
        "neighborhood_magnitude": _brought(
            "Neighbourhood magnitude", None, "NM", "mean of p(true) - p(new) of neighbours", curve=False, share=False
        ),
        "multi_hop": _brought(
            "Multi-hop", "Hop", "Multi-hop", "share of cases of which any question is answered freely with the new answer"
        ),
        "ripple:Logical_Generalization": _brought("Ripple: logical generalization", "LG", what=f"{_PASSED} logical generalization"),
        "ripple:Compositionality_I": _brought("Ripple: compositionality I", "CI", what=f"{_PASSED} compositionality I"),
        "ripple:Compositionality_II": _brought("Ripple: compositionality II", "CII", what=f"{_PASSED} compositionality II"),
        "ripple:Subject_Aliasing": _brought("Ripple: subject aliasing", "SA", what=f"{_PASSED} subject aliasing"),
        "ripple:Relation_Specificity": _brought("Ripple: relation specificity", "RS", what=f"{_PASSED} relation specificity"),
        "ripple:Forgetfulness": _brought("Ripple: forgetfulness", "FN", what=f"{_PASSED} forgetfulness (preservation)"),
        "ripple:Reasoning": _brought("Ripple: reasoning", "Reason", "Reasoning", f"{_PASSED} reasoning"),
        "ripple_counted": _brought("Ripple: share of tests that count", curve=False),
    }
)


def table() -> dict[str, Metric]:
    """Every score by name: this package's, then those that others add. ValueError for what is no `Metric`."""
    rows = with_extensions("metrics", {**OWN, **OF_DATA})
    for name, row in rows.items():
        if not isinstance(row, Metric):
            raise ValueError(
                f"the metric {name!r} of an installed package is {row!r}, expected an easyedit_nmke.scores.table.Metric"
            )
    return rows


def with_tasks(names: Iterable[str]) -> dict[str, Metric]:
    """`table`, and rows for those of `names` that are scores of tasks: the harness' and questions' from files."""
    asked = {name: Metric(name.removeprefix("tasks.")) for name in names if name.startswith(("harness.", "tasks."))}
    return {**table(), **asked}


def task_scores(lines: Sequence[Mapping], checkpoint: int) -> list[tuple[str, str, list[float | None]]]:
    """(task, method, [right, right by length, as unedited]) of every task that any line has, at a checkpoint and unedited: means
    over the seeds that have it."""
    now = [line for line in lines if line["checkpoint"] in (0, checkpoint)]
    names = dict.fromkeys(name for line in now for name in line["scores"] if name.startswith("tasks."))
    tasks = [name for name in names if not name.endswith((".norm", ".same")) or f"{name}.same" in names]
    found = []
    for task, method in product(tasks, dict.fromkeys(line["method"] for line in now)):
        values = [[line["scores"].get(name) for line in now if line["method"] == method] for name in _of_task(task)]
        means = [fmean(known) if (known := [v for v in some if v is not None]) else None for some in values]
        if means[0] is not None:
            found.append((task.removeprefix("tasks."), method, means))
    return found


def _of_task(name: str) -> tuple[str, str, str]:
    return name, f"{name}.norm", f"{name}.same"


def in_shell(scores: Collection[str] = ()) -> dict[str, str]:
    """{name: heading} of the shell's tables; of scores that have to be asked for, those among `scores`."""
    return {name: row.short for name, row in table().items() if row.short and (not row.asked or name in scores)}


def in_report() -> dict[str, Metric]:
    """The columns of the report's table: what the shell always shows too comes first."""
    found = {name: row for name, row in table().items() if row.column}
    return dict(sorted(found.items(), key=lambda item: item[1].short is None or item[1].asked))


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
