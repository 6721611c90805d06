"""Read a DeepSpeed JSON, check every key, and fill in what the run decides.

The user's JSON says how to shard; the run's own flags say how much to train on, how fast and in which precision. Where
both speak they must agree. The result holds no ``"auto"``: DeepSpeed drops the word and uses its own default, so
``"bf16": {"enabled": "auto"}`` would mean *off*.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from taso_ds.distributed import ds_config_keys as keys
from taso_ds.distributed.ds_config_values import (
    AUTO,
    Section,
    check_known,
    checked,
    checked_section,
    number_of,
    section_of,
)
from taso_ds.distributed.placement import resolve_offload, resolve_secondary_shards
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError, nearest, reason
from taso_ds.files.json_text import parse_json

log = logging.getLogger(__name__)

# The loop logs; DeepSpeed's own progress line would only repeat it.
NEVER = 1_000_000_000
_SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
# The run takes torch's AdamW, so an optimizer section that says the same decides nothing.
ADAMW_BY_TORCH = (("torch_adam", True), ("adam_w_mode", True))


def shipped_ds_configs() -> list[Path]:
    """Return the JSON files that come with the package, sorted: of the checkout, or of the wheel."""
    return sorted(Path(str(resources.files("taso_ds.ds_configs"))).glob("*.json"))


def read_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON by path, or by bare name: first in the current folder, then among the shipped ones.

    Raises:
        UserError: no such file, not JSON, a key given twice, or not an object.
    """
    path = _find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"ds_config: cannot read {path}: {reason(error)}") from error
    raw = parse_json(text, f"ds_config: {path}")
    if not isinstance(raw, dict):
        raise UserError(f"ds_config: {path} holds {_json_kind(raw)}, not an object in braces")
    return raw


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.name: file for file in shipped_ds_configs()}
    if path.name == name and name in shipped:
        return shipped[name]
    what = "a folder" if path.is_dir() else "no such file"
    raise UserError(f"ds_config: {name!r}: {what}; shipped are {', '.join(shipped)}{nearest(path.name, list(shipped))}")


def resolve_ds_config(
    raw: Section,
    *,
    micro_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    bf16: bool,
    max_grad_norm: float,
    ranks_per_node: int | None = None,
    nvme_path: str | None = None,
    source: str = "ds_config",
) -> ZeroConfig:
    """Return the configuration for ``deepspeed.initialize``, complete and without ``"auto"``.

    Args:
        raw: the JSON's content; not changed.
        micro_batch_size: rows of one forward on one rank.
        grad_accum_steps: forwards of one optimizer step on one rank.
        world_size: number of ranks, all data-parallel.
        bf16: train in bfloat16 with fp32 master weights, else in fp32.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
        ranks_per_node: None when all ranks stand on one node.
        nvme_path: where parameters are offloaded when the JSON leaves that to the run.
        source: what to call the JSON in errors.

    Raises:
        UserError: an unknown key, a value that disagrees with the run, or a feature that is not supported.
    """
    for count in (micro_batch_size, grad_accum_steps, world_size):
        assert isinstance(count, int), f"not an integer: {count!r}"
        assert count > 0, f"not positive: {count}"
    assert max_grad_norm >= 0.0, f"negative max_grad_norm: {max_grad_norm}"

    check_known(raw, keys.TOP_LEVEL, "", source)
    _check_unsupported(raw, source)
    _check_optimizer(raw, source)
    _check_scheduler(raw, source)
    passed_on = {key: value for key, value in raw.items() if key in keys.PASSED_ON}
    resolved: Section = copy.deepcopy(checked(passed_on, keys.PASSED_ON, "", source))
    resolved |= _batch(raw, micro_batch_size, grad_accum_steps, world_size, source)
    resolved["gradient_clipping"] = _clipping(raw, max_grad_norm, source)
    resolved["bf16"] = _precision(raw, bf16, source)
    zero = _zero(raw, source)
    resolve_offload(zero, nvme_path, source)
    resolve_secondary_shards(zero, world_size, ranks_per_node or world_size, source)
    resolved["zero_optimization"] = zero
    resolved |= _gradient_types(raw, number_of(zero, "stage"), bf16, grad_accum_steps, source)
    resolved |= _optimizer_place(raw, zero, source)
    if resolved.get("steps_per_print", AUTO) == AUTO:
        resolved["steps_per_print"] = NEVER
    # DeepSpeed's own timer waits for the device twice per micro-batch, for a line that steps_per_print keeps silent.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    _refuse_auto(resolved, "", source)
    return ZeroConfig(resolved)


