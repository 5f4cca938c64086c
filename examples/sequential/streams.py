"""What the scripts beside this one share: their arguments, a model and the records that fit it, and how scores are told."""

import argparse
import dataclasses
import sys
from pathlib import Path
from statistics import fmean

from easyedit_nmke import LifelongEditor, read
from easyedit_nmke.experiments.stream import stream
from easyedit_nmke.files import write_json
from easyedit_nmke.scores import metrics


def opened(description, argv, hparams="NMKE/llama3-8b", batch_size=None):
    """(arguments, editor, requests in the file's order) of a command line; records that cannot be edited are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default=hparams, help=f"a YAML file of any method, or a name like {hparams} (the default)")
    parser.add_argument("--data", required=True, help="a file of records as it is published")
    parser.add_argument("--edits", type=int, help="the first so many (default: all)")
    told = f"requests of one update (default: {batch_size or 'what the YAML file says'})"
    parser.add_argument("--batch-size", type=int, default=batch_size, help=told)
    parser.add_argument("--out", type=Path, help="a new JSON file: the scores, and the metrics of every edit as EasyEdit has them")
    args = parser.parse_args(argv)
    try:
        settings = read(args.hparams)
        editor = LifelongEditor.from_hparams(dataclasses.replace(settings, batch_size=args.batch_size or settings.batch_size))
        found = stream(editor, args.data, args.edits, seed=0)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for refusal in found.refused:
        print(f"left out: {refusal}", file=sys.stderr)
    return args, editor, found.requests


def edited(editor, requests):
    """Edit all of them, one after the other; their metrics ("pre", "post" right after each, "final" after the last) and the means:
    of "post" what the newest edit does, of "final" what is left of all of them."""
    results, _, _ = editor.edit([], [], requests=requests)
    scores = metrics.summary([result["pre"] for result in results], [result["final"] for result in results])
    return results, {"rel_at_once": fmean(fmean(result["post"]["rewrite_acc"]) for result in results), **scores}


def tell(args, scores, results):
    """Print the scores that there are, and write everything to --out."""
    for name, value in scores.items():
        if value is not None:
            print(f"{name:44} {value:.3f}")
    if args.out:
        write_json(args.out, {"scores": scores, "metrics": results})
