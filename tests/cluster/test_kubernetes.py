"""The tests' own Kubernetes keeps what it promises to the tests that rest on it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kubernetes import CommandFailed, ControlPlane, Processes, ProgramsMissing

LIBRARY = Path(__file__).with_name("kubernetes.py")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane that a test may break, beside the shared one."""
    with ControlPlane(tmp_path / "own") as cluster:
        yield cluster


def test_everything_killed_and_started_again_is_the_same_cluster(own: ControlPlane) -> None:
    own.kubectl("create", "configmap", "kept", "--from-literal=a=1")
    user = own.user("olga", ["owners"]).read_text()
    own.down()
    again = ControlPlane(own.directory)
    with again:
        assert again.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}") == "1"
        assert again.user("olga", ["owners"]).read_text() == user
        with pytest.raises(CommandFailed, match='User "olga" cannot list resource "pods"'):
            again.kubectl("get", "pods", user=again.user("olga", ["owners"]))


def test_a_restarted_component_serves_what_was_stored(own: ControlPlane) -> None:
    own.kubectl("create", "configmap", "kept")
    for component in own.components():
        own.restart(component)
        assert own.kubectl("get", "configmap", "kept", "-o", "name") == "configmap/kept\n"


def test_clusters_side_by_side_do_not_meet(control_plane: ControlPlane, own: ControlPlane) -> None:
    own.kubectl("create", "namespace", "only-here")
    assert control_plane.address != own.address
    assert "only-here" not in control_plane.kubectl("get", "namespaces", "-o", "name")


def test_a_killed_test_run_leaves_no_process_behind(tmp_path: Path) -> None:
    script = f"""
import sys, pathlib, time
sys.path.insert(0, {str(LIBRARY.parents[1])!r})
from cluster.kubernetes import ControlPlane
ControlPlane(pathlib.Path({str(tmp_path)!r})).up()
print("up", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as run:
        assert run.stdout is not None and run.stdout.readline() == b"up\n"
        processes = Processes(tmp_path)
        assert processes.running() == ["etcd", "kube-apiserver", "kube-controller-manager"]
        os.killpg(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while processes.running():
        assert time.monotonic() < deadline, processes.running()
        time.sleep(0.05)


def test_what_the_command_line_starts_stays_until_it_is_told_to_stop(tmp_path: Path) -> None:
    try:
        up = subprocess.run([sys.executable, LIBRARY, "up", tmp_path], capture_output=True, text=True, check=True)
        cluster = ControlPlane(tmp_path)
        assert up.stdout == f"export KUBECONFIG={cluster.kubeconfig}\n"
        assert cluster.request("GET", "/readyz") == (200, "ok")
    finally:
        subprocess.run([sys.executable, LIBRARY, "down", tmp_path], check=True)
    assert cluster.processes.running() == []


def test_missing_programs_are_named_with_what_builds_them(tmp_path: Path) -> None:
    with pytest.raises(ProgramsMissing, match=r"run tests/cluster/build\.sh: .*/kube is missing"):
        ControlPlane(tmp_path / "cluster", tmp_path).up()


def test_a_user_gets_what_roles_give_and_the_audit_log_names_them(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()
    control_plane.kubectl("create", "rolebinding", "readers", "-n", namespace, "--clusterrole=view", "--group=readers")
    rita = control_plane.user("rita", ["readers"])
    assert "kube-root-ca.crt" in control_plane.kubectl("get", "configmaps", "-n", namespace, "-o", "name", user=rita)
    with pytest.raises(CommandFailed, match='User "rita" cannot create resource "configmaps"'):
        control_plane.kubectl("create", "configmap", "new", "-n", namespace, user=rita)
    events = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
    seen = {
        (event["verb"], event["responseStatus"]["code"])
        for event in events
        if event["user"]["username"] == "rita" and event.get("objectRef", {}).get("resource") == "configmaps"
    }
    assert seen == {("list", 200), ("create", 403)}
