"""Broken files of every kind end in exit code 1 and one sentence, never in a traceback."""

import json

import pytest
import yaml

from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import main

SETTINGS = {"alg_name": "FT", "model_name": "atlas", "device": "cpu", "layers": [1], "num_steps": 1}
BYTES = {
    "empty": b"", "spaces": b" \n\t\n", "binary": bytes(range(256)), "utf-16": "[1]".encode("utf-16"), "a text": b"hello there",
    "cut": b'[{"prompt": "a', "digit": b"7", "null": b"null", "nan": b"NaN", "deep": b"[" * 5000, "shut": b"[" * 900 + b"]" * 900,
    "a list in a list": b"[[[]]]", "huge numbers": b"[1e999999, 123456789012345678901234567890]", "two documents": b"{} {}",
    "a key twice": b'{"a": 1, "a": [1, 2]}', "control characters": b'{"a": "\x00\x01"}', "lines": b'{"a": 1}\n{"b": 2}\nnot json\n',
}  # fmt: skip
RECORDS = [
    {}, {"prompt": None}, {"prompt": {"a": 1}, "target_new": [[[]]], "subject": 3}, [], 3, None, "x",
    {"prompt": "a b", "subject": "c", "target_new": "d"}, {"requested_rewrite": [1, 2]}, {"requested_rewrite": {"prompt": 1}},
    {"src": "a", "subject": "a", "alt": float("nan")}, {"prompt": "{}{}{}", "subject": "{}", "target_new": "{}"},
    {"prompt": "a" * 9000 + " b", "subject": "b", "target_new": "c"},
]  # fmt: skip
VALUES = [None, [], {}, "x", -1, 1e400, float("nan"), True, [[1]], {"a": {"b": 1}}, "1e-1x"]


def refused(capsys, *argv):
    """One sentence on stderr (a settings file's problems are a list), and exit code 1."""
    code = main([str(part) for part in argv])
    told = capsys.readouterr()
    assert code == 1, told
    assert "Traceback" not in told.out + told.err
    return told.out + told.err


@pytest.mark.parametrize("name", BYTES)
def test_files_that_are_nothing(name, tmp_path, capsys):
    path, settings = tmp_path / "file.json", tmp_path / "settings.yaml"
    path.write_bytes(BYTES[name])
    settings.write_text(yaml.safe_dump(SETTINGS))
    said = refused(capsys, "run", "--hparams", settings, "--data", path, "--out", tmp_path / "out")
    assert said.startswith("nmke run: ") and said.count("\n") == 1
    (tmp_path / "file.yaml").write_bytes(BYTES[name])
    refused(capsys, "check", tmp_path / "file.yaml")
    refused(capsys, "run", "--hparams", tmp_path / "file.yaml", "--data", "atlas", "--out", tmp_path / "out")
    refused(capsys, "compare", "--methods", "FT", "--hparams-dir", tmp_path, "--model", "file", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in BYTES if name not in ("empty", "spaces")])
def test_results_that_are_none(name, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_bytes(BYTES[name])
    assert refused(capsys, "report", tmp_path).startswith("nmke report: ")


@pytest.mark.parametrize("name", BYTES)
def test_states_that_are_none(name, tmp_path, capsys):
    (tmp_path / "header.json").write_bytes(BYTES[name])
    for verb in (["log"], ["log", "--verify"], ["undo", "1"], ["export", "--to", "delta"]):
        assert f"nmke {verb[0]}: " in refused(capsys, verb[0], tmp_path, *verb[1:])


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: json.dumps(record)[:40])
def test_records_that_cannot_be_used(record, tmp_path, capsys):
    path, settings = tmp_path / "file.json", tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**SETTINGS, "alg_name": "ROME", "mom2_adjustment": False} | {"num_steps": None}))
    content = yaml.safe_load(settings.read_text())
    del content["num_steps"]
    settings.write_text(yaml.safe_dump({**content, "context_template_length_params": [[2, 5]]}))
    path.write_text(json.dumps([record]))
    refused(capsys, "run", "--hparams", settings, "--data", path, "--out", tmp_path / "out")
    path.write_text("\n".join(json.dumps(one) for one in (record, record)))
    refused(capsys, "run", "--hparams", settings, "--data", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "field", ["layers", "model_name", "L2", "neurons", "batch_size", "template_prefixes", "alg_name", "v_loss_layer", "preset"]
)
def test_settings_of_every_wrong_kind(field, tmp_path, capsys):
    sound = {"alg_name": "NMKE", "model_name": "atlas", "layers": [0]}
    allowed = {"model_name": ["x", "1e-1x"], "v_loss_layer": [None], "template_prefixes": [[]]}
    path = tmp_path / "settings.yaml"
    for value in VALUES:
        if value in allowed.get(field, ()) or (field == "alg_name" and value is None):
            continue
        path.write_text(yaml.safe_dump({**sound, field: value}))
        assert field in refused(capsys, "check", path)
    for name in (3, None, True, 1.5):
        path.write_text(yaml.safe_dump({**sound, name: 1}))
        assert "unknown name" in refused(capsys, "check", path)


def test_a_sound_record_among_broken_ones_is_edited(tmp_path, capsys):
    path, settings = tmp_path / "file.json", tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))
    path.write_text(json.dumps([*RECORDS, *embedded.requests(1)]))
    assert main(["run", "--hparams", str(settings), "--data", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "records refused" in capsys.readouterr().out
