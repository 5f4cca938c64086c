"""EasyEdit's own methods under this package's driver, data and scorers: one edit after the other, as `BaseEditor.edit` makes them.

EasyEdit's files are used as they are. What they leave behind (variables of modules, files in the working directory, the state of
random generators, text on stdout) is kept inside the `EasyEditMethod` that caused it, so that methods do not disturb each other.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from transformers.modeling_outputs import CausalLMOutput

from .. import atlas, facts
from ..hparams import find
from ..models.arch import ModelView
from ..models.hooks import record
from ..models.requests import Request
from ..statistics import corpus, covariance
from .register import easyedit_method

logger = logging.getLogger(__name__)

# Methods that leave no edited model to score, or need what an edit request does not have.
UNSUITED = {
    "IKE": "it changes no model but puts examples before each question, chosen from a training set",
    "FT-Api": "it fine-tunes a model behind a paid interface",
    "DeepEdit-Api": "it asks a model behind a paid interface",
    "DINM": "it unlearns unsafe answers and needs the safe and the unsafe response of a SafeEdit record",
}
# BaseEditor pads on the right for the first line, on the left for all others. The second line counts positions from the left as
# well: under BaseEditor's left padding PMET writes NaN and MEMIT-FE misses the subject.
PADDED_RIGHT = {
    "ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE",
    "PMET", "MEMIT-FE",
}  # fmt: skip
# The word by which EasyEdit tells a family from a model's name, where it is not the model_type.
FAMILY_WORDS = {"gpt2": "gpt2-xl", "gptj": "gpt-j-6b"}
OWN_DATASETS = {"wikipedia", "wikitext", "wikitext2"}  # whose statistics EasyEdit collects itself
PROJECTOR = "null_space_project.pt"  # where AlphaEdit writes P, whatever P_loc says
_ABSENT = object()


class EasyEditMethod:
    """One of EasyEdit's methods on one model.

    model: what to score; for WISE, GRACE and DEFER, which decide per text whether an edit is meant, a `TextByText`. tok: the
    model's tokenizer. hparams: EasyEdit's own object (its `to_dict` gives plain data).
    """

    def __init__(
        self,
        name: str,
        hparams_path: str | Path = "atlas",
        model_and_tok: tuple | None = None,
        device=None,
        seed: int = 0,
        corpus: str | None = None,
    ):
        """hparams_path: a YAML file in EasyEdit's format, or the name of one that comes with the package. model_and_tok: edited in
        place; None loads the embedded model. device: by default where the model is. seed: of torch, numpy and random before the
        first edit. corpus: old knowledge ("atlas", a file, or a data set of the hub), for the covariance of keys and for the
        unrelated prompts of WISE; by default what `mom2_dataset` names, which EasyEdit collects itself when it is one of its own,
        and for WISE the package's `facts`.

        ValueError, before anything is edited, for a method that does not exist or that cannot be run so.
        """
        self.alg_name, self._write, settings = easyedit_method(name)
        _check_suited(self.alg_name)
        self.hparams = _read(settings, find(hparams_path, f"easyedit/{self.alg_name}", of=f" for EasyEdit's {self.alg_name}"))
        named = self.hparams.model_name
        if model_and_tok is None and named != "atlas":
            raise ValueError(f"the hyperparameters are for the model {named!r}; give it as model_and_tok=(model, tokenizer)")
        self._original, self.tok = model_and_tok or atlas.load()
        if device is not None:
            self._original.to(device)
        self.model, self._edits = self._original, 0
        inner = getattr(self.hparams, "_base_hparams", None) or self.hparams  # SimIE edits by another method, with its settings
        for hparams in (self.hparams, inner):
            self._prepare(hparams)
        self.startup: dict[str, float | None] = {}  # seconds before the first edit; EasyEdit's own preparations are in that
        self._inside = Enclosure(inner.alg_name, self.tok, seed)
        source = corpus or getattr(inner, "mom2_dataset", "atlas" if named == "atlas" else None)
        if hasattr(inner, "mom2_dataset") and source not in OWN_DATASETS:
            self._inside.replace("layer_stats", self._statistics(inner, source))
        self._unrelated = self._unrelated_texts(source) if self.alg_name == "WISE" else None

    def apply(self, requests: Sequence[Request | Mapping]) -> None:
        """Write the requests by one call of EasyEdit's function, with the arguments of `BaseEditor.edit(sequential_edit=True)`.

        ValueError when the method does not write as many at once, or the subject is in every text that it could keep. RuntimeError
        when EasyEdit fails; unlike this package's own methods, it may then have changed the model.
        """
        requests = [r if isinstance(r, Request) else Request.from_dict(r) for r in requests]
        self._check_count(len(requests))
        records = [self._record(request) for request in requests]
        with self._inside:
            try:
                edited, _ = self._write(
                    self._original, self.tok, records, self.hparams,
                    copy=False, return_orig_weights=True, keep_original_weight=False, train_ds=None,
                )  # fmt: skip
            except Exception as error:
                raise RuntimeError(
                    f"EasyEdit's {self.alg_name} failed after {self._edits} edits ({type(error).__name__}: {error}); "
                    "the model may hold a part of the edit"
                ) from error
        if not all(torch.isfinite(p).all() for p in self._original.parameters()):
            raise RuntimeError(
                f"EasyEdit's {self.alg_name} left weights that are not finite, {self._edits} edits after the start; "
                "check its hyperparameters"
            )
        self.model = edited if hasattr(edited, "get_output_embeddings") else TextByText(edited)
        self._edits += len(requests)

    def _check_count(self, count: int) -> None:
        batchable = sys.modules["easyeditor.editors.batch_editor"].BatchEditor.is_batchable_method(self.alg_name)
        most = getattr(self.hparams, "batch_size", 1) if batchable else 1
        if count > most:
            why = "batch_size is that" if batchable else "it reads no more than the first"
            raise ValueError(f"EasyEdit's {self.alg_name} writes {most} request at a time ({why}), got {count}")

    def _record(self, request: Request) -> dict:
        """EasyEdit's dictionary; the old answer is what DPO is to avoid."""
        record = {**request.to_dict(), "target_neg": request.ground_truth}
        if self._unrelated is not None:
            some = itertools.islice(self._unrelated, 10_000)  # which is without an end
            record["loc_prompt"] = next((text for text in some if not request.subject or request.subject not in text), None)
            if record["loc_prompt"] is None:
                raise ValueError(f"{request.subject!r} is in every text that {self.alg_name} could keep; give it other texts")
        return record

    def _prepare(self, hparams) -> None:
        """What BaseEditor takes from the model, and what EasyEdit would look for in the working directory."""
        word = FAMILY_WORDS.get(self._original.config.model_type, self._original.config.model_type)
        if word not in hparams.model_name.lower():
            hparams.model_name = word
        hparams.device = str(next(self._original.parameters()).device)
        hparams.sequential_edit = True  # without it WISE starts anew at every edit; no file can set it
        for name in ("stats_dir", "load_path", "archive"):
            if getattr(hparams, name, None):
                setattr(hparams, name, os.path.abspath(getattr(hparams, name)))
        if hasattr(hparams, "P_loc"):
            known = hparams.P_loc and os.path.exists(hparams.P_loc)
            hparams.P_loc = os.path.abspath(hparams.P_loc) if known else PROJECTOR
        if hasattr(hparams, "archive") and not (hparams.archive and os.path.isfile(hparams.archive)):
            raise ValueError(
                f"EasyEdit's {self.alg_name} needs an editor trained for this model; `archive` is {hparams.archive!r}, not a file"
            )

    def _statistics(self, hparams, source: str) -> Callable:
        """EasyEdit's `layer_stats` answered from our covariance of keys over `source`, of the model before the first edit."""
        view = ModelView(self._original)
        asked = SimpleNamespace(
            layers=list(hparams.layers),
            mom2_dataset=source,
            mom2_n_samples=hparams.mom2_n_samples,
            stats_dir=hparams.stats_dir,
            mom2_dtype="float32",
            seed=0,
        )
        known = covariance.moments(view, self.tok, asked, spent=self.startup)
        by_name = {view.weight_name(layer).removesuffix(".weight"): moment for layer, moment in known.items()}

        def layer_stats(model, tokenizer, layer_name, *_, precision="float32", **__):
            if layer_name not in by_name:
                raise ValueError(f"{self.alg_name} asks for the covariance at {layer_name}; known: {', '.join(by_name)}")
            moment = by_name[layer_name].to(getattr(torch, precision))
            return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: moment))

        return layer_stats

    def _unrelated_texts(self, source: str | None) -> Iterator[str]:
        """Without a source, the well-known facts of the tuning half as sentences."""
        if source is None:
            return itertools.cycle(f"{fact['prompt']} {fact['ground_truth']}" for fact in facts.requests(split="tune"))
        return itertools.cycle(corpus.corpus(source, 10_000))


