"""Names of the Hub and folders of its cache, wherever a directory is expected."""

import runpy
import shutil
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.hub import hub_hint

ROOT = Path(__file__).parents[2]
GOLDEN = str(ROOT / "tests/golden/model")
OUTPUT = "--output out"
# Commands that read a directory, given for {}.
COMMANDS = (
    "generate.py --ckpt {} --prompt a",
    f"generate.py --ckpt {GOLDEN} --lora {{}} --prompt a",
    f"generate.py --ckpt {GOLDEN} --tokenizer {{}} --prompt a",
    "eval.py --task demo --ckpt {}",
    "train.py --ckpt {} --data a.txt --out_dir run",
    f"train.py --ckpt {GOLDEN} --adapter {{}} --data a.txt --out_dir run",
    f"convert.py meta --input {{}} {OUTPUT}",
    f"convert.py megatron --input {{}} {OUTPUT}",
    f"convert.py from-megatron --input {{}} {OUTPUT}",
    f"convert.py reshard --input {{}} --tensor_parallel 2 {OUTPUT}",
    f"convert.py apply-delta --base {{}} --delta {GOLDEN} {OUTPUT}",
    f"convert.py apply-delta --base {GOLDEN} --delta {{}} {OUTPUT}",
    f"convert.py make-delta --base {GOLDEN} --target {{}} {OUTPUT}",
    f"convert.py merge-lora --base {{}} --lora {GOLDEN} {OUTPUT}",
    f"convert.py merge-lora --base {GOLDEN} --lora {{}} {OUTPUT}",
    f"convert.py data --input a.txt --tokenizer {{}} {OUTPUT}",
    f"convert.py data --input {{}} --tokenizer {GOLDEN} {OUTPUT}",
    f"convert.py tokenizer --base {{}} --add {GOLDEN}/tokenizer.model {OUTPUT}",
    "convert.py sha256 {}",
    f"convert.py sha256 {GOLDEN} --check {{}}",
    f"eval.py --task boolq --ckpt {GOLDEN} --data {{}}",
)
DATA = ("convert.py data --input {}", "eval.py --task boolq")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of the Hub, and nothing else, as the working directory."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "hub/models--lmsys--vicuna-7b-delta-v1.1"
    for name in ("old", "new"):
        (root / "snapshots" / name).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("new")
    (tmp_path / "hub/models--a--empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    return tmp_path / "hub"


def error_of(command: str, directory: str) -> str:
    script, *words = command.format(directory).split()
    with pytest.raises(UserError) as error:
        runpy.run_path(str(ROOT / script))["main"](words)
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_of_the_hub_is_answered_with_what_downloads_it(command: str, cache: Path) -> None:
    option = " --repo-type dataset" if command.startswith(DATA) else ""
    assert error_of(command, "lmsys/vicuna-7b-delta-v1.1").endswith(
        f"; nothing is downloaded here: run `hf download lmsys/vicuna-7b-delta-v1.1{option} "
        "--local-dir vicuna-7b-delta-v1.1`, and give the path vicuna-7b-delta-v1.1"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_the_cache_is_answered_with_the_revision_in_use(
    command: str, cache: Path
) -> None:
    root = Path("hub/models--lmsys--vicuna-7b-delta-v1.1")
    expected = f"; it is a folder of the Hub's cache: give {root}/snapshots/new"
    assert error_of(command, str(root)).endswith(expected)


def test_other_folders_of_the_cache_are_known_too(cache: Path) -> None:
    root = cache / "models--lmsys--vicuna-7b-delta-v1.1"
    assert hub_hint(root / "snapshots").endswith(f"give {root / 'snapshots/new'}")
    assert hub_hint(cache).endswith(f"give a model in it, such as {root / 'snapshots/new'}")
    assert "run `hf download a/empty --local-dir empty`" in hub_hint(cache / "models--a--empty")
    (cache / "datasets--a--b").mkdir()
    assert "run `hf download a/b --repo-type dataset" in hub_hint(cache / "datasets--a--b")
    shutil.rmtree(root / "refs")
    assert hub_hint(root).endswith(f"give {root / 'snapshots/old'}")  # the last one by name
    assert hub_hint(root / "snapshots/old") == ""
