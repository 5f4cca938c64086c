"""What every editing method promises: bad input is refused before anything changes, and a failure leaves the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..history.durable import Ground, begun, continued
from ..history.journal import Journal
from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams
from ..models.arch import ModelView, editing
from ..models.chat import as_asked
from ..models.device import peak_memory, timed
from ..models.prompts import SUBJECT, ended, tokenised_all
from ..models.requests import Request
from ..models.weights import Matrices, check_finite, check_model, down_projections
from .consolidation import when_due

logger = logging.getLogger(__name__)

HANDLE = "nmke_state"  # the one thing that is put on a model: its state, for calls that pass none (EasyEdit passes none)


def _nothing_measured(view: ModelView, tok, hparams: HyperParams, progress: bool) -> Ground:
    return Ground([[SUBJECT]])


def _no_solvers(view: ModelView, ground: Ground, hparams: HyperParams) -> Mapping[int, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """An editing method: all that the rest of the package knows of it.

    name: its alg_name, and the folder of its YAML files.
    hparams: its hyperparameters, each with what it may be.
    edit(view, tok, requests, hparams, state): computes the updates of one edit, adds each by `state.write`, says what was done.
    measure(view, tok, hparams, progress): what it has to know of the unedited model, once.
    build(view, ground, hparams): from that the solvers which remember past keys, by layer.
    writes(view, hparams): names of the parameters that it edits.
    replay: `edit` that may be given z [D, requests], where edits can be solved again from their values (undo with resolve,
        consolidation); a method whose reports have masks must take `masks`, layer -> [F] bool, too.
    needs_subject: whether a request has to say which words of the prompt are the subject.
    """

    name: str
    hparams: type[HyperParams]
    edit: Callable[[ModelView, Any, Sequence[Request], Any, LifelongState], EditReport]
    measure: Callable[[ModelView, Any, Any, bool], Ground] = _nothing_measured
    build: Callable[[ModelView, Ground, Any], Mapping[int, Any]] = _no_solvers
    writes: Callable[[ModelView, Any], Sequence[str]] = down_projections
    replay: Callable[..., EditReport] | None = None
    needs_subject: bool = True

    def matrices(self, model, hparams: HyperParams) -> Matrices:
        """The parameters that an edit writes, as matrices by name, of the model as it is at the moment."""
        view = ModelView(model)
        return Matrices(view, self.writes(view, hparams))

    def open(self, model, tok, hparams: HyperParams, progress: bool = True, write: bool = True) -> LifelongState:
        """A new state of the model as it is now; with `hparams.state_dir` the one that is kept there, and the model brought to its
        last edit. write: whether later edits are kept there (see `durable.continued`).

        Raises ValueError, and leaves the model as it was, when that state is of another model or of other hyperparameters; OSError
        when the folder cannot be written, or another process writes it.
        """
        view = ModelView(model)
        check_model(view, hparams)
        if hparams.state_dir is not None and Journal.exists(hparams.state_dir):
            return continued(lambda ground: self._state(view, ground, hparams), self.matrices(model, hparams), hparams, write)
        with editing(model):
            ground = self.measure(view, tok, hparams, progress)
        with timed(ground.seconds, "solvers"):
            state = self._state(view, ground, hparams)
        return state if hparams.state_dir is None else begun(state, ground, self.matrices(model, hparams), hparams)

    def _state(self, view: ModelView, ground: Ground, hparams: HyperParams) -> LifelongState:
        solvers = self.build(view, ground, hparams)
        return LifelongState(
            hparams.state_settings(), solvers, ground.templates, ground.value_norms, hparams.keeps_updates, hparams.keeps_originals,
            ground.seconds,
        )  # fmt: skip


def apply_method(
    method: Method,
    model,
    tok,
    requests: Sequence[Mapping | Request],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    state: LifelongState | None = None,
    edit: Callable[..., EditReport] | None = None,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write `requests` into the model by one edit of the method, in EasyEdit's calling convention.

    copy: edit a deep copy. return_orig_weights: also return the edited parameters as they were before this call, by name. state: by
    default the one that the model carries from its last edit with the same settings, or a new one. edit: instead of the method's.

    Raises ValueError, before anything changes, for requests, hyperparameters or models that cannot be edited. When anything
    fails on the way, weights and state are as before the call, bit for bit.
    """
    if not isinstance(hparams, method.hparams):
        got = type(hparams).__name__
        raise ValueError(
            f"hparams is {got}, expected {method.hparams.__name__}; `LifelongEditor` and `apply_to_model` take any method's"
        )
    hparams = shallow_copy(hparams)
    hparams.validate()
    view = ModelView(model)
    requests = [r if isinstance(r, Request) else Request.from_dict(r, method.needs_subject) for r in requests]
    check_model(view, hparams)
    requests = as_asked(tok, requests, hparams)
    learnt = ended(tok, requests, hparams)  # what the method reads; the log and the scores know the request as it was asked
    check_requests(view, tok, learnt, separator=hparams.target_separator)
    if copy:
        _check_copy(hparams, state)
        model = deepcopy(model)
        view = ModelView(model)
    with editing(model):
        if state is None:
            state = carried_state(model, tok, hparams, method)
        check_state(state, hparams)
        setattr(model, HANDLE, state)
        check_requests(view, tok, learnt, state.flat_templates, hparams.target_separator)
        weights = method.matrices(model, hparams)
        state.follow(weights)
        when_due(method, view, tok, hparams, state)  # a process was stopped between an edit and this, or went back to there
        with _unchanged_on_error({name: model.get_parameter(name) for name in weights}) as originals:
            if not state.claim(requests):
                with state.superseding(requests):
                    state.advance((edit or method.edit)(view, tok, learnt, hparams, state), requests)
        when_due(method, view, tok, hparams, state)
    return model, originals if return_orig_weights else {}


