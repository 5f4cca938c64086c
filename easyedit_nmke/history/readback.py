"""What was exported, loaded again from the folder written and compared with the edited model, before it is called done.

Each function here returns what it has compared, in words for the card, and raises a RuntimeError that says what differs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..models.arch import ModelView, context_length, evaluating
from ..models.loading import load_again
from ..models.updates import Update
from .checkpoint import Base
from .delta import joined, load_delta

# The last one long, so that positions count.
PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 4,",
    "Once upon a time there was a king who had three daughters and no son. When he was old he sent for them and asked which "
    "of them loved him most, for she should have the largest part of the country, from the sea in the west to the mountains. "
    "The eldest said that she loved him more than her eyes, the second that she loved him more than her life, and the youngest",
)

# Of ||B·A - the sum of updates|| / ||the sum||, in float32.
_FACTORS = 1e-4
# Of ||difference|| / ||logits|| in float32: 1e-6 where sums come in another order, 1e-3 where a GPU multiplies in TF32.
_FLOOR = 2e-3


def check_checkpoint(folder: Path, model, tok, written: Mapping[str, torch.Tensor]) -> str:
    """A whole model's folder. written: the edited parameters as rounded for it, by name; all others must be the model's."""
    fresh, fresh_tok = _loaded(folder, model)
    _compare_parameters(fresh, model, written)
    return f"from this folder; every parameter equal to the bit, {_compare_logits(fresh, fresh_tok, model, tok, written)}"


def check_delta(folder: Path, model, originals: Mapping[str, torch.Tensor], base: Base | None) -> str:
    """A delta's folder, on its base loaded anew. A base that is in no folder cannot be: then on the model itself, which has its
    original weights (name -> matrix [out, in]) for that long."""
    view = ModelView(model)
    try:
        if base is None:
            with _holding(model, {name: view.oriented(name, weight) for name, weight in originals.items()}) as edited:
                load_delta(model, folder)
                if any(not torch.equal(model.get_parameter(name), tensor) for name, tensor in edited.items()):
                    raise ValueError("it gives other weights than the edited ones")
            return "into the model in memory with its original weights: equal to the bit (the base lies in no folder here)"
        fresh, _ = _loaded(base.folder, model)
        load_delta(fresh, folder)
    except ValueError as error:
        raise RuntimeError(f"the delta read back is not the edited model; nothing was exported: {error}") from error
    _compare_parameters(fresh, model, {})
    return f"into the base model loaded anew; every parameter equal to the bit, {_compare_logits(fresh, None, model, None, {})}"


def check_lora(
    folder: Path,
    model,
    written: Mapping[str, torch.Tensor],
    updates: Sequence[Update],
    errors: Mapping[str, float],
    base: Base | None,
) -> str:
    """An adapter's folder: its factors, those `written`, against the updates, of which they leave out `errors` (by parameter); then
    what PEFT makes of it on the base loaded anew, where there are both."""
    view, stored, products = ModelView(model), load_file(folder / "adapter_model.safetensors"), {}
    if stored.keys() != written.keys() or any(not torch.equal(stored[name], tensor) for name, tensor in written.items()):
        raise RuntimeError("the adapter read back holds other factors than were written; nothing was exported")
    for name, left, right, *_ in joined(updates):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        products[name] = stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        whole = left.float() @ right.float()
        lost = (products[name] - whole).norm().item() / max(whole.norm().item(), 1e-30)
        if not abs(lost - errors[name]) <= _FACTORS:
            told = f"{lost:.2%} of the updates of {name}, not {errors[name]:.2%}"
            raise RuntimeError(f"the adapter read back leaves out {told}; nothing was exported")
    factors = "its factors are those of the updates"
    if base is None:
        return f"{factors}; not by PEFT, as the base model lies in no folder here, but by arithmetic"
    if importlib.util.find_spec("peft") is None:
        return f"{factors}; not by PEFT, which is not installed here, but by arithmetic"
    from peft import PeftModel

    fresh, _ = _loaded(base.folder, model)
    fresh_view, merged = ModelView(fresh), {}
    for name, product in products.items():
        weight = fresh_view.matrix(name)
        total = (weight.float() + product.to(weight.device)).to(weight.dtype).to(view.matrix(name).device)
        merged[name] = view.oriented(name, total)
    adapted = PeftModel.from_pretrained(fresh, folder)
    return f"by PEFT onto the base model loaded anew: {_compare_logits(adapted, None, model, None, merged)}; {factors}"


def _loaded(folder: Path, model):
    try:
        return load_again(folder, model)
    except Exception as error:  # whatever transformers says of a folder that it cannot read
        raise RuntimeError(f"{folder} cannot be loaded again: {error}") from error


def _compare_parameters(fresh, model, written: Mapping[str, torch.Tensor]) -> None:
    found = dict(fresh.named_parameters())
    wanted = {name: written.get(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta}
    wrong = [name for name, tensor in wanted.items() if name not in found or not _same(found[name], tensor)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RuntimeError(
            f"the export read back differs from the edited model in {', '.join(wrong[:3])}{more}; nothing was exported"
        )


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the same bits were loaded, in the dtype they were loaded in."""
    return found.shape == wanted.shape and torch.equal(found, wanted.detach().to(found.device, found.dtype))


