import json

import pytest
import torch

from easyedit_nmke import LifelongEditor, NMKEHyperParams
from easyedit_nmke import atlas as embedded
from easyedit_nmke.models.loading import load_model
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import metrics


@pytest.fixture
def editor(tiny, nmke_hparams):
    def make(**overrides):
        model, tok = tiny("llama")
        return LifelongEditor.from_hparams(nmke_hparams(model, tok, **overrides))

    return make


def columns(records):
    names = ("prompt", "target_new", "subject", "ground_truth", "rephrase_prompt")
    prompts, target, subject, truth, rephrase = ([r[name] for r in records] for name in names)
    locality = {"unrelated": {side: [r["locality"]["unrelated"][side][0] for r in records] for side in ("prompt", "ground_truth")}}
    portability = {"following": {"prompt": [None, records[0]["prompt"]], "ground_truth": [None, "Rome"]}}
    return (prompts, target), dict(
        subject=subject,
        ground_truth=truth,
        rephrase_prompts=rephrase,
        locality_inputs=locality,
        portability_inputs=portability,
    )


def test_edit_has_base_editors_call_and_metrics(editor, requests):
    some = editor()
    start = {name: p.detach().clone() for name, p in some.model.named_parameters()}
    args, kwargs = columns(requests(2))
    results, model, originals = some.edit(*args, **kwargs, sequential_edit=True, verbose=False)
    assert model is some.model and [r["case_id"] for r in results] == [0, 1]
    for result in results:
        assert set(result) == {"case_id", "requested_rewrite", "pre", "post", "final", "time"}
        for scores in (result["post"], result["final"]):
            assert set(scores["locality"]) == {"unrelated_output", "unrelated_acc"}
            assert len(scores["rewrite_acc"]) == len(scores["rephrase_acc"]) == 1
    assert results[0]["post"]["portability"] == {} and "following_acc" in results[1]["post"]["portability"]
    json.dumps(results)
    asked = [Request.from_dict(r["requested_rewrite"]) for r in results]
    now = metrics.quality(some.model, some.tok, asked)
    assert [r["final"]["rewrite_acc"] for r in results] == [n["rewrite_acc"] for n in now]
    some.restore(originals)
    assert all(torch.equal(p, start[name]) for name, p in some.model.named_parameters())


def test_without_sequential_edit_nothing_stays(editor, requests):
    some = editor()
    start = {name: p.detach().clone() for name, p in some.model.named_parameters()}
    args, kwargs = columns(requests(2))
    results, _, _ = some.edit(*args, **kwargs, sequential_edit=False, verbose=False)
    assert "final" not in results[0]
    assert all(torch.equal(p, start[name]) for name, p in some.model.named_parameters())
    again, _, _ = some.edit(*args, **kwargs, sequential_edit=False, verbose=False)
    assert [r["post"] for r in results] == [r["post"] for r in again]


