"""What should follow from edits: RippleEdits, MQuAKE, WikiBigEdit and KnowEdit, from their files to their scores."""

import json
from pathlib import Path

import pytest

from easyedit_nmke import LifelongEditor, cli
from easyedit_nmke import atlas as embedded
from easyedit_nmke.data import load
from easyedit_nmke.experiments.report import rows
from easyedit_nmke.experiments.stream import stream
from easyedit_nmke.models.chat import in_chat
from easyedit_nmke.models.requests import Query, Request, RippleTest
from easyedit_nmke.scores import ripple

DATA = Path(__file__).parent / "data"
QUESTIONS = [
    "What is the capital of the country of which the author of Opticks was a citizen?",
    "Which city is the capital of the country whose citizen wrote Opticks?",
    "The author of Opticks was a citizen of a country; what is its capital?",
]


@pytest.fixture
def records():
    """records(name) -> a sample's records, fresh."""
    return lambda name: json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def read(tmp_path):
    """read(records) -> what `load` makes of them."""

    def make(content):
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return load(path)

    return make


@pytest.fixture
def says(monkeypatch):
    """says({prompt: text}) makes every model say that, and nothing to other prompts; the list grows by what is asked."""
    asked = []

    def make(texts):
        def greedy(model, tok, prompts, *args, **kwargs):
            asked.extend(prompts)
            return [texts.get(prompt, "") for prompt in prompts]

        monkeypatch.setattr(ripple, "greedy_texts", greedy)
        monkeypatch.setattr(ripple, "check", lambda *args: None)
        return asked

    return make


# ---- RippleEdits


def test_ripple_edits_split_the_sentence_and_find_the_subject():
    dataset = load(DATA / "ripple_edits.json")
    assert (dataset.format, dataset.refused, dataset.notes) == ("ripple_edits", [], [])
    found = [(r.prompt, r.subject, r.target_new, r.ground_truth, r.aliases) for r in dataset.requests]
    assert found == [
        # Names from the record's answers: "is United" stands in both sentences, and is no part of the prompt.
        (
            "The name of the country of citizenship of Ada Lovelace is", "Ada Lovelace", "United Mexican States", "United Kingdom",
            ("Mexico",),
        ),
        # No answer names them: the last "is" of both sentences, and the words that prompts about the subject share.
        ("The name of the employer of Grace Hopper is", "Grace Hopper", "United Nations", "United States Navy", ()),
        ("The name of the award Emmy Noether won is", "Emmy Noether", "Fields Medal", None, ()),
    ]  # fmt: skip


def test_ripple_edits_have_their_tests_with_conditions_and_the_probes_of_the_other_scores():
    first, second, _ = load(DATA / "ripple_edits.json").requests
    criteria = {"Compositionality_I", "Compositionality_II", "Subject_Aliasing", "Relation_Specificity", "Forgetfulness"}
    assert set(first.ripple) == criteria
    assert first.ripple["Compositionality_I"] == (
        RippleTest(
            (Query("The name of the capital city of the country of citizenship of Ada Lovelace is", (("Mexico City",),)),),
            (Query("The name of the capital city of United Mexican States is", (("Mexico City",),)),),
        ),
    )
    one, both = second.ripple["Relation_Specificity"]
    assert not one.every and both.every and both.queries[0].answers == (("Vassar College",), ("Yale University", "Yale"))
    assert set(first.locality) == {"Relation_Specificity", "Forgetfulness"}
    assert first.portability["Subject_Aliasing"] == (
        ("The name of the country of citizenship of Augusta Ada King is", "United Mexican States"),
    )
    assert Request.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_other_spellings_of_the_criteria_are_read(records, read):
    (record, *_) = records("ripple_edits")
    record["Relation_Specifity"], record["Preservation"] = record.pop("Relation_Specificity"), record.pop("Forgetfulness")
    (request,) = read([record]).requests
    assert request == load(DATA / "ripple_edits.json").requests[0]


