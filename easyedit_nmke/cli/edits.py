"""`nmke log`, `undo`, `rollback`, `consolidate`, `export`: the edits that `nmke run` left in a folder, told, taken out, solved
at once, and given to others."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .verb import Verb, positive, quiet_libraries


def folder_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR", help="where `nmke run` keeps its edits, or a state_dir")
    sub.add_argument("--model", metavar="NAME", help="where the base model lies now, if it was moved")
    sub.add_argument("--device", metavar="NAME", help="instead of the one that the edits were made on")


def _log_arguments(log: argparse.ArgumentParser) -> None:
    folder_arguments(log)
    log.add_argument("--check", action="store_true", help="also load the model and ask it")
    log.add_argument("--verify", action="store_true", help="first read every file and check that it is what was written")


def _undo_arguments(undo: argparse.ArgumentParser) -> None:
    folder_arguments(undo)
    undo.add_argument("edit", type=positive, metavar="ID", help="its number in `nmke log`")
    undo.add_argument("--resolve", action="store_true", help="solve the later edits again without it (loads the model)")


def _rollback_arguments(rollback: argparse.ArgumentParser) -> None:
    folder_arguments(rollback)
    rollback.add_argument("to", type=int, metavar="ID", help="the last edit that stays, 0 for none")


def _export_arguments(export: argparse.ArgumentParser) -> None:
    folder_arguments(export)
    export.add_argument("--to", required=True, choices=("model", "delta", "lora"), help="a whole checkpoint, factors, an adapter")
    export.add_argument(
        "--rank", type=positive, metavar="R", help="of the adapter, rounded up to one that vLLM serves (default: that of all edits)"
    )
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of a model's edited tensors (default: the base's, rounded)"
    )
    export.add_argument("--out", type=Path, metavar="PATH", help="where it goes, a new folder (default DIR/model, delta or lora)")


def _log(args, console: Console) -> int:
    from . import kept

    if args.verify and (problems := kept.verify(args.folder).problems):
        for problem in problems:
            console.print(f"{problem.file} {problem.reason}", highlight=False, markup=False, soft_wrap=True)
        files = "this file" if len(problems) == 1 else "these files"
        raise ValueError(f"{args.folder} is damaged, see above; put {files} back from a backup")
    if args.check:
        quiet_libraries(args)
    found = kept.edits(args.folder, args.model, args.device, args.check)
    console.print(edit_table(found, f"Edits in {args.folder}", args.check))
    for told in kept.consolidations(args.folder):
        console.print(told, highlight=False, soft_wrap=True)
    console.print(kept.verified(args.folder), highlight=False, markup=False, soft_wrap=True)
    return 0


def edit_table(edits: Sequence[Mapping], title: str, said: bool = False) -> Table:
    """`kept.edits` as a table; said: with what the model says."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("Edit", justify="right")
    for name in ("Subject", "Prompt", "Before", "Wanted", *(["The model says"] if said else [])):
        table.add_column(name, overflow="fold")
    table.add_column("When (UTC)", min_width=10)
    table.add_column("Now", width=len("superseded"))
    for edit in edits:
        style = "" if edit["now"] == "effective" else "dim"
        answer = [Text(edit["said"], "green" if edit["right"] else "red")] if said else []
        asked = [Text(edit[name] or "-") for name in ("subject", "prompt", "ground_truth", "target_new")]
        table.add_row(str(edit["id"]), *asked, *answer, Text(_minute(edit["made"])), Text(edit["now"]), style=style)
    return table


def _minute(stamp: str) -> str:
    """Of a time as records hold it."""
    return f"{datetime.fromisoformat(stamp).astimezone(timezone.utc):%Y-%m-%d %H:%M}"


def _undo(args, console: Console) -> int:
    from . import kept

    quiet_libraries(args)
    edit = kept.take_out(args.folder, args.edit, args.resolve, args.model, args.device)
    told = f"{edit['prompt']} -> {edit['target_new']}"
    console.print(f"Edit {args.edit} is taken out: {told}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _rollback(args, console: Console) -> int:
    from . import kept

    quiet_libraries(args)
    gone = kept.roll_back(args.folder, args.to, args.model, args.device)
    console.print(f"Back at edit {args.to}: {gone} {'edit' if gone == 1 else 'edits'} taken out", highlight=False)
    return 0


def _consolidate(args, console: Console) -> int:
    from . import kept

    quiet_libraries(args)
    console.print(kept.consolidate(args.folder, args.model, args.device), highlight=False, soft_wrap=True)
    return 0


def _export(args, console: Console) -> int:
    from . import kept

    quiet_libraries(args)
    out = args.out or args.folder / args.to
    report = kept.export(args.folder, args.to, out, args.rank, args.model, args.device, args.dtype)
    if report and args.to == "model":
        console.print(str(report), highlight=False, soft_wrap=True)
    elif report:
        if args.rank not in (None, report.rank):
            told = f"--rank {args.rank} is rounded up to {report.rank}, the next one that vLLM serves"
            console.print(told, highlight=False, soft_wrap=True)
        each = ", ".join(f"layer {layer} {error:.2%}" for layer, error in report.errors.items())
        told = f"Rank {report.rank} leaves out {report.total:.2%} of the updates (Frobenius norm): {each}"
        console.print(told, highlight=False, soft_wrap=True)
    console.print(f"{out}: README.md in it says how to load it", highlight=False, markup=False, soft_wrap=True)
    return 0


LOG = Verb(
    "log",
    "list the edits that are kept in a folder: what was asked, when, and whether it still counts",
    "nmke log results",
    _log,
    _log_arguments,
    needs_arguments=True,
)
UNDO = Verb(
    "undo",
    "take one edit out, wherever it lies; the others stay",
    "nmke undo results 17",
    _undo,
    _undo_arguments,
    needs_arguments=True,
)
ROLLBACK = Verb(
    "rollback",
    "take all edits after one out, as if they had never been",
    "nmke rollback results 100",
    _rollback,
    _rollback_arguments,
    needs_arguments=True,
)
CONSOLIDATE = Verb(
    "consolidate",
    "solve all edits that still count at once, in the place of all updates so far",
    "nmke consolidate results",
    _consolidate,
    folder_arguments,
    needs_arguments=True,
)
EXPORT = Verb(
    "export",
    "write the edited model for others: a checkpoint, a delta, or a LoRA adapter",
    "nmke export results --to lora --rank 64",
    _export,
    _export_arguments,
    needs_arguments=True,
)
