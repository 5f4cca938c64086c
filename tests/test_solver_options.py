"""The soft null space and the restricted solve against their formulas, solved densely in float64."""

import numpy as np
import pytest
import torch

from easyedit_nmke.methods.solver import CovarianceSolver, NullSpaceSolver, RestrictedSolver

SIZES = [(7, 0), (7, 3), (63, 20), (200, 150)]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def space(size, rank, spread=4.0):
    """(orthonormal U [N, r], λs [r] over several orders of magnitude)."""
    basis = torch.linalg.qr(normal(size, size, seed=0)).Q[:, :rank]
    return basis, 10 ** (spread * torch.rand(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - spread / 2)


def dense_soft(basis, strength, l2, past, keys, residual, rows):
    """X_S = (U_S diag(λs) U_Sᵀ + L2 I + C_SS + K_S K_Sᵀ)⁻¹ K_S rᵀ, zero elsewhere."""
    known = torch.cat([past, keys], 1)[rows].numpy()
    u = basis[rows].numpy()
    left = u @ np.diag(strength.numpy()) @ u.T + l2 * np.eye(len(u)) + known @ known.T
    out = np.zeros((len(basis), len(residual)))
    out[rows.numpy()] = np.linalg.solve(left, keys[rows].numpy() @ residual.numpy().T)
    return out.T


def dense_hard(basis, l2, past, keys, residual, rows):
    """X_S = (P_S (K_S K_Sᵀ + C_SS) + L2 I)⁻¹ P_S K_S rᵀ, P_S = I - U_S U_S⁺."""
    u, known = basis[rows].numpy(), torch.cat([past, keys], 1)[rows].numpy()
    projector = np.eye(len(u)) - u @ np.linalg.pinv(u) if u.shape[1] else np.eye(len(u))
    out = np.zeros((len(basis), len(residual)))
    left = projector @ known @ known.T + l2 * np.eye(len(u))
    out[rows.numpy()] = np.linalg.solve(left, projector @ keys[rows].numpy() @ residual.numpy().T)
    return out.T


def case(size, count=9, new=2, hidden=5):
    past, keys, residual = normal(size, count, seed=2), normal(size, new, seed=3), normal(hidden, new, seed=4)
    rows = torch.rand(size, generator=torch.Generator().manual_seed(5)) < 0.6
    rows[0] = True
    return past, keys, residual, rows


def distance(found, expected):
    return np.abs(found.numpy() - expected).max() / max(np.abs(expected).max(), 1e-3)  # nothing is free where rank >= neurons


def filled(solver, past):
    for column in past.T:
        solver.append(column[:, None])
    return solver


@pytest.mark.parametrize(("size", "rank"), SIZES)
def test_soft_null_space(size, rank):
    basis, strength = space(size, rank)
    past, keys, residual, rows = case(size)
    found = filled(NullSpaceSolver(basis, 0.3, strength), past).update(keys, residual)
    expected = dense_soft(basis, strength, 0.3, past, keys, residual, torch.ones(size, dtype=torch.bool))
    assert distance(found, expected) < 1e-10
    masked = filled(NullSpaceSolver(basis, 0.3, strength), past).update(keys, residual, rows.double())
    assert distance(masked, expected * rows.numpy()) < 1e-10
    if rank:
        wrong = dense_soft(basis, strength * 1.01, 0.3, past, keys, residual, torch.ones(size, dtype=torch.bool))
        assert distance(found, wrong) > 1e-6


def test_the_hard_null_space_is_the_limit_of_large_weights():
    basis, _ = space(63, 20)
    past, keys, residual, _ = case(63)
    hard = filled(NullSpaceSolver(basis, 0.3), past).update(keys, residual)
    soft = filled(NullSpaceSolver(basis, 0.3, torch.full((20,), 1e12)), past).update(keys, residual)
    assert torch.allclose(hard, soft, rtol=1e-6, atol=1e-9)
    none = filled(NullSpaceSolver(basis, 0.3, torch.zeros(20)), past).update(keys, residual)
    free = filled(NullSpaceSolver(basis[:, :0], 0.3), past).update(keys, residual)
    assert torch.allclose(none, free, rtol=1e-10)


@pytest.mark.parametrize(("size", "rank"), SIZES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_restricted_solve(size, rank, soft):
    basis, strength = space(size, rank)
    past, keys, residual, rows = case(size)
    solver = filled(RestrictedSolver(basis.float(), 0.3, strength if soft else None), past)
    if not soft and rows.sum() <= rank:
        with pytest.raises(ValueError, match=f"{rows.sum()} neurons are chosen and {rank} directions protected"):
            solver.update(keys, residual, rows.double())
        return
    found = solver.update(keys, residual, rows.double())
    past = past.float().double()  # kept in the precision of the weights
    basis = basis.float().double()
    args = (past, keys, residual, rows)
    expected = dense_soft(basis, strength, 0.3, *args) if soft else dense_hard(basis, 0.3, *args)
    assert distance(found, expected) < 1e-6
    assert not found[:, ~rows].any()


def test_a_restricted_solve_that_could_write_nothing_is_refused_with_both_numbers():
    basis, strength = space(63, 20)
    past, keys, residual, _ = case(63)
    solver, soft = filled(RestrictedSolver(basis, 0.3), past), filled(RestrictedSolver(basis, 0.3, strength), past)
    for chosen in (0, 1, 20):
        mask = (torch.arange(63) < chosen).double()
        said = f"{chosen} neurons are chosen and 20 directions protected, which must be fewer.*regularizer: covariance"
        with pytest.raises(ValueError, match=said) as refusal:
            solver.update(keys, residual, mask)
        assert not isinstance(refusal.value, FloatingPointError), "the settings are at fault, not the model"
        assert bool(soft.update(keys, residual, mask).any()) == (chosen > 0)
    assert solver.update(keys, residual, (torch.arange(63) < 21).double()).any()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_restricted_to_all_neurons_is_the_whole_solve(soft):
    basis, strength = space(63, 20)
    past, keys, residual, _ = case(63)
    strength = strength if soft else None
    whole = filled(NullSpaceSolver(basis, 0.3, strength), past).update(keys, residual)
    found = filled(RestrictedSolver(basis, 0.3, strength), past).update(keys, residual)
    assert torch.allclose(found, whole, rtol=1e-8, atol=1e-10)


def test_a_restricted_solve_spares_past_keys_and_writes_the_whole_edit():
    basis, _ = space(200, 30)
    past, keys, residual, rows = case(200, new=1)
    whole = filled(NullSpaceSolver(basis, 1e-6), past).update(keys, residual, rows.double())
    found = filled(RestrictedSolver(basis, 1e-6), past).update(keys, residual, rows.double())
    assert torch.allclose(found @ keys, residual, rtol=1e-4) and not torch.allclose(whole @ keys, residual, rtol=0.1)
    assert (found @ past).abs().max() < 1e-5 and (whole @ past).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [NullSpaceSolver, RestrictedSolver])
def test_a_solver_that_remembers_takes_the_others_place_bit_for_bit(kind):
    basis, strength = space(63, 20)
    past, keys, residual, _ = case(63)
    first = filled(kind(basis, 0.3, strength), past)
    memory = {name: tensor.clone() for name, tensor in first.memory().items()}
    second = kind(basis, 0.3, strength)
    second.remember(memory)
    for solver in (first, second):
        solver.append(keys)
    assert second.count == first.count == 11
    assert torch.equal(first.update(keys, residual), second.update(keys, residual))
    second.truncate(9)
    assert torch.equal(second.update(keys, residual), filled(kind(basis, 0.3, strength), past).update(keys, residual))


def test_a_strength_that_does_not_fit_is_refused():
    basis, _ = space(7, 3)
    for bad in (torch.ones(4), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, torch.nan, 1.0])):
        for kind in (NullSpaceSolver, RestrictedSolver):
            with pytest.raises(ValueError, match=r"strength must be \[3\] and not negative"):
                kind(basis, 0.3, bad)


