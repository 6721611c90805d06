"""What ranks do for the tests of quantized bases: quantize, score and train with DeepSpeed."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import parity_case as case
import parity_ranks as parity
import torch
from configs import zero_config
from load_ranks import digest, heard
from peak_memory import peak_bytes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from taso_ds.config import parse_run_config
from taso_ds.data.collate import collate
from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.distributed.ds_config import read_ds_config
from taso_ds.distributed.zero import full_copy, full_numel, local_shard
from taso_ds.job import Job
from taso_ds.methods.lora import attach_lora, lora_parameters
from taso_ds.models.fingerprint import fingerprint
from taso_ds.models.quantized_linear import QuantizedLinear
from taso_ds.models.spec import read_spec
from taso_ds.models.stored_weights import stored_weights
from taso_ds.objectives.batches import dealt_batches
from taso_ds.objectives.loss import lm_loss_sum
from taso_ds.runs.open_job import load_base
from taso_ds.scoring.score import score_regions
from taso_ds.scoring.scoring_pass import ScoringSettings
from taso_ds.training.arguments import batch_sizes
from taso_ds.training.optim import make_group

STAGES = {"4": (0, 1, 2, 3), "8": (0, 2, 3)}
STORED_STAGES = (0, 3)
SPLIT = case.Split(4, 1)
ROWS_PER_BATCH = 5


def load(folder: str, stage: int, *flags: str, bf16: bool = False, **zero_options: Any) -> Any:
    """The base and its targets, as a run loads them, and the DeepSpeed configuration."""
    config = parse_run_config(
        ["--model_name_or_path", folder, "--task", "sst2", "--bf16" if bf16 else "--no_bf16", *flags]
    )
    raw = read_ds_config(f"zero{stage}.json")
    raw["zero_optimization"] |= zero_options
    zero = zero_config(
        raw, micro=SPLIT.micro, accumulation=SPLIT.accumulation, bf16=bf16, max_grad_norm=case.MAX_GRAD_NORM
    )
    spec = read_spec(config.model, folder)
    targets = spec.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts)
    sizes = batch_sizes(config.training, comm.world_size())
    job = Job(config, zero, sizes, spec, targets, region_file=None, data=None)
    return *load_base(job), zero


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def digests(model: nn.Module) -> dict[str, list[str]]:
    """Bits of every quantized weight and of its statistics."""
    found = {}
    for name, module in quantized(model).items():
        packed, state = full_copy(module.get_parameter("weight")), module.statistics
        assert state is not None
        tensors = [state] if isinstance(state, Tensor) else [state.absmax, state.offset, state.state2.absmax]
        found[name] = [digest(packed.flatten().view(torch.uint8)), *map(digest, tensors)]
    return found


def plain_digests(model: nn.Module) -> dict[str, str]:
    """Bits of every parameter that is not quantized."""
    packed = {f"{name}.weight" for name in quantized(model)}
    return {name: digest(full_copy(value)) for name, value in model.named_parameters() if name not in packed}


def held(folder: str, stage: int, *flags: str) -> dict[str, Any]:
    """Bits of all parameters of a base, and what its loading said."""
    with heard() as said:
        model = load(folder, stage, *flags)[0].model
    return {"packed": digests(model), "plain": plain_digests(model), "said": said}


def train_lora(folder: str, stage: int, *flags: str) -> list[float]:
    base, targets, zero = load(folder, stage, *flags)
    torch.manual_seed(case.SEED)
    attach_lora(base.model, list(targets), rank=2, scaling=1.0, transposed=False)
    trained = list(lora_parameters(base.model).values())
    groups = [make_group(case.TRAINING, "adapter", trained)]
    losses: list[float] = parity.train(base, groups, zero, SPLIT)["loss"]
    return losses


def score(folder: str, stage: int, *flags: str) -> dict[str, Any]:
    base, targets, zero = load(folder, stage, *flags)
    batches = [batch for _, batch in dealt_batches(case.CALIBRATION, batch_size=ROWS_PER_BATCH, collate=parity.COLLATE)]
    found: dict[str, Any] = {}
    with stored_weights(base, targets) as stored, engines.scoring_engine(base.model, zero) as scored:
        assert stored is not None
        found["fingerprint"] = fingerprint(targets, stored)
        for label, original in (("loaded", None), ("original", stored.read)):
            settings = ScoringSettings("importance", "signed_mean", case.LADDER, case.SEED, original_weight=original)
            scores = score_regions(scored, targets, batches, loss_sum=lm_loss_sum, settings=settings)
            found[label] = parity.as_json(scores)
    return found


def train(folder: str, stage: int, regions: parity.Regions, *flags: str) -> dict[str, Any]:
    base, _, zero = load(folder, stage, *flags)
    found = {"digests": digests(base.model)}
    return found | parity.train(base, parity.taso_groups(base, regions), zero, SPLIT)


def kept_for_backward(folder: str, *flags: str) -> list[int]:
    """Return how many of the targets' weights a forward gathers, and how many of them it keeps for backward."""
    # Live parameters are released at once, as they are in a model too large to keep any.
    names = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    options: dict[str, Any] = dict.fromkeys(names, 0)
    base, targets, zero = load(folder, 3, *flags, **options)
    batch = collate(case.CALIBRATION[:2], pad_id=0)
    alive: list[StorageWeakRef] = []
    with engines.scoring_engine(base.model, zero) as scored, ExitStack() as hooks:
        for target in targets.values():
            hook = target.matrix.register_forward_pre_hook(
                lambda own, _: alive.append(StorageWeakRef(own.weight.data.untyped_storage()))
            )
            hooks.callback(hook.remove)
        base.model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_(True))
        total, _ = lm_loss_sum(scored, batch)
        kept = [len(alive), sum(not storage.expired() for storage in alive)]
        total.backward()
    return kept


