"""neuron_mask against Eqs. 4-8 of DESIGN.md section 2, written out in plain Python floats, neuron by neuron."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from easyedit_nmke.attribution.masks import neuron_mask

SELECTIONS = ["both", "general", "specific", "overlap", "non_overlap", "all"]
DEFAULTS = {
    "neurons": "both",
    "ratio": "dynamic",
    "general_ratio": 0.5,
    "specific_ratio": 0.3,
    "general_bias": 0.3,
    "general_scale": 0.1,
    "general_power": 3.0,
    "specific_bias": 0.3,
    "specific_scale": 0.1,
    "specific_power": 2.0,
    "temperature": 30.0,
    "mask": "binary",
    "mask_ties": "include",
}


def options(**changes):
    return SimpleNamespace(**{**DEFAULTS, **changes})


# -- the equations, plainly --------------------------------------------------------------------------------------


def mean(values):
    return math.fsum(values) / len(values)


def general_counts(rows):
    """R of Eq. 4; one neuron alone has no unbiased deviation, so its z is 0."""
    size = len(rows[0])
    counts = [0] * size
    for row in rows:
        if size == 1:
            continue
        centre = mean(row)
        deviation = math.sqrt(math.fsum((score - centre) ** 2 for score in row) / (size - 1))
        for neuron, score in enumerate(row):
            if (score - centre) / (deviation + 1e-6) > 0:
                counts[neuron] += 1
    return counts


def specific_peaks(rows):
    """S of Eq. 5."""
    return [max(column) for column in zip(*rows, strict=True)]


def entropy_ratio(weights):
    """Entropy of the normalised weights over the largest possible one, in [0, 1]."""
    if len(weights) == 1:
        return 0.0
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    return min(max(entropy / math.log(len(weights)), 0.0), 1.0)


def general_ratio(rows, hparams):
    """Eq. 6."""
    if hparams.ratio == "fixed":
        return hparams.general_ratio
    ratios = [entropy_ratio([math.exp(hparams.temperature * (score - max(row))) for score in row]) for row in rows]
    return hparams.general_bias + hparams.general_scale * mean(ratios) ** hparams.general_power


def specific_ratio(peaks, hparams):
    """Eq. 7."""
    if hparams.ratio == "fixed":
        return hparams.specific_ratio
    positive = [max(peak, 0.0) for peak in peaks]
    if math.fsum(positive) < 1e-8:
        return hparams.specific_bias
    return hparams.specific_bias + hparams.specific_scale * entropy_ratio(positive) ** hparams.specific_power


def quantile(values, fraction):
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def keep(values, means, ratio, ties):
    """Eq. 8, one side of the "or"."""
    if ties == "include":
        cut = quantile(values, 1 - ratio)
        return [value >= cut for value in values]
    order = sorted(range(len(values)), key=lambda neuron: (-values[neuron], -means[neuron], neuron))
    chosen = set(order[: max(1, round(ratio * len(values)))])
    return [neuron in chosen for neuron in range(len(values))]


def select(general, specific, neurons):
    rules = {
        "both": lambda g, s: g or s,
        "general": lambda g, s: g,
        "specific": lambda g, s: s,
        "overlap": lambda g, s: g and s,
        "non_overlap": lambda g, s: g != s,
        "all": lambda g, s: True,
    }
    return [float(rules[neurons](g, s)) for g, s in zip(general, specific, strict=True)]


def soft(means, neurons):
    low, high = min(means), max(means)
    if neurons == "all" or low == high:
        return [1.0] * len(means)
    return [(value - low) / (high - low) for value in means]


def plain_mask(scores, hparams):
    rows = scores.double().tolist()
    counts, peaks, means = general_counts(rows), specific_peaks(rows), [mean(column) for column in zip(*rows, strict=True)]
    ratios = general_ratio(rows, hparams), specific_ratio(peaks, hparams)
    general = keep(counts, means, ratios[0], hparams.mask_ties)
    specific = keep(peaks, means, ratios[1], hparams.mask_ties)
    mask = soft(means, hparams.neurons) if hparams.mask == "soft" else select(general, specific, hparams.neurons)
    return SimpleNamespace(mask=mask, general=general, specific=specific, general_ratio=ratios[0], specific_ratio=ratios[1])


# -- comparison --------------------------------------------------------------------------------------------------


def assert_mask(got, expected, tolerance=1e-9):
    assert got.mask.is_floating_point()
    assert got.general.dtype == got.specific.dtype == torch.bool
    assert got.general.tolist() == expected.general
    assert got.specific.tolist() == expected.specific
    assert got.mask.shape == (len(expected.mask),)
    difference = max(abs(a - b) for a, b in zip(got.mask.tolist(), expected.mask, strict=True))
    assert difference <= max(tolerance, 1e-7), "the mask may be float32"
    assert float(got.general_ratio) == pytest.approx(expected.general_ratio, abs=tolerance)
    assert float(got.specific_ratio) == pytest.approx(expected.specific_ratio, abs=tolerance)


def check(scores, tolerance=1e-9, **changes):
    hparams = options(**changes)
    assert_mask(neuron_mask(scores, hparams), plain_mask(scores, hparams), tolerance)


def random_scores(prompts, size, seed=0, spread=1.0, dtype=torch.float64):
    return (spread * torch.randn(prompts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def every_option():
    return list(itertools.product(SELECTIONS, ["dynamic", "fixed"], ["binary", "soft"], ["include", "exact"]))


@pytest.fixture
def poisoned_memory():
    """torch.empty hands out NaN here, so a result that reads memory nobody wrote is not what the oracle says."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -- against the equations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 63, 1000])
