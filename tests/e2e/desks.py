"""A folder with rows and, in ``runs``, what scripts made of them."""

from dataclasses import dataclass
from pathlib import Path

import launching
from launching import Finished, call_main


@dataclass(frozen=True)
class Desk:
    """Scripts run inside ``path``.

    Attributes:
        more: flags beside the base and the rows.
    """

    path: Path
    base: Path
    more: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        rows = ("--train_file", str(self.path / "train.jsonl"), "--eval_file", str(self.path / "eval.jsonl"))
        base = ("--model_name_or_path", str(self.base), "--task", "completion", "--no_bf16", "--max_seq_length", "64")
        return [*base, *rows, *self.more]

    def folder(self, name: str) -> Path:
        return self.path / "runs" / name

    def start(self, name: str, launcher: str, ranks: int, *flags: str) -> Finished:
        """Train in processes of their own."""
        more = [*self.flags, "--output_dir", str(self.folder(name)), *flags]
        return launching.start("train", more, cwd=self.path, launcher=launcher, ranks=ranks).succeeded()

    def call(self, script: str, name: str, *flags: str) -> Finished:
        """Run a script that makes a run, in this process."""
        return call_main(script, [*self.flags, "--output_dir", self.folder(name), *flags])
