"""Every architecture through its row: readout, keys and residual stream against the model's own forward pass."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from transformers import AutoConfig

from easyedit_nmke import apply_nmke_to_model
from easyedit_nmke.methods.keys import Ascent, Contexts, attribution_inputs, key_and_value, keys_of, subject_states
from easyedit_nmke.methods.nmke import neuron_masks
from easyedit_nmke.models import hooks
from easyedit_nmke.models.arch import FAMILIES, UNEDITED, ModelView, Readout
from easyedit_nmke.models.requests import Request


@pytest.mark.parametrize("kind", FAMILIES)
def test_readout_and_coefficients_rebuild_the_models_own_outputs(tiny, kind):
    model, tok = tiny(kind)
    view = ModelView(model)
    texts = ["The birthplace of Mara Vosk is", "Mara Vosk speaks"]
    seen = attribution_inputs(view, tok, texts, [0, 1, 2])
    for row, text in enumerate(texts):
        with torch.no_grad():
            out = model(**tok(text, return_tensors="pt"), output_hidden_states=True)
        logits = view.readout.logits(seen.final_hidden[row])
        assert torch.allclose(logits, out.logits[0, -1], atol=1e-5)
        assert int(seen.predicted[row]) == int(out.logits[0, -1].argmax())
        for layer in (0, 1):  # x + w_out c (+ bias) is the block's output
            bias = getattr(view.down(layer), "bias", None)
            ffn = view.values(layer) @ seen.coefficients[layer][row] + (0 if bias is None else bias)
            assert torch.allclose(seen.residual[layer][row] + ffn, out.hidden_states[layer + 1][0, -1], atol=1e-5)


def test_the_padded_end_is_another_token_for_all_but_the_longest_prompt(tiny):
    model, tok = tiny("llama")
    view = ModelView(model)
    texts = ["The birthplace of Mara Vosk is", "Mara Vosk speaks"]
    last = attribution_inputs(view, tok, texts, [1])
    end = attribution_inputs(view, tok, texts, [1], "padded_end")
    assert torch.equal(last.final_hidden[0], end.final_hidden[0])
    assert not torch.allclose(last.final_hidden[1], end.final_hidden[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_writing_to_w_out_edits_the_model(tiny, kind):
    model, _ = tiny(kind)
    view = ModelView(model)
    view.w_out(1)[0, 3] = 7.0
    stored = view.weight(1)
    assert (stored[3, 0] if kind == "gpt2" else stored[0, 3]) == 7.0
    assert dict(model.named_parameters())[view.weight_name(1)] is stored


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'Linear' is not known; known types: llama, mistral, qwen2, qwen3, gpt2, gptj, "):
        ModelView(torch.nn.Linear(2, 2))


def test_every_family_has_a_tiny_model_in_the_tests():
    """All tests of architectures run over FAMILIES, on the models of this table."""
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mixtral", "a mixture of experts"),
        ("qwen3_moe", "a mixture of experts"),
        ("gpt_oss", "a mixture of experts"),
        ("deepseek_v3", "a mixture of experts"),
        ("jamba", "a hybrid"),
        ("mamba", "a hybrid"),
        ("qwen3_next", "a hybrid"),
        ("gemma3", "a model of images and text"),
        ("opt", "not known"),
    ],
)
def test_experts_and_hybrids_are_refused_by_name(kind, said):
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(kind)
    with pytest.raises(ValueError, match=f"model type '{kind}' is {said}.*; known types: {', '.join(FAMILIES)}$"):
        ModelView(model)


def test_a_mixture_of_experts_of_a_new_name_is_told_by_its_configuration():
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type="newmoe", num_local_experts=8)
    with pytest.raises(ValueError, match="'newmoe' is a mixture of experts"):
        ModelView(model)


def test_every_type_that_is_named_as_unedited_exists():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not set(UNEDITED) & set(FAMILIES)
    assert len(set(UNEDITED) & set(CONFIG_MAPPING_NAMES)) >= 0.9 * len(UNEDITED)


def test_another_package_adds_an_architecture_from_one_file(tmp_path, monkeypatch, tiny, nmke_hparams, requests):
    """A row by an entry point: its models are edited, and the list of known types holds it."""
    (tmp_path / "their_rows.py").write_text(
        "from easyedit_nmke.models.arch import Family\n"
        "row = Family('model.layers', 'mlp.down_proj', 'model.norm', 'rms', 'post_attention_layernorm')\n"
    )
    info = tmp_path / "their_rows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[easyedit_nmke.architectures]\nourllama = their_rows:row\nwrongllama = their_rows:Family\n"
    )
    model, tok = tiny("llama")
    model.config.model_type = "ourllama"
    with pytest.raises(ValueError, match="'ourllama' is not known"):
        ModelView(model)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ModelView(model).family.down == "mlp.down_proj"
    before = ModelView(model).weight(0).clone()
    apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert not torch.equal(ModelView(model).weight(0), before)
    with pytest.raises(ValueError, match=f"{', '.join(FAMILIES)}, ourllama, wrongllama$"):
        ModelView(torch.nn.Linear(2, 2))
    model.config.model_type = "wrongllama"
    with pytest.raises(ValueError, match=r"'wrongllama' of an installed package is .*expected a Family"):
        ModelView(model)


def test_layers_out_of_range(tiny):
    with pytest.raises(ValueError, match=r"layers \[3\] do not exist: the model has blocks 0 to 2"):
        ModelView(tiny("llama")[0]).check_layers([0, 3])


def test_recording_can_stop_early_and_leaves_no_hook(tiny):
    model, tok = tiny("llama")
    view, ran = ModelView(model), []
    handle = view.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    request = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")
    states = subject_states(view, tok, [[request.fill("{}")]], {"c": (view.down(1), "input")})
    assert states["c"].shape == (1, 1, 96) and not ran
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_recorded_calls_repeat_a_block(tiny, kind):
    model, tok = tiny(kind)
    view = ModelView(model)
    inputs = tok(["The birthplace of Mara Vosk is", "Mara Vosk speaks"], padding=True, return_tensors="pt")
    wanted = {"in": (view.blocks[2], "input"), "out": (view.blocks[2], "output")}
    with torch.no_grad(), hooks.record(wanted) as seen, hooks.record_calls(view.blocks) as calls:
        model.base_model(**inputs, use_cache=False)
    args, kwargs = calls[2]
    assert len(calls) == 3
    assert torch.equal(hooks.first_tensor(view.blocks[2](seen["in"], *args, **kwargs)), seen["out"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_large_half_precision_states_are_read_out_as_the_model_does(tiny, kind, dtype):
    model, _ = tiny(kind)
    view = ModelView(model.to(dtype))
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 400
    with torch.no_grad():
        expected = view.head(view.norm(states)).float()
    found = view.readout.logits(states).float()
    assert expected.abs().max() > 0.5 and (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_key_is_the_mean_over_groups_of_templates_and_other_prompts_of_the_subject(tiny):
    model, tok = tiny("llama")
    view = ModelView(model)
    request = Request("The birthplace of Mara Vosk is", "Mara Vosk", "Rome")
    contexts = Contexts([["{}"], ["I say. {}", "So. {}"]], ["{} speaks", "The home of {} is called"])

    def at_subject(text):
        end = text.index(request.subject) + len(request.subject)
        return subject_states(view, tok, [[(text, end)]], {"c": (view.down(1), "input")})["c"][0, 0]

    p = request.prompt
    groups = [[p], [f"I say. {p}", f"So. {p}"], ["Mara Vosk speaks", "The home of Mara Vosk is called"]]
    expected = torch.stack([torch.stack([at_subject(text) for text in group]).mean(0) for group in groups]).mean(0)
    found = keys_of(view, tok, [request], contexts, [1])[1]
    assert found.shape == (96, 1) and torch.allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    plain = keys_of(view, tok, [request], Contexts(contexts.groups), [1])[1]
    assert not torch.allclose(found, plain, rtol=1e-2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_module_is_computed_only_at_the_places_asked_for(tiny, kind):
    model, _ = tiny(kind)
    ffn, seen = ModelView(model).ffn(1), []
    x, places = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 6, 11])
    handle = ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    with torch.no_grad():
        expected = ffn(x).flatten(0, 1)
        with hooks.only_at({ffn: places}):
            found = ffn(x).flatten(0, 1)
        again = ffn(x).flatten(0, 1)
    handle.remove()
    rest = [i for i in range(12) if i not in places]
    assert torch.allclose(found[places], expected[places], rtol=1e-5, atol=1e-6) and not found[rest].any()
    assert torch.equal(again, expected) and not ffn._forward_hooks and not ffn._forward_pre_hooks


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [1]])
@pytest.mark.parametrize("kind", FAMILIES)
def test_keys_of_one_layer_after_the_other_are_those_of_whole_passes(tiny, monkeypatch, kind, layers):
    model, tok = tiny(kind)
    view = ModelView(model)
    asked = [
        Request(f"{before} birthplace of {name} is", name, "Rome") for before, name in (("The", "Mara Vosk"), ("So the", "Ola T"))
    ]
    contexts = Contexts([["{}"], ["I say. {}", "So. {}"]], ["{} speaks", "The home of {} is called"])
    monkeypatch.setattr("easyedit_nmke.methods.keys.ROWS_AT_A_TIME", 3)
    ran = []
    for i, block in enumerate(view.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    ascent = Ascent(view, tok, asked, contexts, layers[-1])
    start = 0
    for layer in layers:
        ran.clear()
        keys, values, outputs = ascent(layer)
        assert set(ran) == set(range(start, layers[-1] + 1)), "blocks below the last edited one run once"
        start = layer
        for found, expected in zip((keys, values), key_and_value(view, tok, asked, contexts, layer, layers[-1]), strict=True):
            assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        at = {"y": (view.down(layer), "output")}
        y = subject_states(view, tok, [[request.fill("{}")] for request in asked], at)["y"][:, 0].T
        assert torch.allclose(outputs, y, rtol=1e-4, atol=1e-5)
        view.w_out(layer).mul_(1.5)
    last = keys_of(view, tok, asked, contexts, layers)
    assert torch.allclose(last[layers[-1]], keys, rtol=1e-4, atol=1e-5), "the edited model's keys, before the last layer is edited"


def test_states_go_to_the_head_and_the_head_nowhere(tiny):
    """It is a gigabyte where several devices share a model, and asked for at every step of a value."""
    readout = ModelView(tiny("llama")[0]).readout
    there = replace(readout, head=readout.head.to("meta"))
    assert there.logits(torch.zeros(3, 32)).device.type == "meta"
    assert torch.equal(replace(readout, head=readout.head.clone()).logits(torch.ones(3, 32)), readout.logits(torch.ones(3, 32)))


def test_values_go_to_the_head_for_attribution(tiny, nmke_hparams, requests, monkeypatch):
    """Once a layer; of the readout itself, what is not at the head's device, once an edit."""
    model, tok = tiny("llama")
    moved, to = [], Readout.to
    monkeypatch.setattr(Readout, "to", lambda self, *args, **kwargs: moved.append(args) or to(self, *args, **kwargs))
    settings = nmke_hparams(model, tok, layers=[0, 1])
    neuron_masks(ModelView(model), tok, [Request.from_dict(r) for r in requests(1)], ["{}"], settings)
    assert len(moved) == 1
