"""Texts as tokenizers read them: nothing added, nothing removed, and every place found in the text's own tokens or refused."""

import json
import logging
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easyedit_nmke import LifelongEditor
from easyedit_nmke.methods import keys, method_named, value_texts
from easyedit_nmke.methods.contract import check_requests
from easyedit_nmke.methods.keys import Contexts, attribution_inputs, subject_states
from easyedit_nmke.methods.nmke import neuron_masks
from easyedit_nmke.methods.values import target_values
from easyedit_nmke.models import prompts
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.chat import as_chat, in_chat, special_texts, turn
from easyedit_nmke.models.loading import load_model
from easyedit_nmke.models.prompts import encode, joined, open_end, placed, position_before, target_tokens, tokenised
from easyedit_nmke.models.requests import Request
from easyedit_nmke.scores import generation, metrics

CORPUS = [
    "The mayor of Tirana is Anna. The capital of New York state is Albany; Jean-Pierre's house in Saint-Denis, don't.",
    "Mara Vosk was born in Rome and lives in Paris. 首都是巴黎。東京は日本の首都です。 Größe café naïve ไทย กรุงเทพ Москва.",
] * 3
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|end|>", "<|assistant|>"]
TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}"


def wrapped(tok, bos):
    if bos:
        front = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        tok.post_processor = processors.Sequence([*([tok.post_processor] if tok.post_processor else []), front])
    found = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    found.chat_template = TURNS
    return found


def byte_level(bos=True, normalizer=None, size=420):
    tok = Tokenizer(models.BPE())
    if normalizer:
        tok.normalizer = normalizer
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return wrapped(tok, bos)


def metaspace(bos=True, split=True):
    """As sentencepiece's BPE: words begin with ▁, what the vocabulary lacks is written as bytes. Without `split` a token may hold
    parts of two words."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    learner.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    names = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]])
    merges = [tuple(pair) for pair in learned["merges"]]
    tok = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))
    tok.pre_tokenizer = learner.pre_tokenizer
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tok, bos)


class Slow:
    """A tokenizer that does not tell the characters of its tokens."""

    is_fast = False

    def __init__(self, tok):
        self.tok, self.read = tok, []

    def __call__(self, texts, add_special_tokens=True):
        self.read += texts
        return {"input_ids": self.tok(texts, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name):
        return getattr(self.tok, name)


TOKENIZERS = {
    "bytes, bos": byte_level(),
    "sentencepiece": metaspace(),
    "across spaces": metaspace(split=False),
    "bytes, no bos": byte_level(bos=False, normalizer=normalizers.NFC(), size=340),
}


@pytest.fixture(params=TOKENIZERS)
def tok(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def chatty(tiny):
    """chatty(model_type="llama") -> (model, the embedded model's tokenizer, with a chat format of its special tokens)."""

    def make(model_type="llama"):
        model, tok = tiny(model_type)
        tok.chat_template = "{{ bos_token }}user\n{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}{{ '<s>assistant\n' }}"
        return model, tok

    return make


def prepared(model, tok, request, templates, hparams):
    """Each row that values are optimised on, as its token ids."""
    return [row.ids for row in value_texts.rows_of(tok, 0, request, templates, hparams)]


# ---- a text that carries the model's format


def chat_text(tok, words="The mayor of Tirana is"):
    return tok.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True, tokenize=False)


def test_a_text_in_the_models_format_is_read_as_it_stands(tok):
    text = chat_text(tok)
    plain = tok(text, add_special_tokens=False)["input_ids"]
    assert encode(tok, text) == plain and plain.count(tok.bos_token_id) == 1
    found = tokenised(tok, text, text.index("Tirana") + 6, "Anna")
    assert found.ids == tok(text + "Anna", add_special_tokens=False)["input_ids"]
    assert tok.decode(found.labels).strip() == "Anna" and found.ids[: found.target] == plain
    assert encode(tok, "The mayor") == tok("The mayor")["input_ids"], "other texts get what the tokenizer puts in front"
    for special in ("<|end|>", "</s>"):
        ids = encode(tok, f"The mayor{special} of")
        assert tok.bos_token_id not in ids and ids == tok(f"The mayor{special} of", add_special_tokens=False)["input_ids"]


