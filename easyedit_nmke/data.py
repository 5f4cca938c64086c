"""Knowledge-editing files (CounterFact, ZsRE, KnowEdit, EasyEdit requests) to Requests.

A file that cannot be read at all raises one sentence; a record that cannot be edited is put aside with its number and its
reason, and the rest of the file is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .models.prompts import SUBJECT, Request

# The type under which EasyEdit's scripts file the unrelated prompts of ZsRE and CounterFact records.
NEIGHBORHOOD = "neighborhood"


@dataclass(frozen=True)
class Refusal:
    """A record that cannot be edited: its number in the file (from 0) and why. `str()` gives both in one sentence."""

    index: int
    reason: str

    def __str__(self) -> str:
        return f"record {self.index}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """What `load` found; unpacks as `requests, refused = load(path)`. `sha256` is of the whole file, whatever the limit.

    indices[i] is requests[i]'s number in the file, from 0."""

    requests: list[Request]
    indices: list[int]
    refused: list[Refusal]
    format: str
    sha256: str

    def __iter__(self) -> Iterator[list]:
        yield self.requests
        yield self.refused


@dataclass(frozen=True)
class _Layout:
    """Where one file format keeps each text: dotted paths into a record, `a|b` where the format has two names for it.

    Probes are (type, prompt path, answer path); None: the record's own {type: ...} under "locality" and "portability".
    """

    prompt: str
    target: str
    truth: str
    rephrase: str
    subject: str = "subject"
    locality: tuple[str, str, str] | None = None
    portability: tuple[str, str, str] | None = None
    told_by: tuple[str, ...] = ()


# A record is of the first format all of whose `told_by` fields it has.
_FORMATS = {
    "multi_counterfact": _Layout(
        "requested_rewrite.prompt", "requested_rewrite.target_new.str", "requested_rewrite.target_true.str",
        "paraphrase_prompts", "requested_rewrite.subject",
        (NEIGHBORHOOD, "neighborhood_prompts", "requested_rewrite.target_true.str"),
        told_by=("requested_rewrite",),
    ),
    "zsre": _Layout(
        "src", "alt", "answers", "rephrase", "subject",
        (NEIGHBORHOOD, "loc", "loc_ans"), ("one_hop", "portability.New Question", "portability.New Answer"),
        told_by=("src", "subject"),
    ),
    "counterfact": _Layout(
        "prompt", "target_new", "ground_truth", "rephrase_prompt", "subject",
        (NEIGHBORHOOD, "locality_prompt", "locality_ground_truth"),
        told_by=("prompt", "locality_prompt"),
    ),
    "knowedit": _Layout(
        "prompt|text", "target_new|labels", "ground_truth", "rephrase_prompt|rephrase", "subject|concept",
        told_by=("prompt|text", "target_new|labels", "locality"),
    ),
    "easyedit": _Layout(
        "prompt", "target_new", "ground_truth", "rephrase_prompt|rephrase", told_by=("prompt", "target_new"),
    ),
}  # fmt: skip


def load(path: str | Path, limit: int | None = None) -> Dataset:
    """Read a JSON list (or JSON lines) of edit records; the format is told from their fields.

    `limit`: the first so many records of the file, refused ones included. Rules, the same for every format:
    - prompt, subject and new target are needed; old answer, rephrase, locality and portability may be absent or empty;
    - texts are stripped (the space between prompt and target is always added later); of several answers the first is kept;
    - the subject must be in the prompt once; where it is there only in another case, the prompt's spelling is taken;
    - ZsRE's locality prompts keep their "nq question: ", as in EasyEdit.

    FileNotFoundError or ValueError, in one sentence, for a file that is missing, not JSON, not a list, or of no known format.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a whole number from 1, or None for the whole file; got {limit!r}")
    path = Path(path)
    content = _read(path)
    records = _records(path, content)[:limit]
    name = _format_of_file(path, records)
    requests, indices, refused = [], [], []
    for index, record in enumerate(records):
        try:
            requests.append(_request(record, _FORMATS[name]))
            indices.append(index)
        except ValueError as problem:
            refused.append(Refusal(index, str(problem)))
    return Dataset(requests, indices, refused, name, hashlib.sha256(content).hexdigest())


# ---- files


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file; give the path of one JSON file of edit records")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of a JSON file of edit records ({_known()})")
    return path.read_bytes()


def _records(path: Path, content: bytes) -> list:
    """The file's records, from a JSON list, from JSON lines, or from one record alone."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8 text (byte {problem.start}); save it as a UTF-8 JSON file") from None
    try:
        records = json.loads(text)
    except json.JSONDecodeError as problem:
        if not text.lstrip().startswith("{"):
            where = f"line {problem.lineno}, column {problem.colno}: {problem.msg}"
            raise ValueError(f"{path} is not JSON ({where}); give a JSON list of edit records, or JSON lines") from None
        records = _json_lines(path, text)
    if isinstance(records, dict) and _format_of(records):
        records = [records]
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {_called(records)}, not a list of edit records; known formats: {_known()}")
    if not records:
        raise ValueError(f"{path} holds no records; known formats: {_known()}")
    return records


def _json_lines(path: Path, text: str) -> list:
    records = []
    # split("\n") and not splitlines(): JSON texts may hold U+2028 and other characters which the latter takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as problem:
                where = f"line {number}: {problem.msg}"
                raise ValueError(f"{path} is neither JSON nor JSON lines ({where}); give a list of edit records") from None
    return records


