"""What the FFN sees: keys and values at the subject's last token, and the states that attribution reads at the last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.arch import ModelView
from ..models.hooks import only_at, record, record_calls, repeated
from ..models.passes import chunks
from ..models.products import frozen
from ..models.prompts import Tokens, encode, pad, reworded, tokenised_all
from ..models.requests import Request

ROWS_AT_A_TIME = 128


@torch.no_grad()
def subject_states(
    view: ModelView, tok, texts: Sequence[Sequence[tuple[str, int]]], wanted: Mapping[str, tuple[torch.nn.Module, str]]
) -> dict[str, torch.Tensor]:
    """What modules see at the subject's last token, name -> [requests, texts, width] float32.

    texts: as many for each request, each with the character at which the subject ends. `wanted` is `hooks.record`'s; the forward
    pass ends at the last of these modules.
    """
    distinct, index = _distinct(tok, texts)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for chunk in chunks(distinct, ROWS_AT_A_TIME):
        batch = pad(chunk, view.device)
        with record(wanted, stop=True) as seen:
            view.model.base_model(**batch.inputs(), use_cache=False)
        for name, states in seen.items():
            last = batch.last.to(states.device)
            parts[name].append(states[torch.arange(len(states), device=states.device), last].float())
    return {name: torch.cat(p)[index].unflatten(0, (len(texts), -1)) for name, p in parts.items()}


def _distinct(tok, texts: Sequence[Sequence[tuple[str, int]]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The texts' tokens up to the subject's last, each row once and short ones first, and which of them each text is. Attention
    looks back only, so nothing after the subject matters; without it many texts are the same."""
    read = tokenised_all(tok, [(text, end, None) for of_request in texts for text, end in of_request])
    rows = [tuple(found.ids[: found.subject + 1]) for found in read]
    distinct = {row: i for i, row in enumerate(sorted(dict.fromkeys(rows), key=len))}
    return list(distinct), [distinct[row] for row in rows]


@dataclass(frozen=True)
class Contexts:
    """The texts that a key is averaged over: context templates in groups, the bare prompt first, and other prompts of the same
    subject ("{}" stands for it), one more group; these are read up to the subject."""

    groups: Sequence[Sequence[str]]
    prompts: Sequence[str] = ()

    def texts(self, request: Request, tok=None) -> list[tuple[str, int]]:
        """Each text with the character at which the subject ends."""
        filled = [request.fill(template, tok) for group in self.groups for template in group]
        others = [reworded(request.prompt, request.subject, prompt, tok) for prompt in self.prompts]
        return filled + [(text[:end], end) for text, end in others]

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """Average [requests, texts, width] over texts -> [requests, width].

        First within each group, then over groups, as MEMIT and AlphaEdit do: the bare prompt weighs as much as all generated
        contexts together.
        """
        sizes = [len(group) for group in self.groups] + ([len(self.prompts)] if self.prompts else [])
        return torch.stack([group.mean(1) for group in states.split(sizes, 1)]).mean(0)


