"""The operator's rights, against what it does: the API server's audit log of whole jobs is replayed against the chart's
Roles. A right that is missing shows as a refusal, a right that is never used is one too many."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes import PROGRAMS
from feddiff_operator.cluster import EVENT, FDJ, Cluster

Object = dict[str, Any]
Right = tuple[str, str, str]  # API group, resource with its subresource, verb
CHART = Path(__file__).parents[2] / "charts/feddiff"
OPERATOR = "system:serviceaccount:{}:feddiff-operator"


def roles(system: str, research: str, clinics: tuple[str, ...]) -> list[Object]:
    """What `helm install` gives the operator in scope `namespaces`."""
    lists = [f"jobNamespaces={{{research}}}", f"ownerNamespaces={{{','.join(clinics)}}}"]
    sets = [part for each in ("scope=namespaces", *lists) for part in ("--set", each)]
    command = [PROGRAMS / "helm", "template", "feddiff", CHART, "-n", system, *sets]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wanted = ("Role", "RoleBinding", "Lease")
    return [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] in wanted]


def granted(objects: list[Object], name: str, namespace: str) -> set[Right]:
    (role,) = [
        each
        for each in objects
        if (each["kind"], each["metadata"]["name"], each["metadata"]["namespace"]) == ("Role", name, namespace)
    ]
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(log: Path, user: str, namespace: str) -> tuple[set[Right], list[str]]:
    """What the user did in the namespace, and what it was refused."""
    rights, refused = set[Right](), []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        about = event.get("objectRef") or {}
        if event["user"]["username"] != user or about.get("namespace") != namespace:
            continue
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        right = (about.get("apiGroup", ""), resource, event["verb"])
        rights.add(right)
        if event["responseStatus"]["code"] == 403:
            refused.append(f"{right}: {event['responseStatus'].get('message', '')}")
    return rights, refused


async def counted_twice(cluster: Cluster, namespace: str) -> None:
    """Some event there has happened again, and is counted: the second write of one is a patch, after a rest."""
    async with asyncio.timeout(60):
        while all(each.get("count", 1) < 2 for each in await cluster.list(EVENT, namespace)):
            await asyncio.sleep(0.2)


@pytest.fixture
def log_of_whole_jobs(world: Any) -> tuple[list[Object], str, str]:
    """The operator, with the chart's rights alone, has carried a job out, suspended and resumed it, and lost it to its
    time limit; another one was deleted while it trained."""
    plane = world.control_plane
    system = plane.namespace("system")
    objects = roles(system, world.research, world.clinics)
    plane.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    user = OPERATOR.format(system)

    async def story() -> None:
        def outcome(pod: Object, spec: Object) -> int | None:
            return None if (spec["job"]["name"], spec["stage"]) == ("second", "train-shared") else 0

        async with world.kubelet(outcome) as kubelet:
            cluster = kubelet.cluster
            await world.apply(cluster, *(world.dataset(clinic) for clinic in world.clinics))
            flags = (f"--lease-namespace={system}", "--lease-seconds=15")
            with world.operator(*flags, kubeconfig=plane.user(user, ["system:serviceaccounts"])):
                await world.apply(cluster, world.job("first", ttlSecondsAfterFinished=5))
                await world.until(cluster, world.phase("Training"), "first")
                await cluster.patch(FDJ, world.research, "first", {"spec": {"suspend": True}})
                await world.until(cluster, world.phase("Suspended"), "first")
                await cluster.patch(FDJ, world.research, "first", {"spec": {"suspend": False}})
                await world.until(cluster, world.phase("Complete"), "first")
                smaller = {**world.job()["spec"]["privacy"], "epsilon": "5"}
                await world.apply(cluster, world.job("second", privacy=smaller))
                await world.until(cluster, world.phase("Training"), "second")
                await cluster.delete(FDJ, world.research, "second")
                await world.gone(cluster, "second")
                await world.gone(cluster, "first")
                for namespace in (world.research, *world.clinics):
                    await counted_twice(cluster, namespace)

    asyncio.run(story())
    return objects, system, user


def test_the_operator_has_the_rights_that_it_uses_and_no_others(
    world: Any, log_of_whole_jobs: tuple[list[Object], str, str]
) -> None:
    objects, system, user = log_of_whole_jobs
    log = world.control_plane.audit_log
    did, refused = used(log, user, world.research)
    assert refused == []
    assert did == granted(objects, "feddiff-job-namespace", world.research)
    for clinic in world.clinics:
        did, refused = used(log, user, clinic)
        assert refused == []
        assert did == granted(objects, "feddiff-owner-namespace", clinic)
    did, refused = used(log, user, system)
    assert (did, refused) == (granted(objects, "feddiff-operator-lease", system), [])


def test_the_same_replay_finds_a_right_that_is_missing_or_too_many(
    world: Any, log_of_whole_jobs: tuple[list[Object], str, str]
) -> None:
    objects, _, user = log_of_whole_jobs
    did, _ = used(world.control_plane.audit_log, user, world.research)
    rights = granted(objects, "feddiff-job-namespace", world.research)
    assert did != rights | {("", "secrets", "get")}
    assert all(did != rights - {right} for right in rights)
