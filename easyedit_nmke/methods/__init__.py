"""Editing methods: each is one file with one record (`contract.Method`), and here is the table of them.

Another package adds one by an entry point of the group `easyedit_nmke.methods` that names its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from .. import hparams as settings
from ..extensions import row, with_extensions
from ..history.log import Consolidation, Undo, check_undo, consolidated, held, standing
from ..history.state import LifelongState
from ..hparams import HyperParams
from ..messages import did_you_mean
from ..models.arch import ModelView, editing
from ..models.requests import Request
from . import alphaedit, consolidation, ft, kne, locft, memit, nmke, rome, ultraedit
from .contract import Method, apply_method, check_state

DEFAULT = nmke.METHOD


_RECORDS = (
    nmke.METHOD, alphaedit.METHOD, memit.METHOD, rome.METHOD, ft.METHOD, locft.METHOD, ultraedit.METHOD, kne.METHOD,
)  # fmt: skip
OWN: Mapping[str, Method] = MappingProxyType({method.name: method for method in _RECORDS})
OTHER_NAMES: Mapping[str, str] = MappingProxyType({"ULTRAEDIT": "UltraEdit"})  # what EasyEdit's files call a method


def methods() -> dict[str, Method]:
    """Every method by its alg_name: this package's, then those that other packages add."""
    return with_extensions("methods", OWN)


def method_named(name: str, source: str = "hyperparameters") -> Method:
    """ValueError, with what was meant, for a name that no method has."""
    found = row("methods", OWN, OTHER_NAMES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        known = methods()
        raise ValueError(f"{source}: alg_name is {name!r}{did_you_mean(str(name), known)}; known methods: {', '.join(known)}")
    return found


def method_of(hparams: HyperParams) -> Method:
    """The method that hyperparameters are of. ValueError for anything else."""
    if not isinstance(hparams, HyperParams):
        raise ValueError(f"hparams is {type(hparams).__name__}, expected a method's hyperparameters (`easyedit_nmke.read(FILE)`)")
    return method_named(hparams.alg_name)


def read(path_or_name: str | Path) -> HyperParams:
    """Read a YAML file of any method, which its alg_name tells (NMKE when it tells none); or one that comes with the package, by
    "<method>/<name>" (or "<name>", for NMKE). Raises what `HyperParams.from_hparams` does."""
    path = settings.find(path_or_name, DEFAULT.name, methods())
    content = settings.load(path)
    return method_named(content.get("alg_name", DEFAULT.name), str(path)).hparams.from_dict(content, source=str(path))


def apply_to_model(
    model,
    tok,
    requests: Sequence[Mapping | Request],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    state: LifelongState | None = None,
    **kwargs,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write `requests` into the model by one update of the method that `hparams` are of; EasyEdit's calling convention.

    requests: EasyEdit's dictionaries or `Request`s. copy: edit a deep copy. return_orig_weights: also return the edited
    parameters as they were before this call, by name. state: past keys and projector; by default the one that the model
    carries from its last edit with the same settings, or a new one. Other keywords of EasyEdit's convention change nothing.

    Raises ValueError, before anything changes, for requests, hyperparameters or models that cannot be edited. When anything
    fails on the way, weights and state are as before the call, bit for bit.
    """
    return apply_method(method_of(hparams), model, tok, requests, hparams, copy, return_orig_weights, state)


def open_state(model, tok, hparams: HyperParams, progress: bool = True) -> LifelongState:
    """A new state for the method that `hparams` are of, with the statistics of the model as it is now (see `Method.open`)."""
    return method_of(hparams).open(model, tok, hparams, progress)


def consolidate(model, tok, hparams: HyperParams, state: LifelongState, undone: int | None = None) -> None:
    """Solve all edits that count at once, in the place of all updates so far (see `consolidation`); with `undone`, make the
    last consolidation anew without this edit. All or nothing, also on disk. ValueError when there is nothing to consolidate."""
    method = method_of(hparams)
    with editing(model):
        check_state(state, hparams)
        state.follow(method.matrices(model, hparams))
        consolidation.consolidate(method, ModelView(model), tok, hparams, state, undone)


def undo(model, tok, hparams: HyperParams, state: LifelongState, edit: int, resolve: bool = False) -> None:
    """Take edit `edit` out of the model: `LifelongState.undo`, or where a consolidation holds it, that one made anew without it.
    With `resolve`, later edits are solved again without it, from their recorded values z; they are made anew, so their numbers move
    up (one that `value_norm: nas` skipped has no value, and is left out), and consolidations come where they came. All or nothing,
    also on disk."""
    if not resolve:
        if held(state.events, edit):
            consolidate(model, tok, hparams, state, edit)
        else:
            state.undo(edit)
        return
    method = method_of(hparams)
    if method.replay is None:
        raise ValueError(f"edits of {method.name} cannot be solved again from their values; undo them without resolve")
    place = check_undo(state.events, edit)
    later, now, whole = state.events[place:], standing(state.events), consolidated(state.events[:place])
    with state.together():
        state.rewind(place)
        for event in later:
            if isinstance(event, Consolidation):
                anew, whole = whole is not None and whole.last == event.last, event  # those that an undo brought come with it
                by_itself = anew or getattr(hparams, "consolidate_every", 0)
                if not by_itself and state.counting and state.events[-1] is not state.consolidation:
                    consolidate(model, tok, hparams, state)
                continue
            if isinstance(event, Undo):
                if event.edit < later[0].first:
                    undo(model, tok, hparams, state, event.edit)
                continue
            skipped = event.report.skipped
            kept = [i for i, n in enumerate(event.ids) if n != edit and now[n] != "undone" and i not in skipped]
            if kept:
                requests = [event.requests[i] for i in kept]
                again = partial(method.replay, z=event.z[:, kept])
                apply_method(method, model, tok, requests, hparams, state=state, edit=again)


def applied(method: Method) -> Callable:
    """`apply_to_model` of one method alone, as EasyEdit's table of methods holds them, and as an entry point of its group
    `easyeditor.methods` names them (docs/upstream.md). Padding is done here, so any side of the tokenizer will do."""

    def apply(
        model, tok, requests, hparams, copy=False, return_orig_weights=False, keep_original_weight=False, state=None, **kwargs
    ):
        return apply_method(method, model, tok, requests, hparams, copy, return_orig_weights, state)

    apply.__name__ = apply.__qualname__ = f"apply_{method.name.lower().replace('-', '_')}_to_model"
    apply.__doc__ = f"Write `requests` into the model by {method.name}; arguments and promises of `apply_to_model`."
    apply.of_easyedit_nmke, apply.hparams, apply.batchable = True, method.hparams, True
    return apply


apply_nmke_to_model = applied(nmke.METHOD)
apply_alphaedit_to_model = applied(alphaedit.METHOD)
apply_memit_to_model = applied(memit.METHOD)
apply_rome_to_model = applied(rome.METHOD)
apply_ft_to_model = applied(ft.METHOD)
apply_locft_to_model = applied(locft.METHOD)
apply_kne_to_model = applied(kne.METHOD)
