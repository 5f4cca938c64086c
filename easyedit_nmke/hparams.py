"""Hyperparameters: one flat YAML file, one dataclass per method, every check. Imports no torch.

`read` picks the class by the file's alg_name. What methods share is inherited, fields and checks alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import site
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

if TYPE_CHECKING:
    from typing_extensions import Self

CHOICES = {
    "dtype": ("float32", "bfloat16", "float16", "auto"),
    "mom2_dtype": ("float32", "float64"),
    "fact_token": ("subject_last",),
    "attribution_strategy": ("lps", "psa", "mpc"),
    "attribution_target": ("predicted", "target_new"),
    "attribution_norm": ("frozen", "exact"),
    "attribution_position": ("last_token", "padded_end"),
    "attribution_backend": ("auto", "reference", "fast"),
    "neurons": ("both", "general", "specific", "overlap", "non_overlap", "all"),
    "ratio": ("dynamic", "fixed"),
    "mask": ("binary", "soft"),
    "mask_ties": ("include", "exact"),
    "objective_optimization": ("prompt_last", "target_new"),
    "regularizer": ("nullspace", "covariance"),
    "l2_scale": ("absolute", "auto"),
    "solve": ("full", "restricted"),
    "value_norm": ("free", "anchored"),
    "key_contexts": ("templates", "relations"),
    "control": ("none", "random", "uniform"),
}

# field -> (lowest, highest, is the lowest allowed). Anything not listed is free. A method's own fields only are looked at.
RANGES = {
    "v_num_grad_steps": (1, math.inf, True),
    "v_lr": (0, math.inf, False),
    "v_loss_layer": (0, math.inf, True),
    "v_weight_decay": (0, math.inf, True),
    "clamp_norm_factor": (0, math.inf, False),
    "kl_factor": (0, math.inf, True),
    "mom2_n_samples": (1, math.inf, True),
    "nullspace_threshold": (0, math.inf, False),
    "nullspace_fraction": (0, 1, False),
    "L2": (0, math.inf, False),
    "max_length": (1, math.inf, True),
    "batch_size": (1, math.inf, True),
    "amplification": (0, math.inf, False),
    "temperature": (0, math.inf, False),
    "general_ratio": (0, 1, False),
    "specific_ratio": (0, 1, False),
    "general_bias": (0, 1, True),
    "general_scale": (0, 1, True),
    "general_power": (0, math.inf, False),
    "specific_bias": (0, 1, True),
    "specific_scale": (0, 1, True),
    "specific_power": (0, math.inf, False),
    "template_length": (2, math.inf, True),
    "mom2_update_weight": (0, math.inf, False),
    "num_steps": (1, math.inf, True),
    "lr": (0, math.inf, False),
    "weight_decay": (0, math.inf, True),
    "norm_constraint": (0, math.inf, False),
    "locality_factor": (0, math.inf, True),
    "v_extra_steps": (0, math.inf, True),
    "value_norm_factor": (0, math.inf, False),
}
WHOLE = {
    "v_num_grad_steps",
    "v_extra_steps",
    "v_loss_layer",
    "mom2_n_samples",
    "max_length",
    "batch_size",
    "template_length",
    "num_steps",
}
OPTIONAL = {"v_loss_layer": None, "nullspace_fraction": None, "norm_constraint": False}  # the value that stands for "none"


class ModelPair(tuple):
    """A (model, tokenizer) tuple that EasyEdit's scorers can ask for the text of its name, as they do of a path."""

    def lower(self) -> str:
        return self[0].config.model_type


