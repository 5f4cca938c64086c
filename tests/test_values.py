"""Target values against a plain procedure: whole forward passes, the model's own logits, one prompt at a time."""

import dataclasses

import pytest
import torch

from easyedit_nmke.methods.values import target_values
from easyedit_nmke.models.arch import FAMILIES, ModelView
from easyedit_nmke.models.hooks import record, shifted
from easyedit_nmke.models.prompts import position_before, target_tokens, tokenised
from easyedit_nmke.models.requests import Request

TEMPLATES = ["{}", "I say this. {}", "Because of what you know by now. {}"]
REQUEST = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome and")


def plain_loss(model, tok, block, delta, z0_norm, reference, settings):
    """The loss as the method states it, from model(...).logits; returns it and the log-probabilities of the KL prompt."""
    view = ModelView(model)

    def logits_of(text, at, extra):
        ids = torch.tensor([tok(text)["input_ids"] + extra])

        def shift(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            hidden[0, at] += delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = view.blocks[block].register_forward_hook(shift)
        try:
            return model(input_ids=ids, use_cache=False).logits[0]
        finally:
            handle.remove()

    losses = []
    for template in TEMPLATES:
        text, end = REQUEST.fill(template)
        target = target_tokens(tok, text, REQUEST.target_new)
        start = len(tok(text)["input_ids"])
        log_probs = logits_of(text, position_before(tok, text, end), target[:-1]).log_softmax(-1)
        losses.append(-torch.stack([log_probs[start - 1 + i, w] for i, w in enumerate(target)]).mean())
    text = f"{REQUEST.subject} is a"
    at = position_before(tok, text, len(REQUEST.subject))
    here = logits_of(text, at, [])[at].log_softmax(-1)
    reference = here.detach() if reference is None else reference
    kl = settings.kl_factor * (here.exp() * (here - reference)).sum()
    return torch.stack(losses).mean() + kl + settings.v_weight_decay * delta.norm() / z0_norm**2, reference


def plain_value(model, tok, block, settings):
    view = ModelView(model)
    text, end = REQUEST.fill("{}")
    with torch.no_grad():
        hidden = model(**tok(text, return_tensors="pt"), output_hidden_states=True).hidden_states[block + 1]
    z0 = hidden[0, position_before(tok, text, end)]
    delta = torch.zeros(view.readout.scale.shape[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.v_lr)
    reference, losses = None, []
    for step in range(settings.v_num_grad_steps):
        loss, reference = plain_loss(model, tok, block, delta, z0.norm(), reference, settings)
        losses.append(loss.item())
        if loss < 0.05 or step == settings.v_num_grad_steps - 1:
            break
        delta.grad = torch.autograd.grad(loss, delta)[0]
        optimiser.step()
        with torch.no_grad():
            longest = settings.clamp_norm_factor * z0.norm()
            if delta.norm() > longest:
                delta *= longest / delta.norm()
    return z0 + delta.detach(), losses


@pytest.mark.parametrize("kind", FAMILIES)
def test_same_value_and_loss_as_the_plain_procedure(tiny, nmke_hparams, kind):
    model, tok = tiny(kind)
    settings = nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=8, clamp_norm_factor=0.3, kl_factor=1.0)
    expected, losses = plain_value(model, tok, 1, settings)
    (found,) = target_values(ModelView(model), tok, [REQUEST], TEMPLATES, 1, settings)
    assert found.steps == len(losses)
    assert found.loss == pytest.approx(losses[-1], rel=1e-4)
    assert torch.allclose(found.z, expected, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
    (other,) = target_values(ModelView(model), tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, v_lr=0.05, kl_factor=0.5))
    assert not torch.allclose(other.z, expected, rtol=1e-3, atol=1e-3)  # so the comparison can fail


def test_it_stops_under_the_loss_and_stays_in_the_ball(atlas, nmke_hparams):
    model, tok = atlas
    view = ModelView(model)
    settings = nmke_hparams(model, tok, v_lr=1.0, v_num_grad_steps=100, clamp_norm_factor=5, v_weight_decay=1e-3)
    (long,) = target_values(view, tok, [dataclasses.replace(REQUEST, target_new="Rome")], TEMPLATES, 1, settings)
    assert long.loss < 0.05 and long.steps < 100
    (tight,) = target_values(
        view, tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, v_num_grad_steps=30, clamp_norm_factor=0.1)
    )
    (one,) = target_values(view, tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, v_num_grad_steps=1))
    assert (tight.z - one.z).norm() <= 0.1 * one.z.norm() * 1.0001


