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

# How a score is taken. Where it is as EasyEdit takes it, EasyEdit's word (its `metric_meta`).
FREE = "free_generation"  # the model goes on from the prompt by itself, greedily
COUNTERFACT = "mean_token_log_probability"  # of the new and the true answer, as MEMIT takes them
NATURAL = "free_generation_to_its_end"  # the same until it stops by itself
FORCED = "decoder_only_teacher_forcing"  # it sees the target, and says each next token
UNCHANGED = "pre_post_argmax_token_match"  # each next token of a text, before the edits and after
AFTER_ALL, BEFORE = "after_all_edits", "before_any_edit"


@dataclass(frozen=True)
class Metric:
    """One score of a result line's "scores", the mean over its requests.

    title: above its curve and in its place in the legend. short: its heading in the shell's tables, column: in the report's; None
    leaves it out there, and curve=False out of the figures. what: what the number is, under the report's table. said: what the
    leading method does, in the report's first lines; a format of the number, "gets {:.0%} of them right". share: it lies between
    0 and 1. baseline: the unedited model's is drawn beside the curves. digits: behind the point, in tables. protocol, scorer: how
    it is taken and what is counted, for `metric_meta`; scores by free generation come first in tables. asked: only runs that ask
    for it have it, or data that bring it.

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
    protocol: str = "own"
    scorer: str = "own"
    measure: Measure | None = None
    asked: bool = False

    @property
    def optional(self) -> bool:
        """Whether tables do without it where they would be too wide: the shell does not always show it."""
        return self.short is None or self.asked

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "higher" else "↓"


# In rows of four curves (free generation comes first): the new answer, what should have stayed, what follows and what else the
# model can do.
# Of new answers the unedited model knows nothing: its line at 0 would only flatten their curves.
OWN: Mapping[str, Metric] = MappingProxyType(
    {
        "rel": Metric(
            "Rel", "Rel", "Rel", "share of the new answer's tokens that the edited prompt gets right", baseline=False,
            said="gets {:.0%} of the new answers' tokens right on the edited prompts",
            protocol=FORCED, scorer="token_accuracy",
        ),
        "rel_exact": Metric(
            "Rel, generated: exact", column="Free Rel", baseline=False,
            what="edited prompts that greedy free generation answers with exactly the new answer",
            said="gives exactly the new answer to {:.0%} of them when it generates freely",
            protocol=FREE, scorer="exact_match",
        ),
        "rel_contains": Metric("Rel, generated: contains", baseline=False, protocol=FREE, scorer="contains"),
        "rel_preferred": Metric("Rel: new over old answer", baseline=False, protocol=FORCED, scorer="likelier_than_old_answer"),
        "gen": Metric(
            "Gen", "Gen", "Gen", "as Rel, for a paraphrase of the prompt", baseline=False,
            said="gets {:.0%} of the tokens right on paraphrases",
            protocol=FORCED, scorer="token_accuracy",
        ),
        "gen_exact": Metric(
            "Gen, generated: exact", column="Free Gen", what="the same for paraphrases", baseline=False,
            protocol=FREE, scorer="exact_match",
        ),
        "gen_contains": Metric("Gen, generated: contains", baseline=False, protocol=FREE, scorer="contains"),
        "gen_preferred": Metric("Gen: new over old answer", baseline=False, protocol=FORCED, scorer="likelier_than_old_answer"),
        "rel_natural_exact": Metric(
            "Rel, natural stop: exact", column="Natural exact", baseline=False,
            what="edited prompts to which the model says the new answer, nothing more, and stops by itself",
            protocol=NATURAL, scorer="exact_match",
        ),
        "rel_natural_contains": Metric(
            "Rel, natural stop: contains", column="Natural", baseline=False,
            what="edited prompts with the new answer in all that the model says until it stops",
            protocol=NATURAL, scorer="contains",
        ),
        "gen_natural_exact": Metric("Gen, natural stop: exact", baseline=False, protocol=NATURAL, scorer="exact_match"),
        "gen_natural_contains": Metric(
            "Gen, natural stop: contains", column="Gen natural", what="Natural for a paraphrase of the prompt", baseline=False,
            protocol=NATURAL, scorer="contains",
        ),
        "rel_judged": Metric(
            "Rel, judged", "Judged", "Judged", "edited prompts where the judge finds the new answer in it", baseline=False,
            asked=True,
            protocol=NATURAL, scorer="judge",
        ),
        "gen_judged": Metric(
            "Gen, judged", column="Gen judged", what="Judged for a paraphrase", baseline=False, asked=True,
            protocol=NATURAL, scorer="judge",
        ),
        "prefix": Metric(
            "Prefix", "Prefix", "Prefix", "Rel when three unrelated sentences come first", baseline=False, asked=True,
            protocol=FORCED, scorer="token_accuracy",
        ),
        "prefix_exact": Metric("Prefix, generated: exact", curve=False, asked=True, protocol=FREE, scorer="exact_match"),
        "prefix_contains": Metric("Prefix, generated: contains", curve=False, asked=True, protocol=FREE, scorer="contains"),
        "prefix_natural_exact": Metric(
            "Prefix, natural stop: exact", curve=False, asked=True,
            protocol=NATURAL, scorer="exact_match",
        ),
        "prefix_natural_contains": Metric(
            "Prefix, natural stop: contains", baseline=False, asked=True,
            protocol=NATURAL, scorer="contains",
        ),
        "prefix_judged": Metric("Prefix, judged", baseline=False, asked=True, protocol=NATURAL, scorer="judge"),
        "loc": Metric(
            "Loc", "Loc", "Loc", "share of outputs to prompts about other subjects that are still the unedited model's",
            said="leaves {:.0%} of the outputs about other subjects as they were",
            protocol=UNCHANGED, scorer="token_match",
        ),
        "neighborhood": Metric("Loc: neighborhood", protocol=UNCHANGED, scorer="token_match"),
        "unrelated": Metric("Loc: unrelated", protocol=UNCHANGED, scorer="token_match"),
        "same_subject": Metric(
            "Same subject", "Same", "Same subject", "the same for other facts of the edited subject",
            protocol=UNCHANGED, scorer="token_match",
        ),
        "loc_natural_exact": Metric("Loc, natural stop: exact", protocol=NATURAL, scorer="exact_match"),
        "loc_natural_contains": Metric(
            "Loc, natural stop: contains", column="Loc natural",
            what="prompts about other subjects with the unedited model's answer in all that the model says",
            protocol=NATURAL, scorer="contains",
        ),
        "loc_judged": Metric(
            "Loc, judged", column="Loc judged", what="those where the judge finds it", asked=True,
            protocol=NATURAL, scorer="judge",
        ),
        "overedit": Metric(
            "Over-editing", "Overedit", "Overedit", "Loc when the edited sentence comes first", asked=True,
            protocol=UNCHANGED, scorer="token_match",
        ),
        "portability": Metric(
            "Portability", "Port", "Port", "portability: as Rel, for what follows from the new answer",
            protocol=FORCED, scorer="token_accuracy",
        ),
        "general": Metric(
            "General", "General", "General", "held-out exercises answered exactly",
            protocol=FORCED, scorer="sequence_exact_match",
        ),
        "kept_kl": Metric(
            "Kept text: KL", "KL", "Kept KL", "how far the model has moved on other text, in nats a token",
            better="lower", share=False, digits=3,
            protocol="kept_text", scorer="kl_from_unedited",
        ),
        "perplexity": Metric(
            "Kept text: perplexity", better="lower", share=False, digits=1, protocol="kept_text", scorer="perplexity"
        ),
        "fluency": Metric(
            "Fluency (bits)", column="Fluency", what="entropy of the n-grams of generated text, in bits", share=False,
            protocol="free_continuation", scorer="ngram_entropy",
        ),
        "immediate": Metric("Rel right after each edit", protocol=FORCED, scorer="token_accuracy"),
        "seconds": Metric(
            "Seconds per edit", column="s/edit", what="seconds per edit", better="lower", curve=False, share=False, baseline=False,
            said="takes {:.2g} s an edit", protocol="wall_clock", scorer="mean_per_edit",
        ),
    }
)  # fmt: skip

# What data may bring: CounterFact's own scores, and what should follow from edits.
_PASSED = "share of ripple tests that free answers pass, of"


def _brought(title: str, short: str | None = None, column: str | None = None, what: str = "", **more) -> Metric:
    return Metric(title, short, column or short, what, asked=True, **{"protocol": FREE, "scorer": "contains", **more})


OF_DATA: Mapping[str, Metric] = MappingProxyType(
    {
        "efficacy_success": _brought(
            "Efficacy success",
            "ES",
            what="share of edited prompts after which the new answer is likelier than the true one",
            protocol=COUNTERFACT,
            scorer="likelier_than_other",
        ),
        "paraphrase_success": _brought(
            "Paraphrase success",
            "PS",
            what="ES of paraphrases",
            protocol=COUNTERFACT,
            scorer="likelier_than_other",
        ),
        "neighborhood_success": _brought(
            "Neighbourhood success",
            "NS",
            what="share of neighbours' prompts after which the true answer is the likelier one",
            protocol=COUNTERFACT,
            scorer="likelier_than_other",
        ),
        "counterfact_score": _brought(
            "CounterFact's score",
            "S",
            what="harmonic mean of ES, PS and NS",
            protocol=COUNTERFACT,
            scorer="harmonic_mean",
        ),
        "efficacy_magnitude": _brought(
            "Efficacy magnitude",
            None,
            "EM",
            "mean of p(new) - p(true)",
            curve=False,
            share=False,
            protocol=COUNTERFACT,
            scorer="probability_difference",
        ),
        "paraphrase_magnitude": _brought(
            "Paraphrase magnitude",
            None,
            "PM",
            "EM of paraphrases",
            curve=False,
            share=False,
            protocol=COUNTERFACT,
            scorer="probability_difference",
        ),
        "neighborhood_magnitude": _brought(
            "Neighbourhood magnitude",
            None,
            "NM",
            "mean of p(true) - p(new) of neighbours",
            curve=False,
            share=False,
            protocol=COUNTERFACT,
            scorer="probability_difference",
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
    return {**table(), **{name: _of_task(name) for name in names if name.startswith(("harness.", "tasks."))}}


def _of_task(name: str) -> Metric:
    if name.startswith("harness."):
        return Metric(name, protocol="lm_evaluation_harness", scorer="main_metric")
    scorer = {"norm": "accuracy_by_length", "same": "as_unedited"}.get(name.rpartition(".")[2], "accuracy")
    return Metric(name.removeprefix("tasks."), protocol="questions", scorer=scorer)


def task_scores(lines: Sequence[Mapping], checkpoint: int) -> list[tuple[str, str, list[float | None]]]:
    """(task, method, [right, right by length, as unedited]) of every task that any line has, at a checkpoint and unedited: means
    over the seeds that have it."""
    now = [line for line in lines if line["checkpoint"] in (0, checkpoint)]
    names = dict.fromkeys(name for line in now for name in line["scores"] if name.startswith("tasks."))
    tasks = [name for name in names if not name.endswith((".norm", ".same")) or f"{name}.same" in names]
    found = []
    for task, method in product(tasks, dict.fromkeys(line["method"] for line in now)):
        values = [[line["scores"].get(name) for line in now if line["method"] == method] for name in _names_of(task)]
        means = [fmean(known) if (known := [v for v in some if v is not None]) else None for some in values]
        if means[0] is not None:
            found.append((task.removeprefix("tasks."), method, means))
    return found


def _names_of(name: str) -> tuple[str, str, str]:
    return name, f"{name}.norm", f"{name}.same"


def in_shell(scores: Collection[str] | None = None) -> dict[str, str]:
    """{name: heading} of the shell's tables, of those among `scores`; None: of all that need not be asked for."""
    return {name: row.short for name, row in table().items() if row.short and (not row.asked if scores is None else name in scores)}


