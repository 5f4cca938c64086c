"""`nmke tune`: settings for a model that nobody has tried."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from ..experiments.analyses.source import on_argument, positive
from .verb import Verb, quiet_libraries


def _budget(text: str) -> float:
    """Seconds: 45m, 1.5h, 600s; a bare number is minutes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 45m, 1.5h or 600s")
    return float(match[1]) * {"s": 1, "": 60, "m": 60, "h": 3600}[match[2]]


def _arguments(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("--model", required=True, metavar="NAME", help="a name, folder, GGUF file or hub name")
    tune.add_argument("--method", default="NMKE", metavar="NAME", help="as `nmke compare` names it (default NMKE)")
    tune.add_argument("--out", required=True, type=Path, metavar="FILE", help="the YAML file; the trials go to a folder beside it")
    tune.add_argument("--data", default="facts", metavar="FILE", help="records to try settings on (default: well-known facts)")
    tune.add_argument("--text", metavar="FILE", help="text for the covariance of keys (default: the model's own samples)")
    tune.add_argument("--budget", type=_budget, default=2700.0, metavar="TIME", help="how long to search (default 45m)")
    tune.add_argument("--seed", type=int, default=0, help="of facts and trials (default 0)")
    tune.add_argument("--device", metavar="NAME", help="where (default: the first GPU, or the CPU)")
    tune.add_argument("--jobs", type=positive, default=1, metavar="N", help="trials chosen together; with --on, made together (1)")
    on_argument(tune)
    tune.add_argument("--dtype", metavar="NAME", help="float32 (default), bfloat16, float16, auto")


def _tune(args, console: Console) -> int:
    import torch

    from ..bench.machine import surroundings
    from ..experiments.tune import REAL, Plan, base_settings, tune
    from ..experiments.tune.written import figure, write, write_lines

    if args.out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out is {args.out}, expected a name that ends in .yaml")
    quiet_libraries(args)
    rest = {"device": args.device or (0 if torch.cuda.is_available() else "cpu"), "dtype": args.dtype or "float32"}
    folder = args.out.with_name(f"{args.out.stem}.tune")
    base = base_settings(args.method, args.model, **rest)
    plan = Plan(args.method, base, folder, args.data, args.text, args.budget, args.seed, at_a_time=args.jobs)
    with _Bar(args.budget) as bar:
        outcome = tune(plan, bar.tell, args.on)
    write_lines(folder / "trials.jsonl", outcome.lines())
    drawn = figure(outcome.searches)
    if drawn is not None:
        for kind in ("png", "svg"):
            drawn.savefig(folder / f"trials.{kind}", dpi=130)
    found = outcome.stream or outcome.trial
    if outcome.worked:
        write(plan, outcome, args.out, args.command, surroundings())
        said = f"Rel {found['rel']:.2f}, Gen {found['gen']:.2f}, Loc {found['loc']:.2f}"
        where = f"after {REAL} edits of other facts" if outcome.stream else "in its best trial"
        console.print(f"{args.out}: {said} {where}; trials in {folder}", highlight=False, markup=False, soft_wrap=True)
    if outcome.interrupted:
        kept = "the best so far is written" if outcome.worked else "nothing is written"
        print(f"nmke tune: interrupted; {kept}; the same command goes on from there", file=sys.stderr)
        return 130
    if not outcome.worked:
        best = f"the best Rel is {found['rel']:.2f}" if found else "no trial came to its end"
        raise ValueError(
            f"nothing worked: {best}, so {args.out} is not written; the trials are in {folder}. "
            "Give a larger --budget, other records by --data, or another method"
        )
    return 0


class _Bar:
    """The budget as a progress bar: seconds that have passed, the stage, and the latest score."""

    def __init__(self, seconds: float):
        self.bar = tqdm(
            total=round(seconds), unit="s", bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} of the budget{postfix}"
        )
        self.started = time.monotonic()

    def tell(self, stage: str, note: str) -> None:
        passed = min(time.monotonic() - self.started, self.bar.total)
        self.bar.set_description(stage, refresh=False)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(round(passed) - self.bar.n)
        self.bar.refresh()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *raised) -> None:
        self.bar.close()


VERB = Verb(
    "tune",
    "find a method's settings for a model that nobody has tried",
    "nmke tune --model smollm2 --method AlphaEdit --budget 45m --out mymodel.yaml",
    _tune,
    _arguments,
    needs_arguments=True,
    goes_on=True,
)
