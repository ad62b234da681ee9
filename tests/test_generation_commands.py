"""generate.py as it is typed: records, interruption and going on, adapters, refusals."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_format import load_model
from minillama.errors import UserError
from minillama.generation import engine as sessions
from minillama.generation.config import GenerationConfig, from_flags
from minillama.generation.output_file import CompletionFile, read_lines
from minillama.generation.sampling import Sampling
from minillama.lora import LoraConfig, add_lora, merge_lora, save_adapter
from minillama.tokenizer import open_tokenizer
from tests.conftest import generate

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
    return read_lines(output)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve prompts of unlike length, one of them twice."""
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
    drawn = (
        "--prompt_file",
        str(prompts),
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--num_samples",
        "3",
    )
    assert texts(run(*drawn, "--batch_size", "2", output=tmp_path / "2.jsonl")) == texts(
        run(*drawn, output=tmp_path / "8.jsonl")
    )


def test_samples_differ_and_the_same_prompt_again_gets_other_ones(tmp_path: Path) -> None:
    drawn = ["--temperature", "2", "--top_p", "1", "--seed", "3", "--ignore_eos"]
    first, again = run(
        "--prompt",
        "cat",
        "--prompt",
        "cat",
        *drawn,
        "--num_samples",
        "2",
        output=tmp_path / "a.jsonl",
    )
    four = [tuple(ids) for record in (first, again) for ids in record["completion_ids"]]
    assert len(set(four)) == 4
    (alone,) = run("--prompt", "cat", *drawn, output=tmp_path / "b.jsonl")
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
    assert f"{done} of 12 answers are in {out}.partial" in capsys.readouterr().err
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


def test_streamed_answers_come_in_the_order_asked(capsys) -> None:
    short, long = QUESTIONS[0], QUESTIONS[2]
    told = []
    for order in ((short, long), (long, short)):
        MAIN(
            [
                *TEMPLATE,
                *(word for text in order for word in ("--prompt", text)),
                "--greedy",
                "--stream",
            ]
        )
        told.append(capsys.readouterr().out.splitlines())
    assert told[0] == told[1][::-1]
    assert told[0][0] != told[0][1]


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
    CompletionFile(tmp_path / "a.jsonl", namespace["settings_of"](engine, [[1]], options))
    engine.model.model.norm.weight[0] += 1
    with pytest.raises(UserError, match="was begun with weights_sample_sha256"):
        CompletionFile(tmp_path / "a.jsonl", namespace["settings_of"](engine, [[1]], options))


def test_ctrl_c_keeps_what_was_written_and_exits_130(shared: Path) -> None:
    model = shared / "models/stories260K"
    run = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "generate.py",
            "--ckpt",
            str(model),
            "--prompt",
            "Once upon a time",
            "--greedy",
            "--ignore_eos",
            "--max_new_tokens",
            "500",
            "--stream",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    began = run.stdout.read(8)
    run.send_signal(signal.SIGINT)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted"
    ids = [1, *open_tokenizer(model).encode("Once upon a time")]
    text = open_tokenizer(model).decode(
        list(generate(load_model(model), ids, 500 - len(ids), Sampling(0.0)))
    )
    assert text.startswith((began + rest).decode().rstrip("\n"))


