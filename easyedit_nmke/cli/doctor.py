"""`nmke doctor`: what is installed here, what is missing, and what that means. Loads no model, fails for nothing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata, util
from typing import NamedTuple

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..easyedit.register import MULTIMODAL_PACKAGES, find_easyedit
from ..messages import how_to_install
from .verb import Verb

PACKAGE = "easyedit-nmke"
NEEDED = {"torch": "runs the models", "transformers": "loads the models"}
EXTRAS = {  # what each is for
    "easyedit": "what EasyEdit's text methods import",
    "figures": "tables and figures: nmke report",
    "analyze": "figures and maps of nmke analyze",
    "lora": "loads what nmke export --to lora writes",
    "harness": "general ability by public tasks: --harness",
    "gguf": "loads models of GGUF files",
    "ray": "work on many machines: --on ray",
    "tune": "finds settings for a model: nmke tune",
    "cuda": "Triton: attribution_backend fused, on a GPU",
}
WIDEST = 1000
NAMED = 4  # packages that a line names; of more, it tells the number
MARKS = {True: ("ok", "green"), False: ("missing", "yellow"), None: ("-", "dim")}


class Finding(NamedTuple):
    """One line. there: True, False where something is missing, None where nothing need be there."""

    part: str
    there: bool | None
    found: str
    meaning: str


def run(args, console: Console) -> int:
    """Print one line for everything that this package can use; 0, whatever is missing."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings():
        mark, style = MARKS[finding.there]
        table.add_row(Text(mark, style), *map(Text, (finding.part, finding.found, finding.meaning)))
    console.width = WIDEST  # one line each, however narrow the terminal
    console.print(table)
    return 0


def version_line() -> str:
    """What `nmke --version` says: this package and the two that decide its numbers; imports none of them."""
    return ", ".join([f"nmke {__version__}", *(f"{name} {_version(name) or 'missing'}" for name in NEEDED)])


def findings() -> Iterator[Finding]:
    """Every line, in the order in which a newcomer needs them."""
    requirements = _requirements()
    yield _self(requirements)
    for name, use in NEEDED.items():
        yield _needed(name, use, requirements)
    yield _gpus()
    yield from _easyedit()
    for extra in _extras():
        yield _extra(extra, requirements)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What the installed package asks for, extras included; empty where it is used without being installed."""
    try:
        return [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return []


def _extras() -> list[str]:
    """The extras of the installed package, without that of its tests."""
    try:
        return [extra for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or [] if extra != "test"]
    except metadata.PackageNotFoundError:
        return []


def _lacks(requirement: Requirement) -> str | None:
    """What is wrong with a requirement here, None where nothing is."""
    version = _version(requirement.name)
    if version is None:
        return requirement.name
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} (needs {requirement.specifier})"


def _self(requirements: list[Requirement]) -> Finding:
    where = f"{__version__}, Python {platform.python_version()}"
    if not requirements:
        return Finding("easyedit_nmke", False, where, "used without being installed, so extras are unknown: pip install -e .")
    lacking = [found for r in requirements if (r.marker is None or r.marker.evaluate({"extra": ""})) and (found := _lacks(r))]
    if lacking:
        return Finding("easyedit_nmke", False, where, f"lacks {', '.join(lacking)}: pip install -e .")
    return Finding("easyedit_nmke", True, where, "everything it needs is here")


def _needed(name: str, use: str, requirements: list[Requirement]) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, False, "not installed", f"{use}: nothing can be edited without it")
    wrong = next((found for r in requirements if r.name == name and (found := _lacks(r))), None)
    if wrong:
        return Finding(name, False, version, f"another version is needed: {wrong}")
    return Finding(name, True, version + (_build() if name == "torch" else ""), use)


def _build() -> str:
    """What torch was built for: its version alone does not always tell."""
    try:
        from torch import version
    except Exception as error:  # a torch that cannot be imported is a finding too
        return f", which cannot be imported ({type(error).__name__})"
    return f", CUDA {version.cuda} build" if version.cuda else ", ROCm build" if version.hip else ", CPU build"


def _gpus() -> Finding:
    try:
        import torch

        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        built = torch.version.cuda or torch.version.hip
    except Exception:  # of a torch that is missing, or of a driver
        cards, built = [], None
    if cards:
        return Finding("GPU", True, "; ".join(f"{c.name}, {c.total_memory / 1e9:.0f} GB" for c in cards), "device: 0 is the first")
    if shutil.which("nvidia-smi") and not built:
        return Finding("GPU", False, "a driver, but no torch for it", "install torch's CUDA build: https://pytorch.org")
    return Finding("GPU", None, "none", "device: cpu; for models of 7B and more you will want one")


def _easyedit() -> Iterator[Finding]:
    """The checkout, found but not imported, and what its image and video part lacks."""
    try:
        home = find_easyedit()
    except ImportError as error:
        found, _, advice = str(error).rstrip(".").partition("; ")
        there = False if os.environ.get("EASYEDIT_HOME") else None
        yield Finding("EasyEdit", there, found.rpartition(": ")[2], f"only needed to work inside it: {advice}")
        return
    yield Finding("EasyEdit", True, str(home), "easyedit_nmke.register() puts NMKE into it")
    lacking = sorted(name for name in MULTIMODAL_PACKAGES if util.find_spec(name) is None)
    if lacking:
        yield Finding("its image part", None, f"without {_listed(lacking)}", "register(text_only=True) does without them")


def _extra(extra: str, requirements: list[Requirement]) -> Finding:
    name, use = f"extra {extra}", EXTRAS.get(extra, "")
    asked = [r for r in requirements if r.marker and not r.marker.evaluate({"extra": ""}) and r.marker.evaluate({"extra": extra})]
    if not asked:
        return Finding(name, None, "nothing to install on this system", use)
    lacking = [found for r in asked if (found := _lacks(r))]
    if lacking:
        return Finding(name, False, f"without {_listed(lacking)}", f"{use}; {how_to_install(extra)}")
    return Finding(name, True, _listed([f"{r.name} {_version(r.name)}" for r in asked]), use)


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


VERB = Verb("doctor", "what is installed here, what is missing, and what that means", "nmke doctor", run)
