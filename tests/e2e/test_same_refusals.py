"""A dry run, a plan, the doctor and a run refuse the same mistakes in the same words: they ask one function."""

import json
from pathlib import Path

import pytest
import tiny_models
from launching import call_main

# flags, beside a good run's: words of the refusal
MISTAKES = {
    "--target_modules q_prj": "target_modules: 'q_prj'",
    "--max_seq_length 4096": "max_seq_length: 4096 exceeds the model's 128 positions",
    "--method full --load_in_4bit": "method: full trains all weights",
    "--core_regions none.safetensors": "none.safetensors: no such file",
    "--method lora --core_regions none.safetensors": "core_regions: --method lora has none",
    "--global_batch_size 3 --per_device_train_batch_size 2": "global_batch_size: 3 is not a multiple",
    "--expected_world_size 5": "expected_world_size: 5 ranks were asked for and 1 came",
    "--ds_config wrong.json": "reduce_bucket_size",
    "--task sst3": "task",
    "--model_name_or_path {bert}": "task completion has no labels for a classification head",
    "--model_name_or_path {damaged}": "is damaged, copy it again",
}
GOOD = (
    "--model_name_or_path {llama} --task completion --train_file train.jsonl --eval_file eval.jsonl --max_seq_length 64"
)
VERBS = {"run": "train", "dry run": "train --dry_run", "plan": "plan --gpus_per_node 1", "doctor": "doctor --json -"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    damaged = tiny_models.save(tiny_models.llama(), folder / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return {
        "llama": tiny_models.save(tiny_models.llama(), folder / "llama"),
        "bert": tiny_models.save(tiny_models.bert(), folder / "bert"),
        "damaged": damaged,
    }


def refusal(verb: str, flags: list[str]) -> str:
    """Return the line with which a verb refuses; the doctor's is a finding among others, unless flags alone say it."""
    script, *more = verb.split()
    finished = call_main(script, [*flags, *more])
    assert finished.code != 0
    if script != "doctor" or finished.errors:
        (line,) = finished.errors
        return line.removeprefix("error: ")
    findings = {found["check"]: found for found in json.loads(finished.out)["findings"]}
    assert findings["model"]["status"] == "fail"
    return str(findings["model"]["found"])


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_all_refuse_alike(mistake: str, models: dict[str, Path]) -> None:
    Path("wrong.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}))
    flags = f"{GOOD} {mistake}".format(**models).split()
    lines = {name: refusal(verb, flags) for name, verb in VERBS.items()}
    for name, line in lines.items():
        assert MISTAKES[mistake] in line, name
    assert len(set(lines.values())) == 1, lines
