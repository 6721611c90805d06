"""Signals that ask a script to stop: Ctrl-C, SIGTERM (pre-emption, ``scancel``) and SIGUSR1 (time limit ahead).

While training, a signal is remembered until the step's end, where all ranks learn of it, save a checkpoint and leave
together; at any other time there is nothing to save that is not on the disk, and the process leaves at once. The exit
code says "start me again", so that a batch script can requeue. A second Ctrl-C leaves at once in any case.

Python runs a handler in the main thread, between two of its own instructions: not while a library waits there, for
another rank say. So the interpreter also writes each signal to a pipe, where a second thread reads it and ends the
process when the main thread does not come to it.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from taso_ds.console import screen as console
from taso_ds.errors import Interrupted, speaks_for_all

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_AT_ONCE = 130  # what a shell says of a process that Ctrl-C has ended

# Seconds. A terminal sends Ctrl-C to all processes, and launchers pass it on to their ranks, which have it already.
_ECHO = 2
# The main thread needs some to remove what is half-written.
_PATIENCE = 10


class Interrupts:
    """What arrives while a script runs. Inside ``with interrupts:`` signals are ours."""

    def __init__(self, leave: Callable[[str, int], None], *, resumes: bool) -> None:
        """Prepare to listen.

        Args:
            leave: says a line and ends the process with an exit code, in a thread that is not the main one.
            resumes: whether the same command goes on where this one was stopped.
        """
        self.arrived: str | None = None
        self._leave, self._resumes = leave, resumes
        self._deferring = False
        self._before: dict[signal.Signals, object] = {}
        self._pipe = self._pipe_before = -1

    def __enter__(self) -> "Interrupts":
        # nohup, and a shell that starts a command with "&", have told the process to ignore some.
        ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        os.register_at_fork(after_in_child=self._let_go)
        self._before = {number: signal.signal(number, self._on_signal) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        os.close(self._pipe)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember signals instead of leaving: whoever enters asks for ``arrived``.

        Raises:
            Interrupted: at the end, if one has arrived.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.arrived is not None:
            raise self._reason(self.arrived)

    def ignore(self) -> None:
        """Let no signal disturb the end of the process; launchers send some to the ranks that a failed one leaves."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _let_go(self) -> None:
        """Put all handlers back: at the end, and in a forked child, whose signals are not ours."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            signal.set_wakeup_fd(self._pipe_before)
        self._before = {}

    def reason(self) -> Interrupted | None:
        """Return the signal that told this process to leave with nothing to save; None if none did."""
        return None if self.arrived is None or self._deferring else self._reason(self.arrived)

    def _reason(self, name: str) -> Interrupted:
        if self._resumes:
            return Interrupted(f"stopped by {name}; the same command goes on from what is saved")
        return Interrupted(f"stopped by {name}; the same command starts anew", _AT_ONCE if name == "SIGINT" else 75)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.arrived is not None:
            return  # it is leaving already
        self.arrived = signal.Signals(number).name
        if not self._deferring:
            raise self._reason(self.arrived)

    def _listen(self, pipe: int) -> None:
        """Leave at once at a second Ctrl-C, and when the main thread is stuck."""
        name, first, idle, told = "", math.inf, math.inf, False
        while True:
            ready, _, _ = select.select([pipe], [], [], 1.0 if name else None)
            read = os.read(pipe, 64) if ready else b""
            if ready and not read:
                os.close(pipe)
                return  # the script has ended
            now = time.monotonic()
            if signal.SIGINT in read and now - first > _ECHO:
                self._leave("stopped by a second SIGINT; what was not saved yet is lost", _AT_ONCE)
            arrived = [number for number in read if number in SIGNALS]
            if arrived and not name:
                name, first, idle = signal.Signals(arrived[0]).name, now, now
            if self._deferring:
                idle = now
            if name and now - idle > _PATIENCE:
                self._leave(str(self._reason(name)), self._reason(name).code)
            if name == "SIGINT" and self._deferring and not told and now - first > _ECHO and speaks_for_all():
                told = True
                print("\nSIGINT: saves after this step; Ctrl-C again leaves at once", file=console.err(), flush=True)
