"""What is measured on: a model of a known shape, a tokenizer of its vocabulary, requests, statistics, past keys.

Time and memory do not depend on what the weights are, so nothing is downloaded: everything here follows from a seed. A model that
is installed (`Shape.model`) has its own weights, and is told facts of the real world.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .. import atlas, facts
from ..history.log import EditReport
from ..hparams import HyperParams
from ..messages import did_you_mean
from ..methods import method_named, read
from ..methods.contract import phase
from ..methods.keys import Contexts, keys_of
from ..models.arch import ModelView, evaluating
from ..models.device import free_memory
from ..models.loading import load_model
from ..models.prompts import context_templates
from ..models.requests import Request

RANK = 0.25  # share of directions that updates may not touch
COSINE = 0.5  # between synthesised past keys
FIRST_WORDS = 64  # that a text may start with
MEMIT_WEIGHT = 100.0
TEMPLATE_LENGTH = 10


@dataclass(frozen=True)
class Shape:
    """A configuration for `AutoConfig.for_model`, the edited blocks, whose file the settings of target values come from, and a
    trained model of that shape by its name, which takes the place of random weights."""

    model_type: str
    config: dict
    layers: tuple[int, ...]
    settings: str = "llama3-8b"
    model: str | None = None


def _llama(
    model_type: str, hidden: int, neurons: int, depth: int, heads: int, shared: int, words: int, tied: bool = False, **more
) -> dict:
    return dict(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=8192, **more,
    )  # fmt: skip


SHAPES = {
    "llama3-8b": Shape("llama", _llama("llama", 4096, 14336, 32, 32, 8, 128256, rope_theta=5e5), (4, 5, 6, 7, 8)),
    "llama3-70b": Shape("llama", _llama("llama", 8192, 28672, 80, 64, 8, 128256, rope_theta=5e5), (4, 5, 6, 7, 8)),
    "qwen2.5-7b": Shape("qwen2", _llama("qwen2", 3584, 18944, 28, 28, 4, 152064, rope_theta=1e6), (4, 5, 6, 7, 8), "qwen2.5-7b"),
    "gpt2-xl": Shape(
        "gpt2", dict(n_embd=1600, n_layer=48, n_head=25, n_positions=1024, vocab_size=50257), (13, 14, 15, 16, 17), "gpt2-xl"
    ),
    "small": Shape("llama", _llama("llama", 768, 3072, 12, 12, 12, 32000), (0, 1, 2, 3, 4)),
    "smollm2": Shape(
        "llama", _llama("llama", 576, 1536, 30, 9, 3, 49152, True, rope_theta=1e5), (4, 5, 6, 7, 8), "smollm2", "smollm2"
    ),
    "gemma3-270m": Shape(
        "gemma3_text", _llama("gemma3_text", 640, 2048, 18, 4, 1, 262144, True, head_dim=256), (2, 3, 4, 5, 6), model="gemma3-270m"
    ),
    "atlas": Shape("llama", {}, (0, 1, 2), "atlas", model="atlas"),
}


def shape_named(name: str) -> Shape:
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}{did_you_mean(name, SHAPES)}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


@dataclass
class Bed:
    """One model and all that an edit of it needs, the same for every engine.

    bases: layer -> U [F, r] that updates may not touch; templates and `once` (what making them took). `l2` is the mean ||k||²
    of the layer with the largest keys: EasyEdit solves in float32, and with much less its own rounding is all one would compare.
    """

    model: torch.nn.Module
    tok: object
    layers: list[int]
    requests: list[Request]
    settings: dict
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    trained: bool = False

    def __post_init__(self):
        self.view = ModelView(self.model)
        self.device = self.view.device
        timed = EditReport(0)
        with phase(timed, "templates"), evaluating(self.model):
            self.templates = context_templates(self.model, self.tok, self.settings["template_prefixes"], TEMPLATE_LENGTH, self.seed)
        self.once = timed
        found = keys_of(self.view, self.tok, self.requests, Contexts(self.templates), self.layers)
        self.energy = {layer: float(keys.norm(dim=0).pow(2).mean()) for layer, keys in found.items()}
        self.l2 = max(self.energy.values())
        self.bases = {layer: self._basis(layer) for layer in self.layers}
        self._past: dict[int, torch.Tensor] = {}

    @property
    def neurons(self) -> int:
        return self.view.w_out(self.layers[0]).shape[1]

    @property
    def flat_templates(self) -> list[str]:
        return [template for group in self.templates for template in group]

    def hparams(self, method: str, **changes) -> HyperParams:
        """Settings of a method of ours for this model."""
        kind = method_named(method).hparams
        own = {"L2": self.l2, "mom2_update_weight": MEMIT_WEIGHT} if method != "NMKE" else {"L2": self.l2}
        content = {**self.settings, **own, **changes}
        content = {name: value for name, value in content.items() if name in kind.__dataclass_fields__}
        return kind(model_name=(self.model, self.tok), layers=self.layers, device=str(self.device), **content)

    def moment(self, layer: int) -> torch.Tensor:
        """A covariance of keys [F, F] float32 with U's directions in front, and some of all others."""
        basis = self.bases[layer]
        scale = self.energy[layer] / basis.shape[1]
        shares = torch.linspace(2, 0.1, basis.shape[1], device=self.device) * scale
        moment = (basis * shares) @ basis.T
        moment.diagonal().add_(0.05 * scale)
        return moment

    def past(self, layer: int, count: int) -> torch.Tensor:
        """`count` past keys [F, count] float32, as long as the requests' and at a cosine of 0.5; the first of a longer list."""
        if layer not in self._past or self._past[layer].shape[1] < count:
            self._past[layer] = synthetic_keys(self.neurons, count, COSINE, self._generator(layer)) * self.energy[layer] ** 0.5
        return self._past[layer][:, :count]

    def _basis(self, layer: int) -> torch.Tensor:
        return orthonormal(self.neurons, round(RANK * self.neurons), self._generator(-1 - layer))

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.seed + 500 + stream)


