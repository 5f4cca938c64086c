"""Methods side by side on one protocol: `nmke compare` and `nmke run`. One result line per (method, seed, checkpoint)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .. import atlas, data
from ..editor import LifelongEditor
from ..hparams import HyperParams, shipped
from ..methods import methods as editing_methods
from ..methods import read
from ..methods.contract import check_requests
from ..models.arch import ModelView
from ..models.loading import load_model
from ..models.prompts import Request
from ..scores import metrics
from .protocol import Scorer, Segment, hparams_differ, save_edited, settings_differ, stamp, whole, write_json

logger = logging.getLogger(__name__)

# Labels that stand for settings of NMKE: the file they are read from, and what is changed in it.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "NMKE+": ("NMKE/{model}-plus", {}),
        "NMKE random mask": ("NMKE/{model}", {"control": "random"}),
        "NMKE uniform": ("NMKE/{model}", {"control": "uniform"}),
        "NMKE+ mask": ("NMKE/{model}-plus", {"neurons": "both"}),
        "NMKE+ random mask": ("NMKE/{model}-plus", {"neurons": "both", "control": "random"}),
    }
)
METHODS = ("NMKE", "NMKE+", "AlphaEdit", "MEMIT", "ROME", "FT", "NMKE random mask")

# Named sets of settings: label -> what differs from the first method's file.
ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "selection": {
            **{name: {"neurons": name} for name in ("general", "specific", "overlap", "non_overlap", "both")},
            "random": {"control": "random"},
            "all": {"neurons": "all"},
        },
        "ratio": {
            "dynamic": {"ratio": "dynamic"},
            "dynamic, exact ties": {"ratio": "dynamic", "mask_ties": "exact"},
            **{
                f"fixed {general}/{specific}": {"ratio": "fixed", "general_ratio": general, "specific_ratio": specific}
                for general, specific in ((0.1, 0.1), (0.3, 0.3), (0.5, 0.3))
            },
            "fixed 0.3/0.3, exact ties": {"ratio": "fixed", "general_ratio": 0.3, "specific_ratio": 0.3, "mask_ties": "exact"},
        },
        "attribution": {
            "LPS": {"attribution_strategy": "lps"},
            "PSA": {"attribution_strategy": "psa"},
            "MPC": {"attribution_strategy": "mpc"},
            "new target": {"attribution_target": "target_new"},
            "exact norm": {"attribution_norm": "exact"},
            "padded end": {"attribution_position": "padded_end"},
        },
        "mask": {
            "binary": {"mask": "binary"},
            "soft": {"mask": "soft"},
            "restricted": {"solve": "restricted"},
            "none": {"neurons": "all"},
        },
        "lambda": {f"λ = {value}": {"amplification": value} for value in (1.0, 10.0, 30.0, 100.0)},
        "temperature": {f"α = {value}": {"temperature": value} for value in (1.0, 10.0, 30.0, 100.0)},
        "l2": {f"L2 x {factor}": {"L2": ("times", factor)} for factor in (0.1, 0.3, 1.0, 3.0, 10.0)},
    }
)


@dataclass(frozen=True)
class Method:
    """What one line of a comparison is called, and how its editor is made (again, in another process)."""

    label: str
    settings: HyperParams | None = None
    easyedit: str | None = None  # the name in EasyEdit's ALG_DICT
    file: str | None = None
    base: HyperParams | None = None  # says which model EasyEdit's method edits, and where
    loaded: Any = None  # an editor on an unedited model, for the only segment of a plan

    def editor(self, seed: int, state_dir: Path):
        """state_dir: where a segment is kept while it is made, for those methods that can go on from any edit."""
        if self.loaded is not None:
            return self.loaded
        if self.settings is not None:
            kept = {} if self.settings.alg_name == "FT" else {"state_dir": str(state_dir)}
            return LifelongEditor.from_hparams(dataclasses.replace(self.settings, **kept))
        from ..easyedit.foreign import EasyEditMethod

        return EasyEditMethod(self.easyedit, self.file, load_model(self.base), seed=seed)


@dataclass(frozen=True)
class Plan:
    """Everything that a comparison does. source: "atlas" or a file of records; tasks: of the LM Evaluation Harness."""

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

    def __post_init__(self):
        beyond = [c for c in self.checkpoints if not 0 < c <= self.edits]
        if beyond or not self.checkpoints:
            raise ValueError(f"checkpoints are {list(self.checkpoints)}, expected numbers from 1 to the {self.edits} edits")
        labels = [method.label for method in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"a method is named twice: {', '.join(labels)}")


def methods(names: str, model: str, directory: Path | None = None, overrides: Mapping[str, Any] | None = None) -> list[Method]:
    """Methods from a list such as "NMKE, NMKE+, AlphaEdit[L2=10], easyedit:WISE".

    Files are `directory`/<method>/<model>.yaml, by default those that come with the package; [name=value; ...] changes settings,
    and so do `overrides` (model_name, device) for all of them. ValueError, naming what is known, for anything that cannot be read.
    """
    found = []
    for name in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", names))):
        bare, changes = _changes(name)
        if bare.lower().startswith("easyedit:"):
            method = bare.split(":", 1)[1]
            base = changed(read(f"NMKE/{model}"), overrides or {})
            found.append(Method(name, easyedit=method, file=_easyedit_file(method, model, directory), base=base))
            continue
        file, preset = VARIANTS.get(bare, ("{method}/{model}", {}))
        known = editing_methods()
        if bare not in VARIANTS and bare not in known:
            known = [*known, *VARIANTS, "easyedit:<method>"]
            close = difflib.get_close_matches(bare, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"method {bare!r} is not known{hint}; known: {', '.join(known)}")
        path = file.format(method=bare, model=model)
        settings = read(directory / path if directory else path)
        found.append(Method(name, changed(settings, {**preset, **changes, **(overrides or {})})))
    return found


def ablation(name: str, base: HyperParams) -> list[Method]:
    """The methods of a named set, each `base` with other settings."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}, expected one of {', '.join(ABLATIONS)}")
    return [Method(label, changed(base, changes)) for label, changes in ABLATIONS[name].items()]