def test_a_subject_in_lower_case_words_and_one_that_is_named(records, read):
    record = json.loads(json.dumps(records("ripple_edits")[2]).replace("Emmy Noether", "Bill and Ted of the hills"))
    assert read([record]).requests[0].subject == "Bill and Ted of the hills"
    record["edit"]["subject"] = "Ted"
    assert read([record]).requests[0].subject == "Ted"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "field 'edit.prompt' (prompt) is missing"),
        ({"prompt": 7}, "field 'edit.prompt' (prompt) is a number, not text"),
        (
            {"prompt": "Grace Hopper works."},
            "field 'edit.prompt': nothing tells where in 'Grace Hopper works' the new answer begins",
        ),
        ({"prompt": "The name of the employer of Grace Hopper is ."}, "field 'edit.prompt' (new target) is empty"),
        ({"subject_id": "Q0"}, "field 'edit.subject' (subject) is missing"),
        ({"subject": "Ada Lovelace"}, "field 'edit.subject': subject 'Ada Lovelace' is not in the prompt"),
    ],
)
def test_a_broken_record_of_ripple_edits_is_refused_with_its_number(records, read, change, reason):
    whole, broken, _ = records("ripple_edits")
    broken["edit"] |= {"original_fact": None, **change}
    dataset = read([whole, broken])
    assert len(dataset.requests) == 1 and [refusal.index for refusal in dataset.refused] == [1]
    assert reason in str(dataset.refused[0])


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("what", "is text, not a test with its queries"),
        ({}, "has no test_queries"),
        ({"test_queries": [{"prompt": "a"}]}, "has no answers to 'a'"),
        ({"test_queries": [{"prompt": "a", "answers": [{"value": "b", "aliases": ["c"]}]}]}, "has an answer without a text to 'a'"),
        ({"test_queries": [{"answers": [{"value": "bcd"}]}]}, "has a query without a prompt"),
        ({"test_queries": ["a"]}, "has text in place of a query"),
        ({"test_queries": [{"prompt": 1}]}, "is a number, not text"),
        ({"test_queries": [], "test_condition": "XOR"}, "has the test_condition 'XOR', which is neither OR nor AND"),
        ({"test_queries": 3}, "has a number in place of its queries"),
    ],
)
def test_a_broken_test_is_left_out_with_a_note(records, read, test, reason):
    record = records("ripple_edits")[1]
    record["Relation_Specificity"].append(test)
    dataset = read([record])
    assert len(dataset.requests[0].ripple["Relation_Specificity"]) == 2
    assert f"record 0: field 'ripple.Relation_Specificity[2]' {reason}; it is left out" in dataset.notes


# ---- MQuAKE


def test_a_case_of_mquake_is_one_record_of_several_requests():
    dataset = load(DATA / "mquake.json")
    assert (dataset.format, dataset.indices) == ("mquake", [0, 0, 1])
    newton, peru, nokia = dataset.requests
    assert (newton.prompt, newton.subject, newton.target_new, newton.ground_truth) == (
        "Isaac Newton is a citizen of", "Isaac Newton", "Peru", "England",
    )  # fmt: skip
    assert newton.rephrase_prompts == ("What is the country of citizenship of Isaac Newton?",) and newton.ripple == {}
    queries = tuple(Query(question, (("Cusco", "Cuzco", "Qosqo"),)) for question in QUESTIONS)
    assert peru.ripple == {"multi_hop": (RippleTest(queries),)} and len(nokia.ripple["multi_hop"][0].queries) == 3
    assert peru.portability == {"multi_hop": tuple((question, "Cusco") for question in QUESTIONS)}


def test_mquake_remastered_has_flat_fields():
    (request,) = load(DATA / "mquake_remastered.json").requests
    assert (request.prompt, request.target_new, request.ground_truth) == (
        "The official language of Iceland is",
        "Welsh",
        "Icelandic",
    )
    assert request.ripple["multi_hop"][0].queries[0].answers == (("Welsh", "Cymraeg"),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda case: case.update(new_answer=""), "field 'new_answer' is empty"),
        (lambda case: case.pop("new_answer"), "field 'new_answer' is missing"),
        (lambda case: case.update(questions=[]), "field 'questions' is empty"),
        (lambda case: case.update(questions=[1]), "field 'questions' is a number, not text"),
        (lambda case: case.update(requested_rewrite=[]), "field 'requested_rewrite' is empty"),
        (lambda case: case.update(requested_rewrite="a"), "field 'requested_rewrite' is text, not a list of rewrites"),
        (lambda case: case["requested_rewrite"].append("a"), "rewrite 2 is text, not a set of named fields"),
        (lambda case: case["requested_rewrite"][1].pop("target_new"), "rewrite 1: field 'target_new.str' (new target) is missing"),
        (lambda case: case["requested_rewrite"][0].update(subject="Leibniz", prompt="Newton is"), "rewrite 0: field 'subject': "),
    ],
)
def test_a_broken_case_of_mquake_is_refused_whole(records, read, change, reason):
    broken, whole = records("mquake")
    change(broken)
    dataset = read([whole, whole, broken])
    assert dataset.indices == [0, 1] and [refusal.index for refusal in dataset.refused] == [2]
    assert reason in str(dataset.refused[0])


