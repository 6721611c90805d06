"""Which folder a run gets, and who may write where."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from other_process import holding

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.errors import UserError
from taso_ds.runs.folder import PARTIAL, RESULTS, RUN, RunFolder
from taso_ds.runs.output_folder import check_no_model, choose_folder, take_folder
from taso_ds.runs.run_lock import LOCK


def config_of(path: Path | None, *flags: str) -> RunConfig:
    where = [] if path is None else ["--output_dir", str(path)]
    return parse_run_config(["--model_name_or_path", "base", "--task", "rte", *where, *flags])


def write_run(path: Path, *flags: str, finished: bool = False, **record: Any) -> Path:
    """A folder with the training run of these flags in it."""
    folder = RunFolder(path)
    folder.start()
    folder.write_json(RUN, {"config": config_of(path, *flags).flags(), "batch": {}, "steps": 6, **record})
    if finished:
        folder.write_json(RESULTS, {"steps": 6})
    return path


# Who may write where --------------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_taken_and_not_created_yet(tmp_path: Path) -> None:
    assert choose_folder(config_of(tmp_path / "a" / "b"), goes_on=True) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    assert choose_folder(config_of(tmp_path / "empty"), goes_on=True) == tmp_path / "empty"


def test_the_same_run_may_be_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "--learning_rate", "1e-3", "--target_modules", "q_proj")
    again = config_of(tmp_path / "run", "--learning_rate", "1e-3", "--target_modules", "q_proj", "--debug")
    assert choose_folder(again, goes_on=True) == tmp_path / "run"  # how it is started is no difference


def test_what_a_run_left_before_its_first_record_is_no_hindrance(tmp_path: Path) -> None:
    for name in (LOCK, PARTIAL, f".{PARTIAL}.tmp"):
        (tmp_path / name).write_text("...")
    assert choose_folder(config_of(tmp_path), goes_on=True) == tmp_path


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        choose_folder(config_of(tmp_path), goes_on=True)
    with pytest.raises(UserError, match="is a file"):
        choose_folder(config_of(tmp_path / "thesis.tex"), goes_on=True)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write"):
        choose_folder(config_of(tmp_path / "locked" / "run"), goes_on=True)


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        choose_folder(config_of(tmp_path / "file" / "run"), goes_on=True)


# Without a name -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def chosen(*flags: str, goes_on: bool = True) -> str:
    return str(choose_folder(config_of(None, *flags), goes_on=goes_on))


@pytest.mark.usefixtures("runs")
def test_without_a_name_the_first_free_one() -> None:
    found = []
    for _ in range(3):
        found.append(chosen())
        Path(found[-1]).mkdir(parents=True)
    assert found == ["runs/taso-rte", "runs/taso-rte-2", "runs/taso-rte-3"]
    assert chosen("--method", "lora") == "runs/lora-rte"


def test_a_folder_in_which_a_run_was_killed_before_it_wrote_is_free(runs: Path) -> None:
    (runs / "taso-rte").mkdir(parents=True)
    (runs / "taso-rte" / LOCK).write_text("{")
    with holding(runs / "taso-rte"):
        assert chosen() == "runs/taso-rte-2"
    (runs / "taso-rte" / LOCK).write_text("{")
    assert chosen() == "runs/taso-rte"
    with ExitStack() as held:
        assert take_folder(config_of(None), held, goes_on=True) == runs / "taso-rte"
    (runs / "taso-rte" / LOCK).write_text("{")
    (runs / "taso-rte" / PARTIAL).write_text("...")
    assert chosen() == "runs/taso-rte-2", "its scores may be those of other flags"


def test_the_newest_unfinished_run_of_the_configuration_goes_on(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(runs / "taso-rte", finished=True)
    write_run(runs / "taso-rte-2")
    write_run(runs / "taso-rte-9")
    write_run(runs / "taso-rte-10", "--logging_steps", "5")  # harmless
    write_run(runs / "taso-rte-11", "--seed", "1")
    write_run(runs / "taso-rte-12").joinpath(RUN).write_text("{")
    write_run(runs / "taso-rte-x")
    with caplog.at_level(logging.INFO, "taso_ds"):
        assert chosen() == "runs/taso-rte-10"
    said = "output_dir: goes on in runs/taso-rte-10, the newest unfinished run of this configuration"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert chosen("--seed", "1") == "runs/taso-rte-11"
    for flags in (("--resume", "none"), ("--overwrite_output_dir",), ("--seed", "2")):
        assert chosen(*flags) == "runs/taso-rte-3", flags
    assert chosen(goes_on=False) == "runs/taso-rte-3", "calibrate goes on with nothing"


def test_a_finished_run_is_said_and_another_one_begins(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(runs / "taso-rte", finished=True)
    with caplog.at_level(logging.INFO, "taso_ds"):
        assert chosen() == "runs/taso-rte-2"
    assert [record.getMessage() for record in caplog.records] == ["output_dir: runs/taso-rte holds this run, finished"]
    write_run(runs / "taso-rte-2", finished=True, steps=12)  # it is being extended
    assert chosen() == "runs/taso-rte-2"


@pytest.mark.usefixtures("runs")
def test_core_regions_alone_are_no_training_run() -> None:
    folder = RunFolder(Path("runs/taso-rte"))
    folder.start()
    folder.write_json(RUN, {"config": config_of(None).flags()})
    assert chosen() == "runs/taso-rte-2"


def test_a_run_in_use_is_not_gone_on_with(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(runs / "taso-rte")
    with caplog.at_level(logging.INFO, "taso_ds"), holding(runs / "taso-rte") as process:
        assert chosen() == "runs/taso-rte-2"
        assert f"runs/taso-rte holds this run, in use by process {process.pid} on" in caplog.text
        with pytest.raises(UserError, match=f"runs/taso-rte is in use by process {process.pid} on"):
            choose_folder(config_of(runs / "taso-rte"), goes_on=True)
    assert chosen() == "runs/taso-rte"


def test_two_that_start_at_once_get_two_folders(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((runs / "taso-rte", runs / "taso-rte-2"))
    monkeypatch.setattr("taso_ds.runs.output_folder.choose_folder", lambda *_, **__: next(free))
    (runs / "taso-rte").mkdir(parents=True)  # the other one is faster
    with ExitStack() as held:
        assert take_folder(config_of(None), held, goes_on=True) == runs / "taso-rte-2"


# A merged model -------------------------------------------------------------------------------------------------------


def test_a_model_is_not_merged_over_another_one(tmp_path: Path) -> None:
    check_no_model(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"merge: .*/model exists already; move it away, or delete it"):
        check_no_model(tmp_path)
