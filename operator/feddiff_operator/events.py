"""What happened to an object, as `kubectl describe` shows it: one Event per object and reason, counted.

Recording never waits and never fails: an event is a courtesy, the conditions are the truth. What cannot be written
now is merged with what comes next, and what is too much is dropped.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from .cluster import EVENT, AlreadyExists, Conflict, Kind, Refused, Unavailable

log = structlog.get_logger()

MESSAGE_BYTES = 1024  # the API server refuses longer ones
COMPONENT = "feddiff-operator"
REST_SECONDS = 10.0  # between two writes of one event, whatever happens meanwhile is counted
GAP_SECONDS = 0.1  # between two writes of any events
MOST_REMEMBERED = 5_000  # events whose counts are in memory; a forgotten one is read again


class EventWriter(Protocol):
    """What the recorder needs of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None: ...
    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]: ...
    async def patch(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]: ...


@dataclass
class _Recorded:
    """One event of one object and reason: what is on the API server, and what is still to be written."""

    event: dict[str, Any]
    unwritten: int = 0  # occurrences since the last write
    count: int | None = None  # on the API server; None: not known yet
    not_before: float = 0.0
    happened: datetime = field(default_factory=lambda: datetime.now(UTC))


class Recorder:
    """The recorder; `run` writes what `record` has noted."""

    def __init__(self, cluster: EventWriter) -> None:
        self._cluster = cluster
        self._recorded: OrderedDict[str, _Recorded] = OrderedDict()  # by the event's name, least recent first
        self._noted = asyncio.Event()

    def record(self, regarding: Mapping[str, Any], reason: str, message: str, warning: bool = False) -> None:
        """Notes that `reason` happened to the object `regarding` (apiVersion, kind, metadata with uid)."""
        event = _event(regarding, reason, message, warning)
        name = f"{event['metadata']['namespace']}/{event['metadata']['name']}"
        recorded = self._recorded.pop(name, None) or _Recorded(event)
        recorded.event, recorded.happened = event, datetime.now(UTC)
        recorded.unwritten += 1
        self._recorded[name] = recorded
        self._forget_old_ones()
        self._noted.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            now = _now()
            waiting = [recorded for recorded in self._recorded.values() if recorded.unwritten]
            due = [recorded for recorded in waiting if recorded.not_before <= now]
            if due:
                await self._write(due[0])
                await asyncio.sleep(GAP_SECONDS)
            elif waiting:
                await self._wait(min(recorded.not_before for recorded in waiting) - now)
            else:
                await self._wait(None)

    async def flush(self) -> None:
        """Everything noted so far was tried once, without pauses; for the end of the process."""
        for recorded in [recorded for recorded in self._recorded.values() if recorded.unwritten]:
            await self._write(recorded)

    async def _wait(self, seconds: float | None) -> None:
        self._noted.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._noted.wait()
        except TimeoutError:
            pass

    def _forget_old_ones(self) -> None:
        while len(self._recorded) > MOST_REMEMBERED:
            self._recorded.popitem(last=False)

    async def _write(self, recorded: _Recorded) -> None:
        """The event is on the API server; otherwise its occurrences stay noted for later."""
        recorded.not_before = _now() + REST_SECONDS
        occurrences = recorded.unwritten
        try:
            await self._create_or_count(recorded, occurrences)
            recorded.unwritten -= occurrences
        except Refused as error:  # the namespace is going, or we may not write events there: it would not change
            recorded.unwritten = 0
            log.warning("an event was refused", name=recorded.event["metadata"]["name"], error=str(error))
        except (Unavailable, Conflict, AlreadyExists) as error:
            log.info("an event has to wait", name=recorded.event["metadata"]["name"], error=str(error))

    async def _create_or_count(self, recorded: _Recorded, occurrences: int) -> None:
        metadata = recorded.event["metadata"]
        stamp = recorded.happened.strftime("%Y-%m-%dT%H:%M:%SZ")
        if recorded.count is None:
            found = await self._cluster.get(EVENT, metadata["namespace"], metadata["name"])
            recorded.count = None if found is None else int(found.get("count") or 1)
        if recorded.count is None:
            times = {"firstTimestamp": stamp, "lastTimestamp": stamp, "count": occurrences}
            await self._cluster.create(EVENT, {**recorded.event, **times})
            recorded.count = occurrences
            return
        change = {
            "count": recorded.count + occurrences,
            "lastTimestamp": stamp,
            "message": recorded.event["message"],
            "type": recorded.event["type"],
        }
        try:
            await self._cluster.patch(EVENT, metadata["namespace"], metadata["name"], change)
        except Conflict:
            recorded.count = None  # the API server forgets events after an hour; the next try makes it anew
            raise
        recorded.count += occurrences


def _event(regarding: Mapping[str, Any], reason: str, message: str, warning: bool) -> dict[str, Any]:
    """A core/v1 Event whose name follows from the object's uid and the reason."""
    metadata = regarding["metadata"]
    digest = hashlib.sha256(f"{metadata['uid']}\0{reason}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": metadata["namespace"], "name": f"{metadata['name'][:200]}.{digest}"},
        "involvedObject": {
            "apiVersion": regarding["apiVersion"],
            "kind": regarding["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": _cut(message),
        "type": "Warning" if warning else "Normal",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
    }


def _cut(message: str) -> str:
    """The message within 1,024 bytes, never in the middle of a character."""
    encoded = message.encode()
    if len(encoded) <= MESSAGE_BYTES:
        return message
    return encoded[: MESSAGE_BYTES - 3].decode(errors="ignore") + "…"


def _now() -> float:
    return asyncio.get_running_loop().time()
