"""``core_regions.safetensors``: the result of scoring, and enough of it to cut other regions without a second pass.

Per module: ``<module>.rows`` and ``<module>.cols`` (int64 indices of the region in use), ``<module>.row_counts`` and
``<module>.col_counts`` (int32, one row per element fraction of the ladder), ``<module>.row_importance`` and
``<module>.col_importance`` (fp32). The settings and the fingerprint of the base stand in the metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from taso_ds.adapters.selection import CoreRegion, RegionScores, cut_region
from taso_ds.adapters.targets import MatrixShape
from taso_ds.errors import UserError
from taso_ds.files.tensors import read_tensors, write_tensors

KIND = "taso_core_regions"
_SCORE_FIELDS = ("row_counts", "col_counts", "row_importance", "col_importance")


@dataclass(frozen=True, eq=False)
class RegionFile:
    """Row and column scores per module, the settings that made them, and the fingerprint of the scored base."""

    scores: dict[str, RegionScores]
    settings: dict[str, object]
    fingerprint: str

    def cut(self, *, element_fraction: float, core_fraction: float, source: str) -> dict[str, CoreRegion]:
        """Cut every module's region.

        Args:
            source: the file, for the message.

        Raises:
            UserError: the element fraction is not on the saved ladder.
        """
        ladder = next(iter(self.scores.values())).ladder
        if element_fraction not in ladder:
            known = ", ".join(map(str, ladder))
            raise UserError(f"element_fraction: {source} holds {known}, not {element_fraction}; score again to get it")
        return {
            name: cut_region(scores, element_fraction=element_fraction, core_fraction=core_fraction)
            for name, scores in self.scores.items()
        }


def save_region_file(path: Path, file: RegionFile, regions: Mapping[str, CoreRegion] | None = None) -> None:
    """Write the scores of every module.

    Args:
        regions: those in use, once they are cut.

    Raises:
        UserError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, scores in file.scores.items():
        if regions is not None:
            tensors[f"{name}.rows"], tensors[f"{name}.cols"] = regions[name].rows, regions[name].cols
        for field in _SCORE_FIELDS:
            tensors[f"{name}.{field}"] = getattr(scores, field)
    metadata = {
        "kind": KIND,
        "modules": list(file.scores),
        "element_fraction_ladder": list(next(iter(file.scores.values())).ladder),
        "settings": file.settings,
        "fingerprint": file.fingerprint,
    }
    write_tensors(path, tensors, metadata)


def load_region_file(path: Path) -> RegionFile:
    """Read a region file.

    Raises:
        UserError: missing, damaged or inconsistent.
    """
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        ladder = tuple(float(fraction) for fraction in metadata["element_fraction_ladder"])
        scores = {
            name: RegionScores(ladder=ladder, **{field: tensors[f"{name}.{field}"] for field in _SCORE_FIELDS})
            for name in metadata["modules"]
        }
        settings, fingerprint = dict(metadata["settings"]), str(metadata["fingerprint"])
    except KeyError as error:
        raise UserError(f"{path}: incomplete, {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not that of a region file ({error})") from error
    if not scores:
        raise UserError(f"{path}: holds no region")
    for name, entry in scores.items():
        _check_scores(entry, f"{path}: {name}")
    return RegionFile(scores=scores, settings=settings, fingerprint=fingerprint)


def _check_scores(scores: RegionScores, where: str) -> None:
    for counts, importance in (
        (scores.row_counts, scores.row_importance),
        (scores.col_counts, scores.col_importance),
    ):
        if counts.ndim != 2 or importance.shape != counts.shape[1:] or len(counts) != len(scores.ladder):
            raise UserError(f"{where}: counts {tuple(counts.shape)} do not fit importance {tuple(importance.shape)}")
        if (counts.dtype, importance.dtype) != (torch.int32, torch.float32):
            raise UserError(f"{where}: counts are {counts.dtype}, importance is {importance.dtype}: made by no scoring")
        if not counts.numel() or int(counts.min()) < 0 or not bool(counts.any(1).all()):
            raise UserError(f"{where}: counts without a core element, or below zero: made by no scoring")
        if not bool(importance.isfinite().all()):
            raise UserError(f"{where}: importance is not finite: made by no scoring")


def check_region_shapes(file: RegionFile, shapes: Mapping[str, MatrixShape], *, source: str) -> None:
    """Refuse regions of other modules or shapes, before any weight is loaded.

    Args:
        shapes: of the matrices to adapt.
        source: the file, for the message.

    Raises:
        UserError: naming the first difference.
    """
    missing = [name for name in shapes if name not in file.scores]
    unknown = [name for name in file.scores if name not in shapes]
    if missing or unknown:
        what = f"no region for {missing[0]}" if missing else f"a region for {unknown[0]}, which is not a target"
        raise UserError(f"core_regions: {source} has {what}; it was made for other target modules or another model")
    for name, shape in shapes.items():
        found = (file.scores[name].row_counts.shape[1], file.scores[name].col_counts.shape[1])
        wanted = (shape.out_features, shape.in_features)
        if found != wanted:
            raise UserError(f"core_regions: {source} has {name} as {found}, the model has {wanted}: another model")


def check_region_file(file: RegionFile, shapes: Mapping[str, MatrixShape], *, fingerprint: str, source: str) -> None:
    """Refuse regions of another model: other module names, other shapes, or other weights.

    Args:
        shapes: of the matrices to adapt.
        fingerprint: of this base's weights.
        source: the file, for the message.

    Raises:
        UserError: naming the first difference.
    """
    check_region_shapes(file, shapes, source=source)
    if file.fingerprint != fingerprint:
        raise UserError(f"core_regions: {source} was scored on other weights than this base; score again")
