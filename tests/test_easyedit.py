"""NMKE inside EasyEdit. Tests marked `easyedit` need a checkout; the others use a stand-in of a few lines, or none."""

import copy
import importlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import easyedit_nmke
from easyedit_nmke import atlas as embedded
from easyedit_nmke.models import prompts
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import metrics
from easyedit_nmke.statistics import covariance, nullspace

registering = importlib.import_module("easyedit_nmke.easyedit.register")

ATLAS_FILE = Path(__file__).parents[1] / "hparams" / "NMKE" / "atlas.yaml"
FAMILIES = ["atlas", "llama", "qwen2", "gpt2"]
# EasyEdit chooses tokenizer and matrix shapes by these words in a model's name.
NAMES = {"atlas": "llama-atlas", "llama": "llama-tiny", "qwen2": "qwen2-tiny", "gpt2": "gpt2-xl-tiny"}
LLAMA_MODULES = {
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
GPT2_MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}


# ---- no checkout needed


@pytest.fixture
def no_easyeditor(monkeypatch):
    """This process as if EasyEdit had never been imported or found; what was there comes back afterwards."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "easyeditor"]:
        monkeypatch.delitem(sys.modules, name)
    checkout = os.environ.get("EASYEDIT_HOME")
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != checkout])
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "easyeditor"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(no_easyeditor, tmp_path, monkeypatch):
    """Write an `easyeditor` with the two tables that NMKE needs, plus `files`, and point EASYEDIT_HOME at it."""

    def write(**files):
        tables = {
            "__init__": "",
            "util/alg_dict": "ALG_DICT = {'ROME': print}",
            "editors/editor": "from ..util.alg_dict import *",
            "editors/batch_editor": (
                "from enum import Enum\n"
                "class BatchEditor(Enum):\n"
                "    MEMIT = 'MEMIT'\n"
                "    @staticmethod\n"
                "    def is_batchable_method(alg_name):\n"
                "        return alg_name == BatchEditor.MEMIT.value\n"
            ),
        }
        for name, text in (tables | files).items():
            path = tmp_path / "checkout" / "easyeditor" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "checkout"))
        return tmp_path / "checkout"

    return write


def test_missing_easyedit_is_one_clear_sentence(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "EASYEDIT_HOME"}
    environment["PYTHONPATH"] = str(Path(easyedit_nmke.__file__).parents[1])
    code = "import easyedit_nmke; easyedit_nmke.register()"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: EasyEdit was not found")
    assert "EASYEDIT_HOME" in last and "git clone" in last


def test_home_without_easyedit_is_named(no_easyeditor, tmp_path, monkeypatch):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(ImportError, match=f"EASYEDIT_HOME={tmp_path} has no easyeditor/__init__.py"):
        easyedit_nmke.register()


def test_register_twice_is_once(stand_in):
    home = stand_in()
    assert registering.find_easyedit() == home
    assert easyedit_nmke.register() is sys.modules["easyeditor"]
    tables = importlib.import_module("easyeditor.util.alg_dict")
    batchable = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    wrapper = batchable.is_batchable_method
    easyedit_nmke.register()
    assert batchable.is_batchable_method is wrapper
    assert [name for name in ("NMKE", "MEMIT", "ROME") if batchable.is_batchable_method(name)] == ["NMKE", "MEMIT"]
    table = dict(tables.ALG_DICT)  # every method that it lacks, and its own as they were
    assert table["ROME"] is print and table["NMKE"] is easyedit_nmke.apply_nmke_to_model
    assert set(table) == {"ROME", "NMKE", "AlphaEdit", "MEMIT", "FT", "LocFT-BF", "UltraEdit", "KNE"}
    assert table["FT"].__name__ == "apply_ft_to_model" and table["LocFT-BF"].__name__ == "apply_locft_bf_to_model"
    assert importlib.import_module("easyeditor.editors.editor").ALG_DICT is tables.ALG_DICT


def test_register_after_easyeditor_was_imported(stand_in, monkeypatch):
    monkeypatch.syspath_prepend(str(stand_in()))
    monkeypatch.delenv("EASYEDIT_HOME")
    copied = importlib.import_module("easyeditor.editors.editor").ALG_DICT
    easyedit_nmke.register()
    assert copied["NMKE"] is easyedit_nmke.apply_nmke_to_model


def test_another_method_of_that_name_is_replaced_with_a_warning(stand_in, caplog):
    stand_in(**{"util/alg_dict": "ALG_DICT = {'NMKE': print}"})
    with caplog.at_level(logging.WARNING):
        easyedit_nmke.register()
    assert "already has a method 'NMKE'" in caplog.text
    assert importlib.import_module("easyeditor.util.alg_dict").ALG_DICT["NMKE"] is easyedit_nmke.apply_nmke_to_model


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("util/alg_dict", "OTHER = {}", "too old .*AttributeError.*ALG_DICT"),
        ("editors/batch_editor", "class BatchEditor: pass", "too old .*is_batchable_method"),
        ("__init__", "from transformers import AWordModelThatIsNoMore", "too old .*transformers .*AWordModelThatIsNoMore"),
        ("__init__", "import no_such_package.part", r"needs the package no_such_package.*pip install -e .\.\[easyedit\]"),
        ("__init__", "import no_such_vision", r"needs the package no_such_vision.*text_only=True"),
    ],
)
def test_unusable_easyedit_says_why(stand_in, monkeypatch, file, text, said):
    monkeypatch.setattr(registering, "MULTIMODAL_PACKAGES", frozenset({"no_such_vision"}))
    stand_in(**{file: text})
    with pytest.raises(ImportError, match=said) as caught:
        easyedit_nmke.register()
    assert "\n" not in str(caught.value)


VISION = """
import json
import no_such_vision
import no_such_vision.models.hub as hub
from no_such_vision.transforms import Compose, InterpolationMode
def crop(mode=InterpolationMode.BICUBIC): pass
class Mine(Compose): pass
"""


def test_text_only_puts_placeholders_where_a_package_is_missing(stand_in, monkeypatch):
    monkeypatch.setattr(registering, "MULTIMODAL_PACKAGES", frozenset({"no_such_vision", "json"}))
    stand_in(vision=VISION, __init__="from . import vision")
    easyedit_nmke.register(text_only=True)
    vision = sys.modules["easyeditor.vision"]
    assert vision.json is sys.modules["json"], "an installed package is imported as ever"
    assert repr(vision.hub) == "<placeholder for no_such_vision.models.hub>"
    for use in (vision.Compose, vision.Mine, vision.hub.download, vision.no_such_vision.anything):
        with pytest.raises(ImportError, match="no_such_vision is not installed"):
            use(1)
    assert not isinstance(1, vision.Compose)


def test_placeholders_fool_nobody_else(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(registering, "MULTIMODAL_PACKAGES", frozenset({"no_such_vision"}))
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "bystander.py").write_text("import no_such_vision")
    look = "import bystander_check\nfrom no_such_vision import x\n"
    check = "import importlib.util\nfound = importlib.util.find_spec('no_such_vision')\n"
    (tmp_path / "checkout" / "bystander_check.py").write_text(check)
    stand_in(__init__=look)
    before = importlib.import_module("builtins").__import__
    easyedit_nmke.register(text_only=True)
    assert importlib.import_module("builtins").__import__ is before
    assert sys.modules["bystander_check"].found is None, "asked while EasyEdit was being imported"
    assert importlib.util.find_spec("no_such_vision") is None
    assert not [name for name in sys.modules if name.startswith("no_such_vision")]
    with registering.text_only(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("bystander")
    monkeypatch.delitem(sys.modules, "bystander_check")


# ---- inside a checkout


@pytest.fixture
def easyeditor(tmp_path, monkeypatch):
    """EasyEdit with NMKE in it, working in a directory of its own (it writes `logs/`), none of its caches kept."""
    try:
        registering.find_easyedit()
    except ImportError as missing:
        pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    package = easyedit_nmke.register(text_only=True)
    for method in ("alphaedit.AlphaEdit_main", "memit.memit_main", "rome.rome_main"):
        module = importlib.import_module(f"easyeditor.models.{method}")
        for name in ("CONTEXT_TEMPLATES_CACHE", "P_loaded", "cache_c_new"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None if name.isupper() else False)
        if hasattr(module, "COV_CACHE"):
            monkeypatch.setattr(module, "COV_CACHE", {})
    yield package
    log = logging.getLogger("easyeditor.editors.editor")
    for handler in list(log.handlers):  # each BaseEditor adds two more
        log.removeHandler(handler)
        handler.close()


@pytest.fixture
def known(atlas, tiny):
    """A fresh (model, tok) by the name of its family."""

    def make(family):
        model, tok = atlas if family == "atlas" else tiny(family)
        return copy.deepcopy(model), copy.deepcopy(tok)

    return make


@pytest.fixture(scope="module")
def edits():
    return embedded.requests(6, split="tune")


def arguments(requests):
    """EasyEdit's request dictionaries as the columns that `edit` and `batch_edit` take."""

    def probes(section):
        kinds = {kind for request in requests for kind in request[section]}
        of = {k: [r[section].get(k, {"prompt": None, "ground_truth": None}) for r in requests] for k in sorted(kinds)}
        return {k: {name: [probe[name] for probe in v] for name in ("prompt", "ground_truth")} for k, v in of.items()}

    columns = {name: [request[name] for request in requests] for name in ("prompt", "target_new", "subject", "ground_truth")}
    columns["prompts"] = columns.pop("prompt")
    columns["rephrase_prompts"] = [request["rephrase_prompt"] for request in requests]
    return columns | {"locality_inputs": probes("locality"), "portability_inputs": probes("portability")}


