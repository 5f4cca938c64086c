"""Each analysis by its command, on a few prompts or edits of the embedded model: lines, figures, sentences, the report."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from easyedit_nmke import LifelongEditor, cli, open_state
from easyedit_nmke import atlas as embedded
from easyedit_nmke.experiments.analyses import Analysis, analyses, record
from easyedit_nmke.experiments.analyses.edited import down_projections
from easyedit_nmke.experiments.analyses.settings import SETTINGS
from easyedit_nmke.history.durable import find
from easyedit_nmke.methods import read
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores.drift import row_drift, weight_drift
from easyedit_nmke.scores.generation import target_log_probs

pytest.importorskip("sklearn")
BASE = dict(
    model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=3, v_lr=1.0, v_weight_decay=0.001, clamp_norm_factor=2,
    mom2_dataset="atlas", mom2_n_samples=200, nullspace_fraction=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with settings of NMKE and AlphaEdit and the edits that each has made: three facts of the embedded model."""
    home = tmp_path_factory.mktemp("analyses")
    for name in ("NMKE", "AlphaEdit"):
        (home / f"{name}.yaml").write_text(yaml.safe_dump({**BASE, "alg_name": name, "stats_dir": str(home / "stats")}))
        hparams = read(home / f"{name}.yaml")
        hparams.state_dir = str(home / name / "state")
        editor = LifelongEditor.from_hparams(hparams)
        for request in embedded.requests(3):
            editor.apply([request])
        editor.close()
    for name, option in {"blue": {"blue": True}, "nas": {"value_norm": "nas"}}.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump({**BASE, "alg_name": "NMKE", **option}))
    (home / "two.json").write_text(json.dumps(embedded.requests(2)))
    (home / "free.jsonl").write_text('{"question": "What is two and two?", "answer": "4"}\n')
    (home / "NMKE" / "results.jsonl").write_text(
        json.dumps({"method": "NMKE", "seed": 0, "checkpoint": 3, "scores": {"rel": 0.5, "gen": 0.25, "loc": 1.0}}) + "\n"
    )
    return home


COMMANDS = {
    "trace": "--facts 2 --draws 2 --hparams {NMKE}",
    "roles": "--only country,sport,language --domains x=country,sport;y=language --limit 3 --layers 1,4 --draws 3",
    "ablate": "--only country,sport --limit 2 --layers 4 --top 1,2 --draws 2",
    "activations": "--each 2 --neurons 5",
    "layers": "{home}/NMKE --at 2",
    "drift": "NMKE={home}/NMKE AlphaEdit={home}/AlphaEdit --rows 20",
    "explain": "{home}/NMKE 2",
    "settings": "--hparams {NMKE} --edits 2 --seeds 1 --only",
}


