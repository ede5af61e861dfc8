"""What has to be reconciled, and when: each key at most once at a time, never lost, never in a hot loop.

A key that is woken ten times before its turn runs once; woken while it runs, it runs once more afterwards. A key
whose work fails waits twice as long each time. Time is the event loop's, so that a test can turn its clock.
"""

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_SECONDS = 0.5
LARGEST_BACKOFF_SECONDS = 300.0
REST_SECONDS = 0.1  # between two runs of one key: its own writes come back as events, and they come in bursts
REST_AFTER_FAILURE_SECONDS = 1.0  # an event may end a long backoff, since it may bring the cure, but not at once


class WorkQueue(Generic[K]):
    """Runs `work` for every key that is woken, on at most `workers` keys at a time.

    `work` answers in how many seconds it wants its key to be woken, or None; what it raises is told to `observe`
    (with the key and the seconds that it took; None when it went well) and its key is tried again later.
    Before start() and after stop() a wake is forgotten: whoever starts the queue wakes everything.
    """

    def __init__(
        self,
        work: Callable[[K], Awaitable[float | None]],
        workers: int,
        observe: Callable[[K, float, Exception | None], None],
    ) -> None:
        self._work, self._workers, self._observe = work, workers, observe
        self._due: dict[K, float] = {}  # when a waiting key wants to run; the earliest wake counts
        self._heap: list[tuple[float, int, K]] = []  # the same in order; what no longer agrees with _due is skipped
        self._turns = itertools.count()
        self._running: dict[K, asyncio.Task[None]] = {}
        self._failures: dict[K, int] = {}
        self._resting: dict[K, float] = {}  # until when a key that has just run may not run again
        self._timer: asyncio.TimerHandle | None = None
        self._open = False

    # -- from outside

    def start(self) -> None:
        """From now on, keys that are woken run."""
        self._open = True

    def wake(self, key: K, delay: float = 0.0) -> None:
        """`key` will run in `delay` seconds or earlier; if it is running now, then once more afterwards."""
        if not self._open:
            return
        due = max(_now() + delay, self._resting.get(key, 0.0))
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._enter(key)
            self._set_timer()  # not at once: ten wakes in one breath are one

    async def stop(self, grace_seconds: float) -> None:
        """Nothing starts any more; what was running has ended by itself, or was cancelled after the grace."""
        self._open = False
        self._due.clear()
        self._heap.clear()
        self._set_timer()
        tasks = list(self._running.values())
        if tasks and grace_seconds > 0:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._failures.clear()

    @property
    def depth(self) -> int:
        """How many keys are due and wait for a worker."""
        return len(self._waiting())

    @property
    def oldest_seconds(self) -> float:
        """How long the first of them has waited; 0 when none does."""
        now = _now()
        return now - min(self._waiting(), default=now)

    @property
    def busy(self) -> bool:
        """Whether anything runs, or is due and waits for a worker."""
        return bool(self._running) or self.depth > 0

    # -- inside

    def _waiting(self) -> list[float]:
        now = _now()
        return [due for key, due in self._due.items() if due <= now and key not in self._running]

    def _enter(self, key: K) -> None:
        if key not in self._running:
            heapq.heappush(self._heap, (self._due[key], next(self._turns), key))

    def _pump(self) -> None:
        """Free workers take what is due, earliest first; a timer waits for the rest."""
        while self._open and len(self._running) < self._workers and (key := self._next_due()) is not None:
            del self._due[key]
            self._running[key] = asyncio.create_task(self._run(key), name=f"reconcile {key}")
        self._set_timer()

    def _next_due(self) -> K | None:
        now = _now()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due and key not in self._running:
                return key
        return None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap and len(self._running) < self._workers:
            self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._pump)

    async def _run(self, key: K) -> None:
        began = _now()
        again: float | None = None
        error: Exception | None = None
        try:
            again = await self._work(key)
        except Exception as raised:
            error = raised
        finally:
            del self._running[key]
        self._observe(key, _now() - began, error)
        if self._open:
            self._after(key, again, error)
            self._pump()

    def _after(self, key: K, again: float | None, error: Exception | None) -> None:
        """The key's next run: after its backoff, when it asked for it, or when it was woken meanwhile."""
        if error is None:
            self._failures.pop(key, None)
            rest = REST_SECONDS
        else:
            again = self._backoff(key)
            rest = min(again, REST_AFTER_FAILURE_SECONDS)
        now = _now()
        self._rest(key, now + rest)
        wanted = min(self._due.get(key, float("inf")), float("inf") if again is None else now + again)
        if wanted < float("inf"):
            self._due[key] = max(wanted, now + rest)
            self._enter(key)

    def _backoff(self, key: K) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        return float(min(FIRST_BACKOFF_SECONDS * 2 ** min(failures - 1, 20), LARGEST_BACKOFF_SECONDS))

    def _rest(self, key: K, until: float) -> None:
        self._resting[key] = until
        asyncio.get_running_loop().call_at(until, self._rested, key, until)

    def _rested(self, key: K, until: float) -> None:
        if self._resting.get(key) == until:
            del self._resting[key]


def _now() -> float:
    return asyncio.get_running_loop().time()
