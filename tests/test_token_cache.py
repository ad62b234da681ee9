"""The data of a run: opened, or tokenized once, or refused with the reason."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.datasets import alpaca, build, contents, damage, document, open_path, write_json_lines


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("bin", lambda raw: raw[:-2], r"set\.bin: has \d+ bytes"),
        ("bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], r"set\.bin: its sha256 is not the one"),
        (
            "mask",
            lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
            r"set\.mask: its sha256 is not the one",
        ),
        ("idx", lambda raw: raw[:8] + raw[16:] + raw[:8], r"set\.idx: offsets do not rise"),
        ("json", lambda raw: b"{}", "not a minillama data set"),
        (
            "json",
            lambda raw: raw.replace(b'"version": 1', b'"version": 9'),
            "version 9, this program reads 1",
        ),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_reason(
    alpaca_dataset, small_tokenizer, part, change, message
):
    damage(alpaca_dataset[1], part, change)
    with pytest.raises(UserError, match=message):
        open_path(alpaca_dataset[1], small_tokenizer)


def test_a_data_set_of_another_tokenizer_or_a_changed_file_is_refused(
    tmp_path, alpaca_dataset, small_tokenizer
):
    source, prefix = alpaca_dataset
    assert len(open_path(prefix, small_tokenizer)) == 40
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["quite another text"] * 3, 280))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_path(prefix, open_tokenizer(other))
    os.utime(source, (1, 1))
    assert len(open_path(prefix, small_tokenizer)) == 40  # touched is not changed
    as_long = source.read_text().replace("Say 1", "Say 2")
    for content in (as_long, as_long + as_long):
        source.write_text(content)
        with pytest.raises(UserError, match=r"a\.jsonl has changed since it was tokenized"):
            open_path(prefix, small_tokenizer)
    source.unlink()
    assert len(open_path(prefix, small_tokenizer)) == 40  # moved away is not changed


def test_another_template_than_a_data_sets_own_is_refused(
    tmp_path, alpaca_dataset, small_tokenizer
):
    source, prefix = alpaca_dataset
    for template in ("", "alpaca"):
        assert len(open_path(prefix, small_tokenizer, template=template)) == 40
    message = "made with the template alpaca, not raw; leave --template out"
    with pytest.raises(UserError, match=message):
        open_path(prefix, small_tokenizer, template="raw")
    other = tmp_path / "other"
    build([source], small_tokenizer, other, template="llama_factory_default")
    # `default` is another name of the same template
    assert len(open_path(other, small_tokenizer, template="default")) == 40


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"data_format": "lines"}, "data_format = 'lines', but .* is tokenized instruction data"),
        ({"append_eod": False}, "append_eod = False holds for raw files"),
        ({"max_samples": 3}, "max_samples = 3 counts records of raw files"),
    ],
    ids=str,
)
def test_an_option_that_does_not_hold_for_a_tokenized_data_set_is_refused(
    alpaca_dataset, small_tokenizer, option, message
):
    _, prefix = alpaca_dataset
    with pytest.raises(UserError, match=message):
        open_path(prefix, small_tokenizer, **option)


def test_an_option_that_a_tokenized_data_set_was_made_with_is_no_contradiction(
    tmp_path, alpaca_dataset, small_tokenizer
):
    """Flags can be those of other, raw files, or follow from a preset or `--stage pt`."""
    _, prefix = alpaca_dataset
    assert len(open_path(prefix, small_tokenizer, data_format="alpaca")) == 40
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    text = tmp_path / "text"
    build([tmp_path / "a.txt"], small_tokenizer, text, append_eod=False)
    for data_format in ("auto", "text", "lines"):
        options = {"data_format": data_format, "append_eod": False, "skip_bad_records": True}
        assert len(open_path(text, small_tokenizer, **options)) == 1
    message = "data_format = 'alpaca', but .* is tokenized plain text"
    with pytest.raises(UserError, match=message):
        open_path(text, small_tokenizer, data_format="alpaca")


def test_a_cache_follows_its_file_its_tokenizer_and_its_options(tmp_path, small_tokenizer):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(10))

    def opened(**options):
        return open_path(source, small_tokenizer, cache_dir=str(tmp_path / "cache"), **options)

    first = opened()
    assert opened().prefix == first.prefix
    assert opened(template="raw").prefix != first.prefix
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"a": {"file_name": "a.jsonl", "columns": {"query": "output"}}}))
    assert opened().prefix != first.prefix
    info.unlink()
    write_json_lines(source, alpaca(11))
    assert len(opened()) == 11


def test_the_name_of_a_cache_is_that_of_earlier_versions(tmp_path, small_tokenizer):
    """A cache of an earlier version is found again: its name is this hash of this JSON."""
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(1))
    status = source.stat()
    stamp = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    options = {
        "append_eod": True,
        "data_format": "auto",
        "skip_bad_records": False,
        "template": "alpaca",
    }
    files = [[str(source.resolve()), {}, stamp]]
    key = json.dumps([files, small_tokenizer.sha256, options], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    dataset = open_path(source, small_tokenizer, cache_dir=str(tmp_path / "cache"))
    assert dataset.prefix == tmp_path / "cache" / f"a-{digest}"


def test_chinese_all_the_way(tmp_path, shared):
    tokenizer = open_tokenizer(shared / "tokenizers/chinese_llama2")
    cache = str(tmp_path)
    source = shared / "sft/alpaca_zh_demo.json"
    chats = open_path(source, tokenizer, cache_dir=cache, template="chinese_alpaca_2")
    assert len(chats) == 1000
    assert chats.meta["documents_without_target"] == 0
    ids, mask = document(chats, 0)
    records = json.loads(source.read_text(encoding="utf-8"))
    assert tokenizer.decode(ids[mask == 1].tolist()) == records[0]["output"]

    book = shared / "text/sanguo_ch1-20_zh.txt"
    text = book.read_text(encoding="utf-8")
    whole = open_path(book, tokenizer, cache_dir=cache, data_format="text")
    assert len(whole) == 1
    assert tokenizer.decode(whole.tokens.tolist()) == text
    lines = open_path(book, tokenizer, cache_dir=cache, data_format="lines")
    assert len(lines) == sum(bool(line.strip()) for line in text.split("\n"))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
        ("mask", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("idx", lambda raw: raw[:-8]),
        ("json", lambda raw: raw[:100]),
        ("json", lambda raw: raw.replace(b'"mask":', b'"musk":')),
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, small_tokenizer, capsys, part, change):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(20))
    prefix = open_path(source, small_tokenizer, cache_dir=str(tmp_path / "cache")).prefix
    intact = contents(prefix)
    status = Path(f"{prefix}.{part}").stat()
    damage(prefix, part, change)
    os.utime(f"{prefix}.{part}", ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing shows it
    assert len(open_path(source, small_tokenizer, cache_dir=str(tmp_path / "cache"))) == 20
    assert contents(prefix) == intact
    assert "the cached data is damaged, and made again" in capsys.readouterr().err


def test_the_mask_of_a_data_set_is_never_taken_as_absent(alpaca_dataset, small_tokenizer):
    """Without its mask, prompts would be trained on."""
    damage(alpaca_dataset[1], "json", lambda raw: raw.replace(b'"mask":', b'"musk":'))
    with pytest.raises(UserError, match="not a minillama data set: key 'mask' is missing"):
        open_path(alpaca_dataset[1], small_tokenizer)


def test_another_tokenizer_has_another_cache(tmp_path, small_tokenizer):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(5))
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["quite another text"] * 3, 280))
    cache = str(tmp_path / "cache")
    first = open_path(source, small_tokenizer, cache_dir=cache)
    second = open_path(source, open_tokenizer(other), cache_dir=cache)
    assert first.prefix != second.prefix
    assert second.meta["tokenizer_sha256"] == open_tokenizer(other).sha256


def test_the_template_is_named_or_the_bases_or_the_datas(tmp_path, small_tokenizer):
    messages = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    chats = write_json_lines(tmp_path / "chats.jsonl", [{"conversations": messages}])
    (tmp_path / "book.txt").write_text("Once upon a time.\r\n", newline="")

    def template(name, **options):
        cache = str(tmp_path / "cache")
        return open_path(tmp_path / name, small_tokenizer, cache_dir=cache, **options).template

    assert template(chats) == "vicuna_v1.1"
    assert template(chats, base_template="llama2") == "llama2"
    assert template(chats, base_template="llama2", template="alpaca") == "alpaca"
    assert template("book.txt") == template("book.txt", template="alpaca") == ""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    assert template("rows.jsonl", data_format="ascend") == ""  # text alone, whatever the format