@pytest.mark.parametrize("prompts", [1, 2, 6, 7])
def test_random_scores(prompts, size):
    for neurons in SELECTIONS:
        check(random_scores(prompts, size, seed=size + prompts, spread=0.05), neurons=neurons)


@pytest.mark.parametrize(("neurons", "ratio", "mask", "ties"), every_option())
def test_every_option(neurons, ratio, mask, ties):
    for prompts, size in [(1, 1), (1, 7), (6, 63)]:
        scores = random_scores(prompts, size, seed=3, spread=0.05)
        check(scores, neurons=neurons, ratio=ratio, mask=mask, mask_ties=ties)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.3, 1e4])
def test_scale_of_the_scores(spread, dtype):
    for mask, ties in itertools.product(["binary", "soft"], ["include", "exact"]):
        scores = random_scores(5, 63, seed=4, spread=spread, dtype=dtype)
        check(scores, tolerance=1e-9 if dtype == torch.float64 else 1e-5, mask=mask, mask_ties=ties)


@pytest.mark.parametrize("change", [
    {"general_bias": 0.1}, {"general_scale": 0.7}, {"general_power": 1.0}, {"specific_bias": 0.1}, {"specific_scale": 0.7},
    {"specific_power": 1.0}, {"temperature": 3.0}, {"ratio": "fixed", "general_ratio": 0.13},
    {"ratio": "fixed", "specific_ratio": 0.83},
])  # fmt: skip
def test_every_number_counts(change):
    scores = random_scores(6, 63, seed=5, spread=0.05)
    for ties in ("include", "exact"):
        check(scores, mask_ties=ties, **change)
    got, usual = neuron_mask(scores, options(**change)), neuron_mask(scores, options())
    moved = abs(got.general_ratio - usual.general_ratio) + abs(got.specific_ratio - usual.specific_ratio)
    assert moved > 1e-3


@pytest.mark.parametrize(("neurons", "ratio", "mask", "ties"), every_option())
@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, -7.0])
def test_all_equal_scores(value, neurons, ratio, mask, ties):
    for prompts, size in [(1, 1), (3, 7), (7, 63)]:
        check(torch.full((prompts, size), value, dtype=torch.float64), neurons=neurons, ratio=ratio, mask=mask, mask_ties=ties)


def test_all_equal_scores_by_hand():
    got = neuron_mask(torch.full((3, 8), 0.1, dtype=torch.float64), options())
    assert got.general.all() and got.specific.all() and got.mask.tolist() == [1.0] * 8
    assert float(got.general_ratio) == pytest.approx(0.4, abs=1e-12)
    assert float(got.specific_ratio) == pytest.approx(0.4, abs=1e-12)
    first = neuron_mask(torch.full((3, 8), 0.1, dtype=torch.float64), options(mask_ties="exact", neurons="overlap"))
    assert first.mask.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("ties", ["include", "exact"])
