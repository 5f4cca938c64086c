"""What the analyses' figures share: their look, how they are saved, heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ...messages import how_to_install

try:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ..figures import COLOURS, RC, WIDTH
except ModuleNotFoundError as missing:
    raise ImportError(f"figures need {missing.name}: {how_to_install('analyze')} brings it") from None

__all__ = ["COLOURS", "LOOK", "WIDTH", "Figure", "figure", "headline", "heat", "np", "rc_context", "save"]

LOOK = {**RC, "svg.fonttype": "none", "svg.hashsalt": "easyedit_nmke"}
DPI = 130


def figure(height: float, width: float = WIDTH) -> Figure:
    return Figure((width, height), layout="constrained")


def headline(drawn: Figure, text: str) -> None:
    """What a figure says, over it."""
    drawn.suptitle(textwrap.fill(text, round(10.6 * drawn.get_figwidth())), fontsize=10.5, fontweight="bold", x=0.01, ha="left")


def save(made: Figure | None, file: Path) -> list[Path]:
    """Beside `file`, as PNG and SVG; an earlier one is removed when there is nothing to draw."""
    targets = [file.with_suffix(".png"), file.with_suffix(".svg")]
    for target in targets:
        target.unlink(missing_ok=True)
    if made is None:
        return []
    made.draw_without_rendering()
    made.set_layout_engine("none")  # which has found its places, the same for both
    made.savefig(targets[0], dpi=DPI)
    made.savefig(targets[1], metadata={"Date": None})
    return targets


def heat(ax, values, rows: Sequence[str], columns: Sequence[str], *, cmap="Purples", low=None, high=None, every: int = 1, rotate=0):
    """A heat map of values [rows, columns], each row and every so many columns named; returns the image."""
    values = np.asarray(values, float)
    image = ax.imshow(values, aspect="auto", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    ax.set_yticks(range(len(rows)), rows)
    shown = range(0, len(columns), every)
    ax.set_xticks(shown, [columns[i] for i in shown], rotation=rotate, ha="right" if rotate else "center")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image
