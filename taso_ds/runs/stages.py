"""The stages of a run, each in one line when it ends: what it did, how long that took, and what comes next."""

import logging
import time
from collections.abc import Sequence

from taso_ds.config import RunConfig
from taso_ds.runs.resume import Start

log = logging.getLogger(__name__)


class Stages:
    """Stages in their order, and a clock that starts anew with each."""

    def __init__(self, names: Sequence[str]) -> None:
        self._ahead = list(names)
        self._since = time.perf_counter()

    def done(self, name: str, what: str, *, next_is: str = "") -> None:
        """Say that a stage has ended. Nothing is said of a stage that was not ahead, because it had nothing to do.

        Args:
            what: what it worked on.
            next_is: what the next one will work on.
        """
        if not self._ahead or self._ahead[0] != name:
            return
        del self._ahead[0]
        seconds = time.perf_counter() - self._since
        then = f"; next: {self._ahead[0]}{next_is and f', {next_is}'}" if self._ahead else ""
        log.info("%s: %s in %s%s", name, what, in_words(seconds), then)
        self._since = time.perf_counter()


def training_stages(config: RunConfig, start: Start) -> Stages:
    """Return the stages of a training run; a run that goes on was scored and evaluated before."""
    scores = config.method.needs_regions and config.calibration.core_regions is None and start.regions is None
    names = {
        "reading": True,
        "loading": True,
        "scoring": scores,
        "engine": True,
        "evaluation": start.progress is None,
        "training": True,
    }
    ends = ["evaluation", "export", *(["proof"] if config.run.verify_export else [])]
    return Stages([*(name for name, is_ahead in names.items() if is_ahead), *ends])


def in_words(seconds: float) -> str:
    """Return a time as people say it: ``4.1 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