def test_batches_share_one_update(editor, requests):
    some = editor(batch_size=3)
    records = requests(4)
    some.edit(None or [], [], subject=[], requests=records, verbose=False)
    assert [report.requests for report in some.state.reports] == [3, 1] and some.state.solvers[0].count == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(subject=None), "needs the subject"),
        (dict(subject=["one"]), "2 prompts but 1 values of subject"),
        (dict(rephrase_prompts=["a", "b", "c"]), "3 values of rephrase_prompt"),
        (dict(locality_inputs={"near": {"prompt": ["a"], "ground_truth": ["b"]}}), "1 prompts and 1 answers, expected 2"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_anything_changes(editor, requests, change, message):
    some = editor()
    args, kwargs = columns(requests(2))
    with pytest.raises(ValueError, match=message):
        some.edit(*args, **{**kwargs, **change})
    assert some._state is None


def test_a_bad_request_late_in_the_list_stops_the_first_from_being_written(editor, requests):
    some = editor()
    start = {name: p.detach().clone() for name, p in some.model.named_parameters()}
    good = requests(3)
    with pytest.raises(ValueError, match="context 128"):
        some.edit([], [], requests=[*good, {**good[0], "prompt": good[0]["prompt"] + " so" * 200}])
    assert all(torch.equal(p, start[name]) for name, p in some.model.named_parameters())


def test_models_are_loaded_by_name_path_or_tuple(tiny, nmke_hparams, tmp_path):
    model, tok = tiny("gpt2")
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    settings = nmke_hparams(model, tok, model_name=str(tmp_path / "m"))
    loaded = LifelongEditor.from_hparams(settings)
    assert torch.equal(loaded.model.transformer.h[0].mlp.c_proj.weight, model.transformer.h[0].mlp.c_proj.weight)
    assert LifelongEditor.from_hparams(nmke_hparams(model, tok)).model is model
    assert LifelongEditor.from_hparams(NMKEHyperParams.from_hparams("atlas")).model.config.hidden_size == 192
    with pytest.raises(ValueError, match="model '/nowhere/at/all' could not be loaded"):
        LifelongEditor.from_hparams(nmke_hparams(model, tok, model_name="/nowhere/at/all"))


def test_a_failure_while_scoring_takes_a_passing_edit_back(editor, requests, monkeypatch):
    some, calls = editor(), []
    start = {name: p.detach().clone() for name, p in some.model.named_parameters()}
    quality = metrics.quality

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quality(*args, **kwargs)

    monkeypatch.setattr(metrics, "quality", fail)
    with pytest.raises(KeyboardInterrupt):
        some.edit([], [], requests=requests(1), sequential_edit=False, verbose=False)
    assert all(torch.equal(p, start[name]) for name, p in some.model.named_parameters())
    assert some.state.edits == 0


def test_restoring_takes_the_past_keys_back_and_every_edit_is_reported(editor, requests):
    some = editor()
    some.edit([], [], requests=requests(2), sequential_edit=False, verbose=False)
    assert some.state.edits == 0 and some.state.solvers[0].count == 0
    for request in requests(3):
        some.apply([request])
    assert len(some.state.reports) == some.state.edits == 3


def test_a_second_editor_of_an_edited_model_keeps_its_past_keys(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    LifelongEditor.from_hparams(nmke_hparams(model, tok)).apply(requests(1))
    second = LifelongEditor.from_hparams(nmke_hparams(model, tok))
    second.apply(requests(2)[1:])
    assert second.state.edits == 2


@pytest.mark.parametrize("section", ["locality_inputs", "portability_inputs"])
def test_probes_without_answers_are_refused(editor, requests, section):
    args, kwargs = columns(requests(2))
    with pytest.raises(ValueError, match=f"{section}\\['near'\\] needs 'prompt' and 'ground_truth'"):
        editor().edit(*args, **{**kwargs, section: {"near": {"prompt": ["a", "b"]}}})
    notes = []
    request = Request.from_dict({**requests(1)[0], "locality": {"near": {"prompt": "a"}}}, note=notes.append)
    assert request.locality == {} and notes == ["field 'locality.near' has no answer to 'a'; it is left out"]


def test_a_device_that_is_none_is_refused(nmke_hparams, tiny):
    with pytest.raises(ValueError, match="device is 'gpu', expected a CUDA index"):
        LifelongEditor.from_hparams(nmke_hparams(*tiny("llama"), device="gpu"))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),  # as its file is stored
        ({"dtype": "float16"}, torch.float16),
        ({"fp16": True}, torch.float16),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_named_model_is_loaded_in_the_dtype_asked_for(atlas, settings, dtype, folder):
    name = str(embedded.DIRECTORY) if folder else "atlas"
    model, tok = load_model(NMKEHyperParams([0], name, device="cpu", **settings))
    known, its_tok = atlas
    for (name, weight), expected in zip(model.named_parameters(), known.parameters(), strict=True):
        assert weight.dtype == dtype and torch.equal(weight, expected.to(dtype)), name
    text = "The birthplace of Mara Vosk is Rome."
    assert not model.training and tok(text)["input_ids"] == its_tok(text)["input_ids"]
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (
        its_tok.pad_token_id, its_tok.bos_token_id, its_tok.eos_token_id,
    )  # fmt: skip


def test_a_model_in_hand_keeps_its_dtype(tiny):
    model, tok = tiny("llama")
    loaded, _ = load_model(NMKEHyperParams([0], (model, tok), device="cpu", dtype="bfloat16"))
    assert loaded is model and model.dtype == torch.float32
