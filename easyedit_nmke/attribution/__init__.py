"""How much one FFN neuron moves the prediction: LPS, PSA and MPC scores for every neuron and prompt (Eqs. 2 and 3).

The one expensive primitive is `perturbed_log_probs`: log p(target | x + λ c_n v_n) for all prompts and neurons, [P, N].
`reference.py` computes it straight from the equations in float64; `fast.py` shares one product over the vocabulary between all
prompts. LPS and PSA are one line above it.
"""

from __future__ import annotations

import math

import torch

from . import fast, reference

BACKENDS = {"reference": reference.perturbed_log_probs, "fast": fast.perturbed_log_probs}
STRATEGIES = ("lps", "psa", "mpc")
NORMS = ("frozen", "exact")
LOWEST_LOG_PROB = math.log(1e-8)  # LPS clamps probabilities to [1e-8, 1]


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
) -> torch.Tensor:
    """Scores [P, N] of N neurons for P prompts, on coefficients' device.

    coefficients [P, N]: c at the attributed token; residual [P, D]: the stream x the FFN output is added to; w_out [D, N], its
    columns the neurons' values v_n; readout: `arch.Readout`; target_ids [P]: the token w whose probability is read.
    strategy: "lps" s = log p(w|x + λ c v) - log p(w|x), probabilities clamped to [1e-8, 1]; "psa" the same difference of
    probabilities; "mpc" |c|·||v||, no vocabulary. norm: "frozen" divides by the statistic of `final_hidden` [P, D] (the final
    norm's input), "exact" recomputes it for every perturbed state. backend: "auto", "fast" or "reference" (float64).
    ValueError for shapes that do not fit, names that are unknown, values that are not finite.
    """
    _check(coefficients, residual, w_out, readout, target_ids, strategy, amplification, norm, final_hidden, backend)
    if strategy == "mpc":
        dtype = torch.float64 if backend == "reference" else torch.promote_types(coefficients.dtype, torch.float32)
        return coefficients.to(dtype).abs() * w_out.to(dtype).norm(dim=0)
    log_probs = BACKENDS["fast" if backend == "auto" else backend]
    after, before = log_probs(
        coefficients, residual, w_out, readout, target_ids, amplification, final_hidden if norm == "frozen" else None
    )
    if strategy == "psa":
        return after.exp() - before.exp()[:, None]
    return after.clamp(LOWEST_LOG_PROB, 0) - before.clamp(LOWEST_LOG_PROB, 0)[:, None]


def _check(coefficients, residual, w_out, readout, target_ids, strategy, amplification, norm, final_hidden, backend) -> None:
    for name, value, allowed in (
        ("strategy", strategy, STRATEGIES),
        ("norm", norm, NORMS),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
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
    if strategy != "mpc" and norm == "frozen":
        if final_hidden is None:
            raise ValueError("norm='frozen' needs final_hidden [P, D], the input of the final norm; got None")
        expected["final_hidden"] = (final_hidden, (prompts, hidden))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not math.isfinite(amplification) or amplification <= 0:
        raise ValueError(f"amplification is {amplification!r}, expected a number more than 0")
    finite = {"coefficients": coefficients, "residual": residual, "w_out": w_out, "final_hidden": final_hidden}
    for name in finite if strategy != "mpc" else ("coefficients", "w_out"):
        if finite[name] is not None and not torch.isfinite(finite[name]).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    if prompts and not (int(target_ids.min()) >= 0 and int(target_ids.max()) < vocabulary):
        raise ValueError(f"target_ids must lie in 0..{vocabulary - 1}, got {target_ids.tolist()}")
