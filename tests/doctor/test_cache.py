"""The Hub's cache: online it needs room for what is not there, offline it must be there."""

from pathlib import Path

import pytest

from taso_ds.doctor.cache import HubModel, check_cache
from taso_ds.doctor.finding import FAIL, OK, WARN, Finding

MODEL = HubModel("some/model", "main", 5e6)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, online."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def by_check(model: HubModel | None) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_cache(model)}


@pytest.mark.usefixtures("hub")
def test_online(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    found = by_check(None)
    assert list(found) == ["HF Hub", "HF cache", "HF cache space"]
    assert {finding.status for finding in found.values()} == {OK}
    assert "5.0 MB needed (download 5.0 MB)" in by_check(MODEL)["HF cache space"].found
    assert by_check(HubModel("some/model", "main", 1e18))["HF cache space"].status == FAIL
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/hub")
    assert by_check(None)["HF cache"].status == FAIL


@pytest.mark.usefixtures("hub")
def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in by_check(None)["HF Hub"].found
    assert by_check(MODEL)["model weights"].status == FAIL
    assert "needed" not in by_check(MODEL)["HF cache space"].found
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/hub")
    assert by_check(None)["HF cache"].status == WARN
