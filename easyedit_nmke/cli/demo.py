"""`nmke demo`."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .verb import Verb, cells, check_file, positive, print_scores, quiet_libraries

if TYPE_CHECKING:
    from ..hparams import HyperParams
    from ..models.requests import Request

EMBEDDED = "atlas"
LONGEST_ANSWER = 24  # characters shown


@dataclasses.dataclass(frozen=True)
class _Bed:
    """What is edited, by which methods, and how the results are told. data: named in the file of results; exercises: of general
    ability; shown: so many answers; extra: scores by name that the table shows besides, with their headings; told: what the file of
    results says in place of some settings."""

    data: str
    requests: Sequence[Request]
    methods: Mapping[str, HyperParams]
    exercises: Sequence[tuple[str, str]]
    intro: str
    legend: str
    shown: int
    text: str | None = None  # on which the edited model is compared with the unedited one; None: the package's own
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)
    told: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--model", default=EMBEDDED, metavar="NAME",
        help="a model with files for NMKE and AlphaEdit, such as smollm2; what it knows of the real world is edited "
        "(default: the embedded model)",
    )  # fmt: skip
    demo.add_argument("--edits", type=positive, metavar="T", help="facts to edit (default 200, of a model with a name 20)")
    demo.add_argument("--seed", type=int, default=0, help="which facts (default 0)")
    demo.add_argument("--out", type=Path, metavar="FILE", help="also write the scores, with their protocol, as JSON")


def _demo(args, console: Console) -> int:
    from ..bench.machine import surroundings
    from ..editor import LifelongEditor
    from ..experiments.protocol import Scorer, Segment, stamp
    from ..files import write_json
    from ..scores.table import in_shell

    quiet_libraries(args)
    check_file(args.out)
    with tempfile.TemporaryDirectory() as folder:
        bed = _embedded(args) if args.model == EMBEDDED else _named(args, Path(folder))
        shown, count = bed.requests[: bed.shown], len(bed.requests)
        scorer, answers, results = None, [], {}
        for name, settings in bed.methods.items():
            editor = LifelongEditor.from_hparams(settings)
            model, tok = editor.model, editor.tok
            if scorer is None:
                console.print(bed.intro, highlight=False)
                scorer = Scorer(model, tok, bed.requests, bed.exercises, text=bed.text)
                if bed.exercises:
                    results["unedited"] = {"general": scorer.unedited(model, tok)["general"]}
                answers.append(_answers(model, tok, shown))
                mark = stamp(editor, {"name": bed.data, "seed": args.seed, "edits": count}, args.command)
            editor.open()  # the covariance's own progress bar comes before the one of the edits
            (line,) = _with_bar(Segment(editor, scorer, name, args.seed, mark).run([count]), count, name)
            answers.append(_answers(model, tok, shown))
            cost = {"seconds_per_edit": line["seconds"]["total"] / count, "density": fmean(line["mask"]["density"].values())}
            results[name] = {**line["scores"], **cost}
            editor = model = None  # let go of before the next one is loaded
    names = list(bed.methods)
    console.print(_answer_table(shown, answers, ["Before", *names]))
    _print({**in_shell(), **bed.extra}, results, console)
    console.print(bed.legend, highlight=False, style="dim")
    if args.out:
        settings = {name: {**settings.to_dict(), **bed.told} for name, settings in bed.methods.items()}
        write_json(args.out, {**mark, "hparams": settings, "hardware": surroundings()["hardware"], "results": results})
    return 0


# ---- what is edited


def _embedded(args) -> _Bed:
    from .. import atlas
    from ..methods.nmke import NMKEHyperParams
    from ..models.requests import Request

    requests = [Request.from_dict(record) for record in atlas.requests(args.edits or 200, split="test", seed=args.seed)]
    settings = NMKEHyperParams.from_hparams(EMBEDDED)
    return _Bed(
        "atlas, test half",
        requests,
        {"NMKE": settings, "AlphaEdit": dataclasses.replace(settings, neurons="all")},
        atlas.exercises(),
        f"Editing {len(requests)} facts of the embedded model, one after the other, with NMKE and with the mask off (AlphaEdit). "
        "All scores are taken after the last edit.\n",
        "Rel: the new answer to the edited prompt. Gen: to a wording never trained with this subject. Loc: other subjects answer "
        "as before. Same: so do other facts of the edited subject. Port: what follows from the new answer. General: held-out "
        "exercises, exact. Higher is better. KL: how far the model has moved on other text, nats a token; lower is better. "
        f"Neurons: the share that an update may touch. T = {len(requests)} edits.",
        shown=5,
        text=atlas.text(),
    )


def _named(args, folder: Path) -> _Bed:
    """Facts of the real world. ValueError for a model without files. The text for the covariance of keys is written to `folder`."""
    from .. import facts
    from ..hparams import shipped
    from ..messages import did_you_mean
    from ..methods import read
    from ..models.requests import Request

    known = [name for name in shipped("NMKE") if name in shipped("AlphaEdit")]
    if args.model not in known:
        hint = did_you_mean(args.model, known)
        raise ValueError(
            f"no files for NMKE and AlphaEdit come with the package for {args.model!r}{hint}; known: {', '.join(known)}"
        )
    requests = [Request.from_dict(record) for record in facts.requests(args.edits or 20, split="test", seed=args.seed)]
    probes = [prompt for request in requests for pairs in request.locality.values() for prompt, _ in pairs]
    asked = {*probes, *(prompt for request in requests for prompt in (request.prompt, *request.rephrase_prompts))}
    sentences = facts.texts(without=asked)
    text = folder / "facts.txt"
    text.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    here = {"mom2_dataset": str(text), "mom2_n_samples": len(sentences)}
    methods = {name: dataclasses.replace(read(f"{name}/{args.model}"), **here) for name in ("NMKE", "AlphaEdit")}
    return _Bed(
        "facts, test half",
        requests,
        methods,
        (),
        f"Editing {len(requests)} well-known facts in {args.model}, one after the other, with NMKE and with AlphaEdit. "
        "All scores are taken after the last edit.\n",
        "Answers are generated freely: green is the new answer, yellow holds it among other words, red does not. Rel: share of the "
        "new answer's tokens right after the edited prompt. Gen: after another wording. Rel says, Gen says: the free answer holds "
        "the new one. Loc: other subjects answer as before. Same: so do other facts of the edited subject. Higher is better. "
        "KL: how far the model has moved on other text, nats a token; lower is better. "
        f"Neurons: the share that an update may touch. T = {len(requests)} edits. To save time the covariance of keys is taken "
        f"over {len(sentences)} sentences about other facts (none that is asked for here), not over a large text.",
        shown=10,
        extra={"rel_contains": "Rel says", "gen_contains": "Gen says"},
        told={"mom2_dataset": "facts.texts(without=asked)"},
    )


# ---- how it is told


def _answers(model, tok, requests) -> list:
    """The judge's verdicts."""
    from ..scores import generation

    return generation.judge(model, tok, [(request.prompt, request.target_new) for request in requests])


