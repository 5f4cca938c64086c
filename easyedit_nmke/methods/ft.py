"""FT: fine-tuning of the FFN's output projection, as EasyEdit does it (FT-L, FT-M)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch.func import functional_call
from torch.nn.functional import log_softmax

from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams, setting, windows
from ..models.arch import ModelView
from ..models.passes import chunks
from ..models.products import frozen_parameters
from ..models.prompts import Tokenised, pad, tokenised_all
from ..models.requests import Request
from ..models.updates import Dense
from .contract import Method, phase

LOSS_TO_STOP = 1e-2


@dataclass
class FTHyperParams(HyperParams):
    """Adam on the FFN's output projection of `layers`; with `norm_constraint` no weight moves by more than that (FT-L)."""

    alg_name: str = setting("FT", state=True)
    num_steps: int = setting(25, least=1, whole=True)
    lr: float = setting(5e-4, above=0)
    weight_decay: float = setting(0.0, least=0)
    norm_constraint: float | bool = setting(False, above=0, none=False)  # false: none
    # every target token from the prompt's last; "target_new": one after the other
    objective_optimization: str = setting("prompt_last", choices=("prompt_last", "target_new"))
    kl_factor: float = setting(0.0, least=0)  # accepted for EasyEdit's files
    # Each edit's whole difference, float32: 1.2 GB an edit at 8B with 5 layers. Without it nothing can be undone or kept on disk.
    keep_updates: bool = setting(False, state=True)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        return {
            "layers": windows(depth, 1),
            "lr": (1e-5, 1e-2),
            "num_steps": [10, 25, 50],
            "norm_constraint": [False, 1e-3, 1e-2],
            "objective_optimization": ["prompt_last", "target_new"],
        }

    def problems(self) -> list[str]:
        found = super().problems()
        if self.state_dir is not None and self.keep_updates is False:
            found.append(
                "state_dir is set, but FT changes whole weights, which are large to keep for every edit; "
                "remove it, or set keep_updates: true"
            )
        return found

    @property
    def keeps_updates(self) -> bool:
        return self.keep_updates


def writes(view: ModelView, hparams: FTHyperParams) -> list[str]:
    """The output projection of every edited layer, and its bias where the architecture has one (GPT-2, GPT-J): as EasyEdit."""
    prefixes = {layer: view.weight_name(layer).removesuffix("weight") for layer in hparams.layers}
    return [prefixes[layer] + name for layer in hparams.layers for name, _ in view.down(layer).named_parameters()]


def edit(view: ModelView, tok, requests: Sequence[Request], hparams: FTHyperParams, state: LifelongState) -> EditReport:
    """Adam on the edited parameters, `batch_size` requests a step, for `num_steps` rounds or until a round's mean loss is under
    0.01; with `norm_constraint` no weight ends further than that from where it was. The model is written once, at the end.
    """
    report = EditReport(len(requests))
    texts = tokenised_all(tok, [(request.prompt, None, request.target_new) for request in requests], hparams.target_separator)
    with phase(report, "values"), frozen_parameters(view.model):
        weights = {name: view.model.get_parameter(name) for name in writes(view, hparams)}
        half = torch.float16  # in which Adam's second moments are 0: it moves float32 copies of such weights
        own = {name: torch.float32 if weight.dtype == half else weight.dtype for name, weight in weights.items()}
        trained = {name: weight.detach().to(own[name], copy=True).requires_grad_() for name, weight in weights.items()}
        optimiser = torch.optim.Adam(trained.values(), lr=hparams.lr, weight_decay=hparams.weight_decay)

        def loss(batch: Sequence[Tokenised]) -> torch.Tensor:
            return target_loss(view, batch, trained, hparams.objective_optimization)

        def constrain() -> None:
            if hparams.norm_constraint:
                _clamp(trained, weights, hparams.norm_constraint)

        report.value_loss = [descend(texts, loss, optimiser, hparams, constrain)]
    with phase(report, "solve"), torch.no_grad():
        if not all(torch.isfinite(new).all() for new in trained.values()):
            raise FloatingPointError("the fine-tuned weights are not finite; the model is left as it was")
        for name, new in trained.items():
            if hparams.keep_updates:  # what is recorded is the rounded difference, so that is what is added
                difference = view.oriented(name, new.float() - weights[name].float())
                state.write(Dense(name, difference, requests=len(requests)), report)
            else:
                weights[name].copy_(new)
    report.density = dict.fromkeys(hparams.layers, 1.0)
    return report


def descend(
    texts: MutableSequence[Tokenised],
    loss_of: Callable[[Sequence[Tokenised]], torch.Tensor],
    optimiser: torch.optim.Optimizer,
    hparams,
    after_step: Callable[[], None] = lambda: None,
    order: Random | None = None,
) -> float:
    """The mean loss of the last of `num_steps` rounds over all texts, `batch_size` a step, or of the first that is under 0.01.

    A step whose loss is under 0.01 is not taken. order: shuffles the texts before each round. FloatingPointError when a loss is not
    finite.
    """
    for _ in range(hparams.num_steps):
        if order is not None:
            order.shuffle(texts)
        total = 0.0
        for batch in chunks(texts, hparams.batch_size):
            with torch.enable_grad():
                loss = loss_of(batch)
            if not torch.isfinite(loss):
                told = f"the loss of {hparams.alg_name} is {loss.item()}"
                raise FloatingPointError(f"{told}; check lr ({hparams.lr}) and the model's weights")
            total += loss.item() * len(batch)
            if loss >= LOSS_TO_STOP:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            after_step()
        if total / len(texts) < LOSS_TO_STOP:
            break
    return total / len(texts)


def target_loss(view: ModelView, texts: Sequence[Tokenised], trained: Mapping[str, torch.Tensor], objective: str):
    """Mean over texts of the mean over target tokens of -log p. "prompt_last" (FT-L): all of them from the prompt's last
    token; "target_new" (FT-M): each from the token before it. The model runs with `trained` rounded to its own dtype."""
    rounded = {name: weight.to(view.model.get_parameter(name).dtype) for name, weight in trained.items()}
    rows = [text.ids[: text.target] if objective == "prompt_last" else text.ids[:-1] for text in texts]
    tokens = pad(rows, view.device)
    logits = functional_call(view.model, rounded, (), {**tokens.inputs(), "use_cache": False}).logits
    losses = []
    for row, text in enumerate(texts):
        labels = torch.tensor(text.labels, device=logits.device)
        at = torch.full_like(labels, text.target - 1)
        if objective != "prompt_last":
            at += torch.arange(len(labels), device=logits.device)
        losses.append(-log_softmax(logits[row, at].float(), -1).gather(1, labels[:, None]).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def _clamp(trained: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor], limit: float) -> None:
    for name, weight in trained.items():
        original = originals[name].to(weight.dtype)
        weight.clamp_(original - limit, original + limit)


METHOD = Method("FT", FTHyperParams, edit, writes=writes, needs_subject=False)
