"""Fixtures that several chapters' tests share."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.generation.decode import Completion, decode
from minillama.generation.sampling import Sampling
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import SentencePieceTokenizer, open_tokenizer, train_tokenizer
from minillama.train_config import TrainConfig
from tests.datasets import alpaca, build, write_json_lines

torch.set_num_threads(1)  # one thread adds in one order, and forked ranks do not fight over the CPU

# 6 query and 3 key/value heads: n_heads != n_kv_heads², so a confusion of the two counts cannot
# come out right by chance.
TINY = LlamaConfig(
    dim=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    ffn_dim=42,
    vocab_size=50,
    max_seq_len=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
)

TEXTS = [
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "### Instruction:",
    "Say hello to the world 123",
    "### Response:",
    "Hello, world!",
    "USER: Hi ASSISTANT: Hello [INST]",
    "A chat between a curious user and an artificial intelligence assistant.",
    "玄德曰：备今日得见天日。",
    "the cat sat on the mat  twice",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    every = "let every operation on files fail once (minutes), not a few of each command"
    parser.addoption("--all-kill-points", action="store_true", help=every)


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny model in which every parameter matters: norms are not 1, biases not 0, attention
    not uniform.
    """
    model = Llama(replace(TINY, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("norm.weight")), 0.2, generator=generator)
    return model


def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, until one of `stop` (not yielded) or max_new_tokens."""
    completion = Completion(prompt, max_new_tokens)
    for _ in decode(model, [completion], sampling, stop, seed):
        if completion.finish_reason != "eos":
            yield completion.ids[-1]


def random_tokens(*shape: int, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs that is not part of the project; tests that need it skip where
    it is absent.
    """
    folder = Path(
        os.environ.get("MINILLAMA_SHARED") or Path(__file__).parents[2] / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip(f"real inputs not found ({folder}); MINILLAMA_SHARED names their folder")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small random checkpoint and returns its directory; keywords
    change its config.
    """

    def write(
        name: str = "base", dtype: torch.dtype = torch.float32, seed: int = 0, **changes
    ) -> Path:
        save_model(random_model(seed, **changes).to(dtype), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A LLaMA-style vocabulary of 400 pieces, learnt from a handful of sentences."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS * 3, 400))
    return open_tokenizer(path)


@pytest.fixture
def alpaca_dataset(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> tuple[Path, Path]:
    """The file of 40 Alpaca records, and the prefix of the data set made from it."""
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(40))
    build([source], small_tokenizer, tmp_path / "set")
    return source, tmp_path / "set"


@pytest.fixture(scope="session")
def llama_tokenizer(shared: Path) -> SentencePieceTokenizer:
    """The published vocabulary of LLaMA."""
    return open_tokenizer(shared / "tokenizers/llama")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an instruction file, a vocabulary, and a random LLaMA that fits it."""
    from tests.runs import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def settings_for(inputs: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a small run in a folder of its own; keywords change them."""
    from tests.runs import small_run

    return partial(small_run, inputs, tmp_path / "run")


@pytest.fixture(scope="session")
def run_settings(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of six steps; see tests/state_runs.py."""
    from tests.state_runs import make_settings

    return make_settings(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def uninterrupted(run_settings: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of that run when nothing stops it."""
    from tests.state_runs import fingerprint, train_here

    run = replace(run_settings, out_dir=str(tmp_path_factory.mktemp("whole") / "run"))
    train_here(run)
    return fingerprint(run)
