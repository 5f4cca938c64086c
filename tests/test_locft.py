"""LocFT-BF against the same thing done plainly, its end token, and what it learns again when further edits come."""

import copy
import random

import pytest
import torch

from easyedit_nmke import LifelongEditor, methods
from easyedit_nmke.methods import locft, read
from easyedit_nmke.methods.locft import LocFTHyperParams
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.prompts import target_tokens
from easyedit_nmke.models.requests import Request


@pytest.fixture
def settings():
    def make(model, tok, **overrides):
        values = dict(model_name=(model, tok), layers=[1], device="cpu", num_steps=3, lr=1e-2, batch_size=2)
        return LocFTHyperParams(**{**values, **overrides})

    return make


def plainly(model, tok, requests, chosen):
    """One prompt after the other, Adam on the model itself."""
    batch, order = [Request.from_dict(r) for r in requests], random.Random(chosen.seed)
    model = copy.deepcopy(model).requires_grad_(False)
    trained = [model.get_parameter(name).requires_grad_() for name in locft.writes(ModelView(model), chosen)]
    optimiser = torch.optim.Adam(trained, lr=chosen.lr, weight_decay=chosen.weight_decay)
    for _ in range(chosen.num_steps):
        order.shuffle(batch)
        for start in range(0, len(batch), chosen.batch_size):
            losses = []
            for request in batch[start : start + chosen.batch_size]:
                ids = tok(request.prompt)["input_ids"]
                target = target_tokens(tok, request.prompt, request.target_new) + [tok.eos_token_id] * chosen.target_eos
                said = model(input_ids=torch.tensor([ids + target])).logits[0].log_softmax(-1)
                losses.append(-torch.stack([said[len(ids) - 1 + i, word] for i, word in enumerate(target)]).mean())
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
    return model


def close(found, expected, start, names):
    """Relative to the change."""
    return all(
        (found.get_parameter(n) - expected.get_parameter(n)).norm() < 2e-3 * (expected.get_parameter(n) - start[n]).norm()
        for n in names
    )


@pytest.mark.parametrize(("kind", "trained", "end"), [("llama", "down", True), ("llama", "block", True), ("gpt2", "down", False)])
def test_locft_is_plain_adam_epoch_after_epoch_with_an_end_token(tiny, settings, requests, kind, trained, end):
    model, tok = tiny(kind)
    chosen = settings(model, tok, trained=trained, target_eos=end, weight_decay=0.01)
    names, start = locft.writes(ModelView(model), chosen), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert len(names) == (1 if trained == "down" else 9)
    expected = plainly(model, tok, requests(3), chosen)
    other = plainly(model, tok, requests(3), settings(model, tok, trained=trained, target_eos=not end, weight_decay=0.01))
    methods.apply_to_model(model, tok, requests(3), chosen)
    assert close(model, expected, start, names) and not close(model, other, start, names)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters() if name not in names)


@pytest.mark.parametrize("keep", [True, False])
def test_further_edits_are_learnt_with_all_earlier_ones_from_the_unedited_weights(tiny, settings, requests, keep):
    model, tok = tiny("llama")
    chosen = settings(model, tok, keep_updates=keep)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = locft.writes(ModelView(model), chosen)
    again = {**requests(1)[0], "target_new": "blue"}  # the first fact anew: its old target is not learnt again
    expected = plainly(model, tok, [*requests(5)[1:], again], chosen)
    edited = LifelongEditor.from_hparams(chosen)
    edited.apply(requests(5)[:2])
    edited.apply(requests(5)[2:])
    edited.apply([again])
    assert close(model, expected, start, names)
    assert edited.state.edits == 3 and [r["target_new"] for r in edited.state.base()[1]][-1] == "blue"