def test_negative_scores_give_the_specific_bias(ties):
    scores = -random_scores(4, 63, seed=6).abs() - 0.5
    check(scores, mask_ties=ties)
    assert float(neuron_mask(scores, options(specific_bias=0.21)).specific_ratio) == pytest.approx(0.21, abs=1e-12)


@pytest.mark.parametrize(("total", "is_bias"), [(0.0, True), (0.9e-8, True), (1.1e-8, False)])
def test_specific_sum_near_zero(total, is_bias):
    scores = torch.full((2, 4), -1.0, dtype=torch.float64)
    scores[0, :] = total / 4
    check(scores, neurons="specific")
    ratio = float(neuron_mask(scores, options(specific_bias=0.2)).specific_ratio)
    assert ratio == pytest.approx(0.2 if is_bias else 0.3, abs=1e-9)


def test_one_dominant_neuron_has_no_entropy():
    scores = torch.zeros(2, 63, dtype=torch.float64)
    scores[:, 17] = 1e4
    check(scores)
    got = neuron_mask(scores, options())
    assert float(got.general_ratio) == pytest.approx(0.3, abs=1e-12)
    assert float(got.specific_ratio) == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("ties", ["include", "exact"])
@pytest.mark.parametrize("score", [-2.0, 0.0, 3.0])
def test_one_neuron(score, ties):
    got = neuron_mask(torch.full((3, 1), score, dtype=torch.float64), options(mask_ties=ties))
    assert got.mask.tolist() == [1.0]
    assert got.general.tolist() == got.specific.tolist() == [True]
    assert float(got.general_ratio) == float(got.specific_ratio) == pytest.approx(0.3, abs=1e-12)


# Two prompts over eight neurons, each with mean 0.
#   R     =  2    2    1    1    1    1    0    0
#   S     =  4    4    2    1    1    2   -3   -3
#   mean  = 3.5  3.5   0    0    0   .5  -3.5  -4
HAND = torch.tensor([[4.0, 3, 2, 1, -1, -1, -3, -5], [3.0, 4, -2, -1, 1, 2, -4, -3]], dtype=torch.float64)


def by_hand(ratio, ties, neurons):
    hparams = options(ratio="fixed", general_ratio=ratio, specific_ratio=ratio, mask_ties=ties, neurons=neurons)
    return neuron_mask(HAND, hparams).mask.tolist()


def test_include_keeps_every_tie():
    """Ratio 0.4 of 8 is 3.2 neurons: the cut (position 4.2) falls among the four ties at R = 1 and the two at S = 2."""
    assert by_hand(0.4, "include", "general") == [1, 1, 1, 1, 1, 1, 0, 0]
    assert by_hand(0.4, "include", "specific") == [1, 1, 1, 0, 0, 1, 0, 0]
    assert by_hand(0.4, "include", "both") == [1, 1, 1, 1, 1, 1, 0, 0]
    assert by_hand(0.4, "include", "overlap") == [1, 1, 1, 0, 0, 1, 0, 0]
    assert by_hand(0.4, "include", "non_overlap") == [0, 0, 0, 1, 1, 0, 0, 0]
    assert by_hand(0.4, "include", "all") == [1] * 8


def test_include_when_the_cut_falls_between_two_values():
    """Position 0.8 * 7 = 5.6 lies between R = 1 and R = 2, and between S = 2 and S = 4."""
    assert by_hand(0.2, "include", "general") == [1, 1, 0, 0, 0, 0, 0, 0]
    assert by_hand(0.2, "include", "specific") == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 5), (0.25, 3), (0.75, 7), (1.0, 9)])
def test_include_when_the_cut_falls_on_a_neuron(ratio, kept):
    """Nine different scores: position (1 - ratio) * 8 is a whole number, and the neuron at the cut is kept."""
    scores = torch.tensor([[3.0, -1, 8, 2, 5, 6, 0, 7, 4]], dtype=torch.float64)
    got = neuron_mask(scores, options(ratio="fixed", specific_ratio=ratio, neurons="specific"))
    assert got.mask.tolist() == [float(rank >= 9 - kept) for rank in (3, 0, 8, 2, 5, 6, 1, 7, 4)]


