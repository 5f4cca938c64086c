"""What the shell does with a state on disk: tell its edits, take some out, export the edited model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path

import torch

from ..editor import LifelongEditor
from ..files import check_new
from ..history import journal
from ..history.checkpoint import ModelReport
from ..history.durable import find, history, undo
from ..history.export import Card, LoraReport, export_delta, export_lora, export_model, served_rank
from ..history.journal import Journal, Verification
from ..history.log import Consolidation, Edit, Event, consolidated, held, standing
from ..models.arch import ModelView, evaluating
from ..models.chat import as_chat
from ..models.products import frozen
from ..scores import generation
from ..scores.table import in_shell


def edits(folder: str | Path, model: str | None = None, device: str | None = None, check: bool = False) -> list[dict]:
    """Every edit of a state: id, subject, prompt, old and new answer, when it was made, and what has become of it ("skipped": the
    method chose not to write it). Loads no model, unless `check`: then "said" is what the edited model answers now, and "right"
    whether that is the new answer.
    """
    where = find(folder)
    with Journal.open(where, write=False) as journal:
        events, _ = history(journal, tensors=False)
    told = list(_told(events))
    found = [edit for edit, _ in told]
    if check and found:
        truths = [(request["prompt"], (request["target_new"], *request.get("aliases", ()))) for _, request in told]
        editor = open_editor(where, model, device, write=False)
        verdicts = generation.judge(editor.model, editor.tok, truths, separator=editor.hparams.target_separator)
        for edit, verdict in zip(found, verdicts, strict=True):
            edit.update(said=verdict.answer, right=verdict.exact)
    return found


def _told(events: Iterable[Event]) -> Iterator[tuple[dict, Mapping]]:
    """(what `edits` tells of it, its request) of every edit."""
    now = standing(events)
    for event in events:
        if isinstance(event, Edit):
            for number, request in zip(event.ids, event.requests, strict=True):
                told = {name: request.get(name) for name in ("subject", "prompt", "ground_truth", "target_new")}
                skipped = number - event.first in event.report.skipped and now[number] == "effective"
                yield {"id": number, **told, "made": event.made, "now": "skipped" if skipped else now[number]}, request


def consolidations(folder: str | Path) -> list[str]:
    """Each consolidation of a state, in a sentence."""
    with Journal.open(find(folder), write=False) as journal:
        events, _ = history(journal, tensors=False)
    found, whole = [event for event in events if isinstance(event, Consolidation)], consolidated(events)
    return [
        f"Consolidated after edit {event.last}: {len(event.edits)} {'edit' if len(event.edits) == 1 else 'edits'} solved at once, "
        f"{event.made}{'' if event is whole else ' (another came after it)'}"
        for event in found
    ]


def consolidate(folder: str | Path, model: str | None = None, device: str | None = None) -> str:
    """Solve all edits of a state that count at once; what was done, as `consolidations` tells it."""
    with closing(open_editor(folder, model, device)) as editor:
        editor.consolidate()
    return consolidations(folder)[-1]


def verify(folder: str | Path) -> Verification:
    """Read every file of a state and check its checksum; what is wrong, file by file."""
    return journal.verify(find(folder))


def verified(folder: str | Path) -> str:
    """When that was last done, and with what result, in a sentence."""
    found = journal.last_verified(find(folder))
    if found is None:
        return "Never verified: --verify reads every file, without it only their sizes are looked at"
    count = len(found.problems)
    result = f"{count} {'problem' if count == 1 else 'problems'}" if count else "every byte as it was written"
    return f"Last verified {found.made}, {found.records} {'record' if found.records == 1 else 'records'}: {result}"


def take_out(folder: str | Path, edit: int, resolve: bool = False, model: str | None = None, device: str | None = None) -> dict:
    """Undo one edit, and return it as `edits` tells it. Without a model: who opens the state next finds the model without the edit.
    A consolidation that holds it is solved anew, with the model loaded. resolve: load the model, and solve all later edits again,
    from which their numbers move up by one."""
    where = find(folder)
    told = {entry["id"]: entry for entry in edits(where)}
    with Journal.open(where, write=False) as journal:
        solved = edit in told and held(history(journal, tensors=False)[0], edit)
    if resolve or solved:
        with closing(open_editor(where, model, device)) as editor:
            editor.undo(edit, resolve)
    else:
        undo(where, edit)
    return told[edit]


def roll_back(folder: str | Path, to: int, model: str | None = None, device: str | None = None) -> int:
    """Make the state what it was after edit `to`; returns how many edits that took away."""
    with closing(open_editor(folder, model, device)) as editor:
        last = editor.state.last
        editor.state.rollback(to)
        return last - to


open_editor = LifelongEditor.of_folder


def export(
    folder: str | Path, to: str, out: Path, rank: int | None = None, model: str | None = None, device: str | None = None,
    dtype: str | None = None,
) -> ModelReport | LoraReport | None:  # fmt: skip
    """Write the edited model of a state to `out`; returns what an adapter's rank, or rounding a whole model to `dtype` (by default
    the base's), leaves out. to: "model", "delta" or "lora". rank: rounded up to one that servers take (`served_rank`)."""
    for name, value, kind in (("--rank", rank, "lora"), ("--dtype", dtype, "model")):
        if value is not None and to != kind:
            raise ValueError(f"{name} is for --to {kind}, not for --to {to}")
    check_new(out)
    where = find(folder)
    editor = open_editor(where, model, device, write=False)
    with Journal.open(where, write=False) as journal:
        card = _card(editor, journal.header["model"]["weights"])
    originals, updates = editor.state.changes()
    if to == "model":
        kind = None if dtype is None else getattr(torch, dtype)
        return export_model(editor.model, editor.tok, out, card, kind, editor.state.weights.masters)
    if to == "delta":
        return export_delta(editor.model, updates, originals, out, card)
    return export_lora(editor.model, updates, out, card, None if rank is None else served_rank(rank), fill=True)


