"""docs/extending.md: a package of its six examples, each one file, is installed and used: an edit, an undo, a report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from easyedit_nmke import LifelongEditor, NMKEHyperParams, load_delta
from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
POINTS = {
    "methods": "Nudge = {}:NUDGE", "architectures": "stablelm = {}:STABLELM", "metrics": "likely = {}:LIKELY",
    "formats": "flashcards = {}:FLASHCARDS", "verbs": "count = {}:COUNT",
    "analyses": "norms = {}:NORMS",
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed package made of the page's examples."""
    home = tmp_path / "site"
    information = home / "extras-1.0.dist-info"
    information.mkdir(parents=True)
    examples = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    text = ""
    for group, point in POINTS.items():
        kind = "analysis" if group == "analyses" else group.removesuffix("s")
        module = f"extras_{kind}"
        (home / f"{module}.py").write_text(examples[kind], encoding="utf-8")
        text += f"[easyedit_nmke.{group}]\n{point.format(module)}\n"
    (information / "entry_points.txt").write_text(text)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: extras\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(home))
    yield home
    for name in [name for name in sys.modules if name.startswith("extras_")]:
        del sys.modules[name]


@pytest.fixture
def run(package, tmp_path, capsys):
    """nmke(verb, ...) -> what it prints; `first`: of the run that edited six facts with the method, the format and the metric."""

    def nmke(*argv):
        assert main([*map(str, argv)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    cards = [
        {"question": r["prompt"], "about": r["subject"], "wrong": r["ground_truth"], "right": r["target_new"]}
        for r in embedded.requests(6)
    ]
    (tmp_path / "cards.json").write_text(json.dumps(cards))
    settings = {"alg_name": "Nudge", "model_name": "atlas", "layers": [1, 2], "device": "cpu", "step": 1.0, "share": 0.01}
    (tmp_path / "nudge.yaml").write_text(yaml.safe_dump(settings))
    nmke.out = tmp_path / "out"
    nmke.first = nmke(
        "run", "--hparams", tmp_path / "nudge.yaml", "--data", tmp_path / "cards.json", "--out", nmke.out, "--checkpoints", "3,6"
    )
    return nmke


def test_a_run_with_a_method_a_metric_and_a_format_of_another_package(run, package, tmp_path):
    lines = [json.loads(line) for line in (run.out / "results.jsonl").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines] == [0, 3, 6] and lines[2]["protocol"]["data"]["format"] == "flashcards"
    assert all(0 <= line["scores"]["likely"] <= 1 for line in lines) and "Likely" in run.first
    assert lines[2]["scores"]["rel"] > lines[0]["scores"]["rel"]
    edited = load_file(next(run.out.glob("edited-*.safetensors")))
    model, _ = embedded.load()
    for name, weight in edited.items():
        share = (weight != model.get_parameter(name)).float().mean()
        assert 0.01 < share < 0.06  # of six edits
    assert run("count", run.out) == f"6 edits in {run.out}\n"
    page = run("report", run.out) and (run.out / "report" / "report.html").read_text(encoding="utf-8")
    assert "Likely" in page and "Nudge" in page


def test_sparse_edits_are_undone_gone_back_on_and_exported(run):
    before = load_file(next(run.out.glob("edited-*.safetensors")))
    run("undo", run.out, "2")
    assert "undone" in run("log", run.out)
    run("export", run.out, "--to", "delta")
    model, _ = embedded.load()
    load_delta(model, run.out / "delta")
    now = {name: model.get_parameter(name) for name in before}
    assert all(not torch.equal(now[name], before[name]) for name in before)
    assert main(["export", str(run.out), "--to", "lora"]) == 1
    run("rollback", run.out, "0")
    unedited, _ = embedded.load()
    from easyedit_nmke.cli import kept

    editor = kept.open_editor(kept.find(run.out))
    editor.close()
    assert all(torch.equal(editor.model.get_parameter(name), unedited.get_parameter(name)) for name in before)


def test_an_adapter_cannot_hold_a_sparse_update(run, capsys):
    assert main(["export", str(run.out), "--to", "lora"]) == 1
    assert "is sparse, and an adapter holds low-rank updates of linear layers only" in capsys.readouterr().err


def test_another_process_knows_them_too(run, package):
    code = "import sys; from easyedit_nmke.cli import main; sys.exit(main(sys.argv[1:]))"
    path = {"PYTHONPATH": f"{package}:{':'.join(sys.path)}"}
    done = subprocess.run([sys.executable, "-c", code, "count", str(run.out)], capture_output=True, text=True, env=path)
    assert done.stdout == f"6 edits in {run.out}\n", done.stderr


def test_an_analysis_of_another_package_has_a_section_in_the_report(package, tmp_path, capsys):
    for _ in range(2):
        assert main(["analyze", "norms", "--out", str(tmp_path)]) == 0
        assert "Mean length of a value" in capsys.readouterr().out
    assert len((tmp_path / "norms.jsonl").read_text().splitlines()) == 1 + 5
    assert main(["report", str(tmp_path)]) == 0
    assert "<h2>Norms: how large each block" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_an_architecture_of_another_package(package, requests, nmke_hparams):
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast.from_pretrained(embedded.DIRECTORY)
    config = AutoConfig.for_model(
        "stablelm", vocab_size=len(tok), hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.2, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    editor = LifelongEditor.from_hparams(nmke_hparams(model, tok, v_num_grad_steps=10))
    assert isinstance(editor.hparams, NMKEHyperParams)
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    results, *_ = editor.edit(requests=requests(2), prompts=[], target_new=[], verbose=False)
    assert len(results) == 2 and not torch.equal(model.model.layers[1].mlp.down_proj.weight, before)
    editor.state.undo(1)
    editor.state.rollback(0)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)
