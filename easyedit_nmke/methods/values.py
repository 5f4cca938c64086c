"""Target values: what a block, or its FFN, should output at the subject so that the model says the new target.

Only the tokens from the subject's last on depend on the value, and only in the blocks above it. So every text is laid out
with that token in one column: what comes before it runs once, and each step runs the columns from it on, against the kept
attention keys and values of the rest. FFNs, most of the work, skip padding and, in the last block, all that is not read.

Requests are solved together as far as memory allows, those with texts of one length next to each other; what one of them needs
no longer is dropped. On one GPU all but the first steps are replayed from a CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import log_softmax

from .. import facts
from ..models.arch import ModelView
from ..models.chat import as_asked
from ..models.device import current, total_memory
from ..models.products import frozen
from ..models.prompts import ended
from ..models.requests import Request
from .above import Above
from .value_texts import OTHER, SUBJECT, Batch, Row, batches, rows_of

logger = logging.getLogger(__name__)

LOSS_TO_STOP = 0.05
UNRECORDED = 2  # steps before the one that is recorded on a GPU: they keep what stays the same, and load every kernel
# Bytes, half for what is kept between steps, half for the activations of one: on a GPU a share of its whole memory, not of what is
# free, which is another time another.
CPU_BUDGET, CUDA_SHARE = 4 << 30, 0.1
# Activations that the backward pass needs, for each token and block in multiples of a width, for each place of the vocabulary.
TIMES_HIDDEN, TIMES_NEURONS, TIMES_HEADS, TIMES_WORDS = 18, 4, 8, 5
LEFT = 0.75  # of a batch's rows; with fewer than that still needed the others are dropped


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
    budget: int | None = None,
) -> list[Value]:
    """z = z0 + δ of each request, for block `z_layer` at the subject's last token, by Adam on δ [D]; z0 is what its `part` puts
    out, the whole "block" (MEMIT and its kin) or the "ffn" (ROME), behind a norm of its output where there is one. δ has the
    same effect on either.

    Loss of a request: mean NLL of the target under all templates + kl_factor · KL(now || unedited) at the subject of
    "{subject} is a" + locality_factor · mean KL(unedited || now) at the end of the `locality_prompts` that ask something else
    + v_weight_decay · ||δ|| / ||z0||²; ||δ|| <= clamp_norm_factor · ||z0||. Stops under 0.05, or as soon as every template gives
    the target at least v_stop_probability (the whole target: the product over its tokens), or after v_num_grad_steps; a target
    that is not the likelier answer by then (mean NLL over ln 2) gets up to v_extra_steps more. None changes another's value. The
    model's weights take no gradient. `whole_texts` runs every token at every step, for comparison. budget: bytes that are not
    exceeded, but for what one request needs (4 GB on a CPU, a tenth of a GPU). FloatingPointError when a loss is not finite.
    """
    requests = ended(tok, requests, hparams)
    texts = [rows_of(tok, i, request, templates, hparams) for i, request in enumerate(requests)]
    sizes = _Sizes(view, z_layer, budget)
    found: dict[int, Value] = {}
    for chosen in sizes.groups(texts):
        rows = [replace(row, owner=owner) for owner, i in enumerate(chosen) for row in texts[i]]
        parts = [Batch(some, len(templates), view.device, whole_texts) for some in batches(rows, sizes.fits)]
        with frozen(view.model):
            pieces = [_Piece(view, batch, z_layer, hparams) for batch in parts]
            values = _solve([requests[i] for i in chosen], pieces, hparams, part)
        found.update(zip(chosen, values, strict=True))
    return [found[i] for i in range(len(requests))]


def reference_norm(view: ModelView, tok, templates: Sequence[str], z_layer: int, hparams, part: str = "block") -> float:
    """Mean norm of the values that the model, as it is now, gets for a calibration set: what `value_norm: anchored` rescales every
    value to (NAS, arXiv 2602.02543), so that they do not grow with the weights."""
    requests = [Request(prompt, subject, target) for prompt, subject, target in facts.calibration()]
    values = target_values(view, tok, as_asked(tok, requests, hparams), templates, z_layer, hparams, part)
    return sum(value.z.norm().item() for value in values) / len(values)


def _solve(requests: Sequence[Request], pieces: list[_Piece], hparams, part: str) -> list[Value]:
    """The values of requests whose texts are shared out over `pieces`. One wait for the device a step."""
    starts, pool = [piece.above.start(part) for piece in pieces], _pool(pieces[0].view)
    z0 = torch.stack([start for _, start in sorted((owner, start) for some in starts for owner, start in some.items())])
    delta = torch.zeros_like(z0, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
    size = z0.norm(dim=1, keepdim=True)
    longest = hparams.clamp_norm_factor * size
    reached: list[Value | None] = [None] * len(requests)
    enough = hparams.v_num_grad_steps
    last = enough + hparams.v_extra_steps
    sure = -math.inf if hparams.v_stop_probability is None else -math.log(hparams.v_stop_probability)
    for step in range(1, last + 1):
        gradient, waiting, found = torch.zeros_like(delta), [], []
        for piece in pieces:
            if pool and step > UNRECORDED:
                if recorded := piece.recorded(delta, pool):
                    gradient += recorded.gradient
                    found.append(recorded.terms)
                    continue
                pool = None
            with torch.enable_grad():
                nll, other, whole = piece(delta)
                waiting.append((nll + other).sum())
            if len(pieces) > 1 and step < last:  # before the next one needs the memory
                gradient += torch.autograd.grad(waiting.pop(), delta)[0]
            found.append([term.detach().to(delta.device) for term in (nll, other, whole)])
        nll, other, whole = (sum(terms) for terms in zip(*found, strict=True))
        length = delta.detach().norm(dim=1, keepdim=True)
        losses = nll + other + hparams.v_weight_decay * (length / size**2)[:, 0]
        done = (losses < LOSS_TO_STOP) | (whole.amax(1) <= sure)
        if step >= enough:
            done |= nll < math.log(2)
        for i, (loss, stops) in enumerate(torch.stack([losses, done]).T.tolist()):
            if reached[i] is not None:
                continue
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of the target value for {requests[i].prompt!r} is {loss} at step {step}; check v_lr "
                    f"({hparams.v_lr}) and that the model's weights are finite"
                )
            if stops or step == last:
                reached[i] = Value((z0 + delta.detach())[i], loss, step)
        if all(reached):
            break
        for total in waiting:
            gradient += torch.autograd.grad(total, delta)[0]
        delta.grad = gradient + hparams.v_weight_decay * delta.detach() / (length * size**2).clamp(min=1e-30)
        optimiser.step()
        with torch.no_grad():
            delta.mul_((longest / delta.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1))
        if step == 1 and hparams.locality_factor:
            _weigh_others(pieces, len(requests), hparams.locality_factor)
        pieces = [piece for piece in pieces if piece.goes_on({i for i, value in enumerate(reached) if value is None})]
    return reached


# ---- memory


def budget_on(device: torch.device) -> float:
    """Bytes that the values of requests solved together may take."""
    return CUDA_SHARE * total_memory(device) if device.type == "cuda" else CPU_BUDGET


class _Sizes:
    """What values take: bytes kept between steps for each text, bytes of activations for each token that is run and place that is
    read."""

    def __init__(self, view: ModelView, z_layer: int, budget: int | None):
        config, blocks = view.model.config, view.depth - z_layer - 1
        hidden, neurons = view.w_out(z_layer).shape
        size = view.weight(z_layer).dtype.itemsize
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        self.half = (budget_on(view.device) if budget is None else budget) / 2
        self.kept = blocks * size * 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
        self.word = 4 * len(view.head.weight)
        self.token = blocks * (size * (TIMES_NEURONS * neurons + TIMES_HEADS * heads * head) + max(size, 4) * TIMES_HIDDEN * hidden)

    def fits(self, tokens: int, reads: int) -> bool:
        return tokens * self.token + reads * TIMES_WORDS * self.word <= self.half

    def groups(self, texts: Sequence[Sequence[Row]]) -> Iterator[list[int]]:
        """Which requests are solved together, in order of their texts' length."""

        def kept(rows: Sequence[Row]) -> float:
            return sum(row.end * self.kept + (0 if row.labels else self.word) for row in rows)

        group, held = [], 0.0
        for i in sorted(range(len(texts)), key=lambda i: max((row.width, row.at) for row in texts[i])):
            need = kept(texts[i])
            if group and held + need > self.half:
                yield group
                group, held = [], 0.0
            group.append(i)
            held += need
        if group:
            yield group


