"""Methods side by side on one protocol: `nmke compare` and `nmke run`. One result line per (method, seed, checkpoint)."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import atlas
from ..editor import LifelongEditor
from ..files import whole, write_json
from ..scores import judge as judges
from ..scores import kept
from ..scores.table import edit_meta, metric_meta
from ..scores.tasks import Task
from .methods import Method
from .processes import in_processes, warn_if_oversubscribed
from .protocol import (
    Event,
    Progress,
    Result,
    Scorer,
    Segment,
    columns_differ,
    hparams_differ,
    models_differ,
    save_edited,
    settings_differ,
    stamp,
)  # fmt: skip
from .stream import stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that a comparison does. source: "atlas" or a file of records; tasks: of the LM Evaluation Harness; text: what is
    kept an eye on, None for the package's own; questions: of files, asked at the last checkpoint or (`questions_each`) at all;
    judge: of what is said freely; also: further readings of the edits (`scores.harder`)."""

    methods: tuple[Method, ...]
    source: str
    edits: int
    checkpoints: tuple[int, ...]
    seeds: tuple[int, ...]
    directory: Path
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None
    allow_code: bool = False
    command: str | None = None
    keep_weights: bool = False
    text: str | None = None
    questions: tuple[Task, ...] = ()
    questions_each: bool = False
    judge: judges.Named | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self):
        beyond = [c for c in self.checkpoints if not 0 < c <= self.edits]
        if beyond or not self.checkpoints:
            raise ValueError(f"checkpoints are {list(self.checkpoints)}, expected numbers from 1 to the {self.edits} edits")
        labels = [method.label for method in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"a method is named twice: {', '.join(labels)}")
        models: dict[str, list[str]] = {}
        for method in self.methods:
            if settings := method.settings or method.base:
                said = f"{settings.to_dict()['model_name']} in {'float16' if settings.fp16 else settings.dtype}"
                models.setdefault(said, []).append(method.label)
        if len(models) > 1:
            said = "; ".join(f"{model}: {', '.join(labels)}" for model, labels in models.items())
            raise ValueError(f"the methods' files name different models ({said}); give one by --model-path and --dtype")

    def due(self, method: Method) -> tuple[int, ...]:
        """The checkpoints at which a method is scored: where a whole number of its batches ends, and the last."""
        return tuple(c for c in self.checkpoints if c % method.batch_size == 0 or c == max(self.checkpoints))


def read_lines(file: Path) -> list[dict]:
    """The result lines of a file; a torn last one (a run was killed while writing it) is left out."""
    if not file.is_file():
        return []
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines()):
        try:
            lines.append(json.loads(text))
        except ValueError:
            logger.warning("%s: line %d is not whole and is left out", file, number + 1)
    return lines


