"""How every script begins, what it says when it ends before its time, and with which exit code."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import environment

from taso_ds.flags.command_line import debug_is_on

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = """
from taso_ds.entry import run_script

def huge(_) -> str:
    import torch
    kept = torch.ones(1 << 26, dtype=torch.uint8)
    rollup = open("/proc/self/smaps_rollup").read()
    return rollup.split("AnonHugePages:")[1].split()[0]

run_script(huge)
"""


@pytest.mark.skipif(
    not SETTING.is_file() or "[madvise]" not in SETTING.read_text(), reason="huge pages are not for those who ask"
)
@pytest.mark.parametrize(
    ("given", "at_least", "at_most"), [({}, 1 << 15, 1 << 17), ({"THP_MEM_ALLOC_ENABLE": "0"}, 0, 0)]
)
def test_host_tensors_lie_in_huge_pages_unless_the_user_says_no(
    given: dict[str, str], at_least: int, at_most: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | given
    done = subprocess.run([sys.executable, "-c", HUGE], env=environment, capture_output=True, text=True, check=True)
    assert at_least <= int(done.stdout.split()[-1]) <= at_most, done.stdout  # kB


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Tests that run in the background of a shell ignore SIGINT, and so would their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def program(*lines: str, resumes: bool = True, before: str = "") -> list[str]:
    """Return the command of a script that does what ``lines`` say."""
    body = "\n    ".join(lines)
    text = f"import hashlib, os, sys, time\n{before}\nfrom taso_ds.entry import run_script\n"
    text += f"def action(interrupts):\n    {body}\nrun_script(action, resumes={resumes})\n"
    return [sys.executable, "-c", text]


def struck(command: list[str], *numbers: int, **variables: str) -> tuple[int, list[str]]:
    """Send signals to a process, one for each line that it prints; returns its exit code and what it said."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | variables
    )
    assert process.stdout is not None
    for number in numbers:
        process.stdout.readline()
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, [line for line in err.splitlines() if line]


# An import that takes its time, inside one of the many that pass over a library that cannot be loaded.
LOADING = ("try:", "    print(flush=True)", "    time.sleep(30)", "except Exception:", "    pass", "time.sleep(30)")
# Nothing of Python runs here, and no signal is looked at.
NATIVE = ("print(flush=True)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")


@pytest.mark.parametrize(
    ("number", "resumes", "code"),
    [
        (signal.SIGTERM, True, 75), (signal.SIGUSR1, True, 75), (signal.SIGINT, True, 75), (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 75),
    ],
)  # fmt: skip
def test_a_signal_while_libraries_load(number: signal.Signals, resumes: bool, code: int) -> None:
    how = "goes on from what is saved" if resumes else "starts anew"
    said = [f"stopped by {number.name}; the same command {how}"]
    assert struck(program(*LOADING, resumes=resumes), number) == (code, said)


def test_a_rank_that_does_not_speak_leaves_in_silence() -> None:
    assert struck(program(*LOADING), signal.SIGTERM, RANK="1", WORLD_SIZE="2") == (75, [])


def test_a_signal_while_a_library_waits() -> None:
    command = program(*NATIVE, before="from taso_ds import interrupts; interrupts._PATIENCE = 0.5")
    assert struck(command, signal.SIGTERM) == (75, ["stopped by SIGTERM; the same command goes on from what is saved"])


def test_another_signal_does_not_use_up_the_patience() -> None:
    """The main thread has its seconds from the first signal that asks it to stop."""
    before = "import signal; from taso_ds import interrupts; interrupts._PATIENCE = 1"
    before += "; signal.signal(signal.SIGALRM, lambda *_: None)"
    lines = ("signal.alarm(1)", "time.sleep(2.5)", "try:", "    print(flush=True)", "    time.sleep(30)")
    command = program(*lines, "finally:", "    time.sleep(0.5)", "    os.write(2, b'tidied up\\n')", before=before)
    said = ["tidied up", "stopped by SIGTERM; the same command goes on from what is saved"]
    assert struck(command, signal.SIGTERM) == (75, said)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    """While training, where the first is remembered and its echo from the launcher counts for nothing."""
    lines = ("print(flush=True)", "time.sleep(0.2)", "print(flush=True)", "time.sleep(1.5)", *NATIVE)
    command = program(
        "with interrupts.deferred():",
        *(f"    {line}" for line in lines),
        before="from taso_ds import interrupts; interrupts._ECHO = 1.0",
    )
    code, said = struck(command, signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert said == [
        "SIGINT: saves after this step; Ctrl-C again leaves at once",
        "stopped by a second SIGINT; what was not saved yet is lost",
    ]


def test_a_signal_after_the_last_step_counts_when_training_ends() -> None:
    command = program("with interrupts.deferred():", "    print(flush=True)", "    time.sleep(0.5)", "time.sleep(30)")
    assert struck(command, signal.SIGTERM)[0] == 75


def test_what_the_shell_ignores_stays_ignored() -> None:
    before = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert struck(program("print(flush=True)", "time.sleep(0.5)", before=before), signal.SIGINT) == (0, [])


def test_a_forked_child_is_not_ours() -> None:
    """Its signals are its own: SIGTERM ends it, and the script goes on."""
    lines = ("child = os.fork()", "if not child:", "    time.sleep(30)", "time.sleep(0.2)", "os.kill(child, 15)")
    command = program(*lines, "return str(os.waitpid(child, 0)[1])")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGTERM)}\n", "")


# What the user may not read -------------------------------------------------------------------------------------------


