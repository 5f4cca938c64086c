"""Architectures as data: one row per `config.model_type`, and a view of a model made from its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..extensions import row, with_extensions
from .post_norm import PostNorm
from .products import product


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts. `ffn_norm` is the module whose input is the residual stream that the FFN output is added to:
    the norm before the FFN, or the FFN itself where there is none; None for parallel blocks, where that sum is read off the
    block's output."""

    blocks: str
    down: str  # output projection of the FFN, inside a block
    norm: str  # final norm
    norm_kind: str  # "rms" or "layer"
    ffn_norm: str | None
    transposed: bool = False  # weight stored [F, D] (Conv1D) rather than [D, F]
    post_norm: str | None = None  # RMS norm of the FFN output, inside a block, before it is added to the stream
    unit_offset: bool = False  # norms scale by 1 + weight

    def weight_name(self, layer: int) -> str:
        """The name of a block's FFN output weight."""
        return f"{self.blocks}.{layer}.{self.down}.weight"


_LLAMA = Family("model.layers", "mlp.down_proj", "model.norm", "rms", "post_attention_layernorm")
_GEMMA = Family(
    "model.layers", "mlp.down_proj", "model.norm", "rms", "pre_feedforward_layernorm",
    post_norm="post_feedforward_layernorm", unit_offset=True,
)  # fmt: skip

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f", "layer", "ln_2", transposed=True),
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f", "layer", None),
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Family("model.layers", "mlp.down_proj", "model.norm", "rms", "mlp", post_norm="post_feedforward_layernorm"),
}

