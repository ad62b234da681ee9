"""Flags of generate.py that are absurd, contradict each other, or would be ignored."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import generate
from minillama.errors import UserError
from minillama.generation import beam, cache
from minillama.generation.api import load
from minillama.generation.config import GenerationConfig
from minillama.generation.sampling import Sampling
from tests.conftest import generate as generated
from tests.conftest import random_model
from tests.test_errors import error_line


@pytest.fixture
def checkpoint(inputs: Path) -> str:
    return str(inputs / "base")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--prompt a --greedy --temperature 1", "--greedy and --temperature 1.0 contradict"),
        ("--prompt a --temperature 1e-320", "a temperature or penalty below 1e-06 overflows"),
        ("--prompt a --temperature 1e-30", "temperature=1e-30"),
        ("--prompt a --repetition_penalty 1e-320", "repetition_penalty=1e-320"),
        ("--prompt a --output /", "/: already exists"),
        ("--prompt a --output ..", "..: already exists"),
        ("--prompt a --host 0.0.0.0", "--host has no meaning without --web"),
        ("--prompt a --port 1", "--port has no meaning without --web"),
        ("--web --port 99999999", "--port 99999999: must be from 0 to 65535"),
        ("--prompt a --base elsewhere", "--base elsewhere would be ignored"),
        ("--prompt a --system b --template none", "--system has no place in a prompt without"),
        ("--prompt_ids 1 --system b", "--system has no meaning with token ids"),
        ("--prompt_ids 1 --template alpaca", "--template has no meaning with token ids"),
        ("--prompt a --num_beams 1000000", "the cache of 1,000,000 sequences of"),
        ("--prompt a --num_beams 1000000000", "--num_beams 1000000000: the table of scores needs"),
        ("--prompt a --num_beams 90000 --top_k 3 --max_new_tokens 2", "use at most"),
        ("--prompt a --rope_alpha 9 --max_new_tokens 99999999999", "the cache of 1 sequences"),
    ],
)
def test_it_is_refused_by_name(
    flags: str, named: str, checkpoint: str, capsys: pytest.CaptureFixture
) -> None:
    text = error_line(capsys, generate.main, ["--ckpt", checkpoint, *flags.split()])
    assert named in text


def test_the_python_api_refuses_the_same(checkpoint: str) -> None:
    with pytest.raises(UserError, match="contradict each other"):
        GenerationConfig(greedy=True, temperature=0.5)
    assert GenerationConfig(greedy=True, temperature=0.0).sampling.temperature == 0.0
    with pytest.raises(UserError, match="--system has no place"):
        load(checkpoint, template="none").generate("a", system="b", greedy=True)


def test_greedy_is_the_limit_of_small_temperatures() -> None:
    """So a filter beside --greedy is no contradiction: the most likely token passes all of them."""
    model = random_model(seed=3)
    greedy = list(generated(model, [1, 2, 3], 8, Sampling(temperature=0.0)))
    assert list(generated(model, [1, 2, 3], 8, Sampling(temperature=1e-6), seed=0)) == greedy
    filtered = Sampling(temperature=0.0, top_k=2, top_p=0.5)
    assert list(generated(model, [1, 2, 3], 8, filtered)) == greedy


def test_what_fits_in_memory_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the memory itself: the cache's bytes are counted, not guessed."""
    model = random_model()
    made = cache.Cache.for_model(model, model.config, batch=3, capacity=5)
    num_bytes = sum(part.nbytes for part in (*made.keys, *made.values))
    monkeypatch.setattr(cache, "most_usable_bytes", lambda device: num_bytes)
    cache.Cache.for_model(model, model.config, batch=3, capacity=5)
    monkeypatch.setattr(cache, "most_usable_bytes", lambda device: num_bytes - 1)
    with pytest.raises(UserError, match="the cache of 3 sequences of 5 tokens"):
        cache.Cache.for_model(model, model.config, batch=3, capacity=5)
    monkeypatch.setattr(cache, "most_usable_bytes", lambda device: None)
    cache.Cache.for_model(model, model.config, batch=3, capacity=5)


def test_each_first_child_keeps_its_parents_row() -> None:
    class Copies:
        def copy(self, sources: list[int], targets: list[int], start: int) -> None:
            self.pairs = dict(zip(targets, sources, strict=True))

    copies = Copies()
    rows = beam.move_rows(copies, [2, 0, 2, 2], start=5)  # type: ignore[arg-type]
    assert rows[:2] == [2, 0]
    assert sorted(rows) == [0, 1, 2, 3]
    assert copies.pairs == {rows[2]: 2, rows[3]: 2}


def test_memory_that_can_be_used_is_a_plausible_number() -> None:
    usable = cache.most_usable_bytes(torch.device("cpu"))
    assert usable is None or 10**6 < usable < 10**15


@pytest.mark.parametrize("template", [["a"], 5, {"a": 1}], ids=str)
def test_a_template_that_is_no_name_is_refused(
    template: object, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    (base / "minillama.json").write_text(json.dumps({"template": template}))
    text = error_line(capsys, generate.main, ["--ckpt", str(base), "--prompt", "a"])
    assert "minillama.json: template is" in text
