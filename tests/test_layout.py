"""The structure that STYLE promises: rooms import only rooms below them, only the shell prints, nothing is global."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import easyedit_nmke

ROOT = Path(easyedit_nmke.__file__).parent
FLOORS = (
    {"files", "messages", "extensions"},
    {"hparams"},
    {"atlas", "facts"},
    {"models"},
    {"data", "statistics", "attribution", "history", "scores"},
    {"methods"},
    {"editor"},
    {"easyedit"},
    {"experiments", "bench"},
    {"cli"},
    {"__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """A file's room: the folder it is in, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Everything a file imports, as absolute dotted names, at whatever depth; by importlib too, whose name must be a text."""
    here, found = ("easyedit_nmke", *path.relative_to(ROOT).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            name = node.args[0]
            found.add(name.value if isinstance(name, ast.Constant) else f"?{ast.unparse(node)}")
    return found


# Names that are not written out where they are imported.
COMPUTED = {"easyedit/register.py", "easyedit/foreign.py", "__init__.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_rooms_below_them(path):
    own, found = room(path), imports(path)
    if str(path.relative_to(ROOT)) not in COMPUTED:
        assert not [name for name in found if name.startswith("?")]
    rooms = {name.split(".")[1] for name in found if name.startswith("easyedit_nmke.")} - {own, "__version__"}
    assert not {other for other in rooms if FLOOR[other] >= FLOOR[own]}, f"{path} is on floor {FLOOR[own]}"


def test_rooms_are_where_the_floors_say():
    assert {room(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_shell_prints_and_only_one_room_imports_easyedit(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"global state at line {node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert room(path) == "cli", f"print at line {node.lineno}"
    assert room(path) == "easyedit" or not [name for name in imports(path) if name.split(".")[0] == "easyeditor"]


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, easyedit_nmke; print([m for m in ('torch', 'transformers', 'easyeditor') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
