"""The documents' commands that train. Words after train.py.

Some documents print the names of shell scripts, and lists of the flags in them: such a command here
has these flags, with the values that the scripts are known to have.
"""

from tests.documents import Command

# 000: 7B_finetune.sh and 13B_finetune.sh, with the parameters that the document lists
FASTCHAT = """
    --model_name_or_path {model} --data_path playground/data/alpaca-data-conversation.json
    --fp16 True --output_dir {output} --num_train_epochs 1 --per_device_train_batch_size 8
    --per_device_eval_batch_size 1 --gradient_accumulation_steps {accumulation}
    --evaluation_strategy no --save_strategy steps --save_steps {save} --save_total_limit 2
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
    --logging_steps 1 --tf32 False --model_max_length 1024 --gradient_checkpointing True
    --lazy_preprocess True --deepspeed {deepspeed}
"""
FASTCHATS = (
    Command(
        "000",
        "7B",
        FASTCHAT.format(
            model="./7B-vicuna/",
            output="./ckpt_8p",
            accumulation=32,
            save=200,
            deepspeed="deepspeed_config_7B.json",
        ),
    ),
    Command(
        "000",
        "13B",
        FASTCHAT.format(
            model="./13B-vicuna",
            output="./ckpt_16p",
            accumulation=16,
            save=500,
            deepspeed="deepspeed_config_13B.json",
        ),
    ),
)

# 001 and 002: what the scripts of AscendSpeed have in common
ASCENDSPEED = """
    --num-layers {layers} --hidden-size {width} --ffn-hidden-size {mlp}
    --num-attention-heads {heads} --micro-batch-size {micro} --global-batch-size {batch}
    --seq-length {length} --max-position-embeddings 4096 --train-iters {steps}
    --save ./ckpt --load {model} --data-path {data} --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path {model} --tokenizer-not-use-fast --data-impl mmap
    --distributed-backend nccl --lr-decay-style cosine --weight-decay 1e-1 --clip-grad 1.0
    --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1 --save-interval 10000
    --position-embedding-type rope --normalization RMSNorm --swiglu --use-flash-attn
    --use-fused-rmsnorm --use-fused-rotary-pos-emb --mlp-layer-fusion
    --no-masked-softmax-fusion --attention-softmax-in-fp32 --attention-dropout 0.0
    --hidden-dropout 0.0 --init-method-std 0.01 --initial-loss-scale 65536
    --untie-embeddings-and-output-weights --disable-bias-linear --optimizer adam
    --make-vocab-size-divisible-by 1 --use-cpu-initialization --no-load-optim --no-load-rng
    --DDP-impl local --seed 1234
"""
SIZE_7B = {"layers": 32, "width": 4096, "mlp": 11008, "heads": 32}
SIZE_13B = {"layers": 40, "width": 5120, "mlp": 13824, "heads": 40}
SIZE_70B = {"layers": 80, "width": 8192, "mlp": 28672, "heads": 64}
PRETRAIN_7B = (
    ASCENDSPEED.format(
        **SIZE_7B,
        micro=4,
        batch=16,
        length=4096,
        steps=5000,
        model="./llama-2-7b-hf/",
        data="./dataset_llama2/alpaca_text_document",
    )
    + "--lr 1.25e-6 --min-lr 1.25e-7 --lr-warmup-fraction 0.01 --bf16 --sequence-parallel "
    + "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1"
)
LORA = (
    " --lora-target-modules query_key_value dense gate_proj up_proj down_proj "
    "--lora-r 16 --lora-alpha 32"
)
TUNE_7B = PRETRAIN_7B.replace("./dataset_llama2/alpaca_text_document", "./finetune_dataset/alpaca")
CHINESE_13B = ASCENDSPEED.format(
    **SIZE_13B,
    micro=4,
    batch=256,
    length=256,
    steps=3000,
    model="path_to_merged_hf_dir",
    data="DATA_PATH",
)
ASCENDSPEEDS = (
    Command(
        "001",
        "Megatron's launcher",
        CHINESE_13B + "--is-instruction-dataset --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 200 "
        "--fp16 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --split 949,50,1 "
        "--eval-interval 1000 --eval-iters 10",
    ),
    Command(
        "001",
        "DeepSpeed's launcher",
        CHINESE_13B + "--is-instruction-dataset --lr 1e-6 --min-lr 0.0 --lr-warmup-iters 200 "
        "--fp16 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
        "--checkpoint-activations --split 949,50,1 --eval-interval 1000 --eval-iters 10 "
        "--deepspeed --deepspeed_config deepspeed_config_13B.json --zero-stage 2",
    ),
    Command("002", "7B", PRETRAIN_7B + " --split 100,0,0 --eval-interval 1000 --eval-iters 0"),
    Command("002", "7B in full", TUNE_7B + " --is-instruction-dataset"),
    Command("002", "7B LoRA", TUNE_7B + " --is-instruction-dataset" + LORA),
    Command(
        "002",
        "7B LoRA on a fused MLP",
        TUNE_7B
        + " --is-instruction-dataset --lora-r 16 --lora-alpha 32 "
        + "--lora-target-modules query_key_value dense proj dense_4h_to_h",
    ),
    Command(
        "002",
        "7B LoRA and a new vocabulary",
        TUNE_7B + LORA + " --lora-modules-to-save word_embeddings lm_head.lm_head",
    ),
    Command(
        "002",
        "70B",
        ASCENDSPEED.format(
            **SIZE_70B,
            micro=2,
            batch=1024,
            length=4096,
            steps=5000,
            model="./llama2-70b-hf/",
            data="./dataset_llama2/alpaca_text_document",
        )
        + "--lr 1.5e-4 --min-lr 1e-5 --lr-warmup-iters 2000 --bf16 --sequence-parallel "
        "--group-query-attention --num-query-groups 8 --use-distributed-optimizer "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8",
    ),
)

