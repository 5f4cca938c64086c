"""`nmke run` and `nmke compare`: edit, score at checkpoints, keep the results; both go on where they were stopped."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from ..experiments.analyses.source import on_argument
from ..scores.table import task_scores
from .report import comparison
from .verb import Verb, cells, numbers, positive, print_scores, quiet_libraries, task_table

NOTES = 5  # on odd records that are shown


def _run_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument("--hparams", required=True, metavar="FILE", help="a YAML file, or the name of one that comes with the package")
    run.add_argument(
        "--data", required=True, metavar="FILE", help="records of a known format (JSON, JSON lines; docs/data.md); or atlas, facts"
    )
    run.add_argument("--edits", type=positive, metavar="N", help="only the first N records that can be edited")
    run.add_argument("--model", metavar="NAME", help="instead of the file's model_name")
    run.add_argument("--seed", type=int, default=0, help="order of the records (default 0: the file's)")
    _shared_arguments(run)


def _compare_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "--model",
        default="atlas",
        metavar="LIST",
        help="which file of each method's hparams (default atlas); of several, DIR/NAME each",
    )
    compare.add_argument("--methods", metavar="LIST", help="for example NMKE,AlphaEdit@100,MEMIT+BLUE,NMKE[L2=10],easyedit:WISE")
    compare.add_argument("--ablation", metavar="SET", help="a named set of NMKE's settings in place of --methods")
    compare.add_argument("--base", metavar="METHOD", help="what an ablation changes (default NMKE)")
    compare.add_argument("--hparams-dir", type=Path, metavar="DIR", help="<method>/<model>.yaml (default: the package's own)")
    compare.add_argument("--model-path", metavar="PATH", help="instead of the files' model_name")
    compare.add_argument("--data", default="atlas", metavar="FILE", help="records to edit (default: the embedded model's facts)")
    compare.add_argument("--edits", type=positive, default=200, metavar="T", help="facts to edit (default 200)")
    compare.add_argument("--seeds", type=positive, default=1, metavar="N", help="streams of facts (default 1)")
    compare.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (default 1)")
    on_argument(compare)
    _shared_arguments(compare)


def _shared_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go (made if missing)")
    sub.add_argument("--checkpoints", type=numbers, metavar="LIST", help="score after so many edits, 1,100,400 (default: all)")
    sub.add_argument("--device", metavar="NAME", help="instead of the file's device")
    sub.add_argument("--dtype", metavar="NAME", help="instead of the file's dtype: float32, bfloat16, float16, auto")
    sub.add_argument("--text-eval", type=Path, metavar="FILE", help="text to see how far the model moves (default: the package's)")
    sub.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="FILE", help="JSON lines: question, choices, answer")
    sub.add_argument("--tasks-at", choices=("last", "each"), default="last", help="which checkpoints they are asked at (last)")
    sub.add_argument("--tasks-limit", type=positive, metavar="N", help="only the first N questions of each file")
    sub.add_argument("--judge", metavar="NAME", help="a model that judges free answers: here, or at OPENAI_BASE_URL if that is set")
    sub.add_argument("--also", default="", metavar="LIST", help="further readings of each edit: prefix, overedit")
    sub.add_argument("--harness", metavar="TASKS", help="also score with these tasks of the LM Evaluation Harness")
    sub.add_argument("--harness-tasks", type=Path, metavar="DIR", help="a folder of your own task files")
    sub.add_argument("--harness-limit", type=positive, metavar="N", help="only N items of each task")
    sub.add_argument("--harness-allow-code", action="store_true", help="let tasks run the code that the model writes")


def _run(args, console: Console) -> int:
    from ..editor import LifelongEditor
    from ..experiments.compare import state_directory
    from ..experiments.methods import Method, changed
    from ..experiments.stream import stream as chosen
    from ..methods import read

    quiet_libraries(args)
    scored_with = _scored_with(args)
    settings = changed(read(args.hparams), _overrides(args, args.model))
    if settings.keeps_updates:
        settings.state_dir = str(state_directory(args.out, settings.alg_name, args.seed))
    editor = LifelongEditor.from_hparams(settings)
    try:
        stream = chosen(editor, args.data, args.edits, args.seed, args.checkpoints or ())
        method = Method(settings.alg_name, settings, loaded=editor)
        lines = _compared(args, _plan(args, scored_with, [method], len(stream.requests), (args.seed,), args.out, keep_weights=True))
    finally:
        editor.close()
    _print(lines, console)
    if asked := task_scores(lines, max(line["checkpoint"] for line in lines)):
        console.print(task_table(asked))
    for refusal in stream.refused:
        console.print(f"refused {refusal}", highlight=False, markup=False, soft_wrap=True)
    for note in stream.notes[:NOTES]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if len(stream.notes) > NOTES:
        console.print(f"note: and {len(stream.notes) - NOTES} more like these", highlight=False)
    done = f"{len(stream.requests)} edits, {len(stream.refused)} records refused; results in {args.out}"
    console.print(done, highlight=False, markup=False, soft_wrap=True)
    return 0


def _print(lines: list[dict], console: Console) -> None:
    """Scores by checkpoint, those that there are; how many edits could not be written only where there are any."""
    from ..experiments.protocol import failed_edits
    from ..scores.table import in_shell

    headings = in_shell({name for line in lines for name, value in line["scores"].items() if value is not None})
    lost, rows = any(map(failed_edits, lines)), []
    for line in lines:
        edits = line["checkpoint"]
        seconds = f"{line['seconds']['total'] / edits:.2f}" if edits else "-"
        more = [str(failed_edits(line))] if lost else []
        rows.append([f"{line['method']}, {edits} edits" if edits else "unedited", *cells(headings, line["scores"]), seconds, *more])
    print_scores(["Method", *headings.values(), "s/edit", *(["Failed"] if lost else [])], rows, console)


def _compare(args, console: Console) -> int:
    from ..experiments import methods as known

    quiet_libraries(args)
    scored_with = _scored_with(args)
    models = list(dict.fromkeys(filter(None, (name.strip() for name in args.model.split(",")))))
    if len(models) > 1 and args.model_path:
        raise ValueError(f"--model-path is one model, but --model names {len(models)}; compare each by a command of its own")
    if len(models) > 1 and (args.out / "results.jsonl").is_file():
        raise ValueError(f"{args.out} holds the results of one model; several need another folder")
    plans = {}  # all of them, before anything is edited
    for model in models:
        overrides = _overrides(args, args.model_path)
        if args.ablation:
            (base,) = known.methods(args.base or "NMKE", model, args.hparams_dir, overrides)
            methods = known.ablation(args.ablation, base.settings)
        else:
            methods = known.methods(args.methods or ", ".join(known.METHODS), model, args.hparams_dir, overrides)
        folder = args.out if len(models) == 1 else args.out / re.sub(r"[^A-Za-z0-9+.=-]+", "_", model)
        plans[folder] = _plan(args, scored_with, methods, args.edits, tuple(range(args.seeds)), folder)
    for folder, plan in plans.items():
        lines = _compared(args, plan)
        try:
            comparison(lines, [], console)
        except ImportError as error:
            console.print(f"results in {folder}; {error}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _overrides(args, model: str | None) -> dict[str, str]:
    """What the command line says of the model in place of the files."""
    given = {"model_name": model, "device": args.device, "dtype": args.dtype}
    return {name: value for name, value in given.items() if value is not None}


def _scored_with(args) -> dict:
    """A `Plan`'s text, questions, judge, further readings and tasks of the harness; an error before any model is loaded when they,
    or the folder for the results, cannot be used."""
    from ..scores import harder, kept
    from ..scores import judge as judges
    from ..scores import tasks as questions

    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder for the results")
    tasks = tuple(name.strip() for name in (args.harness or "").split(",") if name.strip())
    if tasks:
        from ..scores import harness

        harness.check_tasks(tasks, args.harness_tasks, args.harness_allow_code)
    return {
        "text": None if args.text_eval is None else kept.read(args.text_eval),
        "questions": questions.read(args.tasks, args.tasks_limit),
        "questions_each": args.tasks_at == "each",
        "judge": judges.named(args.judge, args.out) if args.judge else None,
        "also": harder.readings(args.also),
        "tasks": tasks,
    }


def _plan(args, scored_with: dict, methods, edits: int, seeds: tuple[int, ...], folder: Path, keep_weights: bool = False):
    from ..experiments.compare import Plan

    return Plan(
        tuple(methods), args.data, edits, args.checkpoints or (edits,), seeds, folder, **scored_with,
        task_folder=args.harness_tasks, task_limit=args.harness_limit, allow_code=args.harness_allow_code,
        command=args.command, keep_weights=keep_weights,
    )  # fmt: skip


def _compared(args, plan) -> list[dict]:
    """Run a `Plan` under a progress bar; its lines."""
    from ..experiments.compare import compare
    from ..experiments.protocol import Event, Progress

    total = len(plan.methods) * len(plan.seeds) * plan.edits
    with tqdm(total=total, desc="editing", unit="edit", smoothing=0.02) as bar, _asked_to_stop() as asked:

        def tell(event: Event) -> None:
            if isinstance(event, Progress):
                bar.update(event.more)
                if asked:
                    raise KeyboardInterrupt
            elif event.line["checkpoint"]:
                bar.set_postfix(Rel=f"{event.line['scores']['rel']:.2f}")

        return compare(plan, getattr(args, "jobs", 1), tell, getattr(args, "on", None))


@contextmanager
def _asked_to_stop() -> Iterator[list]:
    """A list that is no longer empty once Ctrl-C was pressed; pressed again, it interrupts."""
    asked: list[int] = []

    def ask(number, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nfinishing the edit in hand (Ctrl-C again: at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


RUN = Verb(
    "run",
    "edit a model with the facts of a file, one after the other, and score all of them at checkpoints",
    "nmke run --hparams atlas --data requests.json --out results --edits 100",
    _run,
    _run_arguments,
    needs_arguments=True,
    goes_on=True,
)
COMPARE = Verb(
    "compare",
    "edit and score the same facts with several methods",
    "nmke compare --model atlas --edits 400 --checkpoints 1,100,400 --seeds 3 --jobs 2 --out results",
    _compare,
    _compare_arguments,
    goes_on=True,
)
