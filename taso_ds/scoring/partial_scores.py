"""The scores of finished passes in a file: an interrupted scoring goes on after them."""

import dataclasses
import logging
from pathlib import Path

from taso_ds.adapters.region_file import RegionFile, load_region_file, save_region_file
from taso_ds.adapters.selection import RegionScores
from taso_ds.distributed import comm
from taso_ds.errors import UserError

log = logging.getLogger(__name__)


class PartialScores:
    """A file of scores; written only where there is more than one pass.

    Args:
        empty: a region file without scores; a file with other settings or another base belongs to another scoring.
        several: whether there is more than one pass.
    """

    def __init__(self, path: Path, empty: RegionFile, *, several: bool) -> None:
        self._path, self._empty, self._several = path, empty, several

    def read(self) -> dict[str, RegionScores]:
        """Return, on every rank, what an interrupted run has scored.

        Raises:
            UserError: the file belongs to other settings or to another base.
        """
        return comm.on_main(self._read) if self._several else {}

    def _read(self) -> dict[str, RegionScores]:
        if not self._path.is_file():
            return {}
        found = load_region_file(self._path)
        if (found.settings, found.fingerprint) != (self._empty.settings, self._empty.fingerprint):
            raise UserError(f"output_dir: {self._path} was begun with other settings or another base: delete it")
        log.info("scoring: %d matrices are scored already (%s)", len(found.scores), self._path)
        return found.scores

    def write(self, scores: dict[str, RegionScores]) -> None:
        """Keep the scores so far. A collective."""
        if self._several:
            comm.on_main(lambda: self._write(scores))

    def _write(self, scores: dict[str, RegionScores]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_region_file(self._path, dataclasses.replace(self._empty, scores=scores))