def base_editor(easyeditor, hparams):
    return easyeditor.BaseEditor.from_hparams(hparams)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(edited, other, original):
    """Largest relative difference of two edits' updates over the parameters that either of them changed."""
    worst = 0.0
    for name, start in original.items():
        one, two = edited[name] - start, other[name] - start
        if one.any() or two.any():
            relative = float((one - two).norm() / two.norm())
            assert math.isfinite(relative), name  # max() would let NaN pass as equal
            worst = max(worst, relative)
    return worst


def changed(edited, original):
    return sorted(name for name, start in original.items() if not torch.equal(edited[name], start))


def assert_same(edited, other):
    assert changed(edited, other) == []


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["single", "sequential", "batch"])
def test_base_editor_runs_and_standalone_gives_the_same_weights(
    easyeditor, known, nmke_hparams, edits, family, way, record_property
):
    model, tok = known(family)
    original = parameters(model)
    count, batch = (1, 1) if way == "single" else (3, 3 if way == "batch" else 1)
    hparams = nmke_hparams(model, tok, batch_size=batch)
    editor = base_editor(easyeditor, hparams)
    run = editor.batch_edit if way == "batch" else editor.edit
    scores, edited, _ = run(**arguments(edits[:count]), sequential_edit=True)
    assert len(scores) == count
    for score in scores:
        assert {"rewrite_acc", "rephrase_acc", "locality", "portability"} <= set(score["post"])
        assert all(key.endswith(("_acc", "_output")) for key in score["post"]["locality"])
    names = [ModelView(edited).weight_name(layer) for layer in hparams.layers]
    assert changed(parameters(edited), original) == sorted(names)
    assert all((edited.get_parameter(n) - original[n]).norm() > 1e-3 * original[n].norm() for n in names), "more than rounding"

    alone, tok = known(family)
    standalone = easyedit_nmke.LifelongEditor.from_hparams(nmke_hparams(alone, tok, batch_size=batch))
    run = standalone.batch_edit if way == "batch" and hasattr(standalone, "batch_edit") else standalone.edit
    run(**arguments(edits[:count]), sequential_edit=True)
    measured = difference(parameters(edited), parameters(standalone.model), original)
    record_property("relative_difference", measured)
    assert measured < 1e-5


