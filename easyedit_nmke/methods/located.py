"""What the locate-then-edit methods share: their settings, what they measure, and MEMIT's spread of a residual over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams, is_number, setting
from ..models.arch import ModelView
from ..models.device import timed
from ..models.prompts import context_templates
from ..models.requests import Request
from ..models.updates import LowRank
from ..scores.metrics import exact_match
from .contract import phase
from .keys import Ascent, Contexts
from .norms import rescaled
from .values import target_values

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class KeyValueHyperParams(HyperParams):
    """For the methods that write a target value z for a key k: NMKE, AlphaEdit, MEMIT, ROME. Defaults are EasyEdit's."""

    # Target values z (Adam on δ at the last edited layer)
    fact_token: str = setting("subject_last", choices=("subject_last",))
    v_num_grad_steps: int = setting(25, least=1, whole=True)
    v_lr: float = setting(0.1, above=0)
    v_loss_layer: int | None = setting(None, least=0, whole=True, none=None)  # None: the last block
    v_weight_decay: float = setting(0.5, least=0)
    clamp_norm_factor: float = setting(0.75, above=0)
    kl_factor: float = setting(0.0625, least=0)

    # Beyond EasyEdit
    v_extra_steps: int = setting(0, least=0, whole=True)  # for a z that has not made the target the likelier answer by then
    # a z is finished as soon as every template gives the whole target this probability; None: by its loss and steps alone
    v_stop_probability: float | None = setting(None, above=0, most=1, none=None)
    locality_factor: float = setting(0.0, least=0)  # weight of keeping the answers to locality_prompts when z is optimised
    locality_prompts: list[str] = setting(factory=list)  # other relations, "{}" for the subject
    # What solved values are rescaled to, times the factor: "nas" (arXiv 2602.02543) what the FFN puts out, to the mean norm of
    # `nas_pilot` values solved on the unedited model; "anchored" the whole block's output, to that of a dozen
    value_norm: str = setting("free", choices=("free", "anchored", "nas"), state=True)
    value_norm_factor: float = setting(1.0, above=0, state=True)
    nas_pilot: int = setting(50, least=2, whole=True, state=True)  # published: 1000

    # Covariance of keys
    mom2_dataset: str = setting("wikipedia", state=True)
    mom2_n_samples: int = setting(100000, least=1, whole=True, state=True)
    mom2_dtype: str = setting("float32", choices=("float32", "float64"), state=True)  # of the sums over tokens
    mom2_adjustment: bool = True  # ROME's; accepted for EasyEdit's files of the others
    stats_dir: str | None = None  # None: the user's cache directory

    # Context templates
    template_prefixes: list[str] = setting(factory=lambda: ["The", "Therefore", "Because", "I", "You"], state=True)

    def problems(self) -> list[str]:
        found, prompts = super().problems(), self.locality_prompts
        if not isinstance(self.mom2_dataset, str):
            found.append(f"mom2_dataset must be a file or the name of a dataset, got {self.mom2_dataset!r}")
        if self.stats_dir is not None and not isinstance(self.stats_dir, (str, Path)):
            found.append(f"stats_dir must be a folder or null, got {self.stats_dir!r}")
        prefixes = self.template_prefixes
        if not isinstance(prefixes, (list, tuple)) or not all(isinstance(p, str) and p for p in prefixes):
            found.append(f"template_prefixes must be a list of words, got {prefixes!r}")
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) and p.count("{}") == 1 for p in prompts):
            found.append(f"locality_prompts must be a list of texts with one {{}} each for the subject, got {prompts!r}")
        elif not prompts and is_number(self.locality_factor) and self.locality_factor > 0:
            found.append(f"locality_factor is {self.locality_factor!r}, but locality_prompts is empty; give some, or set it to 0")
        return found


@dataclass
class SpreadHyperParams(KeyValueHyperParams):
    """For MEMIT and its kin: one value a request, its residual spread over `layers`; with `blue` (Boundary Layer UpdatE, arXiv
    2502.03748) a value for each of two, the first and the last of `layers` in a file, each residual written whole."""

    blue: bool = setting(False, state=True)
    consolidate_every: int = setting(0, least=0, whole=True)  # edits after which all are solved again at once; 0: never
    # how often an update is written at most, for requests that the model does not answer as asked yet
    write_passes: int = setting(1, least=1, whole=True)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """As the other methods'; of more `layers` than two, `blue` takes the first and the last."""
        layers = content.get("layers")
        if content.get("blue") is True and isinstance(layers, (list, tuple)) and len(layers) > 2:
            content = {**content, "layers": [layers[0], layers[-1]]}
        return super().from_dict(content, source)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.blue is True and isinstance(self.layers, (list, tuple)) and len(self.layers) > 2:
            found.append(f"blue writes two layers, the first and the last, but layers is {self.layers!r}; give these two")
        return found

    @property
    def z_layers(self) -> list[int]:
        """The blocks whose output a value is solved for."""
        return list(self.layers) if self.blue else list(self.layers[-1:])


