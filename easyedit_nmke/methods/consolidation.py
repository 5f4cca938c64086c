"""All edits that count, solved again at once: what their sum would be if they had come as one batch.

Block by block, with K the keys of all edits on the original weights below which the blocks before are written, z* their recorded
values and R = (z* - current z) / (blocks left), the method's own solver gives for R and K, without past keys, the update that takes
the place of all others. Its regulariser is the method's: of NMKE and AlphaEdit

    X = solve(P K Kᵀ + L2·I,  P K Rᵀ)       (hard null space)          X = solve(λ·E[c cᵀ] + L2·I + K Kᵀ,  K Rᵀ)       (soft)

With `write_passes` what the model does not say after that is written again, as by an edit.

Masks: only neurons that some edit's mask chose are written, as by the sum of the edits. The mask of a consolidation is the union of
theirs (all weights 1 where they were soft), and `solve` says, as ever, whether it is applied before or after the solve.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..history.log import Edit, EditReport
from ..history.state import LifelongState
from ..models.arch import ModelView
from ..models.chat import as_asked
from ..models.prompts import ended
from ..models.requests import Request

if TYPE_CHECKING:
    from .contract import Method

logger = logging.getLogger(__name__)


def consolidate(method: Method, view: ModelView, tok, hparams, state: LifelongState, undone: int | None = None) -> None:
    """`LifelongState.consolidate` by the method's own solvers. ValueError for a method whose edits are not solved from values."""
    if method.replay is None:
        raise ValueError(f"edits of {method.name} cannot be solved again from their values, so they cannot be consolidated")

    def solve(edits: Sequence[tuple[int, Edit]]) -> EditReport:
        asked = [Request.from_dict(call.requests[edit - call.first], method.needs_subject) for edit, call in edits]
        requests = ended(tok, as_asked(tok, asked, hparams), hparams)
        z = torch.stack([call.z[:, edit - call.first] for edit, call in edits], 1)
        masks = union([call.masks for _, call in edits])
        return method.replay(view, tok, requests, hparams, state, z=z, **({"masks": masks} if masks else {}))

    state.consolidate(solve, undone)


def when_due(method: Method, view: ModelView, tok, hparams, state: LifelongState) -> None:
    """`consolidate` after every `hparams.consolidate_every` edits. These are made by then: what cannot be solved in floating point,
    in this memory or on this disk leaves them as they are, with a warning, and is tried again after the next one."""
    every = getattr(hparams, "consolidate_every", 0)
    if not every:
        return
    whole = state.consolidation
    if state.last - (0 if whole is None else whole.last) < every or not state.counting:
        return
    try:
        consolidate(method, view, tok, hparams, state)
    except (FloatingPointError, MemoryError, OSError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("the edits up to %d are not consolidated: %s", state.last, error)


def union(masks: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Layer -> the neurons [F] bool that any of the masks chose."""
    found: dict[int, torch.Tensor] = {}
    for of_edit in masks:
        for layer, mask in of_edit.items():
            found[layer] = mask | found.get(layer, mask)
    return found
