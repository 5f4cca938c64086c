"""Target values: what a block, or its FFN, should output at the subject so that the model says the new target.

Only the tokens from the subject's last on depend on the value, and only in the blocks above it. So every text is laid out
with that token in one column: what comes before it runs once, and each step runs the columns from it on, against the kept
attention keys and values of the rest. FFNs, most of the work, skip padding and, in the last block, all that is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache

from .. import facts
from ..models.arch import ModelView
from ..models.chat import as_asked
from ..models.hooks import only_at, record, record_calls, repeated
from ..models.passes import chunks
from ..models.products import frozen
from ..models.prompts import reworded, tokenised
from ..models.requests import Request

KL_PROMPT = "{} is a"
LOSS_TO_STOP = 0.05
REQUESTS_AT_A_TIME = 16  # in one batch; its activations are kept for the backward pass


@dataclass(frozen=True)
class Value:
    """z [D] float32, the loss it reached and the number of forward passes that took."""

    z: torch.Tensor
    loss: float
    steps: int


def target_values(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str],
    z_layer: int,
    hparams,
    part: str = "block",
    whole_texts: bool = False,
) -> list[Value]:
    """z = z0 + δ of each request, for block `z_layer` at the subject's last token, by Adam on δ [D]; z0 is what its `part` puts
    out, the whole "block" (MEMIT and its kin) or the "ffn" (ROME), behind a norm of its output where there is one. δ has the
    same effect on either.

    Loss of a request: mean NLL of the target under all templates + kl_factor · KL(now || unedited) at the subject of
    "{subject} is a" + locality_factor · mean KL(unedited || now) at the end of the `locality_prompts` that ask something else
    + v_weight_decay · ||δ|| / ||z0||²; ||δ|| <= clamp_norm_factor · ||z0||. Stops under 0.05, or as soon as every template gives
    the target at least v_stop_probability (the whole target: the product over its tokens), or after v_num_grad_steps; a target
    that is not the likelier answer by then (mean NLL over ln 2) gets up to v_extra_steps more. All requests share one batch and
    none changes another's value. The model's weights take no gradient. `whole_texts` runs every token at every step, for
    comparison. FloatingPointError when a loss is not finite.
    """
    if len(requests) > REQUESTS_AT_A_TIME:
        parts = chunks(requests, REQUESTS_AT_A_TIME)
        return [v for some in parts for v in target_values(view, tok, some, templates, z_layer, hparams, part, whole_texts)]
    batch = _prepare(view, tok, requests, templates, hparams, whole_texts)
    above = _Above(view, batch, z_layer)
    loss_layer = max(view.depth - 1 if hparams.v_loss_layer is None else hparams.v_loss_layer, z_layer)
    z0 = (above.below if part == "block" else above.ffn)[batch.bare, batch.lookup].float()
    delta = torch.zeros_like(z0, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
    longest = hparams.clamp_norm_factor * z0.norm(dim=1, keepdim=True)
    reached: list[Value | None] = [None] * len(requests)
    kept = None
    enough = hparams.v_num_grad_steps
    sure = -math.inf if hparams.v_stop_probability is None else -math.log(hparams.v_stop_probability)
    last = enough + hparams.v_extra_steps
    for step in range(1, last + 1):
        with torch.enable_grad():
            outputs = above(delta)
            said, subject, other = _log_probs(view, batch, outputs[loss_layer - z_layer], outputs[-1])
            if kept is None:
                kept = _Kept(view, batch, outputs[-1].detach(), subject.detach(), other.detach(), hparams)
            nll, hardest = (of_request.to(delta.device) for of_request in _nll(batch, said))
            losses = nll + kept.loss(subject, other).to(delta.device)
            losses = losses + hparams.v_weight_decay * delta.norm(dim=1) / z0.norm(dim=1) ** 2
            total = losses.sum()
        done = (losses < LOSS_TO_STOP) | (hardest <= sure)
        if step >= enough:
            done |= nll < math.log(2)
        for i, (loss, stops) in enumerate(torch.stack([losses, done]).T.tolist()):
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise FloatingPointError(
                    f"the loss of the target value for {requests[i].prompt!r} is {loss} at step {step}; check v_lr "
                    f"({hparams.v_lr}) and that the model's weights are finite"
                )
            if reached[i] is None and (stops or step == last):
                reached[i] = Value((z0 + delta.detach())[i], loss, step)
        if all(reached):
            break
        (delta.grad,) = torch.autograd.grad(total, delta)
        optimiser.step()
        with torch.no_grad():
            delta.mul_((longest / delta.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1))
    return reached


def reference_norm(view: ModelView, tok, templates: Sequence[str], z_layer: int, hparams) -> float:
    """Mean norm of the values that the model, as it is now, gets for a calibration set: what `value_norm: anchored` rescales every
    value to (NAS, arXiv 2602.02543), so that they do not grow with the weights."""
    requests = [Request(prompt, subject, target) for prompt, subject, target in facts.calibration()]
    values = target_values(view, tok, as_asked(tok, requests, hparams), templates, z_layer, hparams)
    return sum(value.z.norm().item() for value in values) / len(values)


# ---- text


@dataclass(frozen=True)
class _Batch:
    """All rows of all requests, the subject's last token of each in column `lookup`; columns from `start` on run at every step.

    ids, mask [B, T]; needed [B, T]: the tokens that anything read depends on; owner [B] and bare [R]: the request of a row, the
    row of a request's bare prompt. Places are (row, column): of the tokens before the target's (with their labels, which of the
    prompts with a target each is in, request by request, and one over that target's tokens), of the KL prompts' subjects, of the
    locality prompts' ends.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    needed: torch.Tensor
    start: int
    lookup: int
    owner: torch.Tensor
    bare: torch.Tensor
    target: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    prompt: torch.Tensor
    share: torch.Tensor
    prompts: int
    subject: tuple[torch.Tensor, torch.Tensor]
    other: tuple[torch.Tensor, torch.Tensor]

    def at(self, states: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """states [B, columns from start on, D] at `places` -> [places, D]."""
        rows, columns = (place.to(states.device) for place in places)
        return states[rows, columns - self.start]

    @property
    def read(self) -> torch.Tensor:
        """[B, T]: whether the last block's output is read there."""
        read = torch.zeros_like(self.needed)
        for rows, columns in (self.target, self.subject, self.other):
            read[rows, columns] = True
        return read


def _prepare(view: ModelView, tok, requests, templates, hparams, whole_texts: bool) -> _Batch:
    rows: list[tuple[list[int], int]] = []  # tokens, index of the subject's last
    owner, bare, target, labels, lengths, subject, other = [], [], [], [], [], [], []

    def add(i: int, ids: list[int], at: int) -> int:
        rows.append((ids, at))
        owner.append(i)
        return len(rows) - 1

    def add_about(i: int, request: Request, words: str) -> int:
        text, end = reworded(request.prompt, request.subject, words, tok)
        found = tokenised(tok, text, end)
        return add(i, found.ids, found.subject)

    for i, request in enumerate(requests):
        bare.append(len(rows))
        for template in templates:
            found = tokenised(tok, *request.fill(template, tok), request.target_new, hparams.target_separator)
            row = add(i, found.ids[:-1], found.subject)
            target += [(row, column) for column in range(found.target - 1, len(found.ids) - 1)]
            labels += found.labels
            lengths.append(len(found.labels))
        row = add_about(i, request, KL_PROMPT)
        subject.append((row, rows[row][1]))
        for prompt in hparams.locality_prompts if hparams.locality_factor else ():
            row = add_about(i, request, prompt)
            other.append((row, len(rows[row][0]) - 1))
    # One column more than needed: where no token is padding, attention is called without a mask, which later columns need.
    lookup = max(at for _, at in rows) + 1
    width = lookup + max(len(ids) - at for ids, at in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, (tokens, at) in enumerate(rows):
        place = slice(lookup - at, lookup - at + len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1

    def places(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        columns = [column + lookup - rows[row][1] for row, column in pairs]
        return found[:, 0].to(view.device), torch.tensor(columns, dtype=torch.long, device=view.device)

    ends = [0] * len(rows)
    for row, column in target + subject + other:
        ends[row] = max(ends[row], column + lookup - rows[row][1])
    tokens = torch.tensor(lengths)
    needed = mask.bool() & (torch.arange(width) <= torch.tensor(ends)[:, None])
    return _Batch(
        ids.to(view.device),
        mask.to(view.device),
        needed.to(view.device),
        0 if whole_texts else lookup,
        lookup,
        torch.tensor(owner, device=view.device),
        torch.tensor(bare, device=view.device),
        places(target),
        torch.tensor(labels, device=view.device),
        torch.arange(len(tokens)).repeat_interleave(tokens).to(view.device),
        (1 / tokens).repeat_interleave(tokens).to(view.device),
        len(tokens),
        places(subject),
        places(other),
    )


# ---- model


class _Above:
    """The blocks above `z_layer`, run again and again on the columns from `batch.start` on with another value at the subject.

    A first forward pass keeps block `z_layer`'s output, its FFN's, the attention keys and values of the columns before, and
    what each later block is called with besides its hidden states (masks, positions); none of it depends on the value.
    """

    def __init__(self, view: ModelView, batch: _Batch, z_layer: int):
        self.batch, self.blocks = batch, list(view.blocks)[z_layer + 1 :]
        wanted = {"z": (view.blocks[z_layer], "output"), "ffn": (view.addend(z_layer), "output")}
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        first, self.places = self._places(view, z_layer) if batch.start else ({}, {})
        with torch.no_grad(), frozen(view.device), only_at(first), record(wanted) as seen, record_calls(self.blocks) as calls:
            view.model.base_model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        self.below, self.ffn = seen["z"], seen["ffn"]
        before = _Before({i: (kv.keys, kv.values) for i, kv in enumerate(cache.layers) if i > z_layer}, batch.start)

        def later(value, name: str = ""):
            """What a call with all columns passes, for the columns from `start` on."""
            if value is cache:
                return before
            if name == "position_embeddings":
                return tuple(part[:, batch.start :] for part in value)
            if name == "position_ids":
                return value[:, batch.start :]
            if name == "cache_position":
                return value[batch.start :]
            return value[:, :, batch.start :] if torch.is_tensor(value) and value.dim() == 4 else value  # the attention mask

        self.calls = [([later(a) for a in args], {name: later(v, name) for name, v in kwargs.items()}) for args, kwargs in calls]

    def _places(self, view: ModelView, z_layer: int) -> tuple[dict, dict]:
        """Where the first pass and a step need each FFN (see `only_at`)."""
        start, needed = self.batch.start, self.batch.needed

        def flat(wanted: torch.Tensor) -> torch.Tensor:
            return wanted.flatten().nonzero()[:, 0]

        before = needed.clone()
        before[:, start:] = False
        whole, before, after, read = (flat(part) for part in (needed, before, needed[:, start:], self.batch.read[:, start:]))
        last = view.depth - 1
        first = {
            view.ffn(layer): whole if layer <= z_layer else before[:0] if layer == last else before for layer in range(view.depth)
        }
        return first, {view.ffn(layer): read if layer == last else after for layer in range(z_layer + 1, view.depth)}

    def __call__(self, delta: torch.Tensor) -> list[torch.Tensor]:
        """Outputs [B, columns from start on, D] of block z_layer (with δ [R, D] added at the subject) and of every block above,
        right where they are needed."""
        batch, hidden = self.batch, self.below[:, self.batch.start :]
        rows = torch.arange(len(hidden), device=hidden.device)
        columns = torch.full_like(rows, batch.lookup - batch.start)
        value = delta[batch.owner.to(delta.device)].to(hidden)
        hidden = hidden.index_put((rows, columns), value, accumulate=True)
        with frozen(hidden.device), only_at(self.places):
            return [hidden, *repeated(self.blocks, hidden, self.calls)]


class _Before:
    """Stands for the cache that attention asks: the kept keys and values of earlier columns, then the new ones; nothing stays."""

    def __init__(self, kept: Mapping[int, tuple[torch.Tensor, torch.Tensor]], start: int):
        self.kept = {layer: (keys[:, :, :start], values[:, :, :start]) for layer, (keys, values) in kept.items()}

    def update(self, keys, values, layer: int, *_args, **_kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.kept[layer]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)


# ---- loss


class _Kept:
    """What should stay: the unedited log-probabilities at the KL prompts' subjects and at the ends of the locality prompts.

    A locality prompt whose unedited answer is the edited prompt's asks for the edited fact itself, and is left out.
    """

    def __init__(self, view: ModelView, batch: _Batch, final: torch.Tensor, subject: torch.Tensor, other: torch.Tensor, hparams):
        self.batch, self.kl_factor, self.subject, self.other = batch, hparams.kl_factor, subject, other
        self.factors = None
        if len(other):
            bare = torch.stack([batch.target[1][(batch.target[0] == row).nonzero()[0, 0]] for row in batch.bare])
            said = view.readout.logits(batch.at(final, (batch.bare, bare))).argmax(-1)
            owner = batch.owner[batch.other[0]].to(said.device)
            differs = (other.argmax(-1) != said[owner]).float()
            count = torch.zeros(len(said), device=said.device).index_add(0, owner, differs)
            self.factors = hparams.locality_factor * differs / count.clamp(min=1)[owner]

    def loss(self, subject: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[R]"""
        loss = self.kl_factor * _kl(subject, self.subject)
        if self.factors is None:
            return loss
        each = self.factors * _kl(self.other, other)
        return loss.index_add(0, self.batch.owner[self.batch.other[0]].to(each.device), each)


def _log_probs(view: ModelView, batch: _Batch, states: torch.Tensor, final: torch.Tensor) -> Sequence[torch.Tensor]:
    """[places, V] at the targets (of `states`), the KL prompts' subjects and the locality prompts' ends (of `final`), from one
    product with the head; logits exist at these places only."""
    at = [batch.at(states, batch.target).to(final.device), batch.at(final, batch.subject), batch.at(final, batch.other)]
    with frozen(view.device):
        logits = view.readout.logits(torch.cat(at)).float()
    return log_softmax(logits, -1).split([len(part) for part in at])


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(one || other) of each row of log-probabilities."""
    return (one.exp() * (one - other)).sum(-1)


def _nll(batch: _Batch, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R]: mean over a request's templates of the mean over target tokens of -log p; and the largest of its templates' -log p of
    the whole target."""
    device = log_probs.device
    each = -log_probs.gather(1, batch.labels[:, None].to(device))[:, 0]
    prompt, share = batch.prompt.to(device), batch.share.to(each)
    whole, mean = (each.new_zeros(batch.prompts).index_add(0, prompt, part) for part in (each.detach(), each * share))
    return mean.view(len(batch.bare), -1).mean(1), whole.view(len(batch.bare), -1).amax(1)