def _format_of_file(path: Path, records: Sequence) -> str:
    """The format of most records, so that a damaged first record does not decide it."""
    found = Counter(filter(None, map(_format_of, records)))
    if not found:
        got = f"fields {', '.join(records[0]) or '(none)'}" if isinstance(records[0], dict) else _called(records[0])
        raise ValueError(f"{path} has records of no known format: the first has {got}; known formats: {_known()}")
    return found.most_common(1)[0][0]


def _format_of(record) -> str | None:
    if not isinstance(record, dict):
        return None
    for name, layout in _FORMATS.items():
        if all(_get(record, path) is not None for path in layout.told_by):
            return "easyedit" if name == "knowedit" and not _holds_lists(record["locality"]) else name
    return None


def _holds_lists(probes) -> bool:
    """KnowEdit keeps {type: [{prompt, ground_truth}]}, EasyEdit's requests {type: {prompt, ground_truth}}."""
    return isinstance(probes, dict) and any(isinstance(entry, list) for entry in probes.values())


def _known() -> str:
    return "; ".join(
        f"{name} ({', '.join(p.split('|')[0] for p in (layout.prompt, layout.subject, layout.target))} ...)"
        for name, layout in _FORMATS.items()
    )


# ---- records


def _request(record, layout: _Layout) -> Request:
    """One record's Request; ValueError naming the field when it cannot be edited."""
    if not isinstance(record, dict):
        raise ValueError(f"is {_called(record)}, not a set of named fields")
    subject = _required(record, layout.subject, "subject")
    prompt = _required(record, layout.prompt, "prompt").replace(SUBJECT, subject)
    return Request(
        prompt=prompt,
        subject=_as_spelled(prompt, subject, layout.subject),
        target_new=_required(record, layout.target, "new target"),
        ground_truth=_optional(record, layout.truth, "old answer"),
        rephrase_prompt=_optional(record, layout.rephrase, "rephrase"),
        locality=_probes(record, "locality", layout.locality),
        portability=_probes(record, "portability", layout.portability),
    )


def _as_spelled(prompt: str, subject: str, path: str) -> str:
    """The subject as the prompt writes it, where it is there exactly once; ValueError otherwise."""
    found = prompt.count(subject) * [subject]
    if not found:
        found = re.findall(re.escape(subject), prompt, re.IGNORECASE)
    if len(found) != 1:
        where = "not in" if not found else f"{len(found)} times in"
        raise ValueError(f"field '{_name(path)}' (subject): {subject!r} is {where} the prompt {prompt!r}, must be there once")
    return found[0]


def _probes(record: Mapping, section: str, single: tuple[str, str, str] | None) -> dict[str, tuple[tuple[str, str], ...]]:
    """{type: ((prompt, answer), ...)} without empty entries and empty types."""
    if single:
        kind, prompts, answers = single
        probes = {kind: _paired(_get(record, prompts), _get(record, answers), prompts, answers)}
    else:
        content = record.get(section) or {}
        if not isinstance(content, dict):
            raise ValueError(f"field '{section}' is {_called(content)}, not a set of named types")
        probes = {kind: _typed(entry, f"{section}.{kind}") for kind, entry in content.items()}
    return {kind: pairs for kind, pairs in probes.items() if pairs}


def _typed(entry, path: str) -> tuple[tuple[str, str], ...]:
    """The pairs of one type: {prompt, ground_truth} with texts or lists in it, or a list of such (KnowEdit)."""
    if entry is None:
        return ()
    if isinstance(entry, list):
        return tuple(pair for number, one in enumerate(entry) for pair in _typed(one, f"{path}[{number}]"))
    if not isinstance(entry, dict):
        raise ValueError(f"field '{path}' is {_called(entry)}, not a prompt with its ground_truth")
    return _paired(entry.get("prompt"), entry.get("ground_truth"), f"{path}.prompt", f"{path}.ground_truth")


def _paired(prompts, answers, prompt_path: str, answer_path: str) -> tuple[tuple[str, str], ...]:
    """Pairs from one prompt, or a list with an answer each or one answer for all; those with an empty text are left out."""
    if prompts is None:
        return ()
    if answers is None:
        raise ValueError(f"field '{_name(answer_path)}' is missing, though '{_name(prompt_path)}' is there")
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, list):
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise ValueError(f"fields '{_name(prompt_path)}' and '{_name(answer_path)}' have {len(prompts)} and {len(answers)} entries")
    texts = ((_text(p, prompt_path), _text(a, answer_path)) for p, a in zip(prompts, answers, strict=True))
    return tuple((prompt, answer) for prompt, answer in texts if prompt and answer)


# ---- fields


def _get(record: Mapping, path: str):
    """The value at a dotted path; None when it is missing or null. `a|b`: the first one that is there."""
    for option in path.split("|"):
        value = record
        for key in option.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _text(value, path: str, meaning: str = "") -> str:
    """Stripped text, the first of a (nested) list; "" for null and for an empty list."""
    while isinstance(value, list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field '{_name(path)}'{meaning and f' ({meaning})'} is {_called(value)}, not text")
    return (value or "").strip()


def _required(record: Mapping, path: str, meaning: str) -> str:
    value = _get(record, path)
    text = _text(value, path, meaning)
    if not text:
        raise ValueError(f"field '{_name(path)}' ({meaning}) is {'missing' if value is None else 'empty'}")
    return text


def _optional(record: Mapping, path: str, meaning: str) -> str | None:
    return _text(_get(record, path), path, meaning) or None


def _name(path: str) -> str:
    return path.split("|")[0]


def _called(value) -> str:
    """A JSON value's kind in words."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
