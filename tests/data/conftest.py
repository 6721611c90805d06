"""The way to the real data sets, when a developer has them."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets: $TASO_TEST_DATA, or shared/data beside the checkout; skips without it."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("TASO_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: set TASO_TEST_DATA, or put it into {beside}")
    return folder
