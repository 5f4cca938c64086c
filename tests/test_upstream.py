"""The change that docs/upstream.md proposes to EasyEdit, applied to a stand-in, and to a copy of a checkout that then runs NMKE."""

import ast
import configparser
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from easyedit_nmke import atlas as embedded
from easyedit_nmke import methods
from easyedit_nmke.easyedit import register as registering

HOME = Path(__file__).parents[1]
FILES = {
    "util/alg_dict.py": """
import os
from json import (
    dumps,
)

ALG_DICT = {
    'OWN': print,
}
OTHER = {}
""",
    "editors/batch_editor.py": """
from enum import Enum


class BatchEditor(Enum):
    ONE = 'One'
    TWO = 'Two'

    @staticmethod
    def is_batchable_method(name: str):
        return any(name == known for known in (BatchEditor.ONE.value, BatchEditor.TWO.value))
""",
    "editors/editor.py": """
from ..util.alg_dict import *


class BaseEditor:
    def __init__(self, hparams, tok):
        # größer
        kind = 'x' if hparams.alg_name not in ['Z'] else 'y'
        if hparams.alg_name not in ['OWN', 'B']:
            tok.padding_side = 'left'
        if 'llama' in tok.name and hparams.alg_name in ['B', 'OWN']:
            tok.padding_side = 'right'
""",
}
TOY = """
class ToyHyperParams: pass
def apply(): pass
def quiet(): pass
apply.hparams, apply.batchable, apply.padding_side = ToyHyperParams, True, "right"
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("upstream", HOME / "examples" / "upstream.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def declared():
    """The lines of setup.cfg that declare methods to EasyEdit."""
    parser = configparser.ConfigParser()
    parser.optionxform = str
    parser.read(HOME / "setup.cfg")
    return parser["options.entry_points"]["easyeditor.methods"].strip()


@pytest.fixture
def stand_in(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "EasyEdit" / "easyeditor" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        (path.parent / "__init__.py").touch()
    (tmp_path / "EasyEdit" / "easyeditor" / "__init__.py").write_text("from .editors.editor import *\n")
    return tmp_path / "EasyEdit"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def environment(folder, declared):
    """A process's environment with an installed package that declares methods to EasyEdit."""
    information = folder / "site" / "declared-1.0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[easyeditor.methods]\n{declared}\n")
    (information.parent / "toy_of_test.py").write_text(TOY)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(information.parent), str(HOME)])}


def test_setup_declares_every_method_that_easyedit_lacks(declared):
    points = [EntryPoint(*map(str.strip, line.split("=")), group="easyeditor.methods") for line in declared.splitlines()]
    theirs = {"AlphaEdit", "MEMIT", "ROME", "FT", "UltraEdit"}
    assert {point.name for point in points} == methods.OWN.keys() - theirs
    for point in points:
        apply = point.load()
        assert (
            apply.hparams is methods.OWN[point.name].hparams
            and apply.batchable
            and getattr(apply, "padding_side", "left") == "left"
        )


def test_a_stand_in_is_changed_once_and_finds_methods(script, stand_in, declared, tmp_path, capsys):
    assert script.main([str(stand_in)]) == 0
    assert "4 files" in capsys.readouterr().out
    after = contents(stand_in)
    assert script.main([str(stand_in)]) == 0 and "has the change already" in capsys.readouterr().out and contents(stand_in) == after
    points = "Toy = toy_of_test:apply\nQuiet = toy_of_test:quiet\nLost = no_such_package:apply\nOWN = toy_of_test:apply"
    done = subprocess.run(
        [sys.executable, "-S", "-c", SEEN], capture_output=True, text=True, cwd=stand_in, env=environment(tmp_path, points)
    )
    left, right = ["left", "left"], ["right", None]
    assert json.loads(done.stdout) == {
        "OWN": [False, *right], "B": [False, *right], "One": [True, *left], "Two": [True, *left], "Toy": [True, *right],
        "Quiet": [False, *left],
    }  # fmt: skip
    assert "the method Lost (no_such_package:apply) cannot be loaded" in done.stderr


