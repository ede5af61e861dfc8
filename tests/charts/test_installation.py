"""The chart on a real API server: install, upgrade, uninstall, install again; and what is left at each point.

No node runs here, so the operator's pods stay Pending: what counts is that a restricted namespace admitted them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.documents import RELEASE, changed
from cluster.kubernetes import CommandFailed, ControlPlane

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/feddiff"
OPERATOR = "system:serviceaccount:feddiff-system:feddiff-operator"
Object = dict[str, Any]

# What the cluster itself makes and unmakes.
_OWN = {
    "events",
    "events.events.k8s.io",
    "endpoints",
    "endpointslices.discovery.k8s.io",
    "componentstatuses",
    "apiservices.apiregistration.k8s.io",  # one per group of kinds, by the API server
}
NAMESPACES = ("feddiff-system", "research", "clinic-a")
INSTALL = ("feddiff", CHART, "--namespace", "feddiff-system", "--set", "jobNamespaces={research}")
OWNERS = ("--set", "ownerNamespaces={clinic-a}")


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster that has never heard of feddiff, with three namespaces that only admit restricted pods."""
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as cluster:
        for name in NAMESPACES:
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            cluster.kubectl("create", "-f", "-", stdin=json.dumps(namespace(name, labels)))
        yield cluster


def namespace(name: str, labels: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def objects(cluster: ControlPlane) -> set[str]:
    """Every object of every kind, as kind.group/namespace/name."""
    kinds = set(cluster.kubectl("api-resources", "--verbs=list", "--output=name").split()) - _OWN
    listed = cluster.kubectl("get", ",".join(sorted(kinds)), "--all-namespaces", "--output=json")
    found = set()
    for each in json.loads(listed)["items"]:
        group = each["apiVersion"].rpartition("/")[0]
        found.add(f"{each['kind']}.{group}/{each['metadata'].get('namespace', '')}/{each['metadata']['name']}")
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.05)


def pods(cluster: ControlPlane) -> list[Object]:
    status, answer = cluster.request("GET", "/api/v1/namespaces/feddiff-system/pods")
    assert status == 200
    found: list[Object] = answer["items"]
    return found


def refusal(cluster: ControlPlane, *argv: str, stdin: str | None = None) -> str:
    """The words in which the API server refuses."""
    with pytest.raises(CommandFailed) as refused:
        cluster.kubectl(*argv, stdin=stdin)
    return str(refused.value)


def may(cluster: ControlPlane, verb: str, group: str, resource: str, place: str) -> bool:
    """Whether the operator may do this in the namespace `place`."""
    attributes = {"verb": verb, "group": group, "resource": resource, "namespace": place}
    review = {"spec": {"user": OPERATOR, "resourceAttributes": attributes}}
    return bool(
        cluster.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)[1]["status"]["allowed"]
    )


def ledger() -> str:
    """One entry of a ledger."""
    return json.dumps(changed(RELEASE, "metadata", {"name": "prl-1", "namespace": "clinic-a"}))


def policies_hold(cluster: ControlPlane) -> bool:
    """Whether the ledger's policy is in force; the API server takes a moment to learn of it."""
    try:
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=ledger())
    except CommandFailed as refused:
        return "created by the operator alone" in str(refused)
    return False


def uninstall(cluster: ControlPlane) -> None:
    """`helm uninstall`, with a process here in place of the drain's pod: no node runs it."""
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(cluster.helm, "uninstall", "feddiff", "--namespace", "feddiff-system")
        wait_until(lambda: done.done() or bool(drains(cluster)))
        (pod,) = drains(cluster)
        assert pod["spec"]["serviceAccountName"] == "feddiff-operator"
        (container,) = pod["spec"]["containers"]
        user = cluster.user(OPERATOR, ["system:serviceaccounts"])
        command = [sys.executable, *container["command"][1:], *container["args"]]
        subprocess.run(command, check=True, env={**os.environ, "KUBECONFIG": str(user)})
        path = f"/api/v1/namespaces/feddiff-system/pods/{pod['metadata']['name']}/status"
        ended = {"status": {"phase": "Succeeded"}}
        assert cluster.request("PATCH", path, ended, "application/merge-patch+json")[0] == 200
        done.result(timeout=60)


def caps(cluster: ControlPlane) -> Object:
    found = json.loads(cluster.kubectl("get", "-n", "feddiff-system", "configmap/feddiff-caps", "-o", "json"))
    data: Object = found["data"]
    return data


