"""What an owner applies: it parses, a real API server takes it, and it holds no key and no privilege."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes import CommandFailed, ControlPlane
from feddiff import main as command
from feddiff.owner import owner_documents
from feddiff_protocol.api import PrivateDataset, parse_document
from feddiff_protocol.errors import UsageInvalid
from feddiff_protocol.telemetry import METRICS_PORT

CHART = Path(__file__).parents[2] / "charts" / "feddiff"
Object = dict[str, Any]


def documents(*arguments: Any, **options: Any) -> dict[str, Object]:
    """By kind; documents that are comments alone are none."""
    loaded = [each for each in yaml.safe_load_all(owner_documents(*arguments, **options)) if each is not None]
    assert len({each["kind"] for each in loaded}) == len(loaded)
    return {each["kind"]: each for each in loaded}


def dataset_of(found: dict[str, Object]) -> PrivateDataset:
    parsed = parse_document(found["PrivateDataset"], "owner")
    assert isinstance(parsed, PrivateDataset)
    return parsed


def test_an_owner_applies_a_namespace_a_binding_a_network_policy_and_a_dataset() -> None:
    found = documents("clinic-a", "feddiff-system", ["research"])
    assert list(found) == ["Namespace", "RoleBinding", "NetworkPolicy", "PrivateDataset"]
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [each for kind, each in found.items() if kind != "Namespace"]
    assert {each["metadata"]["namespace"] for each in others} == {"clinic-a"}
    assert [(rule.namespace, str(rule.max_epsilon)) for rule in dataset_of(found).spec.access] == [("research", "1")]


def test_a_namespace_that_exists_is_left_out() -> None:
    assert "Namespace" not in documents("clinic-a", "feddiff-system", namespace_exists=True)


def test_without_a_researcher_nobody_has_access() -> None:
    assert dataset_of(documents("clinic-a", "feddiff-system")).spec.access == ()


def test_the_dataset_names_volume_and_stores_so_that_its_stages_can_run_on_a_cluster() -> None:
    spec = dataset_of(documents("clinic-a", "feddiff-system", dataset="scans")).spec
    assert spec.source.volume_claim == "scans"
    assert spec.store is not None and spec.federation is not None
    assert spec.store.uri == "s3://clinic-a/feddiff"
    assert (spec.store.secret_name, spec.federation.secret_name) == ("own-store", "federation-store")


def test_no_secret_is_applied_and_no_key_is_written() -> None:
    text = owner_documents("clinic-a", "feddiff-system")
    lines = [line for line in text.splitlines() if "AWS_" in line]
    assert len(lines) == 6
    assert all(line.startswith("# ") and line.endswith("CHANGE") for line in lines)


def test_the_binding_names_role_and_account_of_the_chart() -> None:
    """The names are the chart's own, found in its templates."""
    binding = documents("clinic-a", "ops")["RoleBinding"]
    rbac = (CHART / "templates" / "rbac.yaml").read_text()
    assert f"name: {binding['roleRef']['name']}\n" in rbac
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "feddiff-operator", "namespace": "ops"}
    assert "name: feddiff-operator, namespace" in rbac


def test_owner_stages_reach_dns_and_one_port_and_only_the_operator_reaches_them() -> None:
    policy = documents("clinic-a", "ops")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ((rule,), (peer,)) = policy["ingress"], policy["ingress"][0]["from"]
    assert rule["ports"] == [{"protocol": "TCP", "port": METRICS_PORT}]
    assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "ops"}}
    for label, value in peer["podSelector"]["matchLabels"].items():
        assert f"{label}: {value}" in (CHART / "templates/_names.tpl").read_text()
    assert ports({"spec": policy}) == [[53, 53], [443]]


def ports(policy: Object) -> list[list[int]]:
    return [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["egress"]]


