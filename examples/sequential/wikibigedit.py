"""Edit the changes of Wikidata in the order in which they came, and see how old edits fare.

    python examples/sequential/wikibigedit.py --hparams NMKE/llama3-8b --data wikibigedit.json --edits 2000

After the last edit, beside the means: the new answers of each tenth of the edits, oldest first, and the questions of two hops,
asked freely.
"""

import sys
from statistics import fmean

from streams import edited, opened, tell

from easyedit_nmke.scores import metrics
from easyedit_nmke.scores.ripple import Ripples


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    hops = Ripples(editor.model, editor.tok, requests, editor.hparams.target_separator)
    results, scores = edited(editor, requests)
    tenths = metrics.retention([fmean(result["final"]["rewrite_acc"]) for result in results])
    ages = {f"rel, tenth {number}": value for number, value in enumerate(tenths, 1)}
    tell(args, {**scores, **ages, **hops.score(editor.model, editor.tok, len(requests))}, results)


if __name__ == "__main__":
    sys.exit(main())
