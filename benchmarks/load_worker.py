"""What ``benchmarks/load.py`` launches on every rank: one load at ZeRO-3, timed from config to ready, imports apart."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import resident
import torch
import transformers.models.llama.modeling_llama

from taso_ds.distributed import comm, engine, process_group, zero
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config
from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load import load_base_model
from taso_ds.models.spec import read_spec


class ReadClock:
    """Seconds spent in file reads of the sharded loader, and the bytes they moved."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        plain = SafetensorsCheckpoint._read

        def timed(checkpoint: SafetensorsCheckpoint, stored: Any, first: int, out: Any) -> None:
            started = time.perf_counter()
            plain(checkpoint, stored, first, out)
            self.seconds += time.perf_counter() - started
            self.bytes += out.numel() * out.element_size()

        SafetensorsCheckpoint._read = timed  # type: ignore[method-assign, assignment]


def sequential_gb_per_s(folder: Path, *, kept: bool) -> float:
    """Read this rank's share of the files from end to end: into fresh memory that is kept, or through one buffer."""
    files = sorted(folder.glob("*.safetensors"))[comm.rank() :: comm.world_size()]
    sizes = [file.stat().st_size for file in files]
    comm.barrier()
    started, first = time.perf_counter(), 0
    memory = memoryview(torch.empty(sum(sizes) if kept else 1 << 24, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(memory[first:]):
                first += count if kept else 0
    return sum(sizes) / (time.perf_counter() - started) / 1e9


def load(how: str, folder: Path, *, load_in_4bit: bool) -> dict[str, float]:
    zero_config = resolve_ds_config(
        read_ds_config("zero3.json"),
        micro_batch_size=1,
        grad_accum_steps=1,
        world_size=comm.world_size(),
        bf16=True,
        max_grad_norm=1.0,
    )
    clock = ReadClock()
    measured = how == "sharded"
    one_buffer = sequential_gb_per_s(folder, kept=False) if measured else 0.0
    sequential = sequential_gb_per_s(folder, kept=True) if measured else 0.0
    if load_in_4bit:
        import bitsandbytes.functional  # noqa: F401  # imports apart
    comm.barrier()
    before, started = resident.forget_peak(), time.perf_counter()
    if how == "sharded":
        arguments = ModelArguments(model_name_or_path=str(folder), load_in_4bit=load_in_4bit)
        model = load_base_model(read_spec(arguments, str(folder)), seed=0, zero=zero_config).model
    elif load_in_4bit:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.bfloat16, quantization_config=nf4()
        )
    else:
        with engine.zero3_loading(zero_config):
            model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    comm.barrier()
    seconds = time.perf_counter() - started
    whole = how == "transformers" and load_in_4bit
    held = [value.detach() if whole else zero.local_shard(value)[0] for value in model.parameters()]
    shards = sum(value.numel() * value.dtype.itemsize for value in held) / 1e9
    return {
        "seconds": seconds,
        "peak_gb": resident.resident_gb("VmHWM") - before,
        "shard_gb": shards,
        "read_gb_per_s": clock.bytes / clock.seconds / 1e9 if clock.seconds else 0.0,
        "sequential_gb_per_s": sequential,
        "one_buffer_gb_per_s": one_buffer,
    }


def nf4() -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", choices=("sharded", "transformers"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    process_group.init()
    engine.quiet_deepspeed()
    comm.barrier()
    found = comm.gather_objects(load(arguments.how, arguments.model, load_in_4bit=arguments.load_in_4bit))
    if comm.is_main():
        arguments.result.write_text(json.dumps(found))
    process_group.leave()


if __name__ == "__main__":
    main()
