import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import easyedit_nmke
from easyedit_nmke import AlphaEditHyperParams, MEMITHyperParams, NMKEHyperParams, ROMEHyperParams, apply_to_model
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.statistics import corpus as sources
from easyedit_nmke.statistics import covariance, nullspace

RAGGED = ["The birthplace of Mara Vosk is Rome.", "", "copy a b c : a b c.", " \n", "Mara Vosk", "a " * 300] * 3


@pytest.fixture
def view(tiny):
    model, tok = tiny("llama")
    return ModelView(model), tok


def by_hand(view, tok, texts, layer, limit=128):
    """E[c cᵀ] in float64 from one text at a time."""
    keys = []
    handle = view.down(layer).register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double()))
    with torch.no_grad():
        for text in texts:
            if text.strip():
                view.model(torch.tensor([tok(text)["input_ids"][:limit]]))
    handle.remove()
    stacked = torch.cat(keys)
    return stacked.T @ stacked / len(stacked)


def close(found, expected, tolerance):
    return ((found.double() - expected).norm() / expected.norm()).item() < tolerance


# ---- sums


@pytest.mark.parametrize("neurons", [1, 7, 63, 96, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strips_hold_the_whole_second_moment(neurons, dtype):
    keys = torch.randn(50, neurons, dtype=dtype, generator=torch.Generator().manual_seed(neurons))
    sums = covariance.SecondMoment(neurons, dtype, "cpu")
    for part in keys.split([1, 20, 29]):
        sums.add(part)
    numbers = sum(strip.numel() for strip in sums.strips)
    assert numbers <= neurons**2 * 0.5625 + neurons * covariance.STRIPS
    found = covariance.whole(sums.means())
    exact = keys.double().T @ keys.double() / 50
    assert torch.equal(found, found.T)
    assert (found.double() - exact).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_covariance_is_the_mean_over_tokens(tiny, kind):
    model, tok = tiny(kind)
    view = ModelView(model)
    found = covariance.covariances(view, tok, RAGGED, [0, 1])
    better = covariance.covariances(view, tok, RAGGED, [0, 1], torch.float64)
    for layer in (0, 1):
        exact = by_hand(view, tok, RAGGED, layer)
        assert close(found[layer], exact, 1e-5) and close(better[layer], exact, 1e-5)
        assert found[layer].dtype == torch.float32 and better[layer].dtype == torch.float64


def test_float64_sums_do_not_drift(view):
    keys = torch.randn(20_000, 40, generator=torch.Generator().manual_seed(0)) + 3
    exact = keys.double().T @ keys.double() / len(keys)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        sums = covariance.SecondMoment(40, dtype, "cpu")
        for part in keys.split(8):
            sums.add(part.to(dtype))
        errors[dtype] = ((covariance.whole(sums.means()).double() - exact).norm() / exact.norm()).item()
    assert errors[torch.float64] < 1e-13 < 1e-8 < errors[torch.float32] < 1e-5


def test_batches_respect_the_token_budget_and_blocks_above_are_not_run(view, monkeypatch):
    view, tok = view
    texts = [f"the larger of {i} and {i * 37} is {i * 37}." for i in range(30)]
    whole = covariance.covariances(view, tok, texts, [0])[0]
    monkeypatch.setattr(covariance, "TEXTS_AT_A_TIME", 7)
    sizes = [(len(batch), max(map(len, batch))) for batch in covariance._batches(view, tok, texts, 40)]
    assert sum(rows for rows, _ in sizes) == 30 and all(rows * widest <= 40 for rows, widest in sizes)
    assert min(widest for _, widest in sizes) < max(widest for _, widest in sizes)
    monkeypatch.setattr(covariance, "_tokens_at_a_time", lambda *_: 40)
    monkeypatch.setattr(view.blocks[1], "forward", lambda *_, **__: pytest.fail("was run"))
    assert close(covariance.covariances(view, tok, texts, [0])[0], whole.double(), 1e-5)


def test_shards_are_summed_by_themselves_and_added_in_order_wherever_that_is_done(view, monkeypatch):
    view, tok = view
    texts = [f"the larger of {i} and {i * 37} is {i * 37}." if i % 5 else " " for i in range(30)]  # 24 that are not blank
    one = covariance.key_sums(view, tok, texts, [0, 1])
    asked = []

    def elsewhere(shards, layers, dtype):
        for shard in shards:
            asked.append(len(shard))
            yield {layer: moment.cpu() for layer, moment in covariance.shard_sums(view, tok, shard, layers, dtype).items()}

    assert all(map(torch.equal, one[0].strips, covariance.shard_sums(view, tok, texts, [0, 1], torch.float32)[0].strips))
    covariance.key_sums(view, tok, texts, [0, 1], torch.float32, False, elsewhere)
    assert not asked  # one shard is summed here
    monkeypatch.setattr(covariance, "SHARD", 10)
    here = covariance.key_sums(view, tok, texts, [0, 1])
    there = covariance.key_sums(view, tok, texts, [0, 1], torch.float32, False, elsewhere)
    assert asked == [10, 10, 4]
    full = [text for text in texts if text.strip()]
    parts = [covariance.shard_sums(view, tok, full[i : i + 10], [0, 1], torch.float32) for i in (0, 10, 20)]
    for layer in (0, 1):
        assert here[layer].count == there[layer].count == one[layer].count
        for strip, other, whole, *some in zip(*(sums[layer].strips for sums in (here, there, one, *parts)), strict=True):
            assert torch.equal(strip, some[0] + some[1] + some[2]) and torch.equal(strip, other)
            assert close(strip, whole.double(), 1e-5)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_pass_that_was_stopped_goes_on_with_the_same_bits(view, nmke_hparams, tmp_path, monkeypatch, caplog, damaged):
    view, tok = view
    text = tmp_path / "texts.txt"
    text.write_text("".join(f"the larger of {i} and {i * 37} is {i * 37}.\n" for i in range(24)))
    settings = nmke_hparams(view.model, tok, mom2_dataset=str(text), mom2_n_samples=24)
    monkeypatch.setattr(covariance, "SHARD", 10)
    whole = covariance.moments(view, tok, settings, progress=False)
    for file in (tmp_path / "stats").iterdir():
        file.unlink()
    monkeypatch.setattr(covariance, "KEEP_EVERY", 0.0)
    summed, asked, stop = covariance.shard_sums, [], True

    def counted(view, tok, texts, *rest):
        asked.append(len(texts))
        if stop and len(asked) == 3:
            raise KeyboardInterrupt
        return summed(view, tok, texts, *rest)

    monkeypatch.setattr(covariance, "shard_sums", counted)
    with pytest.raises(KeyboardInterrupt):
        covariance.moments(view, tok, settings, progress=False)
    (kept,) = (tmp_path / "stats").iterdir()
    if damaged:
        kept.write_bytes(kept.read_bytes()[:50])
    asked, stop = [], False
    spent = {}
    found = covariance.moments(view, tok, settings, progress=False, spent=spent)
    assert asked == ([10, 10, 4] if damaged else [4]) and ("summed from the start" in caplog.text) is damaged
    assert all(torch.equal(found[layer], whole[layer]) for layer in whole) and spent["covariance"] > 0
    assert not kept.exists() and len(list((tmp_path / "stats").iterdir())) == 2


def test_a_batch_fits_the_memory_that_is_free(view, monkeypatch):
    view, _ = view
    assert covariance._tokens_at_a_time(view, [0, 1]) == covariance.TOKENS_AT_A_TIME
    each = 96 * (4 * (2 + 3) + 8) + 8 * 4 * 32 + 4 * 512 * 8
    monkeypatch.setattr(covariance, "free_memory", lambda _: 4.0 * 100 * each)
    assert covariance._tokens_at_a_time(view, [0, 1]) == 100
    monkeypatch.setattr(covariance, "ACTIVATIONS", 50.5 * each)
    assert covariance._tokens_at_a_time(view, [0, 1]) == 50


def test_batches_of_a_gpu_are_larger(monkeypatch):
    weight = SimpleNamespace(is_cuda=True, element_size=lambda: 2, device="cuda")
    config = SimpleNamespace(num_attention_heads=32)
    seen = SimpleNamespace(weight=lambda _: weight, w_out=lambda _: torch.empty(4096, 14336, device="meta"))
    seen.model = SimpleNamespace(config=config)
    monkeypatch.setattr(covariance, "free_memory", lambda _: 60e9)
    assert covariance._tokens_at_a_time(seen, [4, 5, 6, 7, 8]) > 7500
    weight.is_cuda = False
    assert covariance._tokens_at_a_time(seen, [4, 5, 6, 7, 8]) < 2000


def test_layers_that_do_not_fit_take_a_pass_of_their_own(view, nmke_hparams, monkeypatch):
    view, tok = view
    together = covariance.moments(view, tok, nmke_hparams(view.model, tok, layers=[0, 1, 2]), progress=False)
    monkeypatch.setattr(covariance, "SUMS", 2.5 * 96**2 * 4 * 0.5625)
    assert list(covariance._passes(view, [0, 1, 2], torch.float32)) == [[0, 1], [2]]
    assert list(covariance._passes(view, [0, 1, 2], torch.float64)) == [[0], [1], [2]]
    apart = nmke_hparams(view.model, tok, layers=[0, 1, 2], stats_dir="fresh", mom2_dataset="atlas")
    monkeypatch.setattr(covariance, "save", lambda *_: False)
    found = covariance.moments(view, tok, apart, progress=False)
    assert all(close(found[layer], together[layer].double(), 1e-6) for layer in (0, 1, 2))


def test_the_sizes_of_8b_fit_the_budget():
    class Shape:
        def w_out(self, layer):
            return torch.empty(4096, 14336, device="meta")

    assert list(covariance._passes(Shape(), [4, 5, 6, 7, 8], torch.float32)) == [[4, 5, 6, 7, 8]]
    assert list(covariance._passes(Shape(), [4, 5, 6, 7, 8], torch.float64)) == [[4, 5], [6, 7], [8]]


def test_keys_that_are_not_finite_are_an_error(view):
    view, tok = view
    with torch.no_grad():
        view.model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    covariance.covariances(view, tok, RAGGED, [0])
    with pytest.raises(ValueError, match="keys of layer 1 are not finite"):
        covariance.covariances(view, tok, RAGGED, [0, 1])


@pytest.mark.parametrize(
    "hparams",
    [
        NMKEHyperParams, AlphaEditHyperParams, MEMITHyperParams,
        lambda **values: ROMEHyperParams(**values, mom2_adjustment=True, context_template_length_params=[[5, 5]]),
    ],
    ids=["NMKE", "AlphaEdit", "MEMIT", "ROME"],
)  # fmt: skip
def test_a_text_of_fewer_tokens_than_neurons_is_refused_for_every_method(view, requests, tmp_path, hparams):
    view, tok = view
    settings = hparams(
        model_name=(view.model, tok), layers=[1], device="cpu", mom2_dataset=str(tmp_path / "text.txt"), mom2_n_samples=100,
        stats_dir=str(tmp_path / "stats"),
    )  # fmt: skip
    before = view.weight(1).clone()
    (tmp_path / "text.txt").write_text("Mara Vosk speaks. " * 4)
    tokens = len(tok("Mara Vosk speaks. " * 4)["input_ids"]) - 1  # a line is stripped
    said = rf"has {tokens} tokens for 96 neurons.*raise mom2_n_samples, or give mom2_dataset a longer text"
    with pytest.raises(ValueError, match=said):
        apply_to_model(view.model, tok, requests(1), settings)
    assert torch.equal(view.weight(1), before) and not hasattr(view.model, "nmke_state") and not (tmp_path / "stats").exists()


def test_as_many_tokens_as_neurons_are_enough(view):
    view, tok = view
    texts = {len(tok("a" + " a" * count)["input_ids"]): "a" + " a" * count for count in range(100)}
    covariance.covariances(view, tok, [texts[96]], [0])
    with pytest.raises(ValueError, match="95 tokens for 96 neurons"):
        covariance.covariances(view, tok, [texts[95]], [0])


# ---- files


def test_the_second_time_no_text_is_read(view, nmke_hparams, monkeypatch):
    view, tok = view
    settings = nmke_hparams(view.model, tok)
    first = covariance.moments(view, tok, settings, progress=False)
    monkeypatch.setattr(covariance, "corpus", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(view.model.base_model, "forward", lambda *_, **__: pytest.fail("run again"))
    again = covariance.moments(view, tok, settings, progress=False)
    assert all(torch.equal(first[layer], again[layer]) for layer in (0, 1))
    nullspace.row_spaces(view, tok, settings, progress=False)


def test_a_file_is_named_by_text_samples_dtype_tokenizer_and_weights_below(view, nmke_hparams, tmp_path):
    view, tok = view
    (tmp_path / "a.txt").write_text("one")

    def names(other=tok, **changes):
        settings = nmke_hparams(view.model, tok, **{"mom2_dataset": str(tmp_path / "a.txt"), **changes})
        return {layer: file.name for layer, file in covariance.moment_files(view, other, settings).items()}

    first = names()
    assert names() == first and names(layers=[1]) == {1: first[1]} and names(seed=1, L2=3.0) == first
    tok("padding and truncation leave marks in a tokenizer", padding="max_length", max_length=60, truncation=True)
    assert names() == first
    other = type(tok).from_pretrained(tok.name_or_path)
    assert names(other) == first
    other.add_tokens(["Vosk"])
    changed = [names(other), names(mom2_n_samples=7), names(mom2_dtype="float64"), names(mom2_dataset="atlas")]
    (tmp_path / "a.txt").write_text("two")
    changed.append(names())
    assert all(some[layer] != first[layer] for some in changed for layer in (0, 1))
    (tmp_path / "a.txt").write_text("one")
    with torch.no_grad():
        view.model.model.layers[1].mlp.gate_proj.weight[0, 0] += 1
    assert names()[0] == first[0] and names()[1] != first[1]
    own = names(mom2_dataset="self")
    with torch.no_grad():
        view.model.model.layers[2].mlp.gate_proj.weight[0, 0] += 1
    assert names()[0] == first[0] and names(mom2_dataset="self")[0] != own[0]
    assert names(mom2_dataset="self", seed=1)[0] != names(mom2_dataset="self")[0]


def test_gpt2s_positions_are_in_the_name(tiny, nmke_hparams):
    model, tok = tiny("gpt2")
    settings = nmke_hparams(model, tok)
    first = covariance.moment_files(ModelView(model), tok, settings)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    assert covariance.moment_files(ModelView(model), tok, settings)[0] != first[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_write_leaves_no_file(view, nmke_hparams, tmp_path, monkeypatch, error):
    view, tok = view

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(covariance, "save_file", half)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            covariance.moments(view, tok, nmke_hparams(view.model, tok), progress=False)
    else:
        covariance.moments(view, tok, nmke_hparams(view.model, tok), progress=False)
    assert list((tmp_path / "stats").iterdir()) == []


def test_a_damaged_file_is_named(view, nmke_hparams):
    view, tok = view
    settings = nmke_hparams(view.model, tok)
    file = covariance.moment_files(view, tok, settings)[0]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=rf"{file.name} is no covariance of keys .* delete it"):
        covariance.moments(view, tok, settings, progress=False)


# ---- EasyEdit's files


def easyedit_file(settings, layer, name="tiny", precision="float32", module="model.layers.{}.mlp.down_proj"):
    folder = Path(settings.stats_dir) / name / f"{settings.mom2_dataset}_stats"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{module.format(layer)}_{precision}_mom2_{settings.mom2_n_samples}.npz"


@pytest.mark.parametrize(("precision", "name"), [("float32", "tiny"), ("float64", "some_where_tiny")])
def test_easyedits_statistics_are_used(view, nmke_hparams, caplog, precision, name):
    view, tok = view
    view.model.config._name_or_path = "some/where/tiny"
    settings = nmke_hparams(view.model, tok)
    raw = torch.randn(500, 96, generator=torch.Generator().manual_seed(0)).to(getattr(torch, precision))
    state = {"mom2.count": 500, "mom2.mom2": (raw.T @ raw).numpy(), "mom2.constructor": "SecondMoment()", "sample_size": 200}
    file = easyedit_file(settings, 1, name, precision)
    np.savez(file, **state)
    found = covariance.moments(view, tok, settings, progress=False)
    assert close(found[1], raw.double().T @ raw.double() / 500, 1e-6) and str(file) in caplog.text
    assert close(found[0], by_hand(view, tok, sources.corpus("atlas", 200), 0), 1e-5)
    spaces = nullspace.row_spaces(view, tok, settings, progress=False)
    assert torch.equal(spaces[1].basis, nullspace.row_space(found[1].float(), settings.nullspace_threshold).basis)
    np.savez(file, **{**state, "mom2.count": 250})
    os.utime(file, ns=(0, 1))
    again = nullspace.row_spaces(view, tok, settings, progress=False)
    assert torch.allclose(again[1].eigenvalues[-5:], 2 * spaces[1].eigenvalues[-5:], rtol=1e-5)


def test_statistics_of_other_samples_or_of_another_shape(view, nmke_hparams):
    view, tok = view
    view.model.config._name_or_path = "tiny"
    settings = nmke_hparams(view.model, tok)
    np.savez(easyedit_file(settings, 0), **{"mom2.count": 1, "mom2.mom2": np.eye(95, dtype=np.float32)})
    covariance.moment_files(view, tok, nmke_hparams(view.model, tok, mom2_n_samples=10))
    with pytest.raises(ValueError, match=r"holds shape \(95, 95\), expected \(96, 96\)"):
        covariance.moments(view, tok, settings, progress=False)
    np.savez(easyedit_file(settings, 0), **{"mom2.count": 95, "mom2.mom2": np.eye(96, dtype=np.float32)})
    with pytest.raises(ValueError, match="95 tokens for 96 neurons"):
        covariance.moments(view, tok, settings, progress=False)
    easyedit_file(settings, 0).write_bytes(b"PK half")
    with pytest.raises(ValueError, match="is no covariance of keys"):
        covariance.moments(view, tok, settings, progress=False)


def checkout() -> bool:
    home = os.environ.get("EASYEDIT_HOME")
    return bool(home) and Path(home, "easyeditor").is_dir()


@pytest.mark.easyedit
@pytest.mark.skipif(not checkout(), reason="no EasyEdit checkout at EASYEDIT_HOME")
def test_layer_stats_of_easyedit_leave_a_file_that_is_found(tiny, nmke_hparams, monkeypatch):
    """The path and the numbers of EasyEdit's own pass over a text."""
    pytest.importorskip("datasets")
    easyedit_nmke.register(text_only=True)
    stats = importlib.import_module("easyeditor.models.rome.layer_stats")
    model, tok = tiny("llama")
    model.config._name_or_path = "some/where/tiny"
    texts = sources.corpus("atlas", 40)
    monkeypatch.setattr(stats, "load_dataset", lambda *_: {"train": [{"text": text} for text in texts]})
    monkeypatch.setattr(stats, "normalize_device", lambda _: torch.device("cpu"))
    settings = nmke_hparams(model, tok, layers=[1], mom2_dataset="wikitext", mom2_n_samples=40)
    module = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        theirs = stats.layer_stats(
            model, tok, module, settings.stats_dir, "wikitext", ["mom2"], sample_size=40, precision="float32", hparams=settings
        )
    view = ModelView(model)
    assert covariance.moment_files(view, tok, settings)[1] == easyedit_file(settings, 1)
    found = covariance.moments(view, tok, settings, progress=False)[1]
    assert close(found, theirs.mom2.moment().double(), 1e-6) and close(found, by_hand(view, tok, texts, 1), 1e-5)


def test_the_seconds_of_a_pass_count_once_and_are_unknown_of_files_that_tell_none(tiny, nmke_hparams):
    model, tok = tiny("llama")
    chosen, view = nmke_hparams(model, tok, layers=[0, 1, 2]), ModelView(model)
    spent, again, two = {}, {}, {}
    covariance.moments(view, tok, chosen, spent=spent)
    covariance.moments(view, tok, chosen, spent=again)
    covariance.moments(view, tok, nmke_hparams(model, tok, layers=[0, 2]), spent=two)
    assert spent["covariance"] > 0 and spent == again == two  # one pass made all layers
    file = covariance.moment_files(view, tok, chosen)[1]
    save_file(load_file(file), file)
    covariance.moments(view, tok, chosen, spent=spent)
    assert spent == {"covariance": None}
