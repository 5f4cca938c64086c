"""The Triton kernel under Triton's interpreter on a CPU. TRITON_INTERPRET=1 must be set before Triton is imported, so
test_attribution_fused.py runs this file in a process of its own."""

from contextlib import contextmanager

import pytest
import torch
from test_attribution import READOUTS, make_case

from easyedit_nmke import apply_nmke_to_model
from easyedit_nmke.attribution import AttributionCache, Made, fused
from easyedit_nmke.attribution.masks import neuron_mask
from easyedit_nmke.methods.nmke import NMKEHyperParams
from easyedit_nmke.models import adding
from easyedit_nmke.models.updates import LowRank

# P, N, D, V: one of each, one tile and a bit, many prompts, a vocabulary of several tiles
SIZES = [(1, 1, 3, 5), (6, 33, 16, 129), (40, 17, 33, 37), (2, 70, 7, 500)]


def errors(case, norm, **settings):
    """Largest absolute error of the scores."""
    expected = case.scores(backend="reference", norm=norm)
    return float((case.scores(backend="fused", norm=norm, **settings) - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 1, 1), (16, 128, 3), (37, 131, 20)])
def test_columns_are_added_to_the_bit(dtype, rows, width, columns):
    g = torch.Generator().manual_seed(rows)
    sizes = (rows, width), (rows, columns), (columns, width)
    total, left, right = (torch.randn(*size, generator=g, dtype=dtype) for size in sizes)
    expected = total.clone()
    LowRank("w", left, right).added_to(expected, slice(None))
    adding.add_columns(total, left, right)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize(("size", "style"), [*((size, "layer softcap") for size in SIZES), *((SIZES[1], s) for s in READOUTS)])
def test_scores(size, style, norm):
    assert errors(make_case(size, style), norm) < 2e-5


@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_the_same_mask(norm):
    case = make_case((6, 130, 24, 70), "layer", seed=3)
    settings = NMKEHyperParams(model_name="x", layers=[0], mask_ties="exact")
    masks = [neuron_mask(case.scores(backend=name, norm=norm).double(), settings) for name in ("reference", "fused")]
    assert torch.equal(masks[0].mask, masks[1].mask) and 0 < masks[0].density < 1


@pytest.mark.parametrize("gain", [30.0, 300.0])
def test_large_logits(gain):
    """Logits in the hundreds: float32 carries an error of some 1e-7 of their size."""
    case = make_case((3, 63, 17, 300), "rms", seed=1, gain=gain)
    for norm in ("frozen", "exact"):
        assert errors(case, norm) < 1e-6 * gain + 2e-5


def test_padding_is_never_read():
    """Operands inside larger buffers of NaN: a tile that reaches past a ragged end would bring them in."""
    case = make_case((2, 33, 17, 130), "layer", seed=5)

    def embed(tensor):
        buffer = torch.full((tensor.shape[0] + 40, tensor.shape[1]), torch.nan)
        return buffer[: tensor.shape[0]].copy_(tensor)  # contiguous: the kernel is given this very memory, NaN behind it

    inside = case.but_readout(head=embed(case.readout.head)).but(w_out=embed(case.w_out.T).T, residual=embed(case.residual))
    for norm in ("frozen", "exact"):
        assert errors(inside, norm) < 2e-5


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_precisions_of_a_bfloat16_model(precision):
    """The head is bfloat16 already; only the values, times the norm's scale, are rounded once more."""
    case = make_case((6, 63, 64, 300), "rms", dtype=torch.bfloat16)
    expected = case.scores(backend="reference")
    args = (case.coefficients, case.residual, case.w_out, case.readout, case.target_ids, 30.0, case.final_hidden)
    after, before = fused.perturbed_log_probs(*args, precision=precision)
    error = float((after - before[:, None] - expected).abs().max() / expected.abs().max())
    assert error < (4e-3 if precision == "bf16" else 1e-5)  # measured: 2.3e-3


