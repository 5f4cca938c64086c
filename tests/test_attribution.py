"""neuron_scores against Eqs. 2-3 of DESIGN.md section 2, written out prompt by prompt and neuron by neuron in float64."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_nmke.attribution import alignment, neuron_scores
from easyedit_nmke.models.arch import Readout

BACKENDS = ["reference", "fast", "auto"]
# Largest error over the largest score. Measured: 2e-15 for the reference (float64), 3e-6 for the others (float32 or better).
TOLERANCE = {"reference": 1e-11, "fast": 3e-5, "auto": 3e-5}
# Scores that are differences of near-equal numbers have an absolute error, so below this size it no longer shrinks with them.
FLOOR = 0.01
# P, N, D, V: one of each, ragged, and wide enough in N or V to cross any block.
SIZES = [(1, 1, 3, 5), (1, 7, 1, 6), (2, 7, 8, 37), (7, 63, 33, 101), (3, 1000, 17, 211), (2, 5, 6, 20011), (1, 2503, 5, 31)]
READOUTS = {
    "rms": {"norm": "rms"},
    "rms softcap": {"norm": "rms", "softcap": 3.0},
    "rms bias": {"norm": "rms", "head_bias": True, "eps": 0.1},
    "layer": {"norm": "layer", "shift": True, "head_bias": True},
    "layer softcap": {"norm": "layer", "shift": True, "softcap": 2.0, "eps": 0.1},
}
METHODS = [("lps", "frozen"), ("lps", "exact"), ("psa", "frozen"), ("psa", "exact"), ("mpc", "frozen")]


# -- the equations, plainly --------------------------------------------------------------------------------------


def array(tensor):
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def final_norm(readout, y, hidden):
    """N(y), with the statistic of `hidden` when it is given (frozen) and of y itself otherwise (exact)."""
    source = y if hidden is None else hidden
    if readout.norm == "rms":
        return y / math.sqrt(np.mean(source**2) + readout.eps) * readout.scale
    normed = (y - y.mean()) / math.sqrt(np.mean((source - source.mean()) ** 2) + readout.eps) * readout.scale
    return normed if readout.shift is None else normed + readout.shift


def probability(readout, y, hidden, target):
    logits = readout.head @ final_norm(readout, y, hidden)
    if readout.head_bias is not None:
        logits = logits + readout.head_bias
    if readout.softcap is not None:
        logits = readout.softcap * np.tanh(logits / readout.softcap)
    weights = np.exp(logits - logits.max())
    return weights[target] / weights.sum()


def plain_readout(readout):
    fields = {name: array(getattr(readout, name)) for name in ("scale", "shift", "head", "head_bias")}
    return SimpleNamespace(norm=readout.norm, eps=readout.eps, softcap=readout.softcap, **fields)


def plain_scores(case, strategy="lps", norm="frozen", amplification=30.0):
    coefficients, residual, w_out = array(case.coefficients), array(case.residual), array(case.w_out)
    readout = plain_readout(case.readout)
    scores = np.zeros(coefficients.shape)
    for prompt, target in enumerate(case.target_ids.tolist()):
        x, hidden = residual[prompt], array(case.final_hidden[prompt]) if norm == "frozen" else None
        before = probability(readout, x, hidden, target)
        for neuron, coefficient in enumerate(coefficients[prompt]):
            value = w_out[:, neuron]
            if strategy == "mpc":
                scores[prompt, neuron] = abs(coefficient) * math.sqrt(np.sum(value**2))
                continue
            after = probability(readout, x + amplification * coefficient * value, hidden, target)
            if strategy == "psa":
                scores[prompt, neuron] = after - before
            else:
                scores[prompt, neuron] = math.log(min(max(after, 1e-8), 1)) - math.log(min(max(before, 1e-8), 1))
    return scores


def chances(case, norm):
    """p(. | x) of every prompt, [V] each."""
    readout, rows = plain_readout(case.readout), []
    for x, hidden in zip(array(case.residual), array(case.final_hidden), strict=True):
        words = range(case.readout.head.shape[0])
        rows.append(np.array([probability(readout, x, hidden if norm == "frozen" else None, word) for word in words]))
    return rows


def likeliest_words(case, norm):
    return [int(np.argmax(row)) for row in chances(case, norm)]


# -- inputs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    coefficients: torch.Tensor
    residual: torch.Tensor
    w_out: torch.Tensor
    readout: Readout
    target_ids: torch.Tensor
    final_hidden: torch.Tensor

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    def but_readout(self, **changes):
        names = ("norm", "scale", "shift", "eps", "head", "head_bias", "softcap")
        fields = {name: getattr(self.readout, name) for name in names}
        return self.but(readout=Readout(**{**fields, **changes}))

    def scores(self, **settings):
        inputs = (self.coefficients, self.residual, self.w_out, self.readout, self.target_ids)
        return neuron_scores(*inputs, **{"final_hidden": self.final_hidden, **settings})


def make_case(size, style="rms", seed=0, dtype=torch.float32, gain=1.0):
    prompts, neurons, width, words = size
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    choice = READOUTS[style]
    residual = normal(prompts, width)
    readout = Readout(
        norm=choice["norm"],
        scale=(1 + 0.3 * normal(width)).to(dtype),
        shift=(0.5 * normal(width)).to(dtype) if "shift" in choice else None,
        eps=choice.get("eps", 1e-5),
        head=(gain * normal(words, width) / math.sqrt(width)).to(dtype),
        head_bias=(0.5 * normal(words)).to(dtype) if "head_bias" in choice else None,
        softcap=choice.get("softcap"),
    )
    return Case(
        coefficients=(0.1 * normal(prompts, neurons)).to(dtype),
        residual=residual.to(dtype),
        w_out=(normal(width, neurons) / math.sqrt(width)).to(dtype),
        readout=readout,
        target_ids=torch.randint(words, (prompts,), generator=generator),
        final_hidden=(0.7 * residual + normal(prompts, width) + 0.3).to(dtype),
    )


cached_case = cache(make_case)


@cache
def cached_scores(size, style, strategy, norm):
    return plain_scores(cached_case(size, style), strategy, norm)


# -- comparison --------------------------------------------------------------------------------------------------


def error_of(got, expected):
    assert tuple(got.shape) == expected.shape
    got = array(got)
    assert np.isfinite(got).all(), "a score is not finite"
    return np.abs(got - expected).max() / max(np.abs(expected).max(), FLOOR)


def assert_scores(got, expected, tolerance):
    error = error_of(got, expected)
    assert error <= tolerance, f"error {error:.3g} > {tolerance:.3g} of the largest score"


def check(case, backend, tolerance=None, **settings):
    got = case.scores(backend=backend, **settings)
    assert_scores(got, plain_scores(case, **settings), tolerance or TOLERANCE[backend])


@pytest.fixture
def poisoned_memory():
    """torch.empty hands out NaN here, so a result that reads memory nobody wrote is not finite."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -- against the equations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("strategy", "norm"), METHODS)
