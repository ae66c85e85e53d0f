"""The watchdog, by a clock that the test sets."""

import logging

import pytest

from prismatic.serving.watchdog import Trip, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_it_trips_once_after_the_limit_and_stays_so_until_it_is_armed(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watchdog = Watchdog(0.5, clock)
    clock.now = 80.0
    assert watchdog.check() is None, "the limit counts from the first look, however long that took"
    for _ in range(10):
        clock.now += 0.5
        watchdog.feed()
        assert watchdog.check() is None
    clock.now += 0.51
    trip = watchdog.check("the network is cut")
    assert trip == Trip("no action for 0.51 s, limit 0.5 s: the network is cut", 85.51)
    watchdog.feed()
    watchdog.restart()
    clock.now += 10
    assert watchdog.check() is watchdog.tripped is trip
    with caplog.at_level(logging.WARNING):
        watchdog.rearm()
    assert "re-armed, 10.0 s after: no action" in caplog.text
    assert watchdog.check() is None and watchdog.history == [trip]
    clock.now += 0.6
    assert watchdog.check() is not None and len(watchdog.history) == 2


def test_the_first_reason_stays() -> None:
    watchdog = Watchdog(1.0, Clock())
    watchdog.trip("button")
    watchdog.trip("another button")
    assert [trip.reason for trip in watchdog.history] == ["button"]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_are_none(limit: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        Watchdog(limit)