def test_prompts_and_neurons_in_parts():
    case = make_case((7, 130, 16, 70), "layer", seed=2)
    args = (case.coefficients, case.residual, case.w_out, case.readout, case.target_ids, 30.0, None)
    whole = fused.perturbed_log_probs(*args)
    group, width = fused._parts(7, 130, case.readout.head, torch.float32, 40_000)
    assert group < 7 and width < 130
    for a, b in zip(whole, fused.perturbed_log_probs(*args, budget=40_000), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="budget is 1000"):
        fused.perturbed_log_probs(*args, budget=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_reads_a_cache(dtype):
    """U stored, and a change of the weights as pending factors, through the same kernel."""
    case = make_case((3, 63, 20, 150), "layer", dtype=dtype)
    base, generator = case.w_out.clone(), torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 3, generator=generator), 0.1 * torch.randn(3, 63, generator=generator)
    case.w_out.add_(left @ right)
    made = Made(base, [LowRank("0", left, right)], lambda left: left, lambda count: case.w_out if count else base)
    held = AttributionCache().projection(0, case.w_out, case.readout, made)
    for final in (case.final_hidden, None):
        args = (case.coefficients, case.residual, case.w_out, case.readout, case.target_ids, 30.0, final)
        after, before = fused.perturbed_log_probs(*args, projection=held)
        expected = case.scores(backend="reference", norm="exact" if final is None else "frozen")
        error = float((after - before[:, None] - expected).abs().max() / expected.abs().max())
        assert held.width == 3 and error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_one_edit_writes_the_same_weights(tiny, nmke_hparams, requests, weights):
    written = {}
    for backend in ("reference", "fused"):
        model, tok = tiny("llama")
        settings = nmke_hparams(model, tok, attribution_backend=backend)
        apply_nmke_to_model(model, tok, requests(1), settings)
        written[backend] = weights(model, settings)
        assert model.nmke_state.reports[0].attribution.startswith(backend)
    assert all(torch.equal(written["reference"][layer], written["fused"][layer]) for layer in written["reference"])


@pytest.mark.parametrize("tile", [(64, 128, 32), (128, 128, 32), (128, 128, 64), (128, 256, 64)], ids=str)
def test_every_tile_of_the_table(tile, monkeypatch):
    monkeypatch.setattr(fused, "tile", lambda *_: fused.Tile(*tile, 4, 1))
    for norm in ("frozen", "exact"):
        assert errors(make_case((2, 70, 33, 500), "layer softcap"), norm) < 2e-5


def test_the_kernel_is_launched_on_the_gpu_of_its_operands(monkeypatch):
    """Every launch is inside `current(device)`: by itself Triton launches on the current GPU, whatever its operands are on."""
    inside, seen, plain = [], [], fused._kernel

    @contextmanager
    def current(device):
        inside.append(device)
        yield
        inside.pop()

    class Watched:
        def __getitem__(self, grid):
            seen.append(list(inside))
            return plain[grid]

    monkeypatch.setattr(fused, "current", current), monkeypatch.setattr(fused, "_kernel", Watched())
    case = make_case((2, 7, 8, 37))
    case.scores(backend="fused")
    assert seen == [[case.w_out.device]]


def test_a_planted_error_is_noticed(monkeypatch):
    """One word too few, the last: what a kernel that loses its ragged tile would sum."""
    case = make_case((6, 33, 16, 129), "rms")
    plain = fused._log_sums

    def loses_a_word(part, weight, head, stored, base, lean, *rest):
        return plain(part, weight, head, stored, torch.cat([base[:, :-1], base[:, -1:] - 1e4], 1), lean, *rest)

    monkeypatch.setattr(fused, "_log_sums", loses_a_word)
    assert errors(case, "frozen") > 1e-3


def test_a_cache_is_read_with_few_widths():
    """Each other one would compile the kernel anew, some seconds in each of the first edits."""
    case, widths = make_case((2, 33, 16, 129), "rms"), set()
    cache = AttributionCache()
    projection = cache.projection(0, case.w_out, case.readout, Made.of(case.w_out))
    for _ in range(20):
        weight, head, stored, _ = fused._operands(case.w_out, slice(None), case.readout, case.target_ids, projection, torch.float32)
        assert weight.shape[1] == head.shape[1] and weight.is_contiguous() and stored.shape == (33, 129)
        widths.add(weight.shape[1])
        projection._add(torch.randn(16, 1), torch.randn(1, 33), case.readout)
    assert widths == {0, 16, 32}
