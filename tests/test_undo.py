"""Taking edits back: rollback, undo and re-editing, to the bit, with and without float32 masters."""

import dataclasses

import pytest
import torch

from easyedit_nmke import LifelongEditor, NMKEHyperParams
from easyedit_nmke import atlas as embedded
from easyedit_nmke.history.log import standing
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods import read
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import accumulate, of_parameter
from easyedit_nmke.scores import metrics


@pytest.fixture
def begin(tiny, nmke_hparams):
    """begin(kind="llama", dtype=float32, **overrides) -> an editor of a fresh tiny model."""

    def make(kind="llama", dtype=torch.float32, **overrides):
        model, tok = tiny(kind)
        overrides = {"v_num_grad_steps": 2, **overrides}
        return LifelongEditor.from_hparams(nmke_hparams(model.to(dtype), tok, **overrides))

    return make


def picture(editor):
    """Everything that a rollback brings back."""
    state = editor.state
    weights = {layer: editor.model.get_parameter(name).detach().clone() for layer, name in _names(editor).items()}
    masters = {layer: master.clone() for layer, master in state.weights.masters.items()}
    memory = {f"{layer} {name}": t.clone() for layer, s in state.solvers.items() for name, t in s.memory().items()}
    return weights, masters, memory


def _names(editor):
    from easyedit_nmke.models.arch import ModelView

    return {layer: ModelView(editor.model).weight_name(layer) for layer in editor.hparams.layers}


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


