"""generate.py and eval.py on tensor ranks: the same tokens, scores and files as one rank."""

import builtins
import re
import runpy
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minillama
from minillama import comm
from minillama.errors import UserError
from minillama.files import read_json_lines
from minillama.generation.cache import Cache
from minillama.generation.loading import LoadOptions, load_engine, weights_checksum
from minillama.launch import read_launch
from minillama.lora import LINEARS, LoraConfig, save_adapter
from minillama.ops import cpu_linear
from minillama.tokenizer import Tokenizer
from tests.adapters import with_random_adapter
from tests.conftest import random_model
from tests.ranks import run_on_ranks
from tests.tensor_ranks import EIGHT_HEADS, assert_close

ROOT = Path(__file__).parents[1]
GENERATE = runpy.run_path(str(ROOT / "generate.py"))["main"]
PROMPTS = ["--prompt", "Say hello to the world", "--prompt", "the cat sat"]


@pytest.fixture
def model(tiny_checkpoint: Callable, small_tokenizer: Tokenizer) -> Path:
    """A model with a vocabulary of 400 and its tokenizer."""
    path = tiny_checkpoint(**EIGHT_HEADS, vocab_size=small_tokenizer.size + 1)
    (path / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return path


def generate(*words: Any, typed: tuple[str, ...] = ()) -> tuple[str, str]:
    """What generate.py prints, and whether it wrote to stderr. typed: by a person."""
    lines = iter(typed)

    def read(prompt: str = "") -> str:
        for line in lines:
            return line
        raise EOFError

    builtins.input = read
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as notes:
        GENERATE([str(word) for word in words])
    return printed.getvalue(), notes.getvalue()


def on_ranks(size: int, *words: Any, typed: tuple[str, ...] = ()) -> str:
    """What rank 0 prints; all others must print nothing."""
    command = (*words, "--tensor_parallel", size)
    results = run_on_ranks(size, generate_on_rank, command, typed)
    for printed in results[1:]:
        assert printed == ("", "")
    return results[0][0]


def generate_on_rank(words: tuple[Any, ...], typed: tuple[str, ...]) -> tuple[str, str]:
    """The person sits at rank 0."""
    return generate(*words, typed=typed if read_launch().rank == 0 else ())


WAYS = {
    "greedy": ["--greedy"],
    "sampling": ["--seed", "3", "--num_samples", "2", "--temperature", "1.0"],
    "top p and a penalty": ["--seed", "3", "--top_p", "0.8", "--repetition_penalty", "1.2"],
    "streaming": ["--greedy", "--stream"],
    "beams": ["--num_beams", "3"],
    "sampled beams": ["--num_beams", "2", "--temperature", "1.0", "--seed", "3"],
    "four modes": ["--mode", "all", "--seed", "3"],
    "one prompt at a time": ["--greedy", "--batch_size", "1"],
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ranks_write_the_text_of_one(way: list[str], size: int, model: Path) -> None:
    words = ("--ckpt", model, *PROMPTS, "--max_new_tokens", 12, *way)
    expected = without_seconds(generate(*words)[0])
    assert without_seconds(on_ranks(size, *words)) == expected
    assert expected.strip()


def without_seconds(printed: str) -> str:
    return "\n".join(line for line in printed.splitlines() if not line.startswith("Elapsed"))


def sample_on_rank(path: Path) -> tuple[list[list[int]], np.ndarray]:
    """The tokens of a sampling without a seed, and the logits of a prompt, on this rank."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        engine = load_engine(LoadOptions(str(path)), mesh=mesh)
        sampled = minillama.LoadedModel(engine)._with({"temperature": 1.5, "greedy": False})
        completions = [sampled.new_completion([1, 5, 9], number) for number in range(3)]
        for _ in sampled.stream(completions, seed=None):
            pass
        with torch.inference_mode():
            logits = engine.model.logits(engine.model(torch.tensor([[1, 5, 9]])))
        return [completion.ids for completion in completions], logits.numpy()


def test_ranks_sample_the_same_tokens_without_a_seed_and_without_sending_them(
    model: Path,
) -> None:
    """Their logits are the same to the bit, and rank 0 chooses the seed for all."""
    first, second = run_on_ranks(2, sample_on_rank, model)
    assert first[0] == second[0]
    assert (first[1] == second[1]).all()
    engine = load_engine(LoadOptions(str(model), device="cpu"))
    with torch.inference_mode():
        expected = engine.model.logits(engine.model(torch.tensor([[1, 5, 9]])))
    assert_close(first[1], expected.numpy(), 3e-6, "logits")
    again, _ = run_on_ranks(2, sample_on_rank, model)
    assert again[0] != first[0], "samples without a seed are different ones every time"


def test_rank_0_reads_what_a_person_types(model: Path) -> None:
    words = ("--ckpt", model, "--chat", "--greedy", "--max_new_tokens", 8)
    typed = ("Hello", "Say hello", "clear", "Hello", "quit", "not read")
    expected = without_speed(generate(*words, typed=typed)[0])
    assert without_speed(on_ranks(2, *words, typed=typed)) == expected
    assert sum("Answer:" in line for line in expected) == 3


def without_speed(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "tokens/s" not in line]


def test_an_adapter_over_its_base_is_divided_too(model: Path, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, alpha=2.0, targets=(*LINEARS, "lm_head"))
    adapted = with_random_adapter(random_model(**EIGHT_HEADS, vocab_size=401), config)
    save_adapter(adapted, config, tmp_path / "adapter", str(model))
    words = ("--ckpt", model, "--lora", tmp_path / "adapter", *PROMPTS, "--greedy")
    expected = generate(*words, "--max_new_tokens", 12)[0]
    assert on_ranks(4, *words, "--max_new_tokens", 12) == expected


def test_output_is_written_by_rank_0_and_continued_on_another_number_of_ranks(
    model: Path, tmp_path: Path
) -> None:
    words = ("--ckpt", model, *PROMPTS, "--greedy", "--max_new_tokens", 12)
    generate(*words, "--output", tmp_path / "one.jsonl")
    on_ranks(2, *words, "--output", tmp_path / "two.jsonl")
    expected = answers_in(tmp_path / "one.jsonl")
    assert answers_in(tmp_path / "two.jsonl") == expected

    lines = (tmp_path / "begun.jsonl.partial", tmp_path / "begun.jsonl")
    with pytest.raises(Interrupted):
        interrupt_first_answer(words, lines[1])
    assert "Say hello" in lines[0].read_text() or "the cat" in lines[0].read_text()
    on_ranks(4, *words, "--output", lines[1])
    assert answers_in(lines[1]) == expected


class Interrupted(Exception):
    """The machine loses its power."""


def interrupt_first_answer(words: tuple[Any, ...], output: Path) -> None:
    """Complete prompts one at a time, and stop after the first record is written."""
    from minillama.generation.output_file import CompletionFile

    original = CompletionFile.add

    def add(self: CompletionFile, number: int, record: dict[str, Any]) -> None:
        original(self, number, record)
        raise Interrupted

    CompletionFile.add = add
    try:
        generate(*words, "--output", output)
    finally:
        CompletionFile.add = original


def answers_in(path: Path) -> list[tuple[Any, ...]]:
    records = read_json_lines(path)
    return [(record["prompt"], record["completion_ids"]) for record in records]


def inspect_on_rank(path: Path) -> tuple[str, list[int], bool]:
    """The checksum of the weights, the shape of a layer's keys, and whether weights are packed."""
    cpu_linear.LARGE = 1
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = load_engine(LoadOptions(str(path)), mesh=mesh).model
        cache = Cache.for_model(model, model.config, batch=2, capacity=5)
        checksum = weights_checksum(model, mesh)
        cpu_linear.pack_weights(model, num_rows=2)
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        return checksum, list(cache.keys[0].shape), weight.is_mkldnn


def test_the_cache_has_the_local_heads_and_the_checksum_is_that_of_the_whole(model: Path) -> None:
    """The weights are packed for decoding after they are cut."""
    whole = load_engine(LoadOptions(str(model), device="cpu")).model
    results = run_on_ranks(4, inspect_on_rank, model)
    assert results == [(weights_checksum(whole), [2, 1, 5, 4], True)] * 4


def load_and_complete(path: Path) -> str:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = minillama.load(path, mesh=mesh)
        return model.generate("the cat", greedy=True, max_new_tokens=9)


def test_the_python_api_divides_a_model_among_ranks(model: Path) -> None:
    expected = minillama.load(model, device="cpu").generate(
        "the cat", greedy=True, max_new_tokens=9
    )
    assert run_on_ranks(2, load_and_complete, model) == [expected] * 2


@pytest.mark.parametrize(
    ("size", "words", "message"),
    [
        (1, ["--tensor_parallel", "2"], "needs 2 ranks; start them: torchrun --nproc_per_node 2"),
        (2, [], "torchrun started 2 ranks, and --tensor_parallel is 1; use --tensor_parallel 2"),
        (2, ["--tensor_parallel", "2", "--web"], "--web is for one process"),
        (2, ["--tensor_parallel", "2", "--dtype", "int8"], "--dtype int8 and --tensor_parallel"),
        (3, ["--tensor_parallel", "3"], "n_heads = 8 cannot be cut over 3 .*; use 1 or 2 or 4"),
        (1, ["--tensor_parallel", "0"], "--tensor_parallel 0: must be at least 1"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    size: int, words: list[str], message: str, model: Path
) -> None:
    request = [] if "--web" in words else ["--prompt", "Hello"]
    for error in run_on_ranks(size, refusal_of, ["--ckpt", str(model), *request, *words]):
        assert re.search(message, error)


def refusal_of(words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        generate(*words)
    return str(caught.value)
