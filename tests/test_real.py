"""Language models from the package index, with their own weights. Only by `-m real`, where their packages are installed."""

import dataclasses
import importlib
import json

import pytest
import test_easyedit as inside
import test_easyedit_baselines as side_by_side
import torch
from test_post_norm import METHOD_SETTINGS, added

import easyedit_nmke
from easyedit_nmke import LifelongEditor, cli, facts, methods
from easyedit_nmke.attribution import neuron_scores
from easyedit_nmke.methods import read
from easyedit_nmke.methods.keys import attribution_inputs, subject_states
from easyedit_nmke.methods.located import edit_layers
from easyedit_nmke.methods.values import target_values
from easyedit_nmke.models import gguf
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.loading import load_model
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import LowRank
from easyedit_nmke.scores import metrics

pytestmark = pytest.mark.real
easyeditor = inside.easyeditor
LAYER = 6
REQUEST = Request("The capital of France is", "France", "Rome")


def found(name):
    """(model, tok) of a packaged model, from its folder in the user's cache; skips without its packages."""
    try:
        gguf.find(name)
    except ValueError as missing:
        pytest.skip(str(missing))
    return load_model(methods.method_named("NMKE").hparams(model_name=name, layers=[0], device="cpu"))


@pytest.fixture
def smollm2():
    return found("smollm2")


@pytest.fixture(scope="module")
def gemma3():
    return found("gemma3-270m")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text for the covariance of keys, of 3 tokens a neuron, and one place to keep it for all tests."""
    place = tmp_path_factory.mktemp("text") / "facts.txt"
    place.write_text("\n".join(facts.texts()[:400]))
    return {"mom2_dataset": str(place), "mom2_n_samples": 400, "stats_dir": str(place.with_name("stats"))}


def rel(model, tok, records):
    """Mean share of the new answers' tokens after the edited prompts."""
    pairs = [(record["prompt"], record["target_new"]) for record in records]
    shares = metrics.token_accuracy(model, tok, pairs)
    return sum(shares) / len(shares)


# ---- smollm2


def test_five_facts_are_edited_one_after_the_other(smollm2, text):
    records = facts.requests(5, split="test")
    settings = dataclasses.replace(read("AlphaEdit/smollm2"), model_name=smollm2, **text)
    editor = LifelongEditor.from_hparams(settings)
    assert rel(editor.model, editor.tok, records) <= 0.5
    for record in records:
        editor.apply([record])
    assert rel(editor.model, editor.tok, records) >= 0.8


def test_the_demo_from_an_empty_cache(smollm2, monkeypatch, tmp_path, capsys):
    """The file is dequantised and the covariance taken, as where it runs for the first time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["demo", "--model", "smollm2", "--edits", "2", "--out", str(tmp_path / "demo.json")]) == 0
    out, content = capsys.readouterr().out, json.loads((tmp_path / "demo.json").read_text())
    assert all(part in out for part in ("in smollm2", "What the model says", "Rel says", "T = 2 edits"))
    assert content["results"]["AlphaEdit"]["rel"] >= 0.8 and content["results"]["NMKE"]["rel"] >= 0.5


@pytest.fixture
def table(easyeditor):
    """EasyEdit's table of methods, as it was when the test is over."""
    functions = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    before = dict(functions)
    yield functions
    functions.update(before)


def easyedits_own(easyeditor, method, model, text):
    """The values of AlphaEdit's file in EasyEdit's class; the weight of MEMIT's covariance is one for keys of this size."""
    kind, values = methods.method_named(method).hparams, vars(read("AlphaEdit/smollm2"))
    names = {field.name for field in dataclasses.fields(kind)} - {"alg_name"}
    values = {**values, "mom2_update_weight": 15.0, "model_name": model, **text}
    chosen = kind(**{name: value for name, value in values.items() if name in names})
    theirs = side_by_side.theirs_of(easyeditor, chosen, "atlas")  # whose head is tied as well
    theirs.model_name, theirs.device, theirs.stats_dir = chosen.model_name, "cpu", chosen.stats_dir
    return theirs


