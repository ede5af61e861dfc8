"""How far the stages of jobs in flight are, as their own pods say when they are asked: docs/decisions/0009.

Nothing waits for an answer. A pod that is silent, slow, or says what cannot be is as good as one that was not asked,
and what a pod says moves a number in a status, never a decision.
"""

import asyncio
import ipaddress
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from feddiff_protocol.labels import CLIENT, COMPLETION_INDEX, STAGE
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import METRICS_PORT, PROGRESS_BYTES, PROGRESS_PATH, StageProgress

from .batch import pods_by_job
from .cluster import few_at_a_time

ASK_SECONDS = 2.0
ANSWER_BYTES = 1024 + PROGRESS_BYTES  # head and body together
SIDE_BY_SIDE = 16
MOST_ASKED = 400  # in one round; of more pods, those that were asked longest ago
REMEMBERED = 40  # answers of one pod: its pace is that of the last minutes

Object = Mapping[str, Any]
Ask = Callable[[str], Awaitable[StageProgress | None]]


@dataclass(frozen=True)
class Target:
    """A running pod that can be asked."""

    key: StageKey
    pod: str  # its uid
    address: str


@dataclass(frozen=True)
class Known:
    """What is known of one stage: the share ∈ [0, 1] that is done, and when at its present pace it will be through."""

    share: float
    ends_at: datetime | None = None


def targets(jobs: Iterable[Object], pods: Iterable[Object]) -> list[Target]:
    """The running pods of these batch Jobs, of several ranks the first. Nothing else can be made to be asked: not a
    pod that only bears the labels, not the node itself, not an address that no pod has."""
    by_job = pods_by_job(pods)
    return [
        Target((Stage(job["metadata"]["labels"][STAGE]), job["metadata"]["labels"].get(CLIENT, "")), *place)
        for job in jobs
        for pod in by_job.get(job["metadata"]["name"], [])
        if (place := _place(job, pod)) is not None
    ]


def _place(job: Object, pod: Object) -> tuple[str, str] | None:
    """The pod's uid and address, if it is one to ask."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    said = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    controller, first = said.get("batch.kubernetes.io/controller-uid"), said.get(COMPLETION_INDEX, "0") == "0"
    own = metadata.get("namespace") == job["metadata"].get("namespace")
    running = status.get("phase") == "Running" and not metadata.get("deletionTimestamp")
    address = str(status.get("podIP", ""))
    if not (own and first and running and controller in (None, job["metadata"].get("uid"))):
        return None
    return (str(metadata.get("uid")), address) if address != status.get("hostIP") and is_a_pods(address) else None


def is_a_pods(address: str) -> bool:
    """Whether a pod can have this address: it is none of the machine's own, of a link's, or of many."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified)


# ---- One pod -----------------------------------------------------------------------------------------------------


async def ask(address: str, port: int = METRICS_PORT) -> StageProgress | None:
    """What the pod at `address` says; None when nothing comes in time, too much, or what cannot be."""
    try:
        async with asyncio.timeout(ASK_SECONDS):
            return answer_of(await _answer(address, port))
    except (OSError, TimeoutError):
        return None


async def _answer(address: str, port: int) -> bytes:
    """At most ANSWER_BYTES, and nothing when more came. A plain socket: no redirects, no compression, no cookies."""
    reader, writer = await asyncio.open_connection(address, port, limit=ANSWER_BYTES)
    try:
        writer.write(f"GET {PROGRESS_PATH} HTTP/1.0\r\nHost: stage\r\n\r\n".encode())
        await reader.readexactly(ANSWER_BYTES + 1)
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    finally:
        writer.transport.abort()
    return b""


