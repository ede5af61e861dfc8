"""What batch Jobs and pods, plain JSON from the API server, say about a job's stages.

The child Jobs are the record of what happened: one per attempt, kept until the job has ended. Pods vanish, so what
they said is written onto their Job as annotations (`endings.record_of`), and `stages_observed` reads both.

An attempt ends in one of four ways. A valid receipt: Succeeded, whatever else happened. Taken away by the platform,
stopped by us, or left with exit code 75: Stopped, and not held against it. Stopped because of a deadline, or any
other exit code, or no word at all: Failed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.errors import FINAL_EXIT_CODES, Interrupted
from feddiff_protocol.labels import (
    ATTEMPT,
    CLIENT,
    EXIT_CODE,
    JOB_UID,
    LOST,
    MESSAGE,
    RECEIPT,
    STAGE,
    STOPPED,
    STOPPED_BECAUSE,
)
from feddiff_protocol.plan import Reason, StageKey, StageObserved, StagePhase
from feddiff_protocol.stages import Receipt, Stage

from .batch import (
    annotations_of,
    condition_of,
    is_finished,
    is_suspended,
    is_terminated,
    key_of,
    labels_of,
    name_of,
    pods_by_job,
    pods_of,
    running_since,
    time_of,
)
from .endings import is_over, receipt_of, said_by_pods
from .waiting import hindrance
from .workloads import child_name

Object = Mapping[str, Any]

DEADLINES = (Reason.STAGE_DEADLINE_EXCEEDED, Reason.START_DEADLINE_EXCEEDED)
LONGEST_RETRY_SECONDS = 300.0
ZOMBIE_SECONDS = 60.0  # beyond its grace period a pod that does not end is on a node that does not answer


def children_of(job: FederatedDiffusionJob, uid: str, jobs: Iterable[Object]) -> list[Object]:
    """The batch Jobs that are the attempts of `job`: labels can be forged in any namespace, so name and namespace
    must be those that follow from what the labels say."""
    namespaces = {"": job.metadata.namespace, **{each.name: each.dataset.namespace for each in job.spec.clients}}
    return [each for each in jobs if _is_attempt(each, uid, namespaces)]


def _is_attempt(child: Object, uid: str, namespaces: Mapping[str, str]) -> bool:
    labels = labels_of(child)
    stage, client, attempt = labels.get(STAGE, ""), labels.get(CLIENT, ""), labels.get(ATTEMPT, "")
    if stage not in set(Stage) or client not in namespaces or not re.fullmatch("[1-9][0-9]{0,8}", attempt):
        return False
    whole_job = stage in (Stage.TRAIN_SHARED, Stage.REPORT)
    if labels.get(JOB_UID) != uid or whole_job != (client == ""):
        return False
    place = child["metadata"].get("namespace"), name_of(child)
    return place == (namespaces[client], child_name(uid, Stage(stage), client, int(attempt)))


def stages_observed(jobs: Iterable[Object], pods: Iterable[Object], now: datetime) -> dict[StageKey, StageObserved]:
    """For every stage of one feddiff job: its newest attempt, or the older one that still runs or has succeeded."""
    return {key: _stage(attempts) for key, attempts in _by_stage(_attempts(jobs, pods, now)).items()}


def _stage(attempts: Sequence["_Attempt"]) -> StageObserved:
    newest, failures = attempts[-1], sum(each.seen.phase is StagePhase.FAILED for each in attempts)
    for attempt in attempts:
        if attempt.seen.phase is StagePhase.SUCCEEDED:
            return _counted(attempt.seen, attempt.number, failures)
    if any(each.seen.phase is StagePhase.RUNNING for each in attempts):
        return StageObserved(StagePhase.RUNNING, newest.number, failures)
    return _counted(newest.seen, newest.number, failures)


def _counted(seen: StageObserved, attempt: int, failures: int) -> StageObserved:
    return StageObserved(seen.phase, attempt, failures, seen.exit_code, seen.message, seen.receipt, seen.reason)


def retry_at(jobs: Iterable[Object], pods: Iterable[Object], now: datetime) -> dict[StageKey, datetime]:
    """From when the next attempt of a stage may start: min(2ⁿ, 300) s after the last one ended, n of them ended by
    themselves. What we stopped may go on at once."""
    moments = {}
    for key, attempts in _by_stage(_attempts(jobs, pods, now)).items():
        by_themselves = [each for each in attempts if each.ended_by_itself]
        if by_themselves and by_themselves[-1] is attempts[-1]:
            wait = min(2.0 ** min(len(by_themselves), 30), LONGEST_RETRY_SECONDS)
            moments[key] = by_themselves[-1].ended_at + timedelta(seconds=wait)
    return moments


@dataclass(frozen=True)
class Deadline:
    """When an attempt that waits or runs is stopped, and the annotations that then say why."""

    namespace: str
    name: str
    key: StageKey
    at: datetime
    reason: Reason
    message: str

    @property
    def annotations(self) -> dict[str, str]:
        return {STOPPED: self.reason.value, STOPPED_BECAUSE: self.message}


def deadlines(job: FederatedDiffusionJob, jobs: Iterable[Object], pods: Iterable[Object]) -> list[Deadline]:
    """One for every attempt under way that has a limit. Time in a queue, while suspended, does not count; what has
    said how it ended only waits for its controller."""
    found, by_job = [], pods_by_job(pods)
    for each in jobs:
        own = pods_of(each, by_job.get(name_of(each), []))
        over = is_over(each) or RECEIPT in annotations_of(each) or bool(said_by_pods(each, own))
        if not over and not is_suspended(each) and (deadline := _deadline(job, each, own)) is not None:
            found.append(deadline)
    return found


def releasing_since(jobs: Iterable[Object], pods: Iterable[Object]) -> datetime | None:
    """When the first release began to run; None while all of them wait for their queue, a node or their image."""
    by_job = pods_by_job(pods)
    releases = (each for each in jobs if key_of(each)[0] is Stage.RELEASE)
    moments = (_began(each, pods_of(each, by_job.get(name_of(each), []))) for each in releases)
    return min((moment for moment in moments if moment is not None), default=None)


# ---- Attempts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """One batch Job with its pods, understood."""

    key: StageKey
    number: int
    seen: StageObserved
    ended_at: datetime
    ended_by_itself: bool  # it failed, or the platform took it


def _attempts(jobs: Iterable[Object], pods: Iterable[Object], now: datetime) -> list[_Attempt]:
    by_job = pods_by_job(pods)
    return [_attempt(job, pods_of(job, by_job.get(name_of(job), [])), now) for job in jobs]


def _by_stage(attempts: Iterable[_Attempt]) -> dict[StageKey, list[_Attempt]]:
    stages: dict[StageKey, list[_Attempt]] = {}
    for attempt in sorted(attempts, key=lambda each: each.number):
        stages.setdefault(attempt.key, []).append(attempt)
    return stages


def _attempt(job: Object, pods: Sequence[Object], now: datetime) -> _Attempt:
    number, annotations = int(labels_of(job)[ATTEMPT]), annotations_of(job)
    seen = _seen(job, pods, number, now)
    stopped_by_us = STOPPED in annotations and annotations[STOPPED] not in DEADLINES
    ended = seen.phase in (StagePhase.FAILED, StagePhase.STOPPED)
    return _Attempt(key_of(job), number, seen, _ended_at(job), ended and not stopped_by_us)


def _seen(job: Object, pods: Sequence[Object], number: int, now: datetime) -> StageObserved:
    record = {**annotations_of(job), **said_by_pods(job, pods)}
    if RECEIPT in record:
        receipt, fault = receipt_of(job, record[RECEIPT])
        if receipt is not None:
            return StageObserved(StagePhase.SUCCEEDED, number, receipt=receipt)
        record = {EXIT_CODE: "0", MESSAGE: fault}
    if not _over(job, pods, now):
        return StageObserved(StagePhase.RUNNING, number)
    return _ended(job, number, record)


def _over(job: Object, pods: Sequence[Object], now: datetime) -> bool:
    """Whether nothing of the attempt runs any more, or will."""
    live = [pod for pod in pods if not is_terminated(pod) and not _zombie(pod, now)]
    if live:
        return False
    if is_finished(job):
        return True
    zombies = any(_zombie(pod, now) for pod in pods)
    status = job.get("status", {})
    ends = condition_of(job, "FailureTarget") is not None
    if STOPPED in annotations_of(job):
        gone = not status.get("active") and not status.get("terminating")
        return (ends or condition_of(job, "Suspended") is not None) and (gone or zombies)
    # The Job controller waits for a pod on a lost node for as long as the node is known.
    return zombies and ends


def _zombie(pod: Object, now: datetime) -> bool:
    deleted = pod["metadata"].get("deletionTimestamp")
    return bool(deleted) and not is_terminated(pod) and now > time_of(deleted) + timedelta(seconds=ZOMBIE_SECONDS)


def _ended(job: Object, number: int, record: Mapping[str, str]) -> StageObserved:
    """An attempt without a receipt, of which nothing runs any more."""
    stopped, code, message = record.get(STOPPED), record.get(EXIT_CODE, ""), record.get(MESSAGE, "")
    exit_code = int(code) if re.fullmatch("[0-9]{1,3}", code) else None
    if exit_code in FINAL_EXIT_CODES:
        return StageObserved(StagePhase.FAILED, number, exit_code=exit_code, message=message)
    if stopped in DEADLINES:
        words = record.get(STOPPED_BECAUSE, stopped)
        return StageObserved(StagePhase.FAILED, number, message=words, reason=Reason(stopped))
    if stopped is not None:
        return StageObserved(StagePhase.STOPPED, number, exit_code=exit_code, message=f"stopped: {stopped}")
    if code == LOST or exit_code == Interrupted.exit_code:
        return StageObserved(StagePhase.STOPPED, number, exit_code=exit_code, message=message)
    message = message or "its pod is gone and left neither receipt nor exit code"
    return StageObserved(StagePhase.FAILED, number, exit_code=exit_code, message=message)


def _ended_at(job: Object) -> datetime:
    """When the Job controller said so; before it did, the Job's creation, which only lets a retry come sooner."""
    moments = [
        time_of(condition["lastTransitionTime"])
        for kind in ("Complete", "Failed", "FailureTarget", "Suspended")
        if (condition := condition_of(job, kind)) is not None and condition.get("lastTransitionTime")
    ]
    return max(moments, default=time_of(job["metadata"].get("creationTimestamp", "1970-01-01T00:00:00Z")))