def in_report() -> dict[str, Metric]:
    """The columns of the report's table: free generation first, then what the shell shows too, then the rest."""
    found = {name: row for name, row in table().items() if row.column}

    def place(item: tuple[str, Metric]) -> tuple[bool, bool]:
        _, row = item
        return row.protocol not in (FREE, NATURAL) or row.asked, row.optional

    return dict(sorted(found.items(), key=place))


def metric_meta(scores: Mapping[str, Any], batch_size: int | None = None) -> dict[str, dict[str, str]]:
    """Beside every score its protocol, in the spirit of EasyEdit's field of this name: {score: {"protocol", "scorer", "taken",
    "comparable_group"}}. taken: after all edits so far; of `immediate` after each edit or, of batches, after each batch; before any
    (`batch_size` None). Numbers of one comparable_group are of one kind; of others, do not compare them."""
    found, known = {}, with_tasks(scores)
    for name in scores:
        row = known.get(name) or known["neighborhood"]  # a type of locality that a file named
        taken = AFTER_ALL if batch_size else BEFORE
        if name == "immediate":
            taken = "after_each_edit" if batch_size == 1 else "after_each_batch"
        found[name] = _meta(row, taken)
    return found


def edit_meta(edits: Sequence[Mapping]) -> dict[str, dict[str, dict[str, str]]]:
    """`metric_meta` of the scores of single edits, of the unedited model ("pre") and after all edits ("post")."""
    rows = {"rewrite_acc": "rel", "rephrase_acc": "gen", "locality": "loc", "portability": "portability"}
    names = dict.fromkeys(name for edit in edits for name in edit["post"] if name in rows)
    moments = {"pre": BEFORE, "post": AFTER_ALL}
    return {part: {name: _meta(OWN[rows[name]], taken) for name in names} for part, taken in moments.items()}


def _meta(row: Metric, taken: str) -> dict[str, str]:
    group = f"{row.protocol}.{row.scorer}.{taken}"
    return {"protocol": row.protocol, "scorer": row.scorer, "taken": taken, "comparable_group": group}


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