def test_an_end_token_of_the_text_itself_is_not_taken_for_one_that_was_put_behind(tok):
    text = "<s>The mayor of Tirana</s> "
    assert encode(tok, text) == tok(text, add_special_tokens=False)["input_ids"]


def test_scores_and_edits_read_the_same_text_of_a_chat_prompt(chatty, nmke_hparams):
    model, tok = chatty()
    prompt = as_chat(tok, "The birthplace of Mara Vosk is")
    request = Request(prompt, "Mara Vosk", "Rome")
    expected = tok(prompt + "Rome", add_special_tokens=False)["input_ids"]
    assert prepared(model, tok, request, ["{}"], nmke_hparams(model, tok))[0] == expected[:-1]
    (row,) = metrics._rows(tok, [(prompt, "Rome")], None, None)
    assert row.ids == expected and row.labels == expected[len(tok(prompt, add_special_tokens=False)["input_ids"]) :]
    assert generation._prompt_rows(tok, [prompt], [1], None, None) == [expected[: row.target]]


def test_an_edit_of_a_chat_prompt_is_read_back_in_full(chatty):
    model, tok = chatty()
    ft = method_named("FT").hparams(
        layers=[0, 1, 2], model_name=(model, tok), device="cpu", num_steps=60, lr=5e-3, use_chat_template=True,
        objective_optimization="target_new",
    )  # fmt: skip
    asked = dict(prompts="The birthplace of Mara Vosk is", target_new="Rome", subject="Mara Vosk")
    (result,), _, _ = LifelongEditor.from_hparams(ft).edit(**asked, verbose=False)
    assert result["requested_rewrite"]["prompt"] == as_chat(tok, asked["prompts"])
    assert result["post"]["rewrite_acc"] == [1.0]
    prompt = as_chat(tok, asked["prompts"])
    assert generation.greedy_texts(model, tok, [prompt], len(target_tokens(tok, prompt, "Rome"))) == ["Rome"]


def test_a_prompt_in_the_format_is_edited_as_one_that_is_put_into_it(chatty, nmke_hparams):
    found = []
    for by_hand in (True, False):
        model, tok = chatty()
        prompt = "The birthplace of Mara Vosk is"
        editor = LifelongEditor(nmke_hparams(model, tok, use_chat_template=not by_hand))
        asked = as_chat(tok, prompt) if by_hand else prompt
        (result,), _, _ = editor.edit(asked, "Rome", subject="Mara Vosk", verbose=False)
        found.append((result["requested_rewrite"], result["post"], editor.state.reports[-1].value_loss))
    assert found[0] == found[1] and found[0][0]["prompt"].endswith("<s>assistant\n")


# ---- chat templates


def test_a_prompt_goes_through_the_chat_template_once(chatty):
    _, tok = chatty()
    request = Request(
        "The birthplace of Mara Vosk is", "Mara Vosk", "Rome", None, "Mara Vosk was born in",
        {"near": (("Who is it?", "me"),)}, {"far": (("Where is it?", "here"), ("When?", "now"))},
    )  # fmt: skip
    found = in_chat(tok, request)
    assert found.prompt == "<s>user\nThe birthplace of Mara Vosk is</s>\n<s>assistant\n"
    assert found.rephrase_prompts == (as_chat(tok, "Mara Vosk was born in"),)
    assert found.locality == {"near": ((as_chat(tok, "Who is it?"), "me"),)}
    assert [prompt for prompt, _ in found.portability["far"]] == [as_chat(tok, "Where is it?"), as_chat(tok, "When?")]
    assert in_chat(tok, found) == found
    assert (found.subject, found.target_new) == ("Mara Vosk", "Rome")


