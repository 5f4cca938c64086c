"""Causal tracing: where in the model a fact about the subject is looked up, token by token and block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import source
from .record import Analysis, Table

PLACES = ("first subject token", "middle of the subject", "last subject token", "next token", "further tokens", "last token")
PARTS = {"state": "the block's output", "ffn": "FFN outputs"}


def arguments(sub) -> None:
    source.model_arguments(sub)
    sub.add_argument("--prompt", metavar="TEXT", help="one prompt in place of facts; with --subject")
    sub.add_argument("--subject", metavar="TEXT", help="the words of the prompt that are noised")
    source.data_arguments(sub, 10, "that the model knows")
    sub.add_argument("--draws", type=source.positive, default=3, metavar="N", help="of noise (default 3)")
    sub.add_argument("--window", type=source.positive, metavar="N", help="blocks whose FFNs go back together (default a fifth)")
    sub.add_argument("--hparams", metavar="FILE", help="mark the blocks that this file of settings edits, as `nmke tune` wrote it")
    source.seed_argument(sub, "the noise, and of which facts")


def run(args, begin) -> None:
    from tqdm import tqdm

    from ...methods import read
    from ...models.arch import ModelView
    from ...scores.tracing import subject_noise, trace

    if (args.prompt is None) != (args.subject is None):
        raise ValueError("--prompt and --subject go together; give both, or neither")
    model, tok = source.load(args)
    view = ModelView(model)
    window, marked = args.window or max(1, view.depth // 5), list(read(args.hparams).layers) if args.hparams else []
    view.check_layers(marked)
    asked = _asked(args, view, tok)
    noise = subject_noise(view, [ids[place.start : place.stop] for _, ids, place in asked])
    settings = {
        "prompts": [prompt for prompt, *_ in asked], "draws": args.draws, "window": window, "seed": args.seed, "noise": noise,
    }  # fmt: skip
    notebook = begin(settings | {"name": source.name(args), "depth": view.depth, "marked": marked}, model)
    for number, (prompt, ids, subject) in enumerate(tqdm(asked, desc="tracing", unit="prompt")):

        def traced(prompt=prompt, ids=ids, subject=subject, number=number) -> dict:
            found = trace(view, ids, subject, noise, args.draws, args.seed + number, window)
            return {
                "prompt": prompt, "tokens": [tok.decode([i]) for i in ids], "subject": [subject.start, subject.stop],
                "answer": tok.decode([found.answer]), "clean": found.clean, "noised": found.noised.tolist(),
                **{part: [rounded(getattr(found, part)[:, t]) for t in range(len(ids))] for part in PARTS},
            }  # fmt: skip

        notebook.once(number, make=traced)


def rounded(values) -> list[list[float]]:
    """[draws, blocks] to four digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def _asked(args, view, tok) -> list[tuple[str, list[int], range]]:
    """(prompt, its ids, where in them the subject is): the one prompt, or the first facts that the model knows."""
    if args.prompt:
        return [_placed(tok, args.prompt, args.subject)]
    found = source.requests(args.data, source.model_of(args), None, args.seed)
    known = _known(view, tok, [request for request in found if request.ground_truth], args.facts)
    if len(known) < args.facts:
        raise ValueError(
            f"of {len(found)} facts the model knows {len(known)}, {args.facts} were asked for; ask for fewer (--facts)"
        )
    return [_placed(tok, request.prompt, request.subject) for request in known]


def _known(view, tok, requests: Sequence, count: int) -> list:
    """The first `count` whose old answer begins with the model's own next token."""
    from ...models.passes import chunks
    from ...scores.metrics import predicted_tokens

    known: list = []
    for some in chunks(requests, 64):
        said = predicted_tokens(view.model, tok, [(request.prompt, request.ground_truth) for request in some])
        known += [request for request, (guess, label) in zip(some, said, strict=True) if guess[0] == label[0]]
        if len(known) >= count:
            break
    return known[:count]


def _placed(tok, prompt: str, subject: str) -> tuple[str, list[int], range]:
    from ...models.prompts import open_end, tokenised
    from ...models.subjects import find_subject

    text, (start, end) = open_end(prompt, None, tok)[0], find_subject(prompt, subject)
    found = tokenised(tok, text, end)
    front = len(text[:start].rstrip())  # a space in front may be the subject's first token's
    before = tokenised(tok, text, front).subject + 1 if front else found.subject + 1 - _tokens(tok, text, end)
    return text, found.ids, range(min(before, found.subject), found.subject + 1)


def _tokens(tok, text: str, end: int) -> int:
    """How many tokens of the text's beginning hold its first `end` characters: special ones in front are none of them."""
    return len(tok(text[:end], add_special_tokens=False)["input_ids"])


# ---- what the lines hold


def _effects(lines: Sequence[Mapping], part: str):
    """Mean over draws of p(put back) - p(noised): [prompts][T, L]."""
    import numpy as np

    found = []
    for line in lines[1:]:
        values = np.asarray(line[part])  # [T, R, L]
        found.append((values - np.asarray(line["noised"])[None, :, None]).mean(1))
    return found


