"""What the FFN sees: keys and values at the subject's last token, and the states that attribution reads at the last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .arch import ModelView
from .hooks import record
from .prompts import SUBJECT, Request, encode, pad, position_before

ROWS_AT_A_TIME = 128


@torch.no_grad()
def subject_states(
    view: ModelView, tok, texts: Sequence[Sequence[tuple[str, int]]], wanted: Mapping[str, tuple[torch.nn.Module, str]]
) -> dict[str, torch.Tensor]:
    """What modules see at the subject's last token, name -> [requests, texts, width] float32.

    texts: as many for each request, each with the character at which the subject ends. `wanted` is `hooks.record`'s; the forward
    pass ends at the last of these modules.
    """
    flat = [pair for of_request in texts for pair in of_request]
    # Attention looks back only, so nothing after the subject matters; without it many texts are the same.
    rows = [tuple(encode(tok, text)[: position_before(tok, text, end) + 1]) for text, end in flat]
    distinct = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for chunk in _chunks(list(distinct), ROWS_AT_A_TIME):
        batch = pad(chunk, tok, view.device)
        with record(wanted, stop=True) as seen:
            view.model.base_model(**batch.inputs(), use_cache=False)
        for name, states in seen.items():
            last = batch.last.to(states.device)
            parts[name].append(states[torch.arange(len(states), device=states.device), last].float())
    index = [distinct[row] for row in rows]
    return {name: torch.cat(p)[index].unflatten(0, (len(texts), -1)) for name, p in parts.items()}


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class Contexts:
    """The texts that a key is averaged over: context templates in groups, the bare prompt first, and other prompts of the same
    subject ("{}" stands for it), one more group; these are read up to the subject."""

    groups: Sequence[Sequence[str]]
    prompts: Sequence[str] = ()

    def texts(self, request: Request) -> list[tuple[str, int]]:
        """Each text with the character at which the subject ends."""
        filled = [request.fill(template) for group in self.groups for template in group]
        others = [prompt[: prompt.index(SUBJECT)] + request.subject for prompt in self.prompts]
        return filled + [(text, len(text)) for text in others]

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
    states = subject_states(view, tok, [contexts.texts(request) for request in requests], wanted)
    return {layer: contexts.mean(states[str(layer)]).T.contiguous() for layer in layers}


def key_and_value(
    view: ModelView, tok, requests, contexts: Contexts, layer: int, z_layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K [F, requests] of `layer`, current output of block `z_layer` for the bare prompts [D, requests]), from one forward pass."""
    wanted = {"key": (view.down(layer), "input"), "value": (view.blocks[z_layer], "output")}
    states = subject_states(view, tok, [contexts.texts(request) for request in requests], wanted)
    return contexts.mean(states["key"]).T.contiguous(), states["value"][:, 0].T


@dataclass(frozen=True)
class AttributionInputs:
    """States of P prompts at the attributed token. coefficients, residual: layer -> [P, F], [P, D]; final_hidden [P, D] is the
    final norm's input; predicted [P] the model's own next token."""

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
    batch = pad([encode(tok, text) for text in texts], tok, view.device)
    wanted = {"final": (view.norm, "input")}
    for layer in layers:
        wanted[f"c{layer}"] = (view.down(layer), "input")
        norm = view.ffn_norm(layer)
        if norm is not None:
            wanted[f"x{layer}"] = (norm, "input")
        else:
            wanted[f"out{layer}"] = (view.blocks[layer], "output")
            wanted[f"ffn{layer}"] = (view.down(layer), "output")
    with record(wanted) as seen:
        view.model.base_model(**batch.inputs(), use_cache=False)
    at = batch.last if position == "last_token" else torch.full_like(batch.last, batch.ids.shape[1] - 1)
    states = {name: s[torch.arange(len(s), device=s.device), at.to(s.device)] for name, s in seen.items()}
    for layer in layers:
        if f"x{layer}" not in states:
            states[f"x{layer}"] = states[f"out{layer}"].float() - states[f"ffn{layer}"].float()
    final = states["final"].float()
    readout = view.readout
    predicted = torch.cat([readout.logits(h.to(readout.head.device, readout.head.dtype)).argmax(-1) for h in final.split(16)])
    return AttributionInputs(
        {layer: states[f"c{layer}"] for layer in layers},
        {layer: states[f"x{layer}"].float() for layer in layers},
        final,
        predicted,
    )
