"""The lifelong protocol: edit all, score all at checkpoints, against the unedited model; in segments that can be taken up again.

A segment is one editor over one stream of requests. Its editor is anything with `model`, `tok`, `alg_name`, `hparams` and
`apply(requests)`. A `LifelongEditor` whose state is kept on disk (`state_dir`) goes on from its last edit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save_file

from ..editor import LifelongEditor
from ..files import whole
from ..history.journal import versions
from ..history.log import EditReport
from ..hparams import defaults, differences
from ..methods import methods
from ..methods.norms import stamped
from ..models.arch import ModelView
from ..models.device import peak_memory, synchronise
from ..models.requests import Request
from ..models.updates import model_digest
from ..scores import free, generation, metrics
from ..scores.counterfact import compared, counterfact, fits
from ..scores.drift import weight_drift
from ..scores.harder import Harder
from ..scores.kept import KeptText
from ..scores.ripple import Ripples
from ..scores.table import measured, metric_meta
from ..scores.tasks import Questions, Task

logger = logging.getLogger(__name__)

FLUENCY_TEXTS, FLUENCY_TOKENS = 50, 40
SAID = "{}_natural_contains"  # of what is said freely, the score that is kept of each request
COLUMNS = ("judge", "also")  # of a stamp's `scored_with`: columns that not every result has
# What a model worn out by its edits raises: numbers that are not finite, systems that cannot be solved.
WORN_OUT = (FloatingPointError, torch.linalg.LinAlgError)


@dataclass(frozen=True)
class Progress:
    """So many more edits are done."""

    more: int


@dataclass(frozen=True)
class Result:
    """A result line: what was measured of one (method, seed, checkpoint)."""

    line: dict


Event = Progress | Result


class Scorer:
    """Every score of a stream of requests; holds what the unedited model says of all of them.

    exercises: (prompt, answer) pairs of general ability. tasks: called with (model, tok), gives more scores by name. separator:
    between prompt and target, as the editor's `target_separator`. text: to see by how much the model has moved; None: the
    package's own. questions: of files, asked of the unedited model and from `questions_from` edits on. judge: of what is said
    freely. also: further readings (see `Harder`).
    """

    def __init__(
        self,
        model,
        tok,
        requests: Sequence[Request],
        exercises=(),
        tasks: Callable | None = None,
        separator: str | None = None,
        text: str | None = None,
        questions: Sequence[Task] = (),
        questions_from: int = 0,
        judge: free.Judge | None = None,
        also: Sequence[str] = (),
    ):
        self.requests, self.exercises, self.tasks, self.separator = list(requests), list(exercises), tasks, separator
        metrics.check(model, tok, self.requests, separator)
        self.judge, self.harder = judge, Harder(model, tok, self.requests, also, separator)
        self.kept = free.Kept(model, tok, self.requests, separator)
        self.text = KeptText(model, tok, text)
        self.questions, self.questions_from = Questions(model, tok, questions), questions_from
        self.before = metrics.quality(model, tok, self.requests, separator=separator)
        self.ripples, self.counterfact = Ripples(model, tok, self.requests, separator), fits(self.requests)
        unknown = [request for request in self.requests if request.ground_truth is None]
        prompts = [request.prompt for request in unknown]
        texts = generation.clipped_texts(model, tok, prompts, generation.ANSWER_TOKENS, separator=separator)
        said = iter(self._where_it_fits(model, tok, request, text) for request, text in zip(unknown, texts, strict=True))
        self.old = [next(said) if request.ground_truth is None else request.ground_truth for request in self.requests]

    def _where_it_fits(self, model, tok, request: Request, text: str) -> str:
        """The answer in a text, or none: a paraphrase may leave less room for it than the prompt that it was said to."""
        old = generation.answer(text)
        try:
            metrics.check(model, tok, [], self.separator, compared(replace(request, ground_truth=old)))
        except ValueError:
            return ""
        return old

    def unedited(self, model, tok) -> dict:
        """Scores of the model before the first edit, on all requests."""
        return {**self._scores(model, tok, self.requests, self.before, self.before)[0], **self.questions.before}

    def __call__(self, model, tok, edits: int) -> tuple[dict, dict[str, dict]]:
        """(scores, {"retention": of rel and gen by age, "records": of each request}) of the first `edits` requests."""
        requests, before = self.requests[:edits], self.before[:edits]
        after = metrics.quality(model, tok, requests, separator=self.separator)
        scores, records = self._scores(model, tok, requests, before, after)
        ages = {name: metrics.retention(records[name]) for name in ("rel", "gen")}
        asked = self.questions.score(model, tok) if edits >= self.questions_from else {}
        short = {name: [None if value is None else round(value, 4) for value in values] for name, values in records.items()}
        return {**scores, **asked}, {"retention": ages, "records": short}

    def _scores(
        self, model, tok, requests: Sequence[Request], before: list[dict], after: list[dict]
    ) -> tuple[dict, dict[str, list[float | None]]]:
        """All of them, and those by which methods are compared, of each request."""
        found = metrics.of_requests(before, after)
        scores = {**metrics.means(found), "neighborhood": None, "unrelated": None, **metrics.by_kind(before, after)}
        records = {name: found[name] for name in ("rel", "gen", "loc")}
        for name, prompts in (("rel", [(r.prompt,) for r in requests]), ("gen", [r.rephrase_prompts for r in requests])):
            said = self._said(model, tok, name, requests, prompts)
            scores |= {key: free.mean(values) for key, values in said.items()}
            records[SAID.format(name)] = [said[SAID.format(name)].get(i) for i in range(len(requests))]
        scores |= self.kept.score(model, tok, len(requests), self.judge)
        scores |= self.harder.score(model, tok, len(requests), self.judge)
        prompts = [r.prompt for r in requests[:FLUENCY_TEXTS]]
        texts = generation.clipped_texts(model, tok, prompts, FLUENCY_TOKENS, separator=self.separator)
        scores["fluency"] = generation.fluency(texts)
        general = metrics.exact_match(model, tok, self.exercises, separator=self.separator)
        scores["general"] = fmean(general) if general else None
        scores |= self.text.score(model, tok) | self.ripples.score(model, tok, len(requests))
        scores |= counterfact(model, tok, requests, self.separator) if self.counterfact else {}
        scores |= measured(model, tok, requests, before)
        return {**scores, **(self.tasks(model, tok) if self.tasks else {})}, records

    def _said(
        self, model, tok, name: str, requests: Sequence[Request], prompts: Sequence[Sequence[str]]
    ) -> dict[str, dict[int, float]]:
        """Free generation against the target or any of its aliases, and the target's probability against the old answer's: of each
        score, request -> mean over its prompts."""
        truths = [(request.target_new, *request.aliases) for request in requests]
        asked = [free.Asked(i, prompt, truths[i]) for i, several in enumerate(prompts) for prompt in several]
        compared = [(one.owner, one.prompt, self.old[one.owner]) for one in asked if self.old[one.owner]]
        pairs = [(prompt, requests[i].target_new) for i, prompt, _ in compared], [(prompt, old) for _, prompt, old in compared]
        new, old = (generation.target_log_probs(model, tok, some, separator=self.separator) for some in pairs)
        preferred = free.by_request([i for i, *_ in compared], [n > o for n, o in zip(new, old, strict=True)])
        return {**free.said(model, tok, name, asked, self.separator, self.judge), f"{name}_preferred": preferred}


def batches(count: int, size: int, checkpoints: Sequence[int], start: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of the edits of requests from `start` to `count`: `size` at a time, and never across a checkpoint."""
    ends = sorted({*(c for c in checkpoints if start < c < count), count})
    begins = [start, *ends]
    return [(i, min(i + size, end)) for begin, end in zip(begins, ends, strict=False) for i in range(begin, end, size)]


