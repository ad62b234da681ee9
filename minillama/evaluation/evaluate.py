"""A score from beginning to end: read the test, let the model answer, print the table, write summary.json."""

import json
import time
from argparse import Namespace
from pathlib import Path

from minillama import comm
from minillama.errors import UserError, read_json
from minillama.evaluation.choices import Choices
from minillama.evaluation.perplexity import Perplexity
from minillama.evaluation.predictions import predict, sample_of_weights
from minillama.generation.loading import load_session
from minillama.generation.sampling import Sampling


def evaluate(options: Namespace) -> None:
    """`eval.py` for the tasks that read data. Under torchrun every rank calls it, and the first one reports."""
    began = time.perf_counter()
    reference = read_json(Path(options.compare)) if options.compare else None
    session, path = load_session(options, Sampling(temperature=0.0))
    model, tokenizer, context = session.model, session.tokenizer, session.model.config.max_seq_len
    max_length = options.max_length or context
    if not 1 < max_length <= context:
        raise UserError(f"--max_length {max_length}: the model's context is {context} tokens; use at most that")
    test = (Perplexity if options.task == "perplexity" else Choices)(options, tokenizer, max_length)
    hashes = next(iter(test.hashes.values())) if len(test.hashes) == 1 else test.hashes
    about = {"task": options.task, **test.about, "bos": tokenizer.bos_id is not None, "max_length": max_length,
             "tokenizer_sha256": tokenizer.sha256, "data_sha256": hashes}
    settings = about | {"questions": len(test.queries), "dtype": options.dtype, "weights": sample_of_weights(model)}
    out = Path(options.out) if options.out else None
    with comm.start(options.device) as mesh:
        model.to(mesh.device)
        mesh.print(f"{path}: {options.task} by protocol {about['protocol']}, {about['n_shots']} shots, begin token: "
                   f"{'yes' if about['bos'] else 'no'}, split {about['split']}, {len(test.queries)} questions")
        records = predict(model, test, options.batch_size, out, settings, mesh)
        if not mesh.is_first:
            return
    summary = about | test.summarise(records) | {"seconds": round(time.perf_counter() - began, 2), "model": str(path)}
    print(test.table(summary, reference))
    if out:
        (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
