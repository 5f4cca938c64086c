import pytest
import torch

from easyedit_nmke import atlas
from easyedit_nmke.models.prompts import context_templates, encode, pad, position_before, target_tokens
from easyedit_nmke.models.requests import Request

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
