"""Edit all, score all at checkpoints; segments that are taken up again."""

import dataclasses
import json
from itertools import accumulate
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from easyedit_nmke import LifelongEditor, NMKEHyperParams, files
from easyedit_nmke import atlas as embedded
from easyedit_nmke.experiments import protocol
from easyedit_nmke.experiments.protocol import Progress, Result, Scorer, Segment, hparams_differ
from easyedit_nmke.methods import read
from easyedit_nmke.methods.solver import NullSpaceSolver
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import generation, metrics, table
from easyedit_nmke.scores.drift import weight_drift


@pytest.fixture
def begin(tiny, nmke_hparams, requests):
    """begin(kind="llama", edits=4, **overrides) -> a segment on a fresh model."""

    def make(kind="llama", edits=4, **overrides):
        model, tok = tiny(kind)
        editor = LifelongEditor.from_hparams(nmke_hparams(model, tok, v_num_grad_steps=2, **overrides))
        asked = [Request.from_dict(r) for r in requests(edits)]
        with editor.state.as_of(0):
            scorer = Scorer(model, tok, asked, [("copy a b :", "a b")])
            return Segment(editor, scorer, "NMKE", 0, protocol.stamp(editor, {"name": "x"}))

    return make


def lines_of(events) -> list[dict]:
    return [event.line for event in events if isinstance(event, Result)]


def counts_of(events) -> list[int]:
    """How many edits are done, after each of the events that tell of some."""
    return list(accumulate(event.more for event in events if isinstance(event, Progress)))


def weights_of(segment):
    return {name: weight.detach().clone() for name, weight in segment.weights.items()}


def test_every_score_is_taken_after_the_last_edit_against_the_unedited_model(begin):
    segment = begin()
    editor, asked = segment.editor, segment.scorer.requests
    before = metrics.quality(editor.model, editor.tok, asked)
    log_probs = [generation.target_log_probs(editor.model, editor.tok, [(r.prompt, r.target_new)])[0] for r in asked]
    *events, last = segment.run([4])
    line = last.line
    assert counts_of(events) == [0, 1, 2, 3, 4] and line["checkpoint"] == 4 and line["method"] == "NMKE"
    after = metrics.quality(editor.model, editor.tok, asked)
    scores = line["scores"]
    assert {name: scores[name] for name in metrics.summary(before, after)} == metrics.summary(before, after)
    assert scores["neighborhood"] == metrics.by_kind(before, after)["neighborhood"]
    assert scores["general"] == fmean(metrics.exact_match(editor.model, editor.tok, [("copy a b :", "a b")]))
    new = generation.target_log_probs(editor.model, editor.tok, [(r.prompt, r.target_new) for r in asked])
    old = generation.target_log_probs(editor.model, editor.tok, [(r.prompt, r.ground_truth) for r in asked])
    assert scores["rel_preferred"] == fmean(n > o for n, o in zip(new, old, strict=True)) and new != log_probs
    texts = generation.greedy_texts(editor.model, editor.tok, [r.rephrase_prompt for r in asked])
    assert scores["gen_exact"] == fmean(generation.says(t, r.target_new)[0] for t, r in zip(texts, asked, strict=True))
    assert scores["immediate"] == fmean(segment.immediate) and len(line["retention"]["rel"]) == 10
    assert set(line["seconds"]) == {"values", "attribution", "keys", "solve", "apply", "total"}
    assert line["seconds"]["total"] >= sum(v for name, v in line["seconds"].items() if name != "total")
    told = line["records"]
    assert all(len(values) == 4 and fmean(values) == pytest.approx(scores[name], abs=1e-4) for name, values in told.items())
    assert set(told) == {"rel", "gen", "loc", "rel_natural_contains", "gen_natural_contains"}
    assert told["loc"] == [round(metrics.summary([b], [a])["loc"], 4) for b, a in zip(before, after, strict=True)]
    densities = [report.density[1] for report in editor.state.reports]
    assert line["mask"]["density"]["1"] == pytest.approx(fmean(densities)) and line["peak_memory_mb"]["edit"] > 0
    json.dumps(line)


