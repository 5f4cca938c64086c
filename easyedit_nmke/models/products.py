"""Matrix products in all of float32's digits, each on a CPU by the library that is faster there: MKL, torch's own, or oneDNN.

MKL uses half the width of an AMD processor's vector units. Measured on Zen 5 in float32, one thread: oneDNN 180 to 220 GFLOP/s for
large products where MKL reaches 95, and 1.6 to 1.9 times as fast for the few dozen rows of a target value's step. On an Intel
Xeon (Emerald Rapids), one thread and 40 rows: forward both 85 to 95, backward MKL 105 to 128 and oneDNN 90; with a head's many
outputs and 14 rows MKL 17, oneDNN 54. The choice is by processor and shape alone. Both sum in float32; they round in another
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch.nn.functional import linear as plain

from .device import processor

WIDE = 8192  # outputs, from which on oneDNN is the faster one on an Intel processor too


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside it float32 products are summed from float32 factors, whatever the user has allowed elsewhere: TF32 on GPUs, TF32 or
    bfloat16 by oneDNN. What is computed once and kept, or compared, must not depend on that."""
    parts = [part for part in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if _settable(part)]
    before, overall = [part.fp32_precision for part in parts], None
    with suppress(RuntimeError):  # it cannot be told where the parts were set on their own; then they alone count
        overall = torch.get_float32_matmul_precision()
    try:
        if overall is not None:
            torch.set_float32_matmul_precision("highest")
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside it a GPU multiplies float32 factors as TF32. Factors that were bfloat16 or float16 are TF32 numbers already, so that
    their products are exact, at eight times the rate; they are summed in float32."""
    part = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if _settable(part) else ("allow_tf32", True)
    before = getattr(part, name)
    try:
        setattr(part, name, value)
        yield
    finally:
        setattr(part, name, before)


def _settable(part) -> bool:
    """Whether torch is new enough (2.9) to have a setting for each kind of product."""
    return hasattr(part, "fp32_precision")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [.., K] · weightᵀ [K, N] + bias [N]. Without gradients where oneDNN does it (see `_serves`)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if _serves(x, weight) else plain(x, weight, bias)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside it a model's parameters take no gradient, and its linear layers are computed by `product`."""
    layers = [module for module in model.modules() if _is_linear(module) and _prefers_onednn(_matrix(module))]
    with frozen_parameters(model):
        try:
            for module in layers:
                module.forward = partial(_forward, module)
            yield
        finally:
            for module in layers:
                vars(module).pop("forward", None)


@contextmanager
def frozen_parameters(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of the model takes a gradient; what did before does so again afterwards."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear`, by the library that is faster here; gradients reach x, and the weight where it wants one."""
    if not (_prefers_onednn(weight) and _serves(x, weight)):
        return plain(x, weight, bias)
    learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    return plain(x, weight, bias) if learns else _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ weight if _is_intel() else linear(gradient, weight.T), None, None


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether nothing but a product is computed there; GPT-2's Conv1D is one with the weight [in, out]."""
    return (type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D") and "forward" not in vars(module)


def _matrix(module: torch.nn.Module) -> torch.Tensor:
    """The weight as [out, in]."""
    return module.weight if type(module) is torch.nn.Linear else module.weight.T


def _forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return product(x, _matrix(module), module.bias)


def _prefers_onednn(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and (not _is_intel() or len(weight) >= WIDE)


def _is_intel() -> bool:
    return "Intel" in processor()


def _serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch would give this product to MKL, and oneDNN is there to take it."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