@pytest.mark.parametrize("style", READOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores(size, style, strategy, norm, backend):
    case = cached_case(size, style)
    got = case.scores(strategy=strategy, norm=norm, backend=backend)
    assert_scores(got, cached_scores(size, style, strategy, norm), TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_are_lps_frozen_thirty(backend):
    case = cached_case((2, 7, 8, 37), "layer")
    got = case.scores(backend=backend)
    assert torch.equal(got, case.scores(backend=backend, strategy="lps", norm="frozen", amplification=30.0))
    assert_scores(case.scores(), cached_scores((2, 7, 8, 37), "layer", "lps", "frozen"), TOLERANCE["auto"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_input_types(backend, dtype):
    """Half-precision inputs are exact numbers too: what is computed from them is not computed in half precision."""
    for strategy, norm in METHODS:
        check(make_case((2, 33, 16, 37), "layer", dtype=dtype), backend, strategy=strategy, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_coefficients_on_a_bfloat16_model(backend):
    case = make_case((2, 33, 16, 37), "layer", dtype=torch.bfloat16)
    case = case.but(coefficients=case.coefficients.float() * 1.001, residual=case.residual.float() * 1.001)
    for strategy, norm in METHODS:
        check(case, backend, strategy=strategy, norm=norm)


def test_result_type():
    case = cached_case((2, 7, 8, 37), "rms")
    assert case.scores(backend="reference").dtype == torch.float64
    assert case.scores(backend="reference", strategy="mpc").dtype == torch.float64
    for backend in ("fast", "auto"):
        for strategy in ("lps", "psa", "mpc"):
            got = make_case((2, 7, 8, 37), dtype=torch.bfloat16).scores(backend=backend, strategy=strategy)
            assert got.dtype in (torch.float32, torch.float64)
            assert got.device == case.coefficients.device


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amplification", [0.5, 1.0, 300.0])
def test_amplification(amplification, backend):
    for strategy, norm in METHODS:
        check(cached_case((2, 63, 33, 101), "layer"), backend, strategy=strategy, norm=norm, amplification=amplification)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("style", ["rms", "layer"])
def test_large_logits(style, norm, backend):
    """Logits in the hundreds and thousands: exp overflows without care, most probabilities hit the clamp."""
    for gain in (100.0, 3000.0):
        case = make_case((3, 63, 17, 101), style, seed=1, gain=gain)
        case = case.but(target_ids=torch.tensor([*likeliest_words(case, norm)[:2], 0]))
        # float32 logits this large, about 4 times the gain, carry an error of some 1e-7 of their size, and so do the scores
        tolerance = None if backend == "reference" else 1e-6 * gain
        for strategy in ("lps", "psa"):
            check(case, backend, tolerance, strategy=strategy, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_are_clamped_for_lps_only(backend):
    case = make_case((4, 63, 17, 101), "rms", seed=2, gain=8.0)
    unlikeliest = [int(np.argmin(row)) for row in chances(case, "frozen")]
    assert min(row.min() for row in chances(case, "frozen")) < 1e-8
    case = case.but(target_ids=torch.tensor(unlikeliest))
    got = case.scores(backend=backend)
    # before is at the floor already, so no score can be lower; some are higher
    assert float(got.min()) >= -1e-6 and float(got.max()) > 1
    check(case, backend)
    check(case, backend, strategy="psa")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("style", ["rms", "layer"])
def test_outlier_dimensions_and_a_large_mean(style, norm, backend):
    """Trained models carry a few residual dimensions a hundred times the others; GPT-2 also a large mean."""
    case = make_case((3, 63, 33, 101), style, seed=3)
    residual, hidden = case.residual + 20, case.final_hidden + 20
    residual[:, 5] *= 100
    hidden[:, 5] *= 100
    tolerance = None if backend == "reference" else 1e-3
    check(case.but(residual=residual, final_hidden=hidden), backend, tolerance, norm=norm, amplification=3000.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_neurons_and_dead_values_score_zero(backend):
    case = make_case((3, 63, 17, 101), "layer", seed=4)
    case.coefficients[:, 5] = 0
    case.w_out[:, 7] = 0
    for strategy, norm in METHODS:
        got = case.scores(backend=backend, strategy=strategy, norm=norm)
        assert float(got[:, [5, 7]].abs().max()) <= 1e-5
        check(case, backend, strategy=strategy, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_last_word_as_target(backend):
    case = make_case((2, 7, 8, 37), "rms bias").but(target_ids=torch.tensor([0, 36]))
    for strategy, norm in METHODS:
        check(case, backend, strategy=strategy, norm=norm)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(2, 12), st.integers(1, 40)),
    st.sampled_from(sorted(READOUTS)),
    st.sampled_from(METHODS),
    st.floats(0.1, 100),
    st.integers(0, 10_000),
)
def test_any_shape(size, style, method, amplification, seed):
    case = make_case(size, style, seed)
    settings = {"strategy": method[0], "norm": method[1], "amplification": amplification}
    expected = plain_scores(case, **settings)
    # With so few words every score can be tiny (one word: exactly zero), so the error is not taken relative to them.
    scale = max(1.0, np.abs(expected).max())
    for backend in BACKENDS:
        got = array(case.scores(backend=backend, **settings))
        assert np.abs(got - expected).max() <= scale * TOLERANCE[backend]


# -- consequences of the equations -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("strategy", "norm"), METHODS)
def test_prompts_and_neurons_are_independent(strategy, norm, backend):
    case = cached_case((7, 63, 33, 101), "layer")
    settings = {"strategy": strategy, "norm": norm, "backend": backend}
    whole = array(case.scores(**settings))
    some = [40, 3, 17]
    for prompt in (0, 6):
        one = slice(prompt, prompt + 1)
        alone = case.but(
            coefficients=case.coefficients[one][:, some], w_out=case.w_out[:, some], residual=case.residual[one],
            target_ids=case.target_ids[one], final_hidden=case.final_hidden[one],
        )  # fmt: skip
        assert np.abs(array(alone.scores(**settings)) - whole[one][:, some]).max() <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["lps", "psa"])
def test_exact_norm_needs_no_final_hidden(strategy, backend):
    case = cached_case((2, 7, 8, 37), "layer")
    settings = {"strategy": strategy, "norm": "exact", "backend": backend}
    usual = case.scores(**settings)
    assert torch.equal(case.scores(final_hidden=None, **settings), usual)
    assert torch.equal(case.but(final_hidden=case.final_hidden * 3 + 1).scores(**settings), usual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mpc_reads_neither_vocabulary_nor_residual(backend):
    case = cached_case((2, 7, 8, 37), "layer")
    settings = {"strategy": "mpc", "backend": backend}
    usual = case.scores(**settings)
    other = case.but_readout(head=case.readout.head * 7).but(residual=case.residual + 1, target_ids=torch.tensor([1, 2]))
    assert torch.equal(other.scores(final_hidden=None, **settings), usual)
    assert torch.equal(case.scores(amplification=3.0, **settings), usual)


@pytest.mark.parametrize("neurons", [1, 7, 63, 1000])
def test_alignment_is_each_neurons_way_towards_the_value(neurons):
    case = make_case((3, neurons, 17, 5), dtype=torch.float64)
    toward = torch.linspace(-1, 2, 3 * 17, dtype=torch.float64).view(3, 17)
    wanted = torch.tensor(
        [
            [c * (v @ way) for c, v in zip(own, case.w_out.T, strict=True)]
            for own, way in zip(case.coefficients, toward, strict=True)
        ]
    )
    assert torch.allclose(alignment(case.coefficients, case.w_out, toward), wanted, rtol=1e-12)
    assert not torch.allclose(alignment(case.coefficients, case.w_out, toward.flip(0)), wanted, rtol=1e-2)


def test_alignment_is_not_to_be_had_without_a_value():
    with pytest.raises(ValueError, match="'align' compares neurons with the target value"):
        make_case((2, 7, 8, 37)).scores(strategy="align")


def test_frozen_layer_norm_takes_the_mean_from_y():
    """Moving final_hidden by a constant moves its mean and not its deviation."""
    case = make_case((2, 7, 8, 37), "layer", dtype=torch.float64)
    moved = case.but(final_hidden=case.final_hidden + 5)
    for backend in BACKENDS:
        assert_scores(moved.scores(backend=backend), array(case.scores(backend=backend)), TOLERANCE[backend])


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_in_larger_poisoned_buffers(poisoned_memory, backend):
    case = make_case((3, 63, 17, 101), "layer", seed=5)

    def embed(tensor):
        buffer = torch.full((tensor.shape[0] + 3, 2 * tensor.shape[1] + 5), math.nan)
        inside = buffer[2:-1, 3 : 3 + 2 * tensor.shape[1] : 2]
        return inside.copy_(tensor)

    names = ("coefficients", "residual", "final_hidden")
    strided = case.but(w_out=embed(case.w_out.T).T, **{name: embed(getattr(case, name)) for name in names})
    strided = strided.but_readout(head=embed(case.readout.head))
    for strategy, norm in METHODS:
        check(strided, backend, strategy=strategy, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend):
    case = make_case((2, 63, 17, 101), "layer", seed=6)
    names = ("coefficients", "residual", "w_out", "target_ids", "final_hidden")
    held = [getattr(case, name) for name in names] + [case.readout.scale, case.readout.shift, case.readout.head]
    copies = [tensor.clone() for tensor in held]
    for strategy, norm in METHODS:
        case.scores(backend=backend, strategy=strategy, norm=norm)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_is_built_through_parameters(backend):
    """w_out and the head are parameters; a graph through them would keep every block of [P, n, V] logits alive."""
    case = make_case((2, 63, 17, 101), "layer", seed=6)
    case.w_out.requires_grad_(True)
    case.readout.head.requires_grad_(True)
    for strategy, norm in METHODS:
        check(case, backend, strategy=strategy, norm=norm)
        assert not case.scores(backend=backend, strategy=strategy, norm=norm).requires_grad


# -- the comparison can fail -------------------------------------------------------------------------------------


def planted_errors(case):
    """Name -> (strategy, norm, what a slightly wrong implementation would say)."""
    target_off = case.but(target_ids=(case.target_ids + 1) % case.readout.head.shape[0])
    shuffled = case.but(w_out=case.w_out.roll(1, 1))
    return {
        "amplification off by 1 %": ("lps", "frozen", plain_scores(case, amplification=30.3)),
        "amplification off by 1 %, exact": ("lps", "exact", plain_scores(case, norm="exact", amplification=30.3)),
        "amplification off by 1 %, psa": ("psa", "frozen", plain_scores(case, "psa", amplification=30.3)),
        "value vectors off by 1 %": ("mpc", "frozen", 1.01 * plain_scores(case, "mpc")),
        "values of the next neuron": ("mpc", "frozen", plain_scores(shuffled, "mpc")),
        "exact for frozen": ("lps", "frozen", plain_scores(case, norm="exact")),
        "frozen for exact": ("lps", "exact", plain_scores(case)),
        "no eps": ("lps", "frozen", plain_scores(case.but_readout(eps=0.0))),
        "no shift": ("lps", "frozen", plain_scores(case.but_readout(shift=None))),
        "no head bias": ("lps", "frozen", plain_scores(case.but_readout(head_bias=None))),
        "no softcap": ("lps", "frozen", plain_scores(case.but_readout(softcap=None))),
        "softcap off by 1 %": ("psa", "frozen", plain_scores(case.but_readout(softcap=2.02), "psa")),
        "wrong word": ("lps", "frozen", plain_scores(target_off)),
        "psa for lps": ("lps", "frozen", plain_scores(case, "psa")),
        "one word missing": ("lps", "frozen", plain_scores(case.but_readout(
            head=case.readout.head[:-1], head_bias=case.readout.head_bias[:-1]))),
        "rms for layer": ("lps", "frozen", plain_scores(case.but_readout(norm="rms"))),
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_errors_are_noticed(backend):
    case = make_case((2, 33, 16, 37), "layer softcap", seed=7).but(target_ids=torch.tensor([3, 35]))
    case = case.but_readout(head_bias=torch.linspace(-0.5, 0.5, 37))
    for name, (strategy, norm, wrong) in planted_errors(case).items():
        got = case.scores(backend=backend, strategy=strategy, norm=norm)
        assert error_of(got, plain_scores(case, strategy, norm)) <= TOLERANCE[backend]
        assert error_of(got, wrong) > 20 * TOLERANCE[backend], f"'{name}' would go unnoticed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_wrong_score_is_noticed(backend):
    case = cached_case((7, 63, 33, 101), "rms")
    expected = cached_scores((7, 63, 33, 101), "rms", "lps", "frozen").copy()
    expected[6, 62] *= 1.01
    with pytest.raises(AssertionError, match="of the largest score"):
        assert_scores(case.scores(backend=backend), expected, TOLERANCE[backend])


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("strategy", "lpz"), ("backend", "turbo"), ("norm", "frosen")])
def test_unknown_names(name, value):
    with pytest.raises(ValueError, match=value):
        cached_case((2, 7, 8, 37), "rms").scores(**{name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["lps", "psa"])
def test_frozen_norm_needs_final_hidden(strategy, backend):
    with pytest.raises(ValueError, match="final_hidden"):
        cached_case((2, 7, 8, 37), "rms").scores(strategy=strategy, final_hidden=None, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "shape"), [
    ("coefficients", (2, 19)), ("coefficients", (19, 7)), ("residual", (2, 19)), ("residual", (19, 8)),
    ("w_out", (19, 7)), ("w_out", (8, 19)), ("target_ids", (19,)), ("final_hidden", (2, 19)), ("final_hidden", (19, 8)),
    ("coefficients", (19,)), ("w_out", (8, 7, 19)),
])  # fmt: skip
def test_shapes_that_do_not_match(name, shape, backend):
    case = cached_case((2, 7, 8, 37), "rms")
    wrong = torch.zeros(shape, dtype=torch.int64) if name == "target_ids" else torch.ones(shape)
    with pytest.raises(ValueError, match="19"):
        case.but(**{name: wrong}).scores(backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["coefficients", "residual", "w_out", "final_hidden"])
def test_nan_is_refused(name, backend):
    case = cached_case((2, 7, 8, 37), "rms")
    poisoned = getattr(case, name).clone()
    poisoned[1, 3] = math.nan
    with pytest.raises(ValueError, match=f"(?is)(?=.*{name})(?=.*(nan|finite))"):
        case.but(**{name: poisoned}).scores(backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("word", [-1, 37])
def test_target_ids_outside_the_vocabulary(word, backend):
    with pytest.raises(ValueError, match=f"{word}"):
        cached_case((2, 7, 8, 37), "rms").but(target_ids=torch.tensor([3, word])).scores(backend=backend)
