"""Perplexity is transformers' loss, over windows that predict each token once."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.evaluation.perplexity import Perplexity, read_texts, window_query
from minillama.evaluation.runner import predict
from minillama.grid import make_grid
from minillama.tokenizer import Tokenizer
from tests.evaluation.conftest import words
from tests.peers import open_in_transformers


def test_windows_worked_by_hand() -> None:
    """Ten tokens, a context of four: the last window reads back to have four tokens of context."""
    ids = list(range(10))
    windows = [window_query(ids, start, max_length=4) for start in (0, 4, 8)]
    assert [window.context for window in windows] == [[0], [4], [5, 6, 7, 8]]
    assert [window.continuations for window in windows] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[9]]]


@pytest.mark.parametrize("context", [16, 64, 1000])
def test_perplexity_is_transformers_loss_over_windows_that_predict_each_token_once(
    tmp_path: Path,
    small_tokenizer: Tokenizer,
    context: int,
    tiny_checkpoint: Callable,
    options: Callable,
) -> None:
    directory = tiny_checkpoint(vocab_size=small_tokenizer.size, max_seq_len=1000)
    text = words(1, 150) + " é 玄德"  # more bytes than characters
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    task_options = options("perplexity", data=str(tmp_path / "text.txt"))
    test = Perplexity(task_options, small_tokenizer, context)
    records = predict(load_model(directory).eval(), test, 4, None, {}, make_grid(Mesh()))
    summary = test.summarise(records)

    ids = [small_tokenizer.bos_id, *small_tokenizer.encode(text)]
    peer = open_in_transformers(directory)
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        window = torch.tensor([ids[max(0, end - context) : end + 1]])
        with torch.inference_mode():
            logits = peer(window[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        total += losses[-(end - start) :].sum().item()
    assert summary["n"] == len(ids) - 1
    assert summary["loss"] == pytest.approx(total / summary["n"], rel=1e-5)
    bits_per_byte = total / len(text.encode()) / math.log(2)
    assert summary["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)


@pytest.fixture
def perplexity(tmp_path: Path, options: Callable, small_tokenizer: Tokenizer) -> Callable:
    """The benchmark of a .jsonl file with this text."""

    def make(text: str) -> Perplexity:
        path = tmp_path / "t.jsonl"
        path.write_text(text)
        return Perplexity(options("perplexity", data=str(path)), small_tokenizer, 512)

    return make


def test_documents_of_a_jsonl_file_do_not_see_each_other(
    perplexity: Callable, small_tokenizer: Tokenizer
) -> None:
    test = perplexity('{"text": "the cat"}\n{"text": "the mat"}\n')
    contexts = [query.context for query in test.queries.values()]
    assert contexts == [[small_tokenizer.bos_id]] * 2


def test_records_without_text_are_refused(perplexity: Callable) -> None:
    with pytest.raises(UserError, match=r"line 2\): lacks the string"):
        perplexity('{"text": "the cat"}\n{"txt": "the mat"}\n')
    with pytest.raises(UserError, match="its texts are empty"):
        perplexity('{"text": ""}\n')


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.test.tokens", "a.txt"])
def test_a_text_is_read_whatever_its_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"one\r\ntwo")
    assert list(read_texts(tmp_path / name)) == ["one\ntwo"]