def test_what_an_unstreamed_text_had_when_interrupted_is_printed(monkeypatch, capsys) -> None:
    write = sessions.Engine.stream

    def interrupted(self, completions, seed):
        for n, step in enumerate(write(self, completions, seed)):
            if n == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(sessions.Engine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MAIN([*TEMPLATE, "--prompt", QUESTIONS[1], "--greedy"])
    assert 0 < len(capsys.readouterr().out.strip()) < 20


def test_beams_sample_only_where_a_temperature_or_its_like_is_given() -> None:
    namespace = runpy.run_path(str(ROOT / "generate.py"))
    for words, samples in (
        ([], False),
        (["--temperature", "0.9"], True),
        (["--top_k", "5"], True),
        (["--temperature", "0"], False),
    ):
        options = namespace["parse"]([*TEMPLATE, "--num_beams", "3", *words])
        assert from_flags(GenerationConfig, vars(options)).beams.sample is samples


@pytest.mark.parametrize("where", ["hugging face", "run", "adapter"])
def test_adapters_work_unmerged_over_every_kind_of_directory(where: str, tmp_path: Path) -> None:
    """Two adapters over a base; the base as it is, in a run directory, or as the base of the first adapter."""
    merged = load_model(Path(GOLDEN))
    for name, seed in (("a", 1), ("b", 2)):
        model = load_model(Path(GOLDEN))
        config = LoraConfig(rank=2, alpha=8.0)
        for tuned in (model, merged):
            add_lora(tuned, config, torch.Generator().manual_seed(seed))
            for number, module in enumerate(m for m in tuned.modules() if hasattr(m, "lora_B")):
                module.lora_B.data.normal_(
                    0, 0.05, generator=torch.Generator().manual_seed(seed + number)
                )
        save_adapter(model, config, tmp_path / name, GOLDEN)
        merge_lora(merged)
    prompt = [1, 342, 345, 282]
    expected = list(generate(merged, prompt, 20, Sampling(0.0)))
    assert expected != list(generate(load_model(Path(GOLDEN)), prompt, 20, Sampling(0.0)))
    shutil.copytree(GOLDEN, tmp_path / "run/final")
    words = {
        "hugging face": [
            "--ckpt",
            GOLDEN,
            "--lora",
            str(tmp_path / "a"),
            "--lora",
            str(tmp_path / "b"),
        ],
        "run": [
            "--ckpt",
            str(tmp_path / "run"),
            "--lora",
            str(tmp_path / "a"),
            "--lora",
            str(tmp_path / "b"),
        ],
        "adapter": ["--ckpt", str(tmp_path / "a"), "--lora", str(tmp_path / "b")],
    }[where]
    MAIN(
        [
            *words,
            "--prompt_ids",
            " ".join(map(str, prompt)),
            "--greedy",
            "--ignore_eos",
            "--max_new_tokens",
            "20",
            "--output",
            str(tmp_path / "o.jsonl"),
        ]
    )
    assert json.loads((tmp_path / "o.jsonl").read_text())["completion_ids"] == [expected]


def test_two_adapters_that_replace_the_same_module_are_refused(tmp_path: Path) -> None:
    """The second would undo what the first trained, in silence."""
    for name, whole in (
        ("a", ("lm_head",)),
        ("b", ("embed_tokens", "lm_head")),
        ("c", ("embed_tokens",)),
    ):
        model, config = (
            load_model(Path(GOLDEN)),
            LoraConfig(rank=2, alpha=8.0, modules_to_save=whole),
        )
        add_lora(model, config)
        save_adapter(model, config, tmp_path / name, GOLDEN)
    words = [
        "--ckpt",
        GOLDEN,
        "--prompt_ids",
        "1",
        "--greedy",
        "--max_new_tokens",
        "1",
        "--lora",
        str(tmp_path / "a"),
        "--lora",
    ]
    MAIN([*words, str(tmp_path / "c")])
    with pytest.raises(
        UserError,
        match=r"b: replaces lm_head whole, and so does .*a; merge them one after the other",
    ):
        MAIN([*words, str(tmp_path / "b")])


def test_every_id_of_a_list_in_generation_config_ends_a_text(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    prompt = [1, 342, 345, 282]
    free = list(generate(load_model(Path(GOLDEN)), prompt, 20, Sampling(0.0)))
    stop = free[7]
    (tmp_path / "model/generation_config.json").write_text(
        json.dumps({"eos_token_id": [499, stop]})
    )
    words = [
        "--ckpt",
        str(tmp_path / "model"),
        "--prompt_ids",
        "1 342 345 282",
        "--greedy",
        "--max_new_tokens",
        "20",
        "--output",
    ]
    MAIN([*words, str(tmp_path / "a.jsonl")])
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert (record["completion_ids"], record["finish_reason"]) == (
        [free[: free.index(stop)]],
        ["eos"],
    )
    MAIN([*words, str(tmp_path / "b.jsonl"), "--ignore_eos"])
    assert json.loads((tmp_path / "b.jsonl").read_text())["completion_ids"] == [free]


def test_a_template_that_nothing_says_the_model_was_tuned_with_is_warned_of(
    tmp_path: Path, capsys
) -> None:
    shutil.copytree(GOLDEN, tmp_path / "tuned")
    about = tmp_path / "tuned/minillama.json"
    about.write_text('{"template": "alpaca"}')
    for template, warned in (("alpaca", False), ("none", False), ("vicuna_v1.1", True)):
        MAIN(
            [
                "--ckpt",
                str(tmp_path / "tuned"),
                "--template",
                template,
                "--prompt",
                "cat",
                "--max_new_tokens",
                "1",
            ]
        )
        assert (
            "was tuned with the template alpaca; it may not understand" in capsys.readouterr().err
        ) is warned
    MAIN([*TEMPLATE, "--prompt", "cat", "--max_new_tokens", "1"])
    assert (
        "as base models are not; it may not understand llama_factory_default"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--num_beams", "0"], "--num_beams 0: must be at least 1"),
        (["--rope_alpha", "0.5"], "--rope_alpha: '0.5' is neither auto"),
        (["--rope_alpha", "x"], "--rope_alpha: 'x' is neither auto"),
        (["--num_beams", "2", "--num_samples", "3"], "at most as many texts"),
        (["--prompt_file", "absent.txt"], "absent.txt: no such file"),
        (["--prompt_ids", "1 99999"], "99999 is beyond the vocabulary"),
        (["--stop", ""], "an empty text"),
        (["--temperature", "nan"], "expected temperature >= 0"),
        (["--early_stopping", "often"], "early_stopping"),
        (["--prompt_ids", "1 a"], "expected whole numbers"),
        (["--prompt_ids", "²"], "expected whole numbers"),
        (["--stop", ""], "an empty text would end every answer"),
        (["--temperature", "nan"], "expected temperature >= 0"),
        (["--repetition_penalty", "nan"], "repetition_penalty > 0"),
        (
            ["--greedy", "--num_samples", "2"],
            "--num_samples has no meaning where nothing is sampled",
        ),
        (["--length_penalty", "2"], "--length_penalty has no meaning without --num_beams"),
        (["--num_beams", "2", "--length_penalty", "inf"], "must be from -10 to 10"),
        (["--chat"], "--prompt has no meaning with --chat"),
        (["--web", "--num_beams", "2"], "--num_beams has no meaning with --web"),
        (["--output", "tests"], "tests: already exists; name another --output"),
    ],
)
def test_mistakes_are_told_by_name(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        MAIN([*TEMPLATE, "--prompt", "a", *words])


def test_a_prompt_that_is_no_text_is_an_error_with_its_line(tmp_path: Path) -> None:
    for prompt in (5, None, [1, 2], {"text": "a"}):
        (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps({"prompt": prompt})}\n')
        with pytest.raises(UserError, match="line 2 is not"):
            MAIN([*TEMPLATE, "--prompt_file", str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"prompt": 3}\n', "line 1 is not a JSON object"),
        (b'{"prompt": null}\n', "line 1 is not a JSON object"),
        (b'["x"]\n', "line 1 is not a JSON object"),
    ],
)
def test_a_file_without_prompts_is_refused_and_leaves_no_answers(
    tmp_path: Path, content: bytes, named: str
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=named):
        MAIN(
            [
                *TEMPLATE,
                "--prompt_file",
                str(tmp_path / "p.jsonl"),
                "--output",
                str(tmp_path / "a.jsonl"),
            ]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


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


def test_a_system_text_reaches_a_prompt_as_it_reaches_a_conversation(tmp_path: Path) -> None:
    words = [
        "--ckpt",
        GOLDEN,
        "--template",
        "vicuna_v1.1",
        "--max_new_tokens",
        "1",
        "--prompt",
        "cat",
        "--output",
    ]
    lengths = []
    for more in ([], ["--system", "x"]):
        MAIN([*words, str(tmp_path / f"{len(lengths)}.jsonl"), *more])
        lengths.append(
            len(json.loads((tmp_path / f"{len(lengths)}.jsonl").read_text())["prompt_ids"])
        )
    assert lengths[1] < lengths[0]


def test_a_conversation_in_the_terminal(tmp_path: Path) -> None:
    """Ask, ask again, clear, quit; speed shown."""
    done = subprocess.run(
        [sys.executable, "generate.py", *TEMPLATE, "--chat", "--greedy"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        input=f"{QUESTIONS[0]}\n\nclear\n{QUESTIONS[0]}\nquit\n",
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Answer: 62\n") == 2
    assert done.stdout.count("tokens/s)") == 2
    assert "(new conversation)" in done.stdout


def test_batches_hold_prompts_of_like_length_the_longest_first(monkeypatch) -> None:
    namespace = runpy.run_path(str(ROOT / "generate.py"))
    engine = namespace["open_engine"](namespace["parse"]([*TEMPLATE, "--greedy"]))
    sizes, write = [], sessions.Engine.stream
    monkeypatch.setattr(
        sessions.Engine,
        "stream",
        lambda self, answers, seed: (
            sizes.append([len(a.prompt_ids) for a in answers]) or write(self, answers, seed)
        ),
    )
    requests = engine.new_completions([[1] * n for n in (3, 9, 5, 1, 7)], num_samples=2)
    list(engine.stream_all(requests, 4, seed=None))
    assert sizes == [[9, 9, 7, 7], [5, 5, 3, 3], [1, 1]]


def test_the_first_token_needs_none_of_torchs_compiler() -> None:
    """Loading it takes as long as everything else together."""
    program = (
        "import runpy, sys; import atexit; atexit.register(lambda: print('torch._dynamo' in sys.modules)); "
        f"sys.argv = ['generate.py', '--ckpt', {GOLDEN!r}, '--prompt_ids', '1 5', '--greedy', '--max_new_tokens', '1']; "
        "runpy.run_path('generate.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_first_token_needs_no_compiler() -> None:
    """sympy comes with torch's compiler, and would be a fifth of the time to the first token."""
    words = ["generate.py", *TEMPLATE[:-1], "1", "--prompt", "a", "--greedy"]
    code = (
        f"import runpy, sys; sys.argv = {words}; sys.path.insert(0, '')\n"
        "try:\n    runpy.run_path('generate.py', run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'minillama.model' in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)
