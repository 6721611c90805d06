"""What can be done with a finished run: evaluate it again, merge its adapter into the base, prove its export."""

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from taso_ds.adapters.targets import get_target, matrix_shape
from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.distributed.engine import scoring_engine
from taso_ds.errors import UserError
from taso_ds.job import Job
from taso_ds.methods.disk_tensors import DiskTensors
from taso_ds.methods.folders import MODEL
from taso_ds.methods.full import save_model
from taso_ds.methods.merge import check_merged, describe_merged, merge_adapter
from taso_ds.methods.method import SavedAdapter
from taso_ds.methods.probe import probe_logits, probe_rows, relative_distance
from taso_ds.methods.saved import read_adapter, saved_folder
from taso_ds.methods.task_head import load_head
from taso_ds.models.load import BaseModel
from taso_ds.runs.export import prove
from taso_ds.runs.holding import reports_in
from taso_ds.runs.open_job import load_base, open_job
from taso_ds.runs.output_folder import check_no_model
from taso_ds.runs.run_lock import locked
from taso_ds.runs.stages import Stages

log = logging.getLogger(__name__)


def _read(job: Job, run: str | None) -> SavedAdapter | None:
    """Read the run's adapter; UserError when it is damaged or belongs to another base."""
    if run is None:
        return None
    saved = read_adapter(job.config.adapter.method, Path(run))
    if saved is not None:
        _check_fits(job, saved, run)
    return saved


def _check_fits(job: Job, saved: SavedAdapter, run: str) -> None:
    """Refuse an adapter whose matrices or head this base does not have, before its weights are loaded."""
    for name, shape in saved.shapes.items():
        if _shape_of(job.base.meta, name) != shape:
            raise UserError(f"run: the adapter in {run} has {name}, which this base does not have in that shape")
    head = job.base.head_parameters
    for name in sorted(head.keys() | saved.head_tensors.keys()):
        if name not in saved.head_tensors:
            raise UserError(f"run: the adapter in {run} has no {name}, which would be untrained: drop --head")
        if name not in head or head[name].shape != saved.head_tensors[name].shape:
            raise UserError(
                f"run: the adapter in {run} has a trained {name}, which this base does not have in that shape for task"
                f" {job.examples.task.name}"
            )


def _shape_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    try:
        shape = matrix_shape(get_target(model, name))
    except AttributeError:  # no module of this name
        return None
    return None if shape is None else (shape.out_features, shape.in_features)


def _load(job: Job, saved: SavedAdapter | None) -> BaseModel:
    """Load the base, and the adapter onto it."""
    base, _ = load_base(job)
    if saved is not None:
        saved.attach(base.model)
        load_head(base.model, saved.head_tensors)
    return base


def evaluate(config: RunConfig, run: str | None) -> dict[str, object]:
    """Return the task's metrics of what a run trained, or of the base if no run is named."""
    with nullcontext() if run is None else reports_in(Path(run)):
        stages = Stages(["reading", "loading", "evaluation"])
        job = comm.together(lambda: open_job(config, trains=False))
        saved = comm.together(lambda: _read(job, run))
        stages.done("reading", f"{len(job.examples.evaluation)} rows", next_is=str(config.model.model_name_or_path))
        base = _load(job, saved)
        stages.done("loading", str(config.model.model_name_or_path))
        base.model.requires_grad_(False)
        with scoring_engine(base.model, job.zero) as model:
            scores = job.objective.evaluate(model)
        stages.done("evaluation", f"{len(job.examples.evaluation)} rows")
    return {"run": run, "task": job.examples.task.name, **scores}


def export_run(config: RunConfig, run: str, *, merge: bool) -> Path:
    """Prove a run's export again or, with ``merge``, write base plus adapter as a plain model. One process.

    Raises:
        UserError: when the files do not say what was trained, there is nothing to merge, or a model stands there.
    """
    if comm.world_size() > 1:
        raise UserError("export: runs in one process; start it with plain python")
    path = saved_folder(config.adapter.method, Path(run))
    if merge and config.method.trains_base:
        raise UserError(f"merge: {path} is a plain model already; use it as it is")
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, ds_config="zero0.json"))  # no partitions
    with reports_in(Path(run)):
        if not merge:
            return _prove(whole, run, path)
        with locked(Path(run)):  # first: another merge may be about to write the model
            check_no_model(Path(run))
            return _merge(whole, run)


def _prove(config: RunConfig, run: str, path: Path) -> Path:
    stages = Stages(["loading", "proof"])
    job = open_job(config, trains=False)
    base = _load(job, _read(job, run))
    stages.done("loading", str(config.model.model_name_or_path), next_is="a fresh process opens the export")
    base.model.eval()
    rows = probe_rows(job.rows)
    prove(job, Path(run), base, rows, probe_logits(base.model, rows))
    stages.done("proof", "passed")
    return path


def _merge(config: RunConfig, run: str) -> Path:
    if config.model.load_in_4bit or config.model.load_in_8bit:
        log.info("merging into the base as it was before the run quantized it")
        unquantized = dataclasses.replace(config.model, load_in_4bit=False, load_in_8bit=False)
        config = dataclasses.replace(config, model=unquantized)
    stages = Stages(["loading", "merging"])
    job, path = open_job(config, trains=False), Path(run) / MODEL
    if job.base.quantization is not None:
        raise UserError(f"merge: {config.model.model_name_or_path} is quantized; merge into the base it was made from")
    saved = _read(job, run)
    assert saved is not None
    base = _load(job, saved)
    stages.done("loading", str(config.model.model_name_or_path))
    base.model.eval()
    rows = probe_rows(job.rows)
    live = probe_logits(base.model, rows)
    with DiskTensors(path.parent) as disk:
        deltas = saved.detach(base.model)
        effect = relative_distance(probe_logits(base.model, rows), live)
        merge_adapter(base.model, deltas, disk)
        dtype = base.model.dtype
        error = check_merged(probe_logits(base.model, rows), live, dtype=dtype)
        log.info(describe_merged(error, effect, dtype=dtype))
        save_model(path, base.model, base.model.state_dict(), job.base.tokenizer)
    stages.done("merging", str(path))
    return path