# 003: run_finetuning_13b.sh and run_pretraining_13b.sh of Chinese-LLaMA-Alpaca-2
CHINESE_2 = """
    --deepspeed ds_zero2_no_offload.json --model_name_or_path chinese-llama-2-13b
    --tokenizer_name_or_path chinese-llama-2-13b --dataset_dir data
    --validation_split_percentage 0.001 --per_device_train_batch_size {micro} --do_train --seed 7
    --fp16 --num_train_epochs 10 --lr_scheduler_type cosine --learning_rate {rate}
    --warmup_ratio {warmup} --weight_decay {decay} --logging_strategy steps --logging_steps 1
    --save_strategy epoch --save_total_limit 1 --gradient_accumulation_steps {accumulation}
    --preprocessing_num_workers 8 --output_dir {output} --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True --lora_rank 64 --lora_alpha 128
    --trainable q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj --lora_dropout 0.05
    --modules_to_save embed_tokens,lm_head --torch_dtype float16 --load_in_kbits 16
    --gradient_checkpointing --ddp_find_unused_parameters False
"""
CHINESE_2S = (
    Command(
        "003",
        "fine-tuning",
        CHINESE_2.format(
            micro=16, rate=1e-4, warmup=0.03, decay=0, accumulation=1, output="train_output"
        )
        + "--max_seq_length 1024",
    ),
    Command(
        "003",
        "pre-training",
        CHINESE_2.format(
            micro=1, rate=2e-4, warmup=0.05, decay=0.01, accumulation=8, output="train_output"
        )
        + "--block_size 1024 --data_cache_dir cache",
        change="a line of a .txt is an example there, here the whole file",
        changed="--data_format lines",
    ),
    Command(
        "003",
        "with ZeRO-3",
        "--model_name_or_path chinese-llama-2-13b --dataset_dir data --zero3_enabled True",
        reason="zero_stage = 3: weights are not sharded here",
        change="ZeRO-2 in the place of ZeRO-3",
        changed="--zero_stage 2",
    ),
)

# 004: src/train_bash.py, as it is printed
LLAMA_FACTORY = """
    --stage sft --do_train --model_name_or_path {model} --dataset alpaca_gpt4_zh
    --template default --finetuning_type {kind} --output_dir {output} --overwrite_cache
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine
    --logging_steps 1 --save_steps {save} --learning_rate 5e-5 --num_train_epochs {epochs}
    --plot_loss --fp16 --overwrite_output_dir --disable_gradient_checkpointing
"""
LORA_004 = {
    "kind": "lora --lora_target q_proj,v_proj",
    "output": "path_to_sft_checkpoint",
    "save": 10,
    "epochs": "4.0",
}
FULL_004 = {
    "kind": "full",
    "output": "path_to_sft_full_checkpoint",
    "save": 100,
    "epochs": "3.0",
}
MODELS_004 = {
    "7B LoRA": ("/workspace/torch2onnx/llama-2-7b-chat-hf", LORA_004, 2),
    "13B LoRA": ("/workspace/llama2-13b-torch", LORA_004, 4),
    "7B in full": ("/workspace/aa/torch2onnx/llama-2-7b-chat-hf", FULL_004, 11),
    "13B in full": ("/workspace/llama2-13b/llama2-13b-torch/", FULL_004, 21),
}
LLAMA_FACTORIES = tuple(
    Command("004", name, LLAMA_FACTORY.format(model=model, **values), chips=chips)
    for name, (model, values, chips) in MODELS_004.items()
)
ALL = (*FASTCHATS, *ASCENDSPEEDS, *CHINESE_2S, *LLAMA_FACTORIES)
