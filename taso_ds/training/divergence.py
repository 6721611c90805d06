"""When training goes wrong: a loss or gradient that is not finite, or a loss far above what it was."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from taso_ds.errors import UserError

WINDOW = 16
_ENOUGH = 4  # losses that make a median worth comparing with


class Diverged(UserError):
    """Training cannot go on from here. Raised on every rank.

    Attributes:
        good_steps: steps after which the parameters were good.
        applied: whether the bad step has changed the parameters already.
    """

    def __init__(self, message: str, *, good_steps: int, applied: bool) -> None:
        super().__init__(message)
        self.good_steps = good_steps
        self.applied = applied


class LossWatch:
    """Compares each loss with the median of the last ones.

    Args:
        max_jump: rise above that median that counts as divergence; 0 to look for values that are not finite only.
        recent: the losses before, oldest first.
    """

    def __init__(self, max_jump: float, recent: Sequence[float] = ()) -> None:
        self.max_jump = max_jump
        self.recent = deque(recent, maxlen=WINDOW)

    def problem(self, loss: float) -> str | None:
        """Say what is wrong with a loss; None when nothing is, and the loss is remembered."""
        if not math.isfinite(loss):
            return f"is {loss}"
        if self.max_jump and len(self.recent) >= _ENOUGH:
            usual = median(self.recent)
            if loss > usual + self.max_jump:
                return f"is {loss:.4f}, more than {self.max_jump:g} above {usual:.4f}, the median of the steps before"
        self.recent.append(loss)
        return None
