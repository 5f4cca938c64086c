"""Words that several messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the known name that is most like `name`, or "" where none is; case does not matter."""
    names = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def how_to_install(extra: str) -> str:
    """The command that brings what an extra needs. Of this project's own checkout: a package index may have another package of its
    name."""
    return f'python -m pip install -e ".[{extra}]" in this project\'s folder'
