import unicodedata

import pytest
import torch

from easyedit_nmke import atlas
from easyedit_nmke.models.prompts import context_templates, encode, joined, open_end, pad, position_before, target_tokens
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.subjects import find_subject

RECORD = {"prompt": "The birthplace of Mara Vosk is", "subject": "Mara Vosk", "target_new": " Rome"}


@pytest.fixture
def tok():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(atlas.DIRECTORY)


def test_requests_read_easyedits_dictionaries_and_write_them_back():
    record = {
        **RECORD, "ground_truth": ["Paris", "Lyon"], "rephrase_prompt": "Mara Vosk was born in",
        "locality": {"near": {"prompt": "a", "ground_truth": "b"}},
        "portability": {"far": {"prompt": ["c", "d"], "ground_truth": [["e"], "f"]}},
    }  # fmt: skip
    request = Request.from_dict(record)
    assert (request.target_new, request.ground_truth) == ("Rome", "Paris")
    assert request.locality == {"near": (("a", "b"),)} and request.portability == {"far": (("c", "e"), ("d", "f"))}
    assert Request.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_new": "  "}, "target_new. .new target. is empty"),
        ({"subject": ""}, "subject. .subject. is empty"),
        ({"subject": "Tobin"}, "'Tobin' is not in the prompt"),
        ({"prompt": "Mara Vosk and Mara Vosk are"}, "2 times in the prompt"),
        ({"prompt": None}, "field .prompt. .prompt. is missing"),
        ({"target_new": 3}, "field .target_new. .new target. is a number, not text"),
    ],
)
def test_a_request_that_cannot_be_edited_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Request.from_dict({**RECORD, **changes})
    assert "\n" not in str(error.value)


def test_a_placeholder_stands_for_the_subject():
    request = Request.from_dict({**RECORD, "prompt": "The birthplace of {} is"})
    assert request.prompt == RECORD["prompt"]
    text, end = request.fill("Once. {}")
    assert text == "Once. The birthplace of Mara Vosk is" and text[:end].endswith("Mara Vosk")


def test_the_subjects_last_token_is_found_with_and_without_offsets(tok):
    request = Request.from_dict(RECORD)
    for template in ("{}", "I say so. {}"):
        text, end = request.fill(template)
        position = position_before(tok, text, end)
        assert tok.decode(encode(tok, text)[: position + 1]).endswith("Mara Vosk")

        class Slow:
            is_fast, eos_token_id = False, None

            def __call__(self, some):
                return {"input_ids": tok(some)["input_ids"]}

        assert position_before(Slow(), text, end) == position


def test_target_tokens_are_those_the_target_adds(tok):
    ids = target_tokens(tok, "The birthplace of Mara Vosk is", "Rome")
    assert tok.decode(ids) == " Rome"


def test_padding_is_on_the_right_whatever_the_tokenizer_does(tok):
    rows = [[5, 6, 7], [8]]
    for side in ("left", "right"):
        tok.padding_side = side
        batch = pad(rows, "cpu")
        assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
        assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]] and batch.last.tolist() == [2, 0]


