"""What a run reads, by content: its data, tokenizer, base weights and adapter.

A run that goes on must go on with what it began with. A path cannot tell: a file can change under
its name, and the same bytes can lie elsewhere. So a run keeps OUT_DIR/inputs.json:

    fingerprints    by key, such as "data" or "ckpt": a sha256 that follows from the content alone
    files           by path: key, size, time, sha256 of the first MiB and of the whole

Every checkpoint holds the fingerprints too. Equal fingerprints go on, whatever the paths are.
The files save time: one whose size, time and first MiB are as recorded is not read again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.checkpoint.hf_reader import open_weights
from minillama.data.batches import BatchPlan
from minillama.data.memmap import Dataset
from minillama.errors import UserError
from minillama.files import read_json, sha256_of
from minillama.peft_adapters import adapter_tensors
from minillama.tensor_files import TensorRef
from minillama.tokenizer import Tokenizer

INPUTS_FILE = "inputs.json"
HEAD_BYTES = 2**20  # read at every start: all of a small file, the header of a large one

FileRecord = dict[str, Any]  # key, bytes, mtime_ns, head, sha256


@dataclass
class RunInputs:
    """Fingerprints by key, and the files by path."""

    fingerprints: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def add(self, key: str, paths: Iterable[Path], known: Mapping[str, FileRecord]) -> list[str]:
        """Record the files of a key, and return the sha256 of each.

        known: records of before. A file that is as one of them says is not read as a whole.
        """
        hashes = []
        for path in paths:
            name = str(path.resolve())
            record = _record_file(key, path, known.get(name, {}))
            self.files[name] = record
            hashes.append(record["sha256"])
        return hashes

    def set_fingerprint(self, key: str, content: Any) -> None:
        """Make the fingerprint of a key. content: JSON that follows from the files' content."""
        text = json.dumps(content, sort_keys=True)
        self.fingerprints[key] = hashlib.sha256(text.encode()).hexdigest()


def describe_inputs(
    base: Path | None,
    adapter: Path | None,
    tokenizer: Tokenizer,
    plans: Mapping[str, BatchPlan | None],
    known: Mapping[str, FileRecord],
) -> RunInputs:
    """The fingerprints and files of all that a run reads.

    base: the directory of the weights, if they are not random. plans: batches by the key of their
    data. known: what `read_inputs` says of the files.
    """
    inputs = RunInputs()
    inputs.add("tokenizer", [tokenizer.path], known)
    inputs.set_fingerprint("tokenizer", tokenizer.sha256)
    for key, plan in plans.items():
        if plan is not None:
            _add_dataset(inputs, key, plan.windows.dataset, known)
    if base is not None:
        tensors = open_weights(base)
        _add_directory(inputs, "ckpt", base / "config.json", tensors, known)
    if adapter is not None:
        tensors = adapter_tensors(adapter)
        _add_directory(inputs, "adapter", adapter / "adapter_config.json", tensors, known)
    return inputs


def read_inputs(out_dir: Path) -> RunInputs:
    """What a run recorded of its inputs; nothing if it is from an earlier version, or damaged."""
    path = out_dir / INPUTS_FILE
    keys = {"fingerprints": dict, "files": dict}
    try:
        content = read_json(path, keys=keys, what="a record of inputs")
    except UserError:
        return RunInputs()
    return RunInputs(content["fingerprints"], content["files"])


def have_files_changed(files: Mapping[str, FileRecord]) -> bool:
    """Whether a recorded file is there and has another content now."""
    for name, record in files.items():
        path = Path(name)
        if path.is_file() and _record_file("", path, record)["sha256"] != record["sha256"]:
            return True
    return False


def refuse_changes(
    place: Path, before: Mapping[str, str], now: Mapping[str, str], values: Mapping[str, Any]
) -> None:
    """Raise UserError if a fingerprint differs from the one that the run in `place` began with.

    values: the settings, for the message. If `before` is empty, nothing is
    compared: an earlier version stored no fingerprints.
    """
    changes = []
    keys = {**before, **now} if before else {}
    for key in keys:
        if before.get(key) != now.get(key):
            old = before.get(key, "none")[:12]
            new = now.get(key, "none")[:12]
            changes.append(f"{key} = {values[key]!r} (fingerprint {old} then, {new} now)")
    if changes:
        raise UserError(
            f"{place}: began with another content of {', '.join(changes)}; put back what it began "
            "with, choose another --out_dir, or start over with --overwrite_output_dir"
        )


def _record_file(key: str, path: Path, known: FileRecord) -> FileRecord:
    status = path.stat()
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    record = {"key": key, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "head": head}
    is_known = "sha256" in known
    for name in ("bytes", "mtime_ns", "head"):
        is_known = is_known and known.get(name, record[name]) == record[name]
    record["sha256"] = known["sha256"] if is_known else sha256_of(path)
    return record


def _add_dataset(
    inputs: RunInputs, key: str, dataset: Dataset, known: Mapping[str, FileRecord]
) -> None:
    """Record a data set, and the raw files that it was made from, as far as they are there.

    The fingerprint is that of the tokens and masks. `PREFIX.json` has the sha256 of their files,
    which were compared when the data set was opened.
    """
    sources = dataset.meta.get("sources", {})
    raw_files = [Path(name) for name in sources if Path(name).is_file()]
    inputs.add(key, raw_files, sources)
    content = dataset.meta.get("sha256")
    if content is None:  # Megatron's format holds no hashes
        content = inputs.add(key, dataset.files, known)
    inputs.set_fingerprint(key, content)


def _add_directory(
    inputs: RunInputs,
    key: str,
    config: Path,
    tensors: Mapping[str, TensorRef],
    known: Mapping[str, FileRecord],
) -> None:
    """Record a model or adapter directory: its config, and the files of its tensors."""
    files = sorted({tensor.file for tensor in tensors.values()})
    hashes = inputs.add(key, [config, *files], known)
    inputs.set_fingerprint(key, hashes)
