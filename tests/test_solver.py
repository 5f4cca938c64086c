"""NullSpaceSolver against the dense solve of DESIGN.md section 2, in float64, with P = I - U U^T written out in full."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_nmke.methods.solver import NullSpaceSolver

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SIZES = [(1, 0), (1, 1), (7, 0), (7, 3), (7, 7), (63, 20), (1000, 0), (1000, 300)]


# -- the equations, plainly --------------------------------------------------------------------------------------


def array(tensor):
    return tensor.detach().double().cpu().numpy()


def dense_update(row_space, l2, past, keys, residual, mask=None, project=True):
    """X = solve(P (K K^T + C) + L2 I, P K r^T); mask * X; transposed. `past` is a list of [N, k] tensors."""
    basis, keys, residual = array(row_space), array(keys), array(residual)
    size = keys.shape[0]
    projector = np.eye(size) - basis @ basis.T if project else np.eye(size)
    seen = np.zeros((size, size))
    for block in past:
        for column in array(block).T:
            seen += np.outer(column, column)
    for column in keys.T:
        seen += np.outer(column, column)
    solution = np.linalg.solve(projector @ seen + l2 * np.eye(size), projector @ keys @ residual.T)
    if mask is not None:
        solution = array(mask)[:, None] * solution
    return solution.T


# -- inputs ------------------------------------------------------------------------------------------------------


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_row_space(size, rank, seed=0, dtype=torch.float64):
    return torch.linalg.qr(normal(size, size, seed=seed))[0][:, :rank].to(dtype)


def make_keys(size, count, seed, dtype=torch.float64, cosine=0.0):
    """[N, k] keys of norm about 3 whose pairwise cosine is about `cosine`; the same shared direction for every seed."""
    shared = normal(size, 1, seed=999) / math.sqrt(size)
    own = normal(size, count, seed=seed) / math.sqrt(size)
    return (3.0 * (math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * own)).to(dtype)


def complement(row_space):
    """V of the rest of the space; V Vᵀ = I - U Uᵀ."""
    rank = row_space.shape[1]
    return torch.linalg.qr(row_space.double(), mode="complete").Q[:, rank:].to(row_space.dtype)


def solver_with(row_space, l2, past, null=False):
    solver = NullSpaceSolver(complement(row_space) if null else row_space, l2, null=null)
    for block in past:
        solver.append(block)
    return solver


# -- comparison --------------------------------------------------------------------------------------------------


def relative_error(got, expected):
    got = array(got)
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    assert np.isfinite(got).all(), "the update is not finite"
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-3)


def assert_update(got, expected, tolerance):
    error = relative_error(got, expected)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


@pytest.fixture
def poisoned_memory():
    """torch.empty hands out NaN here, so a result that reads memory nobody wrote is not finite."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -- against the dense solve -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "rank"), SIZES)
def test_update_without_past_keys(size, rank, dtype):
    row_space = make_row_space(size, rank, dtype=dtype)
    for count, width, l2 in [(1, 5, 10.0), (3, 1, 1.0)]:
        keys = make_keys(size, count, seed=1, dtype=dtype)
        residual = normal(width, count, seed=2, dtype=dtype)
        got = NullSpaceSolver(row_space, l2).update(keys, residual)
        assert_update(got, dense_update(row_space, l2, [], keys, residual), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (7, 3), (63, 20), (63, 62), (200, 150)])
def test_null_basis_gives_what_the_row_space_gives(size, rank, dtype):
    row_space, past = make_row_space(size, rank, dtype=dtype), [make_keys(size, count, 10 + count, dtype, 0.9) for count in (3, 90)]
    keys, residual = make_keys(size, 2, 1, dtype, 0.9), normal(5, 2, seed=2, dtype=dtype)
    mask = (normal(size, seed=3) > 0).to(dtype)
    got = solver_with(row_space, 10.0, past, null=True).update(keys, residual, mask)
    assert_update(got, dense_update(row_space, 10.0, past, keys, residual, mask), TOLERANCE[dtype])
    if rank:
        wrong = NullSpaceSolver(complement(row_space).roll(1, 0), 10.0, null=True).update(keys, residual, mask)
        assert relative_error(wrong, array(got)) > 1e-3


