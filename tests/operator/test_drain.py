"""Before the operator goes: nothing runs, nothing is left but jobs and ledgers, and no replica interferes."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes import PROGRAMS
from feddiff_operator import drain as draining
from feddiff_operator.aftermath import FINALIZER
from feddiff_operator.cluster import (
    CONFIG_MAP,
    FDJ,
    JOB,
    LEASE,
    PDS,
    POD,
    PRL,
    SERVICE,
    Conflict,
    Kind,
    Refused,
)
from feddiff_operator.drain import AFTERWARDS_SECONDS, Drain, main
from feddiff_operator.lease import Election
from feddiff_protocol.errors import ConfigurationInvalid, Interrupted
from feddiff_protocol.labels import JOB_UID
from many_jobs import Hospital, Object, Operator, books_in_order, made_twice
from virtual_time import now, run

CHART = Path(__file__).parents[2] / "charts/feddiff"
PLACE = ("feddiff-system", "feddiff-operator")
TERM = 15
CHILDREN = (JOB, CONFIG_MAP, SERVICE)


def releases_alone(child: Object, spec: Object) -> int | None:
    return 0 if spec["stage"] == "release" else None


async def in_flight(num_jobs: int = 3, **more: Any) -> Hospital:
    """Jobs whose releases are done and whose trainings run, and a Lease as the chart makes it."""
    hospital = Hospital(num_jobs, outcome=releases_alone, **more)
    hospital.put(LEASE, {"metadata": {"namespace": PLACE[0], "name": PLACE[1]}})
    await Operator(hospital).go_on(lambda: len(hospital.peek(JOB)) == 5 * num_jobs)
    return hospital


@contextlib.asynccontextmanager
async def platform_of(hospital: Hospital, every_seconds: float = 7.0) -> AsyncIterator[None]:
    """The Job controller and the kubelets move now and then; time is the event loop's."""
    began = hospital.now

    async def live() -> None:
        while True:
            await asyncio.sleep(every_seconds)
            hospital.now = began + timedelta(seconds=now())
            hospital.live(hospital.now)

    task = asyncio.create_task(live())
    try:
        yield
    finally:
        task.cancel()


def active(hospital: Hospital, uid: str) -> list[str]:
    pods = [pod for pod in hospital.peek(POD) if pod["metadata"]["labels"]["feddiff.dev/job-uid"] == uid]
    return [pod["metadata"]["name"] for pod in pods if draining.is_active(pod)]