def test_only_a_target_that_is_not_yet_the_likelier_answer_gets_extra_steps(atlas, nmke_hparams):
    model, tok = atlas
    view = ModelView(model)
    requests = [REQUEST, dataclasses.replace(REQUEST, target_new="Rome")]
    few = dict(v_lr=1.0, v_num_grad_steps=12, clamp_norm_factor=5, kl_factor=3.0)  # the KL term keeps all losses over 0.05
    plain = target_values(view, tok, requests, TEMPLATES, 1, nmke_hparams(model, tok, **few))
    more = target_values(view, tok, requests, TEMPLATES, 1, nmke_hparams(model, tok, **few, v_extra_steps=30))
    assert [value.steps for value in plain] == [12, 12]
    hard, easy = more
    assert 12 < hard.steps <= 42 and easy.steps == 12
    assert torch.equal(easy.z, plain[1].z) and hard.loss < plain[0].loss
    (alone,) = target_values(view, tok, requests[:1], TEMPLATES, 1, nmke_hparams(model, tok, **few, v_extra_steps=30))
    assert alone.steps == hard.steps and torch.allclose(alone.z, hard.z, rtol=1e-3, atol=1e-3)


def test_a_value_may_stop_once_every_template_gives_the_whole_target_a_probability(atlas, requests, nmke_hparams):
    model, tok = atlas
    view, block = ModelView(model), 1
    known = Request.from_dict(requests(1)[0])
    request = dataclasses.replace(known, target_new=known.target_new + ".")  # two tokens
    settings = dict(v_lr=0.7, v_num_grad_steps=40, clamp_norm_factor=5, kl_factor=3.0)

    def least(value):
        """The least probability of the whole target under any template, with the value in its place."""
        found = []
        for template in TEMPLATES:
            text, end = request.fill(template, tok)
            row = tokenised(tok, text, end, request.target_new)
            assert len(row.labels) > 1
            at = tokenised(tok, *request.fill("{}", tok)).subject
            with torch.no_grad(), record({"z": (view.blocks[block], "output")}) as bare:
                model(torch.tensor([tokenised(tok, request.prompt).ids]))
            delta = value.z - bare["z"][0, at]
            with torch.no_grad(), shifted(view.blocks[block], torch.tensor([row.subject]), delta[None]):
                said = model(torch.tensor([row.ids])).logits[0, row.target - 1 : -1].log_softmax(-1)
            found.append(said.gather(1, torch.tensor(row.labels)[:, None]).sum().exp().item())
        return min(found)

    def solved(**more):
        (value,) = target_values(view, tok, [request], TEMPLATES, block, nmke_hparams(model, tok, **{**settings, **more}))
        return value

    early = solved(v_stop_probability=0.3)
    assert 1 < early.steps < solved().steps
    assert least(early) >= 0.3
    assert least(solved(v_num_grad_steps=early.steps - 1)) < 0.3
    assert torch.equal(early.z, solved(v_num_grad_steps=early.steps).z)


def test_a_loss_layer_below_the_last_is_read_through_the_final_norm(tiny, nmke_hparams):
    model, tok = tiny("llama")
    view = ModelView(model)
    (low,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok, v_loss_layer=1))
    (last,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok, v_loss_layer=2))
    (default,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok))
    assert torch.equal(last.z, default.z) and not torch.allclose(low.z, default.z)