SEEN = """
import json
from types import SimpleNamespace as S

import easyeditor
from easyeditor.editors.batch_editor import BatchEditor

assert easyeditor.ToyHyperParams.__name__ == "ToyHyperParams" and easyeditor.ALG_DICT["OWN"] is print


def side(name, model):
    tok = S(name=model, padding_side=None)
    easyeditor.BaseEditor(S(alg_name=name), tok)
    return tok.padding_side


names = [*easyeditor.ALG_DICT, "One", "Two", "B"]
print(json.dumps({name: [BatchEditor.is_batchable_method(name), side(name, "llama"), side(name, "opt")] for name in names}))
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("util/alg_dict.py", "ALG_DICT", "METHODS", "no of what there should be once, a table ALG_DICT"),
        ("editors/batch_editor.py", "is_batchable_method", "batchable", "a method is_batchable_method"),
        ("editors/batch_editor.py", "BatchEditor.TWO", "Other.two", "does not name every member"),
        ("editors/editor.py", "['B', 'OWN']", "['B']", "list the same methods by name"),
        ("editors/editor.py", "class BaseEditor", "class Editor", "a class BaseEditor"),
        ("editors/editor.py", "class BaseEditor:", "class BaseEditor(:", "invalid syntax"),
    ],
)
def test_another_checkout_is_left_as_it_is(script, stand_in, capsys, name, old, new, said):
    path = stand_in / "easyeditor" / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    before = contents(stand_in)
    assert script.main([str(stand_in)]) == 1
    error = capsys.readouterr().err
    assert said in error and "nothing was changed" in error and len(error.splitlines()) == 1 and contents(stand_in) == before


def test_what_is_no_checkout_is_said(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 1
    assert "alg_dict.py" in capsys.readouterr().err


# ---- inside a checkout


@pytest.fixture
def checkout(tmp_path):
    try:
        home = registering.find_easyedit()
    except ImportError as missing:
        pytest.skip(str(missing))
    shutil.copytree(home / "easyeditor", tmp_path / "EasyEdit" / "easyeditor")
    return tmp_path / "EasyEdit"


USERS = """
import json

from easyeditor import BaseEditor, NMKEHyperParams

requests = json.load(open("requests.json"))
columns = {name: [request[name] for request in requests] for name in ("subject", "target_new", "ground_truth")}
columns["prompts"] = [request["prompt"] for request in requests]

editor = BaseEditor.from_hparams(NMKEHyperParams.from_hparams("nmke.yaml"))
metrics, edited_model, _ = editor.edit(**columns, sequential_edit=True, verbose=False)
hparams = NMKEHyperParams.from_hparams("nmke.yaml")
hparams.batch_size = 2
together, _, _ = BaseEditor.from_hparams(hparams).batch_edit(**columns, verbose=False)
json.dump([[score["post"]["rewrite_acc"] for score in scores] for scores in (metrics, together)], open("scores.json", "w"))
"""

# What stands between EasyEdit and this machine, not between a user and NMKE: packages for images and video.
AROUND = """
import json, runpy, sys
sys.path.insert(0, CHECKOUT)
from easyedit_nmke.easyedit.register import register, text_only
with text_only():
    import easyeditor
from easyeditor.editors.batch_editor import BatchEditor
from easyeditor.util.plugins import RIGHT_PADDED, pads_right
table, asked = dict(easyeditor.ALG_DICT), BatchEditor.is_batchable_method
runpy.run_path("users.py")
register()
assert easyeditor.ALG_DICT == table and BatchEditor.is_batchable_method is asked
told = {name: [asked(name), pads_right(name)] for name in table}
json.dump([told, sorted(RIGHT_PADDED)], open("told.json", "w"))
"""


OWN_BATCHES = """
import json, sys
sys.path.insert(0, CHECKOUT)
from easyedit_nmke.easyedit.register import text_only
with text_only():
    import easyeditor
from easyeditor.editors.batch_editor import BatchEditor
print(json.dumps({name: BatchEditor.is_batchable_method(name) for name in easyeditor.ALG_DICT}))
"""


@pytest.mark.easyedit
def test_a_changed_checkout_runs_nmke_without_an_import_of_ours(script, checkout, declared, tmp_path, atlas):
    path = checkout / "easyeditor" / "editors" / "editor.py"
    lists = list(script.name_lists(ast.parse(path.read_bytes())))
    named = {item.value for node in lists for item in node.comparators[0].elts}
    before = subprocess.run(
        [sys.executable, "-c", OWN_BATCHES.replace("CHECKOUT", repr(str(checkout)))], capture_output=True, text=True
    )
    assert script.main([str(checkout)]) == 0
    model, tok = atlas
    model.save_pretrained(tmp_path / "llama-atlas")
    PreTrainedTokenizerFast.save_pretrained(tok, tmp_path / "llama-atlas")
    settings = yaml.safe_load((HOME / "hparams" / "NMKE" / "atlas.yaml").read_text())
    settings |= {"model_name": "./llama-atlas", "device": "cpu", "mom2_n_samples": 400, "stats_dir": str(tmp_path / "stats")}
    (tmp_path / "nmke.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "requests.json").write_text(json.dumps(embedded.requests(2, split="tune")))
    (tmp_path / "users.py").write_text(USERS)
    assert "easyedit_nmke" not in USERS
    done = subprocess.run(
        [sys.executable, "-c", AROUND.replace("CHECKOUT", repr(str(checkout)))], cwd=tmp_path, capture_output=True, text=True,
        env=environment(tmp_path, declared),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "scores.json").read_text()) == [[[1.0], [1.0]]] * 2
    told, right = json.loads((tmp_path / "told.json").read_text())
    assert set(right) == named and {name for name, (_, padded) in told.items() if padded} == named
    own = json.loads(before.stdout)
    assert {name: told[name][0] for name in own} == own and all(told[name] == [True, False] for name in ("NMKE", "LocFT-BF", "KNE"))
