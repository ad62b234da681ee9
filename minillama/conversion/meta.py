"""Meta's consolidated.*.pth to Hugging Face's layout, and back.

Three things differ. Names: one table below. Shards: Meta's files each hold a slice of every matrix (model parallelism), along the
axis in the table; Hugging Face's hold whole tensors. And rotary order: Meta rotates neighbours (0,1), (2,3), …, Hugging Face
rotates the first half of a head against the second, so the rows of each query and key head are reordered on the way:

    Meta   a0 b0 a1 b1 a2 b2   ──permute──▶   a0 a1 a2 b0 b1 b2   Hugging Face      (pair i is (a_i, b_i), angle i for both)

Scores are dot products within a head, so one reordering of both q and k changes nothing, provided k is cut into its own
n_kv_heads and not into n_heads. Values are not rotated, so v and o stay.

Left out on purpose: LLaMA 3.1's scale_rope rotary frequencies, whose numbers Meta's files do not hold.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint import hf_format as checkpoints
from minillama.checkpoint.hf_format import (
    EMBEDDING,
    check_names,
    has_tokenizer,
    open_files,
    open_weights,
    write_json,
)
from minillama.conversion.writer import LazyTensor, LazyTensors, Output, write_checkpoint
from minillama.errors import UserError, read_json
from minillama.hf_config import read_config
from minillama.llama_config import LlamaConfig, ffn_width
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs, specs_of, torch_writer
from minillama.tokenizer import open_tokenizer

# Hugging Face's name: Meta's name, and the axis along which Meta cuts it (None: every shard holds all of it)
OUTER = {
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
}
INNER = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
SHARDS = {
    5120: 2,
    6656: 4,
    8192: 8,
}  # Meta's own numbers of files, by model width; 1 for the smaller
PUBLISHED_FFN = (
    (256, None),
    (4096, 1.3),
    (1024, 1.3),
)  # multiple_of and ffn_dim_multiplier: LLaMA 1 and 2, 70B, LLaMA 3 8B


def meta_to_hf(source: Path, output: Output, tokenizer: str = "", max_seq_len: int = 0) -> None:
    """Convert Meta's directory `source`. tokenizer: its file (default: beside the weights, or one directory up)."""
    config, recipes = read_meta(source)
    places = (
        [Path(tokenizer)]
        if tokenizer
        else [path for path in (source, source.resolve().parent) if has_tokenizer(path)]
    )
    found = open_tokenizer(places[0]) if places else None
    if found is None:
        print(
            f"warning: no tokenizer.model in {source} or above it, so the output has none (--tokenizer FILE adds it); "
            f"the embedding's {config.vocab_size} rows give the vocabulary"
        )
    elif found.size > config.vocab_size:
        raise UserError(
            f"{found.path}: {found.size} pieces, but the embedding has {config.vocab_size} rows; "
            "name the right one with --tokenizer"
        )
    config = replace(config, max_seq_len=max_seq_len or config.max_seq_len)
    if not max_seq_len:
        print(
            f"context length {config.max_seq_len}, by transformers' rule (Meta's files do not say; --max_seq_len sets it)"
        )
    write_checkpoint(
        output,
        recipes,
        lambda path: checkpoints.write_configs(
            path, config, output.dtype or recipes[EMBEDDING].dtype, found
        ),
    )


def read_meta(directory: Path) -> tuple[LlamaConfig, LazyTensors]:
    """The config that params.json and the shapes give, and the recipes of all tensors under Hugging Face's names.
    Raises UserError for damaged or missing files, all at once, and for weights that do not fit params.json."""
    if not (paths := sorted(directory.glob("consolidated.*.pth"))):
        raise UserError(f"{directory}: holds no consolidated.*.pth")
    params = _read_params(directory / "params.json")
    table, says = _names(params["n_layers"]), f"params.json says {params['n_layers']} layers"
    names = [name for name, _ in table.values()]
    shards = open_files(dict.fromkeys(paths, names), f"belongs there: {says}", alike=True)
    if unknown := set().union(*shards).difference(names):
        raise UserError(f"{directory}: {says}, and {min(unknown)} is none of their tensors")
    if shards[0]["tok_embeddings.weight"].shape[-1] == params["dim"]:
        table[EMBEDDING] = (
            "tok_embeddings.weight",
            0,
        )  # LLaMA 3 and some exports cut the embedding by rows
    vocab_size, ffn_dim = (
        sum(shard[name].shape[0] for shard in shards)
        for name in ("output.weight", "layers.0.feed_forward.w1.weight")
    )
    config = _config(params, vocab_size, ffn_dim, directory)
    recipes = {
        hf: _whole(hf, [shard[name] for shard in shards], axis, _heads(hf, config))
        for hf, (name, axis) in table.items()
    }
    check_names(config, recipes, directory)
    return config, recipes


