"""What reaches the console of a script, what goes to its log file instead, and what becomes of that file."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

# One script as it is run by a user, whose libraries say something in every way there is.
SCRIPT = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from taso_ds.console import screen as console
from taso_ds.entry import run_script
from taso_ds.errors import LibraryError, UserError

def noise(name):
    print("print", name)
    print("stderr", name, file=sys.stderr)
    os.write(1, f"descriptor 1 {name}\\n".encode())
    os.write(2, f"descriptor 2 {name}\\n".encode())
    subprocess.run(["echo", "child", name], check=True)
    for _ in range(3):
        warnings.simplefilter("always")
        warnings.warn(f"warning {name}")
    logging.getLogger("library").info("info %s", name)
    logging.getLogger("library").warning("caution %s", name)
    logging.getLogger("library").error("trouble %s", name)
    logging.getLogger("taso_ds.runs").debug("detail %s", name)

def action(_):
    noise("early")
    logging.getLogger("taso_ds.runs").info("ours")
    BODY
    return "RUN"

run_script(action, libraries_to_log=True)
"""
SAID = ["print", "stderr", "descriptor 1", "descriptor 2", "child", "warning", "caution"]
KEPT = 'console.keep_log(Path("log.txt"))'


def run(folder: Path, *body: str, flags: tuple[str, ...] = (), **variables: str) -> "subprocess.CompletedProcess[str]":
    (folder / "temporary").mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT.replace("BODY", "\n    ".join(body)))
    return subprocess.run(
        [sys.executable, "script.py", *flags], cwd=folder,
        env=environment() | {"TMPDIR": str(folder / "temporary")} | variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def temporary(folder: Path) -> list[Path]:
    return sorted((folder / "temporary").iterdir())


def test_the_console_is_ours_and_the_log_has_all(tmp_path: Path) -> None:
    """What was said before the file had its place is in it too; an error of a library is on the console as well."""
    done = run(tmp_path, KEPT, 'noise("late")')
    assert (done.returncode, done.stdout, done.stderr) == (0, "trouble early\nours\ntrouble late\nRUN\n", "")
    log = (tmp_path / "log.txt").read_text()
    for name in ("early", "late"):
        for said in (*SAID, "info", "trouble", "detail"):
            assert f"{said} {name}" in log
        assert log.count(f"UserWarning: warning {name}") == 1
    assert "INFO taso_ds.runs: ours" in log
    assert temporary(tmp_path) == []


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("of the first part\n")
    run(tmp_path, KEPT)
    first, *others = (tmp_path / "log.txt").read_text().splitlines()
    assert first == "of the first part"
    assert "print early" in others


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("pass", 0, ""),
        ('raise UserError("rank: no")', 2, "error: rank: no\n"),
        ("import signal; os.kill(os.getpid(), signal.SIGTERM)", 75,
         "stopped by SIGTERM; the same command starts anew\n"),
    ],
)  # fmt: skip
def test_a_log_that_is_nobodys_is_removed(body: str, code: int, err: str, tmp_path: Path) -> None:
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (code, err)
    assert temporary(tmp_path) == []


def test_debug_shows_everything(tmp_path: Path) -> None:
    done = run(tmp_path, KEPT, flags=("--debug",))
    for said in SAID:
        assert f"{said} early" in done.stdout + done.stderr
    assert not (tmp_path / "log.txt").exists()


def test_a_crash_names_the_log(tmp_path: Path) -> None:
    done = run(tmp_path, KEPT, 'raise RuntimeError("the cat ate it")')
    assert done.returncode == 1
    (report,) = temporary(tmp_path)
    assert f"traceback: {report}, what libraries said: log.txt; " in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_crash_before_there_is_a_folder_reports_what_libraries_said(tmp_path: Path) -> None:
    run(tmp_path, 'raise RuntimeError("the cat ate it")')
    (report,) = temporary(tmp_path)
    _, said = report.read_text().split("what libraries said last:")
    assert "descriptor 2 early" in said


def test_what_a_library_said_of_its_failure_is_shown(tmp_path: Path) -> None:
    done = run(tmp_path, 'os.write(2, b"cc: not found\\n")', 'raise LibraryError("no compiler")')
    assert done.returncode == 2
    *_, reason, line = done.stderr.splitlines()
    assert (reason, line) == ("  cc: not found", "error: no compiler")


def test_another_rank_adds_what_it_is_warned_of(tmp_path: Path) -> None:
    done = run(tmp_path, KEPT, RANK="3", WORLD_SIZE="4")
    assert (done.stdout, done.stderr) == ("trouble early\n", "")
    log = (tmp_path / "log.txt").read_text()
    assert "rank 3 WARNING library: caution early" in log
    assert "descriptor 2 early" in log
    assert "info early" not in log
    assert "ours" not in log


def test_no_room_for_the_log_is_no_trouble(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))"
    done = run(tmp_path, full, 'print("x" * 100)', KEPT, 'print("y" * 100)')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "RUN")


def test_no_place_for_the_log_is_no_trouble(tmp_path: Path) -> None:
    done = run(tmp_path, 'console.keep_log(Path("nowhere/log.txt"))')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "RUN")
    assert temporary(tmp_path) == []
