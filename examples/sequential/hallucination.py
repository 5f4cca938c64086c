"""Correct hallucinated passages one after the other; the perplexity of each right continuation before and after.

    python examples/sequential/hallucination.py --hparams LocFT-BF/llama3-8b --data hallucination-edit.json --edits 100

Targets are sentences, not names, so what counts is how likely they are: exp of the mean negative log-probability of their tokens.
Long targets want a method that learns the whole text (LocFT-BF, UltraEdit) rather than one value at the subject.
"""

import math
import sys
from statistics import fmean

from streams import edited, opened, tell

from easyedit_nmke.scores.generation import target_log_probs


def main(argv=None):
    args, editor, requests = opened(__doc__, argv, hparams="LocFT-BF/llama3-8b")
    before = perplexity(editor, requests)
    results, scores = edited(editor, requests)
    tell(args, {**scores, "perplexity before": before, "perplexity after": perplexity(editor, requests)}, results)


def perplexity(editor, requests):
    pairs = [(request.prompt, request.target_new) for request in requests]
    found = target_log_probs(editor.model, editor.tok, pairs, separator=editor.hparams.target_separator)
    return fmean(math.exp(-value) for value in found)


if __name__ == "__main__":
    sys.exit(main())
