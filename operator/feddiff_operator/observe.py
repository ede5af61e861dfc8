"""What batch Jobs and pods, plain JSON from the API server, say about a job's stages.

The child Jobs are the record of what happened: one per attempt, kept until the job has ended. Pods vanish, so what
they said is written onto their Job as annotations (`record_of`), and `stages_observed` reads both.

An attempt ends in one of four ways. A valid receipt: Succeeded, whatever else happened. Taken away by the platform,
stopped by us, or left with exit code 75: Stopped, and not held against it. Stopped because of a deadline, or any
other exit code, or no word at all: Failed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

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
    UNKNOWN,
)
from feddiff_protocol.plan import Reason, StageKey, StageObserved, StagePhase
from feddiff_protocol.stages import RECEIPT_BYTES, Receipt, Stage

from .batch import (
    annotations_of,
    condition_of,
    container_state_of,
    deletion_of,
    ending_of,
    exit_code_of,
    is_finished,
    is_first,
    is_out_of_memory,
    is_out_of_time,
    is_suspended,
    is_terminated,
    key_of,
    labels_of,
    name_of,
    phase_of,
    pods_by_job,
    pods_of,
    running_since,
    time_of,
    was_deleted_first,
)
from .workloads import QUEUE_NAME, child_name

Object = Mapping[str, Any]

DEADLINES = (Reason.STAGE_DEADLINE_EXCEEDED, Reason.START_DEADLINE_EXCEEDED)
LONGEST_RETRY_SECONDS = 300.0
ZOMBIE_SECONDS = 60.0  # beyond its grace period a pod that does not end is on a node that does not answer
PREPARATION_SECONDS = 60.0  # until a pod that is not there, or not running, is worth a word
WORDS_LENGTH = 300
SHOWN_CLIENTS = 5
# What the next stage needs to trust the bytes.
OUTPUTS = {Stage.RELEASE: "manifest", Stage.TRAIN_SHARED: "denoiser"}
MEANING = {
    0: "done",
    1: "a bug of ours, or stopped from outside",
    64: "the command line does not fit",
    65: "spec or data invalid",
    66: "an input is missing",
    69: "a store does not answer",
    73: "output cannot be written",
    74: "an input or output error",
    75: "interrupted",
    77: "privacy refusal, nothing was sent",
    78: "configuration invalid",
    137: "killed",
    143: "terminated",
}


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


def record_of(job: Object, pods: Iterable[Object]) -> dict[str, str] | None:
    """Annotations to write onto the batch Job `job`, because its pods now say so; None when there is nothing new.

    A Job that its queue suspended says nothing: its pods were taken away and come again.
    """
    written = annotations_of(job)
    if RECEIPT in written:
        return None
    record = _said(job, pods_of(job, pods))
    return record if any(written.get(key) != value for key, value in record.items()) else None


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
        over = is_over(each) or RECEIPT in annotations_of(each) or bool(_said(each, own))
        if not over and not is_suspended(each) and (deadline := _deadline(job, each, own)) is not None:
            found.append(deadline)
    return found


def releasing_since(jobs: Iterable[Object], pods: Iterable[Object]) -> datetime | None:
    """When the first release began to run; None while all of them wait for their queue, a node or their image."""
    by_job = pods_by_job(pods)
    releases = (each for each in jobs if key_of(each)[0] is Stage.RELEASE)
    moments = (_began(each, pods_of(each, by_job.get(name_of(each), []))) for each in releases)
    return min((moment for moment in moments if moment is not None), default=None)


def waiting(jobs: Iterable[Object], pods: Iterable[Object], now: datetime | None = None) -> list[str]:
    """What keeps attempts from running, in the words of queue, scheduler and kubelet; equal words said once.

    That a pod is being prepared is said only when it takes long: a status is not written for what passes by itself.
    """
    said: dict[tuple[str, str], list[str]] = {}
    by_job = pods_by_job(pods)
    for job in sorted(jobs, key=name_of):
        if is_over(job):
            continue
        if words := _hindrance(job, pods_of(job, by_job.get(name_of(job), [])), now):
            stage, client = key_of(job)
            said.setdefault((stage.value, words), []).append(client)
    return [f"{_whose(stage, clients)}: {words}" for (stage, words), clients in said.items()]


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
    record = {**annotations_of(job), **_said(job, pods)}
    if RECEIPT in record:
        receipt, fault = _receipt(job, record[RECEIPT])
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


# ---- What pods say -----------------------------------------------------------------------------------------------


def _said(job: Object, pods: Sequence[Object]) -> dict[str, str]:
    """What the attempt's pods say about its end, as annotations; nothing while they say nothing, or nothing that
    counts: pods of a Job that its queue suspended were taken away and come again."""
    speakers = [pod for pod in pods if phase_of(pod) == "Succeeded" and is_first(pod)]
    if speakers:
        return _receipt_record(job, speakers[0])
    if is_suspended(job) and STOPPED not in annotations_of(job):
        return {}
    if lost := next((words for pod in pods if (words := _taken(pod))), ""):
        return {EXIT_CODE: LOST, MESSAGE: lost}
    deleted = min((pod for pod in pods if was_deleted_first(pod)), key=deletion_of, default=None)
    failed = [pod for pod in pods if phase_of(pod) == "Failed" and _speaks_for_itself(pod, deleted)]
    if failed:
        return _exit_record(job, _telling(failed))
    if deleted is not None and is_terminated(deleted):
        return {EXIT_CODE: LOST, MESSAGE: f"pod {name_of(deleted)} was deleted while it ran"}
    return {}


def _speaks_for_itself(pod: Object, deleted: Object | None) -> bool:
    """Whether the pod's end is its own: not a deletion's, nor the consequence of another rank's deletion."""
    if exit_code_of(pod) in FINAL_EXIT_CODES or deleted is None:
        return True
    finished = ending_of(pod).get("finishedAt")
    return not was_deleted_first(pod) and (not finished or time_of(finished) <= deletion_of(deleted))


