"""The Hugging Face cache: whether a model is there, or can be downloaded into it."""

from dataclasses import dataclass, replace
from pathlib import Path

from taso_ds.doctor.finding import FAIL, WARN, Finding, fail, ok
from taso_ds.doctor.folders import check_space, check_writing


@dataclass(frozen=True)
class HubModel:
    """A base that is named by its Hub id, and the bytes of its weights."""

    name: str
    revision: str
    size: float


def check_cache(model: HubModel | None) -> list[Finding]:
    """Return what is known of the cache.

    Args:
        model: None where the run names a folder, or nothing.
    """
    from huggingface_hub import constants

    folder, offline = Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE
    state = "offline (HF_HUB_OFFLINE): only what is in the cache, or in folders, is found"
    found = [ok("HF Hub", state if offline else "online: what is not in the cache is downloaded")]
    missing = model is not None and not _has_weights(model)
    if model is not None and not missing:
        found.append(ok("model weights", f"{model.name} is in the cache"))
    elif model is not None and offline:
        remedy = f"hf download {model.name}, where there is a network"
        found.append(fail("model weights", f"{model.name} is not in the cache, and the Hub is off", remedy))
    remedy = "set HF_HOME to a folder with room"
    writing = check_writing("HF cache", folder, remedy=remedy)
    if offline and writing.status == FAIL:
        writing = replace(writing, status=WARN)  # models are read as they are; prepared data is not kept
    needed = {"download": model.size} if model is not None and missing and not offline else None
    return [*found, writing, check_space("HF cache space", folder, needed, remedy=remedy)]


def _has_weights(model: HubModel) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return False
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
