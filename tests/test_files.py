"""Files and directories are complete or absent, and no file of the user's ends in a traceback."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minillama import files, output_directory
from minillama.errors import UserError
from minillama.files import (
    append_file,
    create_file,
    json_line,
    new_file,
    parsing,
    read_json,
    read_json_lines,
    read_text,
    sha256_of,
    write_json,
    write_json_lines,
    write_text,
)
from minillama.json_values import parse_json
from minillama.output_directory import free_bytes, lock_directory, new_directory, restore


def in_child(action) -> int:
    """Run `action` in a forked process. Returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_process(*_: object) -> None:
    os.kill(os.getpid(), 9)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def made(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(text)
    return directory


# Reading


def test_text_is_read_without_byte_order_mark_and_with_one_kind_of_line_end(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\n"


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "zero", tmp_path / "fifo", tmp_path):
        for read in (read_text, read_json, read_json_lines, sha256_of):
            with pytest.raises(UserError, match=f"{path}: not a regular file"):
                read(path)
    (tmp_path / "large").write_text("12345")
    with pytest.raises(UserError, match="large: has 5 bytes; at most 4 are read"):
        read_text(tmp_path / "large", max_bytes=4)


def test_a_missing_file_is_named_with_its_remedy(tmp_path):
    for read in (read_text, read_json, read_json_lines):
        with pytest.raises(UserError, match=r"a: no such file; make it first$"):
            read(tmp_path / "a", "make it first")
    with pytest.raises(UserError, match="not the name of a file"):
        read_text(Path("a\0b"))


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a: not UTF-8 text .*0xe9"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"x: not valid JSON \(Expecting property name"),
        ("[" * 100_000, "x: nested more than 100 levels deep"),
        ("[" * 101 + "]" * 101, "x: nested more than 100 levels deep"),
        ('{"a": ' * 101 + "0" + "}" * 101, "x: nested more than 100 levels deep"),
        ('{"a": ' + "1" * 5000 + "}", "x: an integer has too many digits"),
        (r'{"a": ["\ud83d"]}', r"x: a string has the lone surrogate .ud83d"),
        (r'{"\udc00": 1}', r"x: a string has the lone surrogate .udc00"),
        ('["\ud800"]', r"x: a string has the lone surrogate .ud800"),
    ],
)
def test_json_that_would_end_in_a_traceback_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_json(text, "x")


def test_json_at_the_limits_is_read():
    assert parse_json("[" * 100 + "1" + "]" * 100, "x")
    assert parse_json(r'"\ud83d\ude00"', "x") == "\U0001f600"
    assert parse_json("1" * 300, "x") == int("1" * 300)


def test_a_json_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json: holds no JSON object"):
        read_json(path)
    path.write_text('\ufeff{"weight_map": 5}', encoding="utf-8")
    assert read_json(path) == {"weight_map": 5}
    with pytest.raises(UserError, match=r"a\.json: not an index \(weight_map is 5\)"):
        read_json(path, keys={"weight_map": dict}, what="an index")
    with pytest.raises(UserError, match=r"not an index \(files is missing\)"):
        read_json(path, keys={"files": dict}, what="an index")


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"text": "\u00e9\u2028"}, {"text": "\u4e2d"}]
    write_json_lines(path, records)
    whole = path.read_bytes()
    assert read_json_lines(path) == records
    for length in range(len(whole)):
        path.write_bytes(whole[:length])  # also in the middle of a character
        assert read_json_lines(path) == records[: whole[:length].count(b"\n")]


def test_a_malformed_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: not valid JSON"):
        read_json_lines(path)
    path.write_text("{}\n{}\n3\n")
    with pytest.raises(UserError, match=r"a\.jsonl: line 3: holds no JSON object"):
        read_json_lines(path)


def test_a_wrong_value_begins_with_its_file():
    with pytest.raises(UserError, match=r"^a: key 'n' is missing$"), parsing("a"):
        {}["n"]
    with pytest.raises(UserError, match=r"^a: a value is wrong or of the wrong type"), parsing("a"):
        int("x")
    with pytest.raises(UserError, match=r"^inner$"), parsing():
        raise UserError("inner")


