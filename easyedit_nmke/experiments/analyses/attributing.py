"""Attribution scores of any texts and blocks; of tasks, kept in the folder of the results for whoever needs them next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ...attribution import choose, neuron_scores
from ...attribution.roles import activity
from ...files import whole
from ...methods.keys import attribution_inputs
from ...models.arch import ModelView, evaluating
from ...models.prompts import tokenised_all
from ...models.updates import model_digest
from .questions import Question


class TaskScores(NamedTuple):
    """Of one block, [tasks, F] each. active: the share of a task's prompts on which a neuron is active; score: its mean
    attribution; size: its mean |c|·||v||. answers: [prompts], the tokens that are scored."""

    active: torch.Tensor
    score: torch.Tensor
    size: torch.Tensor
    answers: torch.Tensor


def task_scores(
    view: ModelView, tok, questions: Sequence[Question], layers: Sequence[int], strategy: str, threshold: float, folder: Path
) -> Iterator[tuple[int, TaskScores]]:
    """Each block's, with a progress bar: how much each neuron moves the model's answer, the first token of the choice that it finds
    likeliest. Kept in `folder` block by block, and read from there when the same is asked again."""
    tasks = list(dict.fromkeys(question.task for question in questions))
    asked = [[question.task, question.prompt, question.choices] for question in questions]
    mark = hashlib.sha256(
        json.dumps([asked, strategy, threshold, TaskScores._fields, model_digest(view.model)]).encode()
    ).hexdigest()
    files = {layer: folder / "attribution" / f"block-{layer}.safetensors" for layer in layers}
    missing = [layer for layer in layers if not holds(files[layer], mark)]
    of = torch.tensor([tasks.index(question.task) for question in questions])
    with tqdm(total=len(missing), desc="attribution", unit="block", disable=not missing) as bar:
        texts, chosen = [question.prompt for question in questions], partial(_chosen, view, tok, questions)
        for layer, found, sizes, answers in _scores(view, tok, texts, missing, strategy, chosen) if missing else ():
            rows = [of.to(found.device) == t for t in range(len(tasks))]
            made = TaskScores(
                torch.stack([activity(found[row], threshold).float() for row in rows]),
                torch.stack([found[row].float().mean(0) for row in rows]),
                torch.stack([sizes[row].float().mean(0) for row in rows]),
                answers,
            )  # fmt: skip
            tensors = {name: tensor.cpu().contiguous() for name, tensor in made._asdict().items()}
            with whole(files[layer]) as temporary:
                save_file(tensors, temporary, metadata={"of": mark})
            bar.update()
    for layer in layers:
        with safe_open(files[layer], "pt") as file:
            yield layer, TaskScores(*(file.get_tensor(name) for name in TaskScores._fields))


def holds(file: Path, mark: str) -> bool:
    """Whether a file of tensors is there, and of what the mark says."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as stored:
        return (stored.metadata() or {}).get("of") == mark


def _chosen(view: ModelView, tok, questions: Sequence[Question], final_hidden: torch.Tensor) -> torch.Tensor:
    """Of each question the first token of the choice whose first token is the likeliest, [P]. final_hidden [P, D]."""
    readout, found = view.readout, []
    for question, state in zip(questions, final_hidden, strict=True):
        rows = tokenised_all(tok, [(question.prompt, None, choice) for choice in question.choices])
        firsts = torch.tensor([row.labels[0] for row in rows])
        logits = readout.logits(state.to(readout.head.device, readout.head.dtype)).cpu()
        found.append(firsts[logits[firsts].argmax()])
    return torch.stack(found)


def _scores(
    view, tok, texts, layers, strategy, targets: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(block, scores, |c|·||v||, both [texts, F], the tokens [texts] that are scored: `targets` of the final states)."""
    with evaluating(view.model):
        seen = attribution_inputs(view, tok, texts, layers)
    readout, words = view.readout, targets(seen.final_hidden)
    for layer in layers:
        coefficients, values = seen.coefficients[layer], view.values(layer)
        device = coefficients.device
        options: Mapping = {
            "strategy": strategy, "final_hidden": seen.final_hidden.to(device),
            "backend": choose("auto", values, readout)[0],
        }  # fmt: skip
        states = coefficients, seen.residual[layer].to(device), values, readout.to(device), words.to(device)
        yield layer, neuron_scores(*states, **options), neuron_scores(*states, strategy="mpc"), words