def _by_place(lines: Sequence[Mapping], part: str):
    """Mean effect over the tokens of each place, then over prompts: (mean [places, L], its standard error)."""
    import numpy as np

    rows = []
    for line, effect in zip(lines[1:], _effects(lines, part), strict=True):
        start, stop = line["subject"]
        last = len(effect) - 1
        groups = ([start] if stop - start > 1 else [], range(start + 1, stop - 1), [stop - 1], [stop] if stop < last else [],
                  range(stop + 1, last), [last] if last >= stop else [])  # fmt: skip
        rows.append([effect[list(group)].mean(0) if len(group) else np.full(effect.shape[1], np.nan) for group in groups])
    rows = np.asarray(rows)
    counts = (~np.isnan(rows)).sum(0)
    total = np.where(counts > 0, np.nansum(rows, 0) / np.maximum(counts, 1), np.nan)
    error = np.sqrt(np.nansum((rows - total) ** 2, 0) / np.maximum(counts - 1, 1) / np.maximum(counts, 1))
    return total, np.where(counts > 1, error, np.nan)


def tables(lines: Sequence[Mapping]) -> list[Table]:
    head = lines[0]["settings"]
    rows = []
    for part, what in PARTS.items():
        mean, error = _by_place(lines, part)
        for place, values, errors in zip(PLACES, mean, error, strict=True):
            if (values == values).all():
                best = int(values.argmax())
                spread = f" ± {errors[best]:.3f}" if errors[best] == errors[best] else ""
                rows.append((what, place, f"{values[best]:+.3f}{spread}", str(best), f"{values.mean():+.3f}"))
    title = f"What brings the answer back, {head['name']}"
    return [Table(title, ("put back", "token", "largest effect", "in block", "mean over blocks"), rows)]


def said(lines: Sequence[Mapping]) -> list[str]:
    head, prompts = lines[0]["settings"], lines[1:]
    clean = sum(line["clean"] for line in prompts) / len(prompts)
    noised = sum(sum(line["noised"]) / len(line["noised"]) for line in prompts) / len(prompts)
    mean, _ = _by_place(lines, "ffn")
    best = int(mean[2].argmax())
    text = [
        f"{head['name']}, {len(prompts)} prompts, {head['draws']} draws of noise: the answer's probability is {clean:.2f}, "
        f"and {noised:.2f} with the subject noised.",
        f"At the last subject token the FFNs around block {best} bring back most ({mean[2][best]:+.3f}).",
    ]
    if head["marked"]:
        inside = [mean[2][layer] for layer in head["marked"]]
        text.append(
            f"The edited blocks {head['marked'][0]} to {head['marked'][-1]} bring back {sum(inside) / len(inside):+.3f} on "
            f"average, "
            f"all blocks {mean[2].mean():+.3f}."
        )
    return text


def _where(lines: Sequence[Mapping]) -> str:
    """From which block on the answer has left the subject."""
    state = _by_place(lines, "state")[0]
    passed = (state[-1] > state[2]).tolist()
    if all(passed) or not any(passed):
        return f"the answer comes back at the {'last token' if all(passed) else 'last subject token'} in all blocks"
    return f"the answer comes back at the last subject token in early blocks, at the last token from block {passed.index(True)} on"


def figure(lines: Sequence[Mapping]):
    """A panel for each kind of state: tokens (of one prompt), or places (of several), by block."""
    from .drawing import figure as made
    from .drawing import headline, heat, np

    head, single = lines[0]["settings"], len(lines) == 2
    values = {part: _effects(lines, part)[0] if single else _by_place(lines, part)[0] for part in PARTS}
    if single:
        start, stop = lines[1]["subject"]
        names = [f"{text}*" if start <= i < stop else text for i, text in enumerate(map(str.strip, lines[1]["tokens"]))]
        shown = list(range(len(names)))
    else:
        names, shown = list(PLACES), [i for i in range(len(PLACES)) if not np.isnan(values["state"][i]).all()]
    drawn = made(0.28 * len(shown) + 1.9)
    for ax, (part, what), colour in zip(drawn.subplots(1, 2, sharey=True), PARTS.items(), ("Purples", "Greens"), strict=True):
        image = heat(ax, values[part][shown], [names[i] for i in shown], list(map(str, range(head["depth"]))),
                     cmap=colour, low=0, high=np.nanmax(values[part][shown]), every=max(1, head["depth"] // 10))  # fmt: skip
        together = f", {head['window']} blocks together" if part == "ffn" and head["window"] > 1 else ""
        ax.set(title=f"put back: {what}{together}", xlabel="block")
        drawn.colorbar(image, ax=ax, shrink=0.9, pad=0.01)
        for first in (layer for layer in head["marked"] if layer - 1 not in head["marked"]):
            run = next(i for i in range(1, head["depth"] + 1) if first + i not in head["marked"])
            ax.add_patch(_box(first, run, len(shown)))
    edited = " (framed: the edited blocks)" if head["marked"] else ""
    of = f"{lines[1]['prompt']!r} → {lines[1]['answer']!r}" if single else f"{len(lines) - 1} facts"
    headline(drawn, f"{head['name']}, {of}: {_where(lines)}{edited}")
    return drawn


def _box(layer: int, width: int, height: int):
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.5, -0.5), width, height, fill=False, edgecolor="#D55E00", linewidth=1.2)


ANALYSIS = Analysis(
    "trace",
    "causal tracing: which token and block hold what the answer needs",
    "nmke analyze trace --model smollm2 --out results",
    run,
    figure,
    arguments,
    tables,
    said,
    "Locate-then-edit methods, NMKE among them, edit the FFNs of early and middle blocks at the subject's last token, because "
    "causal "
    "tracing (ROME) finds facts there.",
    "The subject's embeddings are noised, which loses the answer; then one state of the clean run is put back. Dark: that state "
    "alone brings the answer back. * marks the subject's tokens. What is dark late at the last token is only passed on; what is "
    "dark early at the last subject token is where the fact is read.",
)
