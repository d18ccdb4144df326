"""How every plot looks, and how it is written: colours that colour-blind people can tell apart, PNG and SVG.

The colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/); the shot groups differ in their marker
too, so that no plot needs its colours to be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure


BLUE, ORANGE, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C", "#262626"
GROUP_COLOURS = {"many": BLUE, "medium": ORANGE, "few": VERMILION}
GROUP_MARKERS = {"many": "o", "medium": "s", "few": "^"}
SEQUENTIAL = "Blues"

# Class names may be in any script; of these fonts, those that are installed are used where the first has no glyph.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS", "Noto Emoji")
_DOTS_PER_INCH = 160


def draw(size: tuple[float, float], paint: Callable[[Figure], None]) -> Figure:
    """A figure of `size` inches, painted in the common style. Nothing global changes, and no window opens."""
    with _style():
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; the same figure gives the same bytes."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with _style(), warnings.catch_warnings():
        # A name in a script that no installed font has shows as boxes; that is no reason to warn once a glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(files[0], dpi=_DOTS_PER_INCH, metadata={"Software": None})
        figure.savefig(files[1], dpi=_DOTS_PER_INCH, metadata={"Date": None, "Creator": None})
    return files


def short(name: str, most: int = 24) -> str:
    """A name cut in the middle, because both ends of long names tell them apart.

    >>> short("ruby-throated hummingbird, female", 20)
    'ruby-throa…d, female'
    """
    name = " ".join(str(name).split())
    if len(name) <= most:
        return name
    head = most // 2
    return f"{name[:head]}…{name[len(name) - (most - head - 1) :]}"


def names_of(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """The names to show; classes without names go by their number."""
    return list(class_names) if class_names else [f"class {index}" for index in range(classes)]


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(
        {
            "font.family": _installed_fonts(),
            "font.size": 10,
            "text.parse_math": False,  # a class name may hold a dollar sign
            "text.color": INK,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.8,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "svg.hashsalt": "ballad",
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
        }
    ):
        yield


@cache
def _installed_fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [font for font in _FONTS if font in installed]