@torch.no_grad()
def _compare_logits(fresh, fresh_tok, model, tok, written: Mapping[str, torch.Tensor]) -> str:
    """Of a few prompts, the model's own taken with its edited parameters as they were written. Without tokenizers the prompts are
    fixed tokens."""
    view, worst, most = ModelView(model), 0.0, context_length(model)
    device = next(fresh.parameters()).device
    for ids in _prompts(view, fresh_tok, tok):
        ids = ids[:, :most]
        with evaluating(model), _holding(model, written):
            wanted = model(ids.to(view.device)).logits.float().cpu()
        with evaluating(fresh):
            got = fresh(ids.to(device)).logits.float().cpu()
        worst = max(worst, ((got - wanted).norm() / wanted.norm()).nan_to_num(nan=float("inf")).item())
    allowed = _tolerance(model.dtype, view.depth)
    if worst > allowed:
        raise RuntimeError(
            f"the export read back gives other logits than the edited model (they differ by {worst:.1e} of their norm, "
            f"allowed are {allowed:.1e}); nothing was exported"
        )
    return f"logits of {len(PROMPTS)} prompts within {worst:.1e} of their norm (allowed: {allowed:.1e})"


def _tolerance(dtype: torch.dtype, depth: int) -> float:
    """Largest ||difference|| / ||logits|| of two runs of the same weights. In one arithmetic they are equal to the bit; a second
    model that had to go to another device, or an adapter beside its weight, rounds otherwise. In 16 bits every block does so once
    more, by up to eps/2, and such errors add up as random ones do: measured with bfloat16 (eps 8e-3) are 1e-2 at 3 blocks, 2e-2 at
    32 and 3e-2 at 80."""
    return max(_FLOOR, 2 * torch.finfo(dtype).eps * depth**0.5)


def _prompts(view: ModelView, fresh_tok, tok) -> list[torch.Tensor]:
    """Token ids [1, T] of each prompt."""
    if tok is None:
        draw, words = torch.Generator().manual_seed(0), view.model.get_input_embeddings().weight.shape[0]
        return [torch.randint(words, (1, length), generator=draw) for length in (8, 8, 64)]
    found = []
    for prompt in PROMPTS:
        ids, again = tok(prompt)["input_ids"], fresh_tok(prompt)["input_ids"]
        if list(ids) != list(again):
            raise RuntimeError(
                f"the tokenizer read back makes other tokens of {prompt!r}: {again}, not {ids}; nothing was exported"
            )
        found.append(torch.tensor([ids]))
    return found


@contextmanager
@torch.no_grad()
def _holding(model, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside it, some of the model's parameters have other values; yields their own."""
    before = {name: model.get_parameter(name).detach().clone() for name in tensors}
    try:
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
        yield before
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).copy_(tensor)
