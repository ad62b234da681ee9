"""The figures of docs/: the committed files are what their scripts draw, small, and readable."""

import importlib
import re
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws the figures")

from docs.figures import drawing  # noqa: E402
from docs.figures.__main__ import HERE, NAMES, PAGES  # noqa: E402

ROOT = Path(__file__).parents[1]
each_figure = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def pinned_matplotlib() -> None:
    pin = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin
    if matplotlib.__version__ != pin[1]:
        pytest.skip(f"the files were drawn with matplotlib {pin[1]}, as constraints.txt says")


@each_figure
def test_a_committed_figure_is_what_its_script_draws(name: str, pinned_matplotlib: None) -> None:
    picture = importlib.import_module(f"docs.figures.{name}").draw()
    committed = (HERE / f"{name}.svg").read_text(encoding="utf-8")
    assert picture.to_svg() == committed, "python -m docs.figures draws them again"


@each_figure
def test_a_figure_is_small_has_no_background_and_stands_on_a_page(name: str) -> None:
    svg = (HERE / f"{name}.svg").read_text(encoding="utf-8")
    assert len(svg) < 16_000
    background = re.search(r"<path [^>]*>", svg)
    assert background and "fill: none" in background[0]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"figures/{name}.svg)" in page.read_text(encoding="utf-8") for page in pages)


def luminance(color: str) -> float:
    """Of a colour such as "#3b76c4", as the guidelines for web pages (WCAG 2) define it."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = ((part + 0.055) / 1.055 for part in parts)
    return 0.2126 * red**2.4 + 0.7152 * green**2.4 + 0.0722 * blue**2.4


@pytest.mark.parametrize("color", [drawing.INK, *drawing.COLOURS])
@pytest.mark.parametrize("page", PAGES)
def test_a_colour_can_be_read_on_a_white_page_and_on_a_dark_one(color: str, page: str) -> None:
    """Their contrast is at least 4 : 1, where 1 : 1 is invisible and black on white is 21 : 1."""
    lighter, darker = sorted((luminance(color), luminance(PAGES[page])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4


def test_the_timetable_keeps_the_order_of_1f1b() -> None:
    """Three forwards fill stage 0 of 4; then forward and backward take turns."""
    from docs.figures import pipeline

    work = [f"{kind}{number}" for kind, number in pipeline.work_of(0)]
    assert work[:8] == ["F0", "F1", "F2", "F3", "B0", "F4", "B1", "F5"]
    last = [f"{kind}{number}" for kind, number in pipeline.work_of(3)]
    assert last[:6] == ["F0", "B0", "F1", "B1", "F2", "B2"]
