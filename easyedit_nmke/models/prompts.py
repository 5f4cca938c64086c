"""Text to tokens: context templates, how prompt and target are joined, and where the subject ends.

Texts are taken as they are; what stands between prompt and target is decided in `joined`, and a text's ids, the subject's place
and the target's come from one tokenisation. Padding is always done here, on the right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from .chat import CLOSED, special_texts, turn
from .subjects import find_subject, spaceless

logger = logging.getLogger(__name__)

SUBJECT = "{}"


@dataclass(frozen=True)
class Tokens:
    """Right-padded token ids [B, T] and attention mask [B, T]."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """Position of each row's last real token [B]."""
        return self.mask.sum(1) - 1

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}


def pad(rows: Sequence[Sequence[int]], device, filler: int = 0) -> Tokens:
    """Pad on the right, whatever side the tokenizer would use; with id 0, which every embedding has (masked, so any would do)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return Tokens(ids.to(device), mask.to(device))


# ---- texts


def placed(prompt: str, subject: str, template: str, tok=None) -> tuple[str, int]:
    """The prompt inside a context template, and the character at which the subject ends. In a text that carries a chat format the
    template stands around the user's words; where these are not found the prompt stands alone."""
    start, end = find_subject(prompt, subject)
    before, after = template.split(SUBJECT)
    words = turn(prompt, start, end, tok) if before or after else (0, len(prompt))
    if words is None:
        logger.info("the subject of %r is not in what the user says; the context %r is left out", prompt, template)
        return prompt, end
    first, last = words
    return prompt[:first] + before + prompt[first:last] + after + prompt[last:], end + len(before)


def reworded(prompt: str, subject: str, words: str, tok=None) -> tuple[str, int]:
    """Other words about the subject ('{}' stands for it) in place of the prompt's, and the character at which the subject ends.
    In a text that carries a chat format they take the place of the user's words."""
    start, end = find_subject(prompt, subject)
    first, last = turn(prompt, start, end, tok) or (0, len(prompt))
    before, after = words.split(SUBJECT)
    text = prompt[:first] + before + prompt[start:end]
    return text + after + prompt[last:], len(text)


def joined(prompt: str, target: str, separator: str | None = None, tok=None) -> str:
    """The prompt and its target as one text: what every edit and every score reads.

    separator: what stands between them; None: what the text asks for (see `open_end`). tok: whose special tokens need none.
    """
    return _join(*open_end(prompt, separator, tok), target)


def ended(tok, requests: Sequence, hparams) -> list:
    """The `Request`s as they are learnt: with `target_eos` the tokenizer's end token, as text, is the last of each target.
    ValueError for a tokenizer that has none."""
    if not getattr(hparams, "target_eos", False):
        return list(requests)
    end = tok.eos_token
    if not end:
        raise ValueError("target_eos is set, but the tokenizer has no end token; give it one, or set target_eos: false")
    return [r if r.target_new.endswith(end) else replace(r, target_new=r.target_new + end) for r in requests]


def open_end(prompt: str, separator: str | None = None, tok=None) -> tuple[str, str]:
    """(the text that the model is asked, the space that it leaves between it and the answer).

    Spaces at the prompt's end are no part of what is asked. Without a `separator` those that indent its last line are left between
    it and the answer; else there is no space after a line end, after a special token, and where the last letter is of a script that
    writes none; otherwise one. A separator is asked with the prompt, but for the spaces at its end.
    """
    return _open_end(prompt, separator, special_texts(tok))


def _join(asked: str, space: str, target: str) -> str:
    return asked + space + (target.lstrip(" ") if space else target)


