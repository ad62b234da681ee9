"""generate.py --output: records in order, and an interrupted run that goes on."""

import json
import os
import runpy
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.files import read_json_lines
from minillama.generation import engine as sessions
from minillama.generation.output_file import CompletionFile
from minillama.generation.prompts import settings_of

ROOT = Path(__file__).parents[1]


GOLDEN = str(ROOT / "tests/golden/model")


MAIN = runpy.run_path(str(ROOT / "generate.py"))["main"]


QUESTIONS = [
    "Which number is larger, 31 or 62?",
    "Please repeat cat, dog and owl.",
    "What is the first word in frog, apple, snow?",
]


TEMPLATE = ["--ckpt", GOLDEN, "--template", "llama_factory_default", "--max_new_tokens", "24"]


def run(*words: str, output: Path) -> list[dict]:
    MAIN([*TEMPLATE, *words, "--output", str(output)])
    return read_json_lines(output)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve prompts of different length, one of them twice."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": (q + " ") * (1 + n % 3)}) + "\n"
            for n, q in enumerate([*QUESTIONS * 3, *QUESTIONS])
        )
    )
    return path


def texts(records: list[dict]) -> list[tuple]:
    return [
        (r["prompt"], r["prompt_ids"], r["completions"], r["completion_ids"], r["finish_reason"])
        for r in records
    ]


def test_a_record_has_what_the_interface_promises(tmp_path: Path) -> None:
    (record,) = run("--prompt", QUESTIONS[0], "--greedy", output=tmp_path / "a.jsonl")
    assert list(record) == [
        "prompt",
        "prompt_ids",
        "completions",
        "completion_ids",
        "finish_reason",
        "seconds",
        "tokens_per_second",
    ]
    assert (record["prompt"], record["completions"], record["finish_reason"]) == (
        QUESTIONS[0],
        ["62"],
        ["eos"],
    )
    tokens = len(record["completion_ids"][0])
    assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds"], rel=0.05)
    (beams,) = run(
        "--prompt",
        QUESTIONS[0],
        "--num_beams",
        "3",
        "--num_samples",
        "2",
        output=tmp_path / "b.jsonl",
    )
    assert len(beams["completions"]) == len(beams["scores"]) == 2
    assert beams["scores"] == sorted(beams["scores"], reverse=True)
    assert beams["completions"][0] == "62"


def test_order_is_the_files_and_texts_are_those_of_each_alone(
    prompts: Path, tmp_path: Path
) -> None:
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    one = run(
        "--prompt_file", str(prompts), "--greedy", "--batch_size", "1", output=tmp_path / "1.jsonl"
    )
    five = run(
        "--prompt_file", str(prompts), "--greedy", "--batch_size", "5", output=tmp_path / "5.jsonl"
    )
    assert [record["prompt"] for record in five] == asked
    assert texts(five) == texts(one)
    sampled = (
        "--prompt_file",
        str(prompts),
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--num_samples",
        "3",
    )
    assert texts(run(*sampled, "--batch_size", "2", output=tmp_path / "2.jsonl")) == texts(
        run(*sampled, output=tmp_path / "8.jsonl")
    )


def test_samples_differ_and_the_same_prompt_again_gets_other_ones(tmp_path: Path) -> None:
    sampled = ["--temperature", "2", "--top_p", "1", "--seed", "3", "--ignore_eos"]
    first, again = run(
        "--prompt",
        "cat",
        "--prompt",
        "cat",
        *sampled,
        "--num_samples",
        "2",
        output=tmp_path / "a.jsonl",
    )
    four = [tuple(ids) for record in (first, again) for ids in record["completion_ids"]]
    assert len(set(four)) == 4
    (alone,) = run("--prompt", "cat", *sampled, output=tmp_path / "b.jsonl")
    assert tuple(alone["completion_ids"][0]) == four[0]


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    prompts: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = (
        "--prompt_file",
        str(prompts),
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--batch_size",
        "2",
    )
    whole = run(*command, output=tmp_path / "whole.jsonl")
    write, began, out = sessions.Engine.stream, [], tmp_path / "part.jsonl"

    def interrupted(self, completions, seed):
        began.append(len(completions))
        for n, step in enumerate(write(self, completions, seed)):
            if len(began) == 4 and n == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(sessions.Engine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*command, output=out)
    done = len((tmp_path / "part.jsonl.partial").read_text().splitlines()) - 1
    assert 6 <= done < 12
    assert not out.exists()
    assert f"{done} of 12 completions are in {out}.partial" in capsys.readouterr().err
    with open(tmp_path / "part.jsonl.partial", "a") as file:
        file.write('{"number": 3, "comple')  # killed in the middle of a line
    began.clear()
    monkeypatch.setattr(
        sessions.Engine,
        "stream",
        lambda self, answers, seed: began.append(len(answers)) or write(self, answers, seed),
    )
    assert texts(run(*command, output=out)) == texts(whole)
    assert sum(began) == 12 - done, "what was there is not written again"
    assert not (tmp_path / "part.jsonl.partial").exists()


