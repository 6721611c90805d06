"""What the tests of mistakes share: a run that works, and what a mistake made of it must leave behind."""

from pathlib import Path

from launching import Finished

# A run that works, in a folder with train.jsonl and eval.jsonl; the flags of a case come after these and override them.
GOOD = (
    "--model_name_or_path {llama} --task completion --train_file train.jsonl --eval_file eval.jsonl --max_seq_length 64"
    " --no_bf16 --ds_config zero0.json --max_steps 2 --calibration_samples 4 --no_verify_export --output_dir run"
)


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Every file and folder below, with what the files hold."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def assert_one_line(finished: Finished, *words: str) -> None:
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert len(finished.errors) == 1, finished.err
    line = finished.errors[0]
    assert len(line) < 600, line
    for word in words:
        assert word in line, line
