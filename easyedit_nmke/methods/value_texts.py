"""The texts of target values as rows of tokens, and batches of rows with the subject's last token in one column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..models.prompts import reworded, tokenised_all
from ..models.requests import Request

KL_PROMPT = "{} is a"
MANY = 256  # tokens, from which on rows of another width are better run by themselves than with padding
PADDING = 0.1

TARGET, SUBJECT, OTHER = range(3)  # what is read of a row: the target's tokens, or the next word at the subject, at a prompt's end


@dataclass(frozen=True)
class Row:
    """A text: its token ids, the index of the subject's last, and how many tokens there are up to the last that is read.

    owner: the request's number; template: of a TARGET row, 0 for the bare prompt; labels: the target's tokens, read in front of
    each."""

    kind: int
    owner: int
    ids: Sequence[int]
    at: int
    end: int
    template: int = 0
    labels: Sequence[int] = ()

    @property
    def width(self) -> int:
        """How many tokens depend on the value and are run at every step."""
        return self.end - self.at

    @property
    def reads(self) -> int:
        return max(1, len(self.labels))


def rows_of(tok, owner: int, request: Request, templates: Sequence[str], hparams) -> list[Row]:
    """The target in every template, "{subject} is a", and with a locality_factor the locality prompts; each text is read once."""
    others = [KL_PROMPT, *(hparams.locality_prompts if hparams.locality_factor else ())]
    texts = [(*request.fill(template, tok), request.target_new) for template in templates]
    texts += [(*reworded(request.prompt, request.subject, words, tok), None) for words in others]
    found = tokenised_all(tok, texts, hparams.target_separator)
    rows = []
    for number, text in enumerate(found[: len(templates)]):
        rows.append(Row(TARGET, owner, text.ids[:-1], text.subject, len(text.ids) - 1, number, text.labels))
    about, *rest = found[len(templates) :]
    rows.append(Row(SUBJECT, owner, about.ids, about.subject, about.subject + 1))
    return rows + [Row(OTHER, owner, text.ids, text.subject, len(text.ids)) for text in rest]


def batches(rows: Sequence[Row], fits: Callable[[int, int], bool]) -> Iterator[list[Row]]:
    """Rows that are run together: those with targets first, wide before narrow. `fits` says whether a batch of so many tokens,
    padding included, and places that are read may be; where there are many tokens already, a row that would be, or make,
    more than a tenth of padding begins another batch."""
    batch: list[Row] = []
    width = reads = 0
    for row in sorted(rows, key=lambda row: (row.kind != TARGET, -row.width)):
        wider = max(width, row.width)
        padded = len(batch) * width >= MANY and min(width, row.width) < (1 - PADDING) * wider
        if batch and (padded or not fits((len(batch) + 1) * wider, reads + row.reads)):
            yield batch
            batch, reads, wider = [], 0, row.width
        batch.append(row)
        width, reads = wider, reads + row.reads
    if batch:
        yield batch


class Batch:
    """Rows side by side, the subject's last token of each in column `lookup`; columns from `start` on run at every step.

    ids, mask [B, T]; owner [B]: the request of a row. Places in [B, columns from start on], as one number each: `target` (of the
    tokens before the target's, with `labels`, which prompt each is of (request · templates + template) and `share`, one over that
    target's tokens), `subject` of the KL prompts, `other` of the locality prompts, with the requests of both.
    """

    def __init__(self, rows: Sequence[Row], templates: int, device, whole_texts: bool = False, lookup: int | None = None):
        # One column more than needed: where no token is padding, attention is called without a mask, which later columns need.
        self.rows, self.templates, self.whole_texts = list(rows), templates, whole_texts
        self.lookup = 1 + max(row.at for row in rows) if lookup is None else lookup
        self.start = 0 if whole_texts else self.lookup
        self.width = self.lookup + max(row.width for row in rows)
        ids, mask = torch.zeros(2, len(rows), self.width, dtype=torch.long)
        places: list[list[int]] = [[], [], []]
        for i, row in enumerate(rows):
            end = self.lookup + row.width
            ids[i, end - row.end : end], mask[i, end - row.end : end] = torch.tensor(row.ids[: row.end]), 1
            behind = i * self.columns + end - self.start
            places[row.kind] += range(behind - row.reads, behind)
        targets, subjects, others = ([row for row in rows if row.kind == kind] for kind in (TARGET, SUBJECT, OTHER))
        tokens = torch.tensor([len(row.labels) for row in targets], dtype=torch.long)
        prompts = torch.tensor([row.owner * templates + row.template for row in targets], dtype=torch.long)

        def numbers(values) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.long).to(device)

        self.ids, self.mask, self.owner = ids.to(device), mask.to(device), numbers([row.owner for row in rows])
        self.target, self.subject, self.other = map(numbers, places)
        self.labels = numbers([label for row in targets for label in row.labels])
        self.prompt = numbers(prompts.repeat_interleave(tokens))
        self.share = (1 / tokens).repeat_interleave(tokens).to(device)
        self.subject_owner, self.other_owner = (numbers([row.owner for row in some]) for some in (subjects, others))

    @property
    def columns(self) -> int:
        """How many of them run at every step."""
        return self.width - self.start

    @property
    def read(self) -> torch.Tensor:
        """All places."""
        return torch.cat([self.target, self.subject, self.other])

    @property
    def bare(self) -> list[tuple[int, int]]:
        """(row, request) of the bare prompts."""
        return [(i, row.owner) for i, row in enumerate(self.rows) if row.kind == TARGET and row.template == 0]

    @property
    def bare_ends(self) -> tuple[list[int], torch.Tensor]:
        """(the requests whose bare prompt is here, the place of the word after it)."""
        owners, places, first = [], [], 0
        for row in self.rows:
            if row.kind == TARGET:
                if row.template == 0:
                    owners.append(row.owner)
                    places.append(first)
                first += row.reads
        return owners, self.target[places]

    def some(self, rows: Sequence[int]) -> Batch:
        """The same with some of the rows, in the same columns."""
        return Batch([self.rows[i] for i in rows], self.templates, self.ids.device, self.whole_texts, self.lookup)
