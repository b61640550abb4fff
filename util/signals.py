"""Signals that ask a run to stop: it saves its state after the current step and exits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run was asked to stop and has saved its state. `signum`: the signal, or 0 if another
    process received it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name if signum else "a signal to another process")
        self.signum = signum


class StopRequest:
    """While this context is open, a stop signal is only recorded, in `signum`. Once it has stopped
    the run, it is passed on to the previous handler: submitit's requeues the job."""

    def __enter__(self) -> StopRequest:
        self.signum, self.at_once = 0, False
        self.before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if isinstance(error, Stopped) and callable(self.before.get(error.signum)):
            self.before[error.signum](error.signum, None)

    def _note(self, signum: int, frame) -> None:
        self.signum = signum
        if self.at_once:
            raise Stopped(signum)

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """In this context, where no work would be lost, a signal stops the run immediately."""
        self.at_once = True
        try:
            if self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self.at_once = False
