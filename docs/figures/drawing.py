"""What the figures share: colours, boxes, arrows, and how a file is written.

A figure stands on a white page or on a dark one. So its background is transparent, and each colour
is halfway: white letters can be read on it, and it can be seen on both pages. Text stays text,
which keeps files small. A file depends on nothing but the script and matplotlib's version.
"""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK = "#737b86"  # lines, and letters beside boxes
BLUE = "#3b76c4"
ORANGE = "#bf5f2b"
GREEN = "#2f8a58"
PURPLE = "#8f6cc2"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "svg.fonttype": "none",  # letters, not outlines
    "svg.hashsalt": "minillama",  # names inside the file are the same every time
}
POINTS = 72  # an inch

Point = tuple[float, float]


class Picture:
    """A drawing. Coordinates and sizes are points, from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        size = (width / POINTS, height / POINTS)
        self.figure = Figure(figsize=size)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.set_axis_off()

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 10,
        color: str = INK,
        align: str = "center",
    ) -> None:
        """A text whose middle is at height y; x is where it begins, ends or has its centre."""
        self.axes.text(x, y, text, size=size, color=color, ha=align, va="center_baseline")

    def title(self, x: float, y: float, text: str, size: float = 10, align: str = "center") -> None:
        """A text in bold letters."""
        self.write(x, y, text, size, align=align)
        self.axes.texts[-1].set_fontweight("bold")

    def frame(self, x: float, y: float, width: float, height: float, color: str = INK) -> None:
        """The edge of a rectangle; (x, y) is its top left corner."""
        shape = Rectangle((x, y), width, height, edgecolor=color, facecolor="none", clip_on=False)
        self.axes.add_patch(shape)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        color: str,
        text: str = "",
        size: float = 8,
    ) -> None:
        """A filled rectangle with a text in its middle; (x, y) is its top left corner."""
        shape = Rectangle((x, y), width, height, edgecolor=color, facecolor=color, clip_on=False)
        self.axes.add_patch(shape)
        if text:
            self.write(x + width / 2, y + height / 2, text, size, "white")

    def arrow(self, start: Point, end: Point) -> None:
        shape = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK)
        shape.shrinkA = 0
        shape.shrinkB = 0
        self.axes.add_patch(shape)

    def line(self, *points: Point) -> None:
        """A line through some points."""
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        self.axes.plot(xs, ys, color=INK, linewidth=1, clip_on=False)

    def to_svg(self) -> str:
        """The picture as SVG, without a date."""
        content = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(content, format="svg", transparent=True, metadata=nothing)
        return shorten(content.getvalue())

    def to_png(self, path: Path, background: str) -> None:
        """The picture on a page of some colour, to look at it."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, dpi=110, facecolor=background)


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
    group = r'<g id="(?:patch|text|line2d)_\d+">\n(.*?)\n</g>'
    svg = re.sub(group, r"\1", svg, flags=re.DOTALL)
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)
