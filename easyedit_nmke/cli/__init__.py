"""The shell command `nmke`. The only room that prints: tables on stdout, logs and progress on stderr. A verb is one record."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping

from rich.console import Console

from ..extensions import with_extensions
from . import analyze, bench, chat, check, demo, doctor, edits, report, run, tasks, tune
from .verb import Verb

VERBS = (
    demo.VERB, check.VERB, run.RUN, run.COMPARE, tune.VERB, report.VERB, tasks.VERB, edits.LOG, chat.VERB, edits.UNDO,
    edits.ROLLBACK, edits.CONSOLIDATE, edits.EXPORT, analyze.VERB, bench.VERB, doctor.VERB,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it did its work, 1 with a sentence on stderr when it could not, 2 after printing help."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        verbs = _verbs()
        parser, parsers = _parser(verbs)
    except ValueError as error:  # of another package's verb
        print(f"nmke: {error}", file=sys.stderr)
        return 1
    if not argv:
        parser.print_help()
        return 2
    if len(argv) == 1 and argv[0] in verbs and verbs[argv[0]].needs_arguments:
        parsers[argv[0]].print_help()
        return 2
    args = parser.parse_args(argv)
    args.command = "nmke " + shlex.join(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return verbs[args.verb].run(args, Console())
    except (ValueError, FloatingPointError, OSError, ImportError, RuntimeError) as error:
        print(f"nmke {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "; the same command goes on from there" if verbs[args.verb].goes_on else ""
        print(f"nmke {args.verb}: interrupted{more}", file=sys.stderr)
        return 130


def _verbs() -> dict[str, Verb]:
    """This package's verbs, in the order of the help, and those that others add. ValueError for what is no `Verb`."""
    verbs = with_extensions("verbs", {verb.name: verb for verb in VERBS})
    for name, verb in verbs.items():
        if not isinstance(verb, Verb) or verb.name != name:
            raise ValueError(f"the verb {name!r} of an installed package is {verb!r}, expected a Verb({name!r}, ...) of cli.verb")
    return verbs


def _parser(verbs: Mapping[str, Verb]) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all verbs, and that of each. ValueError, naming the verb, when the arguments of one cannot be added."""
    parser = argparse.ArgumentParser(
        prog="nmke",
        description="Edit facts in language models, one after the other, with neuron-specific masks (NMKE).",
        epilog="for example:\n" + "\n".join(f"  {verb.example}" for verb in verbs.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=doctor.version_line())
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in verbs.items():
        sub = parsers.add_parser(
            name, help=verb.summary, description=verb.summary, epilog=f"for example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("-v", "--verbose", action="store_true", help="log what happens (stderr)")
        try:
            verb.add_arguments(sub)
        except Exception as error:
            raise ValueError(f"the arguments of the verb {name!r} cannot be added ({type(error).__name__}: {error})") from error
    return parser, parsers.choices
