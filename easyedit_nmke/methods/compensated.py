"""`solve: compensated`: updates of masked neurons whose sum goes to the solution for all edits at once, whatever the masks.

Of one layer let D [D, N] be all that edits have changed so far, and V [D, t] what they wanted D·K to be at their keys K [N, t]: of
edit s, v_s = r_s + D·k_s, its residual and what D did there before. The solution for all of them at once minimises

    J(D) = ||D K - V||² + L2·||D||² + ||D U sqrt(λs)||²          (soft null space; a hard one: without the last term, where D U = 0)

and unmasked updates are its recursion: D at the minimum for s < t, where (V - D K) Kᵀ = D (L2·I + U·diag(λs)·Uᵀ), and AlphaEdit's
update give the minimum with edit t. A mask breaks it. The update of the neurons S of edit t that leads to the least J is

    Δ_S = [ r k_Sᵀ + (V - D K) K_Sᵀ - (D (L2·I + U·diag(λs)·Uᵀ))_S ] · (L2·I + U_S·diag(λs)·U_Sᵀ + K_S K_Sᵀ + k_S k_Sᵀ)⁻¹

(a hard null space: with L2·I alone, and rows projected by the P_S of `RestrictedSolver`). The first term is `restricted`'s
update. The other two are the history: what past keys still lack, less what the regulariser lets them lack. They vanish at the
minimum, so with a full mask the update is AlphaEdit's; under masks they bring the neurons of S to where they would be had they been
chosen before. J never rises by them, since every output direction is a least-squares problem of its own.

Within an edit, what one block leaves goes to the next, whose residual is taken anew. Only the block behind which no other comes
stays owing, and there the history enters.
"""

from __future__ import annotations

import torch

from .ridge import Unsolvable
from .solver import RestrictedSolver, ridge

CARRIED = 4  # output directions that an edit makes up for; the rest stays owed


class CompensatedSolver(RestrictedSolver):
    """`RestrictedSolver` that remembers with each key what was wanted there: columns [N + D, k], the key over v (see above).

    An update has CARRIED columns beside those of its requests. D is read off the weights, so what is left out, rounded away or
    undone is owed again.
    """

    exact = True  # its columns are no states of the model

    def compensated(
        self, keys: torch.Tensor, change: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(directions [N, k] of the new `keys` [N, k]; outputs [D, m], orthonormal; owed [N, m]): the update for residual r is
        r·directionsᵀ + outputs·owedᵀ. change [D, N] float64 is D. m is CARRIED, or less where there are fewer past keys: the space
        of what the history gives the past keys that it moves most."""
        rows, columns, protected = self._system(keys, mask)
        count, new = self.count, keys.shape[1]
        weighed = columns.shape[1] - count - new
        picks = columns.new_zeros((columns.shape[1], new))
        picks[weighed + count :] = torch.eye(new, dtype=columns.dtype, device=columns.device)
        if not count:
            return self._widened(ridge(columns, picks, None, self.l2), rows), change[:, :0], keys.double()[:, :0]
        past, wanted = (part.to(change) for part in (self._keys[: self.neurons], self._keys[self.neurons :]))
        history = columns.new_zeros((columns.shape[1], len(change)))
        if weighed:
            history[:weighed] = -self.strength.to(change).sqrt()[:, None] * (change @ self.row_space.to(change)).T
        history[weighed : weighed + count] = (wanted - change @ past).T
        start = -change[:, rows].T
        start = start - protected @ (protected.T @ start)
        both = ridge(columns, torch.cat([picks, history], 1), torch.cat([start.new_zeros(len(start), new), start], 1), self.l2)
        directions, owed = self._widened(both[:, :new], rows), both[:, new:].T  # [D, |S|]
        moved = owed @ past[rows]
        most = moved.norm(dim=0).topk(min(CARRIED, count)).indices
        outputs = torch.linalg.qr(moved[:, most]).Q
        return directions, outputs, self._widened((outputs.T @ owed).T, rows)

    def remembered(self, keys: torch.Tensor, residual: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The columns for `append` after an edit that asked for `residual` [D, k] at `keys` [N, k], before which D was `change`."""
        return torch.cat([keys.double(), residual.double() + change @ keys.to(change)])

    def append(self, keys: torch.Tensor) -> None:
        """From now on, hold the outputs at keys to what was wanted; columns [N + D, k] as `remembered` gives them."""
        if keys.dim() != 2 or len(keys) <= self.neurons:
            raise ValueError(f"columns must be [more than {self.neurons}, k], a key over what was wanted, got {tuple(keys.shape)}")
        if not torch.isfinite(keys).all():
            raise Unsolvable("keys holds NaN or infinite values")
        self._keys = torch.cat([self._keys, keys.to(self._keys)], 1) if self.count else keys.to(self._keys, copy=True)

    def memory(self) -> dict[str, torch.Tensor]:
        """As `RestrictedSolver`; without keys, their width is not known."""
        return {"keys": self._keys if self.count else self.row_space[:, :0]}
