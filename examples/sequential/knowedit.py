"""Edit KnowEdit's records one after the other, and see each kind of portability and locality that they have.

    python examples/sequential/knowedit.py --hparams NMKE/llama3-8b --data test_cf.json --edits 500

Of wiki_counterfact, wiki_recent and ZsRE: what follows from the edit (reasoning, aliases, logical generalization) and what should
stay (relation specificity, forgetfulness).
"""

import sys
from statistics import fmean

from streams import edited, opened, tell

from easyedit_nmke.scores import metrics


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    results, scores = edited(editor, requests)
    finals = [result["final"] for result in results]
    kinds = dict.fromkeys(kind for final in finals for kind in final["portability"])
    for kind in kinds:
        scores[f"portability {kind.removesuffix('_acc')}"] = fmean(
            fmean(final["portability"][kind]) for final in finals if final["portability"].get(kind)
        )
    kept = metrics.by_kind([result["pre"] for result in results], finals)
    tell(args, {**scores, **{f"locality {kind}": value for kind, value in kept.items()}}, results)


if __name__ == "__main__":
    sys.exit(main())
