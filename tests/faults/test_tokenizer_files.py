"""What is written beside a bare tokenizer.model must not change what it means."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minillama.checkpoint.tokenizer_files import copy_tokenizer
from minillama.tokenizer import open_tokenizer
from tests.conftest import TEXTS


@pytest.mark.parametrize(
    "names", [{}, {"bos_id": -1}, {"bos_id": -1, "eos_id": -1}, {"bos_piece": "<begin>"}], ids=str
)
def test_a_bare_tokenizer_model_keeps_its_bos_and_eos(
    names: dict[str, Any], tmp_path: Path
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **names,
    )
    bare = tmp_path / "bare.model"
    bare.write_bytes(model.getvalue())
    (tmp_path / "copy").mkdir()
    copy_tokenizer(bare, tmp_path / "copy")
    before, after = open_tokenizer(bare), open_tokenizer(tmp_path / "copy")
    assert (before.starts_with, before.eos_id) == (after.starts_with, after.eos_id)
    assert (before.size, before.sha256) == (after.size, after.sha256)
