"""What helps against the largest term of a peak that does not fit, and what the search has not tried already."""

from taso_ds.planning.numbers.plan import Misfit

_SHORTER = (
    "a shorter --max_seq_length or fewer rows at a time (--per_device_train_batch_size, --calibration_batch_size)"
)
_LARGER = "larger devices"
_ON_DEVICE = {
    "whole model": "16 bits; transformers merges weights of this model, and quantized it is whole on every rank first",
    "weights": "more devices to spread them over (--gpus_per_node, --nodes), or --nvme_path DISK",
    "gathered": "a DeepSpeed JSON of your own with a smaller stage3_max_live_parameters and stage3_max_reuse_distance",
    "activations": _SHORTER,
    "loss": _SHORTER,
    "accumulators": "--calibration_offload cpu or --calibration_passes N",
    "gradients": f"{_LARGER}: it is two copies of the largest matrix",
    "trained": "--method taso or a smaller --rank, or more devices",
    "buckets": "a DeepSpeed JSON of your own with a smaller reduce_bucket_size",
}
_ON_HOST = {
    "weights": "--ds_config zero3.json on more ranks or nodes, or --nvme_path DISK",
    "checkpoint": "--ds_config zero3.json, where every rank reads its own part only",
    "accumulators": "--calibration_passes N, or more nodes",
    "proof": "--no_verify_export, and a proof of the export later",
    "partition": "a DeepSpeed JSON of your own with a larger buffer_size, or more devices",
    "nvme buffers": "a DeepSpeed JSON of your own with other buffer_size and buffer_count",
    "state": "more nodes",
    "activations": f"{_SHORTER}, or --gradient_checkpointing",
    "loss": _SHORTER,
}


def advice(misfit: Misfit) -> str:
    """Return which term it is, and the remedy for this one."""
    largest = misfit.largest
    if misfit.on_host:
        return host_advice(largest)
    return f"most of it {largest}: {_ON_DEVICE.get(largest, _LARGER)}"


def host_advice(largest: str) -> str:
    """Return the remedy where a node's memory is too small for this term."""
    remedy = _ON_HOST.get(largest, "hosts with more memory")
    return remedy if largest == "partition" else f"most of it {largest}: {remedy}"
