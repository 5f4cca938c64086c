"""Multiple-choice tasks: their files, the embedded model's own, how they are asked, and what a model makes of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch

from ...atlas.facts import make_world
from ...models.arch import ModelView, evaluating
from ...models.hooks import record
from ...models.passes import batches
from ...models.products import frozen
from ...models.prompts import pad, tokenised_all
from ...scores import tasks
from ...scores.metrics import TOKEN_BUDGET

CHOICES = 4  # of the embedded model's facts


@dataclass(frozen=True)
class Question:
    """prompt: what is asked; choices: texts that may follow; answer: which of them is right."""

    task: str
    domain: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def ask(
    files: Sequence[Path], only: Sequence[str] = (), domains: Mapping[str, Sequence[str]] | None = None, limit: int | None = None,
    letters: bool = True, seed: int = 0, least: int = 2,
) -> list[Question]:  # fmt: skip
    """The questions of some files, {"question", "choices", "answer"[, "task"]} a line, the first `limit` of each task; without
    files those of the embedded model: its facts, a task for each relation, a domain for each kind of subject.

    A record without "task" is of the task that its file is named after. domains: domain -> its tasks; by default tasks whose last
    word is the same are one (college_biology, high_school_biology). letters: choices are listed under the question and answered by
    their letter, as MMLU is asked; else each choice follows the question. ValueError for files without such records, tasks that are
    not there, and fewer than `least` tasks.
    """
    found = [question for file in files for question in _read(file, letters)] if files else _embedded(seed)
    names = list(dict.fromkeys(question.task for question in found))
    if absent := [name for name in only if name not in names]:
        raise ValueError(f"there is no task {absent[0]!r}; tasks are {', '.join(names)}")
    chosen = [name for name in names if not only or name in only]
    if len(chosen) < least:
        raise ValueError(f"there is {len(chosen)} task ({', '.join(chosen)}), and roles are told apart by at least two; give more")
    of = _domains(chosen, domains) if files or domains else {question.task: question.domain for question in found}
    counts: Counter = Counter()
    kept = []
    for question in found:
        if question.task in chosen and (limit is None or counts[question.task] < limit):
            counts[question.task] += 1
            kept.append(Question(question.task, of[question.task], question.prompt, question.choices, question.answer))
    return sorted(kept, key=lambda question: chosen.index(question.task))


def _read(file: Path, letters: bool) -> list[Question]:
    """As `tasks.read` has them, with the names of their tasks."""
    (task,) = tasks.read([file])
    records, found = file.read_text(encoding="utf-8").split("\n"), []
    for question in task.questions:
        if not question.choices:
            raise ValueError(
                f"{file}, line {question.line}: a question without choices; tasks need one format, multiple choice, in common"
            )
        prompt, choices = question.prompt, question.choices
        if letters:
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
            prompt, choices = f"{question.text.rstrip()}\n{listed}\nAnswer:", tuple(ascii_uppercase[: len(choices)])
        name = json.loads(records[question.line - 1]).get("task") or file.stem
        found.append(Question(name, "", prompt, choices, question.answer))
    return found


def _embedded(seed: int) -> list[Question]:
    rng, (facts, _) = random.Random(seed), make_world("small")
    found = []
    for fact in facts:
        others = rng.sample([thing for thing in fact.relation.objects if thing != fact.object], CHOICES - 1)
        choices = rng.sample([fact.object, *others], CHOICES)
        wording = next(i for i in range(len(fact.relation.templates)) if i != fact.held_out)
        name, kind = fact.relation.name, fact.relation.kind
        found.append(Question(name, kind, fact.prompt(wording), tuple(choices), choices.index(fact.object)))
    rng.shuffle(found)
    return found


def _domains(names: Sequence[str], given: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    """Task -> its domain; itself where it shares none."""
    if given is not None:
        of = {task: domain for domain, members in given.items() for task in members}
        if absent := [task for task in of if task not in names]:
            raise ValueError(f"--domains names {absent[0]!r}, which is no task here; tasks are {', '.join(names)}")
        return {task: of.get(task, task) for task in names}
    last = Counter(task.rsplit("_", 1)[-1] for task in names)
    return {task: word if last[word := task.rsplit("_", 1)[-1]] > 1 else task for task in names}


def domains_of(text: str) -> dict[str, list[str]]:
    """From "biology=college_biology,high_school_biology;chemistry=..."."""
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    if not pairs or any(not equals or not members.strip() for _, equals, members in pairs):
        raise ValueError(f"--domains is {text!r}, expected domain=task,task;domain=task,...")
    return {name.strip(): [member.strip() for member in members.split(",")] for name, _, members in pairs}


def judged(view: ModelView, tok, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Task -> "log_prob": mean log-probability of the right choice among all choices, in nats; "accuracy"."""
    log_probs = iter(log_likelihoods(view, tok, [(q.prompt, choice) for q in questions for choice in q.choices]))
    found: dict[str, list[tuple[float, float]]] = {}
    for question in questions:
        said = torch.tensor([next(log_probs) for _ in question.choices], dtype=torch.float64)
        right = torch.log_softmax(said, 0)[question.answer].item()
        found.setdefault(question.task, []).append((right, float(int(said.argmax()) == question.answer)))
    return {
        task: {name: sum(pair[i] for pair in pairs) / len(pairs) for i, name in enumerate(("log_prob", "accuracy"))}
        for task, pairs in found.items()
    }


@torch.no_grad()
def log_likelihoods(view: ModelView, tok, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """log p(choice | prompt) of each pair, summed over the choice's tokens. What choices have in common is read once: a question
    that is answered by a letter costs one row, whatever the number of its choices."""
    rows = tokenised_all(tok, [(prompt, None, choice) for prompt, choice in pairs])
    contexts = list(dict.fromkeys(tuple(row.ids[:-1]) for row in rows))
    wanted: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        wanted.setdefault(tuple(row.ids[:-1]), []).append(i)
    found, readout = [0.0] * len(rows), view.readout
    with evaluating(view.model), frozen(view.model):
        for batch in batches(view.model, list(map(len, contexts)), TOKEN_BUDGET):
            tokens = pad([contexts[i] for i in batch], view.device)
            with record({"final": (view.norm, "input")}) as seen:
                view.model.base_model(**tokens.inputs(), use_cache=False)
            for states, context in zip(seen["final"], (contexts[i] for i in batch), strict=True):
                first = min(rows[i].target for i in wanted[context]) - 1
                logits = readout.logits(states[first : len(context)].to(readout.head.device, readout.head.dtype))
                said = torch.log_softmax(logits.float(), -1)
                for i in wanted[context]:
                    labels = torch.tensor(rows[i].labels, device=said.device)
                    places = torch.arange(len(labels), device=said.device) + rows[i].target - 1 - first
                    found[i] = said[places, labels].sum().item()
    return found
