"""Numbers of a config.json: absurd ones are refused by name, and the published ones are right."""

import json
from pathlib import Path

import pytest

import generate
import train
from minillama.checkpoint import hf_reader
from minillama.errors import UserError
from minillama.hf_config import from_hf, stop_ids
from minillama.llama_config import PUBLISHED
from tests.peers import HF_TINY, LLAMA3
from tests.test_errors import error_line

YARN = {"rope_type": "yarn", "factor": 2.0}


# epsilon, theta and context in the config.json that each model was published with
@pytest.mark.parametrize(
    ("name", "epsilon", "theta", "context"),
    [
        ("7b", 1e-5, 1e4, 4096),  # meta-llama/Llama-2-7b-hf
        ("13b", 1e-5, 1e4, 4096),  # meta-llama/Llama-2-13b-hf
        ("33b", 1e-6, 1e4, 2048),  # huggyllama/llama-30b
        ("34b", 1e-5, 1e6, 16384),  # codellama/CodeLlama-34b-hf
        ("65b", 1e-5, 1e4, 2048),  # huggyllama/llama-65b
        ("70b", 1e-5, 1e4, 4096),  # meta-llama/Llama-2-70b-hf
        ("llama1-7b", 1e-6, 1e4, 2048),  # huggyllama/llama-7b
        ("llama1-13b", 1e-6, 1e4, 2048),  # huggyllama/llama-13b
        ("chinese-7b", 1e-5, 1e4, 4096),  # hfl/chinese-llama-2-7b
        ("chinese-13b", 1e-5, 1e4, 4096),  # hfl/chinese-llama-2-13b
        ("chinese-alpaca-7b", 1e-6, 1e4, 2048),  # hfl/chinese-alpaca-lora-7b, merged
        ("chinese-alpaca-13b", 1e-6, 1e4, 2048),  # hfl/chinese-alpaca-lora-13b, merged
        ("chinese-alpaca-33b", 1e-6, 1e4, 2048),  # hfl/chinese-alpaca-lora-33b, merged
        ("llama3-8b", 1e-5, 5e5, 8192),  # meta-llama/Meta-Llama-3-8B
        ("llama3-70b", 1e-5, 5e5, 8192),  # meta-llama/Meta-Llama-3-70B
        ("llama3.1-8b", 1e-5, 5e5, 131072),  # meta-llama/Llama-3.1-8B
        ("llama3.1-70b", 1e-5, 5e5, 131072),  # meta-llama/Llama-3.1-70B
        ("llama3.2-1b", 1e-5, 5e5, 131072),  # meta-llama/Llama-3.2-1B
        ("llama3.2-3b", 1e-5, 5e5, 131072),  # meta-llama/Llama-3.2-3B
        ("15m", 1e-5, 1e4, 256),  # karpathy/tinyllamas
        ("110m", 1e-5, 1e4, 1024),  # karpathy/tinyllamas
        ("1.1b", 1e-5, 1e4, 2048),  # TinyLlama/TinyLlama-1.1B
    ],
)
def test_published_sizes_have_the_published_epsilon_theta_and_context(
    name: str, epsilon: float, theta: float, context: int
) -> None:
    """They leave no trace in the weights: with a wrong one a model still talks, only worse."""
    config = PUBLISHED[name]
    assert (config.norm_eps, config.rope_theta, config.max_seq_len) == (epsilon, theta, context)


def test_every_published_size_is_in_the_table_above() -> None:
    table = test_published_sizes_have_the_published_epsilon_theta_and_context.pytestmark[0]
    assert {row[0] for row in table.args[1]} == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 0}, "rope_theta = 0.0: expected a finite number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 0}}, "rope_theta = 0.0"),
        ({"rms_norm_eps": float("nan")}, "norm_eps = nan"),
        ({"initializer_range": float("inf")}, "initializer_range = inf"),
        ({"rope_scaling": YARN | {"factor": float("inf")}}, "factor = inf"),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, "beta_fast = 'x'"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow = 0"),
        ({"rope_scaling": YARN | {"attention_factor": float("nan")}}, "attention_factor = nan"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate = 'no': expected true or false"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings = 0",
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "must be below high_freq_factor"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x': expected token ids"),
        ({"eos_token_id": -5}, "eos_token_id = -5"),
        ({"eos_token_id": [[1]]}, "eos_token_id = [[1]]"),
        ({"eos_token_id": [1, True]}, "eos_token_id = [1, True]"),
        ({"bos_token_id": "1"}, "token id '1'"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings = 'false': expected true or false"),
        ({"attention_bias": 1}, "attention_bias = 1"),
        ({"num_hidden_layers": 2**31}, "n_layers = 2147483648"),
        ({"num_hidden_layers": 2**31 - 1}, "n_layers = 2147483647: at most 10,000"),
        ({"num_hidden_layers": True}, "n_layers = True"),
    ],
    ids=str,
)
def test_an_absurd_number_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(UserError) as error:
        from_hf(HF_TINY | changes)
    assert named in str(error.value)


def test_null_means_the_default_in_a_rotary_scaling() -> None:
    """transformers reads `"beta_fast": null` as 32."""
    assert from_hf(HF_TINY | {"rope_scaling": YARN | {"beta_fast": None}}) == from_hf(
        HF_TINY | {"rope_scaling": YARN}
    )


@pytest.mark.parametrize("value", ["x", -1, [[1]], [2, None]], ids=str)
def test_a_wrong_eos_of_generation_config_is_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        stop_ids(tmp_path, from_hf(HF_TINY))


@pytest.mark.parametrize("num_layers", [2**31 - 1, 10_000])
def test_more_layers_than_the_files_hold_are_refused_before_anything_is_built(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint,
    num_layers: int,
) -> None:
    """Building 10,000 layers took 40 s before the files were looked at."""
    base = tiny_checkpoint()
    monkeypatch.setattr(hf_reader, "empty_model", lambda *_: pytest.fail("the model was built"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    text = error_line(capsys, generate.main, ["--ckpt", str(base), "--prompt_ids", "1"])
    assert "n_layers" in text or "missing model.layers.2." in text


@pytest.mark.parametrize("start", [["--model", "7b"], ["--dim", "8", "--n_heads", "2"]], ids=str)
def test_too_many_layers_from_scratch_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, start: list[str]
) -> None:
    rest = ["--n_layers", "99999999", "--init", "scratch", "--dry_run"]
    text = error_line(capsys, train.main, [*start, *rest])
    assert "n_layers = 99999999: at most 10,000" in text