def _card(editor: LifelongEditor, fingerprints: Mapping[str, str]) -> Card:
    """fingerprints: of the base's weights. Scores are those that were taken on the way, if no edit was taken out and none
    consolidated since."""
    headings = in_shell()
    state, now = editor.state, list(standing(editor.state.events).values())
    weights = json.dumps(fingerprints, sort_keys=True)
    noted = [(count, note["segment"]["line"]) for count, note in state.notes if "line" in note.get("segment", {})]
    since = state.events[noted[-1][0] :] if noted else []
    lines = [] if any(isinstance(event, Consolidation) for event in since) else [line for _, line in noted]
    scores = [
        {"Edits": line["checkpoint"], **{heading: line["scores"].get(name) for name, heading in headings.items()}}
        for line in lines
        if "undone" not in now
    ]
    settings = editor.hparams.to_dict()
    digest = hashlib.sha256(weights.encode()).hexdigest()[:16]
    today, revision = date.today().isoformat(), settings["revision"]
    return Card(settings["model_name"], digest, editor.alg_name, now.count("effective"), today, scores, revision)


class Sides:
    """The model of a folder of edits, and the same model without them, to be asked both. One model is in memory, and its edited
    matrices a second time, on its device. No byte of the folder changes, and what `undo` takes out is in it still.

    in_chat: whether prompts are put into the tokenizer's chat format; None where it has none.
    """

    def __init__(self, folder: str | Path, model: str | None = None, device: str | None = None):
        self.editor = LifelongEditor.of_folder(folder, model, device, write=False)
        self.in_chat = True if getattr(self.editor.tok, "chat_template", None) else None
        view = ModelView(self.editor.model)
        self._edited = {name: view.model.get_parameter(name) for name in self.editor.state.weights.now}
        originals, _ = self.editor.state.changes()
        self._originals = {
            name: view.oriented(name, originals[name]).to(parameter.device).contiguous() for name, parameter in self._edited.items()
        }

    @property
    def edits(self) -> list[dict]:
        """As `edits` tells those of a folder."""
        return [edit for edit, _ in _told(self.editor.state.events)]

    def undo(self, edit: int) -> dict:
        """Take one edit out, and return it as `edits` tells it. ValueError when it cannot be taken out."""
        told = {entry["id"]: entry for entry in self.edits}
        self.editor.undo(edit)
        return told[edit]

    def answers(self, prompt: str, new_tokens: int) -> Iterator[tuple[generation.Spoken, generation.Spoken]]:
        """What the unedited model says and what the edited one does, again with each token; both greedily. ValueError for a prompt
        that the model cannot read."""
        model, tok = self.editor.model, self.editor.tok
        asked = as_chat(tok, prompt) if self.in_chat else prompt
        unedited, edited = (
            generation.Spoken(model, tok, asked, new_tokens, self.editor.hparams.target_separator) for _ in range(2)
        )
        with evaluating(model), frozen(model):
            while not (unedited.done and edited.done):
                with self._without_edits():
                    unedited.go_on()
                edited.go_on()
                yield unedited, edited

    @contextmanager
    def _without_edits(self) -> Iterator[None]:
        """Inside it the edited parameters have the original values. Only pointers change, so it costs no time."""
        now = {name: parameter.data for name, parameter in self._edited.items()}
        try:
            for name, parameter in self._edited.items():
                parameter.data = self._originals[name]
            yield
        finally:
            for name, parameter in self._edited.items():
                parameter.data = now[name]
