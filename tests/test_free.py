"""Natural stop, and harder readings of edits, against plain loops: one prompt at a time, one token at a time, no cache."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from conftest import TINY
from test_generation import PROMPTS, plain, texts_of

from easyedit_nmke import LifelongEditor
from easyedit_nmke.experiments import protocol
from easyedit_nmke.experiments.protocol import Scorer
from easyedit_nmke.methods.locft import LocFTHyperParams
from easyedit_nmke.models.chat import in_chat
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import free, generation, table
from easyedit_nmke.scores.answers import only
from easyedit_nmke.scores.harder import SENTENCES, Harder, harder, readings


@pytest.fixture
def asked(requests):
    """Requests with two neighbours each, and one of another kind."""
    made = []
    for record in requests(4):
        one = Request.from_dict(record)
        more = (("The people of Cape Wuzes are citizens of", "Kenya"), ("Julius Kleklor practises every day on the", "violin"))
        made.append(replace(one, locality={**one.locality, "neighborhood": (*one.locality["neighborhood"], *more)}))
    return made


def shaken(model, seed):
    """The model with other weights, as an edit leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- natural stop


@pytest.mark.parametrize("text", ["Rome", " rome.", "“Rome”!", "\nROME\n", "Rome ."])
def test_a_text_that_is_only_the_answer(text):
    assert only(text, ["Kenya", "Rome"])