@dataclass
class HyperParams:
    """What every method is told: which blocks of which model, where, and how many requests share one update.

    Names are EasyEdit's where EasyEdit has them; `layers` and `model_name` have no default. Fields under "accepted for
    EasyEdit's files" change nothing here: the architecture table leaves nothing for them to decide.
    """

    STATE: ClassVar[tuple[str, ...]] = ("alg_name", "layers")  # what a `LifelongState` of the method depends on

    layers: list[int]
    model_name: Any  # a path, a hub name, "atlas", or a (model, tokenizer) tuple
    alg_name: str = ""
    device: Any = 0  # a CUDA index, or any torch device name
    model_parallel: bool = False
    dtype: str = "float32"  # of a named model; "auto": as its files are stored
    fp16: bool = False  # EasyEdit's name for dtype: float16
    batch_size: int = 1  # requests written by one update
    max_length: int = 40
    seed: int = 0  # of the context templates
    state_dir: str | None = None  # a folder: every edit is kept there, and a new process goes on from the last

    # Accepted for EasyEdit's files
    rewrite_module_tmp: str | None = None
    layer_module_tmp: str | None = None
    mlp_module_tmp: str | None = None
    attn_module_tmp: str | None = None
    ln_f_module: str | None = None
    lm_head_module: str | None = None

    def __post_init__(self):
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """EasyEdit's users assign attributes after loading; a (model, tokenizer) tuple is wrapped whenever it comes."""
        if name == "model_name" and type(value) is tuple and len(value) == 2:
            value = ModelPair(value)
        super().__setattr__(name, value)

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read a YAML file (the suffix may be left out, as in EasyEdit), or one that comes with the package, by its name.

        Raises FileNotFoundError when there is none, ValueError with every problem of the file in one message.
        """
        path = _find(hparams_name_or_path, cls.alg_name)
        return cls.from_dict(_load(path), source=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """Build from a mapping; unknown and missing names and bad values are reported together."""
        content = {str(name): _number(name, value) for name, value in content.items()}
        names = {f.name for f in dataclasses.fields(cls)}
        problems = [f"unknown name {name!r}{_did_you_mean(name, names)}" for name in content if name not in names]
        problems += [f"{name!r} is missing" for name in ("layers", "model_name") if name not in content]
        known = {name: value for name, value in content.items() if name in names}
        draft = {"layers": [0], "model_name": "atlas", **known}
        bare = cls.__new__(cls)
        for f in dataclasses.fields(cls):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            setattr(bare, f.name, draft.get(f.name, default))
        problems += bare.problems()
        if problems:
            raise ValueError(_report(source, problems))
        return cls(**known)

    def problems(self) -> list[str]:
        """Every reason why these values cannot be used, in words; empty when there is none."""
        found = []
        if self.alg_name != type(self).alg_name:
            found.append(f"alg_name is {self.alg_name!r}, expected {type(self).alg_name!r}")
        if not isinstance(self.model_name, (str, tuple)) or (isinstance(self.model_name, tuple) and len(self.model_name) != 2):
            found.append(f"model_name must be a name, a path or a (model, tokenizer) tuple, got {type(self.model_name).__name__}")
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(_is_int(i) and i >= 0 for i in layers):
            found.append(f"layers must be a list of block numbers (0 or more), got {layers!r}")
        elif list(layers) != sorted(set(layers)):
            found.append(f"layers must increase without repetition, got {layers!r}")
        own = {f.name for f in dataclasses.fields(self)}
        for name, allowed in CHOICES.items():
            value = getattr(self, name, None)
            if name in own and value not in allowed:
                hint = _did_you_mean(str(value), allowed)
                found.append(f"{name} is {value!r}{hint}; expected one of {', '.join(map(repr, allowed))}")
        found += [problem for name in RANGES if name in own for problem in self._out_of_range(name)]
        for name in ("model_parallel", "fp16"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.fp16 is True and self.dtype not in ("float32", "float16"):
            found.append(f"fp16: true asks for float16, dtype for {self.dtype!r}; leave one of them out")
        numbered = _is_int(self.device) or self.device is None or isinstance(self.device, str)
        if not numbered and type(self.device).__name__ != "device":
            found.append(f"device must be a CUDA index or the name of a torch device, got {self.device!r}")
        if not _is_int(self.seed):
            found.append(f"seed must be a whole number, got {self.seed!r}")
        if self.state_dir is not None and not isinstance(self.state_dir, (str, Path)):
            found.append(f"state_dir must be a folder or null, got {self.state_dir!r}")
        return found

    def _out_of_range(self, name: str) -> list[str]:
        value, (low, high, inclusive) = getattr(self, name), RANGES[name]
        if name in OPTIONAL and (value is None or value is OPTIONAL[name]):
            return []
        whole = name in WHOLE
        if not _is_number(value) or (whole and not _is_int(value)):
            return [f"{name} must be a {'whole ' if whole else ''}number, got {value!r}"]
        if not (low <= value <= high and (inclusive or value > low)) or not math.isfinite(value):
            bound = f"{'at least' if inclusive else 'more than'} {low}" + (f" and at most {high}" if high < math.inf else "")
            return [f"{name} is {value!r}, expected {bound}"]
        return []

    def validate(self) -> None:
        """Raise one ValueError that lists every problem. Called again when an edit starts: attributes may have been assigned."""
        found = self.problems()
        unknown = set(vars(self)) - {f.name for f in dataclasses.fields(self)} - _EASYEDIT_EVALUATION
        names = {f.name for f in dataclasses.fields(self)}
        found += [f"unknown attribute {name!r}{_did_you_mean(name, names)}" for name in sorted(unknown)]
        if found:
            raise ValueError(_report("hyperparameters", found))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data but `state_dir`; a (model, tokenizer) tuple is named by its model's name."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "state_dir"}
        if isinstance(self.model_name, tuple):
            content["model_name"] = getattr(getattr(self.model_name[0], "config", None), "_name_or_path", "") or "(model, tok)"
        content["device"] = self.device if isinstance(self.device, (int, str)) or self.device is None else str(self.device)
        return content


@dataclass
class KeyValueHyperParams(HyperParams):
    """For the methods that write a target value z for a key k: NMKE, AlphaEdit, MEMIT, ROME. Defaults are EasyEdit's."""

    STATE: ClassVar[tuple[str, ...]] = (
        *HyperParams.STATE, "mom2_dataset", "mom2_n_samples", "mom2_dtype", "seed", "template_prefixes",
    )  # fmt: skip

    # Target values z (Adam on δ at the last edited layer)
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_loss_layer: int | None = None  # None: the last block
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625

    # Covariance of keys
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = 100000
    mom2_dtype: str = "float32"  # of the sums over tokens
    mom2_adjustment: bool = True  # ROME's; accepted for EasyEdit's files of the others
    stats_dir: str | None = None  # None: the user's cache directory

    # Context templates
    template_prefixes: list[str] = field(default_factory=lambda: ["The", "Therefore", "Because", "I", "You"])

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.mom2_adjustment, bool):
            found.append(f"mom2_adjustment must be true or false, got {self.mom2_adjustment!r}")
        if not isinstance(self.mom2_dataset, str):
            found.append(f"mom2_dataset must be a file or the name of a dataset, got {self.mom2_dataset!r}")
        if self.stats_dir is not None and not isinstance(self.stats_dir, (str, Path)):
            found.append(f"stats_dir must be a folder or null, got {self.stats_dir!r}")
        prefixes = self.template_prefixes
        if not isinstance(prefixes, (list, tuple)) or not all(isinstance(p, str) and p for p in prefixes):
            found.append(f"template_prefixes must be a list of words, got {prefixes!r}")
        return found


