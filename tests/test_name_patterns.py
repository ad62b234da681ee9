"""Patterns of PEFT's files: they match what Python's `re` matches, and never for long."""

import random
import re
import signal
from collections.abc import Iterator

import pytest

from minillama.errors import UserError
from minillama.name_patterns import matches, matches_tail

NAMES = ["", "a", "ab", "a.b", "ab.ba", "layers.10.q_proj", "bbbb"]  # short: `re` explodes
PARTS = ["a", "b", ".", r"\.", "[ab]", "[^.]", r"\d", r"\w", "q_proj", "(?:a|b.)", "(a)", "(b|)"]
ANCHORS = ["^", "$", r"\b", r"\B", "(?=a)", "(?!.*q)"]
QUANTIFIERS = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,3}?"]


def random_pattern(generator: random.Random, depth: int = 1) -> str:
    parts = []
    for _ in range(generator.randint(0, 3)):
        if generator.random() < 0.15:
            parts.append(generator.choice(ANCHORS))
            continue
        part = generator.choice(PARTS)
        if depth and generator.random() < 0.3:
            part = f"({random_pattern(generator, depth - 1)}|{random_pattern(generator, 0)})"
        parts.append(part + generator.choice(QUANTIFIERS))
    return "".join(parts)


@pytest.fixture
def limited_time() -> Iterator[None]:
    """A pattern that explodes ends the test, in place of hanging it."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("matching takes too long")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def test_a_random_pattern_matches_what_re_matches(limited_time: None) -> None:
    generator = random.Random(0)
    outcomes = []
    for _ in range(1000):
        pattern = random_pattern(generator)
        for name in NAMES:
            expected = re.fullmatch(pattern, name) is not None
            assert matches(pattern, name) == expected, (pattern, name)
            tail = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert matches_tail(pattern, name) == tail, (pattern, name)
            outcomes.append(expected)
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.95


@pytest.mark.parametrize(
    "pattern",
    [
        "(.+)+x",
        "(.|.)*(.|.)*(.|.)*x",
        "((((.*)*)*)*)*x",
        ".*" * 100 + "x",
        "(.?){1000}" * 20 + "x",
        "(.|.)" * 60 + "x",
        "(?=(.*)*x).*",
        ".{0,99999999}" * 9 + "x",
        "(((.?){50}){50}){50}x",
    ],
)
def test_a_pattern_that_explodes_in_re_is_matched_at_once(pattern: str, limited_time: None) -> None:
    name = "model.layers.31.self_attn.q_proj.a_long_name_for_a_module"
    assert not matches(pattern, name)
    assert not matches_tail(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("([", "'\\['"),
        ("(a", r"a \( without its \)"),
        ("a)", r"a \) without its \("),
        ("*a", r"\* has nothing to repeat"),
        ("a**", r"\* has nothing to repeat"),
        ("[z-a]", "bad character range"),
        ("(?<=a)b", "is not supported"),
        ("(?i)a", "is not supported"),
        (r"(a)\1", "is not supported"),
        ("a{3,1}", "smaller limit"),
        ("(" * 50 + ")" * 50, "20 levels deep"),
        ("a" * 3000, "3000 characters"),
        ("a{" + "9" * 5000 + "}", "characters"),
        ("\\", "is not supported"),
    ],
)
def test_a_pattern_that_is_wrong_or_not_supported_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        matches(pattern, "model.layers.0.self_attn.q_proj")


def test_unsloths_pattern_is_supported() -> None:
    attention = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    linears = "(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)"
    pattern = rf"(?:.*?(?:text).*?{attention}.*?{linears}.*?)|(?:\bmodel\.layers\.[\d]{{1,}}\."
    pattern += rf"{attention}\.(?:{linears}))"
    assert matches(pattern, "model.layers.12.mlp.up_proj")
    assert not matches(pattern, "model.layers.12.input_layernorm")
