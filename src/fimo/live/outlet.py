"""A logger behind a queue: it may fail, or hang, and costs the run a warning."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Calls that wait for a logger; those beyond are dropped."""

CLOSING_SECONDS = 60.0
"""How long the end of a run waits for a logger that does not say otherwise."""


class Outlet:
    """Calls a logger in a thread of its own, one call after another.

    The first failure switches the logger off, with a warning. One that hangs is waited for at the end of
    the run only, and no longer than its own ``closing_seconds``.

    Args:
        name: for warnings.
        logger: a Lightning logger; methods that it lacks are not called.
    """

    def __init__(self, name: str, logger: Any) -> None:
        self.name, self.logger = name, logger
        self.off = False
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._behind = False

    def call(self, method: str, *arguments: Any, **named: Any) -> None:
        """Queue a call of one of the logger's methods."""
        call = getattr(self.logger, method, None)
        if call is None or self.off:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(lambda: self.off or call(*arguments, **named))
        except queue.Full:
            if not self._behind:
                log.warning("%s does not keep up: part of what it is told is dropped", self.name)
            self._behind = True

    def wait(self, seconds: float) -> None:
        """Wait until all calls so far are made, at most so long."""
        if self._thread is not None and not self.off:
            made = threading.Event()
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(made.set)
                made.wait(max(0.0, seconds))

    def close(self) -> None:
        """Wait until all calls are made, or for as long as the logger may take."""
        if self._thread is None:
            return
        seconds = float(getattr(self.logger, "closing_seconds", CLOSING_SECONDS))
        until = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=seconds)
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self.off = True
            log.warning("%s has not answered for %.0f s: the run ends without it", self.name, seconds)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # whatever it is, it is no reason to end a run
                self.off = True
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning("%s failed and is switched off: %s", self.name, text)
