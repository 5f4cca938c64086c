"""A state on disk: the same bits in another process, faults that lose nothing, states that are not taken for another's."""

import copy
import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from easyedit_nmke import LifelongEditor, open_state
from easyedit_nmke.history import durable
from easyedit_nmke.history.journal import Journal
from easyedit_nmke.history.log import Edit, EditReport, standing
from easyedit_nmke.methods import alphaedit, read
from easyedit_nmke.models.updates import Dense, LowRank, fingerprint


@pytest.fixture
def begin(tiny, nmke_hparams, tmp_path):
    """begin(kind="llama", dtype=float32, **overrides) -> an editor of a fresh tiny model with its state in tmp_path/state."""
    opened = []

    def make(kind="llama", dtype=torch.float32, **overrides):
        model, tok = tiny(kind)
        overrides = {"v_num_grad_steps": 2, "state_dir": str(tmp_path / "state"), **overrides}
        opened.append(LifelongEditor.from_hparams(nmke_hparams(model.to(dtype), tok, **overrides)))
        return opened[-1]

    yield make
    for editor in opened:
        editor.close()


def bits(editor) -> dict:
    """Weights, masters and past keys."""
    state = editor.state
    found = {f"weight {layer}": weight.clone() for layer, weight in editor.method.matrices(editor.model, editor.hparams).items()}
    found |= {f"master {layer}": master.clone() for layer, master in state.weights.masters.items()}
    return found | {f"{layer} {name}": t.clone() for layer, s in state.solvers.items() for name, t in s.memory().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_large_statistics_stay_in_their_file_which_the_state_names_by_its_digest(begin, requests, monkeypatch, tmp_path):
    records = requests(3)
    whole = begin()
    for record in records:
        whole.apply([record])
    base = tmp_path / "state" / "base.safetensors"
    assert base.stat().st_size > 10_000
    monkeypatch.setattr(alphaedit, "LARGE", 0)
    first = begin(state_dir=str(tmp_path / "lean"))
    for record in records[:2]:
        first.apply([record])
    first.close()
    assert (tmp_path / "lean" / "base.safetensors").stat().st_size < 1000
    again = begin(state_dir=str(tmp_path / "lean"))
    again.apply([records[2]])
    assert_same(bits(again), bits(whole))
    again.close()
    (file,) = (tmp_path / "stats").glob("eigenvectors_1_*")
    content = file.read_bytes()
    for damaged, said in (
        (content[:-4] + b"\0\0\0\1", "is not the file that this state"),
        (content[:99], "cannot be read"),
        (None, "is not there"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            begin(state_dir=str(tmp_path / "lean")).open()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / file.name).write_bytes(content)
    (other,) = (tmp_path / "stats").glob("eigenvectors_0_*")
    other.rename(tmp_path / "elsewhere" / other.name)
    assert_same(bits(begin(state_dir=str(tmp_path / "lean"), stats_dir=str(tmp_path / "elsewhere"))), bits(whole))


CASES = [
    ("llama", torch.float32, {}), ("llama", torch.bfloat16, {}), ("gpt2", torch.float32, {"solve": "restricted"}),
    ("gpt2", torch.bfloat16, {"mask": "soft"}),
    ("gpt2", torch.bfloat16, {"solve": "compensated", "regularizer": "covariance"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "overrides"), CASES, ids=lambda x: str(x))
def test_a_reopened_state_has_the_same_bits_and_goes_on_with_the_same(begin, requests, kind, dtype, overrides):
    records = requests(6)
    whole = begin(kind, dtype, **overrides, state_dir=None)
    first = begin(kind, dtype, **overrides)
    for editor in (whole, first):
        for record in (*records[:4], {**records[1], "target_new": "Rome"}):
            editor.apply([record])
        editor.state.undo(3)
    assert_same(bits(whole), bits(first))
    first.close()
    again = begin(kind, dtype, **overrides)
    assert_same(bits(again), bits(whole))
    assert [report.to_dict() for report in again.state.reports] == [report.to_dict() for report in first.state.reports]
    for editor in (whole, again):
        editor.apply([records[4]])
        editor.state.rollback(5)
        editor.apply([records[5]])
    assert_same(bits(again), bits(whole))
    last, expected = again.state.reports[-1], whole.state.reports[-1]
    assert (last.density, last.overlap, last.residual) == (expected.density, expected.overlap, expected.residual)
    again.close()
    final = begin(kind, dtype, **overrides)
    assert_same(bits(final), bits(whole))
    assert standing(final.state.events) == standing(whole.state.events)
    final.state.rollback(0)
    fresh = begin(kind, dtype, **overrides, state_dir=None)
    for layer, weight in fresh.method.matrices(fresh.model, fresh.hparams).items():
        assert torch.equal(weight, bits(final)[f"weight {layer}"])


SCRIPT = """
import sys
import torch
from conftest import tiny_model
from transformers import PreTrainedTokenizerFast
from easyedit_nmke import LifelongEditor, NMKEHyperParams, atlas
from easyedit_nmke.models.updates import fingerprint
tok = PreTrainedTokenizerFast.from_pretrained(atlas.DIRECTORY)
model = tiny_model("llama", len(tok)).to(torch.bfloat16)
values = dict(model_name=(model, tok), layers=[0, 1], device="cpu", v_num_grad_steps=2, v_lr=0.5, mom2_dataset="atlas",
    mom2_n_samples=50, nullspace_threshold=0.3, L2=0.1, stats_dir=sys.argv[1], state_dir=sys.argv[2] if len(sys.argv) > 3 else None)
editor = LifelongEditor.from_hparams(NMKEHyperParams(**values))
for request in atlas.requests(int(sys.argv[3]) if len(sys.argv) > 3 else 4, "tune"):
    editor.apply([request])
print(fingerprint(dict(model.named_parameters())))
"""


def test_a_run_in_two_processes_ends_like_one_in_a_single_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}

    def run(*arguments):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "stats"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    whole = run()
    assert run(str(tmp_path / "state"), "2") != whole
    assert run(str(tmp_path / "state"), "4") == whole


def test_what_an_earlier_process_did_is_claimed_once(begin, requests):
    one, two, three = requests(3)
    first = begin()
    for record in (one, two):
        first.apply([record])
    first.close()
    again = begin()
    assert again.state.claimed == 0 and again.state.last == 2
    before = again.apply([one])
    assert again.state.last == 2 and again.state.claimed == 1
    assert all(torch.equal(again.model.get_parameter(name), weight) for name, weight in before.items())
    again.apply([three])
    assert again.state.last == 3
    again.apply([two])
    assert again.state.last == 3
    again.apply([two])  # asked for a second time: edited anew
    assert again.state.last == 4 and standing(again.state.events)[2] == "superseded by 4"


def test_a_fact_that_was_edited_twice_is_claimed_twice(begin, requests):
    one, two, three = requests(3)
    script = [one, two, {**one, "target_new": "Rome"}, three]
    whole = begin(state_dir=None)
    for record in script:
        whole.apply([record])
    first = begin()
    for record in script[:3]:
        first.apply([record])
    first.close()
    again = begin()
    for record in script:
        again.apply([record])
    assert list(standing(again.state.events).values()) == ["superseded by 3", "effective", "effective", "effective"]
    assert_same(bits(again), bits(whole))


def test_edits_that_are_taken_back_are_not_kept(begin, requests, tmp_path):
    """So that a process that is killed between such an edit and its taking back leaves nothing of it."""
    editor = begin()
    editor.apply(requests(1))
    before, kept = bits(editor), (tmp_path / "state" / "index.jsonl").read_bytes()
    results, _, weights = editor.edit([], [], requests=requests(3)[1:], sequential_edit=False, verbose=False)
    assert all(result["post"]["rewrite_acc"] for result in results)
    assert (tmp_path / "state" / "index.jsonl").read_bytes() == kept
    assert_same(bits(editor), before)
    assert all(torch.equal(weight, editor.model.get_parameter(name)) for name, weight in weights.items())
    editor.apply(requests(2)[1:])
    end = bits(editor)
    editor.close()
    again = begin()
    again.open()
    assert_same(bits(again), end)


def test_a_model_of_another_dtype_than_the_settings_is_opened_by_its_folder(begin, requests, tmp_path):
    first = begin(dtype=torch.bfloat16, stats_dir=tmp_path / "stats")
    assert first.hparams.dtype == "float32"
    first.model.save_pretrained(tmp_path / "model")
    first.tok.save_pretrained(tmp_path / "model")
    first.apply(requests(1))
    end = bits(first)
    first.close()
    again = LifelongEditor.of_folder(tmp_path / "state", model=str(tmp_path / "model"))
    assert again.model.dtype == torch.bfloat16
    assert_same(bits(again), end)
    again.close()


def test_edit_scores_before_what_was_there_before_the_first_process(begin, requests):
    asked = requests(2)
    first = begin()
    results, _, unedited = first.edit([], [], requests=asked, verbose=False)
    end = bits(first)
    first.close()
    again = begin()
    repeated, _, before = again.edit([], [], requests=asked, verbose=False)
    assert before.keys() == unedited.keys() and all(torch.equal(before[name], unedited[name]) for name in before)
    assert [r["pre"] for r in repeated] == [r["pre"] for r in results]
    assert [r["final"] for r in repeated] == [r["final"] for r in results]
    assert_same(bits(again), end)


def test_notes_are_kept_and_claim_what_came_before(begin, requests):
    records = requests(3)
    first = begin()
    first.apply(records[:1])
    first.state.note({"seen": 1})
    first.apply(records[1:2])
    first.close()
    again = begin()
    assert again.state.notes == [(1, {"seen": 1})] and again.state.claimed == 1
    again.state.rollback(0)
    assert again.state.notes == []
    again.close()
    assert begin().state.notes == []


# ---- faults


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_an_edit_that_cannot_be_recorded_is_not_made(begin, requests, monkeypatch, error):
    records = requests(3)
    editor = begin(dtype=torch.bfloat16)
    editor.apply(records[:1])
    before = bits(editor)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", lambda *args: (_ for _ in ()).throw(error))
        for change in (
            lambda: editor.apply(records[1:2]), lambda: editor.apply([{**records[0], "target_new": "Rome"}]),
            lambda: editor.state.undo(1), lambda: editor.state.rollback(0),
        ):  # fmt: skip
            with pytest.raises(type(error)):
                change()
            assert_same(bits(editor), before)
            assert standing(editor.state.events) == {1: "effective"}
    editor.apply(records[1:2])
    end = bits(editor)
    editor.close()
    assert_same(bits(begin(dtype=torch.bfloat16)), end)


def test_a_disk_that_is_full_when_weights_are_put_back_loses_no_edit(begin, requests, monkeypatch):
    """As EasyEdit puts them back, behind the state's back."""
    editor = begin()
    editor.apply(requests(1))
    one = {name: parameter.clone() for name, parameter in editor.model.state_dict().items()}
    editor.apply(requests(2)[1:])
    editor.model.load_state_dict(one)
    real = Journal.append

    def full(journal, content, tensors):
        if content["kind"] == "rollback":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(journal, content, tensors)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Journal, "append", full)
        editor.apply(requests(3)[2:])
    editor.apply(requests(3)[2:])
    end = bits(editor)
    editor.close()
    again = begin()
    assert again.state.last == 2 and [e.requests[0]["prompt"] for e in again.state.log] == [
        requests(3)[i]["prompt"] for i in (0, 2)
    ]
    assert_same(bits(again), end)


def test_a_full_disk_says_what_happened_and_what_to_do(begin, requests, monkeypatch):
    editor = begin()
    editor.apply(requests(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be added to .*No space left on device.*The model is as it was before this edit"):
        editor.apply(requests(2)[1:])
    monkeypatch.undo()
    editor.apply(requests(2)[1:])
    assert editor.state.last == 2


def test_a_state_of_another_model_or_other_hyperparameters_is_refused(begin, requests, tiny, tmp_path):
    first = begin()
    first.apply(requests(1))
    with pytest.raises(BlockingIOError, match="already open for writing in this process"):
        begin().state  # noqa: B018
    first.close()
    with pytest.raises(ValueError, match=r"opened with other hyperparameters \(v_lr 0.5 -> 0.7; L2 0.1 -> 0.2\)"):
        begin(v_lr=0.7, L2=0.2).state  # noqa: B018
    with pytest.raises(ValueError, match=r"of another model \(qwen2 instead of llama\); load that model"):
        begin("qwen2").state  # noqa: B018
    other = begin()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"of another model \(1 of \d+ weights differ: (lm_head|model.embed_tokens)"):
        other.state  # noqa: B018
    edited = begin()
    edited.model.load_state_dict(first.model.state_dict())
    with pytest.raises(ValueError, match="edited already: load the unedited model"):
        edited.state  # noqa: B018
    assert begin().state.last == 1


def test_a_model_has_one_state(begin, requests, tmp_path, tiny):
    editor = begin()
    editor.apply(requests(1))
    second = LifelongEditor.from_hparams(editor.hparams)
    assert second.state is editor.state
    with pytest.raises(ValueError, match=r"edits of this model are kept in .*state, not in elsewhere"):
        LifelongEditor.from_hparams(dataclasses.replace(editor.hparams, state_dir="elsewhere")).state  # noqa: B018
    second.hparams = dataclasses.replace(editor.hparams, v_lr=0.7)
    with pytest.raises(ValueError, match=r"other hyperparameters \(v_lr"):
        second.apply(requests(2)[1:])
    assert copy.deepcopy(editor.state).book is None
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="changed by something else since edit 1, of which the state in"):
        editor.apply(requests(2)[1:])
    model, tok = tiny("llama")
    with pytest.raises(ValueError, match="state_dir is set, but FT changes whole weights"):
        dataclasses.replace(read("FT/atlas"), model_name=(model, tok), device="cpu", state_dir=str(tmp_path))


@pytest.mark.parametrize("method", ["MEMIT", "ROME", "AlphaEdit"])
def test_other_methods_are_kept_too(tiny, requests, tmp_path, method):
    ends = []
    for count in (1, 3):
        model, tok = tiny("llama")
        values = dict(
            model_name=(model, tok), device="cpu", v_num_grad_steps=2, v_loss_layer=None, stats_dir=str(tmp_path / "stats")
        )
        settings = dataclasses.replace(read(f"{method}/atlas"), **values, state_dir=str(tmp_path / "state"))
        settings.layers = settings.layers[:2]
        editor = LifelongEditor.from_hparams(settings)
        for record in requests(3)[:count]:
            editor.apply([record])
        ends.append(fingerprint(dict(model.named_parameters())))
        editor.close()
    model, tok = tiny("llama")
    state = open_state(model, tok, dataclasses.replace(settings, model_name=(model, tok)))
    assert state.last == 3 and fingerprint(dict(model.named_parameters())) == ends[1] != ends[0]
    state.book.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_is_kept_when_asked_for(tiny, requests, tmp_path, dtype):
    """Its dense differences: taken up, undone and gone back on to the bit; they are what is added."""

    def begin():
        model, tok = tiny("gpt2")  # with a bias, and weights the other way round
        settings = dataclasses.replace(
            read("FT/atlas"), model_name=(model.to(dtype), tok), device="cpu", layers=[0, 1], num_steps=2, lr=0.01,
            keep_updates=True, state_dir=str(tmp_path / "state"),
        )  # fmt: skip
        editor = LifelongEditor.from_hparams(settings)
        editor.open()
        return editor

    first = begin()
    start = fingerprint(dict(first.model.named_parameters()))
    for record in requests(3):
        first.apply([record])
    after = fingerprint(dict(first.model.named_parameters()))
    (update, *_), _ = first.state.events[0].updates, first.close()
    assert isinstance(update, Dense) and update.difference.dtype == torch.float32
    again = begin()
    assert fingerprint(dict(again.model.named_parameters())) == after != start
    again.state.undo(2)
    undone = fingerprint(dict(again.model.named_parameters()))
    again.close()
    other = begin()
    assert fingerprint(dict(other.model.named_parameters())) == undone != after
    other.state.rollback(0)
    assert fingerprint(dict(other.model.named_parameters())) == start
    other.close()


def test_requests_that_share_a_dense_update_cannot_be_told_apart(tiny, requests):
    model, tok = tiny("llama")
    settings = dataclasses.replace(
        read("FT/atlas"), model_name=(model, tok), device="cpu", layers=[0], num_steps=1, keep_updates=True, batch_size=2
    )
    editor = LifelongEditor.from_hparams(settings)
    editor.apply(requests(2))
    with pytest.raises(ValueError, match="edits 1 to 2 share one update that cannot be told apart; go back to 0 with rollback"):
        editor.undo(1)


def test_nor_without_a_model(tiny, requests, tmp_path):
    model, tok = tiny("llama")
    kept = {"state_dir": str(tmp_path / "state"), "keep_updates": True, "batch_size": 2}
    settings = dataclasses.replace(read("FT/atlas"), model_name=(model, tok), device="cpu", layers=[0], num_steps=1, **kept)
    editor = LifelongEditor.from_hparams(settings)
    editor.apply(requests(2))
    editor.apply(requests(3)[2:])
    editor.close()
    with pytest.raises(ValueError, match="edits 1 to 2 share one update that cannot be told apart"):
        durable.undo(tmp_path / "state", 1)
    durable.undo(tmp_path / "state", 3)


def test_an_edit_is_undone_without_a_model(begin, requests, tmp_path):
    whole, first = begin(state_dir=None), begin()
    for editor in (whole, first):
        for record in requests(3):
            editor.apply([record])
    first.close()
    durable.undo(tmp_path / "state", 2)
    with pytest.raises(ValueError, match="edit 2 is undone already"):
        durable.undo(tmp_path / "state", 2)
    whole.state.undo(2)
    assert_same(bits(begin()), bits(whole))


# ---- records


def test_a_record_gives_back_what_was_written_and_no_more_is_stored(tmp_path):
    """Shapes of an 8B model, 5 layers, bfloat16: at most 400 KB for an edit."""
    g = torch.Generator().manual_seed(0)
    neurons, hidden, layers = 14336, 4096, range(4, 9)
    for density in (1.0, 0.5, 0.01):
        masks = {layer: torch.rand(neurons, generator=g) < density for layer in layers} if density < 1 else {}
        updates = []
        for layer in layers:
            right = torch.randn(1, neurons, generator=g) * masks.get(layer, torch.ones(neurons))
            updates.append(LowRank(layer, torch.randn(hidden, 1, generator=g), right).rounded(torch.bfloat16))
        keys = {layer: torch.randn(neurons, 1, generator=g).bfloat16() for layer in layers}
        report = EditReport(1, density=dict.fromkeys(layers, density), ratios=dict.fromkeys(layers, (0.4, 0.4)))
        request = {"subject": "Someone", "prompt": "Someone was born in", "target_new": "Rome", "ground_truth": "Oslo"}
        edit = Edit(1, (request,), tuple(updates), keys, torch.randn(hidden, 1, generator=g), masks, report, {1: (0,)}, 7, "now")
        directory = tmp_path / str(density)
        with Journal.create(directory, {}, {}) as journal:
            empty = _size(directory)
            durable.Book(journal).edit(edit)
            assert _size(directory) - empty <= 400_000 * (1 if density == 1 else 0.85 if density == 0.5 else 0.7)
            (found,), _ = durable.history(journal)
        assert (found.first, found.requests, found.supersedes, found.digest, found.made) == (1, (request,), {1: (0,)}, 7, "now")
        assert found.report == edit.report and torch.equal(found.z, edit.z)
        assert all(torch.equal(found.masks[layer], masks[layer]) for layer in masks)
        for one, other in zip(found.updates, updates, strict=True):
            assert (one.parameter, one.first) == (other.parameter, other.first)
            assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right) and one.right.dtype == torch.bfloat16
        assert all(torch.equal(found.keys[layer], keys[layer]) for layer in layers)


def _size(directory) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("neurons", [1, 7, 8, 63, 1000])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
def test_masks_are_packed_without_loss(neurons, density):
    mask = torch.rand(neurons, generator=torch.Generator().manual_seed(0)) < density
    packed = durable._packed(mask)
    assert torch.equal(durable._unpacked(packed, neurons), mask)
    assert packed.nbytes <= max(1, -(-neurons // 8))


def test_the_index_says_in_words_what_was_edited(begin, requests, tmp_path):
    editor = begin()
    editor.apply(requests(1))
    line = json.loads((tmp_path / "state" / "index.jsonl").read_text().splitlines()[0])["content"]
    assert line["kind"] == "edit:2" and line["requests"][0]["prompt"] == requests(1)[0]["prompt"]
    assert len(line["hash"]) == 64 and line["libraries"]["torch"] == torch.__version__ and line["report"]["seconds"]["values"] > 0
    header = Journal.open(tmp_path / "state", write=False).header
    assert header["hparams"]["L2"] == 0.1 and header["model"]["type"] == "llama" and header["templates"][0] == ["{}"]
