"""What every editing method promises: bad input is refused before anything changes, and a failure leaves the same bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from copy import deepcopy
from pathlib import Path

import torch

from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams
from ..models.arch import ModelView, editing
from ..models.device import peak_memory, synchronise
from ..models.prompts import Request, encode, target_tokens
from ..models.updates import Update, accumulate
from ..models.weights import check_finite, check_model, edited_parameters, followed

logger = logging.getLogger(__name__)

_ATTRIBUTE = "nmke_state"  # where a model carries its state between calls that pass none (EasyEdit passes none)

Opens = Callable[[torch.nn.Module, object, HyperParams], LifelongState]
Writes = Callable[[ModelView, object, Sequence[Request], HyperParams, LifelongState], tuple[dict[int, torch.Tensor], EditReport]]


def apply_method(
    opens: Opens,
    writes: Writes,
    model,
    tok,
    requests: Sequence[Mapping | Request],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    state: LifelongState | None = None,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write `requests` into the model by one call of `writes`, in EasyEdit's calling convention.

    opens: makes the method's state, for a model that carries none. writes: computes and writes the update; returns the keys to
    remember (layer -> [F, requests]; none, for methods without a memory) and what it did. copy: edit a deep copy.
    return_orig_weights: also return the edited parameters as they were before this call, by name. state: by default the one
    that the model carries from its last edit with the same settings, or a new one.

    Raises ValueError, before anything changes, for requests, hyperparameters or models that cannot be edited. When anything
    fails on the way, weights and state are as before the call, bit for bit.
    """
    hparams = shallow_copy(hparams)
    hparams.validate()
    view = ModelView(model)
    requests = [r if isinstance(r, Request) else Request.from_dict(r) for r in requests]
    check_model(view, hparams)
    check_requests(view, tok, requests)
    if copy:
        model = deepcopy(model)
        view = ModelView(model)
    with editing(model):
        if state is None:
            state = carried_state(model, tok, hparams, opens)
        elif state.settings != settings_of(hparams):
            raise ValueError(_different_state(state, hparams))
        elif state.book is not None:
            state.book.check(hparams)
        setattr(model, _ATTRIBUTE, state)
        check_requests(view, tok, requests, state.flat_templates)
        weights = followed(view, hparams)
        state.follow(weights)
        with _unchanged_on_error(edited_parameters(view, hparams)) as originals:
            if not state.claim(requests):
                with state.superseding(requests):
                    keys, report = writes(view, tok, requests, hparams, state)
                    state.advance(weights, keys, report, requests)
    return model, originals if return_orig_weights else {}


def require(hparams, kind: type[HyperParams]) -> None:
    """ValueError when a method is given another method's hyperparameters."""
    if not isinstance(hparams, kind):
        got = type(hparams).__name__
        raise ValueError(f"hparams is {got}, expected {kind.__name__}; `LifelongEditor` and `apply_to_model` take any method's")


def write(weight: torch.Tensor, update: Update, report: EditReport, master: torch.Tensor | None = None) -> None:
    """weight [D, F] += update in place, and note it in the report as it was added (see `Update.rounded`).

    With a float32 `master`, weight = master + all updates of its layer in the report, rounded once; the master itself is left
    to `LifelongState.advance`. FloatingPointError when the sum is not finite; the caller puts the weight back.
    """
    update = update.rounded(weight.dtype)
    report.updates.append(update)
    if master is None:
        accumulate(weight, weight, [update])
    else:
        accumulate(weight, master, [u for u in report.updates if u.layer == update.layer])
    if not torch.isfinite(weight).all():
        raise FloatingPointError(f"the update of layer {update.layer} is not finite; the model is left as it was")


def check_requests(view: ModelView, tok, requests: Sequence[Request], templates: Sequence[str] = ("{}",)) -> None:
    """ValueError for a batch that cannot be edited: empty, contradictory, or longer in some template than the model's context."""
    if not requests:
        raise ValueError("there is no request to edit")
    targets: dict[str, str] = {}
    for request in requests:
        other = targets.setdefault(request.prompt, request.target_new)
        if other != request.target_new:
            raise ValueError(
                f"one batch asks for two answers to {request.prompt!r}: {other!r} and {request.target_new!r}; keep one of them"
            )
        longest = max(len(encode(tok, f"{request.fill(template)[0]} {request.target_new}")) for template in templates)
        if view.context_length and longest > view.context_length:
            raise ValueError(
                f"the prompt {request.prompt[:60]!r}... with its target and context is {longest} tokens, "
                f"the model's context {view.context_length}"
            )
        if not target_tokens(tok, request.prompt, request.target_new):
            raise ValueError(f"the target {request.target_new!r} of {request.prompt!r} has no tokens of its own")


def settings_of(hparams: HyperParams) -> dict:
    """The hyperparameters that a state depends on."""
    return {name: deepcopy(getattr(hparams, name)) for name in hparams.STATE}


def _different_state(state: LifelongState, hparams: HyperParams) -> str:
    wanted = settings_of(hparams)
    changed = [
        f"{name} {state.settings.get(name)!r} -> {wanted[name]!r}" for name in wanted if state.settings.get(name) != wanted[name]
    ]
    return f"the state was opened with other settings ({', '.join(changed)}); open a new one with open_state"


def carried_state(model, tok, hparams: HyperParams, opens: Opens) -> LifelongState:
    """The state that the model carries from its last edit with the same settings, or a new one; with `state_dir` the one that is
    kept there.

    ValueError when the model's edits are kept on disk elsewhere or with other hyperparameters.
    """
    state = getattr(model, _ATTRIBUTE, None)
    if state is not None and state.book is not None:
        state.book.check(hparams)
        if hparams.state_dir is None or Path(hparams.state_dir).resolve() == state.book.directory.resolve():
            return state
        raise ValueError(f"the edits of this model are kept in {state.book.directory}, not in {hparams.state_dir}")
    if state is not None and state.settings == settings_of(hparams) and hparams.state_dir is None:
        return state
    if state is not None and state.edits:
        what = _different_state(state, hparams).split(";")[0] if hparams.state_dir is None else "the state was not kept on disk"
        logger.warning("%s; past keys are forgotten", what)
    check_finite(model)
    return opens(model, tok, hparams)


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
    synchronise()
    peak_memory(reset=True)
    started = time.perf_counter()
    yield
    synchronise()
    report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - started
    report.peak_memory[name] = max(report.peak_memory.get(name, 0.0), peak_memory())
