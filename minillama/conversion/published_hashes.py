"""The lists of sha256 that publishers put beside their weights, such as SHA256.md.

Two forms are read. Chinese-LLaMA-Alpaca's Markdown has tables of models:

    #### Merged files (consolidated.*.pth)             the files that the table is about
    | Model             | SHA256                |
    | Chinese-LLaMA-13B | aa7f…<br/>3954…       |      one sha256 for each file of a model

and sha256sum writes a line a file:

    aa7f…  consolidated.00.pth

A table does not say which sha256 is whose. So the files of a kind, such as consolidated.*.pth, must
be those of one model: all of them, and no other.
"""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from minillama.errors import UserError
from minillama.files import read_text, sha256_of

HASH = re.compile(r"\b[0-9a-fA-F]{64}\b")
KIND = re.compile(r"[\w*.-]*[\w*]\.(?:pth|bin|safetensors|model|json)\b", re.IGNORECASE)
HASH_LINE = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(\S.*)")


@dataclass
class PublishedModel:
    """The files of one kind that a model has, by a list."""

    name: str
    kinds: tuple[str, ...]  # patterns of file names, such as consolidated.*.pth
    hashes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class PublishedMatch:
    """A directory whose files are as a list says. `str()` gives the lines for the user."""

    directory: Path
    against: Path
    models: dict[str, str]  # by kind of file: which model it is
    counts: dict[str, int]  # by kind: files

    def __str__(self) -> str:
        lines = []
        for kind, model in self.models.items():
            plural = "s" if self.counts[kind] > 1 else ""
            owner = f" of {model}" if model else ""
            lines.append(f"{kind}: {self.counts[kind]} file{plural}{owner}, as {self.against} says")
        return "\n".join(lines)


def is_hash_list(path: Path) -> bool:
    """Tell whether a file is such a list, and not a manifest of ours."""
    is_json = path.suffix == ".json" or read_text(path).lstrip().startswith("{")
    return not is_json


def check_published(directory: Path, against: Path) -> PublishedMatch:
    """Compare the files of a directory with a published list of sha256.

    Raises UserError for a file that is not as the list says, for files of several models, and if
    the list says nothing about any of them.
    """
    listed = read_list(against)
    models: dict[str, str] = {}
    counts: dict[str, int] = {}
    for kind in dict.fromkeys(kind for model in listed for kind in model.kinds):
        files = _files_of(directory, kind)
        if files:
            candidates = [model for model in listed if kind in model.kinds]
            models[kind] = _find_model(files, candidates, against).name
            counts[kind] = len(files)
    if not models:
        kinds = ", ".join(dict.fromkeys(kind for model in listed for kind in model.kinds))
        raise UserError(f"{directory}: holds none of the files that {against} lists: {kinds}")
    return PublishedMatch(directory, against, models, counts)


def read_list(path: Path) -> list[PublishedModel]:
    """Return the models of a list. Raises UserError if it has none."""
    models: dict[tuple[int, str], PublishedModel] = {}
    heading = ""
    table = 0  # number of the table under way
    kinds: tuple[str, ...] = ()  # of the table under way
    is_in_table = False
    for line in read_text(path).splitlines():
        if not line.startswith("|"):
            is_in_table = False
            if line.startswith("#"):
                heading = line
            match = HASH_LINE.fullmatch(line.strip())
            if match:
                name = Path(match[2]).name
                models[-1, name] = PublishedModel("", (name,), {match[1].lower()})
            continue
        if not is_in_table:
            is_in_table = True
            table += 1
            kinds = _kinds_in(line) or _kinds_in(heading)
            continue
        hashes = {digits.lower() for digits in HASH.findall(line)}
        if hashes and kinds:
            name = line.split("|")[1].strip()
            model = models.setdefault((table, name), PublishedModel(name, kinds))
            model.hashes |= hashes
    if not models:
        raise UserError(
            f"{path}: lists no sha256 of files; --check takes a manifest of convert.py sha256, a "
            "checkpoint directory, a published SHA256.md, or what sha256sum writes"
        )
    return list(models.values())


def _kinds_in(text: str) -> tuple[str, ...]:
    """Return the names of files that a heading names."""
    return tuple(dict.fromkeys(kind.lower() for kind in KIND.findall(text)))


def _files_of(directory: Path, kind: str) -> dict[str, str]:
    """Return the sha256 of the files of a kind, by name."""
    hashes = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and fnmatch(path.name.lower(), kind.lower()):
            hashes[path.name] = sha256_of(path)
    return hashes


def _find_model(
    files: dict[str, str], candidates: list[PublishedModel], against: Path
) -> PublishedModel:
    """Return the model that the files are. Raises UserError if they are none."""
    found = set(files.values())
    for model in candidates:
        if model.hashes == found:
            return model
    owners: dict[str, str] = {}  # by file: the model that it is of
    for name, digits in files.items():
        names = [model.name for model in candidates if digits in model.hashes]
        if not names:
            known = ", ".join(model.name for model in candidates if model.name)
            of_models = f" for {known}" if known else ""
            raise UserError(
                f"{name}: its sha256 is {digits}, which is none that {against} lists{of_models}; "
                "get the file again"
            )
        owners[name] = names[0]
    if len(set(owners.values())) > 1:
        described = ", ".join(f"{name} of {owner}" for name, owner in owners.items())
        raise UserError(f"files of several models, by {against}: {described}")
    model = next(model for model in candidates if model.name in owners.values())
    raise UserError(
        f"of {model.name}, {len(found)} of the {len(model.hashes)} files that {against} lists are "
        "here; get the others too"
    )
