"""General ability by the LM Evaluation Harness (`lm-eval`, the extra "harness"), on the edited model as it is in memory.

Its tasks read their data from the hub; this package's `atlas_exercises` and `atlas_facts`, for the embedded model, need none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from .. import atlas
from ..atlas import facts as world
from ..messages import did_you_mean, how_to_install
from ..models.arch import evaluating

TASKS = Path(__file__).parents[1] / "atlas" / "tasks"
MAIN_METRICS = ("acc", "exact_match", "acc_norm")  # in order of preference
FEWSHOT_SEED = 1234  # which examples come before a question, in tasks that show some: the harness' own choice
ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # without which the metric itself refuses


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness with their data. loaded: as the harness has them; members: name asked for -> its tasks (several for a
    group or a tag); metrics: task -> its main metric."""

    loaded: dict[str, dict]
    members: dict[str, list[str]]
    metrics: dict[str, str]
    allow_code: bool


def check_tasks(names: Sequence[str], include_path: str | Path | None = None, allow_code: bool = False) -> Tasks:
    """The tasks, groups and tags of these names, ready to be evaluated again and again. Call it before any editing.

    include_path: a folder with more task files. Raises ImportError when the harness is not installed; ValueError for unknown
    names (all in one message), for data that cannot be loaded, and, unless `allow_code`, for tasks that run generated code.
    """
    with _quiet(), _code_allowed(allow_code):
        manager = _manager(names, include_path)
        found = {name: _load(manager, name, allow_code) for name in names}
    loaded = {part: {k: v for one in found.values() for k, v in one[part].items()} for part in ("tasks", "groups", "group_map")}
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    members = {name: list(one["tasks"]) for name, one in found.items()}
    metrics = {name: _main_metric(task.aggregation()) for name, task in loaded["tasks"].items()}
    return Tasks(loaded, members, metrics, allow_code)


def evaluate(
    model,
    tok,
    names: Sequence[str] | Tasks,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    verbose: bool = False,
) -> dict[str, float]:
    """{name: score} by the main metric; of the tasks of a tag, which has no score of its own, in its place.

    The main metric is `acc`, else `exact_match`, else `acc_norm`, else the first that the task lists; after the first of its
    filters. names: what `check_tasks` gave (which saves loading it again), or its arguments. limit: only the first documents of
    each task. The model stays where and what it is; an editor around it that decides text by text (`inner`) is asked one text at
    a time, but not as its own forward pass asks: GRACE has the key of the text before, and of an answer that is generated WISE and
    DEFER see one token after the other. verbose: the harness' own logging and progress.
    """
    tasks = names if isinstance(names, Tasks) else check_tasks(names, include_path, allow_code)
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    by_text = hasattr(model, "inner")
    with contextlib.nullcontext() if verbose else _quiet(), _code_allowed(tasks.allow_code), evaluating(model):
        found = run(
            HFLM(pretrained=model.inner if by_text else model, tokenizer=deepcopy(tok), batch_size=1 if by_text else batch_size),
            tasks.loaded, limit=limit, bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=tasks.allow_code,
        )["results"]  # fmt: skip
    scored = [[name] if _scores(found.get(name, {})) else members for name, members in tasks.members.items()]
    return {entry: _main_score(found[entry]) for entries in scored for entry in entries}


def exercise_documents(**_) -> dict:
    """The data of `atlas_exercises`: general-ability exercises that were held out of training."""
    return _documents({"prompt": prompt, "answer": answer} for prompt, answer in atlas.exercises())


def fact_documents(count: int = 300, **_) -> dict:
    """The data of `atlas_facts`: facts of the tuning half in a trained wording, with all objects of the relation to choose from."""
    rng = random.Random(0)
    facts = [fact for fact in world.make_world()[0] if fact.half == "tune"]
    rows = []
    for fact in rng.sample(facts, count):
        wording = rng.choice([i for i in range(len(fact.relation.templates)) if i != fact.held_out])
        choices = list(fact.relation.objects)
        rows.append({"prompt": fact.prompt(wording), "choices": choices, "answer": choices.index(fact.object)})
    return _documents(rows)


def _documents(rows: Iterable[dict]) -> dict:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}


def _manager(names: Sequence[str], include_path: str | Path | None):
    """The harness' catalogue; with its own thousands of tasks only where they are asked for, since listing them takes long."""
    try:
        import lm_eval.models.huggingface  # noqa: F401  it needs more packages than the tasks
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"the LM Evaluation Harness cannot be imported ({error}); {how_to_install('harness')} brings it"
        ) from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path is {str(include_path)!r}, expected a folder with task files of the harness")
    folders = [str(folder) for folder in (TASKS, include_path) if folder is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders)
    unknown = [_suggest(name, manager.all_tasks) for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"the harness has no task {', '.join(unknown)}")
    return manager


def _load(manager, name: str, allow_code: bool) -> dict:
    """{"tasks": {name: task with its data}, "groups": {name: group}, "group_map": {name: names in it}}."""
    unsafe = [name] if (manager.task_index[name].cfg or {}).get("unsafe_code") else []
    if not unsafe or allow_code:
        try:
            found = manager.load([name])
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"harness task {name!r} cannot be loaded ({type(error).__name__}: {reason}); its data comes from the hub, unless "
                "the hub's cache on this machine has it"
            ) from error
        unsafe += [task for task, one in found["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe and not allow_code:
        raise ValueError(f"harness task {unsafe[0]!r} runs code that the model writes; leave it out, or allow it (allow_code=True)")
    return found


def _suggest(name: str, known: Sequence[str]) -> str:
    return repr(name) + did_you_mean(name, known)


def _scores(entry: Mapping) -> dict[str, float]:
    """metric -> value of one entry of the results, whose keys are "metric,filter"."""
    scores: dict[str, float] = {}
    for key, value in entry.items():
        metric, filtered, _ = key.partition(",")
        if filtered and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            scores.setdefault(metric, value)
    return scores


def _main_metric(metrics: Iterable[str]) -> str:
    metrics = list(metrics)
    return next((metric for metric in MAIN_METRICS if metric in metrics), metrics[0])


def _main_score(entry: Mapping) -> float:
    scores = _scores(entry)
    return float(scores[_main_metric(scores)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from the harness and the libraries under it, and no progress bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "evaluate")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    before = os.environ.get(ALLOW_CODE)
    if allowed:
        os.environ[ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ALLOW_CODE, None)
        else:
            os.environ[ALLOW_CODE] = before
