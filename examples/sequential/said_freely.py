"""Edit facts one after the other and judge what the model says by itself, not the tokens that it is shown.

    python examples/sequential/said_freely.py --hparams NMKE/llama3-8b --data zsre_mend_eval.json --edits 1000

exact: the answer is the new one and a sentence ends after it; contains: it has the new one in it. A model as the judge, here or at
an OpenAI-compatible address, is `nmke run --judge`.
"""

import sys
from statistics import fmean

from streams import edited, opened, tell

from easyedit_nmke.scores.generation import judge


def main(argv=None):
    args, editor, requests = opened(__doc__, argv)
    results, scores = edited(editor, requests)
    for name, prompts in (("rel", lambda request: [request.prompt]), ("gen", lambda request: request.rephrase_prompts)):
        asked = [(prompt, (request.target_new, *request.aliases)) for request in requests for prompt in prompts(request)]
        verdicts = judge(editor.model, editor.tok, asked, separator=editor.hparams.target_separator)
        for kind in ("exact", "contains") if verdicts else ():
            scores[f"{name} {kind}"] = fmean(getattr(verdict, kind) for verdict in verdicts)
    tell(args, scores, results)


if __name__ == "__main__":
    sys.exit(main())
