"""What a DeepSpeed JSON may contain, and what becomes of each key.

DeepSpeed ignores a top-level key it does not know: a misspelt ``gradient_clipping`` trains unclipped and says nothing.
These tables let us refuse it, without importing DeepSpeed, so that a dry run needs none.
``tests/distributed/test_ds_config.py`` compares them with the installed DeepSpeed.
"""

from dataclasses import dataclass

from taso_ds.distributed.ds_config_values import (
    BOOL,
    BUCKET,
    DEPTH,
    FACTOR,
    INT,
    NAME,
    PATTERNS,
    POSITIVE,
    SECTION,
    SHARE,
    TEXT,
    TEXTS,
    Kind,
    Table,
    one_of,
)

_MONITOR_FILES: Table = {"enabled": BOOL, "output_path": TEXT, "job_name": NAME}

# Top-level keys that DeepSpeed acts on by itself and that leave the numbers of a run alone.
PASSED_ON: Table = {
    "aio": {
        "block_size": POSITIVE,
        "queue_depth": POSITIVE,
        "intra_op_parallelism": POSITIVE,
        "single_submit": BOOL,
        "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "comet": {
        "enabled": BOOL,
        "samples_log_interval": POSITIVE,
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key"), TEXT),
        "online": BOOL,
        "mode": one_of("get", "create", "get_or_create"),
    },
    "comms_logger": {"enabled": BOOL, "prof_all": BOOL, "prof_ops": TEXTS, "verbose": BOOL, "debug": BOOL},
    "csv_monitor": _MONITOR_FILES,
    "disable_python_gc": BOOL,
    "dump_state": BOOL,
    "flops_profiler": {
        "enabled": BOOL,
        "recompute_fwd_factor": FACTOR,
        "profile_step": POSITIVE,
        "module_depth": DEPTH,
        "top_modules": POSITIVE,
        "detailed": BOOL,
        "output_file": NAME,
    },
    "log_level": one_of("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": BOOL,
    "steps_per_print": POSITIVE,
    "tensorboard": _MONITOR_FILES,
    "timers": {"throughput": {"enabled": BOOL, "synchronized": BOOL}},
    "vocabulary_size": INT,
    "wall_clock_breakdown": BOOL,
    "wandb": {"enabled": BOOL, "group": TEXT, "team": TEXT, "project": TEXT},
    "zero_allow_untested_optimizer": BOOL,
}

# Top-level keys that resolve_ds_config computes or checks against the run.
RESOLVED = frozenset(
    {
        "bf16",
        "bfloat16",
        "communication_data_type",
        "data_types",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)


@dataclass(frozen=True)
class Unsupported:
    """A top-level key that may be present only when it changes nothing.

    Attributes:
        switch: the entry that turns the section on; None for a scalar, or for a section that is on by being there.
        off: the values of the switch, or of the scalar, that change nothing.
        remedy: what to do instead, as the end of a sentence.
    """

    switch: str | None = None
    off: tuple[object, ...] = (False,)
    remedy: str = "remove it"


_SECTION = Unsupported(switch="enabled")
_FLAG = Unsupported()

# Keys that would change what is computed, or that would be accepted and do nothing here.
UNSUPPORTED: dict[str, Unsupported] = {
    "activation_checkpointing": Unsupported(remedy="use --gradient_checkpointing"),
    "amp": Unsupported("enabled", remedy="use --bf16"),
    "autotuning": _SECTION,
    "checkpoint": Unsupported(remedy="checkpoints are not DeepSpeed's: remove it"),
    "compile": Unsupported("deepcompile"),
    "compression_training": _FLAG,
    "curriculum_learning": _SECTION,
    "data_efficiency": _SECTION,
    "data_parallel_size": Unsupported(off=(1,), remedy="every rank is data-parallel"),
    "dataloader_drop_last": Unsupported(remedy="the batches are not DeepSpeed's"),
    "datastates_ckpt": _FLAG,
    "disable_allgather": _FLAG,
    "eigenvalue": _SECTION,
    "elasticity": Unsupported("enabled", remedy="use --global_batch_size"),
    "expert_parallel": _SECTION,
    "gradient_allreduce_op": Unsupported(off=("mean",), remedy="gradients are averaged over the ranks"),
    "gradient_predivide_factor": Unsupported(off=(1,), remedy="gradients are averaged over the ranks"),
    "graph_harvesting": _FLAG,
    "hybrid_engine": _SECTION,
    "managed_gradient_accumulation": Unsupported(off=(True,)),
    "nebula": _SECTION,
    "pipeline": _FLAG,
    "prescale_gradients": Unsupported(remedy="gradients are averaged over the ranks"),
    "progressive_layer_drop": _SECTION,
    "quantize_training": _SECTION,
    "seq_parallel_communication_data_type": Unsupported(off=("fp32",), remedy="there is no sequence parallelism"),
    "sequence_parallel_size": Unsupported(off=(1,), remedy="every rank is data-parallel"),
    "sparse_attention": _FLAG,
    "sparse_gradients": _FLAG,
    "tensor_parallel": Unsupported("autotp_size", off=(0, 1), remedy="use a higher ZeRO stage"),
    "torch_autocast": Unsupported("enabled", remedy="use --bf16"),
    "use_data_before_expert_parallelism": _FLAG,
    "weight_quantization": Unsupported(remedy="a frozen base is quantized by its own loader"),
}

TOP_LEVEL = dict.fromkeys(sorted({*PASSED_ON, *RESOLVED, *UNSUPPORTED}))

BF16: Table = {
    "enabled": BOOL,
    "immediate_grad_update": BOOL,
    "check_grad_overflow": BOOL,
    "bf16_master_weights_and_grads": BOOL,
    "bf16_optimizer_states": BOOL,
}
DATA_TYPES: Table = {
    "grad_accum_dtype": TEXT,  # which of them, and of the next, depends on the run
    "param_dtype": TEXT,
    "buffer_dtype": one_of("fp32", "bf16", "fp16"),
    "keep_in_fp32_modules": PATTERNS,
}

_DEVICE = one_of("none", "cpu", "nvme")
OFFLOAD_OPTIMIZER: Table = {
    "device": _DEVICE,
    "nvme_path": TEXT,
    "buffer_count": POSITIVE,
    "pin_memory": BOOL,
    "pipeline_read": BOOL,
    "pipeline_write": BOOL,
    "fast_init": BOOL,
    "ratio": SHARE,
    "super_offload": BOOL,
    "cpuadam_cores_perc": SHARE,
}
OFFLOAD_PARAM: Table = {
    "device": _DEVICE,
    "nvme_path": TEXT,
    "buffer_count": POSITIVE,
    "buffer_size": POSITIVE,
    "max_in_cpu": INT,
    "pin_memory": BOOL,
}

# DeepSpeed spells these with the prefix in a JSON and without it in Python, and accepts both.
_STAGE3_ALIASED = {
    "prefetch_bucket_size": INT,
    "param_persistence_threshold": INT,
    "model_persistence_threshold": INT,
    "max_live_parameters": INT,
    "max_reuse_distance": INT,
    "gather_16bit_weights_on_model_save": BOOL,
    "module_granularity_threshold": INT,
    "use_all_reduce_for_fetch_params": BOOL,
    "allgather_sequential": BOOL,
}
# Every key of "zero_optimization" and what its value must be.
ZERO: dict[str, Kind] = {
    "stage": INT,
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": BUCKET,
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": BUCKET,
    "overlap_comm": BOOL,
    "compute_grad_norm": BOOL,
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "offload_param": SECTION,
    "offload_optimizer": SECTION,
    "zenflow": SECTION,
    "sub_group_size": INT,
    "cpu_offload_param": BOOL,
    "cpu_offload_use_pin_memory": BOOL,
    "cpu_offload": BOOL,
    "stage3_gather_fp16_weights_on_model_save": BOOL,
    "ignore_unused_parameters": BOOL,
    "legacy_stage1": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": INT,
    "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL,
    "zero_quantized_gradients": BOOL,
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": SECTION,
    **_STAGE3_ALIASED,
    **{f"stage3_{name}": kind for name, kind in _STAGE3_ALIASED.items()},
}

# Keys of "zero_optimization" that stop something the run relies on: the value they must keep, and why.
ZERO_FIXED: dict[str, tuple[object, str]] = {
    "compute_grad_norm": (True, "clipping and the log need the gradient norm"),
    "zenflow": (None, "it replaces the optimizer step"),
    **dict.fromkeys(
        ("module_granularity_threshold", "stage3_module_granularity_threshold"),
        (0, "which modules are gathered as one is the run's to decide; beyond a size DeepSpeed takes the whole model"),
    ),
    "legacy_stage1": (False, "DeepSpeed has it no more"),
    "zero_quantized_nontrainable_weights": (False, "the base is loaded as it is to stay; pass --load_in_4bit"),
    "cpu_offload": (False, 'write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": (False, 'write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": (False, 'write "pin_memory" inside "offload_optimizer"'),
}

# What "auto" means inside "zero_optimization". DeepSpeed itself would drop the word and use its own default; these are
# that default except where a run with one small adapter and a frozen base wants another.
ZERO_AUTO: dict[str, bool | int] = {
    # Reserved on the device in full, in fp32, before the first step: DeepSpeed's 5e8 would be 2 GB for gradients of a
    # few million numbers. 2e7 holds a rank-1 adapter of a 70B model; a larger parameter is reduced by itself.
    "reduce_bucket_size": 20_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    # Persistent parameters are gathered again after every optimizer step, one collective per tensor, the frozen norms
    # too. At 0 they travel inside the prefetch buckets of the matrices next to them.
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    # What is saved is the adapter, which is gathered by itself.
    "stage3_gather_16bit_weights_on_model_save": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "allgather_partitions": True,
    "round_robin_gradients": False,
}
# "overlap_comm" is the one automatic value that depends on the stage: only stage 3 has base weights to fetch ahead.
