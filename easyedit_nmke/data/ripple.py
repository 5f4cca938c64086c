"""Records that say what should follow from their edits, or stay: RippleEdits, MQuAKE, KnowEdit's and WikiBigEdit's portability.

Each gives parts of EasyEdit's request dictionary, with tests under "ripple" in RippleEdits' own form (`Request.from_dict`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile

from ..models.requests import MULTI_HOP, called, is_hole, texts
from ..models.subjects import find_subject

# RippleEdits' six criteria, by the names of its files and, where there are others, those of its paper and its documentation; which
# of EasyEdit's sections they belong to.
CRITERIA = {
    "Logical_Generalization": ("portability", ()),
    "Compositionality_I": ("portability", ()),
    "Compositionality_II": ("portability", ()),
    "Subject_Aliasing": ("portability", ()),
    "Relation_Specificity": ("locality", ("Relation_Specifity",)),
    "Forgetfulness": ("locality", ("Preservation",)),
}
# Words that stand around a subject in RippleEdits' prompts, never at the edge of its name.
_AROUND = (
    *("a", "and", "are", "associated", "award", "by", "capital", "followed", "follows", "for", "in", "is", "member", "name"),
    *("names", "of", "part", "plays", "the", "to", "was", "which", "with", "won"),
)


# ---- RippleEdits


def ripple_edits(record: Mapping) -> dict:
    """EasyEdit's request dictionary of {"edit": {prompt, subject_id, relation, target_id, original_fact}, <criterion>: [test]}.

    The edit is a sentence that ends in the new answer, and its subject an identifier. The answer's name is that which a query of
    the record gives for `target_id`; else what follows the last "is" or "are" that the sentence shares with the original one. The
    subject's is `edit.subject` if there is one; else that which a query gives for `subject_id`; else the words that the edit shares
    with all queries on other relations of the subject. Where nothing tells it, the request has no subject.
    """
    edit = _object(record.get("edit"))
    if not isinstance(edit.get("prompt"), str):
        return {"prompt": edit.get("prompt")}
    tests = {kind: _first(record, (kind, *others)) for kind, (_, others) in CRITERIA.items()}
    queries = {kind: [query for test in _objects(some) for query in _queries(test)] for kind, some in tests.items()}
    every = [query for some in queries.values() for query in some]
    old, names = _sentence(_object(edit.get("original_fact"))), _names(every, edit.get("target_id"))
    prompt, target = _split(_sentence(edit), old, names)
    about = [query for kind, some in queries.items() if kind != "Subject_Aliasing" for query in some]
    return {
        "prompt": prompt,
        "subject": edit.get("subject") or _subject(prompt, edit, about),
        "target_new": target,
        "aliases": [name for name in names if name != target],
        "ground_truth": old.removeprefix(prompt).strip() if old.startswith(prompt) else None,
        **{
            section: {kind: _probes(tests[kind]) for kind, (its, _) in CRITERIA.items() if its == section}
            for section in ("locality", "portability")
        },
        "ripple": tests,
    }


def _first(record: Mapping, names: tuple[str, ...]):
    return next((record[name] for name in names if not is_hole(record.get(name))), None)


def _object(value) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _objects(value) -> Iterator[Mapping]:
    return (one for one in value if isinstance(one, Mapping)) if isinstance(value, list) else iter(())


def _queries(test: Mapping) -> Iterator[Mapping]:
    for part in ("test_queries", "condition_queries"):
        yield from _objects(test.get(part))


def _sentence(fact: Mapping) -> str:
    """A fact in words, without its full stop; "" where there is none."""
    said = fact.get("prompt")
    return said.strip().removesuffix(".").strip() if isinstance(said, str) else ""


def _names(queries: list[Mapping], wanted) -> list[str]:
    """What the queries' answers call an entity: its name and aliases."""
    found = []
    for query in queries:
        targets = query.get("second_hop_target_ids" if query.get("query_type") == "two_hop" else "target_ids")
        targets = targets if isinstance(targets, list) else [targets]
        answers = query.get("answers") if isinstance(query.get("answers"), list) else []
        for target, answer in zip(targets, answers, strict=False):
            if isinstance(wanted, str) and target == wanted:
                with suppress(ValueError):
                    found += texts([_object(answer).get("value"), _object(answer).get("aliases")])
    return list(dict.fromkeys(found))


def _split(sentence: str, old: str, names: list[str]) -> tuple[str, str]:
    """(prompt, new answer) of a sentence."""
    for name in sorted(names, key=len, reverse=True):
        if sentence.endswith(f" {name}"):
            return sentence.removesuffix(name).strip(), name
    words, others = sentence.split(), old.split()
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False))))
    verbs = [i for i, word in enumerate(words[:shared] if old else words) if word in ("is", "are")]
    cut = verbs[-1] + 1 if verbs else shared
    if words and not cut:
        raise ValueError(f"field 'edit.prompt': nothing tells where in {sentence!r} the new answer begins")
    return " ".join(words[:cut]), " ".join(words[cut:])