@dataclass
class MEMITHyperParams(KeyValueHyperParams):
    """Least squares against the covariance of old keys, spread over `layers`; no memory of past edits."""

    STATE: ClassVar[tuple[str, ...]] = (*KeyValueHyperParams.STATE, "template_length", "mom2_update_weight")
    neurons: ClassVar[str] = "all"  # no mask

    alg_name: str = "MEMIT"
    mom2_update_weight: float = 15000.0  # λ of λ·E[c cᵀ] + K Kᵀ
    template_length: int = 10  # tokens, prefix included
    layer_selection: str = "all"  # accepted for EasyEdit's files
    key_contexts: ClassVar[str] = "templates"


@dataclass
class ROMEHyperParams(KeyValueHyperParams):
    """A rank-one update of each of `layers` (EasyEdit's files name one), each with a value of its own."""

    STATE: ClassVar[tuple[str, ...]] = (*KeyValueHyperParams.STATE, "context_template_length_params", "mom2_adjustment")

    alg_name: str = "ROME"
    # [tokens, texts] pairs; the texts are shared out over template_prefixes
    context_template_length_params: list[list[int]] = field(default_factory=lambda: [[5, 10], [10, 10]])

    def problems(self) -> list[str]:
        found, pairs = super().problems(), self.context_template_length_params
        fewest = max(len(self.template_prefixes), 1) if isinstance(self.template_prefixes, (list, tuple)) else 1

        def sound(pair) -> bool:
            return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_int, pair)) and pair[0] > 1

        if not isinstance(pairs, (list, tuple)) or not all(map(sound, pairs)):
            found.append(f"context_template_length_params must be a list of [tokens (2 or more), texts] pairs, got {pairs!r}")
        elif any(texts < fewest for _, texts in pairs):
            found.append(f"context_template_length_params is {pairs!r}, expected at least one text for each of {fewest} prefixes")
        return found


