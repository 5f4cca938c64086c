"""A judge: a second model, on this machine or at an OpenAI-compatible address, that tells whether what was said gives an answer.

It is asked one fixed question, answers yes or no, and is never replaced by anything: what it cannot answer is an error. Its
answers are kept in a file, so that none is asked for twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as Post
from urllib.request import urlopen

from ..hparams import HyperParams
from ..models.arch import context_length
from ..models.chat import as_chat
from ..models.loading import load_model
from ..models.passes import chunks
from ..models.prompts import tokenised_all
from ..models.updates import model_digest
from .endings import read_endings
from .generation import log_probs

logger = logging.getLogger(__name__)

PROMPT = """A language model was given the beginning of a sentence, or a question, and went on from there. \
Does it give the expected answer?

It was given: {prompt}
The expected answer: {truths}
It went on: {said}

Other words for the same thing count, and so does an answer that more text follows. \
An answer that is denied or taken back does not count, and neither does a different one.
The verdict in one word, Yes or No:"""
# Of which a judge that is up gives some answer; whether it is right is told in the log.
PROBES = ((("The capital of Italy is", ("Rome",), " Rome."), True), (("The capital of Italy is", ("Rome",), " a fish."), False))
AT_ONCE = 8  # questions on their way to an address
TIMEOUT = 120  # seconds for one of them
WAITS = (1, 5, 20)  # seconds before a busy address is asked again
ANSWER_TOKENS = 512  # for models that think aloud first
GO_ON = "see that it is up, and the same command goes on"
_VERDICT = re.compile(r"[\W_]*(yes|no)\b", re.IGNORECASE)

Item = tuple[str, Sequence[str], str]  # (prompt, the answers of which any counts, what was said)
Ask = Callable[[Sequence[str]], Iterator[bool]]


def question(prompt: str, truths: Sequence[str], said: str) -> str:
    """What the judge is asked."""
    return PROMPT.format(prompt=prompt, truths=" or ".join(truths), said=said.strip())


@dataclass(frozen=True)
class Named:
    """A judge by name, at an address or, without one, on this machine; and the file that keeps its answers."""

    name: str
    address: str | None
    file: Path

    def __str__(self) -> str:
        return f"the judge {self.name!r}" + (f" at {self.address}" if self.address else "")

    def open(self, device="cpu", dtype: str = "float32") -> Judge:
        """Ready to be asked: a model of this machine is loaded. ValueError, of one sentence, for one that cannot be, or that does
        not answer a plain question."""
        ask, weights = (_Address(self), {}) if self.address else self._loaded(device, dtype)
        right = list(ask([question(*item) for item, _ in PROBES])) == [expected for _, expected in PROBES]
        if not right:
            logger.warning("%s gets plain questions wrong (is Rome, is a fish the capital of Italy?); its scores say little", self)
        return Judge(ask, {"judge": self.name, **weights}, self.file)

    def _loaded(self, device, dtype: str) -> tuple[Ask, dict]:
        try:
            model, tok = load_model(HyperParams(layers=[0], model_name=self.name, device=device, dtype=dtype))
        except ValueError as error:
            raise ValueError(f"judge: {error}; for a model at an address set OPENAI_BASE_URL") from None
        return _Local(self, model.eval(), tok), {"judge weights": model_digest(model)}


def named(name: str, folder: Path) -> Named:
    """The judge of this name: at the address in OPENAI_BASE_URL if that is set, else on this machine (a folder, a GGUF file, a hub
    name, one that comes with a package). Its answers are kept in the folder."""
    return Named(name, os.environ.get("OPENAI_BASE_URL", "").rstrip("/") or None, Path(folder) / "judge.jsonl")


class Judge:
    """Tells of each (prompt, truths, what was said) whether that gives one of the truths; nothing said never does.

    mark: what its answers depend on, for stamps. Those that the file has are not asked for again; others are written to it at once.
    Several processes may add to one file. ValueError when the judge fails: what it has answered until then is kept.
    """

    def __init__(self, ask: Ask, mark: Mapping[str, str], file: Path):
        self.ask, self.file, self.key = ask, file, dict(mark)
        self.mark = {**mark, "judge prompt": hashlib.sha256(PROMPT.encode()).hexdigest()[:16]}
        self.known = self._read()

    def __call__(self, items: Sequence[Item]) -> list[bool]:
        asked = [question(*item) if item[2].strip() else None for item in items]
        new = [text for text in dict.fromkeys(asked) if text is not None and text not in self.known]
        for text, verdict in zip(new, self.ask(new), strict=True):
            self._keep(text, verdict)
        return [text is not None and self.known[text] for text in asked]

    def _read(self) -> dict[str, bool]:
        """Its answers in the file. A line that is not whole is left out; one that a process was killed in is ended."""
        text, known = self.file.read_text(encoding="utf-8") if self.file.is_file() else "", {}
        if text and not text.endswith("\n"):
            self._write("")
        for number, written in enumerate(text.split("\n"), 1):
            try:
                line = json.loads(written)
                if line["by"] == self.key:
                    known[line["question"]] = bool(line["yes"])
            except (ValueError, TypeError, KeyError):
                if written:
                    logger.warning("%s: line %d is not whole and is left out", self.file, number)
        return known

    def _keep(self, text: str, verdict: bool) -> None:
        self.known[text] = verdict
        self._write(json.dumps({"by": self.key, "question": text, "yes": verdict}))

    def _write(self, line: str) -> None:
        """At the end, in one write."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class _Local:
    """Asks a loaded model, which of " Yes" and " No" is likelier; in its chat format if it has one."""

    def __init__(self, name: Named, model, tok):
        self.name, self.model, self.tok = name, model, tok

    def __call__(self, questions: Sequence[str]) -> Iterator[bool]:
        for some in chunks(questions, 64):
            for yes, no in (map(sum, words) for words in read_endings(self.model, list(map(self._rows, some)), log_probs)):
                if not (math.isfinite(yes) and math.isfinite(no)):
                    raise ValueError(f"{self.name} gives Yes and No the log-probabilities {yes} and {no}; choose another judge")
                yield yes > no

    def _rows(self, text: str):
        prompt = as_chat(self.tok, text) if self.tok.chat_template else text
        rows = tokenised_all(self.tok, [(prompt, None, word) for word in ("Yes", "No")])
        longest, context = max(len(row.ids) for row in rows), context_length(self.model)
        if context is not None and longest > context:
            raise ValueError(f"{self.name} reads {context} tokens, and a question has {longest}; choose one that reads more")
        return rows


