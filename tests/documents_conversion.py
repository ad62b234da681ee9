"""The documents' commands that convert models and data. Words after convert.py."""

from tests.documents import Command

FROM_HF = "tools/ckpt_convert/llama/convert_weights_from_huggingface.py"
RESHARD = "./tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py"
PARQUET = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
HUB = "nothing is downloaded here: run `hf download lmsys/vicuna-7b-delta-v1.1"

DELTAS = (
    Command(
        "000",
        "delta 7B",
        "fastchat.model.apply_delta --base-model-path /path/to/llama-7b "
        "--target-model-path /output/path/to/vicuna-7b --delta-path lmsys/vicuna-7b-delta-v1.1",
        reason=HUB,
        change="the delta is downloaded before",
    ),
    Command(
        "000",
        "delta 13B",
        "fastchat.model.apply_delta --base-model-path /path/to/llama-13b "
        "--target-model-path /output/path/to/vicuna-13b --delta-path lmsys/vicuna-13b-delta-v1.1",
        reason=HUB.replace("7b", "13b"),
        change="the delta is downloaded before",
    ),
)
META = Command(
    "001",
    "Meta's weights",
    "convert_llama_weights_to_hf.py --input_dir path_to_original_llama_root_dir --model_size 7B "
    "--output_dir path_to_original_llama_hf_dir",
)
MERGES = (
    Command(
        "001",
        "merge one",
        "merge_llama_with_chinese_lora.py --base_model path_to_original_llama_hf_dir "
        "--lora_model path_to_chinese_llama_or_alpaca_lora --output_type huggingface "
        "--output_dir path_to_merged_hf_dir",
    ),
    Command(
        "001",
        "merge two",
        "merge_llama_with_chinese_lora.py --base_model path_to_original_llama_hf_dir "
        "--lora_model path_to_chinese_llama_plus_lora,path_to_chinese_alpaca_plus_lora "
        "--output_type huggingface --output_dir path_to_merged_hf_dir",
    ),
    Command(
        "001",
        "merge low_mem",
        "merge_llama_with_chinese_lora_low_mem.py --base_model path_to_original_llama_hf_dir "
        "--lora_model path_to_chinese_llama_or_alpaca_lora --output_type huggingface "
        "--output_dir path_to_merged_hf_dir --verbose",
    ),
    Command(
        "001",
        "merge offload",
        "scripts/merge_llama_with_chinese_lora.py --base_model path_to_original_llama_hf_dir "
        "--lora_model path_to_chinese_llama_or_alpaca_lora --output_type huggingface "
        "--output_dir path_to_merged_hf_dir --offload_dir cache",
    ),
    Command(
        "003",
        "merge 13B",
        "merge_llama2_with_chinese_lora_low_mem.py --base_model path_to_original_llama_hf_dir "
        "--lora_model path_to_chinese_llama_or_alpaca_lora --output_type huggingface "
        "--output_dir path_to_merged_hf_dir",
    ),
)
TO_MEGATRON = (
    Command(
        "001",
        "Megatron's launcher",
        f"{FROM_HF} --input-model-dir path_to_merged_hf_dir "
        "--output-model-dir path_to_merged_ascendspeed_dir --tensor-model-parallel-size 4 "
        "--pipeline-model-parallel-size 2 --type 7B",
    ),
    Command(
        "001",
        "DeepSpeed's launcher",
        f"{FROM_HF} --input-model-dir path_to_merged_hf_dir "
        "--output-model-dir path_to_merged_ascendspeed_dir --tensor-model-parallel-size 1 "
        "--pipeline-model-parallel-size 1 --type 7B --deepspeed",
    ),
    Command(
        "002",
        "7B",
        f"{FROM_HF} --input-model-dir llama-2-7b-hf --output-model-dir ./llama2-7b-tp8pp1 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --type 7B --merge-mlp",
    ),
    Command(
        "002",
        "13B",
        f"{FROM_HF} --input-model-dir ./llama-2-13b-hf --output-model-dir ./llama-2-13b_tp8_pp1 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --type 13B",
    ),
    Command(
        "002",
        "70B",
        f"{FROM_HF} --input-model-dir ./llama2-70b-hf/ --output-model-dir ./load_ckpt "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 "
        "--make-vocab-size-divisible-by 8 --merge-mlp --type llama2-70B --num_heads 64 "
        "--num_kv_heads 8 --hidden_size 8192 --num_layers 80",
    ),
    Command(
        "002",
        "34B",
        f"{FROM_HF} --input-model-dir ./codellama-34b-hf --output-model-dir ./load_ckpt "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 "
        "--make-vocab-size-divisible-by 8 --merge-mlp --type llama2-34B --num_heads 64 "
        "--num_kv_heads 8 --hidden_size 8192 --num_layers 48",
    ),
)
RESHARDS = (
    Command(
        "002",
        "34B to one stage",
        f"{RESHARD} --input-model-dir ./load_ckpt/release --output-model-dir ./ptd_48lt8p1/ "
        "--orig-vocab-size 32000 --make-vocab-size-divisible-by 8 "
        "--src-tensor-model-parallel-size 8 --src-pipeline-model-parallel-size 3 "
        "--tgt-tensor-model-parallel-size 8 --tgt-pipeline-model-parallel-size 1 --merge-mlp "
        "--type 34B --num_heads 64 --num_kv_heads 8 --hidden_size 8192 --num_layers 48",
        reason="pipeline parallelism is 2, the command says 3; leave --src_pipeline_parallel out",
        change="the files have two stages: without --src-pipeline-model-parallel-size 3",
        changed="--src-pipeline-model-parallel-size 3",
    ),
    Command(
        "002",
        "70B to one stage",
        f"{RESHARD} --input-model-dir ./load_ckpt/release --output-model-dir ./ptd_80lt8p1/ "
        "--orig-vocab-size 32000 --make-vocab-size-divisible-by 8 "
        "--src-tensor-model-parallel-size 8 --src-pipeline-model-parallel-size 8 "
        "--tgt-tensor-model-parallel-size 8 --tgt-pipeline-model-parallel-size 1 --merge-mlp "
        "--type 70B --num_heads 64 --num_kv_heads 8 --hidden_size 8192 --num_layers 80",
    ),
)
INSTRUCTIONS = (
    Command(
        "001",
        "instructions",
        "tools/preprocess_data.py --input alpaca_data.json --output-prefix DATA_PATH "
        "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER_PATH "
        "--tokenizer-not-use-fast --handler-name GeneralInstructionHandler",
    ),
    Command(
        "002",
        "7B instructions",
        f"./tools/preprocess_data.py --input ./dataset_llama2/{PARQUET} "
        "--tokenizer-name-or-path ./llama-2-7b-hf --output-prefix ./finetune_dataset/alpaca "
        "--workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF "
        "--handler-name GeneralInstructionHandler --append-eod",
    ),
    Command(
        "002",
        "13B instructions",
        f"tools/preprocess_data.py --input WORKSPACE/alpaca/{PARQUET} "
        "--output-prefix WORKSPACE/alpaca_preprocessed/alpaca --tokenizer-type PretrainedFromHF "
        "--tokenizer-name-or-path WORKSPACE/llama-13b-hf --tokenizer-not-use-fast "
        "--handler-name GeneralInstructionHandler",
    ),
    Command(
        "002",
        "MOSS",
        "tools/preprocess_data.py --input ./dataset_llama2/moss-003-sft-no-tools.jsonl "
        "--output-prefix ./dataset_llama2/moss --tokenizer-type PretrainedFromHF "
        "--tokenizer-name-or-path ./llama2-70b-hf --tokenizer-not-use-fast "
        "--handler-name MOSSInstructionHandler",
    ),
)
TEXTS = (
    Command(
        "002",
        "7B text",
        f"./tools/preprocess_data.py --input ./dataset_llama2/{PARQUET} "
        "--tokenizer-name-or-path ./llama-2-7b-hf --output-prefix ./dataset_llama2/alpaca "
        "--workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF",
    ),
    Command(
        "002",
        "70B text",
        f"./tools/preprocess_data.py --input ./dataset_llama2/{PARQUET} "
        "--tokenizer-name-or-path ./llama-2-70b-hf --output-prefix ./dataset_llama2/alpaca "
        "--workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF",
    ),
)
ALL = (*DELTAS, META, *MERGES, *TO_MEGATRON, *RESHARDS, *INSTRUCTIONS, *TEXTS)