def test_every_score_names_its_protocol_beside_it(begin):
    segment = begin(edits=2)
    unedited = segment.scorer.unedited(segment.editor.model, segment.editor.tok)
    meta = table.metric_meta(unedited)
    assert meta.keys() == unedited.keys() and {entry["taken"] for entry in meta.values()} == {"before_any_edit"}
    (line,) = lines_of(segment.run([2]))
    meta = line["metric_meta"]
    assert meta.keys() == line["scores"].keys()
    assert meta["rel"] == {
        "protocol": "decoder_only_teacher_forcing", "scorer": "token_accuracy", "taken": "after_all_edits",
        "comparable_group": "decoder_only_teacher_forcing.token_accuracy.after_all_edits",
    }  # fmt: skip
    assert meta["gen_exact"]["comparable_group"] == "free_generation.exact_match.after_all_edits"
    assert meta["immediate"]["taken"] == "after_each_edit"
    assert table.metric_meta({"tasks.x": 1, "tasks.x.norm": 1, "near": 1}, 1)["near"]["protocol"] == "pre_post_argmax_token_match"
    assert all("own" not in (row.protocol, row.scorer) for row in table.OWN.values())
    edits = segment.edits()
    told = table.edit_meta(edits)
    assert told["pre"]["rewrite_acc"]["taken"] == "before_any_edit" and told["post"]["locality"]["taken"] == "after_all_edits"