def check_state(state: LifelongState, hparams: HyperParams) -> None:
    """ValueError for a state that was opened with other hyperparameters."""
    if state.settings != hparams.state_settings():
        raise ValueError(_different_state(state, hparams))
    if state.book is not None:
        state.book.check(hparams)


def _check_copy(hparams: HyperParams, state: LifelongState | None) -> None:
    """ValueError for a copy whose edits would be kept on disk: a folder keeps the edits of one model, which is not the copy."""
    if hparams.state_dir is not None or (state is not None and state.book is not None):
        raise ValueError(
            "copy=True cannot be had with edits that are kept on disk, which are of the model itself; "
            "copy the model, and give the copy hyperparameters with another state_dir, or with none"
        )


def check_requests(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    templates: Sequence[str] = ("{}",),
    separator: str | None = None,
    beside: Sequence[Request] = (),
) -> None:
    """ValueError for a batch that cannot be edited: empty, contradictory, longer in some template than the model's context, or with
    a subject or a target that has no tokens of its own.

    separator: between prompt and target (`target_separator`). beside: others of the batch, which have been checked.
    """
    if not requests:
        raise ValueError("there is no request to edit")
    targets = {request.prompt: request.target_new for request in beside}
    for request in requests:
        other = targets.setdefault(request.prompt, request.target_new)
        if other != request.target_new:
            raise ValueError(
                f"one batch asks for two answers to {request.prompt!r}: {other!r} and {request.target_new!r}; keep one of them"
            )
        texts = [(*request.fill(template, tok), request.target_new) for template in templates]
        longest = max(len(found.ids) for found in tokenised_all(tok, texts, separator))
        if view.context_length and longest > view.context_length:
            raise ValueError(
                f"the prompt {request.prompt[:60]!r}... with its target and context is {longest} tokens, "
                f"the model's context {view.context_length}"
            )


def carried_state(model, tok, hparams: HyperParams, method: Method, progress: bool = True) -> LifelongState:
    """The state that the model carries from its last edit with the same settings, or a new one; with `state_dir` the one that is
    kept there.

    ValueError when the model's edits are kept on disk elsewhere or with other hyperparameters.
    """
    state = getattr(model, HANDLE, None)
    if state is not None and state.book is not None:
        state.book.check(hparams)
        if hparams.state_dir is None or Path(hparams.state_dir).resolve() == state.book.directory.resolve():
            return state
        raise ValueError(f"the edits of this model are kept in {state.book.directory}, not in {hparams.state_dir}")
    if state is not None and state.settings == hparams.state_settings() and hparams.state_dir is None:
        return state
    if state is not None and state.edits:
        what = _different_state(state, hparams).split(";")[0] if hparams.state_dir is None else "the state was not kept on disk"
        logger.warning("%s; past keys are forgotten", what)
    check_finite(model)
    return method.open(model, tok, hparams, progress)


def _different_state(state: LifelongState, hparams: HyperParams) -> str:
    changed = [
        f"{name} {state.settings.get(name)!r} -> {value!r}"
        for name, value in hparams.state_settings().items()
        if state.settings.get(name) != value
    ]
    return f"the state was opened with other settings ({', '.join(changed)}); open a new one with open_state"


@contextmanager
def _unchanged_on_error(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield copies of the weights; whatever is raised inside puts them back."""
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield originals
    except BaseException:
        with torch.no_grad():
            for name, original in originals.items():
                weights[name].copy_(original)
        raise


@contextmanager
def phase(report: EditReport, name: str) -> Iterator[None]:
    """Add the seconds that the block takes to the report, and keep the most memory it needed."""
    peak_memory(reset=True)
    with timed(report.seconds, name):
        yield
    report.peak_memory[name] = max(report.peak_memory.get(name, 0.0), peak_memory())
