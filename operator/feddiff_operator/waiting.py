"""What keeps attempts from running, in the words of queue, scheduler and kubelet."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from .batch import (
    condition_of,
    container_state_of,
    is_suspended,
    key_of,
    labels_of,
    name_of,
    one_line,
    phase_of,
    pods_by_job,
    pods_of,
    time_of,
)
from .endings import is_over
from .workloads import QUEUE_NAME

Object = Mapping[str, Any]

PREPARATION_SECONDS = 60.0  # until a pod that is not there, or not running, is worth a word
SHOWN_CLIENTS = 5


def waiting(jobs: Iterable[Object], pods: Iterable[Object], now: datetime | None = None) -> list[str]:
    """What keeps attempts from running, and whose they are; equal words said once.

    That a pod is being prepared is said only when it takes long: a status is not written for what passes by itself.
    """
    said: dict[tuple[str, str], list[str]] = {}
    by_job = pods_by_job(pods)
    for job in sorted(jobs, key=name_of):
        if is_over(job):
            continue
        if words := hindrance(job, pods_of(job, by_job.get(name_of(job), [])), now):
            stage, client = key_of(job)
            said.setdefault((stage.value, words), []).append(client)
    return [f"{_whose(stage, clients)}: {words}" for (stage, words), clients in said.items()]


def hindrance(job: Object, pods: Sequence[Object], now: datetime | None) -> str:
    """Why the attempt does not run, or nothing when all of its pods do, or did not have the time yet."""
    if is_suspended(job):
        queue = labels_of(job).get(QUEUE_NAME)
        return f"queue {queue} has not admitted it" if queue else "something other than feddiff suspended its Job"
    if not pods:
        metadata = job["metadata"]
        if not _takes_long(job, now):
            return ""
        return f"no pod yet: kubectl describe job -n {metadata.get('namespace', 'default')} {metadata['name']} says why"
    return next((words for pod in pods if (words := _pod_hindrance(pod, now))), "")


def _takes_long(thing: Object, now: datetime | None) -> bool:
    created = thing["metadata"].get("creationTimestamp")
    return now is not None and bool(created) and now > time_of(created) + timedelta(seconds=PREPARATION_SECONDS)


def _pod_hindrance(pod: Object, now: datetime | None) -> str:
    if phase_of(pod) != "Pending":
        return ""
    scheduled = condition_of(pod, "PodScheduled", status="False")
    if scheduled is not None:
        return one_line(f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}")
    held = container_state_of(pod).get("waiting") or {}
    reason, message = held.get("reason", ""), held.get("message", "")
    if message:
        return one_line(f"{reason}: {message}")
    return f"its pod is still being prepared ({reason or 'no word'})" if _takes_long(pod, now) else ""


def _whose(stage: str, clients: Sequence[str]) -> str:
    named = [client for client in clients if client]
    if not named:
        return stage
    more = len(named) - SHOWN_CLIENTS
    shown = ", ".join(named[:SHOWN_CLIENTS])
    return f"{stage} of {shown} and {more} more" if more > 0 else f"{stage} of {shown}"
