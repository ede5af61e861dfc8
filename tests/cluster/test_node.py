"""Pods really run on the tests' node, under the restrictions that ours have to live with, and survive its reboot."""

import json
import socket
from typing import Any

import pytest

from cluster.kubernetes import NODE_ADDRESS, PAUSE, CommandFailed, Node

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def pod(name: str, **security: Any) -> dict[str, Any]:
    allowed = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "main", "image": PAUSE, "imagePullPolicy": "Never"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "hostname": "rank-0",
            "subdomain": name,
            "automountServiceAccountToken": False,
            "containers": [container | {"securityContext": allowed | security}],
        },
    }


def headless_service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "selector": {"app": name}, "publishNotReadyAddresses": True},
    }


def resolved(name: str) -> str | None:
    """The IPv4 address that the cluster's own DNS gives for `name`."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"\x12\x34\x01\x00\x00\x01" + bytes(6) + labels + b"\x00\x00\x01\x00\x01", (NODE_ADDRESS, 53))
        answer = client.recv(512)
    return socket.inet_ntoa(answer[-4:]) if answer[7] else None


def test_a_restricted_pod_runs_under_its_own_name_and_again_after_a_reboot(node: Node) -> None:
    namespace = node.namespace()
    node.kubectl("label", "namespace", namespace, *(f"{name}={value}" for name, value in RESTRICTED.items()))
    with pytest.raises(CommandFailed, match='violates PodSecurity "restricted:latest"'):
        node.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod("root", runAsNonRoot=False)))
    for each in (headless_service("lasting"), pod("lasting")):
        node.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(each))
    ready = ("wait", "-n", namespace, "pod/lasting", "--for=condition=Ready", "--timeout=60s")
    node.kubectl(*ready)
    state = ("get", "pod", "lasting", "-n", namespace, "-o")
    address = node.kubectl(*state, "jsonpath={.status.podIP}")
    assert resolved(f"rank-0.lasting.{namespace}.svc.cluster.local") == address

    node.down()
    node.up()

    restarted = "{.status.containerStatuses[0].restartCount}"
    node.kubectl("wait", *ready[1:4], f"--for=jsonpath={restarted}=1", "--timeout=60s")
    node.kubectl(*ready)
    assert node.kubectl(*state, "jsonpath={.metadata.uid}") != ""
