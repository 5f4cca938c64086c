"""What 16-bit weights cost: hundreds of edits of the embedded model in float32, and in bfloat16 with and without float32 masters.

    python examples/precision.py --edits 500 --out docs/precision.json

Each run is scored after all of its edits, against its own unedited model. A 16-bit model is always edited through masters;
"without" takes them away, to show what they are for.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from easyedit_nmke import LifelongEditor, atlas, hparams
from easyedit_nmke.experiments import methods, protocol
from easyedit_nmke.files import write_json
from easyedit_nmke.models.requests import Request

RUNS = {"float32": ("float32", True), "bfloat16, masters": ("bfloat16", True), "bfloat16, no masters": ("bfloat16", False)}
SCORES = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "same_subject": "Same subject", "general": "General"}


def run(settings, dtype: str, masters: bool, edits: int, seed: int) -> dict:
    editor = LifelongEditor.from_hparams(methods.changed(settings, {"dtype": dtype}))
    requests = [Request.from_dict(record) for record in atlas.requests(edits, "test", seed)]
    scorer = protocol.Scorer(editor.model, editor.tok, requests, atlas.exercises(), text=atlas.text())
    for request in tqdm(requests, desc=f"{dtype}, seed {seed}", unit="edit", leave=False):
        editor.apply([request])
        if not masters:
            editor.state.masters = {}
    scores, _ = scorer(editor.model, editor.tok, edits)
    return {"seed": seed, "scores": {name: scores[name] for name in SCORES}, "protocol": protocol.stamp(editor)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="NMKE/atlas-plus", help="a settings file of the embedded model")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = hparams.read(args.hparams)
    found = {
        name: [run(settings, dtype, masters, args.edits, seed) for seed in range(args.seeds)]
        for name, (dtype, masters) in RUNS.items()
    }
    if args.out:
        write_json(args.out, {"edits": args.edits, "threads": torch.get_num_threads(), "runs": found})
    table = Table("", *SCORES.values(), title=f"{args.hparams}, {args.edits} edits, mean of {args.seeds} stream(s)")
    for name, runs in found.items():
        table.add_row(name, *(f"{fmean(one['scores'][score] for one in runs):.3f}" for score in SCORES))
    Console().print(table)


if __name__ == "__main__":
    main()
