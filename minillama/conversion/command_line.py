"""The command line of convert.py: a parser for each subcommand. The docstrings are the manuals.

This module imports no torch, so that --help is shown at once.
"""

from collections.abc import Callable
from pathlib import Path

from minillama.cli import BOOLEAN, Parser
from minillama.conversion.shared_flags import (
    add_count,
    add_megatron_input,
    add_megatron_output,
    add_output,
    add_overwrite,
    add_path,
    add_weights_output,
    new_parser,
    parse_share,
)
from minillama.train_config import DEVICES

ORIGINAL = "the original LLaMA, a Hugging Face directory"
DATA_FORMATS = (
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "moss",
    "ascend",
    "completion",
    "text",
    "lines",
)


def meta() -> Parser:
    """Meta's layout (consolidated.*.pth, params.json) to Hugging Face's, or back.

    Reads any number of shards, all heads alike or grouped, either way of cutting the embedding.
    Executes nothing that a file holds. The command of transformers' convert_llama_weights_to_hf.py
    works too, after convert.py, with Meta's root and --model_size.

    Examples
        python convert.py meta --input llama-2-13b/ --output llama-2-13b-hf
        python convert.py meta --reverse --input llama-2-13b-hf --output llama-2-13b-meta --shards 2
    """
    parser = new_parser(meta)
    add_weights_output(parser)
    add_path(parser, "--input", "Meta's directory, or with --reverse Hugging Face's")
    parser.add_argument("--reverse", action="store_true", help="Hugging Face to Meta")
    shards = "with --reverse: files [as Meta: 1; 13B 2, 33B 4, 65B and 70B 8]"
    add_count(parser, "--shards", shards)
    tokenizer = "tokenizer.model [in the input directory or its parent]"
    parser.add_argument("--tokenizer", default="", metavar="FILE", help=tokenizer)
    length = "context length [LLaMA-1 2048, LLaMA-2 4096, CodeLlama 16384]"
    add_count(parser, "--max_seq_len", length)
    return parser


def megatron() -> Parser:
    """Hugging Face's layout to that of Megatron-LM, AscendSpeed and ModelLink, for TP × PP ranks.

    A vocabulary is padded to a multiple of vocab_multiple × tensor_parallel, as AscendSpeed does.
    config.json and the tokenizer are put beside the weights. AscendSpeed's command
    convert_weights_from_huggingface.py works too, after convert.py.

    Example
        python convert.py megatron --input llama-2-13b-hf --output llama-2-13b-tp8-pp2 \\
            --tensor_parallel 8 --pipeline_parallel 2 --merge_mlp
    """
    parser = new_parser(megatron)
    add_megatron_output(parser)
    add_path(parser, "--input", "a Hugging Face directory")
    add = parser.add_argument
    add("--bias", action="store_true", help="the attention of the model has biases")
    add_count(parser, "--added_tokens", "rows for tokens that will be added [0]")
    return parser


def from_megatron() -> Parser:
    """Megatron's layout, a release or a training checkpoint, to Hugging Face's or PEFT's.

    The grid is read from the names of the files. A checkpoint of a LoRA run becomes a PEFT
    directory. Executes nothing that a file holds.

    Examples
        python convert.py from-megatron --input llama-2-13b-tp8-pp2 --output llama-2-13b-hf
        python convert.py from-megatron --input ckpt/iter_0002000 --output tuned-hf \\
            --config llama-2-13b-hf
    """
    parser = new_parser(from_megatron)
    add_weights_output(parser)
    add_megatron_input(parser)
    alpha = "alpha of a LoRA run [as the run's settings say]"
    parser.add_argument("--lora_alpha", type=float, default=0.0, metavar="float", help=alpha)
    return parser


def reshard() -> Parser:
    """Megatron's files for another grid of TP × PP ranks: the weights, whole, and cut anew.

    AscendSpeed's command convert_weights_when_tp_pp_change.py works too, after convert.py.

    Example
        python convert.py reshard --input llama-2-70b-tp8-pp8 --output llama-2-70b-tp8 \\
            --tensor_parallel 8
    """
    parser = new_parser(reshard)
    add_megatron_output(parser)
    add_megatron_input(parser)
    for kind in ("tensor", "pipeline"):
        source = f"{kind} parallelism of the input; an error if its folders say another one"
        add_count(parser, f"--src_{kind}_parallel", source)
    return parser


def apply_delta() -> Parser:
    """target = base + delta, as FastChat computes it, bit for bit.

    In fp16, as FastChat does: add --dtype float16 if the base has another dtype. Both sides are
    shown first; what does not belong together is an error. A delta with more rows than the base
    (Vicuna v0) is added to a base extended by zeros.

    Example
        python convert.py apply-delta --base llama-13b-hf --delta vicuna-13b-delta-v1.1 \\
            --output vicuna-13b
    """
    parser = new_parser(apply_delta)
    add_weights_output(parser)
    add_path(parser, "--base", ORIGINAL)
    add_path(parser, "--delta", "the published difference, likewise")
    return parser


def make_delta() -> Parser:
    """delta = target - base: what may be published if the base may not.

    Example
        python convert.py make-delta --base llama-13b-hf --target my-13b --output my-13b-delta
    """
    parser = new_parser(make_delta)
    add_weights_output(parser)
    add_path(parser, "--base", ORIGINAL)
    add_path(parser, "--target", "the fine-tuned model, likewise")
    return parser


