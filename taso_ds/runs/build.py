"""What a run is made of: everything known before weights are loaded, then the base, its regions, the trained parts."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.region_file import load_region_file
from taso_ds.adapters.targets import Targets
from taso_ds.config import RunConfig
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.encode import EncodedRow, pad_token_id
from taso_ds.data.task_data import TaskData, load_task_data
from taso_ds.distributed import comm, environment, placement, process_group
from taso_ds.distributed import engine as engines
from taso_ds.distributed.ds_config_check import check_device
from taso_ds.distributed.zero import full_shape
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.models.load import BaseModel, load_base_model
from taso_ds.models.quantized_linear import quiet_bitsandbytes
from taso_ds.models.source import model_source
from taso_ds.models.spec import BaseSpec, check_weight_files, read_spec
from taso_ds.models.stored_weights import stored_weights
from taso_ds.objectives.objective import Objective, make_objective
from taso_ds.objectives.vocabulary import check_padding, check_tokens
from taso_ds.planning.host_check import check_this_host
from taso_ds.runs import prepare
from taso_ds.runs.nodes import check_same_model
from taso_ds.scoring import regions
from taso_ds.training.arguments import BatchSizes

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything known before weights are loaded."""

    config: RunConfig
    base: BaseSpec
    zero: ZeroConfig
    sizes: BatchSizes
    data: TaskData
    objective: Objective
    rows: Sequence[EncodedRow]
    targets: Targets
    region_file: regions.RegionFile | None

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(len(self.rows), self.sizes.global_batch_size, seed=self.config.run.seed)

    @cached_property
    def data_digest(self) -> str:
        """Digest of the training rows, as tokens."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.asarray(row.input_ids, dtype=np.int64).tobytes())
            digest.update(np.asarray(row.labels, dtype=np.int64).tobytes())
            digest.update(str(row.target).encode())
        return digest.hexdigest()


def join(config: RunConfig) -> None:
    """Meet the other ranks, bring the base onto this node if that has not been done, then join the process group.

    In this order: a node that has no base ends all, inside a group transformers saves a model on rank 0 only, and
    waiting ranks could time out. What is cheap to check comes first, for a download or a conversion takes its time.
    """
    environment.check()
    prepare.check_flags(config, environment.world_size())
    process_group.meet()
    source = model_source(config.model)
    process_group.init()
    check_same_model(config, source)
    engines.quiet_deepspeed()
    quiet_bitsandbytes()


def set_up(config: RunConfig, *, trains: bool = True) -> Setup:
    """Check and read everything that needs no weights; the process group exists already.

    Args:
        trains: whether this host must have room for more than the loaded model.

    Raises:
        UserError: on every rank, before any weight is loaded.
    """
    zero, sizes = prepare.resolve_deepspeed(config, comm.world_size())
    placement.check_nvme(zero)
    data = load_task_data(config.data, seed=config.run.seed)
    source = model_source(config.model)
    base = read_spec(config.model, source, num_labels=data.task.num_labels)
    check_weight_files(source)
    prepare.check_length(config, base)
    check_padding(base)
    base.pad_with(pad_token_id(base.tokenizer))
    prepare.check_labels(data.task, head=base.head)
    targets = prepare.targets_of(config, base)
    prepare.check_base(config, base, zero, targets, trains=trains)
    check_device(zero, config.run.ds_config)
    region_file = regions.read_regions(config, targets.shapes)
    objective = make_objective(
        data,
        config.data,
        base.tokenizer,
        head=base.head,
        adapted=targets,
        batch_size=config.training.per_device_eval_batch_size,
        max_new_tokens=config.training.max_new_tokens,
    )
    rows = objective.encode(data.train, data.train_source)
    prepare.check_accumulation(sizes, rows)
    check_this_host(config, base, targets, rows, zero=zero, trains=trains)
    objective.check(base.num_positions)
    check_tokens(base, {data.train_source: rows, data.eval_source: objective.rows()})
    log.info("train: %d rows from %s", len(rows), data.train_source)
    log.info("evaluation: %d rows from %s", len(data.evaluation), data.eval_source)
    for line in prepare.base_in_words(config, base, targets):
        log.info(line)
    return Setup(config, base, zero, sizes, data, objective, rows, targets, region_file)


def load_base(setup: Setup) -> tuple[BaseModel, Targets]:
    """Load the base and find its targets."""
    config = setup.config
    base = load_base_model(setup.base, seed=config.run.seed, zero=setup.zero)
    if config.training.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    if setup.zero.stage == 3:
        engines.set_leaf_modules(base.model, find_experts(base.model, shape_of=full_shape).blocks)
    return base, setup.targets.within(base.model, shape_of=full_shape)


def find_regions(setup: Setup, base: BaseModel, targets: Targets, *, earlier: Path | None = None) -> regions.Regions:
    """Read or score the core regions.

    Args:
        earlier: region file of the interrupted run that goes on; rank 0 sees it.
    """
    config = setup.config
    rows = prepare.calibration_rows(config, list(setup.rows))
    with stored_weights(base, targets) as stored:
        if earlier is not None:
            file, known = comm.on_main(lambda: load_region_file(earlier)), rows if setup.region_file is None else []
            return regions.reuse_regions(config, file, targets, source=str(earlier), rows=known, stored=stored)
        if setup.region_file is not None:
            source = str(config.calibration.core_regions)
            return regions.reuse_regions(config, setup.region_file, targets, source=source, stored=stored)
        return regions.score_base(
            config,
            base.model,
            targets,
            rows,
            collate=setup.objective.collate,
            loss_sum=setup.objective.loss_sum,
            zero=setup.zero,
            stored=stored,
        )
