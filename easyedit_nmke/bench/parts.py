"""The two heavy steps alone, one layer, at a shape's real size: the closed-form update and the attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..attribution import BACKENDS, LOWEST_LOG_PROB, AttributionCache, Made, neuron_scores, plain
from ..methods.solver import NullSpaceSolver
from ..models.arch import Readout
from .engines import CANNOT_RUN
from .machine import Clock, Measured, busy, check_device, spread, surroundings
from .shapes import RANK, SHAPES, orthonormal, shape_named, synthetic_keys

COSINE = 0.9  # between past keys: consecutive edits of like facts
NEURONS = 1024  # attributed at once on a CPU
PROMPTS = 6
PARTS = ("solve", "attribution")
L2 = 1.0  # against keys of length 1
APPENDED_AT_A_TIME = 128


LEGEND = (
    "ms: median over the edits. x: times as fast as the plain procedure. peak MB: above what was held before; held MB: past keys "
    "and what is kept of them (dense: P and K Kᵀ). equation: how far the update is from solving its equation, in float64, "
    "relative. difference: solve, relative, of the dense float32 solve to ours; attribution, largest of a score to the plain "
    "procedure's."
)


def sizes(name: str) -> tuple[int, int, int]:
    """(hidden D, neurons F, words V) of a shape."""
    config = shape_named(name).config
    if not config:
        raise ValueError(f"the parts are measured at the size of {', '.join(n for n, s in SHAPES.items() if s.config)}")
    if "n_embd" in config:
        return config["n_embd"], 4 * config["n_embd"], config["vocab_size"]
    return config["hidden_size"], config["intermediate_size"], config["vocab_size"]


def measure(
    part: str, shape: str, edits: int, at: Sequence[int], neurons: int | None, device: str, dtype: str,
    said: Callable[[str], None] = lambda _: None,
) -> dict:  # fmt: skip
    """What `solve` or `attribution` gives, with where it was measured. ValueError for settings that do not belong to the part."""
    check_device(device, dtype)
    if neurons and part != "attribution":
        raise ValueError("the number of neurons is chosen for the attribution only")
    solved = part == "solve"
    content = solve(shape, at, edits, device, said) if solved else attribution(shape, edits, neurons, device, dtype, said)
    size = ", ".join(
        f"{name} {content[name]}" for name in ("hidden", "neurons", "words", "prompts", "protected") if name in content
    )
    what = f"{part}, one layer of {shape} ({device}): {size}"
    return {**surroundings(), "part": part, "what": what, **content}


# ---- update


def solve(name: str, at: Sequence[int], edits: int, device: str = "cpu", said: Callable[[str], None] = lambda _: None) -> dict:
    """One layer's update for one key with `at` past keys: this package's solver, and at the last of `at` one dense float32 solve
    as EasyEdit makes it (P and the past keys' product given).

    "difference" is ||X - X'|| / ||X'|| of the dense one against ours; "equation" how far X is from solving
    (P (K Kᵀ + C) + L2·I) X = P K in float64, relative to P K: the dense solve's is float32's.
    """
    hidden, neurons, _ = sizes(name)
    generator = torch.Generator(device).manual_seed(0)
    said("random row space")
    basis = orthonormal(neurons, round(RANK * neurons), generator)
    keys = synthetic_keys(neurons, max(at) + edits, COSINE, generator)
    past, new = keys[:, : max(at)], keys[:, max(at) :]
    residual = torch.randn(hidden, 1, generator=generator, device=device) / hidden**0.5
    weight, results = torch.zeros(hidden, neurons, device=device), []
    solver, held = NullSpaceSolver(basis, L2), 0.0
    for count in at:
        said(f"{count} past keys")
        holding = Clock()
        with holding.phase("hold"):
            while solver.count < count:
                solver.append(past[:, solver.count : min(count, solver.count + APPENDED_AT_A_TIME)])
        held += holding.memory["hold"]
        update_with(solver, new[:, :1], residual, weight)  # not measured: the first of a size is slower
        solver.truncate(count)
        runs = []
        for column in range(edits):
            clock = update_with(solver, new[:, column : column + 1], residual, weight)
            solver.truncate(count)
            runs.append(clock)
        found = solver.directions(new[:, -1:]).double()
        results.append(
            {"engine": "this package", "at": count, "held_mb": held, **_summary(runs),
             "equation": _equation(found, new[:, -1:], past[:, :count], basis)}
        )  # fmt: skip
    said("dense solve")
    dense, theirs = _dense(basis, past[:, : at[-1]], new[:, -1:], residual, weight)
    results.append(
        {"engine": "dense float32", "at": at[-1], "held_mb": 2 * neurons**2 * 4 / 1e6, **_summary([dense]),
         "equation": _equation(theirs.double(), new[:, -1:], past[:, : at[-1]], basis),
         "difference": ((found - theirs).norm() / theirs.double().norm()).item()}
    )  # fmt: skip
    return {
        "hidden": hidden, "neurons": neurons, "protected": basis.shape[1], "cosine": COSINE, "l2": L2,
        "notes": busy(results, weight.device), "results": results,
    }  # fmt: skip


@torch.no_grad()
def update_with(solver, key: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Measured:
    """Solve, add to the weight, remember the key."""
    clock = Clock()
    with clock.phase("solve"):
        right = solver.directions(key).T.float()
    with clock.phase("apply"):
        weight.addmm_(residual, right)
    with clock.phase("append"):
        solver.append(key)
    return clock.measured()


@torch.no_grad()
def _dense(basis, past, key, residual, weight) -> tuple[Measured, torch.Tensor]:
    """(its cost, X [F, 1] for a residual of 1): X = solve(P (K Kᵀ + C) + L2·I, P K rᵀ) as EasyEdit computes it."""
    projector = -(basis @ basis.T)
    projector.diagonal().add_(1)
    products = past @ past.T
    clock = Clock()
    with clock.phase("solve"):
        system = projector @ (key @ key.T + products)
        system.diagonal().add_(L2)
        update = torch.linalg.solve(system, projector @ key @ residual.T)
    with clock.phase("apply"):
        weight += update.T
    found = update @ residual / residual.pow(2).sum()
    return clock.measured(), found


def _equation(x: torch.Tensor, key: torch.Tensor, past: torch.Tensor, basis: torch.Tensor) -> float:
    """||(P (K Kᵀ + C) + L2·I) x - P K|| / ||P K|| in float64, without a matrix [F, F]."""
    key, u = key.double(), basis.double()

    def project(columns):
        return columns - u @ (u.T @ columns)

    past = past.double()
    wanted = project(key)
    got = project(key @ (key.T @ x) + past @ (past.T @ x)) + L2 * x
    return ((got - wanted).norm() / wanted.norm()).item()


# ---- attribution


def attribution(
    name: str, edits: int, neurons: int | None = None, device: str = "cpu", dtype: str = "float32",
    said: Callable[[str], None] = lambda _: None,
) -> dict:  # fmt: skip
    """LPS scores of one layer's neurons (1024 of them on a CPU, all on a GPU, if not told) for six prompts: each backend, and the
    procedure prompt by prompt with full logits [neurons, V], as the published code has it.

    "difference": the largest of a score to the procedure's. "tflops": of the one product of vocabulary and values that all
    prompts share, against "peak_tflops", a plain product of the same matrices.
    """
    hidden, most, words = sizes(name)
    neurons = min(most, neurons or (NEURONS if torch.device(device).type == "cpu" else most))
    precision = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    said("random weights")
    head = (normal(words, hidden) / hidden**0.5).to(precision)
    readout = Readout("rms", torch.ones(hidden, device=device), None, 1e-5, head)
    values = (0.02 * normal(hidden, neurons)).to(precision)
    coefficients, residual = 0.3 * normal(PROMPTS, neurons), normal(PROMPTS, hidden)
    final = residual + normal(PROMPTS, hidden)
    targets = readout.logits(final.to(head)).argmax(1)
    said("plain product")
    work = 2.0 * hidden * neurons * words
    peak = work / min(_product(head, values) for _ in range(3)) / 1e12
    said("prompt by prompt")
    clock = Clock()
    with clock.phase("attribution"):
        wanted = per_prompt(coefficients, residual, values, readout, targets, final)
    results, notes = [{"engine": "prompt by prompt, full logits", **_summary([clock.measured()])}], []
    for backend in BACKENDS:
        if backend == "reference":
            continue
        said(backend)
        try:
            cache, runs = AttributionCache() if backend == "cached" else None, []
            for number in range(edits + 1):
                clock = Clock()
                with clock.phase("attribution"):
                    kept = {} if cache is None else {"projection": cache.projection(0, values, readout, Made.of(values))}
                    scores = neuron_scores(
                        coefficients, residual, values, readout, targets, final_hidden=final, backend=backend, **kept
                    )  # fmt: skip
                runs += [clock.measured()] if number else []  # the first compiles and fills caches
        except CANNOT_RUN as error:
            notes.append(f"without {backend}: {error}")
            continue
        summary = _summary(runs)
        result = {"engine": backend, **summary, "difference": (scores.float() - wanted).abs().max().item()}
        if cache is None:  # which is there to do without the product
            result |= {"tflops": work / summary["total"]["median"] / 1e12, "peak_tflops": peak}
        results.append(result)
    return {
        "hidden": hidden, "neurons": neurons, "words": words, "prompts": PROMPTS, "dtype": dtype,
        "notes": notes + busy(results, head.device), "results": results,
    }  # fmt: skip


def per_prompt(coefficients, residual, values, readout, targets, final, amplification: float = 30.0) -> torch.Tensor:
    """LPS [P, N] prompt by prompt, with full logits of every perturbed state."""
    after, before = plain.perturbed_log_probs(coefficients, residual, values, readout, targets, amplification, final)
    return after.clamp(LOWEST_LOG_PROB, 0) - before.clamp(LOWEST_LOG_PROB, 0)[:, None]


def _product(head: torch.Tensor, values: torch.Tensor) -> float:
    """Seconds of head · values, block by block of 8192 words, nothing kept."""
    clock = Clock()
    with clock.phase("product"):
        for block in head.split(8192):
            block @ values
    return clock.measured().total


def _summary(runs: Sequence[Measured]) -> dict:
    return {
        "edits": len(runs),
        "total": spread([run.total for run in runs]),
        "processor": spread([run.processor for run in runs]),
        "seconds": {name: spread([run.seconds[name] for run in runs]) for name in runs[0].seconds},
        "memory_mb": {name: max(run.memory[name] for run in runs) for name in runs[0].memory},
    }


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.3g}"


def rows(content: dict) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of what `solve` or `attribution` gives; "x" is how many times faster than the plain procedure."""
    results = content["results"]
    slow = next(r for r in results if r["engine"] in ("dense float32", "prompt by prompt, full logits"))
    phases = list(dict.fromkeys(name for r in results for name in r["seconds"]))
    numbers = {
        "past": "at", "held MB": "held_mb", "difference": "difference", "equation": "equation", "TFLOP/s": "tflops",
        "peak TFLOP/s": "peak_tflops",
    }  # fmt: skip
    numbers = {heading: key for heading, key in numbers.items() if any(key in r for r in results)}
    body = []
    for r in results:
        cells = [r["engine"], f"{1000 * r['total']['median']:.1f}"]
        cells.append(f"{1000 * r['total']['min']:.1f}..{1000 * r['total']['max']:.1f}")
        cells.append(f"{slow['total']['median'] / r['total']['median']:.1f}")
        cells += [f"{1000 * r['seconds'][p]['median']:.1f}" if p in r["seconds"] else "-" for p in phases]
        cells.append(f"{max(r['memory_mb'].values()):.0f}")
        cells += [_short(r[key]) if key in r else "-" for key in numbers.values()]
        body.append(cells)
    return ["engine", "ms", "min..max", "x", *phases, "peak MB", *numbers], body
