"""ROME (arXiv 2202.05262): one rank-one update for each request and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..history.durable import Ground
from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import is_int, setting
from ..models.arch import ModelView
from ..models.device import timed
from ..models.prompts import SUBJECT, context_templates
from ..models.requests import Request
from ..models.updates import LowRank
from ..statistics.covariance import moments
from .contract import Method, phase
from .keys import Contexts, subject_states
from .located import KeyValueHyperParams
from .memit import by_name, covariance_solvers
from .norms import rescaled, value_norms
from .solver import CovarianceSolver
from .values import target_values


@dataclass
class ROMEHyperParams(KeyValueHyperParams):
    """A rank-one update of each of `layers` (EasyEdit's files name one), each with a value of its own."""

    alg_name: str = setting("ROME", state=True)
    mom2_adjustment: bool = setting(True, state=True)  # keys are preconditioned by their covariance
    # [tokens, texts] pairs; the texts are shared out over template_prefixes
    context_template_length_params: list[list[int]] = setting(factory=lambda: [[5, 10], [10, 10]], state=True)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        return {"blocks": [1], "mom2_adjustment": [True, False]}

    def problems(self) -> list[str]:
        found, pairs = super().problems(), self.context_template_length_params
        fewest = max(len(self.template_prefixes), 1) if isinstance(self.template_prefixes, (list, tuple)) else 1

        def sound(pair) -> bool:
            return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_int, pair)) and pair[0] > 1

        if not isinstance(pairs, (list, tuple)) or not all(map(sound, pairs)):
            found.append(f"context_template_length_params must be a list of [tokens (2 or more), texts] pairs, got {pairs!r}")
        elif any(texts < fewest for _, texts in pairs):
            found.append(f"context_template_length_params is {pairs!r}, expected at least one text for each of {fewest} prefixes")
        return found


def measure(view: ModelView, tok, hparams: ROMEHyperParams, progress: bool) -> Ground:
    """Context templates of all lengths in one group, and with `mom2_adjustment` the covariance of keys per layer."""
    prefixes, texts, spent = hparams.template_prefixes, [], {}
    with timed(spent, "templates"):
        for number, (length, count) in enumerate(hparams.context_template_length_params if prefixes else []):
            copies = count // len(prefixes)
            texts += context_templates(view.model, tok, prefixes, length, hparams.seed + number, copies=copies)[1]
    known = moments(view, tok, hparams, progress, spent) if hparams.mom2_adjustment else {}
    groups = [[SUBJECT, *texts]]
    norms = value_norms(view, tok, hparams, groups, hparams.layers, "ffn", spent)
    return Ground(groups, by_name(known), norms, seconds=spent)


def build(view: ModelView, ground: Ground, hparams: ROMEHyperParams) -> Mapping[int, CovarianceSolver]:
    return covariance_solvers(view, ground)


def edit(view: ModelView, tok, requests: Sequence[Request], hparams: ROMEHyperParams, state: LifelongState) -> EditReport:
    """One rank-one update per request and layer, one after the other: w_out += v uᵀ, so that the bare prompt's key k gives z.

    u [F] is the mean key over all templates, preconditioned by the covariance of keys and of length 1; z [D] is what the FFN
    should put out at the subject, and v = (z - its output) / (k · u); with a norm behind the FFN, z is the norm's and v what
    brings it there (`ModelView.ffn_change`).
    """
    report = EditReport(len(requests))
    for number, request in enumerate(requests):
        for layer in hparams.layers:
            with phase(report, "values"):
                (value,) = target_values(view, tok, [request], state.flat_templates, layer, hparams, part="ffn")
                z = rescaled(view, tok, [request], value.z[:, None], layer, hparams, state, report, "ffn", number)[:, 0]
            with phase(report, "keys"):
                ffn = view.down(layer)
                wanted = {"key": (ffn, "input"), "out": (ffn, "output"), "added": (view.addend(layer), "output")}
                seen = subject_states(view, tok, [Contexts(state.templates).texts(request, tok)], wanted)
                keys, output, current = seen["key"][0].double(), seen["out"][0, 0], seen["added"][0, 0].double()
            with phase(report, "solve"):
                u = keys.mean(0)
                if layer in state.solvers:
                    u = state.solvers[layer].solve(u[:, None])[:, 0]
                u = u / u.norm()
                residual = z.to(current) - current
                change = view.ffn_change(layer, output[:, None], residual[:, None])
                left, right = (change / (keys[0] @ u)).float(), u[None].float()
                state.write(LowRank(view.weight_name(layer), left, right, number), report)
            report.density[layer] = 1.0
            report.residual += residual.norm().item() / (len(requests) * len(hparams.layers))
        report.value_loss.append(value.loss)
    return report


METHOD = Method("ROME", ROMEHyperParams, edit, measure, build)
