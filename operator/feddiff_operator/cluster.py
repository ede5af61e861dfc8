"""The cluster's API server, as the operator uses it: plain objects by kind, namespace and name.

Generic REST paths instead of one class per kind; the official client brings credentials (service account,
kubeconfig, token refresh) and the connection pool. Every answer that is not a success becomes one of four errors,
told apart by what the caller has to do next.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

Object = dict[str, Any]
Objects = list[Object]
X = TypeVar("X")
Y = TypeVar("Y")

FIELD_MANAGER: Final = "feddiff-operator"
PAGE: Final = 500  # objects in one answer to a list
TIMEOUT_SECONDS: Final = 30.0
LONGEST_PAUSE_SECONDS: Final = 30.0  # however long a Retry-After asks for


class ClusterError(Exception):
    """The API server did not do what was asked; the message is its own."""


class Conflict(ClusterError):
    """Somebody changed the object, or it is gone: read it again and decide anew."""


class AlreadyExists(ClusterError):
    """An object of that name is there already."""


class Refused(ClusterError):
    """Asking again could only be refused again: forbidden, invalid, unknown kind or namespace."""


class Invalid(Refused):
    """The object itself is wrong: nobody's permission or patience would help."""


class Unavailable(ClusterError):
    """No answer, or not now. What was asked may have happened all the same."""


@dataclass(frozen=True)
class Kind:
    """A namespaced kind of object and where the API server keeps it."""

    api_version: str
    name: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        parts = [root, *(("namespaces", namespace) if namespace else ()), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


JOB: Final = Kind("batch/v1", "Job", "jobs")
POD: Final = Kind("v1", "Pod", "pods")
CONFIG_MAP: Final = Kind("v1", "ConfigMap", "configmaps")
SERVICE: Final = Kind("v1", "Service", "services")
LEASE: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")
EVENT: Final = Kind("v1", "Event", "events")
FDJ: Final = Kind("feddiff.dev/v1alpha1", "FederatedDiffusionJob", "federateddiffusionjobs")
PDS: Final = Kind("feddiff.dev/v1alpha1", "PrivateDataset", "privatedatasets")
PRL: Final = Kind("feddiff.dev/v1alpha1", "PrivacyRelease", "privacyreleases")


# Told of every request: method, path, the answer's status (None: no answer came) and seconds, the wait for the rate
# limit included.
Observe = Callable[[str, str, int | None, float], None]


def unobserved(method: str, path: str, status: int | None, seconds: float) -> None:
    """Nobody wants to know."""


class Cluster:
    """One API server behind a rate limit. Close it, or use it as an async context manager."""

    def __init__(self, client: ApiClient, qps: float, burst: int, observe: Observe = unobserved) -> None:
        self._client = client
        self._client.user_agent = FIELD_MANAGER
        self._bucket = TokenBucket(qps, burst)
        self._observe = observe

    @classmethod
    async def from_kubeconfig(cls, path: str | None, qps: float, burst: int, observe: Observe = unobserved) -> Self:
        """The cluster of a kubeconfig file, or with None the one this pod runs in."""
        configuration = Configuration()
        if path is None:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config(path, client_configuration=configuration, persist_config=False)  # type: ignore[no-untyped-call]
        return cls(ApiClient(configuration), qps, burst, observe)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    # -- read: always the newest state, never a cached one

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        answer = await self._call("GET", kind.path(namespace, name))
        return None if answer.missing else answer.object()

    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> Objects:
        """Every object of the kind in a namespace (None: in all), as of one moment. `labels` is a label selector."""
        while (items := await self._list(kind, namespace, labels)) is None:
            pass
        return [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in items]

    async def _list(self, kind: Kind, namespace: str | None, labels: str) -> Objects | None:
        """All pages of one list; None when the later ones were no longer to be had and it has to start again."""
        items: Objects = []
        query = {"limit": str(PAGE), **({"labelSelector": labels} if labels else {})}
        while True:
            answer = await self._call("GET", kind.path(namespace), query)
            if answer.status == 410 and "continue" in query:
                return None
            page = answer.object()
            items += page["items"]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return items

    # -- write

    async def create(self, kind: Kind, obj: Object, rehearsal: bool = False) -> Object:
        """The object as created, or with `rehearsal` as it would be. Raises AlreadyExists, and Invalid also for a field
        that the kind does not have: left out in silence, a misspelt `limits` would be a trainer without its GPU."""
        path = kind.path(obj["metadata"]["namespace"])
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"dryRun": "All"} if rehearsal else {})
        return (await self._call("POST", path, query, obj)).object()

    async def replace_status(self, kind: Kind, obj: Object) -> Object:
        """The object with its status replaced, if it still is the version that `obj` was. Raises Conflict if not."""
        metadata = obj["metadata"]
        assert metadata.get("resourceVersion"), "a status is replaced only with the version it was computed from"
        path = kind.path(metadata["namespace"], metadata["name"], "status")
        answer = await self._call("PUT", path, {"fieldManager": FIELD_MANAGER}, obj)
        return answer.changed()

    async def patch(self, kind: Kind, namespace: str, name: str, body: Object | Objects) -> Object:
        """The object after a merge patch (a dict) or a JSON patch (a list). Raises Conflict when it is gone."""
        form = "json-patch" if isinstance(body, list) else "merge-patch"
        path, query = kind.path(namespace, name), {"fieldManager": FIELD_MANAGER}
        return (await self._call("PATCH", path, query, body, f"application/{form}+json")).changed()

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> None:
        """The object, and whatever it owns, is on its way out; with `uid` only if it is that very one."""
        options: Object = {"propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        answer = await self._call("DELETE", kind.path(namespace, name), {}, options)
        if not answer.missing and not (uid is not None and answer.status == 409):
            answer.object()

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | Objects | None = None,
        content_type: str = "application/json",
    ) -> "Answer":
        began, status = time.monotonic(), None
        try:
            answer = await self._answer(method, path, query or {}, body, content_type)
            status = answer.status
            return answer
        finally:
            self._observe(method, path, status, time.monotonic() - began)

    async def _answer(
        self, method: str, path: str, query: Mapping[str, str], body: Object | Objects | None, content_type: str
    ) -> "Answer":
        await self._bucket.take()
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],  # reads a service account's token again when it was renewed
            )
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            response = await self._client.call_api(*request, _request_timeout=timeout)
            content = await response.read()  # type: ignore[no-untyped-call]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        if response.status in (429, 503):
            self._bucket.pause(_seconds(response.headers.get("Retry-After")))
        return Answer(f"{method} {path}", response.status, content)


