"""Names of the Hugging Face Hub in the place of a path: errors say that nothing is downloaded.

meta-llama/Llama-2-7b-hf              a name: `hf download` gets it
~/.cache/huggingface/hub              the cache
  models--meta-llama--Llama-2-7b-hf   a model in it
    refs/main                         which revision is in use
    snapshots/01c7f73d…               the files of a revision: what to give
"""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
FOLDER = re.compile(r"(models|datasets)--(.+)")  # of the cache
MOST_SHOWN = 3  # folders of the cache in an error


def hub_hint(path: Path, is_dataset: bool = False) -> str:
    """Return what to do if `path` is a name on the Hub or a folder of its cache, else "".

    is_dataset: whether data is expected there, and not a model.
    """
    if path.is_dir():
        return _cache_hint(path)
    is_name = HUB_NAME.fullmatch(path.as_posix()) is not None
    if is_name and not path.exists() and not path.parent.exists():
        kind = "datasets" if is_dataset else "models"
        return f"; nothing is downloaded here: {_download(kind, path.as_posix())}"
    return ""


def _cache_hint(path: Path) -> str:
    """Return what to give in place of a folder of the cache; "" for any other folder."""
    root = path.parent if path.name in ("snapshots", "blobs", "refs") else path
    folder = FOLDER.fullmatch(root.name)
    if folder is None:
        return _whole_cache_hint(path)
    revision = _revision(root)
    if revision is not None:
        return f"; it is a folder of the Hub's cache: give {revision}"
    kind, name = folder.groups()
    command = _download(kind, name.replace("--", "/", 1))
    return f"; it is an empty folder of the Hub's cache: {command}"


def _whole_cache_hint(path: Path) -> str:
    """Return which folders can be given in place of the whole cache."""
    revisions = []
    for root in sorted(path.glob("models--*")):
        revision = _revision(root)
        if revision is not None:
            revisions.append(str(revision))
    if not revisions:
        return ""
    return (
        f"; it is the Hub's cache: give a model in it, such as {', '.join(revisions[:MOST_SHOWN])}"
    )


def _revision(root: Path) -> Path | None:
    """Return the folder of the revision in use; None if there is none."""
    revisions = sorted(root.glob("snapshots/*"))
    main = root / "refs/main"
    if main.is_file():
        named = root / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()
        if named in revisions:
            return named
    return revisions[-1] if revisions else None


def _download(kind: str, name: str) -> str:
    folder = name.rpartition("/")[2]
    option = " --repo-type dataset" if kind == "datasets" else ""
    return f"run `hf download {name}{option} --local-dir {folder}`, and give the path {folder}"
