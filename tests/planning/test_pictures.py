"""Pictures that show what they are drawn for."""

from pathlib import Path
from typing import Any

import pytest

from taso_ds.planning.numbers.plan import ScalingPoint
from taso_ds.planning.numbers.report import draw_scaling


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures, in place of their files."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_args, **_options: figures.append(self))
    return figures


def test_lines_that_coincide_are_both_seen(drawn: list[Any]) -> None:
    points = [ScalingPoint(nodes, 6.2, 6.2) for nodes in (1, 2, 4)]
    draw_scaling(Path("unused.png"), points, title="70B")
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[1] > 1.1 * 6.2
    one, other = axes.get_lines()
    assert one.get_markersize() > other.get_markersize()
    assert one.get_linestyle() != other.get_linestyle()
    assert len(axes.get_legend().get_texts()) == 2


def test_sizes_are_the_ticks(drawn: list[Any]) -> None:
    import scale

    rows = [{"parameters": int(size * 1e9), "load_s": size, "load_peak_gb": size} for size in (0.4, 1.1, 3.4)]
    scale.draw(rows, Path("unused.png"))
    for axes in drawn[0].axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.4B", "1.1B", "3.4B"]
        assert not axes.get_xticks(minor=True).size
