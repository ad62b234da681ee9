"""Megatron's files: those of the real converters, and back to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minillama
from minillama.conversion.megatron_layout import fuse, split
from minillama.errors import UserError
from tests.conftest import TINY, random_model
from tests.conversions import run_convert
from tests.megatron import (
    assert_same_weights,
    cases_of,
    described,
    described_directory,
    formula_config,
    formula_weights,
    leaves,
    save_weights,
)
from tests.memory import peak_growth

ORIGINALS = ("gqa_tp2_pp2_merge", "mha_tp2_deepspeed")


def test_a_fused_tensor_by_hand() -> None:
    """Four query heads, two key/value heads, two rows a head: the query rows of a group, its key
    rows, its value rows."""
    q = torch.arange(0, 8)
    k = torch.arange(10, 14)
    v = torch.arange(20, 24)
    fused = fuse([q, k, v], groups=2)
    assert fused.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    for index, part in enumerate((q, k, v)):
        assert torch.equal(split(fused, index, modules=3, groups=2, group=2), part)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gqa_tp2_pp2_merge", "2 --merge-mlp --make-vocab-size-divisible-by 8"),
        ("mha_tp2_deepspeed", "1 --deepspeed --make-vocab-size-divisible-by 4"),
    ],
)
def test_the_files_hold_what_the_real_converter_wrote(
    shared: Path, tmp_path: Path, name: str, flags: str
) -> None:
    """Names, order, dtypes, shapes and bytes; and from the real files comes the input again."""
    original = shared / "parallel" / name
    run_convert(
        "convert_weights_from_huggingface.py",
        *("--input-model-dir", original / "hf", "--output-model-dir", tmp_path / "megatron"),
        *"--type tiny --num_layers 2 --num_heads 4 --hidden_size 32".split(),
        *f"--tensor-model-parallel-size 2 --pipeline-model-parallel-size {flags}".split(),
    )
    files = [path for path in (original / "megatron").rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        written = tmp_path / "megatron" / path.relative_to(original / "megatron")
        if path.suffix == ".pt":
            assert described(written) == described(path)
        else:
            assert written.read_bytes() == path.read_bytes()
    hf = original / "hf"
    minillama.from_megatron(original / "megatron", tmp_path / "hf", config=hf)
    assert_same_weights(tmp_path / "hf", hf)


def flags_of(case: dict[str, Any]) -> list[str]:
    """The flags of a case; its first two are the directories."""
    return case["args"][2:]


@pytest.mark.parametrize("name", ["hf_to_megatron_mha", "hf_to_megatron_special"])
def test_the_files_hold_what_the_lists_of_the_real_converter_say(
    shared: Path, tmp_path: Path, name: str
) -> None:
    """12 grids of a model with as many key/value heads, 10 ways to pad a vocabulary of 325."""
    lists = cases_of(shared, f"{name}.json")
    dtype = getattr(torch, lists["model"].pop("dtype"))
    config = formula_config(**lists["model"])
    source = save_weights(tmp_path / "hf", config, formula_weights(config, dtype))
    compared = 0
    for number, case in enumerate(lists["cases"]):
        paths = ("--input-model-dir", source, "--output-model-dir", tmp_path / f"out{number}")
        words = ["convert_weights_from_huggingface", *paths, *flags_of(case)]
        is_overwritten = "--deepspeed" in words and case["pp"] > 1  # the last stage, over the first
        if is_overwritten or case.get("exit"):
            with pytest.raises(UserError, match=r"DeepSpeed's files|smaller --vocab_multiple"):
                run_convert(*words)
            continue
        run_convert(*words)
        written = described_directory(tmp_path / f"out{number}", list(case["files"]))
        assert written == case["files"], case["case"]
        compared += 1
    assert compared == len(lists["cases"]) - 2 * (name == "hf_to_megatron_special")


FLAT_NAMES = {
    "model/language_model/embedding/word_embeddings/": "embedding.word_embeddings.",
    "model/language_model/output_layer/": "lm_head.lm_head.",
    "model/language_model/encoder/": "language_model.",
    ".self_attention.": ".attention.",
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
}


def flatten_file(path: Path) -> None:
    """Turn a file of the nested layout into one of the flat layout."""
    model = {}
    for name, value in leaves(torch.load(path, weights_only=True)):
        for nested, flat in FLAT_NAMES.items():
            name = name.replace(nested, flat)
        if name == "language_model.layers.0.attention.query_key_value.weight":
            model["language_model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
        if isinstance(value, torch.Tensor):
            model[name] = value
    torch.save({"checkpoint_version": 3.0, "model": model}, path)


def by_name(rows: list[list[Any]]) -> dict[str, list[Any]]:
    return {name: value for name, *value in rows if not name.endswith("inv_freq")}


FLAT_MODELS = {
    "mha": (formula_config(4, 64, 8, 8, 96, 320, False), torch.float32),
    "gqa2": (formula_config(2, 64, 8, 2, 112, 256, False), torch.bfloat16),
    "bias": (formula_config(2, 32, 4, 4, 64, 256, True), torch.float32),
}


def test_the_flat_layout_of_the_real_converter_is_read(shared: Path, tmp_path: Path) -> None:
    """Our files under its names are its files, and reading them gives the input again."""
    cases = [case for case in cases_of(shared, "flat_layout.json")["cases"] if "files" in case]
    assert len(cases) == 6
    for case in cases:
        config, dtype = FLAT_MODELS[case["model"]]
        source = tmp_path / case["case"] / "hf"
        out = tmp_path / case["case"] / "megatron"
        save_weights(source, config, formula_weights(config, dtype))
        paths = ("--input-model-dir", source, "--output-model-dir", out)
        run_convert("convert_weights_from_huggingface", *paths, *flags_of(case))
        for path in out.rglob("*.pt"):
            flatten_file(path)
            expected = case["files"][str(path.relative_to(out))]
            assert by_name(described(path)) == by_name(expected)
        minillama.from_megatron(out, tmp_path / case["case"] / "back")
        assert_same_weights(tmp_path / case["case"] / "back", source)


MHA = replace(TINY, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=6, ffn_dim=44)
GQA = replace(TINY, n_heads=8, n_kv_heads=4, head_dim=4, dim=32, ffn_dim=44)
CONFIGS = {
    "all heads alike": MHA,
    "grouped heads": GQA,
    "tied": replace(MHA, tie_embeddings=True),
    "biases": replace(MHA, attention_bias=True),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("vocab_size", [50, 53])
def test_to_megatron_and_back_is_exact(tmp_path: Path, kind: str, vocab_size: int) -> None:
    config = replace(CONFIGS[kind], vocab_size=vocab_size)
    weights = dict(random_model(**vars(config)).named_parameters())
    source = save_weights(tmp_path / "hf", config, {n: w.half() for n, w in weights.items()})
    cut = {"bias": config.attention_bias, "vocab_multiple": 4}
    for tensor_parallel in (1, 2, 4):
        for pipeline_parallel in (1, 2):
            out = tmp_path / f"{tensor_parallel}x{pipeline_parallel}"
            grid = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
            merged = bool(pipeline_parallel - 1)
            minillama.megatron(source, out / "megatron", merge_mlp=merged, **cut, **grid)
            minillama.from_megatron(out / "megatron", out / "hf")
            assert_same_weights(out / "hf", source)
            assert minillama.sha256(out / "hf", check=source)


def test_a_changed_grid_equals_a_direct_conversion(tmp_path: Path) -> None:
    config = replace(GQA, vocab_size=53)
    weights = dict(random_model(**vars(config)).named_parameters())
    source = save_weights(tmp_path / "hf", config, weights)
    options = {"vocab_multiple": 4, "merge_mlp": True}
    minillama.megatron(source, tmp_path / "old", tensor_parallel=4, pipeline_parallel=2, **options)
    minillama.megatron(source, tmp_path / "direct", tensor_parallel=2, **options)
    minillama.reshard(tmp_path / "old", tmp_path / "new", tensor_parallel=2, vocab_multiple=4)
    (tmp_path / "old" / "config.json").unlink()  # the real converter writes none
    run_convert(
        "convert_weights_when_tp_pp_change.py",
        *("--input-model-dir", tmp_path / "old" / "release", "--output-model-dir"),
        *(tmp_path / "published", "--orig-vocab-size", "53", "--make-vocab-size-divisible-by", "4"),
        *"--src-tensor-model-parallel-size 4 --src-pipeline-model-parallel-size 2".split(),
        *"--tgt-tensor-model-parallel-size 2 --tgt-pipeline-model-parallel-size 1".split(),
        *"--merge-mlp --type 34B --num_heads 8 --num_kv_heads 4 --hidden_size 32".split(),
        *("--num_layers", "2"),
    )
    files = sorted((tmp_path / "direct" / "release").rglob("*.pt"))
    assert len(files) == 2
    for path in files:
        name = path.relative_to(tmp_path / "direct")
        assert (tmp_path / "new" / name).read_bytes() == path.read_bytes()
        assert (tmp_path / "published" / name).read_bytes() == path.read_bytes()


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = {}
    for n_layers in (2, 12):
        config = replace(MHA, n_layers=n_layers, dim=256, ffn_dim=4096)
        config = replace(config, head_dim=64, vocab_size=64)
        source = save_weights(
            tmp_path / f"hf{n_layers}", config, formula_weights(config, torch.float32)
        )
        out = tmp_path / f"out{n_layers}"

        def there_and_back(source: Path = source, out: Path = out) -> None:
            cut = {"tensor_parallel": 2, "pipeline_parallel": 2, "merge_mlp": True}
            minillama.megatron(source, out / "megatron", vocab_multiple=1, **cut)
            minillama.from_megatron(out / "megatron", out / "hf")

        peaks[n_layers] = peak_growth(there_and_back)
    layer_bytes = 4 * 256 * (4 * 256 + 3 * 4096)
    assert peaks[12] - peaks[2] < 2 * layer_bytes
