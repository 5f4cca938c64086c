"""EasyEdit's own methods under our driver. What is marked `easyedit` needs a checkout; the rest needs none."""

import importlib
import json
import logging
import os
import random
import sys
from types import SimpleNamespace

import numpy
import pytest
import test_easyedit as inside
import torch
import yaml

from easyedit_nmke import atlas as embedded
from easyedit_nmke import facts
from easyedit_nmke.easyedit import foreign
from easyedit_nmke.easyedit.foreign import EasyEditMethod, TextByText
from easyedit_nmke.hparams import ModelPair, shipped
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import generation, metrics
from easyedit_nmke.statistics import covariance

easyeditor, known = inside.easyeditor, inside.known
SHIPPED = [
    "AlphaEdit", "CORE", "DEFER", "DPO", "EAMET", "EMMET", "FT", "GRACE", "KN", "LoRA", "MEMIT", "MEMIT-FE", "PMET", "R-ROME",
    "ROME", "SPHERE", "SimIE", "ULTRAEDIT", "WISE",
]  # fmt: skip
TEXTS = 1500  # enough for the covariance of 2048 neurons to be invertible
STATISTICS = dict(mom2_n_samples=200)
# Overrides that make a run short; AlphaEdit's decomposition is what takes its time.
SHORT = {
    "ROME": dict(mom2_n_samples=TEXTS),
    "R-ROME": dict(mom2_n_samples=TEXTS),
    "MEMIT": dict(mom2_n_samples=TEXTS),
    "AlphaEdit": dict(mom2_n_samples=TEXTS, layers=[0]),
    "FT": {},
    "WISE": dict(n_iter=30),
    "ULTRAEDIT": {},
    "GRACE": dict(n_iter=30),
    "LoRA": {},
}
LEARNS = {"ROME": 1.0, "R-ROME": 1.0, "MEMIT": 1.0, "AlphaEdit": 1.0, "FT": 0.6, "GRACE": 1.0}  # share of the edits, at least


@pytest.fixture(scope="module")
def edits():
    return [Request.from_dict(record) for record in embedded.requests(4, split="tune")]


@pytest.fixture
def settings(tmp_path):
    """settings(method, **overrides) -> the path of the shipped file with them, statistics kept in the test's folder."""

    def write(name, **overrides):
        content = yaml.safe_load(shipped(f"easyedit/{name}")["atlas"].read_text())
        overrides = {"stats_dir": str(tmp_path / "stats"), **overrides} if "stats_dir" in content else overrides
        path = tmp_path / name / "atlas.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content | overrides))
        return path

    return write


# ---- no checkout needed