@dataclass
class Segment:
    """One editor over one stream, as far as it has come. `immediate`: each edit's Rel right after it; `failed`: the numbers, from
    1, of edits that could not be written; `lines`: the results.

    Made on the unedited model: of a state that goes on, inside `as_of(0)`. ValueError when that was begun with other settings.
    """

    editor: LifelongEditor
    scorer: Scorer
    label: str
    seed: int
    stamp: dict

    def __post_init__(self):
        self.lines: list[dict] = []
        self.immediate: list[float] = []
        self.failed: list[int] = []
        self.seconds, self.memory = 0.0, 0.0  # of edits; MB
        ours = isinstance(self.editor, LifelongEditor)
        self.weights = _edited(self.editor) if ours else {}
        self.originals = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.kept = self.editor.state if ours and self.editor.state.book else None
        notes = [note["segment"] for _, note in self.kept.notes if "segment" in note] if self.kept else []
        self.first = self.editor.state.edits if ours else 0
        if notes:
            self._resume(notes)
        elif self.kept:
            self.kept.note({"segment": {"stamp": self.stamp, "first": self.first}})

    def run(self, checkpoints: Sequence[int]) -> Iterator[Event]:
        """Edit to the last checkpoint, yielding `Progress` after each batch and a `Result` at each checkpoint; those of an earlier
        run come first."""
        yield from map(Result, self.lines)
        yield Progress(len(self.immediate))
        requests, size = self.scorer.requests, getattr(self.editor.hparams, "batch_size", 1)
        while True:
            done = len(self.immediate)
            if done in checkpoints and done not in [line["checkpoint"] for line in self.lines]:
                self._count(line=self._line(done))
                yield Result(self.lines[-1])
            if done >= max(checkpoints):
                return
            (_, stop), *_ = batches(max(checkpoints), size, checkpoints, done)
            self._edit(requests[done:stop])
            yield Progress(stop - done)

    def _edit(self, batch: Sequence[Request]) -> None:
        if not self.weights:  # ours measure every phase
            peak_memory(reset=True)
        started, failed = time.perf_counter(), 0
        try:
            self.editor.apply(batch)
        except WORN_OUT as error:  # those that cannot be written count as failed
            logger.warning("%s, edit %d: %s", self.label, len(self.immediate) + 1, error)
            failed = len(batch)
        synchronise()
        seconds = time.perf_counter() - started
        if not self.weights:
            self.memory = max(self.memory, peak_memory())
        pairs = [(request.prompt, request.target_new) for request in batch]
        right = metrics.token_accuracy(self.editor.model, self.editor.tok, pairs, separator=self.scorer.separator)
        self._count(immediate=right, failed=failed, seconds=seconds)

    def _count(self, **progress) -> None:
        if self.kept:
            self.kept.note({"segment": progress})
        self._add(progress)

    def _add(self, progress: Mapping) -> None:
        done = len(self.immediate)
        self.failed += range(done + 1, done + 1 + progress.get("failed", 0))
        self.immediate += progress.get("immediate", [])
        self.seconds += progress.get("seconds", 0.0)
        self.lines += [progress["line"]] if "line" in progress else []

    def _resume(self, notes: Sequence[Mapping]) -> None:
        begun, *progress = notes
        if differences := settings_differ(begun["stamp"], self.stamp):
            raise ValueError(
                f"{self.kept.book.directory} was begun with other settings ({'; '.join(differences)}); "
                "give another folder, or remove it"
            )
        self.first = begun["first"]
        for made in progress:
            self._add(made)

    def _line(self, edits: int) -> dict:
        peak_memory(reset=True)
        scores, told = self.scorer(self.editor.model, self.editor.tok, edits)
        scored = peak_memory()
        scores["immediate"] = fmean(self.immediate)
        made = list(self.editor.state.log)[self.first :] if self.weights else []
        reports = [edit.report for edit in made]
        peaks = [self.memory, *(peak for report in reports for peak in report.peak_memory.values())]
        seconds: dict[str, float] = {}
        for report in reports:
            for name, value in report.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        startup = self.editor.state.startup if self.weights else getattr(self.editor, "startup", {})
        return {
            "method": self.label,
            "seed": self.seed,
            "checkpoint": edits,
            "failed": list(self.failed),
            "skipped": self._skipped(reports),
            "scores": scores,
            "metric_meta": metric_meta(scores, self.stamp["batch_size"]),
            **told,
            "drift": self._drift(),
            "mask": {name: _mean_by_layer([getattr(report, name) for report in reports]) for name in ("density", "overlap")},
            "seconds": {**seconds, "total": self.seconds},
            "startup_seconds": dict(startup),
            "peak_memory_mb": {"score": scored, "edit": max(peaks)},
            "kept_bytes": sum(edit.bytes for edit in made) if self.weights else None,
            "protocol": self.stamp,
        }

    def _skipped(self, reports: Sequence[EditReport]) -> list[int]:
        """Numbers, from 1, of edits that the method itself chose not to write."""
        written = [number for number in range(1, len(self.immediate) + 1) if number not in set(self.failed)]
        found, before = [], 0
        for report in reports:
            found += [written[before + place] for place in report.skipped]
            before += report.requests
        return found

    def _drift(self) -> dict[str, dict]:
        """Of the output projections of FFNs, where they are edited (UltraEdit may leave them alone)."""
        if not self.weights:
            return {}
        view, drift = ModelView(self.editor.model), {}
        for layer in self.editor.hparams.layers:
            if view.weight_name(layer) not in self.originals:
                continue
            before, after = self.originals[view.weight_name(layer)], view.weight(layer).detach()
            pair = (before.T, after.T) if view.family.transposed else (before, after)
            drift[str(layer)] = weight_drift(*pair)
        return drift

    def edits(self) -> list[dict]:
        """Each edit so far: the request, and EasyEdit's scores of it on the unedited model ("pre") and now ("post")."""
        done = len(self.immediate)
        requests, separator = self.scorer.requests[:done], self.scorer.separator
        after = metrics.quality(self.editor.model, self.editor.tok, requests, separator=separator)
        results = []
        for request, pre, post in zip(self.scorer.requests, self.scorer.before, after, strict=False):
            metrics.add_locality_accuracy(pre, post)
            results.append({"requested_rewrite": request.to_dict(), "pre": pre, "post": post})
        return results


