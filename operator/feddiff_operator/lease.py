"""Which replica leads: one Lease, changed by compare-and-swap alone.

Nobody's wall clock is trusted. A replica takes over once it has seen the same Lease for a whole term by its own
monotonic clock; a leader steps down when, by its own, its last renewal was sent a term ago. Two can lead at once only
while one's clock runs slower than the other's, and no promise rests on it: the ledger has its own compare-and-swap.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from .cluster import LEASE, AlreadyExists, Conflict, Kind, Refused, Unavailable

log = structlog.get_logger()


class Leases(Protocol):
    """What an election needs of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None: ...
    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]: ...
    async def patch(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]: ...


class Election:
    """One replica's part in the election; `identity` must be no other's, also after a restart."""

    def __init__(self, cluster: Leases, namespace: str, name: str, identity: str, term_seconds: int) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._identity, self._term = identity, term_seconds
        self._version = ""  # resourceVersion of our last write
        self._sent = 0.0  # when it was sent
        self.leading = False

    async def run(self, begin: Callable[[], None], end: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: `begin` when this replica leads, `end` when it does so no longer. Frees the Lease."""
        while True:
            await self._acquire()
            async with self._leadership(begin, end):
                await self._hold()

    @contextlib.asynccontextmanager
    async def _leadership(self, begin: Callable[[], None], end: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        log.info("leading", lease=f"{self._namespace}/{self._name}", identity=self._identity)
        self.leading = True
        begin()
        try:
            yield
        except asyncio.CancelledError:
            await end()
            await self._release()
            raise
        finally:
            self.leading = False
            log.info("no longer leading", identity=self._identity)
        await end()

    # -- following

    async def _acquire(self) -> None:
        """The Lease is ours."""
        seen, since = None, _now()
        while True:
            pause = self._term / 3
            try:
                lease = await self._cluster.get(LEASE, self._namespace, self._name)
                if lease is None:
                    return await self._create()
                spec = lease.get("spec") or {}
                if spec != seen:  # somebody wrote since we last looked, and may have done so just now
                    seen, since = spec, _now()
                wait = max(self._term, spec.get("leaseDurationSeconds") or 0) - (_now() - since)
                if spec.get("holderIdentity") in (None, "", self._identity) or wait <= 0:
                    return await self._take(lease, spec)
                pause = min(pause, wait)
            except (Conflict, AlreadyExists):
                log.info("another replica was faster", identity=self._identity)
            except (Unavailable, Refused) as error:
                log.warning("the Lease cannot be read or taken", error=str(error))
            await asyncio.sleep(pause)

    async def _create(self) -> None:
        metadata = {"namespace": self._namespace, "name": self._name}
        sent = _now()
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": self._spec(0)}
        self._written(await self._cluster.create(LEASE, lease), sent)

    async def _take(self, lease: dict[str, Any], spec: dict[str, Any]) -> None:
        sent = _now()
        self._written(await self._write(lease, self._spec((spec.get("leaseTransitions") or 0) + 1)), sent)

    # -- leading

    async def _hold(self) -> None:
        """Returns when the Lease is no longer ours: a term without renewal, or another's name in it."""
        while True:
            try:
                async with asyncio.timeout_at(self._sent + self._term):
                    await asyncio.sleep(self._term / 3)
                    if not await self._renewed():
                        log.warning("another replica holds the Lease", identity=self._identity)
                        return
            except TimeoutError:
                log.warning("the Lease was not renewed for a whole term", seconds=self._term)
                return

    async def _renewed(self) -> bool:
        """True after a renewal, False when another replica holds the Lease; tries for ever."""
        version = self._version
        while True:
            sent = _now()
            try:
                async with asyncio.timeout(self._term / 3):  # one lost answer must not cost the whole term
                    renewed = {"renewTime": _wall_clock()}
                    self._written(await self._write({"metadata": {"resourceVersion": version}}, renewed), sent)
                return True
            except Conflict:
                with contextlib.suppress(Unavailable, Refused, TimeoutError):
                    lease = await self._cluster.get(LEASE, self._namespace, self._name)
                    if lease is None or (lease.get("spec") or {}).get("holderIdentity") != self._identity:
                        return False
                    version = lease["metadata"]["resourceVersion"]  # touched by somebody, still ours
                    continue
            except (Unavailable, Refused, TimeoutError) as error:
                log.warning("the Lease cannot be renewed", error=str(error) or "no answer")
            await asyncio.sleep(self._term / 15)

    async def _release(self) -> None:
        """The Lease names nobody, so that the next replica need not wait; best effort, within a second."""
        try:
            async with asyncio.timeout(1):
                await self._write(
                    {"metadata": {"resourceVersion": self._version}}, {"holderIdentity": "", "leaseDurationSeconds": 1}
                )
        except (TimeoutError, Conflict, Unavailable, Refused) as error:
            log.warning("the Lease could not be freed; it ends by itself", error=str(error))

    # -- the object

    def _spec(self, transitions: int) -> dict[str, Any]:
        now = _wall_clock()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._term,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }

    async def _write(self, lease: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
        """The Lease after a merge patch that holds only for the resourceVersion in `lease`. Raises Conflict."""
        body = {"metadata": {"resourceVersion": lease["metadata"]["resourceVersion"]}, "spec": spec}
        return await self._cluster.patch(LEASE, self._namespace, self._name, body)

    def _written(self, lease: dict[str, Any], sent: float) -> None:
        self._version, self._sent = lease["metadata"]["resourceVersion"], sent


def _now() -> float:
    return asyncio.get_running_loop().time()


def _wall_clock() -> str:
    """For people who look at the Lease; no replica reads it as a time."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