# Model types that no row can be of, and what they are. Others are told by the number of experts in their configuration.
_EXPERTS = "a mixture of experts (many FFNs a block), which is not edited"
_HYBRID = "a hybrid (not every block is attention and one FFN), which is not edited"
_IMAGES = "a model of images and text, which is not edited"
UNEDITED = {
    **dict.fromkeys(
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "flex_olmo", "phimoe", "dbrx",
            "granitemoe", "granitemoeshared", "ernie4_5_moe", "glm4_moe", "llama4", "llama4_text", "minimax_m2", "jetmoe",
            "hunyuan_v1_moe", "longcat_flash", "nllb-moe", "switch_transformers", "doge",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(
        (
            "jamba", "mamba", "mamba2", "falcon_mamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "recurrent_gemma",
            "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "granitemoehybrid", "minimax", "lfm2",
            "lfm2_moe", "olmo_hybrid", "kimi_linear", "rwkv",
        ),
        _HYBRID,
    ),
    **dict.fromkeys(("gemma3", "gemma3n"), _IMAGES),
}  # fmt: skip
_COUNTS_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

PLAIN_ATTENTION = ("eager", "sdpa")


def down_projection(model_type: str, layer: int) -> str:
    """`Family.weight_name` of a model's type."""
    return row("architectures", FAMILIES, model_type).weight_name(layer)


@dataclass(frozen=True)
class Readout:
    """From the residual stream to logits: softcap(head · N(y) + head_bias).

    N is `y · rsqrt(mean y² + eps) · scale` (rms) or `(y - mean y) / sqrt(var y + eps) · scale + shift` (layer).
    scale, shift [D]; head [V, D]; head_bias [V]; softcap c maps a logit v to c·tanh(v/c).
    """

    norm: str
    scale: torch.Tensor
    shift: torch.Tensor | None
    eps: float
    head: torch.Tensor
    head_bias: torch.Tensor | None = None
    softcap: float | None = None

    def __post_init__(self):
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm is {self.norm!r}, expected 'rms' or 'layer'")

    def statistic(self, hidden: torch.Tensor) -> torch.Tensor:
        """What N divides by, for states [..., D]: root mean square or standard deviation, [...], float32 or better (the squares
        of half-precision states overflow)."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        centred = hidden - hidden.mean(-1, keepdim=True) if self.norm == "layer" else hidden
        return (centred.pow(2).mean(-1) + self.eps).sqrt()

    def normalise(self, hidden: torch.Tensor, statistic: torch.Tensor | None = None) -> torch.Tensor:
        """N(hidden) [..., D]; a given `statistic` [...] takes the place of hidden's own (the frozen norm)."""
        statistic = self.statistic(hidden) if statistic is None else statistic
        if self.norm == "layer":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        out = (hidden / statistic.unsqueeze(-1)).to(hidden.dtype) * self.scale.to(hidden)
        return out if self.shift is None else out + self.shift.to(hidden)

    def logits(self, hidden: torch.Tensor, statistic: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., V], on the head's device: states go there, as the head is some 100,000 times as large."""
        normal = self.normalise(hidden, statistic).to(self.head.device)
        out = product(normal, self.head.to(normal))
        if self.head_bias is not None:
            out = out + self.head_bias.to(out)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def to(self, *args, **kwargs) -> Readout:
        """The same readout with its tensors moved or cast, as torch.Tensor.to."""

        def move(tensor):
            return None if tensor is None else tensor.to(*args, **kwargs)

        return Readout(self.norm, move(self.scale), move(self.shift), self.eps, move(self.head), move(self.head_bias), self.softcap)


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout off; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def editing(model) -> Iterator[None]:
    """`evaluating`, and attention that takes plain masks and gives gradients everywhere: a model with another kind (flash, flex,
    paged) has sdpa inside the block, or eager where its class knows no sdpa, and its own again afterwards.

    ValueError, before anything has changed, when its class cannot change attention.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    own = [(config, kind) for config in configs.values() if (kind := getattr(config, "_attn_implementation", None)) is not None]
    others = sorted({kind for _, kind in own} - {*PLAIN_ATTENTION})
    if others and not getattr(type(model), "_can_set_attn_implementation", bool)():
        raise ValueError(
            f"{type(model).__name__} has {' and '.join(others)} attention, which edits cannot use and it cannot change; "
            'load it with attn_implementation="eager"'
        )
    plain = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    try:
        for config, kind in own if others else ():
            config._attn_implementation = kind if kind in PLAIN_ATTENTION else plain
        with evaluating(model):
            yield
    finally:
        for config, kind in own if others else ():
            config._attn_implementation = kind


def context_length(model) -> int | None:
    """Longest text in tokens that the model can read; None when its configuration does not say."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


MERGE = (
    "edits would go into the base, and an export would leave the adapter out. Merge it first: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload(), then save_pretrained (and the tokenizer's)"
)


def check_no_adapter(model, inside: bool = True) -> None:
    """ValueError for a PeftModel, and with `inside` for a model that has an adapter's modules in it, or one loaded by transformers
    (from an adapter's folder or hub name)."""
    for module in model.modules() if inside else (model,):
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise ValueError(f"the model has a PEFT adapter ({type(module).__name__}): {MERGE}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"the model has a PEFT adapter loaded: {MERGE}; or take it out with delete_adapter")


def _unedited(model) -> str:
    """Why a model of no known type is not edited."""
    config = getattr(model, "config", None)
    inner = getattr(config, "text_config", None) or config
    kind = UNEDITED.get(getattr(config, "model_type", None), "not known")
    counts = (getattr(inner, name, None) for name in _COUNTS_EXPERTS)
    return _EXPERTS if kind == "not known" and any(isinstance(count, int) and count > 1 for count in counts) else kind


class ModelView:
    """A transformers causal language model seen through its family's row. Holds references, copies nothing."""

    def __init__(self, model):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        check_no_adapter(model, inside=False)
        family = row("architectures", FAMILIES, kind)
        if family is None:
            known = ", ".join(with_extensions("architectures", FAMILIES))
            raise ValueError(f"model type {kind!r} is {_unedited(model)}; known types: {known}")
        if not isinstance(family, Family):
            raise ValueError(f"the architecture {kind!r} of an installed package is {family!r}, expected a Family of models.arch")
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output head; load the model with AutoModelForCausalLM")
        self.model, self.family = model, family
        self.blocks = model.get_submodule(self.family.blocks)
        self.norm = model.get_submodule(self.family.norm)
        self.head = head
        self.depth = len(self.blocks)

    def down(self, layer: int) -> torch.nn.Module:
        """The module whose input is the FFN coefficients c [.., F] of block `layer`."""
        return self.blocks[layer].get_submodule(self.family.down)

    def ffn(self, layer: int) -> torch.nn.Module:
        """The FFN of block `layer`: [.., D] -> [.., D], each position by itself."""
        return self.model.get_submodule(self.ffn_name(layer))

    def ffn_name(self, layer: int) -> str:
        return self.weight_name(layer).removesuffix(".weight").rpartition(".")[0]

    def weight_name(self, layer: int) -> str:
        return self.family.weight_name(layer)

    def weight(self, layer: int) -> torch.nn.Parameter:
        return self.down(layer).weight

    def w_out(self, layer: int) -> torch.Tensor:
        """The down projection as [D, F]; a view of the parameter, so writing to it edits the model."""
        weight = self.weight(layer).data
        return weight.T if self.family.transposed else weight

    def addend(self, layer: int) -> torch.nn.Module:
        """The module whose output block `layer` adds to the stream for its FFN: a norm behind the FFN, or the FFN."""
        return self.blocks[layer].get_submodule(self.family.post_norm) if self.family.post_norm else self.ffn(layer)

    def post_norm(self, layer: int) -> PostNorm | None:
        return PostNorm(*self._scale_and_eps(self.addend(layer))) if self.family.post_norm else None

    def scaled(self, layer: int, matrix: torch.Tensor) -> torch.Tensor:
        """Outputs of the down projection [D, k] as the stream gets them, but for the statistic of a norm behind the FFN."""
        norm = self.post_norm(layer)
        return matrix if norm is None else (norm.scale.to(matrix.device)[:, None] * matrix).to(matrix.dtype)

    def values(self, layer: int) -> torch.Tensor:
        """The FFN neurons' values [D, F], in the stream: w_out, its rows scaled where a norm is behind the FFN."""
        return self.scaled(layer, self.w_out(layer))

    def ffn_change(self, layer: int, output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """By what the down projection's `output` [D, k] has to change for the stream to move by `wanted` [D, k]: by the same, but
        where a norm is behind the FFN (`PostNorm.change`)."""
        norm = self.post_norm(layer)
        return wanted if norm is None else norm.change(output.T.to(wanted.device), wanted.T).T.contiguous().to(wanted.dtype)

    def matrix(self, name: str) -> torch.Tensor:
        """A parameter as [out, in], the way torch.nn.Linear stores it; a vector as it is. A view: writing to it edits the model."""
        return self.oriented(name, self.model.get_parameter(name).data)

    def oriented(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as its parameter `name` is stored -> [out, in] (GPT-2's Conv1D is the other way round)."""
        module, _, leaf = name.rpartition(".")
        return tensor.T if leaf == "weight" and type(self.model.get_submodule(module)).__name__ == "Conv1D" else tensor

    def ffn_norm(self, layer: int) -> torch.nn.Module | None:
        return self.blocks[layer].get_submodule(self.family.ffn_norm) if self.family.ffn_norm else None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _scale_and_eps(self, norm: torch.nn.Module) -> tuple[torch.Tensor, float]:
        weight = norm.weight.data
        eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
        return 1 + weight.float() if self.family.unit_offset else weight, float(eps)

    @property
    def readout(self) -> Readout:
        scale, eps = self._scale_and_eps(self.norm)
        return Readout(
            self.family.norm_kind,
            scale,
            getattr(self.norm, "bias", None),
            eps,
            self.head.weight.data,
            getattr(self.head, "bias", None),
            getattr(self.model.config, "final_logit_softcapping", None),
        )

    @property
    def context_length(self) -> int | None:
        return context_length(self.model)

    def check_layers(self, layers) -> None:
        """ValueError when a block number does not exist."""
        beyond = [layer for layer in layers if layer >= self.depth]
        if beyond:
            raise ValueError(f"layers {beyond} do not exist: the model has blocks 0 to {self.depth - 1}")
