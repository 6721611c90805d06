"""core_regions.png is a picture, and one of these regions."""

from pathlib import Path

import numpy as np
import torch

from taso_ds.adapters.selection import CoreRegion, RegionScores, cut_region, ladder_with, score_rows_and_cols
from taso_ds.reports.region_picture import _kinds, draw_regions

K, P = 0.05, 0.1


def scored(*, layers: int, planted: bool) -> tuple[dict[str, RegionScores], dict[str, CoreRegion]]:
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for layer in range(layers):
        for kind, shape in (("self_attn.q_proj", (40, 40)), ("mlp.down_proj", (40, 120))):
            importance = torch.rand(shape, generator=generator)
            if planted:
                importance[: shape[0] // 20] += 5.0
            scores[f"model.layers.{layer}.{kind}"] = score_rows_and_cols(importance, ladder_with(K))
    return scores, {name: cut_region(entry, element_fraction=K, core_fraction=P) for name, entry in scores.items()}


def draw(folder: Path, *, layers: int = 3, planted: bool = True) -> np.ndarray:
    from matplotlib.image import imread

    path = folder / f"{layers}-{planted}.png"
    scores, regions = scored(layers=layers, planted=planted)
    draw_regions(path, scores, regions, element_fraction=K, core_fraction=P)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.read_bytes()[-12:] == b"\0\0\0\0IEND\xaeB`\x82"  # complete
    image: np.ndarray = imread(path)
    return image


def test_is_a_picture_with_content(tmp_path: Path) -> None:
    image = draw(tmp_path)
    height, width = image.shape[:2]
    assert min(height, width) > 300
    colours = np.unique(image[..., :3].reshape(-1, 3).round(2), axis=0)
    assert len(colours) > 50  # heat maps, not a blank sheet
    dark = (image[..., :3].sum(-1) < 2.7).mean()
    assert 0.05 < dark < 0.9
    assert [file.name for file in tmp_path.iterdir()] == ["3-True.png"]  # nothing temporary is left


def test_shows_whether_importance_concentrates(tmp_path: Path) -> None:
    structured, noise = draw(tmp_path, planted=True), draw(tmp_path, planted=False)
    assert structured.shape == noise.shape
    assert (np.abs(structured - noise).max(-1) > 0.2).mean() > 0.02


def test_one_layer_is_enough(tmp_path: Path) -> None:
    assert draw(tmp_path, layers=1).size > 0


def test_the_experts_of_a_layer_are_lines_of_one_column() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.up_proj.{index}" for layer in (0, 1) for index in (0, 1, 2)]
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert _kinds([*names, *experts]) == {"q_proj": names, "experts.up_proj": experts}
