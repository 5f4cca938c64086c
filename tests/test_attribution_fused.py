"""The Triton kernel: on a CPU under Triton's interpreter, in a process of its own; on a GPU as it is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attribution import make_case

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra 'cuda')")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [(1, 7, 33, 101), (6, 300, 256, 5000), (40, 129, 65, 1027), (6, 1000, 512, 32001)]  # P, N, D, V


@needs_triton
def test_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_interpreter.py")]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
@needs_triton
def test_a_cpu_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"'fused' cannot run: the weights are on cpu"):
        make_case((2, 7, 8, 37)).scores(backend="fused")


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[cuda\]" in this project'):
        make_case((2, 7, 8, 37)).scores(backend="fused")


@needs_triton
def test_tiles_are_a_table():
    """The same in every process, whatever else the GPU does; they fit its shared memory, and the units of the result."""
    from easyedit_nmke.attribution import fused

    assert not hasattr(fused._kernel, "configs")  # of Triton's autotuner
    found = set()
    for capability, memory in {
        (8, 0): 166912,
        (8, 6): 101376,
        (8, 9): 101376,
        (9, 0): 232448,
        (10, 0): 232448,
        (12, 0): 101376,
    }.items():
        for dtype in (torch.bfloat16, torch.float32):
            for prompts in (1, 6, 64):
                for started in (False, True):
                    tile = fused.tile(dtype, prompts, started, capability)
                    size = torch.float32.itemsize if started else dtype.itemsize
                    assert tile.stages * (tile.neurons + tile.words) * tile.hidden * size <= memory
                    assert tile.words % fused.UNIT == 0
                    found.add(tile)
    assert {tile[:3] for tile in found} == {(64, 128, 32), (128, 128, 32), (128, 128, 64), (128, 256, 64)}


def on_gpu(case, device="cuda"):
    moved = case.but(**{name: getattr(case, name).to(device) for name in ("coefficients", "residual", "w_out", "target_ids")})
    return moved.but(final_hidden=case.final_hidden.to(device), readout=case.readout.to(device))


@pytest.mark.cuda
@needs_gpu
@needs_triton
@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("style", ["rms", "layer", "layer softcap"])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_scores_on_a_gpu(size, style, norm):
    case = on_gpu(make_case(size, style))
    expected = case.scores(backend="reference", norm=norm)
    assert float((case.scores(backend="fused", norm=norm) - expected).abs().max()) < 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two CUDA devices")
@needs_triton
def test_scores_on_the_second_gpu():
    cases = [on_gpu(make_case(SHAPES[1], "layer"), f"cuda:{number}") for number in (0, 1)]
    assert torch.equal(*(case.scores(backend="fused").cpu() for case in cases))


@pytest.mark.cuda
@needs_gpu
@needs_triton
def test_bfloat16_products_on_a_gpu():
    case = on_gpu(make_case((6, 1000, 512, 32001), "rms", dtype=torch.bfloat16))
    expected = case.scores(backend="reference")
    assert float((case.scores(backend="fused") - expected).abs().max() / expected.abs().max()) < 5e-3


@pytest.mark.cuda
@needs_gpu
@needs_triton
def test_the_kernel_is_within_a_factor_of_a_plain_product():
    from easyedit_nmke.attribution import fused

    reached = fused.throughput(neurons=4096, vocabulary=32768)
    assert reached["tflops"] > 0.3 * reached["matmul_tflops"], reached