@pytest.mark.parametrize("text", ["", "Rome. It", "Romes", "in Rome", "Rome\nParis", "Rome, Italy", "C"])
def test_a_text_that_is_something_else(text):
    assert not only(text, ["Rome", "C++"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_speaks_until_its_end_token_or_32_tokens(tiny, family):
    model, tok = tiny(family)
    tok.eos_token, model.generation_config.eos_token_id = None, None
    prompts = PROMPTS[:4]
    rows = [plain(model, tok, prompt, 32) for prompt in prompts]
    number, place = next((n, i) for n, row in enumerate(rows) for i in range(11, 32) if row.index(row[i]) == i)
    end = rows[number][place]
    tok.eos_token = tok.convert_ids_to_tokens(end)
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    assert 10 < len(rows[number]) < 32 and max(map(len, rows)) == 32
    texts = texts_of(tok, rows)
    assert generation.natural_texts(model, tok, prompts) == texts
    truths = [(text.strip(),) if i == number else (text.split()[-1],) for i, text in enumerate(texts)]
    asked = [free.Asked(i // 2, prompt, truth) for i, (prompt, truth) in enumerate(zip(prompts, truths, strict=True))]
    scores = free.said(model, tok, "rel", asked)
    exact = [only(text, truth) for text, truth in zip(texts, truths, strict=True)]
    contains = [generation.says(text, truth)[1] for text, truth in zip(texts, truths, strict=True)]
    assert exact[number] and not all(exact) and sum(contains) > 1
    assert scores["rel_natural_exact"] == {i // 2: fmean(exact[i : i + 2]) for i in (0, 2)}
    assert scores["rel_natural_contains"] == {i // 2: fmean(contains[i : i + 2]) for i in (0, 2)}
    assert "rel_judged" not in scores


def test_what_counts_as_the_answer_does_not_depend_on_how_long_the_model_goes_on(tiny):
    model, tok = tiny("gpt2")
    pairs = [(prompt, "Kenya") for prompt in PROMPTS] + [("Lyon", "a very long answer of so many words that ten are too few")]
    short, long = generation.judge(model, tok, pairs), generation.judge(model, tok, pairs, go_on=32)
    assert [verdict[:4] for verdict in long] == [verdict[:4] for verdict in short]
    assert [verdict.whole for verdict in short] == [verdict.text for verdict in short]
    assert all(verdict.whole.startswith(verdict.text) and len(verdict.whole) > len(verdict.text) for verdict in long)


def test_near_the_end_of_its_context_a_model_says_less(tiny):
    model, tok = tiny("gpt2")
    room = TINY["gpt2"]["n_positions"]
    prompt = "a" + " a" * (room - 5)
    (text,) = generation.natural_texts(model, tok, [prompt])
    assert text == tok.decode(plain(model, tok, prompt, room - len(tok(prompt)["input_ids"]), [tok.eos_token_id]))


def test_what_is_kept_of_the_texts_about_other_subjects(tiny, asked):
    model, tok = tiny("llama")
    kinds = [("neighborhood", "unrelated"), ("neighborhood", "unrelated"), ("neighborhood",), ()]
    some = [replace(r, locality={k: r.locality[k] for k in (*kept, "same_subject")}) for r, kept in zip(asked, kinds, strict=True)]
    some = [replace(r, locality={**r.locality, "attribute": r.locality["same_subject"]}) for r in some]  # counts as little
    prompts = [[r.locality[kind][0][0] for kind in kept] for r, kept in zip(some, kinds, strict=True)]

    def said():
        return [texts_of(tok, [plain(model, tok, p, 32, [tok.eos_token_id]) for p in several]) for several in prompts]

    kept = free.Kept(model, tok, some, None)
    before = said()
    assert kept.score(model, tok, 4) == {"loc_natural_exact": 1.0, "loc_natural_contains": 1.0}
    kept.before[0] = before[0][0] = ""  # there the model had said nothing
    kept.before[3] = before[1][1] = f"{said()[1][1].split()[-1]}. And more."
    shown = []

    def judge(items):
        shown.extend(items)
        return [i == 0 for i in range(len(items))]

    shaken(model, 0)
    after = said()
    same = [[only(now, old) for now, old in zip(*texts, strict=True)] for texts in zip(after, before, strict=True)]
    old = [[generation.answer(text) for text in texts] for texts in before]
    holds = [
        [generation.says(n, o)[1] if o else s for n, o, s in zip(*of, strict=True)] for of in zip(after, old, same, strict=True)
    ]
    scores = kept.score(model, tok, 2, judge)
    assert scores["loc_natural_exact"] == fmean(map(fmean, same[:2]))
    assert scores["loc_natural_contains"] == fmean(map(fmean, holds[:2]))
    assert shown == [(prompts[i][k], (old[i][k],), after[i][k]) for i, k in ((0, 1), (1, 0), (1, 1))]
    assert scores["loc_judged"] == fmean([0.5, 0.0]) and not kept.score(model, tok, 0)["loc_natural_exact"]


def test_an_end_token_that_is_learnt_is_where_the_model_stops(tiny, requests):
    """`target_eos`: it is in the stamp, and only with it the model says the new answer and nothing more."""
    asked, found = [Request.from_dict(record) for record in requests(3)], {}
    for learnt in (True, False):
        values = dict(layers=[1], device="cpu", num_steps=40, lr=2e-2, target_eos=learnt)
        editor = LifelongEditor.from_hparams(LocFTHyperParams(model_name=tiny("llama"), **values))
        scorer = Scorer(editor.model, editor.tok, asked)
        editor.apply(asked)
        scores, _ = scorer(editor.model, editor.tok, 3)
        assert protocol.stamp(editor)["hparams"]["target_eos"] is learnt
        found[learnt] = scores["rel_natural_exact"], scores["rel_natural_contains"]
    assert found[True] == (1.0, 1.0) and found[False][0] == 0.0 and found[False][1] > 0.5


# ---- harder readings


@torch.no_grad()
def guesses(model, tok, prompt, target):
    """(top-1 word before each of the target's tokens, those tokens)."""
    start, ids = len(tok(prompt)["input_ids"]), tok(f"{prompt} {target}")["input_ids"]
    said = [int(model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].argmax()) for place in range(start, len(ids))]
    return said, ids[start:]


def share(one, other):
    return fmean(a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_prefix_and_the_edited_sentence_against_plain_loops(tiny, asked, family):
    model, tok = tiny(family)
    both = Harder(model, tok, asked, ("prefix", "overedit"), None)
    behind = []
    for request, again in zip(asked, both.requests, strict=True):
        first = again.prompt.removesuffix(f" {request.prompt}")
        told = [sentence for sentence in SENTENCES if sentence in first]
        assert len(told) == 3 and len(first) == sum(map(len, told)) + 2 and "same_subject" not in again.locality
        sentence = f"{request.prompt} {request.target_new}."
        kinds = [pairs for kind, pairs in request.locality.items() if kind != "same_subject"]
        behind.append([[(f"{sentence} {prompt}", answer) for prompt, answer in pairs] for pairs in kinds])

    def outputs():
        return [[[guesses(model, tok, *pair)[0] for pair in pairs] for pairs in kinds] for kinds in behind]

    before = outputs()
    shaken(model, 1)
    scores, after = both.score(model, tok, 3), outputs()
    rel = [share(*guesses(model, tok, again.prompt, again.target_new)) for again in both.requests[:3]]
    loc = [[fmean(map(share, *kind)) for kind in zip(*kinds, strict=True)] for kinds in zip(before, after, strict=True)]
    assert scores["prefix"] == pytest.approx(fmean(rel)) and scores["overedit"] == pytest.approx(fmean(map(fmean, loc[:3])))
    assert 0 < scores["overedit"] < 1
    texts = [texts_of(tok, [plain(model, tok, r.prompt, 32, [tok.eos_token_id])])[0] for r in both.requests[:3]]
    contains = [generation.says(text, r.target_new)[1] for text, r in zip(texts, asked, strict=False)]
    assert scores["prefix_natural_contains"] == fmean(contains)


def test_readings_are_drawn_by_the_prompt_alone(tiny, asked):
    _, tok = tiny("llama")
    one, *others = (harder(request, ("prefix",), tok) for request in asked)
    assert one == harder(asked[0], ("prefix",), tok) and one.locality == {}
    assert len({other.prompt.removesuffix(r.prompt) for other, r in zip(others, asked[1:], strict=True)}) == 3
    kept = harder(replace(asked[0], target_new="Kenya."), ("overedit",), tok)
    assert kept.prompt == asked[0].prompt and kept.locality["neighborhood"][0][0].startswith(f"{asked[0].prompt} Kenya. ")


def test_in_a_chat_format_the_user_says_it(tiny, asked):
    _, tok = tiny("llama")
    tok.chat_template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}<s>assistant:"
    request = in_chat(tok, asked[0])
    again = harder(request, ("prefix", "overedit"), tok)
    bare = harder(asked[0], ("prefix", "overedit"), tok)
    assert again.prompt == f"<s>user\n{bare.prompt}</s><s>assistant:"
    kinds = ("neighborhood", "unrelated")
    assert [p for kind in kinds for p, _ in again.locality[kind]] == [
        f"<s>user\n{p}</s><s>assistant:" for kind in kinds for p, _ in bare.locality[kind]
    ]
    assert free.plain(tok, request.prompt) == f"user\n{asked[0].prompt}assistant:"


def test_columns_are_there_when_they_are_asked_for(tiny, asked):
    model, tok = tiny("llama")
    optional = {name for name, row in table.OWN.items() if row.asked}

    def columns(**more):
        scores = Scorer(model, tok, asked[:1], **more).unedited(model, tok)
        assert set(scores) <= set(table.OWN)
        return set(scores) & optional

    judged = {"rel_judged", "gen_judged", "loc_judged"}
    prefix = {"prefix", "prefix_exact", "prefix_contains", "prefix_natural_exact", "prefix_natural_contains"}
    judge = lambda items: [True] * len(items)
    assert columns() == set() and columns(judge=judge, also=("overedit",)) == {*judged, "overedit"}
    assert columns(also=("prefix",)) == prefix
    assert columns(judge=judge, also=("prefix", "overedit")) == {*judged, *prefix, "overedit", "prefix_judged"} == optional
    assert set(table.in_shell(optional)) - set(table.in_shell()) == {"rel_judged", "prefix", "overedit"}


def test_a_further_reading_that_there_is_not_is_refused():
    assert readings("") == () and readings("overedit, prefix,overedit") == ("overedit", "prefix")
    with pytest.raises(ValueError, match=r"'prefixes' is no further reading of an edit \(did you mean 'prefix'\?\); known: prefix"):
        readings("prefixes")


def test_a_prompt_that_fits_alone_but_not_behind_others_is_refused_before_any_edit(tiny, asked):
    model, tok = tiny("llama")
    long = replace(asked[0], prompt=asked[0].prompt + " a" * 100)
    Scorer(model, tok, [long])
    with pytest.raises(ValueError, match="the model's context 128"):
        Scorer(model, tok, [long], also=("prefix",))
