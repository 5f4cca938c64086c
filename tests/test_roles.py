"""Roles of neurons over tasks, and silencing them: planted neurons are found, and only their task misses them."""

import math

import numpy as np
import pytest
import torch

from easyedit_nmke.attribution import neuron_scores
from easyedit_nmke.attribution.roles import activity, overlap, roles, shuffled
from easyedit_nmke.experiments.analyses.ablate import _sets
from easyedit_nmke.experiments.analyses.attributing import task_scores
from easyedit_nmke.experiments.analyses.questions import Question, ask, domains_of, judged, log_likelihoods
from easyedit_nmke.methods.keys import attribution_inputs
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.hooks import silenced
from easyedit_nmke.scores import tasks as questions_of_files

TASKS = ["college_biology", "school_biology", "college_chemistry", "school_chemistry"]
DOMAINS = ["biology", "biology", "chemistry", "chemistry"]


def test_activity_is_the_share_of_prompts_above_the_mean():
    values = torch.randn(7, 63, generator=torch.Generator().manual_seed(0))
    plain = values.double().numpy()
    z = (plain - plain.mean(1, keepdims=True)) / (plain.std(1, keepdims=True, ddof=1) + 1e-6)
    for threshold in (0.0, 1.0):
        np.testing.assert_array_equal(activity(values, threshold).numpy(), (z > threshold).mean(0))


def test_every_neuron_has_the_one_role_of_its_set_of_tasks():
    sets = ["1111", "1100", "0011", "1000", "0001", "1010", "0111", "0000"]
    active = torch.tensor([[bit == "1" for bit in column] for column in sets]).T
    found = roles(active, TASKS, DOMAINS)
    names = [next(role for role, mask in found.items() if mask[i]) for i in range(len(sets))]
    assert names == [
        "general", "domain biology", "domain chemistry", "task college_biology", "task school_chemistry", "mixed", "mixed", "none",
    ]  # fmt: skip
    assert torch.stack(list(found.values())).sum(0).tolist() == [1] * len(sets)


def test_a_domain_of_one_task_is_that_task_and_one_of_all_tasks_is_general():
    active = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    assert roles(active, ["a", "b"], ["a", "b"]).keys() == {"general", "task a", "task b", "none", "mixed"}
    same = roles(active, ["a", "b"], ["x", "x"])
    assert "domain x" not in same and same["general"].tolist() == [True, False, False]


def test_overlap_is_that_of_sets_and_the_control_keeps_the_numbers():
    active = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.6
    sets = [set(row.nonzero()[:, 0].tolist()) for row in active]
    wanted = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    np.testing.assert_allclose(overlap(active).numpy(), wanted)
    assert overlap(torch.zeros(2, 5, dtype=torch.bool)).tolist() == [[1, 1], [1, 1]]
    drawn = shuffled(active, 3)
    assert drawn.sum(1).tolist() == active.sum(1).tolist() and not torch.equal(drawn, active)
    assert torch.equal(drawn, shuffled(active, 3)) and not torch.equal(drawn, shuffled(active, 4))


# ---- a planted neuron

LAYER, NEURON, WORD = 1, 17, " Rome"
PROMPTS = {"a": ["Rome is in", "Oslo is in", "Lima is in"], "b": ["Rome has a", "Oslo has a", "Lima has a"]}


@pytest.fixture
def planted(tiny):
    """(view, tokenizer, questions): a neuron is active on the prompts of task a alone, and promotes the word right there."""
    model, tok = tiny("llama")
    view = ModelView(model)
    mlp = model.model.layers[LAYER].mlp
    inputs = {}
    with torch.no_grad():
        for name, prompts in PROMPTS.items():
            rows = []
            handle = mlp.register_forward_pre_hook(lambda _module, args, rows=rows: rows.append(args[0][0, -1]))
            for prompt in prompts:
                model(**tok(prompt, return_tensors="pt"))
            handle.remove()
            inputs[name] = torch.stack(rows)
        wanted = torch.cat([torch.full((3,), 6.0), torch.full((3,), -40.0)])
        states = torch.cat([inputs["a"], inputs["b"]])
        mlp.gate_proj.weight[NEURON] = torch.linalg.lstsq(states, wanted[:, None]).solution[:, 0]
        mlp.up_proj.weight[NEURON] = torch.linalg.lstsq(states, torch.ones(6, 1)).solution[:, 0]
        word = tok.encode(f"is{WORD}")[-1]
        mlp.down_proj.weight[:, NEURON] = 3 * model.lm_head.weight[word] / model.lm_head.weight[word].norm()
    choices = (WORD.strip(), "Lima")
    asked = [Question(task, task, prompt, choices, 0) for task, prompts in PROMPTS.items() for prompt in prompts]
    return view, tok, asked


def test_a_planted_neuron_is_task_specific_and_first_of_its_role(planted, tmp_path):
    view, tok, asked = planted
    found = dict(task_scores(view, tok, asked, (LAYER,), "lps", 1.0, tmp_path))
    assert roles(found[LAYER].active > 0.5, ["a", "b"], ["a", "b"])["task a"][NEURON]

    class args:
        most, roles, top, draws, seed = 0.5, "task a", (1,), 2, 0

    sets = _sets(args, {"a": "a", "b": "b"}, found)
    assert sets["task a", 1] == [(LAYER, NEURON)] and [len(sets["random", 1, draw]) for draw in (0, 1)] == [1, 1]
    args.top = (97,)
    with pytest.raises(ValueError, match=r"task a has \d+ neurons in these blocks, fewer than the 97 of --top"):
        _sets(args, {"a": "a", "b": "b"}, found)
    args.roles = "task c"
    with pytest.raises(ValueError, match="there is no role 'task c'; roles are"):
        _sets(args, {"a": "a", "b": "b"}, found)


