"""An edited model for others: the whole of it, a delta of update factors, or a LoRA adapter; each a folder with a model card."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ..files import whole_folder
from ..models import gguf
from ..models.arch import ModelView
from ..models.loading import base_folder
from ..models.updates import LowRank, Update
from .checkpoint import Base, ModelReport, write_checkpoint
from .delta import FILE, joined, save_delta, short
from .readback import check_checkpoint, check_delta, check_lora

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank


@dataclass(frozen=True)
class Card:
    """What a reader of an export must know: the base model (hub name, folder, GGUF file, or a name that comes with this package; of
    a hub name the revision), the hash of its weights before any edit, and scores after the last one (rows of a table: column ->
    value)."""

    base: str
    weights: str
    method: str
    edits: int
    date: str
    evaluation: Sequence[Mapping[str, object]] = ()
    revision: str | None = None


class LoraReport(NamedTuple):
    """The rank of an adapter, and the share of the updates it leaves out (||lost|| / ||whole||, Frobenius), by layer (by name for
    other parameters than down projections) and in all."""

    rank: int
    errors: dict[int | str, float]
    total: float


def export_model(
    model,
    tok,
    folder: str | Path,
    card: Card,
    dtype: torch.dtype | None = None,
    masters: Mapping[str, torch.Tensor] | None = None,
) -> ModelReport | None:
    """The base's folder with the edited tensors in the place of its own (see `write_checkpoint`), and a card; returns what rounding
    them to the base's dtype, or to `dtype`, costs. A base that lies in no folder (`card.base` is no name of one, or it is not in
    safetensors or pytorch_model.bin) is written by `save_pretrained`: None.

    masters: name -> matrix [out, in] float32, where the model's own weights are these, rounded. ValueError when
    `folder` holds anything; RuntimeError, and no folder, when what was written does not come back as the edited model.
    """
    base = Base.of(card.base, card.revision)
    if base is None and dtype is not None:
        raise ValueError(f"dtype is {short(dtype)}, but the files of {card.base!r} are not here; cast the model instead")
    report, written, name = None, {}, Path(folder).name
    with whole_folder(folder) as temporary:
        if base is None:
            model.save_pretrained(temporary)
            tok.save_pretrained(temporary)
            kind, what = short(model.dtype), f"the whole edited model, {short(model.dtype)}, and its tokenizer; {_dialect()}"
        else:
            report, written = write_checkpoint(model, base, temporary, masters, dtype)
            kind, what = report.dtype, _changed(report, base)
        checked = check_checkpoint(temporary, model, tok, written)
        code = f"{_AUTO}\nfolder = {name!r}  # where this file lies\n{_loaded('folder', kind)}"
        _write_card(temporary, card, "transformers", what, code, checked)
    return report


def export_delta(model, updates: Sequence[Update], originals: Mapping[str, torch.Tensor], folder: str | Path, card: Card) -> None:
    """A folder for `load_delta`: all updates, card. ValueError when `folder` holds anything.

    model: as edited. originals: name -> matrix [out, in] before the first update.
    """
    with whole_folder(folder) as temporary:
        about = {"base": card.base, "weights": card.weights, "method": card.method, "edits": card.edits, "date": card.date}
        save_delta(temporary / FILE, model, updates, originals, about)
        checked = check_delta(temporary, model, originals, Base.of(card.base, card.revision))
        code = (
            f"{_base(card, short(model.dtype))}\nimport easyedit_nmke\n\n"
            f"folder = {Path(folder).name!r}  # where this file lies\n"
            "originals = easyedit_nmke.load_delta(model, folder)  # the parameters as they were, by name"
        )
        _write_card(temporary, card, "easyedit_nmke", "a delta: every update of the base model's weights", code, checked)


def served_rank(rank: int) -> int:
    """The smallest of SERVED_RANKS that is not below `rank`; `rank` itself where there is none."""
    return next((served for served in SERVED_RANKS if served >= rank), rank)


def export_lora(
    model, updates: Sequence[Update], folder: str | Path, card: Card, rank: int | None = None, fill: bool = False
) -> LoraReport:
    """A folder for `peft.PeftModel.from_pretrained`: a float32 LoRA adapter on the edited down projections, card.

    rank: by default that of all updates together, which leaves nothing out. A lower one keeps the largest singular values of each
    layer's sum of updates; a higher one is that of all updates, or with `fill` as high as asked for, by zeros. ValueError when
    `folder` holds anything, and for updates that an adapter cannot hold.

    All layers get one rank and lora_alpha = r, so that servers which know neither rank_pattern nor alpha_pattern (vLLM) read the
    adapter as PEFT does; a layer of lower rank is filled up with zeros.
    """
    view = ModelView(model)
    factors = _factors(view, updates)
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    full = min(max(len(right) for _, right in factors.values()), *(min(view.matrix(name).shape) for name in factors))
    rank = full if rank is None else rank if fill else min(rank, full)
    tensors, lost, whole, labels = {}, {}, {}, _labels(view, factors)
    for name, (left, right) in factors.items():
        whole[name] = ((left.T.double() @ left.double()) * (right.double() @ right.T.double())).sum().clamp(min=0).sqrt().item()
        left, right, lost[name] = low_rank(left, right, rank)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    errors = {labels[name]: lost[name] / whole[name] if lost[name] else 0.0 for name in factors}
    total = math.hypot(*lost.values()) / math.hypot(*whole.values()) if any(lost.values()) else 0.0
    report = LoraReport(rank, errors, total)
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(_lora_config(view, labels, rank, card), indent=2)
        (temporary / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        lost, base = {name: errors[label] for name, label in labels.items()}, Base.of(card.base, card.revision)
        checked = check_lora(temporary, model, tensors, updates, lost, base)
        layers = all(isinstance(label, int) for label in labels.values())
        where = f"{'the down projections of layers ' if layers else ''}{', '.join(map(str, labels.values()))}"
        what = f"a LoRA adapter of rank {rank} on {where}"
        left_out = f"; it leaves out {report.total:.2%} of the updates (Frobenius norm)" if report.total else ""
        code = (
            f"{_base(card, short(model.dtype))}\nfrom peft import PeftModel\n\n"
            f"folder = {Path(folder).name!r}  # where this file lies\nmodel = PeftModel.from_pretrained(model, folder)"
        )
        _write_card(temporary, card, "peft", what + left_out, code, checked, _serving(card, Path(folder).name, rank))
    return report


def low_rank(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """left [D, R] · right [R, F] as a product of [D, rank] and [rank, F] that is nearest to it, and the Frobenius norm of what
    that leaves out. By the singular values of the [min(D, R), min(F, R)] core between two QR factors, in float64: the product
    itself is never made. Where R <= rank the factors are the given ones, filled up with zeros.
    """
    lost, (hidden, given), right = 0.0, left.shape, right.float()
    if given > rank:
        q, core_left = torch.linalg.qr(left.double())
        p, core_right = torch.linalg.qr(right.T.double())
        u, s, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        root, lost = s[:rank].sqrt(), s[rank:].norm().item()
        left, right = q @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ p.T
    # Both of one size, so that half precision can hold either.
    ratio = (right.norm(dim=1).clamp(min=1e-30) / left.norm(dim=0).clamp(min=1e-30)).sqrt()
    left, right = (left * ratio).float(), (right / ratio[:, None]).float()
    if (missing := rank - len(right)) > 0:
        left = torch.cat([left, left.new_zeros(hidden, missing)], 1)
        right = torch.cat([right, right.new_zeros(missing, right.shape[1])])
    return left.contiguous(), right.contiguous(), lost


def _factors(view: ModelView, updates: Sequence[Update]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameter -> (left [out, R], right [R, in]), whose product is its whole change."""
    found = {}
    for update in joined(updates):
        module = view.model.get_submodule(update.parameter.rpartition(".")[0])
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not isinstance(update, LowRank) or not linear or not update.parameter.endswith(".weight"):
            kind = type(update).__name__.lower()
            raise ValueError(
                f"the update of {update.parameter} is {kind}, and an adapter holds low-rank updates of linear layers only; "
                "export with --to delta or --to model"
            )
        found[update.parameter] = (update.left, update.right)
    return found


