"""Batched teacher-forced accuracy against one plain forward pass per pair, and EasyEdit's dictionaries built from it."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import metrics
from easyedit_nmke.scores.metrics import (
    add_locality_accuracy,
    by_kind,
    exact_match,
    predicted_tokens,
    quality,
    retention,
    summary,
    token_accuracy,
)  # fmt: skip

WORDS = "the mother tongue of a small town is known to speak French English Dutch and many rivers run through it"
PAIRS = [
    ("The mother tongue of Danielle Darrieux is", "English"),
    ("Lyon", "Manila"),
    ("a " * 70 + "town is", "known to speak many a tongue and more"),
    ("Where Thomas Joannes Stieltjes is from, people speak the language of", "Dutch and a little Frisian"),
    ("x", "y"),
    ("nq question: who voiced gaston in beauty and the beast 1991", "American actor and singer Richard White"),
    ("Lyon", "Manila"),
]


def byte_bpe(bos=False, eos=False, pad="<pad>", side="right"):
    """A byte-level BPE like GPT-2's and Llama-3's, with the habits named: bos in front, eos behind, its pad token and side."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([WORDS, *(" ".join(pair) for pair in PAIRS)], trainer)
    if bos or eos:
        layout = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
        tok.post_processor = processors.TemplateProcessing(layout, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token=pad, padding_side=side)


def words(count=40):
    """One token per word: what a model predicts can be put back into a target."""
    tok = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok)


def tiny_llama(vocab=320, **changes):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    config = LlamaConfig(vocab_size=vocab, initializer_range=0.3, **{**sizes, **changes})
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocab=320):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocab, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request):
    return request.param()


