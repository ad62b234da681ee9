"""generate.py as it is typed: streaming, Ctrl-C, a conversation, and mistakes that are named."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.checkpoint.hf_reader import load_model
from minillama.errors import UserError
from minillama.generation import engine as sessions
from minillama.generation.config import GenerationConfig
from minillama.generation.sampling import Sampling
from minillama.options import from_flags
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


def let_ctrl_c_interrupt() -> None:
    """A job in the background ignores Ctrl-C, and so would the processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_was_written_and_exits_130(shared: Path) -> None:
    """The pipe is too small for all that is written, so the command waits until it is read."""
    model = shared / "models/stories260K"
    prompt = "Once upon a time"
    num_prompts = 12
    flags = "-u generate.py --greedy --ignore_eos --max_new_tokens 400 --stream".split()
    run = subprocess.Popen(
        [sys.executable, *flags, "--ckpt", str(model), *["--prompt", prompt] * num_prompts],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # communicate() would not see what a buffer holds
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=let_ctrl_c_interrupt,
        pipesize=4096,
    )
    began = run.stdout.read(8)
    run.send_signal(signal.SIGINT)
    rest, errors = run.communicate(timeout=300)
    assert run.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted"
    ids = [1, *open_tokenizer(model).encode(prompt)]
    text = open_tokenizer(model).decode(list(generate(load_model(model), ids, 400, Sampling(0.0))))
    everything = f"{text}\n" * num_prompts
    assert len(everything) > 4096 + len(began)
    assert everything.startswith((began + rest).decode().rstrip("\n"))


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
        (["--stop", ""], "an empty text would end every completion"),
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
        timeout=300,
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
