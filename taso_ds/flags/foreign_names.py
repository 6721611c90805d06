"""Names that people bring along from other trainers, and what does the same here.

Hugging Face's Trainer, PEFT, axolotl, LLaMA-Factory and DeepSpeed name one thing in many ways. The answer to an unknown
flag with such a name is our name, which helps more than a name that happens to be spelt alike.
"""

from taso_ds.flags.verbs import as_started

# Our name, and theirs.
_SAME: dict[str, tuple[str, ...]] = {
    "model_name_or_path": ("model", "model_name", "model_path", "base_model", "pretrained_model_name_or_path"),
    "tokenizer_name": ("tokenizer", "tokenizer_path", "tokenizer_name_or_path"),
    "train_file": ("train_data", "train_data_file", "train_path"),
    "eval_fraction": ("validation_split", "val_size", "val_set_size", "test_size", "eval_split"),
    "eval_file": ("validation_file", "eval_data", "val_file", "valid_file", "test_file"),
    "data_dir": ("dataset_dir", "data_path"),
    "max_seq_length": ("max_length", "cutoff_len", "sequence_len", "max_seq_len", "seq_length", "block_size"),
    "use_chat_template": ("chat_template", "template", "apply_chat_template"),
    "method": ("finetuning_type", "adapter", "peft_type", "use_lora", "use_peft"),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "target_modules": ("lora_target", "lora_target_modules"),
    "learning_rate": ("lr", "base_lr", "max_lr"),
    "lr_scheduler_type": ("lr_scheduler", "lr_scheduler_name", "scheduler"),
    "per_device_train_batch_size": (
        *("batch_size", "per_device_batch_size", "train_batch_size", "micro_batch_size"),
        *("per_gpu_train_batch_size", "train_micro_batch_size_per_gpu"),
    ),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation", "grad_accum_steps", "accumulate_grad_batches"),
    "num_train_epochs": ("epochs", "num_epochs", "n_epochs", "max_epochs", "epoch"),
    "max_steps": ("max_train_steps", "num_steps", "total_steps", "max_iters"),
    "max_grad_norm": ("gradient_clipping", "clip_grad_norm", "grad_clip"),
    "gradient_checkpointing": ("gradient_checkpoint", "activation_checkpointing"),
    "load_in_4bit": ("qlora", "use_4bit", "int4"),
    "load_in_8bit": ("use_8bit", "int8"),
    "attn_implementation": ("flash_attn", "flash_attention", "use_flash_attention_2", "attn_impl"),
    "save_total_limit": ("keep_last", "num_checkpoints"),
    "ds_config": ("deepspeed", "deepspeed_config", "zero_stage", "offload", "cpu_offload"),
    "output_dir": ("out_dir", "save_dir", "output_path", "run_name"),
    "resume": ("resume_from_checkpoint", "resume_from", "resume_training"),
    "expected_world_size": ("world_size",),
    "seed": ("data_seed", "random_seed", "seed_everything"),
    "model_revision": ("revision",),
    "debug": ("verbose", "log_level", "logging_level"),
}
# What to do, and their names for what is done in another way here, or not at all.
_INSTEAD: dict[str, tuple[str, ...]] = {
    "pass --task NAME, or --task completion with --train_file and --eval_file": ("dataset", "dataset_name", "datasets"),
    "pass --warmup_ratio, a share of the steps": ("warmup_steps", "num_warmup_steps", "warmup"),
    "pass --load_in_4bit or --load_in_8bit": ("quantization_bit", "bits", "quantization", "quantization_method"),
    "pass --bf16 (the default), or --no_bf16 for fp32": (
        "dtype",
        "torch_dtype",
        "mixed_precision",
        "precision",
        "fp32",
    ),
    "pass --save_steps or --save_minutes": ("save_strategy",),
    "pass --eval_steps": ("eval_strategy", "evaluation_strategy", "do_eval"),
    "the optimizer is torch's AdamW, with --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon": (
        *("optim", "optimizer", "betas", "adam_betas"),
    ),
    "metrics.jsonl in the run folder holds every step; for W&B or TensorBoard write DeepSpeed's section wandb or"
    " tensorboard into the JSON of --ds_config": (
        "report_to",
        "wandb",
        "tensorboard",
        "wandb_project",
        "logging_dir",
        "logging_strategy",
        "plot_loss",
    ),
    "launch/train.py always trains and evaluates; drop it": ("do_train", "stage", "do_predict", "training_args"),
    "adapters have no dropout here; drop it": ("lora_dropout",),
    "all linears inside the blocks are adapted unless --target_modules names some; drop it": ("lora_target_linear",),
    "only what the method trains is saved; drop it": ("modules_to_save", "lora_modules_to_save", "additional_target"),
    "there are no variants of LoRA here; drop it": ("use_dora", "use_rslora", "lora_bias"),
    "each row is a sequence of its own; drop it": ("packing", "sample_packing", "neat_packing", "group_by_length"),
    "ZeRO does the sharding: pass --ds_config zero3.json": (
        "fsdp",
        "fsdp_config",
        "device_map",
        "tensor_parallel_size",
    ),
    "rows are tokenized once, before training; drop it": (
        *("num_workers", "dataloader_num_workers", "preprocessing_num_workers", "overwrite_cache"),
    ),
    "upload the adapter folder of the run when it is done": ("push_to_hub", "hub_model_id", "hub_token"),
    "set HF_TOKEN, or log in with `hf auth login`": ("token", "hf_token", "use_auth_token"),
    "set HF_HOME, or TASO_CACHE for converted checkpoints": ("cache_dir", "model_cache_dir"),
    "the last step is what is exported; drop it": (
        *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
    ),
    "it belongs to the launcher, before the script's name: deepspeed --num_gpus 8 launch/train.py": (
        *("num_gpus", "nproc_per_node", "num_processes", "nnodes", "num_nodes", "gpus", "include", "hostfile"),
    ),
}


def ours(name: str) -> str | None:
    """Return our name for what another trainer calls ``name``."""
    return next((our for our, theirs in _SAME.items() if name in theirs), None)


def in_our_words(name: str) -> str:
    """Return what to do about a name of another trainer's, as the end of a sentence; empty for any other name."""
    plain = name.replace("-", "_").lower()
    our = ours(plain)
    advice = (
        f"here it is {our}" if our else next((advice for advice, theirs in _INSTEAD.items() if plain in theirs), "")
    )
    return f": {as_started(advice)}" if advice else ""
