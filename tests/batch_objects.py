"""Jobs, datasets, and the batch Jobs and pods of their stages as an API server would show them: builders for tests."""

import copy
import functools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from feddiff_operator.workloads import Setting, child_name, child_namespace, places, stage_objects
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset
from feddiff_protocol.stages import (
    AnyStageSpec,
    Receipt,
    ReleaseReference,
    Stage,
    owner_stage_spec,
    release_spec,
    report_spec,
    train_shared_spec,
)

Object = dict[str, Any]

UID = "0f8fad5b-d9cb-469f-a165-70867728950e"
SETTING = Setting("registry/trainer:1")
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SHA = "a" * 64


def text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def job(clients: str | Sequence[str | Object] = "ab", **spec: Any) -> FederatedDiffusionJob:
    """A job of one-letter clients, each with a dataset in the namespace `clinic-<client>`, or of those given."""
    document: Object = {
        "metadata": {"name": "digits", "namespace": "research"},
        "spec": {
            "clients": [
                {"name": each, "dataset": {"namespace": f"clinic-{each}", "name": "scans"}}
                if isinstance(each, str)
                else each
                for each in clients
            ],
            "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4"},
            "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
            **spec,
        },
    }
    return FederatedDiffusionJob.model_validate(document)


def dataset(client: str = "a", **spec: Any) -> PrivateDataset:
    document: Object = {
        "metadata": {"name": "scans", "namespace": f"clinic-{client}", "uid": f"dataset-{client}"},
        "spec": {
            "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 2, "records": [30, 40]},
            "budget": {"epsilon": "20", "delta": "1e-5"},
            "access": [{"namespace": "research"}],
            "store": {"uri": f"s3://clinic-{client}/feddiff", "secretName": f"clinic-{client}-store"},
            "federation": {"uri": "s3://federation/jobs", "secretName": f"federation-clinic-{client}"},
            **spec,
        },
    }
    return PrivateDataset.model_validate(document)


def stage_spec(
    asked: FederatedDiffusionJob, stage: Stage, client: str = "", attempt: int = 1, **of_dataset: Any
) -> AnyStageSpec:
    """The spec of one attempt, as the operator makes it."""
    names = [each.name for each in asked.spec.clients]
    datasets = {name: dataset(name, **of_dataset) for name in names}
    where = places(asked, datasets)
    releases = tuple(ReleaseReference(client=name, manifest_sha256=SHA) for name in names)
    first = datasets[client or names[0]]
    if stage is Stage.RELEASE:
        return release_spec(asked, UID, client, first, where, attempt)
    if stage is Stage.TRAIN_SHARED:
        return train_shared_spec(asked, UID, first, releases, where, attempt)
    if stage is Stage.REPORT:
        return report_spec(asked, UID, first, releases, (), (), "", SHA, where, attempt)
    return owner_stage_spec(stage, asked, UID, client, first, releases, SHA, where, attempt)


def manifests(
    asked: FederatedDiffusionJob, stage: Stage, client: str = "", attempt: int = 1, **of_dataset: Any
) -> list[Object]:
    own = dataset(client, **of_dataset) if client else None
    return stage_objects(SETTING, asked, UID, own, stage_spec(asked, stage, client, attempt, **of_dataset))


def batch_job(
    stage: Stage,
    client: str = "",
    attempt: int = 1,
    *,
    asked: FederatedDiffusionJob | None = None,
    created: datetime = NOW,
    annotations: dict[str, str] | None = None,
    suspend: bool = False,
    conditions: dict[str, datetime] | None = None,
    **status: Any,
) -> Object:
    """The batch Job of an attempt, unsuspended and without a condition unless said otherwise."""
    asked = asked or job()
    name = child_name(UID, stage, client, attempt)
    labels = _labels(asked.spec.queue_name, stage, client, attempt)
    shown = [
        {"type": kind, "status": "True", "lastTransitionTime": text(moment)}
        for kind, moment in (conditions or {}).items()
    ]
    return {
        "metadata": {
            "name": name,
            "namespace": child_namespace(asked, client),
            "uid": f"uid-of-{name}",
            "labels": dict(labels),
            "annotations": dict(annotations or {}),
            "creationTimestamp": text(created),
        },
        "spec": {"parallelism": asked.spec.shared.replicas if stage is Stage.TRAIN_SHARED else 1, "suspend": suspend},
        "status": {"startTime": text(created), "conditions": shown, **status},
    }


