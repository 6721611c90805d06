"""The Hugging Face cache: whether a model can be downloaded into it, or must be there already."""

from pathlib import Path

from taso_ds.doctor.finding import Finding, ok
from taso_ds.doctor.folders import check_space, check_writing


def check_cache() -> list[Finding]:
    """Return what is known of the cache; offline nothing is written there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        return [ok("HF Hub", f"offline (HF_HUB_OFFLINE): models and data come from {folder} or from folders")]
    remedy = "set HF_HOME to a folder with room, or HF_HUB_OFFLINE=1 where everything is there already"
    return [
        ok("HF Hub", "online: what is not in the cache is downloaded"),
        check_writing("HF cache", folder, remedy=remedy),
        check_space("HF cache space", folder, None, remedy=remedy),
    ]