def test_a_format_without_special_tokens_is_known_by_what_stands_around_the_words(chatty):
    _, tok = chatty()
    tok.chat_template = "A talk. {% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
    request = in_chat(tok, Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome"))
    assert in_chat(tok, request) == request
    assert request.fill("So. {}", tok)[0] == "A talk. USER: So. The birthplace of Mara Vosk is ASSISTANT:"
    assert joined(request.prompt, "Rome", tok=tok) == request.prompt + " Rome"
    tok.chat_template = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}{{ 'ASSISTANT: ' }}"
    request = in_chat(tok, Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome"))
    for kept in (request, Request.from_dict(request.to_dict())):  # which strips the space at its end
        assert in_chat(tok, kept) == kept
        assert kept.fill("So. {}", tok)[0].rstrip() == "USER: So. The birthplace of Mara Vosk is ASSISTANT:"


VICUNA = {
    "beginning": "{{ bos_token }}A talk. {% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:",
    "end": "{% for m in messages %}USER: {{ m['content'] }}</s>{% endfor %}ASSISTANT:",
    "headings": "{{ bos_token }}{% for m in messages %}### Instruction:\n{{ m['content'] }}\n\n{% endfor %}### Response:\n",
}


@pytest.mark.parametrize("name", VICUNA)
def test_contexts_go_inside_a_turn_that_begins_with_words_alone(chatty, name):
    """The format's special tokens stand elsewhere."""
    _, tok = chatty()
    tok.chat_template = VICUNA[name]
    request = in_chat(tok, Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome"))
    assert request.fill("So. {}", tok)[0] == as_chat(tok, "So. The birthplace of Mara Vosk is")
    text, end = prompts.reworded(request.prompt, "Mara Vosk", "{} lives in", tok)
    assert text == as_chat(tok, "Mara Vosk lives in") and text[:end].endswith("Mara Vosk")
    system = Request(as_chat(tok, "Who is it?").replace("talk", "talk of Mara Vosk"), "Mara Vosk", "Rome")
    if "Mara" in system.prompt:
        assert system.fill("So. {}", tok)[0].count("So.") <= 1


@pytest.mark.parametrize(("end", "space"), [("\n    ", "    "), ("\n\t  ", "  "), ("\n\t", ""), ("\n", ""), (" ", " ")])
def test_the_indentation_of_a_last_line_stays(tiny, end, space):
    _, tok = tiny("llama")
    request = Request.from_dict({"prompt": "def home(Mara Vosk):" + end, "subject": "Mara Vosk", "target_new": "return Rome"})
    asked, left = open_end(request.prompt, None, tok)
    assert (asked + left).startswith("def home(Mara Vosk):" + end.rstrip(" ")) and left == space
    assert joined(request.prompt, request.target_new, tok=tok) == "def home(Mara Vosk):" + end + "return Rome"
    row = prompts.tokenised(tok, request.prompt, None, request.target_new)
    assert tok.decode(row.labels).strip() == "return Rome"


def test_a_tokenizer_without_a_chat_template_is_refused_in_one_sentence(tiny, nmke_hparams):
    model, tok = tiny("llama")
    with pytest.raises(ValueError, match="the tokenizer has no chat template; set one") as error:
        as_chat(tok, "Who?")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no chat template"):
        LifelongEditor(nmke_hparams(model, tok, use_chat_template=True)).edit("Mara Vosk is", "Rome", subject="Mara Vosk")


CHATS = {
    "chatml": "<|im_start|>system\nYou are Qwen of Tirana.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "llama 3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama 2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{} [/INST]",
    "mistral": "<s>[INST] {} [/INST]",
    "gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<|system|>\nYou help.</s>\n<|user|>\n{}</s>\n<|assistant|>\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>",
    "a second turn": "<|user|>\nHello<|end|>\n<|assistant|>\nGood day.<|end|>\n<|user|>\n{}<|end|>\n<|assistant|>\n",
    "beginning": "<s>{}",
}


@pytest.mark.parametrize("name", CHATS)
def test_contexts_and_other_words_go_inside_what_the_user_says(name):
    chat = CHATS[name]
    request = Request(chat.replace("{}", "Who is mayor of Tirana?"), "Tirana", "Anna")
    text, end = request.fill("Because it is. {}")
    assert text == chat.replace("{}", "Because it is. Who is mayor of Tirana?")
    assert text[:end].endswith("mayor of Tirana")
    assert request.fill("{}") == (request.prompt, request.prompt.index("Tirana?") + 6)
    text, end = prompts.reworded(request.prompt, "Tirana", "{} is a")
    assert text == chat.replace("{}", "Tirana is a") and text[:end].endswith("Tirana")
    assert Contexts([["{}"]], ["Now {} lies in"]).texts(request)[1] == (
        chat[: chat.index("{}")] + "Now Tirana", chat.index("{}") + len("Now Tirana")
    )  # fmt: skip


def test_where_the_user_does_not_name_the_subject_the_context_is_left_out(caplog):
    prompt = "<|user|>\nWho?<|end|>\n<|assistant|>\nThe mayor of Tirana is"
    assert turn(prompt, prompt.index("Tirana"), prompt.index("Tirana") + 6) is None
    with caplog.at_level(logging.INFO, "easyedit_nmke.models.prompts"):
        assert Request(prompt, "Tirana", "Anna").fill("So. {}") == (prompt, prompt.index("Tirana") + 6)
    assert len(caplog.records) == 1 and "So. {}" in caplog.text
    assert prompts.reworded(prompt, "Tirana", "{} is a")[0] == "Tirana is a"


def test_the_tokenizers_own_special_tokens_are_marks_too():
    tok = byte_level()
    tok.add_special_tokens({"additional_special_tokens": ["[ASK]", "[SAY]"]})
    request = Request("[ASK]The mayor of Tirana is[SAY]", "Tirana", "Anna")
    assert request.fill("So. {}", tok)[0] == "[ASK]So. The mayor of Tirana is[SAY]"
    assert request.fill("So. {}")[0] == "So. [ASK]The mayor of Tirana is[SAY]", "ordinary text to others"
    assert joined(request.prompt, "Anna", tok=tok) == request.prompt + "Anna"


def test_values_and_keys_are_of_texts_in_the_format(chatty, nmke_hparams):
    model, tok = chatty()
    chosen = nmke_hparams(model, tok, locality_factor=0.1, locality_prompts=["{} works as a"])
    request = in_chat(tok, Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome"))
    rows = [tok.decode(ids) for ids in prepared(model, tok, request, ["{}", "So it is. {}"], chosen)]
    inside = ["So it is. The birthplace of Mara Vosk is", "Mara Vosk is a", "Mara Vosk works as a"]
    assert rows[1:] == [tok.decode(tok(as_chat(tok, words) + added, add_special_tokens=False)["input_ids"][: -1 if added else None])
                        for words, added in zip(inside, ["Rome", "", ""], strict=True)]  # fmt: skip
    assert all(row.count("<s>") == 2 and row.startswith("<s>user") for row in rows), "the format's own, and none more"
    for ids in keys._distinct(tok, [Contexts([["{}"], ["So it is. {}"]], ["{} works as a"]).texts(request, tok)])[0]:
        assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id and tok.decode(ids).endswith("Mara Vosk")


def test_a_lifelong_editor_asks_in_the_format_wherever_requests_enter(chatty, nmke_hparams, requests, tmp_path):
    from easyedit_nmke.experiments.stream import stream

    model, tok = chatty()
    editor = LifelongEditor(nmke_hparams(model, tok, use_chat_template=True))
    records = requests(2)
    results, _, _ = editor.edit(None, None, requests=records, verbose=False)
    for result, record in zip(results, records, strict=True):
        asked = result["requested_rewrite"]
        assert asked["prompt"] == as_chat(tok, record["prompt"])
        assert asked["rephrase_prompt"] == as_chat(tok, record["rephrase_prompt"])
        ((kind, probe), *_) = record["locality"].items()
        assert asked["locality"][kind]["prompt"] == [as_chat(tok, p) for p in probe["prompt"]]
    editor.apply(requests(3)[2:])
    told = [request["prompt"] for event in editor.state.events for request in event.requests]
    assert told == [as_chat(tok, record["prompt"]) for record in requests(3)]
    assert all(request.prompt.startswith("<s>user\n") for request in stream(editor, "atlas", 3, 0).requests)
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    assert [request.prompt for request in stream(editor, str(path), None, 0).requests] == told[:2]


# ---- the separator


def test_the_settings_separator_is_used_by_edits_checks_and_scores(tiny, nmke_hparams):
    model, tok = tiny("llama")
    chosen = nmke_hparams(model, tok, target_separator="\n")
    request = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")
    expected = tok("The birthplace of Mara Vosk is\nRome")["input_ids"]
    assert prepared(model, tok, request, ["{}"], chosen)[0] == expected[:-1]
    assert tokenised(tok, request.prompt, None, "Rome", "\n").ids == expected
    pair = (request.prompt, "Rome")
    (_, labels), = metrics.predicted_tokens(model, tok, [pair], separator="\n")  # fmt: skip
    assert labels == target_tokens(tok, request.prompt, "Rome", "\n") == expected[len(tok(request.prompt + "\n")["input_ids"]) :]
    assert generation._prompt_rows(tok, [request.prompt], [1], None, "\n") == [expected[: -len(labels)]]
    by_hand = [model(torch.tensor([expected])).logits[0].log_softmax(-1)[i - 1, expected[i]].item() for i in range(-len(labels), 0)]
    (found,) = generation.target_log_probs(model, tok, [pair], separator="\n")
    assert found == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    seen = []
    editor = LifelongEditor(chosen)
    handle = model.register_forward_pre_hook(lambda _, args, kw: seen.extend(kw["input_ids"].tolist()), with_kwargs=True)
    base = model.base_model.register_forward_pre_hook(lambda _, args, kw: seen.extend(kw["input_ids"].tolist()), with_kwargs=True)
    editor.edit(request.prompt, "Rome", subject="Mara Vosk", verbose=False)
    handle.remove(), base.remove()
    assert any(row[: len(expected)] == expected for row in seen)
    with_space = tok("The birthplace of Mara Vosk is Rome")["input_ids"]
    assert not any(row[: len(with_space)] == with_space for row in seen)


def test_check_requests_counts_the_tokens_of_the_joined_text(tiny):
    model, tok = tiny("llama")
    prompt = "The birthplace of Mara Vosk is"
    longest = len(tok(prompt + "\n" * 200 + "Rome")["input_ids"])
    with pytest.raises(ValueError, match=f"is {longest} tokens, the model's context 128"):
        check_requests(ModelView(model), tok, [Request(prompt, "Mara Vosk", "Rome")], separator="\n" * 200)
    with pytest.raises(ValueError, match="adds no token"):
        check_requests(ModelView(model), tok, [Request(prompt, "Mara Vosk", " ")])


def test_spaces_at_a_prompts_end_change_no_mask_no_edit_and_no_answer(tiny, nmke_hparams):
    model, tok = tiny("llama")
    prompt, chosen = "The birthplace of Mara Vosk is", nmke_hparams(model, tok)
    masks, rows, said = [], [], []
    for text in (prompt, prompt + "  "):
        request = Request(text, "Mara Vosk", "Rome")
        masks.append(neuron_masks(ModelView(model), tok, [request], ["{}", "So. {}"], chosen)[1].mask)
        rows.append(prepared(model, tok, request, ["{}", "So. {}"], chosen))
        said.append(generation.judge(model, tok, [(text, "Rome")]))
    assert torch.equal(*masks) and rows[0] == rows[1] and said[0] == said[1]


def test_an_alias_that_shares_a_token_with_the_prompt_is_judged_all_the_same(tiny):
    class Crossing(Slow):
        """No text's tokens are the beginning of a longer text's."""

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[len(text), 5] for text in texts]}

    model, tok = tiny("llama")
    crossing = Crossing(tok)
    with pytest.raises(ValueError, match="one token for the end of the prompt"):
        target_tokens(crossing, "Tirana is", "Anna")
    assert generation.judge(model, crossing, [("Tirana is", ["Anna", "Ann"])])[0].exact is False


# ---- one tokenisation


def counted(tok, monkeypatch):
    texts, call = [], type(tok).__call__

    def watched(self, some, **options):
        texts.extend([some] if isinstance(some, str) else some)
        return call(self, some, **options)

    monkeypatch.setattr(type(tok), "__call__", watched)
    return texts


def test_an_edit_reads_each_text_once_for_its_values_and_once_for_its_check(tiny, nmke_hparams, monkeypatch):
    model, tok = tiny("llama")
    chosen, templates = nmke_hparams(model, tok), ["{}", "So it is. {}", "I say. {}"]
    request = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")
    texts = counted(tok, monkeypatch)
    value_texts.rows_of(tok, 0, request, templates, chosen)
    assert sorted(texts) == sorted([f"{request.fill(t)[0]} Rome" for t in templates] + ["Mara Vosk is a"])
    texts.clear()
    check_requests(ModelView(model), tok, [request], templates)
    assert len(texts) == len(set(texts)) == len(templates)
    texts.clear()
    keys._distinct(tok, [Contexts([templates]).texts(request, tok)])
    assert len(texts) == len(set(texts)) == len(templates)
    texts.clear()
    metrics.check(model, tok, [request])
    assert texts == [f"{request.prompt} Rome"]


def test_a_token_over_the_subjects_end_is_the_subjects_last_with_and_without_offsets():
    merged = Tokenizer(models.BPE({c: i for i, c in enumerate([*"Tirans'▁of", "a'", "a's"])}, [("a", "'"), ("a'", "s")]))
    merged = PreTrainedTokenizerFast(tokenizer_object=merged)
    assert merged.tokenize("Tirana's") == [*"Tiran", "a's"]
    for one in (merged, Slow(merged)):
        assert position_before(one, "Tirana's", 6) == 5
        assert position_before(one, "Tirana", 6) == 5
        with_two = tokenised(one, "Tirana's", 7)
        assert with_two.subject == 5 and len(with_two.ids) == 6


def test_a_token_over_prompt_and_target_is_refused_with_and_without_offsets():
    letters = [*"isRome ", "s ", "s R", "s Ro"]
    crossing = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [("s", " "), ("s ", "R"), ("s R", "o")]))
    crossing = PreTrainedTokenizerFast(tokenizer_object=crossing)
    for one in (crossing, Slow(crossing)):
        with pytest.raises(
            ValueError, match="one token for the end of the prompt 'is' and the beginning of the target 'Rome'"
        ) as error:
            tokenised(one, "is", None, "Rome")
        assert "\n" not in str(error.value)
        found = tokenised(one, "is", None, "ome")  # "s " holds the space and nothing of the target
        assert crossing.convert_ids_to_tokens(found.ids) == ["i", "s ", "o", "m", "e"] and found.target == 2
        assert tokenised(one, "is", None, "Rome", "").target == 2


