"""The LM Evaluation Harness on the embedded model, offline. Skipped where lm-eval is not installed, but for its absence itself."""

import copy
import importlib
import random
import re
import sys

import pytest
import torch

from easyedit_nmke import atlas as embedded
from easyedit_nmke.atlas import facts as world
from easyedit_nmke.scores import harness, metrics

LIMIT = 60
TASK = """
task: {name}
{extra}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
DATA = "custom_dataset: !function easyedit_nmke.scores.harness.fact_documents"


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason='lm-eval is not installed (`python -m pip install -e ".[harness]"`)')


@pytest.fixture
def own_tasks(tmp_path):
    """own_tasks(name=lines of its YAML, ...) -> a folder with these tasks."""

    def write(**tasks):
        for name, extra in tasks.items():
            (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, extra=extra))
        return tmp_path

    return write


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r"pip install -e .\.\[harness\]") as caught:
        harness.check_tasks(["atlas_exercises"])
    assert "\n" not in str(caught.value)


def test_the_task_files_name_functions_that_there_are():
    named = [name for file in harness.TASKS.glob("*.yaml") for name in re.findall(r"!function (\S+)", file.read_text())]
    assert len(named) == 2
    for module, _, function in (name.rpartition(".") for name in named):
        assert callable(getattr(importlib.import_module(module), function))


def test_unknown_names_are_reported_together(lm_eval):
    with pytest.raises(ValueError, match=r"'hellaswagg' \(did you mean 'hellaswag'\?\), 'atlas_fact' \(did you mean 'atlas_facts'"):
        harness.check_tasks(["hellaswagg", "atlas_exercises", "atlas_fact"])


def test_include_path_must_be_a_folder(lm_eval, tmp_path):
    with pytest.raises(ValueError, match=r"include_path is .*nowhere.*expected a folder"):
        harness.check_tasks(["mine"], include_path=tmp_path / "nowhere")


def test_data_that_cannot_be_loaded_is_found_before_editing(lm_eval, own_tasks):
    folder = own_tasks(mine="dataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/rows.jsonl}}")
    with pytest.raises(ValueError, match=r"task 'mine' cannot be loaded \(FileNotFoundError: .*comes from the hub") as caught:
        harness.check_tasks(["mine"], include_path=folder)
    assert "\n" not in str(caught.value)


def test_generated_code_is_run_only_when_asked_for(lm_eval, own_tasks, monkeypatch):
    monkeypatch.delenv(harness.ALLOW_CODE, raising=False)
    folder = own_tasks(coding=f"unsafe_code: true\n{DATA}")
    with pytest.raises(ValueError, match=r"task 'coding' runs code that the model writes.*allow_code=True"):
        harness.check_tasks(["coding"], include_path=folder)
    allowed = harness.check_tasks(["coding"], include_path=folder, allow_code=True)
    assert list(harness.evaluate(*embedded.load(), allowed, limit=1)) == ["coding"]
    assert harness.ALLOW_CODE not in harness.os.environ


def damaged(model, kept):
    """A copy with the attention of two blocks weakened: it still does some of what it was taught."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in (3, 4):
            other.model.layers[block].self_attn.o_proj.weight.mul_(kept)
    return other


@pytest.mark.parametrize("harmed", [False, True])
def test_exercises_agree_with_our_exact_match(lm_eval, atlas, harmed):
    """Ours asks whether the greedy answer begins with the target; the harness cuts it at the full stop."""
    model, tok = atlas
    model = damaged(model, 0.4) if harmed else model
    ours = metrics.exact_match(model, tok, embedded.exercises()[:LIMIT])
    assert harness.evaluate(model, tok, ["atlas_exercises"], limit=LIMIT) == {"atlas_exercises": pytest.approx(sum(ours) / LIMIT)}
    assert 0 < sum(ours) < LIMIT, "the agreement of two trivial scores says nothing"