class _Address:
    """Asks an address that speaks the OpenAI protocol of chat completions."""

    def __init__(self, name: Named):
        self.name = name

    def __call__(self, questions: Sequence[str]) -> Iterator[bool]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(self._verdict, questions)

    def _verdict(self, text: str) -> bool:
        body = {"model": self.name.name, "messages": [{"role": "user", "content": text}]}
        answer = self._answer({**body, "temperature": 0, "max_tokens": ANSWER_TOKENS})
        found = _VERDICT.match(answer.rpartition("</think>")[2])
        if found is None:
            raise ValueError(f"{self.name} answered {answer[:80]!r}, expected Yes or No; choose another judge")
        return found[1].lower() == "yes"

    def _answer(self, body: dict) -> str:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps(body).encode()
        try:
            told = _sent(Post(f"{self.name.address}/chat/completions", data, headers))
        except HTTPError as error:
            reason = " ".join(error.read(200).decode(errors="replace").split())
            raise ValueError(f"{self.name} refused a question (status {error.code}: {reason or error.reason}); {GO_ON}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise ValueError(f"{self.name} does not answer ({getattr(error, 'reason', error)}); {GO_ON}") from None
        try:
            content = json.loads(told)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ValueError(f"{self.name} answered {told[:80]!r}, expected a chat completion; {GO_ON}")
        return content


def _sent(post: Post) -> str:
    """What comes back; asked again where the address is busy."""
    for wait in (*WAITS, None):
        try:
            with urlopen(post, timeout=TIMEOUT) as reply:
                return reply.read().decode("utf-8")
        except HTTPError as error:
            if error.code != 429 or wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("the last wait is None")
