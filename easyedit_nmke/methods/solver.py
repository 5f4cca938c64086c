"""The closed-form updates: in the null space of old knowledge (AlphaEdit, NMKE), or weighed by its covariance (MEMIT, ROME).

The first never forms an [N, N] matrix. AlphaEdit's update for keys K and residual r, with all past keys C = past·pastᵀ and
P = I - UUᵀ = VVᵀ, is

    X = solve(P (K Kᵀ + C) + L2·I,  P K rᵀ)      [N, D],   w_out += (mask · X)ᵀ

X lies in range(P), so with B = P·past and b = P·K it is X = (B Bᵀ + b bᵀ + L2·I)⁻¹ b rᵀ: `Ridge` finds it, in the N coordinates of
P·k, or in the N - r of Vᵀk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch

from .ridge import Ridge, Unsolvable, cholesky, kept_columns, times, transposed_times


class _Solver:
    """An update is residual·directionsᵀ, whatever finds the directions. remembers: past keys are appended to it."""

    remembers = True

    def update(self, keys: torch.Tensor, residual: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The change of w_out [D, N] that moves the output at `keys` [N, k] by `residual` [D, k]; zero where `mask` [N] is.

        Returned in residual's dtype. Leaves the solver as it was. `Unsolvable` where keys, residual or mask are not finite, or the
        equations have no solution in floating point.
        """
        _check_residual(residual, keys)
        dtype = torch.promote_types(residual.dtype, torch.float32)  # not float64: [D, N] is large, and rounded once suffices
        return (residual.to(dtype) @ self.directions(keys, mask).T.to(dtype)).to(residual.dtype)


