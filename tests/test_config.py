"""The same arguments as flags, as YAML and as recorded in run.json: one configuration, whatever the values."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taso_ds.batch_script import SlurmArguments
from taso_ds.config import GROUPS, RunConfig, parse_run_config
from taso_ds.doctor.arguments import DoctorArguments, parse_doctor
from taso_ds.errors import UserError
from taso_ds.flags.command_line import debug_is_on, given_names, parse_groups
from taso_ds.flags.file import read_yaml, typed
from taso_ds.flags.flag import flags_of
from taso_ds.planning.arguments import PlanArguments
from taso_ds.runs.finished_arguments import FinishedArguments
from taso_ds.runs.recorded import differences
from taso_ds.scoring.arguments import SCORING

# \r is refused, and U+0085 is a line break that PyYAML writes as it is and reads as a space.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\x85"), max_size=20)
# A dash at the start is a flag to argparse, "~" a home folder, "$" a variable, and an empty text nothing.
names = words.filter(lambda text: text.strip() and not text.startswith(("-", "~")) and "$" not in text)
shares = st.floats(1e-6, 1.0)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "model_name_or_path": names, "load_in_4bit": st.booleans(), "task": names, "max_seq_length": st.integers(2, 2**40),
    "use_chat_template": st.booleans(), "calibration_samples": st.integers(1, 2**40),
    "importance": st.sampled_from(("importance", "magnitude", "gradient", "random")), "element_fraction": shares,
    "core_fraction": shares, "rank": st.integers(1, 64), "alpha": st.floats(1e-6, 1e6),
    "rho": st.sampled_from(("mask", "parameters", "off", "0.5")),
    "target_modules": st.lists(names, min_size=1, max_size=3), "learning_rate": st.floats(1e-9, 1e30),
    "max_steps": st.integers(1, 2**40), "bf16": st.booleans(), "seed": st.integers(0, 2**32 - 1), "output_dir": names,
}  # fmt: skip


def as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags += [f"--{name}", str(value).lower()]
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def groups_of(config: RunConfig) -> list[dict[str, Any]]:
    return [group for group in dataclasses.asdict(config).values() if isinstance(group, dict)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries({}, optional=ARGUMENTS))
def test_flags_yaml_and_a_recorded_run_say_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    from_flags = parse_run_config(as_flags(values))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    assert parse_run_config(["--config", str(path)] if values else []) == dataclasses.replace(
        from_flags, run=dataclasses.replace(from_flags.run, config=str(path) if values else None)
    )
    parsed = {name: value for group in groups_of(from_flags) for name, value in group.items()}
    assert {name: parsed[name] for name in values} == values
    recorded = json.loads(json.dumps(from_flags.flags()))
    again = RunConfig(*parse_groups(GROUPS, [], description="", defaults=typed(recorded, GROUPS, "run.json")))
    assert again.flags() == from_flags.flags()


def test_flags_go_before_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rank: 2\nseed: 3\n")
    config = parse_run_config(["--config", str(tmp_path / "run.yaml"), "--rank", "5"])
    assert (config.adapter.rank, config.run.seed) == (5, 3)


def test_a_file_that_can_be_read_once_only_is_refused(tmp_path: Path) -> None:
    """Whoever reads it second, another rank or a second look of this one, would find nothing in it."""
    os.mkfifo(tmp_path / "run.yaml")
    flags = ["--config", str(tmp_path / "run.yaml")]
    assert not debug_is_on(flags)  # and it does not wait for a writer
    with pytest.raises(UserError, match=r"run\.yaml is a pipe or a device"):
        parse_run_config(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "1e39"], "alpha: 1e\\+39 is not within the range of fp32"),
        (["--max_steps", str(2**63)], "max_steps: 9223372036854775808 is not within 64 bits"),
        (["--task", "a\0b"], "task: .* is not UTF-8 text without null characters"),
        (["--task", "\udcff"], r"task: '\\udcff' is not UTF-8 text"),
        (["--data_dir", "ä" * 128], "data_dir: .* is not short enough for a path"),
    ],
)
def test_values_that_nothing_can_hold_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_run_config(flags)


def test_the_longest_names_a_disk_can_hold_are_taken() -> None:
    path = "/".join(["x" * 255] * 15)
    assert parse_run_config(["--data_dir", path]).data.data_dir == path


def test_flags_that_are_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("calibration_passes: 1\n")
    found = given_names(["--ds-config", "zero3.json", "--no_bf16", "--rank=2", "--config", str(file), "-1"])
    assert {"ds_config", "bf16", "rank", "calibration_passes"} <= found
    assert "zero3.json" not in found
    assert "load_in_4bit" not in found


@pytest.fixture
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


ALL_GROUPS = (*GROUPS, FinishedArguments, PlanArguments, SlurmArguments, DoctorArguments)
PATH_FLAGS = [name for name, flag in flags_of(ALL_GROUPS).items() if flag.is_path]


def test_every_flag_that_names_a_place_is_a_path() -> None:
    """By its help text; a flag that comes later is not forgotten."""
    places = re.compile(r"\b([Ff]olders?|[Ff]iles?|JSONL?|YAML|PNG|hostfile|safetensors)\b")
    named = {name for name, flag in flags_of(ALL_GROUPS).items() if places.search(flag.help)}
    no_places = {"gguf_file", "overwrite_output_dir", "gpus_per_node"}  # inside the base; a switch; a number
    assert named - no_places == {*PATH_FLAGS}


@pytest.mark.usefixtures("_home")
@pytest.mark.parametrize("name", PATH_FLAGS)
def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, name: str) -> None:
    group = next(group for group in ALL_GROUPS if name in flags_of([group]))
    if name == "config":
        (tmp_path / "x").write_text("rank: 2\n")
    (tmp_path / "run.yaml").write_text(f"{name}: ~/x\n")
    sources = [[f"--{name}=~/x"], [f"--{name}", "~/x"], *([] if name == "config" else [["--config", "~/run.yaml"]])]
    for argv in sources:
        groups = GROUPS if group in GROUPS else (*GROUPS, group)
        if group is DoctorArguments:
            found: Any = parse_doctor(argv)[0] if argv[0] != "--config" else None
        else:
            found = next(one for one in parse_groups(groups, argv, description="") if type(one) is group)
        assert found is None or getattr(found, name) == str(tmp_path / "x"), argv


@pytest.mark.usefixtures("_home")
def test_nothing_else_is_expanded() -> None:
    assert parse_run_config(["--task", "~/x"]).data.task == "~/x"
    assert parse_run_config(["--train_file", "a/~"]).data.train_file == "a/~"
    assert parse_run_config(["--train_file", "~nobody-here/x"]).data.train_file == "~nobody-here/x"


@pytest.mark.parametrize(
    ("group", "name"),
    [(PlanArguments, "json"), (PlanArguments, "plot"), (SlurmArguments, "write"), (DoctorArguments, "json")],
)
def test_a_file_that_a_flag_names_is_not_written_over(tmp_path: Path, group: Any, name: str) -> None:
    group(**{name: str(tmp_path / "new")})
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match=f"{name}: .*/old exists already; move it away, or choose another name"):
        group(**{name: str(tmp_path / "old")})


def test_with_a_region_file_nothing_is_recorded_that_it_says() -> None:
    scored, read = (parse_run_config(["--importance", "random", *more]) for more in ([], ["--core_regions", "F"]))
    assert scored.flags().keys() - read.flags().keys() == set(SCORING)
    assert scored.flags()["importance"] == "random"
    assert differences({"config": read.flags() | {"importance": "importance"}}, read, Path("run.json")) == []


def test_what_was_given_is_known_whether_it_is_the_default_or_not(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rank: 1")
    config = parse_run_config(["--config", str(tmp_path / "run.yaml"), "--importance=importance", "--no_bf16"])
    assert {"rank", "importance", "bf16"} <= config.given
    assert "seed" not in config.given


def test_a_configuration_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rank: 2", encoding="utf-16")
    with pytest.raises(UserError, match=r"run\.yaml: it is not UTF-8 text \(byte 0xff at 0\): save it as UTF-8$"):
        read_yaml(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("model_revision: 007", "model_revision", "007"),
        ("model_revision: 2024-01-01", "model_revision", "2024-01-01"),
        ("output_dir: 1.10", "output_dir", "1.10"),
        ("seed: 010", "seed", 10),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("bf16: 'off'", "bf16", False),
        ("rho: off", "rho", "off"),
        ("target_modules: q_proj", "target_modules", ["q_proj"]),
        ("sweep_seeds: [0, 1]", "sweep_seeds", [0, 1]),
        ("save_minutes: null", "save_minutes", None),
    ],
)
def test_yaml_says_what_the_command_line_would(text: str, name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    values = typed(read_yaml(str(tmp_path / "run.yaml")), (*GROUPS, SlurmArguments), "run.yaml")
    assert values == {name: value}


def test_the_doctor_takes_dashes() -> None:
    arguments, others = parse_doctor(["--gpus-per-node", "4", "--max-steps", "3"])
    assert arguments.gpus_per_node == 4
    assert others == ["--max-steps", "3"]
