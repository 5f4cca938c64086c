"""Scores against EasyEdit's own, equal to the last digit: every number of many requests, on several models and tokenizers."""

import copy
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_easyedit as inside
import torch
from test_metrics import byte_bpe, tiny_llama

from easyedit_nmke import atlas as embedded
from easyedit_nmke import data
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import generation, metrics

registering = inside.registering
easyeditor = inside.easyeditor
pytestmark = pytest.mark.easyedit
SOURCES = ["atlas", "counterfact_100", "knowedit_zsre_100", "zsre_100"]
HPARAMS = SimpleNamespace(alg_name="NMKE", max_length=40)  # all that its scorers ask of hyperparameters
MODELS = ["atlas", "llama", "other tokenizer", "eos for padding"]


@pytest.fixture
def scored(atlas, tiny):
    """scored(name) -> (model, tok): the embedded model; a random Llama with its tokenizer; one with a byte-level BPE that puts
    no token in front; one whose tokenizer puts one in front and pads with its end token, on the other side."""

    def make(name):
        if name in ("atlas", "llama"):
            return atlas if name == "atlas" else tiny("llama")
        tok = byte_bpe() if name == "other tokenizer" else byte_bpe(bos=True, pad="<eos>", side="left")
        return tiny_llama(max_position_embeddings=512), tok

    return make


def records(source):
    """EasyEdit request dictionaries: 40 about the embedded model, or the first 20 of a file."""
    if source == "atlas":
        return embedded.requests(40, split="tune")
    requests, _ = data.load(Path(__file__).parent / "data" / f"{source}.json", limit=20)
    assert len(requests) == 20
    return [request.to_dict() for request in requests]


def theirs(easyeditor, model, tok, record):
    """EasyEdit's dictionary."""
    return easyeditor.compute_edit_quality(model, "llama", HPARAMS, tok, record, "cpu")


def numbers(score):
    """Every number of a dictionary, with the place it has there."""
    for key, value in score.items():
        if isinstance(value, dict):
            yield from (((key, *place), number) for place, number in numbers(value))
        else:
            yield from _leaves((key,), value)


def _leaves(place, value):
    if isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _leaves((*place, i), entry)
    else:
        yield place, value


def score_alone(score):
    """A dictionary of EasyEdit's without what it says about its metrics, its numbers as plain ones."""
    kept = {key: value for key, value in score.items() if key in ("rewrite_acc", "rephrase_acc", "locality", "portability")}
    return {place: value.item() if hasattr(value, "item") else value for place, value in numbers(kept)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MODELS)
def test_every_score_is_easyedits_exactly(easyeditor, scored, name, source, record_property):
    model, tok = scored(name)
    found = records(source)
    ours = metrics.quality(model, tok, [Request.from_dict(record) for record in found])
    compared, lengths = 0, set()
    for record, mine in zip(found, ours, strict=True):
        expected = score_alone(theirs(easyeditor, model, tok, record))
        assert dict(numbers(mine)) == expected, record["prompt"]
        compared += len(expected)
        lengths |= {len(outputs) for outputs in mine["locality"].values()}
    record_property("compared_values", compared)
    assert compared > 100 and (max(lengths) > 1) == (source == "knowedit_zsre_100"), "KnowEdit asks several prompts at once"


@pytest.mark.parametrize("name", MODELS)
def test_kept_answers_are_counted_as_easyedit_does(easyeditor, scored, name):
    """Before and after a change of the weights that spoils some of them."""
    (model, tok), found = scored(name), records("knowedit_zsre_100") + records("atlas")
    requests = [Request.from_dict(record) for record in found]
    before = metrics.quality(model, tok, requests)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(torch.rand(len(model.lm_head.weight), 1) + 0.5)
    after = metrics.quality(model, tok, requests)
    finalize = importlib.import_module("easyeditor.editors.editor").finalize_locality_metrics
    seen = {0: 0, 1: 0}
    for record, pre, post in zip(found, before, after, strict=True):
        other = {"pre": copy.deepcopy(pre), "post": copy.deepcopy(post)}
        finalize(other, record, HPARAMS, "llama")
        metrics.add_locality_accuracy(pre, post)
        assert post["locality"] == other["post"]["locality"]
        for values in (v for kind, v in post["locality"].items() if kind.endswith("_acc")):
            seen[0], seen[1] = seen[0] + values.count(0.0), seen[1] + values.count(1.0)
    assert seen[1] and len({value for value in numbers(metrics.by_kind(before, after))}) > 1


# ---- free generation


def wrapper(easyeditor, model, tok, method, edit, steps):
    """(the model inside EasyEdit's WISE or GRACE, after one edit; its hyperparameters)."""
    kind = {"GRACE": easyeditor.GraceHyperParams, "WISE": easyeditor.WISEHyperParams}[method]
    hparams = kind.from_hparams(str(registering.find_easyedit() / "hparams" / method / "llama-7b.yaml"))
    hparams.device, hparams.inner_params, hparams.n_iter = "cpu", ["model.layers[1].mlp.down_proj.weight"], steps
    wrapped, _ = easyeditor.ALG_DICT[method](model, tok, [{**edit, "loc_prompt": "Two and two is four"}], hparams)
    return wrapped, hparams


@pytest.mark.parametrize("method", ["WISE", "GRACE"])
def test_wrappers_go_on_as_easyedit_lets_them(easyeditor, atlas, method, capsys):
    model, tok = atlas
    edits = embedded.requests(8, split="tune")
    unedited = generation.greedy_texts(model, tok, [edit["prompt"] for edit in edits], 6)
    wrapped, _ = wrapper(easyeditor, model, tok, method, edits[0], 20)
    expected = []
    for edit in edits:
        inputs = tok(edit["prompt"], return_tensors="pt")
        ids = wrapped.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=2)
        expected.append(tok.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    found = generation.greedy_texts(wrapped, tok, [edit["prompt"] for edit in edits], 6)
    assert found == expected != unedited


def test_wise_is_scored_as_easyedit_scores_it(easyeditor, atlas, capsys):
    """One text at a time: in a batch WISE would answer all of it from one memory."""
    model, tok = atlas
    edits = embedded.requests(12, split="tune")
    wrapped, hparams = wrapper(easyeditor, model, tok, "WISE", edits[0], 20)
    ours = metrics.quality(wrapped, tok, [Request.from_dict(edit) for edit in edits])
    for edit, mine in zip(edits, ours, strict=True):
        expected = score_alone(easyeditor.compute_edit_quality(wrapped, "llama", hparams, tok, edit, "cpu"))
        assert dict(numbers(mine)) == expected


def test_fluency_is_easyedits(easyeditor, atlas, monkeypatch):
    """On sentences that both split into the same words; its sentence splitter, which needs a download, is left out."""
    model, tok = atlas
    texts = [text.partition(".")[0] for text in embedded.corpus(40)] + ["no no no no yes", "a b", "One, two; and one, two!"]
    texts += [said.replace(".", ",") for said in generation.greedy_texts(model, tok, texts[:10], 60)]
    utils = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    split = functools.partial(utils.nltk.word_tokenize, preserve_line=True)
    monkeypatch.setattr(utils.nltk, "word_tokenize", split)
    texts = [text for text in texts if split(text) == re.findall(r"\w+|[^\w\s]", text)]
    assert len(texts) > 40
    for text in texts:
        assert generation.fluency([text]) == pytest.approx(utils.n_gram_entropy([text]), abs=1e-12)
    assert generation.fluency(texts) == pytest.approx(utils.n_gram_entropy(texts), abs=1e-12)
    assert len({round(generation.fluency([text]), 6) for text in texts}) > 10
