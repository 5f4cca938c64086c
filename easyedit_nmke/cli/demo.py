"""`nmke demo`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .verb import Verb, cells, positive, quiet_libraries, score_table


def _arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--edits", type=positive, default=200, metavar="T", help="facts to edit (default 200)")
    demo.add_argument("--seed", type=int, default=0, help="which facts (default 0)")
    demo.add_argument("--out", type=Path, metavar="FILE", help="also write the scores, with their protocol, as JSON")


def _demo(args, console: Console) -> int:
    from .. import atlas
    from ..editor import LifelongEditor
    from ..experiments.protocol import Scorer, Segment, stamp
    from ..files import write_json
    from ..methods.nmke import NMKEHyperParams
    from ..models.requests import Request
    from ..scores.table import in_shell

    quiet_libraries(args)

    requests = [Request.from_dict(record) for record in atlas.requests(args.edits, split="test", seed=args.seed)]
    settings = NMKEHyperParams.from_hparams("atlas")
    console.print(
        f"Editing {len(requests)} facts of the embedded model, one after the other, with NMKE and with the mask off (AlphaEdit). "
        "All scores are taken after the last edit.\n",
        highlight=False,
    )
    headings = in_shell()
    table, answers, results = score_table(headings, ["ms/edit", "Neurons"]), [], {}
    table.padding = (0, 1, 0, 0)  # 80 columns hold it
    for name, neurons in (("NMKE", settings.neurons), ("AlphaEdit", "all")):
        editor = LifelongEditor.from_hparams(dataclasses.replace(settings, neurons=neurons))
        model, tok = editor.model, editor.tok
        scorer = Scorer(model, tok, requests, atlas.exercises(), text=atlas.text())
        if not answers:
            answers.append(_answers(model, tok, requests[:5]))
            results["unedited"] = {"general": scorer.unedited(model, tok)["general"]}
            table.add_row("unedited", *cells(headings, results["unedited"]), "-", "-")
            mark = stamp(editor, {"name": "atlas, test half", "seed": args.seed, "edits": len(requests)})
        editor.open()  # the covariance's own progress bar comes before the one of the edits
        (line,) = _with_bar(Segment(editor, scorer, name, args.seed, mark).run([len(requests)]), len(requests), name)
        answers.append(_answers(model, tok, requests[:5]))
        density = fmean(line["mask"]["density"].values())
        each = line["seconds"]["total"] / len(requests)
        results[name] = {**line["scores"], "seconds_per_edit": each, "density": density}
        table.add_row(name, *cells(headings, line["scores"]), f"{1000 * each:.0f}", f"{density:.0%}")
    console.print(_answer_table(requests[:5], answers, ["Before", "NMKE", "AlphaEdit"]))
    console.print(table)
    console.print(_legend(len(requests)), highlight=False, style="dim")
    if args.out:
        write_json(args.out, {"command": f"nmke demo --edits {args.edits} --seed {args.seed}", **mark, "results": results})
    return 0


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
        said = [Text(verdict.answer, "green" if verdict.exact else "red") for verdict in after]
        table.add_row(Text(request.prompt), Text(before.answer), Text(request.target_new), *said)
    return table


def _legend(edits: int) -> str:
    return (
        "Rel: the new answer to the edited prompt. Gen: to a wording never trained with this subject. Loc: other subjects answer "
        "as before. Same: so do other facts of the edited subject. Port: what follows from the new answer. General: held-out "
        f"exercises, exact. Higher is better. Neurons: the share that an update may touch. T = {edits} edits."
    )


VERB = Verb(
    "demo",
    "edit the embedded model with NMKE and with AlphaEdit, and score both after all edits",
    "nmke demo --edits 50",
    _demo,
    _arguments,
)