@dataclass
class AlphaEditHyperParams(KeyValueHyperParams):
    """MEMIT's spread of the residual, with updates kept in the null space of old knowledge and past keys remembered."""

    STATE: ClassVar[tuple[str, ...]] = (
        *KeyValueHyperParams.STATE, "template_length", "L2", "nullspace_threshold", "nullspace_fraction", "P_loc",
    )  # fmt: skip
    neurons: ClassVar[str] = "all"  # no mask
    regularizer: ClassVar[str] = "nullspace"
    l2_scale: ClassVar[str] = "absolute"
    solve: ClassVar[str] = "full"
    value_norm: ClassVar[str] = "free"
    key_contexts: ClassVar[str] = "templates"

    alg_name: str = "AlphaEdit"

    # Null space of the covariance of keys
    nullspace_threshold: float = 2e-2
    nullspace_fraction: float | None = None  # instead of the threshold: the share of directions that updates may use
    L2: float = 1.0
    P_loc: str | None = None
    template_length: int = 10  # tokens, prefix included

    # Accepted for EasyEdit's files
    layer_selection: str = "all"
    mom2_update_weight: float = 15000.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.P_loc is not None and not isinstance(self.P_loc, str):
            found.append(f"P_loc must be a path or null, got {self.P_loc!r}")
        return found


@dataclass
class NMKEHyperParams(AlphaEditHyperParams):
    """AlphaEdit, and a mask from attribution. Defaults are the published NMKE code's.

    The section 'Hyperparameters' of the README says which symbol of the paper each one is.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        *AlphaEditHyperParams.STATE,
        "regularizer",
        "l2_scale",
        "mom2_update_weight",
        "solve",
        "value_norm",
        "value_norm_factor",
    )

    alg_name: str = "NMKE"

    # Beyond the paper
    regularizer: str = "nullspace"  # "covariance": λ·E[c cᵀ] + L2 instead of a hard null space; λ = mom2_update_weight
    l2_scale: str = "absolute"  # "auto": L2 times the mean squared norm of a key outside the protected directions, per layer
    solve: str = "full"  # and mask afterwards; "restricted": solve for the chosen neurons alone
    value_norm: str = "free"  # "anchored": every z is rescaled to the mean norm of values solved on the unedited model
    value_norm_factor: float = 1.0  # times this
    key_contexts: str = "templates"  # what a key is averaged over; "relations": the locality_prompts too
    v_extra_steps: int = 0  # for a z that has not made the target the likelier answer after v_num_grad_steps
    locality_factor: float = 0.0  # weight of keeping the answers to locality_prompts when z is optimised
    locality_prompts: list[str] = field(default_factory=list)  # other relations, "{}" for the subject
    control: str = "none"  # what attribution is compared with: "random" neurons as many, "uniform" scaling by as much

    # Attribution (Eqs. 2, 3)
    attribution_strategy: str = "lps"
    amplification: float = 30.0
    attribution_target: str = "predicted"
    attribution_norm: str = "frozen"
    attribution_position: str = "last_token"
    attribution_backend: str = "auto"

    # Mask (Eqs. 4 to 8)
    neurons: str = "both"
    ratio: str = "dynamic"
    general_ratio: float = 0.5  # used when ratio: fixed
    specific_ratio: float = 0.3
    general_bias: float = 0.3
    general_scale: float = 0.1
    general_power: float = 3.0
    specific_bias: float = 0.3
    specific_scale: float = 0.1
    specific_power: float = 2.0
    temperature: float = 30.0
    mask: str = "binary"
    mask_ties: str = "include"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """As the other methods'; `preset` names a set of values for whatever `content` leaves out."""
        content = dict(content)
        preset = content.pop("preset", "published")
        if preset not in PRESETS:
            hint = _did_you_mean(str(preset), PRESETS)
            raise ValueError(_report(source, [f"preset is {preset!r}{hint}; expected one of {', '.join(map(repr, PRESETS))}"]))
        defaults = {name: list(v) if isinstance(v, tuple) else v for name, v in PRESETS[preset].items()}
        return super().from_dict({**defaults, **content}, source)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.solve == "restricted" and self.mask == "soft":
            found.append("solve: restricted chooses neurons and mask: soft weighs all of them; use one of the two")
        prompts = self.locality_prompts
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) and p.count("{}") == 1 for p in prompts):
            found.append(f"locality_prompts must be a list of texts with one {{}} each for the subject, got {prompts!r}")
        elif not prompts and _is_number(self.locality_factor) and self.locality_factor > 0:
            found.append(f"locality_factor is {self.locality_factor!r}, but locality_prompts is empty; give some, or set it to 0")
        elif not prompts and self.key_contexts == "relations":
            found.append("key_contexts: relations needs locality_prompts; give some, or set key_contexts: templates")
        for kind in ("general", "specific"):
            bias, scale = getattr(self, f"{kind}_bias"), getattr(self, f"{kind}_scale")
            if _is_number(bias) and _is_number(scale) and bias + scale > 1:
                found.append(f"{kind}_bias + {kind}_scale is {bias + scale}, expected at most 1")
        return found


