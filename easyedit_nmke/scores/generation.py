"""What a model says by itself: greedy texts and how they are judged, probabilities of answers, and fluency.

The teacher-forced scores of metrics.py show each token of the target the tokens before it; here the model has to find them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin

from ..models.arch import context_length, evaluating
from ..models.passes import batches, body_and_head, input_device
from ..models.products import frozen
from ..models.prompts import Tokens, encode, joined, open_end, pad, tokenised_all
from .answers import answer, says
from .metrics import TOKEN_BUDGET, Pair, read_targets

ANSWER_TOKENS = 10  # that an answer gets at least
STOP_TOKENS = 32  # within which a model should end by itself
BEYOND = 2  # tokens after a long target, to see whether the answer ends there

# ---- free generation


def greedy_texts(
    model,
    tok,
    prompts: Sequence[str],
    new_tokens: int | Sequence[int] = ANSWER_TOKENS,
    token_budget: int = TOKEN_BUDGET,
    separator: str | None = None,
) -> list[str]:
    """What the model says after each prompt, greedily: at most `new_tokens` tokens (one number for all, or one for each prompt),
    ending before an end-of-text token.

    Prompts of like length and as many new tokens share a batch; `token_budget`: their tokens, padding and new ones included (a
    longer prompt goes alone). The tokenizer's padding side and pad token, and the sampling settings that a model comes with, do not
    matter. A text ends at the tokenizer's eos or at one of the model's own end tokens. The model is put in evaluation mode and left
    as it was found. `separator`: what stands between prompt and answer, as in the scores of targets: spaces at a prompt's end are
    left to the model. ValueError when a prompt has no token, or does not fit the model's context together with the new ones.
    """
    found = greedy_ids(model, tok, prompts, new_tokens, token_budget, separator)
    return [tok.decode(ids, skip_special_tokens=True) for ids in found]


def greedy_ids(
    model,
    tok,
    prompts: Sequence[str],
    new_tokens: int | Sequence[int] = ANSWER_TOKENS,
    token_budget: int = TOKEN_BUDGET,
    separator: str | None = None,
) -> list[list[int]]:
    """The new tokens of `greedy_texts`."""
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    rows = _prompt_rows(tok, prompts, counts, context_length(model), separator)
    budget = token_budget if hasattr(model, "generate") else 0
    found: list[list[int]] = [[] for _ in rows]
    with evaluating(model), torch.no_grad(), frozen(model):
        for count in sorted(set(counts)):
            some = [i for i, wanted in enumerate(counts) if wanted == count]
            with _greedy(model, tok, count) as config:
                for batch in batches(model, [len(rows[i]) + count for i in some], budget):
                    chosen = [some[i] for i in batch]
                    said = _continuations(model, _pad_left([rows[i] for i in chosen], input_device(model)), config)
                    for i, ids in zip(chosen, said, strict=True):
                        found[i] = ids
    return found


def natural_texts(model, tok, prompts: Sequence[str], token_budget: int = TOKEN_BUDGET, separator: str | None = None) -> list[str]:
    """`greedy_texts` up to where the model ends by itself, or STOP_TOKENS tokens; less where its context ends."""
    return clipped_texts(model, tok, prompts, STOP_TOKENS, token_budget, separator)


def clipped_texts(
    model, tok, prompts: Sequence[str], most: int, token_budget: int = TOKEN_BUDGET, separator: str | None = None
) -> list[str]:
    """`greedy_texts` of `most` tokens, or as many as the model's context has room for."""
    context = context_length(model)
    starts = [_lengths(tok, prompt, (), separator)[0] for prompt in prompts]
    counts = [most if context is None else min(most, context - start) for start in starts]
    return greedy_texts(model, tok, prompts, counts, token_budget, separator)