def command(place, name, out):
    words = COMMANDS[name].format(home=place, NMKE=place / "NMKE.yaml").split()
    more = ["MPC,ALIGN,random mask,[neurons=all; L2=3; batch_size=2]"] if name == "settings" else []
    return ["analyze", name, *words, *more, "--out", str(out)]


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """(folder with all analyses, what each has printed)."""
    out, printed = tmp_path_factory.mktemp("made"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easyedit_nmke.scores.kept.TOKENS", 60)
        for name in COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert cli.main(command(place, name, out)) == 0
            printed[name] = said.getvalue()
    return out, printed


def test_every_analysis_is_tried_here():
    assert set(COMMANDS) == set(analyses())


@pytest.mark.parametrize("name", COMMANDS)
def test_it_leaves_lines_and_figures_and_says_what_they_hold(made, name):
    out, printed = made
    stem = "explain-2" if name == "explain" else name
    head, *lines = record.read(out / f"{stem}.jsonl")
    assert head["analysis"] == name and head["versions"]["torch"] and lines
    assert (out / f"{stem}.png").stat().st_size > 10_000 and b"</svg>" in (out / f"{stem}.svg").read_bytes()
    analysis = analyses()[name]
    said = analysis.said([head, *lines])
    assert said and all(sentence in printed[name] for sentence in said)
    for table in analysis.tables([head, *lines]):
        assert table.rows and all(len(row) == len(table.headings) for row in table.rows)
    assert analysis.paper and analysis.reading and "nan" not in " ".join(said)


def test_a_second_run_makes_nothing_again(made, place, monkeypatch, capsys):
    out, _ = made
    before = {file.name: file.read_text() for file in out.glob("*.jsonl")}
    for target in (
        "experiments.analyses.trace.rounded", "experiments.analyses.explain._told", "experiments.analyses.roles._counts",
        "experiments.analyses.activations._strongest", "experiments.analyses.layers._chosen", "experiments.analyses.drift._maps",
        "experiments.analyses.questions.judged", "experiments.analyses.settings._Stream",
    ):  # fmt: skip
        monkeypatch.setattr(f"easyedit_nmke.{target}", None)
    monkeypatch.setattr("easyedit_nmke.experiments.analyses.draw", lambda analysis, file: [])
    for name in ("trace", "roles", "explain", "drift"):
        assert cli.main(command(place, name, out)) == 0, capsys.readouterr().err
    assert {file.name: file.read_text() for file in out.glob("*.jsonl")} == before


def test_without_a_name_it_shows_what_there_is_an_example_a_line(capsys):
    assert cli.main(["analyze"]) == 2
    printed = capsys.readouterr().out
    for name, analysis in analyses().items():
        assert f"    {name} " in printed and f"  {analysis.example}\n" in printed


# ---- what the lines hold


def test_roles_say_when_the_model_answers_everything_alike(made):
    out, _ = made
    lines = record.read(out / "roles.jsonl")
    answer, share = lines[1]["commonest answer"]
    assert answer and 0 < share <= 1 / 3 and not any("The model answers" in said for said in analyses()["roles"].said(lines))
    alike = [lines[0], *({**line, "commonest answer": ["A", 1.0]} for line in lines[1:])]
    assert any("The model answers 'A' to 100% of the prompts" in said for said in analyses()["roles"].said(alike))


def test_the_explanation_is_of_the_model_before_and_after_that_edit(made, place):
    out, _ = made
    _, line = record.read(out / "explain-2.jsonl")
    request = Request.from_dict(embedded.requests(3)[1])
    asked = {(text["prompt"], text["answer"]): text for text in line["asked"]}
    editor = LifelongEditor.of_folder(place / "NMKE")
    editor.close()
    view, pairs = ModelView(editor.model), list(asked)
    said, weights = {}, {}
    for when, edit in (("before", 1), ("after", 2)):
        with editor.state.as_of(edit):
            said[when] = target_log_probs(editor.model, editor.tok, pairs)
            weights[when] = {layer: view.w_out(layer).clone() for layer in (0, 1)}
    for i, (prompt, answer) in enumerate(pairs):
        length = len(editor.tok.encode(" " + answer, add_special_tokens=False))
        for when in said:
            assert asked[prompt, answer][when] == pytest.approx(math.exp(said[when][i] * length), rel=1e-3)
    assert (request.prompt, request.target_new) in asked and (request.prompt, request.ground_truth) in asked
    assert line["tokens"][line["subject_token"]].strip() and request.subject.endswith(line["tokens"][line["subject_token"]].strip())
    for block in line["blocks"]:
        change = (weights["after"][block["layer"]] - weights["before"][block["layer"]]).norm(dim=0)
        assert [neuron["neuron"] for neuron in block["top"]] == change.topk(3).indices.tolist()
        assert block["changed"] == int((change > 0).sum()) <= block["attributed"] and block["along"] > 0.99
        assert 0 < block["moved"] <= 1.01 * block["wanted"]


def test_masks_found_again_are_those_of_the_edits(made, place):
    out, _ = made
    _, *lines = record.read(out / "layers.jsonl")
    editor = LifelongEditor.of_folder(place / "NMKE")
    editor.close()
    assert [line["key"] for line in lines] == [[1], [3]]
    for line in lines:
        report = editor.state.reports[line["key"][0] - 1]
        for layer in (0, 1):
            block = line["blocks"][str(layer)]
            assert block["mask"] == pytest.approx(report.density[layer], abs=1e-6) and block["as kept"]
            assert (block["resonance"], block["burst"]) == pytest.approx(report.ratios[layer])
            assert block["general"] + block["specific"] - block["both"] == pytest.approx(block["mask"], abs=1e-6)
            assert block["bytes"]["coefficients"] == 6 * 2048 * 4


@pytest.mark.parametrize("label", ["default", "ALIGN"])
def test_settings_write_the_values_and_use_the_attributions_that_were_found_once(made, place, label):
    """By hand: each z of the unedited model, written one after the other; by its masks, or by those that an edit finds itself."""
    from functools import partial

    from easyedit_nmke.experiments.methods import changed
    from easyedit_nmke.methods.contract import apply_method
    from easyedit_nmke.methods.nmke import attributed
    from easyedit_nmke.methods.values import target_values
    from easyedit_nmke.scores import metrics

    out, _ = made
    lines = {line["key"][0]: line for line in record.read(out / "settings.jsonl")[1:]}
    own = "[neurons=all; L2=3; batch_size=2]"
    assert list(lines) == ["default", "MPC", "ALIGN", "random mask", own] and lines[own]["density"] == 1
    assert lines["default"]["density"] == pytest.approx(lines["random mask"]["density"])
    editor = LifelongEditor.from_hparams(changed(read(place / "NMKE.yaml"), SETTINGS[label]))
    requests = [Request.from_dict(request) for request in embedded.requests(2, "test")]
    before = metrics.quality(editor.model, editor.tok, requests)
    state = open_state(editor.model, editor.tok, editor.hparams)
    values = target_values(ModelView(editor.model), editor.tok, requests, state.flat_templates, 1, editor.hparams)
    scores = [None, None]
    if label == "default":
        scores = [attributed(ModelView(editor.model), editor.tok, [r], state.flat_templates, editor.hparams) for r in requests]
    for request, value, found in zip(requests, values, scores, strict=True):
        edit = partial(editor.method.replay, z=value.z[:, None], scores=found)
        apply_method(editor.method, editor.model, editor.tok, [request], editor.hparams, state=state, edit=edit)
    wanted = metrics.summary(before, metrics.quality(editor.model, editor.tok, requests))
    assert {name: lines[label][name] for name in ("rel", "gen", "loc")} == {name: wanted[name] for name in ("rel", "gen", "loc")}
    assert lines[label]["density"] == pytest.approx(np.mean([r.density[layer] for r in state.reports for layer in (0, 1)]))
    assert lines[label]["phases"]["attribution"] > 0 and lines[label]["phases"].get("values", 0) < 0.1
    assert sorted(path.name for path in (out / "found" / "seed-0").iterdir()) == ["lps-30", "mpc-30", "values"]


def test_every_setting_can_be_read(place):
    from easyedit_nmke.experiments.methods import changed

    base = read(place / "NMKE.yaml")
    assert all(changed(base, changes) for changes in SETTINGS.values())


def test_drift_of_a_known_change():
    generator = torch.Generator().manual_seed(0)
    before, change = torch.randn(300, 7, generator=generator), torch.randn(300, 7, generator=generator)
    after = before + 0.3 * change
    old, new = before.double().numpy(), after.double().numpy()
    cosine = (old * new).sum(1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
    distance = np.linalg.norm(new - old, axis=1)
    found = row_drift(before, after)
    wanted = {"cosine_mean": cosine.mean(), "cosine_std": cosine.std(), "l2_mean": distance.mean(), "l2_std": distance.std()}
    assert found == pytest.approx(wanted)
    stats = pytest.importorskip("scipy.stats")
    assert weight_drift(before, after)["wasserstein"] == pytest.approx(stats.wasserstein_distance(old.ravel(), new.ravel()))
    lengths = np.linalg.norm(old, axis=1)
    twice = {"cosine_mean": 1, "cosine_std": 0, "l2_mean": lengths.mean(), "l2_std": lengths.std()}
    assert row_drift(before, 2 * before) == pytest.approx(twice, abs=1e-6)


def test_edited_weights_are_the_same_from_a_state_a_delta_a_file_and_a_folder(place, tmp_path, atlas):
    model, _ = atlas
    view = ModelView(model)
    unedited = {name: parameter.clone() for name, parameter in model.named_parameters()}
    editor = LifelongEditor.of_folder(place / "NMKE")
    editor.close()
    wanted = {layer: ModelView(editor.model).w_out(layer) for layer in (0, 1)}
    names = {view.weight_name(layer): weight.contiguous() for layer, weight in wanted.items()}
    save_file(names, tmp_path / "edited.safetensors")
    assert cli.main(["export", str(place / "NMKE"), "--to", "delta", "--out", str(tmp_path / "delta")]) == 0
    editor.model.save_pretrained(tmp_path / "model")
    for path in (place / "NMKE", tmp_path / "delta", tmp_path / "edited.safetensors", tmp_path / "model"):
        found = down_projections(path, view)
        assert found.keys() == wanted.keys() and all(torch.equal(found[layer], wanted[layer]) for layer in wanted), path
    assert all(torch.equal(parameter, unedited[name]) for name, parameter in model.named_parameters())
    view.w_out(0)[0, 0] += 1
    with pytest.raises(ValueError, match="edits of another model"):
        down_projections(place / "NMKE", view)


def test_runs_of_another_model_and_paths_without_edits_are_refused(place, tmp_path, tiny):
    view = ModelView(tiny("gpt2")[0])
    with pytest.raises(ValueError, match="edits of another model"):
        down_projections(find(place / "NMKE"), view)
    with pytest.raises(ValueError, match="there is no"):
        down_projections(tmp_path / "nowhere", view)
    (tmp_path / "torn.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        down_projections(tmp_path / "torn.safetensors", view)
    save_file({view.weight_name(0): view.weight(0).data.clone()}, tmp_path / "same.safetensors")
    with pytest.raises(ValueError, match="holds no down projection that differs"):
        down_projections(tmp_path / "same.safetensors", view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edits_of_two_values_and_several_passes_are_told(tiny, nmke_hparams, requests, dtype):
    """Masks by alignment are found again; what a block wanted is what its first pass wanted, and not known in 16 bits."""
    from easyedit_nmke.experiments.analyses import explain, layers
    from easyedit_nmke.models.arch import editing

    model, tok = tiny("llama")
    hparams = nmke_hparams(model.to(dtype), tok, blue=True, attribution_strategy="align", write_passes=3, L2=30.0)
    editor = LifelongEditor.from_hparams(hparams)
    editor.apply(requests(1))
    (edit,) = editor.state.events
    assert len(edit.updates) == 6
    with editing(editor.model):
        told = explain._told(editor, 0, 1)
        with editor.state.weights.lent():
            assert all(block["as kept"] for block in layers._chosen(editor, hparams, 0)["blocks"].values())
    for block, first in zip(told["blocks"], (edit.updates[0], edit.updates[3]), strict=True):
        assert block["along"] > 0.95 and block["top"][0]["rank"] >= 1
        assert block["wanted"] is None if dtype == torch.bfloat16 else block["wanted"] == pytest.approx(first.left.norm().item())


@pytest.mark.parametrize("words", ["drift {home}/NMKE", "layers {home}/NMKE", "explain {home}/NMKE 1"])
def test_a_run_of_another_model_is_one_sentence(place, tmp_path, tiny, capsys, words):
    model, tok = tiny("gpt2")
    model.save_pretrained(tmp_path / "other")
    tok.save_pretrained(tmp_path / "other")
    command = ["analyze", *words.format(home=place).split(), "--model", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1
    *_, err = capsys.readouterr().err.strip().splitlines()
    assert err.startswith("nmke analyze: ") and re.search("another model|was made on|edits of", err), err
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize(
    "words, said",
    [
        ("roles --only country", "there is 1 task (country)"),
        ("roles --model smollm2", "--tasks is missing"),
        ("roles --tasks {home}/free.jsonl", "a question without choices; tasks need one format, multiple choice, in common"),
        ("roles --domains nothing", "expected domain=task,task"),
        ("ablate --only country,sport --limit 1 --layers 4 --top 3000", "fewer than the 3000 of --top"),
        ("trace --prompt Rome", "--prompt and --subject go together"),
        ("trace --data {home}/two.json --facts 3", "the model knows 2, 3 were asked for; ask for fewer"),
        ("layers {home}/AlphaEdit", "were made by AlphaEdit, which chooses no neurons"),
        ("explain {home}/NMKE 9", "there is no edit 9; edits are 1 to 3"),
        ("explain {home}/nowhere 1", "no state of edits"),
        ("drift {home}/NMKE {home}/NMKE", "two runs are called 'NMKE'"),
        ("settings --hparams {home}/AlphaEdit.yaml", "the settings are NMKE's"),
        ("settings --hparams {home}/blue.yaml", "has blue: True and value_norm: free, by which values depend on edits"),
        ("settings --hparams {home}/nas.yaml", "has blue: False and value_norm: nas"),
        ("settings --hparams {home}/NMKE.yaml --only mpc", "there is no setting 'mpc'"),
        ("settings --hparams {home}/NMKE.yaml --only [v_lr=1;L2=2]", "'[v_lr=1;L2=2]' changes v_lr, and all settings"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(place, tmp_path, capsys, words, said):
    assert cli.main(["analyze", *words.format(home=place).split(), "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("nmke analyze: ") and said in err


# ---- the file of lines


def test_lines_go_on_where_they_were_torn_and_are_not_mixed_with_others(tmp_path):
    file, head = tmp_path / "trace.jsonl", {"analysis": "trace", "settings": {"seed": 0, "blocks": [1, 2]}, "command": "a"}
    calls = []

    def make(value):
        calls.append(value)
        return {"value": value}

    book = record.Notebook.open(file, head)
    assert book.once("a", 1, make=lambda: make(1)) == {"key": ["a", 1], "value": 1}
    book.once("a", 2, make=lambda: make(2))
    file.write_text(file.read_text() + '{"key": ["a", 3], "val')
    again = record.Notebook.open(file, {**head, "command": "another"})
    assert again.once("a", 1, make=lambda: make(9))["value"] == 1 and again.once("a", 3, make=lambda: make(3))["value"] == 3
    assert calls == [1, 2, 3] and [line["key"] for line in record.read(file)[1:]] == [["a", 1], ["a", 2], ["a", 3]]
    for other in (
        {**head, "settings": {"seed": 1, "blocks": [1, 2]}},
        {**head, "analysis": "roles"},
        {**head, "model": {"type": "x"}},
    ):
        with pytest.raises(ValueError, match=r"holds results of something else \(.* -> .*\); give another folder"):
            record.Notebook.open(file, other)
    file.write_text("nothing\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no result"):
        record.read(file)


# ---- the report


@pytest.fixture(scope="module")
def page(made):
    out, _ = made
    assert cli.main(["report", str(out)]) == 0
    return out / "report" / "report.html"


def test_the_report_has_a_section_for_each(page, made):
    text = page.read_text()
    for name, analysis in analyses().items():
        assert re.search(rf"<h2>{name.capitalize()}[-0-9]*: ", text) and analysis.paper.split("(")[0][:40] in text.replace(
            "&#39;", "'"
        )
    assert text.count("data:image/png;base64,") == len(COMMANDS) and "<h2>Protocol</h2>" not in text
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|<script|<link", outside) and "nmke analyze" not in outside.split("<h2>")[0]


def test_the_report_of_a_comparison_has_them_behind_it(made, place, tmp_path, capsys):
    out, _ = made
    shutil.copytree(out, tmp_path / "both", ignore=shutil.ignore_patterns("report", "found", "attribution"))
    shutil.copy(place / "NMKE" / "results.jsonl", tmp_path / "both")
    assert cli.main(["report", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both" / "report" / "report.html").read_text()
    assert "After 3 edits NMKE has" in text and text.index("<h2>Roles") < text.index("<h2>Protocol</h2>")
    assert cli.main(["report", str(tmp_path / "both"), "--markdown"]) == 0
    assert capsys.readouterr().out.count("| NMKE |") == 1


@pytest.mark.parametrize("width", [400, 1280])
def test_no_section_is_wider_than_the_screen(page, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser to look with")
    script = (
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "page.querySelectorAll('details').forEach(part => part.open = true);"
        "const found = [page.documentElement.scrollWidth, page.images.length];"
        "document.querySelector('pre').textContent = JSON.stringify(found) }</script>"
    )
    frame = f"<iframe src='{page}' style='border: 0; width: {width}px; height: 900px'></iframe><pre></pre>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}{script}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [browser, *options, "--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    whole, images = json.loads(re.search(r"<pre>(\[.*?\])</pre>", done.stdout)[1])
    assert whole <= width and images == len(COMMANDS)


# ---- records of others


def test_what_is_no_analysis_is_refused(monkeypatch):
    module = "easyedit_nmke.experiments.analyses"
    monkeypatch.setattr(f"{module}.with_extensions", lambda kind, own: {**own, "mine": object()})
    with pytest.raises(ValueError, match=r"the analysis 'mine' of an installed package is .*, expected an Analysis"):
        analyses()
    monkeypatch.setattr(f"{module}.with_extensions", lambda kind, own: {**own, "mine": Analysis("mine", "s", "e", None, None)})
    assert analyses()["mine"].summary == "s"


# ---- docs


def test_the_page_says_what_its_files_say():
    page = (Path(__file__).parents[1] / "docs" / "analyses.md").read_text(encoding="utf-8")
    words = " ".join(page.split())
    files = sorted((Path(__file__).parents[1] / "docs" / "analyses").glob("*/*.jsonl"))
    assert len(files) >= len(COMMANDS)
    for file in files:
        lines = record.read(file)
        analysis = analyses()[lines[0]["analysis"]]
        assert lines[0]["command"] in page and f"analyses/{file.parent.name}/{file.stem}.png" in page
        assert all(" ".join(sentence.split()) in words for sentence in analysis.said(lines)), file
    for name in analyses():
        assert f"## {name}\n" in page


def test_all_tokens_of_a_subject_are_found_wherever_it_stands(atlas, requests):
    from easyedit_nmke.experiments.analyses.trace import _placed

    _, tok = atlas
    asked = [(r["prompt"], r["subject"]) for r in requests(30)]
    asked += [(f"{subject} is", subject) for _, subject in asked[:3]] + [(f'"{subject}" is', subject) for _, subject in asked[:3]]
    assert sum(prompt.startswith(subject) for prompt, subject in asked) < 20
    for prompt, subject in asked:
        _, ids, place = _placed(tok, prompt, subject)
        assert "".join(tok.decode([i]) for i in ids[place.start : place.stop]).strip() == subject


def ablated(tasks, changes):
    """Lines of an ablation: (what, size[, draw]) -> {task: change of the log-probability}."""
    head = {"settings": {"tasks": tasks, "top": [5], "name": "some"}}
    told = lambda of: {task: {"log_prob": value - 2, "accuracy": 0.5} for task, value in of.items()}
    base = {"key": ["nothing", 0], "tasks": told(dict.fromkeys(tasks, 0.0)), "also": {}, "kept_kl": 0.0}
    return [head, base, *({"key": list(key), "tasks": told(of), "also": {}, "kept_kl": 0.1} for key, of in changes.items())]


def test_a_role_is_held_against_random_neurons_on_its_own_tasks():
    from easyedit_nmke.experiments.analyses import ablate

    tasks = {"a": "x", "b": "x", "c": "y"}
    lines = ablated(
        tasks,
        {
            ("task a", 5): {"a": -0.1, "b": 0.0, "c": 0.0},
            ("task c", 5): {"a": 0.0, "b": 0.0, "c": -0.3},
            ("random", 5, 0): {"a": -0.1, "b": 0.0, "c": -0.3},
            ("random", 5, 1): {"a": -0.1, "b": -9.0, "c": -0.3},
        },
    )
    own = [(round(each["own"], 6), each["others"]) for each in ablate._control(lines, 5, "task")]
    assert own == [(-0.2, pytest.approx((-0.15 - 0.05) / 2)), (-0.2, pytest.approx((-4.65 - 4.55) / 2))]
    (said, *_) = [text for text in ablate.said(lines) if "task-specific" in text]
    assert "by -0.200 on their own tasks, inside two spreads of as many random ones there (-0.200 ± 0.000)" in said
    assert "-0.200 (random -0.200 ± 0.000)" in ablate._headline(lines)


def test_the_model_of_a_folder_is_asked_what_that_model_knows(place, monkeypatch):
    from argparse import Namespace

    from easyedit_nmke.experiments.analyses import roles, source

    asked = Namespace(model=None, edits=place / "NMKE", tasks=[])
    assert source.model_of(asked) == "atlas" and source.name(asked) == f"atlas with the edits in {place / 'NMKE'}"
    monkeypatch.setattr(source, "model_of", lambda args: "some/where")
    with pytest.raises(ValueError, match="--tasks is missing"):
        roles.asked(asked)
    monkeypatch.undo()
    assert source.model_of(Namespace(model=None)) == "atlas" and source.model_of(Namespace(model="x", edits=place)) == "x"


def test_a_text_may_hold_other_ends_of_lines(tmp_path):
    notebook = record.Notebook.open(tmp_path / "x.jsonl", {"analysis": "x", "settings": {}})
    notebook.once(1, make=lambda: {"text": "a\u2028b\u2029c\x85d"})
    assert [line.get("text") for line in record.read(tmp_path / "x.jsonl")] == [None, "a\u2028b\u2029c\x85d"]


def test_one_block_is_the_first():
    from easyedit_nmke.experiments.analyses.source import spread

    assert (spread(10, 1), spread(10, 3), spread(2, 3)) == ((0,), (0, 4, 9), (0, 1))


def test_settings_on_data_without_paraphrases_are_told(made):
    out, _ = made
    lines = [{k: v for k, v in line.items() if k not in ("gen", "loc")} for line in record.read(out / "settings.jsonl")]
    analysis = analyses()["settings"]
    assert any(text.startswith("The random mask of the same density, against the default: Rel +") for text in analysis.said(lines))
    assert len(analysis.figure(lines).axes) == len(analysis.figure(record.read(out / "settings.jsonl")).axes) - 2


def test_more_runs_than_colours_are_drawn(made):
    out, _ = made
    head, *lines = record.read(out / "drift.jsonl")
    first, *_ = head["settings"]["runs"]
    many = {f"run {i}": head["settings"]["runs"][first] for i in range(9)}
    told = [
        {**line, "key": ["change", new, line["key"][2]]} for line in lines if line["key"][:2] == ["change", first] for new in many
    ]
    assert told and analyses()["drift"].figure([{**head, "settings": {**head["settings"], "runs": many}}, *told])