def _labels(view: ModelView, names: Iterable[str]) -> dict[str, int | str]:
    """Parameter -> the number of the block whose down projection it is, else its own name."""
    layers = {view.weight_name(layer): layer for layer in range(view.depth)}
    return {name: layers.get(name, name) for name in names}


def _lora_config(view: ModelView, labels: Mapping[str, int | str], rank: int, card: Card) -> dict:
    """adapter_config.json. Down projections go by the last word of the module's name where that is enough to find them in a block:
    servers look it up. The embedded base, or one that was a GGUF file, goes by its folder: that is what can be opened."""
    folder = base_folder(card.base) if card.base == "atlas" or gguf.is_gguf(card.base) else None
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder or card.base),
        "revision": card.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": view.family.transposed,
    }
    if not all(isinstance(label, int) for label in labels.values()):
        return {**content, "target_modules": [name.removesuffix(".weight") for name in labels]}
    name = view.family.down
    short_name = name.rsplit(".", 1)[-1]
    same = [module for module, _ in view.blocks[0].named_modules() if module.rsplit(".", 1)[-1] == short_name]
    target = short_name if len(same) == 1 else name
    return {**content, "target_modules": [target], "layers_to_transform": list(labels.values())}


# ---- folders and cards


def _dialect() -> str:
    """What may read a folder that `save_pretrained` wrote."""
    import transformers

    return (
        f"written by transformers {transformers.__version__}, for this major version and later ones: an earlier one may read other "
        "settings from config.json than were meant (the base of rotary embeddings), and may not know the tokenizer"
    )


