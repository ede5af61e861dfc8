"""What a job took on a cluster beyond what its stages took themselves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Receipt, Stage

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Ran:
    """One stage of one client, in seconds since the epoch, whole ones: more the API does not say."""

    created: float  # its batch Job
    started: float  # the first of its containers
    finished: float  # the last of them
    own_seconds: float  # by its receipt: from the reading of its spec on

    @property
    def process_seconds(self) -> float:
        """The loading of Python and torch belongs to it, as in a local run."""
        return self.finished - self.started

    @property
    def pod_seconds(self) -> float:
        """And the start of its pod: scheduler, volumes, network, container."""
        return self.finished - self.created


def longest_path(seconds: Mapping[StageKey, float]) -> float:
    """The time that stages of these durations take at the least, since one needs what the other makes, for clients c:

    max_c release(c) + max_c [max(train-shared, train-personal(c)) + sample(c) + evaluate(c)] + report
    """
    shared = seconds[Stage.TRAIN_SHARED, ""]
    clients = [client for stage, client in seconds if stage is Stage.RELEASE]
    of_clients = (
        max(shared, seconds[Stage.TRAIN_PERSONAL, c]) + seconds[Stage.SAMPLE, c] + seconds[Stage.EVALUATE, c]
        for c in clients
    )
    releases = max(seconds[Stage.RELEASE, client] for client in clients)
    return releases + max(of_clients) + seconds[Stage.REPORT, ""]


def added_seconds(applied: float, complete: float, ran: Mapping[StageKey, Ran]) -> float:
    """(complete - applied) - longest_path(finished - created of every stage)

    What the operator added: a stage's own time is that from its batch Job to the end of its containers. All else counts
    as added: kubectl, admission, reservation and charge, the objects of the stages, the kubelet's word that a pod has
    ended, and the time until the operator acts on it. These moments are whole seconds, so the sum over the path's five
    stages is right within two.
    """
    return complete - applied - longest_path({key: each.pod_seconds for key, each in ran.items()})


def pod_start_seconds(ran: Mapping[StageKey, Ran]) -> float:
    """What the starts of pods are of the longest path: longest_path(finished - created) - longest_path(finished -
    started). It is no part of what the operator added."""
    with_starts = longest_path({key: each.pod_seconds for key, each in ran.items()})
    return with_starts - longest_path({key: each.process_seconds for key, each in ran.items()})


def stages_that_ran(jobs: Iterable[Object], pods: Iterable[Object]) -> dict[StageKey, Ran]:
    """From a finished job's batch Jobs and pods; every stage took one attempt."""
    found: dict[StageKey, Ran] = {}
    pods = list(pods)
    for job in jobs:
        metadata = job["metadata"]
        receipt = Receipt.model_validate_json(metadata["annotations"]["feddiff.dev/receipt"])
        own = [pod for pod in pods if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == metadata["name"]]
        ends = [each["state"]["terminated"] for pod in own for each in pod["status"]["containerStatuses"]]
        key = (receipt.stage, receipt.client)
        assert key not in found and ends, f"{key} took more than one attempt, or its pods are gone"
        found[key] = Ran(
            created=_moment(metadata["creationTimestamp"]),
            started=min(_moment(end["startedAt"]) for end in ends),
            finished=max(_moment(end["finishedAt"]) for end in ends),
            own_seconds=receipt.milliseconds / 1000,
        )
    return found


def _moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
