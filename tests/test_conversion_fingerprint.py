"""Chapter: the same model, or not. Equal weights have equal fingerprints in any layout; a difference is named and measured."""

import json

import pytest
import torch

import convert
from minillama.checkpoint.hf_format import open_weights, write_weights
from minillama.conversion.checksums import check, manifest, write_manifest
from minillama.conversion.meta import hf_to_meta
from minillama.conversion.writer import Output, write_checkpoint
from minillama.errors import UserError
from minillama.tensor_writers import write_safetensors


def change(directory, name: str, index: int, by: float) -> None:
    """Add `by` to one element of one tensor."""
    tensors = {key: entry.read() for key, entry in open_weights(directory).items()}
    tensors[name].view(-1)[index] += by
    write_safetensors(directory / "model.safetensors", tensors)


def test_layout_shards_and_format_do_not_matter(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    expected = manifest(base)["content"]
    for output in (
        Output(tmp_path / "bin", bin=True),
        Output(tmp_path / "shards", max_shard_bytes=4000),
    ):
        write_checkpoint(output, open_weights(base), lambda directory: None)
        assert manifest(output.path)["content"] == expected
    backwards = dict(reversed(open_weights(base).items()))
    write_checkpoint(Output(tmp_path / "backwards"), backwards, lambda directory: None)
    assert manifest(tmp_path / "backwards")["content"] == expected
    hf_to_meta(base, Output(tmp_path / "meta"), shards=3)
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
        (tmp_path / str(number)).mkdir()
        write_weights(
            tmp_path / str(number),
            iter(version.items()),
            {n: (t.dtype, tuple(t.shape)) for n, t in version.items()},
        )
        contents.add(manifest(tmp_path / str(number))["content"])
    assert len(contents) == 2


def test_the_first_difference_is_named_and_measured(tmp_path, tiny_checkpoint):
    one, two = tiny_checkpoint("one"), tiny_checkpoint("two")
    write_manifest(one)
    assert (
        "all 21 tensors are equal" in check(two, one / "manifest.json")[0]
        and "all 21" in check(two, one)[0]
    )
    change(two, "model.layers.1.mlp.up_proj.weight", 5, 0.25)
    change(two, "model.norm.weight", 0, 1.0)
    with pytest.raises(
        UserError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight: .* by up to 0\.25 \(element 5: .*in 1 elements",
    ):
        check(two, one)
    with pytest.raises(
        UserError, match=r"up_proj\.weight: .* its norm is [\d.]+ here, [\d.]+ there"
    ):
        check(two, one / "manifest.json")


def test_not_a_number_counts_as_a_difference(tiny_checkpoint):
    one, two = tiny_checkpoint("one"), tiny_checkpoint("two")
    change(two, "model.norm.weight", 3, float("nan"))
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*by up to inf \(element 3"):
        check(two, one)


def test_other_files_are_remarked_on(tiny_checkpoint):
    one, two = tiny_checkpoint("one"), tiny_checkpoint("two")
    (two / "config.json").write_text((two / "config.json").read_text() + " ")
    (two / "extra.txt").write_text("")
    assert check(two, one)[1:] == [
        "note: config.json differs",
        "note: extra.txt is on one side only",
    ]


def test_the_command_writes_and_checks(tmp_path, tiny_checkpoint, capsys):
    one, two = str(tiny_checkpoint("one")), str(tiny_checkpoint("two", torch.float16))
    convert.main(["sha256", one])
    convert.main(["sha256", one, "--check", f"{one}/manifest.json"])
    assert "all 21 tensors are equal" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lm_head\.weight: .*dtype float16 here, float32 there"):
        convert.main(["sha256", two, "--check", one])
    for content, message in [
        ("{}", "not a manifest"),
        ("<html>", "not valid JSON"),
        (None, "no such file"),
    ]:
        path = tmp_path / f"{content}.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            convert.main(["sha256", one, "--check", str(path)])
    assert (
        json.loads((tmp_path / "one" / "manifest.json").read_text())["files"]["model.safetensors"][
            "bytes"
        ]
        > 0
    )
