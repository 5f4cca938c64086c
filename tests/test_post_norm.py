"""Families with a norm behind the FFN: the change that is written moves the stream as wanted, and attribution sees the stream."""

import pytest
import torch
from counting import Counts

from easyedit_nmke import methods
from easyedit_nmke.attribution import neuron_scores
from easyedit_nmke.attribution.masks import neuron_mask
from easyedit_nmke.methods import rome
from easyedit_nmke.methods.keys import attribution_inputs, subject_states
from easyedit_nmke.methods.located import edit_layers
from easyedit_nmke.methods.nmke import attributed, neuron_masks
from easyedit_nmke.methods.values import Value
from easyedit_nmke.models import post_norm
from easyedit_nmke.models.arch import FAMILIES, ModelView
from easyedit_nmke.models.hooks import record
from easyedit_nmke.models.post_norm import PostNorm
from easyedit_nmke.models.prompts import open_end
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import LowRank

METHOD_SETTINGS = {
    "MEMIT": dict(layers=[1], mom2_update_weight=2.0, template_prefixes=[]),
    "ROME": dict(layers=[1], context_template_length_params=[[3, 5], [4, 10]]),
}
POST_NORM = [kind for kind, family in FAMILIES.items() if family.post_norm]
REQUEST = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")


def added(norm: PostNorm, y):
    return norm.scale.double() * y / norm.statistic(y)[..., None]


@pytest.fixture
def settings(tmp_path):
    """settings(method, model, tok) -> hyperparameters for one layer of a small model on the CPU."""

    def make(method, model, tok):
        shared = dict(model_name=(model, tok), device="cpu", mom2_dataset="atlas", mom2_n_samples=200, stats_dir=str(tmp_path))
        return methods.method_named(method).hparams(**shared, **METHOD_SETTINGS[method])

    return make


@pytest.fixture
def case():
    """(norm, outputs [5, 32], others of the same length), float64."""
    g = torch.Generator().manual_seed(0)
    y, other = torch.randn(2, 5, 32, generator=g, dtype=torch.float64) * 3
    return (
        PostNorm(1 + 0.5 * torch.randn(32, generator=g), 1e-6),
        y,
        other / other.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True),
    )


def test_a_movement_within_reach_is_made_exactly(case):
    norm, y, other = case
    wanted = added(norm, other) - added(norm, y)
    assert torch.allclose(added(norm, y + norm.change(y, wanted)), added(norm, other), atol=1e-5)
    assert torch.allclose(norm.change(y, torch.zeros_like(y)), torch.zeros_like(y), atol=1e-9)


def test_a_shorter_output_is_the_frozen_norms(case):
    """wanted·σ/g while that makes the output no longer; the norm then lengthens all of it by one factor."""
    norm, y, _ = case
    wanted = -0.3 * added(norm, y)
    change = norm.change(y, wanted)
    assert torch.allclose(change, wanted * norm.statistic(y)[:, None] / norm.scale, atol=1e-6)


@pytest.mark.parametrize("size", [0.5, 3.0, 1e4])
def test_beyond_reach_it_goes_to_the_nearest_point(case, size):
    norm, y, _ = case
    g = torch.Generator().manual_seed(1)
    wanted = size * 6 * torch.randn(5, 32, generator=g, dtype=torch.float64)
    target, new = added(norm, y) + wanted, y + norm.change(y, wanted)
    found = added(norm, new)
    assert torch.allclose(norm.statistic(new), norm.statistic(y), rtol=1e-5), "the length is kept"
    distance = (found - target).norm(dim=1)
    for width in (1e-3, 0.1, 1.0):
        near = added(norm, new + width * torch.randn(200, 5, 32, generator=g, dtype=torch.float64))
        assert ((near - target).norm(dim=2) >= distance * (1 - 1e-9)).all()
    assert ((found - added(norm, y)).norm(dim=1) <= 2 * 32**0.5 * norm.scale.abs().max()).all()