def templates(view: ModelView, tok, hparams, spent: MutableMapping[str, float | None] | None = None) -> list[list[str]]:
    """Context templates of `template_length` tokens, in groups; `spent` is told their seconds."""
    with timed({} if spent is None else spent, "templates"):
        return context_templates(view.model, tok, hparams.template_prefixes, hparams.template_length, hparams.seed)


def plain_update(
    view: ModelView,
    state: LifelongState,
    layer: int,
    keys: torch.Tensor,
    left: torch.Tensor,
    mask: torch.Tensor | None,
    again: bool = False,
) -> tuple[LowRank, torch.Tensor]:
    """(the update of `layer` that moves its output at `keys` [F, k] by `left` [D, k], masked; what is remembered of them). again:
    whether an earlier pass of the same edit has written the layer, and what that gave is what is remembered."""
    right = state.solvers[layer].directions(keys, mask).T.float().contiguous()
    return LowRank(view.weight_name(layer), left, right), keys


def edit_layers(
    view: ModelView,
    tok,
    requests: Sequence[Request],
    hparams: KeyValueHyperParams,
    state: LifelongState,
    z: torch.Tensor | None = None,
    prompts: Sequence[str] = (),
    masks: Callable[[EditReport, torch.Tensor], Mapping[int, torch.Tensor]] = lambda report, z: {},
    update: Callable[..., tuple[LowRank, torch.Tensor]] = plain_update,
) -> EditReport:
    """Compute and write the update layer by layer: AlphaEdit and MEMIT, by the solvers of `state`; NMKE with masks.

    z [D, requests]: values that were found before (with `blue` those of one layer over those of the other). prompts: other prompts
    of the subject over which keys are averaged. masks: asked once, with the values, for the mask [F] of each layer. update: as
    `plain_update`.

    A layer's keys depend on the layers below it alone, which are edited by then: those it was solved with are the edited model's,
    and are remembered. With `blue` so does a layer's value.

    A ridge leaves a part of each residual unwritten, which drifts less, and says the new answer all the same mostly. Where it does
    not, what is left is written again, up to `write_passes` times in all, by the same system: the keys count once.
    """
    report, contexts = EditReport(len(requests)), Contexts(state.templates, prompts)
    groups = [[layer] for layer in hparams.layers] if hparams.blue else [list(hparams.layers)]
    given = [None] * len(groups) if z is None else z.chunk(len(groups))
    chosen, solved, found = None, [], {}
    for layers, known in zip(groups, given, strict=True):
        z_layer = layers[-1]
        with phase(report, "values"):
            z = _solved(view, tok, requests, z_layer, hparams, state, report) if known is None else known
            z = z.to(view.weight(z_layer).device)
            solved.append(z)
        if chosen is None:
            with phase(report, "attribution"):
                chosen = masks(report, z)
        for number, wanting in enumerate(_passes(view, tok, requests, hparams, report)):
            ascent, weight = Ascent(view, tok, requests, contexts, z_layer), wanting.to(z)
            for index, layer in enumerate(layers):
                with phase(report, "keys"):
                    keys, current, output = ascent(layer)
                residual = (z - current.to(z)) / (len(layers) - index) * weight
                if index == number == 0:
                    report.residual += residual.norm(dim=0).mean().item() * len(layers) / len(groups)
                with phase(report, "solve"):
                    device = view.weight(layer).device
                    mask = chosen[layer].to(device) if layer in chosen else None
                    left = view.ffn_change(layer, output, residual).to(device).float()
                    change, remembered = update(view, state, layer, keys, left, mask, again=number > 0)
                    change = change.without_zeros() if number else change  # of the requests that want nothing any more
                with phase(report, "apply"):
                    state.write(change, report)
                found.setdefault(layer, remembered)
                report.density[layer] = 1.0 if mask is None else (mask != 0).double().mean().item()
    report.z = torch.cat([z.to(solved[0].device) for z in solved])
    if all(solver.remembers for solver in state.solvers.values()):
        report.keys = found
    return report


def _passes(view: ModelView, tok, requests: Sequence[Request], hparams, report: EditReport) -> Iterator[torch.Tensor]:
    """Which requests [bool] each pass writes: all, and then those whose new answer is not the likeliest, token by token. Skipped
    ones want nothing: their value is what the model has."""
    yield torch.ones(len(requests), dtype=torch.bool)
    asked = [(request.prompt, request.target_new) for request in requests]
    for _ in range(1, hparams.write_passes):
        wanting = ~torch.tensor(exact_match(view.model, tok, asked, separator=hparams.target_separator))
        wanting[report.skipped] = False
        if not wanting.any():
            return
        yield wanting


def _solved(
    view: ModelView, tok, requests: Sequence[Request], layer: int, hparams, state: LifelongState, report: EditReport
) -> torch.Tensor:
    """Values [D, requests] of `layer`."""
    values = target_values(view, tok, requests, state.flat_templates, layer, hparams)
    report.value_loss += [value.loss for value in values]
    z = torch.stack([value.z for value in values], 1)
    return rescaled(view, tok, requests, z, layer, hparams, state, report)
