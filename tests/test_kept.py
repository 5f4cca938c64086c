"""The shell on a state that `nmke run` left: log, undo, export."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from easyedit_nmke import atlas as embedded
from easyedit_nmke import cli, load_delta
from easyedit_nmke.cli import kept
from easyedit_nmke.cli.edits import edit_table
from easyedit_nmke.history.journal import Journal
from easyedit_nmke.models.prompts import encode
from easyedit_nmke.scores import generation

HOME = Path(__file__).parents[1]
SETTINGS = dict(
    alg_name="NMKE", model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=2, mom2_dataset="atlas", mom2_n_samples=200,
    nullspace_fraction=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of three edits, scored after the last."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "settings.yaml").write_text(yaml.safe_dump({**SETTINGS, "stats_dir": str(folder / "stats")}))
    (folder / "data.json").write_text(json.dumps(embedded.requests(3)))
    argv = ["run", "--hparams", str(folder / "settings.yaml"), "--data", str(folder / "data.json")]
    assert cli.main([*argv, "--out", str(folder / "results")]) == 0
    return folder / "results"


@pytest.fixture
def results(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results")


def run(capsys, *argv) -> str:
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def test_log_undo_and_export(results, requests, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "400")
    asked = requests(3)
    listed = run(capsys, "log", results)
    for number, request in enumerate(asked, 1):
        (line,) = (line for line in listed.splitlines() if line.split()[:1] == [str(number)])
        for part in (request["subject"], request["prompt"], request["ground_truth"], request["target_new"], "effective"):
            assert part in line
    assert "The model says" in run(capsys, "log", results, "--check")

    assert "delta: README.md in it" in run(capsys, "export", results, "--to", "delta")
    card = (results / "delta" / "README.md").read_text()
    assert "# atlas with 3 edits" in card and "| Edits | Rel | Gen | Loc | Same | Port | General |" in card
    model, _ = embedded.load()
    load_delta(model, results / "delta")
    editor = kept.open_editor(kept.find(results))
    editor.close()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in editor.model.named_parameters())

    shown = run(capsys, "export", results, "--to", "lora", "--rank", 1, "--out", tmp_path / "small")
    report = kept.export(results, "lora", tmp_path / "again", rank=1)
    assert f"Rank 1 leaves out {report.total:.2%} of the updates (Frobenius norm): layer 0 " in shown and report.total > 0
    assert "rounded" not in shown and "Rank 3 leaves out 0.00%" in run(capsys, "export", results, "--to", "lora")
    shown = run(capsys, "export", results, "--to", "lora", "--rank", 9, "--out", tmp_path / "served")
    assert "--rank 9 is rounded up to 16, the next one that vLLM serves\nRank 16 leaves out 0.00%" in shown
    assert "--max-lora-rank 16" in (tmp_path / "served" / "README.md").read_text()

    assert asked[1]["prompt"] in run(capsys, "undo", results, 2)
    listed = run(capsys, "log", results)
    assert [line.split()[-1] for line in listed.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])] == [
        "effective", "undone", "effective",
    ]  # fmt: skip
    assert "Rounding to bfloat16 leaves out" in run(capsys, "export", results, "--to", "model")
    card = (results / "model" / "README.md").read_text()
    assert "# atlas with 2 edits" in card and "None were taken." in card

    assert asked[0]["prompt"] in run(capsys, "undo", results, 1, "--resolve")
    assert [edit["prompt"] for edit in kept.edits(results)] == [asked[2]["prompt"]]
    assert "1 edit taken out" in run(capsys, "rollback", results, 0) and not kept.edits(results)


def test_files_are_verified(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert "Never verified: --verify reads every file" in run(capsys, "log", results)
    shown = run(capsys, "log", results, "--verify")
    records = kept.verify(results).records
    assert shown.count("effective") == 3 and f" {records} records: every byte as it was written" in shown
    path = kept.find(results) / "edits" / "000001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "every byte as it was written" in run(capsys, "log", results)  # as of then; sizes are the same
    assert cli.main(["log", str(results), "--verify"]) == 1
    told = capsys.readouterr()
    assert told.out == "edits/000001.safetensors is not what was written (other checksum)\n"
    assert "is damaged, see above; put this file back from a backup" in told.err
    assert f" {records} records: 1 problem" in run(capsys, "log", results)
    path.write_bytes(data)
    run(capsys, "log", results, "--verify")


def test_a_whole_model_is_the_bases_folder_with_the_edits_in_it(results, capsys):
    editor = kept.open_editor(kept.find(results))
    editor.close()
    shown = run(capsys, "export", results, "--to", "model", "--dtype", "float32", "--out", results / "wide")
    assert "Rounding to float32 leaves out 0.00% of the edits (Frobenius norm): layer 0 0.00%, layer 1 0.00%" in shown
    report = kept.export(results, "model", results / "same")
    assert report.dtype == "bfloat16" and report.errors.keys() == {0, 1} and report.total > 0
    for folder, dtype in (("wide", torch.float32), ("same", torch.bfloat16)):
        stored, base = load_file(results / folder / "model.safetensors"), load_file(embedded.DIRECTORY / "model.safetensors")
        changed = {name for name in base if base[name].dtype != stored[name].dtype or not torch.equal(base[name], stored[name])}
        assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
        assert all(torch.equal(stored[name], editor.model.get_parameter(name).to(dtype)) for name in changed)


def test_what_cannot_be_done_is_said(results, tmp_path, capsys):
    for argv, said in (
        (["log", tmp_path / "nowhere"], "holds no state of edits"),
        (["undo", results, "9"], "there is no edit 9"),
        (["rollback", results, "7"], "there is no edit 7"),
        (["export", results, "--to", "delta", "--rank", "3"], "--rank is for --to lora"),
        (["export", results, "--to", "lora", "--dtype", "float32"], "--dtype is for --to model"),
        (["export", results, "--to", "model", "--out", results], "not an empty folder"),
    ):
        assert cli.main(list(map(str, argv))) == 1
        assert said in capsys.readouterr().err
    (state,) = results.glob("state-*")
    shutil.copytree(state, results / "other")
    assert cli.main(["log", str(results)]) == 1
    assert "holds 2 states" in capsys.readouterr().err


def test_a_checked_answer_is_judged_and_not_compared_letter_by_letter(results, requests, monkeypatch, capsys):
    """An abbreviation in the target, a target of many tokens, marks around it: right; another answer: wrong."""
    asked, long = [edit["prompt"] for edit in kept.edits(results)], "one two three four five six seven eight nine ten eleven twelve"
    wanted = dict(zip(asked, ["St. Helier", long, "Rome"], strict=True))
    said = dict(zip(asked, [" St. Helier. It is", f" {long}. So", " Romeo. He"], strict=True))
    seen = []
    monkeypatch.setattr(kept, "history", told(kept.history, wanted))
    monkeypatch.setattr(
        generation, "greedy_ids", lambda m, t, prompts, counts, *_: seen.extend(counts) or [encode(t, said[p]) for p in prompts]
    )
    found = kept.edits(results, check=True)
    assert [(edit["said"], edit["right"]) for edit in found] == [("St. Helier", True), (long, True), ("Romeo", False)]
    assert seen[0] == 10 and seen[1] > 14


def told(history, wanted):
    """`history` with other targets."""

    def other(journal, tensors=True):
        events, notes = history(journal, tensors)
        for event in () if tensors else events:
            for request in event.requests:
                request["target_new"] = wanted[request["prompt"]]
        return events, notes

    return other


def test_the_page_on_serving_runs(results, requests, monkeypatch):
    """Its blocks of Python one after the other, as a reader would."""
    pytest.importorskip("peft")
    for to in ("lora", "model"):
        kept.export(results, to, results / to)
    monkeypatch.chdir(results.parent)
    page, seen = (HOME / "docs" / "serving.md").read_text(), []
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M):
        names = {"asked": seen[-1]["asked"]} if seen else {}
        exec(block, names)
        seen.append(names)
    by_peft, whole, by_transformers = seen
    editor = kept.open_editor(kept.find(results))
    editor.close()
    with torch.no_grad():
        wanted, before = (model(by_peft["asked"]).logits for model in (editor.model, embedded.load()[0]))
    for found in (by_peft["edited"], by_transformers["edited"], by_peft["merged"](by_peft["asked"]).logits):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    for found in (by_peft["unedited"], by_transformers["unedited"]):
        torch.testing.assert_close(found, before, rtol=0, atol=1e-4)
    assert (wanted - before).abs().max() > 1e-2
    (said,) = generation.greedy_texts(whole["model"], whole["tok"], ["The people of Cape Wuzes are citizens of"], 8)
    assert whole["said"].endswith(said.strip())


def test_what_only_reads_writes_nothing_and_waits_for_nobody(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = kept.find(results)
    (file, *_) = sorted(folder.glob("edits/*"), reverse=True)
    content = file.read_bytes()
    file.unlink()  # a copy of the folder that is not done yet
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Journal.open(folder, write=False):
        run(capsys, "log", results, "--check")
        run(capsys, "export", results, "--to", "delta", "--out", results / "early")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    file.write_bytes(content)
    with closing(kept.open_editor(results)) as editor:  # who writes
        assert run(capsys, "log", results, "--check").count("effective") == 3
        run(capsys, "export", results, "--to", "delta", "--out", results / "late")
    assert editor.state.last == 3


def test_a_table_of_edits_says_what_has_become_of_them_in_eighty_columns():
    edit = {"id": 3, "subject": "s " * 20, "prompt": "p " * 40, "ground_truth": "old", "target_new": "new", "said": "x " * 30}
    edit |= {"right": True, "made": "2026-01-31T10:00:00+00:00", "now": "superseded by 12"}
    console = Console(width=80)
    with console.capture() as told:
        console.print(edit_table([edit], "Edits", True))
    assert "superseded" in told.get() and "by 12" in told.get()
