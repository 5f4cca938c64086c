"""Functional roles of neurons over tasks (the paper's section 3.1): general, of one domain, of one task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

GENERAL, MIXED, SILENT = "general", "mixed", "none"


def activity(scores: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """For which share of the prompts each neuron is active, [N]: its attribution, z-scored over the neurons of a prompt, is above
    the threshold (Eq. 4). scores [P, N]."""
    scores = scores.double()
    standardised = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    return (standardised > threshold).double().mean(0)


def roles(active: torch.Tensor, tasks: Sequence[str], domains: Sequence[str]) -> dict[str, torch.Tensor]:
    """Role -> which neurons have it, [N] bool; each neuron has one. active [T, N] bool: on which tasks; domains [T]: of each task.

    "general": on all tasks; "domain NAME": on all tasks of one domain with several, and no other; "task NAME": on one task alone;
    "mixed": another set of tasks; "none": on no task.
    """
    kinds = dict.fromkeys(domains)
    sets = {f"domain {kind}": torch.tensor([domain == kind for domain in domains]) for kind in kinds if domains.count(kind) > 1}
    if len(kinds) == 1:
        sets = {}  # a domain of all tasks is general
    sets |= {f"task {task}": torch.arange(len(tasks)) == i for i, task in enumerate(tasks)}
    sets = {GENERAL: torch.ones(len(tasks), dtype=torch.bool), **sets, SILENT: torch.zeros(len(tasks), dtype=torch.bool)}
    found = {role: (active == of.to(active.device)[:, None]).all(0) for role, of in sets.items()}
    return {**found, MIXED: ~torch.stack(list(found.values())).any(0)}


def overlap(active: torch.Tensor) -> torch.Tensor:
    """Of the neurons active on either of two tasks the share active on both, [T, T]; 1 where there are none. active [T, N] bool."""
    numbers = active.double()
    both = numbers @ numbers.T
    either = numbers.sum(1)[:, None] + numbers.sum(1)[None] - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def shuffled(active: torch.Tensor, seed: int) -> torch.Tensor:
    """The control: as many active neurons on each task, drawn at random, so that tasks share no more than chance gives."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator).to(row.device)] for row in active])
