"""The shell command `nmke`. The only file that prints: tables on stdout, logs and progress on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .hparams import NMKEHyperParams, read

EXAMPLES = {
    "demo": "nmke demo --edits 50",
    "check": "nmke check hparams/NMKE/llama3-8b.yaml",
    "edit": "nmke edit --hparams atlas --data requests.json --out results --limit 100",
    "report": "nmke report results",
}
COLUMNS = {
    "rel": "Rel",
    "gen": "Gen",
    "loc": "Loc",
    "same_subject": "Same",
    "portability": "Port",
    "general": "General",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it did its work, 1 with a sentence on stderr when it could not, 2 after printing help."""
    parser, verbs = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 2
    if argv in (["check"], ["edit"], ["report"]):
        verbs[argv[0]].print_help()
        return 2
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not args.verbose:
        _quiet_libraries()
    try:
        return args.run(args, Console())
    except (ValueError, FloatingPointError, OSError, ImportError, RuntimeError) as error:
        print(f"nmke {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"nmke {args.verb}: interrupted", file=sys.stderr)
        return 130


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="nmke",
        description="Edit facts in language models, one after the other, with neuron-specific masks (NMKE).",
        epilog="for example:\n" + "\n".join(f"  {line}" for line in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=summary, description=summary, epilog=f"for example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("-v", "--verbose", action="store_true", help="log what happens (stderr)")
        sub.set_defaults(run=run)
        return sub

    demo = verb("demo", _demo, "edit the embedded model with NMKE and with AlphaEdit, and score both after all edits")
    demo.add_argument("--edits", type=_positive, default=200, metavar="T", help="facts to edit (default 200)")
    demo.add_argument("--seed", type=int, default=0, help="which facts (default 0)")
    demo.add_argument("--out", type=Path, metavar="FILE", help="also write the scores, with their protocol, as JSON")
    check = verb("check", _check, "report every problem of hyperparameter files at once")
    check.add_argument("files", nargs="+", metavar="FILE", help="YAML files, or names of those that come with the package")
    edit = verb("edit", _edit, "edit a model with the facts of a ZsRE, CounterFact or KnowEdit file, and score them")
    edit.add_argument(
        "--hparams", required=True, metavar="FILE", help="a YAML file, or the name of one that comes with the package"
    )
    edit.add_argument("--data", required=True, type=Path, metavar="FILE", help="JSON or JSON lines with edit records")
    edit.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go (made if missing)")
    edit.add_argument("--limit", type=_positive, metavar="N", help="only the first N records")
    edit.add_argument("--model", metavar="NAME", help="instead of the file's model_name")
    edit.add_argument("--device", metavar="NAME", help="instead of the file's device")
    report = verb("report", _report, "tables and figures of a comparison's results.jsonl, as one HTML page")
    report.add_argument("folder", type=Path, metavar="DIR", help="where `nmke compare` wrote results.jsonl")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.html and its figures go (default DIR/report)")
    report.add_argument("--markdown", action="store_true", help="only print the table, as Markdown")
    return parser, verbs.choices


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check(args, console: Console) -> int:
    bad = 0
    for name in args.files:
        try:
            read(name)
            console.print(f"{name}: no problems", highlight=False, soft_wrap=True)
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
    return 1 if bad else 0


def _demo(args, console: Console) -> int:
    from . import atlas, metrics
    from .lifelong import LifelongEditor, protocol, run, write_json
    from .prompts import Request

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    requests = [Request.from_dict(record) for record in atlas.requests(args.edits, split="test", seed=args.seed)]
    shown = requests[:5]
    exercises = atlas.exercises()
    settings = NMKEHyperParams.from_hparams("atlas")
    console.print(
        f"Editing {len(requests)} facts of the embedded model, one after the other, with NMKE and with the mask off (AlphaEdit). "
        "All scores are taken after the last edit.\n",
        highlight=False,
    )
    table, answers, results = _score_table(["ms/edit", "Neurons"]), [], {}
    for name, neurons in (("NMKE", settings.neurons), ("AlphaEdit", "all")):
        editor = LifelongEditor.from_hparams(dataclasses.replace(settings, neurons=neurons))
        if not answers:
            answers.append([metrics.greedy_text(editor.model, editor.tok, request.prompt) for request in shown])
            general = _mean(metrics.exact_match(editor.model, editor.tok, exercises))
            table.add_row("unedited", *["-"] * 5, f"{general:.2f}", "-", "-")
            results["unedited"] = {"general": general}
            stamp = protocol(editor, {"requests": f"atlas, test half, seed {args.seed}", "edits": len(requests)})
        editor.state  # noqa: B018  the covariance's own progress bar comes before the one of the edits
        with tqdm(total=len(requests), desc=name, unit="edit") as bar:
            outcome = run(editor, requests, on_edit=lambda done, bar=bar: bar.update(done - bar.n))
        answers.append([metrics.greedy_text(editor.model, editor.tok, request.prompt) for request in shown])
        scores = {**outcome.summary(), "general": _mean(metrics.exact_match(editor.model, editor.tok, exercises))}
        density = _mean([value for report in outcome.reports for value in report.density.values()])
        results[name] = {**scores, "seconds_per_edit": outcome.seconds / len(requests), "density": density}
        table.add_row(name, *_cells(scores), f"{1000 * outcome.seconds / len(requests):.0f}", f"{density:.0%}")
    console.print(_answer_table(shown, answers, ["Before", "NMKE", "AlphaEdit"]))
    console.print(table)
    console.print(_legend(len(requests)), highlight=False, style="dim")
    if args.out:
        write_json(args.out, {"command": f"nmke demo --edits {args.edits} --seed {args.seed}", **stamp, "results": results})
    return 0


def _answer_table(requests, columns, names) -> Table:
    table = Table(title="What the model says", title_justify="left")
    table.add_column("Prompt")
    for name in (names[0], "Wanted", *names[1:]):
        table.add_column(name)
    for request, before, *after in zip(requests, *columns, strict=True):
        cells = [f"[green]{said}" if said == request.target_new else f"[red]{said}" for said in after]
        table.add_row(request.prompt, before, request.target_new, *cells)
    return table


def _score_table(extra: list[str]) -> Table:
    table = Table(title="Scores after all edits", title_justify="left")
    table.add_column("Method")
    for name in (*COLUMNS.values(), *extra):
        table.add_column(name, justify="right")
    return table


def _cells(scores: dict) -> list[str]:
    return ["-" if scores.get(name) is None else f"{scores[name]:.2f}" for name in COLUMNS]


def _legend(edits: int) -> str:
    return (
        "Rel: the new answer to the edited prompt. Gen: to a wording never trained with this subject. Loc: other subjects answer "
        "as before. Same: so do other facts of the edited subject. Port: what follows from the new answer. General: held-out "
        f"exercises, exact. Higher is better. Neurons: the share that an update may touch. T = {edits} edits."
    )


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _edit(args, console: Console) -> int:
    from . import data, lifelong, metrics
    from .arch import ModelView
    from .edit import check_requests

    overrides = {name: value for name, value in (("model_name", args.model), ("device", args.device)) if value is not None}
    settings = dataclasses.replace(read(args.hparams), **overrides)
    dataset = data.load(args.data, args.limit)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder for the results")
    args.out.mkdir(parents=True, exist_ok=True)
    editor = lifelong.LifelongEditor.from_hparams(settings)
    view, templates = ModelView(editor.model), editor.state.flat_templates
    accepted, refused = [], [{"record": refusal.index, "reason": refusal.reason} for refusal in dataset.refused]
    for index, request in zip(dataset.indices, dataset.requests, strict=True):
        try:
            begun = [other for _, other in accepted[len(accepted) // settings.batch_size * settings.batch_size :]]
            check_requests(view, editor.tok, [*begun, request], templates)
            metrics.check(editor.model, editor.tok, [request])
            accepted.append((index, request))
        except ValueError as error:
            refused.append({"record": index, "reason": str(error)})
    if not accepted:
        raise ValueError(f"none of the {len(refused)} records of {args.data} can be edited; the first: {refused[0]['reason']}")
    stamp = lifelong.protocol(editor, {"file": args.data.name, "sha256": dataset.sha256, "format": dataset.format})
    with tqdm(total=len(accepted), desc="editing", unit="edit") as bar:
        outcome = lifelong.run(editor, [r for _, r in accepted], on_edit=lambda done: bar.update(done - bar.n))
    scores = outcome.summary()
    results = [
        {"record": index, "requested_rewrite": request.to_dict(), "pre": pre, "post": post}
        for (index, request), pre, post in zip(accepted, outcome.before, outcome.after, strict=True)
    ]
    lifelong.save_edited(editor, args.out / "edited_weights.safetensors")
    lifelong.write_json(
        args.out / "metrics.json", {"summary": scores, "edits": results, "refused": sorted(refused, key=lambda r: r["record"])}
    )
    lifelong.write_json(args.out / "hparams.json", settings.to_dict())
    lifelong.write_json(
        args.out / "protocol.json", {**stamp, "edits": len(accepted), "refused": len(refused), "seconds": outcome.seconds}
    )
    table = _score_table(["s/edit"])
    table.add_row("unedited", *_cells(metrics.summary(outcome.before, outcome.before)), "-")
    table.add_row(settings.alg_name, *_cells(scores), f"{outcome.seconds / len(accepted):.2f}")
    console.print(table)
    for entry in sorted(refused, key=lambda r: r["record"]):
        console.print(f"refused record {entry['record']}: {entry['reason']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(accepted)} edits, {len(refused)} records refused; results in {args.out}", highlight=False, soft_wrap=True)
    return 0


def _report(args, console: Console) -> int:
    from . import report
    from .page import write

    lines, notes = report.read(args.folder)
    last = report.shared_checkpoint(lines)
    if args.markdown:
        print(report.markdown(lines, last))
        return 0
    headings, body = report.rows(lines, last)
    table = Table(title=f"Scores after {report.count(last, 'edit')}", title_justify="left", box=SIMPLE, padding=0)
    table.add_column("Method", overflow="fold")
    for heading in headings:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    styles = {"best": "bold green", "close": "green", "": ""}
    for label, cells in body:
        table.add_row(Text(label), *(Text(text.replace(" ± ", "\n±"), styles[mark]) for text, mark in cells))
    console.print(table)
    for sentence in [report.caption(lines, last), *report.headline(lines, last), *notes, *report.gaps(lines)]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Report: {write(lines, notes, args.out or args.folder / 'report')}", highlight=False, markup=False, soft_wrap=True
    )
    return 0
