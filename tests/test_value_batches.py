"""Target values of many requests at once: what is run together, what is dropped, what it holds, and how often it waits."""

import sys

import pytest
import torch
from counting import Counts
from torch.overrides import TorchFunctionMode

from easyedit_nmke import apply_nmke_to_model
from easyedit_nmke.bench.formulas import HOOKED, LAUNCHES
from easyedit_nmke.methods import above, value_texts, values
from easyedit_nmke.methods.above import Above
from easyedit_nmke.methods.value_texts import Batch, batches, rows_of
from easyedit_nmke.methods.values import target_values
from easyedit_nmke.models.arch import FAMILIES, ModelView
from easyedit_nmke.models.requests import Request

TEMPLATES = ["{}", "I say this. {}", "Because of what you know by now. {}", "The. {}", "You may. {}", "Therefore it is so. {}"]
LOCALITY = dict(locality_factor=0.7, locality_prompts=["{} works as a", "Where {} lives is called"])


@pytest.fixture
def asked(requests):
    return lambda count: [Request.from_dict(record) for record in requests(count)]


@pytest.mark.parametrize("more", [{}, LOCALITY], ids=["published", "locality prompts"])
def test_a_hundred_requests_are_run_with_less_than_a_tenth_of_padding(tiny, nmke_hparams, asked, more):
    model, tok = tiny("llama")
    hparams, view = nmke_hparams(model, tok, **more), ModelView(model)
    texts = [rows_of(tok, i, request, TEMPLATES, hparams) for i, request in enumerate(asked(100))]
    sizes = values._Sizes(view, 1, None)
    groups = list(sizes.groups(texts))
    assert sorted(i for group in groups for i in group) == list(range(100))
    padded = real = 0
    for group in groups:
        for rows in batches([row for i in group for row in texts[i]], sizes.fits):
            batch = Batch(rows, len(TEMPLATES), "cpu")
            real += int(batch.mask[:, batch.start :].sum())
            padded += len(rows) * batch.columns
    assert real == sum(row.width for rows in texts for row in rows) and 1 - real / padded < 0.1


def test_batches_stay_within_what_fits():
    rows = [value_texts.Row(value_texts.TARGET, i, range(9), 2, 2 + width, labels=(1,)) for i, width in enumerate((7, 3, 3, 5, 7))]
    made = list(batches(rows, lambda tokens, reads: tokens <= 14 and reads <= 2))
    assert [[row.width for row in some] for some in made] == [[7, 7], [5, 3], [3]]
    assert list(batches(rows, lambda tokens, reads: False)) == [[row] for row in sorted(rows, key=lambda row: -row.width)]


@pytest.mark.parametrize("kind", ["llama", "gptj", "gemma3_text"])
def test_requests_have_the_same_values_however_they_are_shared_out(tiny, nmke_hparams, asked, monkeypatch, kind):
    model, tok = tiny(kind)
    view, some = ModelView(model), asked(5)
    args = (view, tok, some, TEMPLATES[:3], 1, nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=5, **LOCALITY))
    together = target_values(*args)
    one_by_one = target_values(*args, budget=0)
    monkeypatch.setattr(value_texts, "MANY", 4)
    by_width = target_values(*args)
    for expected, *found in zip(together, one_by_one, by_width, strict=True):
        for value in found:
            assert value.steps == expected.steps and value.loss == pytest.approx(expected.loss, rel=1e-4)
            assert torch.allclose(value.z, expected.z, rtol=1e-4, atol=1e-4)


def test_a_batch_writes_the_weights_of_requests_solved_one_by_one(tiny, nmke_hparams, requests, weights, monkeypatch):
    found = []
    for budget in (values.CPU_BUDGET, 0):
        monkeypatch.setattr(values, "CPU_BUDGET", budget)
        model, tok = tiny("llama")
        settings = nmke_hparams(model, tok, batch_size=6)
        before = weights(model, settings)
        apply_nmke_to_model(model, tok, requests(6), settings)
        found.append({layer: weight - before[layer] for layer, weight in weights(model, settings).items()})
    for layer, change in found[0].items():
        assert change.norm() > 0 and (change - found[1][layer]).norm() < 1e-4 * change.norm()


def test_what_is_done_is_dropped(atlas, nmke_hparams, asked, monkeypatch):
    model, tok = atlas
    some, rows, call = asked(4), [], Above.__call__
    settings = dict(v_lr=1.0, v_num_grad_steps=15, clamp_norm_factor=5, v_weight_decay=1e-3, v_stop_probability=0.4, **LOCALITY)
    hparams, view = nmke_hparams(model, tok, **settings), ModelView(model)
    monkeypatch.setattr(Above, "__call__", lambda self, delta: rows.append(len(self.batch.rows)) or call(self, delta))
    found = target_values(view, tok, some, TEMPLATES[:2], 1, hparams)
    steps = sorted(value.steps for value in found)
    assert len(rows) == steps[-1] and rows[0] == 4 * 5 and steps[0] < steps[-1]
    assert rows[-1] == 5 * sum(step == steps[-1] for step in steps)
    monkeypatch.setattr(values, "LEFT", 0)  # nothing is dropped
    for value, kept in zip(found, target_values(view, tok, some, TEMPLATES[:2], 1, hparams), strict=True):
        assert value.steps == kept.steps and torch.allclose(value.z, kept.z, rtol=1e-3, atol=1e-3)