def test_a_file_that_is_not_open_to_the_user(tmp_path: Path) -> None:
    """Where it is asked for first does not matter; what no file is to blame for is a bug all the same."""
    done = run(program("raise PermissionError(13, 'Permission denied', 'base/config.json')"), tmp_path)
    said = "error: cannot reach base/config.json (Permission denied): name another path, or have it and its folders"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{said} opened to you\n")
    assert not list(tmp_path.iterdir())
    done = run(program("raise PermissionError(1, 'Operation not permitted')"), tmp_path)
    assert (done.returncode, "not foreseen" in done.stderr) == (1, True)


# What nobody foresaw --------------------------------------------------------------------------------------------------


def run(command: list[str], temporary: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    variables = environment() | {"TMPDIR": str(temporary)}
    return subprocess.run([*command, *flags], capture_output=True, text=True, env=variables, check=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise RuntimeError('the cat\\nate it')", "RuntimeError: the cat: not foreseen, so a bug of taso_ds or of"),
        ("raise KeyError", "KeyError: not foreseen"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: not foreseen"),
        ("action(action)", "RecursionError: maximum recursion depth exceeded: not foreseen"),
        ("raise MemoryError", "out of memory (MemoryError); lower --per_device_train_batch_size"),
        ("import torch; raise torch.OutOfMemoryError('2 GiB')", "out of memory (OutOfMemoryError: 2 GiB); lower"),
    ],
)  # fmt: skip
def test_what_nobody_foresaw_is_one_line_and_a_file(line: str, words: str, tmp_path: Path) -> None:
    done = run(program(line), tmp_path, "--flag", "a value")
    (said,) = done.stderr.splitlines()
    (file,) = tmp_path.glob("taso-traceback-*-rank0.txt")
    assert (done.returncode, done.stdout) == (1, "")
    assert said.startswith(f"error: {words}")
    assert f"traceback: {file}" in said
    text = file.read_text()
    assert "Traceback (most recent call last)" in text
    assert "command: -c --flag 'a value'" in text
    assert "taso_ds 0" in text


@pytest.mark.parametrize(
    ("flags", "shown"), [(["--debug"], True), (["--config", "on.yaml"], True), (["--debug", "False"], False)]
)
def test_debug_shows_the_traceback_too(
    flags: list[str], shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("on.yaml").write_text("debug: true")
    done = run(program("raise RuntimeError('the cat')"), tmp_path, *flags)
    assert done.stderr.startswith("Traceback") == shown
    assert done.stderr.splitlines()[-1].startswith("error: RuntimeError: the cat: not foreseen")


def test_without_room_for_the_file_the_line_says_how_to_see_the_traceback(tmp_path: Path) -> None:
    command = program("import tempfile; tempfile.tempdir = '/proc/none'; raise RuntimeError('the cat')")
    (said,) = run(command, tmp_path).stderr.splitlines()
    assert "traceback: with --debug" in said


def test_output_that_nobody_reads() -> None:
    """As behind ``| head -1``: no traceback; what still has something to do goes on."""
    lines = (
        "import logging",
        "log = logging.getLogger('taso_ds')",
        "for n in range(3): log.info('%d', n); time.sleep(.1)",
    )
    stopped = "stopped: nobody reads what it prints\n"
    for command, code, said in (
        (program(*lines, "return 'done'"), 0, ""),
        (program("while True: print('x' * 9999)"), 141, stopped),
        (program("print('x', flush=True)", "time.sleep(.3)", "return 'done'"), 0, ""),
    ):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        process.stderr.close()
        assert (process.wait(60), err) == (code, said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_into_a_file_on_a_full_disk() -> None:
    """The work is not lost with its log, and the log's loss is said once."""
    command = program(
        "import logging", "for n in range(3): logging.getLogger('taso_ds').info('%d', n)", "return 'done'"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    said = "stdout: No space left on device; what else is said there is lost, the work goes on\n"
    assert (done.returncode, done.stderr) == (0, said)


def test_a_current_folder_that_has_been_removed(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = program("return 'done'", before=f"os.chdir({str(folder)!r}); os.rmdir({str(folder)!r})")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the current folder has been removed: change to another one, and start again\n"


# The console ----------------------------------------------------------------------------------------------------------

WARNS = (
    "import logging, warnings",
    "warnings.warn('old', FutureWarning)",
    "logging.getLogger('library').warning('pip install it')",
    "logging.getLogger('library').error('broken')",
)


def test_libraries_are_heard_when_they_must_be_and_with_debug(tmp_path: Path) -> None:
    quiet, loud = run(program(*WARNS), tmp_path), run(program(*WARNS), tmp_path, "--debug")
    assert (quiet.stdout, quiet.stderr) == ("broken\n", "")
    assert loud.stdout == "pip install it\nbroken\n"
    assert "FutureWarning: old" in loud.stderr


@pytest.mark.parametrize(
    ("flags", "on"),
    [
        ("--debug", True), ("--debug --task x", True), ("--debug true", True), ("--debug False", False),
        ("--debug=no", False), ("--task debug", False), ("--config on.yaml", True),
        ("--config=on.yaml --debug false", False), ("--config off.yaml", False), ("--config broken.yaml", False),
        ("--config none.yaml", False), ("", False),
    ],
)  # fmt: skip
def test_the_configuration_says_whether_debug_is_on(
    flags: str, on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("on", "debug: true"), ("off", "debug: false\ntask: sst2"), ("broken", "debug: [")):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert debug_is_on(flags.split()) == on