CASES = [
    ("llama", torch.float32, {}), ("llama", torch.bfloat16, {}), ("gpt2", torch.float32, {"solve": "restricted"}),
    ("gpt2", torch.bfloat16, {"neurons": "all"}),
    ("gpt2", torch.bfloat16, {"solve": "compensated", "regularizer": "covariance"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "overrides"), CASES, ids=lambda x: str(x))
def test_rollback_gives_every_earlier_state_to_the_bit(begin, requests, kind, dtype, overrides):
    editor, seen, records = begin(kind, dtype, **overrides), [], requests(5)
    editor.state.follow(_followed(editor))
    for record in records:
        seen.append(picture(editor))
        editor.apply([record])
    last = picture(editor)
    with editor.state.as_of(2):
        assert_same(picture(editor)[:1], seen[2][:1])
    assert_same(picture(editor), last)
    for t in (4, 2):
        editor.state.rollback(to=t)
        assert_same(picture(editor), seen[t])
        assert editor.state.edits == editor.state.last == t
    for record in records[2:]:
        editor.apply([record])
    assert_same(picture(editor), last)
    editor.state.rollback(0)
    assert_same(picture(editor), seen[0])


def _followed(editor):
    return editor.method.matrices(editor.model, editor.hparams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_leaves_the_sum_of_the_other_updates_and_their_keys(begin, requests, dtype):
    editor = begin(dtype=dtype)
    start = {layer: weight.clone() for layer, weight in _followed(editor).items()}
    for record in requests(4):
        editor.apply([record])
    state = editor.state
    log = list(state.events)
    state.undo(2)
    for layer, (name, weight) in zip(editor.hparams.layers, _followed(editor).items(), strict=True):
        expected = torch.empty_like(weight)
        accumulate(expected, start[name], of_parameter((u for edit in (log[0], log[2], log[3]) for u in edit.updates), name))
        assert torch.equal(weight, expected)
        solver = type(state.solvers[layer])(state.solvers[layer].basis, state.solvers[layer].l2, null=state.solvers[layer].null)
        solver.append(log[0].keys[layer].float())
        for edit in (log[2], log[3]):
            solver.append(edit.keys[layer].float())
        for name, tensor in solver.memory().items():
            assert torch.allclose(state.solvers[layer].memory()[name], tensor, rtol=1e-10, atol=1e-10)
    assert standing(state.events) == {1: "effective", 2: "undone", 3: "effective", 4: "effective"}
    editor.apply(requests(5)[4:])
    assert state.last == 5
    for wrong, said in ((2, "undone already"), (9, "no edit 9; edits are 1 to 5")):
        with pytest.raises(ValueError, match=said):
            state.undo(wrong)
    state.rollback(4)  # as it was after edit 4: with edit 2
    assert state.events == log


def test_a_request_of_a_batch_is_undone_alone(begin, requests):
    editor = begin(batch_size=3)
    records = requests(5)
    editor.apply(records[:3])
    editor.apply(records[3:])
    first, second = editor.state.events
    editor.state.undo(2)
    assert editor.state.solvers[0].count == 4
    for name, weight in _followed(editor).items():
        expected = torch.empty_like(weight)
        first_update, second_update = (of_parameter(edit.updates, name)[0] for edit in (first, second))
        accumulate(expected, editor.state.weights.bases[0][2][name], [first_update.without({1}), second_update])
        assert torch.equal(weight, expected)
    with pytest.raises(ValueError, match="edits 1 to 3 share one update; go to 0 or 3"):
        editor.state.rollback(2)


def test_a_new_answer_to_an_edited_prompt_takes_the_place_of_its_key(begin, requests):
    editor = begin()
    one, two = requests(2)
    editor.apply([one])
    editor.apply([two])
    before = picture(editor)
    editor.apply([{**one, "prompt": " ".join([*one["prompt"].split()[:-1], "", one["prompt"].split()[-1]]), "target_new": "Rome"}])
    state = editor.state
    assert standing(state.events) == {1: "superseded by 3", 2: "effective", 3: "effective"}
    assert state.solvers[0].count == 2 and state.memory.columns == [2, 3]
    with pytest.raises(ValueError, match="edit 1 is superseded by 3; undo 3 first, which brings 1 back"):
        state.undo(1)
    state.undo(3)
    assert standing(state.events)[1] == "effective" and sorted(state.memory.columns) == [1, 2]
    assert_same(picture(editor)[:1], before[:1])
    state.rollback(2)
    assert_same(picture(editor), before)


def test_a_failed_new_answer_leaves_the_old_one_and_its_key(begin, requests, monkeypatch):
    editor = begin(dtype=torch.bfloat16)
    one, two = requests(2)
    editor.apply([one])
    editor.apply([two])
    before = picture(editor)
    monkeypatch.setattr(LifelongState, "write", lambda *args: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        editor.apply([{**one, "target_new": "Rome"}])
    assert_same(picture(editor), before)
    assert standing(editor.state.events) == {1: "effective", 2: "effective"}


def test_after_a_rollback_the_next_report_is_that_of_a_process_that_opened_the_folder(begin, requests, tmp_path):
    overlaps = []
    for name in ("live", "opened"):
        kept_in = str(tmp_path / name)
        editor = begin(state_dir=kept_in)
        for record in requests(2):
            editor.apply([record])
        editor.state.rollback(1)
        if name == "opened":
            editor.close()
            editor = begin(state_dir=kept_in)
        editor.apply(requests(3)[2:])
        overlaps.append(editor.state.reports[-1].overlap)
        editor.close()
    assert overlaps[0] and overlaps[0] == overlaps[1]


@pytest.mark.parametrize("method", ["MEMIT", "ROME"])
def test_methods_without_a_memory_are_undone_too(tiny, requests, tmp_path, method):
    model, tok = tiny("llama")
    changes = dict(model_name=(model, tok), device="cpu", v_num_grad_steps=2, v_loss_layer=None, stats_dir=str(tmp_path))
    settings = dataclasses.replace(read(f"{method}/atlas"), **changes)
    settings.layers = settings.layers[:2]
    editor = LifelongEditor.from_hparams(settings)
    records = requests(3)
    start = picture(editor)
    editor.apply(records[:1])
    one = picture(editor)
    editor.apply(records[1:])
    editor.state.undo(2)
    editor.state.undo(3)
    assert_same(picture(editor)[:1], one[:1])
    editor.state.rollback(0)
    assert_same(picture(editor)[:1], start[:1])


def test_what_cannot_be_taken_back_says_why(tiny, requests, begin, caplog):
    model, tok = tiny("llama")
    settings = dataclasses.replace(read("FT/atlas"), model_name=(model, tok), device="cpu", num_steps=1, layers=[0])
    editor = LifelongEditor.from_hparams(settings)
    editor.apply(requests(1))
    with pytest.raises(ValueError, match="updates of FT are not kept"):
        editor.state.undo(1)
    editor = begin()
    editor.apply(requests(1))
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    changed = picture(editor)
    editor.apply(requests(2)[1:])
    assert "changed by something else since edit 1" in caplog.text
    with pytest.raises(ValueError, match="changed by something else after that edit"):
        editor.state.undo(1)
    editor.state.rollback(1)
    assert_same(picture(editor)[:1], changed[:1])


def test_masters_follow_weights_that_are_put_back(begin, requests):
    """As EasyEdit's restore_after_edit does: by name, into the parameters, without a word to the state."""
    editor, records = begin(dtype=torch.bfloat16), requests(3)
    editor.apply(records[:1])
    before = picture(editor)
    originals = editor.apply(records[1:2])
    with torch.no_grad():
        for name, value in originals.items():
            editor.model.get_parameter(name).copy_(value)
    editor.apply(records[2:])
    after = picture(editor)
    editor.state.rollback(1)
    assert_same(picture(editor), before)
    editor.apply(records[2:])
    assert_same(picture(editor), after)
    other = begin(dtype=torch.bfloat16)
    for record in (records[0], records[2]):
        other.apply([record])
    assert_same(picture(other), after)


def test_small_updates_are_not_rounded_away(begin, requests, monkeypatch):
    """The weights are the master's rounding; without a master, small changes of large weights are lost."""
    ends = {}
    for name in ("exact", "masters", "none"):
        editor = begin(dtype=torch.float32 if name == "exact" else torch.bfloat16)
        state, start = editor.state, {layer: weight.clone() for layer, weight in _followed(editor).items()}
        state.follow(_followed(editor))
        if name == "none":
            state.weights.masters = {}
        g = torch.Generator().manual_seed(0)
        for _ in range(200):
            from easyedit_nmke.history.log import EditReport
            from easyedit_nmke.models.updates import LowRank

            report = EditReport(1)
            for layer in _followed(editor):
                update = LowRank(layer, 1e-4 * torch.ones(32, 1), 0.5 + torch.rand(1, 96, generator=g))
                state.write(update, report)
            state.advance(report)
        ends[name] = {layer: weight.float() - start[layer].float() for layer, weight in _followed(editor).items()}
    for layer, exact in ends["exact"].items():
        lost = {name: ((ends[name][layer] - exact).norm() / exact.norm()).item() for name in ("masters", "none")}
        assert lost["masters"] < 0.1 < 0.5 < lost["none"], lost


def test_later_edits_are_solved_again_without_the_one_that_is_taken_out(begin, requests, tmp_path, monkeypatch):

    records = requests(5)
    editor = begin(state_dir=str(tmp_path / "state"))
    for record in records:
        editor.apply([record])
    editor.undo(1)
    values = [event.z for event in editor.state.events if hasattr(event, "z")]
    before = picture(editor)
    monkeypatch.setattr(LifelongState, "write", lambda *args: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        editor.undo(3, resolve=True)
    monkeypatch.undo()
    assert_same(picture(editor), before)
    editor.undo(3, resolve=True)
    state = editor.state
    assert standing(state.events) == {1: "undone", 2: "effective", 3: "effective", 4: "effective"}
    assert [event.requests[0]["prompt"] for event in state.events if hasattr(event, "z")] == [
        records[i]["prompt"] for i in (0, 1, 3, 4)
    ]
    made = [event.z for event in state.events if hasattr(event, "z")]
    assert all(torch.equal(made[i], values[j]) for i, j in ((0, 0), (1, 1), (2, 3), (3, 4)))
    end = picture(editor)
    editor.close()
    again = begin(state_dir=str(tmp_path / "state"))
    again.state.as_of(0)
    assert_same(picture(again), end)
    again.close()


# ---- on the embedded model


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Where the covariance of the embedded model is kept for all tests."""
    return str(tmp_path_factory.mktemp("statistics"))


@pytest.fixture
def known(atlas, statistics):
    changes = dict(model_name=atlas, neurons="all", stats_dir=statistics, mom2_n_samples=400)
    return LifelongEditor.from_hparams(dataclasses.replace(NMKEHyperParams.from_hparams("atlas"), **changes))


def says(editor, request):
    return metrics.token_accuracy(editor.model, editor.tok, [(request.prompt, request.target_new)])[0]


def test_after_undo_the_old_answer_is_back_and_the_others_stay(known):
    asked = [Request.from_dict(r) for r in embedded.requests(12, "tune")]
    for request in asked:
        known.apply([request])
    held = [says(known, request) for request in asked]
    assert held[4] == 1 and sum(held) >= 11
    known.state.undo(5)
    old = dataclasses.replace(asked[4], target_new=asked[4].ground_truth)
    assert says(known, asked[4]) < 1 and says(known, old) == 1
    assert [says(known, request) for request in asked[:4] + asked[5:]] == held[:4] + held[5:]
    known.state.rollback(0)
    assert all(torch.equal(p, q) for p, q in zip(known.model.parameters(), embedded.load()[0].parameters(), strict=True))


def test_the_tenth_new_answer_to_a_prompt_works_as_well_as_the_first(known):
    fact, *others = [Request.from_dict(r) for r in embedded.requests(5, "tune")]
    for request in others:
        known.apply([request])
    like = [
        r for r in embedded.requests(400, "tune") if r["prompt"].replace(r["subject"], "") == fact.prompt.replace(fact.subject, "")
    ]
    answers = (list(dict.fromkeys(r["target_new"] for r in like)) * 10)[:10]
    assert len(set(answers)) >= 3
    for answer in answers:
        request = dataclasses.replace(fact, target_new=answer)
        known.apply([request])
        assert says(known, request) == 1, answer
    assert known.state.solvers[0].count == 5
    assert all(says(known, request) == 1 for request in others)


def test_bfloat16_edits_hold_as_float32_ones_do(known):
    """A quick look; 500 edits are measured elsewhere."""
    asked = [Request.from_dict(r) for r in embedded.requests(10, "tune")]
    model = embedded.load()[0].to(torch.bfloat16)
    half = LifelongEditor.from_hparams(dataclasses.replace(known.hparams, model_name=(model, known.tok)))
    for request in asked:
        known.apply([request])
        half.apply([request])
    assert isinstance(half.state, LifelongState) and len(half.state.weights.masters) == 3
    held = [sum(says(editor, request) for request in asked) for editor in (known, half)]
    assert held[1] >= held[0] - 1