class TextByText(torch.nn.Module):
    """An editor that EasyEdit put around a model, asked one text at a time without padding.

    WISE and DEFER decide by the average or the last token of a text whether an edit is meant: other texts of a batch, or padding,
    would change the answer. GRACE decides at the question's last token, and a text of question and answer does not tell which
    that is: the token nearest to a key of its codebook is taken (the question's last, where the edit itself is asked for).
    """

    def __init__(self, editor: torch.nn.Module):
        super().__init__()
        self.editor = editor

    @property
    def inner(self):
        """The transformers model, with the editor's layers in it."""
        return self.editor.model

    @property
    def config(self):
        return self.inner.config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        """logits [B, T, V]; zeros where the mask is."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for ids, real in zip(input_ids, mask.bool(), strict=True):
            out = self._ask(ids[real][None])
            rows.append(out.new_zeros(len(ids), out.shape[-1]).index_copy(0, real.nonzero()[:, 0], out))
        return CausalLMOutput(logits=torch.stack(rows))

    def _ask(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, T] -> logits [T, V]."""
        for layer in self.inner.modules():
            if type(layer).__name__ == "GRACEAdapter":
                with record({"queries": (layer, "input")}, stop=True) as seen:
                    self.inner(input_ids=ids)
                layer.key_id = int(torch.cdist(layer.keys.float(), seen["queries"][0].float()).amin(0).argmin())
        with contextlib.redirect_stdout(_Log()):
            return self.editor(input_ids=ids).logits[0]


