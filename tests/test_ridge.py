"""The memory of past keys: what it holds depends on the keys alone, to the bit; 2000 of them against the dense float64 solve."""

import logging
import math

import numpy as np
import pytest
import torch
from counting import Counts

from easyedit_nmke.methods import ridge
from easyedit_nmke.methods.ridge import PANEL, Ridge, times, transposed_times
from easyedit_nmke.methods.solver import CovarianceSolver, NullSpaceSolver, RestrictedSolver

WIDTH = 150  # switches to the primal at 128 columns, refactors at 192, 256, …


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def correlated(size, count, seed=0, cosine=0.9):
    """float32 keys [N, count] of norm about 1 whose pairwise cosine is about `cosine`."""
    shared, own = normal(size, 1, seed=999), normal(size, count, seed=seed)
    return ((math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * own) / math.sqrt(size)).float()


def spaces(size, rank):
    """(U, V) of a random null space, float32."""
    basis = torch.linalg.qr(normal(size, size, seed=5)).Q.float()
    return basis[:, :rank].contiguous(), basis[:, rank:].contiguous()


def holding(columns, groups=(1,)):
    made = Ridge(len(columns), 0.3, columns.float())
    while made.count < columns.shape[1]:
        for group in groups:
            made.append(columns[:, made.count : made.count + group])
            if made.count == columns.shape[1]:
                break
    return made


def assert_same_bits(found: Ridge, expected: Ridge):
    assert (found.count, found._base) == (expected.count, expected._base)
    assert all(torch.equal(found.memory()[name], tensor) for name, tensor in expected.memory().items())
    assert (found._metric is None) == (expected._metric is None)
    assert found._metric is None or torch.equal(found._metric, expected._metric)
    assert found._factor.shape == expected._factor.shape and found._columns.shape == expected._columns.shape
    new = normal(found.width, 2, seed=77)
    assert torch.equal(found.solve(new), expected.solve(new))


# ---- a function of the columns alone


@pytest.mark.parametrize("count", [1, 63, 64, 100, 127, 128, 200, 260])
def test_grouping_does_not_matter(count):
    columns = normal(WIDTH, count, seed=0)
    one_by_one = holding(columns)
    for groups in ((count,), (7, 1), (70, 3), (PANEL,)):
        assert_same_bits(holding(columns, groups), one_by_one)


@pytest.mark.parametrize("count", [0, 5, 64, 70, 127, 128, 129, 191, 192, 205, 230])
def test_truncating_leaves_no_trace(count):
    columns = normal(WIDTH, 230, seed=0)
    found = holding(columns, (30,))
    found.truncate(count)
    assert_same_bits(found, holding(columns[:, :count], (30,)))
    found.append(columns[:, count:])
    assert_same_bits(found, holding(columns, (30,)))


DROPPED = [[], [229], [0], [5, 100], [127], [128, 129], [191, 3], [200, 210, 229], list(range(110)), list(range(230))]


@pytest.mark.parametrize("dropped", DROPPED, ids=lambda dropped: f"{len(dropped)} from {min(dropped, default=None)}")
def test_what_is_dropped_might_never_have_come(dropped):
    columns = normal(WIDTH, 230, seed=0)
    whole = holding(columns, (30,))
    kept = [i for i in range(230) if i not in dropped]
    twin = whole.without(dropped)
    assert_same_bits(twin, holding(columns[:, kept], (30,)))
    twin.append(normal(WIDTH, 3, seed=8))
    twin.truncate(len(kept) // 2)
    assert_same_bits(whole, holding(columns, (30,)))  # nothing is shared that either changes


def test_taking_back_the_last_key_factors_nothing_anew(monkeypatch):
    made = holding(normal(WIDTH, 230, seed=0))
    monkeypatch.setattr(Ridge, "_factor_next", lambda *_: pytest.fail("factored anew"))
    made.truncate(229)
    made.truncate(192)


def test_dropping_what_is_not_there():
    for wrong in ([3], [-1], [0, 5]):
        with pytest.raises(ValueError, match=f"there are 3 past keys, numbered from 0; got .*{wrong[-1]}"):
            holding(normal(7, 3, seed=0)).without(wrong)


@pytest.mark.parametrize("count", [0, 3, 100, 128, 200])
def test_memory_goes_on_where_it_was(count):
    columns = normal(WIDTH, count + 70, seed=0)
    first = holding(columns[:, :count], (30,))
    second = Ridge(WIDTH, 0.3, columns.float())
    second.append(columns[:, :3])
    second.remember({name: tensor.clone() for name, tensor in first.memory().items()})
    assert_same_bits(second, first)
    second.append(columns[:, count:])
    assert_same_bits(second, holding(columns, (30,)))


def test_a_memory_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"past keys are of shape \(3, 7\).*expected \[keys, 8\]"):
        Ridge(8, 0.3, torch.zeros(1)).remember(holding(normal(7, 3, seed=0)).memory())