def without_secrets(value: object) -> object:
    """Return a DeepSpeed dict, or a value of it, as others may see it: without the ``api_key`` of a monitor, say."""
    if isinstance(value, list):
        return [without_secrets(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: "(not recorded)" if isinstance(entry, str) and _SECRET.search(key) else without_secrets(entry)
        for key, entry in value.items()
    }


def _section(parent: Section, key: str, source: str, path: str = "") -> Section:
    """Return the section ``key``; empty when absent or null."""
    value = parent.get(key)
    return {} if value is None else checked_section(value, path + key, source)


def _check_unsupported(raw: Section, source: str) -> None:
    """Refuse what we do not support.

    A section that is present but off is left out of what DeepSpeed gets, which rejects some of them even so.
    """
    for key, entry in keys.UNSUPPORTED.items():
        if key in raw and not _is_off(raw[key], entry):
            raise UserError(f"{source}: {key} is not supported; {entry.remedy}")


def _is_off(value: object, entry: keys.Unsupported) -> bool:
    if value is None or value == AUTO:
        return True
    if isinstance(value, dict):
        switches = value.values() if entry.switch is None else [value.get(entry.switch, entry.off[0])]
        return all(switch in (None, AUTO, *entry.off) for switch in switches)
    return value in entry.off


def _check_optimizer(raw: Section, source: str) -> None:
    """Allow an optimizer section that decides nothing: Adam or AdamW whose numbers are all ``"auto"``."""
    section = _section(raw, "optimizer", source)
    params = _section(section, "params", source, "optimizer.")
    decided = {key: value for key, value in params.items() if (key, value) not in ADAMW_BY_TORCH and value != AUTO}
    if not section:
        return
    if decided or str(section.get("type", AUTO)).lower() not in ("adam", "adamw", AUTO):
        raise UserError(
            f"{source}: the optimizer section sets {json.dumps(decided or section.get('type'))}; the run decides these:"
            " remove the section and pass --learning_rate, --weight_decay, --adam_beta1, --adam_beta2, --adam_epsilon"
        )
    log.info('%s: dropped the optimizer section, which leaves every number to the run ("auto")', source)


def _check_scheduler(raw: Section, source: str) -> None:
    """Allow a scheduler section that decides nothing.

    DeepSpeed's WarmupLR and WarmupDecayLR set every parameter group to one ``warmup_max_lr``, which would overwrite
    TASO's compensated learning rates without a word. A section without params takes DeepSpeed's default of 0.001.
    """
    section = _section(raw, "scheduler", source)
    params = _section(section, "params", source, "scheduler.")
    if not section:
        return
    if not params or any(value != AUTO for value in params.values()):
        raise UserError(
            f"{source}: the scheduler section ({section.get('type')}) would overwrite the learning rate of every"
            " parameter group: remove it and pass --lr_scheduler_type and --warmup_ratio"
        )
    log.info('%s: dropped the scheduler section, which leaves every number to the run ("auto")', source)


def _batch(raw: Section, micro: int, accumulation: int, world_size: int, source: str) -> dict[str, int]:
    """Return the three batch numbers of the run; a number in the JSON must be the same."""
    numbers = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for key, number in numbers.items():
        value = raw.get(key, AUTO)
        if value != AUTO and (isinstance(value, bool) or value != number):
            raise UserError(
                f"{source}: {key} is {json.dumps(value)}, but this run has {micro} rows per rank × {accumulation}"
                f" micro-batches × {world_size} ranks = {micro * accumulation * world_size} rows per step: write"
                f' "auto", or change --per_device_train_batch_size, --gradient_accumulation_steps or'
                f" --global_batch_size"
            )
    return numbers


def _clipping(raw: Section, max_grad_norm: float, source: str) -> float:
    value = raw.get("gradient_clipping", AUTO)
    if value != AUTO and (isinstance(value, bool) or value != max_grad_norm):
        raise UserError(
            f"{source}: gradient_clipping is {json.dumps(value)}, but this run has --max_grad_norm {max_grad_norm}:"
            ' write "auto", or pass the same number'
        )
    return float(max_grad_norm)


def _precision(raw: Section, bf16: bool, source: str) -> Section:
    """Return the bf16 section; fp16 is refused.

    fp16 needs loss scaling, which skips the steps that overflow: the learning-rate schedule, the step count and the
    comparison between two runs would then depend on which steps were skipped.
    """
    if "bf16" in raw and "bfloat16" in raw:
        raise UserError(f"{source}: bf16 and bfloat16 are two names of one section: keep bf16")
    name = "bfloat16" if "bfloat16" in raw else "bf16"
    section = checked(_section(raw, name, source), keys.BF16, f"{name}.", source)
    enabled = section.get("enabled", AUTO)
    if _section(raw, "fp16", source).get("enabled", False) not in (False, AUTO):
        both = " and bf16 are both enabled: fp16" if enabled is True else ""
        raise UserError(f"{source}: fp16{both} is not supported: use --bf16, or --no_bf16 for fp32")
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if section.get(key, False) not in (False, AUTO):
            raise UserError(f"{source}: {name}.{key} is not supported: an adapter's master weights stay in fp32")
    if enabled != AUTO and enabled is not bf16:
        flag = "--bf16" if bf16 else "--no_bf16"
        raise UserError(
            f'{source}: {name}.enabled is {json.dumps(enabled)}, but the run has {flag}: write "auto", or change one'
        )
    return {**{key: value for key, value in section.items() if value != AUTO}, "enabled": bf16}


def _zero(raw: Section, source: str) -> Section:
    """Return the zero_optimization section with its stage and with numbers for ``"auto"``."""
    path = "zero_optimization."
    section = _section(raw, "zero_optimization", source) or {"stage": 0}
    check_known(section, keys.ZERO, path, source)
    stage = section.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{source}: {path}stage is {json.dumps(stage)}, not one of 0, 1, 2, 3")
    for key, (value, why) in keys.ZERO_FIXED.items():
        if section.get(key) not in (None, AUTO, value):
            raise UserError(f"{source}: {path}{key} {json.dumps(section[key])} is not supported: {why}")
    automatic = {**keys.ZERO_AUTO, "overlap_comm": stage == 3}
    resolved: Section = {}
    for key, value in checked(section, keys.ZERO, path, source).items():
        if key in keys.ZERO_FIXED:
            continue
        name = f"stage3_{key}" if f"stage3_{key}" in keys.ZERO else key
        if name in resolved:
            raise UserError(f"{source}: {path}{key} and {path}{name} are two names of one key: keep {name}")
        resolved[name] = automatic.get(name, AUTO) if value == AUTO else copy.deepcopy(value)
    return resolved


def _gradient_types(raw: Section, stage: int, bf16: bool, grad_accum_steps: int, source: str) -> Section:
    """Return in which precision gradients are added over micro-batches and over ranks: fp32 wherever DeepSpeed can.

    Both settings are needed: at stage 1 DeepSpeed rounds an fp32 sum to the communication type before reducing it.
    Stage 0 under bf16 can add micro-batches only in bf16.
    """
    section = checked(_section(raw, "data_types", source), keys.DATA_TYPES, "data_types.", source)
    only_bf16 = bf16 and stage == 0
    allowed = ("bf16",) if only_bf16 else ("fp32", "bf16") if bf16 else ("fp32",)
    accumulate = section.get("grad_accum_dtype", AUTO)
    if accumulate == AUTO:
        accumulate = allowed[0]
        if only_bf16 and grad_accum_steps > 1:
            log.warning(
                "%s: ZeRO stage 0 adds the gradients of %d micro-batches in bf16; stages 1 to 3 add them in fp32",
                source,
                grad_accum_steps,
            )
    if accumulate not in allowed:
        remedy = "; stage 1 or more can add in fp32" if only_bf16 else ""
        raise UserError(
            f"{source}: data_types.grad_accum_dtype is {json.dumps(accumulate)}, but ZeRO stage {stage} in"
            f" {'bf16' if bf16 else 'fp32'} allows {' or '.join(allowed)}{remedy}"
        )
    precision = "bf16" if bf16 else "fp32"
    if section.get("param_dtype", precision) not in (precision, AUTO):
        raise UserError(
            f"{source}: data_types.param_dtype is {json.dumps(section['param_dtype'])}, but this run is in {precision}:"
            f' write "{precision}", or remove it'
        )
    communicate = raw.get("communication_data_type")
    if communicate not in (None, AUTO, "fp32", "bf16", "fp16"):
        raise UserError(f"{source}: communication_data_type is {json.dumps(communicate)}, not fp32, bf16 or fp16")
    # DeepSpeed's own default for keep_in_fp32_modules is "auto", the model's list. param_dtype is the run's precision.
    decided = ("keep_in_fp32_modules", "param_dtype")
    kept = {key: copy.deepcopy(value) for key, value in section.items() if value != AUTO or key not in decided}
    return {
        "data_types": {**kept, "grad_accum_dtype": accumulate},
        "communication_data_type": "fp32" if communicate in (None, AUTO) else communicate,
    }


def _optimizer_place(raw: Section, zero: Section, source: str) -> dict[str, bool]:
    """Let torch's AdamW step on the CPU when the optimizer is offloaded; DeepSpeed would insist on its own."""
    forced = raw.get("zero_force_ds_cpu_optimizer", AUTO)
    offloaded = section_of(zero, "offload_optimizer").get("device", "none") != "none"
    if offloaded and forced not in (False, AUTO):
        raise UserError(
            f"{source}: zero_force_ds_cpu_optimizer is {json.dumps(forced)}, but the optimizer is torch's AdamW: write"
            " false, or remove it"
        )
    return {"zero_force_ds_cpu_optimizer": False} if offloaded else {}


def _refuse_auto(value: object, path: str, source: str) -> None:
    """Refuse every ``"auto"`` that is left, of keys that the run does not decide."""
    if value == AUTO:
        raise UserError(f'{source}: {path} is "auto", but the run does not decide it: write a value, or remove it')
    entries: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, entry in entries:
        _refuse_auto(entry, f"{path}.{key}" if path else str(key), source)


def _json_kind(value: object) -> str:
    names: dict[type, str] = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
