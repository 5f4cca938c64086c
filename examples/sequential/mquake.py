"""Edit the facts of MQuAKE's cases one after the other, and ask what follows from several of them.

    python examples/sequential/mquake.py --hparams NMKE/llama3-8b --data MQuAKE-CF-3k-v2.json --edits 300

multi_hop: the share of cases of which any question is answered with the new answer. Questions are asked freely, without examples
before them, so the numbers are not those of papers that give some.
"""

import sys

from streams import edited, opened, tell

from easyedit_nmke.scores.ripple import Ripples


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    hops = Ripples(editor.model, editor.tok, requests, editor.hparams.target_separator)
    results, scores = edited(editor, requests)
    tell(args, {**scores, **hops.score(editor.model, editor.tok, len(requests))}, results)


if __name__ == "__main__":
    sys.exit(main())
