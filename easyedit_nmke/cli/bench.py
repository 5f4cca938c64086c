"""`nmke bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from .verb import Verb, check_file, numbers, positive, quiet_libraries


def _arguments(bench: argparse.ArgumentParser) -> None:
    known = "llama3-8b, llama3-70b, qwen2.5-7b, gpt2-xl, small, atlas (default), smollm2, gemma3-270m"
    bench.add_argument("--shape", metavar="NAME", help=f"{known}; of --dry also several (default: the first four)")
    bench.add_argument("--dry", action="store_true", help="measure nothing: predict time and memory from counts")
    bench.add_argument("--device-model", metavar="NAME", help="of --dry: h100, h200, a100, rtx4090 (default: all), here")
    bench.add_argument("--part", metavar="PART", help="only this step, one layer: solve or attribution (default shape llama3-8b)")
    bench.add_argument("--edits", type=positive, default=3, metavar="N", help="repetitions of each measurement (default 3)")
    bench.add_argument(
        "--at", type=numbers, metavar="LIST", help="with so many past edits (default 1,500; solve 100,2000; --dry 1000)"
    )
    bench.add_argument("--batch", type=positive, metavar="N", help="also so many edits at once")
    bench.add_argument("--layers", type=positive, metavar="N", help="a model of only so many blocks, where memory is short")
    bench.add_argument("--neurons", type=positive, metavar="N", help="of --part attribution (default 1024, on a GPU all)")
    bench.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    bench.add_argument("--dtype", metavar="NAME", help="of the weights: float32 (default), bfloat16 (default of --dry), float16")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")


def _bench(args, console: Console) -> int:
    import torch

    from .. import bench
    from ..files import write_json

    quiet_libraries(args)
    check_file(args.out)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar:
        content = {"command": args.command, **_measured(args, device, bar.set_description_str)}
    kind = bench.predict if args.dry else bench.parts if args.part else bench
    headings, body = kind.rows(content)
    about = _cards(content) if args.dry else _machine(content)
    for line in (about, *(f"Note: {note}." for note in content["notes"]), "", *_aligned(headings, body), "", kind.LEGEND):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.out:
        write_json(args.out, content)
    return 0


def _measured(args, device: str, said) -> dict:
    from .. import bench

    if args.dry:
        return _predicted(args, device)
    if args.device_model:
        raise ValueError("--device-model goes with --dry; what is measured is measured on --device")
    dtype = args.dtype or "float32"
    if args.part is None:
        if args.neurons:
            raise ValueError("--neurons goes with --part attribution")
        plan = bench.Plan(args.shape or "atlas", args.edits, args.at or (1, 500), args.layers, device, dtype, batch=args.batch)
        return bench.measure(plan, said)
    if args.part not in bench.parts.PARTS:
        raise ValueError(f"no part {args.part!r}; known: {', '.join(bench.parts.PARTS)}")
    for given, option in ((args.layers, "--layers"), (args.batch, "--batch")):
        if given:
            raise ValueError(f"{option} goes with whole edits; a part is measured for one layer")
    return bench.parts.measure(
        args.part, args.shape or "llama3-8b", args.edits, args.at or (100, 2000), args.neurons, device, dtype, said
    )


def _predicted(args, device: str) -> dict:
    from ..bench import predict
    from ..bench.cards import CARDS

    if given := [name for name in ("part", "layers", "neurons", "batch") if getattr(args, name)]:
        raise ValueError(f"--dry predicts whole edits of whole models; leave out {', '.join(f'--{name}' for name in given)}")
    shapes = args.shape.split(",") if args.shape else predict.SHAPES
    cards = args.device_model.split(",") if args.device_model else tuple(CARDS)
    return predict.predict(shapes, cards, max(args.at or (1000,)), args.dtype, device)


def _cards(content: dict) -> str:
    lines = [content["command"], content["what"]]
    for card in content["cards"].values():
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in card["rates"].items() if dtype != "float16")
        lines.append(
            f"{card['name']}: {card['memory'] / 1e9:.0f} GB at {card['bandwidth'] / 1e9:.0f} GB/s; TFLOP/s: {rates}; "
            f"{card['launch'] * 1e6:.1f} us a launch, {card['wait'] * 1e6:.0f} us a wait ({card['source']})"
        )
    return "\n".join(lines)


def _machine(content: dict) -> str:
    where, versions = content["hardware"], content["versions"]
    gpus = "".join(f"; {gpu['name']}, {gpu['memory_gb']} GB" for gpu in where["gpus"])
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    cpu = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, {where['free_memory_gb']} GB free"
    return f"{content['command']}\n{cpu}{gpus}\n{known}\n{content['what']}"


def _aligned(headings: list[str], body: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *body, strict=True)]
    first = [f"{row[0]:<{widths[0]}}" for row in (headings, *body)]
    others = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)) for row in (headings, *body)]
    return [f"{name}  {cells}" for name, cells in zip(first, others, strict=True)]


VERB = Verb(
    "bench",
    "time and memory of an edit: this package, the plain equations and EasyEdit, side by side",
    "nmke bench --shape small --edits 3 --at 1,500 --out bench.json",
    _bench,
    _arguments,
)
