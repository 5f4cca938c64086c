"""Edit the questions of ZsRE one after the other and score all of them after the last.

    python examples/sequential/zsre.py --hparams NMKE/llama3-8b --data zsre_mend_eval.json --edits 1000 --out zsre.json

rel, gen: the new answer to the question and to its paraphrase; loc: Natural Questions answered as before; portability: the question
of one hop, where the file has them (zsre_mend_eval_portability_gpt4.json). All by teacher-forced tokens, as EasyEdit counts them.
"""

import sys

from streams import edited, opened, tell


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    results, scores = edited(editor, requests)
    tell(args, scores, results)


if __name__ == "__main__":
    sys.exit(main())