class Watched:
    """The API server as the drain sees it, with a note of everything that it does too early."""

    def __init__(self, hospital: Hospital, allowed: Callable[[], bool] = lambda: True) -> None:
        self.hospital, self.allowed = hospital, allowed
        self.early: list[str] = []
        self.reasons: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hospital, name)

    async def patch(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        if kind != LEASE and not self.allowed():
            self.early.append(f"{name} patched")
        if kind == JOB:
            self.reasons.add(body["metadata"]["annotations"]["feddiff.dev/stopped"])
        if kind == FDJ:
            uid = self.hospital.objects[kind.name, namespace, name]["metadata"]["uid"]
            self._note(uid, f"{name} let go")
            kept = [each for each in (*self.hospital.peek(JOB), *self.hospital.peek(CONFIG_MAP))]
            if any(each["metadata"]["labels"]["feddiff.dev/job-uid"] == uid for each in kept):
                self.early.append(f"{name} let go before its children")
        return await self.hospital.patch(kind, namespace, name, body)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> None:
        labels = self.hospital.objects[kind.name, namespace, name]["metadata"]["labels"]
        self._note(labels["feddiff.dev/job-uid"], f"{name} deleted")
        await self.hospital.delete(kind, namespace, name, uid)

    def _note(self, uid: str, what: str) -> None:
        if running := active(self.hospital, uid):
            self.early.append(f"{what} while {running} run")


async def drained(hospital: Hospital) -> list[str]:
    """What a whole drain did too early."""
    watched = Watched(hospital)
    async with platform_of(hospital):
        await Drain(watched, PLACE).run(120)  # type: ignore[arg-type]
    assert watched.reasons == {"Uninstalled"}
    return watched.early


def left(hospital: Hospital) -> list[str]:
    return [each["metadata"]["name"] for kind in (*CHILDREN, POD) for each in hospital.peek(kind)]


def holder(hospital: Hospital) -> str:
    return str(hospital.objects["Lease", *PLACE]["spec"]["holderIdentity"])


def without_metadata(objects: list[Object]) -> list[Object]:
    return [{key: value for key, value in each.items() if key != "metadata"} for each in objects]


def test_pods_end_then_children_go_then_finalizers_and_jobs_and_ledgers_stay() -> None:
    async def story() -> None:
        hospital = await in_flight()
        before = [without_metadata(hospital.peek(kind)) for kind in (FDJ, PDS, PRL)]
        assert all(FINALIZER in each["metadata"]["finalizers"] for each in hospital.peek(FDJ))
        assert await drained(hospital) == []
        assert left(hospital) == []
        assert [without_metadata(hospital.peek(kind)) for kind in (FDJ, PDS, PRL)] == before
        assert [each["metadata"]["finalizers"] for each in hospital.peek(FDJ)] == [[]] * 3
        assert holder(hospital) == "drained"

    run(story())


def test_a_drain_that_does_not_wait_for_pods_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        hospital = await in_flight()
        steps = draining.steps
        monkeypatch.setattr(draining, "steps", lambda share: steps(draining.replace(share, pods=())))
        assert await drained(hospital) != []

    run(story())


async def drained_under_kueue(hospital: Hospital) -> None:
    """Of every suspended Job the queue takes the suspension back, at once."""
    patch = hospital.patch

    async def restarting(kind: Kind, namespace: str, name: str, body: Any) -> Object:
        patched = await patch(kind, namespace, name, body)
        return await patch(kind, namespace, name, {"spec": {"suspend": False}}) if kind == JOB else patched

    hospital.patch = restarting  # type: ignore[method-assign]
    async with platform_of(hospital):
        await Drain(hospital, PLACE).run(120)


def test_a_queue_that_starts_suspended_jobs_again_does_not_hold_the_drain_up() -> None:
    async def story() -> None:
        hospital = await in_flight()
        await drained_under_kueue(hospital)
        assert left(hospital) == []

    run(story())


def test_a_drain_that_only_suspends_would_never_end_under_such_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = draining.stopping
    monkeypatch.setattr(draining, "stopping", lambda why: stopping(why) | {"spec": {"suspend": True}})

    async def story() -> None:
        hospital = await in_flight()
        with pytest.raises(Interrupted):
            await drained_under_kueue(hospital)

    run(story())


def test_an_operator_installed_again_goes_on_with_the_same_releases() -> None:
    async def story() -> None:
        hospital = await in_flight()
        paid = {entry.name: entry.manifest_sha256 for entry in hospital.entries()}
        await drained(hospital)
        hospital.ends = lambda child, spec: 0
        hospital.started.clear()
        await Operator(hospital).go_on(lambda: hospital.phases() == {"Complete": 3})
        assert made_twice(hospital) == []
        assert not [stage for stage, _, _ in hospital.started if stage == "release"]
        assert {entry.name: entry.manifest_sha256 for entry in hospital.entries()} == paid
        books_in_order(hospital, 6)

    run(story())


def test_time_that_runs_out_is_said_with_what_still_runs_and_the_operator_goes_on() -> None:
    async def story() -> None:
        hospital = await in_flight()
        stuck = hospital.peek(POD)[-1]
        stuck_job = stuck["metadata"]["labels"]["feddiff.dev/job"]
        remove = hospital.remove

        def hold(kind: Kind, namespace: str, name: str) -> None:
            if name != stuck["metadata"]["name"]:
                remove(kind, namespace, name)

        hospital.remove = hold  # type: ignore[method-assign]
        async with platform_of(hospital):
            with pytest.raises(Interrupted) as said:
                await Drain(hospital, PLACE).run(60)
        words = str(said.value)
        assert "after 60 s" in words and f"pod {stuck['metadata']['namespace']}/{stuck['metadata']['name']}" in words
        assert "\n" not in words and words.count("pod ") == 1
        assert holder(hospital) == "", "a replica may go on at once"
        kept = {each["metadata"]["name"] for each in hospital.peek(FDJ) if each["metadata"]["finalizers"]}
        assert kept == {stuck_job}
        hospital.remove = remove  # type: ignore[method-assign]
        hospital.live(hospital.now)
        hospital.ends = lambda child, spec: 0
        await Operator(hospital).go_on(lambda: hospital.phases() == {"Complete": 3})
        books_in_order(hospital, 6)

    run(story())


def replicas(hospital: Hospital, count: int) -> list[Election]:
    return [Election(hospital, *PLACE, f"replica-{number}", TERM) for number in range(count)]  # type: ignore[arg-type]


async def beside_two_replicas() -> tuple[list[str], Hospital]:
    """What the drain did while a replica led."""
    hospital = await in_flight()
    elections = replicas(hospital, 2)

    async def end() -> None:
        pass

    tasks = [asyncio.create_task(each.run(lambda: None, end)) for each in elections]
    await asyncio.sleep(2 * TERM)
    assert sum(each.leading for each in elections) == 1
    watched = Watched(hospital, lambda: not any(each.leading for each in elections))
    async with platform_of(hospital, every_seconds=20):
        await Drain(watched, PLACE).run(200)  # type: ignore[arg-type]
        await asyncio.sleep(AFTERWARDS_SECONDS - 1)
        assert not any(each.leading for each in elections), "helm deletes them meanwhile"
        await asyncio.sleep(3 * TERM)
        assert any(each.leading for each in elections), "helm did not"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return watched.early, hospital


def test_no_replica_works_while_the_drain_does_and_for_a_while_after_it() -> None:
    early, hospital = run(beside_two_replicas())
    assert early == []
    assert left(hospital) == []


def test_a_drain_that_does_not_wait_for_the_leader_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Drain._alone

    async def at_once(self: Drain) -> bool:
        await alone(self)
        return True

    monkeypatch.setattr(Drain, "_alone", at_once)
    early, _ = run(beside_two_replicas())
    assert early != []


def test_without_the_lease_nothing_is_touched() -> None:
    async def story() -> None:
        hospital = await in_flight(1)
        version = hospital.version
        with pytest.raises(ConfigurationInvalid, match="Lease feddiff-system/other"):
            await Drain(hospital, ("feddiff-system", "other")).run(60)
        assert hospital.version == version

    run(story())


class Forbidding:
    """An API server that permits nothing in one namespace; pods and Jobs can be seen."""

    def __init__(self, hospital: Hospital, namespace: str) -> None:
        self.hospital, self.namespace = hospital, namespace

    def __getattr__(self, name: str) -> Any:
        def call(kind: Kind, namespace: str | None, *more: Any) -> Any:
            if namespace == self.namespace:
                raise Refused(f"cannot {name} {kind.plural} in {namespace}")
            return getattr(self.hospital, name)(kind, namespace, *more)

        async def called(*arguments: Any) -> Any:
            return await call(*arguments)

        return called


def test_an_owner_who_forbids_everything_holds_the_drain_back_only_while_something_runs_there() -> None:
    async def story() -> None:
        hospital = await in_flight(1)
        async with platform_of(hospital):
            with pytest.raises(Interrupted, match=r"pod clinic-a-0/.*cannot (list|patch) .* in clinic-a-0"):
                await Drain(Forbidding(hospital, "clinic-a-0"), PLACE).run(60)  # type: ignore[arg-type]
            hospital.ends = lambda child, spec: 0
            await asyncio.sleep(10)
            drain = Drain(Forbidding(hospital, "clinic-a-0"), PLACE)  # type: ignore[arg-type]
            await drain.run(60)
        assert set(drain.refused) == {"clinic-a-0"}
        assert {each["metadata"]["namespace"] for kind in CHILDREN for each in hospital.peek(kind)} == {"clinic-a-0"}
        assert [each["metadata"]["finalizers"] for each in hospital.peek(FDJ)] == [[]]

    run(story())


@pytest.mark.parametrize("of_a_job", [True, False])
def test_what_a_stranger_labels_where_we_may_change_nothing_holds_no_drain_back(of_a_job: bool) -> None:
    async def story() -> None:
        hospital = await in_flight(1)
        uid = hospital.peek(FDJ)[0]["metadata"]["uid"] if of_a_job else "nobodys"
        metadata = {"name": "x", "namespace": "elsewhere", "labels": {JOB_UID: uid}}
        async with platform_of(hospital):
            forged = {JOB: {"spec": {}, "status": {}}, POD: {"spec": {}, "status": {"phase": "Running"}}}
            listed = {kind: {**body, "metadata": dict(metadata)} for kind, body in forged.items()}
            await Drain(Forged(Forbidding(hospital, "elsewhere"), listed), PLACE).run(60)  # type: ignore[arg-type]
        assert [hospital.peek(kind) for kind in CHILDREN] == [[] for _ in CHILDREN]
        assert [each["metadata"]["finalizers"] for each in hospital.peek(FDJ)] == [[]]

    run(story())


class Forged:
    """An API server that lists a Job and a pod more, which somebody made."""

    def __init__(self, inner: Any, listed: dict[Kind, Object]) -> None:
        self.inner, self.listed = inner, listed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> Any:
        found = await self.inner.list(kind, namespace, labels)
        return [*found, self.listed[kind]] if kind in self.listed and namespace is None else found


def test_a_job_that_somebody_else_carries_out_is_left_alone() -> None:
    async def story() -> None:
        hospital = await in_flight(1)
        (job,) = hospital.peek(FDJ)
        metadata = {**job["metadata"], "finalizers": ["other.example/hold"]}
        hospital.put(FDJ, {**job, "metadata": metadata, "spec": {**job["spec"], "managedBy": "other.example/x"}})
        before = left(hospital)
        async with platform_of(hospital):
            await Drain(hospital, PLACE).run(60)
        assert left(hospital) == before
        assert hospital.peek(FDJ)[0]["metadata"]["finalizers"] == ["other.example/hold"]

    run(story())


def test_jobs_that_outlived_their_job_are_stopped_and_deleted() -> None:
    async def story() -> None:
        hospital = await in_flight(1)
        hospital.remove(FDJ, "research", "job-0")  # somebody took the finalizer away
        await drained(hospital)
        assert hospital.peek(JOB) == [] and hospital.peek(POD) == []

    run(story())


def test_a_mistake_on_the_command_line_or_in_the_surroundings_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main(["--lease-nam=x"]) == 64
    assert main([]) == 78
    assert len(capsys.readouterr().err.splitlines()) == 2


# ---- On a real API server ----------------------------------------------------------------------------------------


@pytest.fixture
def chart_user(world: Any) -> tuple[Path, str]:
    """The kubeconfig of an operator with the chart's rights in the world's namespaces alone, and where its Lease is."""
    plane = world.control_plane
    system = plane.namespace("system")
    owners = ",".join(world.clinics)
    lists = ("scope=namespaces", f"jobNamespaces={{{world.research}}}", f"ownerNamespaces={{{owners}}}")
    sets = [part for each in lists for part in ("--set", each)]
    command = [PROGRAMS / "helm", "template", "feddiff", CHART, "-n", system, *sets]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    items = [each for each in yaml.safe_load_all(text) if each and each["kind"] in ("Role", "RoleBinding", "Lease")]
    plane.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return plane.user(f"system:serviceaccount:{system}:feddiff-operator", ["system:serviceaccounts"]), system


async def drain_process(world: Any, chart_user: tuple[Path, str], seconds: int) -> tuple[int, str]:
    """Exit code and standard error of the drain, with the operator's rights and no others."""
    kubeconfig, system = chart_user
    namespaces = [f"--namespace={each}" for each in (world.research, *world.clinics)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "feddiff_operator.drain", f"--lease-namespace={system}"),
        *(f"--timeout-seconds={seconds}", *namespaces),
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        stderr=subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, error.decode()


def test_on_a_real_api_server_the_drain_stops_a_working_operator_with_no_more_than_its_rights(
    world: Any, chart_user: tuple[Path, str]
) -> None:
    kubeconfig, system = chart_user

    async def story() -> None:
        outcome = {"first": 0, "second": None}
        async with world.kubelet(
            lambda pod, spec: 0 if spec["stage"] == "release" else outcome[spec["job"]["name"]]
        ) as k:
            cluster = k.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics))
            await world.apply(cluster, world.job("first"))
            flags = (f"--lease-namespace={system}", "--lease-seconds=3")
            with world.operator(*flags, kubeconfig=kubeconfig):
                await world.until(cluster, world.phase("Complete"), "first")
                smaller = {**world.job()["spec"]["privacy"], "epsilon": "5"}
                await world.apply(cluster, world.job("second", privacy=smaller))
                await world.until(
                    cluster, lambda job: world.phase("Training")(job) and world.running(job) == 3, "second"
                )
                entries = without_metadata(await world.entries(cluster))
                code, words = await drain_process(world, chart_user, 1)
                assert code == 75 and "the operator, which may work for another" in words
                assert len(words.splitlines()) == 1
                code, words = await drain_process(world, chart_user, 60)
                assert (code, words) == (0, "")
                for namespace in (world.research, *world.clinics):
                    for kind in CHILDREN:
                        assert await cluster.list(kind, namespace, "feddiff.dev/job-uid") == []
                assert without_metadata(await world.entries(cluster)) == entries
            for name in ("first", "second"):
                await cluster.delete(FDJ, world.research, name)
                assert await cluster.get(FDJ, world.research, name) is None  # nobody had to let it go

    asyncio.run(story())
    refused = [
        json.loads(line) for line in world.control_plane.audit_log.read_text().splitlines() if '"code":403' in line
    ]
    user = f"system:serviceaccount:{system}:feddiff-operator"
    assert [each["objectRef"] for each in refused if each["user"]["username"] == user] == []


def test_on_a_real_api_server_a_finalizer_is_taken_only_from_the_version_that_was_seen(world: Any) -> None:
    async def story() -> None:
        async with world.cluster() as cluster:
            await world.apply(cluster, world.job())
            patch = {"metadata": {"finalizers": [FINALIZER]}}
            seen = await cluster.patch(FDJ, world.research, "job", patch)
            await cluster.patch(FDJ, world.research, "job", {"metadata": {"finalizers": [FINALIZER, "a.example/b"]}})
            drain = Drain(cluster, PLACE)
            with pytest.raises(Conflict):
                await drain._do(draining.LetGo(seen))
            await drain._do(draining.LetGo(await cluster.get(FDJ, world.research, "job")))
            assert (await cluster.get(FDJ, world.research, "job"))["metadata"]["finalizers"] == ["a.example/b"]
            await cluster.patch(FDJ, world.research, "job", {"metadata": {"finalizers": []}})

    asyncio.run(story())
