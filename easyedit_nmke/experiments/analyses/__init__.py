"""The analyses of the method's paper, on any model: one file and one record each, found by name as methods and verbs are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...extensions import with_extensions
from . import ablate, activations, drift, explain, layers, roles, settings, trace
from .record import Analysis, Notebook, read

_FILES = (roles, ablate, activations, layers, drift, settings, trace, explain)
OWN: Mapping[str, Analysis] = MappingProxyType({file.ANALYSIS.name: file.ANALYSIS for file in _FILES})


def analyses() -> dict[str, Analysis]:
    """This package's, then those that other packages add. ValueError for what is no `Analysis`."""
    found = with_extensions("analyses", OWN)
    for name, each in found.items():
        if not isinstance(each, Analysis) or each.name != name:
            raise ValueError(f"the analysis {name!r} of an installed package is {each!r}, expected an Analysis({name!r}, ...)")
    return found


def conduct(analysis: Analysis, args: argparse.Namespace) -> tuple[list[dict], list[Path]]:
    """Run an analysis in `args.out`, draw its figure: (head and lines, the files written). ImportError, after the lines are
    written, when what draws is not installed."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder for the results")
    file = args.out / f"{analysis.stem(args) if analysis.stem else analysis.name}.jsonl"

    def begin(settings: Mapping[str, Any], model=None) -> Notebook:
        from ...history.journal import versions

        head = {"analysis": analysis.name, "settings": dict(settings), "command": getattr(args, "command", None)}
        if model is not None:
            head |= {"model": _identity(model), "device": str(next(model.parameters()).device)}
        head["versions"] = versions("easyedit-nmke", "torch", "transformers", "numpy")
        return Notebook.open(file, head)

    analysis.run(args, begin)
    return read(file), [file, *draw(analysis, file)]


def draw(analysis: Analysis, file: Path) -> list[Path]:
    """The figure of a file of lines, beside it as PNG and SVG."""
    from .drawing import LOOK, rc_context, save

    with rc_context(LOOK):
        return save(analysis.figure(read(file)), file)


def in_folder(folder: Path) -> list[tuple[Analysis, Path]]:
    """Every analysis whose lines are in a folder, in the order of `analyses`."""
    known, found = analyses(), []
    for file in sorted(Path(folder).glob("*.jsonl")):
        try:
            lines = read(file)
        except ValueError:
            continue
        if lines[0]["analysis"] in known and len(lines) > 1:
            found.append((known[lines[0]["analysis"]], file))
    order = list(known)
    return sorted(found, key=lambda pair: (order.index(pair[0].name), pair[1].name))


def _identity(model) -> dict[str, str]:
    """What tells one model, with its weights, from another."""
    from ...models.updates import model_digest

    return {"type": model.config.model_type, "weights": model_digest(model)}
