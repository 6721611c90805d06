"""``core_regions.png``: where the core regions lie, and whether importance concentrated at all."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from taso_ds.adapters.selection import CoreRegion, RegionScores, concentration
from taso_ds.files.atomic import replacing

_MAX_KINDS = 8
_BINS = 96


def draw_regions(
    path: Path,
    scores: Mapping[str, RegionScores],
    regions: Mapping[str, CoreRegion],
    *,
    element_fraction: float,
    core_fraction: float,
) -> None:
    """Draw one column per kind of matrix (the last part of its name), one line per layer (and expert).

    First row: where core elements lie among the output rows, relative to an even spread. Second row: among the input
    columns. Third row: the share of core elements inside the core rows and columns, against that of a random region.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = _kinds(list(regions))
    width, height = 2.1 * len(kinds) + 1.6, 7.6  # inches
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(kinds), squeeze=False, sharey="row")
    # Margins by hand: a layout that is computed draws everything twice, seconds for many kinds of matrices.
    right = 1.0 - 1.15 / width
    figure.subplots_adjust(left=0.55 / width, right=right, bottom=0.07, top=0.89, wspace=0.12, hspace=0.32)
    for column, (kind, names) in enumerate(kinds.items()):
        num_layers = len({_split(name)[0] for name in names})
        shares = [concentration(scores[name], regions[name], element_fraction) for name in names]
        step = [scores[name].ladder.index(element_fraction) for name in names]
        for line, field in enumerate(("row_counts", "col_counts")):
            counts = [getattr(scores[name], field)[at] for name, at in zip(names, step, strict=True)]
            image = axes[line][column].imshow(
                np.stack([_relative(count) for count in counts]),
                aspect="auto",
                cmap="magma",
                vmin=0.0,
                vmax=4.0,
                extent=(0, len(counts[0]), num_layers, 0),
                interpolation="nearest",
            )
            axes[line][column].set_xlabel("output row" if line == 0 else "input column", fontsize=8)
            axes[line][column].tick_params(labelsize=7)
            axes[line][column].locator_params(axis="x", nbins=4)
        axes[0][column].set_title(kind, fontsize=9)
        low = axes[2][column]
        layers = np.arange(len(names)) * num_layers / len(names)
        low.plot([share for share, _ in shares], layers, label="in core rows", color="tab:blue", lw=1.2)
        low.plot([share for _, share in shares], layers, label="in core columns", color="tab:orange", lw=1.2)
        low.axvline(core_fraction, color="gray", ls=":", lw=1, label="random region")
        low.set_xlim(0, 1)
        low.invert_yaxis() if column == 0 else None
        low.set_xlabel("share of core elements", fontsize=8)
        low.tick_params(labelsize=7)
    for line in range(3):
        axes[line][0].set_ylabel("layer", fontsize=8)
    scale = figure.add_axes((right + 0.2 / width, 0.5, 0.15 / width, 0.3))
    figure.colorbar(image, cax=scale, label="core elements, relative to an even spread")
    axes[2][-1].legend(fontsize=7, loc="lower right")
    figure.suptitle(
        f"Core regions: top {element_fraction:.0%} of elements, top {core_fraction:.0%} of rows and columns",
        fontsize=11,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _kinds(names: list[str]) -> dict[str, list[str]]:
    """Group modules of the same role and width over the layers, in model order."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(_split(name)[1].removeprefix("self_attn.").removeprefix("mlp."), []).append(name)
    return dict(list(grouped.items())[:_MAX_KINDS])


def _split(name: str) -> tuple[str, str]:
    """Return the layer a matrix stands in, and its role there, the same for all experts."""
    found = re.fullmatch(r"(.*?\.\d+\.|)(.*?)(\.\d+)?", name)
    assert found is not None
    return found[1], found[2]


def _relative(counts: Tensor) -> np.ndarray:
    """Average the counts over at most ``_BINS`` bins, relative to their mean."""
    values = counts.double().numpy()
    bins = np.array_split(values, min(_BINS, len(values)))
    means: np.ndarray = np.array([part.mean() for part in bins]) / values.mean()
    return means
