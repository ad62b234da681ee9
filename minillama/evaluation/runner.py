"""Score a model on the questions of a task, over several ranks, and continue interrupted runs.

    options ──▶ benchmark: queries ──▶ batches ──▶ likelihoods ──▶ records ──▶ summary, table

Batches are planned over all queries, whichever rank computes them and whichever are done already.
So predictions.jsonl is equal to the byte for any number of ranks and interruptions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from minillama import ops
from minillama.comm import Mesh, gather_objects
from minillama.errors import UserError
from minillama.evaluation import predictions
from minillama.evaluation.batching import QueryBatch, plan
from minillama.evaluation.likelihood import QueryResult, score_queries
from minillama.evaluation.multiple_choice import MultipleChoice
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.perplexity import Perplexity
from minillama.evaluation.references import read_reference
from minillama.evaluation.report import EvalResult, Record
from minillama.evaluation.result_files import write_results
from minillama.files import write_json
from minillama.generation.engine import Engine
from minillama.generation.loading import LoadOptions, load_engine, weights_checksum
from minillama.grid import Grid, make_grid
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.threads import use_threads_for

Benchmark = MultipleChoice | Perplexity


def evaluate(
    options: EvalOptions,
    model: Engine | LoadOptions,
    mesh: Mesh,
    announce: Callable[[str], None] = lambda headline: None,
    check_config: Callable[[LlamaConfig], None] = lambda config: None,
    tensor_parallel: int = 1,
) -> EvalResult:
    """Score a model on a task that reads data. Every rank calls it; rank 0 writes --out.

    tensor_parallel: how many ranks divide a model among them; the others share the questions.
    announce: called once, before the first question, with a line on the model and the protocol.
    check_config: called once, when the model is loaded; may raise UserError.
    """
    start = time.perf_counter()
    reference = read_reference(options)
    grid = make_grid(mesh, tensor_parallel)
    if isinstance(model, LoadOptions):
        dtype = model.dtype
        devices = mesh.devices or [mesh.device]
        engine = load_engine(model, devices=devices, mesh=grid.tensor)
        use_threads_for(engine.model.config.parameter_count())
    else:
        dtype = str(model.model.lm_head.weight.dtype).removeprefix("torch.")
        engine = model
    check_config(engine.model.config)
    max_length = options.max_length or engine.model.config.max_seq_len
    check_length(max_length, engine.model)
    benchmark = make_benchmark(options, engine, max_length)
    about = describe(options, benchmark, engine, max_length)
    announce(format_headline(engine, about, len(benchmark.queries)))
    settings = {
        **about,
        "queries": len(benchmark.queries),
        "dtype": dtype,
        "weights_sample_sha256": weights_checksum(engine.model, grid.tensor),
    }
    out = Path(options.out) if options.out else None
    ops.pack_weights(engine.model, num_rows=max_length)
    records = predict(engine.model, benchmark, options.batch_size, out, settings, grid)
    summary = {
        **about,
        **benchmark.summarise(records),
        "seconds": round(time.perf_counter() - start, 2),
        "model": str(engine.path),
    }
    if out and mesh.is_first:
        write_json(out / "summary.json", summary)
        write_results(options, summary, reference, records)
    return EvalResult(summary, benchmark.format_table(summary, reference), records)


def check_length(max_length: int, model: Llama) -> None:
    context = model.config.max_seq_len
    if not 1 < max_length <= context:
        raise UserError(
            f"--max_length {max_length}: must be from 2 to the model's context of {context} tokens"
        )


def make_benchmark(options: EvalOptions, engine: Engine, max_length: int) -> Benchmark:
    kind = Perplexity if options.task == "perplexity" else MultipleChoice
    return kind(options, engine.tokenizer, max_length)


def describe(options: EvalOptions, benchmark: Benchmark, engine: Engine, max_length: int) -> Record:
    """Everything besides the model that a score depends on."""
    hashes: dict[str, str] | str = benchmark.hashes
    if len(hashes) == 1:
        hashes = next(iter(benchmark.hashes.values()))
    about = {
        "task": options.task,
        **asdict(benchmark.setup),
        "bos": bool(engine.tokenizer.starts_with),
        "max_length": max_length,
        "tokenizer_sha256": engine.tokenizer.sha256,
        "data_sha256": hashes,
    }
    if isinstance(benchmark, MultipleChoice) and benchmark.wrapping is not None:
        about["template"] = benchmark.wrapping.name
        about["bos"] = engine.tokenizer.bos_id in benchmark.wrapping.context("")
    return about


def format_headline(engine: Engine, about: Record, num_queries: int) -> str:
    bos = "with" if about["bos"] else "without"
    template = f"template {about['template']}, " if "template" in about else ""
    return (
        f"{engine.path}: {about['task']}, protocol {about['protocol']}, {template}"
        f"{about['n_shots']} shots, {bos} BOS, split {about['split']}, {num_queries} queries"
    )


def predict(
    model: Llama,
    benchmark: Benchmark,
    batch_size: int,
    out: Path | None,
    settings: Record,
    grid: Grid,
) -> list[Record]:
    """A record for each query, in order, on every rank.

    Data ranks share the queries. Tensor ranks compute each of them together, and the first of a
    tensor line writes.

    out: the directory for predictions.jsonl, from which an interrupted run goes on.
    """
    ids = list(benchmark.queries)
    queries = list(benchmark.queries.values())
    resumed: dict[str, Record] = {}
    if out and grid.all.is_first:
        resumed = predictions.resume(out, settings)
    records = gather_objects(grid.all, resumed)[0]
    missing = {i for i, id in enumerate(ids) if id not in records}
    batches = [b for b in plan(queries, batch_size) if not missing.isdisjoint(b.members)]
    metric_sum = sum(map(benchmark.metric, records.values()))
    with tqdm(
        total=len(ids),
        initial=len(records),
        unit="query",
        disable=not grid.all.is_first,
        dynamic_ncols=True,
    ) as bar:
        for results in score_queries(model, queries, share_of(batches, grid.data)):
            new_records = make_records(benchmark, {ids[i]: results[i] for i in results})
            if out and grid.tensor.is_first:
                predictions.append(out, grid.data.rank, new_records.values())
            records.update(new_records)
            metric_sum += sum(map(benchmark.metric, new_records.values()))
            mean = metric_sum / len(records)
            bar.set_postfix_str(f"{benchmark.metric_name} {mean:.3f}", refresh=False)
            bar.update(len(new_records))
    for records_of_rank in gather_objects(grid.data, records):
        records.update(records_of_rank)
    in_order = [records[id] for id in ids]
    if out and grid.all.is_first:
        predictions.publish(out, in_order)
    return in_order


def share_of(batches: list[QueryBatch], mesh: Mesh) -> list[QueryBatch]:
    """The batches of this rank: successive ones, so that ranks have about equal costs."""
    total = sum(batch.cost for batch in batches)
    share = []
    end = 0
    for batch in batches:
        end += batch.cost
        rank = (end - 1) * mesh.size // total
        if rank == mesh.rank:
            share.append(batch)
    return share


def make_records(benchmark: Benchmark, results: dict[str, QueryResult]) -> dict[str, Record]:
    """The records of some queries, by id. Raises UserError for scores that are not finite."""
    records = {}
    for id, result in results.items():
        record = {"id": id, **benchmark.make_record(id, result)}
        scores = record["scores"]
        if not all(map(math.isfinite, scores.values())):
            raise UserError(
                f"{id}: its scores are {scores}; damaged weights, or try --dtype float32"
            )
        records[id] = record
    return records
