"""KNE, the Knowledge Neuronal Ensemble (arXiv 2412.20637): fine-tuning of the few FFN parameters that carry an answer. A
reconstruction.

The publication's equations, learning rate and layers are not public. Its abstract defines: gradient attribution of every FFN
parameter over several blocks, token by token; an ensemble of those with the highest scores; loss and gradients for the ensemble
alone, all of its layers updated together by back-propagation. The rest is chosen here: log-probabilities, the path of the integral,
one ranking over all layers, absolute values, Adam, and when to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call

from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams, setting, windows
from ..models.arch import ModelView
from ..models.products import frozen_parameters
from ..models.prompts import Tokenised, tokenised_all
from ..models.requests import Request
from ..models.updates import Sparse
from .contract import Method, phase
from .ft import descend, target_loss


@dataclass
class KNEHyperParams(HyperParams):
    """Adam on the ensemble of each edit: the parameters of the FFNs of `layers` with the highest attribution."""

    alg_name: str = setting("KNE", state=True)
    share: float = setting(0.01, above=0, most=1)  # of all FFN parameters of `layers`: the ensemble
    attribution_steps: int = setting(5, least=1, whole=True)  # of the integral over gradients; 1: the gradient as it is
    num_steps: int = setting(25, least=1, whole=True)
    lr: float = setting(1e-3, above=0)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        return {"layers": windows(depth, 5), "share": (1e-3, 0.1), "lr": (1e-4, 1e-2), "num_steps": [10, 25, 50]}


def writes(view: ModelView, hparams: KNEHyperParams) -> list[str]:
    """Every parameter of the FFNs of `layers`, biases among them."""
    return [f"{view.ffn_name(layer)}.{name}" for layer in hparams.layers for name, _ in view.ffn(layer).named_parameters()]


def edit(view: ModelView, tok, requests: Sequence[Request], hparams: KNEHyperParams, state: LifelongState) -> EditReport:
    """`attribution`, `ensemble`, `learn`; the model is written once, at the end, by one sparse update for each parameter."""
    report, names = EditReport(len(requests)), writes(view, hparams)
    texts = tokenised_all(tok, [(request.prompt, None, request.target_new) for request in requests], hparams.target_separator)
    with frozen_parameters(view.model):
        with phase(report, "attribution"):
            chosen = ensemble(attribution(view, texts, names, hparams.attribution_steps), hparams.share)
        with phase(report, "values"):
            held = {name: state.weights.masters.get(name, view.matrix(name)) for name in names}
            learnt, loss = learn(view, texts, held, chosen, hparams)
            report.value_loss = [loss]
    with phase(report, "apply"):
        for name, values in learnt.items():
            if len(values):
                state.write(Sparse(name, chosen[name], values, requests=len(requests)), report)
    for layer in hparams.layers:
        own = [name for name in names if name.startswith(f"{view.family.blocks}.{layer}.")]
        report.density[layer] = sum(len(chosen[name]) for name in own) / sum(held[name].numel() for name in own)
    return report


def attribution(view: ModelView, texts: Sequence[Tokenised], names: Sequence[str], steps: int) -> dict[str, torch.Tensor]:
    """Parameter -> scores [out · in] float32 of its matrix, row after row:

        Σ over target tokens y_t of all texts of |w · 1/m Σ_{k=1..m} ∂ log p(y_t | x, y_<t; (k/m)·w) / ∂w|

    integrated gradients along the path on which all of these parameters grow together from 0 to what they are.
    """
    weights = {name: view.model.get_parameter(name).detach() for name in names}
    scores = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}
    for text in texts:
        for at in range(text.target, len(text.ids)):
            ids = torch.tensor([text.ids[:at]], device=view.device)
            total = {name: torch.zeros_like(score) for name, score in scores.items()}
            for step in range(1, steps + 1):
                with torch.enable_grad():
                    scaled = {name: (weight * (step / steps)).requires_grad_() for name, weight in weights.items()}
                    logits = functional_call(view.model, scaled, (), {"input_ids": ids, "use_cache": False}).logits[0, -1]
                    gradients = torch.autograd.grad(logits.float().log_softmax(-1)[text.ids[at]], list(scaled.values()))
                for name, gradient in zip(names, gradients, strict=True):
                    total[name] += gradient
            for name, weight in weights.items():
                scores[name] += (weight.float() * total[name] / steps).abs()
    return {name: view.oriented(name, score).flatten() for name, score in scores.items()}


def ensemble(scores: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Parameter -> increasing indices into its scores: the top `share` of all parameters together, at least one."""
    if not all(torch.isfinite(score).all() for score in scores.values()):
        raise FloatingPointError("the attribution of KNE is not finite; check the model's weights")
    count = max(1, int(share * sum(map(len, scores.values()))))
    best = {name: score.topk(min(count, len(score))) for name, score in scores.items()}
    values = torch.cat([top.values.cpu() for top in best.values()])
    places = values.topk(count).indices.sort().values
    found, first = {}, 0
    for name, top in best.items():
        inside = places[(places >= first) & (places < first + len(top.indices))] - first
        found[name] = top.indices[inside.to(top.indices.device)].sort().values
        first += len(top.indices)
    return found


def learn(
    view: ModelView, texts: Sequence[Tokenised], held: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor],
    hparams: KNEHyperParams,
) -> tuple[dict[str, torch.Tensor], float]:  # fmt: skip
    """Adam on what is added to the chosen entries of `held` (parameter -> matrix): (parameter -> values [chosen] float32, the last
    round's mean loss). `batch_size` texts a step, `num_steps` rounds or until a round's mean loss is under 0.01."""
    values = {name: torch.zeros(len(indices), device=indices.device, requires_grad=True) for name, indices in chosen.items()}
    optimiser = torch.optim.Adam(values.values(), lr=hparams.lr)

    def changed() -> dict[str, torch.Tensor]:
        found = {}
        for name, value in values.items():
            matrix = held[name].float().flatten().index_add(0, chosen[name], value).view(held[name].shape)
            found[name] = view.oriented(name, matrix)
        return found

    last = descend(texts, lambda batch: target_loss(view, batch, changed(), "target_new"), optimiser, hparams)
    return {name: value.detach() for name, value in values.items()}, last


METHOD = Method("KNE", KNEHyperParams, edit, writes=writes, needs_subject=False)
