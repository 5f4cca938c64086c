"""Text for the covariance of keys: a file, a dataset of the Hugging Face hub, the embedded model's text, or the model's own."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .. import atlas

logger = logging.getLogger(__name__)

SELF = "self"  # names the model's own samples
SELF_TOKENS = 128  # of one sample
SELF_ROWS = 32  # sampled together: 0.5 GB of cached keys and values at Llama-3-8B's size, bfloat16
HUB = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}


@dataclass(frozen=True)
class Corpus:
    """At most `count` texts, read anew whenever it is iterated: never in memory as a whole."""

    read: Callable[[], Iterator[str]]
    count: int

    def __iter__(self) -> Iterator[str]:
        return itertools.islice(self.read(), self.count)

    def __len__(self) -> int:
        return self.count


def corpus(source: str, samples: int) -> Sequence[str] | Corpus:
    """The first `samples` texts: "atlas" or "atlas-large", a text file (one per line), a JSON-lines file (.jsonl) with a "text"
    field, or a Hugging Face dataset by name ("wikipedia", "wikitext", "wikitext2", or a hub path), streamed.

    Files are read once here: a line that cannot be read is a ValueError now (file and line in it), not after hours.
    """
    if source in atlas.SOURCES:
        return atlas.corpus(samples, world=atlas.SOURCES[source])
    path = Path(source)
    if path.is_file():
        return Corpus(lambda: _lines(path), sum(1 for _ in itertools.islice(_lines(path), samples)))
    return Corpus(lambda: _hub_texts(source), samples)


def identity(source: str) -> str:
    """What tells one text source from another: the digest of a file's bytes and whether they are read as JSON lines, that of a
    folder's files, else the name."""
    path = Path(source)
    if path.is_file():
        return _digest(path) + (".jsonl" if path.suffix == ".jsonl" else "")
    if path.is_dir() and source not in (*atlas.SOURCES, *HUB, SELF):
        told = [(part.relative_to(path).as_posix(), _digest(part)) for part in sorted(path.rglob("*")) if part.is_file()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return source


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().strip()
                if text and path.suffix == ".jsonl":
                    text = json.loads(text)["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = 'a JSON object with a text under "text"' if path.suffix == ".jsonl" else "UTF-8"
                raise ValueError(f"{path}, line {number}: expected {wanted} ({type(error).__name__}: {error})") from None
            if text:
                yield text


def _hub_texts(source: str) -> Iterator[str]:
    name, config = HUB.get(source, (source, None))
    advice = f"set mom2_dataset to a text file or {SELF!r}, or P_loc to EasyEdit's null_space_project.pt"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"mom2_dataset is {source!r}: no such file, and reading it from the hub needs `pip install datasets`; or {advice}"
        ) from None
    try:
        rows = load_dataset(name, config, split="train", streaming=True)
    except Exception as error:
        raise ValueError(
            f"mom2_dataset {source!r} is neither a file nor a dataset that can be reached ({error}); {advice}"
        ) from None
    for row in rows:
        text = row.get("text")
        if not isinstance(text, str) and not ("text" in row and text is None):
            raise ValueError(f"mom2_dataset {source!r} has no texts in a column 'text'; its columns: {', '.join(row)}; {advice}")
        yield text or ""


@torch.no_grad()
def own_texts(model, tok, count: int, seed: int, progress: bool = True) -> list[str]:
    """`count` texts sampled from the model itself (temperature 1, SELF_TOKENS tokens or up to an end token), a stand-in for real
    text. The same model, device and seed give the same texts; the caller's random state is left alone."""
    logger.warning(
        "mom2_dataset is %r: keys are taken over %d texts that the model makes up, a stand-in for real text such as 'wikipedia'",
        SELF, count,
    )  # fmt: skip
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    texts: list[str] = []
    with tqdm(total=count, desc="texts of the model's own", unit=" texts", leave=False, disable=not progress) as bar:
        while len(texts) < count:
            ids = _sample(model, tok, min(SELF_ROWS, count - len(texts)), generator)
            texts += tok.batch_decode(ids, skip_special_tokens=True)
            bar.update(len(ids))
    return texts


def _sample(model, tok, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids [rows, <= SELF_TOKENS]: a start token, samples, and end tokens behind the first one."""
    start = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
    if start is None:
        raise ValueError(f"mom2_dataset is {SELF!r}, but the tokenizer has no token to start a text with; give a text file")
    ids = torch.full((rows, 1), start, device=generator.device)
    ended = torch.zeros(rows, 1, dtype=torch.bool, device=generator.device)
    past = None
    while ids.shape[1] < SELF_TOKENS and not ended.all():
        out = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = torch.softmax(out.logits[:, -1].float().to(ids.device), -1)
        chosen = torch.multinomial(chances, 1, generator=generator)
        if tok.eos_token_id is not None:
            chosen = chosen.masked_fill(ended, tok.eos_token_id)
            ended |= chosen == tok.eos_token_id
        ids = torch.cat((ids, chosen), 1)
    return ids
