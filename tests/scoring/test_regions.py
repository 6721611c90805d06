"""Scoring in passes that is stopped and goes on: the same scores, nothing scored twice, nothing foreign taken over."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from taso_ds.adapters.targets import find_targets
from taso_ds.config import RunConfig, parse_run_config
from taso_ds.data.collate import collate
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.objectives.loss import lm_loss_sum
from taso_ds.runs.folder import PARTIAL
from taso_ds.runs.output_folder import choose_folder
from taso_ds.scoring import partial_scores, regions, scoring_pass
from taso_ds.scoring.regions import describe_scoring
from taso_ds.scoring.score import split_passes

pytestmark = pytest.mark.usefixtures("on_cpu")

PASSES, STAGE_0 = 3, ZeroConfig({"zero_optimization": {"stage": 0}})


def config_of(folder: Path, *flags: str) -> RunConfig:
    common = ["--model_name_or_path", "tiny", "--task", "sst2", "--output_dir", str(folder), "--no_bf16"]
    return parse_run_config(
        [*common, "--per_device_train_batch_size", "2", "--calibration_passes", str(PASSES), *flags]
    )


def rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, 300, (6, 9), generator=generator).tolist()
    return [EncodedRow(input_ids=ids, labels=[-100] * 4 + ids[4:]) for ids in drawn]


class Rows:
    """An objective of token rows."""

    collate = staticmethod(partial(collate, pad_id=0))
    loss_sum = staticmethod(lm_loss_sum)


def score(config: RunConfig, model: Any, *, calibration: list[EncodedRow] | None = None) -> regions.Regions:
    spec = BaseSpec(config.model, "tiny", model.config, head=False)
    scored = calibration or rows()
    return regions.score_base(
        config.calibration, BaseModel(spec, model), find_targets(model), scored, objective=Rows(),
        batch_size=config.training.per_device_train_batch_size, seed=config.run.seed,
        made_of=describe_scoring(config.calibration, config.model, scored, task="sst2", seed=config.run.seed),
        partial_scores=Path(str(config.run.output_dir)) / PARTIAL, zero=STAGE_0,
    )  # fmt: skip


def frozen_llama(**options: Any) -> Any:
    return tiny_models.llama(**options).requires_grad_(False)


def interrupt(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    """Score, and be stopped after the first pass has been written."""
    written = partial_scores.PartialScores.write

    def write(self: Any, scores: Any) -> None:
        written(self, scores)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(partial_scores.PartialScores, "write", write)
        with pytest.raises(KeyboardInterrupt):
            score(config, frozen_llama())


def test_an_interrupted_scoring_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path / "run")
    whole = score(config_of(tmp_path / "other"), frozen_llama())
    interrupt(monkeypatch, config)
    assert choose_folder(config, goes_on=True) == tmp_path / "run", "a folder with the first passes only may be used"
    model, forwards = frozen_llama(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = score(config, model)
    assert len(forwards) == (PASSES - 1) * 3  # 6 rows in batches of 2, without the first pass
    assert list(found.file.scores) == list(whole.file.scores)
    for name, scores in found.file.scores.items():
        assert torch.equal(scores.row_counts, whole.file.scores[name].row_counts)
        assert torch.equal(scores.col_importance, whole.file.scores[name].col_importance)


@pytest.mark.parametrize("change", ["settings", "rows", "base"])
def test_foreign_passes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    config = config_of(tmp_path / "run")
    interrupt(monkeypatch, config)
    flags = ["--importance", "gradient"] if change == "settings" else []
    model = frozen_llama(seed=1 if change == "base" else 0)
    with pytest.raises(UserError, match=f"{PARTIAL} was begun with other settings or another base: delete it"):
        score(config_of(tmp_path / "run", *flags), model, calibration=rows()[:4] if change == "rows" else None)


def test_one_pass_writes_nothing(tmp_path: Path) -> None:
    score(config_of(tmp_path / "run", "--calibration_passes", "1"), frozen_llama())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "offload"), [("cpu", True), ("none", False)])
def test_the_flag_reaches_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, offload: bool) -> None:
    told: list[bool] = []

    class Told(scoring_pass.GradientSum):
        def __init__(self, *args: Any, **options: Any) -> None:
            told.append(options["offload"])
            super().__init__(*args, **options)

    monkeypatch.setattr(scoring_pass, "GradientSum", Told)
    score(config_of(tmp_path / "run", "--calibration_offload", flag), frozen_llama())
    assert told == [offload] * PASSES


def test_passes_cover_every_matrix_once_and_about_evenly() -> None:
    targets = find_targets(tiny_models.llama(layers=4))
    for passes in (1, 2, 3, 5, 100):
        groups = split_passes(targets, passes)
        assert [name for group in groups for name in group] == list(targets)
        sizes = [group.numel for group in groups]
        largest = max(shape.numel for shape in targets.shapes.values())
        assert max(sizes) <= sum(sizes) / passes + largest
