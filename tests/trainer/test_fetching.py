"""How one rank fetches: in order, several at once, never far ahead. Two ranks are in test_train_shared."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_trainer import fetching
from feddiff_trainer.fetching import ALONE, AT_ONCE, fetched_once

ANSWER_SECONDS = 10  # a fetch that waits for another one gives up after so long: the test fails, it does not hang


def failing(error: Exception) -> bytes:
    raise error


class Meeting:
    """Fetches that return only once `size` of them are under way together, and a count of those that began."""

    def __init__(self, size: int) -> None:
        self.began = 0
        self._barrier, self._lock = threading.Barrier(size), threading.Lock()

    def fetch(self, number: int) -> bytes:
        with self._lock:
            self.began += 1
        self._barrier.wait(ANSWER_SECONDS)
        return b"%d" % number


def met(fetched: Callable[[list[Callable[[], bytes]]], Iterator[bytes]]) -> list[bytes]:
    meeting = Meeting(AT_ONCE)
    return list(fetched([partial(meeting.fetch, number) for number in range(3 * AT_ONCE)]))


def test_what_is_fetched_at_once_comes_in_order() -> None:
    assert met(lambda fetches: fetched_once(fetches, ALONE)) == [b"%d" % number for number in range(3 * AT_ONCE)]


def test_fetches_one_after_the_other_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see if one waited for another."""
    monkeypatch.setattr(fetching, "AT_ONCE", 1)
    monkeypatch.setitem(globals(), "ANSWER_SECONDS", 0.05)
    with pytest.raises(threading.BrokenBarrierError):
        met(lambda fetches: fetched_once(fetches, ALONE))


def test_memory_holds_few_shards_that_nobody_has_asked_for() -> None:
    meeting = Meeting(1)
    contents = fetched_once([partial(meeting.fetch, number) for number in range(100)], ALONE)
    assert meeting.began == 0
    for number in range(3):
        assert next(contents) == b"%d" % number
        assert meeting.began <= number + 1 + AT_ONCE


def test_the_first_failure_in_order_is_the_one_that_is_raised() -> None:
    second_failed = threading.Event()

    def first_fails() -> bytes:
        assert second_failed.wait(ANSWER_SECONDS)
        raise InputMissing("number 1: nothing there")

    def second_fails() -> bytes:
        second_failed.set()
        raise DataInvalid("number 2: damaged")

    contents = fetched_once([lambda: b"0", first_fails, second_fails], ALONE)
    assert next(contents) == b"0"
    with pytest.raises(InputMissing, match="number 1: nothing there"):
        next(contents)


def test_a_reader_that_gives_up_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    contents = fetched_once([lambda: b"-"] * 100, ALONE)
    next(contents)
    contents.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_bug_in_a_fetch_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        list(fetched_once([partial(failing, ZeroDivisionError())], ALONE))