class Results:
    """The result lines in a file, one of each (method, seed, checkpoint); more are appended, and are there once `add` returns."""

    def __init__(self, file: Path):
        self.file, lines = file, read_lines(file)
        with whole(file) as temporary:  # without what was torn
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.known = {(line["method"], line["seed"], line["checkpoint"]): line for line in lines}

    def add(self, line: dict) -> None:
        key = (line["method"], line["seed"], line["checkpoint"])
        if key in self.known:
            return
        self.known[key] = line
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def compare(plan: Plan, jobs: int = 1, tell: Callable[[Event], None] = lambda event: None) -> list[dict]:
    """Run what is missing of the plan and return all its lines; `tell` hears of every edit that has come to be done, and of every
    result once it is on disk.

    Results are appended to directory/results.jsonl at every checkpoint. A comparison that was stopped goes on, each segment from
    its last edit (FT and EasyEdit's methods from the start of theirs). ValueError when the folder holds results of other
    settings. jobs: segments at a time, each in a process of its own with its share of the cores.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    results, todo = Results(plan.directory / "results.jsonl"), []
    beside = next(iter(results.known.values()), None)  # of whatever method
    for method in plan.methods:
        if passed := sorted(set(plan.checkpoints) - set(plan.due(method))):
            logger.warning("%s: not scored after %s edits, where no batch of %d ends", method.label, passed, method.batch_size)
    for seed in plan.seeds:
        for method in plan.methods:
            mine = [results.known[key] for c in plan.due(method) if (key := (method.label, seed, c)) in results.known]
            if mine and method.settings:
                _refuse_others(plan, method, hparams_differ(mine[0]["protocol"]["hparams"], method.settings.to_dict()))
            if mine:
                _refuse_others(plan, method, columns_differ(mine[0]["protocol"].get("scored_with", {}), _columns(plan)))
            tell(Progress(_reached(mine)))
            if len(mine) < len(plan.due(method)) or (plan.keep_weights and not weights_file(plan, method, seed).is_file()):
                todo.append((method, seed, mine))
    if todo:
        warn_if_oversubscribed(jobs)
    segments = [partial(_segment, plan, method, seed, earlier, beside) for method, seed, earlier in todo]
    with closing(in_processes(segments, jobs) if jobs > 1 else (e for segment in segments for e in segment())) as events:
        for event in events:
            if isinstance(event, Result):
                results.add(event.line)
            tell(event)
    for method, seed, _ in todo:
        shutil.rmtree(plan.directory / "segments" / _name(method.label, seed), ignore_errors=True)
    return list(results.known.values())


def _reached(lines: Sequence[Mapping]) -> int:
    return max((line["checkpoint"] for line in lines), default=0)


def _refuse_others(plan: Plan, method: Method, differences: Sequence[str]) -> None:
    if differences:
        raise ValueError(
            f"{plan.directory} holds results of {method.label} with other settings ({'; '.join(differences)}); "
            "give another folder, or remove it"
        )


def _segment(plan: Plan, method: Method, seed: int, earlier: Sequence[Mapping], beside: Mapping | None = None) -> Iterator[Event]:
    """Do what is left of one method on one stream; `earlier`: its lines in the results, `beside`: any line there."""
    judge = _judge(plan, method)
    editor = method.editor(seed, plan.directory / "segments" / _name(method.label, seed))
    ours, checkpoints = isinstance(editor, LifelongEditor), plan.due(method)
    try:
        with editor.state.as_of(0) if ours else nullcontext():
            asked = stream(editor, plan.source, plan.edits, seed, checkpoints)
            text = _text(plan, method)
            mark = {**stamp(editor, asked.facts, plan.command), "seed": seed, "scored_with": _scored_with(plan, text, judge)}
            _refuse_others(plan, method, settings_differ(earlier[0]["protocol"], mark) if earlier else [])
            if beside and models_differ(beside["protocol"], mark):
                raise ValueError(f"{plan.directory} holds results of another model; a folder is of one, so give another")
            exercises = atlas.exercises() if plan.source in atlas.SOURCES else ()
            separator = getattr(editor.hparams, "target_separator", None)
            first = 0 if plan.questions_each else max(plan.checkpoints)
            scorer = Scorer(
                editor.model, editor.tok, asked.requests, exercises, _tasks(plan), separator, text, plan.questions, first,
                judge, plan.also,
            )  # fmt: skip
            if method is plan.methods[0] and not earlier:
                scores = scorer.unedited(editor.model, editor.tok)
                told = {"method": "unedited", "seed": seed, "checkpoint": 0, "scores": scores}
                yield Result({**told, "metric_meta": metric_meta(scores), "protocol": mark})
            segment = Segment(editor, scorer, method.label, seed, mark)
        counted = _reached(earlier)  # told already; those methods that start again make them again
        for event in segment.run(checkpoints):
            if isinstance(event, Progress):
                again = min(event.more, counted)
                event, counted = Progress(event.more - again), counted - again
            yield event
        if plan.keep_weights and ours:
            edits = [{"record": record, **edit} for record, edit in zip(asked.records, segment.edits(), strict=False)]
            refused = [{"record": refusal.index, "reason": refusal.reason} for refusal in asked.refused]
            told = {"edits": edits, "refused": refused, "metric_meta": edit_meta(edits)}
            write_json(plan.directory / f"edits-{_name(method.label, seed)}.json", told)
            save_edited(editor, weights_file(plan, method, seed))
    finally:
        if ours:
            editor.close()


def _text(plan: Plan, method: Method) -> str:
    """The kept text: the plan's, a world's own for the embedded models, which have never seen another, or the package's."""
    settings = method.settings or method.base
    if plan.text is not None:
        return plan.text
    if plan.source in atlas.SOURCES or (settings and settings.model_name == "atlas"):
        return atlas.text(atlas.SOURCES.get(plan.source, "small"))
    return kept.own_text()


def _judge(plan: Plan, method: Method) -> judges.Judge | None:
    """The plan's judge, on the method's device and in its dtype when it is on this machine."""
    settings = method.settings or method.base
    return plan.judge and plan.judge.open(settings.device, "float16" if settings.fp16 else settings.dtype)


def _scored_with(plan: Plan, text: str, judge: judges.Judge | None) -> dict:
    """For the stamp: what the scores depend on besides the requests."""
    asked = {f"tasks.{task.name}": task.mark for task in plan.questions}
    return {"kept text": kept.digest(text), **asked, **_columns(plan), **(judge.mark if judge else {})}


def _columns(plan: Plan) -> dict:
    """Of `_scored_with`: which columns were asked for."""
    return {**({"judge": plan.judge.name} if plan.judge else {}), **({"also": list(plan.also)} if plan.also else {})}


def _tasks(plan: Plan) -> Callable | None:
    if not plan.tasks:
        return None
    from ..scores import harness

    tasks = harness.check_tasks(plan.tasks, plan.task_folder, plan.allow_code)

    def scores(model, tok) -> dict[str, float]:
        found = harness.evaluate(model, tok, tasks, limit=plan.task_limit)
        return {f"harness.{name}": value for name, value in found.items()}

    return scores


def weights_file(plan: Plan, method: Method, seed: int) -> Path:
    """Where `keep_weights` puts the edited parameters."""
    return plan.directory / f"edited-{_name(method.label, seed)}.safetensors"


def state_directory(directory: Path, label: str, seed: int) -> Path:
    """Where `nmke run` keeps its state."""
    return directory / f"state-{_name(label, seed)}"


def _name(label: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9+.=-]+', '_', label)}-{seed}"