# ---- loss


class _Piece:
    """Some rows of a group, what the unedited model says at their places that should stay, and the loss of it."""

    def __init__(self, view: ModelView, batch: Batch, z_layer: int, hparams):
        self.view, self.above, self.kl_factor = view, Above(view, batch, z_layer), hparams.kl_factor
        self.asks_others = hparams.locality_factor > 0
        loss_layer = view.depth - 1 if hparams.v_loss_layer is None else hparams.v_loss_layer
        self.loss_layer = max(loss_layer, z_layer) - z_layer
        self.kept: list[torch.Tensor] | None = None  # log-probabilities [places, V] at the KL prompts and the locality prompts
        self.factors: torch.Tensor | None = None  # weights [places] of the latter
        self.answers: tuple[list[int], torch.Tensor] | None = None
        self._graph: _Graph | None = None

    @property
    def batch(self) -> Batch:
        return self.above.batch

    def __call__(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean NLL [R], the divergences [R], -log p of each template's target [R, templates]), as far as it is here."""
        batch, outputs = self.batch, self.above(delta)
        said, *now = self._log_probs(outputs)
        each = -said.gather(1, batch.labels[:, None].to(said.device))[:, 0]
        prompt, share, count = batch.prompt.to(each.device), batch.share.to(each), len(delta) * batch.templates
        nll, whole = (each.new_zeros(count).index_add(0, prompt, part) for part in (each * share, each.detach()))
        other = each.new_zeros(len(delta))
        if self.kept is None:  # nothing has moved yet, and the divergences are at their lowest
            self.kept = [log_probs.detach() for log_probs in now]
            self.answers = self._answers(outputs[-1].detach()) if self.asks_others else None
        else:
            other = other.index_add(0, batch.subject_owner.to(each.device), self.kl_factor * _kl(now[0], self.kept[0]))
            if self.factors is not None:
                other = other.index_add(0, batch.other_owner.to(each.device), self.factors * _kl(self.kept[1], now[1]))
        return nll.view(len(delta), -1).mean(1), other, whole.view(len(delta), -1)

    def recorded(self, delta: torch.Tensor, pool) -> _Graph | None:
        """The loss and its gradient at δ, from the graph of these rows; None where a block does what no graph can hold."""
        if self._graph is None or self._graph.batch is not self.batch:
            try:
                self._graph = _Graph(self, delta, pool)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("a step of a target value cannot be recorded, and is launched kernel by kernel: %s", reason)
                return None
        self._graph.replay()
        return self._graph

    def goes_on(self, owners: set[int]) -> bool:
        """Whether a row of these requests is here. Where too few are, the others are dropped."""
        batch = self.batch
        rows = [i for i, row in enumerate(batch.rows) if row.owner in owners]
        if rows and len(rows) < LEFT * len(batch.rows):
            kinds = [[row.owner in owners for row in batch.rows if row.kind == kind] for kind in (SUBJECT, OTHER)]
            left = [torch.tensor(kind, dtype=torch.bool).nonzero()[:, 0] for kind in kinds]
            self.kept = [log_probs.index_select(0, i.to(log_probs.device)) for log_probs, i in zip(self.kept, left, strict=True)]
            if self.factors is not None:
                self.factors = self.factors.index_select(0, left[1].to(self.factors.device))
            self.above.keep(rows)
        return bool(rows)

    def _log_probs(self, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """[places, V] at the targets (of the loss layer's states), the KL prompts' subjects and the locality prompts' ends (of the
        last block's), from one product with the head; logits exist at these places only."""
        batch, final = self.batch, outputs[-1]
        at = [_at(outputs[self.loss_layer], batch.target).to(final.device), _at(final, batch.subject), _at(final, batch.other)]
        logits = self.view.readout.logits(torch.cat(at)).float()
        return log_softmax(logits, -1).split([len(part) for part in at])

    def _answers(self, final: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """(requests whose bare prompt is here, the next word after it), of the last block's output."""
        owners, places = self.batch.bare_ends
        return owners, self.view.readout.logits(_at(final, places)).argmax(-1)


class _Graph:
    """A piece's `terms` and `gradient` as a CUDA graph: a step is thousands of kernels, which take many times longer to launch one
    by one than to run. It reads δ where δ is, and leaves what it finds in the same place each time."""

    def __init__(self, piece: _Piece, delta: torch.Tensor, pool):
        self.batch, graph = piece.batch, torch.cuda.CUDAGraph()
        leaf = delta.detach().requires_grad_()  # δ itself still has a node of autograd on the stream of the steps before
        stream = torch.cuda.Stream(delta.device)  # torch's own for graphs is of the GPU that was the current one first
        with current(delta.device), torch.cuda.graph(graph, pool=pool, stream=stream), torch.enable_grad():
            nll, other, whole = piece(leaf)
            self.gradient = torch.autograd.grad((nll + other).sum(), leaf)[0]
        self.terms, self.replay = [term.detach() for term in (nll, other, whole)], graph.replay


def _pool(view: ModelView):
    """The memory that the graphs of all pieces share, one after the other; None where a step is not recorded: on CPUs, and where
    the model is on several devices."""
    devices = {parameter.device for parameter in view.model.parameters()}
    return torch.cuda.graph_pool_handle() if devices == {view.device} and view.device.type == "cuda" else None


def _weigh_others(pieces: Sequence[_Piece], count: int, factor: float) -> None:
    """A locality prompt whose unedited answer is the edited prompt's asks for the edited fact itself, and is left out; the others
    of a request share the factor."""
    device = pieces[0].kept[1].device
    said, differing = torch.zeros(count, dtype=torch.long, device=device), torch.zeros(count, device=device)
    for piece in pieces:
        owners, words = piece.answers
        said[owners] = words.to(device)
    differs = []
    for piece in pieces:
        owner = piece.batch.other_owner.to(device)
        differs.append((piece.kept[1].argmax(-1).to(device) != said[owner]).float())
        differing.index_add_(0, owner, differs[-1])
    for piece, here in zip(pieces, differs, strict=True):
        piece.factors = factor * here / differing.clamp(min=1)[piece.batch.other_owner.to(device)]


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """states [B, columns, D] at `places` -> [places, D]."""
    return states.flatten(0, 1).index_select(0, places.to(states.device))


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(one || other) of each row of log-probabilities."""
    return (one.exp() * (one - other)).sum(-1)
