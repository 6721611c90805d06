"""Which task, and which of its rows."""

from dataclasses import dataclass

from taso_ds.errors import UserError
from taso_ds.flags.flag import arg, require, require_one_of

EVAL_METRICS = ("none", "exact_match", "rouge")


@dataclass(frozen=True)
class DataArguments:
    """The task and its rows."""

    task: str | None = arg(None, "Task name; default: sst2 from the embedded data.", first=True)
    data_dir: str | None = arg(
        None, "Folder with <task>/<split>.jsonl(.gz); default: the Hub.", path=True, words=("embedded",)
    )
    train_file: str | None = arg(None, "JSONL file to train on, instead of data_dir's.", path=True, first=True)
    eval_file: str | None = arg(None, "JSONL file to evaluate on, instead of data_dir's.", path=True, first=True)
    eval_fraction: float | None = arg(
        None, "Evaluate on this share of the training rows, held out by the seed.", unit="share"
    )
    eval_metric: str = arg("none", "Of --task completion, beside the loss: exact_match or rouge of generated answers.")
    max_train_samples: int | None = arg(None, "Use only the first N training rows.", unit="rows")
    max_eval_samples: int | None = arg(None, "Use only the first N evaluation rows.", unit="rows")
    max_seq_length: int = arg(512, "Tokens of a row; longer prompts are cut from the left.", unit="tokens")
    use_chat_template: bool = arg(False, "Wrap prompts in the tokenizer's chat template.")

    def __post_init__(self) -> None:
        require(self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "at least 2")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number of rows")
        require_one_of("eval_metric", self.eval_metric, EVAL_METRICS)
        if self.eval_metric != "none" and self.task not in (None, "completion"):
            raise UserError(
                f"eval_metric: {self.eval_metric} is for --task completion; {self.task} has its own metrics: drop it"
            )
        share = self.eval_fraction
        require(share is None or 0.0 < share < 1.0, "eval_fraction", share, "between 0 and 1")
        if share is not None and self.eval_file is not None:
            raise UserError(
                f"eval_fraction: --eval_file {self.eval_file} names the rows to evaluate on; drop one of both"
            )
