"""What the FFN sees: keys and values at the subject's last token, and the states that attribution reads at the last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .arch import ModelView
from .hooks import record
from .prompts import Request, encode, pad, position_before

ROWS_AT_A_TIME = 128


@torch.no_grad()
def subject_states(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str],
    wanted: Mapping[str, tuple[torch.nn.Module, str]],
) -> dict[str, torch.Tensor]:
    """What modules see at the subject's last token, name -> [requests, templates, width] float32.

    `wanted` is `hooks.record`'s; the forward pass ends at the last of these modules.
    """
    filled = [request.fill(template) for request in requests for template in templates]
    positions = torch.tensor([position_before(tok, text, end) for text, end in filled])
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for start in range(0, len(filled), ROWS_AT_A_TIME):
        chunk = slice(start, start + ROWS_AT_A_TIME)
        batch = pad([encode(tok, text) for text, _ in filled[chunk]], tok, view.device)
        with record(wanted, stop=True) as seen:
            view.model.base_model(**batch.inputs(), use_cache=False)
        for name, states in seen.items():
            rows = torch.arange(len(states), device=states.device)
            parts[name].append(states[rows, positions[chunk].to(states.device)].float())
    return {name: torch.cat(p).unflatten(0, (len(requests), len(templates))) for name, p in parts.items()}


def group_mean(states: torch.Tensor, groups: Sequence[Sequence[str]]) -> torch.Tensor:
    """Average [requests, templates, width] over templates -> [requests, width].

    First within each group of templates, then over groups, as MEMIT and AlphaEdit do: the bare prompt weighs as much as all
    generated contexts together.
    """
    means, start = [], 0
    for group in groups:
        means.append(states[:, start : start + len(group)].mean(1))
        start += len(group)
    return torch.stack(means).mean(0)


def keys_of(view: ModelView, tok, requests, groups, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Keys K [F, requests] of each layer: FFN coefficients at the subject's last token, averaged over context templates."""
    wanted = {str(layer): (view.down(layer), "input") for layer in layers}
    states = subject_states(view, tok, requests, _flat(groups), wanted)
    return {layer: group_mean(states[str(layer)], groups).T.contiguous() for layer in layers}


def key_and_value(view: ModelView, tok, requests, groups, layer: int, z_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K [F, requests] of `layer`, current output of block `z_layer` for the bare prompts [D, requests]), from one forward pass."""
    wanted = {"key": (view.down(layer), "input"), "value": (view.blocks[z_layer], "output")}
    states = subject_states(view, tok, requests, _flat(groups), wanted)
    return group_mean(states["key"], groups).T.contiguous(), states["value"][:, 0].T


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [template for group in groups for template in group]


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
