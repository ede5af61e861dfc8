"""Batch Jobs and their pods, plain JSON from the API server, read: which fields say what, and nothing of what follows
from it. What is missing reads as what it means: a pod without a phase is Pending.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from feddiff_protocol.labels import CLIENT, COMPLETION_INDEX, JOB_NAME_OF_POD, STAGE
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage

from .workloads import CONTAINER

Object = Mapping[str, Any]
WORDS_LENGTH = 300
CONTROLLER_UID = "batch.kubernetes.io/controller-uid"  # written by the Job controller


def key_of(job: Object) -> StageKey:
    """The stage and the client ("" for the whole job's) that a batch Job of ours is an attempt of."""
    return Stage(labels_of(job)[STAGE]), labels_of(job).get(CLIENT, "")


def name_of(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def labels_of(thing: Object) -> Mapping[str, str]:
    return thing["metadata"].get("labels") or {}


def annotations_of(thing: Object) -> Mapping[str, str]:
    return thing["metadata"].get("annotations") or {}


def condition_of(thing: Object, kind: str, status: str = "True") -> Object | None:
    """The condition of this type, if it has this status."""
    conditions: list[Object] = (thing.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each.get("type") == kind and each.get("status") == status), None)


def is_finished(job: Object) -> bool:
    return condition_of(job, "Complete") is not None or condition_of(job, "Failed") is not None


def is_suspended(job: Object) -> bool:
    """By us or by its queue."""
    return bool(job["spec"].get("suspend"))


def is_out_of_time(job: Object) -> bool:
    """Whether it ends as soon as anything lets it go on: its controller then makes no pod."""
    return bool(job["spec"].get("activeDeadlineSeconds") == 0)


def one_line(words: str) -> str:
    """The platform's words, short enough for a status."""
    words = " ".join(words.split()).strip(": ")
    return words if len(words) <= WORDS_LENGTH else f"{words[: WORDS_LENGTH - 1]}…"


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


# ---- Pods -----------------------------------------------------------------------------------------------------------


def job_name_of(pod: Object) -> str:
    labels = labels_of(pod)
    return str(labels.get(JOB_NAME_OF_POD) or labels.get("job-name") or "")


def pods_of(job: Object, pods: Iterable[Object]) -> list[Object]:
    """The Job's own pods: not those of an earlier Job of the same name that somebody deleted, nor what bears the labels
    in another namespace."""
    metadata = job["metadata"]
    return [
        pod
        for pod in pods
        if job_name_of(pod) == name_of(job)
        and pod["metadata"].get("namespace") == metadata.get("namespace")
        and labels_of(pod).get(CONTROLLER_UID) == metadata.get("uid")
    ]


def pods_by_job(pods: Iterable[Object]) -> dict[str, list[Object]]:
    """The pods under the names of their Jobs: a thousand Jobs do not each look through all pods."""
    result: dict[str, list[Object]] = {}
    for pod in pods:
        result.setdefault(job_name_of(pod), []).append(pod)
    return result


def phase_of(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def is_terminated(pod: Object) -> bool:
    return phase_of(pod) in ("Succeeded", "Failed")


def is_first(pod: Object) -> bool:
    """Whether it is the pod of rank 0, which writes the receipt, or the only one."""
    metadata = pod["metadata"]
    index = (metadata.get("annotations") or {}).get(COMPLETION_INDEX) or labels_of(pod).get(COMPLETION_INDEX)
    return index in (None, "0")


def container_state_of(pod: Object) -> Mapping[str, Object]:
    states = [
        status.get("state") or {}
        for status in pod.get("status", {}).get("containerStatuses") or []
        if status.get("name") == CONTAINER
    ]
    return states[0] if states else {}


def ending_of(pod: Object) -> Object:
    """How the stage's container terminated; empty while it did not."""
    return container_state_of(pod).get("terminated") or {}


def exit_code_of(pod: Object) -> int | None:
    code = ending_of(pod).get("exitCode")
    return int(code) if code is not None else None


def is_out_of_memory(pod: Object) -> bool:
    return bool(ending_of(pod).get("reason") == "OOMKilled")


def started_at(pod: Object) -> datetime | None:
    state = container_state_of(pod)
    moment = (state.get("running") or state.get("terminated") or {}).get("startedAt")
    return time_of(moment) if moment else None


def running_since(job: Object, pods: Sequence[Object]) -> datetime | None:
    """When the last of the attempt's pods began to run; None while one of them still waits."""
    started = [moment for pod in pods if (moment := started_at(pod)) is not None]
    return max(started) if len(started) >= job["spec"].get("parallelism", 1) else None


def deletion_of(pod: Object) -> datetime:
    """When somebody asked for the deletion; the API server notes when the grace period after it is over."""
    metadata = pod["metadata"]
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    return time_of(metadata["deletionTimestamp"]) - grace


def was_deleted_first(pod: Object) -> bool:
    """Whether the pod was deleted before it ended: then its end says nothing about the stage."""
    if not pod["metadata"].get("deletionTimestamp"):
        return False
    finished = ending_of(pod).get("finishedAt")
    return not finished or time_of(finished) >= deletion_of(pod)