def _subject(prompt: str, edit: Mapping, queries: list[Mapping]) -> str | None:
    for name in sorted(_names(queries, edit.get("subject_id")), key=len, reverse=True):
        with suppress(ValueError):
            find_subject(prompt, name)
            return name
    its = [query for query in queries if query.get("subject_id") == edit.get("subject_id")]
    others = [query.get("prompt") for query in its if query.get("relation") != edit.get("relation")]
    others = [text for text in others if isinstance(text, str)]
    words = prompt.split()
    runs = (words[start:end] for end in range(len(words), 0, -1) for start in range(end))
    for run in runs if others else ():
        name = re.compile(rf"(?<!\w){re.escape(' '.join(run))}(?!\w)")
        if run[0].lower() not in _AROUND and run[-1].lower() not in _AROUND and all(map(name.search, others)):
            return " ".join(run)
    return None


def _probes(tests) -> list[dict]:
    """Each query of the tests with the first of its answers, as KnowEdit has them."""
    queries = [query for test in _objects(tests) for query in _objects(test.get("test_queries"))]
    answered = ((query.get("prompt"), next(_objects(query.get("answers")), {}).get("value")) for query in queries)
    return [{"prompt": prompt, "ground_truth": answer} for prompt, answer in answered]


# ---- MQuAKE


def mquake(record: Mapping) -> list[dict]:
    """A request dictionary for each rewrite; the last has the case's questions, of which any may be answered with the new answer:
    they count once all of the case is edited. MQuAKE-Remastered's fields are read too (`target_new_str`)."""
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        said = "is empty" if rewrites == [] else f"is {called(rewrites)}, not a list of rewrites"
        raise ValueError(f"field 'requested_rewrite' {said}")
    asked, answers = _texts(record, "questions"), _texts(record, "new_answer")
    aliases = [*answers[1:], *_texts(record, "new_answer_alias", needed=False)]
    return [
        *map(_rewrite, range(len(rewrites) - 1), rewrites),
        {
            **_rewrite(len(rewrites) - 1, rewrites[-1]),
            "portability": {MULTI_HOP: {"prompt": list(asked), "ground_truth": answers[0]}},
            "ripple": {MULTI_HOP: [_test(asked, answers[0], aliases)]},
        },
    ]


def _texts(record: Mapping, name: str, needed: bool = True) -> tuple[str, ...]:
    try:
        found = texts(record.get(name))
    except ValueError as error:
        raise ValueError(f"field '{name}' {error}") from None
    if needed and not found:
        raise ValueError(f"field '{name}' is {'missing' if is_hole(record.get(name)) else 'empty'}")
    return found


def _rewrite(number: int, rewrite) -> dict:
    if not isinstance(rewrite, Mapping):
        raise ValueError(f"rewrite {number} is {called(rewrite)}, not a set of named fields")
    new, true = (_object(rewrite.get(name)).get("str", rewrite.get(f"{name}_str")) for name in ("target_new", "target_true"))
    named = {name: rewrite.get(name) for name in ("prompt", "subject")}
    return {**named, "target_new": new, "ground_truth": true, "rephrase_prompt": rewrite.get("question")}


# ---- KnowEdit and WikiBigEdit


def portable(record: Mapping) -> dict:
    """KnowEdit's portability (also that of wiki_recent and wiki_counterfact) as tests: any spelling of an answer counts."""
    kinds = _object(record.get("portability"))
    return {"ripple": {kind: list(_portable(entries)) for kind, entries in kinds.items()}}


def _portable(entries) -> Iterator[dict]:
    for entry in _objects(entries):
        with suppress(ValueError):  # which portability itself tells
            asked, answers = texts(entry.get("prompt")), texts(entry.get("ground_truth"))
            if asked and answers:
                yield _test(asked[:1], answers[0], answers[1:])


def hops(record: Mapping) -> dict:
    """WikiBigEdit's question of two hops, where a record has one."""
    asked, answer = record.get("mhop"), record.get("mhop_ans")
    if not isinstance(asked, str) or not isinstance(answer, str) or not asked.strip() or not answer.strip():
        return {}
    probe = {"prompt": asked, "ground_truth": answer}
    return {"portability": {MULTI_HOP: probe}, "ripple": {MULTI_HOP: [_test([asked], answer, [])]}}


def _test(asked, answer: str, aliases) -> dict:
    """One test in RippleEdits' form: any of these prompts, answered with any of these texts."""
    answers = [{"value": answer, "aliases": list(aliases)}]
    return {"test_queries": [{"prompt": prompt, "answers": answers} for prompt in asked], "test_condition": "OR"}
