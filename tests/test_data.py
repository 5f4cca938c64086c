"""Files in, Requests and refusals out: every format, every damaged field, every unreadable file."""

import hashlib
import json
from pathlib import Path

import pytest

from easyedit_nmke.data import Refusal, load
from easyedit_nmke.models.requests import Request

DATA = Path(__file__).parent / "data"

COUNTERFACT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": "French",
    "rephrase_prompt": "At home Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
ZSRE = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "rephrase": "When has WEFS been established?",
    "alt": " 1997",
    "answers": ["1987", "1988"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
}
KNOWEDIT = {
    "subject": "ZIC3",
    "prompt": "What species is ZIC3 specific to?",
    "target_new": "male",
    "ground_truth": ["human", "man"],
    "rephrase_prompt": "In which living being is ZIC3?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The strand of ZIC3 is", "ground_truth": [["forward", "plus"], ["minus"]]},
            {"prompt": "ZIC3 strand", "ground_truth": "forward"},
            {"prompt": "ZIC3 length", "ground_truth": ""},
        ],
        "Forgetfulness": [],
    },
    "portability": {"Reasoning": [{"prompt": "Which sex?", "ground_truth": ["male"]}], "Subject_Aliasing": None},
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "At home Danielle Darrieux speaks"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Montesquieu speaks"],
}
EASYEDIT = {
    "prompt": "The capital of {} is",
    "subject": "Norland",
    "target_new": "Aster",
    "locality": {
        "same_subject": {"prompt": ["Norland speaks", "Norland pays in"], "ground_truth": ["Dutch", ["crowns", "marks"]]},
        "neighbor": {"prompt": "The capital of Sudland is", "ground_truth": "Briar"},
    },
    "portability": {},
}
FORMATS = {
    "counterfact": COUNTERFACT,
    "zsre": ZSRE,
    "knowedit": KNOWEDIT,
    "multi_counterfact": ROME,
    "easyedit": EASYEDIT,
}


@pytest.fixture
def written(tmp_path):
    def write(content, name="facts.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def changed(record, **fields):
    """The record with fields replaced, or dropped where the value is `...`."""
    return {name: value for name, value in {**record, **fields}.items() if value is not ...}


@pytest.mark.parametrize("name", FORMATS)
def test_tells_the_format(written, name):
    dataset = load(written([FORMATS[name]]))
    assert (dataset.format, len(dataset.requests), dataset.refused) == (name, 1, [])


def test_counterfact(written):
    (request,), _ = load(written([COUNTERFACT]))
    assert request == Request(
        "The mother tongue of Danielle Darrieux is",
        "Danielle Darrieux",
        "English",
        "French",
        "At home Danielle Darrieux speaks",
        {"neighborhood": (("Michel Rocard is a native speaker of", "French"),)},
    )


def test_zsre_strips_keeps_the_first_answer_and_the_nq_prefix(written):
    portable = changed(ZSRE, portability={"New Question": "Who came after WEFS?", "New Answer": "WEFT"})
    (request,), _ = load(written([portable]))
    assert (request.prompt, request.target_new, request.ground_truth) == ("When was WEFS established?", "1997", "1987")
    assert request.rephrase_prompt == "When has WEFS been established?"
    assert request.locality == {"neighborhood": (("nq question: who voiced gaston", "Richard White"),)}
    assert request.portability == {"one_hop": (("Who came after WEFS?", "WEFT"),)}


def test_knowedit_takes_nested_answers_and_leaves_out_empty_probes(written):
    (request,), _ = load(written([KNOWEDIT]))
    assert request.ground_truth == "human"
    assert request.locality == {"Relation_Specificity": (("The strand of ZIC3 is", "forward"), ("ZIC3 strand", "forward"))}
    assert request.portability == {"Reasoning": (("Which sex?", "male"),)}


def test_original_counterfact_fills_the_subject_in(written):
    (request,), _ = load(written([ROME]))
    assert request.prompt == "The mother tongue of Danielle Darrieux is"
    assert (request.target_new, request.ground_truth) == ("English", "French")
    assert request.rephrase_prompt == "Danielle Darrieux, a native"
    pairs = (("The mother tongue of Léon Blum is", "French"), ("Montesquieu speaks", "French"))
    assert request.locality == {"neighborhood": pairs}


def test_easyedit_requests(written):
    (request,), _ = load(written([EASYEDIT]))
    assert request.prompt == "The capital of Norland is"
    assert request.ground_truth is None and request.rephrase_prompt is None
    assert request.locality == {
        "same_subject": (("Norland speaks", "Dutch"), ("Norland pays in", "crowns")),
        "neighbor": (("The capital of Sudland is", "Briar"),),
    }


def test_a_request_survives_the_round_trip(written):
    first, _ = load(written(list(FORMATS["easyedit"] for _ in range(2))))
    again, refused = load(written([request.to_dict() for request in first], "again.json"))
    assert again == first and refused == []


def test_json_lines_and_a_single_record(written):
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in (ZSRE, changed(ZSRE, alt="a\u2028b"), ZSRE))
    assert [r.target_new for r in load(written(("\ufeff" + lines).encode(), "facts.jsonl")).requests] == [
        "1997",
        "a\u2028b",
        "1997",
    ]
    assert len(load(written(json.dumps(ZSRE).encode(), "one.jsonl")).requests) == 1


