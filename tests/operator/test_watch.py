"""How long a request is tried again, and when what was listed has arrived."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from feddiff_operator import main
from feddiff_operator.watch import FIRST_PAUSES, FORBIDDEN_PAUSE_SECONDS, Patience, Watches
from virtual_time import now, run


def test_only_what_an_owner_forbids_is_tried_for_ever() -> None:
    watches = Watches(lambda: 0.0, lambda *told: None)
    assert tuple(Patience(watches)) == FIRST_PAUSES
    watches.forbidden.add("/api/v1/namespaces/clinic/pods")
    many = list(itertools.islice(Patience(watches), 100))
    assert many[-1] == FORBIDDEN_PAUSE_SECONDS


def test_a_forbidden_watch_is_not_a_dead_one() -> None:
    assert Watches(lambda: 0.0, lambda *told: None).silent_seconds() == {}


def test_events_that_never_pause_keep_no_replica_from_being_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody who may write one job can make its watch bring something three times a second."""
    candidate_at: list[float] = []

    async def candidate(begin: object, end: object) -> None:
        candidate_at.append(now())

    async def story() -> None:
        operator = object.__new__(main.Operator)
        operator._namespaces, operator._heard = (None,), {}
        operator._watches = SimpleNamespace(opened_at=lambda path: 0.0, forbidden=set())  # type: ignore[assignment]
        operator._election = SimpleNamespace(run=candidate)  # type: ignore[assignment]
        electing = asyncio.create_task(operator._elect())
        while not candidate_at and now() < 100:
            operator._heard[main.WATCHED[0].path(None)] = now()
            await asyncio.sleep(0.3)
        electing.cancel()

    monkeypatch.setattr(main.time, "monotonic", lambda: now())
    run(story())
    assert candidate_at == [pytest.approx(main.LISTED_SECONDS, abs=0.5)]
