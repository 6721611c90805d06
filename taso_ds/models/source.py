"""Where the base is loaded from: always a folder on this node. A Hub id or a GGUF file becomes one first."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch

from taso_ds.console.bar import Bar
from taso_ds.errors import UserError, reason
from taso_ds.files.atomic import open_to_umask, writing
from taso_ds.files.safetensors_ranges import has_checkpoint
from taso_ds.models.arguments import ModelArguments

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")
# What a model is read from, beside its weights.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors", "*.bin")
# A second copy of the weights, for Mistral's own software.
OTHER_FILES = "consolidated*"


def model_source(arguments: ModelArguments) -> str:
    """Return the folder to load from. A Hub id is downloaded first, and a GGUF file dequantized into the cache.

    The first rank to arrive on a node does this. The others wait for a file lock, and not in a collective, which could
    time out; so this is called before the ranks join.

    Raises:
        UserError: the Hub cannot be reached or does not have the model, or the GGUF file cannot be read.
    """
    assert arguments.model_name_or_path is not None
    if arguments.gguf_file is None:
        check_no_gguf(arguments.model_name_or_path)
        name = arguments.model_name_or_path
        return name if Path(name).is_dir() else _downloaded(name, arguments.model_revision)
    from filelock import FileLock

    folder = cache_dir() / "gguf" / _gguf_key(arguments.model_name_or_path, arguments.gguf_file)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                log.info("dequantizing %s through transformers into %s (once)", arguments.gguf_file, folder)
                _convert_gguf(arguments, folder)
    return str(folder)


def check_no_gguf(name: str) -> None:
    """Refuse a GGUF file, or a folder that holds nothing else, when no ``--gguf_file`` names it."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files and files[0].suffix == ".gguf" and not (path / "config.json").exists():
        raise UserError(
            f"model_name_or_path: {name}: a GGUF file is named by its folder and its name: pass"
            f" --model_name_or_path {files[0].parent} --gguf_file {files[0].name}"
        )


@cache
def _downloaded(name: str, revision: str) -> str:
    """Return the folder of the Hub's cache that holds the model, with its safetensors files where it has any."""
    from huggingface_hub import snapshot_download

    def load() -> str:
        get = partial(snapshot_download, name, revision=revision, ignore_patterns=["*/*", OTHER_FILES], tqdm_class=Bar)
        folder = get(allow_patterns=[*SMALL_FILES, "*.safetensors"])
        return folder if has_checkpoint(Path(folder)) else get(allow_patterns=[*SMALL_FILES, "*.bin"])

    return loading(f"{name} from the Hub (no such folder is here)", load)


def _gguf_key(name: str, file: str) -> str:
    path = Path(name) / file
    if not path.is_file():
        if Path(name).is_dir():
            raise UserError(f"gguf_file: {path} does not exist")
        return hashlib.sha256(f"{name}/{file}".encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _convert_gguf(arguments: ModelArguments, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    name, file = str(arguments.model_name_or_path), arguments.gguf_file
    unfinished = folder.with_name(f".{folder.name}.tmp")
    model = loading(
        f"{name}/{file}",
        lambda: AutoModelForCausalLM.from_pretrained(
            name, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ),
    )
    try:
        model.save_pretrained(unfinished)
        tokenizer = loading(f"{name}/{file}", lambda: AutoTokenizer.from_pretrained(name, gguf_file=file))
        tokenizer.save_pretrained(unfinished)
        open_to_umask(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def loading(what: str, load: Callable[[], Loaded], *, flag: str = "model_name_or_path") -> Loaded:
    """Return what ``load`` returns, and turn the many errors of an unreadable checkpoint into one line.

    Args:
        what: is loaded, for the message.
        load: calls a library.
        flag: names what is loaded.

    Raises:
        UserError: ``load`` failed.
    """
    try:
        return load()
    except Exception as error:
        # transformers, tokenizers, safetensors and gguf raise a dozen unrelated types; --debug shows the traceback.
        first = " ".join(reason(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            first = "code comes with it: read that code, then pass --trust_remote_code to run it"
        raise UserError(f"{flag}: cannot load {what}: {first}") from error


def cache_dir() -> Path:
    """Return the folder for converted checkpoints: ``TASO_CACHE``, or ``~/.cache/taso_ds``."""
    return Path(os.environ.get("TASO_CACHE", Path.home() / ".cache" / "taso_ds"))