def test_limit_counts_refused_records_and_the_hash_is_of_the_file(written):
    path = written([ZSRE, changed(ZSRE, alt=""), ZSRE])
    dataset = load(path, limit=2)
    assert (len(dataset.requests), [r.index for r in dataset.refused]) == (1, [1])
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(load(path, limit=99).requests) == 2


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_bad_limit(written, limit):
    with pytest.raises(ValueError, match="limit must be a whole number from 1"):
        load(written([ZSRE]), limit)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (changed(ZSRE, alt=""), "field 'alt' (new target) is empty"),
        (changed(ZSRE, alt="  "), "field 'alt' (new target) is empty"),
        (changed(ZSRE, alt=[]), "field 'alt' (new target) is empty"),
        (changed(ZSRE, alt=...), "field 'alt' (new target) is missing"),
        (changed(ZSRE, alt=None), "field 'alt' (new target) is missing"),
        (changed(ZSRE, alt=1997), "field 'alt' (new target) is a number, not text"),
        (changed(ZSRE, src=...), "field 'src' (prompt) is missing"),
        (changed(ZSRE, subject=True), "field 'subject' (subject) is a truth value, not text"),
        (changed(ZSRE, subject=" "), "field 'subject' (subject) is empty"),
        (changed(ZSRE, subject="WEFT"), "field 'subject': subject 'WEFT' is not in the prompt 'When was WEFS established?'"),
        (changed(ZSRE, src="WEFS or WEFS?"), "'WEFS' is 2 times in the prompt 'WEFS or WEFS?'"),
        (changed(ZSRE, src="wefs or Wefs?"), "'WEFS' is 2 times in the prompt 'wefs or Wefs?'"),
        (changed(ZSRE, src="{} or WEFS?"), "'WEFS' is 2 times in the prompt 'WEFS or WEFS?'"),
        ("WEFS", "is text, not a set of named fields"),
        (None, "is null, not a set of named fields"),
    ],
)
def test_a_record_that_cannot_be_edited_is_put_aside(written, record, reason):
    requests, refused = load(written([ZSRE, record, ZSRE]))
    assert len(requests) == 2 and [r.index for r in refused] == [1]
    assert reason in refused[0].reason


