"""Texts that begin alike, such as a question with each of its choices: the beginning is read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ..models.arch import evaluating
from ..models.passes import body_and_head, input_device
from ..models.products import frozen
from ..models.prompts import Tokenised, pad
from .metrics import TOKEN_BUDGET, Reader, read_labels, read_rows


def read_endings(model, groups: Sequence[Sequence[Tokenised]], read: Reader, token_budget: int = TOKEN_BUDGET) -> list[list[list]]:
    """For each text of each group what `read` gives for its labels, as `metrics.read_rows`.

    The keys and values of what a group's texts share, up to the token before the first label, are computed once. Groups that share
    as many tokens are read together, within `token_budget` (a larger group goes alone). A wrapper is given every text as it is.
    """
    if body_and_head(model) is None:
        values = iter(read_rows(model, [row for rows in groups for row in rows], read, token_budget))
        return [[next(values) for _ in rows] for rows in groups]
    found: list[list[list]] = [[] for _ in groups]
    by_share = defaultdict(list)
    for i, rows in enumerate(groups):
        by_share[_shared(rows)].append(i)
    with evaluating(model), torch.no_grad(), frozen(model):
        for share, members in sorted(by_share.items()):
            for batch in _batches(groups, members, token_budget):
                values = iter(_read(model, [groups[i] for i in batch], share, read))
                for i in batch:
                    found[i] = [next(values) for _ in groups[i]]
    return found


def _shared(rows: Sequence[Tokenised]) -> int:
    """How many tokens all rows begin with, and none of them is or directly precedes a label."""
    first, most = rows[0].ids, min(row.target for row in rows) - 1
    return next((k for k in range(most) if any(row.ids[k] != first[k] for row in rows)), most)


def _batches(groups: Sequence[Sequence[Tokenised]], members: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Members in order of their longest text, as many as fit."""
    longest = {i: max(len(row.ids) for row in groups[i]) for i in members}
    batch: list[int] = []
    for i in sorted(members, key=longest.__getitem__):
        if batch and longest[i] * sum(len(groups[j]) for j in (*batch, i)) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _read(model, groups: Sequence[Sequence[Tokenised]], share: int, read: Reader) -> list[list]:
    """Of all rows of groups whose first `share` tokens are the same within each."""
    where, past = input_device(model), None
    if share:
        body, _ = body_and_head(model)
        fronts = pad([rows[0].ids[:share] for rows in groups], where)
        past = body(**fronts.inputs(), use_cache=True).past_key_values
        past.batch_select_indices(torch.tensor([i for i, rows in enumerate(groups) for _ in rows], device=where))
    rows = [row for some in groups for row in some]
    return read_labels(model, pad([row.ids[share:] for row in rows], where), [row.target - share for row in rows], read, past)
