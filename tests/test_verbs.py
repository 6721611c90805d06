"""``taso VERB``: one command for all scripts, and what a printed command is for whoever reads it."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

import taso_ds
from taso_ds.__main__ import main
from taso_ds.flags.verbs import VERBS, as_started, command, launched, program


def taso(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", "-m", "taso_ds", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), timeout=120)


def test_every_script_but_the_demo_is_a_verb() -> None:
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "demo"}
    assert scripts == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_waits_for_no_library(verb: str, tmp_path: Path) -> None:
    done = taso(verb, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: taso {verb} [flags]\n")
    assert "launch/" not in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "taso_ds.flags.help" in loaded
    assert not {"torch", "transformers", "deepspeed", "numpy"} & loaded


def test_taso_lists_its_verbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "taso"), "--help"])
    main()
    text = capsys.readouterr().out
    for verb in VERBS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {verb} ")]
        assert len(line.split()) > 5
    monkeypatch.setattr(sys, "argv", ["taso"])
    main()
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys, "argv", ["taso", "--version"])
    main()
    assert capsys.readouterr().out == f"taso_ds {taso_ds.__version__}\n"


@pytest.mark.parametrize(("word", "nearest"), [("trian", " (nearest: 'train')"), ("--rank", "")])
def test_a_verb_that_is_none(
    word: str, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["taso", word])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {word!r} is no verb{nearest}; taso --help lists them\n"


@pytest.mark.parametrize("name", ["taso", "taso-plan", "taso_ds/__main__.py", "taso_ds/launch/plan.py"])
def test_who_has_no_checkout_reads_of_commands(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("taso_ds.flags.verbs.__file__", str(tmp_path / "taso_ds" / "verbs.py"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / name)])
    assert (command("plan"), launched("train")) == ("taso plan", "--module taso_ds.launch.train")
    assert as_started("python launch/plan.py -x") == "taso plan -x"
    assert as_started("deepspeed launch/train.py -x") == "deepspeed --module taso_ds.launch.train -x"
    assert as_started("in launch/train.py, once") == "in taso train, once"


@pytest.mark.parametrize(
    ("typed", "folder"), [("launch/plan.py", "."), ("plan.py", "launch"), ("../launch/plan.py", "docs")]
)
def test_who_runs_a_script_reads_of_its_neighbours(typed: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, "argv", [typed])
    train = typed.replace("plan", "train")
    assert (program(), command("train"), launched("train")) == (typed, train, train)
    assert as_started("python launch/train.py -x\ndeepspeed launch/train.py") == f"python {train} -x\ndeepspeed {train}"