@pytest.mark.easyedit
def test_atlas_takes_the_edit(easyeditor, known, nmke_hparams, edits):
    """The same numbers that EasyEdit's users look at: before the edit the new target is not said, after it is."""
    hparams = easyedit_nmke.NMKEHyperParams.from_hparams(ATLAS_FILE)
    hparams.model_name, hparams.stats_dir, hparams.mom2_n_samples = known("atlas"), "stats", 400
    scores, _, _ = base_editor(easyeditor, hparams).edit(**arguments(edits[:4]), sequential_edit=True)
    before, after = (sum(score[when]["rewrite_acc"][0] for score in scores) for when in ("pre", "post"))
    assert before < 2
    assert after == 4


@pytest.mark.easyedit
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_model_given_by_its_path(easyeditor, known, nmke_hparams, edits, tmp_path, family):
    """EasyEdit loads it, sets the tokenizer up in its own way (left padding, other pad tokens), and NMKE edits it."""
    model, tok = known(family)
    model.resize_token_embeddings(len(tok) + 8)  # EasyEdit gives Qwen tokenizers an <|endoftext|>
    place = tmp_path / NAMES[family]
    model.save_pretrained(place)
    tok.save_pretrained(place)
    original = parameters(model)
    hparams = nmke_hparams(model, tok, model_name=str(place))
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    _, edited, before = editor.edit(**arguments(edits[:2]), sequential_edit=True)
    names = sorted(ModelView(edited).weight_name(layer) for layer in hparams.layers)
    assert sorted(before) == names == changed(parameters(edited), original)


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_changes_nothing(easyeditor, known, nmke_hparams, edits, family):
    lengths = {len(r["prompt"]) for r in edits[:3]}
    assert len(lengths) > 1, "prompts of one length would need no padding"
    results = []
    for side in ("left", "right"):
        model, tok = known(family)
        tok.padding_side = side
        editor = base_editor(easyeditor, nmke_hparams(model, tok, batch_size=3))
        _, edited, _ = editor.batch_edit(**arguments(edits[:3]), sequential_edit=True)
        assert tok.padding_side == side
        results.append(parameters(edited))
    assert_same(*results)


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["edit", "batch_edit"])
def test_a_non_sequential_edit_leaves_no_trace(easyeditor, known, nmke_hparams, edits, family, way):
    model, tok = known(family)
    original = parameters(model)
    editor = base_editor(easyeditor, nmke_hparams(model, tok, batch_size=1 if way == "edit" else 2))
    getattr(editor, way)(**arguments(edits[:4]), sequential_edit=False)
    assert_same(parameters(editor.model), original)
    getattr(editor, way)(**arguments(edits[4:6]), sequential_edit=True)

    fresh, tok = known(family)
    other = base_editor(easyeditor, nmke_hparams(fresh, tok, batch_size=1 if way == "edit" else 2))
    getattr(other, way)(**arguments(edits[4:6]), sequential_edit=True)
    assert_same(parameters(editor.model), parameters(other.model))


