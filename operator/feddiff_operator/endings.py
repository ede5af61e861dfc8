"""How an attempt ended, from what its pods say, and how one is ended.

Nothing of an owner's own output is repeated: an exit code has a meaning of ours, and a receipt is believed when it is
well formed and the attempt's own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

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
    UNKNOWN,
)
from feddiff_protocol.stages import RECEIPT_BYTES, Receipt, Stage

from .batch import (
    annotations_of,
    condition_of,
    deletion_of,
    ending_of,
    exit_code_of,
    is_finished,
    is_first,
    is_out_of_memory,
    is_out_of_time,
    is_suspended,
    is_terminated,
    labels_of,
    name_of,
    one_line,
    phase_of,
    pods_of,
    time_of,
    was_deleted_first,
)

Object = Mapping[str, Any]

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


def record_of(job: Object, pods: Iterable[Object]) -> dict[str, str] | None:
    """Annotations to write onto the batch Job `job`, because its pods now say so; None when there is nothing new.

    A Job that its queue suspended says nothing: its pods were taken away and come again.
    """
    written = annotations_of(job)
    if RECEIPT in written:
        return None
    record = said_by_pods(job, pods_of(job, pods))
    return record if any(written.get(key) != value for key, value in record.items()) else None


def stopping(annotations: Mapping[str, str]) -> dict[str, Any]:
    """The change that stops a batch Job for good, with the annotations that say why: its controller sends SIGTERM, and
    it stays as a record. Kueue starts a suspended Job again while its Workload is admitted: out of time, it then ends
    instead, and gives its room back."""
    return {"metadata": {"annotations": dict(annotations)}, "spec": {"suspend": True, "activeDeadlineSeconds": 0}}


def is_over(job: Object) -> bool:
    """Whether the batch Job has ended, or we have stopped it; a pod may still be ending."""
    return is_finished(job) or (STOPPED in annotations_of(job) and (is_suspended(job) or is_out_of_time(job)))


def said_by_pods(job: Object, pods: Sequence[Object]) -> dict[str, str]:
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
    receipt, fault = receipt_of(job, ending_of(pod).get("message", ""))
    if receipt is not None:
        return {RECEIPT: receipt.to_line()}
    return {EXIT_CODE: "0", MESSAGE: f"{fault}; {_log_command(job)}"}


def receipt_of(job: Object, text: str) -> tuple[Receipt | None, str]:
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
    platform = one_line(f"{status.get('reason', '')}: {status.get('message', '')}")
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
        return f"pod {name_of(pod)} was taken away: {one_line(words)}"
    own_limit = reason == "Evicted" and "limit" in message
    if reason in ("Evicted", "Preempting", "NodeLost", "Shutdown", "NodeShutdown", "Terminated") and not own_limit:
        return f"pod {name_of(pod)} was taken away: {one_line(f'{reason}: {message}')}"
    return ""


def _log_command(job: Object) -> str:
    metadata = job["metadata"]
    return f"its log: kubectl logs -n {metadata.get('namespace', 'default')} job/{metadata['name']}"