def changed(settings: HyperParams, changes: Mapping[str, Any]) -> HyperParams:
    """`settings` with other values; ("times", x) multiplies. ValueError with every problem in one message."""
    values = {
        name: getattr(settings, name) * value[1] if isinstance(value, tuple) and value[0] == "times" else value
        for name, value in changes.items()
    }
    return type(settings).from_dict({**{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}, **values})


def _changes(name: str) -> tuple[str, dict[str, Any]]:
    import yaml

    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", name)
    if not match:
        raise ValueError(f"method {name!r} cannot be read; expected a name, or name[setting=value; setting=value]")
    pairs = [part.split("=", 1) for part in (match[2] or "").split(";") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"method {name!r} cannot be read; settings are written name[setting=value; setting=value]")
    return match[1].strip(), {key.strip(): yaml.safe_load(value) for key, value in pairs}


def _easyedit_file(method: str, model: str, directory: Path | None) -> str:
    """`directory`'s file for a method of EasyEdit, else the one that comes with this package, else EasyEdit's own."""
    folders = [directory / "easyedit" / method] if directory else []
    own = [Path(os.environ["EASYEDIT_HOME"]) / "hparams" / method] if os.environ.get("EASYEDIT_HOME") else []
    for file in [
        *(f / f"{model}.yaml" for f in folders),
        shipped(f"easyedit/{method}").get(model),
        *(f / f"{model}.yaml" for f in own),
    ]:
        if file is not None and file.is_file():
            return str(file)
    return model


@dataclass(frozen=True)
class Stream:
    """What is edited, in order, and the number of each record in its file; refused records; what the stamp says of them."""

    requests: list[Request]
    records: list[int]
    refused: list[data.Refusal]
    facts: dict