@pytest.mark.easyedit
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_state_on_disk_goes_on_where_a_stopped_process_was(easyeditor, known, nmke_hparams, edits, family, tmp_path):
    whole = base_editor(easyeditor, nmke_hparams(*known(family)))
    expected, _, _ = whole.edit(**arguments(edits[:4]), sequential_edit=True)
    for count in (2, 4):  # the same script again, from its first request
        editor = base_editor(easyeditor, nmke_hparams(*known(family), state_dir=str(tmp_path / "state")))
        scores, _, _ = editor.edit(**arguments(edits[:count]), sequential_edit=True)
        editor.model.nmke_state.book.close()
    assert_same(parameters(editor.model), parameters(whole.model))
    assert editor.model.nmke_state.last == 4
    assert [score["pre"]["rewrite_acc"] for score in scores] == [score["pre"]["rewrite_acc"] for score in expected]
    assert scores[3]["post"]["rewrite_acc"] == expected[3]["post"]["rewrite_acc"]


@pytest.mark.easyedit
@pytest.mark.parametrize("pair", [("atlas", "atlas"), ("atlas", "qwen2"), ("llama", "gpt2")])
def test_two_editors_do_not_disturb_each_other(easyeditor, known, nmke_hparams, edits, pair):
    def make(family):
        return base_editor(easyeditor, nmke_hparams(*known(family)))

    def edit(editor, *numbers):
        for number in numbers:
            editor.edit(**arguments([edits[number]]), sequential_edit=True)

    one, two = map(make, pair)
    edit(one, 0), edit(two, 1), edit(one, 2), edit(two, 3)
    alone, other = map(make, pair)
    edit(alone, 0, 2), edit(other, 1, 3)
    assert_same(parameters(one.model), parameters(alone.model))
    assert_same(parameters(two.model), parameters(other.model))


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_are_easyedits(easyeditor, known, nmke_hparams, edits, family):
    model, tok = known(family)
    probes = [request["locality"]["unrelated"] for request in edits]
    if family != "gpt2":  # EasyEdit pads a list on the left, which shifts GPT-2's absolute positions and so its own scores
        several = {name: [probe[name][0] for probe in probes] for name in ("prompt", "ground_truth")}
        edits = [{**request, "locality": {**request["locality"], "several": several}} for request in edits]
    ours = metrics.quality(model, tok, [Request.from_dict(request) for request in edits])
    for request, mine in zip(edits, ours, strict=True):
        theirs = easyeditor.compute_edit_quality(model, family, nmke_hparams(model, tok), tok, request, "cpu")
        assert mine["rewrite_acc"] == pytest.approx(theirs["rewrite_acc"])
        assert mine["rephrase_acc"] == pytest.approx(theirs["rephrase_acc"])
        assert mine["locality"] == {k: v for k, v in theirs["locality"].items() if k.endswith("_output")}
        assert set(mine["portability"]) == set(theirs["portability"])
        for kind, values in mine["portability"].items():
            assert values == pytest.approx(theirs["portability"][kind])


