"""docs/tour.md and its notebook hold what the script of the tour prints."""

import json
import re
from typing import Any

import pytest

from docs.compare_output import first_difference
from docs.examples.notebook import (
    NOTEBOOK,
    PAGE,
    SCRIPT,
    make_notebook,
    make_page,
    read_cells,
    run_cells,
)

OUTPUT = re.compile(r"```text\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_page_holds_what_each_cell_of_the_script_prints() -> None:
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    outputs = [output for output in run_cells(cells) if output]
    shown = OUTPUT.findall(PAGE.read_text(encoding="utf-8"))
    assert len(shown) == len(outputs)
    for on_page, printed in zip(shown, outputs, strict=True):
        assert not first_difference(on_page, printed)


def test_page_and_notebook_are_made_from_the_script(notebook: dict[str, Any]) -> None:
    """With the outputs that the page has, `python -m docs.examples.notebook` changes nothing."""
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    shown = iter(OUTPUT.findall(page))
    outputs = []
    for cell in cells:
        prints = cell.is_code and "print(" in cell.source
        outputs.append(next(shown) if prints else "")
    assert make_page(cells, outputs) == page
    assert json.loads(make_notebook(cells, outputs)) == notebook


def test_the_notebook_is_one_that_jupyter_opens(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
        assert set(cell) == keys