@functools.cache
def _labels(queue_name: str | None, stage: Stage, client: str, attempt: int) -> dict[str, str]:
    asked = job(sorted({"a", "b", client} - {""}), queueName=queue_name)
    labels: dict[str, str] = manifests(asked, stage, client, attempt)[-1]["metadata"]["labels"]
    return labels


def failed(child: Object, at: datetime = NOW) -> Object:
    """The Job as its controller leaves it once a pod has failed."""
    return with_condition(child, "Failed", at)


def complete(child: Object, at: datetime = NOW) -> Object:
    return with_condition(child, "Complete", at)


def stopped(child: Object, reason: str = "Suspended", at: datetime = NOW, **annotations: str) -> Object:
    """The Job as we suspended it, its controller done with it."""
    result = with_condition(child, "Suspended", at)
    result["spec"]["suspend"] = True
    result["metadata"]["annotations"] |= {"feddiff.dev/stopped": reason, **annotations}
    return result


def with_condition(child: Object, kind: str, at: datetime) -> Object:
    result = copy.deepcopy(child)
    result["status"]["conditions"].append({"type": kind, "status": "True", "lastTransitionTime": text(at)})
    return result


def pod(
    child: Object,
    phase: str = "Running",
    *,
    index: int = 0,
    exit_code: int | None = None,
    message: str = "",
    reason: str = "",
    started: datetime = NOW,
    finished: datetime = NOW,
    deleted: datetime | None = None,
    conditions: list[Object] | None = None,
    waits: tuple[str, str] | None = None,
    pod_reason: str = "",
    pod_message: str = "",
) -> Object:
    """A pod of the Job; `message` is its termination message, `deleted` when somebody asked for that (60 s grace)."""
    metadata: Object = {
        "name": f"{child['metadata']['name']}-{index}-x",
        "namespace": child["metadata"]["namespace"],
        "creationTimestamp": child["metadata"]["creationTimestamp"],
        "labels": {
            **child["metadata"]["labels"],
            "batch.kubernetes.io/job-name": child["metadata"]["name"],
            "batch.kubernetes.io/controller-uid": child["metadata"]["uid"],
            "batch.kubernetes.io/job-completion-index": str(index),
        },
    }
    if deleted is not None:
        metadata |= {"deletionTimestamp": text(deleted + timedelta(seconds=60)), "deletionGracePeriodSeconds": 60}
    state: Object = {}
    if waits:
        state = {"waiting": {"reason": waits[0], "message": waits[1]}}
    elif exit_code is not None:
        ended = {"exitCode": exit_code, "startedAt": text(started), "finishedAt": text(finished)}
        state = {
            "terminated": ended | ({"message": message} if message else {}) | ({"reason": reason} if reason else {})
        }
    elif phase == "Running":
        state = {"running": {"startedAt": text(started)}}
    status: Object = {"phase": phase, "conditions": conditions or []}
    if state:
        status["containerStatuses"] = [{"name": "stage", "state": state}]
    if pod_reason:
        status |= {"reason": pod_reason, "message": pod_message}
    return {"metadata": metadata, "status": status}


def disruption(reason: str = "EvictionByEvictionAPI") -> list[Object]:
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "the node is drained"}]


def unscheduled(message: str = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.") -> list[Object]:
    return [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]


def receipt(stage: Stage, client: str = "", attempt: int = 1, **changes: Any) -> str:
    """The termination message of a stage that succeeded."""
    outputs = {Stage.RELEASE: {"manifest": SHA}, Stage.TRAIN_SHARED: {"denoiser": SHA}}.get(stage, {})
    line = Receipt(
        stage=stage, job_uid=UID, client=client, attempt=attempt, outputs=outputs, milliseconds=1000
    ).model_copy(update=changes)
    return line.to_line()
