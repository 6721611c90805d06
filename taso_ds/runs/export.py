"""What was trained, in the run folder, and the proof that it opens without this package."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from taso_ds.data.encode import pad_token_id
from taso_ds.distributed import comm
from taso_ds.job import Job
from taso_ds.methods.fresh_process import Export
from taso_ds.methods.method import folder_name
from taso_ds.methods.probe import probe_logits, probe_rows
from taso_ds.methods.prove import Proof, prove_export
from taso_ds.methods.saved import saved_folder
from taso_ds.models.load import BaseModel
from taso_ds.runs.stages import Stages

log = logging.getLogger(__name__)


def save(job: Job, run: Path, base: BaseModel, live: nn.Module, stages: Stages) -> Proof | None:
    """Export what was trained, and prove it in a fresh process; None where no proof was asked for. A collective."""
    path = write_trained(job, run, base)
    stages.done("export", str(path), next_is="a fresh process opens it")
    if not job.config.run.verify_export:
        return None
    rows = probe_rows(job.rows)
    live.eval()
    logits = probe_logits(live, rows)  # every rank takes part: ZeRO-3 gathers each layer
    proof = comm.on_main(lambda: prove(job, run, base, rows, logits))
    stages.done("proof", "passed")
    return proof


def write_trained(job: Job, run: Path, base: BaseModel) -> Path:
    """Write what was trained into the run folder; returns its own folder there."""
    config = job.config
    path = run / folder_name(config.method)
    config.method.save(path, base)
    return path


def prove(job: Job, run: Path, base: BaseModel, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Proof:
    """Open the run's adapter with peft, or its model with transformers, in a fresh process; say how logits differ."""
    config, is_model = job.config, job.config.method.trains_base
    export = Export(
        folder=str(saved_folder(config.adapter.method, run)),
        source=None if is_model else job.base.source,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        head=job.base.head,
        num_labels=job.objective.num_labels,
        dtype="bfloat16" if config.model.bf16 else "float32",
        quantization=None if job.base.quantization is None else job.base.quantization.settings(base.model),
        pad_id=pad_token_id(job.base.tokenizer),
    )
    proof = prove_export(export, rows=rows, live=live)
    log.info("opened with %s: %s", "transformers" if is_model else "peft", proof)
    return proof