@pytest.mark.parametrize(
    ("start", "stop", "method", "calls"),
    [
        (3, 5, "_factor_next", 2), (60, 70, "_factor_next", 1), (60, 70, "_factor_next", 3), (120, 130, "_absorb", 1),
        (120, 130, "_factor_next", 3), (205, 70, "_absorb", 1), (205, 70, "_factor_next", 4), (205, 150, "_factor_next", 6),
        (450, 520, "_factor_next", 1), (450, 330, "_factor_next", 5),
    ],
)  # fmt: skip
def test_a_failure_changes_nothing(monkeypatch, start, stop, method, calls):
    columns = normal(WIDTH if start < 450 else 1200, max(start, stop) + 60, seed=0)  # the wider stays in the dual
    made, right, left = holding(columns[:, :start], (30,)), getattr(Ridge, method), iter(range(calls, -1, -1))

    def fails(self, *args):
        right(self, *args)
        if next(left) == 1:
            raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Ridge, method, fails)
        made.append(columns[:, start:stop]) if stop > start else made.truncate(stop)
    assert_same_bits(made, holding(columns[:, :start], (30,)))
    made.append(columns[:, start:])
    assert_same_bits(made, holding(columns, (30,)))


# ---- 2000 correlated keys against the dense solve


def dense(u, l2, past, key):
    """A⁻¹ P k, A = P (k kᵀ + C) P + L2·I, in float64."""
    u, past, key = u.double(), past.double(), key.double()
    projector = torch.eye(len(u), dtype=torch.float64) - u @ u.T
    known = projector @ torch.cat([past, key], 1)
    return torch.linalg.solve(known @ known.T + l2 * torch.eye(len(u), dtype=torch.float64), projector @ key)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("null", "scale"), [(False, 0.01), (True, 0.01), (True, 1.0)])
def test_two_thousand_edits_with_correlated_keys(null, scale, caplog):
    caplog.set_level(logging.INFO, "easyedit_nmke.methods.ridge")
    rank = 700 if null else 300
    u, v = spaces(1024, rank)
    keys = correlated(1024, 2001)
    l2 = scale * (v.T @ keys).square().sum(0).mean().item()
    solver = NullSpaceSolver(v if null else u, l2, null=null)
    switch = PANEL * math.ceil((324 if null else 1024) / 2 / PANEL)
    for count in (switch - 1, switch + 5, 2000):
        solver.append(keys[:, solver.count : count])
        found, expected = solver.directions(keys[:, 2000:]), dense(u, l2, keys[:, :count], keys[:, 2000:])
        assert error(found, expected) < 3e-6
        assert error(found, dense(u, l2, keys[:, 1:count], keys[:, 2000:])) > 1e-5  # one key less would be noticed
    said = [record.message for record in caplog.records]
    assert said[0].startswith(f"switched to the primal at {switch} past keys")
    assert len(said) > 5 and all(message.startswith("refactored at") for message in said[1:])
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_several_hundred_edits_one_by_one_across_the_switch():
    u, v = spaces(512, 100)
    keys = correlated(512, 401)
    l2 = 0.01 * (v.T @ keys).square().sum(0).mean().item()
    solver = NullSpaceSolver(u, l2)
    for count in range(400):
        if count % 57 == 0 or 254 < count < 259:
            key = keys[:, count : count + 1]
            assert error(solver.directions(key), dense(u, l2, keys[:, :count], key)) < 3e-6
        solver.append(keys[:, count : count + 1])
    assert solver._past._base == 384
    solver._past._metric *= 1 + 1e-4
    assert error(solver.directions(keys[:, 400:]), dense(u, l2, keys[:, :400], keys[:, 400:])) > 1e-5


