"""The documents' commands for inference, typed after generate.py on a tiny model."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import generate
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer
from tests.published_inference import (
    CHINESE_ALPACA_13B,
    FASTCHAT_CLI,
    GRADIO,
    LLAMA2_7B,
    LLAMA2_13B,
    LLAMA2_34B,
    LLAMA2_70B,
    for_tiny_model,
    words_of,
)

HEADINGS = [
    "=============== Greedy Search ================",
    "================ Do Sample =================",
    "=============== Beam Search =================",
    "======== Beam Search with sampling ==========",
]


@pytest.fixture
def paths(tiny_checkpoint: Callable, small_tokenizer: Tokenizer) -> dict[str, str]:
    """What stands for MODEL and TOKENIZER: a tiny model of 4,096 tokens, and its tokenizer."""
    model = tiny_checkpoint(vocab_size=small_tokenizer.size, max_seq_len=4096)
    tokenizer = model.parent / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return {"MODEL": str(model), "TOKENIZER": str(tokenizer)}


@pytest.fixture
def with_tokenizer(paths: dict[str, str]) -> list[str]:
    """FastChat's command as typed, for a model beside its tokenizer."""
    model = Path(paths["MODEL"])
    (model / "tokenizer.model").symlink_to(Path(paths["TOKENIZER"]) / "tokenizer.model")
    return words_of(FASTCHAT_CLI, paths)


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> Iterator[str]:
    """Let `input` return lines, then the end of input. Returns those that are left."""
    left = iter(lines)

    def read(prompt: str = "") -> str:
        for line in left:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    return left


