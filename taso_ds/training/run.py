"""One training run from configuration to files, in order of execution; every step is a function of another module."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.targets import MatrixShape, find_targets
from taso_ds.config import BatchSizes, RunConfig
from taso_ds.data.collate import collate, collate_head, empty_row
from taso_ds.data.encode import EncodedRow, pad_token_id
from taso_ds.data.plan import BatchPlan
from taso_ds.distributed import comm, zero
from taso_ds.distributed import engine as engines
from taso_ds.errors import UserError
from taso_ds.training import export, prepare, regions
from taso_ds.training.base_model import (
    BaseModel,
    check_weight_files,
    load_base_model,
    load_config,
    load_tokenizer,
    meta_model,
    model_source,
    wants_head,
)
from taso_ds.training.evaluate import Evaluator
from taso_ds.training.feed import Collate, Feed
from taso_ds.training.lora_baseline import attach_lora, lora_parameters
from taso_ds.training.loss import loss_sum
from taso_ds.training.optim import (
    Group,
    Schedule,
    describe_groups,
    learning_rate_table,
    make_groups,
    make_optimizer,
    make_schedule,
    total_steps,
)
from taso_ds.training.prove import Proof, probe_logits, prove_export
from taso_ds.training.run_folder import ADAPTER, RESULTS, RUN, RunFolder, choose_folder, versions
from taso_ds.training.trainer import Diverged, Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything known before weights are loaded."""

    config: RunConfig
    source: str
    ds_config: dict[str, Any]
    sizes: BatchSizes
    data: prepare.TaskData
    tokenizer: Any
    base_config: Any
    head: bool
    rows: Sequence[EncodedRow]
    shapes: Mapping[str, MatrixShape]
    region_file: regions.RegionFile | None

    @property
    def filler(self) -> EncodedRow:
        return empty_row(pad_token_id(self.tokenizer))

    @property
    def collate(self) -> Collate:
        pad_id = pad_token_id(self.tokenizer)
        if self.head:
            return partial(collate_head, pad_id=pad_id, is_regression=self.data.task.is_regression)
        return partial(collate, pad_id=pad_id)

    @cached_property
    def evaluator(self) -> Evaluator:
        training, data = self.config.training, self.config.data
        return Evaluator(
            examples=self.data.evaluation,
            task=self.data.task,
            tokenizer=self.tokenizer,
            head=self.head,
            source=self.data.eval_source,
            batch_size=training.per_device_eval_batch_size,
            max_seq_length=data.max_seq_length,
            max_new_tokens=training.max_new_tokens,
            use_chat_template=data.use_chat_template,
            synced=engines.zero_stage(self.ds_config) == 3 and comm.world_size() > 1,
        )


def join(config: RunConfig) -> None:
    """Convert a GGUF base if that has not been done, then join the process group.

    In this order: inside a group transformers saves a model on rank 0 only, and waiting ranks could time out. What is
    cheap to check comes first, for a conversion takes its time.
    """
    prepare.check_flags(config, comm.launched_world_size())
    model_source(config.model)
    comm.init()
    engines.quiet_deepspeed()


def set_up(config: RunConfig) -> Setup:
    """Check and read everything that needs no weights; the process group exists already.

    Raises:
        UserError: on every rank, before any weight is loaded.
    """
    ds_config, sizes = prepare.resolve_deepspeed(config, comm.world_size())
    data = prepare.load_task_data(config)
    source = model_source(config.model)
    base_config = load_config(config.model, source)
    check_weight_files(source)
    prepare.check_length(config, base_config)
    head = wants_head(config.model, base_config)
    tokenizer = load_tokenizer(config.model, source)
    prepare.prepare_base_config(base_config, data.task, tokenizer, head=head)
    shapes = prepare.target_shapes(config, meta_model(config.model, base_config, head=head))
    region_file = regions.read_regions(config, shapes)
    rows = prepare.encode_training_rows(config, data, tokenizer, head=head)
    setup = Setup(config, source, ds_config, sizes, data, tokenizer, base_config, head, rows, shapes, region_file)
    setup.evaluator.check()
    log.info("train: %d rows from %s", len(rows), data.train_source)
    log.info("evaluation: %d rows from %s", len(data.evaluation), data.eval_source)
    return setup