class Recording:
    """Stands for a graph where there is no GPU: it computes what was recorded anew, with δ as it is by then, all else as it was."""

    made = 0

    def __init__(self, piece, delta, _pool):
        type(self).made += 1
        self.batch = piece.batch
        kept, factors, calls = list(piece.kept), piece.factors, (piece.above.below, piece.above.calls, piece.above.places)
        self.gradient, self.terms = torch.empty_like(delta), [torch.empty(0)] * 3

        def replay():
            assert (piece.above.below, piece.above.calls, piece.above.places) == calls
            assert all(now is before for now, before in zip(piece.kept, kept, strict=True)) and piece.factors is factors
            with torch.enable_grad():
                terms = piece(delta)
                self.gradient.copy_(torch.autograd.grad((terms[0] + terms[1]).sum(), delta)[0])
            self.terms[:] = [term.detach() for term in terms]

        self.replay = replay


@pytest.mark.parametrize("budget", [None, 0], ids=["together", "one by one"])
def test_recorded_steps_give_the_same_values(tiny, nmke_hparams, asked, monkeypatch, budget):
    model, tok = tiny("llama")
    view, some = ModelView(model), asked(5)
    args = (view, tok, some, TEMPLATES[:3], 1, nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=9, **LOCALITY))
    expected = target_values(*args, budget=budget)
    monkeypatch.setattr(values, "_pool", lambda _view: "pool")
    monkeypatch.setattr(Recording, "made", 0)
    monkeypatch.setattr(values, "_Graph", Recording)
    found = target_values(*args, budget=budget)
    assert Recording.made and all(torch.equal(value.z, other.z) for value, other in zip(found, expected, strict=True))


def test_a_step_that_cannot_be_recorded_is_launched(tiny, nmke_hparams, asked, monkeypatch, caplog):
    model, tok = tiny("llama")
    args = (ModelView(model), tok, asked(2), TEMPLATES[:3], 1, nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=9))
    expected = target_values(*args)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(values, "_pool", lambda _view: "pool")
    monkeypatch.setattr(values, "_Graph", refuse)
    found = target_values(*args)
    assert all(torch.equal(value.z, other.z) for value, other in zip(found, expected, strict=True))
    assert len([r for r in caplog.records if "cannot be recorded" in r.message]) == 1


class Waits(TorchFunctionMode):
    """Calls for which a GPU's work has to be waited for, but those of the optimiser's count of steps, which is on the CPU."""

    NAMES = ("tolist", "item", "nonzero", "masked_select", "bincount", "unique", "__bool__", "__int__", "__float__", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masks = name == "__getitem__" and any(torch.is_tensor(i) and i.dtype == torch.bool for i in _parts(args[1]))
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _parts(index):
    return index if isinstance(index, tuple) else (index,)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_waits_for_the_device_once(tiny, nmke_hparams, asked, monkeypatch, kind):
    model, tok = tiny(kind)
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_get_value", lambda count: 1)
    counts = []
    for steps in (2, 5):
        hparams = nmke_hparams(model, tok, v_lr=0.01, v_num_grad_steps=steps, **LOCALITY)
        with Waits() as waits:
            found = target_values(ModelView(model), tok, asked(2), TEMPLATES[:2], 1, hparams)
        assert [value.steps for value in found] == [steps, steps]
        counts.append(len(waits.seen))
    assert counts[1] - counts[0] == 3


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_block_of_a_step_is_a_bounded_number_of_launches(tiny, nmke_hparams, asked, monkeypatch, kind):
    """And fewer where FFNs skip nothing, as with few tokens on a GPU, which gives the same values."""
    model, tok = tiny(kind)
    each, found = [], []
    for few in (0, 1000):
        monkeypatch.setattr(above, "few_on", lambda device, few=few: few)
        counted = []
        for z_layer in (0, 1):
            for steps in (2, 4):
                hparams = nmke_hparams(model, tok, v_lr=0.01, v_num_grad_steps=steps)
                with Counts() as counts:
                    (value,) = target_values(ModelView(model), tok, asked(1), TEMPLATES[:3], z_layer, hparams)
                counted.append(counts.launches["rest"])
        each.append((counted[1] - counted[0] - counted[3] + counted[2]) / 2)
        found.append(value.z)
    assert each[1] < each[0] - 4 and each[0] <= HOOKED + sum(LAUNCHES[kind]) + (3 if "gemma" in kind else 0)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_what_values_may_take_is_a_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr(values, "total_memory", lambda device: {"cuda": 80e9}[device.type])
    assert values.budget_on(torch.device("cuda")) == 8e9 and values.budget_on(torch.device("cpu")) == values.CPU_BUDGET


@pytest.mark.parametrize("kind", FAMILIES)
def test_activations_are_what_the_budget_takes_them_for(tiny, nmke_hparams, asked, kind):
    """What autograd keeps for the backward pass, parameters and what is kept anyway aside."""
    model, tok = tiny(kind)
    view, sizes = ModelView(model), values._Sizes(ModelView(model), 0, None)
    rows = [row for i, request in enumerate(asked(3)) for row in rows_of(tok, i, request, TEMPLATES, nmke_hparams(model, tok))]
    piece = values._Piece(view, Batch(rows, len(TEMPLATES), "cpu"), 0, nmke_hparams(model, tok))
    others = [*model.parameters(), *(kv for pair in piece.above.before.kept.values() for kv in pair), piece.above.below]
    known, held = {tensor.untyped_storage().data_ptr() for tensor in others}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return tensor

    with values.frozen(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        piece(torch.zeros(3, 32, requires_grad=True))
    saved = sum(storage.nbytes() for storage in held.values())
    places = len(piece.batch.read)
    words = places * sizes.word
    assert saved - words <= len(rows) * piece.batch.columns * sizes.token + 2 * words
    assert saved + 4 * words >= 0.3 * (len(rows) * piece.batch.columns * sizes.token + places * values.TIMES_WORDS * sizes.word)
