"""The first stage of a search: target values. No weight is touched: z is optimised for some facts, put at the subject of their
other wordings (does it carry over?) and of other relations (what does it spoil?), and kept for the trials that write."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from ... import facts
from ...files import whole
from ...methods.alphaedit import AlphaEditHyperParams
from ...methods.keys import subject_states
from ...methods.located import KeyValueHyperParams
from ...methods.values import target_values
from ...models.hooks import record, shifted
from ...models.passes import chunks
from ...models.prompts import pad, reworded, tokenised
from ...models.requests import Request
from ...models.subjects import find_subject
from .bed import Bed

FACTS = 12  # whose values a trial of this stage looks at
AT_A_TIME = 4
OTHERS = 6  # relations of a subject that should stay
# Where EasyEdit's files are for most models, and its values for those with larger ones: a search is never worse than these.
STARTS = (
    {"depth": 0.27, "v_lr": 0.5, "clamp_norm_factor": 4.0, "v_weight_decay": 0.001, "v_num_grad_steps": 25},
    {"depth": 0.27, "v_lr": 0.1, "clamp_norm_factor": 0.75, "v_weight_decay": 0.5, "v_num_grad_steps": 25},
)
SEARCHED = {
    "v_lr": (0.05, 2.0),
    "clamp_norm_factor": (0.5, 8.0),
    "v_weight_decay": [0.5, 0.1, 0.01, 0.001],
    "v_num_grad_steps": [15, 25, 40],
}


def blocks(depth: int) -> list[int]:
    """Those that values are tried at: from a tenth of the depth to half of it."""
    return list(range(max(round(0.1 * depth), 0), max(round(0.5 * depth), 1) + 1))


def starts(depth: int) -> list[dict[str, Any]]:
    return [{"block": round(start["depth"] * depth), **{k: v for k, v in start.items() if k != "depth"}} for start in STARTS]


class Values:
    """The values of a bed's requests by their settings, kept in a folder."""

    def __init__(self, bed: Bed, templates: Sequence[str], folder: Path):
        self.bed, self.templates, self.folder = bed, list(templates), folder
        self.others = facts.relation_prompts(0)[:OTHERS]

    def tried(self, chosen: Mapping[str, Any], go_on: Callable[[float, int], bool]) -> dict[str, float] | None:
        """What the values of the first FACTS requests do (`effect`), with their mean number of steps and their "score": the
        harmonic mean of the target's probability on the prompt itself and in other wordings and of exp(-KL) at other relations,
        where the means are of logarithms. None when `go_on`, asked with the score so far, says no."""
        view, tok = self.bed.view, self.bed.tok
        block, settings = chosen["block"], self._settings(chosen)
        values, means, found = [], [], {}
        for number, some in enumerate(chunks(self.bed.requests[:FACTS], AT_A_TIME)):
            values += target_values(view, tok, some, self.templates, block, settings)
            z = torch.stack([value.z for value in values[-len(some) :]])
            means.append(self.effect(some, z, block))
            found = {name: fmean(mean[name] for mean in means if name in mean) for name in means[0]}
            parts = [math.exp(-found[name]) for name in ("own", "wordings", "others") if name in found]
            found |= {"steps": fmean(value.steps for value in values), "score": harmonic_mean(parts)}
            if not go_on(found["score"], number):
                return None
        self._keep(self._file(block, settings), torch.stack([value.z for value in values], 1))
        return found

    def of(self, chosen: Mapping[str, Any], settings: KeyValueHyperParams, count: int, tick: Callable[[], None]) -> torch.Tensor:
        """z [D, count] of the first requests: from the folder as far as they are there, the rest solved now. chosen: "block" and
        the settings of values; `settings` says the rest."""
        settings = self._settings(chosen, settings)
        file = self._file(chosen["block"], settings)
        z = load_file(file)["z"] if file.is_file() else torch.zeros(0)
        for some in chunks(self.bed.requests[z.shape[-1] if z.dim() > 1 else 0 : count], AT_A_TIME):
            found = target_values(self.bed.view, self.bed.tok, some, self.templates, chosen["block"], settings)
            new = torch.stack([value.z for value in found], 1).cpu()
            z = torch.cat([z, new], 1) if z.dim() > 1 else new
            self._keep(file, z)
            tick()
        return z[:, :count]

    def _settings(self, chosen: Mapping[str, Any], base: KeyValueHyperParams | None = None) -> KeyValueHyperParams:
        names = ("kl_factor", "v_extra_steps", "v_loss_layer", "locality_factor", "locality_prompts", "target_separator")
        rest = {name: getattr(base, name) for name in (*names, "target_eos")} if base else {}
        own = {name: value for name, value in chosen.items() if name != "block"}
        model = (self.bed.model, self.bed.tok)
        return AlphaEditHyperParams.from_dict({"layers": [chosen["block"]], "model_name": model, **rest, **own})

    def _file(self, block: int, settings: KeyValueHyperParams) -> Path:
        names = [name for name in vars(settings) if name.startswith(("v_", "kl_", "locality_"))]
        told = [block, *(getattr(settings, name) for name in [*names, "clamp_norm_factor", "target_separator", "target_eos"])]
        return self.folder / f"z-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.safetensors"

    def _keep(self, file: Path, z: torch.Tensor) -> None:
        with whole(file) as temporary:
            save_file({"z": z.cpu().contiguous()}, temporary)

    # ---- what a value does where it was not made

    @torch.no_grad()
    def effect(self, requests: Sequence[Request], z: torch.Tensor, block: int) -> dict[str, float]:
        """With z [requests, D] in place of what block `block` puts out at the subject of the prompt, and the same difference
        elsewhere: mean over requests of the target's mean NLL after the prompt ("own") and after its other wordings ("wordings"),
        and of KL(unedited || now) at the end of other relations ("others"), in nats.

        Wordings without the subject do not count; a relation whose unedited answer is the prompt's own asks for the edited fact
        itself, and does not either.
        """
        view, tok = self.bed.view, self.bed.tok
        bare = [[request.fill("{}", tok)] for request in requests]
        now = subject_states(view, tok, bare, {"z": (view.blocks[block], "output")})["z"][:, 0]
        delta = z.to(now) - now
        rows = [row for i, request in enumerate(requests) for row in self._rows(i, request)]
        batch = pad([ids for _, _, ids, _, _ in rows], view.device)
        columns = torch.tensor([subject for *_, subject, _ in rows], device=view.device)
        owners = torch.tensor([i for i, *_ in rows], device=delta.device)
        places = [(row, column) for row, (*_, reads) in enumerate(rows) for column in reads]
        unedited = self._log_probs(batch, places)
        with shifted(view.blocks[block], columns, delta[owners]):
            edited = self._log_probs(batch, places)
        found: dict[str, dict[int, list[float]]] = {"own": {}, "wordings": {}, "others": {}}
        said, start = {}, 0
        for i, kind, ids, _, reads in rows:
            was, is_now = unedited[start : start + len(reads)], edited[start : start + len(reads)]
            start += len(reads)
            if kind == "own":
                said[i] = int(was[0].argmax())
            if kind != "others":
                labels = torch.tensor([ids[column + 1] for column in reads], device=is_now.device)
                found[kind].setdefault(i, []).append(-is_now.gather(1, labels[:, None]).mean().item())
            elif int(was[0].argmax()) != said[i]:
                found[kind].setdefault(i, []).append((was.exp() * (was - is_now)).sum().item())
        return {kind: fmean(map(fmean, by_request.values())) for kind, by_request in found.items() if by_request}

    def _rows(self, i: int, request: Request):
        """(request, kind, ids, index of the subject's last token, columns that are read)."""
        tok = self.bed.tok
        asked = [("own", *request.fill("{}", tok))]
        for prompt in request.rephrase_prompts:
            try:
                asked.append(("wordings", prompt, find_subject(prompt, request.subject)[1]))
            except ValueError:
                continue
        for kind, text, end in asked:
            found = tokenised(tok, text, end, request.target_new)
            yield i, kind, found.ids, found.subject, list(range(found.target - 1, len(found.ids) - 1))
        for words in self.others:
            text, end = reworded(request.prompt, request.subject, words, tok)
            found = tokenised(tok, text, end)
            yield i, "others", found.ids, found.subject, [len(found.ids) - 1]

    def _log_probs(self, batch, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[places, V] float32."""
        view = self.bed.view
        with record({"final": (view.norm, "input")}, stop=True) as seen:
            view.model.base_model(**batch.inputs(), use_cache=False)
        rows, columns = (torch.tensor(part, device=seen["final"].device) for part in zip(*places, strict=True))
        return log_softmax(view.readout.logits(seen["final"][rows, columns].to(view.readout.head.device)).float(), -1)