def drains(cluster: ControlPlane) -> list[Object]:
    return [each for each in pods(cluster) if each["metadata"]["labels"]["app.kubernetes.io/component"] == "drain"]


def test_what_is_left_after_uninstalling_is_ledger_kinds_and_policies(bare_cluster: ControlPlane) -> None:
    cluster = bare_cluster
    before = objects(cluster)

    installed = cluster.helm("install", *INSTALL, *OWNERS)
    assert "feddiff 0.1.0 is installed in feddiff-system, scope cluster" in installed
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))
    wait_until(lambda: len(pods(cluster)) == 2)  # admitted: the namespace takes restricted pods only
    for each in yaml.safe_load_all(cluster.helm("get", "hooks", "feddiff", "--namespace", "feddiff-system")):
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(each))
    wait_until(lambda: policies_hold(cluster))
    cluster.kubectl("create", "--as", OPERATOR, "--as-group", "system:masters", "-f", "-", stdin=ledger())

    upgraded = ("--set", "operator.replicas=1", "--set-string", "admission.caps.maxEpsilon=5")
    cluster.helm("upgrade", *INSTALL, *upgraded)
    wait_until(lambda: len([each for each in pods(cluster) if "deletionTimestamp" not in each["metadata"]]) == 1)
    assert caps(cluster) == {"maxEpsilon": "5", "imageRegistries": "", "buckets": ""}
    assert "networkpolicies.networking.k8s.io" in refusal(  # clinic-a is listed no more
        cluster, "get", "networkpolicy", "-n", "clinic-a", "feddiff-owner-stages"
    )

    patch = ("patch", "-n", "feddiff-system", "configmap/feddiff-caps", "--type=merge", "-p")
    cluster.kubectl(*patch, '{"data": {"maxEpsilon": "4"}}')
    with pytest.raises(CommandFailed, match=r'conflict with "kubectl-patch" using v1: .data.maxEpsilon'):
        cluster.helm("upgrade", *INSTALL, *upgraded)  # a cap set by hand is not taken away unnoticed
    cluster.helm("upgrade", *INSTALL, *upgraded[:2], "--set-string", "admission.caps.maxEpsilon=4")
    assert caps(cluster)["maxEpsilon"] == "4"
    cluster.helm("upgrade", *INSTALL, *upgraded[:2], "--force-conflicts")
    assert caps(cluster)["maxEpsilon"] == ""  # docs/upgrade.md warns of it

    uninstall(cluster)
    wait_until(lambda: pods(cluster) == [])
    wait_until(lambda: not any(each.startswith("ReplicaSet.") for each in objects(cluster) - before))
    policies = ("ledger", "definitions", "caps", "images", "operator-jobs")
    assert objects(cluster) - before == {
        "PrivacyRelease.feddiff.dev/clinic-a/prl-1",
        "ConfigMap./feddiff-system/feddiff-caps",
        *(
            f"CustomResourceDefinition.apiextensions.k8s.io//{plural}.feddiff.dev"
            for plural in ("federateddiffusionjobs", "privatedatasets", "privacyreleases")
        ),
        *(
            f"{kind}.admissionregistration.k8s.io//feddiff-{name}"
            for name in policies
            for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
        ),
    }
    assert before - objects(cluster) == set()
    assert "deleted only after somebody says why" in refusal(cluster, "delete", "-n", "clinic-a", "prl/prl-1")


def test_a_chart_installed_again_finds_what_it_left(bare_cluster: ControlPlane) -> None:
    bare_cluster.helm("upgrade", "--install", *INSTALL, *OWNERS)
    assert "prl-1" in bare_cluster.kubectl("get", "-n", "clinic-a", "prl", "-o", "name")
    uninstall(bare_cluster)


def test_scope_namespaces_installs_with_no_rule_for_the_whole_cluster(bare_cluster: ControlPlane) -> None:
    cluster = bare_cluster
    cluster.helm("upgrade", "--install", *INSTALL, *OWNERS, "--set", "scope=namespaces")
    whole = cluster.kubectl("get", "clusterrolebinding", "-o", "name").split()
    assert not [each for each in whole if "feddiff" in each]
    ours = ("federateddiffusionjobs", "privatedatasets", "privacyreleases")
    watched = [*(("feddiff.dev", plural) for plural in ours), ("batch", "jobs"), ("", "pods")]
    for place, expected in (("research", True), ("clinic-a", True), ("default", False), ("", False)):
        for group, plural in watched:  # every kind in every namespace that it serves
            assert may(cluster, "watch", group, plural, place) is expected
    uninstall(cluster)
