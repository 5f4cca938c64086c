"""Reliability, generalization, locality and portability: teacher-forced token accuracy, as EasyEdit's `compute_edit_quality`.

The text is that which an edit writes, mostly `prompt + " " + target` (`prompts.joined`). Its labels are the tokens behind the
prompt; the prediction for a label is the argmax at the position before it. EasyEdit makes one forward pass per prompt with
logits everywhere; here pairs of like length share a pass, and the vocabulary is looked at only where there is a label. Wrappers
around a model (EasyEdit's WISE, GRACE) are given one text at a time: they may choose their weights by all that is in a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import torch

from ..models.arch import context_length, evaluating
from ..models.passes import batches, body_and_head, input_device
from ..models.products import frozen
from ..models.prompts import Tokenised, Tokens, pad, tokenised_all
from ..models.requests import ATTRIBUTE, Request

# Other facts of the edited subject: this type of locality has a column of its own (see `summary`).
SAME_SUBJECT = "same_subject"
TOKEN_BUDGET = 8192
# Positions whose logits exist at once: 256 x 128k words in float32 is 130 MB.
HEAD_ROWS = 256

Pair = tuple[str, str]
Reader = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def read_targets(
    model, tok, pairs: Sequence[Pair], read: Reader, token_budget: int = TOKEN_BUDGET, separator: str | None = None
) -> list[tuple[list, list[int]]]:
    """(what `read` gives for each label, label ids) for each (prompt, target), in the order given, both of the target's length.

    `read` takes the logits [S, V] from which S labels are predicted, and the labels [S], and gives [S]; S <= HEAD_ROWS.
    `token_budget`: tokens, padding included, in one forward pass (a longer text goes alone). `separator`: what stands between
    prompt and target; None: what the text asks for. The tokenizer's padding side and pad token do not matter; the model is put in
    evaluation mode and left as it was found. ValueError when a target adds no token, a prompt has none, a token spans both, or a
    text is longer than the model's context.
    """
    rows = _rows(tok, pairs, context_length(model), separator)
    return [(found, row.labels) for found, row in zip(read_rows(model, rows, read, token_budget), rows, strict=True)]


def read_rows(model, rows: Sequence[Tokenised], read: Reader, token_budget: int = TOKEN_BUDGET) -> list[list]:
    """What `read` gives for each label of each text (see `read_targets`); the texts fit the model's context."""
    values: list[list] = [[] for _ in rows]
    with evaluating(model), torch.no_grad(), frozen(model):
        for batch in batches(model, [len(row.ids) for row in rows], token_budget):
            tokens = pad([rows[i].ids for i in batch], input_device(model))
            for i, found in zip(batch, read_labels(model, tokens, [rows[i].target for i in batch], read), strict=True):
                values[i] = found
    return values


