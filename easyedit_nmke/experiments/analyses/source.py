"""What analyses are asked about: a model, before or after edits, and facts or texts. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ... import atlas
from ... import facts as known


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Different ones of 0 or more, ascending: 0,4,8."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers")
    return tuple(sorted({int(part) for part in text.split(",")}))


def model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", metavar="NAME", help="a folder, a hub name, smollm2, ... (default: that of --edits, or atlas)")
    sub.add_argument("--edits", type=Path, metavar="DIR", help="the model with the edits that `nmke run` left in this folder")
    sub.add_argument("--device", metavar="NAME", help="cpu, cuda:1, ... (default: a GPU where there is one)")
    sub.add_argument("--dtype", default="float32", metavar="NAME", help="float32, bfloat16, float16, auto (default float32)")


def data_arguments(sub: argparse.ArgumentParser, default: int, which: str = "") -> None:
    sub.add_argument("--data", metavar="FILE", help="records to take prompts from; or atlas, facts (default: what fits the model)")
    sub.add_argument("--facts", type=positive, default=default, metavar="N", help=f"how many {which} (default {default})")


def seed_argument(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--seed", type=int, default=0, help=f"of {what} (default 0)")


def on_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--on", metavar="CLUSTER", help="ray, or ray:HOST:PORT: on the machines of a Ray cluster (docs/scale.md)")


def model_of(args: argparse.Namespace) -> str:
    """The name of the model that is asked."""
    if args.model is not None or getattr(args, "edits", None) is None:
        return args.model or "atlas"
    from ...history.durable import find
    from ...history.journal import Journal

    with Journal.open(find(args.edits), write=False) as journal:
        return journal.header["hparams"]["model_name"]


def load(args: argparse.Namespace):
    """(model, tokenizer) that the arguments name, with the edits of `--edits` in it."""
    from ...editor import LifelongEditor
    from ...hparams import HyperParams
    from ...models.loading import load_model

    if getattr(args, "edits", None) is not None:
        editor = LifelongEditor.of_folder(args.edits, args.model, args.device, write=False)
        return editor.model.eval(), editor.tok
    model, tok = load_model(HyperParams([0], model_of(args), device=args.device, dtype=args.dtype))
    return model.eval(), tok


def name(args: argparse.Namespace) -> str:
    """What titles call the model."""
    return model_of(args) + (f" with the edits in {args.edits}" if getattr(args, "edits", None) else "")


def requests(data: str | None, model: str, count: int | None, seed: int = 0) -> list:
    """The first `count` (None: 500, or as many as there are) `Request`s of a file, or of the facts that the embedded model or
    one of real text may know. ValueError when there are fewer than `count`."""
    from ...data import load as read
    from ...models.requests import Request

    data = data or ("atlas" if model == "atlas" else known.SOURCE)
    if data in atlas.SOURCES:
        found = [Request.from_dict(record) for record in atlas.requests(count or 500, "tune", seed, atlas.SOURCES[data])]
    elif data == known.SOURCE:
        found = [Request.from_dict(record) for record in known.requests(count, "tune", seed)]
    else:
        found = read(Path(data)).requests[: count or 500]
    if count and len(found) < count:
        raise ValueError(f"{data} has {len(found)} records that can be used; ask for as many, or fewer")
    return found


def spread(depth: int, count: int) -> tuple[int, ...]:
    """`count` blocks of `depth`, evenly from the first to the last; all of them where there are no more, of one the first."""
    if count == 1:
        return (0,)
    return tuple(range(depth)) if count >= depth else tuple(sorted({round(i * (depth - 1) / (count - 1)) for i in range(count)}))


def at_most(words: Sequence[str], length: int) -> str:
    """A text that fits a label."""
    text = " ".join(words)
    return text if len(text) <= length else text[: length - 1] + "…"
