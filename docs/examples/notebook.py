"""Make the page and the notebook of the tour from its script.

    python -m docs.examples.notebook        writes docs/tour.md and docs/examples/tour.ipynb

tour.py is written in cells, as many editors know them: `# %% [markdown]` begins a text, `# %%`
begins code. The text, the code and what it prints are

    tour.md       text, a block of Python, a block of output
    tour.ipynb    the same cells as JSON; links lead one folder up
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SCRIPT = HERE / "tour.py"
NOTEBOOK = HERE / "tour.ipynb"
PAGE = HERE.parent / "tour.md"


class Cell(NamedTuple):
    """A text in Markdown, or code."""

    is_code: bool
    source: str


def read_cells(script: str) -> list[Cell]:
    """The cells of a script."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            cells.append(Cell(is_code=False, source=body.strip()))
        else:
            cells.append(Cell(is_code=True, source=body.strip()))
    return cells


def run_cells(cells: list[Cell]) -> list[str]:
    """Run the code as Python, cell after cell; returns what each cell prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(cells):
        output = io.StringIO()
        if cell.is_code:
            with contextlib.redirect_stdout(output):
                exec(compile(cell.source, f"cell {number}", "exec"), names)
        printed.append(output.getvalue())
    return printed


def make_page(cells: list[Cell], outputs: list[str]) -> str:
    """The tour as a page of docs/."""
    parts = []
    for cell, output in zip(cells, outputs, strict=True):
        parts.append(f"```python\n{cell.source}\n```" if cell.is_code else cell.source)
        if output:
            parts.append(f"```text\n{output}```")
    return "\n\n".join(parts) + "\n"


def make_notebook(cells: list[Cell], outputs: list[str]) -> str:
    """The tour as a Jupyter notebook (format 4.5)."""
    made = []
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True)):
        values: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if cell.is_code:
            stream = {"name": "stdout", "output_type": "stream", "text": _lines(output)}
            values["cell_type"] = "code"
            values["execution_count"] = None
            values["outputs"] = [stream] if output else []
            values["source"] = _lines(cell.source)
        else:
            values["cell_type"] = "markdown"
            values["source"] = _lines(_one_folder_up(cell.source))
        made.append(values)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _lines(text: str) -> list[str]:
    """A text as notebooks hold it: lines with their line breaks."""
    return text.splitlines(keepends=True)


def _one_folder_up(text: str) -> str:
    """A text of docs/ with links that are right in docs/examples."""
    return text.replace("](", "](../")


def main() -> None:
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    outputs = run_cells(cells)
    PAGE.write_text(make_page(cells, outputs), encoding="utf-8")
    NOTEBOOK.write_text(make_notebook(cells, outputs), encoding="utf-8")


if __name__ == "__main__":
    main()
