"""The objects that carry out one attempt of one stage, as plain dicts: a ConfigMap with its spec, a Service where
ranks must find each other, and the batch Job.

Everything here is a pure function of the job, the dataset and the stage's spec, so the same attempt always has the
same objects under the same names. What owners and researchers may lay over a pod is a list of allowed fields.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, SourceSpec, StoreReference
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.labels import (
    ATTEMPT,
    CLIENT,
    COMPLETION_INDEX,
    JOB_NAME,
    JOB_NAMESPACE,
    JOB_UID,
    MANAGED_BY,
    STAGE,
)
from feddiff_protocol.stages import AnyStageSpec, Places, Stage, TrainSharedSpec
from feddiff_protocol.telemetry import METRICS_PORT, METRICS_PORT_NAME, METRICS_PORT_VARIABLE

Manifest = dict[str, Any]

QUEUE_NAME = "kueue.x-k8s.io/queue-name"

CONTAINER = "stage"
SPEC_FOLDER, DATA_FOLDER, SCRATCH_FOLDER = "/etc/feddiff", "/data", "/tmp"
SPEC_FILE = "spec.json"
MASTER_PORT = 29500
USER = 65532  # nobody's: an image that names no user of its own would be refused as root
GRACE_SECONDS = 60  # to save a checkpoint after SIGTERM


LARGEST_OVERLAY = 64 * 1024  # bytes as JSON: what is larger is not kept in memory, nor laid over anything
TOO_LARGE = {"tooLarge": True}  # stands for such a one


class InvalidPodTemplate(SpecInvalid):
    """An overlay asks for what no overlay may change; the message names the path."""


@dataclass(frozen=True)
class Setting:
    """What the installation says about every pod."""

    trainer_image: str
    image_pull_policy: str = "IfNotPresent"


def stage_objects(
    setting: Setting, job: FederatedDiffusionJob, uid: str, dataset: PrivateDataset | None, spec: AnyStageSpec
) -> list[Manifest]:
    """ConfigMap, Service if there are several ranks, and Job of the attempt that `spec` describes, in the order of
    their creation. `dataset` is the client's for the owner's stages, None for train-shared and report.

    Raises InvalidPodTemplate when the overlay of dataset or job goes too far.
    """
    attempt = _Attempt(setting, job, uid, dataset, spec)
    service = [_service(attempt)] if attempt.num_pods > 1 else []
    return [_config_map(attempt), *service, _batch_job(attempt)]


def child_name(uid: str, stage: Stage, client: str, attempt: int) -> str:
    """The same for every crash and replica: whoever creates it a second time learns that it exists."""
    digest = hashlib.sha256(f"{uid}\0{client}".encode()).hexdigest()
    return f"fd-{stage.value}-{digest[:10]}-{attempt}"


def child_namespace(job: FederatedDiffusionJob, client: str) -> str:
    """The owner's for what touches records, the job's for train-shared and report (client "")."""
    if not client:
        return job.metadata.namespace
    return next(each.dataset.namespace for each in job.spec.clients if each.name == client)


def places(job: FederatedDiffusionJob, datasets: Mapping[str, PrivateDataset]) -> Places:
    """Where stores and records of `job` are, for the clients whose datasets are known.

    Raises SpecInvalid when a store is missing, or when a source leaves the volume.
    """
    return Places(
        federation_store=_store(job.spec.store, f"job {job.metadata.namespace}/{job.metadata.name}").uri,
        owner_stores={client: _store(each.spec.store, _dataset_name(each)).uri for client, each in datasets.items()},
        sources={client: _source_below_data(each) for client, each in datasets.items()},
    )


def _store(store: StoreReference | None, of: str) -> StoreReference:
    if store is None:
        raise SpecInvalid(f"{of}: spec.store: expected the store's address, found none; a cluster has no default store")
    return store


def _dataset_name(dataset: PrivateDataset) -> str:
    return f"dataset {dataset.metadata.namespace}/{dataset.metadata.name}"


def _source_below_data(dataset: PrivateDataset) -> SourceSpec:
    source = dataset.spec.source
    fields = ("path", "labels_path", "holdout_path", "holdout_labels_path", "inception_path")
    paths = {name: value for name in fields if (value := getattr(source, name)) is not None}
    for name, value in paths.items():
        if value.startswith("/") or ".." in value.split("/"):
            raise SpecInvalid(
                f"{_dataset_name(dataset)}: spec.source.{name}: expected a path relative to the volume, found {value}"
            )
    return source.model_copy(update={name: f"{DATA_FOLDER}/{value}" for name, value in paths.items()})


# ---- One attempt -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    setting: Setting
    job: FederatedDiffusionJob
    uid: str
    dataset: PrivateDataset | None
    spec: AnyStageSpec

    @property
    def client(self) -> str:
        return getattr(self.spec, "client", "")

    @property
    def name(self) -> str:
        return child_name(self.uid, self.spec.stage, self.client, self.spec.attempt)

    @property
    def num_pods(self) -> int:
        return self.job.spec.shared.replicas if self._has_ranks else 1

    @property
    def num_processes(self) -> int:
        return self.job.spec.shared.processes_per_replica if self._has_ranks else 1

    @property
    def _has_ranks(self) -> bool:
        """The closed form needs no training, so one process writes it down."""
        return isinstance(self.spec, TrainSharedSpec) and self.spec.shared.denoiser == "trained"

    @property
    def overlay(self) -> Mapping[str, Any]:
        return self.dataset.spec.pod_template if self.dataset else self.job.spec.shared.pod_template

    @property
    def overlay_path(self) -> str:
        if self.dataset:
            return f"{_dataset_name(self.dataset)}: spec.podTemplate"
        return f"job {self.job.metadata.namespace}/{self.job.metadata.name}: spec.shared.podTemplate"

    @property
    def labels(self) -> dict[str, str]:
        client = {CLIENT: self.client} if self.client else {}
        return {
            JOB_UID: self.uid,
            JOB_NAME: self.job.metadata.name,
            JOB_NAMESPACE: self.job.metadata.namespace,
            STAGE: self.spec.stage.value,
            **client,
            ATTEMPT: str(self.spec.attempt),
            MANAGED_BY: "feddiff",
        }

    @property
    def metadata(self) -> Manifest:
        namespace = child_namespace(self.job, self.client)
        return {"name": self.name, "namespace": namespace, "labels": self.labels}


def _config_map(attempt: _Attempt) -> Manifest:
    text = attempt.spec.model_dump_json(by_alias=True, exclude_none=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": attempt.metadata,
        "immutable": True,
        "data": {SPEC_FILE: text},
    }


def _service(attempt: _Attempt) -> Manifest:
    """Names for the ranks, known before they are Ready: they wait for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": attempt.metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_UID: attempt.uid, STAGE: attempt.spec.stage.value, ATTEMPT: str(attempt.spec.attempt)},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"}],
        },
    }


