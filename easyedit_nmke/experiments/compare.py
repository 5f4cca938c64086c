"""Methods side by side on one protocol: `nmke compare` and `nmke run`. One result line per (method, seed, checkpoint)."""

from __future__ import annotations

import dataclasses
import itertools
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
from ..history.journal import Journal
from ..models.arch import ModelView, editing
from ..scores import judge as judges
from ..scores import kept
from ..scores.table import edit_meta, metric_meta
from ..scores.tasks import Task
from ..statistics.covariance import cache_directory
from .cluster import cluster, gpus_of, placed
from .methods import Method, changed
from .pieces import Piece, on_cluster, records
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
from .stream import source_of, stream

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


def compare(plan: Plan, jobs: int = 1, tell: Callable[[Event], None] = lambda event: None, on: str | None = None) -> list[dict]:
    """Run what is missing of the plan and return all its lines; `tell` hears of every edit that has come to be done, and of every
    result once it is on disk.

    Results are appended to directory/results.jsonl at every checkpoint. A comparison that was stopped goes on, each segment from
    its last edit (FT and EasyEdit's methods from the start of theirs). ValueError when the folder holds results of other
    settings. jobs: segments at a time, each in a process of its own with its share of the cores. on: "ray" or "ray:ADDRESS",
    segments are tasks of that cluster (see `cluster`), each with as many threads as this process.
    """
    if on and jobs > 1:
        raise ValueError(f"jobs is {jobs}, but the room on a cluster says how many segments run at a time; leave it out")
    plan.directory.mkdir(parents=True, exist_ok=True)
    results, todo = Results(plan.directory / "results.jsonl"), []
    beside = next(iter(results.known.values()), None)  # of whatever method
    was, now = (beside or {}).get("protocol", {}).get("data"), source_of(plan.source)
    if was and now and source_of(was) != now:
        raise ValueError(
            f"{plan.directory} holds results of other records ({was.get('name')}, {source_of(was)}), "
            f"and these are of {plan.source} ({now}); a folder is of one file, so give another"
        )
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
    if todo and not on:
        warn_if_oversubscribed(jobs)
    with closing(_events(plan, [(*each, beside) for each in todo], jobs, on)) as events:
        for event in events:
            if isinstance(event, Result):
                results.add(event.line)
            tell(event)
    for method, seed in itertools.product(plan.methods, plan.seeds):  # of an earlier run that was killed, too
        shutil.rmtree(plan.directory / "segments" / _name(method.label, seed), ignore_errors=True)
    return list(results.known.values())


def _events(plan: Plan, todo: Sequence[tuple], jobs: int, on: str | None) -> Iterator[Event]:
    """Of all segments that are to be done: here, in processes, or on a cluster."""
    if on is None or not todo:
        segments = [partial(_segment, plan, *each) for each in todo]
        return in_processes(segments, jobs) if jobs > 1 else (event for segment in segments for event in segment())
    return _on_cluster(plan, todo, on)


def _on_cluster(plan: Plan, todo: Sequence[tuple], on: str) -> Iterator[Event]:
    if live := [method.label for method in plan.methods if method.loaded is not None]:
        raise ValueError(f"{live[0]} has an editor in this process, which other machines cannot load; give its settings alone")
    gpus = max(gpus_of(method.settings or method.base) for method in plan.methods)
    there = {method.label: _placed(method) for method in plan.methods}
    elsewhere = dataclasses.replace(plan, methods=tuple(there.values()))
    files = (Path(plan.source),) if Path(plan.source).is_file() else ()
    added = (plan.judge.file,) if plan.judge else ()
    pieces = [
        Piece(
            partial(_segment, elsewhere, there[method.label], *rest), plan.directory, f"segments/{_name(method.label, rest[0])}",
            files, added,
        )
        for method, *rest in todo
    ]  # fmt: skip
    with cluster(on) as machines:
        yield from on_cluster(machines, pieces, gpus)


def _placed(method: Method) -> Method:
    """As a worker of a cluster is to open it."""
    name = "settings" if method.settings else "base"
    settings = getattr(method, name)
    return dataclasses.replace(method, **{name: changed(settings, placed(settings))})


def _reached(lines: Sequence[Mapping]) -> int:
    return max((line["checkpoint"] for line in lines), default=0)


def _refuse_others(plan: Plan, method: Method, differences: Sequence[str]) -> None:
    if differences:
        raise ValueError(
            f"{plan.directory} holds results of {method.label} with other settings ({'; '.join(differences)}); "
            "give another folder, or remove it"
        )


def _segment(
    plan: Plan, method: Method, seed: int, earlier: Sequence[Mapping], beside: Mapping | None = None, folder: Path | None = None
) -> Iterator[Event]:
    """Do what is left of one method on one stream; `earlier`: its lines in the results, `beside`: any line there. folder: of a
    worker of a cluster, in the place of the plan's."""
    folder = folder or plan.directory
    source = records(plan.source, folder)
    judge = _judge(plan, method, folder)
    state = folder / "segments" / _name(method.label, seed)
    editor = method.editor(seed, state)
    ours, checkpoints = isinstance(editor, LifelongEditor), plan.due(method)
    if ours:
        _measure_again(editor, state)
    try:
        with editor.state.as_of(0) if ours else nullcontext():
            asked = stream(editor, source, plan.edits, seed, checkpoints)
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
            write_json(folder / f"edits-{_name(method.label, seed)}.json", told)
            save_edited(editor, folder / weights_file(plan, method, seed).name)
    finally:
        if ours:
            editor.close()


def _measure_again(editor: LifelongEditor, state: Path) -> None:
    """Statistics that a state on disk names and this machine, perhaps another than began it, has not: made anew, in its cache."""
    if not Journal.exists(state):
        return
    with Journal.open(state, write=False) as journal:
        named = [Path(each["path"]) for each in journal.header.get("files", {}).values()]
    cache = cache_directory(editor.hparams) if named else None
    if not all(file.is_file() or (cache / file.name).is_file() for file in named):
        with editing(editor.model):
            editor.method.measure(ModelView(editor.model), editor.tok, editor.hparams, False)


def _text(plan: Plan, method: Method) -> str:
    """The kept text: the plan's, a world's own for the embedded models, which have never seen another, or the package's."""
    settings = method.settings or method.base
    if plan.text is not None:
        return plan.text
    if plan.source in atlas.SOURCES or (settings and settings.model_name == "atlas"):
        return atlas.text(atlas.SOURCES.get(plan.source, "small"))
    return kept.own_text()


def _judge(plan: Plan, method: Method, folder: Path) -> judges.Judge | None:
    """The plan's judge, on the method's device and in its dtype when it is on this machine; its answers are kept in the folder."""
    if plan.judge is None:
        return None
    settings = method.settings or method.base
    judge = plan.judge if folder == plan.directory else dataclasses.replace(plan.judge, file=folder / plan.judge.file.name)
    return judge.open(settings.device, "float16" if settings.fp16 else settings.dtype)


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
