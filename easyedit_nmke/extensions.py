"""What other packages add: methods, architectures, metrics, formats and verbs, by entry points of the group easyedit_nmke.<kind>.

Every table of this package is its own rows and these. Nothing is registered at run time, so nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

KINDS = ("methods", "architectures", "metrics", "formats", "verbs")


def with_extensions(kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` rows by name, then those that installed packages add. ValueError, naming the package, for one that cannot be loaded or
    takes a name that is taken."""
    rows = dict(own)
    for point in entry_points(group=f"easyedit_nmke.{kind}"):
        where = f"the entry point {point.name!r} ({point.value}) of {point.dist.name if point.dist else 'a package'}"
        if point.name in rows:
            raise ValueError(
                f"{where} adds {kind[:-1]} {point.name!r}, which is there already; rename it, or uninstall that package"
            )
        try:
            rows[point.name] = point.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} could not be loaded ({reason}); mend or uninstall that package") from error
    return rows
