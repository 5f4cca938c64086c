"""The shell command `nmke`. The only file that prints: tables on stdout, logs and progress on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ..hparams import NMKEHyperParams, read
from . import doctor

EXAMPLES = {
    "demo": "nmke demo --edits 50",
    "check": "nmke check hparams/NMKE/llama3-8b.yaml",
    "run": "nmke run --hparams atlas --data requests.json --out results --edits 100",
    "compare": "nmke compare --model atlas --edits 400 --checkpoints 1,100,400 --seeds 3 --jobs 2 --out results",
    "report": "nmke report results",
    "log": "nmke log results",
    "undo": "nmke undo results 17",
    "rollback": "nmke rollback results 100",
    "export": "nmke export results --to lora --rank 64",
    "bench": "nmke bench --shape small --edits 3 --at 1,500 --out bench.json",
    "doctor": doctor.EXAMPLE,
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
    if argv in (["check"], ["run"], ["report"], ["log"], ["undo"], ["rollback"], ["export"]):
        verbs[argv[0]].print_help()
        return 2
    args = parser.parse_args(argv)
    args.command = "nmke " + shlex.join(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not args.verbose and args.verb != "doctor":  # which works without them
        _quiet_libraries()
    try:
        return args.run(args, Console())
    except (ValueError, FloatingPointError, OSError, ImportError, RuntimeError) as error:
        print(f"nmke {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "; the same command goes on from there" if args.verb in ("run", "compare") else ""
        print(f"nmke {args.verb}: interrupted{more}", file=sys.stderr)
        return 130


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="nmke",
        description="Edit facts in language models, one after the other, with neuron-specific masks (NMKE).",
        epilog="for example:\n" + "\n".join(f"  {line}" for line in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=doctor.version_line())
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
    run = verb("run", _run, "edit a model with the facts of a file, one after the other, and score all of them at checkpoints")
    run.add_argument("--hparams", required=True, metavar="FILE", help="a YAML file, or the name of one that comes with the package")
    run.add_argument(
        "--data", required=True, metavar="FILE", help="ZsRE, CounterFact or KnowEdit records (JSON, JSON lines); or atlas"
    )
    run.add_argument("--edits", type=_positive, metavar="N", help="only the first N records that can be edited")
    run.add_argument("--model", metavar="NAME", help="instead of the file's model_name")
    run.add_argument("--seed", type=int, default=0, help="order of the records (default 0: the file's)")
    compare = verb("compare", _compare, "edit and score the same facts with several methods")
    compare.add_argument("--model", default="atlas", metavar="NAME", help="which file of each method's hparams (default atlas)")
    compare.add_argument("--methods", metavar="LIST", help="for example NMKE,NMKE+,AlphaEdit[L2=10],easyedit:WISE")
    compare.add_argument("--ablation", metavar="SET", help="a named set of NMKE's settings in place of --methods")
    compare.add_argument("--base", metavar="METHOD", help="what an ablation changes (default NMKE)")
    compare.add_argument("--hparams-dir", type=Path, metavar="DIR", help="<method>/<model>.yaml (default: the package's own)")
    compare.add_argument("--model-path", metavar="PATH", help="instead of the files' model_name")
    compare.add_argument("--data", default="atlas", metavar="FILE", help="records to edit (default: the embedded model's facts)")
    compare.add_argument("--edits", type=_positive, default=200, metavar="T", help="facts to edit (default 200)")
    compare.add_argument("--seeds", type=_positive, default=1, metavar="N", help="streams of facts (default 1)")
    compare.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    for sub in (run, compare):
        sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go (made if missing)")
        sub.add_argument("--checkpoints", type=_numbers, metavar="LIST", help="score after so many edits, 1,100,400 (default: all)")
        sub.add_argument("--device", metavar="NAME", help="instead of the file's device")
        sub.add_argument("--dtype", metavar="NAME", help="instead of the file's dtype: float32, bfloat16, float16, auto")
        sub.add_argument("--harness", metavar="TASKS", help="also score with these tasks of the LM Evaluation Harness")
        sub.add_argument("--harness-tasks", type=Path, metavar="DIR", help="a folder of your own task files")
        sub.add_argument("--harness-limit", type=_positive, metavar="N", help="only N items of each task")
        sub.add_argument("--harness-allow-code", action="store_true", help="let tasks run the code that the model writes")
    report = verb("report", _report, "tables and figures of a comparison's results.jsonl, as one HTML page")
    report.add_argument("folder", type=Path, metavar="DIR", help="where `nmke compare` wrote results.jsonl")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.html and its figures go (default DIR/report)")
    report.add_argument("--markdown", action="store_true", help="only print the table, as Markdown")
    _add_kept(verb)
    bench = verb("bench", _bench, "time and memory of an edit: this package, the plain equations and EasyEdit, side by side")
    bench.add_argument("--shape", metavar="NAME", help="llama3-8b, qwen2.5-7b, gpt2-xl, small or atlas (default atlas)")
    bench.add_argument("--part", metavar="PART", help="only this step, one layer: solve or attribution (default shape llama3-8b)")
    bench.add_argument("--edits", type=_positive, default=3, metavar="N", help="repetitions of each measurement (default 3)")
    bench.add_argument("--at", type=_numbers, metavar="LIST", help="with so many past edits (default 1,500; solve: 100,2000)")
    bench.add_argument("--layers", type=_positive, metavar="N", help="a model of only so many blocks, where memory is short")
    bench.add_argument("--neurons", type=_positive, metavar="N", help="of --part attribution (default 1024, on a GPU all)")
    bench.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    bench.add_argument("--dtype", default="float32", metavar="NAME", help="of the weights: float32 (default), bfloat16, float16")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    verb("doctor", doctor.run, doctor.SUMMARY)
    return parser, verbs.choices


def _add_kept(verb) -> None:
    """The verbs for a state that `nmke run` left."""
    log = verb("log", _log, "list the edits that are kept in a folder: what was asked, when, and whether it still counts")
    undo = verb("undo", _undo, "take one edit out, wherever it lies; the others stay")
    rollback = verb("rollback", _rollback, "take all edits after one out, as if they had never been")
    export = verb("export", _export, "write the edited model for others: a checkpoint, a delta, or a LoRA adapter")
    for sub in (log, undo, rollback, export):
        sub.add_argument("folder", type=Path, metavar="DIR", help="where `nmke run` keeps its edits, or a state_dir")
        sub.add_argument("--model", metavar="NAME", help="where the base model lies now, if it was moved")
        sub.add_argument("--device", metavar="NAME", help="instead of the one that the edits were made on")
    log.add_argument("--check", action="store_true", help="also load the model and ask it")
    undo.add_argument("edit", type=_positive, metavar="ID", help="its number in `nmke log`")
    undo.add_argument("--resolve", action="store_true", help="solve the later edits again without it (loads the model)")
    rollback.add_argument("to", type=int, metavar="ID", help="the last edit that stays, 0 for none")
    export.add_argument("--to", required=True, choices=("model", "delta", "lora"), help="a whole checkpoint, factors, an adapter")
    export.add_argument("--rank", type=_positive, metavar="R", help="of the adapter (default: that of all edits together)")
    export.add_argument("--out", type=Path, metavar="PATH", help="where it goes, a new folder (default DIR/model, delta or lora)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part.strip()) for part in text.split(",")}))


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
    from .. import atlas
    from ..editor import LifelongEditor
    from ..experiments.protocol import Scorer, Segment, stamp, write_json
    from ..models.prompts import Request

    requests = [Request.from_dict(record) for record in atlas.requests(args.edits, split="test", seed=args.seed)]
    settings = NMKEHyperParams.from_hparams("atlas")
    console.print(
        f"Editing {len(requests)} facts of the embedded model, one after the other, with NMKE and with the mask off (AlphaEdit). "
        "All scores are taken after the last edit.\n",
        highlight=False,
    )
    table, answers, results = _score_table(["ms/edit", "Neurons"]), [], {}
    for name, neurons in (("NMKE", settings.neurons), ("AlphaEdit", "all")):
        editor = LifelongEditor.from_hparams(dataclasses.replace(settings, neurons=neurons))
        model, tok = editor.model, editor.tok
        scorer = Scorer(model, tok, requests, atlas.exercises())
        if not answers:
            answers.append(_answers(model, tok, requests[:5]))
            results["unedited"] = {"general": scorer.unedited(model, tok)["general"]}
            table.add_row("unedited", *_cells(results["unedited"]), "-", "-")
            mark = stamp(editor, {"name": "atlas, test half", "seed": args.seed, "edits": len(requests)})
        editor.state  # noqa: B018  the covariance's own progress bar comes before the one of the edits
        (line,) = _with_bar(Segment(editor, scorer, name, args.seed, mark).run([len(requests)]), len(requests), name)
        answers.append(_answers(model, tok, requests[:5]))
        density = _mean(line["mask"]["density"].values())
        each = line["seconds"]["total"] / len(requests)
        results[name] = {**line["scores"], "seconds_per_edit": each, "density": density}
        table.add_row(name, *_cells(line["scores"]), f"{1000 * each:.0f}", f"{density:.0%}")
    console.print(_answer_table(requests[:5], answers, ["Before", "NMKE", "AlphaEdit"]))
    console.print(table)
    console.print(_legend(len(requests)), highlight=False, style="dim")
    if args.out:
        write_json(args.out, {"command": f"nmke demo --edits {args.edits} --seed {args.seed}", **mark, "results": results})
    return 0


def _answers(model, tok, requests) -> list[str]:
    from ..scores import generation

    return [generation.answer(text) for text in generation.greedy_texts(model, tok, [request.prompt for request in requests])]


def _with_bar(events, total: int, name: str) -> list[dict]:
    """The result lines among a segment's events; the others move a progress bar."""
    with tqdm(total=total, desc=name, unit="edit") as bar:
        lines = []
        for event in events:
            lines.append(event) if isinstance(event, dict) else bar.update(event - bar.n)
        return lines


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


