"""Keys that are woken run: each alone, each soon, none for ever."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddiff_operator.queue import LARGEST_BACKOFF_SECONDS, REST_SECONDS, WorkQueue
from virtual_time import now, run


class Work:
    """What ran and when; how long it takes and how it ends can be told per run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.began: list[tuple[str, float]] = []
        self.outcomes: dict[str, list[float | Exception | None]] = {}
        self.seen: list[tuple[str, float, Exception | None]] = []
        self.running: set[str] = set()
        self.most_at_once = 0
        self.twice: list[str] = []

    async def __call__(self, key: str) -> float | None:
        self.began.append((key, now()))
        if key in self.running:
            self.twice.append(key)
        self.running.add(key)
        self.most_at_once = max(self.most_at_once, len(self.running))
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running.discard(key)
        outcome = self.outcomes[key].pop(0) if self.outcomes.get(key) else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def observe(self, key: str, seconds: float, error: Exception | None) -> None:
        self.seen.append((key, seconds, error))

    def times(self, key: str) -> list[float]:
        return [round(at, 3) for name, at in self.began if name == key]


def in_queue(scene: Callable[[WorkQueue[str], Work], Awaitable[None]], workers: int = 2, seconds: float = 1.0) -> Work:
    """The work that was done while `scene` played with an open queue."""
    work = Work(seconds)

    async def play() -> None:
        queue = WorkQueue[str](work, workers, work.observe)
        queue.start()
        await scene(queue, work)
        await queue.stop(0)

    run(play())
    return work


def test_a_key_woken_often_before_its_turn_runs_once() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        for _ in range(10):
            queue.wake("a")
        await asyncio.sleep(100)

    assert in_queue(scene).times("a") == [0.0]


def test_a_key_woken_while_it_runs_runs_once_more_and_never_twice_at_once() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        queue.wake("a")
        await asyncio.sleep(0.5)
        queue.wake("a")
        queue.wake("a")
        await asyncio.sleep(100)

    work = in_queue(scene)
    assert work.times("a") == [0.0, 1.0 + REST_SECONDS]
    assert work.twice == []


def test_the_earliest_of_several_delays_counts() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        queue.wake("a", 50)
        queue.wake("a", 5)
        queue.wake("a", 500)
        await asyncio.sleep(1000)

    assert in_queue(scene).times("a") == [5.0]


def test_work_says_when_it_wants_to_be_woken_and_an_event_comes_before() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        work.outcomes["a"] = [30.0, 30.0]
        queue.wake("a")
        await asyncio.sleep(10)
        queue.wake("a")
        await asyncio.sleep(1000)

    assert in_queue(scene).times("a") == [0.0, 10.0, 41.0]


def test_no_more_workers_than_allowed_and_the_first_come_is_the_first_served() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        for key in "abcdef":
            queue.wake(key)
        await asyncio.sleep(100)

    work = in_queue(scene, workers=2)
    assert work.most_at_once == 2
    assert [key for key, _ in work.began] == list("abcdef")


def test_failures_wait_twice_as_long_each_time_up_to_a_limit_and_success_forgets_them() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        work.outcomes["a"] = [*[ValueError("no")] * 12, 7.0, ValueError("no")]
        queue.wake("a")
        await asyncio.sleep(3000)

    work = in_queue(scene, seconds=0.0)
    times = work.times("a")
    gaps = [round(later - earlier, 3) for earlier, later in itertools.pairwise(times)]
    assert gaps[:10] == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert gaps[10:12] == [LARGEST_BACKOFF_SECONDS] * 2
    assert gaps[12:] == [7.0, 0.5]  # a success, then the first failure of a new row
    assert [type(error) for _, _, error in work.seen[:2]] == [ValueError, ValueError]


def test_an_event_ends_a_long_backoff_but_a_storm_of_events_makes_no_hot_loop() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        work.outcomes["a"] = [ValueError("no")] * 1000
        queue.wake("a")
        await asyncio.sleep(100)  # by now it waits for a minute
        for _ in range(1000):
            queue.wake("a")
            await asyncio.sleep(0.01)

    times = in_queue(scene, seconds=0.0).times("a")
    stormy = [at for at in times if at >= 100]
    assert stormy[0] == 100.0
    assert len(stormy) <= 11  # ten seconds of storm, once a second


def test_work_that_wakes_itself_makes_no_hot_loop() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        work.outcomes["a"] = [0.0] * 10_000
        queue.wake("a")
        await asyncio.sleep(10)

    assert len(in_queue(scene, seconds=0.0).began) <= 101


