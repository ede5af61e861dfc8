"""Who may reach whom, by the NetworkPolicies that the chart makes.

A model of Kubernetes' rules, evaluated for every pair of places and every port in use. That a cluster's network
enforces the policies is **not** tested: the test cluster's bridge has no policy engine.
"""

import copy
import functools
import ipaddress
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes import PROGRAMS
from feddiff.owner import owner_documents
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import METRICS_PORT

CHART = Path(__file__).parents[2] / "charts/feddiff"
Object = dict[str, Any]

SETTINGS = {
    "jobNamespaces": ["research"],
    "ownerNamespaces": ["clinic-a", "clinic-b"],
    "networkPolicy": {
        "metricsFrom": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
            {"podSelector": {"matchLabels": {"app": "scraper"}}},  # of the operator's own namespace
            {"ipBlock": {"cidr": "10.7.7.7/32"}},
        ],
        "apiServer": {"cidrs": ["10.0.0.1/32"], "ports": [6443]},
        "store": {"to": [{"ipBlock": {"cidr": "10.9.0.0/16", "except": ["10.9.9.0/24"]}}], "ports": [8333]},
    },
}


@functools.cache
def _rendered() -> str:
    command = [PROGRAMS / "helm", "template", "feddiff", CHART, "--namespace", "feddiff-system", "--values", "-"]
    done = subprocess.run(command, input=yaml.safe_dump(SETTINGS), capture_output=True, text=True, check=True)
    return done.stdout


def objects_of(kind: str) -> list[Object]:
    return [each for each in yaml.load_all(_rendered(), yaml.CSafeLoader) if each and each["kind"] == kind]


# ---- the model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A pod, or with an empty namespace an address outside of the cluster's pods."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    address: str = "10.244.0.5"


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes `labels`; an empty one takes everything."""
    for expression in selector.get("matchExpressions", []):
        has = expression["key"] in labels
        among = has and labels[expression["key"]] in expression.get("values", [])
        answer = {"In": among, "NotIn": not among, "Exists": has, "DoesNotExist": not has}
        if not answer[expression["operator"]]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: Object, place: Place, own_namespace: str) -> bool:
    """Whether `peer` of a policy in `own_namespace` means `place`."""
    if "ipBlock" in peer:
        address = ipaddress.ip_address(place.address)
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return inside and not any(address in ipaddress.ip_network(each) for each in peer["ipBlock"].get("except", []))
    if not place.namespace:
        return False
    if "namespaceSelector" in peer:
        in_namespace = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": place.namespace})
    else:
        in_namespace = place.namespace == own_namespace
    return in_namespace and selects(peer.get("podSelector", {}), place.labels)


def lets(rule: Object, direction: str, other: Place, namespace: str, port: int, protocol: str) -> bool:
    """Whether one rule allows the traffic; without peers it means everybody, without ports every port."""
    peers, ports = rule.get(direction, []), rule.get("ports", [])
    peer_fits = not peers or any(is_peer(each, other, namespace) for each in peers)
    port_fits = not ports or any((each["port"], each.get("protocol", "TCP")) == (port, protocol) for each in ports)
    return peer_fits and port_fits


def side_allows(policies: list[Object], kind: str, own: Place, other: Place, port: int, protocol: str) -> bool:
    """One side of a connection: what no policy isolates is open, and policies add up."""
    mine = [
        each
        for each in policies
        if each["metadata"]["namespace"] == own.namespace
        and selects(each["spec"]["podSelector"], own.labels)
        and kind in each["spec"]["policyTypes"]
    ]
    direction = "to" if kind == "Egress" else "from"
    rules = [rule for each in mine for rule in each["spec"].get(kind.lower(), [])]
    return not mine or any(lets(rule, direction, other, own.namespace, port, protocol) for rule in rules)


def connects(policies: list[Object], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    """A connection takes leave to go out and leave to come in."""
    out = side_allows(policies, "Egress", source, target, port, protocol)
    return out and side_allows(policies, "Ingress", target, source, port, protocol)


# ---- the places ------------------------------------------------------------------------------------------------


def stage(name: str, namespace: str, stage_name: str) -> Place:
    return Place(name, namespace, {"feddiff.dev/stage": stage_name, "app.kubernetes.io/managed-by": "feddiff"})


def pod_labels(kind: str) -> dict[str, str]:
    """Labels of the chart's own pods, as the chart makes them."""
    (found,) = objects_of(kind)
    metadata = found["metadata"] if kind == "Pod" else found["spec"]["template"]["metadata"]
    labels: dict[str, str] = metadata["labels"]
    return labels


