"""Requests given in Python: the same reading as from files."""

import math

import numpy
import pandas
import pytest

from easyedit_nmke import FTHyperParams, LifelongEditor
from easyedit_nmke.editor import make_requests
from easyedit_nmke.experiments.protocol import Scorer, batches
from easyedit_nmke.methods.nmke import METHOD
from easyedit_nmke.models.requests import Request, texts
from easyedit_nmke.scores import metrics

RECORD = {"prompt": "The birthplace of Mara Vosk is", "subject": "Mara Vosk", "target_new": "Rome"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, ()), (math.nan, ()), ("", ()), ("  \n", ()), ([], ()), ([None, [math.nan]], ()), (" a ", ("a",)),
        (["a", ["b", "c"]], ("a", "b", "c")), (("a", None), ("a",)), ("<user>hi\n", ("<user>hi\n",)),
    ],
)  # fmt: skip
def test_texts_of_a_value(value, found):
    assert texts(value) == found


def test_nested_aliases_are_one_answer_and_its_aliases():
    request = Request.from_dict({**RECORD, "target_new": [["Norse", "Old Norse"]], "ground_truth": [["Rome", "Roma"]]})
    assert (request.target_new, request.aliases, request.ground_truth) == ("Norse", ("Old Norse",), "Rome")


@pytest.mark.parametrize("hole", [None, math.nan, [], "", [None]])
def test_holes_of_pandas_are_no_texts(hole):
    notes = []
    content = {
        "rephrase_prompt": hole,
        "ground_truth": hole,
        "locality": {"near": {"prompt": ["a", hole], "ground_truth": ["b", hole]}},
    }
    request = Request.from_dict({**RECORD, **content}, note=notes.append)
    assert (request.rephrase_prompts, request.ground_truth, request.locality) == ((), None, {"near": (("a", "b"),)})
    assert notes == []


def test_what_is_required_is_named():
    for field, value, said in (
        ("prompt", None, "field 'prompt' (prompt) is missing"),
        ("target_new", math.nan, "field 'target_new' (new target) is missing"),
        ("subject", " ", "field 'subject' (subject) is empty"),
        ("target_new", {"str": "a"}, "field 'target_new' (new target) is an object, not text"),
    ):
        with pytest.raises(ValueError) as error:
            Request.from_dict({**RECORD, field: value})
        assert str(error.value) == said


def test_a_prompt_in_a_chat_format_keeps_its_line_end():
    prompt = "<|im_start|>user\nWhere was Mara Vosk born?<|im_end|>\n<|im_start|>assistant\n"
    assert Request.from_dict({**RECORD, "prompt": prompt}).prompt == prompt


def test_a_subject_is_a_word_of_the_prompt():
    with pytest.raises(ValueError, match="subject 'Iran' is no word of the prompt 'The mayor of Tirana is'"):
        Request.from_dict({"prompt": "The mayor of Tirana is", "subject": "Iran", "target_new": "Ann"})
    request = Request.from_dict({"prompt": "Art in Arthur's house is", "subject": "Art", "target_new": "old"})
    assert request.fill("So. {}") == ("So. Art in Arthur's house is", 7)


def test_columns_are_read_as_records_are(tiny, nmke_hparams, requests, caplog):
    editor = LifelongEditor.from_hparams(nmke_hparams(*tiny("llama")))
    one, two = requests(2)
    results, *_ = editor.edit(
        prompts=[one["prompt"], two["prompt"]], target_new=[one["target_new"], [[two["target_new"], "Nowhere"]]],
        subject=[one["subject"], two["subject"]], ground_truth=[None, math.nan],
        rephrase_prompts=[["One wording of it is", "Another wording is"], None], loc_prompts=["Unrelated"], test_generation=False,
        locality_inputs={"near": {"prompt": ["Something else is", None], "ground_truth": ["so", None]}}, verbose=False,
    )  # fmt: skip
    asked = [result["requested_rewrite"] for result in results]
    assert asked[0]["rephrase_prompt"] == ["One wording of it is", "Another wording is"] and asked[1]["aliases"] == ["Nowhere"]
    assert asked[1]["ground_truth"] is None and "rephrase_prompt" not in asked[1] and asked[1]["locality"] == {}
    assert len(results[0]["post"]["rephrase_acc"]) == 2 and "rephrase_acc" not in results[1]["post"]
    with pytest.raises(TypeError, match="rephrases"):
        editor.edit(prompts=[one["prompt"]], target_new=["a"], rephrases=["b"])
    with pytest.raises(ValueError, match=r"request 1: field 'target_new' \(new target\) is missing"):
        editor.edit(prompts=[one["prompt"]] * 2, target_new=["a", None], subject=[one["subject"]] * 2)