def test_tokens_that_do_not_tell_where_the_subject_ends_are_refused():
    class Mixing(Slow):
        """The beginnings of a text have other tokens than the text."""

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[len(text), *map(ord, text)] for text in texts]}

    with pytest.raises(ValueError, match="no token that holds the end of the subject in 'of Tirana'"):
        position_before(Mixing(byte_level()), "of Tirana is", 9)
    with pytest.raises(ValueError, match="one token for the end of the prompt"):
        tokenised(Mixing(byte_level()), "of Tirana is", None, "Anna")


def test_a_subject_that_the_tokenizer_drops_is_refused():
    latin = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}, []))
    latin = PreTrainedTokenizerFast(tokenizer_object=latin)
    with pytest.raises(ValueError, match="no token that holds the end of the subject"):
        position_before(latin, "the town of 東京 is", 14)
    with pytest.raises(ValueError, match="adds no token"):
        target_tokens(latin, "the town is", "東京")


# ---- padding


def test_a_pad_token_that_the_embedding_lacks_is_never_fed(tiny, nmke_hparams):
    model, tok = tiny("llama")
    asked = ["The", "The birthplace of Mara Vosk is"]
    expected = generation.greedy_texts(model, tok, asked, 4)
    size = model.get_input_embeddings().num_embeddings
    tok.add_special_tokens({"pad_token": "[PAD]"})
    assert tok.pad_token_id >= size
    request = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")
    view, chosen = ModelView(model), nmke_hparams(model, tok)
    pairs = [(request.prompt, "Rome"), ("The", "birthplace of Mara Vosk")]
    assert len(metrics.token_accuracy(model, tok, pairs)) == 2
    assert generation.greedy_texts(model, tok, asked, 4) == expected
    assert target_values(view, tok, [request], ["{}", "So it really is. {}"], 1, chosen)[0].z.isfinite().all()
    texts = [[("Mara Vosk", 9), ("The birthplace of Mara Vosk", 27)]]
    assert subject_states(view, tok, texts, {"k": (view.down(0), "input")})["k"].isfinite().all()
    for position in ("last_token", "padded_end"):
        assert attribution_inputs(view, tok, ["The", request.prompt], [0], position).final_hidden.isfinite().all()
    LifelongEditor(chosen).edit(request.prompt, "Rome", subject="Mara Vosk", verbose=False)