def _mean_by_layer(reports: Sequence[Mapping[int, float]]) -> dict[str, float]:
    return {str(layer): fmean(r[layer] for r in reports if layer in r) for layer in dict.fromkeys(i for r in reports for i in r)}


def stamp(editor, data: Mapping | None = None, command: str | None = None) -> dict:
    """What a result depends on: method, hyperparameters, data, model and library versions."""
    view = ModelView(editor.model)
    return {
        "protocol": "edit all, then score all, against the unedited model",
        "method": editor.alg_name,
        "hparams": editor.hparams.to_dict(),
        "batch_size": getattr(editor.hparams, "batch_size", 1),
        "value_norms": stamped(editor.state.value_norms) if isinstance(editor, LifelongEditor) else {},
        "data": dict(data or {}),
        "model": {"type": editor.model.config.model_type, "weights": model_digest(editor.model)},
        "device": str(view.device),
        "threads": torch.get_num_threads(),
        "command": command,
        "versions": versions("easyedit-nmke", "torch", "transformers", "numpy"),
    }


def models_differ(one: Mapping, other: Mapping) -> bool:
    """Whether two stamps are of different models, as far as they tell (older ones tell no weights)."""
    mine, theirs = one.get("model") or {}, other.get("model") or {}
    return any(name in mine and name in theirs and mine[name] != theirs[name] for name in ("type", "weights"))