@pytest.mark.parametrize("kind", [NullSpaceSolver, RestrictedSolver, CovarianceSolver])
@pytest.mark.parametrize("what", ["keys", "residual", "equations"])
def test_what_a_worn_out_model_gives_is_a_failed_edit(kind, what, monkeypatch):
    """Keys or a residual that are not finite, equations without a solution: a run counts such an edit as failed, and goes on."""
    _, keys, residual, _ = case(63)
    solver = kind(torch.eye(63, dtype=torch.float64)) if kind is CovarianceSolver else kind(space(63, 20)[0], 0.3)
    expected = solver.update(keys, residual)
    if what == "equations":
        solver.l2 = -1e9
        if kind is NullSpaceSolver:
            solver._past.l2 = -1e9
        if kind is CovarianceSolver:  # I + KᵀC⁻¹K is zero
            keys = torch.eye(63, dtype=torch.float64)[:, :2]
            monkeypatch.setattr(solver, "solve", torch.neg)
        with pytest.raises(FloatingPointError, match="no digits are left; raise"):
            solver.update(keys, residual)
        return
    broken = {"keys": keys, "residual": residual, what: torch.full_like({"keys": keys, "residual": residual}[what], torch.nan)}
    with pytest.raises(FloatingPointError, match=f"{what} holds NaN or infinite"):
        solver.update(**broken)
    assert torch.equal(solver.update(keys, residual), expected)