def merge_lora() -> Parser:
    """W + (alpha / r)·B·A for every adapted W, in fp32, rounded once to the output's dtype.

    Takes PEFT adapters of any age (adapter_model.safetensors or .bin, or a raw training state
    beside adapter_config.json), several in order, with grown vocabularies. Every key of an adapter
    is used exactly once, or it is an error. Prints, per layer, how much the weights changed, and by
    how much merged and unmerged layers differ on random hidden states. Chinese-LLaMA-Alpaca's
    merge_llama_with_chinese_lora(_low_mem).py work too, after convert.py; they write pth unless
    --output_type says huggingface.

    Example
        python convert.py merge-lora --base llama-7b-hf --lora chinese-llama-plus \\
            --lora chinese-alpaca-plus --output merged
    """
    parser = new_parser(merge_lora)
    add_weights_output(parser)
    add_path(parser, "--base", "the model the first adapter was trained on")
    add = parser.add_argument
    lora = "adapter; repeat for several"
    add("--lora", type=Path, action="append", required=True, metavar="DIR", help=lora)
    layout = "layout of the output: hf, meta [hf]"
    add("--format", type=_parse_layout, choices=("hf", "meta"), default="hf", help=layout)
    add_count(parser, "--shards", "with --format meta: files [as Meta does]")
    add("--device", default="auto", choices=DEVICES, help="where B·A is computed [auto]")
    add("--seed", type=int, default=0, help="of the random hidden states of the check [0]")
    return parser


def tokenizer() -> Parser:
    """LLaMA's tokenizer.model with the tokens of another SentencePiece model appended.

    The vocabulary of Chinese-LLaMA was made like this.

    Example
        python convert.py tokenizer --base llama/tokenizer.model --add chinese_sp.model \\
            --output merged.model
    """
    parser = new_parser(tokenizer)
    add_output(parser, "the merged tokenizer.model")
    add_path(parser, "--base", "the tokenizer.model that keeps its ids")
    add_path(parser, "--add", "the model whose new tokens are appended")
    return parser


def data() -> Parser:
    """Raw files to a tokenized data set, PREFIX.bin .mask .idx .json, for train.py --data PREFIX.

    An input is a file, a folder, or a name in the dataset_info.json of --dataset_dir. Formats:
    alpaca, sharegpt and moss (conversations, rendered by --template), ascend, text (a document a
    file or record), lines (a document a line). After an interruption, the same command continues
    where it stopped. AscendSpeed's preprocess_data.py works too, after convert.py.

    Example
        python convert.py data --input alpaca.json --tokenizer llama/tokenizer.model \\
            --output my_data --template vicuna_v1.1
    """
    parser = new_parser(data)
    add_overwrite(parser)
    add = parser.add_argument
    prefix = "what the data set's files are called before the dot"
    add("--output", type=Path, default=None, metavar="PATH", help=prefix)
    files = "raw files or folders: .json, .jsonl, .txt, .parquet"
    add("--input", nargs="+", required=True, metavar="FILE", help=files)
    tokenizer = "tokenizer.model or tokenizer.json, or a directory that holds one"
    add("--tokenizer", required=True, metavar="FILE", help=tokenizer)
    add("--format", choices=DATA_FORMATS, default="auto", help="of the input [auto]")
    template = (
        "prompt template of conversations [the tokenizer's own, else sharegpt and messages: "
        "vicuna_v1.1, completion: raw, others: alpaca]"
    )
    add("--template", default="", metavar="NAME|FILE.jinja", help=template)
    add_count(parser, "--workers", "processes that tokenize [1]", default=1)
    append_eod = "end documents with the end-of-text token [true]"
    add("--append_eod", **BOOLEAN, default=None, help=append_eod)
    skip = "leave malformed records out, count and list them, instead of stopping"
    add("--skip_bad_records", action="store_true", help=skip)
    dropped = "largest share of conversations without an answer; more stop the command [0.1]"
    add("--max_dropped", type=parse_share, default=0.1, metavar="float", help=dropped)
    folder = "folder of the dataset_info.json that names data sets"
    add("--dataset_dir", default="", metavar="DIR", help=folder)
    return parser


def sha256() -> Parser:
    """Write DIR/manifest.json with the sha256 of every file and tensor, or compare with one.

    Its content fingerprint covers names, dtypes, shapes and bytes of the tensors. It is the same
    for any file format, number of shards or layout.

    Examples
        python convert.py sha256 vicuna-7b                                 # vicuna-7b/manifest.json
        python convert.py sha256 vicuna-7b --check downloaded/manifest.json
        python convert.py sha256 vicuna-7b --check vicuna-7b-elsewhere
        python convert.py sha256 llama-7b --check SHA256.md

    With a directory, the first tensor that differs is named, and by how much. With a list that a
    publisher made (Markdown tables, or what sha256sum writes), the files are compared, and the
    model is named that they are.
    """
    parser = new_parser(sha256)
    directory = "a checkpoint: Hugging Face's layout, Meta's, or an adapter"
    parser.add_argument("directory", type=Path, metavar="DIR", help=directory)
    against = "compare with a manifest, a checkpoint or a published list; writes nothing"
    parser.add_argument("--check", type=Path, metavar="FILE|DIR", help=against)
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "meta": meta,
    "megatron": megatron,
    "from-megatron": from_megatron,
    "reshard": reshard,
    "apply-delta": apply_delta,
    "make-delta": make_delta,
    "merge-lora": merge_lora,
    "tokenizer": tokenizer,
    "data": data,
    "sha256": sha256,
}


def _parse_layout(name: str) -> str:
    """Translate the names of Chinese-LLaMA-Alpaca's script to ours."""
    return {"huggingface": "hf", "pth": "meta"}.get(name, name)