def _receipt_record(job: Object, pod: Object) -> dict[str, str]:
    receipt, fault = _receipt(job, ending_of(pod).get("message", ""))
    if receipt is not None:
        return {RECEIPT: receipt.to_line()}
    return {EXIT_CODE: "0", MESSAGE: f"{fault}; {_log_command(job)}"}


def _receipt(job: Object, text: str) -> tuple[Receipt | None, str]:
    """The receipt, if it is this attempt's; otherwise what is wrong. Nothing of a bad one is repeated."""
    if not text.strip():
        return None, "receipt missing"
    receipt = _well_formed(text)
    if receipt is None:
        return None, "receipt malformed"
    labels = labels_of(job)
    own = (labels.get(STAGE), labels.get(JOB_UID), labels.get(CLIENT, ""), labels.get(ATTEMPT))
    if (receipt.stage.value, receipt.job_uid, receipt.client, str(receipt.attempt)) != own:
        return None, "receipt of another stage"
    return receipt, ""


@lru_cache(maxsize=10_000)  # it stands on its Job until the end, and every look reads it
def _well_formed(text: str) -> Receipt | None:
    try:
        if len(text.encode()) > RECEIPT_BYTES:
            return None
        receipt = Receipt.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError):
        return None
    needed = OUTPUTS.get(receipt.stage)
    return receipt if needed is None or needed in receipt.outputs else None


def _exit_record(job: Object, pod: Object) -> dict[str, str]:
    """Exit code and its meaning, never a word of the pod's own: an owner's output stays with the owner."""
    status, code = pod.get("status", {}), exit_code_of(pod)
    platform = _cut(f"{status.get('reason', '')}: {status.get('message', '')}")
    if code is None:
        return {EXIT_CODE: UNKNOWN, MESSAGE: platform or f"it left no exit code; {_log_command(job)}"}
    meaning = "OOMKilled, out of memory: raise its limit" if is_out_of_memory(pod) else MEANING.get(code)
    words = [meaning or "no code of ours", *([platform] if platform else []), _log_command(job)]
    return {EXIT_CODE: str(code), MESSAGE: "; ".join(words)}