@dataclass(frozen=True)
class Answer:
    """What the API server said to one request."""

    request: str
    status: int
    body: bytes

    def object(self) -> Object:
        """The object it carries, or the error that it stands for."""
        if 200 <= self.status < 300:
            parsed: Object = json.loads(self.body)
            return parsed
        raise self._error()(self._words())

    def changed(self) -> Object:
        """The same, where an object that is gone was changed by somebody else."""
        if self.missing:
            raise Conflict(self._words())
        return self.object()

    @property
    def missing(self) -> bool:
        """There is no such object; a path that the server does not know at all is something else."""
        return self.status == 404 and self._said.get("reason") == "NotFound" and "name" in self._said.get("details", {})

    def _error(self) -> type[ClusterError]:
        if self.status == 409:
            return AlreadyExists if self._said.get("reason") == "AlreadyExists" else Conflict
        if self.status in (401, 408, 410, 429) or self.status >= 500:
            return Unavailable
        return Invalid if self.status in (400, 422) else Refused

    def _words(self) -> str:
        return f"{self.request}: {self.status}: {self._said.get('message') or self.body[:200].decode(errors='replace')}"

    @property
    def _said(self) -> Object:
        try:
            said = json.loads(self.body)
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header; the API server always sends a whole number."""
    return min(float(retry_after), LONGEST_PAUSE_SECONDS) if retry_after and retry_after.isdigit() else 0.0


async def few_at_a_time(call: Callable[[X], Awaitable[Y]], arguments: Iterable[X], few: int = 8) -> list[Y]:
    """What the call returns for each of the arguments. One job of a thousand clients takes turns with the others."""
    free = asyncio.Semaphore(few)

    async def one(argument: X) -> Y:
        async with free:
            return await call(argument)

    return await asyncio.gather(*map(one, arguments))


class TokenBucket:
    """At most `burst` calls at once and `qps` a second in the long run, first come first served."""

    def __init__(
        self,
        qps: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._qps, self._burst, self._clock, self._sleep = qps, burst, clock, sleep
        self._tokens, self._counted_at = float(burst), clock()

    async def take(self) -> None:
        """Returns when the next call may go out."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._counted_at) * self._qps) - 1
        self._counted_at = now
        if self._tokens < 0:
            try:
                await self._sleep(-self._tokens / self._qps)
            except asyncio.CancelledError:  # nobody waits for it any more: those behind need not, either
                self._tokens += 1
                raise

    def pause(self, seconds: float) -> None:
        """No further call for so long. Several answers to calls made at once do not add up."""
        if seconds > 0:
            self._tokens = min(self._tokens, -seconds * self._qps)
