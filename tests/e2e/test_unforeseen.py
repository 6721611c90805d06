"""A bug inside any verb ends in one line that says so, with a file for whoever mends it, and nothing half-written."""

from pathlib import Path
from typing import NoReturn

import pytest
from launching import Finished, call_main
from mistakes import GOOD, contents

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# verb: a function that it calls. Those of a finished run and of a run under way leave the file in its folder.
POINTS = {
    "train": "taso_ds.runs.train.open_job",
    "train --dry_run": "taso_ds.runs.dry_run.describe",
    "calibrate": "taso_ds.runs.calibrate.open_job",
    "plan": "taso_ds.planning.report_text.describe_forecast",
    "slurm": "taso_ds.batch_script.batch_script",
    "doctor": "taso_ds.doctor.examine.examine",
    "demo": "subprocess.run",
}
OVER_RUNS = {
    "evaluate": "taso_ds.runs.finished.load_base",
    "export": "taso_ds.runs.finished.load_base",
    "export --merge": "taso_ds.runs.finished.merge_adapter",
}


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the machine."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def break_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> NoReturn:
        raise RuntimeError("the cat ate it")

    monkeypatch.setattr(point, fail)


def check(finished: Finished, file: Path) -> None:
    (line,) = finished.errors
    assert finished.code == 1
    assert "Traceback" not in finished.err
    assert line.startswith("error: RuntimeError: the cat ate it: not foreseen, so a bug of taso_ds or of a library")
    assert f"traceback: {file}" in line
    assert 'raise RuntimeError("the cat ate it")' in file.read_text()


@pytest.mark.parametrize("verb", POINTS)
def test_a_bug_is_one_line(
    verb: str, llama_folder: Path, desk: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *flags = verb.split()
    break_at(POINTS[verb], monkeypatch)
    good = [] if script in ("doctor", "demo") else GOOD.format(llama=llama_folder).split()
    before = contents(desk)
    finished = call_main(script, [*good, *flags])
    (file,) = temporary.glob("taso-traceback-*-rank0.txt")
    check(finished, file)
    assert contents(desk) == before


def test_a_bug_in_a_run_leaves_its_traceback_beside_it(
    llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    """The same command goes on afterwards, once the bug is gone."""
    good = GOOD.format(llama=llama_folder).split()
    with monkeypatch.context() as broken:
        break_at("taso_ds.training.trainer.Trainer.step", broken)
        finished = call_main("train", good)
    (file,) = (desk / "run").glob("traceback-*-rank0.txt")
    check(finished, file.relative_to(desk))
    assert call_main("train", good).succeeded().lines[-1] == "RUN run"
    for verb, point in OVER_RUNS.items():
        script, *flags = verb.split()
        file.unlink()
        before = contents(desk)
        with monkeypatch.context() as broken:
            break_at(point, broken)
            finished = call_main(script, ["--run", "run", *flags])
        (file,) = (desk / "run").glob("traceback-*-rank0.txt")
        check(finished, file.relative_to(desk))
        assert contents(desk).keys() - before.keys() == {file}
    assert not list(temporary.iterdir())
