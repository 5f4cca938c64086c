"""Target values: what a block, or its FFN, should output at the subject so that the model says the new target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, log_softmax

from .arch import ModelView
from .hooks import first_tensor, record, record_calls
from .prompts import Request, Tokens, encode, pad, position_before, target_tokens

KL_PROMPT = "{} is a"
LOSS_TO_STOP = 0.05


@dataclass(frozen=True)
class Value:
    """z [D] float32, the loss it reached and the number of forward passes that took."""

    z: torch.Tensor
    loss: float
    steps: int


@dataclass(frozen=True)
class _Batch:
    """Rewriting prompts under every template, then the KL prompt, as one padded batch.

    lookups [B]: the subject's last token of each row; rows, positions, labels [M]: where the target's tokens are predicted.
    """

    tokens: Tokens
    lookups: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def target_value(
    view: ModelView, tok, request: Request, templates: Sequence[str], z_layer: int, hparams, part: str = "block"
) -> Value:
    """z = z0 + δ for block `z_layer` at the subject's last token, by Adam on δ [D]; z0 is what its `part` puts out, the whole
    "block" (MEMIT and its kin) or the "ffn" (ROME). δ has the same effect on either.

    Loss: mean NLL of the target under all templates + kl_factor · KL at the subject of "{subject} is a" against the unedited
    model + v_weight_decay · ||δ|| / ||z0||²; ||δ|| <= clamp_norm_factor · ||z0||; stops under 0.05. The blocks up to
    `z_layer` run once; the model's weights take no gradient. FloatingPointError when the loss is not finite.
    """
    batch = _prepare(view, tok, request, templates)
    above = _Above(view, batch.tokens, z_layer)
    loss_layer = max(view.depth - 1 if hparams.v_loss_layer is None else hparams.v_loss_layer, z_layer)
    z0 = (above.below if part == "block" else above.ffn)[0, batch.lookups[0]].float()
    delta = torch.zeros_like(z0, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
    longest = hparams.clamp_norm_factor * z0.norm()
    reference = None
    for step in range(1, hparams.v_num_grad_steps + 1):
        with torch.enable_grad():
            outputs = above(batch.lookups, delta)
            log_probs = log_softmax(view.readout.logits(_pick(outputs[-1], batch.lookups)[-1:]).float(), -1)
            reference = log_probs.detach() if reference is None else reference
            kl = hparams.kl_factor * kl_div(reference, log_probs, log_target=True, reduction="batchmean")
            decay = hparams.v_weight_decay * delta.norm() / z0.norm() ** 2
            loss = _nll(view, outputs[loss_layer - z_layer], batch).to(delta.device) + kl.to(delta.device) + decay
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the target value for {request.prompt!r} is {loss.item()} at step {step}; check v_lr ({hparams.v_lr}) "
                "and that the model's weights are finite"
            )
        if loss < LOSS_TO_STOP or step == hparams.v_num_grad_steps:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimiser.step()
        with torch.no_grad():
            if delta.norm() > longest:
                delta.mul_(longest / delta.norm())
    return Value(z0 + delta.detach(), loss.item(), step)


class _Above:
    """The blocks above `z_layer`, run again and again on one batch with another value at the subject.

    A first forward pass keeps block `z_layer`'s output, its FFN's, and what each later block is called with besides its hidden
    states (masks, positions); these do not depend on the value.
    """

    def __init__(self, view: ModelView, tokens: Tokens, z_layer: int):
        self.blocks = list(view.blocks)[z_layer + 1 :]
        wanted = {"z": (view.blocks[z_layer], "output"), "ffn": (view.down(z_layer), "output")}
        with torch.no_grad(), record(wanted) as seen, record_calls(self.blocks) as self.calls:
            view.model.base_model(**tokens.inputs(), use_cache=False)
        self.below, self.ffn = seen["z"], seen["ffn"]

    def __call__(self, lookups: torch.Tensor, delta: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of block z_layer (with δ [D] added at `lookups` [B]) and of every block above it."""
        rows = torch.arange(len(lookups), device=self.below.device)
        value = delta.to(self.below).expand(len(rows), -1)
        outputs = [self.below.index_put((rows, lookups.to(rows.device)), value, accumulate=True)]
        for block, (args, kwargs) in zip(self.blocks, self.calls, strict=True):
            hidden = outputs[-1].to(next(block.parameters()).device)
            outputs.append(first_tensor(block(hidden, *args, **kwargs)))
        return outputs


def _prepare(view: ModelView, tok, request: Request, templates: Sequence[str]) -> _Batch:
    ids, lookups, rows, positions, labels = [], [], [], [], []
    for row, template in enumerate(templates):
        text, end = request.fill(template)
        target = target_tokens(tok, text, request.target_new)
        full = encode(tok, f"{text} {request.target_new}")
        ids.append(full[:-1])
        lookups.append(position_before(tok, text, end))
        first = len(full) - len(target)
        rows += [row] * len(target)
        positions += range(first - 1, len(full) - 1)
        labels += target
    text = KL_PROMPT.format(request.subject)
    ids.append(encode(tok, text))
    lookups.append(position_before(tok, text, len(request.subject)))
    where = [torch.tensor(v, device=view.device) for v in (lookups, rows, positions, labels)]
    return _Batch(pad(ids, tok, view.device), *where)


def _pick(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """states [B, T, D] at one position per row -> [B, D]."""
    return states[torch.arange(len(states), device=states.device), positions.to(states.device)]


def _nll(view: ModelView, states: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """Mean over prompts of the mean over target tokens of -log p; logits exist at the target's positions only."""
    device = states.device
    rows, labels = batch.rows.to(device), batch.labels.to(device)
    log_probs = log_softmax(view.readout.logits(states[rows, batch.positions.to(device)]).float(), -1)
    each = -log_probs.gather(1, labels[:, None].to(log_probs.device))[:, 0]
    per_prompt = torch.bincount(rows).to(each)
    return (each / per_prompt[rows.to(each.device)]).sum() / len(per_prompt)
