"""Products by oneDNN: torch's own, in another order of summing, and no gradient for weights; and at which precision."""

import pytest
import torch
from test_attribution import make_case

from easyedit_nmke.attribution import AttributionCache, cached, fast
from easyedit_nmke.models import products
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.updates import LowRank
from easyedit_nmke.statistics import covariance

FAMILIES = ["llama", "gpt2", "gptj"]


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 7, 1000), (63, 192, 7), (1000, 63, 192), (7, 1, 1), (0, 5, 3)])
def test_a_product_is_torchs(rows, width, out):
    x, weight, bias = drawn(2, rows, width), drawn(out, width), drawn(out)
    exact = x.double() @ weight.double().T
    for found, expected in (
        (products.linear(x, weight), exact),
        (products.linear(x, weight, bias), exact + bias.double()),
        (products.linear(x, drawn(width, out).T), x.double() @ drawn(width, out).double()),
        (products.linear(drawn(width, rows).T, weight), drawn(width, rows).double().T @ weight.double().T),
    ):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype):
    x, weight = drawn(3, 5, dtype=dtype), drawn(4, 5, dtype=dtype)
    assert torch.equal(products.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_frozen_model_gives_its_inputs_the_same_gradient_and_its_weights_none(tiny, monkeypatch, kind, intel):
    model, _ = tiny(kind)
    block, calls = ModelView(model).ffn(1), []
    x = drawn(2, 5, 32).requires_grad_()
    expected = block(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    apply = products._Linear.apply
    monkeypatch.setattr(products._Linear, "apply", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.setattr(products, "_is_intel", lambda: intel)
    with products.frozen(model):
        found = block(x)
    found.square().sum().backward()
    assert len(calls) == (0 if intel else 3 if kind == "llama" else 2) * torch.backends.mkl.is_available()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in block.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    calls.clear()
    block(x)
    assert not calls


@pytest.mark.parametrize("intel", [False, True])
def test_products_with_many_outputs_go_through_onednn_on_every_processor(monkeypatch, intel):
    calls, apply = [], products._Linear.apply
    monkeypatch.setattr(products._Linear, "apply", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.setattr(products, "_is_intel", lambda: intel)
    x, weight = drawn(7, 33).requires_grad_(), drawn(products.WIDE + 1, 33)
    expected = torch.nn.functional.linear(x, weight)
    wanted, up = torch.autograd.grad(expected, x, drawn(*expected.shape))[0], drawn(*expected.shape)
    found = products.product(x, weight)
    assert len(calls) == torch.backends.mkl.is_available() and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(found, x, up)[0], wanted, rtol=1e-4, atol=1e-2)
    assert torch.autograd.grad(products.product(x, weight.requires_grad_()).sum(), weight)[0].shape == weight.shape


# -- precision ---------------------------------------------------------------------------------------------------


PARTS = [part for part in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if products._settable(part)]


def precision():
    """torch's settings; None where it refuses to say one word for all parts."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None
    return overall, [part.fp32_precision for part in PARTS]


@pytest.fixture
def settings():
    """Put back as they were."""
    before = precision()
    yield
    torch.set_float32_matmul_precision(before[0])
    for part, value in zip(PARTS, before[1], strict=True):
        part.fp32_precision = value


def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def overall(value):
    return lambda: torch.set_float32_matmul_precision(value)


def part(number, value):
    return lambda: setattr(PARTS[number], "fp32_precision", value)


CHOICES = {"as it comes": lambda: None, "tf32": tf32, "high": overall("high"), "medium": overall("medium")}
if PARTS:
    CHOICES |= {"cuda part": part(0, "tf32"), "oneDNN part": part(1, "bf16")}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_exact_products_pin_the_precision_and_put_it_back(choose):
    choose()
    before = precision()
    for error in (None, ZeroDivisionError):
        try:
            with products.exact_products():
                assert precision() == ("highest", ["ieee"] * len(PARTS)) and not torch.backends.cuda.matmul.allow_tf32
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert precision() == before


def as_tf32(x):
    """Its ten bits behind the point."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_16_bits_are_multiplied_as_tf32_which_holds_them(dtype, tiny, monkeypatch):
    plain, seen = covariance.SecondMoment.add, []

    def add(moment, keys):
        seen.append(PARTS[0].fp32_precision == "tf32" if PARTS else torch.backends.cuda.matmul.allow_tf32)
        assert torch.equal(as_tf32(keys), keys) and keys.dtype == torch.float32
        plain(moment, keys)

    monkeypatch.setattr(covariance.SecondMoment, "add", add)
    before = precision()
    model, tok = tiny("llama")
    covariance.covariances(ModelView(model.to(dtype)), tok, ["The capital of France is Paris. " * 12], [0, 1])
    assert seen == [True, True] and precision() == before


@pytest.mark.usefixtures("settings")
def test_statistics_and_scores_are_computed_exactly(tiny, monkeypatch):
    """Whatever the user has set: what is kept in files, and what masks are chosen by, is the same."""
    torch.set_float32_matmul_precision("medium")
    seen = {}

    def watched(owner, name):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            overall, parts = precision()
            seen.setdefault(name, set()).add((overall, tuple(parts)))
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    model, tok = tiny("llama")
    view = ModelView(model)
    watched(covariance.SecondMoment, "add"), watched(fast, "perturbed_log_probs")
    watched(AttributionCache, "check"), watched(cached.Projection, "_add")
    covariance.covariances(view, tok, ["The capital of France is Paris. " * 12], [0])
    case, cache = make_case((2, 7, 8, 37)), AttributionCache()
    case.scores(backend="fast")
    zeros = [LowRank("0", torch.zeros(8, 1), torch.zeros(1, 7))]
    cache.projection(0, case.w_out, case.readout, cached.Made(case.w_out, zeros, lambda left: left, lambda count: case.w_out))
    exact = {("highest", ("ieee",) * len(PARTS))}
    assert seen == {name: exact for name in ("add", "perturbed_log_probs", "check", "_add")}
    assert torch.get_float32_matmul_precision() == "medium"