def test_a_separator_of_unicode_within_a_text_ends_no_line(tmp_path: Path) -> None:
    asked = ["one\u2028two", "three\x85four", "five\x0csix"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in asked),
        encoding="utf-8",
    )
    (tmp_path / "a.txt").write_text("\n".join(asked), encoding="utf-8-sig")
    for name in ("a.jsonl", "a.txt"):
        records = run(
            "--prompt_file", str(tmp_path / name), "--greedy", output=tmp_path / f"{name}.out"
        )
        assert [record["prompt"] for record in records] == asked
    file = CompletionFile(tmp_path / "b.jsonl", {"seed": 1})
    for number, text in enumerate(asked):
        file.add(number, {"prompt": text})
    assert CompletionFile(tmp_path / "b.jsonl", {"seed": 1}).done == {
        number: {"prompt": text} for number, text in enumerate(asked)
    }


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_finished_completions_survive_an_end_at_any_time(
    call: str, tmp_path: Path, monkeypatch
) -> None:
    """Killed while the file is opened again, or put in order: before or after the new content."""
    file = CompletionFile(tmp_path / "b.jsonl", {"seed": 1})
    for number in (1, 0):
        file.add(number, {"prompt": str(number)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for act in (lambda: CompletionFile(tmp_path / "b.jsonl", {"seed": 1}), file.finish):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, call, killed)
            act()
        assert CompletionFile(tmp_path / "b.jsonl", {"seed": 1}).done == {
            0: {"prompt": "0"},
            1: {"prompt": "1"},
        }


def test_a_partial_file_of_other_settings_is_refused(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.with_name("a.jsonl.partial").write_text(
        json.dumps({"settings": {"checkpoint": "another"}}) + "\n"
    )
    with pytest.raises(UserError, match="was begun with checkpoint = 'another', now it is"):
        run("--prompt_file", str(prompts), output=out)


def test_a_partial_file_of_other_weights_at_the_same_place_is_refused(tmp_path: Path) -> None:
    namespace = runpy.run_path(str(ROOT / "generate.py"))
    options = namespace["parse"]([*TEMPLATE, "--greedy"])
    engine = namespace["open_engine"](options)
    CompletionFile(tmp_path / "a.jsonl", settings_of(engine, [[1]], vars(options)))
    engine.model.model.norm.weight[0] += 1
    with pytest.raises(UserError, match="was begun with weights_sample_sha256"):
        CompletionFile(tmp_path / "a.jsonl", settings_of(engine, [[1]], vars(options)))


def test_line_breaks_other_than_the_line_feed_belong_to_a_prompt_and_to_an_answer(
    tmp_path: Path,
) -> None:
    """U+2028 stands in JSON as it is; splitlines would end a line there."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    words = [
        *TEMPLATE,
        "--greedy",
        "--prompt_file",
        str(tmp_path / "p.jsonl"),
        "--output",
        str(tmp_path / "a.jsonl"),
    ]
    MAIN(words)
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["prompt"] == "a\u2028b"
    file = CompletionFile(tmp_path / "b.jsonl", {})
    file.add(0, {"completions": ["a\u2028b\x85"]})
    assert CompletionFile(tmp_path / "b.jsonl", {}).done == {0: {"completions": ["a\u2028b\x85"]}}


def test_a_damaged_file_of_unfinished_answers_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.partial").write_text("junk\n")
    with pytest.raises(UserError, match=r"a\.jsonl\.partial: line 1: not valid JSON"):
        CompletionFile(tmp_path / "a.jsonl", {})
