"""`nmke tasks`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .verb import Verb, check_file, positive, quiet_libraries


def _arguments(tasks: argparse.ArgumentParser) -> None:
    tasks.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines: question, choices, answer")
    tasks.add_argument("--model", required=True, metavar="NAME", help="a folder, a GGUF file, a hub name, atlas, smollm2 ...")
    tasks.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each file")
    tasks.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    tasks.add_argument("--dtype", default="float32", metavar="NAME", help="of the weights: float32 (default), bfloat16, float16")
    tasks.add_argument("--out", type=Path, metavar="FILE", help="also write the scores as JSON")


def _tasks(args, console: Console) -> int:
    import torch

    from ..files import write_json
    from ..scores import tasks

    quiet_libraries(args)
    check_file(args.out)
    asked = tasks.read(args.files, args.limit)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    about, scores = _scores(asked, args.model, device, args.dtype)
    console.print(_table(args.model, scores))
    if args.out:
        write_json(args.out, {"command": args.command, **about, "scores": scores})
    return 0


def _scores(asked, name: str, device: str, dtype: str) -> tuple[dict, dict[str, dict]]:
    """(what the scores depend on, {task: its scores})."""
    import torch

    from ..history.journal import versions
    from ..methods.nmke import NMKEHyperParams
    from ..models.loading import load_model
    from ..models.updates import model_digest
    from ..scores.tasks import Questions

    model, tok = load_model(NMKEHyperParams.from_dict({"model_name": name, "layers": [0], "device": device, "dtype": dtype}))
    scores = {}
    for task in (bar := tqdm(asked, unit="file", leave=False)):
        bar.set_description(task.name)
        started, found = time.perf_counter(), Questions(model, tok, [task]).before
        right, by_length = found[f"tasks.{task.name}"], found.get(f"tasks.{task.name}.norm")
        scores[task.name] = {
            **task.mark, "right": right, "standard_error": (right * (1 - right) / len(task.questions)) ** 0.5,
            "right_by_length": by_length, "seconds": time.perf_counter() - started,
        }  # fmt: skip
    about = {
        "model": {"name": name, "type": model.config.model_type, "weights": model_digest(model)}, "device": device, "dtype": dtype,
        "threads": torch.get_num_threads(), "versions": versions("easyedit-nmke", "torch", "transformers", "numpy"),
    }  # fmt: skip
    return about, scores


def _table(name: str, scores: dict[str, dict]) -> Table:
    table = Table(title=Text(f"What {name} gets right"), title_justify="left")
    table.add_column("Task")
    for heading in ("Questions", "Right", "Right by length"):
        table.add_column(heading, justify="right")
    for task, found in scores.items():
        by_length = "-" if found["right_by_length"] is None else f"{found['right_by_length']:.3f}"
        table.add_row(task, str(found["questions"]), f"{found['right']:.3f} ± {found['standard_error']:.3f}", by_length)
    return table


VERB = Verb(
    "tasks",
    "ask a model the questions of files: multiple choice and free answers",
    "nmke tasks arc_easy.jsonl piqa.jsonl --model smollm2",
    _tasks,
    _arguments,
    needs_arguments=True,
)
