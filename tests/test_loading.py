"""What is loaded by name, and what is refused before anything starts."""

import json

import pytest
import torch

from easyedit_nmke import LifelongEditor, NMKEHyperParams
from easyedit_nmke import atlas as embedded
from easyedit_nmke.models.arch import check_no_adapter
from easyedit_nmke.models.loading import base_folder, load_model

SETTINGS = dict(layers=[0, 1], device="cpu", mom2_dataset="atlas", mom2_n_samples=20, nullspace_fraction=0.9)


@pytest.fixture
def adapted(tiny, tmp_path):
    """(PeftModel, tokenizer), and the folders of its base and of the adapter, with a tokenizer in either."""
    peft = pytest.importorskip("peft")
    model, tok = tiny("llama")
    for folder in ("base", "adapter"):
        tok.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped, tok, tmp_path / "base", tmp_path / "adapter"


def refused(model_name):
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload\(\)") as error:
        LifelongEditor.from_hparams(NMKEHyperParams(model_name=model_name, **SETTINGS))
    assert "\n" not in str(error.value)


def test_an_adapters_folder_is_refused(adapted):
    _, _, base, adapter = adapted
    refused(str(adapter))
    (base / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    refused(str(base))  # transformers would look no further than the adapter's configuration


def test_an_adapter_that_transformers_loads_by_itself_is_refused(adapted, monkeypatch):
    """By a hub name, where no folder can be looked into first."""
    from transformers import AutoModelForCausalLM

    *_, base, adapter = adapted
    own = AutoModelForCausalLM.from_pretrained
    assert own(adapter)._hf_peft_config_loaded  # base + adapter, silently
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **options: own(adapter, **options))
    refused(str(base))


@pytest.mark.parametrize("part", ["PeftModel", "model inside", "prompt tuning"])
def test_a_live_model_with_an_adapter_is_refused(part, adapted, tiny):
    peft = pytest.importorskip("peft")
    wrapped, tok, *_ = adapted
    model = wrapped if part == "PeftModel" else wrapped.get_base_model()
    if part == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(tiny("llama")[0], config)
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused((model, tok))
    assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())


def test_a_merged_model_is_none_with_an_adapter(adapted):
    wrapped, tok, *_ = adapted
    check_no_adapter(wrapped.merge_and_unload())
    assert LifelongEditor.from_hparams(NMKEHyperParams(model_name=(wrapped.merge_and_unload(), tok), **SETTINGS)).tok is tok


def test_where_the_files_of_a_model_lie(tmp_path):
    assert base_folder("atlas") == embedded.DIRECTORY and base_folder(str(tmp_path)) == tmp_path
    for name in ("some/model", "(model, tok)", str(tmp_path / "nowhere" / "at" / "all")):
        assert base_folder(name) is None, name
    assert json.loads((embedded.DIRECTORY / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", None])
def test_weights_that_are_torn_are_said(tiny, tmp_path, content):
    model, tok = tiny("llama")
    for part in (model, tok):
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"could not be loaded \(.*a weight file is torn, or what git-lfs has in its place"):
        LifelongEditor.from_hparams(NMKEHyperParams(**SETTINGS, model_name=str(tmp_path / "model")))


@pytest.mark.parametrize("places", [{"model": 0, "lm_head": 1}, {"": "disk"}])
def test_a_model_that_is_spread_stays_where_it_is(tiny, places):
    model, tok = tiny("llama")
    model.hf_device_map = places
    model.to = None  # not called
    assert load_model(NMKEHyperParams(**SETTINGS, model_name=(model, tok))) == (model, tok)