def test_without_replay_only_the_new_edits_are_learnt_from_the_weights_as_they_are(tiny, settings, requests):
    model, tok = tiny("llama")
    chosen = settings(model, tok, replay="new")
    start, names = {n: p.detach().clone() for n, p in model.named_parameters()}, locft.writes(ModelView(model), chosen)
    expected = plainly(plainly(model, tok, requests(2), chosen), tok, requests(4)[2:], chosen)
    for some in (requests(2), requests(4)[2:]):
        methods.apply_to_model(model, tok, some, chosen)
    assert close(model, expected, start, names)
    assert all(not base for _, _, base in model.nmke_state.weights.bases), "nothing has to be kept for that"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_that_are_kept_go_on_in_another_process_roll_back_and_are_undone(tiny, settings, requests, tmp_path, dtype):
    def opened():
        model, tok = tiny("llama")
        model.to(dtype)
        return LifelongEditor.from_hparams(settings(model, tok, keep_updates=True, state_dir=str(tmp_path / "state")))

    first = opened()
    name = locft.writes(ModelView(first.model), first.hparams)[0]
    stages = [first.model.get_parameter(name).detach().clone()]
    for some in (requests(2), requests(3)[2:]):
        first.apply(some)
        stages.append(first.model.get_parameter(name).detach().clone())
    first.close()
    again = opened()
    assert again.state.last == 3 and torch.equal(again.model.get_parameter(name), stages[2])
    with pytest.raises(ValueError, match="edits 1 to 2 share one update"):
        again.undo(1)
    again.undo(3)
    assert torch.equal(again.model.get_parameter(name), stages[1])
    again.apply(requests(3)[2:])
    assert torch.allclose(again.model.get_parameter(name), stages[2], atol=1e-5 if dtype == torch.float32 else 1e-2)
    again.state.rollback(0)
    assert torch.equal(again.model.get_parameter(name), stages[0])


def test_sixteen_bit_weights_learn_through_float32_copies(tiny, settings, requests):
    """A step that is smaller than the weights' own digits adds up."""
    model, tok = tiny("llama")
    model.bfloat16()
    start = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    methods.apply_to_model(model, tok, requests(2), settings(model, tok, lr=1e-5, num_steps=40))
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, start)


def test_it_stops_when_all_is_learnt(atlas, requests, monkeypatch):
    model, tok = atlas
    calls, loss = [], locft.target_loss
    monkeypatch.setattr(locft, "target_loss", lambda *args: calls.append(1) or loss(*args))
    values = dict(model_name=(model, tok), layers=[3], device="cpu", num_steps=60, lr=3e-3, batch_size=4)
    edited = LifelongEditor.from_hparams(LocFTHyperParams(**values, target_eos=False))
    results, *_ = edited.edit([], [], requests=requests(4), sequential_edit=True, verbose=False)
    assert 3 < len(calls) < 60 and edited.state.reports[0].value_loss[0] < 0.01
    assert all(result["final"]["rewrite_acc"] == [1.0] for result in results)


def test_scores_and_the_log_leave_the_end_token_out(tiny, settings, requests):
    model, tok = tiny("llama")
    edited = LifelongEditor.from_hparams(settings(model, tok, num_steps=30))
    results, *_ = edited.edit([], [], requests=requests(2), sequential_edit=True, verbose=False)
    assert all(result["final"]["rewrite_acc"] == [1.0] for result in results)
    assert all(tok.eos_token not in request["target_new"] for request in edited.state.base()[1])
    asked = requests(2)[1]
    ids = tok(f"{asked['prompt']} {asked['target_new']}", return_tensors="pt")["input_ids"]
    assert model(ids).logits[0, -1].argmax() == tok.eos_token_id, "it has learnt to stop"


def test_it_knows_no_single_edits_and_keeps_nothing_unless_asked():
    values = dict(model_name="atlas", layers=[1])
    with pytest.raises(ValueError, match="batch_size is 1, but LocFT-BF learns all edits together in batches"):
        LocFTHyperParams(**values, batch_size=1)
    with pytest.raises(ValueError, match="set keep_updates: true"):
        LocFTHyperParams(**values, state_dir="x")
    assert (LocFTHyperParams(**values).batch_size, LocFTHyperParams(**values).target_eos) == (100, True)


def test_the_published_files():
    for name, layer, trained, lr in (
        ("llama3-8b", 22, "down", 5e-4),
        ("qwen2.5-7b", 6, "down", 5e-4),
        ("mistral-7b", 23, "block", 5e-5),
    ):
        found = read(f"LocFT-BF/{name}")
        assert (found.layers, found.trained, found.lr, found.batch_size, found.num_steps) == ([layer], trained, lr, 100, 25)
        assert (found.target_eos, found.replay, found.weight_decay) == (True, "all", 0)
