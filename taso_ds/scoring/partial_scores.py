"""The scores of finished passes, so that an interrupted scoring goes on after them."""

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
        empty: what the file says beside the scores: a file that says otherwise is another scoring's.
    """

    def __init__(self, path: Path, empty: RegionFile, *, several: bool) -> None:
        self._path, self._empty, self._several = path, empty, several

    def read(self) -> dict[str, RegionScores]:
        """Return what an interrupted run of the same settings on the same base has scored, on every rank."""
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
