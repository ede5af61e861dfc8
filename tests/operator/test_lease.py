"""One leader at a time, whatever the network and other people's clocks do."""

import asyncio
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddiff_operator.cluster import AlreadyExists, Conflict, Kind, Unavailable
from feddiff_operator.lease import Election
from virtual_time import now, run

TERM = 15


@dataclass
class Server:
    """The API server's one Lease, with its compare-and-swap."""

    lease: dict[str, Any] | None = None
    version: int = 0
    history: list[str] = field(default_factory=list)

    def write(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        lease["metadata"]["resourceVersion"] = str(self.version)
        self.lease = lease
        self.history.append(lease["spec"]["holderIdentity"])
        return copy.deepcopy(lease)


@dataclass
class Line:
    """One replica's line to the server: slow, down, or losing answers when told so."""

    server: Server
    latency: Callable[[], float] = lambda: 0.01
    down: bool = False  # nothing arrives
    deaf: bool = False  # everything arrives, no answer comes back
    hanging: bool = False  # nothing arrives and nothing fails
    calls: int = 0

    async def _there(self) -> None:
        self.calls += 1
        if self.hanging:
            await asyncio.Event().wait()
        await asyncio.sleep(self.latency())
        if self.down:
            raise Unavailable("no route")

    async def _back(self) -> None:
        await asyncio.sleep(self.latency())
        if self.deaf or self.down:
            raise Unavailable("no answer")

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        await self._there()
        lease = copy.deepcopy(self.server.lease)
        await self._back()
        return lease

    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        await self._there()
        if self.server.lease is not None:
            raise AlreadyExists("there is one")
        lease = self.server.write(copy.deepcopy(obj))
        await self._back()
        return lease

    async def patch(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        await self._there()
        lease = self.server.lease
        if lease is None or lease["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict("somebody was faster")
        lease = self.server.write({**lease, "spec": {**lease["spec"], **body["spec"]}})
        await self._back()
        return lease


@dataclass
class Replica:
    """One election with its line; notes when it led."""

    server: Server
    name: str
    make: type[Election] = Election
    led: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.line = Line(self.server)
        self.election = self.make(self.line, "feddiff-system", "leader", self.name, TERM)
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.election.run(self._begin, self._end))

    async def stop(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def kill(self) -> None:
        """As by kill -9: nothing it does from now on arrives."""
        self.line.down = True
        await self.stop()

    @property
    def leads(self) -> bool:
        return bool(self.led) and len(self.led[-1]) == 1

    def _begin(self) -> None:
        self.led.append([now()])

    async def _end(self) -> None:
        if self.leads:
            self.led[-1].append(now())


def two() -> tuple[Server, Replica, Replica]:
    server = Server()
    a, b = Replica(server, "a"), Replica(server, "b")
    return server, a, b


def test_the_first_leads_the_second_waits_and_renewals_keep_it_so() -> None:
    async def scene() -> None:
        server, a, b = two()
        a.start()
        await asyncio.sleep(1)
        b.start()
        await asyncio.sleep(1000)
        assert (a.leads, b.leads) == (True, False)
        assert set(server.history) == {"a"}
        assert 1000 / TERM * 3 - 5 < len(server.history) < 1000 / TERM * 3 + 5
        await a.stop()
        await b.stop()

    run(scene())


def test_a_leader_that_stops_frees_the_lease_and_the_other_need_not_wait() -> None:
    async def scene() -> None:
        server, a, b = two()
        a.start()
        await asyncio.sleep(1)
        b.start()
        await asyncio.sleep(20)
        await a.stop()
        assert not a.leads
        assert server.lease is not None and server.lease["spec"]["holderIdentity"] == ""
        await asyncio.sleep(TERM / 3 + 0.1)
        assert b.leads
        assert server.lease["spec"]["leaseTransitions"] == 2 - 1
        await b.stop()

    run(scene())


def test_a_killed_leader_is_followed_after_a_whole_term_and_soon_after() -> None:
    async def scene() -> None:
        _, a, b = two()
        a.start()
        await asyncio.sleep(1)
        b.start()
        await asyncio.sleep(21)
        killed = now()
        await a.kill()
        await asyncio.sleep(100)
        assert b.leads
        waited = b.led[-1][0] - killed
        assert TERM * 2 / 3 - 0.2 <= waited <= TERM * 4 / 3 + 0.2
        await b.stop()

    run(scene())


def test_a_leader_whose_line_is_down_steps_down_by_its_own_clock_before_another_leads() -> None:
    async def scene(fault: str) -> None:
        _, a, b = two()
        a.start()
        await asyncio.sleep(1)
        b.start()
        await asyncio.sleep(30)
        setattr(a.line, fault, True)
        await asyncio.sleep(200)
        ended = a.led[0][1]
        if fault != "deaf":  # a deaf leader's renewals arrive, so nobody may follow it until it has given up
            assert b.leads
        assert all(began >= ended for began, *_ in b.led)
        await asyncio.gather(a.stop(), b.stop())

    for fault in ("down", "hanging", "deaf"):
        run(scene(fault))


def test_a_short_outage_costs_no_leadership() -> None:
    async def scene() -> None:
        _, a, b = two()
        a.start()
        await asyncio.sleep(1)
        b.start()
        await asyncio.sleep(30)
        a.line.down = True
        await asyncio.sleep(TERM / 2)
        a.line.down = False
        await asyncio.sleep(100)
        assert len(a.led) == 1 and a.leads and b.led == []
        await asyncio.gather(a.stop(), b.stop())

    run(scene())


def test_a_lease_that_somebody_else_took_or_deleted_ends_the_leadership_at_the_next_renewal() -> None:
    async def scene(remove: bool) -> None:
        server, a, _ = two()
        a.start()
        await asyncio.sleep(20)
        assert server.lease is not None
        if remove:
            server.lease = None
        else:
            server.write({**server.lease, "spec": {**server.lease["spec"], "holderIdentity": "c"}})
        await asyncio.sleep(TERM / 3 + 0.1)
        assert not a.leads or len(a.led) == 2  # a deleted one it may create anew
        await a.stop()

    run(scene(remove=False))
    run(scene(remove=True))


def test_an_annotation_on_the_lease_is_no_loss() -> None:
    async def scene() -> None:
        server, a, _ = two()
        a.start()
        await asyncio.sleep(20)
        assert server.lease is not None
        server.write({**server.lease, "metadata": {**server.lease["metadata"], "annotations": {"x": "y"}}})
        await asyncio.sleep(100)
        assert len(a.led) == 1 and a.leads
        await a.stop()

    run(scene())


def test_times_in_the_lease_are_nobodys_business() -> None:
    """A renewTime a year ago or ahead changes nothing: only that it changes counts."""

    async def scene(year: str) -> None:
        server, _, b = two()
        spec = {"holderIdentity": "a", "leaseDurationSeconds": TERM, "renewTime": f"{year}-01-01T00:00:00.000000Z"}
        server.write({"metadata": {"name": "leader"}, "spec": spec})
        b.start()
        await asyncio.sleep(TERM - 0.5)
        assert b.led == []
        await asyncio.sleep(1)
        assert b.leads
        await b.stop()

    run(scene("1999"))
    run(scene("2999"))


def test_a_holder_with_a_longer_term_is_given_its_own_term() -> None:
    async def scene() -> None:
        server, _, b = two()
        server.write({"metadata": {"name": "leader"}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 60}})
        b.start()
        await asyncio.sleep(59)
        assert b.led == []
        await asyncio.sleep(2)
        assert b.leads
        await b.stop()

    run(scene())


def test_a_lost_answer_to_the_taking_is_no_dead_end() -> None:
    async def scene() -> None:
        _, a, _ = two()
        a.line.deaf = True
        a.start()
        await asyncio.sleep(1)
        a.line.deaf = False
        await asyncio.sleep(TERM / 3 + 1)
        assert a.leads
        await a.stop()

    run(scene())


Faults = list[tuple[str, str, float, float]]  # replica, fault, seconds until it begins, seconds that it lasts
FAULTS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["down", "deaf", "hanging", "slow", "restart"]),
        st.floats(0.1, 30),
        st.floats(0.1, 60),
    ),
    max_size=8,
)