def _batch_job(attempt: _Attempt) -> Manifest:
    of_owner = attempt.dataset is not None
    template = laid_over(_pod_template(attempt), attempt.overlay, attempt.overlay_path, identities=of_owner)
    template["metadata"]["labels"].pop(QUEUE_NAME, None)  # the Job queues, not its pods
    queue = _queue_name(attempt)
    metadata = attempt.metadata
    metadata["labels"] = {**metadata["labels"], **({QUEUE_NAME: queue} if queue else {})}
    ranks = {"completions": attempt.num_pods, "parallelism": attempt.num_pods}
    if attempt.spec.stage is Stage.TRAIN_SHARED:
        ranks["completionMode"] = "Indexed"  # type: ignore[assignment]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": 0, **ranks, "template": template},
    }


def _queue_name(attempt: _Attempt) -> str | None:
    """The job's queue in the job's namespace; an owner's own queue, which its overlay names, in the owner's."""
    if attempt.dataset is None:
        return attempt.job.spec.queue_name
    labels: Mapping[str, str] = attempt.overlay.get("metadata", {}).get("labels", {})
    return labels.get(QUEUE_NAME)


def _pod_template(attempt: _Attempt) -> Manifest:
    # In an owner's namespace its own overlay says whose pods go first, and nobody else's file.
    priority = None if attempt.dataset else attempt.job.spec.priority_class_name
    ranks = {"subdomain": attempt.name} if attempt.num_pods > 1 else {}
    return {
        "metadata": {"labels": attempt.labels},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **({"priorityClassName": priority} if priority else {}),
            **ranks,
            "volumes": _volumes(attempt),
            "containers": [_container(attempt)],
        },
    }