def _names(n_layers: int) -> dict[str, tuple[str, int | None]]:
    """Hugging Face's name -> (Meta's name, axis), in the model's order."""
    embed, norm, head = (
        (f"{hf}.weight", (f"{meta}.weight", axis)) for hf, (meta, axis) in OUTER.items()
    )
    layers = (
        (f"model.layers.{i}.{hf}.weight", (f"layers.{i}.{meta}.weight", axis))
        for i in range(n_layers)
        for hf, (meta, axis) in INNER.items()
    )
    return dict([embed, *layers, norm, head])


def _heads(name: str, config: LlamaConfig) -> int:
    """The heads in whose rows this tensor's rotary order is changed: 0 for all but queries and keys."""
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2], 0)


def _read_params(path: Path) -> dict:
    params = read_json(path, "Meta's directory has one beside the weights")
    params = params.get("model", params)
    kinds = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
    if wrong := [
        key
        for key, kind in kinds.items()
        if type(params.get(key)) is not kind or not 0 < params[key] < 2**20
    ]:
        raise UserError(
            f"{path}: {wrong[0]} = {params.get(wrong[0])!r} is missing or makes no sense; is this Meta's own file?"
        )
    if params.get("use_scaled_rope"):
        raise UserError(
            f"{path}: use_scaled_rope: LLaMA 3.1 and later stretch the rotary frequencies by numbers that Meta's files "
            "do not hold; take the Hugging Face release"
        )
    return params


def _whole(name: str, parts: list[TensorRef], axis: int | None, heads: int) -> LazyTensor:
    """The parts laid end to end along `axis`, read one at a time; q and k (by heads) in Hugging Face's rotary order."""
    kinds = {
        (part.dtype, *(size for i, size in enumerate(part.shape) if i != axis)) for part in parts
    }
    if len(kinds) > 1:
        raise UserError(
            f"{name}: the shards do not fit together: "
            f"{', '.join(f'{part.shape} of {part.dtype} in {part.file.name}' for part in parts)}"
        )
    shape = tuple(
        sum(part.shape[i] for part in parts) if i == axis else size
        for i, size in enumerate(parts[0].shape)
    )

    def read() -> Tensor:
        if axis is None or len(parts) == 1:
            tensor = parts[0].read()
            if not all(torch.equal(tensor, part.read()) for part in parts[1:]):
                raise UserError(
                    f"{name}: differs between the shards that should all hold it; files of different models"
                )
        else:
            tensor = torch.empty(shape, dtype=parts[0].dtype)
            for part, place in zip(
                parts, tensor.split([part.shape[axis] for part in parts], axis), strict=True
            ):
                place.copy_(part.read())
        return to_halves(tensor, heads) if heads else tensor

    return LazyTensor(parts[0].dtype, shape, read)


def _config(params: dict, vocab_size: int, ffn_dim: int, where: Path) -> LlamaConfig:
    dim, n_heads, theta = (
        params["dim"],
        params["n_heads"],
        float(params.get("rope_theta") or 10000.0),
    )
    n_kv_heads = params.get("n_kv_heads") or n_heads
    if params.get("vocab_size") not in (-1, None, vocab_size):
        raise UserError(
            f"{where}: params.json says vocab_size = {params['vocab_size']}, the embedding has {vocab_size} rows; "
            "a file is missing"
        )
    is_llama3 = vocab_size >= 128_000
    is_llama1 = params["norm_eps"] < 5e-6 or (
        dim == 8192 and n_kv_heads == n_heads
    )  # 65B: 1e-5, but all heads
    context = 8192 if is_llama3 else 16384 if theta > 10000 else 2048 if is_llama1 else 4096
    return LlamaConfig(
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=context,
        norm_eps=params["norm_eps"],
        rope_theta=theta,
        bos_id=128_000 if is_llama3 else 1,
        eos_ids=(128_001,) if is_llama3 else (2,),
    )


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Meta's rotary order to Hugging Face's, for the rows of q_proj (H heads) or k_proj (K heads): (n·D, C) -> (n·D, C)."""
    rows, C = weight.shape
    return (
        weight.view(heads, rows // heads // 2, 2, C).transpose(1, 2).reshape(rows, C)
    )  # (n, D/2, 2, C) -> (n, 2, D/2, C)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    rows, C = weight.shape
    return (
        weight.view(heads, 2, rows // heads // 2, C).transpose(1, 2).reshape(rows, C)
    )  # (n, 2, D/2, C) -> (n, D/2, 2, C)


def hf_to_meta(source: Path, output: Output, shards: int = 0) -> None:
    """Convert the Hugging Face directory `source` to Meta's layout. shards: files (0: as Meta does for this width)."""
    config, entries = read_config(source), open_weights(source)
    check_names(config, entries, source)
    write_meta(output, entries, config, source, shards)