def settings_differ(one: Mapping, other: Mapping) -> list[str]:
    """What two stamps' results depend on and do not share, in words; versions, device and command aside. Of the texts and files
    that are scored with, those that both have: older stamps name none."""
    found = [f"{key} {one[key]!r} -> {other[key]!r}" for key in ("method", "data", "model") if one[key] != other[key]]
    ours, theirs = one.get("scored_with", {}), other.get("scored_with", {})
    found += columns_differ(ours, theirs)
    both = [key for key in ours if key in theirs and key not in COLUMNS]
    found += [f"{key} {ours[key]!r} -> {theirs[key]!r}" for key in both if ours[key] != theirs[key]]
    return found + hparams_differ(one["hparams"], other["hparams"])


def columns_differ(one: Mapping, other: Mapping) -> list[str]:
    """The judge and the further readings that one of two stamps' `scored_with` has and the other has not, in words."""
    return [f"{key} {one.get(key)} -> {other.get(key)}" for key in COLUMNS if one.get(key) != other.get(key)]


def hparams_differ(one: Mapping, other: Mapping) -> list[str]:
    """The hyperparameters that a result depends on and that are not the same, in words. One that is absent had its default."""
    method = methods().get(other.get("alg_name"))
    return differences(one, other, defaults(method.hparams) if method else {}, free=("device", "stats_dir"))


def failed_edits(line: Mapping) -> int:
    """How many edits could not be written up to a result line; older files hold the count in place of the edits' numbers."""
    found = line.get("failed") or 0
    return found if isinstance(found, int) else len(found)


# ---- files


def _edited(editor: LifelongEditor) -> dict[str, torch.nn.Parameter]:
    return {name: editor.model.get_parameter(name) for name in editor.method.matrices(editor.model, editor.hparams)}


def save_edited(editor: LifelongEditor, path: Path) -> None:
    """The edited parameters as safetensors, by name: load them over the base model with `load_state_dict(..., strict=False)`."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in _edited(editor).items()}
    with whole(path) as temporary:
        save_file(tensors, temporary)
