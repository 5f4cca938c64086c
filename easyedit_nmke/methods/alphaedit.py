"""AlphaEdit (arXiv 2410.02355): MEMIT's spread of the residual, in the null space of old knowledge, with past keys remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..history.durable import Ground
from ..hparams import setting
from ..models.arch import ModelView
from ..statistics.nullspace import RowSpace, check_protection, read_row_space, row_space_files, row_spaces, space_digest
from .contract import Method
from .located import SpreadHyperParams, edit_layers, templates
from .norms import value_norms
from .solver import NullSpaceSolver

LARGE = 1 << 28  # bytes of row spaces, beyond which a state on disk names their files in the cache instead of holding them


@dataclass
class AlphaEditHyperParams(SpreadHyperParams):
    """MEMIT's spread of the residual, with updates kept in the null space of old knowledge and past keys remembered."""

    alg_name: str = setting("AlphaEdit", state=True)

    # Null space of the covariance of keys
    nullspace_threshold: float = setting(2e-2, above=0, state=True)
    # instead of the threshold: the share of directions that updates may use
    nullspace_fraction: float | None = setting(None, above=0, most=1, none=None, state=True)
    L2: float = setting(1.0, above=0, state=True)
    P_loc: str | None = setting(None, state=True)
    template_length: int = setting(10, least=2, whole=True, state=True)  # tokens, prefix included

    # Accepted for EasyEdit's files
    layer_selection: str = "all"
    mom2_update_weight: float = setting(15000.0, above=0)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        """A share of the directions suits models of any size of keys; the published threshold is one of the values."""
        return {"blocks": [1, 2, 3, 5, 7], "nullspace_fraction": [None, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98], "L2": (0.01, 100.0)}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.P_loc is not None and not isinstance(self.P_loc, str):
            found.append(f"P_loc must be a path or null, got {self.P_loc!r}")
        return found


def measure(view: ModelView, tok, hparams: AlphaEditHyperParams, progress: bool) -> Ground:
    """Context templates, each layer's row space, and norms of values, of the model as it is now."""
    spent: dict[str, float | None] = {}
    found = templates(view, tok, hparams, spent)
    spaces = row_spaces(view, tok, hparams, progress, spent)
    check_protection(spaces, hparams)
    statistics = {f"{part}.{layer}": t for layer, space in spaces.items() for part, t in space._asdict().items()}
    large = sum(tensor.nbytes for tensor in statistics.values()) > LARGE
    files = row_space_files(view, tok, hparams) if large and hparams.state_dir is not None else {}
    filed = {str(layer): {"path": str(file), "digest": space_digest(spaces[layer])} for layer, file in files.items()}
    norms = value_norms(view, tok, hparams, found, hparams.z_layers, spent=spent)
    return Ground(found, statistics, norms, files=filed, seconds=spent)


def row_space(view: ModelView, ground: Ground, layer: int, hparams: AlphaEditHyperParams) -> RowSpace:
    """What `measure` has found for a layer, on its device."""
    device = view.weight(layer).device
    if f"basis.{layer}" in ground.statistics:
        space = [ground.statistics[f"{part}.{layer}"] for part in RowSpace._fields]
    else:
        filed = ground.files[str(layer)]
        space = read_row_space(Path(filed["path"]), filed["digest"], hparams)
    return RowSpace(*(tensor.to(device) for tensor in space))


def hard_solver(space: RowSpace, l2: float) -> NullSpaceSolver:
    """By whichever of the row space and the null space has fewer directions."""
    basis: torch.Tensor = space.null if space.null.shape[1] else space.basis
    return NullSpaceSolver(basis, l2, null=bool(space.null.shape[1]))


def build(view: ModelView, ground: Ground, hparams: AlphaEditHyperParams) -> Mapping[int, NullSpaceSolver]:
    return {layer: hard_solver(row_space(view, ground, layer, hparams), hparams.L2) for layer in hparams.layers}


METHOD = Method("AlphaEdit", AlphaEditHyperParams, edit_layers, measure, build, replay=edit_layers)