def test_context_templates_are_seeded_and_leave_the_random_state_alone(tiny):
    model, tok = tiny("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = context_templates(model, tok, ["The", "I"], 8, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == context_templates(model, tok, ["The", "I"], 8, seed=1)
    assert first != context_templates(model, tok, ["The", "I"], 8, seed=2)
    assert first[0] == ["{}"] and len(first[1]) == 2
    assert all(text.endswith(". {}") and text.count("{") == 1 for text in first[1])


def test_an_end_token_that_the_tokenizer_appends_is_left_out(tok):
    class Closing:
        is_fast, eos_token, eos_token_id = False, tok.eos_token, tok.eos_token_id

        def __call__(self, texts):
            return {"input_ids": [[*ids, tok.eos_token_id] for ids in tok(texts)["input_ids"]]}

    text = "The birthplace of Mara Vosk is"
    assert encode(Closing(), text) == encode(tok, text)
    assert target_tokens(Closing(), text, "Rome") == target_tokens(tok, text, "Rome")


# ---- the subject in the prompt


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The mayor of Tirana is", "Tirana", "Tirana"),
        ("Art in Arthur's house is", "Art", "Art"),
        ("In Arthur's house Art is", "Art", "Art"),
        ("Iran and Tirana are", "Iran", "Iran"),
        ("Apollo 11 came after Apollo 1", "Apollo 1", "Apollo 1"),
        ("Tirana's mayor is", "Tirana", "Tirana"),
        ("Tirana’s mayor is", "Tirana", "Tirana"),
        ("James' house is", "James", "James"),
        ("La capitale de l'Iran est", "Iran", "Iran"),
        ("The Tirana-based firm is", "Tirana", "Tirana"),
        ("Jean met Jean-Pierre in", "Jean", "Jean"),
        ("Jean-Pierre met Jean in", "Jean-Pierre", "Jean-Pierre"),
        ("Brien, not O'Brien, is", "Brien", "Brien"),
        ("C++ was made by", "C++", "C++"),
        ("Who wrote (What Is Life?) then", "(What Is Life?)", "(What Is Life?)"),
        ("The town of St. Louis is", "St. Louis", "St. Louis"),
        ("_Tirana_ is", "Tirana", "Tirana"),
        ("法国的首都是", "法国", "法国"),
        ("在Paris的人", "Paris", "Paris"),
        ("東京タワーは", "東京", "東京"),
        ("กรุงเทพเป็น", "กรุงเทพ", "กรุงเทพ"),
        # another case, where it is not there as it is spelled
        ("the mayor of TIRANA is", "Tirana", "TIRANA"),
        ("The art of Art is", "Art", "Art"),
        ("Die STRASSE ist", "Straße", "STRASSE"),
        # forms that look alike
        ("The caf\u00e9 is", "cafe\u0301", "caf\u00e9"),
        ("The cafe\u0301 is", "caf\u00e9", "cafe\u0301"),
        ("The CAFE\u0301 is", "caf\u00e9", "CAFE\u0301"),
        ("The \ufb01rst \uff21BC is", "first ABC", "\ufb01rst \uff21BC"),
        ("So New\u00a0York is", "New York", "New\u00a0York"),
        ("So New\u2009York is", "New York", "New\u2009York"),
        ("So O’Brien is", "O'Brien", "O’Brien"),
        ("So “Ulysses” is", '"Ulysses"', "“Ulysses”"),
        ("So Jean\u2011Pierre is", "Jean-Pierre", "Jean\u2011Pierre"),
        ("The Iran\u2013Iraq War was", "Iran-Iraq War", "Iran\u2013Iraq War"),
        ("Se\u00adoul is", "Seoul", "Se\u00adoul"),
        ("각 나라 한국 is", unicodedata.normalize("NFD", "한국"), "한국"),
    ],
)
def test_a_subject_is_found_as_words_of_the_prompt_as_they_are_spelled_there(prompt, subject, found):
    start, end = find_subject(prompt, subject)
    assert prompt[start:end] == found
    text, stop = Request(prompt, subject, "x").fill("So. {}")
    assert text == "So. " + prompt and text[:stop].endswith(found) and stop == 4 + end


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        ("The mayor of Tirana is", "Iran", "'Iran' is no word of the prompt 'The mayor of Tirana is', only a part of 'Tirana'"),
        ("The mayor of Tirana is", "iran", "only a part of 'Tirana'"),
        ("The mayor of Tirana is", "Tir", "only a part of 'Tirana'"),
        ("The cafe\u0301 is", "cafe", "only a part of 'cafe\u0301'"),
        ("Apollo 11 is", "Apollo 1", "only a part of 'Apollo 11'"),
        ("각 is", "가", "'가' is not in the prompt"),
        ("Tirana's mayor lives in Tirana", "Tirana", "2 times in the prompt"),
        ("The TIRANA of tirana is", "Tirana", r"2 times in the prompt .* \(as 'TIRANA', 'tirana'\)"),
        ("The caf\u00e9 or cafe\u0301 is", "\uff43af\u00e9", r"2 times .* \(as 'caf\\xe9', 'cafe\\u0301'\)"),
        ("東京と東京は", "東京", "2 times in the prompt"),
        (
            "The mayor of Tirana is",
            "Durres",
            "'Durres' is not in the prompt 'The mayor of Tirana is'; it must be there exactly once",
        ),
        (
            "M\u0430ra Vosk is",
            "Mara Vosk",
            r"nearest there is 'Mаra Vosk', that is 'M\\u0430ra Vosk', and the subject 'Mara Vosk'",
        ),
        ("Mara Vosck is", "Mara Vosk", r"\(the nearest there is 'Mara Vosck'\)"),
        ("Tirana is", "", "is empty"),
    ],
)
def test_what_is_no_word_of_the_prompt_or_several_is_refused(prompt, subject, message):
    with pytest.raises(ValueError, match=message) as error:
        find_subject(prompt, subject)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subject", ["user", "Alibaba Cloud", "assistant"])
