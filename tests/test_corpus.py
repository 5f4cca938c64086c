import sys
from types import SimpleNamespace

import pytest
import torch

from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.statistics import corpus as sources
from easyedit_nmke.statistics import nullspace
from easyedit_nmke.statistics.corpus import corpus


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n\n{"text": ""}\n{"text": "five", "id": 3}\n')
    some = corpus(str(tmp_path / "a.txt"), 2)
    assert list(some) == ["one", "two"] == list(some) and len(some) == 2
    assert list(corpus(str(tmp_path / "b.jsonl"), 5)) == ["four", "five"] and len(corpus(str(tmp_path / "b.jsonl"), 5)) == 2
    assert len(corpus("atlas", 7)) == 7


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("a.jsonl", b'{"text": "half', "a JSON object with a text"),
        ("a.jsonl", b'{"words": "none"}', "a JSON object with a text"),
        ("a.jsonl", b'["text"]', "a JSON object with a text"),
        ("a.jsonl", b'{"text": null}', "a JSON object with a text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_at_once(tmp_path, name, line, expected):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    assert len(corpus(str(tmp_path / name), 1)) == 1
    with pytest.raises(ValueError, match=rf"{name}, line 3: expected {expected}"):
        corpus(str(tmp_path / name), 10)


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise ConnectionError("not reachable")
        return ({"text" if name != "other/columns" else "words": f"text {i}", "id": i} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    some = corpus("wikipedia", 3)
    assert list(some) == ["text 0", "text 1", "text 2"] == list(some) and len(some) == 3
    assert asked[0] == ("wikimedia/wikipedia", "20231101.en", "train", True)
    with pytest.raises(ValueError, match=r"can be reached \(not reachable\); set mom2_dataset to a text file"):
        list(corpus("no/such", 3))
    with pytest.raises(ValueError, match="no texts in a column 'text'; its columns: words, id"):
        list(corpus("other/columns", 3))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs `pip install datasets`"):
        list(corpus("wikipedia", 3))


def test_a_file_is_told_by_its_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    first = sources.identity(str(tmp_path / "a.txt"))
    assert first == sources.identity(str(tmp_path / "b.txt")) != "one"
    (tmp_path / "a.txt").write_text("two")
    assert sources.identity(str(tmp_path / "a.txt")) != first
    assert sources.identity("wikipedia") == "wikipedia"


def test_own_texts_are_sampled_from_the_model(atlas, caplog, monkeypatch):
    model, tok = atlas
    monkeypatch.setattr(sources, "SELF_TOKENS", 16)
    monkeypatch.setattr(sources, "SELF_ROWS", 5)
    before = torch.random.get_rng_state()
    texts = sources.own_texts(model, tok, 12, seed=3, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(texts) == 12 and len(set(texts)) > 6 and not any("</s>" in text or "<s>" in text for text in texts)
    assert "a stand-in for real text" in caplog.text
    assert texts == sources.own_texts(model, tok, 12, seed=3, progress=False)
    assert texts != sources.own_texts(model, tok, 12, seed=4, progress=False)


def test_samples_follow_the_models_own_probabilities(tiny, monkeypatch):
    model, tok = tiny("llama")
    chances, multinomial = [], torch.multinomial
    monkeypatch.setattr(sources, "SELF_TOKENS", 9)
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kwargs: chances.append(p) or multinomial(p, *args, **kwargs))
    ids = sources._sample(model, tok, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.softmax(model(ids).logits, -1)
    assert ids.shape == (6, 9) and (ids[:, 0] == tok.bos_token_id).all() and len(chances) == 8
    for step, found in enumerate(chances):
        assert torch.allclose(found, expected[:, step], atol=1e-6)


def test_a_sample_ends_with_its_end_token(tiny, monkeypatch):
    model, tok = tiny("llama")
    draws = iter([[5, 6, 7], [tok.eos_token_id, 8, 9], [5, tok.eos_token_id, 5], [5, 5, tok.eos_token_id]])
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor(next(draws))[:, None])
    ids = sources._sample(model, tok, 3, torch.Generator())
    end = tok.eos_token_id
    assert ids[:, 1:].tolist() == [[5, end, end, end], [6, 8, end, end], [7, 9, 5, end]]


def test_self_makes_a_null_space(view_of, nmke_hparams, caplog):
    view, tok = view_of
    settings = nmke_hparams(view.model, tok, mom2_dataset="self", mom2_n_samples=10)
    found = nullspace.row_spaces(view, tok, settings, progress=False)
    assert found[0].basis.shape[0] == 96 and caplog.text.count("stand-in") == 1
    nullspace.row_spaces(view, tok, settings, progress=False)
    assert caplog.text.count("stand-in") == 1


@pytest.fixture
def view_of(tiny):
    model, tok = tiny("llama")
    return ModelView(model), tok


def test_a_tokenizer_without_a_start_token_cannot_sample(tiny):
    model, tok = tiny("llama")
    tok.bos_token = tok.eos_token = None
    with pytest.raises(ValueError, match="no token to start a text with"):
        sources.own_texts(model, tok, 1, 0, progress=False)


def test_a_source_is_told_by_how_it_is_read_and_a_folder_by_its_files(tmp_path, monkeypatch):
    line = '{"text": "one"}\n'
    for name in ("a.txt", "a.json", "a.jsonl"):
        (tmp_path / name).write_text(line)
    told = {name: sources.identity(str(tmp_path / name)) for name in ("a.txt", "a.json", "a.jsonl")}
    assert told["a.txt"] == told["a.json"] != told["a.jsonl"]
    folder = tmp_path / "parts"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "0.parquet").write_bytes(b"one")
    first = sources.identity(str(folder))
    (folder / "more" / "0.parquet").write_bytes(b"two")
    second = sources.identity(str(folder))
    (folder / "more" / "0.parquet").rename(folder / "more" / "1.parquet")
    assert len({first, second, sources.identity(str(folder)), str(folder)}) == 4
    monkeypatch.chdir(tmp_path)
    for name in ("atlas", "wikipedia", "self"):  # where results may lie
        (tmp_path / name).mkdir()
        assert sources.identity(name) == name


def test_a_row_without_a_text_is_an_empty_one(monkeypatch):
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    assert list(corpus("some/where", 3)) == ["one", "", "two"]
