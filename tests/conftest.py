"""Models and settings that tests share: the embedded model, and a tiny random one of every known architecture."""

import json
import os

# Before torch is imported: processes that share cores are many times slower with more threads than their share.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub, and one that does not answer is asked for half a minute

import pytest
import torch

from easyedit_nmke import NMKEHyperParams
from easyedit_nmke import atlas as embedded

_LLAMA = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=128)  # fmt: skip
_GPT = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=96)
# A window shorter than the texts, in the first and the last block.
_GEMMA = dict(_LLAMA, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
VARIED = ("phi3", "gemma2", "gemma3_text", "olmo2")  # norms have random scales
TINY = {
    "llama": dict(_LLAMA, rms_norm_eps=1e-5),
    "mistral": dict(_LLAMA, sliding_window=None),
    "qwen2": _LLAMA,
    "qwen3": dict(_LLAMA, head_dim=8),
    "gpt2": _GPT,
    "gptj": dict(_GPT, rotary_dim=8),
    "phi3": dict(_LLAMA, sliding_window=None),
    "gemma2": dict(_GEMMA, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(_GEMMA, query_pre_attn_scalar=8),
    "olmo2": _LLAMA,
}


def pytest_collection_modifyitems(config, items):
    """Language models of their real size take minutes, and a cluster its processes: only by `-m real` and `-m ray`."""
    for name, what in (("real", "a real model"), ("ray", "a cluster on this machine")):
        if name not in config.option.markexpr:
            skip = pytest.mark.skip(reason=f"{what}, run by `pytest -m {name}`")
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(skip)


def tiny_model(model_type: str, vocab_size: int, seed: int = 0):
    """A random model: 3 blocks, hidden 32, 4 heads; the weights are large enough for neurons to differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, initializer_range=0.2, pad_token_id=2, bos_token_id=0, eos_token_id=1, **TINY[model_type]
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters() if model_type in VARIED else ():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


def write_tiny(home):
    """home/model: a tiny model with atlas' tokenizer; home/data.json: records to edit it with."""
    model, (_, tok) = tiny_model("llama", 2048), embedded.load()
    model.save_pretrained(home / "model")
    tok.save_pretrained(home / "model")
    (home / "data.json").write_text(json.dumps(embedded.requests(12, "tune")))


@pytest.fixture
def atlas():
    """(model, tokenizer) of the embedded model, fresh for each test."""
    return embedded.load()


@pytest.fixture
def tiny():
    """tiny(model_type, seed=0) -> (model, tokenizer)."""
    from transformers import PreTrainedTokenizerFast

    def make(model_type: str, seed: int = 0):
        tok = PreTrainedTokenizerFast.from_pretrained(embedded.DIRECTORY)
        return tiny_model(model_type, len(tok), seed), tok

    return make


@pytest.fixture
def nmke_hparams(tmp_path):
    """nmke_hparams(model, tok, **overrides) -> settings for short edits of a small model on the CPU."""

    def make(model, tok, **overrides):
        values = dict(
            model_name=(model, tok), layers=[0, 1], device="cpu", v_num_grad_steps=4, v_lr=0.5, mom2_dataset="atlas",
            mom2_n_samples=200, nullspace_threshold=0.3, L2=0.1, stats_dir=str(tmp_path / "stats"),
        )  # fmt: skip
        return NMKEHyperParams(**{**values, **overrides})

    return make


@pytest.fixture
def requests():
    """requests(n, split="tune") -> EasyEdit-format edit requests about the embedded model's facts."""
    return embedded.requests


@pytest.fixture
def weights():
    """weights(model, hparams) -> {layer: copy of the down projection}."""
    from easyedit_nmke.models.arch import ModelView

    def take(model, hparams):
        view = ModelView(model)
        return {layer: view.weight(layer).detach().clone() for layer in hparams.layers}

    return take


@pytest.fixture(autouse=True)
def short_kept_text(monkeypatch):
    """Of the text that every scorer reads, so few tokens that tests of other things do not wait for it."""
    from easyedit_nmke.scores import kept

    monkeypatch.setattr(kept, "TOKENS", 200)