def _volumes(attempt: _Attempt) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "spec", "configMap": {"name": attempt.name}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if claim := _volume_claim(attempt):
        volumes.append({"name": "records", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return volumes


def _mounts(attempt: _Attempt) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH_FOLDER},
    ]
    if _volume_claim(attempt):
        mounts.append({"name": "records", "mountPath": DATA_FOLDER, "readOnly": True})
    return mounts


def _volume_claim(attempt: _Attempt) -> str | None:
    return attempt.dataset.spec.source.volume_claim if attempt.dataset else None


def _container(attempt: _Attempt) -> Manifest:
    resources = attempt.job.spec.shared.resources if attempt.spec.stage is Stage.TRAIN_SHARED else {}
    return {
        "name": CONTAINER,
        "image": attempt.setting.trainer_image,
        "imagePullPolicy": attempt.setting.image_pull_policy,
        "command": _command(attempt),
        "env": _environment(attempt),
        "envFrom": _credentials(attempt),
        "ports": [{"name": METRICS_PORT_NAME, "containerPort": METRICS_PORT, "protocol": "TCP"}],
        "volumeMounts": _mounts(attempt),
        "resources": dict(resources),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _command(attempt: _Attempt) -> list[str]:
    """The stage below a first process that listens from the start: the kernel keeps SIGTERM from a first process that
    has not asked for it, and a stage imports for seconds before it does."""
    module, spec = attempt.spec.stage.module, f"{SPEC_FOLDER}/{SPEC_FILE}"
    return ["python", "-m", "feddiff_trainer.ranks", str(attempt.num_processes), module, spec]


def _environment(attempt: _Attempt) -> list[Manifest]:
    home = [_variable("HOME", SCRATCH_FOLDER), _variable(METRICS_PORT_VARIABLE, str(METRICS_PORT))]
    if attempt.num_pods * attempt.num_processes == 1:
        return home
    address = f"{attempt.name}-0.{attempt.name}" if attempt.num_pods > 1 else "127.0.0.1"
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{COMPLETION_INDEX}']"}}
    return [
        *home,
        {"name": "NODE_RANK", "valueFrom": index},
        _variable("WORLD_SIZE", str(attempt.num_pods * attempt.num_processes)),
        _variable("MASTER_ADDR", address),
        _variable("MASTER_PORT", str(MASTER_PORT)),
    ]


def _variable(name: str, value: str) -> Manifest:
    return {"name": name, "value": value}


def _credentials(attempt: _Attempt) -> list[Manifest]:
    """Two stores, two Secrets, told apart by a prefix; the owner decides how it reaches the federation's store."""
    if attempt.dataset is None:
        named = {"FEDERATION_": attempt.job.spec.store}
    else:
        named = {"OWNER_": attempt.dataset.spec.store, "FEDERATION_": attempt.dataset.spec.federation}
    return [
        {"prefix": prefix, "secretRef": {"name": store.secret_name}}
        for prefix, store in named.items()
        if store is not None and store.secret_name
    ]


# ---- Overlays ----------------------------------------------------------------------------------------------------


def is_too_large(overlay: Mapping[str, Any]) -> bool:
    return len(json.dumps(overlay)) > LARGEST_OVERLAY


def check_overlay(overlay: Mapping[str, Any], path: str, *, identities: bool = False) -> None:
    """Raises InvalidPodTemplate, naming the field, unless everything in `overlay` is allowed."""
    if overlay == TOO_LARGE or is_too_large(overlay):
        raise InvalidPodTemplate(f"{path}: expected at most {LARGEST_OVERLAY // 1024} KiB as JSON, found more")
    empty = {"metadata": {"labels": {}}, "spec": {"volumes": [], "containers": [{}]}}
    laid_over(empty, overlay, path, identities=identities)


def laid_over(template: Manifest, overlay: Mapping[str, Any], path: str, *, identities: bool = False) -> Manifest:
    """The pod template with `overlay` (metadata, spec with at most one container) on it.

    Lists are added to, so that nothing of ours is lost; a volume mounted at /tmp or, without a volume claim, /data
    stands in for ours. Raises InvalidPodTemplate for a field that no overlay may set, and, unless it may mount
    `identities`, for a token or certificate of a service account: an owner's may, for its namespace is its own.
    """
    _only(overlay, {"metadata", "spec"}, path)
    over = _mapping(overlay.get("spec", {}), f"{path}.spec")
    containers = over.get("containers", [])
    if not isinstance(containers, list) or len(containers) > 1:
        raise InvalidPodTemplate(f"{path}.spec.containers: expected at most one, the stage's, found {containers!r}")
    metadata = _metadata(template["metadata"], _mapping(overlay.get("metadata", {}), f"{path}.metadata"), path)
    spec = _pod(template["spec"], {key: value for key, value in over.items() if key != "containers"}, f"{path}.spec")
    if not identities:
        _refuse_identities(over.get("volumes", []), f"{path}.spec.volumes")
    (container,) = spec["containers"]
    for each in containers:
        place = f"{path}.spec.containers[0]"
        container = _contained(container, _mapping(each, place), place)
    used = {mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = [volume for volume in spec["volumes"] if volume.get("name") in used or volume.get("name") not in _OURS]
    return {"metadata": metadata, "spec": {**spec, "volumes": volumes, "containers": [container]}}


_REPLACED_IN_POD = {
    "serviceAccountName",
    "nodeSelector",
    "affinity",
    "tolerations",
    "topologySpreadConstraints",
    "priorityClassName",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "terminationGracePeriodSeconds",
    "imagePullSecrets",
}
_SECURITY_CONTEXT = {"fsGroup", "runAsUser", "runAsGroup", "supplementalGroups"}
_OURS = {"spec", "scratch", "records"}
_IDENTITIES = {"serviceAccountToken", "podCertificate"}  # sources of a projected volume


def _metadata(ours: Manifest, over: Mapping[str, Any], path: str) -> Manifest:
    _only(over, {"labels", "annotations"}, f"{path}.metadata")
    result = dict(ours)
    for field in over:
        place = f"{path}.metadata.{field}"
        entries = _mapping(over[field], place)
        for key, value in entries.items():
            reserved = str(key).startswith("feddiff.dev/") or key == MANAGED_BY
            if reserved or not isinstance(key, str) or not isinstance(value, str):
                raise InvalidPodTemplate(f"{place}[{key!r}]: expected a text of the owner's own, found {value!r}")
        result[field] = {**entries, **ours.get(field, {})}
    return result


def _pod(ours: Manifest, over: Mapping[str, Any], path: str) -> Manifest:
    _only(over, _REPLACED_IN_POD | {"volumes", "securityContext"}, path)
    result = {**ours, **{key: value for key, value in over.items() if key in _REPLACED_IN_POD}}
    if "securityContext" in over:
        context = _mapping(over["securityContext"], f"{path}.securityContext")
        _only(context, _SECURITY_CONTEXT, f"{path}.securityContext")
        if context.get("runAsUser") == 0:
            raise InvalidPodTemplate(f"{path}.securityContext.runAsUser: expected a user other than root, found 0")
        result["securityContext"] = {**ours.get("securityContext", {}), **context}
    volumes = _entries(over.get("volumes", []), f"{path}.volumes")
    for index, volume in enumerate(volumes):
        if volume.get("name") in _OURS:
            raise InvalidPodTemplate(f"{path}.volumes[{index}].name: {volume['name']!r} is ours; use another name")
    return {**result, "volumes": [*ours["volumes"], *volumes]}


def _refuse_identities(volumes: list[Manifest], path: str) -> None:
    for index, volume in enumerate(volumes):
        projected = volume.get("projected")
        sources = projected.get("sources") if isinstance(projected, dict) else None
        listed = sources if isinstance(sources, list) else []  # what is no list, the API server refuses
        given = {key for source in listed if isinstance(source, dict) for key in source}
        if found := sorted(given & _IDENTITIES):
            raise InvalidPodTemplate(
                f"{path}[{index}].projected: {found[0]} would lend a job's pods the identity of any service account of"
                " its namespace; leave it out"
            )


def _contained(ours: Manifest, over: Mapping[str, Any], path: str) -> Manifest:
    _only(over, {"name", "env", "envFrom", "volumeMounts", "resources"}, path)
    if over.get("name", CONTAINER) != CONTAINER:
        raise InvalidPodTemplate(f"{path}.name: expected {CONTAINER!r} or nothing, found {over['name']!r}")
    env = _entries(over.get("env", []), f"{path}.env")
    _refuse_names_of_ours(env, {each["name"] for each in ours.get("env", [])}, f"{path}.env")
    mounts = _entries(over.get("volumeMounts", []), f"{path}.volumeMounts")
    result = {
        **ours,
        "env": [*ours.get("env", []), *env],
        "envFrom": [*ours.get("envFrom", []), *_entries(over.get("envFrom", []), f"{path}.envFrom")],
        "volumeMounts": _mounted(ours.get("volumeMounts", []), mounts, f"{path}.volumeMounts"),
    }
    if "resources" in over:
        result["resources"] = {**ours.get("resources", {}), **_mapping(over["resources"], f"{path}.resources")}
    return result


def _refuse_names_of_ours(entries: list[Manifest], taken: set[str], path: str) -> None:
    for index, entry in enumerate(entries):
        if entry.get("name") in taken:
            raise InvalidPodTemplate(f"{path}[{index}].name: {entry['name']} is set by feddiff; leave it out")


def _mounted(ours: list[Manifest], over: list[Manifest], path: str) -> list[Manifest]:
    """Our mounts, less those whose place the overlay takes, and the overlay's. The spec and a claimed volume stay."""
    taken = {str(mount.get("mountPath")).rstrip("/") for mount in over}
    for index, mount in enumerate(over):
        if mount.get("name") in _OURS:
            raise InvalidPodTemplate(f"{path}[{index}].name: volume {mount['name']!r} is ours; mount one of your own")
    fixed = {mount["mountPath"] for mount in ours if mount.get("readOnly")}
    if clash := sorted(fixed & taken):
        raise InvalidPodTemplate(f"{path}: {clash[0]} is where feddiff mounts its own; choose another place")
    return [*(mount for mount in ours if mount["mountPath"] not in taken), *over]


def _only(found: Mapping[str, Any], allowed: set[str], path: str) -> None:
    if unknown := sorted(str(key) for key in found if key not in allowed):
        raise InvalidPodTemplate(
            f"{path}.{unknown[0]}: an overlay cannot set this; it may set {', '.join(sorted(allowed))}"
        )


def _mapping(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidPodTemplate(f"{path}: expected a mapping, found {type(value).__name__}")
    return value


def _entries(value: object, path: str) -> list[Manifest]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidPodTemplate(f"{path}: expected a list of mappings, found {type(value).__name__}")
    return value