class MeanDecides(torch.nn.Module):
    """As WISE does: what it answers depends on the average over all tokens that it is shown."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, **inputs):
        assert "attention_mask" not in inputs
        out = self.model(**inputs)
        out.logits = out.logits + inputs["input_ids"].float().mean()
        return out


def test_an_editor_is_asked_text_by_text(tiny):
    model, tok = tiny("llama")
    alone, texts = MeanDecides(model), ["one two three four", "five"]
    rows = [torch.tensor(tok(text)["input_ids"]) for text in texts]
    together = TextByText(alone)
    for side in ("left", "right"):
        padded = tok(texts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            logits = together(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
            expected = [alone(input_ids=row[None]).logits[0] for row in rows]
        for found, mask, wanted in zip(logits, padded["attention_mask"].bool(), expected, strict=True):
            assert torch.equal(found[mask], wanted) and not found[~mask].any()
    assert not torch.allclose(alone(input_ids=padded["input_ids"]).logits[1, -1], expected[1][-1]), "the padding would have told"
    assert together.config is model.config and generation.greedy_texts(together, tok, ["one two"])


def test_what_a_module_remembers_is_read_from_its_source(tmp_path):
    path = tmp_path / "method.py"
    path.write_text(
        "CACHE = None\nSEEN = {}\nLIMIT = 3\nNAMES = {'a': print}\nloaded = False\n"
        "def f():\n    global CACHE, loaded, P\n    P = 1\n"
    )
    found = foreign._remembered(SimpleNamespace(__file__=str(path)))
    assert found == {"CACHE": None, "SEEN": {}, "loaded": False, "P": foreign._ABSENT}


# ---- inside a checkout

needs_easyedit = pytest.mark.easyedit


@needs_easyedit
@pytest.mark.parametrize(
    "name, said",
    [
        ("ROMME", r"no method 'ROMME' \(did you mean 'ROME'\?\); it has ROME, MEMIT"),
        ("NMKE", "no method 'NMKE'.*; it has ROME"),
        ("IKE", "IKE cannot be run here: it changes no model"),
        ("DINM", "DINM cannot be run here: .*SafeEdit"),
        ("FT-Api", "FT-Api cannot be run here: .*paid interface"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_loaded(easyeditor, monkeypatch, name, said):
    monkeypatch.setattr(foreign.atlas, "load", None)
    with pytest.raises(ValueError, match=said):
        EasyEditMethod(name)


@needs_easyedit
def test_what_is_missing_is_said_before_anything_is_edited(easyeditor, known, settings, tmp_path):
    pair = known("llama")
    mend = tmp_path / "mend.yaml"
    home = inside.registering.find_easyedit()
    mend.write_text((home / "hparams" / "MEND" / "gpt2-xl.yaml").read_text())
    with pytest.raises(ValueError, match=r"MEND needs an editor trained for this model; `archive` is .*not a file"):
        EasyEditMethod("MEND", mend, pair)
    with pytest.raises(ValueError, match=r"for the model 'somewhere/llama'; give it as model_and_tok"):
        EasyEditMethod("FT", settings("FT", model_name="somewhere/llama"))
    with pytest.raises(FileNotFoundError, match=r"no hyperparameter file llama3\.yaml for EasyEdit's WISE; .*package: atlas"):
        EasyEditMethod("WISE", "llama3", pair)
    with pytest.raises(ValueError, match=r"is no file for EasyEdit's FTHyperParams: TypeError: .*unexpected.*numsteps"):
        EasyEditMethod("FT", settings("FT", numsteps=3), pair)


@needs_easyedit
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_file_is_what_easyedit_reads(easyeditor, name):
    found, _, kind = inside.registering.easyedit_method(name.lower())
    hparams = foreign._read(kind, shipped(f"easyedit/{name}")["atlas"])
    assert found == name == hparams.alg_name and hparams.model_name == "atlas"
    json.dumps(hparams.to_dict())


def without_luck(function):
    """BaseEditor scores after every edit, and with GRACE and LoRA (dropout left on) its scoring draws random numbers."""

    def called(*args, **kwargs):
        with torch.random.fork_rng():
            return function(*args, **kwargs)

    return called


def base_editor(easyeditor, name, path, model, tok, requests, unrelated, seed, moments, monkeypatch):
    """The edited model of `BaseEditor.edit(sequential_edit=True)`, as in a process of its own: without what earlier edits left in
    EasyEdit's modules."""
    for module in foreign._method_modules():
        for variable, value in foreign._remembered(module).items():
            if value is foreign._ABSENT:
                monkeypatch.delattr(module, variable, raising=False)
            else:
                monkeypatch.setattr(module, variable, value, raising=False)
    _, _, kind = inside.registering.easyedit_method(name)
    hparams = kind.from_hparams(str(path))
    hparams.model_name, hparams.sequential_edit = ModelPair((model, tok)), True
    if hasattr(hparams, "P_loc"):
        hparams.P_loc = "null_space_project.pt"
    for module in [m for n, m in sys.modules.items() if n.startswith("easyeditor.models.") and hasattr(m, "layer_stats")]:
        find = lambda _m, _t, where, *_, precision, **__: SimpleNamespace(
            mom2=SimpleNamespace(moment=lambda: moments[int(where.split(".")[2])].to(getattr(torch, precision)))
        )
        monkeypatch.setattr(module, "layer_stats", find)
    tok.padding_side = "right" if name in ("ROME", "MEMIT", "AlphaEdit", "R-ROME") else "left"
    editors = importlib.import_module("easyeditor.editors.editor")
    monkeypatch.setattr(editors, "compute_edit_quality", without_luck(editors.compute_edit_quality))
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    records = [{**r.to_dict(), "loc_prompt": text} for r, text in zip(requests, unrelated, strict=True)]
    for sow in (random.seed, numpy.random.seed, torch.manual_seed):
        sow(seed)
    return editor.edit_requests(records, sequential_edit=True, verbose=False)[1]