def test_exact_breaks_ties_by_mean_then_index():
    assert by_hand(0.4, "exact", "general") == [1, 1, 0, 0, 0, 1, 0, 0]
    assert by_hand(0.4, "exact", "specific") == [1, 1, 0, 0, 0, 1, 0, 0]
    assert by_hand(0.5, "exact", "general") == [1, 1, 1, 0, 0, 1, 0, 0]
    assert by_hand(0.6, "exact", "general") == [1, 1, 1, 1, 0, 1, 0, 0]
    assert by_hand(0.6, "exact", "specific") == [1, 1, 1, 1, 0, 1, 0, 0]
    assert by_hand(0.12, "exact", "general") == [1, 0, 0, 0, 0, 0, 0, 0]
    assert by_hand(0.01, "exact", "specific") == [1, 0, 0, 0, 0, 0, 0, 0]


def test_soft_is_the_normalised_mean_score():
    means = [3.5, 3.5, 0, 0, 0, 0.5, -3.5, -4]
    expected = [(value + 4) / 7.5 for value in means]
    got = neuron_mask(HAND, options(mask="soft", neurons="specific"))
    assert got.mask.tolist() == pytest.approx(expected, abs=1e-7)
    assert neuron_mask(HAND, options(mask="soft", neurons="all")).mask.tolist() == [1.0] * 8


@pytest.mark.parametrize("size", [7, 63, 1000])
@pytest.mark.parametrize("ratio", [0.004, 0.1, 1 / 3, 0.77, 1.0])
def test_exact_keeps_exactly_the_count(size, ratio):
    scores = random_scores(3, size, seed=7).round()
    got = neuron_mask(scores, options(ratio="fixed", general_ratio=ratio, specific_ratio=ratio, mask_ties="exact"))
    count = max(1, round(ratio * size))
    assert int(got.general.sum()) == int(got.specific.sum()) == count
    check(scores, ratio="fixed", general_ratio=ratio, specific_ratio=ratio, mask_ties="exact")


@st.composite
def tied_scores(draw):
    """Multiples of 1/4, so that sums are exact in any precision and ties are everywhere."""
    prompts, size = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    values = draw(st.lists(st.integers(-6, 6), min_size=prompts * size, max_size=prompts * size))
    return torch.tensor(values, dtype=torch.float64).view(prompts, size) / 4


def clear_cut(ratio, size):
    """False where rounding alone decides: a cut on a sample point, or a count halfway between two integers."""
    position, count = (1 - ratio) * (size - 1), ratio * size
    return abs(position - round(position)) > 1e-6 and abs(count - math.floor(count) - 0.5) > 1e-6


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tied_scores(),
    st.sampled_from(SELECTIONS),
    st.sampled_from(["include", "exact"]),
    st.sampled_from([0.03, 0.11, 0.37, 0.49, 0.73]),
    st.sampled_from([0.07, 0.29, 0.51, 0.97]),
    st.booleans(),
)
def test_any_tied_scores(scores, neurons, ties, general, specific, fixed):
    hparams = options(neurons=neurons, mask_ties=ties)
    if fixed:
        hparams = options(neurons=neurons, mask_ties=ties, ratio="fixed", general_ratio=general, specific_ratio=specific)
    expected = plain_mask(scores, hparams)
    size = scores.shape[1]
    flat = size == 1 or all(len(set(row)) == 1 for row in scores.tolist())
    assume(flat or (clear_cut(expected.general_ratio, size) and clear_cut(expected.specific_ratio, size)))
    assert_mask(neuron_mask(scores, hparams), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tied_scores(), st.randoms(use_true_random=False))
def test_ties_included_do_not_depend_on_the_order_of_neurons(scores, random):
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    straight, shuffled = neuron_mask(scores, options()), neuron_mask(scores[:, order], options())
    assume(clear_cut(float(straight.general_ratio), len(order)) and clear_cut(float(straight.specific_ratio), len(order)))
    assert torch.equal(straight.mask[order], shuffled.mask)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tied_scores(), st.sampled_from(["include", "exact"]))