def test_all_wordings_are_scored_and_averaged(tiny, requests):
    model, tok = tiny("llama")
    record = {**requests(1)[0], "rephrase_prompt": ["One wording of it is", "Another wording is", "A third is"]}
    single = [Request.from_dict({**record, "rephrase_prompt": one}) for one in record["rephrase_prompt"]]
    (whole,) = metrics.quality(model, tok, [Request.from_dict(record)])
    assert whole["rephrase_acc"] == [metrics.quality(model, tok, [one])[0]["rephrase_acc"][0] for one in single]
    scores = Scorer(model, tok, [Request.from_dict(record)]).unedited(model, tok)
    each = [Scorer(model, tok, [one]).unedited(model, tok) for one in single]
    for name in ("gen", "gen_exact", "gen_contains", "gen_preferred"):
        assert scores[name] == pytest.approx(sum(one[name] for one in each) / 3)


def test_fine_tuning_needs_no_subject(tiny, requests):
    model, tok = tiny("llama")
    editor = LifelongEditor.from_hparams(FTHyperParams(layers=[0], model_name=(model, tok), device="cpu", num_steps=1))
    record = requests(1)[0]
    results, *_ = editor.edit(prompts=[record["prompt"]], target_new=[record["target_new"]], verbose=False)
    assert results[0]["requested_rewrite"]["subject"] == ""


def test_batches_end_at_checkpoints():
    assert batches(10, 4, (1, 6)) == [(0, 1), (1, 5), (5, 6), (6, 10)]
    assert batches(10, 4, ()) == [(0, 4), (4, 8), (8, 10)] and batches(10, 4, (6, 10), start=5) == [(5, 6), (6, 10)]


def test_two_answers_in_one_batch_are_told_before_anything_is_edited(tiny, nmke_hparams, requests, tmp_path):
    import json

    from easyedit_nmke.experiments.stream import stream

    records = requests(6)
    records[3] = {**records[2], "target_new": "Elsewhere"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    editor = LifelongEditor.from_hparams(nmke_hparams(*tiny("llama"), batch_size=4))
    assert [refusal.index for refusal in stream(editor, str(path), None, 0).refused] == [3]
    # Batches are now 0, 1-2, 3-5: the two answers are in different ones.
    assert stream(editor, str(path), None, 0, (1, 3)).refused == []
    # 0, 1-4, 5: again in one.
    assert [refusal.index for refusal in stream(editor, str(path), None, 0, (1, 6)).refused] == [3]


def test_methods_that_refuse_other_records_edit_the_rest_in_the_same_order(tiny, nmke_hparams, requests, tmp_path):
    import json

    from easyedit_nmke.experiments.stream import stream

    records = requests(9)
    del records[5]["subject"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    model, tok = tiny("llama")
    ours = LifelongEditor.from_hparams(nmke_hparams(model, tok))
    tuned = LifelongEditor.from_hparams(FTHyperParams(layers=[0], model_name=(model, tok), device="cpu", num_steps=1))
    found, every = stream(ours, str(path), None, 1), stream(tuned, str(path), None, 1)
    assert [refusal.index for refusal in found.refused] == [5] and every.refused == []
    assert "order" in found.facts and "order" not in every.facts
    assert every.records != sorted(every.records) and found.records == [i for i in every.records if i != 5]


def test_a_record_without_room_for_the_old_answer_is_refused_before_anything_is_edited(tiny, nmke_hparams, requests, tmp_path):
    import json

    from easyedit_nmke.experiments.stream import stream

    records = requests(3)
    records[1]["ground_truth"] = "Cusco " * 150
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    editor = LifelongEditor.from_hparams(nmke_hparams(*tiny("llama")))
    (refused,) = stream(editor, str(path), None, 0).refused
    assert refused.index == 1 and "the model's context 128" in refused.reason


def test_columns_of_pandas_and_arrays_are_lists():
    content = {
        "rephrase_prompt": numpy.array(["again", None], dtype=object),
        "locality": {"near": {"prompt": numpy.array(["a", "b"]), "ground_truth": numpy.array(["c", "d"])}},
    }
    query = {"prompt": "q", "answers": numpy.array([{"value": "yes", "aliases": numpy.array(["yea"])}], dtype=object)}
    content["ripple"] = {"Reasoning": numpy.array([{"test_queries": numpy.array([query], dtype=object)}], dtype=object)}
    notes = []
    request = Request.from_dict({**RECORD, **content}, note=notes.append)
    assert (request.rephrase_prompts, request.locality) == (("again",), {"near": (("a", "c"), ("b", "d"))}) and not notes
    assert [test.queries[0].prompt for test in request.ripple["Reasoning"]] == ["q"]
    frame = pandas.DataFrame({"prompt": [RECORD["prompt"]] * 2, "truth": ["Rome", None]}).convert_dtypes()
    columns = [frame["prompt"], frame["prompt"].to_numpy()]
    for prompts in columns:
        made = make_requests(
            METHOD, prompts, pandas.Series([RECORD["target_new"]] * 2), [RECORD["subject"]] * 2, frame["truth"], None, None, None
        )
        assert [(request.prompt, request.ground_truth) for request in made] == [
            (RECORD["prompt"], "Rome"),
            (RECORD["prompt"], None),
        ]