@needs_easyedit
@pytest.mark.parametrize("name", SHORT)
def test_the_same_weights_as_base_editor(easyeditor, known, edits, settings, name, monkeypatch):
    """Bit for bit, although BaseEditor ran before in this process and left its traces in EasyEdit's modules."""
    path, seed, requests = settings(name, **SHORT[name]), 3, edits[:3]
    model, tok = known("atlas")
    layers = yaml.safe_load(path.read_text()).get("layers") or [0]
    moments = covariance.covariances(ModelView(model), tok, embedded.corpus(TEXTS), layers)
    texts = iter(embedded.corpus(10_000))
    unrelated = [next(text for text in texts if request.subject not in text) for request in requests]
    other, other_tok = known("atlas")
    theirs = base_editor(easyeditor, name, path, other, other_tok, requests, unrelated, seed, moments, monkeypatch)

    method = EasyEditMethod(name, path, (model, tok), seed=seed)
    original = inside.parameters(known("atlas")[0])
    before = metrics.quality(method.model, tok, requests)
    for request in requests:
        method.apply([request])
    after = metrics.quality(method.model, tok, requests)
    ours, wanted = inside.parameters(method._original), inside.parameters(other)
    assert ours.keys() == wanted.keys() and inside.changed(ours, wanted) == []
    assert ours.keys() != original.keys() or inside.changed(ours, original) != [], "nothing was edited"
    assert metrics.summary(before, after)["rel"] >= LEARNS.get(name, 0)
    if name != "GRACE":  # EasyEdit scores it by what it generates
        score = importlib.import_module("easyeditor.evaluate").compute_edit_quality
        other.eval()  # EasyEdit leaves LoRA's dropout on
        for request, mine in zip(requests, after, strict=True):
            said = score(theirs, "llama", method.hparams, tok, request.to_dict(), "cpu")
            assert said["rewrite_acc"] == pytest.approx(mine["rewrite_acc"])


@needs_easyedit
def test_two_methods_in_turn_do_not_disturb_each_other_nor_anybody_else(easyeditor, known, edits, settings, monkeypatch, capsys):
    """AlphaEdit keeps projector, past keys and templates in variables of its module; so does everybody's random state change."""
    path = settings("AlphaEdit", **STATISTICS, v_loss_layer=2, layers=[0, 1], v_num_grad_steps=4, nullspace_threshold=0.3)
    module = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
    mark = torch.eye(2)
    monkeypatch.setattr(module, "P", mark, raising=False)
    monkeypatch.setattr(module, "P_loaded", True)

    pairs, original = [known("llama") for _ in range(3)], inside.parameters(known("llama")[0])

    def edited(*some):
        """Weights of methods that make two edits each, in turn."""
        methods = [EasyEditMethod("AlphaEdit", path, pair) for pair in some]
        for request in edits[:2]:
            for method in methods:
                method.apply([request])
        return [inside.parameters(method._original) for method in methods]

    outside = os.getcwd(), random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    (alone,), together = edited(pairs[0]), edited(*pairs[1:])
    for weights in together:
        inside.assert_same(weights, alone)
    assert inside.changed(alone, original)
    assert module.P is mark and module.P_loaded is True and module.CONTEXT_TEMPLATES_CACHE is None
    assert (os.getcwd(), random.getstate(), numpy.random.get_state()[1].tolist()) == outside[:3]
    assert torch.equal(torch.get_rng_state(), outside[3])
    assert not os.path.exists("null_space_project.pt") and not os.path.exists("logs")
    assert capsys.readouterr().out == ""


