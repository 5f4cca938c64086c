"""All edits solved at once: by dense equations in float64; rolled back over, undone, taken up again and exported to the bit."""

import dataclasses
import shutil
from functools import partial

import pytest
import torch
from test_baselines import states_at
from test_undo import assert_same, picture

from easyedit_nmke import LifelongEditor, NMKEHyperParams, load_delta
from easyedit_nmke import atlas as embedded
from easyedit_nmke.cli import kept
from easyedit_nmke.experiments.protocol import Scorer, Segment, stamp
from easyedit_nmke.history import durable
from easyedit_nmke.history.journal import Journal
from easyedit_nmke.history.log import Consolidation, standing
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods import consolidation, read
from easyedit_nmke.methods.ridge import Unsolvable
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import accumulate, of_parameter


@pytest.fixture
def begin(tiny, nmke_hparams):
    """begin(kind="llama", dtype=float32, **overrides) -> an editor of a fresh tiny model; closed at the end."""
    opened = []

    def make(kind="llama", dtype=torch.float32, **overrides):
        model, tok = tiny(kind)
        overrides = {"v_num_grad_steps": 2, "attribution_strategy": "mpc", **overrides}
        opened.append(LifelongEditor.from_hparams(nmke_hparams(model.to(dtype), tok, **overrides)))
        return opened[-1]

    yield make
    for editor in opened:
        editor.close()


@pytest.fixture
def kept_in(tmp_path):
    return str(tmp_path / "state")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Where the covariance of the embedded model is kept for all tests."""
    return str(tmp_path_factory.mktemp("statistics"))


def edited(editor, records):
    for record in records:
        editor.apply([record])
    return editor


# ---- against the equations


def weighed(solver, keys, residual, rows=None):
    """The update [D, F] of the solver's regulariser for all keys at once, by a dense solve of neurons `rows`; zero elsewhere."""
    rows = torch.ones(len(keys), dtype=torch.bool) if rows is None else rows
    k, n = keys[rows], int(rows.sum())
    basis = getattr(solver, "basis", getattr(solver, "row_space", None)).double()
    out = torch.zeros(len(residual), len(keys), dtype=torch.float64)
    if solver.strength is not None:
        u = basis[rows]
        out[:, rows] = torch.linalg.solve(u * solver.strength.double() @ u.T + solver.l2 * torch.eye(n) + k @ k.T, k @ residual.T).T
        return out
    if getattr(solver, "null", False):
        p = basis @ basis.T
    else:
        q = torch.linalg.qr(basis[rows]).Q
        p = torch.eye(n) - q @ q.T
    out[:, rows] = torch.linalg.solve(p @ k @ k.T + solver.l2 * torch.eye(n), p @ k @ residual.T).T
    return out


def assert_at_once(editor, model, masks=None):
    """`editor`'s weights are `model`'s (unedited) plus a dense solution for all edits that count, block by block."""
    view, tok, state, layers = ModelView(model), editor.tok, editor.state, editor.hparams.layers
    counting = state.counting
    asked = [Request.from_dict(call.requests[i - call.first]) for i, call in counting]
    z = torch.stack([call.z[:, i - call.first] for i, call in counting], 1).double()
    for index, layer in enumerate(layers):
        keys = []
        for request in asked:
            groups = [[states_at(model, tok, view.down(layer), request, t, "input") for t in group] for group in state.templates]
            keys.append(torch.stack([torch.stack(group).mean(0) for group in groups]).mean(0))
        now = [states_at(model, tok, view.blocks[layers[-1]], request, "{}", "output") for request in asked]
        residual = (z - torch.stack(now, 1)) / (len(layers) - index)
        rows = None if masks is None else masks[layer]
        expected = weighed(state.solvers[layer], torch.stack(keys, 1), residual, rows)
        found = ModelView(editor.model).w_out(layer).double() - view.w_out(layer).double()
        assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-3
        with torch.no_grad():
            view.w_out(layer).add_(expected.float())


