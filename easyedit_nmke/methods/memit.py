"""MEMIT (arXiv 2210.07229): least squares against the covariance of old keys, spread over layers; no memory of past edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..history.durable import Ground
from ..hparams import setting
from ..models.arch import ModelView
from ..statistics.covariance import moments
from .contract import Method
from .located import SpreadHyperParams, edit_layers, templates
from .norms import value_norms
from .solver import CovarianceSolver


@dataclass
class MEMITHyperParams(SpreadHyperParams):
    """Least squares against the covariance of old keys, spread over `layers`; no memory of past edits."""

    alg_name: str = setting("MEMIT", state=True)
    mom2_update_weight: float = setting(15000.0, above=0, state=True)  # λ of λ·E[c cᵀ] + K Kᵀ
    template_length: int = setting(10, least=2, whole=True, state=True)  # tokens, prefix included
    layer_selection: str = "all"  # accepted for EasyEdit's files

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        return {"blocks": [1, 2, 3, 5, 7], "mom2_update_weight": (1.0, 30000.0)}


def measure(view: ModelView, tok, hparams: MEMITHyperParams, progress: bool) -> Ground:
    """Context templates, the covariance of each layer's keys, and norms of values, of the model as it is now."""
    spent: dict[str, float | None] = {}
    found = templates(view, tok, hparams, spent)
    known = by_name(moments(view, tok, hparams, progress, spent))
    return Ground(found, known, value_norms(view, tok, hparams, found, hparams.z_layers, spent=spent), seconds=spent)


def build(view: ModelView, ground: Ground, hparams: MEMITHyperParams) -> Mapping[int, CovarianceSolver]:
    return covariance_solvers(view, ground, hparams.mom2_update_weight)


def by_name(moments: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The covariances as a state's statistics."""
    return {str(layer): moment for layer, moment in moments.items()}


def covariance_solvers(view: ModelView, ground: Ground, weight: float = 1.0) -> dict[int, CovarianceSolver]:
    """From the statistics that `by_name` made."""
    layers = sorted(map(int, ground.statistics))
    return {layer: CovarianceSolver(ground.statistics[str(layer)].to(view.weight(layer).device), weight) for layer in layers}


METHOD = Method("MEMIT", MEMITHyperParams, edit_layers, measure, build, replay=edit_layers)
