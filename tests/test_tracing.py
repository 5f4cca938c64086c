"""Causal tracing against a plain version that runs the whole model for every state, and where the effect is known."""

import pytest
import torch

from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.scores.tracing import subject_noise, trace


def plain(view, ids, subject, noise, draws, seed, window, answer):
    """(noised [R], state and ffn [R, T, L]) by forward passes of the whole model, one for each."""
    model = view.model
    embed = model.get_input_embeddings()
    drawn = torch.randn(draws, len(subject), embed.weight.shape[1], generator=torch.Generator().manual_seed(seed)) * noise
    tokens, clean = torch.tensor([ids]), {}

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def keep(name):
        return lambda _module, _args, output: clean.__setitem__(name, first(output).clone())

    def put(name, token):
        def hook(_module, _args, output):
            changed = first(output).clone()
            changed[:, token] = clean[name][:, token]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def said(hooks):
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        logits = model(input_ids=tokens).logits[0, -1]
        for handle in handles:
            handle.remove()
        return torch.softmax(logits.double(), -1)[answer].item()

    parts = [(f"s{i}", view.blocks[i]) for i in range(view.depth)] + [(f"f{i}", view.addend(i)) for i in range(view.depth)]
    said([(module, keep(name)) for name, module in parts])
    found = torch.zeros(2, draws, len(ids), view.depth)
    noised = []
    for draw in range(draws):

        def add(_module, _args, output, draw=draw):
            output = output.clone()
            output[:, subject.start : subject.stop] += drawn[draw]
            return output

        noised.append(said([(embed, add)]))
        for token in range(len(ids)):
            for layer in range(view.depth):
                found[0, draw, token, layer] = said([(embed, add), (view.blocks[layer], put(f"s{layer}", token))])
                around = [i for i in range(layer - (window - 1) // 2, layer + window // 2 + 1) if 0 <= i < view.depth]
                found[1, draw, token, layer] = said([(embed, add), *((view.addend(i), put(f"f{i}", token)) for i in around)])
    return noised, *found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "gemma2"])
def test_it_is_what_whole_runs_say(tiny, kind):
    model, tok = tiny(kind)
    view, ids, subject = ModelView(model), tok("Rome is in Italy and")["input_ids"][:5], range(1, 3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = trace(view, ids, subject, 0.5, 2, 7, 2)
    noised, state, ffn = plain(view, ids, subject, 0.5, 2, 7, 2, found.answer)
    clean = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
    assert found.answer == int(clean.argmax()) and found.clean == pytest.approx(clean.max().item(), rel=1e-4)
    torch.testing.assert_close(found.noised, torch.tensor(noised), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.state, state, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.ffn, ffn, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_many_tokens_are_traced_in_parts(tiny, monkeypatch):
    model, tok = tiny("llama")
    view, ids = ModelView(model), tok("Rome is in Italy and")["input_ids"][:5]
    whole = trace(view, ids, range(1, 3), 0.5, 2, 7, 1)
    monkeypatch.setattr("easyedit_nmke.scores.tracing.ROWS_AT_A_TIME", 4)
    torch.testing.assert_close(trace(view, ids, range(1, 3), 0.5, 2, 7, 1).state, whole.state)


def test_the_embedded_model_reads_a_fact_at_the_last_subject_token_early_and_passes_it_on_late(atlas, requests):
    """It was trained so: nothing else can look up the subject in blocks 0 to 2."""
    model, tok = atlas
    view = ModelView(model)
    from easyedit_nmke.experiments.analyses.trace import _placed

    texts = [_placed(tok, request["prompt"], request["subject"]) for request in requests(6)]
    noise = subject_noise(view, [ids[place.start : place.stop] for _, ids, place in texts])
    early, late, others = [], [], []
    for _, ids, subject in texts:
        found = trace(view, ids, subject, noise, 2, 0, 1)
        state = found.state.mean(0) - found.noised.mean()
        torch.testing.assert_close(found.state[:, -1, -1], torch.full((2,), found.clean), rtol=1e-4, atol=1e-5)
        lost = found.clean - found.noised.mean().item()
        early.append(state[subject.stop - 1, :3].min().item() / lost)
        late.append(state[-1, -2].item() / lost)
        others.append(state[: subject.stop - 1].max().item() / lost)
    assert sum(early) / 6 > 0.5 and sum(others) / 6 < 0.3 and sum(late) / 6 > 0.3


def test_no_noise_changes_nothing(tiny):
    model, tok = tiny("llama")
    found = trace(ModelView(model), tok("Rome is in Italy")["input_ids"], range(1, 2), 0.0, 1, 0, 2)
    torch.testing.assert_close(found.state, torch.full_like(found.state, found.clean), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.ffn, torch.full_like(found.ffn, found.clean), rtol=1e-4, atol=1e-6)
