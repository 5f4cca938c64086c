"""Texts in a model's chat format: what the user says in them, and how a request is put into it."""

from __future__ import annotations

import re
from dataclasses import replace

# What formats mark their parts with, as text: special tokens of their models, after which an answer needs no space ...
_TOKEN = r"<\|[^<>|\s]+\|>|<｜[^<>\s]+｜>|</?s>|<[be]os>|<(?:start|end)_of_turn>"
CLOSED = re.compile(rf"(?:{_TOKEN})\Z")
# ... and words that are none.
_MARK = rf"{_TOKEN}|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>"
_OTHERS = "system|assistant|model|bot|gpt|developer|tool|function"
_NAME = f"(?i:user|human|{_OTHERS})"
_ROLE = re.compile(rf"(?P<user>user|human|\[INST\])|{_OTHERS}|/INST|<SYS>", re.IGNORECASE)
_PROBE = "What is asked?"
_BRACKETED = re.compile(r"[<\[|｜]")  # as <pad>, [PAD] and <|end|> are


def special_texts(tok) -> tuple[str, ...]:
    """The texts of the tokenizer's special tokens, but for a word of the vocabulary ("!") that is its pad token for want of one."""
    marked = [token.content for token in getattr(tok, "added_tokens_decoder", {}).values() if token.special]
    roles = getattr(tok, "special_tokens_map", {})
    pad, others = roles.get("pad_token"), [text for role, text in roles.items() if role != "pad_token"]
    found = dict.fromkeys([*getattr(tok, "all_special_tokens", ()), *marked])
    return tuple(text for text in found if text != pad or text in others or _BRACKETED.search(text))


def as_chat(tok, prompt: str) -> str:
    """The prompt as what a user says in the tokenizer's chat format, up to where the answer begins. ValueError without one."""
    if not getattr(tok, "chat_template", None):
        raise ValueError("use_chat_template is set, but the tokenizer has no chat template; set one, or use_chat_template: false")
    return tok.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)


def as_asked(tok, requests, hparams) -> list:
    """The `Request`s as they are asked of a model: with `use_chat_template` in its chat format."""
    return [in_chat(tok, request) for request in requests] if getattr(hparams, "use_chat_template", False) else list(requests)


def in_chat(tok, request):
    """The `Request` with its prompt, rephrases and probes in the tokenizer's chat format; those that are in it stay as they are."""
    frame, special = _frame(tok), special_texts(tok)

    def put(prompt: str) -> str:
        there = (frame and _framed(prompt, frame)) or any(text in prompt for text in special)
        return prompt if there else as_chat(tok, prompt)

    def probes(kinds):
        return {kind: tuple((put(prompt), answer) for prompt, answer in pairs) for kind, pairs in kinds.items()}

    def queries(some):
        return tuple(replace(query, prompt=put(query.prompt)) for query in some)

    def tests(some):
        return tuple(replace(test, queries=queries(test.queries), conditions=queries(test.conditions)) for test in some)

    return replace(
        request,
        prompt=put(request.prompt),
        rephrase_prompts=tuple(map(put, request.rephrase_prompts)),
        locality=probes(request.locality),
        portability=probes(request.portability),
        ripple={kind: tests(some) for kind, some in request.ripple.items()},
    )


def turn(prompt: str, start: int, end: int, tok=None) -> tuple[int, int] | None:
    """The user's words around prompt[start:end]: what the tokenizer's chat format frames, if that has no marks in it; else what
    stands between the marks of a chat format; a text without marks is all words. None when somebody else says them (the system,
    the assistant). tok: whose special tokens are marks as well."""
    special = sorted((text for text in special_texts(tok) if text in prompt), key=len, reverse=True)
    mark = "|".join([_MARK, *map(re.escape, special)])
    # Marks that follow each other with no more than a role between them, and the role's name where it ends the line.
    headers = rf"(?:{mark})(?:\s*{_NAME}?\s*(?:{mark}))*(?:[ \t]*{_NAME}[ \t]*\n)?\s*"
    found = list(re.finditer(headers, prompt))
    if (frame := _frame(tok)) and _framed(prompt, frame):
        first, last = framed_words(tok, prompt)
        if not re.search(mark, prompt[first:last]):
            return (first, last) if first <= start and end <= last else None
    before = [header for header in found if header.start() < end]
    after = [header for header in found if header.start() >= end]
    stop = len(prompt[: after[0].start()].rstrip()) if after else len(prompt)
    if not before:
        return 0, stop
    roles = list(_ROLE.finditer(before[-1].group()))
    if before[-1].end() > start or (roles and not roles[-1]["user"]):
        return None
    return before[-1].end(), stop


def framed_words(tok, prompt: str) -> tuple[int, int]:
    """Where the user's words begin and end in a prompt that the tokenizer's chat format frames; all of any other."""
    frame = _frame(tok)
    if not frame or not _framed(prompt, frame):
        return 0, len(prompt)
    return len(frame[0]), len(prompt.rstrip(" ")) - len(frame[1])


def _frame(tok) -> tuple[str, str] | None:
    """What the tokenizer's chat format puts before and after a user's words, without spaces at its end."""
    if not getattr(tok, "chat_template", None):
        return None
    parts = as_chat(tok, _PROBE).rstrip(" ").split(_PROBE)
    return tuple(parts) if len(parts) == 2 else None


def _framed(prompt: str, frame: tuple[str, str]) -> bool:
    long_enough = len(prompt) > len(frame[0]) + len(frame[1]) > 0
    return long_enough and prompt.startswith(frame[0]) and prompt.rstrip(" ").endswith(frame[1])
