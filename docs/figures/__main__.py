"""Draw all figures of docs/.

python -m docs.figures                 write docs/figures/*.svg
python -m docs.figures --png FOLDER    draw each on a white page and on a dark one, to look at
"""

import argparse
import importlib
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("cache", "data", "memory", "packing", "pipeline", "tensor_parallel", "zero")
PAGES = {"light": "#ffffff", "dark": "#0d1117"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    folder = parser.parse_args().png
    for name in NAMES:
        picture = importlib.import_module(f"docs.figures.{name}").draw()
        if folder is None:
            (HERE / f"{name}.svg").write_text(picture.to_svg(), encoding="utf-8")
            continue
        for page, background in PAGES.items():
            picture.to_png(folder / f"{name}_{page}.png", background)


if __name__ == "__main__":
    main()