def _overlaps(make: type[Election], faults: Faults) -> list[tuple[float, float]]:
    """Moments at which two replicas led at once."""
    replicas: list[Replica] = []

    async def afflict(replica: Replica, fault: str, seconds: float) -> None:
        if fault == "restart":
            await replica.stop()
            replica.line.hanging = False
            replica.start()
        elif fault == "slow":
            replica.line.latency = lambda: 2.0
            await asyncio.sleep(seconds)
            replica.line.latency = lambda: 0.01
        else:
            setattr(replica.line, fault, True)
            await asyncio.sleep(seconds)
            setattr(replica.line, fault, False)

    async def scene() -> None:
        server = Server()
        replicas.extend(Replica(server, name, make) for name in "abc")
        for replica in replicas:
            replica.start()
        afflictions = []
        for name, fault, pause, seconds in faults:
            await asyncio.sleep(pause)
            afflictions.append(asyncio.create_task(afflict(replicas["abc".index(name)], fault, seconds)))
        await asyncio.sleep(200)
        await asyncio.gather(*afflictions)
        await asyncio.gather(*(replica.stop() for replica in replicas))

    run(scene())
    spans = sorted((began, ended) for replica in replicas for began, ended in replica.led)
    return [(later, ended) for (_, ended), (later, _) in itertools.pairwise(spans) if later < ended]


@given(FAULTS)
@settings(max_examples=80, deadline=None)
def test_never_do_two_lead_at_once(faults: Faults) -> None:
    assert _overlaps(Election, faults) == []


class _Stubborn(Election):
    """A broken leader: it goes on until it is told that another leads."""

    async def _hold(self) -> None:
        while await self._renewed():
            await asyncio.sleep(self._term / 3)


class _Impatient(Election):
    """A broken follower: it waits only for half of the term."""

    async def _acquire(self) -> None:
        self._term //= 2
        try:
            await super()._acquire()
        finally:
            self._term *= 2


@pytest.mark.parametrize("broken", [_Stubborn, _Impatient])
def test_the_check_above_finds_a_broken_election(broken: type[Election]) -> None:
    silent: Faults = [("a", "hanging", 20.0, 60.0)]
    assert _overlaps(broken, silent) != []
    assert _overlaps(Election, silent) == []