def _with_bar(events, total: int, name: str) -> list[dict]:
    """The result lines among a segment's events; the others move a progress bar."""
    from ..experiments.protocol import Progress

    lines = []
    with tqdm(total=total, desc=name, unit="edit") as bar:
        for event in events:
            bar.update(event.more) if isinstance(event, Progress) else lines.append(event.line)
    return lines


def _answer_table(requests, columns, names) -> Table:
    table = Table(title="What the model says", title_justify="left")
    table.add_column("Prompt")
    for name in (names[0], "Wanted", *names[1:]):
        table.add_column(name)
    for request, before, *after in zip(requests, *columns, strict=True):
        said = [Text(_cut(verdict.answer), _colour(verdict)) for verdict in after]
        table.add_row(Text(request.prompt), Text(_cut(before.answer)), Text(request.target_new), *said)
    return table


def _colour(verdict) -> str:
    return "green" if verdict.exact else "yellow" if verdict.contains else "red"


def _cut(answer: str) -> str:
    return answer if len(answer) <= LONGEST_ANSWER else answer[: LONGEST_ANSWER - 1].rstrip() + "…"


def _print(headings: Mapping[str, str], results: Mapping[str, Mapping], console: Console) -> None:
    """Scores, without the columns that nothing has."""
    headings = {name: short for name, short in headings.items() if any(row.get(name) is not None for row in results.values())}
    slow, rows = any(row.get("seconds_per_edit", 0) >= 1 for row in results.values()), []
    for name, scores in results.items():
        each, density = scores.get("seconds_per_edit"), scores.get("density")
        time = "-" if each is None else f"{each:.1f}" if slow else f"{1000 * each:.0f}"
        rows.append([name, *cells(headings, scores), time, "-" if density is None else f"{density:.0%}"])
    print_scores(["Method", *headings.values(), "s/edit" if slow else "ms/edit", "Neurons"], rows, console)


VERB = Verb(
    "demo",
    "edit the embedded model, or one of your choice, with NMKE and with AlphaEdit, and score both after all edits",
    "nmke demo --edits 50",
    _demo,
    _arguments,
)
