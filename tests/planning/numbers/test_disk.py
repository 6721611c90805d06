"""What a run writes, against files that were really written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted_models import counted, llama

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.peft_format import save_adapter
from taso_ds.adapters.region_file import RegionFile, save_region_file
from taso_ds.adapters.selection import RegionScores, cut_region, ladder_with
from taso_ds.adapters.structure import count_dense
from taso_ds.planning.numbers.disk import disk_bytes

LADDER = ladder_with(0.05)
OUT, IN, MATRICES = 3000, 2000, 3


@pytest.mark.parametrize(("structure", "rank", "dtype"), [("union", 2, "bfloat16"), ("intersection", 1, "float32")])
def test_files_are_as_large_as_planned(tmp_path: Path, structure: str, rank: int, dtype: str) -> None:
    scores = {f"layers.{number}": _scores() for number in range(MATRICES)}
    regions = {name: cut_region(one, element_fraction=0.05, core_fraction=0.1) for name, one in scores.items()}
    save_region_file(tmp_path / "regions", RegionFile(scores, {}, "base"), regions)
    adapter = TasoAdapter(regions, structure=structure, rank=rank, scaling=1.0, seed=0, dtype=getattr(torch, dtype))
    save_adapter(tmp_path / "adapter", adapter, torch.ones_like(adapter.flat), config={}, head={})
    shape = replace(
        counted(llama(), trainable=adapter.flat.numel()),
        adapter_dense=MATRICES * count_dense(structure, out_features=OUT, in_features=IN, rank=rank),
    )
    planned = disk_bytes(
        shape, element=getattr(torch, dtype).itemsize, edges=MATRICES * (OUT + IN), core_fraction=0.1,
        ladder=len(LADDER), checkpoints=2,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert written == pytest.approx(planned["adapter"], rel=0.03)  # headers on top
    assert (tmp_path / "regions").stat().st_size == pytest.approx(planned["core regions"], rel=0.03)
    indices = sum(4 * (len(region.rows) + len(region.cols)) for region in regions.values())
    assert planned["checkpoints"] == 2 * (12 * adapter.flat.numel() + indices)


def _scores() -> RegionScores:
    return RegionScores(
        ladder=LADDER,
        row_counts=torch.randint(0, IN, (len(LADDER), OUT), dtype=torch.int32),
        col_counts=torch.randint(0, OUT, (len(LADDER), IN), dtype=torch.int32),
        row_importance=torch.rand(OUT),
        col_importance=torch.rand(IN),
    )


def test_other_methods_have_no_regions() -> None:
    planned = disk_bytes(
        counted(llama(), trainable=1000), element=2, edges=0, core_fraction=0.1, ladder=5, checkpoints=0
    )
    assert planned == {"adapter": 2000.0, "core regions": 0.0, "checkpoints": 0.0}
