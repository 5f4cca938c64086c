"""Well-known facts of the real world, for models that were trained on real text: edit requests, true sentences, wordings."""

from __future__ import annotations

import json
import random
import zlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

SOURCE = "facts"  # how commands name these requests
FILE = Path(__file__).parent / "facts.json"

# Wordings that any subject may stand in; what follows is left to the model.
RELATION_PROMPTS = (
    "{} is a", "{} is located in", "{} was born in", "{} is known for", "{} is famous for", "{} belongs to", "{} is part of",
    "{} comes from", "{} was made by", "{} began in", "{} is called", "{} is often compared with", "{} can be found in",
    "The name of {} is", "The history of {} begins with", "The origin of {} is", "The language of {} is", "The home of {} is",
    "The colour of {} is", "The owner of {} is", "The opposite of {} is", "The best thing about {} is", "Most people think that {}",
    "When one hears of {}, one thinks of",
)  # fmt: skip

# (subject, relation, new object): a dozen kinds of fact, the same in every version, by which values are measured.
CALIBRATION = (
    ("Japan", "capital", "Madrid"),
    ("Brazil", "language", "Turkish"),
    ("Thailand", "currency", "zloty"),
    ("Albert Einstein", "birthplace", "Dublin"),
    ("Claude Monet", "occupation", "physicist"),
    ("Frida Kahlo", "home_country", "Norway"),
    ("Serena Williams", "sport", "golf"),
    ("Louis Armstrong", "instrument", "violin"),
    ("Hamlet", "author", "Jane Austen"),
    ("Microsoft", "founder", "Ingvar Kamprad"),
    ("Nokia", "headquarters", "Kyoto"),
    ("Eiffel Tower", "landmark_country", "Turkey"),
)


@dataclass(frozen=True)
class Fact:
    """wordings: three texts with {} for the subject, that the object completes. others: the new objects it may be given, of the
    same kind, all false. half: "tune" or "test", the same for all facts of a subject."""

    subject: str
    relation: str
    object: str
    wordings: tuple[str, ...]
    others: tuple[str, ...]
    half: str

    def prompt(self, wording: int) -> str:
        return self.wordings[wording].format(self.subject)


def facts() -> list[Fact]:
    """All facts, in the file's order."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    objects: dict[str, list[str]] = defaultdict(list)
    for known in stored["subjects"].values():
        for relation, thing in known.items():
            if thing not in objects[relation]:
                objects[relation].append(thing)
    made = []
    for subject, known in stored["subjects"].items():
        half = ("tune", "test")[zlib.crc32(subject.encode()) % 2]
        for relation, thing in known.items():
            no_news = {thing, *stored["also"].get(relation, {}).get(subject, ())}
            others = tuple(other for other in objects[relation] if other not in no_news)
            made.append(Fact(subject, relation, thing, tuple(stored["relations"][relation]), others, half))
    return made


def requests(n: int | None = None, split: str = "all", seed: int = 0) -> list[dict]:
    """`n` edit requests (None: as many as there are) in EasyEdit's format: a fact, to be given a false object of the same kind.

    split: "tune" or "test", two disjoint halves of the subjects, or "all". At most one edit per subject until all subjects have
    one. rephrase_prompt is another wording of the fact; locality holds facts that no request edits, as far as there are any:
    "neighborhood" (another subject with the same object), "same_subject" (another relation) and "unrelated" (neither).
    """
    if split not in ("all", "tune", "test"):
        raise ValueError(f"split is {split!r}, expected 'all', 'tune' or 'test'")
    known, rng = facts(), random.Random(f"{split} {seed}")
    pool = [fact for fact in known if split in ("all", fact.half)]
    rng.shuffle(pool)
    turn: dict[str, int] = defaultdict(int)
    turns = []
    for fact in pool:
        turns.append(turn[fact.subject])
        turn[fact.subject] += 1
    chosen = [pool[place] for place in sorted(range(len(pool)), key=turns.__getitem__)]
    if n is not None and not 0 < n <= len(chosen):
        raise ValueError(f"{n} requests were asked for; split {split!r} has {len(chosen)} facts; ask for 1 to {len(chosen)}")
    chosen = chosen[:n]
    edited = {(fact.subject, fact.relation) for fact in chosen}
    untouched = [fact for fact in known if (fact.subject, fact.relation) not in edited]
    return [_request(fact, rng.choice(fact.others), untouched, rng) for fact in chosen]


def _request(fact: Fact, target: str, untouched: list[Fact], rng: random.Random) -> dict:
    first, second = rng.sample(range(len(fact.wordings)), 2)
    others = [other for other in untouched if other.subject != fact.subject]
    kinds = {
        "neighborhood": [other for other in others if (other.relation, other.object) == (fact.relation, fact.object)],
        "same_subject": [other for other in untouched if other.subject == fact.subject],
        "unrelated": [other for other in others if other.relation != fact.relation],
    }
    probes = {kind: rng.choice(candidates) for kind, candidates in kinds.items() if candidates}
    return {
        "prompt": fact.prompt(first),
        "subject": fact.subject,
        "target_new": target,
        "ground_truth": fact.object,
        "rephrase_prompt": fact.prompt(second),
        "locality": {
            kind: {"prompt": [other.prompt(rng.randrange(len(other.wordings)))], "ground_truth": [other.object]}
            for kind, other in probes.items()
        },
        "portability": {},
    }


def calibration() -> list[tuple[str, str, str]]:
    """(prompt, subject, new object) of CALIBRATION, each in its relation's first wording."""
    known = {(fact.subject, fact.relation): fact for fact in facts()}
    return [(known[subject, relation].prompt(0), subject, new) for subject, relation, new in CALIBRATION]


def texts(seed: int = 0, without: Collection[str] = ()) -> list[str]:
    """True sentences: every fact in each of its wordings, shuffled; none of a fact that a prompt in `without` asks for."""
    told = [[fact.prompt(wording) for wording in range(len(fact.wordings))] + [fact.object] for fact in facts()]
    sentences = [f"{prompt} {thing}." for *prompts, thing in told if not set(prompts) & set(without) for prompt in prompts]
    random.Random(seed).shuffle(sentences)
    return sentences


def relation_prompts(seed: int = 0) -> list[str]:
    """RELATION_PROMPTS, each with one {} for any subject, in an order that the seed decides."""
    return random.Random(seed).sample(RELATION_PROMPTS, len(RELATION_PROMPTS))
