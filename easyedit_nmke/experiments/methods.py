"""What is compared: methods by name, with options, batch size and other settings behind it, and named sets of NMKE's settings."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ..attribution import STRATEGIES
from ..editor import LifelongEditor
from ..hparams import HyperParams, shipped
from ..messages import did_you_mean
from ..methods import methods as editing_methods
from ..methods import read
from ..methods.nmke import NMKEHyperParams
from ..models.loading import load_model

# Labels that stand for settings of NMKE: the file they are read from, and what is changed in it.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "NMKE+": ("NMKE/{model}-plus", {}),
        "NMKE random mask": ("NMKE/{model}", {"control": "random"}),
        "NMKE uniform": ("NMKE/{model}", {"control": "uniform"}),
        "NMKE+ mask": ("NMKE/{model}-plus", {"neurons": "both"}),
        "NMKE+ random mask": ("NMKE/{model}-plus", {"neurons": "both", "control": "random"}),
    }
)
METHODS = ("NMKE", "NMKE+", "AlphaEdit", "MEMIT", "ROME", "FT", "NMKE random mask")
# What "+NAS" and "+BLUE" behind a method's name set.
OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"NAS": {"value_norm": "nas"}, "BLUE": {"blue": True}})

# Named sets of settings: label -> what differs from the first method's file.
ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "selection": {
            **{name: {"neurons": name} for name in ("general", "specific", "overlap", "non_overlap", "both")},
            "random": {"control": "random"},
            "all": {"neurons": "all"},
        },
        "ratio": {
            "dynamic": {"ratio": "dynamic"},
            "dynamic, exact ties": {"ratio": "dynamic", "mask_ties": "exact"},
            **{
                f"fixed {general}/{specific}": {"ratio": "fixed", "general_ratio": general, "specific_ratio": specific}
                for general, specific in ((0.1, 0.1), (0.3, 0.3), (0.5, 0.3))
            },
            "fixed 0.3/0.3, exact ties": {"ratio": "fixed", "general_ratio": 0.3, "specific_ratio": 0.3, "mask_ties": "exact"},
        },
        "attribution": {
            **{strategy.label: {"attribution_strategy": name} for name, strategy in STRATEGIES.items()},
            "new target": {"attribution_target": "target_new"},
            "exact norm": {"attribution_norm": "exact"},
            "padded end": {"attribution_position": "padded_end"},
        },
        "mask": {
            "binary": {"mask": "binary"},
            "soft": {"mask": "soft"},
            "restricted": {"solve": "restricted"},
            "compensated": {"solve": "compensated"},
            "none": {"neurons": "all"},
        },
        "lambda": {f"λ = {value}": {"amplification": value} for value in (1.0, 10.0, 30.0, 100.0)},
        "temperature": {f"α = {value}": {"temperature": value} for value in (1.0, 10.0, 30.0, 100.0)},
        "l2": {f"L2 x {factor}": {"L2": ("times", factor)} for factor in (0.1, 0.3, 1.0, 3.0, 10.0)},
    }
)


@dataclass(frozen=True)
class Method:
    """What one line of a comparison is called, and how its editor is made (again, in another process)."""

    label: str
    settings: HyperParams | None = None
    easyedit: str | None = None  # the name in EasyEdit's ALG_DICT
    file: str | None = None
    base: HyperParams | None = None  # says which model EasyEdit's method edits, and where
    loaded: Any = None  # an editor on an unedited model, for the only segment of a plan

    @property
    def batch_size(self) -> int:
        """Edits that share one update; of EasyEdit's methods, whose files are theirs, 1."""
        return self.settings.batch_size if self.settings else 1

    def editor(self, seed: int, state_dir: Path):
        """state_dir: where a segment is kept while it is made, for those methods that can go on from any edit."""
        if self.loaded is not None:
            return self.loaded
        if self.settings is not None:
            kept = {"state_dir": str(state_dir)} if self.settings.keeps_updates else {}
            return LifelongEditor.from_hparams(dataclasses.replace(self.settings, **kept))
        from ..easyedit.foreign import EasyEditMethod

        return EasyEditMethod(self.easyedit, self.file, load_model(self.base), seed=seed)