def test_a_residual_that_is_too_large_is_a_warning(caplog):
    keys = 1e5 * correlated(128, 64).double()
    Ridge(128, 1e-3, keys).append(keys)
    assert "more than 1e-08: raise L2" in caplog.text


def test_an_l2_that_leaves_no_digits_is_refused():
    key = 1e9 * normal(63, 1, seed=0)
    made = holding(normal(63, 2, seed=1))
    with pytest.raises(ValueError, match=r"L2 .* is too small for keys of energy .*raise L2") as refusal:
        made.append(torch.cat([key, key, key], 1))
    assert made.count == 2 and isinstance(refusal.value, FloatingPointError), "a run counts it as a failed edit"


# ---- solvers without some of their keys


@pytest.mark.parametrize("kind", ["rows", "null", "soft", "restricted"])
def test_a_solver_without_some_keys(kind):
    u, v = spaces(200, 70)
    strength = torch.linspace(0.1, 9, 70) if kind == "soft" else None

    def fed(keys):
        if kind == "restricted":
            solver = RestrictedSolver(u, 0.3)
        else:
            solver = NullSpaceSolver(v if kind == "null" else u, 0.3, strength, null=kind == "null")
        for key in keys.T:
            solver.append(key[:, None])
        return solver

    keys, new = correlated(200, 140), correlated(200, 2, seed=3)
    whole = fed(keys)
    before = whole.directions(new)
    for dropped in ([1], [130, 7], [139]):
        twin = whole.without(dropped)
        kept = [i for i in range(140) if i not in dropped]
        assert twin.count == len(kept) and type(twin) is type(whole)
        assert torch.equal(twin.directions(new), fed(keys[:, kept]).directions(new))
        assert not torch.equal(twin.directions(new), before)
    assert whole.count == 140 and torch.equal(whole.directions(new), before)


def test_a_solver_without_memory_is_its_own_twin():
    solver = CovarianceSolver(torch.eye(3))
    assert solver.without([0]) is solver


# ---- products in blocks


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 63), (63, 0), (0, 5), (1000, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_in_blocks(monkeypatch, rows, columns, dtype):
    monkeypatch.setattr(ridge, "SCRATCH", 100)
    matrix = normal(rows, columns, seed=0, dtype=dtype)
    right, left = normal(columns, 2, seed=1), normal(rows, 2, seed=2)
    assert np.allclose(times(matrix, right), matrix.double() @ right, rtol=1e-12, atol=1e-12)
    assert np.allclose(transposed_times(matrix, left), matrix.double().T @ left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("null", [False, True])
def test_launches_of_a_solve_do_not_grow_with_past_keys_on_a_gpu(monkeypatch, null):
    """Blocks of a GPU's size; of a CPU's, many times as many."""
    basis, past, new = spaces(600, 150)[0], correlated(600, 100), correlated(600, 1, seed=3)
    counted = {}
    for scratch in (ridge.CUDA_SCRATCH, 1 << 10):
        monkeypatch.setattr(ridge, "SCRATCH", scratch)
        for count in (10, 100):
            solver = NullSpaceSolver(basis, 0.1, null=null)
            solver.append(past[:, :count])
            with Counts() as counts, counts.phase("solve"):
                solver.directions(new)
            with counts, counts.phase("append"):
                solver.append(new)
            counted[scratch, count] = counts.launches, counts.waits
    large = [counted[ridge.CUDA_SCRATCH, count] for count in (10, 100)]
    assert large[0] == large[1] and large[0][0]["solve"] <= 35 and large[0][0]["append"] <= 45
    assert large[0][1]["solve"] <= 3 and large[0][1]["append"] <= 2
    assert counted[1 << 10, 100][0]["solve"] > 5 * large[0][0]["solve"]
    assert sum(-(-n // ridge.block_height(w, cuda=True)) for n, w in ((14336, 3584), (2000, 14336))) <= 3
