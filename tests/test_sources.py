"""Files, folders, and the names in dataset_info.json."""

import hashlib
import json

import pytest

from minillama.chat import Conversation, Turn
from minillama.data.sources import Source, find_sources
from minillama.errors import UserError
from tests.datasets import build
from tests.raw_files import ALPACA, documents, read, write


@pytest.fixture
def dataset_dir(tmp_path):
    rows = [{"q": "Q", "more": "I", "a": "A", "past": [["P", "O"]], "system": "S"}]
    path = write(tmp_path / "rows.json", rows)
    write(
        tmp_path / "talk.json",
        [{"chat": [{"role": "user", "text": "Q"}, {"role": "bot", "text": "A"}]}],
    )
    columns = {"prompt": "q", "query": "more", "response": "a", "history": "past"}
    write(
        tmp_path / "dataset_info.json",
        {
            "rows_zh": {
                "file_name": "rows.json",
                "file_sha1": hashlib.sha1(path.read_bytes()).hexdigest(),
                "columns": columns,
            },
            "talk_en": {
                "file_name": "talk.json",
                "formatting": "sharegpt",
                "columns": {"messages": "chat"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "text",
                    "user_tag": "user",
                    "assistant_tag": "bot",
                },
            },
            "damaged": {"file_name": "rows.json", "file_sha1": "0" * 40},
            "hub_only": {"hf_hub_url": "a/b"},
            "rewards": {"file_name": "rows.json", "ranking": True},
            "gone": {"file_name": "gone.json"},
        },
    )
    return tmp_path


def test_dataset_info_gives_names_columns_and_tags(dataset_dir):
    rows = Conversation((Turn("P", "O"), Turn("Q", "A", "I")))
    talk = Conversation((Turn("Q", "A", None),))
    named = find_sources(["rows_zh", "talk_en"], dataset_dir=dataset_dir)
    assert documents(named) == [rows, talk]  # the file has a system text, but no column names it
    # An entry also holds for its file if that is named, or its folder.
    assert documents(find_sources([dataset_dir / "rows.json"])) == [rows]
    assert documents(find_sources([dataset_dir])) == [rows, talk]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows_z", "has no data set 'rows_z' .did you mean 'rows_zh'"),
        ("damaged", "its sha1 is .* for damaged; get the file again"),
        ("hub_only", "hub_only has no file_name"),
        ("rewards", "ranking data"),
        ("gone", r"gone\.json: no such file"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_refused_with_the_reason(dataset_dir, name, message):
    with pytest.raises(UserError, match=message):
        find_sources([name], dataset_dir=dataset_dir)


def test_several_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder/b.jsonl", "folder/a.txt", "folder/ignored.png", "c.json"):
        write(tmp_path / name, "x")
    found = find_sources([tmp_path / "c.json", tmp_path / "folder"], "text")
    assert [source.path.name for source in found] == ["c.json", "a.txt", "b.jsonl"]
    assert found[0] == Source(tmp_path / "c.json", "text")
    for missing in (tmp_path / "none", "not_a_name"):
        with pytest.raises(UserError, match="no such file or folder"):
            find_sources([missing])
    with pytest.raises(UserError, match="the folder holds no"):
        (tmp_path / "empty").mkdir()
        find_sources([tmp_path / "empty"])


@pytest.mark.parametrize(
    "info",
    [
        {"a": ["b"]},
        {"a": {"file_name": "f", "columns": ["q"]}},
        {"a": {"file_name": "f", "tags": 1}},
    ],
)
def test_a_dataset_info_of_other_kinds_is_one_error(tmp_path, info):
    write(tmp_path / "dataset_info.json", info)
    with pytest.raises(
        UserError,
        match=r"dataset_info\.json: expected an object that maps data set names to objects",
    ):
        find_sources(["a"], dataset_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"a\.csv: a \.csv file is not read"),
        ("a.tsv", r"a\.tsv: a \.tsv file is not read"),
        ("a.yaml", r"a\.yaml: a \.yaml file is not read"),
        ("a.json.gz", r"a\.json\.gz: a compressed file is not read; unpack it first"),
        ("a.ZIP", r"a\.ZIP: a compressed file is not read"),
        ("a.parquet", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_a_file_of_an_unknown_kind_is_not_read_as_text(tmp_path, name, message):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, "instruction,output\nQ,A\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_file_of_an_unknown_kind_is_read_if_its_format_is_clear(tmp_path):
    conversation = Conversation((Turn("Q", "A", "I"),))
    assert read(write(tmp_path / "a.ndjson", json.dumps(ALPACA))) == [conversation]
    assert read(write(tmp_path / "a.JSON", [ALPACA])) == [conversation]
    code = write(tmp_path / "a.py", "x = [1]\n")
    assert read(code, "text") == ["x = [1]\n"]
    assert read(write(tmp_path / "a.TXT", "{one}\n")) == ["{one}\n"]
    assert read(write(tmp_path / "corpus", "one\n")) == ["one\n"]


def test_cards_of_a_folder_are_left_out_and_named(tmp_path, small_tokenizer, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    others = ("README.md", "readme_zh.md", "LICENSE", "License.txt", "loader.py", ".hidden.txt")
    for name in others:
        write(folder / name, "not data")
    write(folder / "reader.md", "one")  # begins like a card, and is none
    write(folder / "UPPER.TXT", "two")
    assert [source.path.name for source in find_sources([folder])] == ["UPPER.TXT", "reader.md"]
    build([folder], small_tokenizer, tmp_path / "set", quiet=False)
    printed = capsys.readouterr().err
    assert all(name in printed for name in others)
    assert documents([Source(folder / "README.md", "text")]) == ["not data"]  # if it is named
    write(folder / "more.csv", "a,b\n")
    with pytest.raises(UserError, match=r"more\.csv: a \.csv file is not read; .* move it out"):
        find_sources([folder])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "/etc/passwd"}, "file_name '/etc/passwd' is outside"),
        ({"file_name": "../a.json"}, r"file_name '\.\./a\.json' is outside"),
        ({"file_name": "sub/../../a.json"}, "is outside"),
        ({"file_name": 5}, "a: file_name is 5, expected the name of a file"),
        ({"file_name": ["a.json"]}, "file_name is .'a.json'., expected the name of a file"),
        ({"columns": {"prompt": 5}}, "a: prompt is 5, expected the name of a column"),
        ({"columns": {"prompt": ["q"]}}, "prompt is .'q'., expected"),
        ({"columns": {"promt": "q"}}, r"'promt' is not known here .did you mean 'prompt'"),
        ({"columns": {"tools": "tools"}}, "a: columns: the key 'tools' is not known here"),
        ({"tags": {"rolle_tag": "role"}}, r"did you mean 'role_tag'"),
        ({"num_samples": 10}, "a: the key 'num_samples' is not known here"),
    ],
)
def test_an_entry_of_dataset_info_does_not_lead_elsewhere(tmp_path, entry, message):
    write(tmp_path / "a.json", [ALPACA])
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "b.json", [ALPACA])
    write(folder / "dataset_info.json", {"a": {"file_name": "b.json"} | entry})
    with pytest.raises(UserError, match=message):
        find_sources(["a"], dataset_dir=folder)


def test_an_entry_may_name_a_file_in_a_subfolder_and_keys_without_effect(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub/b.json", [ALPACA])
    entry = {"file_name": "sub/b.json", "hf_hub_url": "a/b", "columns": {"tools": None}}
    entry["tags"] = {"observation_tag": "observation"}
    write(tmp_path / "dataset_info.json", {"a": entry})
    [source] = find_sources(["a"], dataset_dir=tmp_path)
    assert source.path == path
