"""Directories in Meta's layout that are broken, and models that Meta's layout cannot hold."""

import pytest
import torch

from minillama.checkpoint.hf_reader import open_weights
from minillama.conversion.meta import hf_to_meta, meta_to_hf
from minillama.conversion.writer import Output
from minillama.errors import UserError
from tests.conversions import random_meta, run_convert, save_meta


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "params.json").unlink(), "no such file"),
        (lambda d: (d / "params.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "params.json").write_text('{"dim": 24}'), "n_layers = None"),
        (lambda d: save_meta(d, [], use_scaled_rope=True), "use_scaled_rope"),
        (lambda d: save_meta(d, [], vocab_size=49), "vocab_size = 49, the embedding has 50 rows"),
        (lambda d: save_meta(d, [], n_layers=3), "params.json says 3 layers"),
        (
            lambda d: save_meta(d, [], n_layers=1),
            r"1 layers, and layers\.1\.attention\.wk\.weight is none of their tensors",
        ),
        (
            lambda d: save_meta(d, [random_meta(), random_meta() | {"stray": torch.ones(1)}]),
            "stray is none of their tensors",
        ),
        (lambda d: save_meta(d, [], n_kv_heads=6), "do not fit config.json"),
        (lambda d: save_meta(d, [random_meta(), {}]), r"consolidated\.01\.pth: lacks"),
        (
            lambda d: save_meta(d, [random_meta() | {"norm.weight": torch.ones(25)}]),
            "do not fit config.json",
        ),
        (
            lambda d: save_meta(d, [random_meta(), random_meta() | {"norm.weight": torch.ones(9)}]),
            r"model\.norm\.weight: the shards do not fit together: .* in consolidated\.01\.pth",
        ),
        (lambda d: (d / "consolidated.00.pth").write_bytes(b"<html>"), "web page"),
        (lambda d: (d / "consolidated.00.pth").unlink(), "holds no consolidated"),
    ],
)
def test_a_broken_meta_directory_is_refused_by_name(tmp_path, break_it, message):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    break_it(directory)
    with pytest.raises(UserError, match=message):
        run_convert("meta", "--input", directory, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_different_models_are_told_by_their_norms(tmp_path, tiny_checkpoint):
    """Every shard holds the norms; they differ between models."""
    hf_to_meta(tiny_checkpoint(), Output(tmp_path / "meta"), num_shards=3)
    hf_to_meta(tiny_checkpoint("other", seed=9), Output(tmp_path / "other-meta"), num_shards=3)
    other = tmp_path / "other-meta" / "consolidated.01.pth"
    other.replace(tmp_path / "meta" / "consolidated.01.pth")
    with pytest.raises(UserError, match="differs between the shards"):
        meta_to_hf(tmp_path / "meta", Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, shared):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    tokenizer = shared / "tokenizers/llama/tokenizer.model"
    with pytest.raises(UserError, match="32000 tokens, but the embedding has 50 rows"):
        meta_to_hf(directory, Output(tmp_path / "out"), tokenizer)


@pytest.mark.parametrize(
    ("changes", "num_shards", "message"),
    [
        ({}, 2, "n_kv_heads = 3 cannot be cut into 2 shards"),
        ({"attention_bias": True}, 1, "no biases"),
        ({"head_dim": 6}, 1, "head_dim = 6"),
    ],
)
def test_a_model_that_metas_layout_cannot_hold_is_refused(
    tmp_path, tiny_checkpoint, changes, num_shards, message
):
    with pytest.raises(UserError, match=message):
        hf_to_meta(tiny_checkpoint(**changes), Output(tmp_path / "out"), num_shards)


def test_a_meta_directory_given_as_a_checkpoint_shows_the_command(tmp_path):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    with pytest.raises(UserError, match=r"python convert\.py meta --input"):
        open_weights(directory)
