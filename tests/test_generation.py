"""Batched greedy texts against one prompt at a time without cache; what texts say; probabilities; fluency in hand-made numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from easyedit_nmke.models.prompts import target_tokens
from easyedit_nmke.scores import generation, metrics
from easyedit_nmke.scores.generation import answer, fluency, greedy_texts, judge, says, target_log_probs

PROMPTS = [
    "The people of Cape Wuzes are citizens of",
    "Lyon",
    "The month of the Cape Wuzes fair is",
    "Count: one two three four five six seven eight nine ten eleven twelve and then, after all of that, we say again",
    "The",
    "Julius Kleklor practises every day on the",
    "The people of Cape Wuzes are citizens of",
]
FAMILIES = ["atlas", "llama", "qwen2", "gpt2", "gptj"]


@pytest.fixture
def known(atlas, tiny):
    def make(family):
        return atlas if family == "atlas" else tiny(family)

    return make


@torch.no_grad()
def plain(model, tok, prompt, new_tokens=10, ends=()):
    """Ids after one prompt: no batch, no padding, no cache, the whole text at every step."""
    ids = tok(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + new_tokens:
        word = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if word in ends:
            break
        ids.append(word)
    return ids[start:]


def texts_of(tok, rows):
    return [tok.decode(ids, skip_special_tokens=True) for ids in rows]


def watched(model):
    """(hook handle, list that the shapes of the body's inputs are put into)."""
    shapes = []

    def remember(_, args, kwargs):
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    hook = getattr(model, "base_model", model).register_forward_pre_hook(remember, with_kwargs=True)
    return hook, shapes


# ---- decoding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_say_what_each_prompt_says_alone(known, family, side):
    model, tok = known(family)
    tok.padding_side = side
    expected = texts_of(tok, [plain(model, tok, p, ends=[tok.eos_token_id]) for p in PROMPTS])
    assert len(set(expected)) == len(set(PROMPTS))
    hook, shapes = watched(model)
    assert greedy_texts(model, tok, PROMPTS) == expected
    hook.remove()
    assert shapes[0][0] == len(PROMPTS) and {width for _, width in shapes[1:]} == {1}, "one batch, and then the cache"
    assert tok.padding_side == side

    tok.padding_side = "left"
    padded = tok(PROMPTS, padding=True, return_tensors="pt")
    seen = model.generate(padded["input_ids"], attention_mask=torch.ones_like(padded["input_ids"]), max_new_tokens=10)
    assert texts_of(tok, seen[:, padded["input_ids"].shape[1] :]) != expected, "padding that is looked at would be noticed"


@pytest.mark.parametrize("budget", [1, 60, 100, 8192])
def test_the_budget_changes_batches_and_nothing_else(tiny, budget):
    model, tok = tiny("gpt2")
    hook, shapes = watched(model)
    found = greedy_texts(model, tok, PROMPTS, 5, budget)
    hook.remove()
    assert found == texts_of(tok, [plain(model, tok, p, 5, [tok.eos_token_id]) for p in PROMPTS])
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    assert all(rows == 1 or rows * (width + 5) <= budget for rows, width in prefills)
    assert len(prefills) == {1: len(PROMPTS), 8192: 1}.get(budget, len(prefills)) and (budget == 8192) == (len(prefills) == 1)


@pytest.mark.parametrize("pad", ["</s>", None])
def test_the_pad_token_does_not_matter(tiny, pad):
    model, tok = tiny("llama")
    expected = greedy_texts(model, tok, PROMPTS)
    tok.pad_token = pad
    assert greedy_texts(model, tok, PROMPTS) == expected and tok.pad_token == pad


@pytest.mark.parametrize("whose", ["tokenizer", "model"])
def test_a_text_ends_at_an_end_token_and_the_others_go_on(tiny, whose):
    model, tok = tiny("llama")
    model.generation_config.eos_token_id = None
    tok.eos_token = None
    free = [plain(model, tok, p) for p in PROMPTS]
    end = free[0][2]
    if whose == "tokenizer":
        tok.eos_token = tok.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = [1, end]
    ends = [end] if whose == "tokenizer" else [1, end]
    expected = [plain(model, tok, p, ends=ends) for p in PROMPTS]
    assert len(expected[0]) <= 2 and max(map(len, expected)) == 10
    assert greedy_texts(model, tok, PROMPTS) == texts_of(tok, expected)


SAMPLING = dict(
    do_sample=True, temperature=5.0, repetition_penalty=30.0, no_repeat_ngram_size=1, top_k=3, num_beams=3, max_length=4,
    suppress_tokens=list(range(100, 600)), renormalize_logits=True,
)  # fmt: skip


def test_sampling_settings_of_the_model_do_not_leak_in(tiny):
    model, tok = tiny("llama")
    expected = greedy_texts(model, tok, PROMPTS)
    own = model.generation_config = GenerationConfig(**SAMPLING, eos_token_id=1)
    ids = tok(PROMPTS[0], return_tensors="pt").input_ids
    leaky = model.generate(ids, generation_config=GenerationConfig(do_sample=False, max_new_tokens=10, num_beams=1, eos_token_id=1))
    assert texts_of(tok, leaky[:, ids.shape[1] :]) != expected[:1], "a clean configuration alone is filled in from the model's"
    assert greedy_texts(model, tok, PROMPTS) == expected
    assert model.generation_config is own and own.repetition_penalty == 30.0
    with pytest.raises(IndexError):
        greedy_texts(model, Fixed(tok, [10**6]), PROMPTS[:1])
    assert model.generation_config is own


class Fixed:
    """A tokenizer that gives ids beyond the model's vocabulary."""

    def __init__(self, tok, ids):
        self.tok, self.ids = tok, ids

    def __call__(self, texts):
        return {"input_ids": [self.ids for _ in texts]}

    def __getattr__(self, name):
        return getattr(self.tok, name)


def test_leaves_the_model_as_it_was(tiny):
    model, tok = tiny("gpt2")  # gpt2 has dropout
    expected = greedy_texts(model, tok, PROMPTS)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert greedy_texts(model, tok, PROMPTS) == expected
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


class Bare(torch.nn.Module):
    """A wrapper with a forward pass alone. Its answer depends on all that is in the batch, padding included, as WISE's does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, SimpleNamespace()
        self.shapes = []

    def forward(self, input_ids, attention_mask, **options):
        self.shapes.append((*input_ids.shape, bool(options.get("use_cache"))))
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        out.logits = out.logits.roll(int(input_ids.sum()) % 7, -1)
        return out


class Generating(Bare):
    """As WISE and GRACE: `generate` is the inner model's."""

    def forward(self, **inputs):
        raise AssertionError("it has a way of its own to generate")

    def generate(self, *args, **options):
        self.shapes.append(tuple(options["input_ids"].shape))
        return self.model.generate(*args, **options)


@torch.no_grad()
def test_a_wrapper_is_given_one_whole_text_at_a_time(tiny):
    model, tok = tiny("llama")
    bare = Bare(model)
    expected = texts_of(tok, [plain(lambda input_ids, **_: bare(input_ids, None), tok, p, 6, [1]) for p in PROMPTS])
    bare.shapes.clear()
    assert greedy_texts(bare, tok, PROMPTS, 6) == expected != greedy_texts(model, tok, PROMPTS, 6)
    assert {rows for rows, *_ in bare.shapes} == {1}
    lengths = sorted(len(tok(p)["input_ids"]) for p in PROMPTS)
    assert [width for _, width, _ in bare.shapes][:6] == list(range(lengths[0], lengths[0] + 6))


def test_a_wrapper_that_can_generate_does(tiny):
    model, tok = tiny("qwen2")
    expected = greedy_texts(model, tok, PROMPTS)
    model.generation_config = GenerationConfig(**SAMPLING, eos_token_id=1)
    own, wrapper = model.generation_config, Generating(model)
    hook, shapes = watched(model)
    assert greedy_texts(wrapper, tok, PROMPTS) == expected
    hook.remove()
    assert sorted(wrapper.shapes) == sorted((1, len(tok(p)["input_ids"])) for p in PROMPTS)
    assert min(width for _, width in shapes) > 1, "no cache: the whole text at every step"
    assert model.generation_config is own


def test_a_peft_model_generates_in_batches_with_its_adapters(tiny):
    peft = pytest.importorskip("peft")
    model, tok = tiny("llama")
    before = greedy_texts(model, tok, PROMPTS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    adapted.eval()
    expected = texts_of(tok, [plain(adapted, tok, p, ends=[1]) for p in PROMPTS])
    hook, shapes = watched(model)
    assert greedy_texts(adapted, tok, PROMPTS) == expected != before
    hook.remove()
    assert shapes[0][0] == len(PROMPTS)


def test_prompts_that_cannot_be_continued(tiny):
    model, tok = tiny("llama")
    assert greedy_texts(model, tok, []) == []
    with pytest.raises(ValueError, match="prompt '' has no token"):
        greedy_texts(model, Fixed(tok, []), [""])
    length = len(tok(PROMPTS[0])["input_ids"])
    message = f"has {length} tokens and 120 new ones, the model's context is 128; ask for fewer"
    with pytest.raises(ValueError, match=message):
        greedy_texts(model, tok, PROMPTS[:1], 120)
    greedy_texts(model, tok, PROMPTS[:1], 128 - length)


# ---- what a text says


@pytest.mark.parametrize(
    "text, expected",
    [
        (" Kenya. The country", "Kenya"),
        ("\n\n Kenya \nThe", "Kenya"),
        ("", ""),
        (".", ""),
        ("New York, of course", "New York, of course"),
    ],
)
def test_the_answer_ends_at_a_full_stop_or_a_line_end(text, expected):
    assert answer(text) == expected


@pytest.mark.parametrize(
    "text, target, exact, contains",
    [
        (" Kenya. The country where", "Kenya", True, True),
        ("kenya", " KENYA.", True, True),
        ("\n'Kenya'!\nNo, France", "Kenya", True, True),
        ("“Straße”", "STRASSE", True, True),
        ("It is Kenya.", "Kenya", False, True),
        ("It is: Kenya, surely", "Kenya", False, True),
        ("Kenya and France", "Kenya", False, True),
        ("Kenyan food.", "Kenya", False, False),
        ("unKenya", "Kenya", False, False),
        ("France. Kenya", "Kenya", False, True),
        ("New\nYork", "New York", False, True),
        ("new   York.", "New York", True, True),
        ("New Yorkers", "New York", False, False),
        ("St. Louis. It", "St. Louis", True, True),
        ("St. Petersburg", "St. Louis", False, False),
        ("C++ of course", "C++", False, True),
        ("C", "C++", False, False),
        ("a.b", "axb", False, False),
        ("axb", "a.b", False, False),
        ("...", "...", True, True),
        ("", "Kenya", False, False),
        # in every script, and with abbreviations
        ("巴黎。法国的首都", "巴黎", True, True),
        ("是巴黎的一部分", "巴黎", False, True),
        ("「巴黎」！是的", "巴黎", True, True),
        ("巴黎，法国", "巴黎", False, True),
        ("首都是Paris的", "Paris", False, True),
        ("1998年", "1998", False, True),
        ("1998年", "199", False, False),
        ("東京です。", "東京", False, True),
        ("ＴＯＫＹＯ。", "Tokyo", True, True),
        ("กรุงเทพมหานคร", "กรุงเทพ", False, True),
        ("서울입니다.", "서울", False, True),
        ("दिल्ली। भारत", "दिल्ली", True, True),
        ("दिल्लीवाला", "दिल्ली", False, False),
        ("दिल्ली।", "दिल", False, False),
        ("القاهرة؟ نعم", "القاهرة", True, True),
        ("لاہور۔ پاکستان", "لاہور", True, True),
        ("Москва. Да", "Москва", True, True),
        ("Московский", "Москов", False, False),
        ("አዲስ አበባ። ነው", "አዲስ አበባ", True, True),
        ("¿París? Sí", "París", True, True),
        ("Pari\u0301s.", "París", True, True),
        ("„Wien“. Ja", "Wien", True, True),
        ("Kenya! The", "Kenya", True, True),
        ("St. Helier. It is", "St. Helier", True, True),
        ("St. Helier, Jersey", "St. Helier", False, True),
        ("the U.S. It", "U.S.", False, True),
        ("U.S. It is", "U.S.", True, True),
        ("U.S.A. It is", "U.S.", False, True),
        ("3.5 percent", "3", False, True),
        ("3.5. It", "3.5", True, True),
        ("3. It", "3", True, True),
    ],
)
def test_says(text, target, exact, contains):
    assert says(text, target) == (exact, contains)


@given(
    st.lists(st.sampled_from(["Kenya", "kenya", "New", "York", "new", ",", ".", "\n", " ", "  ", "'", "!"]), max_size=7).map(
        "".join
    ),
    st.sampled_from(["Kenya", "New York", "York!", "'new'"]),
)
def test_exact_is_the_answer_and_exact_contains(text, target):
    """Against a comparison of words alone; none of these targets has a full stop inside."""

    def words(text):
        return [word for word in "".join(c if c.isalnum() else " " for c in text.casefold()).split()]

    given_answer = answer(text)
    exact, contains = says(text, target)
    if exact:
        assert words(given_answer) == words(target) and contains
    if words(given_answer) == words(target) and not any(mark in given_answer.strip(" ,'!") for mark in ",'!"):
        assert exact
    if contains:
        said, wanted = words(text), words(target)
        assert any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


def test_an_empty_target_is_an_error():
    with pytest.raises(ValueError, match="target ' ' has no text"):
        says("Kenya", " ")
    for truths in (["Kenya", ""], []):
        with pytest.raises(ValueError, match="has no text"):
            says("Kenya", truths)


def test_any_of_several_truths_counts():
    assert says("The U.K.", ["Britain", "U.K."]) == (False, True)
    assert says("Britain. It", ("U.K.", "Britain")) == (True, True)
    assert says("Britain. It", ["France"]) == (False, False)
    assert says("Britain, of course. France", ["Britain.", "France"]) == (False, True)


@pytest.mark.parametrize(
    "text, truths, expected",
    [
        ("St. Helier. It is", "St. Helier", "St. Helier"),
        ("St. Peter Port. It is", "St. Helier", "St. Peter Port"),
        ("J. R. Smith. He", (), "J. R. Smith"),
        ("Rome! And", (), "Rome"),
        ("巴黎。法国", (), "巴黎"),
        ("Washington D.C. It", ["Washington D.C."], "Washington D.C"),
        ("Bay. St. Louis.", ["St. Louis"], "Bay"),
        ("about 3.5 percent. It", (), "about 3.5 percent"),
    ],
)
def test_the_answer_shown_is_the_one_that_is_judged(text, truths, expected):
    assert answer(text, truths) == expected


class Speaker(torch.nn.Module):
    """Says after each prompt what it is told to, token by token, and an end token after that."""

    def __init__(self, tok, said):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.zeros(1)), SimpleNamespace()
        self.rows = [tok(prompt)["input_ids"] for prompt in said]
        self.texts = [tok(f"{prompt} {text}")["input_ids"] for prompt, text in said.items()]
        self.size, self.end, self.asked = len(tok), tok.eos_token_id, []

    def forward(self, input_ids, attention_mask):
        ids = input_ids[0].tolist()
        self.asked.append(len(ids))
        number = next(i for i, row in enumerate(self.rows) if ids[: len(row)] == row)
        rest = self.texts[number][len(ids) :]
        return torch.nn.functional.one_hot(torch.tensor([[rest[0] if rest else self.end]]), self.size).float()


LONG = "the old town hall of Mara Vosk, beside the great river, under seven very tall trees"
SAID = {"Lyon": f"{LONG}. It is", "The month of": "Kenya. It", "The people of Cape": f"{LONG}, and St. Helier"}


def test_a_target_of_any_length_can_be_right(tiny):
    _, tok = tiny("llama")
    length = len(tok(LONG)["input_ids"])
    assert length > 20 and not says(greedy_texts(Speaker(tok, SAID), tok, ["Lyon"])[0], LONG)[1], "ten tokens are too few"
    model = Speaker(tok, SAID)
    found = judge(model, tok, [("Lyon", LONG), ("The month of", ["Rome", "Kenya"]), ("The people of Cape", LONG)])
    assert [(v.exact, v.contains) for v in found] == [(True, True), (True, True), (False, True)]
    assert [v.answer for v in found][:2] == [LONG, "Kenya"] and found[2].text.startswith(f" {LONG}, and")
    longest = {prompt: len(tok(prompt)["input_ids"]) for prompt in SAID}
    assert max(model.asked) <= max(longest.values()) + length + 2


def test_different_lengths_share_batches_and_say_what_each_says_alone(tiny):
    model, tok = tiny("gpt2")
    counts = [3, 12, 3, 12, 7, 3, 12]
    alone = [greedy_texts(model, tok, [prompt], count)[0] for prompt, count in zip(PROMPTS, counts, strict=True)]
    hook, shapes = watched(model)
    assert greedy_texts(model, tok, PROMPTS, counts) == alone
    hook.remove()
    assert [rows for rows, width in shapes if width > 1] == [3, 1, 3]


def test_the_judge_allows_ten_tokens_and_more_for_a_long_target(tiny, monkeypatch):
    model, tok = tiny("gpt2")
    asked, said = [], generation.greedy_ids

    def spy(model, tok, prompts, counts, *rest):
        asked.extend(counts)
        return said(model, tok, prompts, counts, *rest)

    monkeypatch.setattr(generation, "greedy_ids", spy)
    length = len(target_tokens(tok, "Lyon", LONG))
    near = "a" + " a" * (128 - length - len(tok("a")["input_ids"]))
    while len(tok(f"{near} {LONG}")["input_ids"]) > 128:
        near = near.removesuffix(" a")
    pairs = [("Lyon", "Kenya"), ("Lyon", ["Kenya", LONG]), (near, LONG), (near, "Kenya")]
    verdicts = judge(model, tok, pairs)
    room = 128 - len(tok(near)["input_ids"])
    assert asked == [10, length + 2, room, 10] and length <= room < length + 2
    assert verdicts[0].text == tok.decode(said(model, tok, ["Lyon"])[0])
    with pytest.raises(ValueError, match="ask for fewer"):
        judge(model, tok, [(f"{near} a a a", LONG)])


# ---- probabilities


PAIRS = [
    (prompt, target)
    for prompt, target in zip(PROMPTS, ["Kenya", "a", "the end of all", "no", "x y z", "piano", "Italy"], strict=True)
]


@torch.no_grad()
def log_prob(model, tok, prompt, target):
    start, ids = len(tok(prompt)["input_ids"]), tok(f"{prompt} {target}")["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    picked = torch.log_softmax(logits, -1)[range(start - 1, len(ids) - 1), ids[start:]]
    return picked.mean().item()


@pytest.mark.parametrize("budget", [1, 60, 8192])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_one_plain_pass(known, family, budget):
    model, tok = known(family)
    expected = [log_prob(model, tok, *pair) for pair in PAIRS]
    assert len({len(labels) for _, labels in metrics.predicted_tokens(model, tok, PAIRS)}) > 2
    assert target_log_probs(model, tok, PAIRS, budget) == pytest.approx(expected, abs=2e-5)
    shifted = [log_prob(model, tok, p, t + " is") for p, t in PAIRS]
    assert max(abs(a - b) for a, b in zip(expected, shifted, strict=True)) > 0.1
    assert target_log_probs(model, tok, []) == []


def test_logits_exist_at_few_targets_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(metrics, "HEAD_ROWS", 4)
    model, tok = tiny("llama")
    expected, seen = [log_prob(model, tok, *pair) for pair in PAIRS], []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    assert target_log_probs(model, tok, PAIRS) == pytest.approx(expected, abs=2e-5)
    hook.remove()
    assert max(rows for rows, *_ in seen) == 4 and all(len(shape) == 2 for shape in seen)


def test_log_probabilities_of_half_precision_weights_are_taken_in_single(tiny):
    model, tok = tiny("llama")
    model = model.bfloat16()
    assert target_log_probs(model, tok, PAIRS, 1) == pytest.approx([log_prob(model, tok, *pair) for pair in PAIRS], abs=1e-4)


def test_capped_logits_are_capped(tiny):
    _, tok = tiny("llama")
    config = AutoConfig.for_model(
        "gemma2", vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = [log_prob(model, tok, *pair) for pair in PAIRS]
    assert target_log_probs(model, tok, PAIRS) == pytest.approx(expected, abs=2e-5)
    model.config.final_logit_softcapping = None
    assert target_log_probs(model, tok, PAIRS) != pytest.approx(expected, abs=0.1)


@torch.no_grad()
def test_a_wrapper_is_scored_by_its_own_pass_one_text_at_a_time(tiny):
    model, tok = tiny("llama")
    bare = Bare(model)
    alone = [log_prob(lambda input_ids: bare(input_ids, None), tok, *pair) for pair in PAIRS]
    bare.shapes.clear()
    assert target_log_probs(bare, tok, PAIRS) == pytest.approx(alone, abs=2e-5)
    assert {rows for rows, *_ in bare.shapes} == {1} and len(bare.shapes) == len(PAIRS)
    assert alone != pytest.approx(target_log_probs(model, tok, PAIRS), abs=0.1)


# ---- fluency


@pytest.mark.parametrize(
    "text, two, three",
    [
        ("a b c d e", 2.0, math.log2(3)),
        ("a b a b a", 1.0, 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)),
        ("no no no no no no", 0.0, 0.0),
        ("One, two!", 2 / 2 * math.log2(3), 1.0),
        ("a b", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_fluency_weighs_the_entropies_of_pairs_and_triples(text, two, three):
    assert fluency([text]) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2, abs=1e-12)


def test_fluency_is_a_mean_over_texts():
    assert fluency(["a b c d e", "no no no"]) == pytest.approx(fluency(["a b c d e"]) / 2)
    assert fluency([]) is None