def keys_of(view: ModelView, tok, requests, contexts: Contexts, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Keys K [F, requests] of each layer: FFN coefficients at the subject's last token, averaged over contexts."""
    wanted = {str(layer): (view.down(layer), "input") for layer in layers}
    states = subject_states(view, tok, [contexts.texts(request, tok) for request in requests], wanted)
    return {layer: contexts.mean(states[str(layer)]).T.contiguous() for layer in layers}


class Ascent:
    """`key_and_value` of one layer after the other, while each is edited before the next one's are asked for.

    An edited layer changes nothing below it: each pass begins with the states that went into the block edited last, which the
    pass before kept. FFNs are computed where the subject's last token can depend on them.
    """

    def __init__(self, view: ModelView, tok, requests, contexts: Contexts, z_layer: int):
        self.view, self.z_layer, self.count = view, z_layer, len(requests)
        distinct, self.index = _distinct(tok, [contexts.texts(request, tok) for request in requests])
        self.contexts = contexts
        self.parts = [_Part(view, pad(chunk, view.device), z_layer) for chunk in chunks(distinct, ROWS_AT_A_TIME)]

    @torch.no_grad()
    def __call__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(K [F, requests] of `layer`; for the bare prompts the current output of block `z_layer`, and of `layer`'s down projection
        [D, requests])."""
        found = zip(*(part(layer) for part in self.parts), strict=True)
        keys, values, outputs = (torch.cat(parts)[self.index].unflatten(0, (self.count, -1)) for parts in found)
        return self.contexts.mean(keys).T.contiguous(), values[:, 0].T, outputs[:, 0].T


class _Part:
    """Some rows of an `Ascent`. `start`: the block that the next pass begins with, on `hidden`; `calls`: with what else each
    block from there to `z_layer` is called."""

    def __init__(self, view: ModelView, batch: Tokens, z_layer: int):
        self.view, self.batch, self.z_layer = view, batch, z_layer
        self.start, self.hidden, self.calls = 0, None, []
        self.rows = torch.arange(len(batch.ids), device=batch.ids.device)
        real, last = batch.mask.flatten().nonzero()[:, 0], self.rows * batch.ids.shape[1] + batch.last
        self.places = {view.ffn(i): last if i == z_layer else real for i in range(z_layer + 1)}
        self.last = last

    def __call__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(coefficients of `layer` [rows, F], output of block `z_layer`, output of `layer`'s down projection [rows, D]) at the
        subject's last token, float32."""
        view, blocks = self.view, self.view.blocks
        wanted = {
            "hidden": (blocks[layer], "input"), "key": (view.down(layer), "input"), "out": (view.down(layer), "output"),
            "value": (blocks[self.z_layer], "output"),
        }  # fmt: skip
        with frozen(view.model), only_at(self.places), record(wanted, stop=True) as seen:
            if self.hidden is None:
                with record_calls(blocks[layer : self.z_layer + 1]) as self.calls:
                    view.model.base_model(**self.batch.inputs(), use_cache=False)
            else:
                list(repeated(blocks[self.start : self.z_layer + 1], self.hidden, self.calls))
        self.calls = self.calls[len(self.calls) - (self.z_layer + 1 - layer) :]
        self.start, self.hidden = layer, seen["hidden"]
        places = self.places[view.ffn(layer)]
        key, out, value = seen["key"][0], seen["out"][0], seen["value"]
        at = torch.searchsorted(places, self.last).to(key.device)
        value = value[self.rows.to(value.device), self.batch.last.to(value.device)]
        return key[at].float(), value.float(), out[at].float()


def key_and_value(
    view: ModelView, tok, requests, contexts: Contexts, layer: int, z_layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K [F, requests] of `layer`, current output of block `z_layer` for the bare prompts [D, requests]), from one forward pass."""
    wanted = {"key": (view.down(layer), "input"), "value": (view.blocks[z_layer], "output")}
    states = subject_states(view, tok, [contexts.texts(request, tok) for request in requests], wanted)
    return contexts.mean(states["key"]).T.contiguous(), states["value"][:, 0].T


def _padding(view: ModelView, tok) -> int:
    """The id that the published code pads with, where the embedding has it: the PAD token's, else the end token's."""
    known = len(view.model.get_input_embeddings().weight)
    return next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None and i < known), 0)


@dataclass(frozen=True)
class AttributionInputs:
    """States of P prompts at the attributed token. coefficients, residual: layer -> [P, F], [P, D]; final_hidden [P, D] is the
    final norm's input; predicted [P] the model's own next token.

    Where a norm is behind the FFN, the coefficients are over its statistic, so that the stream gets `view.values` times them."""

    coefficients: dict[int, torch.Tensor]
    residual: dict[int, torch.Tensor]
    final_hidden: torch.Tensor
    predicted: torch.Tensor


@torch.no_grad()
def attribution_inputs(
    view: ModelView, tok, texts: Sequence[str], layers: Sequence[int], position: str = "last_token"
) -> AttributionInputs:
    """Run `texts` (P prompts) and read every layer in `layers` at the last real token, or at the padded end (position -1 of the
    right-padded batch, a PAD token for all but the longest prompts, as the published code does)."""
    wanted = {"final": (view.norm, "input")}
    for layer in layers:
        wanted[f"c{layer}"] = (view.down(layer), "input")
        if view.family.post_norm:
            wanted[f"y{layer}"] = (view.down(layer), "output")
        norm = view.ffn_norm(layer)
        if norm is not None:
            wanted[f"x{layer}"] = (norm, "input")
        else:
            wanted[f"out{layer}"] = (view.blocks[layer], "output")
            wanted[f"ffn{layer}"] = (view.down(layer), "output")
    filler = _padding(view, tok) if position == "padded_end" else 0
    batch = pad([encode(tok, text) for text in texts], view.device, filler)  # as one, since the padded end is that of all
    at = batch.last if position == "last_token" else torch.full_like(batch.last, batch.ids.shape[1] - 1)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for start in range(0, len(texts), ROWS_AT_A_TIME):
        chunk = slice(start, start + ROWS_AT_A_TIME)
        with record(wanted) as seen:
            view.model.base_model(**{name: value[chunk] for name, value in batch.inputs().items()}, use_cache=False)
        for name, s in seen.items():
            parts[name].append(s[torch.arange(len(s), device=s.device), at[chunk].to(s.device)])
    states = {name: torch.cat(p) for name, p in parts.items()}
    for layer in layers:
        if f"x{layer}" not in states:
            states[f"x{layer}"] = states[f"out{layer}"].float() - states[f"ffn{layer}"].float()
        if view.family.post_norm:
            states[f"c{layer}"] = states[f"c{layer}"] / view.post_norm(layer).statistic(states[f"y{layer}"])[:, None]
    final = states["final"].float()
    readout = view.readout
    predicted = torch.cat([readout.logits(h.to(readout.head.device, readout.head.dtype)).argmax(-1) for h in final.split(16)])
    return AttributionInputs(
        {layer: states[f"c{layer}"] for layer in layers},
        {layer: states[f"x{layer}"].float() for layer in layers},
        final,
        predicted,
    )
