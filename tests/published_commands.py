"""Command lines and DeepSpeed files as other systems publish them.."""

# BASE, OUT and DEEPSPEED stand for paths.

# DeepSpeed's files of FastChat on Ascend (7B) and of Chinese-LLaMA-Alpaca
COMMON = """
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"
"""
ZERO = """
    "allgather_partitions": true, "allgather_bucket_size": 1e8, "overlap_comm": true,
    "reduce_scatter": true, "reduce_bucket_size": 1e8, "contiguous_gradients": true
"""
ASCEND = f"""{{
    "fp16": {{"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
             "initial_scale_power": 8, "hysteresis": 2, "min_loss_scale": 1}},
    "optimizer": {{"type": "Adam", "params": {{"lr": "auto", "betas": "auto", "eps": "auto",
                                             "weight_decay": "auto", "torch_adam": true}}}},
    "zero_optimization": {{"stage": 1, {ZERO}}}, {COMMON}
}}"""
CHINESE = f"""{{
    "fp16": {{"enabled": "auto", "loss_scale": 0, "loss_scale_window": 100,
             "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1e-10}},
    "zero_optimization": {{"stage": 2, {ZERO}}}, {COMMON},
    "steps_per_print": 2000, "wall_clock_breakdown": false
}}"""

LLAMA_FACTORY = """
    --stage sft --do_train --model_name_or_path BASE --dataset alpaca_gpt4_zh --template default
    --finetuning_type lora --lora_target q_proj,v_proj --output_dir OUT --overwrite_cache
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine
    --logging_steps 1 --save_steps 10 --learning_rate 5e-5 --num_train_epochs 4.0 --plot_loss
    --fp16 --overwrite_output_dir --disable_gradient_checkpointing
"""
FASTCHAT = """
    --model_name_or_path BASE --data_path alpaca-data-conversation.json --fp16 True --output_dir
    OUT --num_train_epochs 1 --per_device_train_batch_size 8 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 32 --evaluation_strategy no --save_strategy steps --save_steps
    200 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 False --model_max_length 1024
    --gradient_checkpointing True --lazy_preprocess True --deepspeed DEEPSPEED
"""
VICUNA = """
    --model_name_or_path BASE --data_path dummy.json --bf16 True --output_dir OUT
    --num_train_epochs 3 --per_device_train_batch_size 2 --per_device_eval_batch_size 2
    --gradient_accumulation_steps 16 --evaluation_strategy no --save_strategy steps --save_steps
    1200 --save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --lazy_preprocess True
"""
CHINESE_SFT = """
    --deepspeed DEEPSPEED --model_name_or_path BASE --tokenizer_name_or_path BASE --dataset_dir
    data --validation_split_percentage 0.001 --per_device_train_batch_size 1
    --per_device_eval_batch_size 1 --do_train --do_eval --seed 7 --fp16 --num_train_epochs 1
    --lr_scheduler_type cosine --learning_rate 1e-4 --warmup_ratio 0.03 --weight_decay 0
    --logging_strategy steps --logging_steps 10 --save_strategy steps --save_total_limit 3
    --evaluation_strategy steps --eval_steps 100 --save_steps 200 --gradient_accumulation_steps 8
    --preprocessing_num_workers 8 --max_seq_length 1024 --output_dir OUT --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True --lora_rank 64 --lora_alpha 128 --trainable
    q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj --lora_dropout 0.05 --modules_to_save
    embed_tokens,lm_head --torch_dtype float16 --load_in_kbits 16 --gradient_checkpointing
    --ddp_find_unused_parameters False
"""
ASCENDSPEED = """
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --load BASE --data-path
    alpaca.json --save OUT --tokenizer-type PretrainedFromHF --tokenizer-name-or-path BASE
    --tokenizer-not-use-fast --micro-batch-size 4 --seq-length 512 --train-iters 2000 --lr 1e-6
    --min-lr 1e-8 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --clip-grad
    1.0 --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1 --save-interval 1000 --eval-interval
    1000 --seed 1234 --bf16 --lora-target-modules
    query_key_value,dense,gate_proj,up_proj,down_proj --lora-r 16 --lora-alpha 32
    --lora-adapter-name default
"""