class Enclosure:
    """A context in which EasyEdit's code finds what it left there the last time, and after which everybody else does too.

    Held apart: variables of EasyEdit's method modules, starting with the values that their source gives them; the working
    directory; the random states; the tokenizer's padding side; stdout, which goes to the log.
    """

    def __init__(self, alg_name: str, tok, seed: int):
        self._tok, self._side = tok, "right" if alg_name in PADDED_RIGHT else "left"
        self._directory = tempfile.TemporaryDirectory(prefix="easyedit_")
        self._variables = {module.__name__: _remembered(module) for module in _method_modules()}
        outside = _random_states()
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        self._random = _exchange_random(outside)

    def replace(self, name: str, value) -> None:
        """Inside, `value` is what every method module that has a `name` finds under it."""
        for module in _method_modules():
            if hasattr(module, name):
                self._variables[module.__name__][name] = value

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(contextlib.redirect_stdout(_Log()))
        self._stack.callback(os.chdir, os.getcwd())
        os.chdir(self._directory.name)
        self._exchange()
        self._stack.callback(self._exchange)

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _exchange(self) -> None:
        """What is kept here changes place with what is there."""
        for module, values in self._variables.items():
            there = vars(sys.modules[module])
            for name, value in values.items():
                values[name] = there.get(name, _ABSENT)
                if value is _ABSENT:
                    there.pop(name, None)
                else:
                    there[name] = value
        self._random = _exchange_random(self._random)
        self._tok.padding_side, self._side = self._side, self._tok.padding_side


def _method_modules() -> list:
    modules = [module for name, module in sys.modules.items() if name.startswith("easyeditor.models.")]
    return [module for module in modules if getattr(module, "__file__", None)]


def _remembered(module) -> dict:
    """The variables in which a module's functions remember things, by name, with the values that its source gives them: those
    that a function declares global, and containers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in EasyEdit's source
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    declared = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    values = dict.fromkeys(declared, _ABSENT)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(node.value)
                if node.targets[0].id in declared or isinstance(value, (dict, list, set)):
                    values[node.targets[0].id] = value
    return values


def _random_states() -> tuple:
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _exchange_random(states: tuple) -> tuple:
    """Set the states; returns those before."""
    before = _random_states()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.cuda.set_rng_state_all(states[3])
    return before


class _Log(io.TextIOBase):
    """A stream whose lines go to the log."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)


def _check_suited(alg_name: str) -> None:
    reason = UNSUITED.get(alg_name)
    if alg_name == "QLoRA" and not torch.cuda.is_available():
        reason = "it needs a model quantised to 4 bits, on a CUDA device"
    if reason:
        raise ValueError(f"EasyEdit's {alg_name} cannot be run here: {reason}")


def _read(settings: type, path: Path):
    """EasyEdit's hyperparameters; ValueError where its class refuses the file."""
    try:
        with contextlib.redirect_stdout(_Log()):
            return settings.from_hparams(str(path))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file for EasyEdit's {settings.__name__}: {type(error).__name__}: {error}") from error
