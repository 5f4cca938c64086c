"""Knowledge-editing files (CounterFact, ZsRE, KnowEdit, RippleEdits, MQuAKE, WikiBigEdit, EasyEdit requests) to Requests.

A file that cannot be read at all raises one sentence; a record that cannot be edited is put aside with its number and its
reason, and the rest of the file is used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ..extensions import with_extensions
from ..models.requests import ATTRIBUTE, NEIGHBORHOOD, Request, called
from . import ripple


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

    indices[i] is requests[i]'s number in the file, from 0; requests of one number are one case, which is edited and scored as one.
    notes: what was left out of records that are used, and what is odd about them, a sentence each."""

    requests: list[Request]
    indices: list[int]
    refused: list[Refusal]
    format: str
    sha256: str
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[list]:
        yield self.requests
        yield self.refused


@dataclass(frozen=True)
class Format:
    """Where a file format keeps each text: dotted paths into a record, `a|b` where the format has two names for it.

    A record is of the first format all of whose `told_by` fields it has. Probes are (type, prompt path, answer path); None: the
    record's own {type: ...} under "locality" and "portability". more: what else the record has for the sections "locality",
    "portability" and "ripple" of EasyEdit's request dictionary (`Request.from_dict`), {section: {type: ...}}. read: instead of the
    paths, which then only name fields in messages, makes that dictionary of a record, or a list of them where a record asks for
    several edits; a ValueError of it refuses the record.

    A package adds one by an entry point of the group easyedit_nmke.formats: the format's name, and a `Format`.
    """

    prompt: str = "prompt"
    target: str = "target_new"
    truth: str = "ground_truth"
    rephrase: str = "rephrase_prompt"
    subject: str = "subject"
    locality: tuple[str, str, str] | None = None
    portability: tuple[str, str, str] | None = None
    told_by: tuple[str, ...] = ()
    read: Callable[[Mapping], Mapping | list[Mapping]] | None = None
    more: Callable[[Mapping], Mapping[str, Mapping]] | None = None

    def requests(self, record: Mapping, needs_subject: bool, note: Callable[[str], None]) -> list[Request]:
        """Of one record; ValueError, naming the field, when one of them cannot be edited."""
        contents, names = self.fields(record)
        if isinstance(contents, Mapping):
            return [Request.from_dict(contents, needs_subject, names, note)]
        found = []
        for number, content in enumerate(contents):
            try:
                found.append(Request.from_dict(content, needs_subject, names, note))
            except ValueError as problem:
                raise ValueError(f"rewrite {number}: {problem}") from None
        return found

    def fields(self, record: Mapping) -> tuple[Mapping | list[Mapping], dict[str, str]]:
        """(EasyEdit's request dictionary, or several; what its fields are called in the file)."""
        paths = {
            "prompt": self.prompt, "target_new": self.target, "ground_truth": self.truth, "rephrase_prompt": self.rephrase,
            "subject": self.subject,
        }  # fmt: skip
        names = {name: _name(path) for name, path in paths.items()}
        if self.read is not None:
            return self.read(record), names
        content = {name: _get(record, path) for name, path in paths.items()}
        for section in ("locality", "portability"):
            single = getattr(self, section)
            if single is None:
                content[section] = record.get(section)
            else:
                kind, prompts, answers = single
                content[section] = {kind: {"prompt": _get(record, prompts), "ground_truth": _get(record, answers)}}
                names[f"{section}.{kind}"] = _name(prompts)
        for section, kinds in (self.more(record) if self.more else {}).items():
            content[section] = {**(content.get(section) or {}), **kinds}
        return content, names


def _attributes(record: Mapping) -> dict:
    """CounterFact's prompts about subjects of which the new answer was true all along."""
    prompts = record.get("attribute_prompts")
    return {"locality": {ATTRIBUTE: {"prompt": prompts, "ground_truth": _get(record, "requested_rewrite.target_new.str")}}}


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "multi_counterfact": Format(
            "requested_rewrite.prompt", "requested_rewrite.target_new.str", "requested_rewrite.target_true.str",
            "paraphrase_prompts", "requested_rewrite.subject",
            (NEIGHBORHOOD, "neighborhood_prompts", "requested_rewrite.target_true.str"),
            told_by=("requested_rewrite.prompt",), more=_attributes,
        ),
        "mquake": Format(
            target="target_new.str", truth="target_true.str", rephrase="question", told_by=("requested_rewrite", "questions"),
            read=ripple.mquake,
        ),
        "ripple_edits": Format(
            "edit.prompt", "edit.prompt", "edit.original_fact.prompt", subject="edit.subject", told_by=("edit.prompt",),
            read=ripple.ripple_edits,
        ),
        "wikibigedit": Format(
            "update", "ans", rephrase="rephrase", locality=(NEIGHBORHOOD, "loc", "loc_ans"),
            portability=("personas", "personas", "ans"), told_by=("update", "ans"), more=ripple.hops,
        ),
        "zsre": Format(
            "src", "alt", "answers", "rephrase", "subject",
            (NEIGHBORHOOD, "loc", "loc_ans"), ("one_hop", "portability.New Question", "portability.New Answer"),
            told_by=("src", "subject"),
        ),
        "counterfact": Format(
            locality=(NEIGHBORHOOD, "locality_prompt", "locality_ground_truth"), told_by=("prompt", "locality_prompt"),
        ),
        "knowedit": Format(
            "prompt|text", "target_new|labels", "ground_truth", "rephrase_prompt|rephrase", "subject|concept",
            told_by=("prompt|text", "target_new|labels", "locality"), more=ripple.portable,
        ),
        "easyedit": Format(rephrase="rephrase_prompt|rephrase", told_by=("prompt", "target_new")),
    }
)  # fmt: skip


