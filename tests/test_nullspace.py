import pytest
import torch
from safetensors.torch import load_file

from easyedit_nmke import apply_nmke_to_model
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.statistics import covariance, nullspace


@pytest.fixture
def view(tiny):
    model, tok = tiny("llama")
    return ModelView(model), tok


@pytest.fixture
def counted(monkeypatch):
    """The layers of every `eigh` and of every pass over a text that the test makes."""
    passes, sizes = [], []
    sums, eigh = covariance.key_sums, torch.linalg.eigh
    monkeypatch.setattr(covariance, "key_sums", lambda *args: passes.append(list(args[3])) or sums(*args))
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(matrix.dtype) or eigh(matrix))
    return passes, sizes


def same(first, second):
    return all(torch.equal(a, b) for layer in first for a, b in zip(first[layer], second[layer], strict=True))


def test_row_space_by_threshold_and_by_fraction():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    moment = basis @ torch.diag(torch.tensor([5.0, 1.0, 0.02, 0.01, 0.0, 0.0], dtype=torch.float64)) @ basis.T
    by_threshold = nullspace.row_space(moment, 0.015).basis
    assert by_threshold.shape == (6, 3)
    assert torch.allclose(by_threshold @ by_threshold.T, basis[:, :3] @ basis[:, :3].T)
    by_fraction, eigenvalues, energy, _ = nullspace.row_space(moment, 1e9, fraction=2 / 3)
    assert torch.allclose(eigenvalues, torch.tensor([1.0, 5.0], dtype=torch.float64)) and energy.item() == pytest.approx(0.03)
    assert torch.allclose(by_fraction @ by_fraction.T, basis[:, :2] @ basis[:, :2].T)
    assert nullspace.row_space(moment, 1e9).basis.shape == (6, 0)


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.5, 2 / 3, 1.0])
def test_the_null_basis_comes_where_it_is_thinner(fraction):
    keys = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = nullspace.row_space(keys @ keys.T, 0, fraction)
    rank = space.basis.shape[1]
    assert rank == 6 - round(6 * fraction) and space.null.shape == (6, 6 - rank if 6 - rank < rank else 0)
    if space.null.shape[1]:
        assert torch.allclose(space.null @ space.null.T, torch.eye(6, dtype=torch.float64) - space.basis @ space.basis.T)


LIMITS = [dict(nullspace_threshold=0.3), dict(nullspace_fraction=0.9), dict(nullspace_fraction=0.3), dict(nullspace_threshold=1e9)]


@pytest.mark.parametrize("limits", LIMITS)
def test_row_spaces_are_those_of_the_covariance(view, nmke_hparams, limits):
    view, tok = view
    settings = nmke_hparams(view.model, tok, **limits)
    found = nullspace.row_spaces(view, tok, settings, progress=False)
    moments = covariance.moments(view, tok, settings, progress=False)
    for layer in (0, 1):
        expected = nullspace.row_space(moments[layer], settings.nullspace_threshold, settings.nullspace_fraction)
        assert same({0: found[layer]}, {0: expected}) and found[layer].basis.is_contiguous()


def test_files_serve_other_limits_and_other_choices_of_layers(view, nmke_hparams, counted):
    view, tok = view
    passes, decompositions = counted
    settings = nmke_hparams(view.model, tok)
    first = nullspace.row_spaces(view, tok, settings, progress=False)
    assert passes == [[0, 1]] and len(decompositions) == 2
    assert same(first, nullspace.row_spaces(view, tok, settings, progress=False))
    for changes in (dict(nullspace_threshold=0.5), dict(nullspace_fraction=0.5), dict(layers=[0])):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, **changes), progress=False)
    assert passes == [[0, 1]] and len(decompositions) == 2
    more = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, layers=[0, 1, 2]), progress=False)
    assert passes == [[0, 1], [2]] and len(decompositions) == 3 and same(first, more)


def test_everything_else_asks_for_another_pass(view, nmke_hparams, counted):
    view, tok = view
    passes, _ = counted

    def made(**changes):
        before = len(passes)
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, **changes), progress=False)
        return passes[before:]

    assert made() == [[0, 1]] and made() == []
    assert made(mom2_n_samples=100) == [[0, 1]] and made(mom2_dtype="float64") == [[0, 1]]
    with torch.no_grad():
        view.model.model.layers[1].mlp.up_proj.weight[5, 5] += 1
    assert made() == [[1]]
    with torch.no_grad():
        view.model.model.embed_tokens.weight[5, 5] += 1
    assert made() == [[0, 1]]


def test_eigenvectors_are_float32_whatever_the_sums_are(view, nmke_hparams, counted):
    view, tok = view
    settings = nmke_hparams(view.model, tok, mom2_dtype="float64")
    assert nullspace.row_spaces(view, tok, settings, progress=False)[0].basis.dtype == torch.float32
    assert counted[1] == [torch.float32] * 2