def _telling(pods: Sequence[Object]) -> Object:
    """Of several ranks the one that explains: a final code first, 75 last, the earliest of equals."""

    def order(pod: Object) -> tuple[int, str]:
        code = exit_code_of(pod)
        rank = 0 if code in FINAL_EXIT_CODES else 3 if code == Interrupted.exit_code else 2 if code in (137, 143) else 1
        return min(rank, 1) if is_out_of_memory(pod) else rank, ending_of(pod).get("finishedAt") or ""

    return min(pods, key=order)


def _taken(pod: Object) -> str:
    """How the platform took the pod away, or nothing. A pod over its own storage limit is evicted, too, but that is
    its own doing and the same would happen again."""
    status = pod.get("status", {})
    reason, message = status.get("reason", ""), status.get("message", "")
    disrupted = condition_of(pod, "DisruptionTarget")
    if disrupted is not None:
        words = f"{disrupted.get('reason', '')}: {disrupted.get('message', '')}"
        return f"pod {name_of(pod)} was taken away: {_cut(words)}"
    own_limit = reason == "Evicted" and "limit" in message
    if reason in ("Evicted", "Preempting", "NodeLost", "Shutdown", "NodeShutdown", "Terminated") and not own_limit:
        return f"pod {name_of(pod)} was taken away: {_cut(f'{reason}: {message}')}"
    return ""


def _zombie(pod: Object, now: datetime) -> bool:
    deleted = pod["metadata"].get("deletionTimestamp")
    return bool(deleted) and not is_terminated(pod) and now > time_of(deleted) + timedelta(seconds=ZOMBIE_SECONDS)


def _log_command(job: Object) -> str:
    metadata = job["metadata"]
    return f"its log: kubectl logs -n {metadata.get('namespace', 'default')} job/{metadata['name']}"


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
        hindrance = _hindrance(child, pods, at) or "its pods did not all run"
        reason = Reason.START_DEADLINE_EXCEEDED
        words = f"waited longer than deadlines.startSeconds = {seconds}: {hindrance}"
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


# ---- Waiting -----------------------------------------------------------------------------------------------------


def _hindrance(job: Object, pods: Sequence[Object], now: datetime | None) -> str:
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
        return _cut(f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}")
    held = container_state_of(pod).get("waiting") or {}
    reason, message = held.get("reason", ""), held.get("message", "")
    if message:
        return _cut(f"{reason}: {message}")
    return f"its pod is still being prepared ({reason or 'no word'})" if _takes_long(pod, now) else ""


def _whose(stage: str, clients: Sequence[str]) -> str:
    named = [client for client in clients if client]
    if not named:
        return stage
    more = len(named) - SHOWN_CLIENTS
    shown = ", ".join(named[:SHOWN_CLIENTS])
    return f"{stage} of {shown} and {more} more" if more > 0 else f"{stage} of {shown}"


# ---- What was recorded, and what stops -----------------------------------------------------------------------------


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


def stopping(annotations: Mapping[str, str]) -> dict[str, Any]:
    """The change that stops a batch Job for good, with the annotations that say why: its controller sends SIGTERM, and
    it stays as a record. Kueue starts a suspended Job again while its Workload is admitted: out of time, it then ends
    instead, and gives its room back."""
    return {"metadata": {"annotations": dict(annotations)}, "spec": {"suspend": True, "activeDeadlineSeconds": 0}}


def is_over(job: Object) -> bool:
    """Whether the batch Job has ended, or we have stopped it; a pod may still be ending."""
    return is_finished(job) or (STOPPED in annotations_of(job) and (is_suspended(job) or is_out_of_time(job)))


def _cut(words: str) -> str:
    words = " ".join(words.split()).strip(": ")
    return words if len(words) <= WORDS_LENGTH else f"{words[: WORDS_LENGTH - 1]}…"