def test_scores_of_tasks_are_kept_and_not_taken_for_those_of_other_questions(planted, tmp_path, monkeypatch):
    from easyedit_nmke.experiments.analyses import attributing

    view, tok, asked = planted
    first = dict(task_scores(view, tok, asked, (LAYER,), "lps", 0.0, tmp_path))
    states = attribution_inputs(view, tok, PROMPTS["b"], (LAYER,))
    logits = view.readout.logits(states.final_hidden)
    firsts = [tok.encode(f" {choice}", add_special_tokens=False)[0] for choice in asked[0].choices]
    likeliest = torch.tensor(firsts)[logits[:, firsts].argmax(1)]
    assert not torch.equal(likeliest, states.predicted)
    plain = neuron_scores(states.coefficients[LAYER], states.residual[LAYER], view.values(LAYER), view.readout, likeliest,
                          final_hidden=states.final_hidden)  # fmt: skip
    torch.testing.assert_close(first[LAYER].score[1], plain.mean(0).float())
    torch.testing.assert_close(first[LAYER].active[1], activity(plain).float())
    with monkeypatch.context() as patch:
        patch.setattr(attributing, "_scores", None)
        again = dict(task_scores(view, tok, asked, (LAYER,), "lps", 0.0, tmp_path))
        assert all(map(torch.equal, first[LAYER], again[LAYER]))
        with pytest.raises(TypeError):
            dict(task_scores(view, tok, asked[1:], (LAYER,), "lps", 0.0, tmp_path))


def test_silencing_it_breaks_its_task_alone(planted):
    view, tok, asked = planted
    before = judged(view, tok, asked)
    with silenced({view.down(LAYER): torch.tensor([NEURON])}):
        after = judged(view, tok, asked)
    assert before["a"]["accuracy"] == 1 and after["a"]["log_prob"] < before["a"]["log_prob"] - 0.5
    assert abs(after["b"]["log_prob"] - before["b"]["log_prob"]) < 1e-3
    assert judged(view, tok, asked) == before


def test_silencing_is_a_weight_of_zero_and_leaves_no_trace(tiny):
    for kind in ("llama", "gpt2", "gemma2"):
        model, tok = tiny(kind)
        view, ids = ModelView(model), tok("Rome is in Italy", return_tensors="pt")
        weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            plain = model(**ids).logits
            with pytest.raises(KeyboardInterrupt), silenced({view.down(1): torch.tensor([3, 5])}):
                inside = model(**ids).logits
                raise KeyboardInterrupt
            assert torch.equal(model(**ids).logits, plain)
            assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
            view.w_out(1)[:, [3, 5]] = 0
            torch.testing.assert_close(model(**ids).logits, inside)
            assert not torch.allclose(inside, plain)


# ---- questions


def lines(path, *records):
    import json

    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_are_of_the_task_that_they_name(tmp_path):
    file = lines(
        tmp_path / "mixed.jsonl",
        {"task": "college_biology", "question": "What?", "choices": ["this", "that"], "answer": 1},
        {"task": "school_biology", "question": "Who?", "choices": ["he", "she"], "answer": "A"},
        {"question": "Where?", "choices": ["here", "there"], "answer": 0},
        {"task": "college_biology", "question": "When?", "choices": ["now", "then"], "answer": 0},
    )
    asked = ask([file], limit=1)
    assert [(q.task, q.domain) for q in asked] == [
        ("college_biology", "biology"),
        ("school_biology", "biology"),
        ("mixed", "mixed"),
    ]
    assert asked[0].prompt == "What?\nA. this\nB. that\nAnswer:" and asked[0].choices == ("A", "B") and asked[0].answer == 1
    assert ask([file], letters=False)[0].prompt == "Question: What?\nAnswer:"
    own = ask([file], ["mixed", "school_biology"], domains_of("one=mixed;two=school_biology"))
    assert [(q.task, q.domain) for q in own] == [("school_biology", "two"), ("mixed", "one")]


@pytest.mark.parametrize(
    "records, only, said",
    [
        ([{"question": "What?", "choices": ["a", "b"], "answer": 0}], (), r"there is 1 task \(one\).*at least two"),
        ([{"question": "What?", "answer": "4"}], (), "one format, multiple choice, in common"),
        ([{"question": "What?", "choices": ["a", "b"], "answer": 7}], (), "one.jsonl cannot be used: line 1"),
        ([{"question": "What?", "choices": ["a", "b"], "answer": 0}], ("two",), "there is no task 'two'; tasks are one"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, records, only, said):
    with pytest.raises(ValueError, match=said) as error:
        ask([lines(tmp_path / "one.jsonl", *records)], only)
    assert "\n" not in str(error.value)


def test_log_likelihoods_are_those_of_the_task_scorer(tiny, tmp_path):
    file = lines(
        tmp_path / "t.jsonl",
        {"question": "Where is Rome", "choices": ["in Italy", "in a far country", "in Italy of old"], "answer": 0},
        {"question": "Who", "choices": ["Oslo", "Lima"], "answer": 1},
    )
    for kind in ("llama", "gpt2", "gemma2"):
        model, tok = tiny(kind)
        (task,) = questions_of_files.read([file])
        wanted = [value for row in questions_of_files.likelihoods(model, tok, task.questions) for value in row]
        asked = ask([file], letters=False, least=1)
        found = log_likelihoods(ModelView(model), tok, [(q.prompt, choice) for q in asked for choice in q.choices])
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        said = judged(ModelView(model), tok, asked)["t"]
        right = [wanted[0] - math.log(sum(map(math.exp, wanted[:3]))), wanted[4] - math.log(sum(map(math.exp, wanted[3:])))]
        assert said["log_prob"] == pytest.approx(sum(right) / 2, rel=1e-4)