@needs_easyedit
def test_the_seed_decides(easyeditor, known, edits, settings):
    path = settings("AlphaEdit", **STATISTICS, v_loss_layer=2, layers=[0], v_num_grad_steps=2, nullspace_threshold=0.3)

    def edited(seed):
        method = EasyEditMethod("AlphaEdit", path, known("llama"), seed=seed)
        method.apply(edits[:1])
        return inside.parameters(method._original)

    first = edited(0)
    inside.assert_same(edited(0), first)
    assert inside.changed(edited(1), first), "other templates were sampled"


@needs_easyedit
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_method_edits_twice(easyeditor, known, edits, settings, name):
    """On a model of three blocks, with few steps; finite weights are checked by `apply` itself."""
    content = yaml.safe_load(shipped(f"easyedit/{name}")["atlas"].read_text())
    small = dict(v_num_grad_steps=2, v_loss_layer=2, n_iter=3, num_steps=2, mom2_n_samples=100)
    overrides = {key: value for key, value in small.items() if key in content}
    if content.get("layers"):
        overrides["layers"] = [1] if len(content["layers"]) == 1 else [0, 1]
    if isinstance(content.get("mom2_update_weight"), list):
        overrides["mom2_update_weight"] = [100, 100]
    if "inner_params" in content:
        overrides["inner_params"] = [where.replace("[3]", "[1]").replace(".3.", ".1.") for where in content["inner_params"]]
    if name == "SimIE":
        settings("ROME", **STATISTICS, v_num_grad_steps=2, v_loss_layer=2, layers=[1])
    model, tok = known("llama")
    method = EasyEditMethod(name, settings(name, **overrides), (model, tok))
    before = metrics.quality(method.model, tok, edits[:2])
    for request in edits[:2]:
        method.apply([request])
    scores = metrics.summary(before, metrics.quality(method.model, tok, edits[:2]))
    assert all(0 <= value <= 1 for value in scores.values() if value is not None)
    assert isinstance(method.model, TextByText) == (name in ("WISE", "GRACE", "DEFER"))


@needs_easyedit
def test_wise_remembers_the_first_of_its_edits(easyeditor, known, edits, settings):
    """EasyEdit starts it anew at every edit unless its settings say `sequential_edit`, which no file of theirs can."""
    model, tok = known("atlas")
    method = EasyEditMethod("WISE", settings("WISE", n_iter=3), (model, tok))
    layers = []
    for request in edits[:2]:
        method.apply([request])
        layers.append(next(m for m in model.modules() if type(m).__name__ == "WISEAdapter"))
    assert layers[0] is layers[1] and layers[0].editing_total_cnt == 2


@needs_easyedit
def test_wise_is_told_well_known_facts_that_are_not_of_the_edits_subject(easyeditor, known, settings):
    """Where no text is named: sentences, of another subject than the edit's."""
    method = EasyEditMethod("WISE", settings("WISE", model_name="somewhere/llama"), known("llama"))
    fact = facts.requests(split="tune")[0]
    subjects = (fact["subject"], "Nobody at all")
    asked = [{"prompt": f"{subject} is a", "subject": subject, "target_new": "fool"} for subject in subjects]
    told = [method._record(Request.from_dict(each)) for each in asked]
    assert f"{fact['prompt']} {fact['ground_truth']}" not in told[0]["loc_prompt"]
    assert all(len(each["loc_prompt"].split()) > 2 and each["subject"] not in each["loc_prompt"] for each in told)


