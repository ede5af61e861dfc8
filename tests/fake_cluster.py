"""An API server in memory, with optimistic concurrency, and what a platform does to Jobs and pods, one turn at a time.

Every call lets others come in between, so that a test decides the order of everything.
"""

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from datetime import datetime
from typing import Any

from feddiff_operator.cluster import FDJ, JOB, PDS, POD, PRL, AlreadyExists, Conflict, Kind

Object = dict[str, Any]
Key = tuple[str, str, str]


@types.coroutine
def turn() -> Generator[None, None, None]:
    """Another may come in between here."""
    yield


def finished(coroutine: Coroutine[None, None, Any]) -> Any:
    """What a coroutine returns when nobody else moves."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value


async def no_sleep(_: float) -> None:
    await turn()


class FakeCluster:
    """Objects with versions, replaced by compare-and-swap. The mutant compares nothing."""

    def __init__(self, compares: bool = True) -> None:
        self.objects: dict[Key, Object] = {}
        self.compares, self.version = compares, 0

    def put(self, kind: Kind, obj: Object) -> Object:
        """An object as somebody else writes it; a new one gets a uid."""
        self.version += 1
        metadata = {**obj["metadata"], "resourceVersion": str(self.version)}
        metadata.setdefault("uid", f"uid-{self.version:04}")
        metadata.setdefault("generation", 1)
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        written = {**obj, "metadata": metadata}
        self.objects[(kind.name, metadata["namespace"], metadata["name"])] = written
        return written

    def remove(self, kind: Kind, namespace: str, name: str) -> None:
        self.objects.pop((kind.name, namespace, name), None)

    def peek(self, kind: Kind) -> list[Object]:
        return [obj for (name, _, _), obj in self.objects.items() if name == kind.name]

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        await turn()
        return self.objects.get((kind.name, namespace, name))

    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> "list[Object]":
        await turn()
        found = [obj for obj in self.peek(kind) if namespace in (None, obj["metadata"]["namespace"])]
        name, _, value = labels.partition("=")
        return [obj for obj in found if not labels or obj["metadata"].get("labels", {}).get(name) == value]

    async def create(self, kind: Kind, obj: Object, rehearsal: bool = False) -> Object:
        await turn()
        if (kind.name, obj["metadata"]["namespace"], obj["metadata"]["name"]) in self.objects:
            raise AlreadyExists(obj["metadata"]["name"])
        if rehearsal:
            return obj
        return self.put(kind, {key: value for key, value in obj.items() if key != "status"})

    async def replace_status(self, kind: Kind, obj: Object) -> Object:
        await turn()
        metadata = obj["metadata"]
        stands = self.objects.get((kind.name, metadata["namespace"], metadata["name"]))
        if stands is None or stands["metadata"]["uid"] != metadata["uid"]:
            raise Conflict(metadata["name"])
        if self.compares and stands["metadata"]["resourceVersion"] != metadata["resourceVersion"]:
            raise Conflict(metadata["name"])
        return self.put(kind, {**stands, "status": obj["status"]})

    async def patch(self, kind: Kind, namespace: str, name: str, body: "Object | list[Object]") -> Object:
        await turn()
        stands = self.objects.get((kind.name, namespace, name))
        if stands is None:
            raise Conflict(name)
        return self._settle(kind, self.put(kind, _patched(stands, body)))

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> None:
        await turn()
        stands = self.objects.get((kind.name, namespace, name))
        if stands is None or uid not in (None, stands["metadata"]["uid"]):
            return
        doomed = {**stands, "metadata": {**stands["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
        self._settle(kind, self.put(kind, doomed))

    def _settle(self, kind: Kind, obj: Object) -> Object:
        """A deleted object is gone when no finalizer holds it; a Job's pods go with it."""
        metadata = obj["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.remove(kind, metadata["namespace"], metadata["name"])
            for pod in self.peek(POD) if kind == JOB else []:
                if pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == metadata["name"]:
                    self.remove(POD, metadata["namespace"], pod["metadata"]["name"])
        return obj


def _patched(obj: Object, body: "Object | list[Object]") -> Object:
    if isinstance(body, dict):
        known = body.get("metadata", {}).get("resourceVersion", obj["metadata"]["resourceVersion"])
        if known != obj["metadata"]["resourceVersion"]:
            raise Conflict(obj["metadata"]["name"])
        return _merged(obj, body)
    for step in body:
        *path, last = step["path"].strip("/").split("/")
        where = obj
        for part in path:
            where = where[part]
        if step["op"] == "test" and where.get(last) != step["value"]:
            raise Conflict(step["path"])
        if step["op"] != "test":
            obj = _merged(obj, _nested([*path, last], step["value"]))
    return obj


def _nested(path: list[str], value: Any) -> Object:
    return {path[0]: _nested(path[1:], value) if path[1:] else value}


def _merged(old: Object, new: Object) -> Object:
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        result[key] = _merged(old[key], value) if both else value
    return result


# ---- The platform ------------------------------------------------------------------------------------------------


class Platform(FakeCluster):
    """The API server with its Job controller, and pods that end as `outcome(pod, spec)` says: an exit code and a
    termination message, None to go on running."""

    def __init__(self, outcome: Callable[[Object, Object], tuple[int, str] | None]) -> None:
        super().__init__()
        self.outcome = outcome
        self.started: list[tuple[str, str, int]] = []  # every pod ever: stage, client, attempt

    def live(self, now: datetime) -> bool:
        """Whether one turn of controller and kubelet changed anything."""
        before = self.version
        for job in self.peek(JOB):
            self._control(job, now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        return self.version != before

    def _control(self, job: Object, moment: str) -> None:
        job = _merged({"status": {}}, job)
        pods = [
            pod
            for pod in self.peek(POD)
            if pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == job["metadata"]["name"]
        ]
        conditions = {each["type"] for each in job["status"].get("conditions", [])}
        if conditions & {"Complete", "Failed"}:
            return
        if job["spec"].get("suspend"):
            for pod in pods:
                self.remove(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
            if "Suspended" not in conditions:
                self._conclude(_merged(job, {"status": {"startTime": None}}), "Suspended", moment)
        elif job["spec"].get("activeDeadlineSeconds") == 0:
            for pod in pods:
                self.remove(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
            self._conclude(job, "Failed", moment)
        elif not pods and job["status"].get("startTime"):
            self._conclude(job, "Failed", moment)  # somebody deleted it: backoffLimit is 0
        elif not pods:
            self.put(JOB, _merged(job, {"status": {"startTime": moment, "conditions": []}}))
            for index in range(job["spec"]["parallelism"]):
                self._start(job, index, moment)
        else:
            self._watch(job, pods, moment)

    def _start(self, job: Object, index: int, moment: str) -> None:
        name, labels = job["metadata"]["name"], job["metadata"]["labels"]
        of_job = {"job-name": name, "controller-uid": job["metadata"]["uid"], "job-completion-index": str(index)}
        more = {f"batch.kubernetes.io/{label}": value for label, value in of_job.items()}
        metadata = {"name": f"{name}-{index}", "namespace": job["metadata"]["namespace"], "labels": {**labels, **more}}
        running = [{"name": "stage", "state": {"running": {"startedAt": moment}}}]
        self.put(POD, {"metadata": metadata, "spec": {}, "status": {"phase": "Running", "containerStatuses": running}})
        key = (labels["feddiff.dev/stage"], labels.get("feddiff.dev/client", ""), int(labels["feddiff.dev/attempt"]))
        self.started.append(key)

    def _watch(self, job: Object, pods: "list[Object]", moment: str) -> None:
        for pod in pods:
            if pod["status"]["phase"] == "Running" and (end := self.outcome(pod, job)) is not None:
                code, message = end
                ended = {"exitCode": code, "message": message, "startedAt": moment, "finishedAt": moment}
                statuses = [{"name": "stage", "state": {"terminated": ended}}]
                status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": statuses}
                self.put(POD, {**pod, "status": status})
        names = [("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods]
        phases = [self.objects[name]["status"]["phase"] for name in names if name in self.objects]
        if "Failed" in phases:
            self._conclude(job, "Failed", moment)
        elif phases == ["Succeeded"] * len(pods):
            self._conclude(job, "Complete", moment)

    def _conclude(self, job: Object, kind: str, moment: str) -> None:
        known = job["status"].get("conditions", [])
        condition = {"type": kind, "status": "True", "lastTransitionTime": moment}
        self.put(JOB, _merged(job, {"status": {"conditions": [*known, condition]}}))


class SeenChildren:
    """The children as watches would show them if they were never late."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    def jobs_of(self, uid: str) -> list[Object]:
        return [each for each in self.cluster.peek(JOB) if each["metadata"]["labels"]["feddiff.dev/job-uid"] == uid]

    def pods_of(self, uid: str) -> list[Object]:
        return [each for each in self.cluster.peek(POD) if each["metadata"]["labels"]["feddiff.dev/job-uid"] == uid]

    def strangers(self, namespace: str, name: str, uid: str) -> list[Object]:
        labels = {"feddiff.dev/job": name, "feddiff.dev/job-namespace": namespace}
        return [
            each
            for each in self.cluster.peek(JOB)
            if labels.items() <= each["metadata"]["labels"].items()
            and each["metadata"]["labels"]["feddiff.dev/job-uid"] != uid
        ]

    def releases_of(self, uid: str) -> list[Object]:
        return [each for each in self.cluster.peek(PRL) if each["spec"]["job"]["uid"] == uid]

    def job(self, namespace: str, name: str) -> Object | None:
        return self.cluster.objects.get((FDJ.name, namespace, name))

    def dataset(self, namespace: str, name: str) -> Object | None:
        return self.cluster.objects.get((PDS.name, namespace, name))

    def entries(self, namespace: str, name: str) -> list[Object]:
        own = [each for each in self.cluster.peek(PRL) if each["metadata"]["namespace"] == namespace]
        return [each for each in own if each["spec"]["dataset"]["name"] == name]


# ---- Operators that die ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """kill -9."""


class Mortal:
    """A cluster whose caller dies at the n-th call: before it is made, or after it took effect."""

    def __init__(self, cluster: Any, dies_at: int, after: bool) -> None:
        self.cluster, self.dies_at, self.after, self.num_calls = cluster, dies_at, after, 0

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **more: Any) -> Any:
            self.num_calls += 1
            dies = self.num_calls == self.dies_at
            if dies and not self.after:
                raise Killed(name)
            answer = await getattr(self.cluster, name)(*arguments, **more)
            if dies:
                raise Killed(name)
            return answer

        return call