def orthonormal(neurons: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthonormal columns [neurons, rank] float32."""
    return torch.linalg.qr(torch.randn(neurons, rank, generator=generator, device=generator.device)).Q


def synthetic_keys(neurons: int, count: int, cosine: float, generator: torch.Generator) -> torch.Tensor:
    """[neurons, count] float32 of length about 1, with `cosine` between any two. Column by column: a longer list starts alike."""
    rows = torch.randn(count + 1, neurons, generator=generator, device=generator.device) / neurons**0.5
    return (cosine**0.5 * rows[0] + (1 - cosine) ** 0.5 * rows[1:]).T


# ---- models


def build(name: str, edits: int, layers: int | None, device, dtype: torch.dtype, seed: int = 0) -> Bed:
    """The bed of a shape. layers: only so many blocks (None: all). ValueError where it is unknown or does not fit."""
    shape = shape_named(name)
    settings = settings_of(shape)
    if shape.model:
        if layers is not None:
            raise ValueError(f"--layers leaves blocks out of models with random weights; {name} is a trained one")
        model, tok = load_model(_loading(shape, device, dtype))
        records = atlas.requests(edits, "tune", seed) if name == "atlas" else facts.requests(edits, "test", seed)
        requests = [Request.from_dict(record) for record in records]
        edited, notes = list(shape.layers), []
    else:
        config, edited, notes = _config(shape, layers)
        _check_fits(config, device, dtype)
        model = _random_model(config, device, dtype, seed)
        tok = word_tokenizer(config.vocab_size)
        requests = list(itertools.islice(synthetic_requests(config.vocab_size, seed), edits))
        notes.insert(0, "random weights")
    settings["v_loss_layer"] = ModelView(model).depth - 1
    return Bed(model, tok, edited, requests, settings, seed, notes, trained=shape.model is not None)


def _loading(shape: Shape, device, dtype: torch.dtype) -> HyperParams:
    kind = method_named("AlphaEdit").hparams
    return kind(model_name=shape.model, layers=list(shape.layers), device=str(device), dtype=str(dtype).removeprefix("torch."))


def settings_of(shape: Shape) -> dict:
    """The settings of target values that the model's file for AlphaEdit has, and over how many texts its covariance is taken."""
    known = vars(read(f"AlphaEdit/{shape.settings}"))
    return {name: known[name] for name in known if name.startswith("v_")} | {
        name: known[name] for name in ("clamp_norm_factor", "kl_factor", "fact_token", "template_prefixes", "mom2_n_samples")
    }


def configuration(shape: Shape):
    """transformers' configuration of a shape."""
    from transformers import AutoConfig

    if not shape.config:
        return AutoConfig.from_pretrained(atlas.DIRECTORY)
    return AutoConfig.for_model(shape.model_type, pad_token_id=1, bos_token_id=None, eos_token_id=2, **shape.config)


def _config(shape: Shape, layers: int | None):
    """(transformers' configuration, edited blocks, what to tell the reader)."""
    config = configuration(shape)
    config.initializer_range = config.hidden_size**-0.5  # so that states are of the size of a trained model's
    depth, edited = config.num_hidden_layers, list(shape.layers)
    if layers is None:
        return config, edited, []
    if not 2 <= layers <= depth:
        raise ValueError(f"--layers is {layers}, expected 2 to {depth}: one block to edit and one above it, at least")
    kept = [layer for layer in edited if layer < layers - 1]
    if len(kept) < len(edited):
        kept = list(range(max(0, layers - 1 - len(edited)), layers - 1))
    config.num_hidden_layers = layers
    return config, kept, [f"only {layers} of {depth} blocks, {len(kept)} edited: not a whole edit of this shape"]


def _random_model(config, device, dtype: torch.dtype, seed: int):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _check_fits(config, device, dtype: torch.dtype) -> None:
    size = sum(p.numel() for p in _random_model(config, "meta", dtype, 0).parameters()) * dtype.itemsize
    free = free_memory(torch.device(device))
    if size > free:
        raise ValueError(
            f"the model takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}; "
            f"give --layers with less than {config.num_hidden_layers} blocks, or --dtype bfloat16"
        )


# ---- text


def _word(number: int) -> str:
    """A word of letters, another for each number."""
    letters = ""
    while True:
        number, digit = divmod(number, 26)
        letters += string.ascii_lowercase[digit]
        if not number:
            return letters + "q"


def word_tokenizer(size: int):
    """A tokenizer with exactly `size` tokens, one for each word: with its space, and for a few words also without it, as the first
    of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = [*["The", "Therefore", "Because", "I", "You"], *(_word(i).capitalize() for i in range(FIRST_WORDS))]
    words = ["<unk>", "<pad>", "<end>", ".", "Ġis", "Ġa", *first]
    words += [f"Ġ{_word(i)}" for i in range(size - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="right",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def synthetic_requests(size: int, seed: int) -> Iterator[Request]:
    """Facts about subjects of three words, in prompts of eight, with targets of two, for `word_tokenizer(size)`."""
    for i in itertools.count():
        words = [_word((100 + 977 * seed + 13 * i + j) % (size - 2 * FIRST_WORDS)) for j in range(8)]
        subject = " ".join([_word((seed + i) % FIRST_WORDS).capitalize(), *words[:2]])
        yield Request(
            f"{subject} {' '.join(words[2:6])} is", subject, " ".join(words[6:8]), ground_truth=words[5],
            rephrase_prompts=f"The {words[4]} {words[2]} a {words[6]} is",
            locality={"unrelated": ((f"The {words[3]} {words[5]} is", words[1]),)},
        )  # fmt: skip