class Spoken:
    """What the model says after a prompt, token by token: the text of `greedy_texts` once it is `done`.

    At most `new_tokens` tokens, fewer where the model's context ends. `ended`: the model has ended it by itself. Errors as
    `greedy_texts`. Nothing is set on the model, which is to be in evaluation mode; its weights may differ from one token to the
    next, and those of an answer are its own if they are the same whenever it goes on.
    """

    def __init__(self, model, tok, prompt: str, new_tokens: int, separator: str | None = None):
        context, start = context_length(model), _lengths(tok, prompt, (), separator)[0]
        self._left = new_tokens if context is None else max(1, min(new_tokens, context - start))
        (self._next,) = _prompt_rows(tok, [prompt], [self._left], context, separator)
        self._model, self._tok, self._cache = model, tok, None
        self._ends, self.ids, self.ended = _end_tokens(_generating(model), tok), [], False

    @property
    def text(self) -> str:
        return self._tok.decode(self.ids, skip_special_tokens=True)

    @property
    def done(self) -> bool:
        return self.ended or not self._left

    @torch.no_grad()
    def go_on(self) -> None:
        """Say one token more, if it is not done."""
        if self.done:
            return
        ids = torch.tensor([self._next], device=input_device(self._model))
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        word = int(out.logits[0, -1].argmax())
        self._cache, self._next, self._left = out.past_key_values, [word], self._left - 1
        self.ended = word in self._ends
        self.ids += [] if self.ended else [word]


# ---- answers


class Verdict(NamedTuple):
    """What a model says to a prompt, the answer in it (see `answer`), how that compares with the truths (see `says`), and what it
    says when it may go on."""

    text: str
    answer: str
    exact: bool
    contains: bool
    whole: str = ""


def judge(
    model,
    tok,
    asked: Sequence[tuple[str, str | Sequence[str]]],
    token_budget: int = TOKEN_BUDGET,
    separator: str | None = None,
    go_on: int = ANSWER_TOKENS,
) -> list[Verdict]:
    """The model's own answer to each (prompt, truths), of which any counts. It may take ANSWER_TOKENS tokens, or BEYOND more than
    the longest truth has; less where the model's context ends. `whole`: the text that takes `go_on` tokens in place of
    ANSWER_TOKENS, which begins with the answer's. Errors as `greedy_texts` and `says`."""
    wanted = [[truths] if isinstance(truths, str) else list(truths) for _, truths in asked]
    prompts, context = [prompt for prompt, _ in asked], context_length(model)
    lengths = [_lengths(tok, prompt, truths, separator) for prompt, truths in zip(prompts, wanted, strict=True)]
    first, most = ([_new_tokens(*found, least, context) for found in lengths] for least in (ANSWER_TOKENS, go_on))
    found = greedy_ids(model, tok, prompts, list(map(max, first, most)), token_budget, separator)
    texts = [tok.decode(ids[:count], skip_special_tokens=True) for ids, count in zip(found, first, strict=True)]
    wholes = [tok.decode(ids, skip_special_tokens=True) for ids in found]
    told = zip(texts, wanted, wholes, strict=True)
    return [Verdict(text, answer(text, truths), *says(text, truths), whole) for text, truths, whole in told]


def _lengths(tok, prompt: str, truths: Sequence[str], separator: str | None) -> tuple[int, int]:
    """Tokens of what is asked, and of the longest truth."""
    start = len(encode(tok, open_end(prompt, separator, tok)[0]))
    return start, max((len(encode(tok, joined(prompt, truth, separator, tok))) - start for truth in truths), default=0)


def _new_tokens(start: int, longest: int, least: int, context: int | None) -> int:
    enough = max(least, longest + BEYOND)
    return enough if context is None else max(longest, min(enough, context - start))


# ---- probability and fluency


def target_log_probs(
    model, tok, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET, separator: str | None = None
) -> list[float]:
    """Mean log-probability of each target's tokens after its prompt, teacher-forced, in nats; errors as `read_targets`."""
    return [sum(values) / len(values) for values, _ in read_targets(model, tok, pairs, log_probs, token_budget, separator)]


