"""Products by oneDNN: torch's own, in another order of summing, and no gradient for weights."""

import pytest
import torch

from easyedit_nmke.models import products
from easyedit_nmke.models.arch import ModelView

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


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_frozen_model_gives_its_inputs_the_same_gradient_and_its_weights_none(tiny, monkeypatch, kind):
    model, _ = tiny(kind)
    block, calls = ModelView(model).ffn(1), []
    x = drawn(2, 5, 32).requires_grad_()
    expected = block(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    apply = products._Linear.apply
    monkeypatch.setattr(products._Linear, "apply", lambda *args: calls.append(1) or apply(*args))
    with products.frozen(torch.device("cpu")):
        found = block(x)
    found.square().sum().backward()
    assert len(calls) == (3 if kind == "llama" else 2) * torch.backends.mkl.is_available()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-6)
    assert not calls or all(p.grad is None for name, p in block.named_parameters())
