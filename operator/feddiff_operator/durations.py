"""How long an attempt of a stage waited and ran, told once, when its pods first say how it ended."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from feddiff_protocol.errors import Interrupted
from feddiff_protocol.labels import EXIT_CODE, LOST, RECEIPT, STAGE

from .workloads import CONTAINER

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """One attempt that has ended."""

    stage: str
    result: str  # succeeded, failed, or stopped: by us, by itself to go on later, or by the platform
    waited_seconds: float  # from its creation to its first pod's start
    ran_seconds: float  # from there to its last pod's end


def ended_now(job: Object, pods: Iterable[Object], record: Mapping[str, str]) -> Ended | None:
    """The end of the batch Job `job`, if `record` is the first that its pods say of it, and if one of them ran."""
    metadata = job["metadata"]
    known = metadata.get("annotations") or {}
    runs = [run for pod in pods if (run := _run(pod)) is not None]
    if RECEIPT in known or EXIT_CODE in known or not runs:
        return None
    began, ended = min(began for began, _ in runs), max(ended for _, ended in runs)
    waited = (began - _time(metadata["creationTimestamp"])).total_seconds()
    ran = (ended - began).total_seconds()
    return Ended(metadata["labels"][STAGE], _result(record), max(0.0, waited), max(0.0, ran))


def _result(record: Mapping[str, str]) -> str:
    if RECEIPT in record:
        return "succeeded"
    return "stopped" if record.get(EXIT_CODE) in (LOST, str(Interrupted.exit_code)) else "failed"


def _run(pod: Object) -> tuple[datetime, datetime] | None:
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        ending = (status.get("state") or {}).get("terminated") or {}
        if status.get("name") == CONTAINER and ending.get("startedAt") and ending.get("finishedAt"):
            return _time(ending["startedAt"]), _time(ending["finishedAt"])
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
