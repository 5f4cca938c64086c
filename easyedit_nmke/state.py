"""What one edit leaves to the next: past keys, projector and templates, held by an object and never by a module."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22
_WRAP = (1 << 64) - 1


def fingerprint(tensors: Mapping[Any, torch.Tensor]) -> int:
    """A 64-bit digest of the bits of some tensors: the same bits give the same digest, a changed bit changes it.

    Reads the tensors once; scratch is 64 MB.
    """
    digest = 0
    for tensor in tensors.values():
        bits = tensor.detach().reshape(-1)
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        generator = torch.Generator().manual_seed(1)
        weights = torch.randint(-(1 << 62), 1 << 62, (min(_CHUNK, len(bits)),), generator=generator, dtype=torch.int64)
        weights = (weights | 1).to(bits.device)
        for chunk in bits.split(_CHUNK):
            part = int((chunk.long() * weights[: len(chunk)]).sum().item())
            digest = (digest * 6364136223846793005 + part + 1442695040888963407) & _WRAP
    return digest


class Update(NamedTuple):
    """One low-rank change of a layer's w_out [D, F]: left [D, k] · right [k, F], in the dtype it is added in."""

    layer: int
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class EditReport:
    """What one call did: requests, mask density and ratios per layer, loss of the values, seconds by phase."""

    requests: int
    density: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, tuple[float, float]] = field(default_factory=dict)
    value_loss: list[float] = field(default_factory=list)
    residual: float = 0.0  # mean norm of z - current z before the update
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)  # MB by phase: of the process, on a GPU of its allocations
    attribution: str = ""  # the backend that scored neurons, and why it was taken
    overlap: dict[int, float] = field(default_factory=dict)  # Jaccard overlap of each layer's mask with the last edit's
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # [F] bool; the state takes them over
    updates: list[Update] = field(default_factory=list)  # what was added to the weights, in order; the state takes them over

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EditReport:
        """From `to_dict`, also after JSON made texts of the layers' numbers."""
        by_layer = ("density", "ratios", "overlap")
        return cls(**{k: {int(i): x for i, x in v.items()} if k in by_layer else v for k, v in content.items()})

    def to_dict(self) -> dict:
        """Everything but the tensors."""
        return {name: value for name, value in vars(self).items() if name not in ("masks", "updates")}


class LifelongState:
    """Solvers (statistics of old knowledge and past keys, one per layer), context templates, and the weights they belong to.

    `settings` are the hyperparameters that the state depends on; a call with others needs a state of its own.
    """

    def __init__(
        self, settings: Mapping[str, Any], solvers: Mapping[int, Any], templates: list[list[str]], value_norm: float | None = None
    ):
        self.settings, self.solvers, self.templates = dict(settings), dict(solvers), templates
        self.value_norm = value_norm  # of every z; None: as they are
        self.reports: list[EditReport] = []
        self.masks: dict[int, torch.Tensor] = {}  # of the last edit, [F] bool
        self.attribution_cache: Any = None  # `attribution.AttributionCache`, made when first asked for; no part of a snapshot
        self._digests: list[int] = []  # after each call; _digests[0] before the first

    @property
    def edits(self) -> int:
        """Calls whose update is in the weights."""
        return len(self.reports)

    @property
    def flat_templates(self) -> list[str]:
        """All context templates, the bare prompt first."""
        return [template for group in self.templates for template in group]

    def follow(self, weights: Mapping[Any, torch.Tensor]) -> None:
        """Take note of what happened to `weights` (the edited parameters, always in one order) since the last call.

        Weights put back to what they were after an earlier call (EasyEdit does so after a non-sequential edit) take the past
        keys back with them. Weights changed in another way keep them, with a warning.
        """
        now = fingerprint(weights)
        if not self._digests:
            self._digests = [now]
        elif now in self._digests:
            step = len(self._digests) - 1 - self._digests[::-1].index(now)
            if step < self.edits:
                self._roll_back(step)
        else:
            logger.warning("the edited weights were changed by something else since edit %d; past keys are kept", self.edits)
            self._digests[-1] = now

    def advance(self, weights: Mapping[Any, torch.Tensor], keys: Mapping[int, torch.Tensor], report: EditReport) -> None:
        """Record one finished call: keys [F, requests] of each layer become past keys (none, for methods without a memory)."""
        columns = {layer: self.solvers[layer].count for layer in keys}
        try:
            for layer in keys:
                self.solvers[layer].append(keys[layer])
        except BaseException:
            for layer, count in columns.items():
                self.solvers[layer].truncate(count)
            raise
        self.masks, report.masks, report.updates = report.masks, {}, []
        self.reports.append(report)
        self._digests.append(fingerprint(weights))

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, plain data) from which `resume` continues; the weights are not in it."""
        tensors = {f"mask.{layer}": mask for layer, mask in self.masks.items()}
        for layer, solver in self.solvers.items():
            tensors.update({f"solver.{layer}.{name}": tensor for name, tensor in solver.memory().items()})
        return tensors, {"reports": [report.to_dict() for report in self.reports], "digests": list(self._digests)}

    def resume(self, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> None:
        """Take the place of the state that made the snapshot: one opened on the same model with the same settings."""
        for layer, solver in self.solvers.items():
            start = f"solver.{layer}."
            solver.remember({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
        self.masks = {int(name.removeprefix("mask.")): t for name, t in tensors.items() if name.startswith("mask.")}
        self.reports = [EditReport.from_dict(report) for report in content["reports"]]
        self._digests = list(content["digests"])

    def _roll_back(self, step: int) -> None:
        kept = sum(report.requests for report in self.reports[:step])
        for solver in self.solvers.values():
            solver.truncate(kept)
        self.masks = {}
        del self.reports[step:], self._digests[step + 1 :]
        logger.debug("weights were put back to edit %d; so were the past keys", step)
