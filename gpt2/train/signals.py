"""Signals that ask a run to stop: noted when they come, acted on at the next step boundary.

Slurm and spot machines send SIGUSR1 or SIGTERM some time before they end a job; a user sends SIGINT
(Ctrl-C), a terminal that is closed SIGHUP. A handler may run in the middle of anything, a
collective or a write, so it only sets a flag; the training loop polls it. A second SIGINT, a second
or more later, stops at once: torchrun passes on the one that its terminal has already sent to every
process.
"""

import contextlib
import os
import signal
import threading
import time

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: the run is saved, the same command line goes on with it


class StopSignals:
    """A context in which those signals only set `.received`, to their names."""

    def __init__(self):
        self.received: str | None = None
        self._interrupted_at = float("inf")
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers; elsewhere whoever runs it has them.
        if threading.current_thread() is threading.main_thread():
            # What the process was started to ignore (nohup, a job in the background) stays so.
            wanted = [n for n in HANDLED if signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at > 1.0:
                raise KeyboardInterrupt
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        if self.received is None:
            self.received = signal.Signals(number).name
            # write(2) and not print: the interrupted code may be inside print itself.
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            text = f"\n{self.received}: saving after this step, then stopping{again}\n"
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, text.encode())


class Interrupted(SystemExit):
    """Ends a process whose run was saved and is to be resumed; exit status 75."""

    def __init__(self, signal_name: str):
        super().__init__(RESUME_ME)
        self.signal_name = signal_name