def _changed(report: ModelReport, base: Base) -> str:
    """What sets a folder apart from its base's, in words."""
    anew, shards = report.shards
    files = (
        f"its pytorch_model.bin as safetensors, {shards} {'file' if shards == 1 else 'files'}"
        if base.pickled
        else f"{anew} of {shards} weight {'file' if shards == 1 else 'files'} written anew"
    )
    lost = f"; rounding leaves out {report.total:.2%} of the edits (Frobenius norm)" if report.total else ""
    return (
        f"the whole edited model: the files of the base, byte for byte but for the edited tensors ({files}), "
        f"which are {report.dtype}{lost}. What opens the base opens it"
    )


_AUTO = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"


def _loaded(source: str, kind: str, at: str = "") -> str:
    return (
        f"model = AutoModelForCausalLM.from_pretrained({source}{at}, dtype=torch.{kind})\n"
        f"tok = AutoTokenizer.from_pretrained({source}{at})"
    )


def _base(card: Card, kind: str) -> str:
    """Code that loads the base model, and its tokenizer."""
    base, at = card.base, f", revision={card.revision!r}" if card.revision else ""
    if base == "atlas":
        return "from easyedit_nmke import atlas\n\nmodel, tok = atlas.load()\n"
    if gguf.is_gguf(base):
        return (
            f"{_AUTO}from easyedit_nmke.models.gguf import plain_folder\n\nbase = plain_folder({base!r})\n{_loaded('base', kind)}\n"
        )
    return f"{_AUTO}\n{_loaded(repr(base), kind, at)}\n"


def _serving(card: Card, name: str, rank: int) -> str:
    if rank > SERVED_RANKS[-1]:
        return f"vLLM serves adapters up to rank {SERVED_RANKS[-1]}: export with `--rank {SERVED_RANKS[-1]}` for it."
    options = f"--enable-lora --max-lora-rank {served_rank(rank)} --lora-modules {shlex.quote(f'edited={name}')}"
    base, where = shlex.quote(card.base) + (f" --revision {shlex.quote(card.revision)}" if card.revision else ""), ""
    if card.base == "atlas":
        base, where = "BASE", " (BASE is the folder `easyedit_nmke.atlas.DIRECTORY`)"
    if gguf.is_gguf(card.base):
        base, where = "BASE", f" (BASE is the folder that `easyedit_nmke.models.gguf.plain_folder({card.base!r})` gives)"
    return f"With vLLM, for the architectures whose adapters it takes{where}:\n\n```bash\nvllm serve {base} {options}\n```"


def _write_card(folder: Path, card: Card, library: str, what: str, code: str, checked: str, more: str = "") -> None:
    head = [f"library_name: {library}", "tags: [knowledge-editing]"]
    made, packaged = gguf.origin(base_folder(card.base, card.revision)), gguf.PACKAGED.get(card.base)
    if card.base != "atlas" and not gguf.is_gguf(card.base) and not Path(card.base).exists():
        head.append(f"base_model: {card.base}")
    facts = {
        "Base model": f"{card.base}, which `{packaged.command}` brings" if packaged else card.base,
        **({"Revision": card.revision} if card.revision else {}),
        **({"Dequantised from": ", ".join(f"{name} {value}" for name, value in made.items())} if made else {}),
        "Hash of its weights": card.weights,
        "Method": card.method,
        "Edits": card.edits,
        "Date": card.date,
        "This folder": what,
        "Read back": checked,
    }
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {card.base} with {card.edits} {'edit' if card.edits == 1 else 'edits'}",
        _table([{"": name, " ": value} for name, value in facts.items()]),
        f"## Load it\n\n```python\n{code}\n```",
        *([more] if more else []),
        "## Scores after the last edit\n\n" + (_table(card.evaluation) if card.evaluation else "None were taken."),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
