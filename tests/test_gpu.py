"""Edits on one GPU and over two: the CPU's, to float32's digits."""

import copy

import pytest
import torch

from easyedit_nmke import methods
from easyedit_nmke.methods import values
from easyedit_nmke.methods.values import target_values
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import LowRank, accumulate

pytestmark = pytest.mark.cuda
one = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two CUDA devices")
NULL_SPACE = {"nullspace_fraction": 0.5, "L2": 0.1}
SETTINGS = {
    "NMKE": {"mask_ties": "exact", **NULL_SPACE}, "AlphaEdit": NULL_SPACE,
    "MEMIT": {"mom2_update_weight": 10.0}, "ROME": {"layers": [1]},
}  # fmt: skip


def spread(model, devices):
    """The model with a share of its blocks on each device, the embedding on the first, the head on the last."""
    from accelerate import dispatch_model

    blocks = {f"model.layers.{i}": devices[i * len(devices) // 3] for i in range(3)}
    ends = {"model.embed_tokens": devices[0], "model.norm": devices[-1], "model.rotary_emb": devices[0], "lm_head": devices[-1]}
    return dispatch_model(model, blocks | ends) if len(devices) > 1 else model.to(devices[0])


def updates(model, tok, requests, nmke_hparams, method, devices):
    """layer -> by how much three edits change its output projection [D, F]."""
    settings = {"v_num_grad_steps": 4, "v_lr": 0.5, "mom2_dataset": "atlas", "mom2_n_samples": 200, "layers": [0, 1]}
    model = spread(copy.deepcopy(model), devices)
    kind, stats = methods.method_named(method).hparams, nmke_hparams(model, tok).stats_dir
    device = devices[0] if len(devices) == 1 else 0
    hparams = kind(model_name=(model, tok), device=device, stats_dir=stats, **{**settings, **SETTINGS[method]})
    view = ModelView(model)
    before = {layer: view.w_out(layer).clone() for layer in range(2)}
    for request in requests(3):
        methods.apply_to_model(model, tok, [request], hparams)
    return {layer: (view.w_out(layer) - weight).cpu() for layer, weight in before.items()}


def compared(tiny, requests, nmke_hparams, method, devices):
    model, tok = tiny("llama")
    expected = updates(model, tok, requests, nmke_hparams, method, ["cpu"])
    found = updates(model, tok, requests, nmke_hparams, method, devices)
    assert any(update.any() for update in expected.values())
    for layer, update in expected.items():
        assert (found[layer] - update).norm() <= 1e-2 * update.norm(), layer


@one
@pytest.mark.parametrize("method", SETTINGS)
def test_an_edit_on_a_gpu(tiny, requests, nmke_hparams, method):
    compared(tiny, requests, nmke_hparams, method, ["cuda:0"])


@two
@pytest.mark.parametrize("method", SETTINGS)
def test_an_edit_of_a_model_over_two_gpus(tiny, requests, nmke_hparams, method):
    compared(tiny, requests, nmke_hparams, method, ["cuda:0", "cuda:1"])


@one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_have_the_cpus_bits(dtype):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(300, 1030, generator=g).to(dtype)
    some = [LowRank("w", torch.randn(300, k, generator=g), torch.randn(k, 1030, generator=g)).rounded(dtype) for k in (1, 7, 30)]
    expected, found = torch.empty_like(start), torch.empty_like(start, device="cuda")
    accumulate(expected, start, some)
    accumulate(found, start.cuda(), some)
    assert torch.equal(found.cpu(), expected)


@one
@pytest.mark.parametrize("kind", ["llama", "gptj", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 0], ids=["together", "one by one"])
def test_recorded_steps_give_the_values_of_launched_ones(tiny, requests, nmke_hparams, monkeypatch, caplog, kind, dtype, budget):
    model, tok = tiny(kind)
    model = copy.deepcopy(model).to("cuda", dtype)
    hparams = nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=12, locality_factor=0.7, locality_prompts=["{} works as a"])
    args = (ModelView(model), tok, [Request.from_dict(r) for r in requests(5)], ["{}", "I say this. {}"], 1, hparams)
    found = target_values(*args, budget=budget)
    assert not caplog.records and all(value.steps > values.UNRECORDED for value in found)
    monkeypatch.setattr(values, "_pool", lambda _view: None)
    for value, other in zip(found, target_values(*args, budget=budget), strict=True):
        assert (value.z - other.z).norm() <= 1e-5 * other.z.norm() and value.steps == other.steps


@two
def test_recorded_steps_on_the_second_gpu(tiny, requests, nmke_hparams):
    model, tok = tiny("llama")
    hparams, found = nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=12), []
    for device in ("cuda:0", "cuda:1"):
        view = ModelView(copy.deepcopy(model).to(device))
        found.append(target_values(view, tok, [Request.from_dict(requests(1)[0])], ["{}"], 1, hparams)[0].z.cpu())
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@one
def test_graphs_leave_no_memory_behind(tiny, requests, nmke_hparams):
    model, tok = tiny("llama")
    model = copy.deepcopy(model).to("cuda")
    some = [Request.from_dict(r) for r in requests(3)]
    args = (ModelView(model), tok, some, ["{}"], 1, nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=6))
    held = []
    for _ in range(6):
        target_values(*args)
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1], held