@pytest.mark.parametrize("harmed", [False, True])
def test_facts_agree_with_the_likeliest_object(lm_eval, atlas, harmed):
    model, tok = atlas
    model = damaged(model, 0.05) if harmed else model
    rows = harness.fact_documents()["test"].to_list()[:12]

    def likelihood(prompt, answer):
        start = len(tok(prompt)["input_ids"])
        ids = torch.tensor([tok(f"{prompt} {answer}")["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        return float(logs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum())

    right = 0
    for row in rows:
        values = [likelihood(row["prompt"], choice) for choice in row["choices"]]
        right += values.index(max(values)) == row["answer"]
    assert harness.evaluate(model, tok, ["atlas_facts"], limit=12) == {"atlas_facts": pytest.approx(right / 12)}
    assert not harmed or 0 < right < 12


def test_facts_are_what_edits_of_the_test_half_leave_alone():
    pytest.importorskip("datasets")
    known = {(f.prompt(w), f.object, f.half) for f in world.make_world()[0] for w in range(len(f.relation.templates))}
    rows = list(harness.fact_documents()["test"])
    assert len(rows) == 300 and rows == list(harness.fact_documents()["test"])
    assert all((row["prompt"], row["choices"][row["answer"]], "tune") in known for row in rows)


def test_loaded_tasks_serve_again_and_nothing_of_the_caller_changes(lm_eval, atlas, capfd):
    model, tok = atlas
    tasks = harness.check_tasks(["atlas_exercises", "atlas_facts"])
    assert tasks.metrics == {"atlas_exercises": "exact_match", "atlas_facts": "acc"}
    model.train()
    model.model.layers[1].eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    states = random.getstate(), torch.get_rng_state(), tok.padding_side
    first = harness.evaluate(model, tok, tasks, limit=10)
    assert first == harness.evaluate(model, tok, tasks, limit=10, batch_size=3)
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1]) and tok.padding_side == states[2]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    assert harness.evaluate(model, tok, tasks, limit=10) != first


def test_a_tag_gives_its_tasks_and_acc_comes_first(lm_eval, atlas, own_tasks):
    folder = own_tasks(one=f"tag: both\n{DATA}", two=f"tag: both\n{DATA}")
    tasks = harness.check_tasks(["both", "atlas_facts"], include_path=folder)
    assert tasks.metrics == dict.fromkeys(("one", "two", "atlas_facts"), "acc")
    scores = harness.evaluate(*atlas, tasks, limit=5)
    assert list(scores) == ["one", "two", "atlas_facts"] and len(set(scores.values())) == 1


def test_a_group_has_one_score(lm_eval, atlas, own_tasks):
    folder = own_tasks(one=DATA, two=DATA)
    (folder / "group.yaml").write_text(
        "group: pair\ntask: [one, two]\naggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    assert list(harness.evaluate(*atlas, ["pair"], limit=3, include_path=folder)) == ["pair"]


@pytest.mark.parametrize(
    "entry, score",
    [
        ({"alias": "x", "acc_norm,none": 0.1, "acc,none": 0.2, "acc_stderr,none": 0.3}, 0.2),
        ({"exact_match,strict": 0.4, "exact_match,flexible": 0.6, "exact_match_stderr,strict": 0.1}, 0.4),
        ({"acc_norm,none": 0.5, "other,none": 0.6}, 0.5),
        ({"pass@1,create_test": 0.7, "pass@1_stderr,create_test": 0.1}, 0.7),
    ],
)
def test_main_metric(entry, score):
    assert harness._main_score(entry) == score


class Alone(torch.nn.Module):
    """A model that may be asked one text at a time only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        inner.model.register_forward_pre_hook(self._one, with_kwargs=True)

    def _one(self, _module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        assert len(ids) == 1, "several texts at once"


def test_an_editor_that_decides_text_by_text_is_asked_one_text_at_a_time(lm_eval, atlas):
    model, tok = atlas
    tasks = harness.check_tasks(["atlas_exercises", "atlas_facts"])
    together = harness.evaluate(model, tok, tasks, limit=8)
    assert harness.evaluate(Alone(model), tok, tasks, limit=8) == together
    with pytest.raises(AssertionError, match="several texts"):
        harness.evaluate(model, tok, tasks, limit=8)