def _open_end(prompt: str, separator: str | None, special: tuple[str, ...]) -> tuple[str, str]:
    if separator is not None:
        text = (prompt.rstrip(" ") if separator else prompt) + separator
        asked = text.rstrip(" ")
        return asked, text[len(asked) :]
    asked = prompt.rstrip(" ")
    if asked and asked[-1].isspace():
        return asked, prompt[len(asked) :]
    if not asked or asked.endswith(special) or CLOSED.search(asked):
        return asked, ""
    letter = next((char for char in reversed(asked) if char.isalpha()), "")
    return asked, "" if letter and spaceless(letter) else " "


# ---- tokens


@dataclass(frozen=True)
class Tokenised:
    """A text's token ids, the index of the subject's last token, and the index of the target's first; None where not asked."""

    ids: list[int]
    subject: int | None = None
    target: int | None = None

    @property
    def labels(self) -> list[int]:
        """The target's tokens."""
        return self.ids[self.target :]


def tokenised(
    tok, prompt: str, subject_end: int | None = None, target: str | None = None, separator: str | None = None
) -> Tokenised:
    """The prompt, joined with the target if there is one (see `joined`), from one call of the tokenizer.

    subject_end: the character of the prompt at which the subject ends. Special tokens come in front, none behind; a text that has
    some itself is complete, and gets none. ValueError when there is no token for the subject's end, for the prompt or for the
    target, or when one token spans the end of the prompt and the beginning of the target.
    """
    (found,) = tokenised_all(tok, [(prompt, subject_end, target)], separator)
    return found


def tokenised_all(tok, texts: Sequence[tuple[str, int | None, str | None]], separator: str | None = None) -> list[Tokenised]:
    """`tokenised` of each (prompt, subject_end, target)."""
    special = special_texts(tok)
    complete = [any(mark in prompt for mark in special) for prompt, _, _ in texts]
    ends = [(prompt, "") if target is None else _open_end(prompt, separator, special) for prompt, _, target in texts]
    whole = [_join(*end, target or "") for end, (*_, target) in zip(ends, texts, strict=True)]
    rows = _read(tok, whole, complete, where=any(part is not None for _, *parts in texts for part in parts))
    found = []
    for (_, stop, target), (asked, space), text, closed, read in zip(texts, ends, whole, complete, rows, strict=True):
        row = _Row(tok, text, closed, *read)
        subject = None if stop is None else row.last_before(stop)
        found.append(Tokenised(row.ids, subject, None if target is None else row.first_after(len(asked), len(asked) + len(space))))
    return found


def encode(tok, text: str) -> list[int]:
    """Token ids with the tokenizer's special tokens in front, none behind: an end token it appends is no part of a prompt. A text
    that has special tokens in it is complete, and gets none."""
    return tokenised(tok, text).ids


def without_end(tok, ids: Sequence[int], text: str) -> list[int]:
    """ids without an end-of-text token that the tokenizer put behind a text that does not end with one itself."""
    end = tok.eos_token_id
    appended = end is not None and len(ids) > 0 and ids[-1] == end and not text.endswith(tok.eos_token)
    return list(ids[:-1] if appended else ids)


def position_before(tok, text: str, end: int) -> int:
    """Index of the token that holds the last of text[:end]'s characters: the subject's last token."""
    return tokenised(tok, text, end).subject


def target_tokens(tok, text: str, target: str, separator: str | None = None) -> list[int]:
    """Token ids that `target` adds after `text`, tokenised together (so that no space token is doubled)."""
    return tokenised(tok, text, None, target, separator).labels


def _read(tok, texts: Sequence[str], complete: Sequence[bool], where: bool = False) -> list[tuple[list[int], list | None]]:
    """(ids, with `where` each token's characters if the tokenizer tells) of each text; a complete one gets no special tokens."""
    rows: list = [None] * len(texts)
    told = {"return_offsets_mapping": True} if where and getattr(tok, "is_fast", False) else {}
    for closed, options in ((False, told), (True, {**told, "add_special_tokens": False})):
        some = [i for i, one in enumerate(complete) if one == closed]
        read = tok([texts[i] for i in some], **options) if some else {"input_ids": []}
        offsets = read["offset_mapping"] if told and some else [None] * len(some)
        for i, ids, characters in zip(some, read["input_ids"], offsets, strict=True):
            ids = list(ids) if closed else without_end(tok, ids, texts[i])
            rows[i] = ids, characters and characters[: len(ids)]
    return rows


