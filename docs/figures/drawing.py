"""What the figures share: colours, boxes, arrows, and how a file is written.

A figure stands on a white page or on a dark one. So its background is transparent, and each colour
is halfway: white letters can be read on it, and it can be seen on both pages. Text stays text,
which keeps files small. A file depends on nothing but the script and matplotlib's version.
"""

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK = "#737b86"  # lines, and letters beside boxes
BLUE = "#3b76c4"
ORANGE = "#bf5f2b"
GREEN = "#2f8a58"
PURPLE = "#8f6cc2"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "svg.fonttype": "none",  # letters, not outlines
    "svg.hashsalt": "minillama",  # names inside the file are the same every time
}
POINTS = 72  # an inch


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture. Coordinates are points, from the top left corner."""
    figure = Figure(figsize=(width / POINTS, height / POINTS))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float = 10,
    color: str = INK,
    align: str = "center",
    bold: bool = False,
) -> None:
    """A text whose middle is at height y; x is where it begins, ends or has its centre."""
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, size=size, color=color, ha=align, va="center_baseline", fontweight=weight)


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    color: str = BLUE,
    size: float = 10,
    filled: bool = True,
) -> None:
    """A rectangle with a text in its middle; (x, y) is its top left corner."""
    face = color if filled else "none"
    axes.add_patch(
        Rectangle(
            (x, y), width, height, facecolor=face, edgecolor=color, linewidth=1, clip_on=False
        )
    )
    if text:
        ink = "white" if filled else color
        write(axes, x + width / 2, y + height / 2, text, size, ink)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=color, shrinkA=0, shrinkB=0
        )
    )


def line(axes: Axes, xs: list[float], ys: list[float], color: str = INK) -> None:
    axes.plot(xs, ys, color=color, linewidth=1, clip_on=False)


def to_svg(figure: Figure) -> str:
    """The picture as SVG, without a date."""
    content = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    return shorten(content.getvalue())


def shorten(svg: str) -> str:
    """The same picture in fewer bytes: one font for all texts, two decimals, no empty groups."""
    svg = re.sub(r"<!-- .*? -->|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n(?=[A-Zz\"])", " ", svg)  # a path in one line
    svg = re.sub(r"\s*\n+\s*", "\n", svg)
    fonts = re.search(r"font-family: ([^;]*);", svg)
    if fonts:
        svg = svg.replace("</style>", f" text{{font-family: {fonts[1]}}}</style>", 1)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = svg.replace("; stroke-linejoin: miter", "")
    svg = re.sub(r'<g id="(?:patch|text|line2d)_\d+">\n(.*?)\n</g>', r"\1", svg, flags=re.DOTALL)
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)


def to_png(figure: Figure, path: Path, background: str) -> None:
    """The picture on a page of some colour, to look at it."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=110, facecolor=background)
