"""What other packages add: methods, architectures, metrics, formats, verbs and analyses, by entry points of the group
easyedit_nmke.<kind>.

Every table of this package is its own rows and these. Nothing is registered at run time, so nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

KINDS = ("methods", "architectures", "metrics", "formats", "verbs", "analyses")


def with_extensions(kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` rows by name, then those that installed packages add. ValueError, naming the package, for one that cannot be loaded or
    takes a name that is taken."""
    rows = dict(own)
    for point in entry_points(group=f"easyedit_nmke.{kind}"):
        if point.name in rows:
            raise ValueError(f"{_where(point)} takes a name of {kind} that is there already; rename it, or uninstall that package")
        rows[point.name] = _loaded(point)
    return rows


def row(kind: str, own: Mapping[str, Any], name: str) -> Any:
    """One row of `with_extensions` without a look at the others, which takes milliseconds; None where there is none."""
    if name in own:
        return own[name]
    return next((_loaded(point) for point in entry_points(group=f"easyedit_nmke.{kind}") if point.name == name), None)


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_where(point)} could not be loaded ({reason}); mend or uninstall that package") from error


def _where(point: EntryPoint) -> str:
    return f"the entry point {point.name!r} ({point.value}) of {point.dist.name if point.dist else 'a package'}"
