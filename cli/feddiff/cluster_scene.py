"""What a cluster holds of one job, as far as the user may read it: job, datasets, entries, attempts, pods, events.

Pure: on_cluster.py reads the objects, and asks here which attempt's logs are meant; cluster_why.py says what they mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feddiff_protocol.errors import InputMissing, UsageInvalid
from feddiff_protocol.labels import (
    ATTEMPT,
    CLIENT,
    COMPLETION_INDEX,
    EXIT_CODE,
    JOB_NAME,
    JOB_NAME_OF_POD,
    JOB_NAMESPACE,
    JOB_UID,
    MESSAGE,
    RECEIPT,
    STAGE,
    STOPPED,
    STOPPED_BECAUSE,
)
from feddiff_protocol.stages import Stage

Object = dict[str, Any]

SHARED_STAGES = (Stage.TRAIN_SHARED, Stage.REPORT)  # of the whole job, in its own namespace


@dataclass(frozen=True)
class Unreadable:
    """What the user's rights do not reach, and who can tell."""

    namespace: str
    what: str  # a plural: "pods"
    ask: str


@dataclass(frozen=True)
class JobReference:
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Scene:
    """Everything of one job that the user may read."""

    reference: JobReference
    job: Object | None = None  # None: an owner looks at somebody else's job from its own namespace
    datasets: Mapping[str, Object | None] = field(default_factory=dict)  # by namespace/name; None: there is none
    releases: Sequence[Object] = ()  # the job's entries in the owners' ledgers
    attempts: Sequence[Object] = ()  # batch Jobs
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()  # warnings about batch Jobs
    unreadable: tuple[Unreadable, ...] = ()

    def may_not_read(self, namespace: str, what: str) -> bool:
        return any((each.namespace, each.what) == (namespace, what) for each in self.unreadable)


def newest_attempts(attempts: Iterable[Object]) -> list[Object]:
    """The newest batch Job of every stage and client, in the order of the stages."""
    newest: dict[tuple[str, str], Object] = {}
    for each in attempts:
        of = (label(each, STAGE), label(each, CLIENT))
        if of not in newest or number_of(each) > number_of(newest[of]):
            newest[of] = each
    order = [stage.value for stage in Stage]
    known = {of: each for of, each in newest.items() if of[0] in order}
    return [known[of] for of in sorted(known, key=lambda of: (order.index(of[0]), of[1]))]


def without_pods(attempts: Iterable[Object], pods: Sequence[Object]) -> bool:
    """Whether some attempt under way has no pod: then only the events of its Job can say why."""
    return any(
        not pods_of(each, pods) and not {RECEIPT, EXIT_CODE, STOPPED} & set(each["metadata"].get("annotations") or {})
        for each in newest_attempts(attempts)
    )


def pods_of(attempt: Object, pods: Iterable[Object]) -> list[Object]:
    """The attempt's pods, in the order of their ranks."""
    place = attempt["metadata"]["namespace"], attempt["metadata"]["name"]
    own = [each for each in pods if (each["metadata"]["namespace"], label(each, JOB_NAME_OF_POD)) == place]
    return sorted(own, key=lambda each: (int(label(each, COMPLETION_INDEX) or 0), each["metadata"]["name"]))


# ---- Which attempt's logs are meant ------------------------------------------------------------------------------


def check_stage(stage: str | None, client: str | None) -> None:
    """Raises UsageInvalid for a stage that does not exist, or does not belong to a client."""
    if stage is not None and stage not in set(Stage):
        raise UsageInvalid(f"--stage: expected one of {', '.join(Stage)}, found {stage}")
    if client is not None and stage in SHARED_STAGES:
        raise UsageInvalid(f"--stage {stage} is of the whole job, found --client {client}; leave one out")


def log_place(scene: Scene, client: str | None, stage: str | None) -> tuple[str, str]:
    """Namespace and client ("" for a stage of the whole job) of the logs that are meant. Raises UsageInvalid."""
    assert scene.job is not None
    namespaces = {each["name"]: each["dataset"].get("namespace", "default") for each in scene.job["spec"]["clients"]}
    if client is None and (stage is None or stage in SHARED_STAGES):
        return scene.reference.namespace, ""
    if client is None and len(namespaces) == 1:
        (client,) = namespaces
    names = ", ".join(list(namespaces)[:5]) + (", …" if len(namespaces) > 5 else "")
    if client is None:
        raise UsageInvalid(f"--stage {stage}: every client has one; name one with --client: {names}")
    if client not in namespaces:
        raise UsageInvalid(f"--client {client}: job {scene.reference.name} has no such client; it has {names}")
    return namespaces[client], client


def attempt_to_read(attempts: Sequence[Object], client: str | None, stage: str | None, of: str) -> Object:
    """The attempt that was started last, of those that fit. `client` "" means the stages of the whole job, None any.

    Raises InputMissing where none fits, UsageInvalid where several clients' do.
    """
    fitting = [
        each
        for each in attempts
        if (stage is None or label(each, STAGE) == stage) and (client is None or label(each, CLIENT) == client)
    ]
    named = stage or ("any stage" if client or client is None else "train-shared or report")
    if not fitting:
        whose = f" of client {client}" if client else ""
        hint = "" if stage or client or client is None else "; stages of an owner: name it with --client"
        raise InputMissing(f"{of}: no attempt of {named}{whose} has been started{hint}")
    if len(clients := sorted({label(each, CLIENT) for each in fitting})) > 1:
        raise UsageInvalid(f"{of}: stages of {', '.join(clients)} fit; name one with --client")
    return max(fitting, key=lambda each: (each["metadata"].get("creationTimestamp", ""), number_of(each)))


def gone_words(attempt: Object) -> str:
    """What is left of an attempt whose pods are gone."""
    written = attempt["metadata"].get("annotations") or {}
    name = f"{label(attempt, STAGE)}, attempt {number_of(attempt)}: job {attempt['metadata']['name']}"
    if RECEIPT in written:
        return f"{name}: its pods are gone, and their logs with them; it succeeded"
    said = written.get(MESSAGE) or written.get(STOPPED_BECAUSE) or written.get(STOPPED)
    return f"{name}: it has no pods" + (f"; what is known: {said}" if said else "; feddiff why says what it waits for")


# ---- Reading Kubernetes' JSON ------------------------------------------------------------------------------------


def label(thing: Object, name: str) -> str:
    return str((thing["metadata"].get("labels") or {}).get(name, ""))


def reference_of(thing: Object) -> JobReference:
    """The job that a batch Job, by its labels, is an attempt of."""
    return JobReference(label(thing, JOB_NAMESPACE), label(thing, JOB_NAME), label(thing, JOB_UID))


def number_of(attempt: Object) -> int:
    text = label(attempt, ATTEMPT)
    return int(text) if text.isdecimal() else 0
