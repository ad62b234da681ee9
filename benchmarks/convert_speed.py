"""The conversions beside what people use today: CPU and wall seconds, and peak memory.

    python benchmarks/convert_speed.py     1.1B shape, fp16: 7 GB of disk, 5 GB of memory
    python benchmarks/convert_speed.py --only merge --repeat 3

For each conversion: ours; a peer that loads whole models, as FastChat's apply_delta, peft's merge
and transformers' Meta converter do; and the bare loop, the least that reads, computes and writes
one tensor at a time with nothing checked or reported. Rounds are interleaved, every run is a fresh
process on one thread, and medians are compared.
"""

import argparse
import json
import shutil
import statistics
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from convert_memory import ROOT, build, measure, require_disk


def fastchat_delta(base: Path, delta: Path, out: Path) -> None:
    """FastChat's rule: both models whole, fp16, added in place."""
    import torch
    from transformers import LlamaForCausalLM

    model, other = (
        LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float16) for path in (base, delta)
    )
    parts = other.state_dict()
    for name, parameter in model.state_dict().items():
        parameter.data += parts[name]
    model.save_pretrained(out)


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def transformers_meta(source: Path, _: Path, out: Path) -> None:
    """transformers' Meta converter, step by step.

    Load all, permute, save by layers, load as a model, save again.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minillama.conversion.meta_layout import meta_tensors

    params, staging = json.loads((source / "params.json").read_text()), out / "tmp"
    loaded = torch.load(source / "consolidated.00.pth", weights_only=True)
    staging.mkdir(parents=True)
    dim, heads, weight_map = params["dim"], params["n_heads"], {}
    groups: dict[str, dict] = {}
    for name, meta in meta_tensors(params["n_layers"]).items():
        tensor = loaded[meta.name]
        if "q_proj" in name or "k_proj" in name:
            n = heads if "q_proj" in name else params["n_kv_heads"]
            tensor = (
                tensor.view(n, tensor.shape[0] // n // 2, 2, dim)
                .transpose(1, 2)
                .reshape(tensor.shape)
            )
        file = f"pytorch_model-{name.split('.')[2] if '.layers.' in name else 'rest'}.bin"
        groups.setdefault(file, {})[name] = tensor
        weight_map[name] = file
    for file, tensors in groups.items():
        torch.save(tensors, staging / file)
    (staging / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    LlamaConfig(
        hidden_size=dim,
        intermediate_size=loaded["layers.0.feed_forward.w1.weight"].shape[0],
        num_attention_heads=heads,
        num_key_value_heads=params["n_kv_heads"],
        num_hidden_layers=params["n_layers"],
        rms_norm_eps=params["norm_eps"],
        vocab_size=loaded["output.weight"].shape[0],
    ).save_pretrained(staging)
    del loaded, groups, tensors, tensor
    LlamaForCausalLM.from_pretrained(staging, torch_dtype=torch.float16).save_pretrained(out)
    shutil.rmtree(staging)


def bare_read(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable]:
    """Return the shapes by name, and a function that reads one tensor by its offset.

    A mapped file would count as memory as a whole.
    """
    import torch

    file = open(path, "rb")  # noqa: SIM115, until the process ends
    length = struct.unpack("<Q", file.read(8))[0]
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    dtypes = {"F16": torch.float16, "F32": torch.float32}

    def read(name: str) -> torch.Tensor:
        start, end = header[name]["data_offsets"]
        file.seek(8 + length + start)
        return torch.frombuffer(
            bytearray(file.read(end - start)), dtype=dtypes[header[name]["dtype"]]
        ).view(header[name]["shape"])

    return {name: tuple(spec["shape"]) for name, spec in header.items()}, read


def bare_write(out: Path, tensors: Iterator, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {
            "dtype": "F16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    out.mkdir()
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def bare_delta(base: Path, delta: Path, out: Path) -> None:
    (shapes, one), (_, two) = (
        bare_read(base / "model.safetensors"),
        bare_read(delta / "model.safetensors"),
    )
    bare_write(out, (one(name) + two(name) for name in shapes), shapes)


def bare_merge(base: Path, adapter: Path, out: Path) -> None:
    (shapes, one), (factors, two) = (
        bare_read(base / "model.safetensors"),
        bare_read(adapter / "adapter_model.safetensors"),
    )

    def merged(name: str) -> "torch.Tensor":  # noqa: F821
        weight, key = one(name), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            return weight
        return (
            weight.float() + 2.0 * (two(f"{key}.lora_B.weight") @ two(f"{key}.lora_A.weight"))
        ).half()

    bare_write(out, map(merged, shapes), shapes)


def bare_meta(source: Path, _: Path, out: Path) -> None:
    import torch

    from minillama.conversion.meta_layout import meta_tensors

    params = json.loads((source / "params.json").read_text())
    # mmap: the file is mapped, which spares a copy
    loaded = torch.load(source / "consolidated.00.pth", weights_only=True, mmap=True)
    table = {name: meta.name for name, meta in meta_tensors(params["n_layers"]).items()}

    def permuted(name: str) -> torch.Tensor:
        tensor = loaded[table[name]]
        if "q_proj" not in name and "k_proj" not in name:
            return tensor
        n = params["n_heads"] if "q_proj" in name else params["n_kv_heads"]
        return (
            tensor.view(n, tensor.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        )

    bare_write(
        out, map(permuted, table), {name: tuple(loaded[meta].shape) for name, meta in table.items()}
    )


# conversion: the peer, the bare loop, and our command line
CONTENDERS: dict[str, tuple[Callable, Callable, list[str]]] = {
    "delta": (
        fastchat_delta,
        bare_delta,
        ["apply-delta", "--base", "{0}", "--delta", "{1}", "--output", "{2}"],
    ),
    "merge": (
        peft_merge,
        bare_merge,
        ["merge-lora", "--base", "{0}", "--lora", "{1}", "--output", "{2}", "--device", "cpu"],
    ),
    "meta": (transformers_meta, bare_meta, ["meta", "--input", "{0}", "--output", "{2}"]),
}


def bench(conversion: str, model: str, where: Path, repeat: int) -> None:
    peer, bare, command = CONTENDERS[conversion]
    with tempfile.TemporaryDirectory(dir=where) as folder:
        first, second, out = (f"{folder}/{name}" for name in ("first", "second", "out"))
        build("hf", model, first)
        if conversion != "meta":
            build("hf" if conversion == "delta" else "adapter", model, second)
        else:
            Path(first).rename(second)
            measure(
                [
                    str(ROOT / "convert.py"),
                    "meta",
                    "--reverse",
                    "--input",
                    second,
                    "--output",
                    first,
                    "--shards",
                    "1",
                ]
            )
            shutil.rmtree(second)
        runs = {
            "ours": [
                str(ROOT / "convert.py"),
                *(part.format(first, second, out) for part in command),
            ],
            peer.__name__: [__file__, "--run", peer.__name__, first, second, out],
            bare.__name__: [__file__, "--run", bare.__name__, first, second, out],
        }
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
        for _ in range(repeat):
            for name, arguments in runs.items():
                results[name].append(measure(arguments))
                shutil.rmtree(out)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    for name, (cpu, wall, peak) in medians.items():
        ratios = [
            mine / theirs for mine, theirs in zip(medians["ours"], (cpu, wall, peak), strict=True)
        ]
        print(
            f"{conversion:6} {name:18} {cpu:6.1f} CPU-s {wall:6.1f} s {peak:5.2f} GB   "
            f"ours / it: {ratios[0]:5.2f} CPU {ratios[1]:5.2f} wall {ratios[2]:5.2f} memory",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1.1b", help="a published shape [1.1b]")
    parser.add_argument("--only", choices=CONTENDERS, help="one of: delta, merge, meta")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are printed [3]")
    parser.add_argument(
        "--dir", default=tempfile.gettempdir(), help="where the temporary directory is made"
    )
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        return globals()[flags.run[0]](*map(Path, flags.run[1:]))
    require_disk(Path(flags.dir), 9)
    for conversion in [flags.only] if flags.only else CONTENDERS:
        bench(conversion, flags.model, Path(flags.dir), flags.repeat)


if __name__ == "__main__":
    sys.exit(main())
