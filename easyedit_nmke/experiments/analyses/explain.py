"""One kept edit, told to a person: where it was written, by which neurons, what it made of the answer, and what else it moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import source
from .record import Analysis, Table

NEURONS, WORDS, PROBES = 3, 5, 10  # shown: of each block, of each value, of what else changed
OTHERS = 200  # probes of other edits that are asked


def arguments(sub) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR", help="where `nmke run` keeps its edits, or a state_dir")
    sub.add_argument("edit", type=source.positive, metavar="ID", help="its number in `nmke log`")
    sub.add_argument("--model", metavar="NAME", help="where the base model lies now, if it was moved")
    sub.add_argument("--device", metavar="NAME", help="instead of the one that the edits were made on")


def run(args, begin) -> None:
    from ...editor import LifelongEditor
    from ...history.log import check_undo, standing
    from ...models.arch import editing

    editor = LifelongEditor.of_folder(args.folder, args.model, args.device, write=False)
    events = editor.state.events
    place = next((i for i, event in enumerate(events) if args.edit in getattr(event, "ids", ())), None)
    if place is None:
        check_undo(events, args.edit)  # which says what edits there are
    if not editor.state.weights.replays:
        raise ValueError(f"the updates of {editor.alg_name} were not kept, so no edit can be told; set keep_updates: true")
    name = editor.hparams.to_dict()["model_name"]
    settings = {"name": str(name), "method": editor.alg_name, "edit": args.edit, "made": events[place].made}
    notebook = begin({**settings, "now": standing(events)[args.edit]}, editor.model)
    with editing(editor.model):
        notebook.once("edit", args.edit, make=lambda: _told(editor, place, args.edit))


def _told(editor, place: int, number: int) -> dict:
    """All of the line: the model is asked as it was before and after the event, and put back."""
    from ...models.arch import ModelView
    from ...models.prompts import open_end, tokenised
    from ...models.requests import Request

    state, view = editor.state, ModelView(editor.model)
    event = state.events[place]
    column = number - event.first
    request = Request.from_dict(event.requests[column], editor.method.needs_subject)
    probes, layers = _probes(state.events, request), list(editor.hparams.layers)
    asked = {}
    with state.weights.lent():
        state.weights.set_to(state.events[:place], masters=False)
        values = {layer: view.values(layer).float().clone() for layer in layers}
        weights = {layer: view.w_out(layer).float().clone() for layer in layers}
        asked["before"] = _ask(editor, request, probes)
        scores = _scores(editor, request, event.z, column) if event.masks else {}
        state.weights.set_to(state.events[: place + 1], masters=False)
        asked["after"] = _ask(editor, request, probes)
        keys = _keys(editor, request)
        blocks = [
            _block(editor.tok, view, event, column, layer, values[layer], weights[layer], keys, scores.get(layer))
            for layer in layers
        ]
    text, _ = open_end(request.prompt, editor.hparams.target_separator, editor.tok)
    end = request.fill("{}", editor.tok)[1] if request.subject else None
    found = tokenised(editor.tok, text, end)
    loss = event.report.value_loss
    return {
        "prompt": request.prompt, "subject": request.subject, "new": request.target_new, "old": request.ground_truth,
        "tokens": [editor.tok.decode([i]) for i in found.ids], "subject_token": found.subject,
        "value_loss": loss[column] if column < len(loss) else None, "supersedes": list(event.supersedes.get(number, ())),
        "blocks": blocks, "asked": [
            {**probe, "before": before, "after": after}
            for probe, before, after in zip(_texts(request, probes), *(asked[when]["answers"] for when in asked), strict=True)
        ],
        "words": {when: said["words"] for when, said in asked.items()},
    }  # fmt: skip


def _probes(events, request) -> list[dict]:
    """What should have stayed, or followed: this edit's probes, then those of other edits and their own prompts."""
    found = [
        {"of": kind, "prompt": prompt, "answer": answer, "own": True}
        for section in (request.locality, request.portability)
        for kind, pairs in section.items()
        for prompt, answer in pairs
    ]
    seen = {(probe["prompt"], probe["answer"]) for probe in found} | {(request.prompt, request.target_new)}
    for event in events:
        for other in getattr(event, "requests", ()):
            pairs = [("another edit's prompt", other["prompt"], other["target_new"])]
            for kind, entry in {**other.get("locality", {}), **other.get("portability", {})}.items():
                pairs += [(f"{kind}, of another edit", *pair) for pair in zip(entry["prompt"], entry["ground_truth"], strict=True)]
            for kind, prompt, answer in pairs:
                if (prompt, answer) not in seen and len(found) < OTHERS:
                    seen.add((prompt, answer))
                    found.append({"of": kind, "prompt": prompt, "answer": answer, "own": False})
    return found


