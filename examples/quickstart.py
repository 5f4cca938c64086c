"""Edit one fact of the embedded model, look at the answer, and take the edit back: python examples/quickstart.py"""

from easyedit_nmke import LifelongEditor, NMKEHyperParams, atlas
from easyedit_nmke.scores.generation import answer, greedy_texts

editor = LifelongEditor.from_hparams(NMKEHyperParams.from_hparams("atlas"))
request = atlas.requests(1)[0]


def said(prompt: str) -> str:
    return answer(greedy_texts(editor.model, editor.tok, [prompt])[0])


def show(when: str) -> None:
    print(f"{when:>8}: {request['prompt']} {said(request['prompt'])}")


show("before")
metrics, model, weights_before = editor.edit(
    prompts=[request["prompt"]],
    target_new=[request["target_new"]],
    subject=[request["subject"]],
    rephrase_prompts=[request["rephrase_prompt"]],
    sequential_edit=True,
    verbose=False,
)
show("after")
print(f"   wants: {request['target_new']}; rephrased: {request['rephrase_prompt']}", end=" ")
print(said(request["rephrase_prompt"]))
editor.restore(weights_before)
show("restored")
