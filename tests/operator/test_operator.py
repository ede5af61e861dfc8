"""Whole jobs on a real API server: the operator's own process, the real Job controller, pods that say what we let
them say."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from feddiff_operator.batch import condition_of, is_finished
from feddiff_operator.cluster import CONFIG_MAP, EVENT, FDJ, JOB, PDS, POD, SERVICE
from feddiff_operator.endings import stopping
from feddiff_protocol.labels import STOPPED

Object = dict[str, Any]
STAGES = {"release", "train-shared", "train-personal", "sample", "evaluate", "report"}
CONDITIONS = {
    *("Accepted", "BudgetReserved", "Released", "SharedTrained", "PersonalTrained", "Evaluated"),
    *("Suspended", "Complete", "Failed"),
}


def test_a_job_of_two_owners_completes(world: Any) -> None:
    async def story() -> None:
        async with world.kubelet() as kubelet:
            cluster = kubelet.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics), world.job())
            with world.operator():
                job = await world.until(cluster, world.phase("Complete"))
            events = await cluster.list(EVENT, world.research)
            assert {each["type"] for each in job["status"]["conditions"]} == CONDITIONS
            true = {each["type"] for each in job["status"]["conditions"] if each["status"] == "True"}
            assert true == CONDITIONS - {"Suspended", "Failed"}
            assert job["status"]["clientsSummary"] == "2/2"
            assert job["status"]["trainer"] == "2/2"
            assert job["status"]["progress"] == "100 %"
            assert job["status"]["counted"] == ["a", "b"]
            entries = await world.entries(cluster)
            assert [entry["status"]["phase"] for entry in entries] == ["Charged", "Charged"]
            assert all(len(entry["status"]["manifestSha256"]) == 64 for entry in entries)
            for clinic in world.clinics:
                dataset = await cluster.get(PDS, clinic, "scans")
                assert float(dataset["status"]["budget"]["spent"]) == 10
                children = await cluster.list(JOB, clinic)
                assert {child["metadata"]["labels"]["feddiff.dev/stage"] for child in children} == STAGES - {
                    "train-shared",
                    "report",
                }
            assert {event["reason"] for event in events} >= {"Releasing", "Training", "Complete"}
            shared = kubelet.specs["train-shared/"][0]
            assert [each["client"] for each in shared["releases"]] == ["a", "b"]
            manifests = {entry["spec"]["client"]: entry["status"]["manifestSha256"] for entry in entries}
            assert {each["client"]: each["manifestSha256"] for each in shared["releases"]} == manifests

    asyncio.run(story())


def test_a_job_over_budget_fails_before_any_pod_exists(world: Any) -> None:
    async def story() -> None:
        async with world.kubelet() as kubelet:
            cluster = kubelet.cluster
            first, second = world.clinics
            await world.apply(
                cluster, world.dataset(first), world.dataset(second, budget={"epsilon": "5", "delta": "1e-5"})
            )
            await world.apply(cluster, world.job())
            with world.operator():
                job = await world.until(cluster, world.phase("Failed"))
                failed = next(each for each in job["status"]["conditions"] if each["type"] == "Failed")
                assert failed["reason"] == "PrivacyBudgetExceeded"
                assert "client b" in failed["message"] and "of 5" in failed["message"]
                for namespace in (world.research, *world.clinics):
                    assert await cluster.list(JOB, namespace) == []
                phases = [entry["status"]["phase"] for entry in await world.entries(cluster)]
                assert set(phases) <= {"Returned"}
            dataset = await cluster.get(PDS, first, "scans")
            assert float(dataset["status"]["budget"]["remaining"]) > 19.99

    asyncio.run(story())


def test_a_deleted_job_leaves_its_entries_and_nothing_else(world: Any) -> None:
    async def story() -> None:
        async with world.kubelet(lambda pod, spec: 0 if spec["stage"] == "release" else None) as kubelet:
            cluster = kubelet.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics), world.job())
            with world.operator():
                await world.until(cluster, world.phase("Training"))
                await cluster.delete(FDJ, world.research, "job")
                await world.gone(cluster)
            for kind in (JOB, CONFIG_MAP, SERVICE):
                for namespace in (world.research, *world.clinics):
                    left = await cluster.list(kind, namespace, "feddiff.dev/job-uid")
                    assert left == []
            assert [entry["status"]["phase"] for entry in await world.entries(cluster)] == ["Charged", "Charged"]

    asyncio.run(story())


def test_a_suspended_job_goes_on_with_new_attempts_and_the_same_releases(world: Any) -> None:
    async def story() -> None:
        async with world.kubelet(
            lambda pod, spec: 0 if spec["stage"] == "release" or spec["attempt"] > 1 else None
        ) as kubelet:
            cluster = kubelet.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics), world.job())
            with world.operator():
                await world.until(cluster, lambda job: world.phase("Training")(job) and world.running(job) == 3)
                await cluster.patch(FDJ, world.research, "job", {"spec": {"suspend": True}})
                await world.until(cluster, lambda job: world.phase("Suspended")(job) and not world.running(job))
                await cluster.patch(FDJ, world.research, "job", {"spec": {"suspend": False}})
                await world.until(
                    cluster,
                    lambda job: (
                        len(kubelet.specs["train-shared/"]) == 2
                        and any(
                            each["succeeded"] for each in job["status"]["stages"] if each["stage"] == "train-shared"
                        )
                    ),
                )
            assert [spec["attempt"] for spec in kubelet.specs["train-shared/"]] == [2, 2]
            assert len(kubelet.specs["release/a"]) == len(kubelet.specs["release/b"]) == 1

    asyncio.run(story())


def sleeper(namespace: str) -> Object:
    """A batch Job whose pod, told nothing, runs until it is stopped."""
    labels = {"feddiff.dev/job-uid": "a-test"}
    told = [{"name": "spec", "configMap": {"name": "none"}}]
    pod = {"restartPolicy": "Never", "volumes": told, "containers": [{"name": "stage", "image": "trainer:test"}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "sleeper", "namespace": namespace, "labels": labels},
        "spec": {"backoffLimit": 0, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


@pytest.mark.parametrize("holds", [True, False], ids=["stopped", "only suspended"])
def test_a_stopped_batch_job_that_its_queue_starts_again_ends_without_another_pod(world: Any, holds: bool) -> None:
    """What Kueue does with a suspended Job whose Workload is admitted, and what the real Job controller makes of it."""

    async def story() -> None:
        async with world.kubelet() as kubelet:
            cluster, place = kubelet.cluster, (world.research, "sleeper")

            async def until(good: Callable[[Object, list[Object]], bool]) -> tuple[Object, list[Object]]:
                async with asyncio.timeout(60):
                    while True:
                        job = await cluster.get(JOB, *place)
                        pods = await cluster.list(POD, world.research, "feddiff.dev/job-uid")
                        if good(job, pods):
                            return job, pods
                        await asyncio.sleep(0.1)

            await cluster.create(JOB, sleeper(world.research))
            _, (first,) = await until(lambda job, pods: [each["status"]["phase"] for each in pods] == ["Running"])
            change = stopping({STOPPED: "Suspended"})
            await cluster.patch(JOB, *place, change if holds else {**change, "spec": {"suspend": True}})
            await until(lambda job, pods: condition_of(job, "Suspended") is not None and not pods)
            await cluster.patch(JOB, *place, {"spec": {"suspend": False}})
            job, pods = await until(lambda job, pods: is_finished(job) or bool(pods))
            if holds:
                assert (condition_of(job, "Failed") or {})["reason"] == "DeadlineExceeded" and pods == []
            else:
                assert [each["metadata"]["uid"] for each in pods] != [first["metadata"]["uid"]]
            await cluster.delete(JOB, *place)

    asyncio.run(story())


def test_a_failing_stage_is_tried_again_until_the_limit(world: Any) -> None:
    def outcome(pod: Object, spec: Object) -> int | None:
        return 74 if spec["stage"] == "release" and spec["client"] == "b" else 0

    async def story() -> None:
        async with world.kubelet(outcome) as kubelet:
            cluster = kubelet.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics), world.job(backoffLimit=1))
            with world.operator():
                job = await world.until(cluster, world.phase("Failed"))
            failed = next(each for each in job["status"]["conditions"] if each["type"] == "Failed")
            assert failed["reason"] == "StageFailed" or failed["reason"] == "ClientsLost"
            assert "74" in failed["message"]
            assert [spec["attempt"] for spec in kubelet.specs["release/b"]] == [1, 2]
            assert {spec["release"] for spec in kubelet.specs["release/b"]} == {
                entry["metadata"]["name"] for entry in await world.entries(cluster) if entry["spec"]["client"] == "b"
            }

    asyncio.run(story())
