"""What the watches have seen, by the job that it belongs to; only what is read later is kept in memory.

A pod is 30 kB of Python objects, and most of them are a template that we wrote ourselves.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from feddiff_protocol.labels import JOB_NAME, JOB_NAMESPACE, JOB_UID

from .metrics import job_facts
from .workloads import TOO_LARGE, is_too_large

V = TypeVar("V")


class Children(Protocol):
    """What the watches have brought: jobs with their children in every namespace, datasets with their entries. It may
    be late, so nothing is admitted, charged or started on its word alone."""

    def job(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A FederatedDiffusionJob."""
        ...

    def jobs_of(self, uid: str) -> list[dict[str, Any]]:
        """Its batch Jobs, without spec.template and managedFields."""
        ...

    def pods_of(self, uid: str) -> list[dict[str, Any]]:
        """Its pods: metadata without managedFields, status, and of the spec the node's name."""
        ...

    def strangers(self, namespace: str, name: str, uid: str) -> list[dict[str, Any]]:
        """Batch Jobs of an earlier job of this name; all of them when `uid` is empty, since then there is none."""
        ...

    def releases_of(self, uid: str) -> list[dict[str, Any]]:
        """Its entries in the ledgers."""
        ...

    def dataset(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A PrivateDataset."""
        ...

    def entries(self, namespace: str, name: str) -> list[dict[str, Any]]:
        """The entries that bear the dataset's name, whatever its uid was then."""
        ...


@dataclass(frozen=True, slots=True)
class _Kept(Generic[V]):
    value: V
    keys: frozenset[Hashable]
    listing: int


class Shelf(Generic[V]):
    """What is kept of every object of one kind, found by the keys under which it is asked for.

    kopf's own indexes are not used: filling them takes time that grows with the square of the number of objects, and
    what is deleted while a watch is down stays in them for ever.
    """

    def __init__(
        self, keep: Callable[[Mapping[str, Any]], V], keys: Callable[[Mapping[str, Any]], Iterable[Hashable]]
    ) -> None:
        self._keep, self._keys = keep, keys
        self._kept: dict[tuple[str, str], _Kept[V]] = {}  # by namespace and uid
        self._found: dict[Hashable, dict[str, V]] = {}  # by key and uid

    def put(self, body: Mapping[str, Any], listing: int) -> tuple[V, V | None]:
        """What is kept of the object now, and what was kept of it before. `listing`: how often all were listed."""
        before = self.take(body)
        namespace, uid = _place(body)
        kept = _Kept(self._keep(body), frozenset(self._keys(body)), listing)
        self._kept[namespace, uid] = kept
        for key in kept.keys:
            self._found.setdefault(key, {})[uid] = kept.value
        return kept.value, before

    def take(self, body: Mapping[str, Any]) -> V | None:
        """What was kept of the object, which is no longer."""
        return self._take(*_place(body))

    def take_unlisted(self, namespace: str | None, listing: int) -> list[V]:
        """What was kept of objects that the newest listing, number `listing`, did not bring: they are gone."""
        gone = [place for place, kept in self._kept.items() if kept.listing < listing and namespace in (None, place[0])]
        return [value for place in gone if (value := self._take(*place)) is not None]

    def of(self, key: Hashable) -> list[V]:
        return list(self._found.get(key, {}).values())

    def __iter__(self) -> Iterator[V]:
        return iter([kept.value for kept in self._kept.values()])

    def _take(self, namespace: str, uid: str) -> V | None:
        kept = self._kept.pop((namespace, uid), None)
        if kept is None:
            return None
        for key in kept.keys:
            found = self._found[key]
            del found[uid]
            if not found:
                del self._found[key]
        return kept.value


def _place(body: Mapping[str, Any]) -> tuple[str, str]:
    return body["metadata"]["namespace"], body["metadata"]["uid"]


class Once(Generic[V]):
    """What an object means, worked out once for each of its versions. The least recently asked are forgotten."""

    def __init__(self, work: Callable[[Mapping[str, Any]], V], most: int) -> None:
        self._work, self._most = work, most
        self._known: OrderedDict[str, tuple[str, V]] = OrderedDict()  # version and meaning, by uid

    def __call__(self, body: Mapping[str, Any]) -> V:
        uid, version = body["metadata"].get("uid"), body["metadata"].get("resourceVersion")
        if not uid or not version:
            return self._work(body)
        known = self._known.pop(uid, None)
        if known is None or known[0] != version:
            known = version, self._work(body)
        self._known[uid] = known
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return known[1]


class Seen:
    """Everything that the watches have brought, found by whoever asks for it."""

    def __init__(self) -> None:
        self.jobs = Shelf(kept, lambda body: [("job", *_named(body)), *job_facts(body).datasets])
        self.datasets = Shelf(kept, lambda body: [_named(body)])
        self.releases = Shelf(kept, _release_keys)
        self.child_jobs = Shelf(kept_job, lambda body: [_labels(body).get(JOB_UID), owner_of(body)])
        self.child_pods = Shelf(kept_pod, lambda body: [_labels(body).get(JOB_UID)])

    def jobs_of(self, uid: str) -> list[dict[str, Any]]:
        return self.child_jobs.of(uid)

    def pods_of(self, uid: str) -> list[dict[str, Any]]:
        return self.child_pods.of(uid)

    def strangers(self, namespace: str, name: str, uid: str) -> list[dict[str, Any]]:
        return [child for child in self.child_jobs.of((namespace, name)) if _labels(child).get(JOB_UID) != uid]

    def releases_of(self, uid: str) -> list[dict[str, Any]]:
        return self.releases.of(uid)

    def job(self, namespace: str, name: str) -> dict[str, Any] | None:
        return next(iter(self.jobs.of(("job", namespace, name))), None)

    def dataset(self, namespace: str, name: str) -> dict[str, Any] | None:
        return next(iter(self.datasets.of((namespace, name))), None)

    def entries(self, namespace: str, name: str) -> list[dict[str, Any]]:
        return self.releases.of((namespace, name))


def kept_job(body: Mapping[str, Any]) -> dict[str, Any]:
    """A batch Job as it is kept: everything but spec.template and managedFields."""
    return _kept(body, spec={key: value for key, value in (body.get("spec") or {}).items() if key != "template"})


def kept_pod(body: Mapping[str, Any]) -> dict[str, Any]:
    """A pod as it is kept: metadata without managedFields, status, and of the spec the node's name."""
    return _kept(body, spec={key: value for key, value in (body.get("spec") or {}).items() if key == "nodeName"})


def kept(body: Mapping[str, Any]) -> dict[str, Any]:
    """A job, dataset or entry as it is kept: everything but managedFields, and overlays too large to be used."""
    spec: dict[str, Any] = _without_large_overlay(body.get("spec") or {})
    if isinstance(shared := spec.get("shared"), dict):
        spec = {**spec, "shared": _without_large_overlay(shared)}
    return _kept(body, spec=spec)


def _without_large_overlay(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A megabyte of `{}` takes forty in memory."""
    large = "podTemplate" in spec and is_too_large(spec["podTemplate"])
    return {**spec, "podTemplate": TOO_LARGE} if large else dict(spec)


def _kept(body: Mapping[str, Any], **parts: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    whole = {"metadata": metadata, "spec": body.get("spec") or {}, "status": body.get("status") or {}, **parts}
    shared: dict[str, Any] = _shared({"apiVersion": body.get("apiVersion", ""), "kind": body.get("kind", ""), **whole})
    return shared


def _shared(value: Any) -> Any:
    """The same value, of strings that all kept objects share: most say the same thing in thousands of them."""
    match value:
        case dict():
            return {sys.intern(key): _shared(part) for key, part in value.items()}
        case list():
            return [_shared(part) for part in value]
        case str() if len(value) <= 100:
            return sys.intern(value)
        case _:
            return value


def owner_of(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """Namespace and name of the FederatedDiffusionJob whose child this is, as its labels say; None without them."""
    namespace, name = _labels(body).get(JOB_NAMESPACE), _labels(body).get(JOB_NAME)
    return (namespace, name) if namespace and name else None


def _labels(body: Mapping[str, Any]) -> Mapping[str, str]:
    labels: Mapping[str, str] = body["metadata"].get("labels") or {}
    return labels


def _release_keys(body: Mapping[str, Any]) -> list[Hashable]:
    spec = body.get("spec") or {}
    dataset = body["metadata"]["namespace"], (spec.get("dataset") or {}).get("name")
    return [(spec.get("job") or {}).get("uid"), dataset]


def _named(body: Mapping[str, Any]) -> tuple[str, str]:
    return body["metadata"]["namespace"], body["metadata"]["name"]