def fluency(texts: Sequence[str]) -> float | None:
    """Mean over texts of (2/3·H₂ + 4/3·H₃) / 2, H_n the entropy in bits of the text's n-grams of words; None without texts.

    ROME's and EasyEdit's number, which falls when a text repeats itself. A word is a run of letters and digits, or one other
    character; EasyEdit's (nltk) differ in abbreviations and in contractions such as "don't". It grows with a text's length, so
    compare texts of one length only. EasyEdit takes 100 tokens, prompt included, drawn from the model's top 5.
    """
    return sum(map(_fluency_of, texts)) / len(texts) if texts else None


def _fluency_of(text: str) -> float:
    words = re.findall(r"\w+|[^\w\s]", text)
    two, three = itertools.pairwise(words), zip(words, words[1:], words[2:], strict=False)
    return (2 / 3 * _entropy(two) + 4 / 3 * _entropy(three)) / 2


def _entropy(items) -> float:
    """Bits; 0 of nothing."""
    counts = Counter(items)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of labels [S] under logits [S, V], in nats: a `Reader`."""
    logits = logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


# ---- decoding


def _prompt_rows(tok, prompts: Sequence[str], counts: Sequence[int], context: int | None, separator: str | None) -> list[list[int]]:
    asked = [(open_end(prompt, separator, tok)[0], None, None) for prompt in prompts]
    rows = [found.ids for found in tokenised_all(tok, asked)]
    for prompt, ids, new_tokens in zip(prompts, rows, counts, strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no token, so there is nothing to go on from")
        if context is not None and len(ids) + new_tokens > context:
            size = f"{len(ids)} tokens and {new_tokens} new ones"
            raise ValueError(f"prompt {prompt[:60]!r} has {size}, the model's context is {context}; ask for fewer")
    return rows


def _pad_left(rows: Sequence[Sequence[int]], where: torch.device) -> Tokens:
    """Every row ends in the last column, so that a batch goes on from there."""
    turned = pad([row[::-1] for row in rows], where)
    return Tokens(turned.ids.flip(1), turned.mask.flip(1))


@contextmanager
def _greedy(model, tok, new_tokens: int) -> Iterator[GenerationConfig]:
    """Settings of plain greedy decoding; what `generate` would fill in from the model's own ones is out of its sight meanwhile."""
    owner = _generating(model)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        # A wrapper may choose its weights by the text it is given, so it is given the whole text at every step.
        use_cache=body_and_head(model) is not None,
        eos_token_id=sorted(_end_tokens(owner, tok)) or None,
        pad_token_id=0,  # of rows that have ended; every embedding has it
    )
    if owner is None:
        yield config
        return
    kept, owner.generation_config = owner.generation_config, config
    try:
        yield config
    finally:
        owner.generation_config = kept


def _generating(model) -> GenerationMixin | None:
    """The part of a model that has a `generate` of its own."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)


def _end_tokens(owner: GenerationMixin | None, tok) -> set[int]:
    own = owner.generation_config.eos_token_id if owner is not None else None
    return {tok.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def _continuations(model, tokens: Tokens, config: GenerationConfig) -> list[list[int]]:
    """New ids of each left-padded row, without the end token and what follows it. `generate` tells positions by the mask."""
    if hasattr(model, "generate"):
        new = model.generate(**tokens.inputs(), generation_config=config)[:, tokens.ids.shape[1] :].tolist()
    else:
        new = [_step_by_step(model, tokens, config)]
    ends = config.eos_token_id or []
    return [list(itertools.takewhile(lambda word: word not in ends, row)) for row in new]


def _step_by_step(model, tokens: Tokens, config: GenerationConfig) -> list[int]:
    """New ids of a single row, for a wrapper that has a forward pass and nothing else."""
    ids, width = tokens.ids, tokens.ids.shape[1]
    for _ in range(config.max_new_tokens):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        ids = torch.cat([ids, getattr(out, "logits", out)[:, -1:].argmax(-1).to(ids.device)], 1)
        if int(ids[0, -1]) in (config.eos_token_id or []):
            break
    return ids[0, width:].tolist()
