"""Weights in one file or in shards: all are found, and everything wrong is listed at once."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minillama.checkpoint.hf_reader import load_model, open_weights
from minillama.checkpoint.hf_writer import save_model, split_into_shards, write_weights
from minillama.errors import UserError
from minillama.tensor_writers import safetensors_writer, specs_of, torch_writer
from tests.conftest import random_model
from tests.tensors import assert_same, random_tensors, write


def sharded(directory: Path, bin: bool) -> dict[str, torch.Tensor]:
    tensors = random_tensors([(torch.float16, (8, 8))] * 4)
    directory.mkdir()
    write_weights(directory, iter(tensors.items()), specs_of(tensors), 200, bin)
    return tensors


@pytest.mark.parametrize("bin", [False, True])
def test_sharded_weights_come_back_whatever_the_kind(tmp_path, bin):
    tensors = sharded(tmp_path / "c", bin)
    assert len(list((tmp_path / "c").glob("*-of-00004.*"))) == 4
    assert_same(
        {name: entry.read() for name, entry in open_weights(tmp_path / "c").items()}, tensors
    )


def test_a_shard_is_filled_up_to_its_limit_and_the_index_counts_all_bytes(tmp_path):
    assert split_into_shards({"a": 4, "b": 4, "c": 1, "d": 9}, 8) == [["a", "b"], ["c"], ["d"]]
    sharded(tmp_path / "c", bin=False)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 8 * 8 * 2


def test_rows_that_a_vocabulary_gains_are_the_mean_in_fp32(tmp_path):
    model = random_model().bfloat16()
    save_model(model, tmp_path)
    grown = load_model(tmp_path, torch.float32, vocab_size=52)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = model.get_parameter(name).float().mean(0)
        assert torch.equal(grown.get_parameter(name)[50:], mean.expand(2, -1))


@pytest.mark.parametrize("bin", [False, True])
def test_all_bad_shards_are_listed_at_once(tmp_path, bin):
    sharded(tmp_path / "c", bin)
    shards = sorted((tmp_path / "c").glob("*-of-*"))
    shards[0].write_bytes(b"<html>")
    shards[1].write_bytes(shards[1].read_bytes()[:-80])
    shards[2].unlink()
    write(torch_writer if bin else safetensors_writer, shards[3], {"another": torch.zeros(1)})
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "c")
    for part in (
        f"{shards[0].name}: a web page",
        shards[1].name,
        f"{shards[2].name}: the index names this file, but it is not",
        f"{shards[3].name}: lacks layer.3.weight, which the index promises",
    ):
        assert part in str(caught.value)


def test_an_index_may_not_lead_out_of_its_directory(tmp_path):
    sharded(tmp_path / "c", bin=True)
    index = tmp_path / "c" / "pytorch_model.bin.index.json"
    for name in ("../secret.bin", "/etc/passwd", "sub/w.bin"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match="only plain file names"):
            open_weights(tmp_path / "c")
    index.unlink()
    with pytest.raises(UserError, match="without their index"):
        open_weights(tmp_path / "c")


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    sharded(tmp_path / "c", bin=True)
    first, second, *_ = sorted((tmp_path / "c").glob("*-of-*"))
    write(
        torch_writer, second, {"layer.0.weight": torch.zeros(1), "layer.1.weight": torch.zeros(1)}
    )
    with pytest.raises(UserError, match=rf"layer\.0\.weight is in {first.name} too"):
        open_weights(tmp_path / "c")


def test_stray_rotary_buffers_of_old_files_are_ignored(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        base / "pytorch_model.bin",
    )
    assert open_weights(base).keys() == tensors.keys()
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({key: raw[key] for key in raw if key not in ("rope_theta", "head_dim")})
    )
    assert torch.equal(load_model(base).lm_head.weight, tensors["lm_head.weight"])


def test_real_bin_checkpoints_load_like_their_safetensors(shared):
    models = shared / "models"
    expected = {name: entry.read() for name, entry in open_weights(models / "stories260K").items()}
    for name in (
        "stories260K_fp16_bin",
        "stories260K_untied_fp16_sharded_bin",
        "stories260K_untied_sharded",
    ):
        found = open_weights(models / name)
        dtype = next(iter(found.values())).dtype
        assert all(
            torch.equal(found[key].read(), tensor.to(dtype)) for key, tensor in expected.items()
        )