# ---- Deadlines ---------------------------------------------------------------------------------------------------


def _deadline(job: FederatedDiffusionJob, child: Object, pods: Sequence[Object]) -> Deadline | None:
    """The deadline that the attempt is under now: to start, or to end."""
    stage, _ = key = key_of(child)
    limits = job.spec.deadlines.of(stage.value)
    since, seconds = running_since(child, pods), limits.stage_seconds
    reason, words = Reason.STAGE_DEADLINE_EXCEEDED, f"ran longer than deadlines.stageSeconds = {seconds}"
    if since is None:
        started = child.get("status", {}).get("startTime")
        since, seconds = time_of(started) if started else None, limits.start_seconds
        at = since + timedelta(seconds=seconds) if since and seconds else None
        why = hindrance(child, pods, at) or "its pods did not all run"
        reason = Reason.START_DEADLINE_EXCEEDED
        words = f"waited longer than deadlines.startSeconds = {seconds}: {why}"
    if seconds is None or since is None:
        return None
    metadata = child["metadata"]
    at = since + timedelta(seconds=seconds)
    return Deadline(metadata.get("namespace", "default"), metadata["name"], key, at, reason, words)


def _began(job: Object, pods: Sequence[Object]) -> datetime | None:
    """When the attempt began to run; of one whose pods are gone, when its Job was let start."""
    if (since := running_since(job, pods)) is not None:
        return since
    started = job.get("status", {}).get("startTime")
    return time_of(started) if started and {RECEIPT, EXIT_CODE} & annotations_of(job).keys() else None


# ---- What was recorded -------------------------------------------------------------------------------------------


def with_recorded_release(
    stages: Mapping[StageKey, StageObserved], uid: str, client: str, manifest_sha256: str
) -> dict[StageKey, StageObserved]:
    """`stages`, the client's release done as its ledger recorded it, even if somebody deleted the Job that says so."""
    key = (Stage.RELEASE, client)
    seen = stages.get(key)
    if not manifest_sha256 or (seen is not None and seen.phase is StagePhase.SUCCEEDED):
        return dict(stages)
    attempt = seen.attempt if seen else 1
    outputs = {"manifest": manifest_sha256}
    receipt = Receipt(stage=Stage.RELEASE, job_uid=uid, client=client, attempt=attempt, outputs=outputs, milliseconds=0)
    return {**stages, key: StageObserved(StagePhase.SUCCEEDED, attempt, receipt=receipt)}