class NullSpaceSolver(_Solver):
    """Past keys of one layer, and the update they allow.

    basis [N, r]: orthonormal columns U that no update may touch (r may be 0), or with `null` columns V that span all the rest,
    which is less work where they are fewer. l2 > 0. Keys are kept projected, in the basis' dtype but no less than float32; every
    product is float64 (why: `ridge`). An update reads the basis twice and past keys twice, `append` the basis twice (V: once) and
    past keys once. Past N/2 keys, (N - r)/2 with `null`, `Ridge` switches to the primal and says so.

    strength [r] (soft null space): U are eigenvectors of E[c cᵀ] and `strength` their eigenvalues s times λ. Directions are then
    weighed instead of forbidden: X = solve(U·diag(λs)·Uᵀ + L2·I + C + K Kᵀ, K rᵀ). In place of P stands the square root
    G = I - U·diag(1 - sqrt(L2 / (L2 + λs)))·Uᵀ, applied to the keys and once more to X; P is its limit.
    """

    def __init__(self, basis: torch.Tensor, l2: float, strength: torch.Tensor | None = None, null: bool = False):
        _check_arguments(basis, l2, strength)
        if null and strength is not None:
            raise ValueError("a soft null space weighs the row space; give its basis, not the null space's")
        self.basis, self.null, self.l2 = basis, null, float(l2)
        self.strength = None if strength is None else strength.double()
        self._past = Ridge(basis.shape[1] if null else len(basis), self.l2, basis)

    @property
    def neurons(self) -> int:
        return len(self.basis)

    @property
    def count(self) -> int:
        """How many past keys."""
        return self._past.count

    def directions(self, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[N, k] float64: the update for any `residual` [D, k] at `keys` is residual·directionsᵀ."""
        _check(keys, mask, self.neurons)
        directions = self._past.solve(self._coordinates(keys))
        if self.null:
            directions = times(self.basis, directions)
        elif self.strength is not None:
            directions = self._coordinates(directions)
        return directions if mask is None else directions * mask[:, None].to(directions)

    def append(self, keys: torch.Tensor) -> None:
        """From now on, keep the outputs at `keys` [N, k]. When this fails, nothing has changed."""
        _check_keys(keys, self.neurons)
        self._past.append(self._coordinates(keys))

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` past keys."""
        self._past.truncate(count)

    def without(self, columns: Sequence[int]) -> NullSpaceSolver:
        """A new solver on the same basis that remembers all past keys but those numbered `columns` (from 0), in their order.

        Bit for bit what a solver would hold that was never given them, as long as keys appended together are dropped together;
        else the same up to the rounding of a projection (1e-15 before keys are rounded to the basis' dtype).
        """
        twin = copy(self)
        twin._past = self._past.without(columns)
        return twin

    def memory(self) -> dict[str, torch.Tensor]:
        """All that `append` has left, to be given to `remember` of a solver made from the same arguments."""
        return self._past.memory()

    def remember(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Take the place of the solver that `memory` comes from."""
        self._past.remember(memory)

    def _coordinates(self, keys: torch.Tensor) -> torch.Tensor:
        """P·keys (G·keys in a soft null space) [N, k], or Vᵀ·keys [N - r, k]; float64."""
        keys = keys.to(self.basis.device, torch.float64)
        share = transposed_times(self.basis, keys)
        if self.null:
            return share
        if self.strength is not None:
            share = share * (1 - (self.l2 / (self.l2 + self.strength)).sqrt())[:, None]
        return keys - times(self.basis, share)


class RestrictedSolver(_Solver):
    """`NullSpaceSolver` for updates solved on the masked neurons S alone, instead of masked after the solve:

        X_S = solve(P_S (K_S K_Sᵀ + C_SS) + L2·I, P_S K_S rᵀ),   P_S = I - Q Qᵀ,   Q = orth(U_S)

    in a hard null space and X_S = solve(U_S·diag(λs)·U_Sᵀ + L2·I + C_SS + K_S K_Sᵀ, K_S rᵀ) in a soft one. The edit is then whole
    and past keys stay protected. A hard null space must protect fewer directions than S has neurons: with more, nothing is left to
    write with. S changes with every edit, so nothing can be factored ahead: an update costs O(|S|·(r + t)²), or O(|S|³) where that
    is less. Past keys are kept as they are, N·t·4 bytes.

    The sum of such updates is the one-shot solution only where every edit chooses the same neurons, or where L2 (and λs) are small
    beside the keys' energy: what an edit could not write on its own neurons stays unwritten on later ones (`compensated`).
    """

    def __init__(self, row_space: torch.Tensor, l2: float, strength: torch.Tensor | None = None):
        _check_arguments(row_space, l2, strength)
        self.row_space, self.l2, self.strength = row_space, float(l2), strength
        self._keys = row_space.new_zeros((len(row_space), 0))

    @property
    def neurons(self) -> int:
        return len(self.row_space)

    @property
    def count(self) -> int:
        return self._keys.shape[1]

    def directions(self, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[N, k] float64: the update for any `residual` [D, k] at `keys` is residual·directionsᵀ."""
        rows, columns, _ = self._system(keys, mask)
        picks = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)[:, columns.shape[1] - keys.shape[1] :]
        return self._widened(ridge(columns, picks, None, self.l2), rows)

    def _system(self, keys: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(S [N] bool; columns [|S|, c] float64 that weigh an update besides L2: in a soft null space U_S·sqrt(λs), then past and
        new keys on S; Q [|S|, r], the directions that are left out, r = 0 in a soft one)."""
        _check(keys, mask, self.neurons)
        rows = torch.ones(self.neurons, dtype=torch.bool) if mask is None else mask != 0
        rows = rows.to(keys.device)
        new = keys[rows].double()
        seen, basis = torch.cat([self._keys[: self.neurons][rows].to(new), new], 1), self.row_space[rows].to(new)
        if self.strength is not None:
            return rows, torch.cat([basis * self.strength.to(new).sqrt(), seen], 1), basis[:, :0]
        if len(basis) <= basis.shape[1]:
            raise ValueError(
                f"the chosen neurons alone could write nothing: {len(basis)} neurons are chosen and {basis.shape[1]} directions "
                "protected, which must be fewer; protect fewer (raise nullspace_threshold or nullspace_fraction), choose more "
                "neurons, or set regularizer: covariance"
            )
        basis = torch.linalg.qr(basis).Q
        return rows, seen - basis @ (basis.T @ seen), basis

    @staticmethod
    def _widened(chosen: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[|S|, k] with zeros for the other neurons."""
        whole = chosen.new_zeros((len(rows), chosen.shape[1]))
        whole[rows] = chosen
        return whole

    def append(self, keys: torch.Tensor) -> None:
        """From now on, keep the outputs at `keys` [N, k]."""
        _check_keys(keys, self.neurons)
        self._keys = torch.cat([self._keys, keys.to(self._keys)], 1)

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` past keys."""
        if not 0 <= count <= self.count:
            raise ValueError(f"count must be from 0 to {self.count}, got {count}")
        self._keys = self._keys[:, :count]

    def without(self, columns: Sequence[int]) -> RestrictedSolver:
        """A new solver on the same row space that remembers all past keys but those numbered `columns`, bit for bit."""
        twin = copy(self)
        twin._keys = self._keys[:, kept_columns(self.count, columns)]
        return twin

    def memory(self) -> dict[str, torch.Tensor]:
        """All that `append` has left, to be given to `remember` of a solver made from the same arguments."""
        return {"keys": self._keys}

    def remember(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Take the place of the solver that `memory` comes from."""
        self._keys = memory["keys"].to(self._keys, copy=True)


def ridge(columns: torch.Tensor, targets: torch.Tensor, start: torch.Tensor | None, l2: float) -> torch.Tensor:
    """The X [n, k] that minimises ||columnsᵀX - targets||² + L2·||X - start||², (columns·columnsᵀ + L2·I)⁻¹ (columns·targets +
    L2·start), for targets [t, k]; by whichever of n and t is fewer. start [n, k]; None: zero."""
    n, t = columns.shape
    what = f"L2 {l2:.3g} is too small for these keys: no digits are left; raise L2"
    if n <= t:
        gram = columns @ columns.T + l2 * torch.eye(n, dtype=columns.dtype, device=columns.device)
        wanted = columns @ targets
        return torch.cholesky_solve(wanted if start is None else wanted + l2 * start, cholesky(gram, what))
    gram = columns.T @ columns + l2 * torch.eye(t, dtype=columns.dtype, device=columns.device)
    if start is None:
        return columns @ torch.cholesky_solve(targets, cholesky(gram, what))
    return start + columns @ torch.cholesky_solve(targets - columns.T @ start, cholesky(gram, what))


class CovarianceSolver(_Solver):
    """MEMIT's update X = solve(weight·C0 + K Kᵀ, K rᵀ) [N, D], w_out += (mask · X)ᵀ, with C0 = E[c cᵀ] of the unedited model.

    moment [N, N] is C0. Only the Cholesky factor of weight·C0 is kept, in float64 (14336 neurons: 1.6 GB a layer); with
    B = (weight·C0)⁻¹ K the update is B (I + Kᵀ B)⁻¹ rᵀ, O(k·N²) instead of N³. There is no memory of past keys.
    """

    count, remembers = 0, False

    def __init__(self, moment: torch.Tensor, weight: float = 1.0):
        if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
            raise ValueError(f"moment must be [neurons, neurons], got shape {tuple(moment.shape)}")
        if not torch.isfinite(moment).all():
            raise ValueError("moment holds NaN or infinite values")
        if not weight > 0:
            raise ValueError(f"weight must be more than 0, got {weight!r}")
        self._factor, info = torch.linalg.cholesky_ex(moment.double() * weight)
        if info.any():
            raise ValueError(
                "the covariance of keys cannot be inverted: its text has too few tokens for "
                f"{len(moment)} neurons; raise mom2_n_samples, or for ROME set mom2_adjustment: false"
            )

    @property
    def neurons(self) -> int:
        return len(self._factor)

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """(weight·C0)⁻¹ keys [N, k], float64."""
        _check_keys(keys, self.neurons)
        return torch.cholesky_solve(keys.to(self._factor), self._factor)

    def directions(self, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[N, k] float64: the update for any `residual` [D, k] at `keys` is residual·directionsᵀ."""
        _check(keys, mask, self.neurons)
        solved = self.solve(keys)
        inner = torch.eye(keys.shape[1], dtype=solved.dtype, device=solved.device) + keys.to(solved).T @ solved
        directions, failed = torch.linalg.solve_ex(inner, solved, left=False)  # [N, k]
        if failed.any():
            raise Unsolvable("keys are too large for their covariance: no digits are left; raise mom2_update_weight")
        return directions if mask is None else directions * mask[:, None].to(directions)

    def truncate(self, count: int) -> None:
        """Nothing is remembered, so there is nothing to forget."""

    def without(self, columns: Sequence[int]) -> CovarianceSolver:
        """Itself."""
        return self

    def memory(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def remember(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""


def _check_arguments(basis: torch.Tensor, l2: float, strength: torch.Tensor | None) -> None:
    if basis.dim() != 2 or basis.shape[1] > len(basis):
        raise ValueError(f"the basis must be [neurons, rank] with rank <= neurons, got shape {tuple(basis.shape)}")
    if not torch.isfinite(basis).all():
        raise ValueError("the basis holds NaN or infinite values")
    if not l2 > 0:
        raise ValueError(f"l2 must be more than 0, got {l2!r}")
    if strength is not None and (strength.shape != basis.shape[1:] or not (strength >= 0).all()):
        raise ValueError(f"strength must be [{basis.shape[1]}] and not negative, got shape {tuple(strength.shape)}")


def _check(keys: torch.Tensor, mask: torch.Tensor | None, neurons: int) -> None:
    _check_keys(keys, neurons)
    if mask is not None and mask.shape != (neurons,):
        raise ValueError(f"mask must be [{neurons}], got shape {tuple(mask.shape)}")
    if mask is not None and not torch.isfinite(mask).all():
        raise Unsolvable("mask holds NaN or infinite values")


def _check_residual(residual: torch.Tensor, keys: torch.Tensor) -> None:
    if keys.dim() == 2 and (residual.dim() != 2 or residual.shape[1] != keys.shape[1]):
        raise ValueError(f"residual must be [hidden, {keys.shape[1]}] (one column per key), got shape {tuple(residual.shape)}")
    if not torch.isfinite(residual).all():
        raise Unsolvable("residual holds NaN or infinite values")


def _check_keys(keys: torch.Tensor, neurons: int) -> None:
    if keys.dim() != 2 or len(keys) != neurons or keys.shape[1] == 0:
        raise ValueError(f"keys must be [{neurons}, k], got shape {tuple(keys.shape)}")
    if not torch.isfinite(keys).all():
        raise Unsolvable("keys holds NaN or infinite values")
