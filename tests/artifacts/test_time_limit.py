"""A step that never ends is interrupted, and another timer is kept."""

import re
import signal
import time

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.time_limit import time_limit


def loop_within(seconds):
    with time_limit(seconds, UserError("slow")):
        while True:
            pass


@pytest.fixture
def alarms():
    """The alarms of an outer timer, restored at the end."""
    seen: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    yield seen
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_loop_and_an_expression_are_interrupted():
    started = time.monotonic()
    with pytest.raises(UserError, match="slow"):
        loop_within(0.1)
    with pytest.raises(UserError, match="slow"), time_limit(0.1, UserError("slow")):
        re.fullmatch("(a|a)+b", 60 * "a")
    assert time.monotonic() - started < 5


def test_a_timer_that_ran_before_still_ends(alarms):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(UserError, match="slow"):
        loop_within(0.1)
    assert not alarms
    time.sleep(0.4)
    assert alarms == [signal.SIGALRM]


def test_a_timer_that_ends_sooner_wins(alarms):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with time_limit(0.2, UserError("slow")):
        time.sleep(0.15)
    assert alarms == [signal.SIGALRM]
