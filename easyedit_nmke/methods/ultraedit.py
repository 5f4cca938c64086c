"""UltraEdit (arXiv 2505.14679): no training and no subject; one linear solve from what chosen modules see and the gradients at
their outputs, normalised by statistics of all edits so far."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..history.durable import Ground
from ..history.log import EditReport
from ..history.state import LifelongState
from ..hparams import HyperParams, setting, windows
from ..models.arch import ModelView
from ..models.hooks import altered, record
from ..models.passes import chunks
from ..models.products import frozen_parameters
from ..models.prompts import Tokenised, pad, tokenised_all
from ..models.requests import Request
from ..models.updates import LowRank
from .contract import Method, phase

if TYPE_CHECKING:
    from typing_extensions import Self

EPSILON = torch.finfo(torch.float32).eps


@dataclass
class UltraEditHyperParams(HyperParams):
    """Names are EasyEdit's; its files load as they are. `layers` are the blocks that `inner_params` name; without these, what leads
    into the FFNs of `layers` is edited."""

    alg_name: str = setting("UltraEdit", state=True)
    inner_params: list[str] = setting(factory=list, state=True)  # names of the edited modules
    lr: float = setting(1e-6, above=0)
    batch_size: int = setting(100, least=1, whole=True)
    batch_size_once: int = setting(10, least=1, whole=True)  # requests whose loss is one mean over their target tokens
    token: str = setting("mask", choices=("mask",))  # every token of prompt and target

    # Accepted for EasyEdit's files
    editor_batch_size: int = 1024
    half: bool = False
    silent: bool = True
    dropout: float = 0.0
    no_grad_layers: Any = None
    model_class: str | None = None
    class_name: str | None = None
    tokenizer_class: str | None = None
    tokenizer_name: str | None = None
    results_dir: str | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "hyperparameters") -> Self:
        """As the other methods'; without `layers`, which EasyEdit's files have not, they are read off `inner_params`."""
        content, names = dict(content), content.get("inner_params")
        if content.get("alg_name") == "ULTRAEDIT":
            content["alg_name"] = cls.alg_name
        if "layers" not in content and names and _are_names(names):
            content["layers"] = _blocks(names)
        return super().from_dict(content, source)

    def searched(self, depth: int) -> dict[str, list | tuple[float, float]]:
        return {"layers": windows(depth, max(depth // 5, 1)), "lr": (1e-7, 1e-3), "batch_size_once": [1, 10]}

    def problems(self) -> list[str]:
        found, names = super().problems(), self.inner_params
        if not _are_names(names):
            found.append(f"inner_params must be a list of modules' names, such as model.layers.3.mlp.up_proj, got {names!r}")
        elif names and isinstance(self.layers, (list, tuple)) and list(self.layers) != _blocks(names):
            found.append(f"layers is {self.layers!r}, but inner_params names modules of {_blocks(names)!r}; leave layers out")
        return found


def _are_names(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and all(isinstance(name, str) and re.search(r"\.\d+\.", name) for name in names)


def _blocks(names: Sequence[str]) -> list[int]:
    return sorted({int(re.search(r"\.(\d+)\.", name)[1]) for name in names})


def writes(view: ModelView, hparams: UltraEditHyperParams) -> list[str]:
    """The weights of `inner_params`, else of all linear modules of the FFNs but the last. ValueError for other modules."""
    known, names = dict(view.model.named_modules()), [name.removesuffix(".weight") for name in hparams.inner_params]
    if not names:
        inside = [(layer, name, module) for layer in hparams.layers for name, module in view.ffn(layer).named_modules()]
        names = [f"{view.ffn_name(i)}.{name}" for i, name, module in inside if _linear(module) and module is not view.down(i)]
    for name in names:
        if not _linear(known.get(name)):
            raise ValueError(f"inner_params names {name}, which is no linear module of {type(view.model).__name__}")
    return [f"{name}.weight" for name in names]


def _linear(module: torch.nn.Module | None) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


# ---- lifelong normalisation


class Statistics:
    """Running mean and standard deviation of features [.., d] over all tokens of all edits, from what each request adds to them.

    A key [1 + 2·d] of a request holds its number of tokens, their mean, and the sum of squares about it; so requests can be taken
    out again (undone edits) and statistics go on from a log. Keys are kept as they are, sums are float64.
    """

    remembers = exact = True

    def __init__(self, width: int):
        self.width, self._blocks = width, []
        self._sums = torch.zeros((), dtype=torch.float64), *torch.zeros(2, width, dtype=torch.float64)

    @property
    def count(self) -> int:
        return sum(block.shape[1] for block in self._blocks)

    def append(self, keys: torch.Tensor) -> None:
        """keys [1 + 2·d, requests]."""
        self._sums = self._with(keys)
        self._blocks = [*self._blocks, keys]

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` requests."""
        kept = []
        for block in self._blocks:
            kept += [block[:, :count]] if count > 0 else []
            count -= block.shape[1]
        self._be(kept)

    def without(self, columns: Sequence[int]) -> Statistics:
        """New statistics of all requests but those numbered `columns`."""
        twin, kept, first = Statistics(self.width), [], 0
        for block in self._blocks:
            places = [i for i in range(block.shape[1]) if first + i not in columns]
            kept += [block[:, places] if len(places) < block.shape[1] else block] if places else []
            first += block.shape[1]
        twin._be(kept)
        return twin

    def normal(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) [d], float64, of all requests and those of `keys`."""
        n, mean, squares = self._with(keys)
        return mean, (squares / (n - 1 + EPSILON)).sqrt()

    def memory(self) -> dict[str, torch.Tensor]:
        """All that `append` has left."""
        return {"keys": torch.cat(self._blocks, 1)} if self._blocks else {}

    def _be(self, blocks: list[torch.Tensor]) -> None:
        self.__init__(self.width)
        for block in blocks:
            self.append(block)

    def _with(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, means, squares = keys.double().cpu().split([1, self.width, self.width])
        parts = [torch.cat([total[..., None], new], -1) for total, new in zip(self._sums, (n[0], means, squares), strict=True)]
        return _pooled(*parts)


def _pooled(n: torch.Tensor, means: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts [.., k], means [d, .., k] and sums of squares about them of several parts, as those of all of them together."""
    total = n.sum(-1)
    mean = (n * means).sum(-1) / total
    return total, mean, (squares + n * (means - mean[..., None]) ** 2).sum(-1)


