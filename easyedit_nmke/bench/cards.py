"""What devices can do: of four GPUs from their data sheets, of this machine by a small benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..messages import did_you_mean
from ..models.device import processor, synchronise, total_memory

EAGER_OP, WAIT = 6e-6, 20e-6  # seconds of the host for an operation of eager torch, and for a wait; no data sheet has them
SECONDS = 0.05  # of each measurement of this machine


@dataclass(frozen=True)
class Card:
    """Figures of a device: memory (bytes), bandwidth (bytes/s), rates of products by dtype (FLOP/s, dense, sums in float32 or
    better), exponentials/s, seconds of an operation's launch and of a wait for the device; whether it computes, moves
    bytes and is given launches at once; where the figures are from."""

    name: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    exponentials: float
    source: str
    launch: float = EAGER_OP
    wait: float = WAIT
    overlaps: bool = True


def _rates(bfloat16: float, float32: float, float64: float) -> Mapping[str, float]:
    """All of these cards multiply TF32 at half the rate of bfloat16."""
    half = {"bfloat16": bfloat16, "float16": bfloat16, "tf32": bfloat16 / 2}
    return MappingProxyType({**half, "float32": float32, "float64": float64})


# Exponentials: 16 a multiprocessor and clock (CUDA C++ Programming Guide, arithmetic instructions), times both at boost clock.
_HOPPER = _rates(989.4e12, 66.9e12, 66.9e12)
CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "h100": Card("H100 SXM", 80e9, 3.35e12, _HOPPER, 132 * 16 * 1.83e9, "NVIDIA H100 Tensor Core GPU data sheet"),
        "h200": Card("H200 SXM", 141e9, 4.8e12, _HOPPER, 132 * 16 * 1.83e9, "NVIDIA H200 Tensor Core GPU data sheet"),
        "a100": Card(
            "A100 SXM 80 GB", 80e9, 2.039e12, _rates(312e12, 19.5e12, 19.5e12), 108 * 16 * 1.41e9,
            "NVIDIA A100 Tensor Core GPU data sheet",
        ),
        "rtx4090": Card(
            "GeForce RTX 4090", 24e9, 1.008e12, _rates(165.2e12, 82.6e12, 1.29e12), 128 * 16 * 2.52e9,
            "NVIDIA Ada GPU architecture white paper, appendix A",
        ),
    }
)  # fmt: skip
HERE = "here"


def card_named(name: str, device: str = "cpu") -> Card:
    """A card of the table, or "here": `device` of this machine, measured. ValueError for another name."""
    if name == HERE:
        return measured(torch.device(device))
    if name not in CARDS:
        raise ValueError(f"no card {name!r}{did_you_mean(name, CARDS)}; known: {', '.join(CARDS)}, {HERE}")
    return CARDS[name]


@torch.no_grad()
def measured(device: torch.device) -> Card:
    """Figures of a device of this machine, in some seconds: products of the few dozen rows that a value's step has, a copy of
    256 MB, exponentials of a block in the cache, small additions, as they are launched in a forward and a backward pass."""
    ones = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype, device=device)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rows, weights = ones(64, 1024, dtype=dtype), [ones(2048, 1024, dtype=dtype) for _ in range(8)]
        products = lambda rows=rows, weights=weights: [torch.nn.functional.linear(rows, weight) for weight in weights]
        rates[str(dtype).removeprefix("torch.")] = 2 * 64 * 1024 * 2048 * 8 / _seconds(products)
    large, block, small = ones(1 << 25), ones(1 << 18), ones(8, 8)
    out = torch.empty_like(large)
    copying = _seconds(lambda: out.copy_(large))
    exponentials = _seconds(lambda: torch.exp2(block))
    launch = _seconds(lambda: [small + small for _ in range(100)]) / 100
    wait = 0.0 if device.type == "cpu" else _seconds(lambda: small.sum().item()) - launch
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Card(
        name, total_memory(device), 8 * large.numel() / copying, {**rates, "float16": rates["bfloat16"], "tf32": rates["float32"]},
        block.numel() / exponentials, "measured", launch, wait, device.type != "cpu",
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    """Of one call; the fastest of several, within SECONDS."""

    def once() -> float:
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        return time.perf_counter() - started

    once()
    best, until = once(), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        best = min(best, once())
    return best