def test_costs_are_counted_where_they_are_caused_and_survive_a_stop(begin, tmp_path, nmke_hparams, tiny):
    kept = str(tmp_path / "state")
    first = begin(state_dir=kept, value_norm="nas", nas_pilot=4)
    for event in first.run([2, 4]):
        if isinstance(event, Progress) and len(first.immediate) == 3:
            break
    spent = {report.seconds["values"] for report in first.editor.state.reports}
    startup = dict(first.editor.state.startup)
    assert set(startup) == {"templates", "covariance", "null space", "pilot", "solvers"} and min(startup.values()) > 0
    first.editor.close()
    again = begin(state_dir=kept, value_norm="nas", nas_pilot=4)
    line = lines_of(again.run([2, 4]))[-1]
    assert line["startup_seconds"] == startup
    assert spent < {report.seconds["values"] for report in again.editor.state.reports}
    assert line["seconds"]["values"] == pytest.approx(sum(r.seconds["values"] for r in again.editor.state.reports))
    edits = list(again.editor.state.log)
    held = sum(t.nbytes for edit in edits for update in edit.updates for t in (update.left, update.right))
    held += sum(t.nbytes for edit in edits for t in (*edit.keys.values(), *edit.masks.values(), edit.z))
    assert line["kept_bytes"] == held > 0
    again.editor.close()
    # another process that finds covariance and pilot in the cache was spared the work, and knows what it was
    (line,) = lines_of(begin(edits=1, value_norm="nas", nas_pilot=4).run([1]))
    told = line["startup_seconds"]
    assert all(told[name] == startup[name] for name in ("covariance", "null space", "pilot"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_drift_is_of_the_output_projection_since_the_first_edit(begin, kind):
    segment = begin(kind, edits=2)
    start = {layer: segment.editor.model.get_submodule(name).weight.detach().clone() for layer, name in _downs(kind).items()}
    (line,) = lines_of(segment.run([2]))
    for layer, name in _downs(kind).items():
        now = segment.editor.model.get_submodule(name).weight.detach()
        pair = (start[layer].T, now.T) if kind == "gpt2" else (start[layer], now)
        assert line["drift"][str(layer)] == weight_drift(*pair) and line["drift"][str(layer)]["frobenius"] > 0


def _downs(kind):
    return {i: f"transformer.h.{i}.mlp.c_proj" if kind == "gpt2" else f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_the_unedited_model_scores_itself(begin):
    segment = begin()
    scores = segment.scorer.unedited(segment.editor.model, segment.editor.tok)
    assert scores["loc"] == scores["same_subject"] == 1.0 and scores["rel"] < 0.5


@pytest.mark.parametrize("solve", ["full", "restricted"])
@pytest.mark.parametrize("stop", [1, 2, 3], ids=["between", "before a score", "after a score"])
def test_a_stopped_segment_goes_on_from_its_last_edit_bit_for_bit(begin, tmp_path, solve, stop):
    whole = begin(solve=solve)
    expected = lines_of(whole.run([2, 4]))
    kept = str(tmp_path / "state")
    first = begin(solve=solve, state_dir=kept)
    stopped = first.run([2, 4])
    for event in stopped:
        if isinstance(event, Progress) and len(first.immediate) == stop:
            break
    stopped.close()
    first.editor.close()
    again = begin(solve=solve, state_dir=kept)
    events = list(again.run([2, 4]))
    assert counts_of(events) == list(range(stop, 5))
    lines = lines_of(events)
    assert len(lines) == 2
    for found, line in zip(lines, expected, strict=True):
        assert all(found[name] == line[name] for name in ("scores", "drift", "mask", "retention"))
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, weights_of(whole)[name])
    again.editor.close()
    last = begin(solve=solve, state_dir=kept)
    assert lines_of(last.run([2, 4])) == lines  # a finished one only tells its lines
    last.editor.close()


def test_a_segment_of_other_settings_is_not_taken_up(begin, tmp_path):
    first = begin(state_dir=str(tmp_path / "state"))
    next(first.run([4]))
    first.editor.close()
    with pytest.raises(ValueError, match=r"other hyperparameters \(L2 0.1 -> 0.2\)"):
        begin(state_dir=str(tmp_path / "state"), L2=0.2)
    again = begin(state_dir=str(tmp_path / "state"))
    with pytest.raises(ValueError, match=r"begun with other settings \(data .*'x'.*'y'"):
        Segment(again.editor, again.scorer, "NMKE", 0, {**again.stamp, "data": {"name": "y"}})
    again.editor.close()


@pytest.mark.parametrize("error", [FloatingPointError, torch.linalg.LinAlgError])
def test_edits_of_a_worn_out_model_that_cannot_be_written_are_listed_and_change_nothing(begin, tmp_path, monkeypatch, error):
    """The second layer of the second edit fails, when the first layer is written already."""
    solve, calls = NullSpaceSolver.directions, []

    def directions(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise error("the matrix is not positive definite")
        return solve(self, *args)

    monkeypatch.setattr(NullSpaceSolver, "directions", directions)
    segment = begin(edits=3, state_dir=str(tmp_path / "state"))
    lines, before = [], None
    for event in segment.run([1, 2, 3]):
        if isinstance(event, Result):
            lines.append(event.line)
            before = before or weights_of(segment)
        elif len(segment.immediate) == 2:
            assert all(torch.equal(weight, before[name]) for name, weight in weights_of(segment).items())
            assert segment.editor.state.edits == 1
    assert [line["failed"] for line in lines] == [[], [2], [2]] and list(map(protocol.failed_edits, lines)) == [0, 1, 1]
    assert segment.editor.state.edits == 2 and len(segment.immediate) == 3
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(segment).items())
    segment.editor.close()
    again = begin(edits=3, state_dir=str(tmp_path / "state"))
    assert again.failed == [2] and again.lines == lines
    again.editor.close()


def test_bad_input_still_ends_a_run(begin, monkeypatch):
    segment = begin(edits=2)
    monkeypatch.setattr(
        NullSpaceSolver, "directions", lambda *_: (_ for _ in ()).throw(ValueError("keys are [3], expected [F, K]"))
    )
    with pytest.raises(ValueError, match="keys are"):
        list(segment.run([2]))
    assert not segment.failed


def test_every_score_has_its_row(begin):
    (line,) = lines_of(begin(edits=2).run([2]))
    assert set(line["scores"]) <= set(table.OWN)


def test_batches_do_not_run_over_a_checkpoint(begin):
    segment = begin(batch_size=3)
    assert counts_of(segment.run([2, 4])) == [0, 2, 4]
    assert segment.editor.state.edits == 2 and [report.requests for report in segment.editor.state.reports] == [2, 2]


def test_stamps_differ_by_what_results_depend_on(begin):
    one, other = begin(), begin(L2=0.2)
    first = one.stamp
    assert protocol.settings_differ(first, {**first, "command": "other", "device": "cuda"}) == []
    assert protocol.settings_differ(first, other.stamp) == ["L2 0.1 -> 0.2"]
    one.editor.apply([one.scorer.requests[0]])
    assert protocol.settings_differ(first, protocol.stamp(one.editor, {"name": "x"}))[0].startswith("model ")
    assert first["versions"]["torch"] and first["data"] == {"name": "x"} and first["hparams"]["layers"] == [0, 1]


def test_saved_weights_and_files_that_are_whole_or_not_there(begin, tmp_path):
    segment = begin(edits=1)
    list(segment.run([1]))
    protocol.save_edited(segment.editor, tmp_path / "w.safetensors")
    stored = load_file(tmp_path / "w.safetensors")
    assert len(stored) == 2
    for name, tensor in stored.items():
        assert torch.equal(tensor, segment.editor.model.get_parameter(name))
    path = tmp_path / "sub" / "result.json"
    files.write_json(path, "old")
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == "old" and list(path.parent.iterdir()) == [path]


def test_atlas_takes_new_answers_and_keeps_the_rest(atlas, tmp_path):
    """A handful of real edits: the point of it all."""
    settings = dataclasses.replace(NMKEHyperParams.from_hparams("atlas"), model_name=atlas, stats_dir=str(tmp_path))
    editor = LifelongEditor.from_hparams(settings)
    scorer = Scorer(*atlas, [Request.from_dict(r) for r in embedded.requests(8, "tune")], embedded.exercises(60))
    before = scorer.unedited(*atlas)
    assert before["general"] > 0.8 and before["rel_exact"] == 0
    (line,) = lines_of(Segment(editor, scorer, "NMKE", 0, protocol.stamp(editor)).run([8]))
    scores = line["scores"]
    assert scores["rel"] >= 0.75 and scores["gen"] >= 0.6 and scores["loc"] >= 0.9
    assert scores["rel_exact"] >= 0.75 and scores["rel_contains"] >= scores["rel_exact"] and scores["rel_preferred"] >= 0.75


def test_a_setting_that_a_stored_line_lacks_had_its_default():
    now = read("NMKE/atlas").to_dict()
    then = {name: value for name, value in now.items() if name not in ("use_chat_template", "target_separator")}
    assert hparams_differ(then, now) == [] and hparams_differ(now, then) == []
    assert hparams_differ(then, {**now, "use_chat_template": True}) == ["use_chat_template False -> True"]


def test_a_target_of_more_than_ten_tokens_can_be_said(tiny, requests, monkeypatch):
    """What is generated is cut where the scorer says, as a model's text is."""
    model, tok = tiny("llama")
    long = "the old town hall of Mara Vosk, beside the great river, under seven very tall trees"
    asked = [dataclasses.replace(Request.from_dict(r), target_new=long) for r in requests(2)]

    def said(model, tok, prompts, new_tokens=10, *_, **__):
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        ids = tok(f" {long}. It is said")["input_ids"]
        return [ids[: count + 1] for count in counts]

    monkeypatch.setattr(generation, "greedy_ids", said)
    scores = Scorer(model, tok, asked).unedited(model, tok)
    names = ("rel_exact", "rel_contains", "gen_exact", "gen_contains")
    assert [scores[name] for name in names] == [1.0] * 4


@pytest.mark.parametrize("known", [True, False])
def test_a_prompt_that_nearly_fills_the_context_is_scored(tiny, requests, known):
    model, tok = tiny("llama")
    (asked,) = (Request.from_dict(r) for r in requests(1))
    asked = dataclasses.replace(asked, locality={}, portability={}, ground_truth=asked.ground_truth if known else None)
    pairs = [(prompt, asked.target_new) for prompt in (asked.prompt, *asked.rephrase_prompts)]
    longest = max(len(tok(" ".join(pair))["input_ids"]) for pair in pairs)
    model.config.max_position_embeddings = longest + 1
    scores = Scorer(model, tok, [asked], text="a b c").unedited(model, tok)
    assert None not in [scores[name] for name in ("rel_contains", "gen_contains", "fluency")]
    assert (scores["gen_preferred"] is None) is not known  # what it says to its prompt has no room behind the paraphrase
