"""Methods side by side: how they are named, and that a comparison can be stopped at any moment."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import tiny_model, write_tiny

from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import main
from easyedit_nmke.experiments import compare, methods, processes
from easyedit_nmke.experiments.compare import Plan
from easyedit_nmke.experiments.methods import ABLATIONS, Method
from easyedit_nmke.experiments.protocol import Progress, Result
from easyedit_nmke.methods import alphaedit, read

QUICK = dict(
    device="cpu", v_num_grad_steps=1, v_lr=0.1, mom2_n_samples=200, template_prefixes=["The"], layers=[0, 1], v_loss_layer=None
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model with atlas' tokenizer, records to edit it with, and a place for statistics."""
    home = tmp_path_factory.mktemp("compare")
    write_tiny(home)
    return home


@pytest.fixture
def quick(folder):
    """Methods of short edits."""

    def make(*names):
        changes = {**QUICK, "model_name": str(folder / "model"), "stats_dir": str(folder / "stats")}
        return tuple(Method(m.label, methods.changed(m.settings, changes)) for m in methods.methods(",".join(names), "atlas"))

    return make


@pytest.fixture
def plan(quick, folder, tmp_path):
    def make(*names, **changes):
        values = dict(source=str(folder / "data.json"), edits=3, checkpoints=(1, 3), seeds=(0, 1), directory=tmp_path / "out")
        return Plan(quick(*(names or ("NMKE", "AlphaEdit"))), **{**values, **changes})

    return make


def edits(told) -> int:
    """How many edits have come to be done."""
    return sum(event.more for event in told if isinstance(event, Progress))


def test_methods_are_read_from_files_and_changed_in_brackets():
    found = methods.methods(
        "NMKE, AlphaEdit[L2=3; v_lr=0.5] ,NMKE+,NMKE random mask,easyedit:WISE,", "atlas", None, {"device": "cpu"}
    )
    assert [m.label for m in found] == ["NMKE", "AlphaEdit[L2=3; v_lr=0.5]", "NMKE+", "NMKE random mask", "easyedit:WISE"]
    assert (found[1].settings.L2, found[1].settings.v_lr, found[1].settings.alg_name) == (3, 0.5, "AlphaEdit")
    assert found[0].settings == read("NMKE/atlas") and found[3].settings.control == "random"
    assert found[2].settings.regularizer == "covariance" and found[4].easyedit == "WISE" and found[4].settings is None


COLUMNS = (
    "NMKE, NMKE+, AlphaEdit, AlphaEdit@100, MEMIT, MEMIT@100, AlphaEdit+NAS, MEMIT+BLUE@100, LocFT-BF, UltraEdit, KNE, ROME, FT, "
    "NMKE random mask"
)


