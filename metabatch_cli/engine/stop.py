"""Stopping: SIGINT and SIGTERM end a training after the step that it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(SystemExit):
    """A training was stopped by a signal and saved; the exit code is 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Stopped(Exception):
    """Somebody who watches a training ended it early; says why."""


class StopSignals:
    """While open, SIGINT and SIGTERM set `received`, zero until then, instead of ending the
    process; so does SIGUSR2 where somebody waits for it, as launchers on clusters do, who are told
    that time is up.

    A second SIGINT raises KeyboardInterrupt, for whoever does not want to wait. With `at_once`
    a signal raises Interrupted where it comes: when all that matters is saved.
    """

    def __init__(self) -> None:
        self.received = 0
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            awaited = callable(signal.getsignal(signal.SIGUSR2))
            for signum in (signal.SIGINT, signal.SIGTERM, *[signal.SIGUSR2] * awaited):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        if self.at_once:
            raise Interrupted(signum)