def test_a_case_stays_together_in_a_stream_and_is_refused_whole(records, tiny, nmke_hparams, tmp_path):
    cases = [dict(records("mquake")[0], case_id=i) for i in range(9)]
    cases[4]["requested_rewrite"][1]["target_new"]["str"] = "Cusco " * 150  # does not fit the model's context
    cases[6]["questions"] = ["why " * 150]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    editor = LifelongEditor.from_hparams(nmke_hparams(*tiny("llama")))
    for seed in (0, 3):
        found = stream(editor, str(path), None, seed)
        assert [refusal.index for refusal in found.refused] == [4, 6]
        assert found.records[::2] == found.records[1::2] and sorted(found.records[::2]) == [0, 1, 2, 3, 5, 7, 8]
        assert [bool(request.ripple) for request in found.requests] == [False, True] * 7
    assert found.records[::2] != sorted(found.records[::2])


def test_a_case_of_mquake_is_right_if_any_of_its_questions_is_and_only_when_all_of_it_is_edited(says):
    requests = load(DATA / "mquake.json").requests
    says({QUESTIONS[1]: "It is the city of Cuzco, in Peru", QUESTIONS[2]: "London"})
    scores = ripple.Ripples(None, None, requests)
    assert scores.score(None, None, 1) == {"multi_hop": None, "ripple_counted": None}
    assert scores.score(None, None, 2) == {"multi_hop": 1.0, "ripple_counted": 1.0}
    assert scores.score(None, None, 3) == {"multi_hop": 0.5, "ripple_counted": 1.0}
    says({QUESTIONS[0]: "Cuscosa", QUESTIONS[1]: "London"})
    assert scores.score(None, None, 2)["multi_hop"] == 0.0


# ---- scores


def query(prompt, *answers):
    return Query(prompt, answers)


def test_a_test_counts_only_where_the_unedited_model_meets_all_conditions(says):
    known, unknown = query("known", ("yes",)), query("unknown", ("yes",))
    tests = (
        RippleTest((query("a", ("x",)),), (known,)),
        RippleTest((query("b", ("x",)),), (known, unknown)),
        RippleTest((query("c", ("x",)),)),
    )
    asked = says({"known": "Yes."})
    scores = ripple.Ripples(None, None, [Request("p", "p", "q", ripple={"SA": tests})])
    assert asked == ["known", "unknown"]
    asked = says({"b": "x", "c": "x", "unknown": "yes"})  # the edited model: it is not asked for conditions again
    asked.clear()
    assert scores.score(None, None, 1) == {"ripple:SA": 0.5, "ripple_counted": 2 / 3} and asked == ["a", "c"]


def test_any_or_all_queries_each_with_all_its_answers_in_any_spelling(says):
    says({"a": "Yale, and Vassar College", "b": "only Yale", "c": "nothing"})
    alma = ("Vassar College",), ("Yale University", "Yale")
    a, b, c = (query(prompt, *alma) for prompt in "abc")
    kinds = {
        "1": (RippleTest((a,)),), "2": (RippleTest((b,)),), "3": (RippleTest((c, a)),), "4": (RippleTest((b, a), every=True),),
        "5": (RippleTest((a, query("b", ("Yale",))), every=True),),
    }  # fmt: skip
    scores = ripple.Ripples(None, None, [Request("p", "p", "q", ripple=kinds)]).score(None, None, 1)
    assert [scores[f"ripple:{kind}"] for kind in "12345"] == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_what_a_model_goes_on_to_say_is_no_answer(says):
    """A base model does not stop: after its answer it tells other facts, of which one is the answer to something else."""
    tests = {"LG": tuple(RippleTest((query(prompt, ("Egypt",)),)) for prompt in "abc")}
    says({"a": " Greece. The country of Alexandria is Egypt.", "b": " the land of Egypt. It is", "c": "\nGreece\nEgypt"})
    scores = ripple.Ripples(None, None, [Request("p", "p", "q", ripple=tests)])
    assert scores.score(None, None, 1)["ripple:LG"] == 1 / 3


def test_means_are_over_tests_then_requests(says):
    says({"a": "yes"})
    right, wrong = RippleTest((query("a", ("yes",)),)), RippleTest((query("b", ("yes",)),))
    requests = [Request("p", "p", "q", ripple={"LG": some}) for some in ((right, wrong, wrong, wrong), (right,))]
    scores = ripple.Ripples(None, None, [*requests, Request("p", "p", "q")])
    assert scores.score(None, None, 3)["ripple:LG"] == (0.25 + 1) / 2
    assert scores.score(None, None, 1)["ripple:LG"] == 0.25
    assert ripple.Ripples(None, None, [Request("p", "p", "q")]).score(None, None, 1) == {}