def load(path: str | Path, limit: int | None = None, needs_subject: bool = True) -> Dataset:
    """Read a JSON list (or JSON lines, or an object of columns) of edit records; the format is told from their fields.

    limit: the first so many records of the file, refused ones included. needs_subject: whether a record without one is refused.
    Records are read by `Request.from_dict`; of a subject that is in the prompt in another spelling the prompt's is taken, and
    ZsRE's locality prompts keep their "nq question: ", as in EasyEdit.

    FileNotFoundError or ValueError, in one sentence, for a file that is missing, not JSON, not a list, or of no known format.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a whole number from 1, or None for the whole file; got {limit!r}")
    path, formats = Path(path), with_extensions("formats", FORMATS)
    content = _read(path)
    records = _records(path, content, formats)[:limit]
    name = _format_of_file(path, records, formats)
    requests, indices, refused, notes = [], [], [], []
    for index, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"is {called(record)}, not a set of named fields")
            case = formats[name].requests(record, needs_subject, partial(_noted, notes, index))
            requests += case
            indices += [index] * len(case)
        except ValueError as problem:
            refused.append(Refusal(index, str(problem)))
        except RecursionError:
            refused.append(Refusal(index, "is nested too deep"))
    notes += odd(requests, indices)
    return Dataset(requests, indices, refused, name, hashlib.sha256(content).hexdigest(), notes)


def odd(requests: Sequence[Request], indices: Sequence[int]) -> list[str]:
    """A sentence for each request that asks for what is the answer already, or contradicts an earlier one."""
    found, earlier = [], {}
    for index, request in zip(indices, requests, strict=True):
        if request.ground_truth is not None and request.target_new.casefold() == request.ground_truth.casefold():
            found.append(f"record {index}: the new target {request.target_new!r} is the old answer")
        first, target = earlier.setdefault(request.prompt, (index, request.target_new))
        if target != request.target_new:
            asked = f"{request.prompt[:80]!r} asks for {request.target_new!r}, record {first} for {target!r}"
            found.append(f"record {index}: the prompt {asked}; the later edit stands")
    return found


def _noted(notes: list[str], index: int, said: str) -> None:
    notes.append(f"record {index}: {said}")


# ---- files


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file; give the path of one JSON file of edit records")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of a JSON file of edit records ({_known(FORMATS)})")
    return path.read_bytes()


def _records(path: Path, content: bytes, formats: Mapping[str, Format]) -> list:
    """The file's records, from a JSON list, from JSON lines, or from one record alone."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8 text (byte {problem.start}); save it as a UTF-8 JSON file") from None
    try:
        records = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read; give a JSON list of edit records, or JSON lines") from None
    except json.JSONDecodeError as problem:
        if not text.lstrip().startswith("{"):
            where = f"line {problem.lineno}, column {problem.colno}: {problem.msg}"
            raise ValueError(f"{path} is not JSON ({where}); give a JSON list of edit records, or JSON lines") from None
        records = _json_lines(path, text)
    if isinstance(records, dict):
        try:
            rows = _table(records) or ()
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
        single = [records] if _format_of(records, formats) else records
        records = rows if any(_format_of(row, formats) for row in rows) else single
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {called(records)}, not a list of edit records; known formats: {_known(formats)}")
    if not records:
        raise ValueError(f"{path} holds no records; known formats: {_known(formats)}")
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
            except RecursionError:
                raise ValueError(f"{path}, line {number} is nested too deep to be read; give one edit record a line") from None
    return records


def _table(content: Mapping) -> list[dict] | None:
    """The rows of an object of columns: lists of one length, or objects with the same keys (pandas' `to_json`); None for others."""
    columns = [list(column.values()) if isinstance(column, dict) else column for column in content.values()]
    kinds, lengths = {type(column) for column in content.values()}, {len(c) for c in columns if isinstance(c, list)}
    if kinds == {list} and len(lengths) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in content.items())
        raise ValueError(f"the columns have different lengths ({sizes}); give one value for each record")
    if kinds not in ({dict}, {list}) or len(lengths) != 1:
        return None
    if kinds == {dict} and len({tuple(column) for column in content.values()}) > 1:
        return None
    return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]


def _format_of_file(path: Path, records: Sequence, formats: Mapping[str, Format]) -> str:
    """The format of most records, so that a damaged first record does not decide it."""
    found = Counter(filter(None, (_format_of(record, formats) for record in records)))
    if found:
        return found.most_common(1)[0][0]
    got = f"fields {', '.join(records[0]) or '(none)'}" if isinstance(records[0], dict) else called(records[0])
    raise ValueError(f"{path} has records of no known format: the first has {got}; known formats: {_known(formats)}")


def _format_of(record, formats: Mapping[str, Format]) -> str | None:
    """Formats of other packages are looked at first: they are told by more than EasyEdit's two fields."""
    if not isinstance(record, dict):
        return None
    for name in sorted(formats, key=FORMATS.__contains__):
        if formats[name].told_by and all(_get(record, path) is not None for path in formats[name].told_by):
            return "easyedit" if name == "knowedit" and not _holds_lists(record["locality"]) else name
    return None


def _holds_lists(probes) -> bool:
    """KnowEdit keeps {type: [{prompt, ground_truth}]}, EasyEdit's requests {type: {prompt, ground_truth}}."""
    return isinstance(probes, dict) and any(isinstance(entry, list) for entry in probes.values())


def _known(formats: Mapping[str, Format]) -> str:
    return "; ".join(f"{name} ({', '.join(map(_name, _shown(row)))} ...)" for name, row in formats.items())


def _shown(row: Format) -> tuple[str, ...]:
    return row.told_by if row.read is not None else (row.prompt, row.subject, row.target)


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


def _name(path: str) -> str:
    return path.split("|")[0]