def test_easyedits_projector_file_is_used(view, nmke_hparams, tmp_path):
    view, tok = view
    basis, _ = torch.linalg.qr(torch.randn(96, 40, generator=torch.Generator().manual_seed(0)))
    torch.save(torch.stack([torch.eye(96) - basis @ basis.T, torch.eye(96)]), tmp_path / "P.pt")
    found = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, P_loc=str(tmp_path / "P.pt")))
    assert found[0].basis.shape == (96, 40) and found[1].basis.shape == (96, 0)
    assert found[0].null.shape == found[1].null.shape == (96, 0)
    assert torch.allclose(found[0].basis @ found[0].basis.T, basis @ basis.T, atol=1e-5)
    torch.save(torch.eye(96), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"holds shape \(96, 96\), expected \(2, 96, 96\)"):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, P_loc=str(tmp_path / "wrong.pt")))


def test_an_empty_text_is_an_error(view, nmke_hparams, tmp_path):
    view, tok = view
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, mom2_dataset=str(tmp_path / "empty.txt")))


def test_a_cache_that_cannot_be_written_is_only_a_warning(view, nmke_hparams, tmp_path, caplog):
    view, tok = view
    expected = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok), progress=False)
    blocker = tmp_path / "file"
    blocker.write_text("")
    found = nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, stats_dir=str(blocker / "stats")), progress=False)
    assert same(expected, found) and caplog.text.count("were not cached") == 4


def test_each_layers_file_is_written_before_the_next_is_begun(view, nmke_hparams, tmp_path, monkeypatch):
    view, tok = view
    eigh, calls = torch.linalg.eigh, []

    def interrupted(matrix):
        calls.append(sorted(path.name.split("_")[1] for path in (tmp_path / "stats").glob("eigenvectors_*")))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok), progress=False)
    assert calls == [[], ["0"]]
    (file,) = (tmp_path / "stats").glob("eigenvectors_0_*")
    assert {name: tensor.shape for name, tensor in load_file(file).items()} == {"eigenvalues": (96,), "eigenvectors": (96, 96)}


def test_the_log_tells_what_is_protected(view, nmke_hparams, caplog):
    view, tok = view
    caplog.set_level("INFO", "easyedit_nmke.statistics.nullspace")
    nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok, layers=[0, 2], nullspace_fraction=0.75), progress=False)
    assert [record.getMessage() for record in caplog.records if "protected" in record.message] == [
        "layer 0: 24 of 96 directions protected", "layer 2: 24 of 96 directions protected",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (dict(nullspace_threshold=1e9), r"0 of 96 directions .*nullspace_threshold 1000000000.*change all.*lower "),
        (dict(nullspace_fraction=0.999), r"0 of 96 directions .*nullspace_fraction 0.999.*change all.*set nullspace_fraction"),
        (dict(nullspace_threshold=1e-9), r"96 of 96 directions .*nullspace_threshold 1e-09.*write nothing; raise "),
        (dict(nullspace_fraction=0.001), r"96 of 96 directions .*nullspace_fraction 0.001.*write nothing; raise "),
        (dict(nullspace_threshold=1e9, regularizer="covariance"), "0 of 96 directions"),
    ],
)
def test_a_null_space_of_all_or_of_nothing_is_refused(view, nmke_hparams, requests, limits, said):
    view, tok = view
    settings = nmke_hparams(view.model, tok, **limits)
    before = view.weight(0).clone()
    with pytest.raises(ValueError, match=f"^layer 0: {said}"):
        apply_nmke_to_model(view.model, tok, requests(1), settings)
    assert torch.equal(view.weight(0), before) and not hasattr(view.model, "nmke_state")


def test_a_soft_null_space_may_weigh_every_direction(view, nmke_hparams, requests):
    view, tok = view
    settings = nmke_hparams(view.model, tok, nullspace_threshold=1e-9, regularizer="covariance", mom2_update_weight=1.0)
    before = view.weight(0).clone()
    apply_nmke_to_model(view.model, tok, requests(1), settings)
    assert not torch.equal(view.weight(0), before)


@pytest.mark.parametrize(("rank", "said"), [(0, "0 of 96 .*P_loc.*the model knows"), (96, "96 of 96 .*P_loc.*write nothing")])
def test_a_projector_of_all_or_of_nothing_is_refused(view, nmke_hparams, requests, tmp_path, rank, said):
    view, tok = view
    projector = torch.eye(96) * (rank == 0)
    torch.save(torch.stack([projector, projector]), tmp_path / "P.pt")
    with pytest.raises(ValueError, match=f"{said}; remove P_loc"):
        apply_nmke_to_model(view.model, tok, requests(1), nmke_hparams(view.model, tok, P_loc=str(tmp_path / "P.pt")))


def test_damaged_eigenvectors_are_named(view, nmke_hparams, tmp_path):
    view, tok = view
    nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok), progress=False)
    (file,) = (tmp_path / "stats").glob("eigenvectors_0_*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file.name} holds no eigenvectors .* delete it, and it will be made again"):
        nullspace.row_spaces(view, tok, nmke_hparams(view.model, tok), progress=False)
