import pytest
import torch

from easyedit_nmke import nullspace
from easyedit_nmke.arch import ModelView


@pytest.fixture
def view(tiny):
    model, tok = tiny("llama")
    return ModelView(model), tok


def test_covariance_is_the_mean_over_tokens(view):
    view, tok = view
    texts = ["The birthplace of Mara Vosk is Rome.", "copy a b c : a b c.", "Mara Vosk"] * 5
    found = nullspace.covariances(view, tok, texts, [0, 1])
    for layer in (0, 1):
        keys = []
        handle = view.down(layer).register_forward_pre_hook(lambda _, args, keys=keys: keys.append(args[0][0].double()))
        with torch.no_grad():
            for text in texts:
                view.model(**tok(text, return_tensors="pt"))
        handle.remove()
        stacked = torch.cat(keys)
        assert torch.allclose(found[layer].double(), stacked.T @ stacked / len(stacked), rtol=1e-4, atol=1e-6)


def test_batches_respect_the_token_budget(view, monkeypatch):
    view, tok = view
    texts = [f"the larger of {i} and {i * 37} is {i * 37}." for i in range(30)]
    whole = nullspace.covariances(view, tok, texts, [0])[0]
    monkeypatch.setattr(nullspace, "TOKENS_AT_A_TIME", 40)
    sizes = [(len(batch), max(map(len, batch))) for batch in nullspace._batches(tok(texts)["input_ids"])]
    assert sum(rows for rows, _ in sizes) == 30 and all(rows * widest <= 40 for rows, widest in sizes)
    assert torch.allclose(nullspace.covariances(view, tok, texts, [0])[0], whole, rtol=1e-4, atol=1e-6)


def test_row_space_by_threshold_and_by_fraction():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    moment = basis @ torch.diag(torch.tensor([5.0, 1.0, 0.02, 0.01, 0.0, 0.0], dtype=torch.float64)) @ basis.T
    by_threshold = nullspace.row_space(moment, 0.015).basis
    assert by_threshold.shape == (6, 3)
    assert torch.allclose(by_threshold @ by_threshold.T, basis[:, :3] @ basis[:, :3].T)
    by_fraction, eigenvalues, energy = nullspace.row_space(moment, 1e9, fraction=2 / 3)
    assert torch.allclose(eigenvalues, torch.tensor([1.0, 5.0], dtype=torch.float64)) and energy.item() == pytest.approx(0.03)
    assert torch.allclose(by_fraction @ by_fraction.T, basis[:, :2] @ basis[:, :2].T)
    assert nullspace.row_space(moment, 1e9).basis.shape == (6, 0)


def test_row_spaces_are_cached_by_everything_they_depend_on(view, nmke_hparams, monkeypatch):
    view, tok = view
    settings = nmke_hparams(view.model, tok)
    first = nullspace.row_spaces(view, tok, settings, progress=False)
    monkeypatch.setattr(nullspace, "covariances", lambda *_: pytest.fail("computed again"))
    again = nullspace.row_spaces(view, tok, settings, progress=False)
    assert all(torch.equal(a, b) for layer in first for a, b in zip(first[layer], again[layer], strict=True))
    for changes in (dict(mom2_n_samples=100), dict(nullspace_threshold=0.5), dict(nullspace_fraction=0.5), dict(layers=[0])):
        with pytest.raises(pytest.fail.Exception):
            nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, **changes), progress=False)
    with torch.no_grad():
        view.model.model.embed_tokens.weight[5, 5] += 1
    with pytest.raises(pytest.fail.Exception):
        nullspace.row_spaces(view, tok, settings, progress=False)


def test_easyedits_projector_file_is_used(view, nmke_hparams, tmp_path):
    view, tok = view
    basis, _ = torch.linalg.qr(torch.randn(96, 40, generator=torch.Generator().manual_seed(0)))
    torch.save(torch.stack([torch.eye(96) - basis @ basis.T, torch.eye(96)]), tmp_path / "P.pt")
    found = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, P_loc=str(tmp_path / "P.pt")))
    assert found[0].basis.shape == (96, 40) and found[1].basis.shape == (96, 0)
    assert torch.allclose(found[0].basis @ found[0].basis.T, basis @ basis.T, atol=1e-5)
    torch.save(torch.eye(96), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"holds shape \(96, 96\), expected \(2, 96, 96\)"):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, P_loc=str(tmp_path / "wrong.pt")))


def test_text_sources(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "five"}\n')
    assert list(nullspace.corpus(str(tmp_path / "a.txt"), 2)) == ["one", "two"]
    assert list(nullspace.corpus(str(tmp_path / "b.jsonl"), 5)) == ["four", "five"]
    assert len(list(nullspace.corpus("atlas", 7))) == 7
    with pytest.raises(ValueError, match="set mom2_dataset to a text file"):
        list(nullspace.corpus("no/such-dataset", 3))


def test_an_empty_text_is_an_error(view, nmke_hparams, tmp_path):
    view, tok = view
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, mom2_dataset=str(tmp_path / "empty.txt")))


def test_a_cache_that_cannot_be_written_is_only_a_warning(view, nmke_hparams, tmp_path, caplog):
    view, tok = view
    blocker = tmp_path / "file"
    blocker.write_text("")
    found = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, stats_dir=str(blocker / "stats")), progress=False)
    assert set(found) == {0, 1} and "were not cached" in caplog.text