def places() -> list[Place]:
    return [
        Place("operator", "feddiff-system", pod_labels("Deployment")),
        Place("drain", "feddiff-system", pod_labels("Job")),
        Place("helm-test", "feddiff-system", pod_labels("Pod")),
        *(stage(f"{each}-a", "clinic-a", each) for each in ("release", "train-personal", "sample", "evaluate")),
        stage("release-b", "clinic-b", "release"),
        stage("rank-0", "research", "train-shared"),
        stage("rank-1", "research", "train-shared"),
        stage("report", "research", "report"),
        *(Place(f"stranger-{each}", each) for each in ("clinic-a", "research", "feddiff-system", "elsewhere")),
        Place("prometheus", "monitoring"),
        *(Place(f"scraper-{each}", each, {"app": "scraper"}) for each in ("feddiff-system", "clinic-a", "research")),
        Place("outer-prometheus", address="10.7.7.7"),
        Place("dns", "kube-system", {"k8s-app": "kube-dns"}),
        Place("api-server", address="10.0.0.1"),
        Place("store", address="10.9.1.1"),
        Place("not-a-store", address="10.9.9.1"),
        Place("internet", address="93.184.216.34"),
    ]


PORTS = [(53, "UDP"), (53, "TCP"), (443, "TCP"), (6443, "TCP"), (8080, "TCP"), (8333, "TCP")]
PORTS += [(METRICS_PORT, "TCP"), (29500, "TCP")]
STAGES = {"release-a", "train-personal-a", "sample-a", "evaluate-a", "release-b", "rank-0", "rank-1", "report"}
GUARDED = STAGES | {"operator", "drain"}  # pods that some policy isolates


def expected() -> set[tuple[str, str, int]]:
    """Every connection from or to a pod of ours that shall be possible."""
    allowed = {(each, "store", 8333) for each in STAGES}
    allowed |= {(each, "dns", 53) for each in GUARDED}
    allowed |= {(each, "api-server", 6443) for each in ("operator", "drain")}
    scrape = ("prometheus", "scraper-feddiff-system", "outer-prometheus")
    allowed |= {(each, "operator", 8080) for each in ("helm-test", *scrape)}
    allowed |= {(each, stage, METRICS_PORT) for each in ("operator", *scrape) for stage in STAGES}
    ranks = [("rank-0", "rank-1"), ("rank-1", "rank-0")]
    return allowed | {(*pair, port) for pair in ranks for port, _ in PORTS}


def found(policies: list[Object]) -> set[tuple[str, str, int]]:
    def pairs() -> Iterator[tuple[Place, Place]]:
        everywhere = places()
        for source in everywhere:
            yield from ((source, target) for target in everywhere if target is not source)

    return {
        (source.name, target.name, port)
        for source, target in pairs()
        if {source.name, target.name} & GUARDED
        for port, protocol in PORTS
        if connects(policies, source, target, port, protocol)
    }


def test_every_pair_connects_exactly_where_it_should() -> None:
    assert found(objects_of("NetworkPolicy")) == expected()


