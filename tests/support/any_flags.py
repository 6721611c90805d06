"""Any flags for every script, on the command line, in YAML and mixed: what people type, and what nobody would.

Values are made from the types of the dataclasses, so that a new flag is tried without being named here. Whatever they
are, a script does what it says or refuses in one line, and leaves nothing behind.
"""

import dataclasses
import random
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_type_hints

import tiny_models
import yaml
from launching import Finished, call, call_main
from sample_rows import write_splits

from taso_ds.batch_script import SlurmArguments, parse_job
from taso_ds.config import GROUPS, parse_run_config
from taso_ds.doctor.arguments import DoctorArguments, parse_doctor
from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts
from taso_ds.planning.arguments import PlanArguments
from taso_ds.runs.finished_arguments import EVALUATE, EXPORT, FinishedArguments, parse_over_run

# What is on the command line already: mostly a run that works, for a check that comes late must be reached. Without a
# model it is the demonstration's, which takes seconds to count.
_BEFORE = {
    "--model_name_or_path llama --task completion --train_file train.jsonl --eval_file eval.jsonl --max_seq_length 64"
    " --no_bf16 --output_dir run": 0.8,
    "--model_name_or_path llama": 0.195,
    "": 0.005,
}
_SECONDS = 20  # after which a script hangs
_PYTHON = re.compile(r"\[Errno|Traceback|<class|object at 0x|Error\(")  # what no person says


def _parses(script: str, parse: Callable[[Sequence[str]], object], flags: Sequence[str]) -> Finished:
    """Run a script that has no dry run as far as it only reads its flags."""

    def action(_: Interrupts) -> None:
        parse(flags)

    return call(lambda: run_script(action), script, flags)


def _doctor(flags: Sequence[str]) -> None:
    _, others = parse_doctor(flags)
    parse_run_config(others)


@dataclass(frozen=True)
class Script:
    """A script: its groups of flags, how it is run on any of them, and those that it always gets."""

    groups: tuple[Any, ...]
    run: Callable[[Sequence[str]], Finished]
    always: tuple[str, ...] = ()
    writes: bool = False


SCRIPTS: dict[str, Script] = {
    "train": Script(GROUPS, partial(call_main, "train"), ("--dry_run",)),
    "calibrate": Script(GROUPS, partial(call_main, "calibrate"), ("--dry_run",)),
    "plan": Script((*GROUPS, PlanArguments), partial(call_main, "plan"), writes=True),
    "slurm": Script(
        (*GROUPS, SlurmArguments),
        partial(_parses, "slurm", partial(parse_job, description="")),
        ("--output_dir", "run"),
    ),
    "evaluate": Script(
        (*GROUPS, FinishedArguments), partial(_parses, "evaluate", partial(parse_over_run, verb=EVALUATE))
    ),
    "export": Script((*GROUPS, FinishedArguments), partial(_parses, "export", partial(parse_over_run, verb=EXPORT))),
    "doctor": Script((*GROUPS, DoctorArguments), partial(_parses, "doctor", _doctor)),
}
# Most of the runs go where most of the code is.
_WEIGHTS = {"train": 8, "calibrate": 1, "plan": 4, "slurm": 1, "evaluate": 1, "export": 1, "doctor": 1}

