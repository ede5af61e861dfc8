"""The API server as the operator uses it: which answer is which error, and what real servers answer."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.kubernetes import ControlPlane
from feddiff_operator import cluster as operator_cluster
from feddiff_operator.cluster import (
    CONFIG_MAP,
    FDJ,
    JOB,
    PDS,
    AlreadyExists,
    Answer,
    Cluster,
    ClusterError,
    Conflict,
    Invalid,
    Kind,
    Refused,
    TokenBucket,
    Unavailable,
    few_at_a_time,
)
from virtual_time import now, run

Object = dict[str, Any]


def test_a_kind_knows_its_paths() -> None:
    assert JOB.path("a", "b") == "/apis/batch/v1/namespaces/a/jobs/b"
    assert CONFIG_MAP.path(None) == "/api/v1/configmaps"
    assert PDS.path("a", "b", "status") == "/apis/feddiff.dev/v1alpha1/namespaces/a/privatedatasets/b/status"


# ---- Answers -----------------------------------------------------------------------------------------------------


def answer(status: int, reason: str = "", message: str = "its own words") -> Answer:
    body = {"kind": "Status", "reason": reason, "message": message, "details": {"name": "b", "kind": "jobs"}}
    return Answer("GET /somewhere", status, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("status", "reason", "error"),
    [
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (400, "BadRequest", Invalid),
        (403, "Forbidden", Refused),
        (404, "NotFound", Refused),
        (413, "RequestEntityTooLarge", Refused),
        (422, "Invalid", Invalid),
        (401, "Unauthorized", Unavailable),
        (410, "Expired", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (500, "InternalError", Unavailable),
        (503, "ServiceUnavailable", Unavailable),
        (504, "Timeout", Unavailable),
    ],
)
def test_every_answer_is_the_error_that_says_what_to_do_next(
    status: int, reason: str, error: type[ClusterError]
) -> None:
    with pytest.raises(error, match="its own words") as caught:
        answer(status, reason).object()
    assert type(caught.value) is error


def test_only_an_object_that_is_not_there_is_missing() -> None:
    assert answer(404, "NotFound").missing
    assert not Answer("GET /apis/unknown", 404, b"404 page not found\n").missing
    with pytest.raises(Refused, match="404 page not found"):
        Answer("GET /apis/unknown", 404, b"404 page not found\n").object()


def test_changing_what_is_gone_is_a_conflict() -> None:
    with pytest.raises(Conflict):
        answer(404, "NotFound").changed()


# ---- Rate --------------------------------------------------------------------------------------------------------


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def times(bucket: TokenBucket, time: Time, count: int) -> list[float]:
    async def take() -> list[float]:
        taken = []
        for _ in range(count):
            await bucket.take()
            taken.append(round(time.now - 100, 6))
        return taken

    return asyncio.run(take())


def test_a_burst_goes_out_at_once_and_the_rest_at_the_rate() -> None:
    time = Time()
    assert times(TokenBucket(10, 3, time, time.sleep), time, 6) == [0, 0, 0, 0.1, 0.2, 0.3]


def test_a_server_that_asks_for_a_pause_gets_it_once() -> None:
    time = Time()
    bucket = TokenBucket(10, 3, time, time.sleep)
    for _ in range(5):  # five calls were on their way when it asked
        bucket.pause(2)
    assert times(bucket, time, 2) == [2.1, 2.2]


def test_who_is_cancelled_while_it_waits_holds_nobody_up() -> None:
    """A look that ran out of time leaves a thousand calls behind, of which none goes out."""

    async def story() -> float:
        bucket = TokenBucket(10, 1, now)
        await bucket.take()
        waiting = [asyncio.create_task(bucket.take()) for _ in range(1000)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await bucket.take()
        return now()

    assert run(story()) == pytest.approx(0.1)


def test_a_few_calls_at_a_time_answer_in_order() -> None:
    under_way, most = 0, 0

    async def call(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(1 / (1 + number))
        under_way -= 1
        return 2 * number

    assert run(few_at_a_time(call, range(30), few=4)) == [2 * number for number in range(30)]
    assert most == 4 and under_way == 0


class Told:
    """A client whose server gives one answer, always."""

    def __init__(self, status: int, headers: Object | None = None) -> None:
        self.status, self.headers = status, headers or {}

    async def param_serialize(self, *_: Any, **__: Any) -> tuple[Any, ...]:
        return ("GET", "https://nowhere")

    async def call_api(self, *_: Any, **__: Any) -> "Told":
        return self

    async def read(self) -> bytes:
        return b"{}"


@pytest.mark.parametrize(("header", "seconds"), [("3", 3), ("86400", 30), ("Thu, 01 Jan", 0)])
def test_a_retry_after_is_honoured_within_reason(header: str, seconds: float) -> None:
    time = Time()
    cluster = Cluster(Told(429, {"Retry-After": header}), qps=1000, burst=2)  # type: ignore[arg-type]
    cluster._bucket = TokenBucket(1000, 2, time, time.sleep)

    async def ask() -> None:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await cluster.get(JOB, "a", "b")

    asyncio.run(ask())
    assert time.now - 100 == pytest.approx(seconds, abs=0.01)


class Silent(Told):
    """A client whose server never answers."""

    async def call_api(self, *_: Any, **__: Any) -> "Told":
        raise TimeoutError


def test_every_request_is_told_to_the_observer_whatever_becomes_of_it() -> None:
    told: list[tuple[str, str, int | None]] = []

    def observe(method: str, path: str, status: int | None, seconds: float) -> None:
        assert seconds >= 0
        told.append((method, path, status))

    async def ask() -> None:
        for client in (Told(200), Told(429), Silent(200)):
            cluster = Cluster(client, 1000, 10, observe)  # type: ignore[arg-type]
            with contextlib.suppress(Unavailable):
                await cluster.get(JOB, "a", "b")

    asyncio.run(ask())
    path = "/apis/batch/v1/namespaces/a/jobs/b"
    assert told == [("GET", path, 200), ("GET", path, 429), ("GET", path, None)]


# ---- A real API server -------------------------------------------------------------------------------------------


def ask(control_plane: ControlPlane, story: Callable[[Cluster], Awaitable[None]], user: str = "") -> None:
    kubeconfig = control_plane.user(user) if user else control_plane.kubeconfig

    async def with_cluster() -> None:
        async with await Cluster.from_kubeconfig(str(kubeconfig), qps=1000, burst=1000) as cluster:
            await story(cluster)

    asyncio.run(with_cluster())


def config_map(namespace: str, name: str, **data: str) -> Object:
    metadata = {"name": name, "namespace": namespace, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def dataset(namespace: str, name: str = "scans", epsilon: str = "20") -> Object:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "PrivateDataset",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "source": {"format": "npz", "path": "train.npz"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 1, "records": [9]},
            "budget": {"epsilon": epsilon, "delta": "1e-5"},
        },
    }


def test_objects_are_created_read_patched_and_deleted(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()

    async def story(cluster: Cluster) -> None:
        assert await cluster.get(CONFIG_MAP, namespace, "a") is None
        made = await cluster.create(CONFIG_MAP, config_map(namespace, "a", one="1"))
        with pytest.raises(AlreadyExists):
            await cluster.create(CONFIG_MAP, config_map(namespace, "a", one="2"))
        await cluster.patch(CONFIG_MAP, namespace, "a", {"data": {"two": "2"}})
        stale = {"op": "test", "path": "/metadata/resourceVersion", "value": made["metadata"]["resourceVersion"]}
        with pytest.raises((Refused, Conflict)):
            await cluster.patch(CONFIG_MAP, namespace, "a", [stale, {"op": "remove", "path": "/data/two"}])
        patched = await cluster.patch(CONFIG_MAP, namespace, "a", [{"op": "remove", "path": "/data/two"}])
        assert patched["data"] == {"one": "1"}
        assert {each["manager"] for each in patched["metadata"]["managedFields"]} == {"feddiff-operator"}
        await cluster.delete(CONFIG_MAP, namespace, "a", uid="another")
        assert await cluster.get(CONFIG_MAP, namespace, "a") is not None
        await cluster.delete(CONFIG_MAP, namespace, "a", uid=made["metadata"]["uid"])
        await cluster.delete(CONFIG_MAP, namespace, "a")
        assert await cluster.get(CONFIG_MAP, namespace, "a") is None
        with pytest.raises(Conflict):
            await cluster.patch(CONFIG_MAP, namespace, "a", {"data": {}})

    ask(control_plane, story)


def test_a_list_reads_every_page_and_says_what_its_items_are(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_cluster, "PAGE", 2)
    namespace = control_plane.namespace()

    async def story(cluster: Cluster) -> None:
        for name in "abcde":
            await cluster.create(CONFIG_MAP, config_map(namespace, name))
        found = [each for each in await cluster.list(CONFIG_MAP, namespace) if each["metadata"]["name"] in "abcde"]
        assert [each["metadata"]["name"] for each in found] == list("abcde")
        assert {(each["apiVersion"], each["kind"]) for each in found} == {("v1", "ConfigMap")}
        (only,) = await cluster.list(CONFIG_MAP, namespace, "app=c")
        assert only["metadata"]["name"] == "c"
        assert len(await cluster.list(CONFIG_MAP, None, "app in (a, b)")) >= 2

    ask(control_plane, story)


def test_a_status_is_replaced_only_from_the_version_that_was_read(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()

    async def story(cluster: Cluster) -> None:
        read = await cluster.create(PDS, dataset(namespace))
        written = await cluster.replace_status(PDS, {**read, "status": {"account": {"by": "one"}}})
        assert written["status"] == {"account": {"by": "one"}}
        with pytest.raises(Conflict):
            await cluster.replace_status(PDS, {**read, "status": {"account": {"by": "two"}}})
        unversioned = {**written, "metadata": {"name": "scans", "namespace": namespace}}
        with pytest.raises(AssertionError, match="version"):
            await cluster.replace_status(PDS, unversioned)
        await cluster.delete(PDS, namespace, "scans")
        with pytest.raises(Conflict):
            await cluster.replace_status(PDS, {**written, "status": {"account": {"by": "two"}}})
        await cluster.create(PDS, dataset(namespace))
        with pytest.raises(Conflict):
            await cluster.replace_status(PDS, {**written, "status": {"account": {"by": "two"}}})

    ask(control_plane, story)


def test_what_can_only_be_refused_again_is_refused_in_the_servers_words(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()

    async def story(cluster: Cluster) -> None:
        with pytest.raises(Refused, match=r"must be > 0\.0"):
            await cluster.create(PDS, dataset(namespace, epsilon="0"))
        with pytest.raises(Refused, match=r"namespaces .* not found"):
            await cluster.create(PDS, dataset("nowhere"))
        with pytest.raises(Refused, match="page not found"):
            await cluster.get(Kind("nobody.dev/v1", "Nothing", "nothings"), namespace, "a")
        with pytest.raises(Refused, match="page not found"):
            await cluster.list(Kind("nobody.dev/v1", "Nothing", "nothings"), namespace)

    async def forbidden(cluster: Cluster) -> None:
        with pytest.raises(Refused, match="cannot get resource"):
            await cluster.get(FDJ, namespace, "a")

    ask(control_plane, story)
    ask(control_plane, forbidden, user="nobody-in-particular")


def test_a_server_that_does_not_answer_is_unavailable(control_plane: ControlPlane, tmp_path: Any) -> None:
    kubeconfig = json.loads(control_plane.kubeconfig.read_text())
    kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "config").write_text(json.dumps(kubeconfig))

    async def story() -> None:
        async with await Cluster.from_kubeconfig(str(tmp_path / "config"), qps=10, burst=10) as cluster:
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
                await cluster.get(JOB, "a", "b")

    asyncio.run(story())
