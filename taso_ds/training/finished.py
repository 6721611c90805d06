"""What can be done with a run folder afterwards: evaluate its adapter again, merge it, prove it."""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.peft_format import COMPACT_FILE, load_adapter
from taso_ds.config import GROUPS, RunConfig
from taso_ds.distributed import comm
from taso_ds.distributed.engine import scoring_engine
from taso_ds.errors import UserError
from taso_ds.flags import arg, given_names, parse_groups
from taso_ds.training import export
from taso_ds.training.base_model import BaseModel
from taso_ds.training.build import Setup, load_base, set_up
from taso_ds.training.disk_tensors import DiskTensors
from taso_ds.training.prepare import with_defaults
from taso_ds.training.prove import probe_logits
from taso_ds.training.recorded import read_run, recorded_flags
from taso_ds.training.run import prove
from taso_ds.training.run_folder import ADAPTER, MODEL, RUN, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedArguments:
    """Which finished run is meant."""

    run: str | None = arg(
        None, "Folder of a finished run; its recorded arguments are the defaults of all flags.", path=True
    )
    merge: bool = arg(False, "export: add the adapter to the base's weights and write a plain model.")


def parse_over_run(argv: Sequence[str] | None = None, *, description: str = "") -> tuple[RunConfig, FinishedArguments]:
    """Parse flags over the arguments recorded in ``--run FOLDER``.

    Raises:
        UserError: bad flag, or a folder that is not a run.
    """
    (named,) = parse_groups([FinishedArguments], argv, description="", partial=True)
    recorded = {} if named.run is None else recorded_flags(read_run(Path(named.run)), Path(named.run) / RUN)
    defaults = {key: value for key, value in recorded.items() if key != "core_regions"}  # the adapter knows its own
    if "eval_file" in given_names(sys.argv[1:] if argv is None else argv):
        defaults.pop("eval_fraction", None)  # other rows instead of those held out
    *groups, finished = parse_groups((*GROUPS, FinishedArguments), argv, description=description, defaults=defaults)
    return with_defaults(RunConfig(*groups)), finished


Adapter = tuple[TasoAdapter, Mapping[str, Tensor]]


def _read_adapter(setup: Setup, run: str | None) -> Adapter | None:
    """Read the run's adapter and its head; UserError when it is damaged or belongs to another base."""
    if run is None:
        return None
    folder = Path(run) / ADAPTER
    if not (folder / COMPACT_FILE).is_file():
        raise UserError(f"run: {folder / COMPACT_FILE} does not exist; only TASO runs can be opened again")
    adapter, head = load_adapter(folder)
    for name, region in adapter.regions.items():
        shape = setup.shapes.get(name)
        if shape is None or (shape.out_features, shape.in_features) != (region.out_features, region.in_features):
            raise UserError(f"run: the adapter in {run} has {name}, which this base does not have in that shape")
    return adapter, head


def _load(setup: Setup, found: Adapter | None) -> BaseModel:
    """Load the base, and the adapter onto it."""
    base, _, _ = load_base(setup)
    if found is not None:
        adapter, head = found
        adapter.to(comm.device()).attach(base.model)
        export.load_head(base.model, head)
    return base


def evaluate(config: RunConfig, run: str | None) -> dict[str, Any]:
    """Return the task's metrics of a run's adapter, or of the base where no run is named."""
    setup = comm.together(lambda: set_up(config))
    base = _load(setup, comm.together(lambda: _read_adapter(setup, run)))
    base.model.requires_grad_(False)
    with scoring_engine(base.model, setup.ds_config) as model:
        scores = setup.evaluator(model)
    return {"run": run, "task": setup.data.task.name, **scores}


def export_run(config: RunConfig, run: str, *, merge: bool) -> Path:
    """Prove a run's adapter again or, with ``merge``, write base plus adapter as a plain model. One process.

    Raises:
        UserError: when the files do not say what the adapter says.
    """
    if comm.world_size() > 1:
        raise UserError("export: runs in one process; start it with plain python")
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, ds_config="zero0.json"))  # no partitions
    if merge and (config.model.load_in_4bit or config.model.load_in_8bit):
        log.info("merging into the base as it was before the run quantized it")
        unquantized = dataclasses.replace(config.model, load_in_4bit=False, load_in_8bit=False)
        scoring = dataclasses.replace(config.calibration, importance_weights="loaded")
        whole = dataclasses.replace(whole, model=unquantized, calibration=scoring)
    setup, folder = set_up(whole), RunFolder(Path(run))
    found = _read_adapter(setup, run)
    assert found is not None
    base, adapter = _load(setup, found), found[0]
    if merge and base.quantization is not None:
        raise UserError(f"merge: {config.model.model_name_or_path} is quantized; merge into the base it was made from")
    base.model.eval()
    rows = export.probe_rows(setup.rows)
    live = probe_logits(base.model, rows)
    if not merge:
        proof = prove(setup, folder, base, rows, live)
        log.info("opened with peft: logits differ by %.1e, the adapter moves them by %.1e", proof.error, proof.effect)
        return folder.path / ADAPTER
    adapter.detach(base.model)
    with DiskTensors(folder.path) as disk:
        export.merge_adapter(base.model, adapter, disk)
        error = export.check_merged(probe_logits(base.model, rows), live, dtype=base.model.dtype)
        log.info("merged: logits differ from the adapter's by %.1e", error)
        export.save_model(folder, base.model, base.model.state_dict(), setup.tokenizer)
    return folder.path / MODEL