SOLVERS = {
    "hard": {"neurons": "all"}, "soft": {"neurons": "all", "regularizer": "covariance", "L2": 0.3},
    "restricted": {"solve": "restricted", "regularizer": "covariance", "L2": 0.3, "mom2_update_weight": 10.0},
    "compensated": {"solve": "compensated", "nullspace_threshold": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_consolidation_is_the_dense_solution_of_all_edits_that_count(begin, tiny, requests, kind, name):
    records = requests(5)
    editor = edited(begin(kind, ratio="fixed", general_ratio=0.2, specific_ratio=0.2, **SOLVERS[name]), records)
    editor.apply([{**records[1], "target_new": "Rome"}])
    editor.undo(4)
    apart, calls = picture(editor)[0], {i: call for i, call in editor.state.counting}
    editor.consolidate()
    assert list(calls) == [1, 3, 5, 6]
    event = editor.state.events[-1]
    assert event.edits == (1, 3, 5, 6) and event.last == 6 and [s.count for s in editor.state.solvers.values()] == [4, 4]
    masks = consolidation.union([call.masks for call in calls.values()])
    assert all(0.2 < mask.double().mean() < 0.95 for mask in masks.values())
    assert_at_once(editor, tiny(kind)[0], masks or None)
    assert all((picture(editor)[0][layer] - weight).norm() > 1e-3 for layer, weight in apart.items())


def test_of_the_embedded_model_too(atlas, statistics):
    """NMKE+'s regulariser, values solved in a hurry."""
    settings = dataclasses.replace(
        NMKEHyperParams.from_hparams("atlas-plus"), model_name=atlas, stats_dir=statistics, mom2_n_samples=200, layers=[0, 1],
        key_contexts="templates", locality_prompts=[], locality_factor=0, v_num_grad_steps=3, v_extra_steps=0,
    )  # fmt: skip
    editor = edited(LifelongEditor.from_hparams(settings), embedded.requests(6, "tune"))
    editor.consolidate()
    assert_at_once(editor, embedded.load()[0])


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_other_methods_that_solve_values(tiny, requests, tmp_path, method):
    """One batch of all requests with the same values does the same."""
    ends = []
    for several in (True, False):
        model, tok = tiny("llama")
        values = dict(
            model_name=(model, tok), device="cpu", v_num_grad_steps=2, v_loss_layer=None, stats_dir=str(tmp_path), blue=True
        )
        editor = LifelongEditor.from_hparams(dataclasses.replace(read(f"{method}/atlas"), **values, layers=[0, 2]))
        if several:
            edited(editor, requests(3)).consolidate()
            z = torch.cat([call.z for _, call in editor.state.counting], 1)
        else:
            from easyedit_nmke.methods.contract import apply_method

            again = partial(editor.method.replay, z=z)
            apply_method(editor.method, model, tok, requests(3), editor.hparams, state=editor.state, edit=again)
        ends.append(picture(editor))
    assert_same(*ends)


def test_masks_are_not_switched_on_or_off_within_one_state(begin, requests):
    """A joint solution would not know which neurons an edit without a mask wrote."""
    editor = begin()
    editor.apply(requests(1))
    editor.hparams.neurons = "all" if editor.hparams.neurons != "all" else "both"
    with pytest.raises(ValueError, match="opened with other settings"):
        editor.apply(requests(2)[1:])


def test_what_cannot_be_consolidated_says_why(begin, tiny, requests, tmp_path):
    editor = begin()
    with pytest.raises(ValueError, match="there are no edits"):
        editor.consolidate()
    edited(editor, requests(1)).consolidate()
    with pytest.raises(ValueError, match="edits up to 1 are consolidated already"):
        editor.consolidate()
    with pytest.raises(ValueError, match=r"edit 1 was consolidated with those up to 1, .* undo it by `LifelongEditor.undo`"):
        editor.state.undo(1)
    editor.undo(1)
    assert_same(picture(editor)[:1], picture(begin())[:1])
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="changed by something else between edits"):
        edited(editor, requests(2)).consolidate()
    model, tok = tiny("llama")
    settings = dataclasses.replace(read("ROME/atlas"), model_name=(model, tok), device="cpu", v_num_grad_steps=1, layers=[1],
                                   v_loss_layer=None, stats_dir=str(tmp_path))  # fmt: skip
    with pytest.raises(ValueError, match="edits of ROME cannot be solved again from their values"):
        edited(LifelongEditor.from_hparams(settings), requests(1)).consolidate()


# ---- going back and forth


CASES = [
    ("llama", torch.float32, {"neurons": "all"}), ("gpt2", torch.bfloat16, {"solve": "restricted"}),
    ("llama", torch.bfloat16, {"solve": "compensated", "regularizer": "covariance", "L2": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "overrides"), CASES, ids=lambda x: str(x))
def test_rollback_passes_over_it_to_the_bit_and_disk_keeps_it(begin, requests, kept_in, kind, dtype, overrides):
    editor, records, seen = begin(kind, dtype, state_dir=kept_in, **overrides), requests(5), {}
    for number, record in enumerate(records, 1):
        editor.apply([record])
        seen[number] = picture(editor)
        if number == 3:
            editor.consolidate()
            seen["at once"] = picture(editor)
    with editor.state.as_of(3):  # as when edit 4 was made
        assert_same(picture(editor)[:1], seen["at once"][:1])
    with editor.state.as_of(2):
        assert_same(picture(editor)[:1], seen[2][:1])
    editor.undo(2)
    undone = picture(editor)
    editor.close()
    editor = begin(kind, dtype, state_dir=kept_in, **overrides)
    editor.open()
    assert_same(picture(editor), undone)
    for to in (5, 4, 3, 2):
        editor.state.rollback(to)
        assert_same(picture(editor), seen[to])
    editor.apply([records[2]])
    assert_same(picture(editor), seen[3])
    editor.consolidate()
    assert_same(picture(editor), seen["at once"])
    for number in (4, 5):
        editor.apply([records[number - 1]])
        assert_same(picture(editor), seen[number])
    editor.state.rollback(0)
    fresh = begin(kind, dtype, **overrides)
    assert_same(picture(editor)[:1], picture(fresh)[:1])


def test_undo_solves_it_again_without_the_edit_and_leaves_later_ones(begin, requests, kept_in):
    records = requests(6)
    editor = edited(begin(state_dir=kept_in), records[:4])
    editor.consolidate()
    edited(editor, records[4:])
    later = editor.state.events[-2:]
    with pytest.raises(ValueError, match="edit 2 was consolidated"):
        editor.state.undo(2)
    editor.undo(2)
    state = editor.state
    assert standing(state.events)[2] == "undone" and state.memory.columns == [1, 3, 4, 5, 6]
    assert isinstance(state.events[-1], Consolidation) and state.events[-1].edits == (1, 3, 4) and state.events[-1].last == 4
    # the same as if the four had been consolidated without it, and the later updates added
    other = edited(begin(), records[:4])
    other.undo(2)
    other.consolidate()
    for name, weight in other.state.weights.now.items():
        expected = torch.empty_like(weight)
        bases, _ = other.state.changes()
        made = [update for edit in (other.state.events[-1], *later) for update in edit.updates]
        accumulate(expected, bases[name], of_parameter(made, name))
        assert torch.equal(editor.state.weights.now[name], expected)
    editor.undo(6)  # a later one, alone: no solve
    assert state.last == 6 and not isinstance(state.events[-1], Consolidation) and state.memory.columns == [1, 3, 4, 5]
    end = picture(editor)
    editor.close()
    again = begin(state_dir=kept_in)
    again.open()
    assert_same(picture(again), end)
    again.close()
    with pytest.raises(ValueError, match="edit 1 was consolidated with those up to 4"):
        durable.undo(kept_in, 1)


def test_a_superseded_edit_comes_back_with_its_key_as_consolidated(begin, requests):
    records = requests(3)
    editor = edited(begin(), records)
    editor.consolidate()
    before = picture(editor)
    editor.apply([{**records[0], "target_new": "Rome"}])
    assert editor.state.memory.columns == [2, 3, 4]
    editor.undo(2)
    assert editor.state.consolidation.edits == (1, 3) and editor.state.memory.columns == [3, 4]  # 4 was solved on top of 1
    editor.state.rollback(4)
    editor.undo(4)
    assert_same(picture(editor)[:1], before[:1])
    assert sorted(editor.state.memory.columns) == [1, 2, 3]
    whole = editor.state.consolidation
    editor.state.solvers[0].truncate(2)
    editor.state.solvers[0].append(whole.keys[0][:, :1])  # what came back last
    assert torch.equal(picture(editor)[2]["0 keys"], editor.state.solvers[0].memory()["keys"])


def test_later_edits_are_solved_again_and_consolidated_where_they_were(begin, requests):
    records = requests(5)
    editor = edited(begin(neurons="all"), records[:3])
    editor.consolidate()
    edited(editor, records[3:])
    values = {call.requests[0]["prompt"]: call.z for _, call in editor.state.counting}
    editor.undo(3)
    editor.undo(2, resolve=True)
    kinds = [type(event).__name__ for event in editor.state.events]
    assert kinds == ["Edit", "Consolidation", "Edit", "Edit"] and editor.state.consolidation.edits == (1,)
    assert all(torch.equal(call.z, values[call.requests[0]["prompt"]]) for _, call in editor.state.counting)


# ---- every so many edits


def test_a_run_that_is_stopped_anywhere_in_it_ends_with_the_same_bits(begin, requests, tmp_path, monkeypatch):
    """Copies of the folder made on the way are what kills at these moments would leave."""
    records, copies = requests(5), []
    begin = partial(begin, consolidate_every=2)
    whole = begin(state_dir=str(tmp_path / "whole"))

    def leave(*_):
        copies.append(shutil.copytree(tmp_path / "whole", tmp_path / f"copy {len(copies)}"))

    real = {name: getattr(durable.Book, name) for name in ("edit", "consolidation")}

    def noted(name):
        def call(book, event):
            leave()
            real[name](book, event)
            leave()

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(durable.Book, name, noted(name))
        edited(whole, records)
    end, kinds = picture(whole), [type(event).__name__ for event in whole.state.events]
    assert kinds == ["Edit", "Edit", "Consolidation", "Edit", "Edit", "Consolidation", "Edit"] and len(copies) == 14
    assert_same(picture(edited(begin(), records)), end)
    for copy in copies[2:6] + copies[9:11]:
        again = edited(begin(state_dir=str(copy)), records)
        assert_same(picture(again), end)
        assert [type(event).__name__ for event in again.state.events] == kinds
        again.close()
    whole.state.rollback(4)  # before the second one, which is due before the next edit
    edited(whole, records[4:])
    assert_same(picture(whole), end)


def test_a_run_scores_what_was_consolidated(begin, requests):
    editor = begin(consolidate_every=2, neurons="all")
    scorer = Scorer(editor.model, editor.tok, [Request.from_dict(record) for record in requests(2)])
    lines = [event.line for event in Segment(editor, scorer, "NMKE", 0, stamp(editor)).run([1, 2]) if hasattr(event, "line")]
    again, lengths = edited(begin(neurons="all"), requests(2)), []
    for change in (lambda: None, again.consolidate):
        change()
        lengths.append(again.state.weights.change(ModelView(again.model).weight_name(0)).norm().item())
    assert lengths[0] != pytest.approx(lengths[1], rel=1e-3)
    start = again.state.weights.bases[0][2][ModelView(again.model).weight_name(0)].norm().item()
    assert lines[1]["drift"]["0"]["frobenius"] == pytest.approx(lengths[1] / start, rel=1e-4)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("undone", [None, 1])
def test_one_that_fails_leaves_weights_log_and_files_as_they_were(begin, requests, kept_in, monkeypatch, error, undone):
    editor = edited(begin(dtype=torch.bfloat16, state_dir=kept_in), requests(3))
    if undone:
        editor.consolidate()
    before, events = picture(editor), list(editor.state.events)
    with Journal.open(kept_in, write=False) as journal:
        told = durable.history(journal, tensors=False)[0]
    for place, name in ((LifelongState, "write"), (durable.Book, "consolidation")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                editor.undo(undone) if undone else editor.consolidate()
        assert_same(picture(editor), before)
        assert editor.state.events == events
    with Journal.open(kept_in, write=False) as journal:
        now = durable.history(journal, tensors=False)[0]
    assert [(type(a), a.digest) for a in now] == [(type(a), a.digest) for a in told]
    editor.close()
    again = begin(dtype=torch.bfloat16, state_dir=kept_in)
    again.open()
    assert_same(picture(again), before)


@pytest.mark.parametrize(
    "error",
    [Unsolvable("no digits are left"), torch.cuda.OutOfMemoryError("out of memory"), OSError("No space left on device")],
    ids=repr,
)
def test_what_cannot_be_solved_stays_as_it_was_and_the_run_goes_on(begin, requests, monkeypatch, caplog, error):
    plain = picture(edited(begin(), requests(2)))
    editor = begin(consolidate_every=2)
    editor.apply(requests(1))
    with monkeypatch.context() as patch:
        patch.setattr(LifelongState, "consolidate", lambda *_: (_ for _ in ()).throw(error))
        editor.apply(requests(2)[1:])
    assert f"the edits up to 2 are not consolidated: {error}" in caplog.text
    assert_same(picture(editor), plain)
    editor.apply(requests(3)[2:])
    assert [type(event).__name__ for event in editor.state.events] == ["Edit", "Edit", "Consolidation", "Edit"]


# ---- told and given to others


def test_the_shell_consolidates_tells_it_and_exports_it(requests, statistics, tmp_path, capsys, monkeypatch):
    from easyedit_nmke import cli

    monkeypatch.setenv("COLUMNS", "300")
    values = dict(model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=2, mom2_n_samples=200, mom2_dataset="atlas")
    folder, settings = tmp_path / "state", NMKEHyperParams(
        **values, nullspace_fraction=0.9, neurons="all", stats_dir=statistics, state_dir=str(tmp_path / "state")
    )  # fmt: skip
    editor = edited(LifelongEditor.from_hparams(settings), requests(3))
    editor.state.note({"segment": {"line": {"checkpoint": 3, "scores": {}}}})
    assert kept._card(editor, {}).evaluation
    editor.close()

    def run(*argv):
        capsys.readouterr()
        status = cli.main(list(map(str, argv)))
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    assert "Consolidated after edit 3: 3 edits solved at once, " in run("consolidate", folder)
    assert "edits up to 3 are consolidated already" in run("consolidate", folder)
    assert requests(1)[0]["prompt"] in run("undo", folder, 1)
    listed = run("log", folder)
    assert "Consolidated after edit 3: 3 edits solved at once" in listed and "(another came after it)" in listed
    assert "Consolidated after edit 3: 2 edits solved at once" in listed and listed.count("effective") == 2
    for to in ("delta", "lora"):
        assert "says how to load it" in run("export", folder, "--to", to)
    assert "None were taken." in (folder / "delta" / "README.md").read_text()  # the scores are not this model's
    editor = kept.open_editor(folder)
    model, _ = embedded.load()
    load_delta(model, folder / "delta")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), editor.model.parameters(), strict=True))
    editor.close()
