"""Which models are edited: plain weights in memory; everything else is refused in one sentence before anything starts."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from easyedit_nmke import LifelongEditor, apply_nmke_to_model, open_state
from easyedit_nmke.methods import located
from easyedit_nmke.models.arch import ModelView, editing
from easyedit_nmke.models.weights import check_model


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def refused(model, tok, hparams, requests, said):
    """By both ways in, and the model carries no state afterwards."""
    settings = hparams(model, tok)
    with pytest.raises(ValueError, match=said):
        apply_nmke_to_model(model, tok, requests(1), settings)
    with pytest.raises(ValueError, match=said):
        LifelongEditor.from_hparams(settings)
    assert not hasattr(model, "nmke_state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_can_be_edited(tiny, nmke_hparams, dtype):
    model, tok = tiny("llama")
    check_model(ModelView(model.to(dtype)), nmke_hparams(model, tok))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_on_cuda_can_be_edited(tiny, nmke_hparams):
    model, tok = tiny("llama")
    check_model(ModelView(model.half().cuda()), nmke_hparams(model, tok))


FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_") or name.startswith("float4_")]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, *FLOAT8], ids=str)
def test_every_other_type_of_weight_is_refused(tiny, nmke_hparams, requests, dtype):
    model, tok = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj
    weight.weight = Parameter(torch.empty(weight.weight.shape, dtype=dtype), requires_grad=False)
    name = str(dtype).replace(".", r"\.")
    refused(model, tok, nmke_hparams, requests, rf"layers\.1\.mlp\.down_proj\.weight is {name}: quantised weights cannot be edited")


def test_a_quantised_weight_that_is_not_edited_is_refused_too(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    proj = model.model.layers[2].self_attn.q_proj
    proj.weight = Parameter(proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, tok, nmke_hparams, requests, "q_proj.weight is torch.float8_e4m3fn")


class Packed(torch.nn.Module):
    """As AWQ's and GPTQ's layers: packed integers, and no weight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(32, 12, dtype=torch.int32))


class Int8Params(Parameter):
    """As bitsandbytes': a float16 parameter that becomes int8 on its way to the GPU."""


@pytest.mark.parametrize("kind", ["packed", "int8 params", "flat", "dictionary", "object", "quantizer"])
def test_quantised_models_are_refused(tiny, nmke_hparams, requests, kind):
    model, tok = tiny("llama")
    mlp, said = model.model.layers[0].mlp, "quantised weights cannot be edited"
    if kind == "packed":
        mlp.down_proj, said = Packed(), r"down_proj\.weight is missing, expected a plain matrix: quantised weights cannot"
    elif kind == "int8 params":
        mlp.down_proj.weight = Int8Params(mlp.down_proj.weight.detach())
        said = r"is Int8Params of 2 dimensions, expected a plain matrix"
    elif kind == "flat":  # as Params4bit
        mlp.down_proj.weight, said = Parameter(torch.zeros(96)), "is Parameter of 1 dimensions"
    elif kind == "dictionary":
        model.config.quantization_config, said = {"quant_method": "awq", "bits": 4}, r"the model is quantised \(awq\)"
    elif kind == "object":
        model.config.quantization_config, said = SimpleNamespace(quant_method="gptq"), r"the model is quantised \(gptq\)"
    else:
        model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
        said = r"the model is quantised \(bitsandbytes\)"
    refused(model, tok, nmke_hparams, requests, said)