def owners_own(**options: Any) -> list[Object]:
    """The chart's policies, those of clinic-b by the owner's own hand."""
    text = owner_documents("clinic-b", "feddiff-system", **options)
    (own,) = (each for each in yaml.safe_load_all(text) if each and each["kind"] == "NetworkPolicy")
    others = (each for each in objects_of("NetworkPolicy") if each["metadata"]["namespace"] != "clinic-b")
    return [*others, own]


def with_clinic_b(policies: list[Object]) -> set[tuple[str, str, int]]:
    return {each for each in found(policies) if "release-b" in each[:2]}


def test_an_owners_own_policy_lets_in_whom_it_names_and_opens_its_stores_port_alone() -> None:
    """Its store may be anywhere, until the owner says where."""
    own = with_clinic_b(owners_own(endpoints=["http://10.9.1.1:8333"], metrics_from=["monitoring"]))
    reached_from = {(source, port) for source, target, port in own if target == "release-b"}
    assert reached_from == {("operator", METRICS_PORT), ("prometheus", METRICS_PORT)}
    reaches = {(target, port) for source, target, port in own if source == "release-b"}
    assert ("store", 8333) in reaches and {port for _, port in reaches} == {53, 8333}


def test_an_owner_that_names_no_monitoring_is_scraped_by_nobody() -> None:
    own = with_clinic_b(owners_own())
    assert {source for source, target, _ in own if target == "release-b"} == {"operator"}
    assert ("release-b", "store", 8333) not in own and ("release-b", "store", 443) in own


def _open_ingress(policies: list[Object]) -> None:
    policies[0]["spec"]["ingress"] = [{}]


def _scraped_from_everywhere(policies: list[Object]) -> None:
    for each in policies:
        for rule in each["spec"]["ingress"]:
            if rule.get("ports") == [{"protocol": "TCP", "port": METRICS_PORT}]:
                del rule["from"]


def _open_beside_the_port(policies: list[Object]) -> None:
    for each in policies:
        for rule in each["spec"]["ingress"]:
            rule.pop("ports", None)


def _scraped_from_the_owners_namespace(policies: list[Object]) -> None:
    """A peer as it stands in the values, where it means the operator's namespace."""
    for each in policies:
        for rule in each["spec"]["ingress"]:
            for peer in rule["from"]:
                if peer.get("podSelector") == {"matchLabels": {"app": "scraper"}}:
                    peer.pop("namespaceSelector", None)


def _without_ranks(policies: list[Object]) -> None:
    policies[:] = [each for each in policies if each["metadata"]["name"] != "feddiff-ranks"]


def _without_an_owner(policies: list[Object]) -> None:
    policies[:] = [each for each in policies if each["metadata"]["namespace"] != "clinic-b"]


def _forgetting_a_stage(policies: list[Object]) -> None:
    for each in policies:
        for expression in each["spec"]["podSelector"].get("matchExpressions", []):
            expression["values"] = [value for value in expression["values"] if value != "sample"]


def _without_the_exception(policies: list[Object]) -> None:
    for each in policies:
        for rule in each["spec"]["egress"]:
            for peer in rule["to"]:
                peer.get("ipBlock", {}).pop("except", None)


@pytest.mark.parametrize(
    "spoil",
    [
        _open_ingress,
        _scraped_from_everywhere,
        _open_beside_the_port,
        _scraped_from_the_owners_namespace,
        _without_ranks,
        _without_an_owner,
        _forgetting_a_stage,
        _without_the_exception,
    ],
)
def test_a_spoilt_policy_is_noticed(spoil: Callable[[list[Object]], None]) -> None:
    policies = copy.deepcopy(objects_of("NetworkPolicy"))
    spoil(policies)
    assert found(policies) != expected()


def test_every_stage_is_selected_by_a_policy() -> None:
    selected = {
        value
        for each in objects_of("NetworkPolicy")
        for expression in each["spec"]["podSelector"].get("matchExpressions", [])
        for value in expression["values"]
    }
    assert selected == {each.value for each in Stage}
