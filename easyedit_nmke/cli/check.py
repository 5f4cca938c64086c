"""`nmke check`."""

from __future__ import annotations

import argparse

from rich.console import Console

from .verb import Verb


def _arguments(check: argparse.ArgumentParser) -> None:
    check.add_argument("files", nargs="+", metavar="FILE", help="YAML files, or names of those that come with the package")


def _check(args, console: Console) -> int:
    from ..methods import read

    bad = 0
    for name in args.files:
        try:
            read(name)
            console.print(f"{name}: no problems", highlight=False, markup=False, soft_wrap=True)
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
    return 1 if bad else 0


VERB = Verb(
    "check",
    "report every problem of hyperparameter files at once",
    "nmke check hparams/NMKE/llama3-8b.yaml",
    _check,
    _arguments,
    needs_arguments=True,
)