_WHOLE = (
    *("0", "1", "2", "-1", "3", "8", "64", "1000", "-2147483649", "4294967296", "9223372036854775807", "1" + "0" * 30),
)
_NOT_WHOLE = (
    *("1.5", "1e3", "nan", "", " ", "two", "0x10", "4_0", "٣", "true", "None", "1,000", "-", "--", "9" * 5000),
)
_REAL = (
    *("0", "1", "-1", "0.5", "0.05", "0.1", "1e-3", "2e-4", "1.0", "-0.0", "5e-324", "1e30", "1e300", "1e400", "-1e9"),
)
_NOT_REAL = ("nan", "inf", "-inf", "", "0,5", "½", "1e", "ten", "0x1p3", "1_0.5", "1 000")
_TEXTS = (
    *("", " ", "a", "x", "none", "auto", "null", "~", "~nobody-of-that-name/x", "/", ".", "..", "-", "--", "-x"),
    *("train.jsonl", "gone", "gone/x", "train.jsonl/x", "here", "round", "folder", "llama", "llama/config.json"),
    *("/dev/null", "/proc/x/y", "ü/π.jsonl", "日本", "a b", "a\nb", "a\tb", "\x1b[31mred", "\u202eabc", "\ud800"),
    *("a\0b", "%s%n", "{x}", "{", "$(id)", "x" * 300, "d/" * 2500, "'", '"', "\\", "*", "(", "[", "q_proj", "q_proj["),
    *(".*", "^$", "http://x", "s3://a/b", "gone.jsonl", "empty.jsonl", "cut.jsonl", "empty.yaml", "cut.json"),
    *("list.json", "off", "0.5", "mask", "24:00:00"),
)
# Words that mean something to some flag, so that more than one check is passed.
_MEANT: dict[str, tuple[str, ...]] = {
    "head": ("auto", "lm", "classification"), "method": ("taso", "lora", "full"),
    "structure": ("union", "intersection"), "importance": ("importance", "magnitude", "gradient", "random"),
    "calibration_reduction": ("signed_mean", "per_batch_abs"), "calibration_offload": ("none", "cpu"),
    "importance_weights": ("loaded", "original"), "rho": ("mask", "parameters", "off", "0.5"),
    "lr_scheduler_type": ("linear", "cosine", "constant"), "on_divergence": ("stop", "rollback"),
    "ds_config": ("zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json", "zero3_nvme.json"),
    "task": ("completion", "sst2", "rte", "gsm8k"), "data_dir": (".", "embedded"), "resume": ("auto", "none"),
    "target_modules": ("q_proj", "down_proj", "lm_head"), "train_file": ("train.jsonl",), "eval_file": ("eval.jsonl",),
    "model_name_or_path": ("llama",), "tokenizer_name": ("llama",), "output_dir": ("run", "runs/a"),
    "device": ("a100-80", "a100-40", "h100", "cpu"), "network": ("ib-400", "ethernet-10"), "plan_for": ("a100-80",),
    "sweep_tasks": ("rte", "sst2"), "sweep_seeds": ("0", "1"), "nvme_path": ("folder",), "run": ("folder", "gone"),
}  # fmt: skip
_APART = ("config", "debug", "dry_run")  # one is added where there is YAML, one shows tracebacks, one stays on
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2.5, 1e400, "", "two", [], [1, 2], ["q_proj"], {}, {"a": 1}, "2024-01-01", "1e-3",
)  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One call of a script, which its number alone decides."""

    script: str
    flags: list[str]
    configuration: str | None = None

    def __str__(self) -> str:
        text = "" if self.configuration is None else f"\nrun.yaml: {self.configuration!r}"
        return f"launch/{self.script}.py {shlex.join(self.flags)}{text}"


def make_desk(folder: Path) -> None:
    """Put into a folder what flags can name: a model, rows, links that lead nowhere, files that are empty or cut."""
    tiny_models.save(tiny_models.llama(), folder / "llama")
    write_splits(folder, 8, 8)
    for name in ("empty.jsonl", "empty.yaml"):
        (folder / name).touch()
    (folder / "cut.jsonl").write_text('{"prompt": "a", "compl')
    (folder / "cut.json").write_text('{"zero_optimization": {')
    (folder / "list.json").write_text("[1]")
    (folder / "folder").mkdir()
    (folder / "here").symlink_to("gone")
    (folder / "round").symlink_to("round")


def attempt(seed: int, number: int) -> Attempt:
    """Return the call of this number."""
    draw = random.Random(f"{seed}/{number}")
    name = draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    script = SCRIPTS[name]
    hints = {key: hint for group in script.groups for key, hint in get_type_hints(group).items()}
    known = [entry.name for group in script.groups for entry in dataclasses.fields(group) if entry.name not in _APART]
    chosen = draw.sample(known, draw.choice((1, 1, 1, 2, 2, 3, 5, 9)))
    in_yaml = draw.choice((0.0, 0.0, 1.0, 0.5))
    there = {key for key in chosen if draw.random() < in_yaml}
    flags = [word for key in chosen if key not in there for word in _as_flag(draw, key, hints[key])]
    flags = [*draw.choices(list(_BEFORE), list(_BEFORE.values()))[0].split(), *script.always, *flags]
    if not there:
        return Attempt(name, flags)
    return Attempt(name, [*flags, "--config", "run.yaml"], _as_yaml(draw, {key: hints[key] for key in there}))


def _as_flag(draw: random.Random, name: str, hint: Any) -> list[str]:
    if draw.random() < 0.02:
        name = draw.choice(
            (name[:-1], name.upper(), name.replace("_", "-"), f"{name}s", "lr", "no_" + name, "deepspeed")
        )
    kind = _kind(hint)
    if kind is bool:
        word = draw.choice((None, None, "true", "False", "0", "yes", "maybe", "", "2"))
        return [draw.choice((f"--{name}", f"--no_{name}"))] if word is None else [f"--{name}", word]
    values = [
        _word(draw, name, kind) for _ in range(draw.choice((1, 1, 1, 0, 2)) if kind not in (int, float, str) else 1)
    ]
    return [f"--{name}={values[0]}"] if values and draw.random() < 0.1 else [f"--{name}", *values]


def _word(draw: random.Random, name: str, kind: Any) -> str:
    if name in _MEANT and draw.random() < 0.4:
        return draw.choice(_MEANT[name])
    if kind is int or kind == list[int]:
        return draw.choice(_WHOLE if draw.random() < 0.7 else _NOT_WHOLE)
    if kind is float:
        return draw.choice(_REAL if draw.random() < 0.7 else _NOT_REAL)
    return draw.choice(_TEXTS)


def _as_yaml(draw: random.Random, hints: dict[str, Any]) -> str:
    values = {}
    for name, hint in hints.items():
        kind = _kind(hint)
        word = draw.random() < 0.05 if kind is bool else draw.random() < 0.7
        values[name] = _plain(_word(draw, name, kind)) if word else draw.choice((*_ODD, True, False))
    text = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5)
    if draw.random() < 0.1:  # a slip of the finger
        at = draw.randrange(len(text) + 1)
        text = (
            text[:at] + draw.choice(("", ":", "\t", "[", "*a ", "&a ", "- ", "!!python/x ", "\n", "#")) + text[at + 1 :]
        )
    return text


def _plain(word: str) -> Any:
    """Return what YAML makes of a word that a person writes without quotes."""
    try:
        return yaml.safe_load(word)
    except (yaml.YAMLError, ValueError):
        return word


def _kind(hint: Any) -> Any:
    if hint in (list[str], list[int]):
        return hint
    return next((one for one in get_args(hint) if one is not type(None)), hint)


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def faults(desk: Path, tried: Attempt) -> list[str]:
    """Make the call in the desk's folder, which is the current one, and return what is wrong with how it ended."""
    if tried.configuration is not None:
        (desk / "run.yaml").write_bytes(tried.configuration.encode("utf-8", "surrogatepass"))
    script, before = SCRIPTS[tried.script], _names(desk)
    with _in_time():
        finished = script.run(tried.flags)
    new = sorted(_names(desk) - before)
    found = [f"exit code {finished.code}: {finished.err[-3000:]}"] if finished.code not in (0, 2) else []
    if finished.code == 2:
        found += [f"not one line of error: {finished.err[-3000:]}"] if len(finished.errors) != 1 else []
        found += (
            [f"more than the error: {finished.err[-3000:]}"] if finished.err.splitlines() != finished.errors else []
        )
        found += [f"Python's words: {line}" for line in finished.errors if _PYTHON.search(line) or len(line) > 600]
    if new and (finished.code or not script.writes):
        found.append(f"left behind: {', '.join(new)}")
    for name in reversed(new):
        path = desk / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return found


def _names(desk: Path) -> set[str]:
    return {str(path.relative_to(desk)) for path in desk.rglob("*")}
