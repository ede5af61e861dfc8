"""A cluster as the command line reads it: in the user's own name, with the user's own rights, and writing nothing.

The official client is imported when a command first needs a cluster; it comes with the extra `operator`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from feddiff_protocol.errors import ConfigurationInvalid, FeddiffError, InputMissing, UsageInvalid
from feddiff_protocol.labels import ATTEMPT, CLIENT, JOB_NAME, JOB_NAMESPACE, JOB_UID, STAGE

from .cluster_budgets import Books
from .cluster_scene import (
    SHARED_STAGES,
    JobReference,
    Object,
    Scene,
    Unreadable,
    attempt_to_read,
    check_stage,
    gone_words,
    label,
    log_place,
    pods_of,
    reference_of,
    without_pods,
)

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

PAGE = 500  # objects in one answer to a list
SECONDS = (10.0, 60.0)  # until a connection stands, until an answer has come
STEADY_READS = 5
CONTAINER = "stage"


class ClusterUnavailable(FeddiffError):
    """The API server does not answer."""

    exit_code = 69


class Forbidden(ConfigurationInvalid):
    """The user's rights do not reach that far."""


@dataclass(frozen=True)
class Kind:
    """A namespaced kind, where the API server keeps it, and who may be asked for what one may not read."""

    api: str
    plural: str
    ask: str


JOBS = Kind(
    "apis/feddiff.dev/v1alpha1", "federateddiffusionjobs", "researchers read jobs, by the role feddiff-researcher there"
)
DATASETS = Kind(
    "apis/feddiff.dev/v1alpha1",
    "privatedatasets",
    "its owner can let you see budgets, by the role feddiff-budget-reader",
)
RELEASES = Kind("apis/feddiff.dev/v1alpha1", "privacyreleases", "the ledger's entries are for their owner to see")
_OWNERS = "an owner sees its own: feddiff why JOB -n NAMESPACE"
ATTEMPTS = Kind("apis/batch/v1", "jobs", _OWNERS)
PODS = Kind("api/v1", "pods", _OWNERS)
EVENTS = Kind("api/v1", "events", _OWNERS)


# ---- The API server ----------------------------------------------------------------------------------------------


