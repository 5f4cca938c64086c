"""What `nmke bench --dry` predicts, against what is counted on tiny models of each architecture, and on a real one."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting import Counts

from easyedit_nmke import bench, cli
from easyedit_nmke.bench import cards, engines, predict, shapes
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods import apply_to_model, located, method_of
from easyedit_nmke.methods.keys import Contexts, _distinct
from easyedit_nmke.methods.solver import NullSpaceSolver
from easyedit_nmke.methods.value_texts import rows_of
from easyedit_nmke.models import gguf, products
from easyedit_nmke.models.prompts import encode

SIZES = [(32, 96, 4, 4, 2, 700, (0, 1)), (48, 160, 5, 4, 4, 900, (0, 1, 2)), (64, 384, 7, 4, 1, 3000, (1, 3))]
STEPS, PAST = 4, 20


def shape(kind, hidden, neurons, depth, heads, shared, words, layers):
    if kind == "gpt2":
        config = dict(n_embd=hidden, n_inner=neurons, n_layer=depth, n_head=heads, n_positions=128, vocab_size=words)
        return shapes.Shape(kind, config, layers, "gpt2-xl")
    return shapes.Shape(kind, shapes._llama(kind, hidden, neurons, depth, heads, shared, words, head_dim=16), layers)


@pytest.fixture
def counted(monkeypatch):
    """counted(shape) -> (what an NMKE edit is predicted to take, what it took)."""
    settings, timed = shapes.settings_of, located.phase
    monkeypatch.setattr(shapes, "settings_of", lambda shape: {**settings(shape), "v_num_grad_steps": STEPS})
    monkeypatch.setattr(predict, "settings_of", shapes.settings_of)
    monkeypatch.setattr(products, "_prefers_onednn", lambda weight: False)

    def make(shape):
        monkeypatch.setitem(shapes.SHAPES, "counted", shape)
        bed = shapes.build("counted", 1, None, "cpu", torch.float32)
        hparams = bed.hparams("NMKE", attribution_backend="fast")
        solvers = {layer: NullSpaceSolver(bed.bases[layer], bed.l2) for layer in bed.layers}
        for layer, solver in solvers.items():
            solver.append(bed.past(layer, PAST))
        state = LifelongState(hparams.state_settings(), solvers, bed.templates)
        state.follow(method_of(hparams).matrices(bed.model, hparams))
        counts = Counts(bed.model.parameters())

        @contextmanager
        def phase(report, name):
            with timed(report, name), counts.phase(name):
                yield

        monkeypatch.setattr(located, "phase", phase)
        with counts:
            apply_to_model(bed.model, bed.tok, bed.requests, hparams, state=state)
        (request,) = bed.requests
        keys, _ = _distinct(bed.tok, [Contexts(bed.templates).texts(request, bed.tok)])
        prompts = [encode(bed.tok, request.fill(template, bed.tok)[0]) for template in bed.flat_templates]
        rows = rows_of(bed.tok, 0, request, bed.flat_templates, hparams)
        texts = predict.Texts(rows, [len(key) for key in keys], [len(prompt) for prompt in prompts])
        assert predict.Model.of(bed.model.config).parameters == pytest.approx(
            sum(p.numel() for p in bed.model.parameters()), rel=0.15
        )
        return predict.edit_of(shape, PAST, "float32", "fast", False, texts), counts

    return make


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3_text"])
def test_an_edit_takes_what_the_formulas_say(counted, kind, sizes):
    edit, counts = counted(shape(kind, *sizes))
    work, memory = edit.work(), edit.memory()
    assert set(work) == set(memory) == set(predict.PHASES)
    for name, part in work.items():
        assert part.flops == pytest.approx(counts.flops[name], rel=0.01), name
        most = 0.3 if name == "attribution" else 0.1  # logits that stray far take a second way
        assert part.launches == pytest.approx(counts.launches[name], rel=most), name
        assert abs(part.waits - counts.waits[name]) <= 2, name
        assert counts.read[name] <= part.bytes <= counts.bytes[name], name  # what stays in the cache is in neither
        assert 0.7 * counts.peak[name] <= memory[name] <= 2.5 * counts.peak[name], name


def test_an_edit_of_8b_in_bfloat16_takes_less_than_26_gb():
    """Also with two thousand edits before it; `fused` is what a card gets that is not three times as large."""
    for past in (0, 2000):
        for backend in ("fused", None):
            edit = predict.edit_of(shapes.SHAPES["llama3-8b"], past, "bfloat16", backend, True)
            assert 16e9 < edit.held()["weights"] < edit.peak() <= 26e9


@pytest.mark.parametrize(
    "name, parameters", [("llama3-8b", 8.03e9), ("llama3-70b", 70.6e9), ("qwen2.5-7b", 7.62e9), ("gpt2-xl", 1.56e9)]
)
def test_sizes_are_those_of_the_models(name, parameters):
    assert predict.edit_of(shapes.SHAPES[name], 0, "bfloat16", None, True).model.parameters == pytest.approx(parameters, rel=0.005)


def test_the_roofline_takes_what_is_slowest():
    rates = {"float32": 1e12, "float64": 1e11}
    card = cards.Card("a card", 1e9, 1e9, rates, 1e9, "made up", launch=1e-3, wait=1e-2)
    assert predict.Work("float32", 1e12, 5e8, 1e9, 10, 3).seconds(card) == pytest.approx(2.03)
    assert predict.Work("float64", 1e11, 5e9, 0, 10, 0).seconds(card) == pytest.approx(5)
    assert predict.Work("float32", 0, 0, 0, 2000, 0).seconds(card) == pytest.approx(2)
    assert predict.Work("float32", 1e12, 5e8, 0, 100, 0).seconds(replace(card, overlaps=False)) == pytest.approx(1.6)


def test_a_dry_run_tells_of_every_card_and_writes_json(tmp_path, capsys):
    out = tmp_path / "dry.json"
    assert cli.main(["bench", "--dry", "--shape", "llama3-8b,gpt2-xl", "--out", str(out)]) == 0
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "predicted, not measured" in printed and "NVIDIA H100 Tensor Core GPU data sheet" in printed
    found = {(r["shape"], r["card"], r["engine"]): r for r in content["results"]}
    assert {card for _, card, _ in found} == set(cards.CARDS)
    assert found["llama3-8b", "h100", "NMKE, cached"]["peak"] > 30e9
    assert ("llama3-8b", "rtx4090", "NMKE, cached") not in found
    for (_, _, engine), r in found.items():
        assert set(r["work"]) == set(r["seconds"]) == set(predict.PHASES) - ({"attribution"} if engine == "AlphaEdit" else set())
        assert r["total"] == pytest.approx(sum(r["seconds"].values())) and 0 < r["thousand"] < 3600
        assert r["devices"] == math.ceil(r["peak"] / (content["cards"][r["card"]]["memory"] - predict.KEPT_FREE))
    assert found["llama3-8b", "h200", "AlphaEdit"]["total"] <= found["llama3-8b", "a100", "AlphaEdit"]["total"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--dry", "--part", "solve"], "leave out --part"),
        (["--dry", "--device-model", "h10"], "no card 'h10' (did you mean 'h100'?); known: h100, h200, a100, rtx4090, here"),
        (["--dry", "--shape", "huge"], "no shape 'huge'"),
        (["--dry", "--dtype", "int8"], "dtype is 'int8'"),
        (["--device-model", "h100"], "--device-model goes with --dry"),
        (["--dry", "--batch", "10"], "leave out --batch"),
        (["--dry", "--device-model", "here", "--device", "cuda"], "no CUDA device is visible here"),
    ],
)
def test_what_cannot_be_predicted_is_said(argv, said, capsys):
    assert cli.main(["bench", *argv]) == 1
    assert said in capsys.readouterr().err


def test_this_machine_is_measured():
    card = cards.card_named(cards.HERE)
    assert card.source == "measured" and not card.overlaps
    assert 1e9 < card.bandwidth < 1e13 and card.rates["float32"] > card.rates["float64"] / 2 > 1e8 and 1e-8 < card.launch < 1e-3
    (result,) = [r for r in predict.predict(["atlas"], [cards.HERE], 10)["results"] if r["engine"] == "AlphaEdit"]
    assert result["dtype"] == "float32" and 0.001 < result["total"] < 10


def test_the_page_holds_what_the_command_prints():
    page, content = Path("docs/scale.md").read_text(), json.loads(Path("docs/bench/predicted.json").read_text())
    now = json.loads(json.dumps(predict.predict(predict.SHAPES, tuple(cards.CARDS), 1000)))
    assert {name: content[name] for name in now} == now, f"make docs/bench/predicted.json anew: {content['command']}"
    for cells in predict.rows(content)[1]:
        assert f"| {' | '.join(cells)} |" in page
    assert content["command"] in page


@pytest.mark.real
def test_a_real_edit_takes_at_most_twice_as_long_as_predicted_or_half():
    try:
        gguf.find("smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    bed = shapes.build("smollm2", 1, None, "cpu", torch.float32)
    solvers, predicted = {layer: NullSpaceSolver(bed.bases[layer], bed.l2) for layer in bed.layers}, {}
    for result in predict.predict(["smollm2"], [cards.HERE], 1)["results"]:
        predicted[result["engine"]] = result["total"]
    for engine in (
        engines.Ours(bed, "NMKE", solvers, "NMKE, fast", attribution_backend="fast"),
        engines.Ours(bed, "AlphaEdit", solvers),
    ):
        engine.prepare(1)
        seconds, _ = min((bench._edit(bed, engine, bed.requests[0])[0].total, i) for i in range(2))
        assert predicted[engine.name] / 2 < seconds < 2 * predicted[engine.name], engine.name
