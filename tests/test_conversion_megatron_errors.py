"""What Megatron's conversions refuse: each mistake is one line that says what to do instead."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import minillama
from minillama.errors import UserError
from tests.conversions import run_convert

ONE_RANK = "release/mp_rank_00/model_optim_rng.pt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor_parallel 2", "n_kv_heads = 3 cannot be cut over 2 .*; use 1 or 3"),
        ("--pipeline_parallel 4", "n_layers = 2 cannot be cut into 4 equal stages; choose a divi"),
        ("--deepspeed --pipeline_parallel 2", "with --deepspeed use --pipeline_parallel 1"),
        ("", "would get 78 rows more, .* choose a smaller --vocab_multiple"),
        ("--bias", "holds 0 biases; leave --bias out"),
        ("--type 7B", "n_layers = 2, the command says 32; leave its flag out"),
        ("--num_kv_heads 6", "n_kv_heads = 3, the command says 6"),
        ("--vocab_multple 8", "did you mean '--vocab_multiple'"),
    ],
)
def test_a_model_that_cannot_be_cut_like_this(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], flags: str, message: str
) -> None:
    source = tiny_checkpoint(vocab_size=50)
    paths = ["--input", source, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=message):
        run_convert("megatron", *paths, *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "no biases in its MLP"),
        ({"attention_bias": True}, "no biases beside grouped key/value heads"),
    ],
)
def test_biases_for_which_the_layout_has_no_place(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], changes: dict, message: str
) -> None:
    source = tiny_checkpoint(**changes)
    with pytest.raises(UserError, match="biases; add --bias"):
        minillama.megatron(source, tmp_path / "out", vocab_multiple=1)
    with pytest.raises(UserError, match=message):
        minillama.megatron(source, tmp_path / "out", vocab_multiple=1, bias=True)


@pytest.fixture
def release(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A release of three ranks and two stages, of a vocabulary of 50 rows and one of padding."""
    grid = {"tensor_parallel": 3, "pipeline_parallel": 2, "vocab_multiple": 1}
    minillama.megatron(tiny_checkpoint("source", vocab_size=50), tmp_path / "release", **grid)
    return tmp_path / "release"


def change_file(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def encoder_of(content: dict) -> dict:
    return content["model"]["language_model"]["encoder"]


FIRST = "release/mp_rank_00_000/model_optim_rng.pt"
NORM = "layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("checkpoint_version"), "checkpoint_version = None: only 3.0"),
        (lambda state: encoder_of(state).pop(NORM), "input_layernorm.weight: only in one of"),
        (lambda state: encoder_of(state)[NORM].add_(1), "differs between the tensor-parallel"),
    ],
)
def test_files_that_do_not_belong_together(
    release: Path, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    change_file(release / FIRST, change)
    with pytest.raises(UserError, match=message):
        minillama.from_megatron(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_layout_has(release: Path, tmp_path: Path) -> None:
    def add_router(state: dict) -> None:
        encoder_of(state)["layers.0.mlp.router.weight"] = torch.ones(1)

    for rank in range(3):
        change_file(release / FIRST.replace("_00_", f"_{rank:02d}_"), add_router)
    with pytest.raises(UserError, match=r"router.weight is no tensor of Megatron's LLaMA"):
        minillama.from_megatron(release, tmp_path / "out")


def test_files_that_are_missing_or_were_never_there(release: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source: holds no mp_rank_"):
        minillama.from_megatron(tmp_path / "source", tmp_path / "out")
    shutil.rmtree(release / "release" / "mp_rank_01_001")
    with pytest.raises(UserError, match=r"mp_rank_01_001/model_optim_rng.pt is missing"):
        minillama.from_megatron(release, tmp_path / "out")


def test_a_script_that_is_given_megatrons_files_says_how_to_convert_them(release: Path) -> None:
    with pytest.raises(UserError, match=r"Megatron's; convert it first: .* from-megatron --input"):
        minillama.load(release)


def test_heads_and_vocabulary_are_never_guessed(release: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shutil.move(release / "config.json", config)
    with pytest.raises(UserError, match=r"do not hold the number of heads; .* --config"):
        minillama.from_megatron(release, tmp_path / "out")
    with pytest.raises(UserError, match=r"do not hold the number of heads; .* --config"):
        minillama.reshard(release, tmp_path / "out")
    with pytest.raises(UserError, match=r"51 rows; it cannot be cropped to 52"):
        minillama.from_megatron(release, tmp_path / "out", config=config, vocab_size=52)
    with pytest.raises(UserError, match=r"Heads\(n_heads=32, n_kv_heads=32\); --config"):
        minillama.from_megatron(release, tmp_path / "out", config="7b")


def test_a_vocabulary_far_larger_than_config_json_says(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The config of the base, but the files of a model whose vocabulary was extended."""
    extended = tiny_checkpoint("extended", vocab_size=300)
    minillama.megatron(extended, tmp_path / "release")
    (tmp_path / "release" / "config.json").unlink()
    base = tiny_checkpoint("base")
    with pytest.raises(UserError, match=r"384 rows of vocabulary, config.json says 50; .*--vocab"):
        minillama.from_megatron(tmp_path / "release", tmp_path / "hf", config=base)
    minillama.from_megatron(tmp_path / "release", tmp_path / "hf", config=base, vocab_size=300)
    assert minillama.sha256(tmp_path / "hf", check=extended)


def test_a_source_grid_that_the_folders_do_not_have(release: Path, tmp_path: Path) -> None:
    """The published recipe for 34B converts for two stages, and changes from three."""
    paths = ["--input", release, "--output", tmp_path / "out", "--vocab_multiple", "1"]
    with pytest.raises(UserError, match=r"pipeline parallelism is 2, the command says 3; leave"):
        run_convert("reshard", *paths, "--src-pipeline-model-parallel-size", "3")


def test_the_flat_layout_with_mixed_heads(tmp_path: Path, tiny_checkpoint) -> None:
    """Its converter wrote several key/value heads of a rank in a wrong order."""
    minillama.megatron(tiny_checkpoint("source"), tmp_path / "release", vocab_multiple=1)

    def to_flat(state: dict) -> None:
        encoder = encoder_of(state)
        for name in list(encoder):
            encoder[name.replace("self_attention", "attention")] = encoder.pop(name)

    change_file(tmp_path / "release" / ONE_RANK, to_flat)
    with pytest.raises(UserError, match=r"before 2023-11-28, .*convert the original model again"):
        minillama.from_megatron(tmp_path / "release", tmp_path / "out")


def test_an_output_is_replaced_only_if_it_is_a_release(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    source = tiny_checkpoint("source")
    out = tmp_path / "out"
    minillama.megatron(source, out, vocab_multiple=1)
    with pytest.raises(UserError, match="already exists; --overwrite"):
        minillama.megatron(source, out, vocab_multiple=1)
    minillama.megatron(source, out, vocab_multiple=1, deepspeed=True, overwrite=True)
    assert not (out / ONE_RANK).exists()
    assert (out / "latest").read_text() == "release\n"
    with pytest.raises(UserError, match="the output would replace the input"):
        minillama.reshard(out / "release", out, vocab_multiple=1, overwrite=True)
    (out / "iter_0000100").mkdir()
    with pytest.raises(UserError, match="not a plain checkpoint directory"):
        minillama.megatron(source, out, vocab_multiple=1, overwrite=True)
