"""General ability by questions from files: choices by log-likelihood, as the LM Evaluation Harness counts, and free answers.

Every question is asked as "Question: ...\\nAnswer:", the harness' words for ARC, PIQA and GSM8K, with no examples before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase

import numpy as np

from ..models.arch import context_length
from ..models.prompts import Tokenised, encode
from .answers import answer, says
from .generation import greedy_texts, log_probs
from .metrics import read_rows

FREE_TOKENS = 256  # of a free answer at most, the harness' own number
LISTED = 5  # broken records in one message
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Question:
    """choices: () for a free answer. answer: the right choice's index, or the free answer's text. line: in the file, from 1."""

    text: str
    choices: tuple[str, ...]
    answer: int | str
    line: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.text}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """A file of questions. name: the file's, without its ending; sha256: of the whole file, whatever the limit."""

    name: str
    file: Path
    questions: tuple[Question, ...]
    sha256: str

    @property
    def mark(self) -> dict:
        """What a result depends on, for its stamp."""
        return {"sha256": self.sha256, "questions": len(self.questions)}


def read(files: Sequence[str | Path], limit: int | None = None) -> tuple[Task, ...]:
    """The questions of JSON-lines files: {"question", "choices", "answer"}, where the answer is the right choice's index from 0,
    its text, or its letter; without "choices" it is a text or a number that a free answer should come to. limit: the first so many
    of each file.

    ValueError in one message for a file that is not there or has no record, two of one name, and broken records, with their lines.
    """
    tasks = tuple(_read(Path(file), limit) for file in files)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two files of questions are called {' and '.join(sorted(twice))}; their scores would have one name")
    return tasks


class Questions:
    """The questions of several tasks, and what the unedited model answers.

    ValueError for a question that the model cannot be asked: with its answer, it is longer than the model's context.
    """

    def __init__(self, model, tok, tasks: Sequence[Task]):
        self.tasks = tuple(tasks)
        for task in self.tasks:
            _check(model, tok, task)
        self._before = {task.name: given(model, tok, task) for task in self.tasks}
        self.before = {name: value for task in self.tasks for name, value in self._scores(task, self._before[task.name])}

    def score(self, model, tok) -> dict[str, float]:
        """For each task "tasks.<name>", the share of right answers; for choices "tasks.<name>.norm", the share when each choice's
        log-likelihood is divided by its number of characters (lm-eval's acc_norm); and "tasks.<name>.same", the share of answers
        (choices; numbers; texts) that are the unedited model's."""
        return {name: value for task in self.tasks for name, value in self._scores(task, given(model, tok, task))}

    def _scores(self, task: Task, answers: Sequence[Given]) -> Iterator[tuple[str, float]]:
        yield f"tasks.{task.name}", fmean(one.right for one in answers)
        by_length = [one.right_norm for one in answers if one.right_norm is not None]
        if by_length:
            yield f"tasks.{task.name}.norm", fmean(by_length)
        before = self._before[task.name]
        yield f"tasks.{task.name}.same", fmean(one.said == other.said for one, other in zip(answers, before, strict=True))


@dataclass(frozen=True)
class Given:
    """What a model answers to a question: the likeliest choice's index, or the number or text of its free answer; whether that is
    right; whether the choice that is likeliest by character is (None for free answers)."""

    said: int | float | str
    right: bool
    right_norm: bool | None = None


def given(model, tok, task: Task) -> list[Given]:
    """The model's answers, in the questions' order; it is left as it was found."""
    chosen = [question for question in task.questions if question.choices]
    free = [question for question in task.questions if not question.choices]
    found = {q.line: _choice(q, values) for q, values in zip(chosen, likelihoods(model, tok, chosen), strict=True)}
    found |= {q.line: _free(q, text) for q, text in zip(free, _texts(model, tok, free), strict=True)}
    return [found[question.line] for question in task.questions]


def likelihoods(model, tok, questions: Sequence[Question]) -> list[list[float]]:
    """log p(" choice" | prompt) of each choice, in nats, summed over its tokens. Questions of like length share forward passes, and
    choices that are the same tokens are read once."""
    rows = [row for question in questions for row in _rows(tok, question)]
    keys = [tuple(row.ids) for row in rows]
    unique = {key: row for key, row in zip(keys, rows, strict=True)}
    sums = dict(zip(unique, map(sum, read_rows(model, list(unique.values()), log_probs)), strict=True))
    values = iter(sums[key] for key in keys)
    return [[next(values) for _ in question.choices] for question in questions]