@pytest.fixture
def projector(tmp_path):
    """Write the projector file of a model's null space as EasyEdit keeps it: P [layers, F, F]. Returns (path, {layer: U})."""

    def write(model, tok, hparams):
        view = ModelView(model)
        bases = {layer: space.basis for layer, space in nullspace.row_spaces(view, tok, hparams).items()}
        place = tmp_path / "null_space_project.pt"
        torch.save(torch.stack([torch.eye(len(u)) - u @ u.T for u in bases.values()]), place)
        return str(place), bases

    return write


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_file_of_easyedit_is_used(easyeditor, known, nmke_hparams, edits, projector, family):
    model, tok = known(family)
    original = parameters(model)
    hparams = nmke_hparams(model, tok, neurons="all")
    place, bases = projector(model, tok, hparams)
    unread = nmke_hparams(model, tok, neurons="all", P_loc=place, mom2_dataset="there is no such text")
    base_editor(easyeditor, unread).edit(**arguments(edits[:2]), sequential_edit=True)
    view = ModelView(model)
    for layer, basis in bases.items():
        start = original[view.weight_name(layer)]
        update = view.w_out(layer) - (start.T if view.family.transposed else start)
        assert 0 < basis.shape[1] < len(basis)
        assert (update @ basis).norm() < 1e-3 * update.norm(), "the update must leave the row space alone"


def alphaedit_hparams(hparams, family, place):
    """The same settings for EasyEdit's AlphaEdit."""
    module = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_hparams")
    names = module.AlphaEditHyperParams.__dataclass_fields__
    shared = {name: value for name, value in vars(hparams).items() if name in names}
    modules = GPT2_MODULES if family == "gpt2" else LLAMA_MODULES
    if family == "atlas":  # MEMIT asks for the weight by name, and tied to the embedding it has only that one
        modules = modules | {"lm_head_module": "model.embed_tokens"}
    own = {"alg_name": "AlphaEdit", "model_name": NAMES[family], "P_loc": place, "v_loss_layer": hparams.v_loss_layer or 0}
    return module.AlphaEditHyperParams(**{**shared, **modules, **own})


