from __future__ import annotations

import logging
import threading
import time

import pytest

from fimo.live.outlet import Outlet


class Recorder:
    closing_seconds = 0.3

    def __init__(self) -> None:
        self.told: list[object] = []

    def say(self, word: object) -> None:
        self.told.append(word)

    def fail(self) -> None:
        raise SystemExit("the disk is full\nand more")

    def hang(self, free: threading.Event) -> None:
        free.wait(20)


def test_calls_are_made_in_order_and_the_end_waits_for_them() -> None:
    outlet = Outlet("logger.x", logger := Recorder())
    for word in range(50):
        outlet.call("say", word)
    outlet.call("has_no_such_method")
    outlet.close()
    assert logger.told == list(range(50))


def test_a_logger_that_fails_is_switched_off_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    outlet = Outlet("logger.x", logger := Recorder())
    outlet.call("say", 1)
    for _ in range(3):
        outlet.call("fail")
    outlet.call("say", 2)
    outlet.close()
    assert logger.told == [1]
    assert [r.getMessage() for r in caplog.records] == [
        "logger.x failed and is switched off: the disk is full"
    ]


def test_a_logger_that_hangs_costs_a_bounded_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.live.outlet.MOST_WAITING", 3)
    outlet, free = Outlet("logger.x", Recorder()), threading.Event()
    began = time.monotonic()
    for _ in range(3):
        outlet.call("hang", free)
    outlet.wait(0.1)
    for _ in range(1000):
        outlet.call("say", 1)
    with caplog.at_level(logging.WARNING):
        outlet.close()
    free.set()
    assert time.monotonic() - began < 5
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        "logger.x does not keep up: part of what it is told is dropped",
        "logger.x has not answered for 0 s: the run ends without it",
    ]