def predicted_tokens(
    model, tok, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET, separator: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """(predicted ids, label ids) for each (prompt, target): the top-1 word before each label (see `read_targets`)."""
    return read_targets(model, tok, pairs, lambda logits, _: logits.argmax(-1), token_budget, separator)


def token_accuracy(
    model, tok, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET, separator: str | None = None
) -> list[float]:
    """Share of the target's tokens predicted right, for each pair (0 to 1)."""
    return [_share(guess, label) for guess, label in predicted_tokens(model, tok, pairs, token_budget, separator)]


def exact_match(model, tok, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET, separator: str | None = None) -> list[bool]:
    """Whether every token of the target is predicted right, for each pair: greedy decoding then starts with the target."""
    return [guess == label for guess, label in predicted_tokens(model, tok, pairs, token_budget, separator)]


def quality(model, tok, requests: Sequence[Request], token_budget: int = TOKEN_BUDGET, separator: str | None = None) -> list[dict]:
    """EasyEdit's dictionary for each request; the prompts of all requests share forward passes.

    {"rewrite_acc": [share], "rephrase_acc": [share of each rephrase] if there is one, "locality": {"<type>_output": [predicted ids
    of each prompt]}, "portability": {"<type>_acc": [share of each prompt]}}.
    """
    slots = [(i, *slot) for i, request in enumerate(requests) for slot in _slots(request)]
    outcomes = predicted_tokens(model, tok, [pair for *_, pair in slots], token_budget, separator)
    results: list[dict] = [{"locality": {}, "portability": {}} for _ in requests]
    for (i, section, key, _), (guess, label) in zip(slots, outcomes, strict=True):
        place = results[i][section] if section else results[i]
        place.setdefault(key, []).append(guess if section == "locality" else _share(guess, label))
    return results


def check(model, tok, requests: Sequence[Request], separator: str | None = None, more: Sequence[Pair] = ()) -> None:
    """ValueError when a prompt or an answer of the requests, or of `more`, cannot be scored: too long for the model, or without a
    token."""
    _rows(tok, [*(pair for request in requests for *_, pair in _slots(request)), *more], context_length(model), separator)


def add_locality_accuracy(before: dict, after: dict) -> None:
    """Write after["locality"]["<type>_acc"]: for each prompt, the share of tokens predicted as `before` (EasyEdit's locality).

    `before` and `after` are one request's dictionaries from `quality`. ValueError when they are not about the same prompts.
    """
    accuracies = _locality_accuracy(before, after)
    after["locality"].update({f"{kind}_acc": values for kind, values in accuracies.items()})


def summary(before: Sequence[dict], after: Sequence[dict]) -> dict[str, float | None]:
    """Means over requests (`of_requests`): "rel", "gen", "loc", "same_subject", "portability"; None where nothing is to average."""
    return means(of_requests(before, after))


def means(found: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Of each score over the requests that have it; None where none has."""
    return {name: _mean(values) for name, values in found.items()}


def of_requests(before: Sequence[dict], after: Sequence[dict]) -> dict[str, list[float | None]]:
    """`summary`'s scores of each request; None where it has nothing to average.

    `before` and `after`: `quality` of the same requests on the unedited and on the edited model. Per request the prompts of a
    type are averaged first, then its types, then the requests that have any, so that no request counts more for having more
    prompts. "loc" leaves out the type "same_subject": other facts of the edited subject share its key and are far harder to
    keep than neighbours, so one mean of both would hide how each of them does; and "attribute", which is in no published Loc.
    Types are told by name alone: KnowEdit's "Relation_Specificity" asks about the edited subject too, but counts in "loc", as
    EasyEdit counts it.
    """
    kept = _kept(before, after)
    near = [[values for kind, values in types.items() if kind not in (SAME_SUBJECT, ATTRIBUTE)] for types in kept]
    return {
        "rel": [_mean_over_types([a["rewrite_acc"]]) for a in after],
        "gen": [_mean_over_types([a.get("rephrase_acc", [])]) for a in after],
        "loc": [_mean_over_types(types) for types in near],
        "same_subject": [_mean_over_types([types.get(SAME_SUBJECT, [])]) for types in kept],
        "portability": [_mean_over_types(list(a["portability"].values())) for a in after],
    }


def by_kind(before: Sequence[dict], after: Sequence[dict]) -> dict[str, float]:
    """{type of locality: mean agreement with `before`}: over its prompts, then over the requests that have it (as `summary`)."""
    kept = _kept(before, after)
    kinds = dict.fromkeys(kind for types in kept for kind in types)
    return {kind: _mean([fmean(types[kind]) for types in kept if types.get(kind)]) for kind in kinds}


def retention(values: Sequence[float | None], parts: int = 10) -> list[float | None]:
    """Means of `parts` consecutive stretches of equal length (to one), oldest first; None where a stretch has no number."""
    bounds = [len(values) * part // parts for part in range(parts + 1)]
    stretches = (values[start:end] for start, end in itertools.pairwise(bounds))
    return [_mean(stretch) for stretch in stretches]


# ---- numbers


def _share(guess: Sequence[int], label: Sequence[int]) -> float:
    return sum(g == w for g, w in zip(guess, label, strict=True)) / len(label)


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are numbers; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_over_types(types: Sequence[Sequence[float]]) -> float | None:
    """[type][prompt] -> mean over prompts, then types, leaving out what is empty."""
    return _mean([sum(prompts) / len(prompts) for prompts in types if prompts])


def _kept(before: Sequence[dict], after: Sequence[dict]) -> list[dict[str, list[float]]]:
    """`_locality_accuracy` of each request."""
    if len(before) != len(after):
        raise ValueError(f"before has {len(before)} requests, after {len(after)}; both must be scores of the same requests")
    return [_locality_accuracy(b, a) for b, a in zip(before, after, strict=True)]


def _locality_accuracy(before: dict, after: dict) -> dict[str, list[float]]:
    """{type: [share of each prompt's tokens that are the same]}."""
    result = {}
    for key, outputs in after["locality"].items():
        if not key.endswith("_output"):
            continue
        kind = key.removesuffix("_output")
        earlier = before["locality"].get(key)
        if earlier is None or list(map(len, earlier)) != list(map(len, outputs)):
            raise ValueError(f"locality type {kind!r} was scored on other prompts before the edit than after it")
        result[kind] = [_share(new, old) for new, old in zip(outputs, earlier, strict=True)]
    return result


def _slots(request: Request) -> Iterator[tuple[str | None, str, Pair]]:
    """(section, key, (prompt, target)) of everything that one request is scored on."""
    yield None, "rewrite_acc", (request.prompt, request.target_new)
    for prompt in request.rephrase_prompts:
        yield None, "rephrase_acc", (prompt, request.target_new)
    for section, suffix in (("locality", "output"), ("portability", "acc")):
        for kind, pairs in getattr(request, section).items():
            for pair in pairs:
                yield section, f"{kind}_{suffix}", pair


# ---- text


def _rows(tok, pairs: Sequence[Pair], context: int | None, separator: str | None) -> list[Tokenised]:
    """Prompt and target of each pair as one text."""
    rows = tokenised_all(tok, [(prompt, None, target) for prompt, target in pairs], separator)
    for (prompt, _), row in zip(pairs, rows, strict=True):
        if context is not None and len(row.ids) > context:
            raise ValueError(f"prompt {prompt[:60]!r} and target have {len(row.ids)} tokens, the model's context {context}")
    return rows


# ---- model


def read_labels(model, tokens: Tokens, starts: Sequence[int], read: Reader, past=None) -> list[list]:
    """For each row what `read` gives for its labels, which begin at `starts` and end with the row. past: as of `logits_at`."""
    ends = tokens.mask.sum(1).tolist()
    rows = torch.tensor([b for b, (s, e) in enumerate(zip(starts, ends, strict=True)) for _ in range(s, e)])
    places = torch.tensor([p for s, e in zip(starts, ends, strict=True) for p in range(s, e)])
    labels = tokens.ids.cpu()[rows, places].split(HEAD_ROWS)
    chunks = zip(logits_at(model, tokens, rows, places - 1, past), labels, strict=True)
    values = torch.cat([read(logits, some.to(logits.device)) for logits, some in chunks]).cpu()
    return [found.tolist() for found in values.split([e - s for s, e in zip(starts, ends, strict=True)])]


def logits_at(model, tokens: Tokens, rows: torch.Tensor, places: torch.Tensor, past=None) -> Iterator[torch.Tensor]:
    """The logits at (row, place), in order, at most HEAD_ROWS of them at a time: [<= HEAD_ROWS, V]. past: cached keys and values of
    what stands before each row, without padding; of a model that has a body and a head."""
    parts = body_and_head(model)
    if parts is None:
        out = model(**tokens.inputs())
        yield from getattr(out, "logits", out)[rows, places].split(HEAD_ROWS)
        return
    body, head = parts
    softcap = getattr(model.config, "final_logit_softcapping", None)
    inputs = {**tokens.inputs(), "use_cache": past is not None}
    if past is not None:
        before = tokens.mask.new_ones(len(tokens.mask), past.get_seq_length())
        inputs |= {"attention_mask": torch.cat((before, tokens.mask), 1), "past_key_values": past}
    hidden = body(**inputs).last_hidden_state
    chosen = hidden[rows.to(hidden.device), places.to(hidden.device)].to(head.weight.device)
    for some in chosen.split(HEAD_ROWS):
        yield softcapped(head(some), softcap)


def softcapped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """c·tanh(logits / c), or as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
