"""Several nodes: whether they hold the same model, and which of them see the output.

Rank 0 alone reads and writes the run folder, so it need not be shared. Each node reads model and tokenizer from its own
disk. Their digests are compared, which costs a few reads per file. (``agreement`` compares the rows, as tokens.)
"""

import hashlib
import logging
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from taso_ds.config import RunConfig
from taso_ds.distributed import comm, environment
from taso_ds.errors import UserError
from taso_ds.files.atomic import write_flushed
from taso_ds.models.source import OTHER_FILES, SMALL_FILES, WEIGHT_FILES
from taso_ds.runs.folder import RUN

log = logging.getLogger(__name__)

_SAMPLE = 1 << 16  # bytes
_TOKEN = ".token_of_rank_0.tmp"

Found = TypeVar("Found")


def check_same_model(config: RunConfig, folder: str) -> None:
    """Refuse nodes that hold different models or tokenizers, before anything of them is loaded. A collective.

    Raises:
        UserError: on every rank; names the node and the file that differ from the first node's.
    """
    _check_same_files("model_name_or_path", Path(folder))
    if config.model.tokenizer_name is not None and Path(config.model.tokenizer_name).is_dir():
        _check_same_files("tokenizer_name", Path(config.model.tokenizer_name))


def _check_same_files(flag: str, folder: Path) -> None:
    if not comm.spans_nodes():
        return
    (first, expected), *others = _on_each_node(lambda: file_digests(folder))
    for node, digests in others:
        different = sorted(name for name, _ in expected.items() ^ digests.items())
        if different:
            name = different[0]
            verb = "lacks" if name not in digests else "has another" if name in expected else "has, unlike the others,"
            raise UserError(f"{flag}: {node} {verb} {name} in {folder}; make it the same as on {first}")


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file that a model is read from, by name.

    Small files count whole. Of weights the size counts, the beginning, where the header is, and samples of the middle
    and the end.
    """
    small = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    large = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    others = set(folder.glob(OTHER_FILES))
    return {path.name: _sampled_digest(path, whole=path in small) for path in sorted((small | large) - others)}


def _sampled_digest(path: Path, *, whole: bool) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if whole or size <= 3 * _SAMPLE:
            digest.update(file.read())
        else:
            for start in (0, size // 2, size - _SAMPLE):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def check_no_run_elsewhere(folder: Path) -> None:
    """Refuse to begin anew on rank 0's node what another node has begun in a folder of the same name. A collective.

    That happens when the folder is not shared and the nodes come in another order than before.
    """
    if not comm.spans_nodes():
        return
    (first, has_run), *others = _on_each_node((folder / RUN).is_file)
    holders = [node for node, holds in others if holds]
    if holders and not has_run:
        raise UserError(
            f"output_dir: {holders[0]} holds a run in {folder} that {first}, where rank 0 is now, does not see; name"
            f" {holders[0]} first, copy the folder there, or pass another --output_dir"
        )


def say_who_sees(folder: Path) -> None:
    """Say which nodes see the folder that rank 0 writes; it exists. A collective."""
    if not comm.spans_nodes():
        return
    token = comm.on_main(lambda: secrets.token_hex(8))
    comm.on_main(lambda: write_flushed(folder / _TOKEN, token))
    nodes = _on_each_node(lambda: _read(folder / _TOKEN) == token)
    comm.on_main(lambda: (folder / _TOKEN).unlink(missing_ok=True))
    blind = [node for node, sees in nodes if not sees]
    if blind:
        log.info("output: %s is on %s; not on %s, which need not see it", folder, nodes[0][0], ", ".join(blind))
    else:
        log.info("output: %s is shared by all %d nodes", folder, len(nodes))


def _on_each_node(action: Callable[[], Found]) -> list[tuple[str, Found]]:
    """Return what ``action`` finds on each node, with the node's name, rank 0's first. A collective."""
    is_first = environment.local_rank() == 0
    found = comm.together(lambda: [(socket.gethostname(), action())] if is_first else [])
    return [pair for pairs in comm.gather_objects(found) for pair in pairs]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