def load_base(setup: Setup) -> tuple[BaseModel, dict[str, nn.Module], dict[str, MatrixShape]]:
    """Load the base and find its targets."""
    config = setup.config
    base = load_base_model(
        config.model, setup.source, setup.base_config, head=setup.head, seed=config.run.seed, ds_config=setup.ds_config
    )
    if config.training.gradient_checkpointing:
        # ZeRO-3 empties frozen weights between a block's recomputation and the check of its tensors' shapes, which
        # would then fail on weights that are gathered again before use; the numbers are covered by a test.
        check = {"determinism_check": "none"} if engines.zero_stage(setup.ds_config) == 3 else {}
        base.model.gradient_checkpointing_enable({"use_reentrant": False, **check})  # type: ignore[operator]
    targets = find_targets(base.model, config.adapter.target_modules)
    return base, targets, prepare.target_shapes(config, base.model)


def find_regions(
    setup: Setup, base: BaseModel, targets: Mapping[str, nn.Module], shapes: Mapping[str, MatrixShape]
) -> regions.Regions:
    """Read or score the core regions."""
    config = setup.config
    if setup.region_file is not None:
        return regions.reuse_regions(config, setup.region_file, targets, shapes)
    return regions.score_base(
        config,
        base.model,
        targets,
        shapes,
        prepare.calibration_rows(config, list(setup.rows)),
        collate=setup.collate,
        filler=setup.filler,
        head=setup.head,
        ds_config=setup.ds_config,
    )


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


def train(config: RunConfig) -> Path:
    """Run everything and return the run folder.

    Raises:
        UserError: on every rank; before training nothing is left behind.
    """
    path = comm.on_main(lambda: choose_folder(config))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(path)))
    setup, folder = comm.together(lambda: set_up(config)), RunFolder(path)
    base, targets, shapes = load_base(setup)
    found = find_regions(setup, base, targets, shapes) if config.adapter.method == "taso" else None
    trained = attach(setup, base, shapes, found)
    plan = BatchPlan(len(setup.rows), setup.sizes.global_batch_size, seed=config.run.seed)
    schedule = make_schedule(config.training, total_steps(config.training, plan.steps_per_epoch))
    record = run_record(setup, base.model, trained.groups, schedule)
    comm.on_main(lambda: _start(folder, config, record, found))
    engine = engines.training_engine(base.model, make_optimizer(trained.groups, config.training), setup.ds_config)
    evaluate = partial(setup.evaluator, engine.module)
    before = evaluate()
    log.info("before: %s", _in_words(before))

    def on_eval(step: int) -> None:
        scores = evaluate()
        if comm.is_main():
            folder.log({"step": step, "eval": scores})

    trainer = Trainer(
        engine,
        Feed(setup.rows, plan, setup.sizes, setup.collate, setup.filler),
        loss_sum=partial(loss_sum, head=setup.head),
        groups=trained.groups,
        schedule=schedule,
        logging_steps=config.training.logging_steps,
        eval_steps=config.training.eval_steps,
        on_log=lambda metrics: folder.log(metrics) if comm.is_main() else None,
        on_eval=on_eval,
    )
    engine.train()
    try:
        trainer.fit()
    except Diverged as error:
        _save_last_good(setup, folder, base, trained, error)
        raise
    after = evaluate()
    log.info("after:  %s", _in_words(after))
    proof = save(setup, folder, base, trained, engine.module)
    results = {
        "task": setup.data.task.name,
        "method": config.adapter.method,
        "steps": schedule.total_steps,
        "headline": setup.evaluator.headline,
        "before": before,
        "after": after,
        "trainable_parameters": record["parameters"]["trainable"],
        "export": None if proof is None else dataclasses.asdict(proof),
        "concentration": None if found is None else found.mean_concentration(config.calibration.element_fraction),
    }
    comm.on_main(lambda: folder.write_json(RESULTS, results))
    return path


def _start(folder: RunFolder, config: RunConfig, record: dict[str, Any], found: regions.Regions | None) -> None:
    """Create the folder and write what is known before the first step."""
    folder.start()
    if found is not None:
        log.info(regions.describe_regions(found, config))
        regions.write_regions(folder, config, found)
    folder.write_json(RUN, record)
    log.info(describe_record(record))


