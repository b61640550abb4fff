"""Signals that ask a run to stop: it does so after the step at hand, when its state is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run was asked to stop, and its state is saved. `signum`: by which signal, 0 if another
    process got it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name if signum else "a signal to another process")
        self.signum = signum


class StopRequest:
    """While this context is open, a stop signal is only noted, in `signum`.

    When it has stopped the run, it is passed on to whom it went before: under submitit, that
    requeues the job.
    """

    def __enter__(self) -> StopRequest:
        self.signum, self.at_once = 0, False
        self.before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if isinstance(error, Stopped) and callable(self.before.get(error.signum)):
            self.before[error.signum](error.signum, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self.at_once:
            raise Stopped(signum)

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """In this context, where nothing would be lost, a signal ends the run right away."""
        self.at_once = True
        try:
            if self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self.at_once = False
