"""The structure that STYLE promises: files import only files of lower rank, only cli.py prints, nothing is global."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import easyedit_nmke

ROOT = Path(easyedit_nmke.__file__).parent
RANK = {
    "hparams": 0, "arch": 0, "prompts": 0, "masks": 0, "ridge": 0, "updates": 0, "journal": 0, "atlas": 0, "drift": 0,
    "products": 0, "hooks": 1, "solver": 1, "data": 1, "metrics": 1, "attribution": 1, "corpus": 1, "log": 1, "delta": 1,
    "values": 2, "keys": 2, "covariance": 2, "state": 2, "generation": 2,
    "nullspace": 3, "edit": 3,
    "durable": 4,
    "editor": 5,
    "baselines": 6,
    "register": 7, "lifelong": 7, "harness": 7, "figures": 7,
    "foreign": 8, "protocol": 8, "report": 8,
    "compare": 9, "page": 9, "export": 9, "bench": 9,
    "kept": 10,
    "cli": 11, "__init__": 12,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def unit(path: Path) -> str:
    """The ranked name a file belongs to: its own, or its folder's."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Units of this package that a file imports, at whatever depth."""
    here, found = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            parts = [part for part in base if part]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("easyedit_nmke."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("easyedit_nmke.")}
    return found - {unit(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_in_rank(path):
    above = {name for name in imported_units(path) if RANK[name] >= RANK[unit(path)]}
    assert not above, f"{path.name} (rank {RANK[unit(path)]}) imports {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_shell_prints_and_only_register_imports_easyedit(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"global state at line {node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert path.name == "cli.py", f"print at line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(name.split(".")[0] == "easyeditor" for name in names):
                assert path.name == "register.py"


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, easyedit_nmke; print([m for m in ('torch', 'transformers', 'easyeditor') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