def write_meta(
    output: Output, recipes: LazyTensors, config: LlamaConfig, companions: Path, shards: int = 0
) -> None:
    """Write `recipes`, whole tensors under Hugging Face's names, as `shards` consolidated files and params.json.
    companions: the directory whose tokenizer is copied. Raises UserError for what Meta's layout cannot say."""
    shards = shards or SHARDS.get(config.dim, 1)
    _refuse_what_meta_cannot_say(config, shards)
    tied = {"lm_head.weight": recipes[EMBEDDING]} if config.tie_embeddings else {}

    def finish(directory: Path) -> None:
        write_json(directory / "params.json", _params(config))
        checkpoints.copy_tokenizer(companions, directory)

    ordered = {name: (tied | recipes)[name] for name in _names(config.n_layers)}
    write_checkpoint(output, ordered, finish, partial(_write_shards, config, shards))


def _refuse_what_meta_cannot_say(config: LlamaConfig, shards: int) -> None:
    if config.attention_bias or config.mlp_bias:
        raise UserError("Meta's layout has no biases; this model has some")
    if config.rope_scaling is not None:
        raise UserError(f"params.json has no place for rope scaling {config.rope_scaling.kind!r}")
    if config.head_dim * config.n_heads != config.dim:
        raise UserError(
            f"head_dim = {config.head_dim}: Meta's layout means dim / n_heads = {config.dim // config.n_heads}"
        )
    for what in ("n_heads", "n_kv_heads", "ffn_dim", "dim"):
        if getattr(config, what) % shards:
            raise UserError(
                f"{what} = {getattr(config, what)} cannot be cut into {shards} shards; choose a divisor with --shards"
            )


def _write_shards(
    config: LlamaConfig,
    shards: int,
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    plan: TensorSpecs,
) -> None:
    """Write every tensor once into all files, each its slice. A vocabulary that does not divide leaves its rest to the last."""
    table = _names(config.n_layers)

    def cut(tensor: Tensor, axis: int | None) -> Sequence[Tensor]:
        ends = (
            [tensor.shape[axis] // shards * shard for shard in range(1, shards)]
            if axis is not None
            else []
        )
        return tensor.tensor_split(ends, axis) if ends else [tensor] * shards

    empty = {
        table[name][0]: cut(torch.empty(shape, dtype=dtype, device="meta"), table[name][1])
        for name, (dtype, shape) in plan.items()
    }
    plans = [
        specs_of({name: parts[shard] for name, parts in empty.items()}) for shard in range(shards)
    ]
    with ExitStack() as files:
        appends = [
            files.enter_context(torch_writer(directory / f"consolidated.{shard:02d}.pth", part))
            for shard, part in enumerate(plans)
        ]
        for name, tensor in tensors:
            meta_name, axis = table[name]
            heads = _heads(name, config)
            for append, part in zip(
                appends, cut(to_pairs(tensor, heads) if heads else tensor, axis), strict=True
            ):
                append(meta_name, part)


def _params(config: LlamaConfig) -> dict[str, float]:
    multiple_of, multiplier = _ffn_params(config.dim, config.ffn_dim)
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,  # -1: as the tokenizer has
        "n_kv_heads": config.n_kv_heads if config.n_kv_heads != config.n_heads else None,
        "rope_theta": config.rope_theta if config.rope_theta != 10000.0 else None,
    }
    return {key: value for key, value in params.items() if value is not None}


def _ffn_params(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier for which `ffn_width` gives `ffn_dim`: a published pair where one does."""
    fitting = (pair for pair in PUBLISHED_FFN if ffn_width(dim, *pair) == ffn_dim)
    return next(
        fitting, (1, (ffn_dim + 0.5) / int(8 * dim / 3))
    )  # half a row more, so that the rule's truncation lands on ffn_dim