@pytest.mark.parametrize(
    ("record", "note"),
    [
        (changed(EASYEDIT, locality=[1]), "field 'locality' is a list, not a set of named types"),
        (changed(EASYEDIT, locality={"a": "b"}), "field 'locality.a' is text, not a prompt with its ground_truth"),
        (changed(EASYEDIT, locality={"a": {"prompt": "b"}}), "field 'locality.a' has no answer to 'b'"),
        (
            changed(EASYEDIT, locality={"a": {"prompt": ["b", "c"], "ground_truth": ["d", None]}}),
            "'locality.a' has no answer to 'c'",
        ),
        (
            changed(EASYEDIT, portability={"a": {"prompt": ["b", "c"], "ground_truth": ["d"]}}),
            "field 'portability.a' has 2 prompts and 1 answers",
        ),
        (
            changed(EASYEDIT, portability={"a": [{"prompt": "b", "ground_truth": 1}]}),
            "a[0]': a prompt or its answer is a num",
        ),
        (changed(ZSRE, rephrase={"a": 1}), "field 'rephrase' (rephrase) is an object, not text"),
        (changed(ZSRE, answers=[7]), "field 'answers' (old answer) is a number, not text"),
        (changed(ZSRE, loc_ans=...), "field 'loc' has no answer to 'nq question: who voiced gaston'"),
        (changed(ZSRE, loc=3), "field 'loc': a prompt or its answer is a number, not text"),
    ],
)
def test_what_cannot_be_used_of_an_optional_part_is_left_out_with_a_note(written, record, note):
    dataset = load(written([record]))
    assert len(dataset.requests) == 1 and dataset.refused == []
    (said,) = dataset.notes
    assert said.startswith("record 0: ") and note in said and said.endswith("it is left out")


def test_holes_are_no_matter(written):
    holes = changed(EASYEDIT, rephrase_prompt=None, ground_truth=[], locality={"a": None, "b": {"prompt": [], "ground_truth": []}})
    dataset = load(written([holes]))
    assert dataset.notes == [] and dataset.requests[0].locality == {}


def test_several_answers_and_rephrases_are_kept(written):
    several = changed(KNOWEDIT, rephrase_prompt=["One ZIC3?", "Two ZIC3?"], target_new=[["mouse", "house mouse"]])
    (request,), _ = load(written([several]))
    assert request.rephrase_prompts == ("One ZIC3?", "Two ZIC3?") and request.rephrase_prompt == "One ZIC3?"
    assert (request.target_new, request.aliases) == ("mouse", ("house mouse",))
    assert Request.from_dict(request.to_dict()) == request


@pytest.mark.parametrize("kind", ["lists", "rows by number"])
def test_an_object_of_columns_is_a_table(written, kind):
    rows = [changed(COUNTERFACT, target_new=target) for target in ("English", "Dutch", "Danish", "Greek")]
    columns = {name: [row[name] for row in rows] for name in COUNTERFACT}
    if kind != "lists":
        columns = {name: {str(i): value for i, value in enumerate(column)} for name, column in columns.items()}
    dataset = load(written(columns))
    assert [request.target_new for request in dataset.requests] == ["English", "Dutch", "Danish", "Greek"]
    assert (dataset.format, dataset.refused) == ("counterfact", [])


def test_columns_of_different_lengths_are_no_table(written):
    with pytest.raises(ValueError, match=r"the columns have different lengths \(prompt 2, target_new 1, subject 2\)"):
        load(written({"prompt": ["a b", "c d"], "target_new": ["e"], "subject": ["a", "c"]}))


def test_odd_records_are_told(written):
    same = changed(COUNTERFACT, target_new="french")
    other = changed(COUNTERFACT, target_new="Dutch")
    dataset = load(written([same, other, COUNTERFACT]))
    assert len(dataset.requests) == 3
    assert dataset.notes[0] == "record 0: the new target 'french' is the old answer"
    asked = "'The mother tongue of Danielle Darrieux is'"
    assert dataset.notes[1] == f"record 1: the prompt {asked} asks for 'Dutch', record 0 for 'french'; the later edit stands"
    assert len(dataset.notes) == 3


