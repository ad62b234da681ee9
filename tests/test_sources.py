"""Files, folders, and the names in dataset_info.json."""

import hashlib

import pytest

from minillama.chat import Conversation, Turn
from minillama.data.sources import Source, find_sources
from minillama.errors import UserError
from tests.raw_files import documents, write


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