def test_a_soft_null_space_needs_the_row_space():
    with pytest.raises(ValueError, match="weighs the row space"):
        NullSpaceSolver(make_row_space(7, 3), 1.0, torch.ones(3), null=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize(("size", "rank"), SIZES)
def test_update_with_past_keys_and_mask(size, rank, cosine, dtype):
    row_space = make_row_space(size, rank, dtype=dtype)
    past = [make_keys(size, count, 10 + count, dtype, cosine) for count in (1, 4, 2)]
    keys, residual = make_keys(size, 3, 1, dtype, cosine), normal(5, 3, seed=2, dtype=dtype)
    mask = (normal(size, seed=3) > 0).to(dtype)
    solver = solver_with(row_space, 10.0, past)
    assert solver.count == 7
    for chosen in (None, mask):
        expected = dense_update(row_space, 10.0, past, keys, residual, chosen)
        assert_update(solver.update(keys, residual, chosen), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize(("size", "rank", "l2"), [(1, 0, 10.0), (7, 3, 10.0), (63, 20, 0.1), (200, 77, 10.0)])
def test_many_sequential_edits(size, rank, l2, cosine, dtype):
    row_space = make_row_space(size, rank, dtype=dtype)
    solver, past = NullSpaceSolver(row_space, l2), []
    for edit in range(66):
        keys, residual = make_keys(size, 1, 100 + edit, dtype, cosine), normal(4, 1, seed=500 + edit, dtype=dtype)
        if edit % 5 == 0:
            expected = dense_update(row_space, l2, past, keys, residual)
            assert_update(solver.update(keys, residual), expected, TOLERANCE[dtype])
        solver.append(keys)
        past.append(keys)
    assert solver.count == 66


def test_many_edits_of_several_keys_in_a_wide_layer():
    row_space, past = make_row_space(1000, 300), [make_keys(1000, 5, 20 + edit, cosine=0.9) for edit in range(15)]
    keys, residual = make_keys(1000, 4, 1, cosine=0.9), normal(33, 4, seed=2)
    got = solver_with(row_space, 1.0, past).update(keys, residual)
    assert_update(got, dense_update(row_space, 1.0, past, keys, residual), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_duplicate_keys(dtype):
    row_space = make_row_space(63, 20, dtype=dtype)
    key = make_keys(63, 1, 5, dtype)
    keys, residual = torch.cat([key, key], 1), normal(4, 2, seed=6, dtype=dtype)
    past = [key, torch.cat([key, key, key], 1), key]
    got = solver_with(row_space, 10.0, past).update(keys, residual)
    assert_update(got, dense_update(row_space, 10.0, past, keys, residual), TOLERANCE[dtype])


def test_zero_keys_and_keys_inside_the_row_space():
    row_space = make_row_space(63, 20)
    hidden = 3.0 * row_space[:, :2]
    past = [hidden, torch.zeros(63, 1, dtype=torch.float64), make_keys(63, 3, 7)]
    keys, residual = make_keys(63, 2, 8), normal(4, 2, seed=9)
    solver = solver_with(row_space, 10.0, past)
    assert_update(solver.update(keys, residual), dense_update(row_space, 10.0, past, keys, residual), 1e-10)
    assert_update(solver.update(hidden, residual), np.zeros((4, 63)), 1e-10)


def test_small_l2_and_large_keys():
    """Key energy 9e4 over L2 1e-2: the dense system has a condition number near 1e9, so neither side has 10 digits."""
    row_space, past = make_row_space(63, 20), [100 * make_keys(63, 10, 11)]
    keys, residual = 100 * make_keys(63, 2, 12), normal(4, 2, seed=13)
    got = solver_with(row_space, 1e-2, past).update(keys, residual)
    assert_update(got, dense_update(row_space, 1e-2, past, keys, residual), 1e-6)


def test_soft_mask_scales_columns():
    row_space, keys, residual = make_row_space(63, 20), make_keys(63, 2, 1), normal(5, 2, seed=2)
    mask = torch.rand(63, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    solver = NullSpaceSolver(row_space, 10.0)
    assert_update(solver.update(keys, residual, mask), dense_update(row_space, 10.0, [], keys, residual, mask), 1e-10)
    full = array(solver.update(keys, residual))
    assert_update(solver.update(keys, residual, torch.ones_like(mask)), full, 1e-15)
    assert not solver.update(keys, residual, torch.zeros_like(mask)).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    size = data.draw(st.integers(1, 24), label="N")
    rank = data.draw(st.integers(0, size), label="r")
    blocks = data.draw(st.lists(st.integers(1, 4), max_size=6), label="appends")
    count, width = data.draw(st.integers(1, 5), label="k"), data.draw(st.integers(1, 6), label="D")
    cosine, l2 = data.draw(st.sampled_from([0.0, 0.9]), label="cosine"), data.draw(st.sampled_from([0.5, 10.0]), label="l2")
    seed = data.draw(st.integers(0, 10_000), label="seed")
    row_space = make_row_space(size, rank, seed)
    past = [make_keys(size, block, seed + 1 + i, cosine=cosine) for i, block in enumerate(blocks)]
    keys, residual = make_keys(size, count, seed + 50, cosine=cosine), normal(width, count, seed=seed + 51)
    solver = solver_with(row_space, l2, past, null=data.draw(st.booleans(), label="null"))
    assert solver.count == sum(blocks)
    assert_update(solver.update(keys, residual), dense_update(row_space, l2, past, keys, residual), 1e-10)


# -- consequences of the equations -------------------------------------------------------------------------------


def test_update_leaves_the_row_space_alone_and_spares_past_keys():
    row_space, past = make_row_space(63, 20), [make_keys(63, 10, 30)]
    keys, residual = make_keys(63, 1, 31), normal(5, 1, seed=32)
    free = NullSpaceSolver(row_space, 0.01).update(keys, residual)
    spared = solver_with(row_space, 0.01, past).update(keys, residual)
    assert (spared @ row_space).abs().max() < 1e-12
    assert (spared @ past[0]).norm() < 0.05 * (free @ past[0]).norm()
    assert (spared @ keys - residual).norm() < 0.01 * residual.norm()


def test_update_is_zero_when_the_row_space_is_everything():
    got = NullSpaceSolver(make_row_space(7, 7), 10.0).update(make_keys(7, 2, 1), normal(3, 2, seed=2))
    assert_update(got, np.zeros((3, 7)), 1e-10)


def test_grouping_and_order_of_past_keys_do_not_matter():
    row_space, past = make_row_space(63, 20), make_keys(63, 12, 40, cosine=0.9)
    keys, residual = make_keys(63, 2, 41, cosine=0.9), normal(5, 2, seed=42)
    whole = array(solver_with(row_space, 1.0, [past]).update(keys, residual))
    for blocks in (past.split(1, 1), past.split([5, 1, 6], 1), past.flip(1).split(4, 1)):
        assert_update(solver_with(row_space, 1.0, blocks).update(keys, residual), whole, 1e-11)


# -- what the solver remembers -----------------------------------------------------------------------------------


def test_update_changes_neither_the_solver_nor_its_inputs():
    row_space, past = make_row_space(63, 20), make_keys(63, 4, 50)
    keys, residual, mask = make_keys(63, 2, 51), normal(5, 2, seed=52), torch.ones(63, dtype=torch.float64)
    solver = solver_with(row_space, 10.0, [past])
    inputs = [row_space, past, keys, residual, mask]
    copies = [tensor.clone() for tensor in inputs]
    first = solver.update(keys, residual, mask)
    kept = first.clone()
    solver.update(make_keys(63, 3, 53), normal(5, 3, seed=54))
    assert torch.equal(solver.update(keys, residual, mask), kept)
    assert torch.equal(first, kept)
    assert solver.count == 4
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


def test_past_keys_are_the_solvers_own_copy():
    row_space, past, keys = make_row_space(63, 20), make_keys(63, 4, 60), make_keys(63, 2, 61)
    residual = normal(5, 2, seed=62)
    expected = dense_update(row_space, 10.0, [past], keys, residual)
    solver = solver_with(row_space, 10.0, [past])
    past.fill_(math.nan)
    assert_update(solver.update(keys, residual), expected, 1e-10)


def test_two_solvers_do_not_share_past_keys():
    row_space, keys, residual = make_row_space(63, 20), make_keys(63, 2, 70), normal(5, 2, seed=71)
    first, second = NullSpaceSolver(row_space, 10.0), NullSpaceSolver(row_space, 10.0)
    first.append(make_keys(63, 4, 72))
    assert (first.count, second.count) == (4, 0)
    assert_update(second.update(keys, residual), dense_update(row_space, 10.0, [], keys, residual), 1e-10)


@pytest.mark.parametrize(("size", "rank", "before", "more"), [(63, 20, 3, 5), (7, 3, 2, 60), (7, 0, 30, 9), (1, 0, 1, 4)])
def test_truncate_undoes_appends(size, rank, before, more):
    row_space, past = make_row_space(size, rank), make_keys(size, before, 80, cosine=0.9)
    keys, residual = make_keys(size, 2, 81, cosine=0.9), normal(5, 2, seed=82)
    solver = solver_with(row_space, 1.0, [past])
    kept = array(solver.update(keys, residual))
    for column in make_keys(size, more, 83, cosine=0.9).split(1, 1):
        solver.append(column)
    assert solver.count == before + more
    assert relative_error(solver.update(keys, residual), kept) > 1e-6
    solver.truncate(before)
    assert solver.count == before
    assert_update(solver.update(keys, residual), kept, 1e-12)


def test_truncate_inside_a_block_then_append_again():
    row_space, past, later = make_row_space(63, 20), make_keys(63, 6, 90), make_keys(63, 3, 91)
    keys, residual = make_keys(63, 2, 92), normal(5, 2, seed=93)
    solver = solver_with(row_space, 1.0, [past])
    solver.truncate(6)
    assert solver.count == 6
    solver.truncate(4)
    solver.append(later)
    assert solver.count == 7
    expected = dense_update(row_space, 1.0, [past[:, :4], later], keys, residual)
    assert_update(solver.update(keys, residual), expected, 1e-10)
    solver.truncate(0)
    assert solver.count == 0
    assert_update(solver.update(keys, residual), dense_update(row_space, 1.0, [], keys, residual), 1e-10)


def test_memory_nobody_wrote_is_never_read(poisoned_memory):
    row_space, past = make_row_space(63, 20), [make_keys(63, count, 100 + count) for count in (1, 5, 2, 40)]
    wide = torch.full((80, 9), math.nan, dtype=torch.float64)
    wide[:63, ::4] = make_keys(63, 3, 101)
    keys, residual = wide[:63, ::4], normal(5, 3, seed=102)
    solver = NullSpaceSolver(row_space, 1.0)
    for done, block in enumerate(past):
        assert_update(solver.update(keys, residual), dense_update(row_space, 1.0, past[:done], keys, residual), 1e-10)
        solver.append(block)
    assert_update(solver.update(keys, residual), dense_update(row_space, 1.0, past, keys, residual), 1e-10)


# -- the comparison can fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", [False, True], ids=["rows", "null"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_planted_errors_are_noticed(dtype, null):
    tolerance = TOLERANCE[dtype]
    row_space = make_row_space(63, 20, dtype=dtype)
    past, keys = [make_keys(63, 4, 110, dtype)], make_keys(63, 2, 111, dtype)
    residual, mask = normal(5, 2, seed=112, dtype=dtype), (normal(63, seed=113) > 0).to(dtype)
    got = solver_with(row_space, 10.0, past, null).update(keys, residual, mask)
    assert_update(got, dense_update(row_space, 10.0, past, keys, residual, mask), tolerance)
    off_by_one = mask.clone()
    off_by_one[17] = 1 - off_by_one[17]
    wrong = {
        "no projector": dense_update(row_space, 10.0, past, keys, residual, mask, project=False),
        "one direction too few": dense_update(row_space[:, :-1], 10.0, past, keys, residual, mask),
        "no past keys": dense_update(row_space, 10.0, [], keys, residual, mask),
        "one past key lost": dense_update(row_space, 10.0, [past[0][:, :-1]], keys, residual, mask),
        "past keys twice": dense_update(row_space, 10.0, past + past, keys, residual, mask),
        "l2 off by 0.1 %": dense_update(row_space, 10.01, past, keys, residual, mask),
        "no mask": dense_update(row_space, 10.0, past, keys, residual),
        "mask off by one neuron": dense_update(row_space, 10.0, past, keys, residual, off_by_one),
        "masked before the solve": dense_update(row_space, 10.0, past, keys * mask[:, None], residual),
        "residual columns swapped": dense_update(row_space, 10.0, past, keys, residual.flip(1), mask),
    }
    for name, expected in wrong.items():
        assert relative_error(got, expected) > 5 * tolerance, f"'{name}' would go unnoticed"


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("l2", "named"), [(0.0, "0"), (-1.5, "-1.5"), (math.nan, "nan")])
def test_l2_must_be_positive(l2, named):
    with pytest.raises(ValueError, match=named):
        NullSpaceSolver(make_row_space(7, 3), l2)


@pytest.mark.parametrize("name", ["keys", "residual", "mask"])
def test_shapes_that_do_not_match(name):
    solver = NullSpaceSolver(make_row_space(7, 3), 10.0)
    inputs = {"keys": make_keys(7, 2, 1), "residual": normal(5, 2, seed=2), "mask": torch.ones(7, dtype=torch.float64)}
    wrong = {"keys": make_keys(11, 2, 1), "residual": normal(5, 11, seed=2), "mask": torch.ones(11, dtype=torch.float64)}
    with pytest.raises(ValueError, match="11"):
        solver.update(**{**inputs, name: wrong[name]})


def test_appending_the_wrong_shape_changes_nothing():
    solver = NullSpaceSolver(make_row_space(7, 3), 10.0)
    with pytest.raises(ValueError, match="11"):
        solver.append(make_keys(11, 2, 1))
    assert solver.count == 0


@pytest.mark.parametrize("shape", [(9,), (3, 7, 9), (7, 9)])
def test_row_space_must_be_a_matrix_with_no_more_columns_than_rows(shape):
    with pytest.raises(ValueError, match="9"):
        NullSpaceSolver(torch.ones(shape, dtype=torch.float64), 10.0)


@pytest.mark.parametrize("name", ["keys", "residual", "mask"])
def test_nan_in_an_update_is_refused(name):
    solver = NullSpaceSolver(make_row_space(7, 3), 10.0)
    inputs = {"keys": make_keys(7, 2, 1), "residual": normal(5, 2, seed=2), "mask": torch.ones(7, dtype=torch.float64)}
    inputs[name].view(-1)[1] = math.nan
    with pytest.raises(ValueError, match=f"(?is)(?=.*{name})(?=.*(nan|finite))"):
        solver.update(**inputs)


def test_nan_in_past_keys_is_refused():
    solver, keys = NullSpaceSolver(make_row_space(7, 3), 10.0), make_keys(7, 2, 1)
    keys[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        solver.append(keys)
    assert solver.count == 0


def test_nan_in_the_row_space_is_refused():
    row_space = make_row_space(7, 3)
    row_space[2, 2] = math.nan
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        NullSpaceSolver(row_space, 10.0)


@pytest.mark.parametrize("count", [-1, 4])
def test_truncate_to_a_count_that_never_was(count):
    solver = solver_with(make_row_space(7, 3), 10.0, [make_keys(7, 3, 1)])
    with pytest.raises(ValueError, match=str(count)):
        solver.truncate(count)
    assert solver.count == 3
