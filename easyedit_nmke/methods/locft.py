"""LocFT-BF ("Fine-tuning done right in model editing", arXiv 2509.22072): plain fine-tuning of one matrix or block, over all edits,
epoch after epoch, in batches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams, setting, windows
from ..models.arch import ModelView
from ..models.products import frozen_parameters
from ..models.prompts import Tokenised, ended, tokenised_all
from ..models.requests import Request
from ..models.updates import Dense
from .contract import Method, phase
from .ft import descend, target_loss


@dataclass
class LocFTHyperParams(HyperParams):
    """Adam on one matrix (or block), breadth-first: every epoch sees every edit once, `batch_size` at a time."""

    single_edits: ClassVar[bool] = False

    alg_name: str = setting("LocFT-BF", state=True)
    batch_size: int = setting(100, least=1, whole=True)  # of a training step, and of a call
    num_steps: int = setting(25, least=1, whole=True)  # epochs
    lr: float = setting(5e-4, above=0)
    weight_decay: float = setting(0.0, least=0)
    trained: str = setting("down", choices=("down", "block"))  # of `layers`: the output projection, or every parameter
    # What is learnt when further edits come: "all" edits so far, again from the unedited weights (the published procedure's result
    # for all of them, at a cost that grows with them); "new": these alone, from the weights as they are
    replay: str = setting("all", choices=("all", "new"), state=True)
    target_eos: bool = True
    keep_updates: bool = setting(False, state=True)  # each call's whole difference, as FT's: 235 MB a call at 8B

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        """The published rate is that of models of 8B; small ones need more."""
        return {"layers": windows(depth, 1), "lr": (5e-4, 5e-2), "num_steps": [10, 25, 50], "trained": ["down", "block"]}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.batch_size == 1:
            found.append(
                "batch_size is 1, but LocFT-BF learns all edits together in batches and knows no single edits; "
                "give 2 or more (100 is published)"
            )
        if self.state_dir is not None and self.keep_updates is False:
            found.append(
                "state_dir is set, but LocFT-BF changes whole weights, which are large to keep for every call; "
                "remove it, or set keep_updates: true"
            )
        return found

    @property
    def keeps_updates(self) -> bool:
        return self.keep_updates

    @property
    def keeps_originals(self) -> bool:
        return self.replay == "all"


def writes(view: ModelView, hparams: LocFTHyperParams) -> list[str]:
    """The output projection of every edited layer, or all parameters of its block."""
    if hparams.trained == "down":
        return [view.weight_name(layer) for layer in hparams.layers]
    blocks = {layer: view.weight_name(layer).removesuffix(f"{view.family.down}.weight") for layer in hparams.layers}
    return [blocks[layer] + name for layer in hparams.layers for name, _ in view.blocks[layer].named_parameters()]


def edit(view: ModelView, tok, requests: Sequence[Request], hparams: LocFTHyperParams, state: LifelongState) -> EditReport:
    """`learn` the requests; with `replay: all` those of earlier edits too, from the weights before the first of them.

    Undoing an edit of an earlier call takes out that call's difference; what later calls learn is then without it.
    """
    report, names = EditReport(len(requests)), writes(view, hparams)
    originals, earlier = state.base() if hparams.replay == "all" else ({}, [])
    asked = [*ended(tok, [Request.from_dict(request, METHOD.needs_subject) for request in earlier], hparams), *requests]
    texts = tokenised_all(tok, [(request.prompt, None, request.target_new) for request in asked], hparams.target_separator)
    with phase(report, "values"), frozen_parameters(view.model):
        now = {name: view.model.get_parameter(name) for name in names}
        held = {name: view.oriented(name, state.weights.masters.get(name, view.matrix(name))) for name in names}
        start = {name: view.oriented(name, originals[name]).to(held[name].device) for name in names} if originals else held
        trained, loss = learn(view, texts, start, hparams)
        report.value_loss = [loss]
    with phase(report, "apply"), torch.no_grad():
        for name, new in trained.items():
            if hparams.keep_updates:  # what is recorded is the rounded difference, so that is what is added
                difference = view.oriented(name, new - held[name].float())
                state.write(Dense(name, difference, requests=len(requests)), report)
            else:
                now[name].copy_(new)
    report.density = dict.fromkeys(hparams.layers, 1.0)
    return report


def learn(
    view: ModelView, texts: Sequence[Tokenised], start: Mapping[str, torch.Tensor], hparams: LocFTHyperParams
) -> tuple[dict[str, torch.Tensor], float]:
    """Adam on float32 copies of `start` (parameter -> values): (what they become, the last epoch's mean loss). The model runs with
    them in its own dtype.

    Each of `num_steps` epochs takes all texts in another (seeded) order, `batch_size` a step; the loss is the mean over texts of
    the mean over target tokens of -log p. A step whose loss is under 0.01 is not taken, and an epoch whose mean is ends it.
    """
    trained = {name: weight.detach().float().clone().requires_grad_() for name, weight in start.items()}
    optimiser = torch.optim.Adam(trained.values(), lr=hparams.lr, weight_decay=hparams.weight_decay)

    def loss(batch: Sequence[Tokenised]) -> torch.Tensor:
        return target_loss(view, batch, trained, "target_new")

    last = descend(list(texts), loss, optimiser, hparams, order=random.Random(hparams.seed))
    if not all(torch.isfinite(new).all() for new in trained.values()):
        raise FloatingPointError("the fine-tuned weights are not finite; the model is left as it was")
    return {name: new.detach() for name, new in trained.items()}, last


METHOD = Method("LocFT-BF", LocFTHyperParams, edit, writes=writes, needs_subject=False)