@pytest.mark.parametrize(
    ("endpoints", "opened"),
    [
        (["http://store.clinic-a:8333"], [8333]),
        (["https://minio.example:9000", "https://s3.eu-central-1.amazonaws.com"], [443, 9000]),
        (["http://store.example", "http://store.example:80/"], [80]),
        (["https://[2001:db8::1]:9000"], [9000]),
    ],
)
def test_the_ports_of_the_stores_servers_are_open_and_no_others(endpoints: list[str], opened: list[int]) -> None:
    policy = documents("clinic-a", "ops", endpoints=endpoints)["NetworkPolicy"]
    assert ports(policy) == [[53, 53], opened]


@pytest.mark.parametrize(
    "endpoint",
    ["minio.example:9000", "s3://clinic-a/feddiff", "https://", "https://store:no", "https://store:0", "https://[::1"],
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageInvalid, match="--endpoint: expected http"):
        owner_documents("clinic-a", "ops", endpoints=["https://store.example", endpoint])


def test_a_prometheus_reads_metrics_where_the_owner_names_its_namespace_and_nothing_else_changes() -> None:
    without = documents("clinic-a", "ops")
    named = documents("clinic-a", "ops", metrics_from=["monitoring", "monitoring"])
    peers = named["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert peers.pop() == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert named == without


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("Clinic A", "feddiff-system"), "--namespace"),
        (("clinic-a\n---\nkind: Secret", "feddiff-system"), "--namespace"),
        (("clinic-a", "no/good"), "--operator-namespace"),
        (("clinic-a", "feddiff-system", ["x: y"]), "--research"),
        (("clinic-a", "feddiff-system", [], "two words"), "--dataset"),
    ],
)
def test_a_name_that_is_none_is_refused_with_its_option(arguments: tuple[Any, ...], option: str) -> None:
    with pytest.raises(UsageInvalid, match=f"{option}: expected"):
        owner_documents(*arguments)


def test_the_command_prints_what_kubectl_reads_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["owner", "init", "-n", "clinic-a", "--research", "research", "--research", "lab"]
    assert command._exit_code(lambda: command.app(arguments)) == 0
    said = capsys.readouterr()
    assert said.out == owner_documents("clinic-a", "feddiff-system", ["research", "lab"])
    assert said.err == ""


def test_the_command_takes_servers_and_monitoring(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["owner", "init", "-n", "clinic-a", "--endpoint", "http://store:8333", "--metrics-from", "monitoring"]
    assert command._exit_code(lambda: command.app(arguments)) == 0
    options = {"endpoints": ["http://store:8333"], "metrics_from": ["monitoring"]}
    assert capsys.readouterr().out == owner_documents("clinic-a", "feddiff-system", **options)


def test_a_namespace_of_monitoring_that_is_none_is_refused() -> None:
    with pytest.raises(UsageInvalid, match="--metrics-from: expected"):
        owner_documents("clinic-a", "feddiff-system", metrics_from=["x: y"])


def test_the_command_needs_no_cluster_package() -> None:
    script = (
        "import sys; sys.modules['kubernetes'] = None; sys.argv = ['feddiff', 'owner', 'init', '-n', 'clinic-a']\n"
        "import feddiff.main; feddiff.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_real_api_server_would_take_all_of_it(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace("clinic")
    options = {"endpoints": ["http://store:8333"], "metrics_from": ["monitoring"]}
    text = owner_documents(namespace, "feddiff-system", ["research"], **options)
    said = control_plane.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=text)
    assert len(said.splitlines()) == 4
    assert all("serverside-applied" in line for line in said.splitlines())


def test_a_real_api_server_would_refuse_a_typo_in_it(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace("clinic")
    text = owner_documents(namespace, "feddiff-system").replace("volumeClaim:", "volumeClaims:")
    with pytest.raises(CommandFailed, match="volumeClaims"):
        control_plane.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=text)


def test_restricted_means_what_it_says_on_a_real_api_server(control_plane: ControlPlane) -> None:
    """The Namespace as printed refuses a privileged pod."""
    namespace = control_plane.namespace("clinic")
    text = owner_documents(namespace, "feddiff-system").split("---\n")[1]
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    container = {"name": "c", "image": "i", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    with pytest.raises(CommandFailed, match="restricted"):
        control_plane.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
