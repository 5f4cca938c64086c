"""Edit the facts of CounterFact one after the other; EasyEdit's scores and CounterFact's own after the last.

    python examples/sequential/counterfact.py --hparams NMKE/llama3-8b --data counterfact-edit.json --edits 1000

Reads EasyEdit's file and the authors' (multi_counterfact.json, with several paraphrases and neighbours). CounterFact's own scores
compare the probabilities of the new and the true answer: efficacy, paraphrase and neighbourhood, and their harmonic mean.
"""

import sys

from streams import edited, opened, tell

from easyedit_nmke.scores.counterfact import counterfact


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    results, scores = edited(editor, requests)
    tell(args, {**scores, **counterfact(editor.model, editor.tok, requests, editor.hparams.target_separator)}, results)


if __name__ == "__main__":
    sys.exit(main())
