"""Edit requests, and the one reading of them: from files (`data`), from EasyEdit's dictionaries, and from columns in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .prompts import SUBJECT, placed
from .subjects import find_subject

Probes = Mapping[str, tuple[tuple[str, str], ...]]

# Types of locality: the unrelated prompts of ZsRE and CounterFact records, as EasyEdit's scripts file them; and CounterFact's
# prompts about subjects of which the new answer was true all along.
NEIGHBORHOOD, ATTRIBUTE = "neighborhood", "attribute"
# The type of portability, and of tests, that asks through several facts.
MULTI_HOP = "multi_hop"

# Field -> what messages call it.
MEANINGS = {
    "prompt": "prompt", "subject": "subject", "target_new": "new target", "ground_truth": "old answer",
    "rephrase_prompt": "rephrase",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """A prompt, and what has to be said after it: every one of `answers`, each in any of its spellings."""

    prompt: str
    answers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class RippleTest:
    """What should follow from an edit, or stay as it was: passed when any of the queries (`every`: all) is answered rightly. It
    counts only where the unedited model answers all conditions rightly."""

    queries: tuple[Query, ...]
    conditions: tuple[Query, ...] = ()
    every: bool = False


@dataclass(frozen=True)
class Request:
    """One fact to write, with the prompts that measure it.

    prompt: the full text, with the subject in it ("" where the method needs none). rephrase_prompts: other wordings of it, all
    scored. aliases: other texts of the new target, which count as well when the model answers freely. locality, portability: type
    -> ((prompt, answer), ...). ripple: type -> tests that are asked freely.
    """

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: Probes = field(default_factory=dict)
    portability: Probes = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    ripple: Mapping[str, tuple[RippleTest, ...]] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.rephrase_prompts, tuple):  # one wording by itself, or none
            object.__setattr__(self, "rephrase_prompts", (self.rephrase_prompts,) if self.rephrase_prompts else ())

    @classmethod
    def from_dict(
        cls,
        record: Mapping[str, Any],
        needs_subject: bool = True,
        names: Mapping[str, str] | None = None,
        note: Callable[[str], None] = lambda said: None,
    ) -> Request:
        """From EasyEdit's request dictionary.

        Prompt, new target and (with `needs_subject`) subject are required: ValueError, naming the field, when one cannot be used.
        The rest is optional: what cannot be used of it is left out, and `note` is told. None, NaN, empty texts and empty lists are
        holes. Of several texts (also nested ones) all rephrases are kept, the first target is written and the others count as its
        aliases, and the first answer of a probe is taken. "ripple" is {type: [test]}, with tests in RippleEdits' form:
        {"test_queries": [{"prompt", "answers": [{"value", "aliases"}]}], "test_condition": "OR" or "AND", "condition_queries": [as
        test_queries]}. names: what a field is called where the record comes from.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"is {called(record)}, not a set of named fields")
        read = _Reader(record, names or {}, note)
        prompt, targets = read.required("prompt")[0], read.required("target_new")
        subject = read.required("subject")[0] if needs_subject else (read.optional("subject") or ("",))[0]
        if subject:
            prompt = prompt.replace(SUBJECT, subject)
            try:
                start, end = find_subject(prompt, subject)
            except ValueError as error:
                if needs_subject:
                    raise ValueError(f"field '{read.names.get('subject', 'subject')}': {error}") from None
                note(f"{read.field('subject')}: {error}; it is left out")
                subject = ""
            else:
                subject = prompt[start:end]
        truth, rephrases = read.optional("ground_truth"), read.optional("rephrase_prompt")
        aliases = tuple(dict.fromkeys([*targets[1:], *read.optional("aliases")]))
        return cls(
            prompt, subject, targets[0], truth[0] if truth else None, rephrases, read.probes("locality"),
            read.probes("portability"), aliases, read.ripple(),
        )  # fmt: skip

    @property
    def rephrase_prompt(self) -> str | None:
        """The first wording."""
        return self.rephrase_prompts[0] if self.rephrase_prompts else None

    def to_dict(self) -> dict:
        """EasyEdit's request dictionary."""
        record: dict[str, Any] = {name: getattr(self, name) for name in ("prompt", "subject", "target_new", "ground_truth")}
        if self.rephrase_prompts:
            several = list(self.rephrase_prompts)
            record["rephrase_prompt"] = several if len(several) > 1 else several[0]
        if self.aliases:
            record["aliases"] = list(self.aliases)
        for name in ("locality", "portability"):
            record[name] = {
                kind: {"prompt": [p for p, _ in pairs], "ground_truth": [a for _, a in pairs]}
                for kind, pairs in getattr(self, name).items()
            }
        if self.ripple:
            record["ripple"] = {kind: [_written(test) for test in tests] for kind, tests in self.ripple.items()}
        return record

    def fill(self, template: str, tok=None) -> tuple[str, int]:
        """The prompt inside a context template ('{}' stands for the prompt), and the character at which the subject ends. In a chat
        format the template goes inside the user's words (see `prompts.placed`)."""
        if not self.subject:
            before, after = template.split(SUBJECT)
            return before + self.prompt + after, len(before) + len(self.prompt)
        return placed(self.prompt, self.subject, template, tok)


