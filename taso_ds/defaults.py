"""What a run gets that names no model, task or data: the embedded ones, sized for two CPU cores."""

import dataclasses
from collections.abc import Mapping

from taso_ds.config import RunConfig
from taso_ds.data.embedded import EMBEDDED, EMBEDDED_DATA, embedded_model
from taso_ds.errors import UserError
from taso_ds.flags.flag import Parsed
from taso_ds.training.arguments import TrainArguments

_EMBEDDED_TASK = "sst2"
_EMBEDDED_TRAINING = {
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.1,
}


def with_defaults(config: RunConfig) -> RunConfig:
    """Fill in the embedded model and data where the user named none.

    Raises:
        UserError: a model without a task, or an extra that is not installed.
    """
    model, data = config.model, config.data
    if model.model_name_or_path is None:
        if model.gguf_file is not None:
            raise UserError("gguf_file: needs --model_name_or_path, the folder or Hub id it stands in")
        folder, file = embedded_model()
        model = dataclasses.replace(model, model_name_or_path=folder, gguf_file=file)
        if data.task is None:
            data = dataclasses.replace(data, task=_EMBEDDED_TASK)
            config = _sized_for_two_cores(config)
        if data.data_dir is None and data.train_file is None and data.task in EMBEDDED:
            data = dataclasses.replace(data, data_dir=EMBEDDED_DATA)
    if data.task is None:
        raise UserError("task: name one with --task (completion for your own prompt/completion JSONL)")
    return dataclasses.replace(config, model=model, data=data)


def _where_untouched(group: Parsed, values: Mapping[str, float]) -> Parsed:
    """Return the group with these values in the place of defaults; what the user set stays."""
    untouched = {entry.name: entry.default for entry in dataclasses.fields(group)}
    chosen = {name: value for name, value in values.items() if getattr(group, name) == untouched[name]}
    return dataclasses.replace(group, **chosen)


def _sized_for_two_cores(config: RunConfig) -> RunConfig:
    """Size a demonstration, a run without model and task, for minutes on two CPU cores. The user's flags stay."""
    training = dict(_EMBEDDED_TRAINING)
    if config.training.num_train_epochs != TrainArguments.num_train_epochs:
        del training["max_steps"]
    return dataclasses.replace(
        config,
        training=_where_untouched(config.training, training),
        calibration=_where_untouched(config.calibration, {"calibration_samples": 64, "calibration_batch_size": 16}),
    )