def _run(args, console: Console) -> int:
    from ..experiments import compare

    tasks = _tasks(args)
    overrides = _overrides(args, args.model)
    settings = compare.changed(read(args.hparams), overrides)
    if settings.alg_name != "FT":
        settings.state_dir = str(compare.state_directory(args.out, settings.alg_name, args.seed))
    editor = compare.LifelongEditor.from_hparams(settings)
    try:
        stream = compare.stream(editor, args.data, args.edits, args.seed)
        method = compare.Method(settings.alg_name, settings, loaded=editor)
        lines = _compared(args, tasks, [method], len(stream.requests), (args.seed,), keep_weights=True)
    finally:
        editor.close()
    table = _score_table(["s/edit"])
    for line in lines:
        edits = line["checkpoint"]
        seconds = f"{line['seconds']['total'] / edits:.2f}" if edits else "-"
        table.add_row(f"{line['method']}, {edits} edits" if edits else "unedited", *_cells(line["scores"]), seconds)
    console.print(table)
    for refusal in stream.refused:
        console.print(f"refused {refusal}", highlight=False, markup=False, soft_wrap=True)
    done = f"{len(stream.requests)} edits, {len(stream.refused)} records refused; results in {args.out}"
    console.print(done, highlight=False, soft_wrap=True)
    return 0