def texts(value: Any) -> tuple[str, ...]:
    """All texts of a value, a text or a (nested) list of them, without holes and without spaces around them; line ends stay, since
    a chat format may end with one, and so does the indentation of a last line. ValueError for anything that is no text."""
    if is_hole(value):
        return ()
    if isinstance(value, str):
        text = value.strip(" \t")
        indented = text.endswith(("\n", "\r"))
        return (value.lstrip(" \t") if indented else text,) if value.strip() else ()
    value = listed(value)
    if isinstance(value, (list, tuple)):
        return tuple(text for part in value for text in texts(part))
    raise ValueError(f"is {called(value)}, not text")


def is_hole(value: Any) -> bool:
    """None, or what pandas has in its place: NaN, NaT and NA, which is neither equal to itself nor not."""
    return value is None or type(value).__name__ == "NAType" or (not hasattr(value, "__len__") and value != value)


def listed(value: Any) -> Any:
    """A column of pandas, or an array, as a list; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "__len__") else value


def called(value: Any) -> str:
    """A value's kind in words."""
    kinds = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


class _Reader:
    """The fields of one record. names: field -> what it is called there."""

    def __init__(self, record: Mapping[str, Any], names: Mapping[str, str], note: Callable[[str], None]):
        self.record, self.names, self.note = record, names, note

    def field(self, name: str) -> str:
        """In words: field 'alt' (new target)."""
        meaning = MEANINGS.get(name)
        return f"field '{self.names.get(name, name)}'" + (f" ({meaning})" if meaning else "")

    def required(self, name: str) -> tuple[str, ...]:
        value = self.record.get(name)
        try:
            found = texts(value)
        except ValueError as error:
            raise ValueError(f"{self.field(name)} {error}") from None
        if not found:
            raise ValueError(f"{self.field(name)} is {'missing' if is_hole(value) else 'empty'}")
        return found

    def optional(self, name: str) -> tuple[str, ...]:
        try:
            return texts(self.record.get(name))
        except ValueError as error:
            self.note(f"{self.field(name)} {error}; it is left out")
            return ()

    def probes(self, section: str) -> dict[str, tuple[tuple[str, str], ...]]:
        """{type: ((prompt, answer), ...)} without empty types."""
        content = self.record.get(section)
        if is_hole(content):
            return {}
        if not isinstance(content, Mapping):
            self.note(f"{self.field(section)} is {called(content)}, not a set of named types; it is left out")
            return {}
        found = {kind: tuple(self._pairs(entry, f"{section}.{kind}")) for kind, entry in content.items()}
        return {kind: pairs for kind, pairs in found.items() if pairs}

    def _pairs(self, entry: Any, path: str) -> Iterator[tuple[str, str]]:
        """The pairs of one type: {prompt, ground_truth} with texts or lists in it, or a list of such (KnowEdit)."""
        entry = listed(entry)
        if isinstance(entry, (list, tuple)):
            for number, one in enumerate(entry):
                yield from self._pairs(one, f"{path}[{number}]")
        elif isinstance(entry, Mapping):
            prompts, answers = listed(entry.get("prompt")), listed(entry.get("ground_truth"))
            if not isinstance(prompts, (list, tuple)):
                prompts, answers = [prompts], [answers]
            elif not isinstance(answers, (list, tuple)):
                answers = [answers] * len(prompts)
            if len(prompts) != len(answers):
                self.note(f"{self.field(path)} has {len(prompts)} prompts and {len(answers)} answers; it is left out")
                return
            for prompt, answer in zip(prompts, answers, strict=True):
                yield from self._pair(prompt, answer, path)
        elif not is_hole(entry):
            self.note(f"{self.field(path)} is {called(entry)}, not a prompt with its ground_truth; it is left out")

    def _pair(self, prompt: Any, answer: Any, path: str) -> Iterator[tuple[str, str]]:
        try:
            asked, answers = texts(prompt), texts(answer)
        except ValueError as error:
            self.note(f"{self.field(path)}: a prompt or its answer {error}; it is left out")
            return
        if asked and answers:
            yield asked[0], answers[0]
        elif asked:
            self.note(f"{self.field(path)} has no answer to {asked[0]!r}; it is left out")

    def ripple(self) -> dict[str, tuple[RippleTest, ...]]:
        """{type: tests} without those that cannot be read."""
        content = self.record.get("ripple")
        if is_hole(content):
            return {}
        if not isinstance(content, Mapping):
            self.note(f"{self.field('ripple')} is {called(content)}, not a set of named types; it is left out")
            return {}
        found = {kind: tuple(self._tests(tests, f"ripple.{kind}")) for kind, tests in content.items()}
        return {kind: tests for kind, tests in found.items() if tests}

    def _tests(self, tests: Any, path: str) -> Iterator[RippleTest]:
        tests = listed(tests)
        if is_hole(tests):
            return
        for number, test in enumerate(tests if isinstance(tests, (list, tuple)) else [tests]):
            try:
                yield _test(test)
            except ValueError as error:
                self.note(f"{self.field(f'{path}[{number}]')} {error}; it is left out")


