"""Predictions on disk, so that an interrupted evaluation goes on where it stopped and several ranks make one file.

    DIR/settings.json        what the predictions depend on; with other settings they are refused, never mixed
    DIR/predictions.jsonl    a line for each question, appended as batches are done (rank r > 0: predictions.rank-r.jsonl),
                             and in the questions' order at the end

Batches are planned over all questions, whoever computes them and whatever is done already: the same batch gives the same bits, so the
finished file is the same to the byte for any number of ranks and interruptions.
"""

import hashlib
import json
import math
import os
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from minillama.comm import Mesh, gather_objects
from minillama.errors import UserError, parsing, read_json
from minillama.evaluation.scoring import Query, Reading, plan, read
from minillama.model import Llama

Record = dict[str, Any]


class Test(Protocol):
    """What is asked: `choices.Choices` or `perplexity.Perplexity`."""

    queries: dict[str, Query]  # by id
    measure: str  # the name of what the bar shows the mean of

    def judge(self, id: str, reading: Reading) -> Record:
        """The record of an answer, "scores" among it."""

    def worth(self, record: Record) -> float:
        """A record's contribution to the mean."""


def predict(model: Llama, test: Test, batch_size: int, out: Path | None, settings: dict[str, Any], mesh: Mesh) -> list[Record]:
    """A record for each query, in order, on every rank."""
    ids, queries = list(test.queries), list(test.queries.values())
    known = gather_objects(mesh, _open(out, settings) if mesh.is_first and out else {})[0]
    batches = [batch for batch in plan(queries, batch_size) if any(ids[i] not in known for i in batch.members)]
    total = sum(batch.cost for batch in batches)
    ends = accumulate(batch.cost for batch in batches)
    mine = [batch for batch, end in zip(batches, ends, strict=True) if (end - 1) * mesh.size // total == mesh.rank]
    records, name = dict(known), f"predictions{f'.rank-{mesh.rank}' if mesh.rank else ''}.jsonl"
    bar = tqdm(total=len(queries), initial=len(known), unit="question", disable=not mesh.is_first, dynamic_ncols=True)
    worth = sum(map(test.worth, known.values()))
    with bar, open(out / name if out else os.devnull, "a", encoding="utf-8") as file:
        for found in read(model, queries, mine):
            made = [_checked({"id": ids[i], **test.judge(ids[i], reading)}) for i, reading in found]
            file.write("".join(_line(record) for record in made))
            file.flush()
            records |= {record["id"]: record for record in made}
            worth += sum(map(test.worth, made))
            bar.set_postfix_str(f"{test.measure} {worth / len(records):.3f}", refresh=False)
            bar.update(len(made))
    records = {name: record for part in gather_objects(mesh, records) for name, record in part.items()}
    if out and mesh.is_first:
        _write(out, [records[name] for name in ids])
    return [records[name] for name in ids]


def _checked(record: Record) -> Record:
    if not all(map(math.isfinite, record["scores"].values())):
        raise UserError(f"{record['id']}: the model's scores are {record['scores']}, not finite numbers; its weights are damaged, or "
                        "its numbers leave the dtype's range: try --dtype float32")
    return record


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _open(out: Path, settings: dict[str, Any]) -> dict[str, Record]:
    """The predictions that are there already; settings.json is written, or compared."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.is_file():
        with parsing(path):
            before = dict(read_json(path))
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            raise UserError(f"{out}: its predictions were made with {changed[0]} = {before.get(changed[0])}, not {settings[changed[0]]}; "
                            "name another --out, or delete it")
    files = sorted(out.glob("predictions*.jsonl"))
    if files and not path.is_file():
        raise UserError(f"{files[0]}: predictions without the settings.json that says what made them; name another --out, or delete them")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1]]  # a line cut short is not a line
    records = {record["id"]: record for record in map(json.loads, lines)}
    _write(out, list(records.values()))
    return records


def _write(out: Path, records: list[Record]) -> None:
    """Replace predictions.jsonl by these, and the other ranks' files with it."""
    new = out / "predictions.jsonl.tmp"
    new.write_text("".join(map(_line, records)), encoding="utf-8")
    os.replace(new, out / "predictions.jsonl")
    for part in out.glob("predictions.rank-*.jsonl"):
        part.unlink()


def sample_of_weights(model: Llama) -> str:
    """A sha256 over up to 4096 numbers of each parameter, adapters included: another model has another one."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.flatten()[::max(1, parameter.numel() // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
