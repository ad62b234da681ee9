"""Files that must be refused, as a table: what is written, the command that reads it, the error.

Each is one change to the folder of `scenarios.write_world`, in which the command would be right.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.bad_commands import C, E, G, T

GENERATE = f"{G} --prompt a"
ADAPTED = "generate.py --ckpt adapter --base base --greedy --max_new_tokens 2 --prompt a"
DATA = f"{C} data --tokenizer tokenizer.model --output set --input"
DEEP = "[" * 100_000 + "]" * 100_000


@dataclass(frozen=True)
class BadFile:
    """A change to the folder, the command that meets it, and words that the error must have."""

    name: str
    write: Callable[[Path], object]
    command: str
    words: str


def text(path: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / path).write_bytes(raw)


def changed(path: str, **values: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file."""

    def write(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | values))

    return write


def link(path: str, target: str) -> Callable[[Path], None]:
    """Put a symbolic link in the place of a file."""

    def write(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target)

    return write


def pipe(path: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        os.mkfifo(folder / path)

    return write


def cut(path: str, share: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raw = (folder / path).read_bytes()
        (folder / path).write_bytes(raw[: int(len(raw) * share)])

    return write


def torch_file(path: str, data: bytes, compressed_zeros: int = 0) -> Callable[[Path], None]:
    """Write an archive of torch.save with this pickle, in the place of the weights."""

    def write(folder: Path) -> None:
        (folder / "base/model.safetensors").unlink()
        with zipfile.ZipFile(folder / path, "w") as archive:
            archive.writestr("w/data.pkl", data)
            archive.writestr("w/version", b"3")
            if compressed_zeros:
                info = zipfile.ZipInfo("w/byteorder")
                info.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(info, "w", force_zip64=True) as entry:
                    for _ in range(compressed_zeros // 2**20):
                        entry.write(bytes(2**20))

    return write


def index(weight_map: Any) -> Callable[[Path], None]:
    """Write an index of shards in the place of the weights."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        content = json.dumps({"weight_map": weight_map})
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return write


def header(path: str, content: Any, length: int | None = None) -> Callable[[Path], object]:
    """Write a safetensors file of a header alone."""
    raw = json.dumps(content).encode() if not isinstance(content, bytes) else content
    size = len(raw) if length is None else length
    return lambda folder: (folder / path).write_bytes(struct.pack("<Q", size) + raw)


WEIGHTS = "base/model.safetensors"
CONFIG = "base/config.json"
ADAPTER = "adapter/adapter_config.json"
HUGE_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."  # stores the dictionary in place 2^31 - 1 of the memo
HUGE_BYTES = b"\x80\x02X\xff\xff\xff\x7fa."  # a string of 2^31 - 1 bytes
LINES = '{"instruction": "a", "output": "b"}\n'

# fmt: off
FILES = (
    # config.json: not JSON, not a file, absurd numbers
    BadFile("config is empty", text(CONFIG, ""), GENERATE, "config.json"),
    BadFile("config is a list", text(CONFIG, "[]"), GENERATE, "config.json"),
    BadFile("config is deep", text(CONFIG, DEEP), GENERATE, "nested"),
    BadFile("config is not UTF-8", text(CONFIG, b"\xff\xfe{}"), GENERATE, "UTF-8"),
    BadFile("config is cut short", cut(CONFIG, 0.5), GENERATE, "not valid JSON"),
    BadFile("config is endless", link(CONFIG, "/dev/zero"), GENERATE, "not a regular file"),
    BadFile("config is a terminal", link(CONFIG, "/dev/tty"), GENERATE, "config.json"),
    BadFile("config is a pipe", pipe(CONFIG), GENERATE, "not a regular file"),
    BadFile("config links to itself", link(CONFIG, "config.json"), GENERATE, "config.json"),
    BadFile("config links to nothing", link(CONFIG, "nowhere"), GENERATE, "config.json"),
    BadFile("an integer of 5,000 digits", text(CONFIG, '{"hidden_size": ' + "9" * 5000 + "}"),
            GENERATE, "digits"),
    BadFile("2^31 layers", changed(CONFIG, num_hidden_layers=2**31), GENERATE, "layers"),
    BadFile("no layers", changed(CONFIG, num_hidden_layers=0), GENERATE, "0"),
    BadFile("layers are a text", changed(CONFIG, num_hidden_layers="2"), GENERATE, "2"),
    BadFile("width is -24", changed(CONFIG, hidden_size=-24), GENERATE, "-24"),
    BadFile("width is null", changed(CONFIG, hidden_size=None), GENERATE, "hidden_size"),
    BadFile("heads do not divide", changed(CONFIG, num_key_value_heads=4), GENERATE, "4"),
    BadFile("theta is 0", changed(CONFIG, rope_theta=0), GENERATE, "theta"),
    BadFile("theta is infinite", changed(CONFIG, rope_theta=float("inf")), GENERATE, "theta"),
    BadFile("epsilon is NaN", changed(CONFIG, rms_norm_eps=float("nan")), GENERATE, "eps"),
    BadFile("epsilon is a list", changed(CONFIG, rms_norm_eps=[1]), GENERATE, "config.json"),
    BadFile("EOS is a text", changed(CONFIG, eos_token_id="x"), GENERATE, "eos_token_id"),
    BadFile("EOS is -5", changed(CONFIG, eos_token_id=-5), GENERATE, "eos_token_id"),
    BadFile("EOS is a list of lists", changed(CONFIG, eos_token_id=[[1]]), GENERATE, "[[1]]"),
    BadFile("a rope of another kind",
            changed(CONFIG, rope_scaling={"type": "longrope", "factor": 2}), GENERATE, "longrope"),
    BadFile("yarn's factor is infinite",
            changed(CONFIG, rope_scaling={"rope_type": "yarn", "factor": float("inf")}),
            GENERATE, "factor"),
    BadFile("yarn's beta is a text",
            changed(CONFIG, rope_scaling={"rope_type": "yarn", "factor": 2, "beta_fast": "x"}),
            GENERATE, "beta_fast"),
    BadFile("a rope that is a number", changed(CONFIG, rope_scaling=3), GENERATE, "config.json"),
    BadFile("another network", changed(CONFIG, model_type="gpt2"), GENERATE, "gpt2"),
    BadFile("context 0", changed(CONFIG, max_position_embeddings=0), GENERATE, "0"),
    BadFile("a vocabulary of 2^40", changed(CONFIG, vocab_size=2**40), GENERATE, "config.json"),
    # weights
    BadFile("weights are empty", text(WEIGHTS, b""), GENERATE, "empty"),
    BadFile("weights are a web page", text(WEIGHTS, "<html>"), GENERATE, "web page"),
    BadFile("weights are cut short", cut(WEIGHTS, 0.7), GENERATE, "cut short"),
    BadFile("weights are cut in the header", cut(WEIGHTS, 0.002), GENERATE, "cut short"),
    BadFile("weights are a directory", lambda folder: [(folder / WEIGHTS).unlink(),
            (folder / WEIGHTS).mkdir()], GENERATE, "model"),
    BadFile("a header of 2^60 bytes", header(WEIGHTS, {}, 2**60), GENERATE, "model.safetensors"),
    BadFile("a header that is deep", header(WEIGHTS, DEEP.encode()), GENERATE, "model.safetensors"),
    BadFile("a header without tensors", header(WEIGHTS, {}), GENERATE, "missing"),
    BadFile("a tensor of 2^62 elements", header(WEIGHTS, {"w": {"dtype": "F32",
            "shape": [2**31, 2**31], "data_offsets": [0, 0]}}), GENERATE, "model.safetensors"),
    BadFile("a shape of -1", header(WEIGHTS, {"w": {"dtype": "F32", "shape": [-1],
            "data_offsets": [0, 4]}}), GENERATE, "model.safetensors"),
    BadFile("an index that names nothing", index({"a": ""}), GENERATE, "index.json"),
    BadFile("an index that leads outside", index({"a": "../target/model.safetensors"}),
            GENERATE, "index.json"),
    BadFile("an index of numbers", index({"a": 5}), GENERATE, "index.json"),
    BadFile("an index of what is not there", index({"a": "other.safetensors"}),
            GENERATE, "other.safetensors"),
    BadFile("a pickle with a huge memo", torch_file("base/pytorch_model.bin", HUGE_MEMO),
            GENERATE, "missing"),
    BadFile("a pickle with a huge text", torch_file("base/pytorch_model.bin", HUGE_BYTES),
            GENERATE, "pytorch_model.bin"),
    BadFile("a pickle that is deep", torch_file("base/pytorch_model.bin",
            b"\x80\x02" + b"(" * 10**6), GENERATE, "pytorch_model.bin"),
    BadFile("a pickle of other things", torch_file("base/pytorch_model.bin",
            pickle.dumps({"a": [1]}, 2)), GENERATE, "not a tensor"),
    BadFile("a deflated entry of 900 MB", torch_file("base/pytorch_model.bin",
            pickle.dumps({}, 2), 900 * 2**20), GENERATE, "compressed"),
    # tokenizers
    BadFile("a tokenizer that is empty", text("base/tokenizer.model", b""), GENERATE, "tokenizer"),
    BadFile("a tokenizer that is a page", text("base/tokenizer.model", "<html>"),
            GENERATE, "tokenizer.model"),
    BadFile("a tokenizer that is cut", cut("base/tokenizer.model", 0.5), GENERATE, "tokenizer"),
    BadFile("a tokenizer that is endless", link("base/tokenizer.model", "/dev/zero"),
            GENERATE, "tokenizer"),
    BadFile("tokenizer.json that is a list", text("base/tokenizer.json", "[]"),
            f"{GENERATE} --tokenizer base/tokenizer.json", "tokenizer.json"),
    BadFile("tokenizer.json that is deep", text("base/tokenizer.json", DEEP),
            f"{GENERATE} --tokenizer base/tokenizer.json", "tokenizer.json"),
    BadFile("tokenizer_config that is a number", text("base/tokenizer_config.json", "3"),
            GENERATE, "tokenizer_config.json"),
    # minillama.json, generation_config.json, manifest.json
    BadFile("a template that is a list", text("base/minillama.json", '{"template": ["a"]}'),
            GENERATE, "template"),
    BadFile("a template in another folder", text("base/minillama.json",
            '{"template": "../a.jinja"}'), GENERATE, "no template '../a.jinja'"),
    BadFile("a chat template that is cut", text("base/chat_template.jinja", "{% if a"),
            GENERATE, "the chat template cannot be used"),
    BadFile("a chat template that is endless", link("base/chat_template.jinja", "/dev/zero"),
            GENERATE, "not a regular file"),
    BadFile("a generation config of lists", text("base/generation_config.json",
            '{"eos_token_id": [["a"]]}'), GENERATE, "eos_token_id"),
    BadFile("a manifest without a file", text("base/manifest.json", '{"tensors": 1}'),
            f"{C} sha256 base --check base/manifest.json", "manifest.json"),
    # adapters
    BadFile("an adapter of rank 0", changed(ADAPTER, r=0), ADAPTED, "r"),
    BadFile("an adapter of rank -1", changed(ADAPTER, r=-1), ADAPTED, "-1"),
    BadFile("an adapter whose alpha is NaN", changed(ADAPTER, lora_alpha=float("nan")),
            ADAPTED, "lora_alpha"),
    BadFile("targets that are a number", changed(ADAPTER, target_modules=5), ADAPTED, "target"),
    BadFile("targets that are numbers", changed(ADAPTER, target_modules=[5]), ADAPTED, "target"),
    BadFile("targets that are no pattern", changed(ADAPTER, target_modules="(["), ADAPTED, "(["),
    BadFile("a pattern that never ends", changed(ADAPTER, target_modules="(.*)*" * 20 + "x"),
            ADAPTED, "adapter"),
    BadFile("ranks that are a list", changed(ADAPTER, rank_pattern=[1]), ADAPTED, "rank_pattern"),
    BadFile("ranks that are texts", changed(ADAPTER, rank_pattern={"q_proj": "x"}),
            ADAPTED, "q_proj is 'x'"),
    BadFile("an adapter of DoRA", changed(ADAPTER, use_dora=True), ADAPTED, "use_dora"),
    BadFile("an adapter of another method", changed(ADAPTER, peft_type="IA3"), ADAPTED, "IA3"),
    BadFile("an adapter cut short", cut("adapter/adapter_model.safetensors", 0.5),
            ADAPTED, "adapter_model.safetensors"),
    BadFile("an adapter config that is deep", text(ADAPTER, DEEP), ADAPTED, "nested"),
    BadFile("a merge of rank 0", changed(ADAPTER, r=0),
            f"{C} merge-lora --base base --lora adapter --output out", "r"),
    # data
    BadFile("data without records", text("a.json", "[]"), f"{DATA} a.json", "a.json"),
    BadFile("data of numbers", text("a.json", "[1, 2]"), f"{DATA} a.json", "a.json"),
    BadFile("data that is deep", text("a.json", DEEP), f"{DATA} a.json", "a.json"),
    BadFile("lines that are deep", text("a.jsonl", DEEP), f"{DATA} a.jsonl", "a.jsonl"),
    BadFile("data with another key", text("a.json", '[{"q": "a"}]'), f"{DATA} a.json", "a.json"),
    BadFile("a bad third record", text("a.jsonl", LINES * 2 + '{"instruction": 1}\n'),
            f"{DATA} a.jsonl", "a.jsonl"),
    BadFile("a third line cut short", text("a.jsonl", LINES * 2 + '{"instr'), f"{DATA} a.jsonl",
            "a.jsonl"),
    BadFile("data with lone surrogates",
            text("a.jsonl", '{"instruction": "\\ud83d", "output": "b"}'),
            f"{DATA} a.jsonl", "a.jsonl"),
    BadFile("data that is not UTF-8", text("a.txt", b"\xe4\xf6\xfc" * 9), f"{DATA} a.txt", "UTF-8"),
    BadFile("data of zeros", text("a.json", bytes(1000)), f"{DATA} a.json", "a.json"),
    BadFile("data that is endless", link("a.txt", "/dev/zero"), f"{DATA} a.txt", "a.txt"),
    BadFile("data that is a pipe", pipe("a.jsonl"), f"{DATA} a.jsonl", "a.jsonl"),
    BadFile("names of data that are a list", text("dataset_info.json", "[]"),
            f"{DATA} named --dataset_dir .", "dataset_info.json"),
    BadFile("a name of data that is a number", text("dataset_info.json",
            '{"named": {"file_name": 5}}'), f"{DATA} named --dataset_dir .", "file_name"),
    BadFile("a name of data elsewhere", text("dataset_info.json",
            '{"named": {"file_name": "/etc/passwd"}}'), f"{DATA} named --dataset_dir .", "passwd"),
    BadFile("a data set without its index", text("set.json", '{"version": 1}'),
            f"{T} --data set", "set"),
    BadFile("a data set of the future", lambda folder: [text("set.bin", b"")(folder),
            text("set.json", '{"version": 9}')(folder)], f"{T} --data set", "set.json"),
    # prompts, questions, settings
    BadFile("prompts that are not UTF-8", text("p.txt", b"\xff\xfe"), f"{G} --prompt_file p.txt",
            "UTF-8"),
    BadFile("prompts without prompts", text("p.txt", "\n \n"), f"{G} --prompt_file p.txt",
            "no prompts"),
    BadFile("prompts with another key", text("p.jsonl", '{"q": "a"}'), f"{G} --prompt_file p.jsonl",
            "p.jsonl"),
    BadFile("prompts with lone surrogates", text("p.jsonl", '{"prompt": "\\ud83d"}'),
            f"{G} --prompt_file p.jsonl", "surrogate"),
    BadFile("a text to score that is empty", text("text.txt", ""), E, "text.txt"),
    BadFile("a text to score of bytes", text("text.txt", b"\xff" * 9), E, "UTF-8"),
    BadFile("a comparison that is a list", text("s.json", "[]"), f"{E} --compare s.json", "s.json"),
    BadFile("settings that are no TOML", text("a.toml", "a = = 1"),
            f"{T} --config a.toml", "a.toml"),
    BadFile("settings with an unknown key", text("a.toml", "learning_rat = 1"),
            f"{T} --config a.toml", "learning_rate"),
    BadFile("settings of the wrong type", text("a.toml", 'max_steps = "many"'),
            "train.py --config a.toml --ckpt base --data alpaca.json", "max_steps"),
    BadFile("DeepSpeed's file that is a list", text("ds.json", "[]"), f"{T} --deepspeed ds.json",
            "ds.json"),
    BadFile("DeepSpeed's file of a word", text("ds.json", '{"fp16": {"enabled": "maybe"}}'),
            f"{T} --deepspeed ds.json", "maybe"),
    # outputs whose temporary name is taken by a link
    BadFile("a link for the temporary directory", link(".out.partial", "base"),
            f"{C} meta --input meta --output out", ".out.partial"),
    BadFile("a link for the old directory", link(".out.old", "base"),
            f"{C} meta --input meta --output out", ".out.old"),
    BadFile("a link for the data's temporary file", link("set.bin.partial", "alpaca.json"),
            f"{DATA} text.txt", "set.bin.partial"),
    BadFile("a link for the data's counts", link("set.json.partial", "alpaca.json"),
            f"{DATA} text.txt", "set.json.partial"),
    # Meta's layout
    BadFile("params.json that is deep", text("meta/params.json", DEEP),
            f"{C} meta --input meta --output out", "nested"),
    BadFile("params.json of texts", text("meta/params.json", '{"dim": "a", "n_heads": 2}'),
            f"{C} meta --input meta --output out", "params.json"),
    BadFile("a shard that is cut", cut("meta/consolidated.00.pth", 0.5),
            f"{C} meta --input meta --output out", "consolidated.00.pth"),
)
# fmt: on