def _test(test: Any) -> RippleTest:
    """ValueError for what is no test, which says why."""
    if not isinstance(test, Mapping):
        raise ValueError(f"is {called(test)}, not a test with its queries")
    needs = test.get("test_condition") or "OR"
    if needs not in ("OR", "AND"):
        raise ValueError(f"has the test_condition {needs!r}, which is neither OR nor AND")
    queries, conditions = (_queries(test.get(part)) for part in ("test_queries", "condition_queries"))
    if not queries:
        raise ValueError("has no test_queries")
    return RippleTest(queries, conditions, needs == "AND")


def _queries(some: Any) -> tuple[Query, ...]:
    some = listed(some)
    if not is_hole(some) and not isinstance(some, (list, tuple)):
        raise ValueError(f"has {called(some)} in place of its queries")
    return tuple(map(_query, some or ()))


def _query(query: Any) -> Query:
    if not isinstance(query, Mapping):
        raise ValueError(f"has {called(query)} in place of a query")
    prompt, answers = texts(query.get("prompt")), listed(query.get("answers"))
    if not prompt:
        raise ValueError("has a query without a prompt")
    if not isinstance(answers, (list, tuple)) or not answers or not all(isinstance(answer, Mapping) for answer in answers):
        raise ValueError(f"has no answers to {prompt[0]!r}")
    spelled = tuple(texts([answer.get("value"), answer.get("aliases")]) for answer in answers)
    # A single letter is in nearly every text.
    spelled = tuple(tuple(name for name in names if len(name) > 1 or name.isdigit()) for names in spelled)
    if not all(spelled):
        raise ValueError(f"has an answer without a text to {prompt[0]!r}")
    return Query(prompt[0], spelled)


def _written(test: RippleTest) -> dict:
    """A test in RippleEdits' form."""

    def queries(some: tuple[Query, ...]) -> list[dict]:
        return [
            {"prompt": query.prompt, "answers": [{"value": first, "aliases": others} for first, *others in query.answers]}
            for query in some
        ]

    needs = "AND" if test.every else "OR"
    return {"test_queries": queries(test.queries), "test_condition": needs, "condition_queries": queries(test.conditions)}
