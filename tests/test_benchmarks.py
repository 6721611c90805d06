"""Benchmarks whose launches fail or do not fit: the table and the JSON line come all the same, the exit code tells."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks

LOADED = {
    "seconds": 2.0, "peak_gb": 1.5, "shard_gb": 1.0, "read_gb_per_s": 1.0, "sequential_gb_per_s": 2.0,
    "one_buffer_gb_per_s": 4.0,
}  # fmt: skip
PHASES = ("load", "score", "train", "export", "first step")
RUN = {phase: {"seconds": 1.0, "peak_gb": 1.0, "after_gb": 0.5} for phase in PHASES}
FAILED = ranks.LaunchFailed("load_worker.py failed")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a benchmark on the tiny shape with launches that end as told; returns exit code, JSON line and table."""

    def run(script: str, *, own: Any, usual: Any) -> tuple[int, dict[str, Any], str]:
        def launch(worker: Path, flags: list[str], **_options: Any) -> Any:
            found = usual if "transformers" in flags else own
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(ranks, "launch", launch)
        more = ["--rounds", "1"] if script == "load" else ["--plot", str(tmp_path / "plot.png")]
        flags = ["--sizes", "tiny", "--folder", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        code = 0
        try:
            importlib.import_module(script).main()
        except SystemExit as left:
            code = int(left.code or 0)
        *table, line = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        return code, found["rows"][0] if script == "scale" else found, "\n".join(table)

    return run


@pytest.mark.parametrize(("usual", "said"), [(FAILED, "failed"), (None, "does not fit")], ids=["fails", "large"])
@pytest.mark.parametrize("script", ["load", "scale"])
def test_the_usual_way_may_fail(run: Any, script: str, usual: Any, said: str) -> None:
    code, row, table = run(script, own=[LOADED, LOADED] if script == "load" else RUN, usual=usual)
    assert code == 0
    assert said in table
    if script == "load":
        assert (row["sharded_s"], row["transformers_lacks"]) == (2.0, said)
        assert "speedup" not in row
    else:
        assert (row["export_s"], row["usual_load_lacks"]) == (1.0, said)


@pytest.mark.parametrize(("own", "said"), [(FAILED, "failed"), (None, "does not fit")], ids=["fails", "large"])
@pytest.mark.parametrize("script", ["load", "scale"])
def test_our_own_way_may_not(run: Any, script: str, own: Any, said: str) -> None:
    code, row, table = run(script, own=own, usual=[LOADED, LOADED])
    assert code == 1
    assert said in table
    assert row["sharded_lacks" if script == "load" else "lacks"] == said


@pytest.mark.parametrize("script", ["load", "scale"])
def test_both_ways_complete(run: Any, script: str) -> None:
    code, row, table = run(script, own=[LOADED, LOADED] if script == "load" else RUN, usual=[LOADED, LOADED])
    assert (code, "fail" in table, "fit" in table) == (0, False, False)
    assert row["speedup" if script == "load" else "usual_load_s"] == (1.0 if script == "load" else 2.0)
