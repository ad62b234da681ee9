"""Complete many prompts: print the completions in order, or write a record of each prompt."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama.chat import name_of
from minillama.errors import UserError
from minillama.files import numbered_lines, open_text
from minillama.generation.decode import Completion
from minillama.generation.engine import Engine
from minillama.generation.loading import weights_checksum
from minillama.generation.output_file import CompletionFile
from minillama.generation.ranks import share_from_first
from minillama.json_values import parse_json

Prompt = str | list[int]  # text, or token ids

# Flags that a completion does not depend on: an interrupted --output goes on under other values.
FREE = {
    "ckpt",
    "device",
    "devices",
    "tensor_parallel",
    "debug",
    "host",
    "port",
    "prompt",
    "prompt_ids",
    "prompt_file",
    "stream",
    "output",
    "batch_size",
    "mode",
    "translation",
}


@dataclass(frozen=True)
class PromptOptions:
    """How many prompts are completed."""

    num_samples: int = 1  # completions of each prompt
    batch_size: int = 8  # completions written at once; it changes no completion
    seed: int | None = None
    stream: bool = False  # print text as it comes, prompt by prompt
    show_progress: bool = False  # a progress bar in place of the completions


def read_prompt_file(path: Path) -> list[str]:
    """Prompts, one a line that is not blank, read as data files are."""
    prompts = []
    is_json = path.suffix == ".jsonl"
    with open_text(path) as file:
        for number, line in numbered_lines(file):
            prompt = prompt_of_record(line, f"{path}: line {number}") if is_json else line
            prompts.append(prompt)
    return prompts


def prompt_of_record(line: str, place: str) -> str:
    """The prompt of a line of JSON. place: the file and line, for the error."""
    record = parse_json(line, place)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{place} is not a JSON object with the text "prompt"')
    return prompt


def encode_prompts(engine: Engine, prompts: list[Prompt], system: str = "") -> list[list[int]]:
    """Token ids of each prompt. Raises UserError for an id beyond the vocabulary."""
    vocab_size = engine.model.config.vocab_size
    encoded = []
    for prompt in prompts:
        ids = engine.encode_prompt(prompt, system) if isinstance(prompt, str) else prompt
        highest = max(ids, default=0)
        if highest >= vocab_size:
            raise UserError(f"--prompt_ids: {highest} is beyond the vocabulary of {vocab_size}")
        encoded.append(ids)
    return encoded


def complete_prompts(
    engine: Engine,
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    options: PromptOptions,
    file: CompletionFile | None,
) -> None:
    """Complete all prompts, given as the user wrote them and as token ids.

    file: gets the records, on the first rank; prompts whose record it has are left out. After
    Ctrl-C, what was written of unprinted completions is printed, and the file keeps the finished
    ones.
    """
    done = share_from_first(engine.mesh, set(file.done) if file else set())
    requests = engine.new_completions(prompt_ids, options.num_samples)
    requests = {index: request for index, request in requests.items() if index not in done}
    unprinted: deque[Completion] = deque()
    if not options.show_progress and not options.stream:
        unprinted.extend(completion for request in requests.values() for completion in request)
    batch_size = 1 if options.stream else options.batch_size
    bar = tqdm(
        total=len(prompts), initial=len(done), unit="prompt", disable=not options.show_progress
    )
    try:
        for index, text in engine.stream_all(requests, batch_size, options.seed):
            is_done = all(completion.is_finished for completion in requests[index])
            if options.stream:
                print(text, end="\n" if is_done else "", flush=True)
            while unprinted and unprinted[0].is_finished:
                print(unprinted.popleft().text, flush=True)
            bar.update(is_done)
            if is_done and file:
                file.add(index, record_of(engine, prompts[index], requests[index]))
    except KeyboardInterrupt:
        started = [completion.text for completion in unprinted if completion.text]
        print(*started, sep="\n", flush=True)
        if file:
            progress = f"{len(file.done)} of {len(prompts)} completions are in {file.partial}"
            print(f"\n{progress}; the same command goes on", file=sys.stderr)
        raise
    finally:
        bar.close()
    if file:
        file.finish()


def open_output(
    engine: Engine, prompt_ids: list[list[int]], flags: Mapping[str, Any]
) -> CompletionFile | None:
    """The file of --output, with the records of an interrupted run.

    None without --output, and on all ranks but the first. Every rank calls this.
    """
    if not flags["output"]:
        return None
    settings = settings_of(engine, prompt_ids, flags)
    return CompletionFile(Path(flags["output"]), settings) if engine.mesh.is_first else None


def settings_of(
    engine: Engine, prompt_ids: list[list[int]], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """What a completion depends on: an interrupted file goes on only if all of it is equal."""
    kept = {name: value for name, value in flags.items() if name not in FREE}
    return {
        "checkpoint": str(engine.path),
        "weights_sample_sha256": weights_checksum(engine.model, engine.mesh),
        "prompts_sha256": hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest(),
        **kept,
        "template": name_of(engine.template),
    }


def record_of(engine: Engine, prompt: Prompt, completions: list[Completion]) -> dict[str, Any]:
    """A prompt's record in --output."""
    prompt_ids = completions[0].prompt_ids
    seconds = max(completion.seconds for completion in completions)
    num_tokens = sum(len(completion.ids) for completion in completions)
    record = {
        "prompt": prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt_ids),
        "prompt_ids": prompt_ids,
        "completions": [completion.text for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "seconds": round(seconds, 4),
        "tokens_per_second": round(num_tokens / seconds, 2),
    }
    if engine.config.beams:
        record["scores"] = [completion.score for completion in completions]
    return record