def stream(editor, source: str, edits: int | None, seed: int) -> Stream:
    """The first `edits` (None: all) facts of the embedded model's test half, or records of a file, in an order that the seed
    decides (0: as they are), without those that this model and its templates cannot be edited with or scored on."""
    if source in atlas.SOURCES:
        requests = [Request.from_dict(r) for r in atlas.requests(edits or 200, "test", seed, atlas.SOURCES[source])]
        return Stream(requests, list(range(len(requests))), [], {"name": f"{source}, test half", "edits": len(requests)})
    loaded = data.load(Path(source))
    order = list(range(len(loaded.requests)))
    if seed:
        random.Random(seed).shuffle(order)
    view, templates = ModelView(editor.model), editor.state.flat_templates if isinstance(editor, LifelongEditor) else ("{}",)
    accepted, refused, batch = [], list(loaded.refused), getattr(editor.hparams, "batch_size", 1)
    for place in order:
        try:
            begun = [loaded.requests[i] for i in accepted[len(accepted) // batch * batch :]]
            check_requests(view, editor.tok, [*begun, loaded.requests[place]], templates)
            metrics.check(editor.model, editor.tok, [loaded.requests[place]])
            accepted.append(place)
        except ValueError as error:
            refused.append(data.Refusal(loaded.indices[place], str(error)))
    refused.sort(key=lambda refusal: refusal.index)
    if not accepted:
        raise ValueError(f"none of the {len(refused)} records of {source} can be edited; the first: {refused[0].reason}")
    if edits and len(accepted) < edits:
        raise ValueError(f"{edits} edits were asked for, but {len(accepted)} records of {source} can be edited; ask for fewer")
    chosen = accepted[:edits]
    facts = {"name": Path(source).name, "sha256": loaded.sha256, "format": loaded.format, "refused": len(refused)}
    return Stream(
        [loaded.requests[i] for i in chosen], [loaded.indices[i] for i in chosen], refused, {**facts, "edits": len(chosen)}
    )


# ---- running


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


def compare(
    plan: Plan,
    jobs: int = 1,
    on_edit: Callable[[int], None] = lambda edits: None,
    on_line: Callable[[Mapping], None] = lambda line: None,
) -> list[dict]:
    """Run what is missing of the plan and return all its lines; `on_edit` is told how many edits have come to be done, `on_line`
    each result.

    Results are appended to directory/results.jsonl at every checkpoint. A comparison that was stopped goes on, each segment from
    its last edit (FT and EasyEdit's methods from the start of theirs). ValueError when the folder holds results of other
    settings. jobs: segments at a time, each in a process of its own with its share of the cores.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    results = plan.directory / "results.jsonl"
    lines = read_lines(results)
    with whole(results) as temporary:  # without what was torn
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    known = {(line["method"], line["seed"], line["checkpoint"]): line for line in lines}
    todo = []
    for seed in plan.seeds:
        for method in plan.methods:
            mine = [known[key] for c in plan.checkpoints if (key := (method.label, seed, c)) in known]
            if mine and method.settings:
                _refuse_others(plan, method, hparams_differ(mine[0]["protocol"]["hparams"], method.settings.to_dict()))
            on_edit(max([line["checkpoint"] for line in mine], default=0))
            if len(mine) < len(plan.checkpoints) or (plan.keep_weights and not weights_file(plan, method, seed).is_file()):
                todo.append((method, seed, mine))

    def write(line: Mapping) -> None:
        on_line(line)
        key = (line["method"], line["seed"], line["checkpoint"])
        if key not in known:
            known[key] = line
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    segments = [partial(_segment, plan, method, seed, earlier) for method, seed, earlier in todo]
    for event in _in_processes(segments, jobs) if jobs > 1 else (event for segment in segments for event in segment()):
        on_edit(event) if isinstance(event, int) else write(event)
    for method, seed, _ in todo:
        shutil.rmtree(plan.directory / "segments" / _name(method.label, seed), ignore_errors=True)
    return list(known.values())


Event = int | dict  # how many more edits are done, or a result line


def _refuse_others(plan: Plan, method: Method, differences: Sequence[str]) -> None:
    if differences:
        raise ValueError(
            f"{plan.directory} holds results of {method.label} with other settings ({'; '.join(differences)}); "
            "give another folder, or remove it"
        )


def _segment(plan: Plan, method: Method, seed: int, earlier: Sequence[Mapping]) -> Iterator[Event]:
    """Do what is left of one method on one stream; `earlier`: its lines in the results."""
    editor = method.editor(seed, plan.directory / "segments" / _name(method.label, seed))
    ours = isinstance(editor, LifelongEditor)
    try:
        with editor.state.as_of(0) if ours else nullcontext():
            asked = stream(editor, plan.source, plan.edits, seed)
            mark = {**stamp(editor, asked.facts, plan.command), "seed": seed}
            _refuse_others(plan, method, settings_differ(earlier[0]["protocol"], mark) if earlier else [])
            exercises = atlas.exercises() if plan.source in atlas.SOURCES else ()
            scorer = Scorer(editor.model, editor.tok, asked.requests, exercises, _tasks(plan))
            if method is plan.methods[0] and not earlier:
                scores = scorer.unedited(editor.model, editor.tok)
                yield {"method": "unedited", "seed": seed, "checkpoint": 0, "scores": scores, "protocol": mark}
            segment = Segment(editor, scorer, method.label, seed, mark)
        counted = max((line["checkpoint"] for line in earlier), default=0)
        for event in segment.run(plan.checkpoints):
            if isinstance(event, int):
                event, counted = max(event - counted, 0), max(event, counted)
            yield event
        if plan.keep_weights and ours:
            edits = [{"record": record, **edit} for record, edit in zip(asked.records, segment.edits(), strict=False)]
            refused = [{"record": refusal.index, "reason": refusal.reason} for refusal in asked.refused]
            write_json(plan.directory / f"edits-{_name(method.label, seed)}.json", {"edits": edits, "refused": refused})
            save_edited(editor, weights_file(plan, method, seed))
    finally:
        if ours:
            editor.close()


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


def _in_processes(segments: Sequence[Callable[[], Iterator[Event]]], jobs: int) -> Iterator[Event]:
    """The events of all segments, `jobs` of them at a time, each in a process of its own. The first error ends them all."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    threads = max((os.cpu_count() or 1) // jobs, 1)
    waiting, running = list(segments), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=_work, args=(waiting.pop(0), told, os.getpid(), threads), daemon=True)
                process.start()
                running.append(process)
            try:
                pid, event = told.get(timeout=1)
            except queue.Empty:
                dead = [process for process in running if process.exitcode]
                if dead:
                    raise RuntimeError(f"a process ended with exit code {dead[0].exitcode} (out of memory?)") from None
                continue
            if isinstance(event, BaseException):
                raise event
            if event is None:
                (ended,) = (process for process in running if process.pid == pid)
                ended.join()
                running.remove(ended)
            else:
                yield event
    finally:
        for process in running:
            process.terminate()


def _work(segment: Callable[[], Iterator[Event]], told, parent: int, threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is told to all of a shell's processes; the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        for event in segment():
            told.put((os.getpid(), event))
        told.put((os.getpid(), None))
    except Exception as error:
        told.put((os.getpid(), error))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: whoever starts it again needs the states that it holds."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
