"""Core regions that are not this run's."""

from pathlib import Path

import pytest
from mistakes import REGIONS, Mistake, Mistakes, assert_refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add

add("regions of a baseline", f"{REGIONS}llama.safetensors --method lora", "core_regions", "--method lora", "drop")
add("regions missing", f"{REGIONS}none.safetensors", "none.safetensors", "no such file")
add("regions truncated", f"{REGIONS}truncated.safetensors", "truncated.safetensors", "not a readable safetensors file")
add("regions are text", f"{REGIONS}text.safetensors", "text.safetensors", "not a readable safetensors file")
add(
    "regions are weights", "--core_regions {llama}/model.safetensors", "model.safetensors",
    "not a taso_core_regions file",
)  # fmt: skip
add("regions lack a tensor", f"{REGIONS}part.safetensors", "part.safetensors", "row_counts", "missing")
add("regions of another model", f"{REGIONS}gpt2.safetensors", "core_regions", "gpt2.safetensors", "another model")
add(
    "regions of another shape", f"{REGIONS}wide.safetensors", "core_regions", "wide.safetensors", "(32, 32)", "(16, 32)"
)
add("regions of other targets", f"{REGIONS}llama.safetensors --target_modules q_proj", "core_regions", "not a target")
add("regions off the ladder", f"{REGIONS}llama.safetensors --element_fraction 0.03", "element_fraction", "0.05", "0.03")
for flags, asked, made in (
    ("--importance random", "random", "importance"),
    ("--calibration_reduction per_batch_abs", "per_batch_abs", "signed_mean"),
    ("--calibration_samples 3", "3", "4"),
    ("--importance_weights original --load_in_4bit", "original", "loaded"),
):
    for script in ("train", "plan"):
        words = (flags.split()[0].strip("-"), "llama.safetensors", f"scored with {made}, not {asked}", "--core_regions")
        add(f"{script}: regions and {flags}", f"{REGIONS}llama.safetensors {flags}", *words, script=script)
add(
    "regions and scoring in YAML", f"{REGIONS}llama.safetensors --config run.yaml", "importance: ", "not magnitude",
    files={"run.yaml": "importance: magnitude"},
)  # fmt: skip
add(
    "regions of other weights", f"{REGIONS}seed1.safetensors", "core_regions", "seed1.safetensors", "other weights",
    loads=True,
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)