def answer_of(answer: bytes) -> StageProgress | None:
    """The progress that an HTTP answer holds, if it holds one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not re.match(rb"HTTP/1\.[01] 200 ", head) or len(body) > PROGRESS_BYTES:
        return None
    try:
        return StageProgress.model_validate_json(body)
    except ValidationError:
        return None


class _Told:
    """What one pod has said so far."""

    def __init__(self, said: StageProgress, at: datetime) -> None:
        self.last = said
        self._samples = deque([(at, said.done)], maxlen=REMEMBERED)

    def hear(self, said: StageProgress, at: datetime) -> None:
        """A pod that goes back or changes its mind about the whole is not believed."""
        if said.total == self.last.total and said.done >= self.last.done:
            self.last = said
            self._samples.append((at, said.done))

    def known(self) -> Known:
        return Known(self.last.done / self.last.total, self._ends_at())

    def _ends_at(self) -> datetime | None:
        (began, first), (now, done) = self._samples[0], self._samples[-1]
        seconds = (now - began).total_seconds()
        if self.last.stage is not Stage.TRAIN_SHARED or done <= first or seconds <= 0:
            return None
        left = (self.last.total - done) * seconds / (done - first)
        return now + timedelta(seconds=left) if left < timedelta(days=365).total_seconds() else None


# ---- All of them -------------------------------------------------------------------------------------------------


@dataclass
class _Followed:
    """One job in flight."""

    uid: str
    targets: Sequence[Target] = ()
    told: dict[str, _Told] = field(default_factory=dict)  # by pod
    known: dict[StageKey, Known] = field(default_factory=dict)  # also of a stage whose pod is gone: it goes on there


class Progresses:
    """How far every job is that is followed, by namespace and name."""

    def __init__(self, clock: Callable[[], datetime], ask: Ask = ask) -> None:
        self._clock, self._ask = clock, ask
        self._jobs: dict[tuple[str, str], _Followed] = {}
        self._asked: dict[str, int] = {}  # the round in which a pod was last asked
        self._rounds = 0

    def follow(self, namespace: str, name: str, uid: str, targets: Sequence[Target]) -> None:
        """From now on these pods of the job are asked, and no others."""
        job = self._jobs.get((namespace, name))
        if job is None or job.uid != uid:
            job = self._jobs[namespace, name] = _Followed(uid)
        job.targets = targets
        pods = {target.pod for target in targets}
        job.told = {pod: told for pod, told in job.told.items() if pod in pods}

    def forget(self, namespace: str, name: str) -> None:
        """The job is in flight no longer."""
        self._jobs.pop((namespace, name), None)

    def clear(self) -> None:
        """Who no longer leads asks nobody."""
        self._jobs.clear()

    def of(self, namespace: str, name: str) -> Mapping[StageKey, Known]:
        """What is known of the job's stages; those of which nothing is known are not in it."""
        job = self._jobs.get((namespace, name))
        return job.known if job is not None else {}

    async def round(self) -> list[tuple[str, str]]:
        """The jobs about which there is something new to say, now that every running pod was asked once; of very many
        pods, those that were asked longest ago."""
        self._rounds += 1
        everybody = [(job, target) for job in self._jobs.values() for target in job.targets]
        self._asked = {target.pod: self._asked.get(target.pod, 0) for _, target in everybody}
        turn = sorted(everybody, key=lambda each: self._asked[each[1].pod])[:MOST_ASKED]
        before = {place: _percents(job.known) for place, job in self._jobs.items()}
        await few_at_a_time(self._ask_one, turn, SIDE_BY_SIDE)
        return [place for place, known in before.items() if _percents(self.of(*place)) != known]

    async def _ask_one(self, followed: tuple[_Followed, Target]) -> None:
        job, target = followed
        self._asked[target.pod] = self._rounds
        said = await self._ask(target.address)
        if said is None or said.stage is not target.key[0] or target not in job.targets:
            return  # the last: it ended while it was asked, and another one may have its address
        if target.pod in job.told:
            job.told[target.pod].hear(said, self._clock())
        else:
            job.told[target.pod] = _Told(said, self._clock())
        job.known[target.key] = job.told[target.pod].known()


def _percents(known: Mapping[StageKey, Known]) -> dict[StageKey, int]:
    return {key: math.floor(100 * each.share) for key, each in known.items()}
