"""One job and its children at one moment, and the moments that matter to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TypeVar

from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.plan import JobPhase, Plan, Stop

from .batch import condition_of, key_of, time_of
from .cluster import Object
from .endings import is_over
from .observe import Deadline, deadlines, releasing_since

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    found: Object  # the job, as it was read
    job: FederatedDiffusionJob
    uid: str
    jobs: Sequence[Object]  # the batch Jobs that are its attempts
    pods: Sequence[Object]
    now: datetime

    @cached_property
    def deadlines(self) -> list[Deadline]:
        return deadlines(self.job, self.jobs, self.pods)

    @property
    def counted(self) -> tuple[str, ...]:
        return tuple((self.found.get("status") or {}).get("counted") or ())

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple((self.found.get("status") or {}).get("leftOut") or ())

    def taking_part(self, by_client: Mapping[str, T]) -> dict[str, T]:
        """`by_client` of those who are not left out."""
        return {client: each for client, each in by_client.items() if client not in self.left_out}

    @property
    def releasing_since(self) -> datetime | None:
        """When the first release began to run, as the status says or the children do; None before that."""
        known = (self.found.get("status") or {}).get("releasingSince")
        return time_of(known) if known else releasing_since(self.jobs, self.pods)

    @property
    def going_on_since(self) -> datetime | None:
        """When the job began, or went on after it was suspended; None while it is."""
        goes_on = condition_of(self.found, "Suspended", status="False")
        return time_of(goes_on["lastTransitionTime"]) if goes_on is not None and not self.job.spec.suspend else None

    @property
    def reservation_deadline(self) -> datetime | None:
        """It stands still while the job is suspended, and counts anew from when it goes on."""
        seconds, since = self.job.spec.deadlines.reservation_seconds, self.going_on_since
        return since + timedelta(seconds=seconds) if seconds is not None and since is not None else None

    @property
    def release_deadline(self) -> datetime | None:
        """None before the first release, and once the releases are counted; otherwise as the other one."""
        seconds, since = self.job.spec.deadlines.release_seconds, self.releasing_since
        if seconds is None or since is None or self.counted or self.going_on_since is None:
            return None
        return max(since, self.going_on_since) + timedelta(seconds=seconds)

    def passed(self, deadline: datetime | None) -> bool:
        return deadline is not None and deadline <= self.now

    def to_stop(self, decision: Plan) -> list[Object]:
        """The attempts that `decision` stops, apart from those that cleanPodPolicy None leaves alone."""
        stages = [(stop.stage, stop.client) for stop in decision.actions if isinstance(stop, Stop)]
        keys = {key for key in stages if not self._left_running(decision, client=key[1])}
        return [child for child in self.jobs if key_of(child) in keys and not is_over(child)]

    def _left_running(self, decision: Plan, client: str) -> bool:
        """Whether the job has ended, and the client was part of it to the end. What was late or dropped is stopped all
        the same, and so is a release that will never count."""
        ends = decision.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED)
        took_part = self.counted and client in ("", *self.counted) and client not in decision.status.dropped
        spec = self.job.spec
        return bool(ends and took_part) and spec.clean_pod_policy == "None" and not spec.suspend
