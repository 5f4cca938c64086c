"""What solved values are rescaled to, so that they do not grow with the weights: `value_norm` of the locate-then-edit methods.

"nas" is Norm-Anchor Scaling as published (arXiv 2602.02543): what the FFN puts out at the subject, v* = v0 + δ, gets the mean norm
of values solved on the unedited model, and an edit whose v* is far longer is not written. "anchored" does it to z, the whole
block's output, by a dozen facts, and skips nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import facts
from ..history.log import EditReport
from ..history.state import LifelongState, ValueNorm
from ..models.arch import ModelView
from ..models.chat import as_asked
from ..models.prompts import SUBJECT
from ..models.requests import Request
from ..models.updates import model_digest
from ..statistics.covariance import own_file, save, tokenizer_digest
from ..statistics.making import Making, making_of, seconds_of
from .keys import subject_states
from .values import reference_norm, target_values

logger = logging.getLogger(__name__)

DROPPED = 0.05  # of the pilot's values, the longest
TOO_LONG = 2.0  # times the mean: such an edit is skipped

# Settings that a solved value depends on, besides those whose names begin with "v_".
_SETTINGS = (
    "clamp_norm_factor", "kl_factor", "locality_factor", "locality_prompts", "target_separator", "target_eos", "use_chat_template",
)  # fmt: skip


def value_norms(
    view: ModelView,
    tok,
    hparams,
    templates: Sequence[Sequence[str]],
    layers: Sequence[int],
    part: str = "block",
    spent: MutableMapping[str, float | None] | None = None,
) -> dict[int, ValueNorm]:
    """The norm that the values of each of `layers` get, of the model as it is now; empty with `value_norm: free`. part: what the
    method solves, see `target_values`. spent: told the seconds of the "pilot", as they were when its values were solved."""
    found: dict[int, ValueNorm] = {}
    made: list[Making | None] = []
    for layer in layers if hparams.value_norm != "free" else ():
        if hparams.value_norm == "anchored":
            flat, started = [template for group in templates for template in group], time.perf_counter()
            norm = ValueNorm(reference_norm(view, tok, flat, layer, hparams, part), None, len(facts.CALIBRATION))
            made.append(Making.since(started))
        else:
            norm = trimmed(pilot(view, tok, hparams, layer, part, made))
            logger.info(
                "layer %d: values of the unedited model have a mean norm of %.4g, standard error %.2g (%d of %d pilot values)",
                layer, *norm, hparams.nas_pilot,
            )  # fmt: skip
        factor = hparams.value_norm_factor
        found[layer] = norm._replace(mean=factor * norm.mean, error=None if norm.error is None else factor * norm.error)
    if made and spent is not None:
        spent["pilot"] = seconds_of(made)
    return found


def trimmed(norms: torch.Tensor) -> ValueNorm:
    """Mean of all but the longest DROPPED of norms [n], and its standard error."""
    kept = norms.double().sort().values[: len(norms) - int(DROPPED * len(norms) + 1e-9)]
    return ValueNorm(kept.mean().item(), kept.std().item() / len(kept) ** 0.5, len(kept))


def pilot(view: ModelView, tok, hparams, layer: int, part: str = "block", made: list[Making | None] | None = None) -> torch.Tensor:
    """Norms of v* [nas_pilot] for so many facts with false objects, solved under the bare prompt alone. Kept in the cache of
    covariances, under a name that holds the model, the tokenizer and all settings that they depend on. made: gets what it
    took to solve them, now or once."""
    made = [] if made is None else made
    settings = {name: value for name, value in hparams.to_dict().items() if name in _SETTINGS or name.startswith("v_")}
    told = [settings, hparams.nas_pilot, part, model_digest(view.model), tokenizer_digest(tok)]
    file = own_file("values", layer, told, hparams)
    if file.is_file():
        made.append(making_of(file))
        try:
            return load_file(file)["norms"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{file} holds no norms of pilot values ({error}); delete it, and they will be solved again") from None
    logger.info("layer %d: %d pilot values are solved on the unedited model, once", layer, hparams.nas_pilot)
    started = time.perf_counter()
    requests = as_asked(tok, pilot_requests(hparams.nas_pilot), hparams)
    z = torch.stack([value.z for value in target_values(view, tok, requests, [SUBJECT], layer, hparams, part)], 1)
    stream, _ = _around_ffn(view, tok, requests, layer, part)
    norms = (z - stream.to(z)).norm(dim=0).cpu()
    made.append(making := Making.since(started))
    save(file, {"norms": norms}, making.metadata())
    return norms


def pilot_requests(count: int) -> list[Request]:
    """Facts of the real world, each given another object; the same ones for the same count. Where they are used up, with other
    objects and wordings again."""
    known, found = len(facts.facts()), []
    while len(found) < count:
        found += facts.requests(min(known, count - len(found)), seed=len(found))
    return [Request.from_dict(record) for record in found]


def rescaled(
    view: ModelView, tok, requests: Sequence[Request], z: torch.Tensor, layer: int, hparams, state: LifelongState,
    report: EditReport, part: str = "block", first: int = 0,
) -> torch.Tensor:  # fmt: skip
    """z [D, requests] of `layer`, as `value_norm` has it. With "nas" a request whose ||v*|| is above twice the reference keeps the
    value that it has (v* = v0): it is not written, and the report says so (by its number in the call, from `first` on)."""
    norm = state.value_norms.get(layer)
    if norm is None:
        return z
    if hparams.value_norm == "anchored":
        return z * (norm.mean / z.norm(dim=0))
    stream, now = (states.to(z) for states in _around_ffn(view, tok, requests, layer, part))
    v = z - stream
    lengths = v.norm(dim=0)
    skipped = lengths > TOO_LONG * norm.mean
    for i in skipped.nonzero()[:, 0].tolist():
        report.skipped += [] if first + i in report.skipped else [first + i]
        logger.warning(
            "%r is skipped: its value of layer %d has norm %.4g, more than %g times the reference %.4g",
            requests[i].prompt, layer, lengths[i].item(), TOO_LONG, norm.mean,
        )  # fmt: skip
    return stream + torch.where(skipped, now, v * (norm.mean / lengths))


def _around_ffn(view: ModelView, tok, requests: Sequence[Request], layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """At the subjects of the bare prompts, [D, requests]: what a value of `part` holds besides what the FFN adds (the stream before
    it; for "ffn" nothing), and what it adds now."""
    wanted = {"block": (view.blocks[layer], "output"), "added": (view.addend(layer), "output")}
    seen = subject_states(view, tok, [[request.fill(SUBJECT, tok)] for request in requests], wanted)
    added = seen["added"][:, 0].T
    return torch.zeros_like(added) if part == "ffn" else seen["block"][:, 0].T - added, added


def stamped(norms: Mapping[int, ValueNorm]) -> dict[str, dict]:
    """As result files tell them."""
    return {str(layer): norm._asdict() for layer, norm in norms.items()}