def test_one_key_that_hangs_does_not_hold_the_others_up() -> None:
    work = Work()
    done: list[str] = []

    async def hang_or_do(key: str) -> None:
        if key == "stuck":
            await asyncio.Event().wait()
        done.append(key)

    async def play() -> None:
        queue = WorkQueue[str](hang_or_do, 2, work.observe)
        queue.start()
        for key in ("stuck", "a", "b", "c"):
            queue.wake(key)
        await asyncio.sleep(10)
        await queue.stop(5)

    run(play())
    assert done == ["a", "b", "c"]


def test_stop_lets_what_runs_end_within_its_grace_and_begins_nothing() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        queue.wake("a")
        queue.wake("b")
        queue.wake("c")
        queue.wake("d", 1)
        await asyncio.sleep(0.5)
        await queue.stop(10)
        queue.wake("e")
        await asyncio.sleep(100)
        assert now() == 101.0  # stop took the half second that was missing

    work = in_queue(scene, workers=2)
    assert [key for key, _ in work.began] == ["a", "b"]
    assert [error for _, _, error in work.seen] == [None, None]


def test_stop_cancels_what_outlives_the_grace_and_a_new_start_begins_anew() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        work.seconds = 1000.0
        queue.wake("a")
        await asyncio.sleep(1)
        await queue.stop(5)
        assert now() == 6.0
        assert work.running == set()
        work.seconds = 0.0
        queue.start()
        queue.wake("b")
        await asyncio.sleep(1)

    assert [key for key, _ in in_queue(scene).began] == ["a", "b"]


def test_depth_and_oldest_wait_count_only_what_is_due_and_waits() -> None:
    async def scene(queue: WorkQueue[str], work: Work) -> None:
        assert (queue.depth, queue.oldest_seconds, queue.busy) == (0, 0.0, False)
        queue.wake("later", 1000)
        assert (queue.depth, queue.busy) == (0, False)
        for key in "abc":
            queue.wake(key)
        await asyncio.sleep(0.75)
        queue.wake("a")  # runs now: waits for itself, not for a worker
        assert (queue.depth, queue.oldest_seconds, queue.busy) == (2, 0.75, True)
        await asyncio.sleep(10)
        assert (queue.depth, queue.oldest_seconds, queue.busy) == (0, 0.0, False)

    in_queue(scene, workers=1)


Step = tuple[str, float, float]


def _lost_or_doubled(make: type[WorkQueue[str]], steps: list[Step], workers: int) -> list[str]:
    """Keys that ran twice at once, or that were woken and did not begin a run at or after their wake."""
    work = Work(0.3)
    woken: dict[str, float] = {}

    async def play() -> None:
        queue = make(work, workers, work.observe)
        queue.start()
        for key, delay, pause in steps:
            queue.wake(key, delay)
            woken[key] = max(woken.get(key, 0.0), now())
            await asyncio.sleep(pause)
        await asyncio.sleep(1000)
        await queue.stop(0)

    run(play())
    last = {key: max(at for name, at in work.began if name == key) for key, _ in work.began}
    return work.twice + [key for key, at in woken.items() if last.get(key, -1.0) < at]


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.2, 3.0]), st.sampled_from([0.0, 0.1, 0.5])))


@given(STEPS, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_no_wake_is_lost_and_no_key_runs_twice_at_once(steps: list[Step], workers: int) -> None:
    assert _lost_or_doubled(WorkQueue, steps, workers) == []


class _Forgetful(WorkQueue[str]):
    """A broken queue: what is woken while it runs is taken as done."""

    def wake(self, key: str, delay: float = 0.0) -> None:
        if key not in self._running:
            super().wake(key, delay)


class _Doubling(WorkQueue[str]):
    """A broken queue: it forgets who is at work."""

    def _next_due(self) -> str | None:
        running, self._running = self._running, {}
        try:
            return super()._next_due()
        finally:
            self._running = running

    def _enter(self, key: str) -> None:
        running, self._running = self._running, {}
        try:
            super()._enter(key)
        finally:
            self._running = running

    def _rest(self, key: str, until: float) -> None:
        """No rest either."""


@pytest.mark.parametrize("broken", [_Forgetful, _Doubling])
def test_the_check_above_finds_a_broken_queue(broken: type[WorkQueue[str]]) -> None:
    assert _lost_or_doubled(broken, [("a", 0.0, 0.1), ("a", 0.0, 0.1), ("b", 0.0, 0.0)], 3) != []