def memory_of_load(folder: str) -> dict[str, int]:
    """Return the peak of an NF4 load at stage 3 on the worst rank, and what it is made of, in bytes of tensors."""
    from bitsandbytes.functional import QuantState

    loaded: list[nn.Module] = []
    load(folder, 3, "--load_in_4bit", bf16=True)  # imports, and tables that stay
    peak = peak_bytes(lambda: loaded.append(load(folder, 3, "--load_in_4bit", bf16=True)[0].model))
    shard = statistics = whole = 0
    for parameter in loaded[0].parameters():
        shard += local_shard(parameter)[0].nbytes
        whole += full_numel(parameter) * parameter.dtype.itemsize
    for module in quantized(loaded[0]).values():
        state = module.statistics
        assert isinstance(state, QuantState)
        statistics += sum(tensor.nbytes for tensor in (state.absmax, state.offset, state.code))
        statistics += state.state2.absmax.nbytes + state.state2.code.nbytes
    return {"peak": max(comm.gather_objects(peak)), "shard": shard, "statistics": statistics, "whole": whole}


def run_all(root: str) -> dict[str, Any]:
    base, others = f"{root}/base", sorted(Path(root, "others").iterdir())
    found: dict[str, Any] = {}
    for bits in STAGES:
        flag = f"--load_in_{bits}bit"
        here = found[bits] = {"score": {}, "train": {}, "stored": {}}
        for stage in STAGES[bits]:
            here["score"][stage] = score(base, stage, flag)
            regions = parity.regions_of(here["score"][0]["loaded"])
            here["train"][stage] = train(base, stage, regions, flag)
            if stage in STORED_STAGES:
                here["stored"][stage] = train(f"{root}/stored_{bits}", stage, regions)
        here["checkpointed"] = train(base, 3, regions, flag, "--gradient_checkpointing")["loss"]
        here["bf16"] = [digests(load(base, stage, flag, bf16=True)[0].model) for stage in (0, 3)]
        here["lora"] = [train_lora(base, stage, flag) for stage in (0, 3)]
        here["others"] = {other.name: [held(str(other), stage, flag) for stage in (0, 3)] for other in others}
        here["kept"] = kept_for_backward(base, flag)
    found["stored_mixtral"] = [held(f"{root}/stored_mixtral", stage) for stage in (0, 3)]
    found["memory"] = memory_of_load(f"{root}/deep")
    found["16"] = {"kept": kept_for_backward(base)}
    return found
