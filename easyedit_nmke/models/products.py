"""Matrix products in all of float32's digits; on a CPU by oneDNN instead of MKL, which uses half the width of an AMD processor's
vector units.

Measured on Zen 5 in float32, one thread: 180 to 220 GFLOP/s for large products where MKL reaches 95, and 1.6 to 1.9 times as
fast for the few dozen rows of a target value's step. Both sum in float32; they round in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch.nn.functional import linear as plain
from torch.overrides import TorchFunctionMode


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


def _settable(part) -> bool:
    """Whether torch is new enough (2.9) to have a setting for each kind of product."""
    return hasattr(part, "fp32_precision")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [.., K] · weightᵀ [K, N] + bias [N]. Without gradients where oneDNN does it (see `_serves`)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if _serves(x, weight) else plain(x, weight, bias)


def frozen(device: torch.device) -> AbstractContextManager:
    """Inside it the linear layers of a model on a CPU go through `linear`. Gradients reach their inputs, never their weights."""
    return _Frozen() if device.type == "cpu" else nullcontext()


class _Frozen(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is plain and not kwargs and _serves(*args[:2]):
            return _Linear.apply(*args)
        if func is torch.addmm and len(args) == 3 and not kwargs and _serves(*args[1:]):  # GPT-2's layers: weights [K, N]
            return _Linear.apply(args[1], args[2].T, args[0])
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.T), None, None


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
