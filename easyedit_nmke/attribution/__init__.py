"""How much one FFN neuron moves the prediction: LPS, PSA and MPC scores for every neuron and prompt (Eqs. 2 and 3).

The one expensive primitive is `perturbed_log_probs`: log p(target | x + λ c_n v_n) for all prompts and neurons, [P, N].
`reference.py` computes it straight from the equations in float64; `fast.py` shares one product over the vocabulary between all
prompts, `fused.py` (Triton) never writes it to memory, `cached.py` keeps it from edit to edit. LPS and PSA are one line above it.
`alignment` asks instead how far a neuron moves the stream towards a target value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..models.device import triton_problem
from ..models.products import exact_products
from . import fast, reference
from .cached import AttributionCache, Made, Projection

__all__ = [
    "BACKENDS", "NORMS", "STRATEGIES", "AttributionCache", "Made", "Projection", "Strategy", "alignment", "choose",
    "neuron_scores",
]  # fmt: skip

BACKENDS = ("reference", "fast", "fused", "cached")
NORMS = ("frozen", "exact")
LOWEST_LOG_PROB = math.log(1e-8)  # LPS clamps probabilities to [1e-8, 1]


@dataclass(frozen=True)
class Strategy:
    """A way to score neurons: its label in tables, and either `gain`, from log p(w | x + λ c_n v_n) [P, N] and log p(w | x) [P, 1]
    to scores [P, N], or without a vocabulary `size`, from |c| [P, N] and ||v|| [N]; one with neither is `alignment`."""

    label: str
    gain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    size: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "lps": Strategy("LPS", lambda after, before: after.clamp(LOWEST_LOG_PROB, 0) - before.clamp(LOWEST_LOG_PROB, 0)),
        "psa": Strategy("PSA", lambda after, before: after.exp() - before.exp()),
        "mpc": Strategy("MPC", size=torch.mul),
        "align": Strategy("ALIGN"),
    }
)


@exact_products()
@torch.no_grad()
def alignment(coefficients: torch.Tensor, w_out: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    """c_n ⟨v_n, z - h⟩ [P, N]: how far each neuron moves the stream towards its value. coefficients [P, N] at the token where the
    value is wanted, w_out [D, N], toward [P, D] the way z - h that is left to it. Of this package, not of the paper."""
    return coefficients * (toward @ w_out.to(toward))


@exact_products()
@torch.no_grad()
def neuron_scores(
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    w_out: torch.Tensor,
    readout,
    target_ids: torch.Tensor,
    *,
    strategy: str = "lps",
    amplification: float = 30.0,
    norm: str = "frozen",
    final_hidden: torch.Tensor | None = None,
    backend: str = "auto",
    projection: Projection | None = None,
) -> torch.Tensor:
    """Scores [P, N] of N neurons for P prompts, on coefficients' device.

    coefficients [P, N]: c at the attributed token; residual [P, D]: the stream x the FFN output is added to; w_out [D, N], its
    columns the neurons' values v_n; readout: `arch.Readout`; target_ids [P]: the token w whose probability is read.
    strategy: "lps" s = log p(w|x + λ c v) - log p(w|x), probabilities clamped to [1e-8, 1]; "psa" the same difference of
    probabilities; "mpc" |c|·||v||, no vocabulary. norm: "frozen" divides by the statistic of `final_hidden` [P, D] (the final
    norm's input), "exact" recomputes it for every perturbed state. backend: "auto", "reference" (float64), "fast", "fused", or
    "cached", which reads `projection` (`AttributionCache.projection`) instead of the values.
    ValueError for shapes that do not fit, names that are unknown, values that are not finite, a backend that cannot run here.
    """
    _check(coefficients, residual, w_out, readout, target_ids, strategy, amplification, norm, final_hidden, backend)
    way = STRATEGIES[strategy]
    if way.size is not None:
        dtype = torch.float64 if backend == "reference" else torch.promote_types(coefficients.dtype, torch.float32)
        return way.size(coefficients.to(dtype).abs(), torch.linalg.vector_norm(w_out, dim=0, dtype=dtype))
    if backend == "auto":
        backend, _ = choose(backend, w_out, readout)
    log_probs, options = _primitive(backend, w_out, projection)
    after, before = log_probs(
        coefficients, residual, w_out, readout, target_ids, amplification, final_hidden if norm == "frozen" else None, **options
    )
    return way.gain(after, before[:, None])


def choose(backend: str, w_out: torch.Tensor, readout, layers: int = 1, cache: AttributionCache | None = None) -> tuple[str, str]:
    """(name of the backend, why) for so many layers like w_out [D, N]. A named backend is checked: ValueError where it cannot run,
    MemoryError where its cache does not fit. "auto" takes "cached" where there is a `cache` that is a small part of the device's
    memory, else "fused" on a GPU that can, else "fast"."""
    device = "CUDA" if w_out.is_cuda else w_out.device.type.upper()
    missing = layers - (0 if cache is None else len(cache.layers))
    if backend != "auto":
        _primitive(backend, w_out, None, needs_projection=False)
        if backend == "cached":
            if cache is None:
                raise ValueError("attribution_backend is 'cached', but there is no state to keep the cache from edit to edit")
            cache.check(missing, w_out, readout)
        return backend, f"named, {device}"
    if cache is not None and cache.suits(layers, w_out, readout):
        return "cached", f"{device}, {layers * Projection.bytes(w_out, readout) / 1e9:.2g} GB are kept from edit to edit"
    if not w_out.is_cuda:
        return "fast", device
    try:
        _primitive("fused", w_out, None)
    except ValueError as error:
        return "fast", f"{device}, {error}"
    return "fused", f"{device}, {torch.cuda.get_device_name(w_out.device)}"


def _primitive(backend: str, w_out: torch.Tensor, projection: Projection | None, needs_projection: bool = True):
    """(perturbed_log_probs of a backend, its keywords); ValueError where it cannot run."""
    if backend == "cached":
        if needs_projection and projection is None:
            raise ValueError("backend 'cached' needs projection, of AttributionCache.projection; got None")
        backend, options = "fused" if w_out.is_cuda and _fused_problem(w_out) is None else "fast", {"projection": projection}
    else:
        options = {}
    if backend == "fused":
        problem = _fused_problem(w_out)
        if problem is not None:
            raise ValueError(f"backend 'fused' cannot run: {problem}; choose 'fast' or 'auto'")
        from . import fused

        return fused.perturbed_log_probs, options
    return (reference if backend == "reference" else fast).perturbed_log_probs, options


def _fused_problem(w_out: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot run here."""
    if problem := triton_problem(w_out.device):
        return problem
    if not w_out.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the weights are on {w_out.device}, not on a CUDA device"
    if w_out.dtype == torch.float64:
        return "its products are float32 at best, the weights are float64"
    return None


def _check(coefficients, residual, w_out, readout, target_ids, strategy, amplification, norm, final_hidden, backend) -> None:
    for name, value, allowed in (
        ("strategy", strategy, STRATEGIES),
        ("norm", norm, NORMS),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    if strategy == "align":
        raise ValueError("strategy 'align' compares neurons with the target value of an edit, and there is none; choose another")
    if coefficients.dim() != 2 or w_out.dim() != 2:
        raise ValueError(f"coefficients must be [P, N] and w_out [D, N], got {tuple(coefficients.shape)} and {tuple(w_out.shape)}")
    prompts, neurons = coefficients.shape
    hidden = w_out.shape[0]
    vocabulary = len(readout.head)
    expected = {
        "w_out": (w_out, (hidden, neurons)),
        "residual": (residual, (prompts, hidden)),
        "target_ids": (target_ids, (prompts,)),
        "readout.head": (readout.head, (vocabulary, hidden)),
        "readout.scale": (readout.scale, (hidden,)),
    }
    needs_vocabulary = STRATEGIES[strategy].gain is not None
    if needs_vocabulary and norm == "frozen":
        if final_hidden is None:
            raise ValueError("norm='frozen' needs final_hidden [P, D], the input of the final norm; got None")
        expected["final_hidden"] = (final_hidden, (prompts, hidden))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not math.isfinite(amplification) or amplification <= 0:
        raise ValueError(f"amplification is {amplification!r}, expected a number more than 0")
    finite = {"coefficients": coefficients, "residual": residual, "w_out": w_out, "final_hidden": final_hidden}
    for name in finite if needs_vocabulary else ("coefficients", "w_out"):
        if finite[name] is not None and not all(torch.isfinite(part).all() for part in finite[name].split(256)):
            raise ValueError(f"{name} holds NaN or infinite values")
    if prompts and not (int(target_ids.min()) >= 0 and int(target_ids.max()) < vocabulary):
        raise ValueError(f"target_ids must lie in 0..{vocabulary - 1}, got {target_ids.tolist()}")