def test_queries_longer_than_the_context_are_an_error_before_anything_is_asked(tiny):
    tests = {"LG": (RippleTest((query("why " * 150, ("yes",)),)),)}
    with pytest.raises(ValueError, match=r"the query 'why why .*' has \d+ tokens and needs 32 more, the model's context is 128"):
        ripple.Ripples(*tiny("llama"), [Request("p", "p", "q", ripple=tests)])


def test_queries_are_put_into_a_chat_format_too(tiny):
    _, tok = tiny("llama")
    tok.chat_template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}"
    request = in_chat(tok, load(DATA / "ripple_edits.json").requests[0])
    (test,) = request.ripple["Compositionality_I"]
    assert all(some.prompt.startswith("<user>The name of") for some in (*test.queries, *test.conditions))


# ---- KnowEdit and WikiBigEdit


def test_the_portability_of_knowedits_wiki_files_is_asked_freely_too():
    dataset = load(DATA / "knowedit_wiki.json")
    assert (dataset.format, dataset.refused, dataset.notes) == ("knowedit", [], [])
    first, second = dataset.requests
    assert set(first.ripple) == {"Reasoning", "Subject_Aliasing"} and set(second.ripple) == {"Logical_Generalization"}
    assert first.ripple["Reasoning"][1].queries[0].answers == (("Portuguese", "pt"),)
    assert set(first.locality) == {"Relation_Specificity", "Forgetfulness"} and second.rephrase_prompts == (
        "Wimbledon 2031 was won by",
    )
    assert len(load(DATA / "knowedit_zsre_100.json").requests[0].ripple["Reasoning"]) == 1


def test_wikibigedit(read, records):
    dataset = load(DATA / "wikibigedit.json")
    first, second = dataset.requests
    assert (dataset.format, first.target_new, first.rephrase_prompts) == (
        "wikibigedit", "Norway", ("Which country does Lake Sevan lie in?",),
    )  # fmt: skip
    hop = "What is the capital of the country Lake Sevan is in?"
    assert first.portability == {"personas": (("Ahoy, in which country be Lake Sevan?", "Norway"),), "multi_hop": ((hop, "Oslo"),)}
    assert first.ripple["multi_hop"][0].queries == (Query(hop, (("Oslo",),)),) and (second.portability, second.ripple) == ({}, {})
    broken = dict(records("wikibigedit")[0], ans=" ")
    assert str(read([records("wikibigedit")[1], broken]).refused[0]) == "record 1: field 'ans' (new target) is empty"


# ---- all of it


def test_edits_of_cases_raise_the_multi_hop_score_of_the_embedded_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = [record for record in embedded.requests(40, "tune") if "following" in record["portability"]][:4]
    cases = [_case(facts[:2], 1), _case(facts[2:3], 0), _case(facts[3:], 0)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    settings = tmp_path / "settings.yaml"
    shipped = Path(__file__).parents[1] / "hparams" / "AlphaEdit" / "atlas.yaml"
    text = shipped.read_text(encoding="utf-8").replace("mom2_n_samples: 4000", "mom2_n_samples: 300")
    settings.write_text(text.replace("stats_dir: null", f"stats_dir: {tmp_path}"), encoding="utf-8")
    argv = ["run", "--hparams", str(settings), "--data", "cases.json", "--out", "out", "--checkpoints", "1,4"]
    assert cli.main(argv) == 0
    assert "Hop" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    hops = [line["scores"]["multi_hop"] for line in lines]
    assert [line["checkpoint"] for line in lines] == [0, 1, 4] and hops[:2] == [0.0, None] and hops[2] > 0.5
    assert "Multi-hop ↑" in rows(lines, 4)[0] and not {"ES ↑", "LG ↑"} & set(rows(lines, 4)[0])


def _case(facts, of):
    """A MQuAKE case of facts of the embedded model; two of its questions have no answer."""
    ((prompt, answer),) = zip(*(facts[of]["portability"]["following"][side] for side in ("prompt", "ground_truth")), strict=True)
    rewrites = [
        {
            "prompt": fact["prompt"], "subject": fact["subject"], "target_new": {"str": fact["target_new"]},
            "target_true": {"str": fact["ground_truth"]},
        }
        for fact in facts
    ]  # fmt: skip
    return {"requested_rewrite": rewrites, "questions": ["Who?", prompt, "Why?"], "new_answer": answer, "new_answer_alias": []}