@torch.no_grad()
def plain(model, tok, prompt, target):
    """One pair, no padding, the model's own logits."""
    start = len(tok(prompt)["input_ids"])
    ids = tok(f"{prompt} {target}")["input_ids"]
    guesses = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    return guesses[start - 1 : -1], ids[start:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", "<bos>", None])
@pytest.mark.parametrize("bos", [False, True])
def test_agrees_with_one_plain_pass_per_pair(model, bos, pad, side):
    tok = byte_bpe(bos=bos, pad=pad, side=side)
    expected = [plain(model, tok, *pair) for pair in PAIRS]
    assert predicted_tokens(model, tok, PAIRS) == expected
    assert len({len(labels) for _, labels in expected}) > 3 and all(labels for _, labels in expected)
    assert tok.padding_side == side and tok.pad_token == pad


@pytest.mark.parametrize("budget", [1, 64, 100, 8192])
def test_the_budget_changes_batches_and_nothing_else(model, budget):
    tok = byte_bpe()
    shapes = []
    watch = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = predicted_tokens(model, tok, PAIRS, budget)
    finally:
        watch.remove()
    assert found == [plain(model, tok, *pair) for pair in PAIRS]
    assert all(rows == 1 or rows * width <= budget for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == len(PAIRS)
    assert len(shapes) == {1: len(PAIRS), 8192: 1}.get(budget, len(shapes))
    assert [width for _, width in shapes] == sorted(width for _, width in shapes)


def test_the_head_sees_label_positions_only_and_few_at_a_time(model, monkeypatch):
    monkeypatch.setattr(metrics, "HEAD_ROWS", 5)
    tok, seen = byte_bpe(), []
    watch = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    try:
        found = predicted_tokens(model, tok, PAIRS)
    finally:
        watch.remove()
    assert sum(shape[0] for shape in seen) == sum(len(labels) for _, labels in found)
    assert max(shape[0] for shape in seen) == 5 and all(len(shape) == 2 for shape in seen)
    assert found == [plain(model, tok, *pair) for pair in PAIRS]


def test_pad_equal_to_eos_does_not_hide_an_eos_in_the_text(model):
    tok = byte_bpe(pad="<eos>")
    pairs = [("first<eos> then", "a town"), ("the town", "is<eos>"), *PAIRS]
    found = predicted_tokens(model, tok, pairs)
    assert found == [plain(model, tok, *pair) for pair in pairs]
    assert found[1][1][-1] == tok.eos_token_id


def test_an_appended_eos_is_no_part_of_the_answer(model):
    open_ended, closed = byte_bpe(bos=True), byte_bpe(bos=True, eos=True)
    assert closed("a town")["input_ids"][-1] == closed.eos_token_id
    assert predicted_tokens(model, closed, PAIRS) == predicted_tokens(model, open_ended, PAIRS)


class Slow:
    """A tokenizer without offsets, tensors or padding: ids for texts and no more."""

    eos_token = eos_token_id = pad_token_id = None

    def __init__(self, tok):
        self.tok = tok

    def __call__(self, texts, padding=False, truncation=False):
        return {"input_ids": [self.tok(text)["input_ids"] for text in texts]}


def test_asks_little_of_the_tokenizer(model):
    tok = byte_bpe()
    assert predicted_tokens(model, Slow(tok), PAIRS) == predicted_tokens(model, tok, PAIRS)


class Wrapper(torch.nn.Module):
    """As EasyEdit's WISE and GRACE: a module around the model with nothing but a forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        return self.model(**inputs)


def test_a_wrapped_model_is_scored_by_its_own_pass(model):
    tok = byte_bpe()
    assert predicted_tokens(Wrapper(model), tok, PAIRS) == predicted_tokens(model, tok, PAIRS)


class Routing(Wrapper):
    """As WISE: all that is in a batch, padding included, decides which weights answer."""

    def forward(self, **inputs):
        return self.model(**inputs).logits.roll(int(inputs["input_ids"].sum()) % 7, -1)  # a tensor, as some wrappers give


def test_a_wrapper_is_given_one_text_at_a_time(model):
    tok = byte_bpe()
    wrapped = Routing(model)
    expected = [answered for pair in PAIRS for answered in predicted_tokens(wrapped, tok, [pair])]
    assert predicted_tokens(wrapped, tok, PAIRS) == expected
    assert expected != predicted_tokens(model, tok, PAIRS)


class Adapted(Wrapper):
    """As a peft model: the plain model, with the adapters in it, comes out of `get_base_model`."""

    def get_base_model(self):
        return self.model

    def forward(self, **inputs):
        raise AssertionError("full logits were asked for")


def test_an_adapted_model_is_scored_without_full_logits(model):
    tok = byte_bpe()
    assert predicted_tokens(Adapted(model), tok, PAIRS) == predicted_tokens(model, tok, PAIRS)


def test_leaves_the_model_as_it_was():
    model, tok = tiny_gpt2(), byte_bpe()  # gpt2 has dropout
    expected = predicted_tokens(model, tok, PAIRS)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert predicted_tokens(model, tok, PAIRS) == expected == predicted_tokens(model, tok, PAIRS)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_scores_without_gradients(model):
    seen = []
    watch = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    try:
        predicted_tokens(model, byte_bpe(), PAIRS)
    finally:
        watch.remove()
    assert seen and not any(seen)


def test_leaves_the_model_as_it_was_after_a_failure():
    model = tiny_llama(vocab=40).train()  # ids beyond its vocabulary
    with pytest.raises(IndexError):
        predicted_tokens(model, byte_bpe(), PAIRS)
    assert model.training and all(module.training for module in model.modules())


def test_nothing_to_score(model):
    assert predicted_tokens(model, byte_bpe(), []) == []
    assert quality(model, byte_bpe(), []) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("", "a town"), "prompt '' has no token"),
        (("a " * 300, "town"), "tokens, the model's context 256"),
    ],
)
def test_pairs_that_cannot_be_scored(model, pair, message):
    with pytest.raises(ValueError, match=message):
        predicted_tokens(model, byte_bpe(), [*PAIRS, pair])


def test_a_target_without_tokens():
    with pytest.raises(ValueError, match="target '' adds no token to the prompt 'w3 w4'"):
        predicted_tokens(tiny_llama(40), words(), [("w3 w4", "")])


# ---- numbers, on a model whose answers are known


def answer(model, tok, prompt, length):
    """The model's greedy continuation, word by word."""
    text = prompt
    for _ in range(length):
        ids = tok(text)["input_ids"]
        text += " w" + str(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return text.removeprefix(prompt).split()


def wrong(word, step=1):
    return f"w{(int(word[1:]) + step) % 40}"


@pytest.fixture(scope="module")
def known():
    """A model with its one-token-per-word tokenizer and its own three-word answers to two prompts."""
    model, tok = tiny_llama(40), words()
    with torch.no_grad():
        return model, tok, {prompt: answer(model, tok, prompt, 3) for prompt in ("w5 w6 w7", "w9")}


def test_accuracy_counts_tokens_and_exact_match_all_of_them(known):
    model, tok, answers = known
    pairs = []
    for prompt, said in answers.items():
        pairs += [(prompt, " ".join(said)), (prompt, " ".join([*said[:2], wrong(said[2])])), (prompt, wrong(said[0]))]
    assert token_accuracy(model, tok, pairs) == [1.0, 2 / 3, 0.0] * 2
    assert token_accuracy(model, tok, pairs, token_budget=1) == [1.0, 2 / 3, 0.0] * 2
    assert exact_match(model, tok, pairs) == [True, False, False] * 2


def test_exact_match_is_greedy_decoding(known):
    model, tok, answers = known
    for prompt, said in answers.items():
        ids = torch.tensor([tok(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)[0, ids.shape[1] :]
        assert [f"w{i}" for i in out.tolist()] == said
        assert exact_match(model, tok, [(prompt, " ".join(said))]) == [True]


def requests_for(answers):
    (long, said), (short, told) = answers.items()
    return [
        Request(
            long, "w6", f"{said[0]} {wrong(said[1])}", rephrase_prompts=short,
            locality={"neighborhood": ((short, "w3"), (long, "w3 w4 w8")), "same_subject": ((short, " ".join(told)),)},
            portability={"one_hop": ((short, " ".join(told)), (short, wrong(told[0])))},
        ),
        Request(short, "w9", told[0]),
    ]  # fmt: skip


def test_quality_has_easyedits_shape(known):
    model, tok, answers = known
    requests = requests_for(answers)
    first, second = quality(model, tok, requests)
    expect = lambda pair: plain(model, tok, *pair)[0]
    locality = requests[0].locality
    assert first["rewrite_acc"][0] >= 0.5 and set(first) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
    assert first["rephrase_acc"] == token_accuracy(model, tok, [(requests[0].rephrase_prompt, requests[0].target_new)])
    assert first["locality"] == {f"{kind}_output": [expect(pair) for pair in pairs] for kind, pairs in locality.items()}
    assert first["portability"] == {"one_hop_acc": [1.0, 0.0]}
    assert second == {"rewrite_acc": [1.0], "locality": {}, "portability": {}}
    assert quality(model, tok, requests, token_budget=1) == [first, second]


def test_locality_accuracy_compares_predictions_and_not_answers():
    before = {"locality": {"near_output": [[1, 2, 3], [4]], "far_output": [[5, 6]]}}
    after = {"locality": {"near_output": [[1, 9, 3], [4]], "far_output": [[6, 5]]}}
    add_locality_accuracy(before, after)
    assert after["locality"]["near_acc"] == [2 / 3, 1.0] and after["locality"]["far_acc"] == [0.0]
    again = copy.deepcopy(after)
    add_locality_accuracy(before, after)
    assert after == again


@pytest.mark.parametrize("earlier", [{}, {"near_output": [[1, 2]]}, {"near_output": [[1], [2, 3]]}])
def test_locality_of_other_prompts_is_an_error(earlier):
    with pytest.raises(ValueError, match="locality type 'near' was scored on other prompts"):
        add_locality_accuracy({"locality": earlier}, {"locality": {"near_output": [[1, 2], [3]]}})


def scores(rewrite, rephrase=None, locality=None, portability=None):
    score = {"rewrite_acc": rewrite, "locality": locality or {}, "portability": portability or {}}
    return score if rephrase is None else {**score, "rephrase_acc": rephrase}


def test_summary_averages_prompts_then_types_then_requests():
    before = [
        scores([0.0], [0.0], {"near_output": [[1], [2], [3], [4]], "far_output": [[5]], "same_subject_output": [[6, 7]]}),
        scores([0.0], None, {"near_output": [[1, 1]]}),
        scores([0.0]),
    ]
    after = [
        scores(
            [0.5], [0.25], {"near_output": [[1], [0], [0], [0]], "far_output": [[5]], "same_subject_output": [[6, 0]]},
            {"hop_acc": [1.0, 0.0], "alias_acc": [0.0]},
        ),
        scores([1.0], None, {"near_output": [[1, 1]]}),
        scores([0.0]),
    ]  # fmt: skip
    found = copy.deepcopy(after)
    assert summary(before, after) == {
        "rel": 0.5,
        "gen": 0.25,
        "loc": ((0.25 + 1.0) / 2 + 1.0) / 2,
        "same_subject": 0.5,
        "portability": 0.25,
    }
    assert after == found


def test_summary_of_little():
    columns = ("gen", "loc", "same_subject", "portability")
    assert summary([scores([0.0])], [scores([1.0])]) == {"rel": 1.0, **dict.fromkeys(columns)}
    assert summary([], []) == dict.fromkeys(("rel", *columns))
    only_own = scores([1.0], None, {"same_subject_output": [[1]]})
    assert summary([only_own], [only_own])["loc"] is None and summary([only_own], [only_own])["same_subject"] == 1.0
    with pytest.raises(ValueError, match="before has 1 requests, after 2"):
        summary([scores([0.0])], [scores([1.0])] * 2)


def test_by_kind_averages_prompts_then_requests():
    before = [
        scores([0.0], None, {"near_output": [[1], [2]], "same_subject_output": [[6, 7]]}),
        scores([0.0], None, {"near_output": [[3, 3]]}),
    ]
    after = [
        scores([0.0], None, {"near_output": [[1], [0]], "same_subject_output": [[6, 0]]}),
        scores([0.0], None, {"near_output": [[3, 3]]}),
    ]
    assert by_kind(before, after) == {"near": 0.75, "same_subject": 0.5}
    assert by_kind(before[1:], after[1:]) == {"near": 1.0} and by_kind([], []) == {}
    assert by_kind(before, after)["same_subject"] == summary(before, after)["same_subject"]
    with pytest.raises(ValueError, match="before has 1 requests, after 2"):
        by_kind(before[:1], after)


def test_retention_is_oldest_first_and_covers_all():
    assert retention([1.0] * 10 + [0.0] * 10) == [1.0] * 5 + [0.0] * 5
    assert retention([0.0, 1.0, 0.5, 0.5, None, 0.25], 3) == [0.5, 0.5, 0.25]
    assert retention([None, None, 1.0, 0.0], 2) == [None, 0.5]
    assert retention([], 3) == [None] * 3
    few = retention([0.0, 0.5, 1.0])
    assert len(few) == 10 and [value for value in few if value is not None] == [0.0, 0.5, 1.0]
    for count in (1, 9, 10, 23, 199):
        ones = [retention([float(i == j) for j in range(count)]) for i in range(count)]
        sizes = [sum(1 for one in ones if (one[part] or 0) > 0) for part in range(10)]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