def test_selections_fit_together(scores, ties):
    masks = {name: neuron_mask(scores, options(neurons=name, mask_ties=ties)).mask for name in SELECTIONS}
    assert torch.equal(masks["both"], torch.maximum(masks["general"], masks["specific"]))
    assert torch.equal(masks["overlap"], masks["general"] * masks["specific"])
    assert torch.equal(masks["non_overlap"], masks["both"] - masks["overlap"])
    assert bool((masks["all"] == 1).all())


def test_general_and_specific_do_not_depend_on_the_mask():
    scores = random_scores(5, 63, seed=8)
    usual = neuron_mask(scores, options())
    for neurons, mask in itertools.product(SELECTIONS, ["binary", "soft"]):
        got = neuron_mask(scores, options(neurons=neurons, mask=mask))
        assert torch.equal(got.general, usual.general) and torch.equal(got.specific, usual.specific)


def test_scores_in_a_larger_poisoned_buffer(poisoned_memory):
    buffer = torch.full((12, 140), math.nan, dtype=torch.float64)
    buffer[1:6, 3:129:2] = random_scores(5, 63, seed=9)
    scores = buffer[1:6, 3:129:2]
    before = scores.clone()
    for mask, ties in itertools.product(["binary", "soft"], ["include", "exact"]):
        check(scores, mask=mask, mask_ties=ties)
    assert torch.equal(scores, before)


# -- the comparison can fail -------------------------------------------------------------------------------------


def changed(expected, **changes):
    return SimpleNamespace(**{**vars(expected), **changes})


def flipped(values, neuron):
    return [type(value)(1 - value) if index == neuron else value for index, value in enumerate(values)]


def test_planted_errors_are_noticed(monkeypatch):
    scores = random_scores(6, 63, seed=10, spread=0.05)
    got, expected = neuron_mask(scores, options()), plain_mask(scores, options())
    assert_mask(got, expected)
    wrong = {
        "mask off by one neuron": changed(expected, mask=flipped(expected.mask, 17)),
        "general off by one neuron": changed(expected, general=flipped(expected.general, 62)),
        "specific off by one neuron": changed(expected, specific=flipped(expected.specific, 0)),
        "temperature off by 1 %": plain_mask(scores, options(temperature=30.3)),
        "power of the paper": plain_mask(scores, options(general_power=1.0)),
        "bits or nats mixed": changed(expected, specific_ratio=0.3 + (expected.specific_ratio - 0.3) / math.log(2)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.specific_peaks", lambda rows: [mean(column) for column in zip(*rows, strict=True)])
        wrong["mean instead of peak"] = plain_mask(scores, options())
    for name, oracle in wrong.items():
        with pytest.raises(AssertionError):
            assert_mask(got, oracle)
            pytest.fail(f"'{name}' would go unnoticed", pytrace=False)


def test_losing_the_ties_is_noticed(monkeypatch):
    got = neuron_mask(HAND, options())
    assert_mask(got, plain_mask(HAND, options()))
    strictly = lambda values, means, ratio, ties: [value > quantile(values, 1 - ratio) for value in values]
    monkeypatch.setattr(f"{__name__}.keep", strictly)
    with pytest.raises(AssertionError):
        assert_mask(got, plain_mask(HAND, options()))


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("neurons", "generic"), ("ratio", "fluid"), ("mask", "fuzzy"), ("mask_ties", "random"),
])  # fmt: skip
def test_unknown_names(field, value):
    with pytest.raises(ValueError, match=value):
        neuron_mask(HAND, options(**{field: value}))


@pytest.mark.parametrize("shape", [(11,), (2, 3, 11), (0, 11), (11, 0)])
def test_scores_must_be_a_matrix_with_entries(shape):
    with pytest.raises(ValueError, match="11"):
        neuron_mask(torch.zeros(shape, dtype=torch.float64), options())


@pytest.mark.parametrize("neurons", ["both", "all"])
@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_nan_scores_are_refused(neurons, mask):
    scores = HAND.clone()
    scores[1, 5] = math.nan
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        neuron_mask(scores, options(neurons=neurons, mask=mask))