# Writing files


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"name": "\u4e2d", "sizes": [1]})
    expected = json.dumps({"name": "\u4e2d", "sizes": [1]}, indent=2, ensure_ascii=False) + "\n"
    assert (tmp_path / "new" / "a.json").read_bytes() == expected.encode()
    write_text(tmp_path / "b", "\u00e9\n")
    assert read_text(tmp_path / "b") == "\u00e9\n"
    assert json_line({"a": "\u00e9"}) == '{"a": "\u00e9"}\n'
    assert names_in(tmp_path) == ["b", "new"]


def test_a_file_whose_writer_fails_or_is_killed_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names_in(tmp_path) == ["a"]
    monkeypatch.setattr(os, "replace", kill_process)
    assert in_child(lambda: write_text(path, "new")) == 9
    assert path.read_text() == "old" and names_in(tmp_path) == [".a.partial", "a"]
    monkeypatch.undo()
    write_text(path, "next")
    assert path.read_text() == "next" and names_in(tmp_path) == ["a"]


def test_content_is_flushed_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    write_text(tmp_path / "a", "text")
    assert calls == ["fsync .a.partial", "replace .a.partial", f"fsync {tmp_path.name}"]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names given to os.fsync, os.replace and os.rename from now on, in order."""
    calls: list[str] = []
    fsync = os.fsync

    def record_fsync(handle: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def recorder(name: str):
        original = getattr(os, name)

        def record(source, target, **arguments) -> None:
            calls.append(f"{name} {Path(source).name}")
            original(source, target, **arguments)

        return record

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", recorder("replace"))
    monkeypatch.setattr(os, "rename", recorder("rename"))
    return calls


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("keep")
    for name in (".a.partial", "a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a", "new")
    with create_file(tmp_path / "b") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "keep"
    assert read_text(tmp_path / "a") == read_text(tmp_path / "b") == "new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_appended_records_follow_those_that_are_there(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for step in range(2):
        with append_file(path) as file:
            file.write(json_line({"step": step}).encode())
            assert len(read_json_lines(path)) == step + 1, "visible at once"


def test_a_write_that_the_system_takes_in_part_is_an_error_with_the_name(tmp_path):
    """The system accepts 3 of the 5 bytes, and says why only when the rest is offered."""
    path = tmp_path / "a"
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard_limit))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*a'"), append_file(path) as file:
            file.write(b"12345")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
    assert path.read_bytes() == b"123"


def test_a_full_disk_names_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_file(Path("/dev/full")).write(b"text")


def test_a_failed_flush_names_the_file(tmp_path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 'a'}'"):
        write_text(tmp_path / "a", "new")
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        files.flush_to_disk(tmp_path)
    assert read_text(tmp_path / "a") == "old" and names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["/", "..", "."])
def test_a_path_without_a_name_cannot_be_written(name):
    with pytest.raises(UserError, match="cannot be written; name a file or directory below it"):
        write_text(Path(name), "text")


# Writing directories


def test_a_directory_appears_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    made(tmp_path / "final", "old")
    with new_directory(tmp_path / "final", replace=True) as directory:
        (directory / "config.json").write_text("new")
        made(directory / "inner", "inner")
        assert (tmp_path / "final" / "config.json").read_text() == "old"
    assert (tmp_path / "final" / "config.json").read_text() == "new"
    assert names_in(tmp_path) == ["final"]
    assert sorted(calls[:4]) == [
        "fsync .final.partial",
        "fsync config.json",
        "fsync config.json",
        "fsync inner",
    ]
    assert calls[4:] == ["rename final", "rename .final.partial", f"fsync {tmp_path.name}"]


def test_a_directory_whose_writer_fails_is_as_before(tmp_path):
    made(tmp_path / "final", "old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), new_directory(tmp_path / "final", replace=True) as directory:
            (directory / "config.json").write_text("half")
            raise error
    with (
        pytest.raises(UserError, match="final: full; no output was written, and what was"),
        new_directory(tmp_path / "final", replace=True),
    ):
        raise OSError(28, "full")
    assert (tmp_path / "final" / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["final"]


def kill_before_second_rename(final: Path) -> None:
    """Leave what a writer leaves that is killed between its two renames."""
    rename = Path.rename

    def rename_or_die(source: Path, target: Path) -> None:
        if source.name == ".final.partial":
            kill_process()
        rename(source, target)

    def write() -> None:
        Path.rename = rename_or_die
        with new_directory(final, replace=True) as directory:
            made(directory / "inner", "new")

    assert in_child(write) == 9
    assert names_in(final.parent) == [".final.old", ".final.partial"]


def test_a_reader_restores_what_a_killed_writer_moved_aside(tmp_path):
    final = made(tmp_path / "final", "old")
    kill_before_second_rename(final)
    restore(final)
    restore(final)
    assert (final / "config.json").read_text() == "old"


def test_a_reader_leaves_a_living_writer_alone(tmp_path):
    made(tmp_path / ".final.old", "old")
    (tmp_path / ".final.partial").mkdir()
    with lock_directory(tmp_path / ".final.partial"):
        restore(tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_the_next_writer_clears_the_remains_and_keeps_the_old_directory(tmp_path):
    final = made(tmp_path / "final", "old")
    kill_before_second_rename(final)
    with pytest.raises(UserError, match="already exists; --overwrite"), new_directory(final):
        pass
    assert (final / "config.json").read_text() == "old" and names_in(tmp_path) == ["final"]
    kill_before_second_rename(final)
    with new_directory(final, replace=True) as directory:
        assert names_in(directory) == []
    assert names_in(final) == [] and names_in(tmp_path) == ["final"]


def test_the_caller_decides_which_directories_may_be_replaced(tmp_path):
    final = made(tmp_path / "final", "old")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "empty").mkdir()
    for path, replace in ((final, lambda path: False), (tmp_path / "file", True)):
        with (
            pytest.raises(UserError, match="not a plain checkpoint directory"),
            new_directory(path, replace),
        ):
            pass
    with new_directory(final, lambda path: (path / "config.json").is_file()):
        pass
    with new_directory(tmp_path / "empty"):
        pass
    assert names_in(tmp_path) == ["empty", "file", "final"]


def test_two_processes_do_not_write_one_directory(tmp_path):
    taken = "final: another conversion is writing this output"
    with (
        new_directory(tmp_path / "final"),
        pytest.raises(UserError, match=taken),
        new_directory(tmp_path / "final", writer="conversion"),
    ):
        pass
    assert names_in(tmp_path) == ["final"]


def test_a_lock_is_held_until_its_block_or_process_ends(tmp_path):
    run = tmp_path / "run"
    with (
        lock_directory(run),
        pytest.raises(UserError, match="run: another process is writing there"),
        lock_directory(run),
    ):
        pass

    def die_with_the_lock() -> None:
        with lock_directory(run):
            kill_process()

    assert in_child(die_with_the_lock) == 9
    with lock_directory(run):
        assert names_in(run) == []


def test_a_lock_on_a_directory_that_was_renamed_meanwhile_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    flock = fcntl.flock

    def rename_first(handle: int, operation: int) -> None:
        (tmp_path / "a").rename(tmp_path / "b")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with pytest.raises(UserError, match="another process"), lock_directory(tmp_path / "a"):
        pass


@pytest.mark.parametrize("name", [".final.partial", ".final.old"])
def test_links_in_the_place_of_temporary_directories_are_refused(tmp_path, name):
    precious = made(tmp_path / "precious", "keep")
    (tmp_path / name).symlink_to(precious)
    with pytest.raises(UserError, match="a symbolic link"), new_directory(tmp_path / "final"):
        pass
    restore(tmp_path / "final")
    assert (precious / "config.json").read_text() == "keep" and not (tmp_path / "final").exists()


def test_room_on_the_disk_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    assert free_bytes(tmp_path / "not" / "yet") > 0
    monkeypatch.setattr(output_directory, "free_bytes", lambda path: 10**9)
    with (
        pytest.raises(UserError, match=r"needs 20\.00 GB, and 1\.00 GB are free there"),
        new_directory(tmp_path / "final", needed_bytes=20 * 10**9),
    ):
        pytest.fail("work began")
    assert names_in(tmp_path) == []


def test_without_fcntl_and_torch_the_modules_import_and_write(tmp_path):
    program = (
        "import sys; sys.modules['fcntl'] = None; from pathlib import Path;"
        "from minillama.output_directory import lock_directory, new_directory\n"
        "with lock_directory(Path('run')), new_directory(Path('run/final')): pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert names_in(tmp_path / "run") == ["final"]