def test_scales_and_outputs_of_zero_are_finite(case):
    norm, y, _ = case
    norm = PostNorm(norm.scale * (torch.arange(32) > 3), norm.eps)
    for states in (y, torch.zeros_like(y)):
        assert norm.change(states, torch.ones_like(y)).isfinite().all()
        assert norm.change(states, torch.zeros_like(y)).isfinite().all()


@pytest.mark.parametrize("spread", [0.1, 3, 12])
@pytest.mark.parametrize("length", [1.01, 30, 1e6])
def test_the_damping_is_the_root_to_the_last_digits(spread, length):
    """Against bisection, with scales and targets over so many orders of magnitude."""
    g = torch.Generator().manual_seed(4)
    scale = 10 ** (spread * (torch.rand(32, generator=g, dtype=torch.float64) - 0.5))
    target = torch.randn(20, 32, generator=g, dtype=torch.float64) * scale * scale.roll(1)
    target *= length / (target / scale**2).square().mean(1, keepdim=True).sqrt()
    low, high = torch.zeros(20, 1, dtype=torch.float64), target.square().mean(1, keepdim=True).sqrt()
    for _ in range(2000):  # from values of any size: the middle of the exponents first
        middle = torch.where(low > 0, (low * high).sqrt(), high * 1e-6)
        long = (target / (scale**2 + middle)).square().mean(1, keepdim=True) > 1
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    assert torch.allclose(post_norm._damping(scale, target), high, rtol=1e-9)


def test_a_movement_is_few_launches(case):
    norm, y, _ = case
    with Counts() as counts:
        norm.change(y, 100 * torch.ones_like(y))
    assert counts.launches["rest"] <= 220


def at_subject(view, tok, module):
    return subject_states(view, tok, [[REQUEST.fill("{}")]], {"s": (module, "output")})["s"][0, 0].double()


