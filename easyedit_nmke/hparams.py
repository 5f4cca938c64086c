"""Hyperparameters: one flat YAML file, one dataclass, every check. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHOICES = {
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
}

# field -> (lowest, highest, is the lowest allowed). Anything not listed is free.
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
}


class ModelPair(tuple):
    """A (model, tokenizer) tuple that EasyEdit's scorers can ask for the text of its name, as they do of a path."""

    def lower(self) -> str:
        return self[0].config.model_type


@dataclass
class NMKEHyperParams:
    """All settings of one edit. Names are EasyEdit's (hparams/AlphaEdit) where EasyEdit has them.

    Defaults are the published NMKE code's; `layers` and `model_name` have none. The section 'Hyperparameters' of the README
    says which symbol of the paper each one is. Fields under "accepted for EasyEdit's files" change nothing here.
    """

    layers: list[int]
    model_name: Any  # a path, a hub name, "atlas", or a (model, tokenizer) tuple
    alg_name: str = "NMKE"
    device: Any = 0  # a CUDA index, or any torch device name
    model_parallel: bool = False
    fp16: bool = False
    batch_size: int = 1  # requests written by one update
    max_length: int = 40
    seed: int = 0  # of the context templates

    # Target values z (Adam on δ at the last edited layer)
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_loss_layer: int | None = None  # None: the last block
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625

    # Null space of the covariance of keys
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = 100000
    mom2_dtype: str = "float32"
    nullspace_threshold: float = 2e-2
    nullspace_fraction: float | None = None  # instead of the threshold: the share of directions that updates may use
    L2: float = 1.0
    P_loc: str | None = None
    stats_dir: str | None = None  # None: the user's cache directory

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

    # Context templates
    template_prefixes: list[str] = field(default_factory=lambda: ["The", "Therefore", "Because", "I", "You"])
    template_length: int = 10  # tokens, prefix included

    # Accepted for EasyEdit's files: the architecture table and the method leave nothing for them to decide
    layer_selection: str = "all"
    mom2_adjustment: bool = True
    mom2_update_weight: float = 15000
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
    def from_hparams(cls, hparams_name_or_path: str | Path) -> NMKEHyperParams:
        """Read a YAML file (the suffix may be left out, as in EasyEdit), or one that comes with the package, by its name.

        Raises FileNotFoundError when there is none, ValueError with every problem of the file in one message.
        """
        path = Path(hparams_name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = path.with_name(path.name + ".yaml")
        if not path.is_file() and path.parent == Path("."):
            path = shipped().get(path.stem, path)
        if not path.is_file():
            raise FileNotFoundError(f"no hyperparameter file {path}; those that come with the package: {', '.join(shipped())}")
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must hold one mapping of names to values, got {type(content).__name__}")
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> NMKEHyperParams:
        """Build from a mapping; unknown and missing names and bad values are reported together."""
        content = {name: _number(name, value) for name, value in content.items()}
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
        if self.alg_name != "NMKE":
            found.append(f"alg_name is {self.alg_name!r}, expected 'NMKE'")
        if not isinstance(self.model_name, (str, tuple)) or (isinstance(self.model_name, tuple) and len(self.model_name) != 2):
            found.append(f"model_name must be a name, a path or a (model, tokenizer) tuple, got {type(self.model_name).__name__}")
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(_is_int(i) and i >= 0 for i in layers):
            found.append(f"layers must be a list of block numbers (0 or more), got {layers!r}")
        elif list(layers) != sorted(set(layers)):
            found.append(f"layers must increase without repetition, got {layers!r}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                hint = _did_you_mean(str(value), allowed)
                found.append(f"{name} is {value!r}{hint}; expected one of {', '.join(map(repr, allowed))}")
        for name, (low, high, inclusive) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("v_loss_layer", "nullspace_fraction"):
                continue
            whole = isinstance(getattr(type(self), name, None), int) or name == "v_loss_layer"
            if not _is_number(value) or (whole and not _is_int(value)):
                found.append(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
            elif not (low <= value <= high and (inclusive or value > low)) or not math.isfinite(value):
                bound = f"{'at least' if inclusive else 'more than'} {low}" + (f" and at most {high}" if high < math.inf else "")
                found.append(f"{name} is {value!r}, expected {bound}")
        if _is_number(self.general_bias) and _is_number(self.general_scale) and self.general_bias + self.general_scale > 1:
            found.append(f"general_bias + general_scale is {self.general_bias + self.general_scale}, expected at most 1")
        if _is_number(self.specific_bias) and _is_number(self.specific_scale) and self.specific_bias + self.specific_scale > 1:
            found.append(f"specific_bias + specific_scale is {self.specific_bias + self.specific_scale}, expected at most 1")
        for name in ("model_parallel", "fp16"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not _is_int(self.seed):
            found.append(f"seed must be a whole number, got {self.seed!r}")
        prefixes = self.template_prefixes
        if not isinstance(prefixes, (list, tuple)) or not all(isinstance(p, str) and p for p in prefixes):
            found.append(f"template_prefixes must be a list of words, got {prefixes!r}")
        if self.P_loc is not None and not isinstance(self.P_loc, str):
            found.append(f"P_loc must be a path or null, got {self.P_loc!r}")
        return found

    def validate(self) -> None:
        """Raise one ValueError that lists every problem. Called again when an edit starts: attributes may have been assigned."""
        found = self.problems()
        unknown = set(vars(self)) - {f.name for f in dataclasses.fields(self)} - _EASYEDIT_EVALUATION
        names = {f.name for f in dataclasses.fields(self)}
        found += [f"unknown attribute {name!r}{_did_you_mean(name, names)}" for name in sorted(unknown)]
        if found:
            raise ValueError(_report("hyperparameters", found))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data; a (model, tokenizer) tuple is named by its model's name."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.model_name, tuple):
            content["model_name"] = getattr(getattr(self.model_name[0], "config", None), "_name_or_path", "") or "(model, tok)"
        content["device"] = self.device if isinstance(self.device, (int, str)) or self.device is None else str(self.device)
        return content


def shipped() -> dict[str, Path]:
    """The YAML files that come with the package, by name: hparams/NMKE of a checkout, or its installed copy."""
    for directory in (Path(__file__).parents[1] / "hparams/NMKE", Path(sys.prefix) / "share/easyedit_nmke/hparams/NMKE"):
        files = sorted(directory.glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


# Attributes that EasyEdit's evaluation reads from any hyperparameter object and its users assign.
_EASYEDIT_EVALUATION = {"evaluation_type", "api_key", "use_chat_template"}


def _report(source: str, problems: list[str]) -> str:
    noun = "problem" if len(problems) == 1 else "problems"
    return f"{source}: {len(problems)} {noun}\n" + "\n".join(f"  - {p}" for p in problems)


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number(name: str, value: Any) -> Any:
    """YAML 1.1 reads '1e-1' as text; EasyEdit's files rely on it becoming a number."""
    if name in RANGES and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
