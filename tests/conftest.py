import os
from pathlib import Path

import pytest

from minillama.tokenizer import SentencePieceTokenizer, open_tokenizer, train_tokenizer

TEXTS = ["Below is an instruction that describes a task. Write a response that appropriately completes the request.",
         "### Instruction:", "Say hello to the world 123", "### Response:", "Hello, world!", "USER: Hi ASSISTANT: Hello [INST]",
         "A chat between a curious user and an artificial intelligence assistant.",
         "玄德曰：备今日得见天日。", "the cat sat on the mat  twice"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs, which are no part of the project; tests that need them skip where it is absent."""
    path = Path(os.environ.get("MINILLAMA_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"{path} is absent; MINILLAMA_SHARED names the folder of shared data")
    return path


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A LLaMA-style vocabulary of 400 pieces, learnt from a handful of sentences."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS * 3, 400))
    return open_tokenizer(path)
