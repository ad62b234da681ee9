"""The same model, or not: equal weights have equal fingerprints in any layout."""

import json
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import open_weights
from minillama.checkpoint.hf_writer import write_weights
from minillama.conversion.checksums import check, manifest, write_manifest
from minillama.conversion.meta import hf_to_meta
from minillama.conversion.writer import Output, write_checkpoint
from minillama.errors import UserError
from minillama.tensor_writers import specs_of, write_safetensors
from tests.conversions import read_weights, run_convert


def change(directory: Path, name: str, index: int, by: float) -> None:
    """Add `by` to one element of one tensor."""
    tensors = read_weights(directory)
    tensors[name].view(-1)[index] += by
    write_safetensors(directory / "model.safetensors", tensors)


def test_layout_shards_and_format_do_not_matter(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    tensors = open_weights(base)
    backwards = dict(reversed(tensors.items()))
    outputs = [
        (Output(tmp_path / "bin", bin=True), tensors),
        (Output(tmp_path / "shards", max_shard_bytes=4000), tensors),
        (Output(tmp_path / "backwards"), backwards),
    ]
    expected = manifest(base)["content"]
    for output, ordered in outputs:
        write_checkpoint(output, [], ordered, lambda directory: None)
        assert manifest(output.path)["content"] == expected
    hf_to_meta(base, Output(tmp_path / "meta"), num_shards=3)
    assert manifest(tmp_path / "meta")["content"] == expected


@pytest.mark.parametrize(
    "alter",
    [
        lambda t: t | {"w": t["w"] + 1},
        lambda t: t | {"w": t["w"].view(3, 2)},
        lambda t: {"v": t["w"]},
        lambda t: t | {"w": t["w"].double()},
        lambda t: t | {"x": torch.ones(1)},
    ],
)
def test_name_dtype_shape_and_bytes_all_count(tmp_path, alter):
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    contents = set()
    for number, version in enumerate((tensors, alter(tensors))):
        directory = tmp_path / str(number)
        directory.mkdir()
        write_weights(directory, iter(version.items()), specs_of(version))
        contents.add(manifest(directory)["content"])
    assert len(contents) == 2


def test_the_first_difference_is_named_and_measured(tiny_checkpoint):
    one = tiny_checkpoint("one")
    two = tiny_checkpoint("two")
    write_manifest(one)
    assert check(two, one / "manifest.json").num_tensors == 21
    assert "all 21 tensors are equal" in str(check(two, one))
    name = "model.layers.1.mlp.up_proj.weight"
    change(two, name, 5, 0.25)
    change(two, "model.norm.weight", 0, 1.0)
    by_elements = rf"{name}: .* by up to 0\.25 \(element 5: .*in 1 elements"
    with pytest.raises(UserError, match=by_elements):
        check(two, one)
    by_norms = rf"{name}: .* its norm is [\d.]+ here, [\d.]+ there"
    with pytest.raises(UserError, match=by_norms):
        check(two, one / "manifest.json")


def test_a_tensor_on_one_side_only_is_named_with_its_side(tiny_checkpoint):
    one = tiny_checkpoint("one")
    two = tiny_checkpoint("two")
    tensors = read_weights(two)
    write_safetensors(two / "model.safetensors", tensors | {"extra": torch.ones(1)})
    for directory, against in ((one, two), (two, one)):
        with pytest.raises(UserError, match=f"extra: only in {two}"):
            check(directory, against)


def test_not_a_number_counts_as_a_difference(tiny_checkpoint):
    one = tiny_checkpoint("one")
    two = tiny_checkpoint("two")
    change(two, "model.norm.weight", 3, float("nan"))
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*by up to inf \(element 3"):
        check(two, one)


def test_differences_in_other_files_are_notes(tiny_checkpoint):
    one = tiny_checkpoint("one")
    two = tiny_checkpoint("two")
    (two / "config.json").write_text((two / "config.json").read_text() + " ")
    (two / "extra.txt").write_text("")
    assert check(two, one).notes == (
        "note: config.json differs",
        "note: extra.txt is on one side only",
    )


def test_the_command_writes_and_checks(tmp_path, tiny_checkpoint, capsys):
    one = tiny_checkpoint("one")
    two = tiny_checkpoint("two", torch.float16)
    run_convert("sha256", one)
    written = json.loads((one / "manifest.json").read_text())
    assert f"{one}: content {written['content']}" in capsys.readouterr().out
    assert written["files"]["model.safetensors"]["bytes"] > 0
    run_convert("sha256", one, "--check", one / "manifest.json")
    assert "all 21 tensors are equal" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lm_head\.weight: .*dtype float16 here, float32 there"):
        run_convert("sha256", two, "--check", one)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "not a manifest"), ("<html>", "not valid JSON"), (None, "no such file")],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, tiny_checkpoint, content, message):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        check(tiny_checkpoint(), path)