@pytest.mark.easyedit
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_mask_off_the_update_is_alphaedits(
    easyeditor, known, nmke_hparams, edits, projector, family, batch, monkeypatch, record_property
):
    """Three edits in a row with the same z, P and templates; past keys are each side's own.

    EasyEdit solves densely in float32, which loses about 1e-6 · ||Pk||² / L2: with atlas's keys (||Pk||² = 500) and L2 = 0.1
    its own update is 2e-3 away from the same formula in float64, this package's 5e-6. Hence the larger L2.
    """
    model, tok = known(family)
    tok.padding_side = "right"  # what EasyEdit sets for AlphaEdit
    theirs = copy.deepcopy(model)
    original = parameters(model)
    place, _ = projector(model, tok, nmke_hparams(model, tok))
    hparams = nmke_hparams(model, tok, neurons="all", P_loc=place, batch_size=batch, L2=30.0)
    templates = prompts.context_templates(model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)

    values = {}
    engine = importlib.import_module("easyedit_nmke.methods.located")
    compute = engine.target_values

    def remember(view, tok, requests, *rest):
        found = compute(view, tok, requests, *rest)
        values.update((request.prompt, value) for request, value in zip(requests, found, strict=True))
        return found

    monkeypatch.setattr(engine, "target_values", remember)
    alphaedit = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
    monkeypatch.setattr(alphaedit, "CONTEXT_TEMPLATES_CACHE", templates)
    monkeypatch.setattr(
        alphaedit, "compute_z", lambda model, tok, request, *rest: values[request["prompt"].format(request["subject"])].z
    )
    settings = alphaedit_hparams(hparams, family, place)
    worst = 0.0
    for number in range(0, 3 * batch, batch):
        chunk = edits[number : number + batch]
        before = parameters(model), parameters(theirs)
        easyedit_nmke.apply_nmke_to_model(model, tok, chunk, hparams)
        alphaedit.apply_AlphaEdit_to_model(theirs, tok, chunk, settings)
        steps = [{k: w[k] - b[k] for k in w} for w, b in zip((parameters(model), parameters(theirs)), before, strict=True)]
        worst = max(worst, difference(*steps, {k: torch.zeros_like(v) for k, v in original.items()}))
    worst = max(worst, difference(parameters(model), parameters(theirs), original))
    record_property("relative_difference", worst)
    assert len(changed(parameters(theirs), original)) == len(hparams.layers)
    assert worst < 1e-4


@pytest.mark.easyedit
@pytest.mark.parametrize("family", FAMILIES)
def test_target_values_are_alphaedits(easyeditor, known, nmke_hparams, edits, family, record_property):
    model, tok = known(family)
    tok.padding_side = "right"
    hparams = nmke_hparams(model, tok, v_loss_layer=ModelView(model).depth - 1)
    templates = prompts.context_templates(model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)
    request = edits[0]
    values = importlib.import_module("easyedit_nmke.methods.values")
    flat = [template for group in templates for template in group]
    ours = values.target_values(ModelView(model), tok, [Request.from_dict(request)], flat, hparams.layers[-1], hparams)[0].z
    compute_z = importlib.import_module("easyeditor.models.alphaedit.compute_z").compute_z
    wanted = request | {
        "prompt": request["prompt"].replace(request["subject"], "{}"),
        "target_new": " " + request["target_new"],
    }
    settings = alphaedit_hparams(hparams, family, "")
    theirs = compute_z(model, tok, wanted, settings, hparams.layers[-1], templates).detach()
    measured = float((ours - theirs).norm() / theirs.norm())
    record_property("relative_difference", measured)
    assert measured < 1e-3


@pytest.mark.easyedit
@pytest.mark.parametrize("method", ["ROME", "MEMIT", "AlphaEdit"])
def test_easyedits_own_methods_work_beside_it(easyeditor, known, nmke_hparams, edits, projector, tmp_path, method, monkeypatch):
    model, tok = known("atlas")
    hparams = nmke_hparams(model, tok, v_loss_layer=ModelView(model).depth - 1)
    place, _ = projector(model, tok, hparams)
    model.save_pretrained(tmp_path / NAMES["atlas"])
    tok.save_pretrained(tmp_path / NAMES["atlas"])
    settings = vars(alphaedit_hparams(hparams, "atlas", place)) | {
        "alg_name": method, "model_name": str(tmp_path / NAMES["atlas"]), "mom2_adjustment": method != "ROME",
        "context_template_length_params": [[5, 5]], "fp16": False, "mom2_update_weight": 100,
    }  # fmt: skip
    kind = getattr(easyeditor, f"{method}HyperParams")
    settings = kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})
    if method == "MEMIT":  # its covariance would be read from Wikipedia
        moments = covariance.covariances(ModelView(model), tok, embedded.corpus(400), hparams.layers)
        named = {ModelView(model).weight_name(layer).removesuffix(".weight"): m for layer, m in moments.items()}
        main = importlib.import_module("easyeditor.models.memit.memit_main")
        monkeypatch.setattr(main, "get_cov", lambda model, tok, layer_name, *rest, **options: named[layer_name])
    editor = easyeditor.BaseEditor.from_hparams(settings)
    scores, edited, _ = editor.edit(**arguments(edits[:2]), sequential_edit=True)
    assert len(changed(parameters(edited), parameters(model))) == len(settings.layers)
    assert all(torch.isfinite(p).all() for p in parameters(edited).values())
    assert {"pre", "post"} <= set(scores[0]) and len(scores) == 2
    assert not hasattr(edited, "nmke_state")


