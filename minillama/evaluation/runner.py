"""A score from beginning to end. Predictions are appended to DIR/predictions.jsonl as batches are done, and put in order at the end.

An interrupted run goes on from them; under other settings (DIR/settings.json) they are refused. Batches are planned over all questions,
whoever computes them and whatever is done already, so the file is the same to the byte for any number of ranks and interruptions.
"""

import math
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from minillama import ops
from minillama.checkpoint.hf_format import write_json
from minillama.comm import Mesh, gather_objects, start
from minillama.errors import UserError, parsing, read_json
from minillama.evaluation.likelihood import plan, read
from minillama.evaluation.questions import Choices, Perplexity
from minillama.generation.loading import LoadOptions, load_engine, weights_checksum
from minillama.generation.output_file import (
    Record,
    line_of,
    read_lines,
    refuse_other_settings,
    replace_lines,
)
from minillama.model import Llama


def load_options(options: Namespace) -> LoadOptions:
    return LoadOptions(
        ckpt=options.ckpt,
        base=options.base,
        lora=tuple(options.lora),
        tokenizer=options.tokenizer,
        device=options.device,
        dtype=options.dtype,
        ops=options.ops,
    )


def evaluate(options: Namespace) -> None:
    """`eval.py` for the tasks that read data. Under torchrun every rank calls it, and the first one reports."""
    began, out = time.perf_counter(), Path(options.out) if options.out else None
    reference = read_json(Path(options.compare)) if options.compare else None
    if reference and reference.get("task") != options.task:
        raise UserError(
            f"{options.compare}: not a summary of --task {options.task}, but of {reference.get('task')!r}"
        )
    with start(options.device) as mesh:
        session = load_engine(load_options(options), device=mesh.device)
        path = session.path
        model, tokenizer, context = (
            session.model,
            session.tokenizer,
            session.model.config.max_seq_len,
        )
        max_length = options.max_length or context
        if not 1 < max_length <= context:
            raise UserError(
                f"--max_length {max_length}: must be from 2 to the model's context of {context} tokens"
            )
        test = (Perplexity if options.task == "perplexity" else Choices)(
            options, tokenizer, max_length
        )
        hashes = next(iter(test.hashes.values())) if len(test.hashes) == 1 else test.hashes
        about = {
            "task": options.task,
            **test.about,
            "bos": tokenizer.bos_id is not None,
            "max_length": max_length,
            "tokenizer_sha256": tokenizer.sha256,
            "data_sha256": hashes,
        }
        settings = about | {
            "queries": len(test.queries),
            "dtype": options.dtype,
            "weights_sample_sha256": weights_checksum(model),
        }
        mesh.print(
            f"{path}: {options.task}, protocol {about['protocol']}, {about['n_shots']} shots, "
            f"{'a' if about['bos'] else 'no'} begin token, split {about['split']}, {len(test.queries)} queries"
        )
        ops.pack(model, rows=1)
        records = predict(model, test, options.batch_size, out, settings, mesh)
        summary = (
            about
            | test.summarise(records)
            | {"seconds": round(time.perf_counter() - began, 2), "model": str(path)}
        )
        if out and mesh.is_first:
            write_json(out / "summary.json", summary)
        with parsing(Path(options.compare)):
            mesh.print(test.show(summary, reference))


def predict(
    model: Llama,
    test: Choices | Perplexity,
    batch_size: int,
    out: Path | None,
    settings: Record,
    mesh: Mesh,
) -> list[Record]:
    """A record for each query, in order, on every rank."""
    ids, queries = list(test.queries), list(test.queries.values())
    records = gather_objects(mesh, _open(out, settings) if mesh.is_first and out else {})[0]
    batches = [
        batch
        for batch in plan(queries, batch_size)
        if any(ids[i] not in records for i in batch.members)
    ]
    total, ends = sum(batch.cost for batch in batches), accumulate(batch.cost for batch in batches)
    mine = [
        batch
        for batch, end in zip(batches, ends, strict=True)
        if (end - 1) * mesh.size // total == mesh.rank
    ]
    name = f"predictions.rank-{mesh.rank}.jsonl" if mesh.rank else "predictions.jsonl"
    worth = sum(map(test.worth, records.values()))  # so far
    with (
        tqdm(
            total=len(ids),
            initial=len(records),
            unit="query",
            disable=not mesh.is_first,
            dynamic_ncols=True,
        ) as bar,
        open(out / name if out else os.devnull, "a", encoding="utf-8") as file,
    ):
        for readings in read(model, queries, mine):
            made = [
                {"id": ids[i], **test.judge(ids[i], reading)} for i, reading in readings.items()
            ]
            if bad := [r for r in made if not all(map(math.isfinite, r["scores"].values()))]:
                raise UserError(
                    f"{bad[0]['id']}: its scores are {bad[0]['scores']}; damaged weights, or try --dtype float32"
                )
            file.writelines(map(line_of, made))
            file.flush()
            records |= {record["id"]: record for record in made}
            worth += sum(map(test.worth, made))
            bar.set_postfix_str(f"{test.measure} {worth / len(records):.3f}", refresh=False)
            bar.update(len(made))
    records = {id: record for part in gather_objects(mesh, records) for id, record in part.items()}
    ordered = [records[id] for id in ids]
    if out and mesh.is_first:
        write(out, ordered)
    return ordered


def _open(out: Path, settings: Record) -> dict[str, Record]:
    """The predictions that are there already, by id; settings.json is written, or compared."""
    out.mkdir(parents=True, exist_ok=True)
    files, path = sorted(out.glob("predictions*.jsonl")), out / "settings.json"
    before = read_json(path) if path.is_file() else {} if files else settings
    with parsing(out):
        refuse_other_settings(before, settings, "name another --out, or delete it")
        write_json(path, settings)
        records = {record["id"]: record for file in files for record in read_lines(file)}
    write(out, records.values())
    return records


def write(out: Path, records: Iterable[Record]) -> None:
    """Replace predictions.jsonl, and with it what other ranks have appended to files of their own."""
    replace_lines(out / "predictions.jsonl", records)
    for part in out.glob("predictions.rank-*.jsonl"):
        part.unlink()
