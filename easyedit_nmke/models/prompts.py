"""Text to tokens: edit requests, context templates, and where the subject ends. Padding is always done here, on the right."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

logger = logging.getLogger(__name__)

SUBJECT = "{}"
_REQUIRED = ("prompt", "subject", "target_new")


@dataclass(frozen=True)
class Request:
    """One fact to write, with the prompts that measure it.

    `prompt` is the full text with the subject in it; `locality` and `portability` map a type to ((prompt, answer), ...).
    """

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    rephrase_prompt: str | None = None
    locality: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, record: Mapping) -> Request:
        """From EasyEdit's request dictionary. ValueError in one sentence when it cannot be edited."""
        missing = [name for name in _REQUIRED if not isinstance(record.get(name), str)]
        if missing:
            raise ValueError(f"a request needs the texts {', '.join(_REQUIRED)}; missing or not text: {', '.join(missing)}")
        subject, target = record["subject"].strip(), record["target_new"].strip()
        if not subject:
            raise ValueError(f"the subject of prompt {record['prompt']!r} is empty")
        if not target:
            raise ValueError(f"the new target of prompt {record['prompt']!r} is empty")
        prompt = record["prompt"].replace(SUBJECT, subject) if SUBJECT in record["prompt"] else record["prompt"]
        prompt = prompt.strip()
        count = prompt.count(subject)
        if count != 1:
            found = "not in" if count == 0 else f"{count} times in"
            raise ValueError(f"subject {subject!r} is {found} the prompt {prompt!r}; it must be there exactly once")
        truth = record.get("ground_truth")
        return cls(
            prompt,
            subject,
            target,
            truth[0] if isinstance(truth, (list, tuple)) and truth else truth,
            record.get("rephrase_prompt") or None,
            _probes(record.get("locality")),
            _probes(record.get("portability")),
        )

    def to_dict(self) -> dict:
        """EasyEdit's request dictionary."""
        record = {name: getattr(self, name) for name in ("prompt", "subject", "target_new", "ground_truth")}
        if self.rephrase_prompt:
            record["rephrase_prompt"] = self.rephrase_prompt
        for name in ("locality", "portability"):
            record[name] = {
                kind: {"prompt": [p for p, _ in pairs], "ground_truth": [a for _, a in pairs]}
                for kind, pairs in getattr(self, name).items()
            }
        return record

    def fill(self, template: str) -> tuple[str, int]:
        """The prompt inside a context template ('{}' stands for the prompt), and the character at which the subject ends."""
        before, after = template.split(SUBJECT)
        return before + self.prompt + after, len(before) + self.prompt.index(self.subject) + len(self.subject)


def _probes(content: Mapping | None) -> dict[str, tuple[tuple[str, str], ...]]:
    probes = {}
    for kind, entry in (content or {}).items():
        if not isinstance(entry, Mapping) or not {"prompt", "ground_truth"} <= set(entry):
            raise ValueError(f"the probe {kind!r} of a request needs 'prompt' and 'ground_truth', got {entry!r}")
        prompts, answers = entry["prompt"], entry["ground_truth"]
        if isinstance(prompts, str):
            prompts, answers = [prompts], [answers]
        first = [a[0] if isinstance(a, (list, tuple)) and a else a for a in answers]
        if prompts:
            probes[kind] = tuple(zip(prompts, first, strict=True))
    return probes


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


def pad(rows: Sequence[Sequence[int]], tok, device) -> Tokens:
    """Pad on the right with the tokenizer's pad token, whatever side the tokenizer would use (masked, so any id would do)."""
    filler = tok.pad_token_id if tok.pad_token_id is not None else 0
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return Tokens(ids.to(device), mask.to(device))


def encode(tok, text: str) -> list[int]:
    """Token ids with the tokenizer's special tokens in front, none behind: an end token it appends is no part of a prompt."""
    return without_end(tok, tok(text)["input_ids"], text)


def without_end(tok, ids: Sequence[int], text: str) -> list[int]:
    """ids without an end-of-text token that the tokenizer put behind a text that does not end with one itself."""
    end = tok.eos_token_id
    appended = end is not None and len(ids) > 0 and ids[-1] == end and not text.endswith(tok.eos_token)
    return list(ids[:-1] if appended else ids)


def position_before(tok, text: str, end: int) -> int:
    """Index of the token that holds the last of text[:end]'s characters: the subject's last token."""
    if getattr(tok, "is_fast", False):
        offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
        return max(i for i, (start, stop) in enumerate(offsets) if start < end and stop > start)
    return len(encode(tok, text[:end])) - 1


def target_tokens(tok, text: str, target: str) -> list[int]:
    """Token ids that `target` adds after `text`, tokenised together (so that no space token is doubled)."""
    both = encode(tok, f"{text} {target}")
    return both[_common_prefix(encode(tok, text), both) :]


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


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