@dataclass(frozen=True)
class _Row:
    """A text's tokens, and which of them holds a character: by the tokenizer's offsets, else by the tokens of the text's
    beginnings where these are the first tokens of the whole."""

    tok: object
    text: str
    complete: bool
    ids: list[int]
    offsets: Sequence[tuple[int, int]] | None

    def last_before(self, end: int) -> int:
        """The token of the character before `end`."""
        if self.offsets is not None:
            at = max((i for i, (start, stop) in enumerate(self.offsets) if start < end and stop > start), default=None)
            if at is not None and not any(map(str.isalnum, self.text[self.offsets[at][1] : end])):
                return at
        else:
            count = self._held([end])
            if count:
                return count - 1
            if count is None:  # a token goes on beyond `end`: it is the one between the two nearest places where tokens end
                before, after = self._held(range(end - 1, -1, -1)), self._held(range(end + 1, len(self.text) + 1))
                if before is not None and after == before + 1:
                    return before
        raise ValueError(
            f"the tokenizer has no token that holds the end of the subject in {self.text[:end]!r}; choose another prompt"
        )

    def first_after(self, seam: int, begin: int) -> int:
        """The first token behind the prompt, which ends at `seam`; the target begins at `begin`."""
        prompt, target = self.text[:seam], self.text[begin:]
        if self.offsets is not None:
            behind = [i for i, (_, stop) in enumerate(self.offsets) if stop > seam]
            there = bool(behind) and self.offsets[-1][1] > begin
            if behind and self.offsets[behind[0]][0] < seam:
                behind = behind[1:] if self.offsets[behind[0]][1] <= begin else []
            first = behind[0] if behind else None
        else:
            first, used = self._held([seam, begin]), self._held([begin])
            there = used is None or used < len(self.ids)
        if not there:
            raise ValueError(f"target {target!r} adds no token to the prompt {prompt!r}; give a target with text in it")
        if first is None:
            raise ValueError(
                f"the tokenizer has one token for the end of the prompt {prompt[-60:]!r} and the beginning of the target "
                f"{target!r}; set target_separator, or let the prompt end otherwise"
            )
        if first == 0:
            raise ValueError(f"prompt {prompt!r} has no token, so there is no position to predict {target!r} from")
        return first

    def _held(self, places: Iterable[int]) -> int | None:
        """How many tokens hold text[:place] and nothing else, at the first place where that is so; None when tokens go on beyond
        each of them."""
        for place in places:
            ((ids, _),) = _read(self.tok, [self.text[:place]], [self.complete])
            if self.ids[: len(ids)] == ids:
                return len(ids)
        return None


@torch.no_grad()
def context_templates(
    model, tok, prefixes: Sequence[str], length: int, seed: int, top_k: int = 5, copies: int = 1
) -> list[list[str]]:
    """[["{}"], ["<generated text>. {}", ...]]: the groups under which keys are averaged, as MEMIT does; `copies` of each prefix.

    Texts are sampled from the model (top-k) with a seeded generator of their own: the same seed and model give the same
    templates, and the caller's random state is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    texts = []
    for prefix in [prefix for prefix in prefixes for _ in range(copies)]:
        ids = encode(tok, prefix)
        while len(ids) < length:
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
            best = logits.topk(min(top_k, len(logits)))
            choice = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
            ids.append(int(best.indices[choice]))
        text = tok.decode(ids, skip_special_tokens=True)
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". " + SUBJECT)
    logger.debug("context templates: %s", texts)
    return [[SUBJECT], texts] if texts else [[SUBJECT]]