def run_record(setup: Setup, model: nn.Module, groups: Sequence[Group], schedule: Schedule) -> dict[str, Any]:
    """Return the content of ``run.json``."""
    trainable = sum(zero.full_numel(value) for group in groups for value in group.parameters)
    total = sum(zero.full_numel(parameter) for parameter in model.parameters())
    return {
        "config": setup.config.flags(),
        "deepspeed": setup.ds_config,
        "world_size": comm.world_size(),
        "versions": versions(),
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch": dataclasses.asdict(setup.sizes) | {"global_batch_size": setup.sizes.global_batch_size},
        "steps": schedule.total_steps,
        "learning_rates": learning_rate_table(groups, schedule),
        "data": {"train": setup.data.train_source, "evaluation": setup.data.eval_source},
    }


def describe_record(record: dict[str, Any]) -> str:
    """Return counts and learning rates as lines."""
    parameters = record["parameters"]
    return "\n".join(
        [
            f"parameters: {parameters['trainable']:,} trainable of {parameters['total']:,} ({parameters['share']:.3%});"
            f" {record['steps']} steps",
            *describe_groups(record["learning_rates"]),
        ]
    )


def _in_words(scores: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
    )


def save(setup: Setup, folder: RunFolder, base: BaseModel, trained: Trained, live: nn.Module) -> Proof | None:
    """Export what was trained and prove it in a fresh process; None for full fine-tuning or when not asked for."""
    config = setup.config
    name = str(config.model.model_name_or_path)
    if trained.adapter is not None:
        export.save_taso(folder, base.model, trained.adapter, base_name=name, head=base.head_parameters)
    elif trained.lora_config is not None:
        export.save_lora(
            folder,
            lora_parameters(base.model),
            config=trained.lora_config,
            base_name=name,
            head=base.head_parameters,
        )
    else:
        export.save_full(folder, base.model, setup.tokenizer)
        return None
    if not config.run.verify_export:
        return None
    rows = export.probe_rows(setup.rows)
    live.eval()
    logits = probe_logits(live, rows)  # every rank takes part: ZeRO-3 gathers each layer
    return comm.on_main(lambda: prove(setup, folder, rows, logits))


def prove(setup: Setup, folder: RunFolder, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Proof:
    """Open the run's adapter in a fresh process with peft and compare logits."""
    config = setup.config
    return prove_export(
        folder.path / ADAPTER,
        source=setup.source,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        head=setup.head,
        num_labels=prepare.num_labels(setup.data.task) if setup.head else 0,
        dtype="bfloat16" if config.model.bf16 else "float32",
        pad_id=pad_token_id(setup.tokenizer),
        rows=rows,
        live=live,
    )


def calibrate(config: RunConfig) -> Path:
    """Score the base and write its core regions only; returns the folder.

    Raises:
        UserError: on every rank, before anything is written.
    """
    if config.calibration.core_regions is not None or config.adapter.method != "taso":
        raise UserError("calibrate: makes core regions; drop --core_regions and --method")
    path = comm.on_main(lambda: choose_folder(config))
    setup, folder = comm.together(lambda: set_up(config)), RunFolder(path)
    base, targets, shapes = load_base(setup)
    found = find_regions(setup, base, targets, shapes)
    record = {
        "config": config.flags(),
        "deepspeed": setup.ds_config,
        "world_size": comm.world_size(),
        "versions": versions(),
        "data": {"train": setup.data.train_source},
        "concentration": found.mean_concentration(config.calibration.element_fraction),
    }

    def write() -> None:
        folder.start()
        log.info(regions.describe_regions(found, config))
        regions.write_regions(folder, config, found)
        folder.write_json(RUN, record)

    comm.on_main(write)
    return path


def _save_last_good(setup: Setup, folder: RunFolder, base: BaseModel, trained: Trained, error: Diverged) -> None:
    """Keep what the finished steps learned."""
    if error.good_steps == 0 or trained.adapter is None:
        return
    export.save_taso(
        folder,
        base.model,
        trained.adapter,
        base_name=str(setup.config.model.model_name_or_path),
        head=base.head_parameters,
    )
    raise UserError(f"{error}; the adapter after step {error.good_steps} is in {folder.path / ADAPTER}") from error