@pytest.mark.parametrize(
    "command",
    [CHINESE_ALPACA_13B, LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B],
    ids=["alpaca", "7b", "13b", "34b", "70b"],
)
def test_ascendspeeds_inference_answers_in_four_modes_and_then_chats(
    command: str,
    paths: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """As typed, but for the numbers of the shape."""
    left = type_lines(monkeypatch, "Give three tips", "", "quit", "not read")
    generate.main([*for_tiny_model(words_of(command, paths)), "--max-new-tokens", "16"])
    printed = capsys.readouterr().out
    found = [line for line in printed.splitlines() if line in HEADINGS]
    assert found == HEADINGS
    assert printed.count("You:\nhow are you?\n\nAnswer:\n") == 4
    assert len(re.findall(r"^Elapsed: \d+\.\d\ds$", printed, re.MULTILINE)) == 4
    assert printed.count("tokens/s)") == 1  # one message of the conversation was answered
    assert list(left) == ["not read"]


@pytest.mark.parametrize("command", [LLAMA2_7B, LLAMA2_34B], ids=["7b", "34b"])
def test_a_command_for_another_model_is_refused_by_the_first_number_that_differs(
    command: str, paths: dict[str, str]
) -> None:
    words = words_of(command.replace("parallel-size 8", "parallel-size 1"), paths)
    number = "32" if command == LLAMA2_7B else "48"
    with pytest.raises(UserError, match=f"--num_layers {number}: the checkpoint has 2"):
        generate.main([*words, "--max-new-tokens", "1"])
    long = [*for_tiny_model(words), "--seq-length", "8192"]
    with pytest.raises(UserError, match="--seq_length 8192: the model's context is 4096 tokens"):
        generate.main(long)


def test_fastchats_command_holds_a_conversation_that_an_empty_line_ends(
    with_tokenizer: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    left = type_lines(monkeypatch, "hello", "", "not read")
    generate.main([*with_tokenizer, "--max-new-tokens", "4"])
    printed = capsys.readouterr()
    assert printed.out.count("tokens/s)") == 1
    assert "an empty line: end" in printed.out
    assert "no template, so vicuna_v1.1 is used" in printed.err
    assert "(template: vicuna_v1.1, " in printed.err
    assert list(left) == ["not read"]


def test_model_path_with_a_prompt_completes_it(
    with_tokenizer: list[str], capsys: pytest.CaptureFixture
) -> None:
    generate.main([*with_tokenizer, "--prompt", "hello", "--greedy", "--max-new-tokens", "4"])
    assert "You:" not in capsys.readouterr().out


def test_an_empty_line_does_not_end_a_conversation_of_our_own_command(
    with_tokenizer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = type_lines(monkeypatch, "", "quit", "not read")
    generate.main(["--ckpt", with_tokenizer[1], "--chat", "--template", "none"])
    assert list(left) == ["not read"]


def test_the_web_pages_command_says_what_to_add(paths: dict[str, str]) -> None:
    words = words_of(GRADIO, paths)[:2]
    with pytest.raises(UserError, match=r"nothing to answer; give --prompt TEXT, .* or --web"):
        generate.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--load_in_4bit", "--load_in_4bit is not supported: .*--dtype int8"),
        ("--max-gpu-memory 13Gib", "--max_gpu_memory is not supported"),
        ("--max_memory 1024", "--max_memory is not supported: the oldest turns"),
        ("--negative_prompt x", "--negative_prompt is not supported"),
        ("--use_ntk", "--use_ntk is not supported: --rope_alpha auto, or --alpha A"),
        ("--use_vllm", "--use_vllm is not supported: .* leave it out"),
        ("--speculative_sampling", "--speculative_sampling is not supported"),
        ("--share", "--share true is not supported: .*--host ADDRESS"),
        ("--style rich", "--style rich is not supported: .*--style simple"),
        ("--lora-r 16", "--lora_r is not supported: .*adapter_config.json"),
        ("--tensor-model-parallel-size 8", "--tensor_parallel 8 needs 8 ranks; .*torchrun"),
        ("--pipeline-model-parallel-size 2", "--pipeline_model_parallel_size 2 is not supported"),
        ("--pipeline_parallel 2", "is not supported: .*--tensor_parallel N .*--devices N"),
        ("--num-layers many", "--num_layers many: expected a whole number"),
        ("--do_sample maybe", "--do_sample maybe: expected True or False"),
        ("--do_sample --greedy", "--do_sample and --greedy contradict each other"),
        ("--do_sample --num_beams 2", "--do_sample with --num_beams: add .*--temperature 1.0"),
        ("--load elsewhere", "--load is another name of --ckpt"),
        ("--task 1", "--task says what to write, and so does another flag"),
        ("--mode beams", r"no mode 'beams' .did you mean 'beam'\?.; modes: all, greedy"),
        ("--mode all --greedy", "--greedy has no meaning with --mode"),
        ("--mode all --temperature 0", "--temperature 0 leaves nothing to sample in --mode"),
        ("--mode all --output a.jsonl", "--output has no meaning with --mode"),
    ],
)
def test_what_is_not_done_is_refused_with_what_to_use(words: str, message: str) -> None:
    command = ["--ckpt", "tests/golden/model", "--prompt", "a", *words.split()]
    with pytest.raises(UserError, match=message):
        generate.main(command)


def test_a_task_of_ascendspeed_that_is_not_here_is_named() -> None:
    with pytest.raises(UserError, match="--task 5 is not supported: 1 greedy, 2 sample, 3 beam"):
        generate.parse(["--load", "x", "--task", "1", "5"])
    options = generate.parse(["--load", "x", "--task", "1", "3"])
    assert (options.mode, options.prompt, options.chat) == (
        ("greedy", "beam"),
        ["how are you?"],
        False,
    )
    assert generate.parse(["--load", "x", "--task", "6"]).chat


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--alpha auto", {"rope_alpha": 0.0}),
        ("--alpha 2", {"rope_alpha": 2.0}),
        ("--only_cpu", {"device": "cpu"}),
        ("--fp16", {"dtype": "float16"}),
        ("--dtype fp16", {"dtype": "float16"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--do_sample", {"greedy": False}),
        ("--do_sample False", {"greedy": True}),
        ("--do_sample False --num_beams 2", {"greedy": False, "num_beams": 2}),
        ("--flash_attn --share False --style simple --local-rank 0", {"share": None}),
        ("--lora-load adapter", {"lora": ["adapter"]}),
        ("--tokenizer-name-or-path dir", {"tokenizer": "dir"}),
        ("--micro-batch-size 4", {"batch_size": 4}),
    ],
)
def test_what_is_understood_has_the_meaning_of_a_flag_of_ours(
    words: str, expected: dict[str, object]
) -> None:
    options = generate.parse(["--ckpt", "x", "--prompt", "a", *words.split()])
    assert {name: getattr(options, name, None) for name in expected} == expected


def test_each_mode_writes_what_its_own_command_writes(
    with_tokenizer: list[str], capsys: pytest.CaptureFixture
) -> None:
    """And the seed decides the samples."""
    base = [
        "--ckpt",
        with_tokenizer[1],
        "--prompt",
        "hello",
        "--max_new_tokens",
        "8",
        "--seed",
        "5",
    ]
    generate.main([*base, "--mode", "greedy,sample,beam,beam_sample", "--num_beams", "3"])
    blocks = re.findall(r"Answer:\n(.*?)\n=+\n\nElapsed", capsys.readouterr().out, re.DOTALL)
    commands = (
        ["--greedy"],
        [],
        ["--num_beams", "3"],
        ["--num_beams", "3", "--temperature", "0.8"],
    )
    for block, command in zip(blocks, commands, strict=True):
        generate.main([*base, *command])
        assert capsys.readouterr().out == f"{block}\n"


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (FASTCHAT_CLI, "1"),
        ("--ckpt MODEL --num-gpus 2", "2"),
        (GRADIO, "auto:0,auto:1"),
        ("--ckpt MODEL --gpus 3", "auto:3"),
        ("--ckpt MODEL --gpus 1,3 --num-gpus 1", "auto:1"),
    ],
)
def test_gpus_are_devices(words: str, devices: str) -> None:
    assert generate.parse(shlex.split(words)).devices == devices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus a", "--gpus a: expected numbers"),
        ("--gpus 0,1 --devices npu:0", "--gpus 0,1 and --devices npu:0"),
        ("--gpus 0 --num-gpus 2", "--num-gpus 2 is more than --gpus 0 names"),
    ],
)
def test_gpus_that_contradict_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate.parse(shlex.split(words))
