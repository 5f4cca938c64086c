"""KNE against the same thing done plainly, on the model itself; and its sparse updates, kept and undone."""

import copy

import pytest
import test_easyedit as inside
import torch

import easyedit_nmke
from easyedit_nmke import LifelongEditor, methods
from easyedit_nmke.methods import kne
from easyedit_nmke.methods.kne import KNEHyperParams
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.prompts import target_tokens
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import Sparse

easyeditor = inside.easyeditor


@pytest.fixture
def settings():
    def make(model, tok, **overrides):
        values = dict(model_name=(model, tok), layers=[0, 2], device="cpu", num_steps=4, lr=1e-2, share=0.02, attribution_steps=2)
        return KNEHyperParams(**{**values, **overrides})

    return make


def plainly(model, tok, requests, chosen):
    """Scores from .backward() on scaled copies, one sort, and Adam whose gradients are zeroed outside the ensemble."""
    model, names = copy.deepcopy(model), kne.writes(ModelView(model), chosen)
    read = []
    for request in map(Request.from_dict, requests):
        prompt = tok(request.prompt)["input_ids"]
        read.append((prompt, target_tokens(tok, request.prompt, request.target_new)))
    scores = {name: 0 for name in names}
    for prompt, target in read:
        for place, word in enumerate(target):
            gradients = {name: 0 for name in names}
            for step in range(1, chosen.attribution_steps + 1):
                scaled = copy.deepcopy(model)
                for name in names:
                    scaled.get_parameter(name).data *= step / chosen.attribution_steps
                scaled(torch.tensor([prompt + target[:place]])).logits[0, -1].log_softmax(-1)[word].backward()
                gradients = {name: gradients[name] + scaled.get_parameter(name).grad / chosen.attribution_steps for name in names}
            scores = {name: scores[name] + (model.get_parameter(name) * gradients[name]).abs().detach() for name in names}
    every = torch.cat([scores[name].flatten() for name in names])
    least = every.sort(descending=True).values[int(chosen.share * len(every)) - 1]
    masks = {name: scores[name] >= least for name in names}
    model.requires_grad_(False)
    optimiser = torch.optim.Adam([model.get_parameter(name).requires_grad_() for name in names], lr=chosen.lr)
    for _ in range(chosen.num_steps):
        for start in range(0, len(read), chosen.batch_size):
            losses = []
            for prompt, target in read[start : start + chosen.batch_size]:
                said = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
                losses.append(-torch.stack([said[len(prompt) - 1 + i, word] for i, word in enumerate(target)]).mean())
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad *= mask
            optimiser.step()
    return model, masks


@pytest.mark.parametrize(("kind", "count", "steps"), [("llama", 1, 3), ("llama", 3, 1), ("gpt2", 2, 2)])
def test_kne_learns_with_the_ensemble_alone(tiny, settings, requests, kind, count, steps):
    model, tok = tiny(kind)
    chosen = settings(model, tok, attribution_steps=steps, batch_size=2)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected, masks = plainly(model, tok, requests(count), chosen)
    methods.apply_to_model(model, tok, requests(count), chosen)
    for name, parameter in model.named_parameters():
        changed = parameter != start[name]
        if name not in masks:
            assert not changed.any(), name
            continue
        assert (changed != masks[name]).sum() <= 2, "ties aside, the same parameters"
        difference = expected.get_parameter(name) - start[name]
        assert (parameter - expected.get_parameter(name)).norm() <= 5e-3 * difference.norm() + 1e-6, name
    total = sum(mask.numel() for mask in masks.values())
    assert len(masks) == (8 if kind == "gpt2" else 6) and sum(int(m.sum()) for m in masks.values()) == int(0.02 * total)
    report = model.nmke_state.reports[0]
    assert set(report.density) == {0, 2} and min(report.density.values()) > 0 and sum(report.density.values()) / 2 < 0.025


def test_one_ranking_serves_all_layers():
    scores = {"a": torch.tensor([0.1, 5.0, 0.2, 4.0]), "b": torch.tensor([0.3, 3.0]), "c": torch.zeros(4)}
    found = kne.ensemble(scores, 0.3)
    assert [found[name].tolist() for name in "abc"] == [[1, 3], [1], []]
    assert [kne.ensemble(scores, 0.01)[name].tolist() for name in "abc"] == [[1], [], []]
    with pytest.raises(FloatingPointError, match="attribution of KNE"):
        kne.ensemble({"a": torch.tensor([float("nan")])}, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_sparse_updates_are_kept_undone_and_exported(tiny, settings, requests, tmp_path, dtype):
    def opened():
        model, tok = tiny("llama")
        edited = LifelongEditor.from_hparams(settings(model.to(dtype), tok, state_dir=str(tmp_path / "state"), num_steps=2))
        edited.open()
        return edited

    def now(editor):
        return {n: p.detach().clone() for n, p in editor.model.named_parameters()}

    def same(one, other):
        return all(torch.equal(p, other[n]) for n, p in one.items())

    first = opened()
    stages = [now(first)]
    for request in requests(2):
        first.apply([request])
        stages.append(now(first))
    updates = [update for edit in first.state.log for update in edit.updates]
    assert updates and all(isinstance(update, Sparse) for update in updates) and not same(stages[1], stages[2])
    first.close()
    again = opened()
    assert same(now(again), stages[2])
    again.undo(2)
    assert same(now(again), stages[1])
    again.undo(1)
    assert same(now(again), stages[0])
    again.close()


def test_it_stops_when_the_answer_is_learnt(atlas, requests, monkeypatch):
    model, tok = atlas
    calls, loss = [], kne.target_loss
    monkeypatch.setattr(kne, "target_loss", lambda *args: calls.append(1) or loss(*args))
    values = dict(layers=[1, 2], device="cpu", lr=3e-3, num_steps=80, attribution_steps=1)
    methods.apply_to_model(model, tok, requests(1), KNEHyperParams(model_name=(model, tok), **values))
    assert 3 < len(calls) < 80 and model.nmke_state.reports[0].value_loss[0] < 0.01


@pytest.mark.easyedit
def test_easyedit_has_it_once_registered(easyeditor, tiny, settings, requests):
    easyedit_nmke.register(text_only=True)
    table = inside.registering._tables(inside.registering.find_easyedit())
    assert table[1].is_batchable_method("KNE") and table[1].is_batchable_method("LocFT-BF")
    assert "UltraEdit" not in table[0] and "ULTRAEDIT" in table[0], "EasyEdit's own is left alone"
    model, tok = tiny("llama")
    edited, before = table[0]["KNE"](model, tok, requests(1), settings(model, tok), return_orig_weights=True)
    assert edited is model and set(before) == set(kne.writes(ModelView(model), settings(model, tok)))
