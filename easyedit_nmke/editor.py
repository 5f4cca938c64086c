"""Editing without EasyEdit: `LifelongEditor`, with BaseEditor's calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .history.durable import find
from .history.journal import Journal
from .history.state import LifelongState
from .hparams import HyperParams
from .methods import apply_to_model, consolidate, method_named, method_of, undo
from .methods.contract import Method, carried_state, check_requests
from .models.arch import ModelView
from .models.chat import as_asked
from .models.loading import load_model
from .models.passes import chunks
from .models.requests import Request, is_hole, listed
from .models.weights import check_model
from .scores import metrics

logger = logging.getLogger(__name__)


class LifelongEditor:
    """Edits one model request after request, with the calls of EasyEdit's BaseEditor; by whichever
    method the hyperparameters are of."""

    def __init__(self, hparams: HyperParams):
        hparams.validate()
        self.hparams, self.model_name, self.alg_name = hparams, hparams.model_name, hparams.alg_name
        self.method = method_of(hparams)
        self.model, self.tok = load_model(hparams)
        check_model(ModelView(self.model), hparams)
        self._state: LifelongState | None = None

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> LifelongEditor:
        return cls(hparams)

    @classmethod
    def of_folder(
        cls, folder: str | Path, model: str | None = None, device: str | None = None, write: bool = True
    ) -> LifelongEditor:
        """The editor of the edits that are kept in `folder` or below it (see `durable.find`), its model brought to the last one.
        model, device: instead of those that it was started with. write: whether later edits, and undone ones, are kept there too;
        without it they are this editor's alone, and the folder stays as it is."""
        folder = find(folder)
        with Journal.open(folder, write=False) as journal:
            content = journal.header["hparams"]
        changes = {name: value for name, value in (("model_name", model), ("device", device)) if value is not None}
        hparams = method_named(content["alg_name"], str(folder)).hparams.from_dict(
            {**content, **changes, "state_dir": str(folder)}, source=f"the state in {folder}"
        )
        editor = cls.from_hparams(hparams)
        editor._state = editor.method.open(editor.model, editor.tok, hparams, write=write)  # brings the model to the last edit
        return editor

    def open(self) -> LifelongState:
        """Make the state, or take up the one that the model or `state_dir` has. Most of the work is the covariance of keys, at
        8B hours, once for a model (it is cached on disk; stopped, it goes on). The first edit opens the state by itself."""
        if self._state is None:
            self._state = carried_state(self.model, self.tok, self.hparams, self.method)
        return self._state

    @property
    def state(self) -> LifelongState:
        """What the method keeps from edit to edit (statistics, past keys, templates), opened if it is not yet (see `open`)."""
        return self.open()

    def apply(self, requests: Sequence[Request | Mapping]) -> dict[str, torch.Tensor]:
        """Write one batch of requests; returns the edited parameters as they were before, by name."""
        requests = self._asked(requests)
        _, before = apply_to_model(self.model, self.tok, requests, self.hparams, return_orig_weights=True, state=self.state)
        return before

    def undo(self, edit: int, resolve: bool = False) -> None:
        """Take one edit out (see `methods.undo`); with `resolve`, later ones are solved again without it."""
        undo(self.model, self.tok, self.hparams, self.state, edit, resolve)

    def consolidate(self) -> None:
        """Solve all edits that count at once, in the place of all updates so far (see `methods.consolidate`)."""
        consolidate(self.model, self.tok, self.hparams, self.state)

    def close(self) -> None:
        """Let another process go on with the state that `state_dir` keeps."""
        if self._state is not None and self._state.book is not None:
            self._state.book.close()

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put parameters back (as returned by `apply` and `edit`), and past keys with them."""
        with torch.no_grad():
            for name, original in weights.items():
                self.model.get_parameter(name).copy_(original)
        if self._state is not None:
            self._state.follow(self.method.matrices(self.model, self.hparams))

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg=None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Mapping] | None = None,
        portability_inputs: Mapping[str, Mapping] | None = None,
        sequential_edit: bool = True,
        verbose: bool = True,
        *,
        subject: str | Sequence[str] | None = None,
        requests: Sequence[Mapping | Request] | None = None,
        keep_original_weight: bool = False,
        loc_prompts: str | Sequence[str] | None = None,
        test_generation: bool = False,
    ):
        """Edit, and score before and after: (metrics, model, weights as they were before this call), as BaseEditor.edit.

        metrics[i] has "pre", "post" (right after the request's own edit, as EasyEdit scores), "time" in seconds, and with
        `sequential_edit` also "final": after all edits of this call. Without `sequential_edit` every edit is taken back after
        its scoring. `hparams.batch_size` requests share one update. `requests` (EasyEdit's dictionaries) replaces the columns;
        target_neg, keep_original_weight, loc_prompts (WISE's) and test_generation are accepted as in EasyEdit and change nothing.
        """
        if requests is None:
            requests = make_requests(
                self.method, prompts, target_new, subject, ground_truth, rephrase_prompts, locality_inputs, portability_inputs
            )
        checked = self._asked(requests)
        separator = self.hparams.target_separator
        for batch in chunks(checked, self.hparams.batch_size):
            check_requests(ModelView(self.model), self.tok, batch, self.state.flat_templates, separator)
        metrics.check(self.model, self.tok, checked, separator)
        with nullcontext() if sequential_edit else self.state.aside():
            return self._edit(checked, sequential_edit, verbose)

    def batch_edit(self, prompts, target_new, *args, sequential_edit: bool = False, **kwargs):
        """`edit` with BaseEditor.batch_edit's default: each batch is taken back after its scoring."""
        return self.edit(prompts, target_new, *args, sequential_edit=sequential_edit, **kwargs)

    def _asked(self, requests: Sequence[Request | Mapping]) -> list[Request]:
        """See `chat.as_asked`."""
        found = [_request(self.method, number, record) for number, record in enumerate(requests)]
        return as_asked(self.tok, found, self.hparams)

    def _quality(self, requests: Sequence[Request]) -> list[dict]:
        return metrics.quality(self.model, self.tok, requests, separator=self.hparams.target_separator)

    def _edit(self, requests: list[Request], sequential: bool, verbose: bool):
        with self.state.as_of(self.state.claimed):  # a process that was stopped made later edits, which this one will claim
            before = self._quality(requests)
            names = self.method.matrices(self.model, self.hparams)
            originals = {name: self.model.get_parameter(name).detach().clone() for name in names}
        results = [
            {"case_id": i, "requested_rewrite": request.to_dict(), "pre": pre}
            for i, (request, pre) in enumerate(zip(requests, before, strict=True))
        ]
        batches = list(chunks(results, self.hparams.batch_size))
        for batch in tqdm(batches, desc="editing", unit="edit", disable=not verbose):
            asked = [requests[result["case_id"]] for result in batch]
            started = time.perf_counter()
            weights = self.apply(asked)
            seconds = time.perf_counter() - started
            try:
                for result, post in zip(batch, self._quality(asked), strict=True):
                    metrics.add_locality_accuracy(result["pre"], post)
                    result.update(post=post, time=seconds)
            finally:
                if not sequential:
                    self.restore(weights)
        if sequential:
            for result, final in zip(results, self._quality(requests), strict=True):
                metrics.add_locality_accuracy(result["pre"], final)
                result["final"] = final
        return results, self.model, originals


def make_requests(
    method: Method, prompts, target_new, subject, ground_truth, rephrase_prompts, locality_inputs, portability_inputs
) -> list[Request]:
    """EasyEdit's columns to requests. ValueError when they are of different lengths, or a request cannot be edited (see
    `Request.from_dict`)."""

    def column(value) -> list:
        return [value] if isinstance(value, str) or is_hole(value) else list(listed(value))

    prompts = column(prompts)
    if subject is None and method.needs_subject:
        raise ValueError(f"{method.name} needs the subject of every prompt; give subject=[...], one for each prompt")
    records: list[dict] = [{"prompt": prompt, "locality": {}, "portability": {}} for prompt in prompts]
    given = {"target_new": target_new, "subject": subject, "ground_truth": ground_truth, "rephrase_prompt": rephrase_prompts}
    for name, value in given.items():
        values = column(value) if value is not None else [None] * len(prompts)
        if len(values) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(values)} values of {name}; give one for each prompt")
        for record, one in zip(records, values, strict=True):
            record[name] = one
    for section, inputs in (("locality", locality_inputs), ("portability", portability_inputs)):
        for kind, entry in (inputs or {}).items():
            if not isinstance(entry, Mapping) or not {"prompt", "ground_truth"} <= set(entry):
                raise ValueError(f"{section}_inputs[{kind!r}] needs 'prompt' and 'ground_truth', got {entry!r}")
            asked, answers = column(entry["prompt"]), column(entry["ground_truth"])
            if len(asked) != len(prompts) or len(answers) != len(prompts):
                raise ValueError(
                    f"{section}_inputs[{kind!r}] has {len(asked)} prompts and {len(answers)} answers, expected {len(prompts)}"
                )
            for record, prompt, answer in zip(records, asked, answers, strict=True):
                record[section][kind] = {"prompt": prompt, "ground_truth": answer}
    return [_request(method, number, record) for number, record in enumerate(records)]


def _request(method: Method, number: int, record: Mapping | Request) -> Request:
    """ValueError with the request's number; what is left out of it is logged."""
    if isinstance(record, Request):
        return record
    try:
        return Request.from_dict(record, method.needs_subject, note=partial(logger.warning, "request %d: %s", number))
    except ValueError as error:
        raise ValueError(f"request {number}: {error}") from None