@pytest.mark.parametrize("kind", ["wrapped", "injected", "loaded", "merged"])
def test_models_with_adapters_are_refused_until_they_are_merged(tiny, nmke_hparams, requests, kind):
    peft = pytest.importorskip("peft")
    model, tok = tiny("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    if kind == "loaded":
        model.add_adapter(config)
    else:
        wrapped = peft.get_peft_model(model, config)
        model = {"wrapped": wrapped, "injected": model}.get(kind) or wrapped.merge_and_unload()
    if kind == "merged":
        check_model(ModelView(model), nmke_hparams(model, tok))
    else:
        refused(model, tok, nmke_hparams, requests, "PEFT.*merge_and_unload")


def test_a_flag_of_adapters_is_enough(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    model._hf_peft_config_loaded = True
    refused(model, tok, nmke_hparams, requests, "PEFT.*merge_and_unload.*delete_adapter")


@pytest.mark.parametrize("kind", ["meta", "another layer", "hook", "cpu", "disk"])
def test_models_that_are_not_in_memory_are_refused(tiny, nmke_hparams, requests, tmp_path, kind):
    model, tok = tiny("llama")
    said = "meta device.*load the whole model into memory"
    if kind == "meta":
        model.model.layers[0].mlp.down_proj.to("meta")
    elif kind == "another layer":
        model.model.layers[2].self_attn.to("meta")
    elif kind == "hook":
        model.model.layers[2]._hf_hook, said = SimpleNamespace(offload=True), "offloaded.*load the whole model into memory"
    else:
        accelerate, said = pytest.importorskip("accelerate"), "offloaded.*load the whole model into memory"
        if kind == "cpu":
            accelerate.cpu_offload(model, "cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), "cpu")
    with pytest.raises(ValueError, match=said):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert not hasattr(model, "nmke_state")


def test_nothing_is_edited_in_inference_mode(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    before = bits(model)
    with torch.inference_mode():
        refused(model, tok, nmke_hparams, requests, r"torch\.inference_mode\(\) forbids; call this outside of it")
    assert same(model, before)
    with torch.no_grad():
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    with torch.inference_mode():
        model, tok = tiny("llama")
    refused(model, tok, nmke_hparams, requests, r"_(tokens|proj)\.weight was made in torch\.inference_mode")


# ---- attention that edits cannot use


@pytest.fixture
def strange(monkeypatch):
    """A kind of attention that fails where it is used, as flash attention does with plain masks; and a list of what is asked."""
    asked = []

    def attention(module, *args, **kwargs):
        asked.append(kwargs.get("attention_mask"))
        if torch.is_grad_enabled():
            raise NotImplementedError("no gradients")
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "strange_kernel", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "strange_kernel", sdpa_mask)
    return asked


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_attention_is_sdpa_while_an_edit_is_made(tiny, nmke_hparams, requests, strange, kind):
    (model, tok), (plain, _) = tiny(kind), tiny(kind)
    model.set_attn_implementation("strange_kernel")
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(strange) == 3
    for one in (model, plain):
        apply_nmke_to_model(one, tok, requests(1), nmke_hparams(one, tok))
    assert len(strange) == 3 and model.config._attn_implementation == "strange_kernel"
    assert same(model, bits(plain)) and plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(strange) == 6


def test_a_failed_edit_gives_the_attention_back(tiny, nmke_hparams, requests, strange, monkeypatch):
    model, tok = tiny("llama")
    model.set_attn_implementation("strange_kernel")
    monkeypatch.setattr(located, "target_values", lambda *_: pytest.fail(model.config._attn_implementation))
    with pytest.raises(pytest.fail.Exception, match="sdpa"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert model.config._attn_implementation == "strange_kernel"


def test_a_state_is_opened_under_sdpa(tiny, nmke_hparams, strange):
    model, tok = tiny("llama")
    model.set_attn_implementation("strange_kernel")
    open_state(model, tok, nmke_hparams(model, tok, value_norm="anchored"))
    assert not strange and model.config._attn_implementation == "strange_kernel"


def test_flex_attention_is_set_aside(tiny):
    model, _ = tiny("llama")
    model.set_attn_implementation("flex_attention")
    ids = torch.tensor([[3, 4, 5]])
    with editing(model):
        model(input_ids=ids).logits.sum().backward()  # flex attention has no gradient on a CPU
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_plain_attention_is_left_alone(tiny, kind):
    model, _ = tiny("llama")
    model.set_attn_implementation(kind)
    with editing(model):
        assert model.config._attn_implementation == kind
    assert model.config._attn_implementation == kind


def test_attention_that_a_class_cannot_change_is_refused(tiny, nmke_hparams, requests):
    model, tok = tiny("gptj")
    before = bits(model)
    model.config._attn_implementation = "flash_attention_2"  # GPT-J chooses its attention's class when it is made
    with pytest.raises(ValueError, match=r"flash_attention_2 attention.*load it with attn_implementation=.eager"):
        apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok))
    assert same(model, before) and not hasattr(model, "nmke_state")
    model.config._attn_implementation = "eager"
    assert not same(apply_nmke_to_model(copy.deepcopy(model), tok, requests(1), nmke_hparams(model, tok))[0], before)
