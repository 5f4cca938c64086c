"""`nmke chat`: the unedited and the edited model asked side by side."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..messages import did_you_mean
from .edits import edit_table, folder_arguments
from .verb import Verb, positive, quiet_libraries

if TYPE_CHECKING:
    from ..scores.generation import Spoken
    from .kept import Sides

NAMES = ("Unedited", "Edited")
COMMANDS = {
    "/undo": "/undo ID    take one edit out of the edited model, here and now: the folder keeps it",
    "/edits": "/edits      list the edits, and whether each still counts",
    "/plain": "/plain      ask without the model's chat format, and with it again",
    "/help": "/help       this",
    "/quit": "/quit       end, as Ctrl-D does; Ctrl-C ends an answer",
}


def _arguments(chat: argparse.ArgumentParser) -> None:
    folder_arguments(chat)
    chat.add_argument("--tokens", type=positive, default=200, metavar="N", help="of an answer at most (default 200)")


def _chat(args, console: Console) -> int:
    from . import kept

    quiet_libraries(args)
    with console.status("opening the model and its edits"):
        sides = kept.Sides(args.folder, args.model, args.device)
    _tell(console, _greeting(sides, args.folder))
    for line in _lines(console):
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                _obey(line, sides, args, console)
            else:
                _ask(line, sides, args.tokens, console)
        except ValueError as error:
            _tell(console, str(error), "red")
        except KeyboardInterrupt:
            _tell(console, "interrupted; the models are as they were", "red")
    return 0


def _greeting(sides: Sides, folder) -> str:
    counting = sum(edit["now"] == "effective" for edit in sides.edits)
    edits = f"{counting} {'edit' if counting == 1 else 'edits'} of {sides.editor.alg_name}"
    how = "in its chat format" if sides.in_chat else "as texts that it goes on with (it has no chat format)"
    return (
        f"{sides.editor.hparams.model_name} without and with {edits}, asked {how}; each question stands alone. "
        f"Nothing in {folder} is changed. /help lists what else there is."
    )


def _lines(console: Console) -> Iterator[str]:
    """What is typed, line after line without empty ones, until Ctrl-D; what comes from a file or a pipe is shown."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):  # earlier lines by the arrow keys, where the system has it
            import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt) as stop:
            console.print()
            if isinstance(stop, EOFError):
                return
            continue
        if not typed and not line:
            return
        if line := line.strip():
            if not typed:
                _tell(console, f"> {line}")
            yield line


def _obey(line: str, sides: Sides, args, console: Console) -> None:
    """A command. ValueError, in a sentence, when it cannot be done."""
    name, _, rest = line.partition(" ")
    if name == "/undo":
        if not rest.strip().isdecimal():
            raise ValueError(f"/undo takes the number of an edit, as in /undo 3, not {rest.strip()!r}; /edits lists them")
        edit = sides.undo(int(rest))
        _tell(console, f"Edit {edit['id']} is taken out here, and not in {args.folder}: {edit['prompt']} -> {edit['target_new']}")
    elif name == "/edits":
        console.print(edit_table(sides.edits, f"Edits in {args.folder}, and what is left of them here"))
    elif name == "/plain":
        if sides.in_chat is None:
            raise ValueError("the model has no chat format: everything is asked without one")
        sides.in_chat = not sides.in_chat
        _tell(console, f"Asked {'in' if sides.in_chat else 'without'} the model's chat format from here on.")
    elif name == "/help":
        _tell(console, "\n".join(COMMANDS.values()))
    else:
        raise ValueError(f"there is no {name}{did_you_mean(name, COMMANDS)}; /help lists what there is")


# ---- answers


def _ask(prompt: str, sides: Sides, tokens: int, console: Console) -> None:
    """Both answers as they come, in two columns of a terminal; elsewhere whole, one after the other."""
    screen = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    with closing(sides.answers(prompt, tokens)) as answers, _asked_to_stop() as asked, screen as live:
        for pair in answers:
            if live:
                live.update(_columns(pair, console), refresh=True)
            if asked:
                break
        if live:
            live.update(_columns(pair, console, whole=True), refresh=True)
            return
    for name, answer in zip(NAMES, pair, strict=True):
        _tell(console, f"{name + ':':10}{_said(answer, whole=True)}")
    _tell(console, "")


def _columns(pair: tuple[Spoken, Spoken], console: Console, whole: bool = False) -> Table:
    """Two answers beside each other; before they are whole their last lines, as many as there is room for."""
    table = Table(box=SIMPLE, expand=True)
    width, height = console.width // 2 - 5, max(1, console.height - 6)
    for name in NAMES:
        table.add_column(name, ratio=1)
    texts = [Text(_said(answer, whole)) for answer in pair]
    table.add_row(*(text if whole else Text("\n").join(text.wrap(console, width)[-height:]) for text in texts))
    return table


def _said(answer: Spoken, whole: bool) -> str:
    """An answer's text; with marks where it was cut off, and without half a letter before it is whole."""
    text = answer.text.strip()
    return f"{text} […]" if whole and not answer.ended else text if whole else text.rstrip("\ufffd")


@contextmanager
def _asked_to_stop() -> Iterator[list]:
    """A list that is no longer empty once Ctrl-C was pressed."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)


VERB = Verb(
    "chat",
    "ask a model without its edits and with them, side by side",
    "nmke chat results",
    _chat,
    _arguments,
    needs_arguments=True,
)