@pytest.mark.easyedit
def test_every_copy_of_the_table_has_nmke(easyeditor):
    tables = [vars(m).get("ALG_DICT") for name, m in sys.modules.items() if name.partition(".")[0] == "easyeditor"]
    tables = [table for table in tables if table is not None]
    assert len(tables) > 1
    assert all(table["NMKE"] is easyedit_nmke.apply_nmke_to_model for table in tables)


@pytest.mark.easyedit
def test_text_only_leaves_availability_checks_truthful(easyeditor):
    from transformers.utils import is_av_available, is_cv2_available, is_timm_available, is_torchvision_available

    told = {
        "av": is_av_available(), "cv2": is_cv2_available(), "timm": is_timm_available(),
        "torchvision": is_torchvision_available(),
    }  # fmt: skip
    for package, available in told.items():
        assert available == (importlib.util.find_spec(package) is not None), package
    importlib.import_module("transformers").AutoProcessor  # noqa: B018


@pytest.fixture
def example(tmp_path):
    """The script's module, and its arguments for the embedded model with quick settings."""
    path = Path(__file__).parents[1] / "examples" / "easyedit_edit.py"
    spec = importlib.util.spec_from_file_location("easyedit_edit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = yaml.safe_load(ATLAS_FILE.read_text()) | {"mom2_n_samples": 400, "stats_dir": str(tmp_path / "stats")}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(settings))
    return module, ["--hparams_dir", str(tmp_path / "quick.yaml"), "--output_dir", str(tmp_path / "out")]


@pytest.mark.easyedit
def test_the_example_edits_a_zsre_file(easyeditor, example, edits, tmp_path):
    script, options = example
    records = [
        {"src": e["prompt"], "subject": e["subject"], "alt": e["target_new"], "answers": [e["ground_truth"]],
         "rephrase": e["rephrase_prompt"], "loc": e["locality"]["unrelated"]["prompt"][0],
         "loc_ans": e["locality"]["unrelated"]["ground_truth"][0]}
        for e in edits
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "zsre_mend_eval.json").write_text(json.dumps(records))
    options += ["--data_dir", str(tmp_path / "data"), "--data_type", "ZsRE", "--ds_size", "2", "--sequential_edit"]
    assert script.main(options) == 0
    scores = json.loads((tmp_path / "out" / "atlas_NMKE_N=2_Sequential=True.json").read_text())
    assert [score["post"]["rewrite_acc"] for score in scores] == [[1.0], [1.0]]
    assert all("neighborhood_acc" in score["post"]["locality"] for score in scores)


@pytest.mark.easyedit
def test_the_example_leaves_out_what_cannot_be_edited(easyeditor, example, edits, tmp_path, capsys):
    script, options = example
    (tmp_path / "edits.json").write_text(json.dumps([{**edits[0], "subject": "Nobody"}, edits[1]]))
    assert script.main([*options, "--data_dir", str(tmp_path / "edits.json")]) == 0
    assert "record 0" in capsys.readouterr().err
    assert (tmp_path / "out" / "atlas_NMKE_N=1_Sequential=False.json").is_file()


@pytest.mark.easyedit
def test_the_example_knows_every_method_of_easyedit(easyeditor, example):
    script, _ = example
    for method in easyeditor.ALG_DICT:
        assert hasattr(script.hparams_class(easyeditor, method), "from_hparams"), method
    with pytest.raises(SystemExit, match=r"no method 'Telepathy'.*NMKE"):
        script.hparams_class(easyeditor, "Telepathy")