def reachable(view, tok, layer):
    """Another output of the norm behind the FFN, of an FFN output as long as the one at the subject."""
    y = at_subject(view, tok, view.down(layer))
    other = torch.randn(len(y), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return added(view.post_norm(layer), other / other.norm() * y.norm())


@pytest.mark.parametrize("kind", POST_NORM)
def test_rome_brings_the_norms_output_to_z(tiny, settings, monkeypatch, kind):
    model, tok = tiny(kind)
    view = ModelView(model)
    z = reachable(view, tok, 1)
    assert (at_subject(view, tok, view.addend(1)) - z).norm() > 1
    monkeypatch.setattr(rome, "target_values", lambda *_, **__: [Value(z.float(), 0.0, 1)])
    methods.apply_rome_to_model(model, tok, [REQUEST], settings("ROME", model, tok))
    assert torch.allclose(at_subject(view, tok, view.addend(1)), z, atol=1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_stream_moves_to_z_where_the_key_gives_what_is_asked(tiny, settings, kind):
    """With directions that answer the key exactly and one layer, all of the residual is written, whatever the family."""
    model, tok = tiny(kind)
    view = ModelView(model)
    chosen = settings("MEMIT", model, tok)
    state = methods.open_state(model, tok, chosen)
    state.follow(methods.method_named("MEMIT").matrices(model, chosen))
    before = at_subject(view, tok, view.blocks[1])
    if kind in POST_NORM:
        z = before - at_subject(view, tok, view.addend(1)) + reachable(view, tok, 1)
    else:
        z = before + torch.randn(32, generator=torch.Generator().manual_seed(2))

    def exactly(view, state, layer, keys, left, mask, again):
        return LowRank(view.weight_name(layer), left, (keys / keys.pow(2).sum(0)).T.contiguous()), keys

    edit_layers(view, tok, [REQUEST], chosen, state, z.float()[:, None], update=exactly)
    assert (z - before).norm() > 1 and torch.allclose(at_subject(view, tok, view.blocks[1]), z, atol=2e-3)


@pytest.mark.parametrize("strategy", ["lps", "psa", "mpc"])
@pytest.mark.parametrize("kind", POST_NORM)
def test_attribution_is_of_what_the_stream_gets(tiny, kind, strategy):
    """By the definition, through the model's own modules: neuron n adds norm(y)'s share c_n v_n, both norms frozen."""
    model, tok = tiny(kind)
    view, text = ModelView(model), "The birthplace of Mara Vosk is"
    seen = attribution_inputs(view, tok, [text], [1])
    found = neuron_scores(
        seen.coefficients[1], seen.residual[1], view.values(1), view.readout, seen.predicted, strategy=strategy,
        amplification=5.0, final_hidden=seen.final_hidden,
    )[0]  # fmt: skip
    kept = {}
    hooks = [
        view.down(1).register_forward_hook(lambda _, args, out: kept.update(c=args[0][0, -1], y=out[0, -1])),
        view.norm.register_forward_pre_hook(lambda _, args: kept.update(final=args[0][0, -1])),
    ]
    with torch.no_grad():
        out = model(**tok(text, return_tensors="pt"), output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        gain = view.addend(1)(kept["y"]) / kept["y"]  # g/σ
        x = out.hidden_states[2][0, -1] - view.addend(1)(kept["y"])
        share = gain * (view.down(1).weight * kept["c"]).T  # [F, D]
        frozen = view.norm(kept["final"]) / kept["final"]
        cap = getattr(model.config, "final_logit_softcapping", None)

        def said(state):
            logits = view.head(state * frozen)
            logits = cap * torch.tanh(logits / cap) if cap else logits
            return logits.log_softmax(-1)[..., out.logits[0, -1].argmax()]

        after, now = said(x + 5.0 * share), said(x)
    expected = {"lps": after - now, "psa": after.exp() - now.exp(), "mpc": share.norm(dim=1)}[strategy]
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["llama", "gpt2", *POST_NORM])
def test_alignment_is_of_what_the_stream_gets_at_the_subject(tiny, nmke_hparams, kind):
    """By the definition, through the model's own modules, in two templates: what neuron n adds, times the way from the last
    edited block's output to z."""
    model, tok = tiny(kind)
    view, chosen = ModelView(model), nmke_hparams(model, tok, attribution_strategy="align", layers=[0, 1])
    templates, z = ["{}", "Well, so it is. {}"], torch.randn(32, 1, generator=torch.Generator().manual_seed(3))
    found = attributed(view, tok, [REQUEST], templates, chosen, z=z)
    for number, template in enumerate(templates):
        text, end = REQUEST.fill(template, tok)
        at = len(tok(text[:end]).input_ids) - 1
        wanted = {f"{side} {layer}": (view.down(layer), side) for layer in (0, 1) for side in ("input", "output")}
        with torch.no_grad(), record(wanted) as seen:
            out = model(**tok(text, return_tensors="pt"), output_hidden_states=True)
        toward = z[:, 0] - out.hidden_states[2][0, at]
        for layer in (0, 1):
            c, y = seen[f"input {layer}"][0, at], seen[f"output {layer}"][0, at]
            with torch.no_grad():
                gain = view.addend(layer)(y) / y if view.family.post_norm else torch.ones(len(y))
            expected = toward @ (gain[:, None] * view.w_out(layer) * c)
            assert expected.abs().max() > 1e-3
            assert torch.allclose(found[layer][number], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    with pytest.raises(ValueError, match="none are given"):
        neuron_masks(view, tok, [REQUEST], templates, chosen)


@pytest.mark.parametrize("kind", POST_NORM)
def test_masks_are_those_of_the_streams_values(tiny, nmke_hparams, kind):
    model, tok = tiny(kind)
    few = dict(neurons="specific", ratio="fixed", specific_ratio=0.7)
    view, chosen = ModelView(model), nmke_hparams(model, tok, attribution_strategy="mpc", layers=[1], **few)
    found = neuron_masks(view, tok, [REQUEST], ["{}"], chosen)[1].mask
    text = open_end(REQUEST.prompt, chosen.target_separator, tok)[0]
    seen = attribution_inputs(view, tok, [text], [1])

    def mask(values):
        return neuron_mask(seen.coefficients[1].abs() * values.norm(dim=0), chosen).mask

    scale = view.addend(1).weight.data + (1 if "gemma" in kind else 0)
    assert torch.equal(found, mask(scale[:, None] * view.w_out(1)))
    assert not torch.equal(found, mask(view.w_out(1))), "so the comparison can fail"
