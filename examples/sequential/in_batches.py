"""Edit many facts by few updates: batches of a hundred, each on top of the one before.

python examples/sequential/in_batches.py --hparams UltraEdit/llama3-8b --batch-size 100 --data wikibigedit.json --edits 10000
"""

import sys

from streams import edited, opened, tell


def main(argv=None):
    args, editor, requests = opened(__doc__, argv, hparams="UltraEdit/llama3-8b", batch_size=100)
    results, scores = edited(editor, requests)
    batches = results[:: editor.hparams.batch_size]
    tell(args, {**scores, "seconds an edit": sum(batch["time"] for batch in batches) / len(results)}, results)


if __name__ == "__main__":
    sys.exit(main())
