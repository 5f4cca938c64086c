"""`write_passes`: what an edit has left of its residual is written again where the model does not answer as asked yet."""

import copy
import dataclasses

import pytest
import torch
from test_undo import assert_same, picture

from easyedit_nmke import LifelongEditor
from easyedit_nmke.history.log import Consolidation
from easyedit_nmke.methods import alphaedit, read
from easyedit_nmke.methods.located import edit_layers
from easyedit_nmke.models.arch import ModelView, editing
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import of_parameter
from easyedit_nmke.scores.metrics import exact_match

L2 = 300.0  # so much that a part of the values is not said after one pass


@pytest.fixture
def settings(atlas, tmp_path):
    """settings(L2, **changes) -> AlphaEdit's of the embedded model."""
    model, tok = atlas

    def make(l2, **changes):
        kept = {"model_name": (copy.deepcopy(model), tok), "stats_dir": str(tmp_path), "mom2_n_samples": 200, "L2": l2}
        return dataclasses.replace(read("AlphaEdit/atlas"), **kept, **changes)

    return make


def opened(hparams):
    model, tok = hparams.model_name
    state = alphaedit.METHOD.open(model, tok, hparams, progress=False)
    state.follow(alphaedit.METHOD.matrices(model, hparams))
    return ModelView(model), tok, state


def said(view, tok, requests):
    return exact_match(view.model, tok, [(r.prompt, r.target_new) for r in requests], separator=None)


def test_what_is_not_said_yet_is_written_again_by_the_same_system(settings, requests):
    """Two passes are two edits to one value, before the keys of either are remembered; three stop where all is said."""
    asked = [Request.from_dict(requests(1)[0])]
    once, twice, many = (settings(1000.0, write_passes=passes) for passes in (1, 2, 50))
    view, tok, state = opened(once)
    with editing(view.model):
        first = edit_layers(view, tok, asked, once, state)
        assert not any(said(view, tok, asked)), "the ridge leaves too little for this test"
        again = edit_layers(view, tok, asked, once, state, z=first.z)
    other, _, state = opened(twice)
    with editing(other.model):
        report = edit_layers(other, tok, asked, twice, state, z=first.z)
    layers = once.layers
    assert len(report.updates) == 2 * len(layers) and torch.equal(report.keys[layers[-1]], first.keys[layers[-1]])
    for index, layer in enumerate(layers):
        assert torch.equal(view.w_out(layer), other.w_out(layer))
        made = of_parameter(report.updates, view.weight_name(layer))
        assert [torch.equal(u.left, v.left) for u, v in zip(made, (first.updates[index], again.updates[index]), strict=True)]
    last, _, state = opened(many)
    with editing(last.model):
        report = edit_layers(last, tok, asked, many, state, z=first.z)
        assert all(said(last, tok, asked)) and 1 < len(report.updates) / len(layers) < 50


def test_of_a_batch_only_those_are_written_again_that_are_not_said(settings, requests):
    asked = [Request.from_dict(record) for record in requests(3)]
    hparams = settings(L2)
    view, tok, state = opened(hparams)
    with editing(view.model):
        z = edit_layers(view, tok, asked, hparams, state).z
        right = said(view, tok, asked)
    assert any(right) and not all(right), "the ridge leaves too little, or too much, for this test"
    hparams = settings(L2, write_passes=2)
    other, _, state = opened(hparams)
    with editing(other.model):
        report = edit_layers(other, tok, asked, hparams, state, z=z)
    for update in report.updates[len(hparams.layers) :]:
        assert update.owner.tolist() == [i for i, r in enumerate(right) if not r] and update.left.any(0).all()


def test_an_edit_of_several_passes_is_kept_consolidated_undone_and_gone_on_from_to_the_bit(settings, requests, tmp_path):
    records, kept = requests(3), str(tmp_path / "state")
    whole = LifelongEditor.from_hparams(settings(L2, write_passes=3))
    for record in records:
        whole.apply([record])
    assert any(len(edit.updates) > len(whole.hparams.layers) for edit in whole.state.log)
    editor = LifelongEditor.from_hparams(settings(L2, write_passes=3, state_dir=kept))
    editor.apply([records[0]])
    first = picture(editor)
    editor.close()
    editor = LifelongEditor.from_hparams(settings(L2, write_passes=3, state_dir=kept))
    editor.apply([records[1]])
    editor.apply([records[2]])
    assert_same(picture(editor), picture(whole))
    before = picture(editor)
    editor.consolidate()
    (whole_solution,) = [event for event in editor.state.events if isinstance(event, Consolidation)]
    assert len(whole_solution.updates) > len(editor.hparams.layers) and not torch.equal(picture(editor)[0][0], before[0][0])
    solved = picture(editor)
    editor.close()
    editor = LifelongEditor.from_hparams(settings(L2, write_passes=3, state_dir=kept))
    assert_same(picture(editor), solved)
    editor.state.rollback(2)
    editor.undo(2)
    assert_same(picture(editor), first)
    editor.close()
