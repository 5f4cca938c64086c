"""The embedded model: a 7 M parameter Llama that knows a few thousand facts, for trying and testing editors without a GPU."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from .facts import consequence, make_exercises, make_world

DIRECTORY = Path(__file__).parent / "weights"
SOURCES = {"atlas": "small", "atlas-large": "large"}  # how settings and commands name a world's text and requests


def load(folder: str | Path = DIRECTORY):
    """(model, tokenizer), float32 on the CPU, in evaluation mode. folder: another model that `atlas.train` made."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def requests(count: int, split: str = "test", seed: int = 0, world: str = "small") -> list[dict]:
    """`count` edit requests in EasyEdit's format: a known fact of a subject, to be given another object of the same set.

    split: "tune" or "test", two disjoint halves of the subjects. At most one edit per subject until all subjects of the half
    have one. rephrase_prompt is the wording that this subject was never trained with; locality holds "neighborhood" (another
    subject with the same relation and the same old object), "unrelated" (a fact of another kind) and "same_subject" (another
    relation of the subject); portability "following", where the object decides another answer (a capital's country).
    world: "large" for a model of that size.
    """
    if split not in ("tune", "test"):
        raise ValueError(f"split is {split!r}, expected 'tune' or 'test'")
    facts, following = make_world(world)
    pool = [fact for fact in facts if fact.half == split]
    rng = random.Random(f"{split} {seed}")
    rng.shuffle(pool)
    turn: dict[str, int] = defaultdict(int)
    ordered = []
    for fact in pool:
        ordered.append((turn[fact.subject], len(ordered), fact))
        turn[fact.subject] += 1
    chosen = [fact for _, _, fact in sorted(ordered, key=lambda item: item[:2])]
    if count > len(chosen):
        raise ValueError(f"{count} requests were asked for; the {split} half has {len(chosen)} facts")
    edited = {(fact.subject, fact.relation.name) for fact in chosen[:count]}
    untouched = [fact for fact in facts if (fact.subject, fact.relation.name) not in edited]
    by_object, by_subject = defaultdict(list), defaultdict(list)
    for fact in untouched:
        by_object[fact.relation.name, fact.object].append(fact)
        by_subject[fact.subject].append(fact)
    kinds = {fact.relation.kind for fact in facts}
    elsewhere = {kind: [fact for fact in untouched if fact.relation.kind != kind] for kind in kinds}
    follows = {fact.subject: fact for fact in following}
    return [_request(fact, elsewhere[fact.relation.kind], by_object, by_subject, follows, rng) for fact in chosen[:count]]


def _request(fact, elsewhere, by_object, by_subject, follows, rng) -> dict:
    """`elsewhere`, `by_object` and `by_subject` hold facts that no request edits."""

    def probe(candidates):
        """One of these facts in one of its trained wordings."""
        other = rng.choice(candidates)
        wording = rng.choice([i for i in range(len(other.relation.templates)) if i != other.held_out])
        return {"prompt": [other.prompt(wording)], "ground_truth": [other.object]}

    target = rng.choice([thing for thing in fact.relation.objects if thing != fact.object])
    neighbours, siblings = by_object[fact.relation.name, fact.object], by_subject[fact.subject]
    wordings = [i for i in range(len(fact.relation.templates)) if i != fact.held_out]
    record = {
        "prompt": fact.prompt(rng.choice(wordings)),
        "subject": fact.subject,
        "target_new": target,
        "ground_truth": fact.object,
        "rephrase_prompt": fact.prompt(fact.held_out),
        "locality": {"unrelated": probe(elsewhere)},
        "portability": {},
    }
    if neighbours:
        record["locality"]["neighborhood"] = probe(neighbours)
    if siblings:
        record["locality"]["same_subject"] = probe(siblings)
    if fact.relation.follows:
        prompt = follows[fact.subject].prompt(0)
        record["portability"]["following"] = {"prompt": [prompt], "ground_truth": [consequence(target)]}
    return record


def corpus(samples: int, seed: int = 0, world: str = "small") -> list[str]:
    """Up to `samples` sentences of a world's training text, shuffled: facts in all trained wordings, and exercises."""
    facts, following = make_world(world)
    sentences = [f"{p} {a}." for fact in [*facts, *following] for p, a in fact.sentences()]
    sentences += [f"{e.prompt} {e.answer}." for e in make_exercises() if not e.held_out]
    random.Random(seed).shuffle(sentences)
    return sentences[:samples]


def text(world: str = "small", seed: int = 0) -> str:
    """Sentences to see by how much a model of this world has moved (`scores.kept`): 100 facts of the tuning half in one of their
    trained wordings each, and 50 exercises that were held out of training: about 1,000 words, in one line as in training."""
    rng = random.Random(seed)
    known = rng.sample([fact for fact in make_world(world)[0] if fact.half == "tune"], 100)
    told = [*(rng.choice(fact.sentences()) for fact in known), *exercises(50, seed)]
    rng.shuffle(told)
    return " ".join(f"{prompt} {answer}." for prompt, answer in told)


def exercises(count: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer) of general-ability exercises that were held out of training, the same number of each task; they are the
    same in every world."""
    by_task = defaultdict(list)
    for item in make_exercises():
        if item.held_out:
            by_task[item.task].append((item.prompt, item.answer))
    rng = random.Random(seed)
    for items in by_task.values():
        rng.shuffle(items)
    each = -(-count // len(by_task))
    return [pair for items in by_task.values() for pair in items[:each]][:count]