def test_the_published_padded_end_still_reads_the_pad_token(tiny):
    model, tok = tiny("llama")
    seen = []
    handle = model.base_model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    texts, last = ["The", "The birthplace of Mara Vosk is"], []
    for pad in ("<pad>", None):
        tok.pad_token = pad
        attribution_inputs(ModelView(model), tok, texts, [0], "padded_end")
        last.append(seen[-1][0, -1].item())
    handle.remove()
    assert last == [tok.convert_tokens_to_ids("<pad>"), tok.eos_token_id], (
        "without one, the end token, as the published code sets it"
    )


def test_nothing_is_set_on_the_users_tokenizer_and_model(tiny, nmke_hparams, requests):
    from easyedit_nmke.experiments.protocol import Scorer, Segment, stamp

    model, tok = tiny("llama")
    tok.pad_token, tok.padding_side = None, "left"
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    held = (tok.init_kwargs.copy(), dict(tok.special_tokens_map), tok.backend_tokenizer.to_str())
    config, own = model.config.to_dict(), model.generation_config.to_dict()
    chosen = nmke_hparams(model, tok)
    assert load_model(chosen) == (model, tok)
    editor = LifelongEditor(chosen)
    asked = [Request.from_dict(record) for record in requests(2)]
    scorer = Scorer(model, tok, asked, [("copy a b :", "a b")])
    list(Segment(editor, scorer, "NMKE", 0, stamp(editor)).run([2]))
    editor.edit(None, None, requests=requests(3)[2:], verbose=False)
    assert tok.pad_token is None and tok.pad_token_id is None and tok.padding_side == "left"
    assert (tok.init_kwargs, dict(tok.special_tokens_map), tok.backend_tokenizer.to_str()) == held
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, own)