# What `preset` stands for, in NMKE's files. The prompts are relations that most knowledge bases have; one that asks for the edited
# fact itself is left out when z is optimised.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": {},
        "plus": {
            "neurons": "all",
            "regularizer": "covariance",
            "l2_scale": "auto",
            "nullspace_fraction": 0.1,
            "mom2_update_weight": 2500.0,
            "L2": 12.0,
            "key_contexts": "relations",
            "v_extra_steps": 45,
            "locality_factor": 1.5,
            "locality_prompts": (
                "{} was born in",
                "{} works as a",
                "{} lives in",
                "{} speaks",
                "{} is married to",
                "{} studied at",
                "{} is located in",
                "{} was founded in",
                "{} is famous for",
                "{} belongs to",
                "{} plays",
                "The capital of {} is",
            ),
        },
    }
)


@dataclass
class FTHyperParams(HyperParams):
    """Adam on the FFN's output projection of `layers`; with `norm_constraint` no weight moves by more than that (FT-L)."""

    alg_name: str = "FT"
    num_steps: int = 25
    lr: float = 5e-4
    weight_decay: float = 0.0
    norm_constraint: float | bool = False  # false: none
    objective_optimization: str = "prompt_last"  # every target token from the prompt's last; "target_new": one after the other
    kl_factor: float = 0.0  # accepted for EasyEdit's files

    def problems(self) -> list[str]:
        found = super().problems()
        if self.state_dir is not None:
            found.append("state_dir is set, but FT changes whole weights, which are too large to keep for every edit; remove it")
        return found


CLASSES = {
    kind.alg_name: kind for kind in (NMKEHyperParams, AlphaEditHyperParams, MEMITHyperParams, ROMEHyperParams, FTHyperParams)
}


def read(path_or_name: str | Path) -> HyperParams:
    """Read a YAML file of any method, which its alg_name tells (NMKE when it tells none); or one that comes with the package, by
    "<method>/<name>" (or "<name>", for NMKE). Raises what `HyperParams.from_hparams` does."""
    path = _find(path_or_name, NMKEHyperParams.alg_name)
    content = _load(path)
    method = content.get("alg_name", NMKEHyperParams.alg_name)
    if method not in CLASSES:
        raise ValueError(
            f"{path}: alg_name is {method!r}{_did_you_mean(str(method), CLASSES)}; known methods: {', '.join(CLASSES)}"
        )
    return CLASSES[method].from_dict(content, source=str(path))


def shipped(method: str = "NMKE") -> dict[str, Path]:
    """The YAML files of a method that come with the package, by name: hparams/ of a checkout, or its installed copy."""
    installed = (
        Path(base) / "share/easyedit_nmke/hparams" for base in (sys.prefix, sysconfig.get_path("data"), site.getuserbase())
    )
    for directory in (Path(__file__).parents[1] / "hparams", *installed):
        files = sorted((directory / method).glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def _find(path_or_name: str | Path, method: str) -> Path:
    path = Path(path_or_name)
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(path.name + ".yaml")
    if not path.is_file() and str(path.parent) in (".", *CLASSES):
        method = method if path.parent == Path(".") else str(path.parent)
        path = shipped(method).get(path.stem, path)
    if not path.is_file():
        raise FileNotFoundError(f"no hyperparameter file {path}; those that come with the package: {', '.join(shipped(method))}")
    return path


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold one mapping of names to values, got {type(content).__name__}")
    return content


# Attributes that EasyEdit's evaluation reads from any hyperparameter object and its users assign.
_EASYEDIT_EVALUATION = {"evaluation_type", "api_key", "use_chat_template"}


def _report(source: str, problems: list[str]) -> str:
    noun = "problem" if len(problems) == 1 else "problems"
    return f"{source}: {len(problems)} {noun}\n" + "\n".join(f"  - {p}" for p in problems)


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number(name: str, value: Any) -> Any:
    """YAML 1.1 reads '1e-1' as text; EasyEdit's files rely on it becoming a number. 1e5 may stand for a whole number."""
    if name in RANGES and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
        if name in WHOLE and value.is_integer():
            return int(value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
