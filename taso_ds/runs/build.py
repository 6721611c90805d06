"""What a run is made of: everything known before weights are loaded, then the base, its regions, the trained parts."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.region_file import load_region_file
from taso_ds.adapters.targets import MatrixShape, Target
from taso_ds.config import RunConfig
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.encode import EncodedRow
from taso_ds.data.task_data import TaskData, load_task_data
from taso_ds.distributed import comm, environment, placement, process_group
from taso_ds.distributed import engine as engines
from taso_ds.distributed.ds_config_check import check_device
from taso_ds.distributed.zero import full_shape
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.methods.lora import attach_lora, lora_parameters
from taso_ds.models.load import BaseModel, check_weight_files, load_base_model, load_config, load_tokenizer, meta_model
from taso_ds.models.model_class import wants_head
from taso_ds.models.quantized_linear import quiet_bitsandbytes
from taso_ds.models.source import model_source
from taso_ds.models.stored_weights import StoredWeights, stored_weights
from taso_ds.objectives.objective import Objective, make_objective
from taso_ds.objectives.vocabulary import check_padding, check_tokens
from taso_ds.planning.host_check import check_this_host
from taso_ds.runs import prepare
from taso_ds.runs.nodes import check_same_model
from taso_ds.scoring import regions
from taso_ds.training.arguments import BatchSizes
from taso_ds.training.optim import Group, make_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything known before weights are loaded."""

    config: RunConfig
    source: str
    zero: ZeroConfig
    sizes: BatchSizes
    data: TaskData
    tokenizer: Any
    base_config: Any
    head: bool
    objective: Objective
    rows: Sequence[EncodedRow]
    shapes: Mapping[str, MatrixShape]
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
    base_config = load_config(config.model, source)
    check_weight_files(source)
    prepare.check_length(config, base_config)
    head = wants_head(config.model, base_config)
    tokenizer = load_tokenizer(config.model, source)
    check_padding(tokenizer, base_config)
    prepare.prepare_base_config(base_config, data.task, tokenizer, head=head)
    model = meta_model(config.model, base_config, head=head)
    shapes = prepare.target_shapes(config, model)
    prepare.check_base(config, base_config, zero, model, shapes, head=head, trains=trains)
    check_device(zero, config.run.ds_config)
    region_file = regions.read_regions(config, shapes)
    objective = make_objective(
        data,
        config.data,
        tokenizer,
        head=head,
        adapted=shapes,
        batch_size=config.training.per_device_eval_batch_size,
        max_new_tokens=config.training.max_new_tokens,
    )
    rows = objective.encode(data.train, data.train_source)
    prepare.check_accumulation(sizes, rows)
    check_this_host(config, model, base_config, shapes, rows, zero=zero, source=source, trains=trains)
    objective.check(prepare.num_positions(base_config))
    check_tokens(tokenizer, base_config, {data.train_source: rows, data.eval_source: objective.rows()})
    log.info("train: %d rows from %s", len(rows), data.train_source)
    log.info("evaluation: %d rows from %s", len(data.evaluation), data.eval_source)
    for line in prepare.base_in_words(config, base_config, model, shapes):
        log.info(line)
    return Setup(config, source, zero, sizes, data, tokenizer, base_config, head, objective, rows, shapes, region_file)


def load_base(setup: Setup) -> tuple[BaseModel, dict[str, Target], dict[str, MatrixShape]]:
    """Load the base and find its targets."""
    config = setup.config
    base = load_base_model(
        config.model, setup.source, setup.base_config, head=setup.head, seed=config.run.seed, zero=setup.zero
    )
    if config.training.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if setup.zero.stage == 3:
        engines.set_leaf_modules(base.model, find_experts(base.model, shape_of=full_shape).blocks)
    return base, prepare.targets_of(config, base.model), prepare.target_shapes(config, base.model)


def find_regions(
    setup: Setup,
    base: BaseModel,
    targets: Mapping[str, Target],
    shapes: Mapping[str, MatrixShape],
    *,
    earlier: Path | None = None,
) -> regions.Regions:
    """Read or score the core regions.

    Args:
        earlier: region file of the interrupted run that goes on; rank 0 sees it.
    """
    config = setup.config
    rows = prepare.calibration_rows(config, list(setup.rows))
    with _stored(setup, base) as stored:
        if earlier is not None:
            file, known = comm.on_main(lambda: load_region_file(earlier)), rows if setup.region_file is None else []
            return regions.reuse_regions(config, file, targets, shapes, source=str(earlier), rows=known, stored=stored)
        if setup.region_file is not None:
            source = str(config.calibration.core_regions)
            return regions.reuse_regions(config, setup.region_file, targets, shapes, source=source, stored=stored)
        return regions.score_base(
            config,
            base.model,
            targets,
            shapes,
            rows,
            collate=setup.objective.collate,
            loss_sum=setup.objective.loss_sum,
            zero=setup.zero,
            stored=stored,
        )


def base_fingerprint(setup: Setup, base: BaseModel, targets: Mapping[str, Target]) -> str:
    """Return the digest of the base's target weights; empty where training changes them. A collective."""
    if setup.config.adapter.method == "full":
        return ""
    with _stored(setup, base) as stored:
        return regions.fingerprint(targets, stored)


def _stored(setup: Setup, base: BaseModel) -> AbstractContextManager[StoredWeights | None]:
    """Open the checkpoint of a quantized base; the weights of any other are all in the model."""
    if base.quantization is None:
        return nullcontext()
    return stored_weights(base.model, setup.source, setup.shapes, revision=setup.config.model.model_revision)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method trains: its parameters by role, and how it is saved."""

    adapter: TasoAdapter | None
    lora_config: Any
    groups: list[Group]


def attach(setup: Setup, base: BaseModel, shapes: Mapping[str, MatrixShape], found: regions.Regions | None) -> Trained:
    """Make the method's parameters part of the model, trainable beside a task head."""
    config, model = setup.config, base.model
    head = list(base.head_parameters.values())
    count = prepare.count_adapter(config, dict(shapes))
    adapter, lora_config, trained, full = None, None, [], []
    if config.adapter.method == "taso":
        assert found is not None
        adapter = TasoAdapter(
            found.cut,
            structure=config.adapter.structure,
            rank=config.adapter.rank,
            scaling=config.adapter.scaling,
            seed=config.run.seed,
            dtype=model.dtype,  # type: ignore[arg-type]
        ).to(comm.device())
        adapter.attach(model)
        trained = [adapter.flat]
        assert adapter.flat.numel() == count.trainable
    elif config.adapter.method == "lora":
        torch.manual_seed(config.run.seed)
        lora_config = attach_lora(
            model,
            list(shapes),
            rank=config.adapter.rank,
            scaling=config.adapter.scaling,
            transposed=any(shape.transposed for shape in shapes.values()),
        )
        trained = list(lora_parameters(model).values())
    else:
        model.requires_grad_(True)
        heads = {id(parameter) for parameter in head}
        full = [parameter for parameter in model.parameters() if id(parameter) not in heads]
    groups = make_groups(config.training, adapter=trained, head=head, full=full, rho=count.rho)
    return Trained(adapter, lora_config, groups)
