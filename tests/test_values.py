"""Target values against a plain procedure: whole forward passes, the model's own logits, one prompt at a time."""

import dataclasses

import pytest
import torch

from easyedit_nmke.arch import FAMILIES, ModelView
from easyedit_nmke.prompts import Request, position_before, target_tokens
from easyedit_nmke.values import target_values

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
    kl = settings.kl_factor * (reference.exp() * (reference - here)).sum()
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
    settings = nmke_hparams(model, tok, v_lr=0.05, v_num_grad_steps=8, clamp_norm_factor=0.08)
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
    (tight,) = target_values(view, tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, v_num_grad_steps=30, clamp_norm_factor=0.1))
    (one,) = target_values(view, tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok, v_num_grad_steps=1))
    assert (tight.z - one.z).norm() <= 0.1 * one.z.norm() * 1.0001


def test_a_loss_layer_below_the_last_is_read_through_the_final_norm(tiny, nmke_hparams):
    model, tok = tiny("llama")
    view = ModelView(model)
    (low,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok, v_loss_layer=1))
    (last,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok, v_loss_layer=2))
    (default,) = target_values(view, tok, [REQUEST], TEMPLATES, 0, nmke_hparams(model, tok))
    assert torch.equal(last.z, default.z) and not torch.allclose(low.z, default.z)


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_check(tiny, nmke_hparams):
    model, tok = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"is nan at step 1; check v_lr \(0.5\)"):
        target_values(ModelView(model), tok, [REQUEST], TEMPLATES, 1, nmke_hparams(model, tok))