@needs_easyedit
def test_statistics_are_those_of_the_unedited_model(easyeditor, known, edits, settings, tmp_path):
    model, tok = known("llama")
    expected = covariance.covariances(ModelView(model), tok, embedded.corpus(100), [0, 1])
    overrides = dict(mom2_n_samples=100, layers=[0, 1], v_loss_layer=2, v_num_grad_steps=2)
    method = EasyEditMethod("MEMIT", settings("MEMIT", **overrides), (model, tok))
    for request in edits[:2]:
        method.apply([request])
    with method._inside:
        main = importlib.import_module("easyeditor.models.memit.memit_main")
        for layer in (0, 1):
            found = main.layer_stats(model, tok, f"model.layers.{layer}.mlp.down_proj", precision="float64").mom2.moment()
            assert found.dtype == torch.float64
            torch.testing.assert_close(found.float(), expected[layer])
        with pytest.raises(ValueError, match=r"asks for the covariance at lm_head; known: model\.layers\.0"):
            main.layer_stats(model, tok, "lm_head")
    assert main.layer_stats.__module__ == "easyeditor.models.rome.layer_stats"
    easyedits = EasyEditMethod("MEMIT", settings("MEMIT", mom2_dataset="wikitext", stats_dir="here", **overrides), (model, tok))
    with easyedits._inside:
        assert main.layer_stats.__module__ == "easyeditor.models.rome.layer_stats", "its own data set it reads itself"
    assert easyedits.hparams.stats_dir == str(tmp_path / "here")


@needs_easyedit
def test_failures_name_the_method_and_what_may_have_happened(easyeditor, known, edits, settings, monkeypatch):
    method = EasyEditMethod("FT", settings("FT", layers=[1]), known("llama"))
    with pytest.raises(ValueError, match=r"FT writes 1 request at a time .*got 2"):
        method.apply(edits[:2])
    method.apply(edits[:1])
    method.hparams.objective_optimization = "nothing"
    with pytest.raises(RuntimeError, match=r"EasyEdit's FT failed after 1 edits \(.*the model may hold a part of the edit"):
        method.apply(edits[1:2])
    assert method.tok.padding_side == "right", "put back although it failed"

    def spoil(model, *_, **__):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
        return model, {}

    monkeypatch.setattr(method, "_write", spoil)
    with pytest.raises(RuntimeError, match="FT left weights that are not finite"):
        method.apply(edits[:1])


@needs_easyedit
def test_methods_that_read_one_request_are_not_given_two(easyeditor, known, edits, settings):
    method = EasyEditMethod("GRACE", settings("GRACE", inner_params=["model.layers[1].mlp.down_proj.weight"]), known("llama"))
    with pytest.raises(ValueError, match=r"GRACE writes 1 request at a time .it reads no more than the first., got 2"):
        method.apply(edits[:2])


@needs_easyedit
def test_grace_is_looked_up_at_the_end_of_the_question(easyeditor, known, edits, settings):
    """Also of an earlier edit whose question is of another length than the last one's, and with the answer behind it."""
    model, tok = known("atlas")
    method = EasyEditMethod("GRACE", settings("GRACE", n_iter=30), (model, tok))
    for request in edits[:3]:
        method.apply([request])
    assert len({len(tok(request.prompt)["input_ids"]) for request in edits[:3]}) > 1
    for request in edits[:3]:
        assert metrics.exact_match(method.model, tok, [(request.prompt, request.target_new)]) == [True]
        (text,) = generation.greedy_texts(method.model, tok, [request.prompt])
        assert text.strip().startswith(request.target_new)


@needs_easyedit
def test_text_of_easyedit_goes_to_the_log(easyeditor, known, edits, settings, capsys, caplog):
    method = EasyEditMethod("FT", settings("FT", layers=[1], num_steps=1), known("llama"))
    with caplog.at_level(logging.DEBUG, logger=foreign.__name__):
        method.apply(edits[:1])
    assert "Executing FT" in caplog.text
    assert capsys.readouterr().out == ""