def test_options_and_batch_sizes_stand_behind_a_name():
    found = {m.label: m.settings for m in methods.methods(f"{COLUMNS}, NMKE++NAS, NMKE+NAS @ 10[L2=3]", "atlas")}
    assert len(found) == 16
    assert [found[name].batch_size for name in ("AlphaEdit", "AlphaEdit@100", "MEMIT@100", "LocFT-BF")] == [1, 100, 100, 100]
    assert (found["AlphaEdit+NAS"].alg_name, found["AlphaEdit+NAS"].value_norm) == ("AlphaEdit", "nas")
    assert (found["MEMIT+BLUE@100"].blue, found["MEMIT+BLUE@100"].layers) == (True, [0, 2])
    assert (found["NMKE++NAS"].regularizer, found["NMKE++NAS"].value_norm) == ("covariance", "nas")
    other = found["NMKE+NAS @ 10[L2=3]"]
    assert (other.regularizer, other.value_norm, other.batch_size, other.L2) == ("nullspace", "nas", 10, 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LocFT-BF@1", "method LocFT-BF@1: 1 problem\n.*LocFT-BF learns all edits together in batches and knows no single edits"),
        ("FT+BLUE", "method FT.BLUE: 1 problem\n.*unknown name 'blue'"),
        ("AlphaEdit+NAS+GREEN", "method 'AlphaEdit.NAS.GREEN' is not known"),
        ("AlphaEdit@many", "expected a name, name@batch size"),
        ("AlphaEdit@0", "batch_size is 0"),
        ("easyedit:MEMIT@100", "changes settings of EasyEdit's"),
    ],
)
def test_what_a_method_does_not_know_is_refused(name, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        methods.methods(name, "atlas")


def test_methods_without_settings_for_a_model_are_told_with_what_finds_them(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        methods.methods("NMKE, MEMIT, NMKE random mask, ROME@2", "gpt-j-6B", None)
    assert str(error.value) == (
        "no hyperparameter file MEMIT/gpt-j-6B.yaml, ROME/gpt-j-6B.yaml; `nmke tune --model gpt-j-6B --method MEMIT "
        "--out DIR/MEMIT/gpt-j-6B.yaml` finds settings, and --hparams-dir DIR takes them"
    )
    with pytest.raises(FileNotFoundError, match=r"--method NMKE\+ --out DIR/NMKE/mine-plus.yaml"):
        methods.methods("NMKE+", "mine", tmp_path)


def test_methods_that_cannot_be_read_are_refused_with_what_is_known(tmp_path):
    with pytest.raises(
        ValueError, match=r"method 'AlphaEdti' is not known \(did you mean 'AlphaEdit'\?\); known: NMKE, .*easyedit:"
    ):
        methods.methods("NMKE,AlphaEdti", "atlas")
    with pytest.raises(ValueError, match="unknown name 'L3'"):
        methods.methods("NMKE[L3=1]", "atlas")
    with pytest.raises(ValueError, match=r"name\[setting=value"):
        methods.methods("NMKE[L2]", "atlas")
    with pytest.raises(FileNotFoundError, match="no hyperparameter file"):
        methods.methods("NMKE", "llama9")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        methods.methods("NMKE", "atlas", tmp_path)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_valid_settings_that_differ(name):
    base = read("NMKE/atlas")
    found = methods.ablation(name, base)
    assert len({str(m.settings.to_dict()) for m in found}) == len(found) == len(ABLATIONS[name])
    assert base.to_dict() in [m.settings.to_dict() for m in found]  # the published setting is one of them
    with pytest.raises(ValueError, match="ablation is 'colour', expected one of selection"):
        methods.ablation("colour", base)


def test_plans_that_make_no_sense_are_refused(plan, quick):
    with pytest.raises(ValueError, match=r"checkpoints are \[1, 5\], expected numbers from 1 to the 3 edits"):
        plan(checkpoints=(1, 5))
    with pytest.raises(ValueError, match="named twice"):
        plan("NMKE", "NMKE")


def test_files_that_name_different_models_are_refused(plan):
    found = methods.methods("NMKE, MEMIT", "qwen2.5-7b")
    with pytest.raises(ValueError, match=r"different models \(Qwen/\S+ in bfloat16: NMKE; .*Qwen2.5-7B in bfloat16: MEMIT\); give"):
        Plan(tuple(found), "data.json", 1, (1,), (0,), plan().directory)
    found = methods.methods("NMKE, MEMIT", "qwen2.5-7b", None, {"model_name": "mine"})
    assert Plan(tuple(found), "data.json", 1, (1,), (0,), plan().directory)


def test_results_of_another_model_are_not_added_to(plan, folder, tmp_path):
    compare.compare(plan("NMKE", edits=1, checkpoints=(1,), seeds=(0,)))
    tiny_model("llama", 2048, seed=1).save_pretrained(tmp_path / "other")
    (_, tok) = embedded.load()
    tok.save_pretrained(tmp_path / "other")
    (alpha,) = plan("AlphaEdit").methods
    other = Method(alpha.label, methods.changed(alpha.settings, {"model_name": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="holds results of another model; a folder is of one"):
        compare.compare(dataclasses.replace(plan("NMKE", edits=1, checkpoints=(1,), seeds=(0,)), methods=(other,)))


@pytest.mark.parametrize("name", ["UltraEdit", "KNE"])
def test_methods_that_write_other_weights_than_nmke_have_whole_lines(name, folder, tmp_path, capsys):
    """UltraEdit leaves the FFN's output projection alone, whose drift the others tell."""
    own = {"inner_params": ["model.layers.1.mlp.up_proj"], "layers": [1]} if name == "UltraEdit" else {"layers": [1]}
    changes = {"model_name": str(folder / "model"), "device": "cpu", **own}
    (method,) = methods.methods(name, "atlas", None, changes)
    lines = compare.compare(Plan((method,), str(folder / "data.json"), 3, (3,), (0,), tmp_path / "out"))
    assert [(line["method"], line["checkpoint"]) for line in lines] == [("unedited", 0), (name, 3)]
    assert list(lines[1]["drift"]) == ([] if name == "UltraEdit" else ["1"])
    assert main(["report", str(tmp_path / "out")]) == 0 and name in capsys.readouterr().out


def test_a_method_of_batches_is_scored_where_they_end(plan, caplog):
    three = plan("AlphaEdit", "AlphaEdit@2", edits=5, checkpoints=(1, 2, 3, 5), seeds=(0,))
    lines = compare.compare(three)
    found = {(line["method"], line["checkpoint"]): line for line in lines}
    assert [t for method, t in found if method == "AlphaEdit"] == [1, 2, 3, 5]
    assert [t for method, t in found if method == "AlphaEdit@2"] == [2, 5]
    assert "AlphaEdit@2: not scored after [1, 3] edits, where no batch of 2 ends" in caplog.text
    kinds = [found[method, 5]["metric_meta"]["immediate"]["taken"] for method in ("AlphaEdit", "AlphaEdit@2")]
    assert kinds == ["after_each_edit", "after_each_batch"]
    assert compare.compare(three) == lines


def test_lines_of_every_method_seed_and_checkpoint_and_a_second_run_that_adds_nothing(plan):
    told = []
    lines = compare.compare(plan(), tell=told.append)
    keys = [(line["method"], line["seed"], line["checkpoint"]) for line in lines]
    expected = [
        (m, s, c) for s in (0, 1) for m, c in (("unedited", 0), ("NMKE", 1), ("NMKE", 3), ("AlphaEdit", 1), ("AlphaEdit", 3))
    ]
    assert keys == expected and edits(told) == 12
    file = plan().directory / "results.jsonl"
    stored = file.read_text()
    assert [json.loads(text) for text in stored.splitlines()] == lines
    assert lines[0]["scores"]["general"] is None and lines[0]["scores"]["loc"] == 1
    data = lines[1]["protocol"]["data"]
    assert data["name"] == "data.json" and data["edits"] == 3 and lines[-1]["protocol"]["seed"] == 1
    told.clear()
    left = plan().directory / "segments" / "NMKE-0"  # by a run that was killed once this segment was done
    left.mkdir(parents=True)
    assert compare.compare(plan(), tell=told.append) == lines and file.read_text() == stored and edits(told) == 12
    assert not left.exists()


def test_a_torn_line_and_a_lost_one_are_made_again(plan):
    lines = compare.compare(plan(seeds=(0,)))
    file = plan().directory / "results.jsonl"
    texts = file.read_text().splitlines()
    file.write_text("\n".join([*texts[:3], texts[4][:100]]))
    told = []
    again = compare.compare(plan(seeds=(0,)), tell=told.append)
    assert edits(told) == 6
    assert [(line["method"], line["checkpoint"], line["scores"]) for line in again] == [
        (line["method"], line["checkpoint"], line["scores"]) for line in lines
    ]
    assert [json.loads(text) for text in file.read_text().splitlines()] == again


def test_results_of_other_settings_are_not_mixed(plan, quick):
    compare.compare(plan("NMKE", seeds=(0,)))
    with pytest.raises(ValueError, match=r"holds results of NMKE with other settings \(data .*'edits': 3.*'edits': 4"):
        compare.compare(plan("NMKE", seeds=(0,), edits=4, checkpoints=(1, 4)))
    other = plan("NMKE", seeds=(0,))
    other.methods[0].settings.L2 = 0.7  # also where nothing is left to be done
    with pytest.raises(ValueError, match=r"with other settings \(L2 5 -> 0.7\)"):
        compare.compare(other)


def test_results_of_another_file_are_not_taken_for_this_ones(plan, quick, tmp_path):
    """Also where nothing would be left to be done."""
    done = plan("NMKE", seeds=(0,))
    compare.compare(done)
    with open(done.source) as file:
        records = json.load(file)
    (tmp_path / "other.json").write_text(json.dumps(records[::-1]))
    for other in ("NMKE", "AlphaEdit"):
        with pytest.raises(ValueError, match=r"holds results of other records \(data.json, .*and these are of .*other.json"):
            compare.compare(dataclasses.replace(plan(other, seeds=(0,)), source=str(tmp_path / "other.json")))


def test_a_killed_comparison_loses_no_more_than_the_edits_since_a_checkpoint(tmp_path, folder):
    """SIGKILL while it edits; the same command again gives what an uninterrupted one gives."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom easyedit_nmke.experiments import compare, methods\n"
        f"changes = {dict(QUICK, model_name=str(folder / 'model'), stats_dir=str(folder / 'stats'))!r}\n"
        "if __name__ == '__main__':\n"
        "    found = methods.methods('NMKE,AlphaEdit', 'atlas')\n"
        "    short = [methods.Method(m.label, methods.changed(m.settings, changes)) for m in found]\n"
        f"    plan = compare.Plan(tuple(short), {str(folder / 'data.json')!r}, 12, (2, 4, 12), (0,), Path(sys.argv[1]))\n"
        "    compare.compare(plan, int(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder, jobs):
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / folder), jobs], env=environment)

    assert start("whole", "1").wait() == 0
    process, results = start("killed", "2"), tmp_path / "killed" / "results.jsonl"
    for _ in range(6000):
        time.sleep(0.05)
        if process.poll() is not None or (results.is_file() and '"checkpoint": 4' in results.read_text()):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = compare.read_lines(results)
    assert any(line["checkpoint"] == 4 for line in held) and len(held) < 7
    assert any((tmp_path / "killed" / "segments").iterdir())
    assert start("killed", "2").wait() == 0

    def scores(folder):
        lines = compare.read_lines(tmp_path / folder / "results.jsonl")
        return {(line["method"], line["checkpoint"]): line["scores"]["rel"] for line in lines}

    assert scores("killed").keys() == scores("whole").keys() and len(scores("whole")) == 7
    assert not any((tmp_path / "killed" / "segments").iterdir())


def test_a_state_that_names_statistics_goes_on_where_they_are_not(plan, tmp_path, monkeypatch):
    """As on another machine: null spaces are too large for the state, and gone."""
    monkeypatch.setattr(alphaedit, "LARGE", 0)
    two = plan("AlphaEdit", seeds=(0,), edits=4, checkpoints=(2, 4))
    (method,) = two.methods
    own = Method(method.label, methods.changed(method.settings, {"stats_dir": str(tmp_path / "stats")}))
    two = dataclasses.replace(two, methods=(own,))

    def stop(event):
        if isinstance(event, Result) and event.line["checkpoint"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare(two, tell=stop)
    named = list((tmp_path / "stats").glob("eigenvectors_*"))
    assert len(named) == 2
    for file in (tmp_path / "stats").iterdir():
        file.unlink()
    told = []
    lines = compare.compare(two, tell=told.append)
    assert all(file.is_file() for file in named) and edits(told) == 4
    whole = compare.compare(dataclasses.replace(two, directory=tmp_path / "whole"))
    assert [line["scores"] for line in lines] == [line["scores"] for line in whole]


class Lost(Exception):
    """Cannot be pickled."""

    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


class Failing(Method):
    """Fails, once the other method has a result, with an error that cannot be told as it is."""

    def editor(self, seed, state_dir):
        results = state_dir.parents[1] / "results.jsonl"
        while '"checkpoint": 1,' not in results.read_text():
            time.sleep(0.05)
        raise Lost("no weights left")


def test_an_error_that_cannot_be_pickled_ends_the_comparison_and_keeps_its_results(plan, quick):
    two = plan("NMKE", seeds=(0,), edits=12, checkpoints=(1, 12))
    two = dataclasses.replace(two, methods=(*two.methods, Failing("failing")))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in editor.*Lost: no weights left"):
        compare.compare(two, jobs=2)
    held = [line["checkpoint"] for line in compare.read_lines(two.directory / "results.jsonl") if line["method"] == "NMKE"]
    assert held[:1] == [1] and not multiprocessing.active_children()


def test_a_machine_with_too_few_cores_is_warned_of_once(plan, monkeypatch, caplog):
    monkeypatch.setattr(processes, "cores", lambda: 0)
    compare.compare(plan("NMKE", seeds=(0, 1), edits=1, checkpoints=(1,)))
    assert len([record for record in caplog.records if "oversubscribed" in record.getMessage()]) == 1


@pytest.fixture
def easyedit_files(tmp_path):
    """easyedit_files(**model) -> a folder with EasyEdit's AlphaEdit file for a model `new`, which says that much of it."""

    def make(**said):
        folder = tmp_path / "files"
        (folder / "easyedit" / "AlphaEdit").mkdir(parents=True)
        (folder / "easyedit" / "AlphaEdit" / "new.yaml").write_text(yaml.safe_dump({"alg_name": "AlphaEdit", "L2": 5, **said}))
        return folder

    return make


def test_easyedits_methods_edit_the_model_that_the_folder_or_the_command_line_names(easyedit_files):
    folder = easyedit_files(model_name="/models/theirs", device="cpu", fp16=True)
    name = "easyedit:AlphaEdit"
    (found,) = methods.methods(name, "new", folder)
    assert (found.base.model_name, found.base.device, found.base.fp16) == ("/models/theirs", "cpu", True)
    assert found.file == str(folder / "easyedit" / "AlphaEdit" / "new.yaml")
    (found,) = methods.methods(name, "new", folder, {"model_name": "/models/mine", "dtype": "bfloat16"})
    assert (found.base.model_name, found.base.device, found.base.dtype) == ("/models/mine", "cpu", "bfloat16")
    (folder / "NMKE").mkdir()
    content = {"alg_name": "NMKE", "model_name": "/models/ours", "layers": [0], "device": "cpu", "dtype": "float16"}
    (folder / "NMKE" / "new.yaml").write_text(yaml.safe_dump(content))
    (found,) = methods.methods(name, "new", folder)
    assert (found.base.model_name, found.base.dtype) == ("/models/ours", "float16")


def test_a_folder_that_does_not_say_which_model_is_meant_is_refused(easyedit_files, tmp_path):
    folder = easyedit_files(device="cpu")
    with pytest.raises(ValueError, match=r"no file says which model 'new' is: there is no .*NMKE/new.yaml, .*give --model-path"):
        methods.methods("easyedit:AlphaEdit", "new", folder)
    (found,) = methods.methods("easyedit:AlphaEdit", "new", folder, {"model_name": "/models/mine"})
    assert found.base.model_name == "/models/mine"
    with pytest.raises(ValueError, match="no file says which model 'llama9' is"):
        methods.methods("easyedit:AlphaEdit", "llama9")


def test_methods_whose_edits_a_run_keeps():
    assert read("NMKE/atlas").keeps_updates and not read("FT/atlas").keeps_updates
    assert methods.changed(read("FT/atlas"), {"keep_updates": True}).keeps_updates


def test_an_error_in_a_process_ends_the_comparison_with_its_message(plan):
    with pytest.raises(ValueError, match="99 edits were asked for, but 12 records"):
        compare.compare(plan(edits=99, checkpoints=(1,), seeds=(0,)), jobs=2)