def methods(names: str, model: str, directory: Path | None = None, overrides: Mapping[str, Any] | None = None) -> list[Method]:
    """Methods from a list such as "NMKE, NMKE+, AlphaEdit@100, MEMIT+BLUE, AlphaEdit[L2=10], easyedit:WISE".

    Files are `directory`/<method>/<model>.yaml, by default those that come with the package. +NAS and +BLUE are OPTIONS, @100 is
    the batch size, [name=value; ...] changes settings, and so do `overrides` (model_name, device) for all of them. ValueError,
    naming what is known, for anything that cannot be read; FileNotFoundError for all methods that have no file for the model.
    """
    found, missing = [], {}
    for name in separate(names):
        bare, changes = named(name)
        if bare.lower().startswith("easyedit:"):
            if changes:
                raise ValueError(f"method {name!r} changes settings of EasyEdit's, which are those of its file; change them there")
            method = bare.split(":", 1)[1]
            file = _easyedit_file(method, model, directory)
            base = _base(file, model, directory, overrides or {})
            found.append(Method(name, easyedit=method, file=file, base=base))
            continue
        file, preset = VARIANTS.get(bare, ("{method}/{model}", {}))
        known = editing_methods()
        if bare not in VARIANTS and bare not in known:
            known = [*known, *VARIANTS, "easyedit:<method>"]
            raise ValueError(f"method {bare!r} is not known{did_you_mean(bare, known)}; known: {', '.join(known)}")
        path = file.format(method=bare, model=model)
        try:
            settings = read(directory / path if directory else path)
        except FileNotFoundError:
            missing[f"{directory / path if directory else path}.yaml"] = path
            continue
        found.append(Method(name, changed(settings, {**preset, **changes, **(overrides or {})}, f"method {name}")))
    if missing:
        path = next(iter(missing.values()))
        method = path.split("/")[0] + ("+" if path.endswith("-plus") else "")
        raise FileNotFoundError(
            f"no hyperparameter file {', '.join(missing)}; `nmke tune --model {model} --method {method} --out DIR/{path}.yaml` "
            "finds settings, and --hparams-dir DIR takes them"
        )
    return found


def separate(names: str) -> list[str]:
    """The names of a list, separated by commas that stand in no brackets."""
    return [part.strip() for part in re.split(r",(?![^\[\]]*\])", names) if part.strip()]


def named(name: str) -> tuple[str, dict[str, Any]]:
    """What a name is made of: "MEMIT+BLUE@100[v_lr=0.5]" -> ("MEMIT", {"blue": True, "batch_size": 100, "v_lr": 0.5})."""
    match = re.fullmatch(r"([^\[\]@]+)(?:@\s*(\d+)\s*)?(?:\[([^\[\]]*)\])?", name)
    if not match:
        raise ValueError(f"method {name!r} cannot be read; expected a name, name@batch size, or name[setting=value; setting=value]")
    pairs = [part.split("=", 1) for part in (match[3] or "").split(";") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"method {name!r} cannot be read; settings are written name[setting=value; setting=value]")
    bare, changes = match[1].strip(), {"batch_size": int(match[2])} if match[2] else {}
    while bare not in VARIANTS and (option := bare.rpartition("+")[2]) in OPTIONS:
        bare, changes = bare.rpartition("+")[0], {**OPTIONS[option], **changes}
    return bare, {**changes, **{key.strip(): yaml.safe_load(value) for key, value in pairs}}


def ablation(name: str, base: HyperParams) -> list[Method]:
    """The methods of a named set, each `base` with other settings."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}, expected one of {', '.join(ABLATIONS)}")
    return [Method(label, changed(base, changes)) for label, changes in ABLATIONS[name].items()]


def changed(settings: HyperParams, changes: Mapping[str, Any], source: str = "hyperparameters") -> HyperParams:
    """`settings` with other values; ("times", x) multiplies. ValueError with every problem of `source` in one message."""
    values = {
        name: getattr(settings, name) * value[1] if isinstance(value, tuple) and value[0] == "times" else value
        for name, value in changes.items()
    }
    now = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return type(settings).from_dict({**now, **values}, source)


def _easyedit_file(method: str, model: str, directory: Path | None) -> str:
    """`directory`'s file for a method of EasyEdit, else the one that comes with this package, else EasyEdit's own."""
    folders = [directory / "easyedit" / method] if directory else []
    own = [Path(os.environ["EASYEDIT_HOME"]) / "hparams" / method] if os.environ.get("EASYEDIT_HOME") else []
    for file in [
        *(f / f"{model}.yaml" for f in folders),
        shipped(f"easyedit/{method}").get(model),
        *(f / f"{model}.yaml" for f in own),
    ]:
        if file is not None and file.is_file():
            return str(file)
    return model


def _base(file: str, model: str, directory: Path | None, overrides: Mapping[str, Any]) -> HyperParams:
    """Which model EasyEdit's method edits, where, and in which dtype: as NMKE's file says, `directory`'s if that is given, the
    package's if not; where there is none, `overrides`, and for the rest EasyEdit's own file."""
    theirs = directory / "NMKE" / f"{model}.yaml" if directory else shipped("NMKE").get(model)
    if theirs is not None and theirs.is_file():
        return changed(read(theirs), overrides)
    said = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if Path(file).is_file() else None
    own = {name: said[name] for name in ("model_name", "device", "dtype", "fp16") if name in said} if isinstance(said, dict) else {}
    if "dtype" in overrides:
        own.pop("fp16", None)
    named = {**own, **overrides}
    if not named.get("model_name"):
        raise ValueError(
            f"no file says which model {model!r} is: there is no {theirs or f'NMKE/{model}.yaml'}, and no model_name in EasyEdit's "
            f"{file}; give --model-path, or one of the two files"
        )
    return NMKEHyperParams.from_dict({"layers": [0], **named}, source=file)
