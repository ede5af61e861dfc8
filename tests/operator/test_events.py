"""Events: one per object and reason, counted; recording never waits and never fails."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from feddiff_operator import events
from feddiff_operator.cluster import AlreadyExists, Conflict, Kind, Refused, Unavailable
from feddiff_operator.events import MESSAGE_BYTES, REST_SECONDS, Recorder
from virtual_time import now, run

JOB = {
    "apiVersion": "feddiff.dev/v1alpha1",
    "kind": "FederatedDiffusionJob",
    "metadata": {"namespace": "research", "name": "digits", "uid": "7c1e"},
}


def job(name: str) -> dict[str, Any]:
    return {**JOB, "metadata": {"namespace": "research", "name": name, "uid": f"uid-{name}"}}


@dataclass
class Server:
    """The API server's events, and every call with its time; fails as told."""

    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, float]] = field(default_factory=list)
    error: Exception | None = None

    def _call(self, verb: str) -> None:
        self.calls.append((verb, now()))
        if self.error:
            raise self.error

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        self._call("get")
        return copy.deepcopy(self.events.get(name))

    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        self._call("create")
        name = obj["metadata"]["name"]
        if name in self.events:
            raise AlreadyExists(name)
        self.events[name] = copy.deepcopy(obj)
        return obj

    async def patch(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        self._call("patch")
        if name not in self.events:
            raise Conflict(f"{name} is gone")
        self.events[name].update(copy.deepcopy(body))
        return self.events[name]

    @property
    def counts(self) -> dict[str, int]:
        return {event["reason"]: event["count"] for event in self.events.values()}


def recorded(scene: Callable[[Recorder, Server], Awaitable[None]], server: Server | None = None) -> Server:
    """What is on the server after `scene` with a running recorder."""
    server = server or Server()

    async def play() -> None:
        recorder = Recorder(server)
        writing = asyncio.create_task(recorder.run())
        await scene(recorder, server)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    run(play())
    return server


def test_an_event_names_its_object_its_reason_and_what_happened() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "PrivacyBudgetExceeded", "needs 1.5, 0.7 remain", warning=True)
        await asyncio.sleep(1)

    (event,) = recorded(scene).events.values()
    assert event["metadata"]["namespace"] == "research"
    assert event["metadata"]["name"].startswith("digits.")
    assert event["involvedObject"] == {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "namespace": "research",
        "name": "digits",
        "uid": "7c1e",
    }
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "PrivacyBudgetExceeded", 1)
    assert event["message"] == "needs 1.5, 0.7 remain"
    assert event["firstTimestamp"] == event["lastTimestamp"]


def test_the_same_reason_is_one_object_with_a_count_and_the_newest_words() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        for turn in range(500):
            recorder.record(JOB, "Waiting", f"turn {turn}")
            await asyncio.sleep(1)
        recorder.record(JOB, "Complete", "done")
        await asyncio.sleep(60)

    server = recorded(scene)
    assert server.counts == {"Waiting": 500, "Complete": 1}
    assert {event["message"] for event in server.events.values()} == {"turn 499", "done"}
    assert len(server.calls) <= 2 * 2 + 500 / REST_SECONDS + 2


def test_another_process_goes_on_counting() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "Waiting", "still")
        await asyncio.sleep(60)

    server = recorded(scene)
    assert recorded(scene, server).counts == {"Waiting": 2}


def test_the_same_name_of_a_new_job_is_another_event() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "Complete", "done")
        recorder.record({**JOB, "metadata": {**JOB["metadata"], "uid": "9f"}}, "Complete", "done")
        await asyncio.sleep(60)

    assert len(recorded(scene).events) == 2


def test_an_event_that_the_server_forgot_is_made_anew() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "Waiting", "a")
        await asyncio.sleep(60)
        server.events.clear()
        recorder.record(JOB, "Waiting", "b")
        await asyncio.sleep(60)

    (event,) = recorded(scene).events.values()
    assert (event["count"], event["message"]) == (1, "b")


@pytest.mark.parametrize("message", ["x" * 5000, "ε" * 5000, "ε" + "x" * 1022])
def test_a_message_is_cut_to_1024_bytes_between_characters(message: str) -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "Failed", message)
        await asyncio.sleep(1)

    (event,) = recorded(scene).events.values()
    assert len(event["message"].encode()) <= MESSAGE_BYTES
    assert message.startswith(event["message"].removesuffix("…"))


def test_a_message_that_fits_stays_as_it_is() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        recorder.record(JOB, "Failed", "ε" * 512)
        await asyncio.sleep(1)

    (event,) = recorded(scene).events.values()
    assert event["message"] == "ε" * 512


def test_a_flood_of_events_is_written_at_a_bounded_rate() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        for number in range(1000):
            recorder.record(job(f"j{number}"), "Started", "now")
        await asyncio.sleep(10)

    server = recorded(scene)
    assert 80 <= len(server.events) <= 101


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_REMEMBERED", 10)

    async def scene(recorder: Recorder, server: Server) -> None:
        for number in range(1000):
            recorder.record(job(f"j{number}"), "Started", "now")
        assert len(recorder._recorded) == 10
        await asyncio.sleep(60)

    assert sorted(event["involvedObject"]["name"] for event in recorded(scene).events.values())[0] == "j990"


def test_a_server_that_is_down_costs_nothing_and_loses_no_count() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        server.error = Unavailable("down")
        for _ in range(3):
            recorder.record(JOB, "Waiting", "still")
            await asyncio.sleep(30)
        server.error = None
        await asyncio.sleep(60)

    server = recorded(scene)
    assert server.counts == {"Waiting": 3}
    assert len(server.calls) < 15  # no hot loop meanwhile


def test_events_that_may_not_be_written_are_dropped_until_they_happen_again() -> None:
    async def scene(recorder: Recorder, server: Server) -> None:
        server.error = Refused("forbidden")
        recorder.record(JOB, "Waiting", "still")
        await asyncio.sleep(1000)
        assert len(server.calls) == 1
        server.error = None
        recorder.record(JOB, "Waiting", "still")
        await asyncio.sleep(60)

    assert recorded(scene).counts == {"Waiting": 1}


def test_the_last_words_before_the_end_are_written() -> None:
    server = Server()

    async def play() -> None:
        recorder = Recorder(server)
        recorder.record(JOB, "Stopping", "the operator ends")
        await recorder.flush()

    run(play())
    assert server.counts == {"Stopping": 1}
