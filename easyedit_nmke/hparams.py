"""Hyperparameters: one flat YAML file, one dataclass per method, every check. Imports no torch.

The classes stand with their methods (`methods/`), each field with what it may be; what methods share is inherited, checks alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import site
import sys
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from .messages import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


def setting(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = math.inf,
    whole: bool = False,
    none: Any = dataclasses.MISSING,
    choices: Sequence[str] = (),
    factory: Any = dataclasses.MISSING,
    state: bool = False,
) -> Any:
    """A field of a method's hyperparameters, with what it may be.

    A number: from `least`, or more than `above`, up to `most`; `whole`: without a fraction; `none`: the value that stands for
    "not used". A word: one of `choices`. state: a `LifelongState` depends on it, so that another value needs another state.
    """
    numeric = least is not None or above is not None
    allowed = {"least": least, "above": above, "most": most, "whole": whole, "none": none} if numeric else {}
    return field(default=default, default_factory=factory, metadata={**allowed, "choices": tuple(choices), "state": state})


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

    single_edits: ClassVar[bool] = True  # whether one request can be an update of its own

    layers: list[int] = setting(state=True)
    model_name: Any  # a path, a hub name, "atlas", or a (model, tokenizer) tuple
    alg_name: str = setting("", state=True)
    device: Any = 0  # a CUDA index, or any torch device name
    revision: str | None = None  # of a hub name; null: the newest
    model_parallel: bool = False
    dtype: str = setting("float32", choices=("float32", "bfloat16", "float16", "auto"))  # of a named model; "auto": as it is stored
    fp16: bool = False  # EasyEdit's name for dtype: float16
    batch_size: int = setting(1, least=1, whole=True)  # requests written by one update
    max_length: int = setting(40, least=1, whole=True)
    seed: int = setting(0, state=True)  # of the context templates
    state_dir: str | None = None  # a folder: every edit is kept there, and a new process goes on from the last
    use_chat_template: bool = False  # prompts are what a user says, and go through the tokenizer's chat template
    target_separator: str | None = None  # between prompt and target; null: what the text asks for, mostly one space
    target_eos: bool = False  # targets are learnt with the tokenizer's end token behind them; scores ask for the text alone

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
        path = find(hparams_name_or_path, cls.alg_name)
        return cls.from_dict(load(path), source=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """Build from a mapping; unknown and missing names and bad values are reported together."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        content = {str(name): _number(fields.get(name), value) for name, value in content.items()}
        names = set(fields)
        problems = [f"unknown name {name!r}{did_you_mean(name, names)}" for name in content if name not in names]
        problems += [f"{name!r} is missing" for name in ("layers", "model_name") if name not in content]
        known = {name: value for name, value in content.items() if name in names}
        bare = cls.__new__(cls)
        for name, value in {**defaults(cls), "layers": [0], "model_name": "atlas", **known}.items():
            setattr(bare, name, value)
        problems += bare.problems()
        if problems:
            raise ValueError(report(source, problems))
        return cls(**known)

    def problems(self) -> list[str]:
        """Every reason why these values cannot be used, in words; empty when there is none."""
        found = []
        if self.alg_name != type(self).alg_name:
            found.append(f"alg_name is {self.alg_name!r}, expected {type(self).alg_name!r}")
        if not isinstance(self.model_name, (str, tuple)) or (isinstance(self.model_name, tuple) and len(self.model_name) != 2):
            found.append(f"model_name must be a name, a path or a (model, tokenizer) tuple, got {type(self.model_name).__name__}")
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(is_int(i) and i >= 0 for i in layers):
            found.append(f"layers must be a list of block numbers (0 or more), got {layers!r}")
        elif list(layers) != sorted(set(layers)):
            found.append(f"layers must increase without repetition, got {layers!r}")
        found += [problem for f in dataclasses.fields(self) for problem in _wrong(f, getattr(self, f.name))]
        if self.fp16 is True and self.dtype not in ("float32", "float16"):
            found.append(f"fp16: true asks for float16, dtype for {self.dtype!r}; leave one of them out")
        numbered = is_int(self.device) or self.device is None or isinstance(self.device, str)
        if not numbered and type(self.device).__name__ != "device":
            found.append(f"device must be a CUDA index or the name of a torch device, got {self.device!r}")
        if not is_int(self.seed):
            found.append(f"seed must be a whole number, got {self.seed!r}")
        if self.revision is not None and not isinstance(self.revision, str):
            found.append(f"revision must be a text or null, got {self.revision!r}")
        if self.target_separator is not None and not isinstance(self.target_separator, str):
            found.append(f"target_separator must be a text or null, got {self.target_separator!r}")
        if self.state_dir is not None and not isinstance(self.state_dir, (str, Path)):
            found.append(f"state_dir must be a folder or null, got {self.state_dir!r}")
        return found

    def validate(self) -> None:
        """Raise one ValueError that lists every problem. Called again when an edit starts: attributes may have been assigned."""
        found = self.problems()
        unknown = set(vars(self)) - {f.name for f in dataclasses.fields(self)} - _EASYEDIT_EVALUATION
        names = {f.name for f in dataclasses.fields(self)}
        found += [f"unknown attribute {name!r}{did_you_mean(name, names)}" for name in sorted(unknown)]
        if found:
            raise ValueError(report("hyperparameters", found))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data but `state_dir`; a (model, tokenizer) tuple is named by its model's name."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "state_dir"}
        if isinstance(self.model_name, tuple):
            content["model_name"] = getattr(getattr(self.model_name[0], "config", None), "_name_or_path", "") or "(model, tok)"
        content = {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}
        content["device"] = self.device if isinstance(self.device, (int, str)) or self.device is None else str(self.device)
        return content

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        """What `nmke tune` tries for a model of `depth` blocks, besides the settings of target values: name -> the values of a
        list, or any number between two, evenly by its logarithm. "blocks": how many are edited, the value's own and those right
        below it; methods without target values name "layers". Empty: there is nothing to try."""
        return {}

    @property
    def keeps_updates(self) -> bool:
        """Whether every edit's update is kept, so that it can be told, undone and gone back to."""
        return True

    @property
    def keeps_originals(self) -> bool:
        """Whether an edit needs the weights as they were before the first one, although no updates are kept."""
        return False

    def state_settings(self) -> dict[str, Any]:
        """Those that a `LifelongState` depends on."""
        return {f.name: deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.metadata.get("state")}

    def differences(self, stored: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """What is not as in `stored` (an earlier `to_dict`, from JSON), in words. What is absent there had its default."""
        return differences(stored, self.to_dict(), defaults(type(self)), free)


def differences(one: Mapping, other: Mapping, default: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """What two `to_dict`s do not share, in words, but for what is `free`. What is absent in one had its `default`."""
    one, other, default = (json.loads(json.dumps(content)) for content in (one, other, default))
    names = (name for name in dict.fromkeys([*other, *one]) if name not in free)
    pairs = ((name, one.get(name, default.get(name)), other.get(name, default.get(name))) for name in names)
    return [f"{name} {was!r} -> {now!r}" for name, was, now in pairs if was != now]


def defaults(kind: type[HyperParams]) -> dict[str, Any]:
    """Field -> default, of those that have one."""
    found = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in dataclasses.fields(kind) if f.default_factory is not dataclasses.MISSING}
    return {**found, **made}


def _wrong(f: dataclasses.Field, value: Any) -> list[str]:
    """What is wrong with a field's value by itself."""
    name, allowed = f.name, f.metadata
    if allowed.get("choices") and value not in allowed["choices"]:
        hint = did_you_mean(str(value), allowed["choices"])
        return [f"{name} is {value!r}{hint}; expected one of {', '.join(map(repr, allowed['choices']))}"]
    if f.type == "bool" and not isinstance(value, bool):
        return [f"{name} must be true or false, got {value!r}"]
    if "most" not in allowed or (allowed["none"] is not dataclasses.MISSING and (value is None or value is allowed["none"])):
        return []
    whole, low = allowed["whole"], allowed["above"] if allowed["least"] is None else allowed["least"]
    if not is_number(value) or (whole and not is_int(value)):
        return [f"{name} must be a {'whole ' if whole else ''}number, got {value!r}"]
    if not (low <= value <= allowed["most"]) or value == allowed["above"] or not math.isfinite(value):
        bound = f"{'more than' if allowed['least'] is None else 'at least'} {low}"
        upper = f" and at most {allowed['most']}" if allowed["most"] < math.inf else ""
        return [f"{name} is {value!r}, expected {bound}{upper}"]
    return []


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


def find(path_or_name: str | Path, method: str, methods: Collection[str] = (), of: str = "") -> Path:
    """A hyperparameter file by its path, or by the name of one that comes with the package: "name", or "method/name" for one of
    `methods`. FileNotFoundError when there is none; of: what it says the file is for."""
    path = Path(path_or_name)
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(path.name + ".yaml")
    if not path.is_file() and str(path.parent) in (".", *methods):
        method = method if path.parent == Path(".") else str(path.parent)
        path = shipped(method).get(path.stem, path)
    if not path.is_file():
        known = ", ".join(shipped(method)) or "none"
        raise FileNotFoundError(f"no hyperparameter file {path}{of}; those that come with the package: {known}")
    return path


def load(path: Path) -> Mapping[str, Any]:
    """What a YAML file holds; ValueError when that is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {_yaml_problem(error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold one mapping of names to values, got {type(content).__name__}")
    return content


def _yaml_problem(error: Exception) -> str:
    """What PyYAML says in several lines, in one, with the line of the file."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    context = f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"


# Attributes that EasyEdit's evaluation reads from any hyperparameter object and its users assign.
_EASYEDIT_EVALUATION = {"evaluation_type", "api_key"}


def report(source: str, problems: list[str]) -> str:
    noun = "problem" if len(problems) == 1 else "problems"
    return f"{source}: {len(problems)} {noun}\n" + "\n".join(f"  - {p}" for p in problems)


def _number(f: dataclasses.Field | None, value: Any) -> Any:
    """YAML 1.1 reads '1e-1' as text; EasyEdit's files rely on it becoming a number. 1e5 may stand for a whole number."""
    if f is not None and "most" in f.metadata and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
        if f.metadata["whole"] and value.is_integer():
            return int(value)
    return value


def windows(depth: int, width: int) -> list[list[int]]:
    """Runs of `width` neighbouring blocks that a search tries, a tenth of a model's depth apart."""
    first, width = depth // 10, min(width, depth - depth // 10)
    return [list(range(start, start + width)) for start in range(first, depth - width + 1, max(first, 1))]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
