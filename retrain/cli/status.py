"""What a command is doing, said at least every two seconds while nothing else is.

The library speaks by `logging`: each phase, each layer, each batch of a long pass is a record of
"retrain" or "solvers". Here the last record is kept; a thread that wakes twice a second says it
where nothing has been said for two seconds. On a terminal it stands beside the bar, elsewhere it is
a plain line on stderr.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LOGGERS = ("retrain", "solvers")

SILENCE = 2.0
"""Seconds without a word after which the phase is said."""

REPEATED = 10.0
"""Seconds after which a phase that has not changed is said again, with its age."""

_TICK = 0.25


class Status(logging.Handler):
    """The last thing the library said, and when anything was last shown.

    Parameters
    ----------
    show : callable
        Shows a line, such as "solving: layer fc1 (1 of 3)".
    live : bool
        Whether `show` replaces what it showed before, so that every change may be shown at once.
    clock : callable
        Gives the time in seconds.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        live: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(logging.DEBUG)
        self._show, self._live, self._clock = show, live, clock
        self._phase, self._begun = "starting: loading torch and the files", clock()
        self._said, self._spoken = "", clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note a phase; hand a warning on to whoever listens at the root."""
        if record.levelno >= logging.WARNING:
            logging.getLogger().handle(record)
            return
        self._phase, self._begun = record.getMessage(), self._clock()

    def spoken(self) -> None:
        """Note that something else has been shown."""
        self._spoken = self._clock()

    def tick(self) -> None:
        """Say the phase if it is time to."""
        now, phase = self._clock(), self._phase
        new = phase != self._said
        wait = (0.0 if self._live else SILENCE) if new else REPEATED
        if now - self._spoken < wait:
            return
        age = now - self._begun
        self._show(phase if new else f"{phase}, for {age:.0f} s")
        self._said, self._spoken = phase, now

    def __enter__(self) -> Status:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level, logger.propagate))
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for logger, level, propagate in self._before:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate

    def _run(self) -> None:
        while not self._over.wait(_TICK):
            self.tick()