def test_a_value_stops_once_every_template_gives_the_whole_target_the_probability(atlas, nmke_hparams, requests):
    model, tok = atlas
    view, asked = ModelView(model), [Request.from_dict(record) for record in requests(3)]
    settings = dict(v_lr=1.0, v_num_grad_steps=15, clamp_norm_factor=5, v_weight_decay=1e-3)

    def probability(request, delta):
        """The smallest of the templates', from whole forward passes with δ added to what the block puts out."""
        found = []
        for template in TEMPLATES:
            text, end = request.fill(template, tok)
            target, at = target_tokens(tok, text, request.target_new), position_before(tok, text, end)

            def shift(_module, _args, output, at=at):
                output[0, at] += delta
                return output

            handle = view.blocks[1].register_forward_hook(shift)
            with torch.no_grad():
                ids = tok(text)["input_ids"]
                logits = model(torch.tensor([ids + target[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
            handle.remove()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum().exp().item())
        return min(found)

    def values(**more):
        return target_values(view, tok, asked, TEMPLATES, 1, nmke_hparams(model, tok, **{**settings, **more}))

    start, off, found = values(v_num_grad_steps=1), values(), values(v_stop_probability=0.4)
    assert len({value.steps for value in found}) > 1, "each stops by itself"
    for request, z0, value, never in zip(asked, start, found, off, strict=True):
        assert value.steps < never.steps and probability(request, value.z - z0.z) >= 0.4
    last = max(value.steps for value in found)
    for request, z0, value, before in zip(asked, start, found, values(v_num_grad_steps=last - 1), strict=True):
        assert (probability(request, before.z - z0.z) < 0.4) == (value.steps == last)
    assert [value.steps for value in values(v_stop_probability=1.0)] == [value.steps for value in off]


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_check(tiny, nmke_hparams):
    model, tok = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"is nan at step 1; check v_lr \(0.5\)"):
        target_values(ModelView(model), tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok))


OTHERS = [Request("Nils Brandt speaks", "Nils Brandt", "Dutch"), Request("What does Ola play? Ola T plays the", "Ola T", "flute")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_running_only_what_depends_on_the_value_changes_nothing(tiny, nmke_hparams, kind, attention):
    model, tok = tiny(kind)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("softcapped attention is eager")
    model.set_attn_implementation(attention)
    prompts = dict(locality_factor=0.7, locality_prompts=["{} works as a", "Where {} lives is called"])
    settings = nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=6, **prompts)
    view, asked = ModelView(model), [REQUEST, *OTHERS]
    for part in ("block", "ffn"):
        whole = target_values(view, tok, asked, TEMPLATES, 1, settings, part, whole_texts=True)
        quick = target_values(view, tok, asked, TEMPLATES, 1, settings, part)
        single = [target_values(view, tok, [request], TEMPLATES, 1, settings, part)[0] for request in asked]
        for expected, *found in zip(whole, quick, single, strict=True):
            for value in found:
                assert value.steps == expected.steps and value.loss == pytest.approx(expected.loss, rel=1e-4)
                assert torch.allclose(value.z, expected.z, rtol=1e-3, atol=1e-4)


def test_texts_without_any_padding(tiny, nmke_hparams):
    model, tok = tiny("llama")
    settings = nmke_hparams(model, tok, v_lr=0.05, kl_factor=0.0)
    request = Request("Mara Vosk is a", "Mara Vosk", "x")  # as long with its target as the KL prompt
    args = (ModelView(model), tok, [request], ["{}"], 1, settings)
    assert torch.allclose(target_values(*args)[0].z, target_values(*args, whole_texts=True)[0].z, rtol=1e-4, atol=1e-5)


def test_the_locality_term_is_the_mean_divergence_at_the_end_of_prompts_that_ask_something_else(tiny, nmke_hparams):
    """By the definition, with whole forward passes."""
    model, tok = tiny("llama")
    view = ModelView(model)
    prompts = ["{} works as a", "So {} plays the", REQUEST.prompt.replace(REQUEST.subject, "{}")]  # the last asks the edited fact

    def said(text, delta=None):
        def shift(_module, _args, output):
            at = position_before(tok, text, text.index(REQUEST.subject) + len(REQUEST.subject))
            output[0, at] += delta
            return output

        handle = view.blocks[1].register_forward_hook(shift) if delta is not None else None
        try:
            with torch.no_grad():
                return model(**tok(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        finally:
            if handle:
                handle.remove()

    texts = [prompt.replace("{}", REQUEST.subject) for prompt in prompts]
    assert said(texts[2]).argmax() != said(texts[0]).argmax() and said(texts[2]).argmax() != said(texts[1]).argmax()

    def loss(factor, steps):
        chosen = dict(v_lr=0.05, v_num_grad_steps=steps, locality_factor=factor, locality_prompts=prompts)
        return target_values(view, tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, **chosen))[0]

    assert loss(0.7, 1).loss == pytest.approx(loss(0.0, 1).loss, rel=1e-5)  # nothing has moved yet
    free, held = loss(0.0, 9), loss(50.0, 9)
    text, end = REQUEST.fill("{}")
    with torch.no_grad():
        hidden = model(**tok(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2]
    z0 = hidden[0, position_before(tok, text, end)]

    def divergence(value):
        pairs = [(said(t), said(t, value.z - z0)) for t in texts[:2]]
        return sum((a.exp() * (a - b)).sum().item() for a, b in pairs) / 2

    assert divergence(held) < 0.5 * divergence(free)
    # the loss that was reached holds exactly factor x divergence more than the loss without the term at the same value
    barely = loss(1e-6, 2), loss(0.7, 2)
    first_step = loss(0.0, 2)
    assert torch.allclose(barely[0].z, first_step.z, atol=1e-5)
    assert barely[1].loss - first_step.loss == pytest.approx(0.7 * divergence(first_step), rel=0.05)