@pytest.mark.easyedit
@pytest.mark.parametrize("method", ["NMKE", "AlphaEdit", "MEMIT"])
def test_base_editor_edits_it_sequentially(easyeditor, table, smollm2, text, method):
    """NMKE as it registers itself; AlphaEdit and MEMIT are EasyEdit's, on this engine."""
    if method == "NMKE":
        hparams = dataclasses.replace(read("NMKE/smollm2"), model_name=smollm2, **text)
    else:
        easyedit_nmke.accelerate_easyedit(text_only=True)
        hparams = easyedits_own(easyeditor, method, smollm2, text)
    records, (_, tok) = facts.requests(3, split="test"), smollm2
    editor = inside.base_editor(easyeditor, hparams)
    _, edited, _ = editor.edit(**inside.arguments(records), sequential_edit=True, verbose=False)
    assert rel(edited, tok, records) == 1.0


# ---- gemma3: a norm behind the FFN


def test_attribution_of_gemma3_is_of_what_the_stream_gets(gemma3):
    """A few neurons, by the definition, through the model's own modules: neuron n adds norm(y)'s share c_n v_n, norms frozen."""
    model, tok = gemma3
    view = ModelView(model)
    seen = attribution_inputs(view, tok, [REQUEST.prompt], [LAYER])
    some = seen.coefficients[LAYER][0].abs().topk(12).indices
    scores = neuron_scores(
        seen.coefficients[LAYER][:, some], seen.residual[LAYER], view.values(LAYER)[:, some], view.readout, seen.predicted,
        amplification=5.0, final_hidden=seen.final_hidden,
    )[0]  # fmt: skip
    kept = {}
    hooks = [
        view.down(LAYER).register_forward_hook(lambda _, args, out: kept.update(c=args[0][0, -1], y=out[0, -1])),
        view.norm.register_forward_pre_hook(lambda _, args: kept.update(final=args[0][0, -1])),
    ]
    with torch.no_grad():
        out = model(**tok(REQUEST.prompt, return_tensors="pt"), output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        behind = view.addend(LAYER)(kept["y"])
        share = (behind / kept["y"]) * (view.down(LAYER).weight[:, some] * kept["c"][some]).T
        x = out.hidden_states[LAYER + 1][0, -1] - behind
        frozen = view.norm(kept["final"]) / kept["final"]
        said = lambda state: view.head(state * frozen).log_softmax(-1)[..., out.logits[0, -1].argmax()]
        expected = said(x + 5.0 * share) - said(x)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(scores.float(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_value_of_gemma3_is_the_plain_procedures(gemma3):
    model, tok = gemma3
    settings = methods.method_named("MEMIT").hparams(
        model_name=gemma3, layers=[LAYER], device="cpu", v_lr=0.5, v_num_grad_steps=4, clamp_norm_factor=4.0
    )
    args = ModelView(model), tok, [REQUEST], ["{}", "It is so. {}"], LAYER, settings
    (quick,), (plain,) = target_values(*args), target_values(*args, whole_texts=True)
    assert quick.steps == plain.steps and quick.loss == pytest.approx(plain.loss, rel=1e-4)
    assert (quick.z - plain.z).norm() <= 1e-4 * plain.z.norm()


def test_the_stream_of_gemma3_ends_at_z(gemma3, text):
    """Where the key gives what is asked, and z is within reach of the norm."""
    model, tok = gemma3
    view = ModelView(model)
    settings = methods.method_named("MEMIT").hparams(
        model_name=gemma3, device="cpu", **{**METHOD_SETTINGS["MEMIT"], "layers": [LAYER]}, **{**text, "mom2_dataset": "atlas"}
    )

    def at_subject(module):
        return subject_states(view, tok, [[REQUEST.fill("{}")]], {"s": (module, "output")})["s"][0, 0].double()

    y, before = at_subject(view.down(LAYER)), at_subject(view.blocks[LAYER])
    other = torch.randn(len(y), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = before - at_subject(view.addend(LAYER)) + added(view.post_norm(LAYER), other / other.norm() * y.norm())
    originals = view.weight(LAYER).detach().clone()
    state = methods.open_state(model, tok, settings)
    state.follow(methods.method_named("MEMIT").matrices(model, settings))

    def exactly(view, state, layer, keys, left, mask, again):
        return LowRank(view.weight_name(layer), left, (keys / keys.pow(2).sum(0)).T.contiguous()), keys

    edit_layers(view, tok, [REQUEST], settings, state, z.float()[:, None], update=exactly)
    after = at_subject(view.blocks[LAYER])
    with torch.no_grad():
        view.weight(LAYER).copy_(originals)
    assert (z - before).norm() > 0.05 * before.norm() and (after - z).norm() <= 1e-3 * (z - before).norm()
