"""EasyEdit's AlphaEdit and MEMIT on this engine: its files and calls, its results."""

import copy
import importlib
import time

import pytest
import test_easyedit as inside
import test_easyedit_baselines as side_by_side
import torch

import easyedit_nmke
from easyedit_nmke import atlas as embedded
from easyedit_nmke import methods
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.statistics import covariance, nullspace

easyeditor, known, edits, chosen = inside.easyeditor, inside.known, inside.edits, side_by_side.chosen
pytestmark = pytest.mark.easyedit


@pytest.fixture
def table(easyeditor):
    """EasyEdit's table of methods, as it was when the test is over."""
    methods = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    before = dict(methods)
    yield methods
    methods.update(before)


def test_functions_are_replaced_once_and_put_back(table):
    before = dict(table)
    easyedit_nmke.accelerate_easyedit(text_only=True)
    fast = dict(table)
    assert {name for name in before if fast[name] is not before[name]} == {"AlphaEdit", "MEMIT"}
    easyedit_nmke.accelerate_easyedit(text_only=True)
    assert table == fast
    easyedit_nmke.accelerate_easyedit(restore=True, text_only=True)
    assert table == before
    easyedit_nmke.accelerate_easyedit(restore=True, text_only=True)
    assert table == before


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT"])
def test_base_editor_gives_this_engines_weights(easyeditor, table, chosen, edits, method):
    options = dict(L2=30.0, nullspace_fraction=0.5) if method == "AlphaEdit" else dict(mom2_update_weight=10.0)
    model, tok, settings = chosen(method, "llama", **options)
    other = copy.deepcopy(model)
    easyedit_nmke.accelerate_easyedit(text_only=True)
    theirs = side_by_side.theirs_of(easyeditor, settings, "llama")
    theirs.model_name, theirs.device, theirs.stats_dir = settings.model_name, "cpu", settings.stats_dir
    if method == "AlphaEdit":
        theirs.nullspace_threshold = 0.3  # of the tiny model's directions about a half
        settings.nullspace_fraction, settings.nullspace_threshold = None, theirs.nullspace_threshold
    editor = inside.base_editor(easyeditor, theirs)
    _, edited, _ = editor.edit(**inside.arguments(edits[:3]), sequential_edit=True, verbose=False)
    for edit in edits[:3]:
        methods.apply_to_model(other, tok, [edit], settings)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, edited.get_parameter(name)), name


def test_fifty_alphaedits_on_atlas(easyeditor, table, chosen, monkeypatch, tmp_path, record_property):
    place = tmp_path / "P.pt"
    model, tok, settings = chosen("AlphaEdit", "atlas", L2=100.0, P_loc=str(place))  # EasyEdit solves in float32
    moments = covariance.covariances(ModelView(model), tok, embedded.corpus(400), settings.layers)
    bases = [nullspace.row_space(moments[layer], 0, fraction=0.5).basis for layer in settings.layers]
    torch.save(torch.stack([torch.eye(len(basis)) - basis @ basis.T for basis in bases]), place)
    other, original = copy.deepcopy(model), inside.parameters(model)
    theirs = side_by_side.theirs_of(easyeditor, settings, "atlas")
    main = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
    state = methods.open_state(model, tok, settings)
    monkeypatch.setattr(main, "get_context_templates", lambda *_: state.templates)
    own = table["AlphaEdit"]
    easyedit_nmke.accelerate_easyedit(text_only=True)
    seconds = {"ours": 0.0, "easyedit": 0.0}
    for request in embedded.requests(50, "tune"):
        for name, apply, edited in (("ours", table["AlphaEdit"], model), ("easyedit", own, other)):
            started = time.perf_counter()
            apply(edited, tok, [copy.deepcopy(request)], theirs)
            seconds[name] += time.perf_counter() - started
    worst = inside.difference(inside.parameters(model), inside.parameters(other), original)
    record_property("relative_difference", worst)
    print(f"relative difference {worst:.2e} after 50 edits; seconds {seconds}")  # noqa: T201
    assert worst < 1e-4
    assert seconds["ours"] < seconds["easyedit"]