def _rows(tok, question: Question) -> list[Tokenised]:
    """Prompt and choice as one text, whose tokens beyond the prompt's own count are the choice's: lm-eval's rule, also where a
    token spans both."""
    start = len(encode(tok, question.prompt))
    return [Tokenised(encode(tok, f"{question.prompt} {choice}"), target=start) for choice in question.choices]


def _choice(question: Question, values: Sequence[float]) -> Given:
    likeliest = int(np.argmax(values))
    by_length = int(np.argmax(np.array(values) / [len(choice) for choice in question.choices]))
    return Given(likeliest, likeliest == question.answer, by_length == question.answer)


def _texts(model, tok, questions: Sequence[Question]) -> list[str]:
    """Greedy answers of at most FREE_TOKENS tokens, up to an end token or another "Question:", which is where base models go on."""
    context = context_length(model) or 10**9
    rooms = [min(FREE_TOKENS, context - len(encode(tok, question.prompt))) for question in questions]
    said = greedy_texts(model, tok, [question.prompt for question in questions], rooms)
    return [text.split("Question:")[0] for text in said]


def _free(question: Question, text: str) -> Given:
    """A number is right when it is the last one of the text, as the harness' flexible extraction has it; another answer when the
    text contains it as whole words."""
    wanted = _number(question.answer)
    if wanted is None:
        return Given(answer(text, question.answer), says(text, question.answer).contains)
    said = [_number(number) for number in _NUMBER.findall(text)]
    return Given(said[-1] if said else "", bool(said) and said[-1] == wanted)


def _number(text: str) -> float | None:
    """72, 1,234.50, $-3; None for what is no number alone."""
    plain = text.strip()
    return float(re.sub(r"[$,]", "", plain)) if _NUMBER.fullmatch(plain) else None


# ---- files


def _read(file: Path, limit: int | None) -> Task:
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give JSON lines with a question, choices and an answer in each")
    content = file.read_bytes()
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()][:limit]
    questions, broken = [], []
    for number, line in lines:
        try:
            questions.append(_question(line, number))
        except ValueError as error:
            broken.append(f"line {number}: {error}")
    if broken or not lines:
        more = f"; and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
        raise ValueError(f"{file} cannot be used: {'; '.join(broken[:LISTED]) or 'it has no record'}{more}")
    return Task(file.stem, file, tuple(questions), hashlib.sha256(content).hexdigest())


def _question(line: bytes, number: int) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    text, choices, right = (record.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'expected a text under "question", got {text!r}')
    if choices is None:
        return Question(text, (), _free_answer(right), number)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f'expected two or more texts under "choices", got {choices!r}')
    return Question(text, tuple(choices), _index(right, choices), number)


def _free_answer(right) -> str:
    found = str(right) if isinstance(right, (int, float)) and not isinstance(right, bool) else right
    if not isinstance(found, str) or not any(map(str.isalnum, found)):
        raise ValueError(f'expected a text or a number under "answer" where there are no choices, got {right!r}')
    return found


def _index(right, choices: Sequence[str]) -> int:
    """Of the right choice: its index from 0, text, or letter, in this order."""
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices):
        return right
    if isinstance(right, str) and right in choices:
        return choices.index(right)
    letters = ascii_uppercase[: len(choices)]
    if isinstance(right, str) and len(right.strip()) == 1 and right.strip().upper() in letters:
        return letters.index(right.strip().upper())
    raise ValueError(f'expected an index from 0 to {len(choices) - 1}, a choice or a letter under "answer", got {right!r}')


def _check(model, tok, task: Task) -> None:
    context = context_length(model)
    for question in task.questions:
        rows = _rows(tok, question) if question.choices else [Tokenised([*encode(tok, question.prompt), 0], target=1)]
        longest = max(len(row.ids) for row in rows)
        if context is not None and longest > context:
            problem = f"question and answer have {longest} tokens, the model's context is {context}"
        elif not all(0 < row.target < len(row.ids) for row in rows):
            problem = "the question or a choice has no token of its own"
        else:
            continue
        raise ValueError(f"{task.file}, line {question.line}: {problem}")
