"""How texts share forward passes: batches by length, a model's body and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive ones, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def batches(model, lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in order of length, in groups whose padded size (rows x longest) is within the budget, or of one row.

    Always of one row for a wrapper: WISE picks one memory for a whole batch, padding included, so others would change its answer.
    """
    budget = token_budget if body_and_head(model) else 0
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # In order of length the newcomer is the longest, so it sets the width of the group it joins.
        if batch and lengths[i] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def input_device(model) -> torch.device:
    """Where token ids go: the embedding's device, also when the layers are spread over several."""
    embed = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return (embed.weight if embed is not None else next(model.parameters())).device


def body_and_head(model) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """What makes the final hidden states, and what makes logits of them; None for a wrapper with no more than a forward pass."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft puts LoRA layers inside it
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", model)
    return None if head is None or body is model else (body, head)