class Cluster:
    """One API server. `context` and `namespace` are those of the kubeconfig, or what the user said instead.

    A context manager: leaving it closes the connections.
    """

    def __init__(self, client: "ApiClient", context: str, namespace: str) -> None:
        self._client, self.context, self.namespace = client, context, namespace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()  # type: ignore[no-untyped-call]

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        status, body = self._ask(_path(kind, namespace, name))
        said = _said(body)
        if status == 404 and said.get("reason") == "NotFound" and said.get("details", {}).get("name") == name:
            return None
        return self._object(kind, namespace, status, body)

    def list(self, kind: Kind, namespace: str | None, labels: str = "", fields: str = "") -> list[Object]:
        """Every object of the kind in a namespace, None: in all."""
        items: list[Object] = []
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields, "continue": ""}
        while True:
            asked = {name: value for name, value in query.items() if value}
            page = self._object(kind, namespace, *self._ask(_path(kind, namespace), asked))
            items += page["items"]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return items

    def log(self, namespace: str, pod: str) -> str:
        """What a pod's stage has printed. Raises InputMissing before it has."""
        kind = Kind(PODS.api, "pods/log", "its log is for those who may read pods/log there")
        status, body = self._ask(f"{_path(PODS, namespace, pod)}/log", {"container": CONTAINER})
        if status in (204, 400, 404):  # 204: no node has it yet
            words = _said(body).get("message", "it has no log yet; feddiff why says what it waits for")
            raise InputMissing(f"pod {pod}: {words}")
        if status == 200:
            return body.decode(errors="replace")
        raise self._error(kind, namespace, status, body)

    def _ask(self, path: str, query: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            request = self._client.param_serialize(
                "GET", path, query_params=list((query or {}).items()), auth_settings=["BearerToken"]
            )
            response = self._client.call_api(*request, _request_timeout=SECONDS)
            return response.status, response.read() or b""  # type: ignore[no-untyped-call]
        except (HTTPError, ApiException, OSError) as error:
            server = self._client.configuration.host
            words = " ".join(str(getattr(error, "reason", None) or error).split())
            raise ClusterUnavailable(
                f"{server} does not answer: {words}; is it the cluster you mean? --context, --kubeconfig"
            ) from None

    def _object(self, kind: Kind, namespace: str | None, status: int, body: bytes) -> Object:
        if status != 200:
            raise self._error(kind, namespace, status, body)
        return _said(body)

    def _error(self, kind: Kind, namespace: str | None, status: int, body: bytes) -> FeddiffError:
        where = f"{kind.plural} in {namespace or 'all namespaces'}"
        words = _said(body).get("message") or body[:200].decode(errors="replace").strip()
        if status == 403:
            return Forbidden(f"{where}: not yours to read: {words}; {kind.ask}")
        if status == 401:
            return ConfigurationInvalid(f"the cluster does not know you (context {self.context}): log in again")
        if status == 404:
            return ConfigurationInvalid(f"this cluster (context {self.context}) has no {kind.plural}: install feddiff")
        if status == 429 or status >= 500:
            return ClusterUnavailable(f"{where}: the API server says {status}: {words}")
        return UsageInvalid(f"{where}: the API server says {status}: {words}")


def _path(kind: Kind, namespace: str | None, name: str = "") -> str:
    parts = ["", kind.api, *(("namespaces", quote(namespace, safe="")) if namespace else ()), kind.plural]
    return "/".join([*parts, quote(name, safe="")] if name else parts)


def _said(body: bytes) -> Object:
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def connect(kubeconfig: Path | None, context: str | None, namespace: str | None) -> Cluster:
    """The cluster that the user means. Raises ConfigurationInvalid where the client or a kubeconfig is missing."""
    import yaml

    try:
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
    except ImportError:
        raise ConfigurationInvalid("a cluster needs one more package: pip install 'feddiff[operator]'") from None
    path, configuration = (str(kubeconfig) if kubeconfig else None), Configuration()
    configuration.retries = False  # one try: whoever waits at a terminal tries again
    try:
        contexts, current = config.list_kube_config_contexts(path)  # type: ignore[no-untyped-call]
        chosen = current if context is None else _named(contexts, context)
        config.load_kube_config(path, chosen["name"], configuration, persist_config=False)  # type: ignore[no-untyped-call]
    except (config.ConfigException, yaml.YAMLError, OSError, TypeError, KeyError, ValueError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationInvalid(
            f"{path or 'kubeconfig'}: {words}; name one with --kubeconfig or KUBECONFIG"
        ) from None
    place = namespace or (chosen["context"] or {}).get("namespace") or "default"
    return Cluster(ApiClient(configuration), chosen["name"], place)


def _named(contexts: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    for each in contexts:
        if each["name"] == name:
            return each
    known = ", ".join(str(each["name"]) for each in contexts)
    raise UsageInvalid(f"--context {name}: the kubeconfig has {known or 'none'}")


# ---- Jobs --------------------------------------------------------------------------------------------------------


def read_job(cluster: Cluster, name: str) -> Object:
    """The job NAME in the cluster's namespace, or NAMESPACE/NAME. Raises InputMissing."""
    namespace, name, _ = _place(cluster, name)
    found = cluster.get(JOBS, namespace, name)
    if found is None:
        raise _no_job(cluster, namespace, name)
    return found


def _place(cluster: Cluster, job: str) -> tuple[str, str, str]:
    """Namespace and name of the job, and the namespace from which it is looked at."""
    namespace, slash, name = job.rpartition("/")
    if "/" in namespace or not name or (slash and not namespace):
        raise UsageInvalid(f"expected JOB as NAME or NAMESPACE/NAME, found {job}")
    return namespace or cluster.namespace, name, cluster.namespace


def read_scene(cluster: Cluster, job: str) -> Scene:
    """Everything about the job that the user may read.

    A data owner, who may not read the job itself, sees what its own namespace (-n) holds of it. Raises InputMissing.
    """
    reader = _Reader(cluster)
    scene = _find(reader, job)
    if scene.job is None:
        return _owners_scene(reader, scene)
    clients = scene.job["spec"]["clients"]
    references = {(each["dataset"].get("namespace", "default"), each["dataset"]["name"]) for each in clients}
    owners = sorted({namespace for namespace, _ in references})
    selector = f"{JOB_UID}={scene.reference.uid}"
    namespaces = sorted({scene.reference.namespace, *owners})
    datasets = _datasets(reader, references)
    releases = reader.everywhere(RELEASES, owners, selector)
    attempts = [each for each in reader.everywhere(ATTEMPTS, namespaces, selector) if _belongs(each, scene)]
    readable = [each for each in namespaces if not reader.may_not_read(ATTEMPTS, each)]
    pods = reader.everywhere(PODS, readable, selector)
    events = reader.everywhere(EVENTS, readable, "", _JOB_WARNINGS) if without_pods(attempts, pods) else []
    return Scene(
        scene.reference,
        scene.job,
        datasets,
        releases,
        attempts,
        pods,
        events,
        tuple(reader.unreadable),
    )


def _datasets(reader: "_Reader", references: Iterable[tuple[str, str]]) -> dict[str, Object | None]:
    """By namespace/name, None where there is none; those that may not be read are missing."""
    namespaces = sorted({namespace for namespace, _ in references})
    listed = reader.everywhere(DATASETS, namespaces, "")
    found = {(each["metadata"]["namespace"], each["metadata"]["name"]): each for each in listed}
    return {
        f"{namespace}/{name}": found.get((namespace, name))
        for namespace, name in references
        if not reader.may_not_read(DATASETS, namespace)
    }


_JOB_WARNINGS = "involvedObject.kind=Job,type=Warning"


def _belongs(attempt: Object, scene: Scene) -> bool:
    """Whether the attempt is where its label says: labels can be forged in any namespace."""
    assert scene.job is not None
    owners = {each["name"]: each["dataset"].get("namespace", "default") for each in scene.job["spec"]["clients"]}
    expected = owners.get(label(attempt, CLIENT)) if label(attempt, CLIENT) else scene.reference.namespace
    return bool(attempt["metadata"]["namespace"] == expected)


def _find(reader: "_Reader", job: str) -> Scene:
    """The job by its name, or, where it cannot be read, by the attempts in the user's namespace."""
    namespace, name, here = _place(reader.cluster, job)
    forbidden: Forbidden | None = None
    try:
        if (found := reader.cluster.get(JOBS, namespace, name)) is not None:
            return Scene(JobReference(namespace, name, found["metadata"]["uid"]), found)
    except Forbidden as error:
        forbidden = error
    selector = f"{JOB_NAME}={name}" + (f",{JOB_NAMESPACE}={namespace}" if "/" in job else "")
    with reader.unless_forbidden(ATTEMPTS, here):
        attempts = reader.cluster.list(ATTEMPTS, here, selector)
        references = sorted({reference_of(each) for each in attempts}, key=lambda each: (each.namespace, each.uid))
        if len({each.namespace for each in references}) > 1:
            names = ", ".join(f"{each.namespace}/{each.name}" for each in references)
            raise UsageInvalid(f"{here} has stages of {names}; name one of them so")
        if references:  # of several jobs of that name, one after the other, the one that came last
            newest = max(attempts, key=lambda each: str(each["metadata"].get("creationTimestamp", "")))
            return Scene(reference_of(newest))
    if forbidden is not None:
        raise forbidden
    raise _no_job(reader.cluster, namespace, name)


def _no_job(cluster: Cluster, namespace: str, name: str) -> InputMissing:
    return InputMissing(f"there is no job {namespace}/{name} (context {cluster.context}); -n names another namespace")


def _owners_scene(reader: "_Reader", scene: Scene) -> Scene:
    here, selector = reader.cluster.namespace, f"{JOB_UID}={scene.reference.uid}"
    attempts = reader.everywhere(ATTEMPTS, [here], selector)
    pods = reader.everywhere(PODS, [here], selector)
    events = reader.everywhere(EVENTS, [here], "", _JOB_WARNINGS) if without_pods(attempts, pods) else []
    return Scene(scene.reference, attempts=attempts, pods=pods, events=events, unreadable=tuple(reader.unreadable))


class _Reader:
    """Reads what may be read and remembers what may not."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.unreadable: list[Unreadable] = []

    def everywhere(self, kind: Kind, namespaces: Sequence[str], labels: str, fields: str = "") -> list[Object]:
        """Objects in these namespaces: by one question where the user may read all, else by one for each."""
        if len(namespaces) > 1:
            try:
                found = self.cluster.list(kind, None, labels, fields)
                return [each for each in found if each["metadata"]["namespace"] in namespaces]
            except Forbidden:
                pass
        items: list[Object] = []
        for namespace in namespaces:
            with self.unless_forbidden(kind, namespace):
                items += self.cluster.list(kind, namespace, labels, fields)
        return items

    def may_not_read(self, kind: Kind, namespace: str) -> bool:
        return Unreadable(namespace, kind.plural, kind.ask) in self.unreadable

    def unless_forbidden(self, kind: Kind, namespace: str) -> "_UnlessForbidden":
        return _UnlessForbidden(self, Unreadable(namespace, kind.plural, kind.ask))


@dataclass(frozen=True)
class _UnlessForbidden:
    """Notes, instead of raising, that something may not be read."""

    reader: _Reader
    what: Unreadable

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, Forbidden):
            return False
        if self.what not in self.reader.unreadable:
            self.reader.unreadable.append(self.what)
        return True


# ---- Logs --------------------------------------------------------------------------------------------------------


def read_logs(cluster: Cluster, job: str, client: str | None, stage: str | None) -> list[Object]:
    """The log of each pod of the one attempt that is meant: the newest that fits. Raises Forbidden with who can."""
    check_stage(stage, client)
    scene = _find(_Reader(cluster), job)
    of = f"job {scene.reference.namespace}/{scene.reference.name}"
    if scene.job is None:
        namespace, of = cluster.namespace, f"{of} in {cluster.namespace}"
    else:
        namespace, client = log_place(scene, client, stage)
    selector = f"{JOB_UID}={scene.reference.uid}"
    try:
        attempt = attempt_to_read(cluster.list(ATTEMPTS, namespace, selector), client, stage, of)
        pods = pods_of(attempt, cluster.list(PODS, namespace, selector))
        if not pods:
            raise InputMissing(gone_words(attempt))
        return [_pod_log(cluster, attempt, pod) for pod in pods]
    except Forbidden as error:
        raise Forbidden(_who_can(scene, namespace, client, stage, error)) from None


def _pod_log(cluster: Cluster, attempt: Object, pod: Object) -> Object:
    metadata = pod["metadata"]
    return {
        "namespace": metadata["namespace"],
        "pod": metadata["name"],
        "stage": label(attempt, STAGE),
        "client": label(attempt, CLIENT),
        "attempt": label(attempt, ATTEMPT),
        "lines": cluster.log(metadata["namespace"], metadata["name"]).splitlines(),
    }


def _who_can(scene: Scene, namespace: str, client: str | None, stage: str | None, error: Forbidden) -> str:
    if not client:
        return str(error)
    job = f"{scene.reference.namespace}/{scene.reference.name}"
    option = f" --stage {stage}" if stage and stage not in SHARED_STAGES else ""
    return (
        f"the logs of client {client} stay in {namespace}, where you may not read them; its owner can:"
        f" feddiff logs {job} -n {namespace} --client {client}{option}"
    )


# ---- Budgets -----------------------------------------------------------------------------------------------------


def read_books(cluster: Cluster, dataset: str | None) -> list[Books]:
    """The dataset with its entries, or every dataset of the namespace. Raises InputMissing."""
    if dataset is None:
        return [_steady(cluster, each) for each in cluster.list(DATASETS, cluster.namespace)]
    found = cluster.get(DATASETS, cluster.namespace, dataset)
    if found is None:
        raise InputMissing(
            f"there is no dataset {cluster.namespace}/{dataset} (context {cluster.context}); -n names another namespace"
        )
    return [_steady(cluster, found)]


def _steady(cluster: Cluster, dataset: Object) -> Books:
    """Dataset and entries of one moment: the dataset is the same before and after its entries were read."""
    namespace, name = dataset["metadata"]["namespace"], dataset["metadata"]["name"]
    for _ in range(STEADY_READS):
        try:
            releases: list[Object] | None = cluster.list(RELEASES, namespace)
        except Forbidden:
            return Books(dataset, None)
        again = cluster.get(DATASETS, namespace, name)
        if again is None:
            raise InputMissing(f"dataset {namespace}/{name} was deleted while it was read; its entries stay")
        if again["metadata"]["resourceVersion"] == dataset["metadata"]["resourceVersion"]:
            return Books(dataset, releases)
        dataset = again
    return Books(dataset, releases, steady=False)
