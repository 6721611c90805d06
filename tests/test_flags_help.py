"""What ``--help`` says: true, in groups, what matters first; and the page of all flags, which says the same."""

import re
from collections.abc import Sequence
from typing import Any

import flags_page
import pytest
from launching import ROOT, Finished, call_main

from taso_ds.config import GROUPS
from taso_ds.flags.command_line import parse_groups
from taso_ds.flags.flag import flags_of
from taso_ds.flags.help import section_of, sections
from taso_ds.flags.verbs import VERBS

HIDDEN = {name for name, flag in flags_of(GROUPS).items() if flag.is_hidden}


def help_of(capsys: pytest.CaptureFixture[str], flags: Sequence[str], **more: Any) -> str:
    with pytest.raises(SystemExit) as left:
        parse_groups(GROUPS, flags, description="Train.\n\npython a.py\npython b.py\n", **more)
    assert left.value.code == 0
    return capsys.readouterr().out


def shown(text: str) -> set[str]:
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_the_help_is_true_and_keeps_commands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, ["--help_all"])
    assert "\npython a.py\npython b.py\n" in text
    assert "--bf16, --no_bf16 " in text
    assert "None" not in text
    assert "(default: 0.05)" in text
    assert "(default: off)" in text
    assert "(default: on)" in text
    assert "--max_seq_length TOKENS " in text
    assert "--target_modules NAME ... " in text


def test_ten_flags_come_first_and_all_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    short, whole = help_of(capsys, ["--help"]), help_of(capsys, ["--rank", "2", "--help-all"])
    assert len(shown(short)) == 10
    assert "--help_all shows all " in short
    assert {"fp16", "local_rank"} == HIDDEN
    assert shown(whole) == flags_of(GROUPS).keys() - HIDDEN
    titles = [section.title for section in sections(GROUPS, whole=True)]
    assert [line for line in whole.splitlines() if line.endswith(":") and line[0] != " "] == [f"{t}:" for t in titles]
    lines = [line.name for section in sections(GROUPS, whole=True) for line in section.lines]
    assert len(lines) == len(set(lines))


def test_help_is_not_asked_where_flags_are_right_or_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(help_of(capsys, ["--no_such_flag", "--rank", "0", "-h"]))


def test_only_one_rank_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert help_of(capsys, ["--help"]) == ""


@pytest.fixture(scope="module")
def helps() -> dict[str, Finished]:
    return {verb: call_main(verb, ["--help_all"]).succeeded() for verb in VERBS}


def test_a_verb_shows_what_acts_there(helps: dict[str, Finished]) -> None:
    every = flags_of(GROUPS).keys() - HIDDEN
    assert all(every <= shown(helps[verb].out) for verb in ("train", "calibrate", "plan", "doctor", "slurm"))
    assert {"run", "task", "max_new_tokens"} <= shown(helps["evaluate"].out)
    assert not {"merge", "rank", "output_dir"} & shown(helps["evaluate"].out)
    assert {"run", "merge"} <= shown(helps["export"].out)
    assert "max_new_tokens" not in shown(helps["export"].out)


def test_the_page_of_flags_is_what_the_dataclasses_say() -> None:
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags_page.page(), "python benchmarks/flags_page.py > docs/flags.md"
    titles = [f"## {section.title}\n" for section in sections(GROUPS, whole=True)]
    assert page.startswith("# Flags\n")
    assert all(title in page for title in titles)


def test_every_number_says_what_it_counts() -> None:
    """Unless it is a number of nothing, like a factor or a seed."""
    plain = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"}
    plain |= {"rank", "alpha", "seed", "max_loss_jump"}
    groups = [*GROUPS, *(group for _, group in flags_page.OWN)]
    lines = [line for group in groups for line in section_of(group).lines]
    assert {line.name for line in lines if line.value == "number"} == plain
