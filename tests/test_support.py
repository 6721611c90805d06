"""The support table of docs/models.md: it names every family, and says what the families say when they are tried."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, Family
from forked import ForkServer
from support_table import marks, put_into, read_marks, render
from support_trial import Desk, Failed, Trial, try_family

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "models.md"
# One whose forward does not call its base model, one whose layers differ, one whose layers are one.
SAMPLE = ("opt", "gemma3n_text", "albert")


def test_the_table_has_every_family() -> None:
    assert list(read_marks(DOCUMENT)) == [family.name for family in FAMILIES]
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[] if family.name in SAMPLE else [pytest.mark.slow])
        for family in FAMILIES
    ],
)
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_row_says_what_the_family_does(fork_server: ForkServer, family: Family, tmp_path: Path) -> None:
    row = try_family(fork_server, family, tmp_path)
    assert marks(row) == read_marks(DOCUMENT)[family.name], row["cells"]


class Server:
    """Answers every job with these exit codes, and leaves this on rank 1's stderr."""

    def __init__(self, codes: list[int], said: str) -> None:
        self.codes, self.said = codes, said

    def run(self, _argv: list[str], folder: Path, **_options: Any) -> dict[str, Any]:
        folder.mkdir()
        (folder / "rank0.out").write_text("RUN\n")
        (folder / "rank0.err").write_text("")
        (folder / "rank1.err").write_text(self.said)
        return {"codes": self.codes, "hung": False}


@pytest.mark.parametrize(
    ("codes", "said", "why"),
    [
        ([0, 2], "error: model: {path}/base is a whale\n", "model: …/base is a whale"),
        ([-11, 1], "", r"exit codes \[-11, 1\]"),
    ],
    ids=["error", "crash"],
)
def test_a_run_that_fails_is_a_no_with_its_line(codes: list[int], said: str, why: str, tmp_path: Path) -> None:
    desk: Any = Desk(Server(codes, said.format(path=tmp_path)), tmp_path, FAMILIES[0])  # type: ignore[arg-type]
    with pytest.raises(Failed, match=why):
        desk.run("fp32")


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [(2.0, float("nan"), "the loss is 2.0, then nan"), (2.0, 1.0, None)],
    ids=["diverged", "trained"],
)
def test_a_run_whose_loss_is_not_finite_is_a_no(before: float, after: float, why: str | None, tmp_path: Path) -> None:
    results = {"before": {"loss": before}, "after": {"loss": after}}
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "results.json").write_text(json.dumps(results))
    desk: Any = Desk(Server([0], ""), tmp_path, FAMILIES[0])  # type: ignore[arg-type]
    if why is None:
        assert desk.train("fp32") == results | {"said": "RUN\n"}
    else:
        with pytest.raises(Failed, match=why):
            desk.train("fp32")


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = {
        "llama": {"cells": {"fp32": None, "merge": None}, "linears": ["q_proj"]},
        "mixtral": {"cells": {"fp32": "it is large", "bf16": "it is large", "lora": None}, "linears": []},
    }
    file = tmp_path / "models.md"
    file.write_text("before\n<!-- made by benchmarks/support.py -->\nold\n<!-- end -->\nafter\n")
    put_into(file, render(rows))
    put_into(file, render(rows))  # over itself
    assert read_marks(file) == {name: marks(row) for name, row in rows.items()}
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "- mixtral, fp32, bf16: it is large\n" in text
    assert "- mixtral: `--method lora` trains it" in text
    assert "old" not in text


def test_what_is_refused_before_it_begins_is_not_tried_in_other_ways(tmp_path: Path) -> None:
    server: Any = Server([2, 2], "error: model: it is a whale\n")
    cells = Trial(Desk(server, tmp_path, FAMILIES[0])).run()
    assert cells == {"fp32": "model: it is a whale", "lora": "model: it is a whale"}
