"""Drift against plain numpy in one piece, and Jaccard overlaps of masks."""

import math

import numpy as np
import pytest
import torch

from easyedit_nmke.scores import drift
from easyedit_nmke.scores.drift import mask_overlap, weight_drift

SHAPES = [(1, 7), (63, 5), (300, 1000)]  # the last has more rows than are summed at once


def weights(shape, change, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator)
    scale = 10.0 ** torch.linspace(-8, 2, shape[1])  # neurons changed by very different amounts
    return before.to(dtype), (before + change * scale * torch.randn(shape, generator=generator)).to(dtype)


def plainly(before, after):
    """Every quantity from its definition."""
    old, new = (w.double().numpy() for w in (before, after))
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(old, new, strict=True)]
    moved = np.linalg.norm(new - old, axis=0)
    with np.errstate(divide="ignore"):
        relative = np.log10(moved / np.linalg.norm(old, axis=0))
    counts = np.zeros(28, int)
    for value in relative:
        counts[min(max(math.floor((value + 6) * 4), 0), 27) if np.isfinite(value) else 0] += 1
    return {
        "frobenius": np.linalg.norm(new - old) / np.linalg.norm(old),
        "row_cosine": np.mean(cosines),
        "wasserstein": np.mean(np.abs(np.sort(old, axis=None) - np.sort(new, axis=None))),
        "norm_before": np.linalg.norm(old),
        "norm": np.linalg.norm(new),
    }, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_drift_is_what_it_says(shape, dtype):
    before, after = weights(shape, 0.1, dtype=dtype)
    found = weight_drift(before, after)
    expected, counts = plainly(before, after)
    histogram = found.pop("histogram")
    assert found == pytest.approx(expected, rel=1e-12)
    assert histogram == {"edges": [-6 + k / 4 for k in range(29)], "counts": counts.tolist()}
    assert sum(histogram["counts"]) == shape[1]
    assert found["frobenius"] > 0.01 and found["row_cosine"] < 0.9999
    assert found["frobenius"] != pytest.approx(weight_drift(after, before)["frobenius"], rel=1e-3)


def test_changes_too_small_for_single_precision_sums_are_seen():
    """One entry in 300000 moved by 1e-3 of one: float32 norms are the same, their difference 0."""
    before, _ = weights(SHAPES[-1], 0)
    after = before.clone()
    after[7, 11] *= 1.001
    found = weight_drift(before, after)
    expected, counts = plainly(before, after)
    assert found["frobenius"] == pytest.approx(expected["frobenius"], rel=1e-9) and 0 < found["frobenius"] < 1e-5
    assert found["norm"] - found["norm_before"] == pytest.approx(expected["norm"] - expected["norm_before"], rel=1e-3) != 0
    assert found["histogram"]["counts"] == counts.tolist() and counts[0] == SHAPES[-1][1] - 1


def test_nothing_changed():
    before, _ = weights((63, 5), 0)
    before[:, 2] = 0  # a neuron without a value
    before[3] = 0  # a row without a direction
    found = weight_drift(before, before.clone())
    assert found["frobenius"] == found["wasserstein"] == 0 and found["row_cosine"] == pytest.approx(1, abs=1e-15)
    assert found["histogram"]["counts"] == [5] + [0] * 27
    grown = before.clone()
    grown[0, 2] = 1.0
    assert weight_drift(before, grown)["histogram"]["counts"] == [4] + [0] * 26 + [1]


def test_a_column_is_a_neuron_also_in_a_transposed_view():
    before, after = weights((63, 40), 0.1)
    found, stored = weight_drift(before, after), weight_drift(before.T.contiguous().T, after.T.contiguous().T)
    assert stored.pop("histogram") == found.pop("histogram") and stored == pytest.approx(found, rel=1e-12)
    assert sum(weight_drift(before.T, after.T)["histogram"]["counts"]) == 63


def test_many_entries_are_sampled(monkeypatch):
    before, _ = weights((300, 1000), 0)
    after = 1.1 * before + 0.05
    exact = weight_drift(before, after)
    monkeypatch.setattr(drift, "SAMPLE", 300_000)
    assert weight_drift(before, after) == exact
    monkeypatch.setattr(drift, "SAMPLE", 100_000)
    sampled = weight_drift(before, after)
    assert sampled == weight_drift(before, after), "the same sample every time"
    assert sampled["wasserstein"] != exact["wasserstein"]
    assert sampled["wasserstein"] == pytest.approx(exact["wasserstein"], rel=0.02)
    assert sampled | {"wasserstein": 0} == exact | {"wasserstein": 0}
    assert weight_drift(before, before)["wasserstein"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[:, 1:], r"shapes \[4, 6\] and \[4, 5\]"),
        (lambda w: w.flatten(), r"shapes \[4, 6\] and \[24\]"),
        (lambda w: w / 0, "finite"),
        (lambda w: w * float("nan"), "finite"),
    ],
)
def test_weights_that_cannot_be_compared(change, message):
    before = torch.ones(4, 6)
    with pytest.raises(ValueError, match=message):
        weight_drift(before, change(before))
    with pytest.raises(ValueError, match="at first not all 0"):
        weight_drift(0 * before, before)


def test_overlap_of_masks():
    def mask(*bits):
        return torch.tensor(bits, dtype=torch.bool)

    assert mask_overlap(mask(1, 1, 0, 0), mask(1, 0, 1, 0)) == 1 / 3
    assert mask_overlap(mask(1, 1, 0, 0), mask(1, 1, 0, 0)) == 1.0
    assert mask_overlap(mask(1, 0), mask(0, 1)) == 0.0
    assert mask_overlap(mask(0, 0), mask(0, 0)) == 1.0
    assert mask_overlap(mask(0, 0), mask(0, 1)) == 0.0
    with pytest.raises(ValueError, match=r"bool \[2\] and torch.bool \[3\]"):
        mask_overlap(mask(0, 1), mask(0, 1, 1))
    with pytest.raises(ValueError, match="both must be bool"):
        mask_overlap(mask(0, 1), mask(0, 1).float())