def _texts(request, probes: Sequence[Mapping]) -> list[dict]:
    """Everything that is asked, in order: new and old answer to the prompt and its wordings, then the probes."""
    found = []
    for of, prompt in [("prompt", request.prompt), *(("wording", prompt) for prompt in request.rephrase_prompts)]:
        found.append({"of": of, "which": "new", "prompt": prompt, "answer": request.target_new})
        if request.ground_truth:
            found.append({"of": of, "which": "old", "prompt": prompt, "answer": request.ground_truth})
    return [*found, *probes]


def _ask(editor, request, probes: Sequence[Mapping]) -> dict:
    """answers: the probability of each answer of `_texts`, whole; words: the likeliest next tokens of the prompt."""
    import torch

    from ...models.prompts import open_end, pad, target_tokens, tokenised
    from ...scores.generation import target_log_probs

    model, tok, separator = editor.model, editor.tok, editor.hparams.target_separator
    pairs = [(text["prompt"], text["answer"]) for text in _texts(request, probes)]
    means = target_log_probs(model, tok, pairs, separator=separator)
    lengths = [len(target_tokens(tok, *pair, separator)) for pair in pairs]
    batch = pad(
        [tokenised(tok, open_end(request.prompt, separator, tok)[0]).ids], editor.model.get_input_embeddings().weight.device
    )
    with torch.no_grad():
        best = torch.softmax(model(**batch.inputs()).logits[0, -1].double(), -1).topk(WORDS)
    return {
        "answers": [math.exp(mean * length) for mean, length in zip(means, lengths, strict=True)],
        "words": [(tok.decode([i]), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
    }


def _keys(editor, request) -> Mapping:
    """Each block's key at the subject, of the model as it is; {} without a subject."""
    from ...methods.keys import Contexts, keys_of
    from ...models.arch import ModelView

    if not request.subject:
        return {}
    layers = list(editor.hparams.layers)
    return keys_of(ModelView(editor.model), editor.tok, [request], Contexts(editor.state.templates), layers)


def _scores(editor, request, z, column: int) -> dict:
    """The mean attribution score [F] of each block, of the model as it is. z: the values of the edit's requests, this one's in
    `column`."""
    from dataclasses import replace

    from ...methods.nmke import attributed
    from ...models.arch import ModelView

    backend = editor.hparams.attribution_backend.replace("cached", "auto")
    hparams, templates = replace(editor.hparams, attribution_backend=backend), editor.state.flat_templates
    own = None if z is None else z[:, column, None]
    found = attributed(ModelView(editor.model), editor.tok, [request], templates, hparams, z=own)
    return {layer: of_layer.mean(0) for layer, of_layer in found.items()}


def _block(tok, view, event, column: int, layer: int, values, weights, keys: Mapping, scores) -> dict:
    """What the event did to one block: how far it should have moved the FFN's output at the subject, how far it did, and which
    neurons' values changed most. Of 16-bit weights the log does not tell how far, only in which direction (`LowRank.rounded`)."""
    from ...models.updates import HALF, LowRank, of_parameter

    change = view.w_out(layer).float() - weights  # [D, F]
    made = [u for u in of_parameter(event.updates, view.weight_name(layer)) if isinstance(u, LowRank)]
    own = next((u for u in made if 0 <= column - u.first < u.requests), None)  # the first: later passes want what it left
    wanted = own.left[:, column - own.first].float() if own is not None else None
    key = keys[layer][:, 0].to(change) if keys else None
    moved = None if key is None else change @ key
    size, now = change.norm(dim=0), view.values(layer).float()
    mask = event.masks.get(layer)
    told = {
        "layer": layer, "changed": int((size > 0).sum()), "neurons": len(size), "relative": (change.norm() / weights.norm()).item(),
        "attributed": None if mask is None else int(mask.sum()),
        "wanted": None if wanted is None or own.right.dtype in HALF else wanted.norm().item(),
        "moved": None if moved is None else moved.norm().item(),
        "along": None if wanted is None or moved is None else _cosine(wanted.to(moved), moved), "top": [],
    }  # fmt: skip
    for i in size.topk(min(NEURONS, len(size))).indices.tolist():
        sign = 1.0 if key is None or key[i] >= 0 else -1.0
        told["top"].append({
            "neuron": i, "change": (size[i] / weights[:, i].norm().clamp(min=1e-30)).item(),
            "coefficient": None if key is None else key[i].item(), "score": None if scores is None else scores[i].item(),
            "rank": None if scores is None else int((scores > scores[i]).sum()) + 1,
            "before": _promoted(tok, view.readout, sign * values[:, i]), "after": _promoted(tok, view.readout, sign * now[:, i]),
        })  # fmt: skip
    return told


def _cosine(one, other) -> float:
    return (one @ other / (one.norm() * other.norm()).clamp(min=1e-30)).item()


def _promoted(tok, readout, value) -> list[str]:
    """The words whose logits a value [D] raises most."""
    if readout.norm == "layer":
        value = value - value.mean()
    logits = readout.head.to(value) @ (readout.scale.to(value) * value)
    return [tok.decode([i]) for i in logits.topk(WORDS).indices.tolist()]


# ---- what the line holds


def _changed(line: Mapping) -> list[dict]:
    """The probes by how much their answer's probability moved, most first."""
    probes = [text for text in line["asked"] if "which" not in text]
    return sorted(probes, key=lambda text: -abs(text["after"] - text["before"]))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.0e}"


def tables(lines: Sequence[Mapping]) -> list[Table]:
    line = lines[1]
    answers = [
        (text["of"], text["prompt"], f"{text['which']}: {text['answer']}", _percent(text["before"]), _percent(text["after"]))
        for text in line["asked"]
        if "which" in text
    ]
    blocks = [
        (str(b["layer"]), _or(b["wanted"], "{:.2f}"), _or(b["moved"], "{:.2f}"), _or(b["along"], "{:+.2f}"),
         _or(b["attributed"], "{:d}"), f"{b['changed']} of {b['neurons']}", f"{b['relative']:.4f}")
        for b in line["blocks"]
    ]  # fmt: skip
    neurons = [
        (f"{b['layer']}.{n['neuron']}", f"{n['change']:.2f}", _or(n["coefficient"], "{:+.2f}"), _or(n["rank"], "{:d}"),
         _words(n["before"]), _words(n["after"]))
        for b in line["blocks"] for n in b["top"]
    ]  # fmt: skip
    probes = [(p["of"], p["prompt"], p["answer"], _percent(p["before"]), _percent(p["after"])) for p in _changed(line)[:PROBES]]
    return [
        Table("The answer", ("asked by", "text", "answer", "before", "after"), answers),
        Table("The blocks: |wanted| and |moved| are of the FFN's output at the subject's last token",
              ("block", "wanted", "moved", "cosine", "attributed", "changed neurons", "|ΔW|/|W|"), blocks),
        Table("The neurons whose values changed most, and the words that these promote",
              ("neuron", "|Δv|/|v|", "coefficient", "attribution rank", "before", "after"), neurons),
        Table("What else changed most", ("kind", "text", "answer", "before", "after"), probes),
    ]  # fmt: skip


def _or(value, form: str) -> str:
    return "-" if value is None else form.format(value)


def _words(words: Sequence[str]) -> str:
    return " ".join(word.strip() or repr(word) for word in words)


def said(lines: Sequence[Mapping]) -> list[str]:
    head, line = lines[0]["settings"], lines[1]
    tokens = "|".join(line["tokens"])
    at = (
        ""
        if line["subject_token"] is None
        else f", written at token {line['subject_token']} ({line['tokens'][line['subject_token']]!r})"
    )
    shifts = [abs(text["after"] - text["before"]) for text in _changed(line)]
    others = f"Of {len(shifts)} probes, the probability of the answer moved by more than .1 in {sum(s > 0.1 for s in shifts)}."
    return [
        f"Edit {head['edit']} of {head['name']} by {head['method']}, made {head['made']}, now {head['now']}: "
        f"{line['prompt']} {line['old'] or '…'} → {line['new']}.",
        f"Tokens: {tokens}{at}.",
        *([others] if shifts else []),
    ]


def figure(lines: Sequence[Mapping]):
    """The likeliest next words before and after; the blocks; what else changed."""
    from .drawing import figure as made
    from .drawing import headline, np

    line, probes = lines[1], _changed(lines[1])[:PROBES]
    drawn = made(3.1 + 0.3 * max(len(probes), 1))
    top, bottom = drawn.add_gridspec(2, 1, height_ratios=(2.6, 0.3 * max(len(probes), 1) + 0.5))
    left, middle, right = top.subgridspec(1, 3).subplots()
    for ax, when in ((left, "before"), (middle, "after")):
        words, shares = map(list, zip(*line["words"][when], strict=True))
        for text in line["asked"]:
            if text["of"] == "prompt" and text.get("which") and not any(_is(word, text["answer"]) for word in words):
                words, shares = [*words, text["answer"]], [*shares, text[when]]
        colours = [
            "#D55E00" if _is(word, line["new"]) else "#0072B2" if _is(word, line["old"]) else "#b0b0b0" for word in words
        ]  # fmt: skip
        ax.barh(range(len(words)), shares, color=colours)
        ax.set_yticks(range(len(words)), [word.strip() or repr(word) for word in words])
        ax.invert_yaxis()
        ax.set(xlim=(0, 1), title=f"next word, {when}", xlabel="probability")
        ax.grid(axis="y", visible=False)
    places = np.arange(len(line["blocks"]))
    for shift, name, colour in ((-0.2, "wanted", "#b0b0b0"), (0.2, "moved", "#009E73")):
        heights = [block[name] or 0 for block in line["blocks"]]
        right.bar(places + shift, heights, 0.4, color=colour, label=name)
    right.set_xticks(places, [str(block["layer"]) for block in line["blocks"]])
    right.set(title="FFN output at the subject, by block", xlabel="block", ylabel="norm")
    right.grid(axis="x", visible=False)
    right.legend(fontsize=8)
    ax = drawn.add_subplot(bottom)
    for place, probe in enumerate(probes):
        ax.plot([probe["before"], probe["after"]], [place, place], color="#b0b0b0", zorder=1)
        ax.scatter([probe["before"]], [place], 26, color="#b0b0b0", zorder=2)
        ax.scatter([probe["after"]], [place], 26, color="#D55E00", zorder=2)
    ax.set_yticks(range(len(probes)), [source.at_most([f"{probe['prompt']} {probe['answer']}"], 60) for probe in probes])
    ax.invert_yaxis()
    ax.set(xlim=(-0.02, 1.02), title="what else changed most (grey: before, orange: after)", xlabel="probability of the answer")
    new = next(text for text in line["asked"] if text["of"] == "prompt" and text["which"] == "new")
    headline(drawn, f"Edit {lines[0]['settings']['edit']}: {line['prompt']} {line['old'] or '…'} → {line['new']}. The new answer's "
                    f"probability: {_percent(new['before'])} → {_percent(new['after'])}")  # fmt: skip
    return drawn


def _is(word: str, answer: str | None) -> bool:
    """Whether a token begins an answer."""
    return bool(answer) and bool(word.strip()) and answer.startswith(word.strip())


ANALYSIS = Analysis(
    "explain",
    "one kept edit, told to a person: where it was written, by which neurons, what else it moved",
    "nmke analyze explain results 17 --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "NMKE attributes the prediction to neurons and writes the update into those alone (Eqs. 2 to 8).",
    "Orange: the new answer, blue: the old one. A block that moved as far as was wanted, and in that direction (cosine 1), "
    "has written "
    "its share. A probe whose dot moved is what the edit cost.",
    lambda args: f"explain-{args.edit}",
)
