"""Questions from files: how they are read and refused, and that they are counted as the LM Evaluation Harness counts them."""

import json
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model

from easyedit_nmke import atlas as embedded
from easyedit_nmke import cli
from easyedit_nmke.methods.nmke import NMKEHyperParams
from easyedit_nmke.models.loading import load_model
from easyedit_nmke.scores import harness, kept, tasks
from easyedit_nmke.scores.table import task_scores
from easyedit_nmke.scores.tasks import Given, Question, Questions

SAMPLE = Path(__file__).parent / "data" / "questions.jsonl"
YAML = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def sample():
    (task,) = tasks.read([SAMPLE])
    return task


@pytest.fixture
def file(tmp_path):
    """file(*records, name="mine") -> a JSON-lines file; a record may be a line of text."""

    def write(*records, name="mine"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
        return path

    return write


def with_choices(task):
    return [question for question in task.questions if question.choices]


def by_the_harness(model, tok, questions, folder):
    """lm-eval's own reading, tokens, batches, sums and metrics of these questions: (its means, its samples in order)."""
    pytest.importorskip("lm_eval", reason='lm-eval is not installed (`python -m pip install -e ".[harness]"`)')
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    rows = [{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(YAML.format(file=folder / "rows.jsonl"))
    loaded = harness.check_tasks(["mine"], include_path=folder).loaded
    with harness._quiet():
        found = evaluate(HFLM(pretrained=model, tokenizer=deepcopy(tok), batch_size=4), loaded, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["mine"], key=lambda sample: sample["doc_id"])
    return found["results"]["mine"], samples


def agrees_with_the_harness(model, tok, questions, folder):
    ours = [tasks._choice(q, v) for q, v in zip(questions, tasks.likelihoods(model, tok, questions), strict=True)]
    means, samples = by_the_harness(model, tok, questions, folder)
    assert [one.right for one in ours] == [bool(sample["acc"]) for sample in samples]
    assert [one.right_norm for one in ours] == [bool(sample["acc_norm"]) for sample in samples]
    theirs = [[value for ((value, _),) in sample["resps"]] for sample in samples]
    assert [one.said for one in ours] == [int(np.argmax(values)) for values in theirs]
    for mine, its in zip(tasks.likelihoods(model, tok, questions), theirs, strict=True):
        assert mine == pytest.approx(its, abs=2e-3)
    assert any(one.right != one.right_norm for one in ours), "the two may stand for each other"
    assert np.mean([one.right for one in ours]) == means["acc,none"]
    assert np.mean([one.right_norm for one in ours]) == means["acc_norm,none"]
    return means


def test_choices_and_accuracies_are_the_harness(atlas, sample, tmp_path):
    agrees_with_the_harness(*atlas, with_choices(sample), tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2"])
def test_a_hundred_real_questions_are_counted_as_the_harness_counts_them(name, tmp_path):
    """NMKE_TASKS: a file of ARC-easy in this package's format."""
    if "NMKE_TASKS" not in os.environ:
        pytest.skip("NMKE_TASKS names no file of questions")
    (task,) = tasks.read([os.environ["NMKE_TASKS"]], limit=100)
    try:
        pair = load_model(NMKEHyperParams.from_dict({"model_name": name, "layers": [0], "device": "cpu"}))
    except ValueError as error:
        pytest.skip(str(error))
    assert len(with_choices(task)) == 100
    means = agrees_with_the_harness(*pair, task.questions, tmp_path)
    assert 0.3 < means["acc,none"] < 0.9


# ---- likelihoods


def plain(model, tok, question):
    """log p of each choice, one text at a time, all logits in float64."""
    start, values = len(tok(question.prompt)["input_ids"]), []
    for choice in question.choices:
        ids = torch.tensor([tok(f"{question.prompt} {choice}")["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        values.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
    return values


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3"])
def test_likelihoods_are_those_of_each_text_by_itself(kind, tiny, sample, monkeypatch):
    model, tok = tiny(kind)
    model.config.max_position_embeddings = 128
    questions = with_choices(sample)[:8]
    assert Question("?", (), "x", 1).prompt == "Question: ?\nAnswer:"
    wanted = [pytest.approx(plain(model, tok, q), abs=1e-3) for q in questions]
    assert tasks.likelihoods(model, tok, questions) == wanted
    # One token too many or too few, and padding that counts, are found.
    monkeypatch.setattr(tasks, "read_endings", lambda *args, read=tasks.read_endings: [[v[1:] for v in g] for g in read(*args)])
    assert tasks.likelihoods(model, tok, questions) != wanted


def test_length_is_in_characters_and_the_first_of_equals_is_chosen():
    question = Question("?", ("x", "yes it is", "no"), 1, 1)
    assert tasks._choice(question, [-2.0, -4.0, -3.0]) == Given(0, False, True)
    assert tasks._choice(question, [-2.0, -2.0, -2.0]) == Given(0, False, True)
    accented = Question("?", ("éé", "abc"), 0, 1)  # 2 characters, 4 bytes
    assert tasks._choice(accented, [-1.0, -1.2]) == Given(0, True, False)


def test_equal_choices_are_read_once_and_equal_to_the_bit(atlas, sample):
    model, tok = atlas
    question = next(q for q in with_choices(sample) if len(set(q.choices)) < len(q.choices))
    rows = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    values = tasks.likelihoods(model, tok, [question])[0]
    assert rows == [1, 3] and values[2] == values[3]  # the prompt, and what differs


# ---- free answers


@pytest.mark.parametrize(
    "wanted, text, right",
    [
        ("72", " 48 / 2 = 24, so 48 + 24 = 72.", True),
        ("72", " 72. But wait, it is 71", False),
        ("1,200", " That is $1200.00", True),
        ("1200", " 1,200 dollars", True),
        ("-3", " -3", True),
        ("3.5", " about 3.5 hours", True),
        ("72", " none", False),
        ("yellow", " It is Yellow, of course", True),
        ("yellow", " yellowish", False),
    ],
)
def test_a_number_is_the_last_one_and_a_text_is_contained(wanted, text, right):
    assert tasks._free(Question("?", (), wanted, 1), text).right is right


def test_a_free_answer_ends_where_another_question_begins_and_fits_the_context(atlas, sample, monkeypatch):
    model, tok = atlas
    asked = []

    def said(model, tok, prompts, counts):
        asked.append((prompts, counts))
        return [" 3 + 4 = 7\nQuestion: What is 8 + 8?\nAnswer: 16"] * len(prompts)

    monkeypatch.setattr(tasks, "greedy_texts", said)
    free = [question for question in sample.questions if not question.choices]
    assert tasks._texts(model, tok, free) == [" 3 + 4 = 7\n"] * 3
    ((prompts, counts),) = asked
    assert all(len(tok(p)["input_ids"]) + n == 256 for p, n in zip(prompts, counts, strict=True))  # atlas' context
    model.config.max_position_embeddings = 4096
    tasks._texts(model, tok, free)
    assert asked[1][1] == [tasks.FREE_TOKENS] * 3


# ---- scores


def test_scores_are_shares_and_the_unedited_models_answers_are_the_same_as_themselves(atlas, sample, monkeypatch):
    monkeypatch.setattr(tasks, "FREE_TOKENS", 4)
    model, tok = atlas
    asked = Questions(model, tok, [sample])
    assert set(asked.before) == {f"tasks.questions{kind}" for kind in ("", ".norm", ".same")}
    assert asked.before["tasks.questions.same"] == 1.0 and asked.score(model, tok) == asked.before
    answers = tasks.given(model, tok, sample)
    assert asked.before["tasks.questions"] == np.mean([one.right for one in answers])
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= -1
    after = asked.score(model, tok)
    changed = [a.said == b.said for a, b in zip(answers, tasks.given(model, tok, sample), strict=True)]
    assert after["tasks.questions.same"] == np.mean(changed) < 1


def test_means_over_seeds_are_told_by_task_and_method():
    lines = [
        {"method": "unedited", "checkpoint": 0, "scores": {"tasks.a": 0.5, "tasks.a.norm": 0.4, "tasks.a.same": 1.0, "rel": 1}},
        {"method": "X", "checkpoint": 9, "scores": {"tasks.a": 0.2, "tasks.a.norm": 0.1, "tasks.a.same": 0.5}},
        {"method": "X", "checkpoint": 9, "scores": {"tasks.a": 0.4, "tasks.a.norm": 0.3, "tasks.a.same": 0.7, "tasks.b": 0.0}},
        {"method": "X", "checkpoint": 5, "scores": {}},
    ]
    a, x, b = task_scores(lines, 9)
    assert a == ("a", "unedited", [0.5, 0.4, 1.0]) and b == ("b", "X", [0.0, None, None])
    assert x == ("a", "X", pytest.approx([0.3, 0.2, 0.6])) and task_scores(lines[-1:], 5) == []


# ---- files


def test_answers_are_indices_texts_and_letters(sample):
    assert [q.answer for q in sample.questions] == [0, 1, 2, 3, 0, 1, 2, 1, 0, 0, 1, 2, 0, 0, 1, 1, 0, 1, "7", "15", "yellow"]
    assert [q.line for q in sample.questions] == list(range(1, 22)) and sample.name == "questions" and len(sample.sha256) == 64
    (short,) = tasks.read([SAMPLE], limit=3)
    assert short.questions == sample.questions[:3] and short.mark == {"sha256": sample.sha256, "questions": 3}


GOOD = {"question": "Is it?", "choices": ["yes", "no"], "answer": 1}


@pytest.mark.parametrize(
    "record, reason",
    [
        ("{torn", "not JSON"),
        ("[1]", "expected an object, got list"),
        ({**GOOD, "question": " "}, 'expected a text under "question"'),
        ({**GOOD, "choices": ["yes"]}, 'two or more texts under "choices"'),
        ({**GOOD, "choices": ["yes", ""]}, 'two or more texts under "choices"'),
        ({**GOOD, "choices": "yes no"}, 'two or more texts under "choices"'),
        ({**GOOD, "answer": 2}, "an index from 0 to 1, a choice or a letter under .*got 2"),
        ({**GOOD, "answer": -1}, "got -1"),
        ({**GOOD, "answer": True}, "got True"),
        ({**GOOD, "answer": "C"}, "got 'C'"),
        ({"question": "Is it?"}, "a text or a number .* got None"),
        ({"question": "Is it?", "answer": " "}, "a text or a number"),
    ],
)
def test_a_broken_record_is_refused_with_file_number_and_reason(record, reason, file):
    path = file(GOOD, "", record, GOOD)
    with pytest.raises(ValueError, match=rf"mine.jsonl cannot be used: line 3: .*{reason}") as caught:
        tasks.read([path])
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        tasks.read([tmp_path / "nowhere.jsonl"])
    with pytest.raises(ValueError, match="it has no record"):
        tasks.read([file("")])
    with pytest.raises(ValueError, match=r"line 5: .*; and 4 more"):
        tasks.read([file(*["x"] * 9)])
    with pytest.raises(ValueError, match="two files of questions are called questions"):
        tasks.read([SAMPLE, SAMPLE])


def test_a_question_that_does_not_fit_the_model_is_refused(tiny, file):
    model, tok = tiny("llama")
    (task,) = tasks.read([file(GOOD, {**GOOD, "question": "why " * 200})])
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: question and answer have \d+ tokens, the model's context is 128"):
        Questions(model, tok, [task])


# ---- the shell


def test_a_broken_file_stops_a_run_before_anything_is_loaded(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("easyedit_nmke.editor.LifelongEditor.from_hparams", lambda *_: pytest.fail("a model was loaded"))
    asked = ["--hparams", "atlas", "--data", "atlas", "--out", str(tmp_path / "out"), "--tasks", str(file({**GOOD, "answer": 5}))]
    assert cli.main(["run", *asked]) == 1
    assert "mine.jsonl cannot be used: line 1: expected an index" in capsys.readouterr().err
    text = ["--hparams", "atlas", "--data", "atlas", "--out", str(tmp_path / "out"), "--text-eval", str(tmp_path / "none.txt")]
    assert cli.main(["run", *text]) == 1 and "there is no text file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_asked_from_the_shell(tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert cli.main(["tasks", str(SAMPLE), "--model", "atlas", "--limit", "5", "--device", "cpu", "--out", str(out)]) == 0
    content, printed = json.loads(out.read_text()), capsys.readouterr().out
    found = content["scores"]["questions"]
    assert found["questions"] == 5 and f"{found['right']:.3f} ± " in printed and content["model"]["name"] == "atlas"
    assert "--limit 5" in content["command"] and found["sha256"] == tasks.read([SAMPLE])[0].sha256


def test_a_run_scores_its_text_and_its_questions(tmp_path, requests, capsys):
    model, (_, tok) = tiny_model("llama", 2048), embedded.load()
    for part in (model, tok):
        part.save_pretrained(tmp_path / "model")
    values = dict(
        alg_name="NMKE", model_name=str(tmp_path / "model"), layers=[0], device="cpu", v_num_grad_steps=3, v_lr=0.5, L2=0.1,
        mom2_dataset="atlas", mom2_n_samples=50, stats_dir=str(tmp_path / "stats"), template_prefixes=["The"],
        nullspace_fraction=0.9,
    )  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "data.json").write_text(json.dumps(requests(2)))
    (tmp_path / "text.txt").write_text("Copy a b c. The sum of two and two is four.")
    argv = ["run", "--hparams", str(tmp_path / "mine.yaml"), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    argv += ["--checkpoints", "1,2", "--text-eval", str(tmp_path / "text.txt"), "--tasks", str(SAMPLE), "--tasks-limit", "4"]
    assert cli.main([*argv, "--tasks-at", "each"]) == 0
    printed = capsys.readouterr().out
    assert "Questions from files" in printed and "questions" in printed and "KL" in printed
    lines = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["scores"]["kept_kl"] > 0 for line in lines] == [False, True, True]
    assert all({"tasks.questions", "tasks.questions.same"} <= set(line["scores"]) for line in lines)
    marks = lines[0]["protocol"]["scored_with"]
    assert marks["kept text"] == kept.digest((tmp_path / "text.txt").read_text()) and marks["tasks.questions"]["questions"] == 4
    (tmp_path / "text.txt").write_text("Another text that is long enough.")
    assert cli.main([*argv, "--edits", "2"]) == 0  # nothing was left to do
    (tmp_path / "out" / "results.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert cli.main(argv) == 1 and "other settings (kept text" in capsys.readouterr().err
