"""Kept text: the divergence from the unedited model and the perplexity, against full logits in float64."""

import math

import pytest
import torch
from conftest import TINY

from easyedit_nmke import atlas as embedded
from easyedit_nmke import facts
from easyedit_nmke.models.prompts import encode
from easyedit_nmke.scores import kept
from easyedit_nmke.scores.kept import KeptText

TEXT = " ".join(kept.own_text().split()[:150])


def windows(tok, context):
    """The text's windows as they are documented."""
    front = encode(tok, "")
    ids, step = encode(tok, TEXT)[len(front) :], min(kept.WINDOW, context) - len(front)
    return [front + ids[i : i + step] for i in range(0, len(ids), step)]


def log_probs(model, tok):
    """[tokens, V] of the whole text in float64, and the tokens."""
    found, labels = [], []
    for ids in windows(tok, model.config.max_position_embeddings):
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1))
        labels += ids[1:]
    return torch.cat(found), torch.tensor(labels)


def expected(before, after, labels):
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    return {"kept_kl": kl, "perplexity": math.exp(-after[range(len(labels)), labels].mean())}


def damage(model, scale=0.03):
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "mlp" in name and name.endswith("weight"):
            weight.data += scale * torch.randn(weight.shape, generator=generator).to(weight)


class Wrapped(torch.nn.Module):
    """A forward pass and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.editor = model

    @property
    def config(self):
        return self.editor.config

    def forward(self, input_ids, attention_mask=None):
        return self.editor(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("kind", TINY)
def test_both_numbers_are_those_of_full_logits_in_float64(kind, tiny):
    model, tok = tiny(kind)
    text, (before, labels) = KeptText(model, tok, TEXT), log_probs(model, tok)
    assert text.score(model, tok)["kept_kl"] == 0.0
    damage(model)
    after, _ = log_probs(model, tok)
    wanted = expected(before, after, labels)
    found = text.score(model, tok)
    assert wanted["kept_kl"] > 1e-3 and found == pytest.approx(wanted, rel=1e-4)
    assert text.score(Wrapped(model), tok) == pytest.approx(wanted, rel=1e-4)


def reversed_divergence(before, after):
    return (after.exp() * (after - before)).sum(-1)


def padded_windows(*args, found=kept._windows):
    rows, start = found(*args)
    return [row + [2] * (max(map(len, rows)) - len(row)) for row in rows], start


@pytest.mark.parametrize(
    "name, bug",
    [
        ("divergence", lambda before, after: (after.exp() * (after - before)).sum(-1)),
        ("divergence", lambda before, after: (before.exp() * (before - after)).mean(-1)),
        ("divergence", lambda before, after: (before.exp() - after.exp()).abs().sum(-1)),
        ("_windows", padded_windows),
        ("softcapped", lambda logits, softcap: logits),
    ],
    ids=["the other way round", "mean over words", "total variation", "padding counted", "no softcap"],
)
def test_a_planted_error_is_found(name, bug, tiny, monkeypatch):
    model, tok = tiny("gemma2")
    before, labels = log_probs(model, tok)
    monkeypatch.setattr(kept, name, bug)
    text = KeptText(model, tok, TEXT)
    model.model.norm.weight.data += 1.0  # surer of everything: the two directions differ
    wanted = expected(before, log_probs(model, tok)[0], labels)
    assert text.score(model, tok)["kept_kl"] != pytest.approx(wanted["kept_kl"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_unedited_model_of_any_dtype_is_as_it_was(dtype, tiny):
    model, tok = tiny("llama")
    plain = KeptText(model, tok, TEXT).score(model, tok)
    model.to(dtype)
    text = KeptText(model, tok, TEXT)
    found = text.score(model, tok)
    assert found["kept_kl"] == 0.0 and found["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    damage(model)
    assert text.score(model, tok)["kept_kl"] > 1e-3


def test_the_embedded_model_knows_its_own_text_and_not_the_packages(atlas):
    known, real = KeptText(*atlas, embedded.text()[:3000]), KeptText(*atlas, TEXT)
    scores = known.score(*atlas)
    assert scores["kept_kl"] == 0.0 and scores["perplexity"] < 10 < real.score(*atlas)["perplexity"]
    damage(atlas[0], 0.01)
    worse = known.score(*atlas)
    assert worse["perplexity"] > scores["perplexity"] and 0 < worse["kept_kl"] < 0.2


def test_logits_never_exist_for_more_than_a_window_and_the_model_is_left_as_it_was(atlas, monkeypatch):
    model, tok = atlas
    model.train()
    model.model.layers[1].eval()
    modes, asked = [module.training for module in model.modules()], []
    model.lm_head.register_forward_hook(lambda _, args, out: asked.append(out.shape[:-1].numel()))
    monkeypatch.setattr(kept, "TOKENS", 600)
    text = KeptText(model, tok)
    assert not asked
    text.score(model, tok)
    assert max(asked) < kept.WINDOW and sum(asked) == 2 * 600 == 2 * sum(map(len, text._states))
    assert [module.training for module in model.modules()] == modes


def test_a_head_that_was_written_to_leaves_no_divergence_and_says_so(tiny, caplog):
    model, tok = tiny("llama")
    text = KeptText(model, tok, TEXT)
    model.get_output_embeddings().weight.data[5, 7] += 0.5
    scores = text.score(model, tok)
    assert scores["kept_kl"] is None and scores["perplexity"] > 1 and "output head was edited" in caplog.text


def test_a_worn_out_model_is_infinitely_far(tiny):
    model, tok = tiny("llama")
    text = KeptText(model, tok, TEXT)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    assert text.score(model, tok) == {"kept_kl": math.inf, "perplexity": math.inf}


def test_what_cannot_be_kept_is_refused(tiny):
    model, tok = tiny("gpt2")
    with pytest.raises(ValueError, match="no token to predict"):
        KeptText(model, tok, "")
    with pytest.raises(ValueError, match="no body and head"):
        KeptText(Wrapped(model), tok)


def test_the_packages_text_is_of_a_size_and_about_nothing_that_is_edited():
    text = kept.own_text()
    assert 1900 < len(text.split()) < 2500
    words = set(text.replace(",", " ").replace(".", " ").split())
    subjects = {record["subject"] for half in ("tune", "test") for record in facts.requests(150, half)}
    assert len(subjects) > 150 and not [s for s in subjects if s in text] and "France" not in words