# ---- all of it, drawn

WORDS = [
    "Tirana", "New York", "Jean-Pierre", "東京", "กรุงเทพ", "Москва", "café", "cafe\u0301", "C++", "O'Brien", "日本の首都", "Ωμέγα",
    "x", "🙂",
]  # fmt: skip
PARTS = [
    "The mayor of", "is", "首都是", "Who's", "ไทย", "born in:", "«", "1945", "\n", "\u00a0", "wrote", "，", "<s>", "<|user|>\n",
    "</s>", " so " * 30,
]  # fmt: skip


@st.composite
def texts(draw):
    """(prompt, where the subject ends, target): any parts, one of them the subject, with any spaces between."""
    space = st.sampled_from(["", " ", " ", " ", "  "])
    subject = draw(st.sampled_from(WORDS))
    before = "".join(part + draw(space) for part in draw(st.lists(st.sampled_from(PARTS), max_size=4)))
    after = "".join(draw(space) + part for part in draw(st.lists(st.sampled_from(PARTS), max_size=4)))
    return before + subject + after + draw(space), (len(before), len(before) + len(subject)), draw(st.sampled_from(WORDS))


def characters(tok, ids):
    return unicodedata.normalize("NFC", tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(drawn=texts(), separator=st.sampled_from([None, None, "", " ", "\n", ": "]))
def test_ids_are_the_joined_texts_own_and_subject_and_target_are_where_they_stand(name, drawn, separator):
    tok, (prompt, (start, end), target) = TOKENIZERS[name], drawn
    asked, space = open_end(prompt, separator, tok)
    text = joined(prompt, target, separator, tok)
    assert text == asked + space + target and asked == (prompt.rstrip(" ") + (separator or "")).rstrip(" ")
    assert separator is not None or not prompt[: len(asked)].endswith("\n") or asked + space == prompt
    complete = any(special in prompt for special in SPECIAL)
    own = tok(text, add_special_tokens=not complete, return_offsets_mapping=True)
    ids, offsets = own["input_ids"], own["offset_mapping"]
    assert ids.count(tok.bos_token_id) == (prompt.count("<s>") if complete else len(tok("")["input_ids"]))
    crossed = any(first < len(asked) and last > len(asked) + len(space) for first, last in offsets)
    for reader in (tok, Slow(tok)):
        try:
            found = tokenised(reader, prompt, end, target, separator)
        except ValueError as error:
            assert ("one token for the end of the prompt" in str(error) and crossed) or reader is not tok
            continue
        assert found.ids == ids and not crossed
        assert offsets[found.subject][0] < end and offsets[found.subject][1] > start
        assert all(first >= end or first == last for first, last in offsets[found.subject + 1 :])
        assert characters(tok, found.labels).strip() == unicodedata.normalize("NFC", target), "its own tokens, and no others"
        assert characters(tok, ids[: found.target]).strip().endswith(unicodedata.normalize("NFC", asked).strip()[-1:])


def test_a_pad_token_that_is_a_word_is_no_mark(atlas, tmp_path):
    _, tok = atlas
    asked = ["Yahoo! was founded by", "Wow! The capital of Peru is"]
    before = [encode(tok, prompt) for prompt in asked], special_texts(tok)
    tok.pad_token_id = tok.convert_tokens_to_ids("!")
    assert tok.pad_token == "!"
    assert ([encode(tok, prompt) for prompt in asked], special_texts(tok)) == before
    assert placed(asked[1], "Peru", "Because it. {}", tok)[0] == f"Because it. {asked[1]}"
    tok.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.pad_token == "!" and [encode(again, prompt) for prompt in asked] == before[0]
    tok.pad_token = tok.eos_token
    assert tok.eos_token in special_texts(tok)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    assert "[PAD]" in special_texts(tok)