def statistics_of(features: torch.Tensor, owner: torch.Tensor, together: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each request adds to `Statistics`, from features [tokens, d] float64 of a module: (counts [requests], means and sums of
    squares [d, requests]).

    As published, each part of `together` requests adds its number of tokens times its unbiased variance, which is its sum of
    squares and a share more; each request bears the part of that which its own tokens make up.
    """
    n, means, squares = _moments(features, owner)
    part = torch.arange(len(n), device=n.device) // together
    tokens, centres, _ = _moments(features, part[owner])
    about = squares + n * (means - centres[:, part]) ** 2
    return n, means, squares + about / (tokens - 1).clamp(min=1)[part]


def _moments(features: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and sum of squares about it, of the tokens of each owner."""
    n = torch.bincount(owner).to(features)
    sums = features.new_zeros(len(n), features.shape[1])
    means = sums.index_add(0, owner, features) / n[:, None]
    return n, means.T, sums.index_add(0, owner, (features - means[owner]) ** 2).T


def _shapes(view: ModelView, hparams: UltraEditHyperParams) -> dict[str, int]:
    """Weight -> the number of its shape; modules of one shape share statistics, as published."""
    names = writes(view, hparams)
    known = list(dict.fromkeys(tuple(view.matrix(name).shape) for name in names))
    return {name: known.index(tuple(view.matrix(name).shape)) for name in names}


def build(view: ModelView, ground: Ground, hparams: UltraEditHyperParams) -> Mapping[int, Statistics]:
    return {number: Statistics(sum(view.matrix(name).shape)) for name, number in _shapes(view, hparams).items()}


# ---- one edit


def edit(view: ModelView, tok, requests: Sequence[Request], hparams: UltraEditHyperParams, state: LifelongState) -> EditReport:
    """For each module, from its inputs H [tokens, in] at all tokens of prompts and targets, and the loss' gradients at its outputs:

        ΔW = Vᵀ (H Hᵀ + I)⁻¹ H,   V = -lr · ||ĥ||² · ĝ of each token,

    where ĥ and ĝ are its input and gradient, normalised by the `Statistics` of all tokens so far, these included. The columns of a
    request's tokens are its own, so that it can be undone by itself.
    """
    report, shapes = EditReport(len(requests)), _shapes(view, hparams)
    texts = tokenised_all(tok, [(request.prompt, None, request.target_new) for request in requests], hparams.target_separator)
    with phase(report, "values"):
        parts = [_features(view, some, list(shapes), report) for some in chunks(texts, hparams.batch_size_once)]
        rows = [len(text.ids) for text in texts]
        seen = {name: tuple(map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in shapes}
    with phase(report, "solve"):
        added: dict[int, list] = {}
        for name, number in shapes.items():
            owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(seen[name][0].device)
            one = statistics_of(torch.cat(seen[name], 1).double(), owner, hparams.batch_size_once)
            added.setdefault(number, []).append([part.cpu() for part in one])
        for number, several in added.items():
            n, means, squares = _pooled(*(torch.stack(part, -1) for part in zip(*several, strict=True)))
            report.keys[number] = torch.cat([n[None], means, squares]).float()
    for name, number in shapes.items():
        keys, gradients = seen[name]
        with phase(report, "solve"):
            mean, deviation = (part.to(keys.device) for part in state.solvers[number].normal(report.keys[number]))
            widths = keys.shape[1], gradients.shape[1]
            normal = (torch.cat([keys, gradients], 1).double() - mean) / (deviation + EPSILON)
            key, gradient = normal.split(widths, 1)
            left = -hparams.lr * key.pow(2).sum(1) * gradient.T
            gram = keys.double() @ keys.double().T + torch.eye(len(keys), dtype=torch.float64, device=keys.device)
            right = torch.linalg.solve(gram, keys.double())
        with phase(report, "apply"):
            owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(keys.device)
            state.write(LowRank(name, left.float(), right.float(), owner=owner), report)
    report.density = dict.fromkeys(hparams.layers, 1.0)
    return report


def _features(
    view: ModelView, texts: Sequence[Tokenised], names: Sequence[str], report: EditReport
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight -> (inputs [tokens, in], gradients of the loss at outputs [tokens, out]) of its module, float32, text after text; the
    loss is the mean of -log p over the target tokens of all `texts`."""
    tokens = pad([text.ids for text in texts], view.device)
    modules = {name: view.model.get_submodule(name.removesuffix(".weight")) for name in names}
    wanted = {f"{side} {name}": (module, side) for name, module in modules.items() for side in ("input", "output")}
    # With what the embedding puts out, what modules put out takes a gradient, whatever the weights do.
    differentiable = altered({view.model.get_input_embeddings(): lambda embedded: embedded.requires_grad_()})
    with torch.enable_grad(), frozen_parameters(view.model), differentiable, record(wanted) as found:
        logits = view.model(**tokens.inputs(), use_cache=False).logits
        rows = [row for row, text in enumerate(texts) for _ in text.labels]
        before = [at - 1 for text in texts for at in range(text.target, len(text.ids))]
        labels = torch.tensor([label for text in texts for label in text.labels], device=logits.device)
        losses = cross_entropy(logits[rows, before].float(), labels, reduction="none")
        if not torch.isfinite(losses).all():
            raise FloatingPointError("the loss of UltraEdit is not finite; check the model's weights")
        gradients = torch.autograd.grad(losses.mean(), [found[f"output {name}"] for name in names])
    report.value_loss += [part.mean().item() for part in losses.detach().split([len(text.labels) for text in texts])]
    real = tokens.mask.bool()
    return {
        name: (found[f"input {name}"].detach()[real.to(gradient.device)].float(), gradient[real.to(gradient.device)].float())
        for name, gradient in zip(names, gradients, strict=True)
    }


METHOD = Method("UltraEdit", UltraEditHyperParams, edit, build=build, writes=writes, needs_subject=False)