def test_in_a_chat_format_the_users_words_name_the_subject(subject):
    chat = "<|im_start|>system\nYou are Qwen of Alibaba Cloud.<|im_end|>\n<|im_start|>user\nWhat is the {} for?<|im_end|>\n"
    prompt = chat.format(subject) + "<|im_start|>assistant\n"
    start, end = find_subject(prompt, subject)
    assert prompt[:start].endswith("What is the ") and prompt[start:end] == subject


# ---- prompt and target


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("The mayor of Tirana is", "Anna", "The mayor of Tirana is Anna"),
        ("The mayor of Tirana is  ", "Anna", "The mayor of Tirana is Anna"),
        ("The mayor of Tirana is", " Anna", "The mayor of Tirana is Anna"),
        ("Who is it?", "Anna", "Who is it? Anna"),
        ("2 + 2 =", "4", "2 + 2 = 4"),
        ("Q: Who?\nA:", "Anna", "Q: Who?\nA: Anna"),
        ("Q: Who?\n", "Anna", "Q: Who?\nAnna"),
        ("Q: Who?\r\n\n", "Anna", "Q: Who?\r\n\nAnna"),
        ("Qui\u00a0:\u00a0", "Anna", "Qui\u00a0:\u00a0Anna"),
        ("<|user|>\nWho?<|end|>\n<|assistant|>\n", "Anna", "<|user|>\nWho?<|end|>\n<|assistant|>\nAnna"),
        ("<|user|>\nWho?<|end|><|assistant|>", "Anna", "<|user|>\nWho?<|end|><|assistant|>Anna"),
        ("<｜User｜>Who?<｜Assistant｜>", "Anna", "<｜User｜>Who?<｜Assistant｜>Anna"),
        ("Who?</s>", "Anna", "Who?</s>Anna"),
        ("a <b>bold</b>", "move", "a <b>bold</b> move"),
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("法国的首都是 ", "巴黎", "法国的首都是巴黎"),
        ("法国的首都是：", "巴黎", "法国的首都是：巴黎"),
        ("フランスの首都は", "パリ", "フランスの首都はパリ"),
        ("ひらがな", "かな", "ひらがなかな"),
        ("เมืองหลวงคือ", "ปารีส", "เมืองหลวงคือปารีส"),
        ("ນະຄອນຫຼວງ", "ປາຣີ", "ນະຄອນຫຼວງປາຣີ"),
        ("រាជធានី", "ប៉ារីស", "រាជធានីប៉ារីស"),
        ("မြို့တော်", "ပါရီ", "မြို့တော်ပါရီ"),
        ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
        ("Столица", "Париж", "Столица Париж"),
    ],
)
def test_what_stands_between_prompt_and_target_follows_the_text(prompt, target, text):
    assert joined(prompt, target) == text
    asked, space = open_end(prompt)
    assert text == asked + space + target.strip() and space in ("", " ")


@pytest.mark.parametrize(
    ("separator", "text"),
    [("", "It is  Anna"), (" ", "It is Anna"), ("\n", "It is\nAnna"), (": ", "It is: Anna"), ("\nA:  ", "It is\nA:  Anna")],
)
def test_a_separator_that_is_given_is_taken(separator, text):
    assert joined("It is  ", "Anna", separator) == text
    asked, space = open_end("It is  ", separator)
    assert asked + space + "Anna" == text and not asked.endswith(" "), "the spaces are the answer's, all else is asked"