def _compare(args, console: Console) -> int:
    from ..experiments import compare

    tasks = _tasks(args)
    overrides = _overrides(args, args.model_path)
    if args.ablation:
        (base,) = compare.methods(args.base or "NMKE", args.model, args.hparams_dir, overrides)
        methods = compare.ablation(args.ablation, base.settings)
    else:
        methods = compare.methods(args.methods or ", ".join(compare.METHODS), args.model, args.hparams_dir, overrides)
    lines = _compared(args, tasks, methods, args.edits, tuple(range(args.seeds)))
    try:
        _comparison(lines, [], console)
    except ImportError as error:
        console.print(f"results in {args.out}; {error}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _overrides(args, model: str | None) -> dict[str, str]:
    """What the command line says of the model in place of the files."""
    given = {"model_name": model, "device": args.device, "dtype": args.dtype}
    return {name: value for name, value in given.items() if value is not None}


def _tasks(args) -> tuple[str, ...]:
    """The harness' tasks; an error before any model is loaded when they, or the folder for the results, cannot be used."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder for the results")
    tasks = tuple(name.strip() for name in (args.harness or "").split(",") if name.strip())
    if tasks:
        from ..scores import harness

        harness.check_tasks(tasks, args.harness_tasks, args.harness_allow_code)
    return tasks


def _compared(args, tasks, methods, edits: int, seeds: tuple[int, ...], keep_weights: bool = False) -> list[dict]:
    """Run a comparison under a progress bar; its lines."""
    from ..experiments import compare

    plan = compare.Plan(
        tuple(methods), args.data, edits, args.checkpoints or (edits,), seeds, args.out, tasks=tasks,
        task_folder=args.harness_tasks, task_limit=args.harness_limit, allow_code=args.harness_allow_code,
        command=args.command, keep_weights=keep_weights,
    )  # fmt: skip
    total = len(methods) * len(seeds) * edits
    with tqdm(total=total, desc="editing", unit="edit", smoothing=0.02) as bar, _asked_to_stop() as asked:

        def on_edit(more: int) -> None:
            bar.update(more)
            if asked:
                raise KeyboardInterrupt

        def on_line(line) -> None:
            if line["checkpoint"]:
                bar.set_postfix(Rel=f"{line['scores']['rel']:.2f}")

        return compare.compare(plan, getattr(args, "jobs", 1), on_edit, on_line)


@contextmanager
def _asked_to_stop() -> Iterator[list]:
    """A list that is no longer empty once Ctrl-C was pressed; pressed again, it interrupts."""
    asked: list[int] = []

    def ask(number, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nfinishing the edit in hand (Ctrl-C again: at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _report(args, console: Console) -> int:
    from ..experiments import report
    from ..experiments.page import write

    lines, notes = report.read(args.folder)
    if args.markdown:
        print(report.markdown(lines, report.shared_checkpoint(lines)))
        return 0
    _comparison(lines, notes, console)
    path = write(lines, notes, args.out or args.folder / "report")
    console.print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _comparison(lines: list[dict], notes: list[str], console: Console) -> None:
    """The table of the last checkpoint that all methods have reached, and what it says in words."""
    from ..experiments import report

    last = report.shared_checkpoint(lines)
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


def _log(args, console: Console) -> int:
    from . import kept

    table = Table(title=f"Edits in {args.folder}", title_justify="left", box=SIMPLE)
    table.add_column("Edit", justify="right")
    names = ("Subject", "Prompt", "Before", "Wanted", *(["The model says"] if args.check else []), "When", "Now")
    for name in names:
        table.add_column(name, overflow="fold")
    for edit in kept.edits(args.folder, args.model, args.device, args.check):
        style = "" if edit["now"] == "effective" else "dim"
        said = [Text(edit["said"], "green" if edit["said"] == edit["target_new"] else "red")] if args.check else []
        asked = [Text(edit[name] or "-") for name in ("subject", "prompt", "ground_truth", "target_new")]
        table.add_row(str(edit["id"]), *asked, *said, Text(edit["made"]), Text(edit["now"]), style=style)
    console.print(table)
    return 0


def _undo(args, console: Console) -> int:
    from . import kept

    edit = kept.take_out(args.folder, args.edit, args.resolve, args.model, args.device)
    told = f"{edit['prompt']} -> {edit['target_new']}"
    console.print(f"Edit {args.edit} is taken out: {told}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _rollback(args, console: Console) -> int:
    from . import kept

    gone = kept.roll_back(args.folder, args.to, args.model, args.device)
    console.print(f"Back at edit {args.to}: {gone} {'edit' if gone == 1 else 'edits'} taken out", highlight=False)
    return 0


def _export(args, console: Console) -> int:
    from . import kept

    out = args.out or args.folder / args.to
    report = kept.export(args.folder, args.to, out, COLUMNS, args.rank, args.model, args.device)
    if report:
        each = ", ".join(f"layer {layer} {error:.2%}" for layer, error in report.errors.items())
        told = f"Rank {report.rank} leaves out {report.total:.2%} of the updates (Frobenius norm): {each}"
        console.print(told, highlight=False, soft_wrap=True)
    console.print(f"{out}: README.md in it says how to load it", highlight=False, markup=False, soft_wrap=True)
    return 0


def _bench(args, console: Console) -> int:
    import torch

    from .. import bench
    from ..experiments.protocol import write_json

    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; give a file")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar:
        content = {"command": args.command, **_measured(args, device, bar.set_description_str)}
    part = content.get("part")
    headings, body = (bench.parts if part else bench).rows(content)
    for line in (_machine(content), *(f"Note: {note}." for note in content["notes"]), "", *_aligned(headings, body), ""):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print((bench.parts if part else bench).LEGEND, highlight=False, markup=False, soft_wrap=True)
    if args.out:
        write_json(args.out, content)
    return 0


def _measured(args, device: str, said) -> dict:
    from .. import bench

    if args.part is None:
        if args.neurons:
            raise ValueError("--neurons goes with --part attribution")
        plan = bench.Plan(args.shape or "atlas", args.edits, args.at or (1, 500), args.layers, device, args.dtype)
        return bench.measure(plan, said)
    if args.part not in bench.parts.PARTS:
        raise ValueError(f"no part {args.part!r}; known: {', '.join(bench.parts.PARTS)}")
    if args.layers:
        raise ValueError("--layers goes with whole edits; a part is measured for one layer")
    return bench.parts.measure(
        args.part, args.shape or "llama3-8b", args.edits, args.at or (100, 2000), args.neurons, device, args.dtype, said
    )


def _machine(content: dict) -> str:
    where, versions = content["hardware"], content["versions"]
    gpus = "".join(f"; {gpu['name']}, {gpu['memory_gb']} GB" for gpu in where["gpus"])
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    cpu = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, {where['free_memory_gb']} GB free"
    return f"{content['command']}\n{cpu}{gpus}\n{known}\n{content['what']}"


def _aligned(headings: list[str], body: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *body, strict=True)]
    first = [f"{row[0]:<{widths[0]}}" for row in (headings, *body)]
    others = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)) for row in (headings, *body)]
    return [f"{name}  {cells}" for name, cells in zip(first, others, strict=True)]
