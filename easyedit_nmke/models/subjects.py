"""Where a subject stands in a prompt: as words of it, however they are spelled."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from difflib import get_close_matches

from .chat import turn

# What `unicodedata` names the letters of scripts that write no spaces between words: any place in them may be a border.
SPACELESS = (
    "CJK ", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "YI ", "TANGUT", "NUSHU", "THAI", "LAO",
    "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI ",
)  # fmt: skip
_MARKS = {
    **dict.fromkeys("’‘‛ʼ′`´＇", "'"), **dict.fromkeys("“”„‟«»″＂", '"'), **dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"),
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),
}  # fmt: skip
_POSSESSIVE = re.compile(r"['’ʼ][sS]?(?!\w)")
_JOINED_ON = re.compile(r"['’ʼ‐‑-]\w")


def spaceless(char: str) -> bool:
    """Whether this is a letter of a script without spaces between words."""
    return unicodedata.name(char, "").startswith(SPACELESS)


def find_subject(prompt: str, subject: str) -> tuple[int, int]:
    """Where the subject stands in the prompt, as a word or words of it: prompt[start:end], as it is spelled there.

    Looked for as it is spelled; then in another case; then in forms that look alike (composed and decomposed characters, kinds of
    spaces, quotes and dashes); then in both. Inside a longer word it does not count, and as a part of a compound ("Jean-Pierre",
    "O'Brien") only when it stands nowhere else. In scripts without spaces every place is a border of words. Of a text in a chat
    format the user's words count first. ValueError when it is not there, or more than once.
    """
    if not subject:
        raise ValueError(f"the subject of prompt {prompt!r} is empty")
    inside = []
    for form in (None, str.casefold, _looks, lambda text: _looks(text).casefold()):
        places = _places(prompt, subject, form)
        words = [place for place in places if _is_word(prompt, *place)]
        inside = inside or places
        if len(words) > 1:
            words = [place for place in words if turn(prompt, *place)] or words
        if len(words) > 1:
            words = [place for place in words if not _in_compound(prompt, *place)] or words
        if len(words) == 1:
            return words[0]
        if words:
            raise ValueError(_repeated(prompt, subject, words))
    raise ValueError(_absent(prompt, subject, inside))


def _looks(text: str) -> str:
    """The text with one form for all that look alike."""
    text = "".join(_MARKS.get(char, char) for char in text)
    return "".join(_MARKS.get(char, char) for char in unicodedata.normalize("NFKD", text))


def _places(prompt: str, subject: str, form: Callable[[str], str] | None) -> list[tuple[int, int]]:
    """Every (start, end) at which the prompt has the subject, both in this form. A letter and its marks are not taken apart."""
    if form is None:
        return [(at.start(), at.start() + len(subject)) for at in re.finditer(f"(?={re.escape(subject)})", prompt)]
    starts = [i for i, char in enumerate(prompt) if not i or not unicodedata.combining(char)]
    letters = [prompt[start:stop] for start, stop in zip(starts, [*starts[1:], len(prompt)], strict=True)]
    begin, end, length, text = {}, {}, 0, []
    for start, letter in zip(starts, letters, strict=True):
        folded = form(letter)
        if folded:
            begin[length] = start
            length += len(folded)
            end[length] = start + len(letter)
            text.append(folded)
    text, wanted = "".join(text), form(subject)
    found = (i for i in range(len(text) - len(wanted) + 1) if wanted and text.startswith(wanted, i))
    return [(begin[i], end[i + len(wanted)]) for i in found if i in begin and i + len(wanted) in end]


def _is_word(prompt: str, start: int, end: int) -> bool:
    return _border(prompt, start) and _border(prompt, end)


def _border(text: str, at: int) -> bool:
    """Whether a word may begin or end at this place: not between two letters or digits, nor before a letter's own mark."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M"):
        return False
    return not (_in_word(before) and _in_word(after)) or spaceless(before) or spaceless(after)


def _in_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")


def _in_compound(prompt: str, start: int, end: int) -> bool:
    """Whether a hyphen or an apostrophe joins more to it; a possessive's does not."""
    before = start > 1 and _JOINED_ON.match(prompt[start - 1] + prompt[start - 2]) is not None
    return before or (_JOINED_ON.match(prompt, end) is not None and _POSSESSIVE.match(prompt, end) is None)


# ---- what is said of it


def _repeated(prompt: str, subject: str, words: list[tuple[int, int]]) -> str:
    spelled = list(dict.fromkeys(prompt[start:end] for start, end in words))
    forms = "" if spelled == [subject] else f" (as {', '.join(map(ascii, spelled))})"
    return f"subject {subject!r} is {len(words)} times in the prompt {prompt!r}{forms}; it must be there exactly once"


def _absent(prompt: str, subject: str, inside: list[tuple[int, int]]) -> str:
    if inside:
        start, end = inside[0]
        while not _border(prompt, start):
            start -= 1
        while not _border(prompt, end):
            end += 1
        hint = f"is no word of the prompt {prompt!r}, only a part of {prompt[start:end]!r}"
        return f"subject {subject!r} {hint}; it must be there exactly once, as a word"
    return f"subject {subject!r} is not in the prompt {prompt!r}{_nearest(prompt, subject)}; it must be there exactly once"


def _nearest(prompt: str, subject: str) -> str:
    """What of the prompt is most like the subject, with the characters that differ where these can hardly be seen."""
    words, count = re.findall(r"\S+", prompt), max(len(subject.split()), 1)
    candidates = [" ".join(words[i : i + count]) for i in range(len(words) - count + 1)]
    close = get_close_matches(subject, candidates, 1, 0.7)
    if not close:
        return ""
    if subject.isascii() and close[0].isascii():
        return f" (the nearest there is {close[0]!r})"
    return f" (the nearest there is {close[0]!r}, that is {close[0]!a}, and the subject {subject!a})"
