"""Commands that other systems' documents print for inference and evaluation: their flags.

MODEL, TOKENIZER, DATA and OUT stand for paths. AscendSpeed's documents start some of them by a
script of theirs; then these are the flags in that script.
"""

import shlex
from collections.abc import Mapping

# FastChat on Ascend
FASTCHAT_CLI = "--model-path MODEL --num-gpus 1"

# AscendSpeed, LLaMA2: 7B, 13B, 34B and 70B. The shape is that of the model.
LLAMA2_7B = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 11008 --mlp-layer-fusion --load MODEL
    --num-attention-heads 32 --max-position-embeddings 4096 --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path TOKENIZER --tokenizer-not-use-fast --fp16 --micro-batch-size 1
    --seq-length 4096 --max-new-tokens 256 --use-flash-attn --seed 42
"""
LLAMA2_13B = """
    --no-contiguous-buffers-in-local-ddp --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 1 --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824
    --load MODEL --num-attention-heads 40 --max-position-embeddings 4096
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER --tokenizer-not-use-fast
    --fp16 --micro-batch-size 1 --seq-length 4096 --max-new-tokens 256 --seed 42
    --position-embedding-type rope --normalization RMSNorm
"""
LLAMA2_34B = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --num-layers 48
    --hidden-size 8192 --ffn-hidden-size 22016 --mlp-layer-fusion --load MODEL
    --num-attention-heads 64 --position-embedding-type rope --group-query-attention
    --num-query-groups 8 --max-position-embeddings 4096 --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path TOKENIZER --tokenizer-not-use-fast --fp16 --micro-batch-size 1
    --seq-length 4096 --max-new-tokens 256 --use-flash-attn --use-fused-rmsnorm --seed 42
    --normalization RMSNorm
"""
LLAMA2_70B = LLAMA2_34B.replace("48", "80").replace("22016", "28672")

# AscendSpeed, Chinese-LLaMA-Alpaca 13B under DeepSpeed
CHINESE_ALPACA_13B = """
    --no-contiguous-buffers-in-local-ddp --num-layers 40 --hidden-size 5120
    --ffn-hidden-size 13824 --num-attention-heads 40 --max-position-embeddings 2048
    --tokenizer-type PretrainedFromHF --load MODEL --tokenizer-name-or-path TOKENIZER
    --tokenizer-not-use-fast --fp16 --micro-batch-size 1 --seq-length 256 --max-new-tokens 64
    --seed 42 --deepspeed --deepspeed_config ds_config.json --no-pipeline-parallel
"""

# Chinese-LLaMA-Alpaca-2 on Cambricon: the web page
GRADIO = "--base_model MODEL --gpus 0,1"

# AscendSpeed's evaluation: MMLU with 7B, BoolQ with 13B, and BoolQ with 34B
MMLU_7B = """
    --task-data-path DATA --task mmlu --seq-length 4096 --max-new-tokens 1
    --max-position-embeddings 4096 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --mlp-layer-fusion --load MODEL --position-embedding-type rope --normalization RMSNorm
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER --tokenizer-not-use-fast
    --fp16 --micro-batch-size 1 --seed 42
"""
BOOLQ_13B = """
    --task-data-path DATA --task boolq --seq-length 4096 --max-new-tokens 32
    --max-position-embeddings 4096 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
    --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --load MODEL
    --num-attention-heads 40 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER
    --tokenizer-not-use-fast --fp16 --micro-batch-size 1 --seed 42
"""
BOOLQ_34B = """
    --task-data-path DATA --task boolq --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 1 --num-layers 48 --hidden-size 8192 --ffn-hidden-size 22016
    --mlp-layer-fusion --load MODEL --num-attention-heads 64 --position-embedding-type rope
    --group-query-attention --num-query-groups 8 --max-position-embeddings 4096
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER --tokenizer-not-use-fast
    --fp16 --micro-batch-size 1 --seq-length 1024 --max-new-tokens 32 --use-flash-attn
    --use-fused-rmsnorm --seed 42 --normalization RMSNorm
"""

# Chinese-LLaMA-Alpaca-2's C-Eval on Cambricon; it is started beside the folder `data`
CEVAL_13B = """
    --model_path MODEL --cot False --few_shot False --with_prompt True
    --constrained_decoding True --temperature 0.2 --n_times 1 --ntrain 5 --do_save_csv False
    --do_test False --output_dir OUT
"""

# The numbers of a command that say how large the model is, for the tiny one of the tests.
TINY_SHAPE = {
    "--num-layers": "2",
    "--hidden-size": "24",
    "--ffn-hidden-size": "42",
    "--num-attention-heads": "6",
    "--num-query-groups": "3",
    "--tensor-model-parallel-size": "1",
}


def words_of(command: str, paths: Mapping[str, str]) -> list[str]:
    """The words of a command, with paths in the place of their names."""
    return [paths.get(word, word) for word in shlex.split(command)]


def for_tiny_model(words: list[str]) -> list[str]:
    """The words of a command for a model of the tests' tiny shape."""
    changed = list(words)
    for position, word in enumerate(words[:-1]):
        if word in TINY_SHAPE:
            changed[position + 1] = TINY_SHAPE[word]
    return changed
