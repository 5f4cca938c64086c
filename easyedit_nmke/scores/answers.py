"""What a text says: where an answer in it ends, and whether that is the one wanted, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

# Full stops of all scripts; exclamation and question marks, which end an answer too; and line ends.
_STOPS = ".…。｡．۔।॥།።፧។៕။᠃։߹܀"
_ENDS = f"{_STOPS}!?！？‽؟\n\r\u2028\u2029"
_LINES = "\n\r\u2028\u2029"
_SIGNS = "#%&*@/\\§¶†‡‰‱"  # punctuation to Unicode, but they mean something in an answer, as C++, -5 and 5 % do
# Scripts whose words have no spaces between them (Hangul: particles follow a word without one).
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u3029\u3031-\u318f\u31a0-\u31ff\u3400-\u9fff\ua960-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff]"
)
# A "." after these, or after a single capital, goes on ("St. Helier", "J. R. Smith").
_ABBREVIATED = re.compile(r"(?:^|[^\w])(?:[A-Z]|St|Ste|Mt|Ft|Dr|Mr|Mrs|Ms|Prof)$")


def answer(text: str, truths: str | Sequence[str] = ()) -> str:
    """What counts as the answer given, stripped: the text up to the first end of a line or sentence, of any script, that completes
    one of the truths; else to the first that does not follow an abbreviation."""
    text, wanted = text.strip(), _truths(truths)
    ends = list(_ends(text))
    for end in ends:
        if _bare(text[:end]) in wanted:
            return text[:end].strip()
    start = next((i for i, mark in enumerate(text) if not _soft(mark)), len(text))
    return next(text[:end] for end in ends if end >= start and not _abbreviated(text, end)).strip()


def says(text: str, truths: str | Sequence[str]) -> tuple[bool, bool]:
    """(exact, contains): whether the text begins with a truth and ends a sentence or line after it, and whether a truth is anywhere
    in the text as whole words.

    Case, width, runs of spaces, and marks around the answer and the truth do not count. A "." inside a truth ("St. Louis") does not
    end an answer that begins with it. In scripts without spaces between words, the next letter is no other word's. ValueError when
    there is no truth, or an empty one.
    """
    wanted = _truths(truths)
    if not all(wanted) or not wanted:
        raise ValueError(f"target {truths!r} has no text, so nothing can be said to contain it; give the answer that is expected")
    text = text.strip()
    spoken = " ".join(_folded(text).split())
    return any(_bare(text[:end]) in wanted for end in _ends(text)), any(_has_words(spoken, truth) for truth in wanted)


def only(text: str, truths: str | Sequence[str]) -> bool:
    """Whether the whole text is one of the truths and says nothing more. Case, width, runs of spaces, and marks and full stops
    around them do not count."""
    return _truths(text)[0] in _truths(truths)


def _folded(text: str) -> str:
    """Without differences of case, width and composition."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _truths(truths: str | Sequence[str]) -> list[str]:
    """As `_bare` leaves answers; marks alone are left as they are."""
    found = []
    for truth in [truths] if isinstance(truths, str) else truths:
        plain = " ".join(_folded(truth).split())
        found.append(_stripped(plain, _STOPS) or plain)
    return found


def _bare(text: str) -> str:
    """An answer without what does not count in it."""
    return _stripped(re.sub(rf"[^\S{_LINES}]+", " ", _folded(text)))


def _stripped(text: str, more: str = "") -> str:
    start, stop = 0, len(text)
    while start < stop and (_soft(text[start]) or text[start] in more):
        start += 1
    while stop > start and (_soft(text[stop - 1]) or text[stop - 1] in more):
        stop -= 1
    return text[start:stop]


def _soft(mark: str) -> bool:
    """Whether it does not count around an answer: blanks, quotes, brackets, punctuation of all scripts but full stops."""
    if mark.isspace():
        return mark not in _LINES
    kind = unicodedata.category(mark)
    return kind in ("Ps", "Pe", "Pi", "Pf") or (kind == "Po" and mark not in _STOPS and mark not in _SIGNS)


def _ends(text: str) -> Iterator[int]:
    """Where an answer may end: before each mark that ends a sentence or line, and with the text. A "." inside a number or between
    single letters (3.5, U.S.) does neither."""
    for i, mark in enumerate(text):
        if mark == "." and text[i + 1 : i + 2].isalnum():
            before = text[max(i - 2, 0) : i]
            if (before[-1:].isdigit() and text[i + 1].isdigit()) or (before[-1:].isalpha() and not before[:-1].isalnum()):
                continue
        if mark in _ENDS:
            yield i
    yield len(text)


def _abbreviated(text: str, end: int) -> bool:
    return text[end : end + 1] == "." and _ABBREVIATED.search(text[:end]) is not None


def _has_words(text: str, truth: str) -> bool:
    """Whether `truth` is in the text with no letter of a word of its own before or after it."""
    place = text.find(truth)
    while place >= 0:
        before, after = text[place - 1 : place] if place else "", text[place + len(truth) : place + len(truth) + 1]
        if not _joined(before, truth[0]) and not _joined(after, truth[-1]):
            return True
        place = text.find(truth, place + 1)
    return False


def _joined(neighbour: str, edge: str) -> bool:
    """Whether a letter belongs to the same word as the letter at the edge of what is next to it."""
    letter = neighbour.isalnum() or neighbour == "_" or (neighbour and unicodedata.category(neighbour)[0] == "M")
    return bool(letter) and not _UNSPACED.match(neighbour) and not _UNSPACED.match(edge)
