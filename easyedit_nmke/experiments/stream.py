"""Which facts are edited, in which order: the embedded model's, or the records of a file that a model can be edited with."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .. import atlas, data
from .. import facts as known
from ..editor import LifelongEditor
from ..methods.contract import check_requests
from ..models.arch import ModelView
from ..models.chat import as_asked
from ..models.requests import Request
from ..scores import counterfact, metrics, ripple
from .protocol import batches


@dataclass(frozen=True)
class Stream:
    """What is edited, in order, and the number of each record in its file; refused records; what the stamp says of them; what is
    odd about them."""

    requests: list[Request]
    records: list[int]
    refused: list[data.Refusal]
    facts: dict
    notes: list[str] = field(default_factory=list)


def source_of(told: str | Mapping) -> str | None:
    """What tells facts apart, by where `stream` reads them or by what a stamp tells of them: the sha256 of a file, or the name of
    facts that come with the package. None for a file that is not there."""
    if not isinstance(told, str):
        return told.get("sha256", told.get("name"))
    if told in atlas.SOURCES or told == known.SOURCE:
        return f"{told}, test half"
    return hashlib.sha256(Path(told).read_bytes()).hexdigest() if Path(told).is_file() else None


def stream(editor, source: str, edits: int | None, seed: int, checkpoints: Sequence[int] = ()) -> Stream:
    """The first `edits` (None: all) facts of the test half of `atlas` or `facts`, or records of a file, in an order that the seed
    decides (0: as they are), without those that this model and its templates cannot be edited with or scored on. checkpoints: where
    batches end, besides after `batch_size` requests. The requests of one record stay together, and are refused together."""
    if source in atlas.SOURCES or source == known.SOURCE:
        if source == known.SOURCE:
            records = known.requests(edits or 200, "test", seed)
        else:
            records = atlas.requests(edits or 200, "test", seed, atlas.SOURCES[source])
        requests = as_asked(editor.tok, [Request.from_dict(r) for r in records], editor.hparams)
        return Stream(requests, list(range(len(requests))), [], {"name": source_of(source), "edits": len(requests)})
    method = getattr(editor, "method", None)
    loaded = data.load(Path(source), needs_subject=method is None or method.needs_subject)
    cases = {record: list(places) for record, places in groupby(range(len(loaded.requests)), key=loaded.indices.__getitem__)}
    order = list(range(1 + max((*loaded.indices, *(refusal.index for refusal in loaded.refused)), default=-1)))
    if seed:  # of the whole file, so that methods that refuse other records edit the rest in the same order
        random.Random(seed).shuffle(order)
    view, templates = ModelView(editor.model), editor.state.flat_templates if isinstance(editor, LifelongEditor) else ("{}",)
    accepted, refused, size = [], list(loaded.refused), getattr(editor.hparams, "batch_size", 1)
    separator, asked = getattr(editor.hparams, "target_separator", None), {}
    starts = [start for start, _ in batches(len(loaded.requests), size, checkpoints)]
    for case in filter(None, map(cases.get, order)):
        before = len(accepted)
        try:
            for place in case:
                (asked[place],) = as_asked(editor.tok, [loaded.requests[place]], editor.hparams)
                begun = [asked[i] for i in accepted[starts[bisect_right(starts, len(accepted)) - 1] :]]
                check_requests(view, editor.tok, [asked[place]], templates, separator, begun)
                metrics.check(editor.model, editor.tok, [asked[place]], separator, counterfact.compared(asked[place]))
                ripple.check(editor.model, editor.tok, [asked[place]], separator)
                accepted.append(place)
        except ValueError as error:
            del accepted[before:]
            refused.append(data.Refusal(loaded.indices[place], str(error)))
    refused.sort(key=lambda refusal: refusal.index)
    if not accepted:
        raise ValueError(f"none of the {len(refused)} records of {source} can be edited; the first: {refused[0].reason}")
    if edits and len(accepted) < edits:
        raise ValueError(f"{edits} edits were asked for, but {len(accepted)} records of {source} can be edited; ask for fewer")
    chosen = accepted[:edits]
    told = {
        "name": Path(source).name,
        "sha256": loaded.sha256,
        "format": loaded.format,
        "refused": len(refused),
        "edits": len(chosen),
    }
    if seed and loaded.refused:
        told["order"] = "of the whole file"  # once it was of what could be read
    return Stream([asked[i] for i in chosen], [loaded.indices[i] for i in chosen], refused, told, loaded.notes)
