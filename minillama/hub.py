"""Names of the Hugging Face Hub in the place of a path: errors say that nothing is downloaded."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/model


def hub_hint(path: Path) -> str:
    """Return what to do if `path` is a name on the Hub or a folder of its cache, else "".

    The cache keeps a model in models--OWNER--NAME/snapshots/REVISION.
    """
    if path.name.startswith("models--") and path.is_dir():
        name = path.name.removeprefix("models--").replace("--", "/", 1)
        revisions = sorted(path.glob("snapshots/*"))
        if revisions:
            return f"; it is a folder of the Hub's cache: give {revisions[-1]}"
        return f"; it is an empty folder of the Hub's cache: {_download(name)}"
    is_name = HUB_NAME.fullmatch(path.as_posix()) is not None
    if is_name and not path.exists() and not path.parent.exists():
        return f"; nothing is downloaded here: {_download(path.as_posix())}"
    return ""


def _download(name: str) -> str:
    folder = name.rpartition("/")[2]
    return f"run `hf download {name} --local-dir {folder}`, and give the path {folder}"
