"""What --ckpt and --lora name: adapters over every kind of directory, stop tokens, templates."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import requirements
from minillama.checkpoint.hf_reader import load_model
from minillama.errors import UserError
from minillama.generation.sampling import Sampling
from minillama.lora import LoraConfig, add_lora, merge_lora, save_adapter
from tests.conftest import generate

ROOT = Path(__file__).parents[1]


GOLDEN = str(ROOT / "tests/golden/model")


MAIN = runpy.run_path(str(ROOT / "generate.py"))["main"]


TEMPLATE = ["--ckpt", GOLDEN, "--template", "llama_factory_default", "--max_new_tokens", "24"]


@pytest.mark.parametrize("where", ["hugging face", "run", "adapter"])
def test_adapters_work_unmerged_over_every_kind_of_directory(where: str, tmp_path: Path) -> None:
    """Two adapters over a base: as it is, in a run directory, or as the first adapter's base."""
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
        "names no prompt template, as base models do not; "
        "it may not understand llama_factory_default" in capsys.readouterr().err
    )


def test_the_first_token_needs_none_of_torchs_compiler() -> None:
    """Loading it takes as long as everything else together."""
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch._dynamo' in sys.modules))\n"
        f"sys.argv = ['generate.py', '--ckpt', {GOLDEN!r}, '--prompt_ids', '1 5',"
        " '--greedy', '--max_new_tokens', '1']\n"
        "runpy.run_path('generate.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.skipif(
    requirements.torch_version() < (2, 13),
    reason="an older torch draws the first weights of a layer on meta with parts of its compiler",
)
def test_a_first_token_needs_no_compiler() -> None:
    """sympy comes with torch's compiler, and would be a fifth of the time to the first token."""
    words = ["generate.py", *TEMPLATE[:-1], "1", "--prompt", "a", "--greedy"]
    code = (
        f"import runpy, sys; sys.argv = {words}; sys.path.insert(0, '')\n"
        "try:\n    runpy.run_path('generate.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'minillama.model' in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_another_models_tokenizer_is_warned_of(
    small_tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--ckpt", GOLDEN, "--prompt", "a", "--max_new_tokens", "1", "--tokenizer"]
    other = "is not the tokenizer of this model: id "
    MAIN([*words, str(small_tokenizer.path)])
    assert f"warning: {small_tokenizer.path} {other}" in capsys.readouterr().err
    same = shutil.copy(f"{GOLDEN}/tokenizer.model", tmp_path / "copy.model")
    MAIN([*words, str(same)])
    assert other not in capsys.readouterr().err