def test_a_method_that_needs_no_subject_takes_records_without_one(written):
    record = changed(COUNTERFACT, subject=...)
    assert [r.reason for r in load(written([record])).refused] == ["field 'subject' (subject) is missing"]
    (request,), _ = load(written([record], "again.json"), needs_subject=False)
    assert request.subject == "" and request.fill("Once. {}")[0] == f"Once. {request.prompt}"


def test_missing_field_inside_an_original_record(written):
    broken = changed(ROME, requested_rewrite=changed(ROME["requested_rewrite"], target_new="English"))
    _, refused = load(written([ROME, broken]))
    assert str(refused[0]) == "record 1: field 'requested_rewrite.target_new.str' (new target) is missing"


def test_a_refusal_reads_as_one_sentence():
    assert str(Refusal(17, "field 'alt' (new target) is empty")) == "record 17: field 'alt' (new target) is empty"


@pytest.mark.parametrize("src", ["When was Wefs established?", "wefs: when?"])
def test_the_prompts_spelling_of_the_subject_is_taken(written, src):
    (request,), _ = load(written([changed(ZSRE, src=src)]))
    assert request.subject.lower() == "wefs" and request.prompt.count(request.subject) == 1


def test_one_exact_spelling_beside_another_case_is_enough(written):
    (request,), _ = load(written([changed(ZSRE, src="Is WEFS short for wefs?")]))
    assert request.subject == "WEFS"


def test_optional_fields_may_be_absent(written):
    (request,), refused = load(written([changed(ZSRE, rephrase=..., loc=..., loc_ans=..., answers=[])]))
    assert request == Request("When was WEFS established?", "WEFS", "1997") and refused == []


def test_most_records_decide_the_format(written):
    dataset = load(written([{"junk": 1}, changed(COUNTERFACT, locality_prompt=...), COUNTERFACT, COUNTERFACT]))
    assert dataset.format == "counterfact"
    assert [str(r) for r in dataset.refused] == ["record 0: field 'prompt' (prompt) is missing"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"hello", "is not JSON .line 1, column 1"),
        (b'[{"src": 1},', "is not JSON .line 1, column 13"),
        (b'{"src": 1}\n{"src"', "neither JSON nor JSON lines .line 2"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ([], "holds no records"),
        ({"data": [ZSRE]}, "holds an object, not a list of edit records"),
        (3, "holds a number, not a list"),
        ([{"question": "?", "answer": "!"}], "no known format: the first has fields question, answer; known formats: multi_"),
        (["a"], "no known format: the first has text"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"src": 1}\n' + b"[" * 100_000, "line 2 is nested too deep"),
    ],
    ids=range(12),
)
def test_a_file_that_cannot_be_used(written, content, message):
    path = written(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_that_is_nested_too_deep_is_refused(written):
    deep = "Rome"
    for _ in range(600):
        deep = [deep]
    dataset = load(written([ZSRE, changed(ZSRE, alt=deep)]))
    assert [str(refusal) for refusal in dataset.refused] == ["record 1: is nested too deep"] and len(dataset.requests) == 1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*facts\.json; give the path"):
        load(tmp_path / "facts.json")
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "count", "locality", "portability"),
    [
        ("counterfact_100.json", "counterfact", 100, 100, 0),
        ("zsre_100.json", "zsre", 100, 100, 0),
        ("knowedit_zsre_100.json", "knowedit", 100, 200, 100),
    ],
)
def test_real_files(name, kind, count, locality, portability):
    dataset = load(DATA / name)
    assert (dataset.format, len(dataset.requests), dataset.refused) == (kind, count, [])
    assert all(Request.from_dict(request.to_dict()) == request for request in dataset.requests)
    probes = [sum(len(p) for r in dataset.requests for p in getattr(r, s).values()) for s in ("locality", "portability")]
    assert probes == [locality, portability]
