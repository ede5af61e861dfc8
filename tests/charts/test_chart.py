"""What the chart renders: under every toggle, with every right counted, and with typos refused.

Needs helm, which tests/cluster/build.sh brings, and no cluster.
"""

import copy
import functools
import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_objects import job, manifests
from cluster.kubernetes import PROGRAMS
from feddiff_operator.drain import parse_arguments
from feddiff_operator.metrics import Metrics
from feddiff_operator.settings import Settings, parse_settings
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import told_by

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/feddiff"
HELM = PROGRAMS / "helm"
OURS = {"federateddiffusionjobs", "privatedatasets", "privacyreleases"}
Object = dict[str, Any]

NAMESPACES = ["scope=namespaces", "jobNamespaces={research}", "ownerNamespaces={clinic-a,clinic-b}"]
CLUSTER = ["jobNamespaces={research}", "ownerNamespaces={clinic-a,clinic-b}"]

specification = importlib.util.spec_from_file_location("generate", ROOT / "charts/generate.py")
assert specification and specification.loader
generate = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generate)


def helm(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *argv], capture_output=True, text=True)


def render(*settings: str) -> list[Object]:
    """Every object that the chart makes with these `--set`s."""
    return documents(rendered(*settings))


@functools.cache
def rendered(*settings: str) -> str:
    sets = [part for setting in settings for part in ("--set", setting)]
    done = helm("template", "feddiff", CHART, "--namespace", "feddiff-system", *sets)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[Object]:
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def identity(each: Object) -> str:
    return f"{each['kind']}/{each['metadata'].get('namespace', '')}/{each['metadata']['name']}"


# ---- rendering -------------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_warn_of() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 chart(s) failed" in done.stderr + done.stdout
    assert "[WARNING]" not in done.stderr + done.stdout


TOGGLES = {
    "crds.enabled": {"CustomResourceDefinition"},
    "drain.enabled": {"Job", "NetworkPolicy"},
    "podDisruptionBudget.enabled": {"PodDisruptionBudget"},
    "roles.enabled": {"ClusterRole"},
    "admission.enabled": {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ConfigMap"},
    "networkPolicy.enabled": {"NetworkPolicy"},
    "monitoring.podMonitor": {"PodMonitor"},
    "monitoring.serviceMonitor": {"ServiceMonitor"},
    "monitoring.prometheusRule": {"PrometheusRule"},
    "monitoring.dashboards.enabled": {"ConfigMap"},
}


@pytest.mark.parametrize("scope", [CLUSTER, NAMESPACES], ids=["cluster", "namespaces"])
@pytest.mark.parametrize("toggle", TOGGLES)
def test_a_toggle_takes_away_its_own_kinds_and_nothing_else(toggle: str, scope: list[str]) -> None:
    with_it, without = ({identity(each) for each in render(*scope, f"{toggle}={on}")} for on in ("true", "false"))
    assert without < with_it
    assert {gone.split("/")[0] for gone in with_it - without} == TOGGLES[toggle]


def test_every_boolean_value_is_a_toggle_that_was_tried() -> None:
    def booleans(values: Object, prefix: str = "") -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, bool):
                yield prefix + key
            elif isinstance(value, dict):
                yield from booleans(value, f"{prefix}{key}.")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(booleans(values)) == TOGGLES.keys()


def test_nothing_of_the_prometheus_operator_or_grafana_is_made_unasked() -> None:
    kinds = {each["apiVersion"] for each in render(*CLUSTER)}
    assert "monitoring.coreos.com/v1" not in kinds and "grafana_dashboard" not in rendered(*CLUSTER)


@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_a_monitor_reads_the_port_that_the_operator_serves(kind: str) -> None:
    objects = render(f"monitoring.{kind[0].lower()}{kind[1:]}=true", "monitoring.labels.release=prometheus")
    monitor = named(objects, kind, "feddiff-operator")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True  # or every job would be in the operator's namespace
    deployment = named(objects, "Deployment", "feddiff-operator")["spec"]["template"]
    service = named(objects, "Service", "feddiff-operator")
    carries = service["metadata"]["labels"] if kind == "ServiceMonitor" else deployment["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= carries.items()
    assert endpoint["port"] in {port["name"] for port in deployment["spec"]["containers"][0]["ports"]}
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("scope", [CLUSTER, NAMESPACES], ids=["cluster", "namespaces"])
def test_a_monitor_reads_the_port_that_stages_serve_wherever_they_run(scope: list[str]) -> None:
    objects = render(*scope, "monitoring.podMonitor=true", "monitoring.labels.release=prometheus")
    monitor = named(objects, "PodMonitor", "feddiff-stages")
    where = {"matchNames": ["clinic-a", "clinic-b", "research"]} if scope == NAMESPACES else {"any": True}
    assert monitor["metadata"]["labels"]["release"] == "prometheus" and monitor["spec"]["namespaceSelector"] == where
    pod = manifests(job(), Stage.RELEASE, "a")[-1]["spec"]["template"]
    (wanted,), (endpoint,) = monitor["spec"]["selector"]["matchExpressions"], monitor["spec"]["podMetricsEndpoints"]
    assert wanted["operator"] == "Exists" and wanted["key"] in pod["metadata"]["labels"]
    assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert not of_kind(render(*scope, "monitoring.serviceMonitor=true"), "PodMonitor")


def test_what_an_owners_pod_says_is_kept_only_if_a_stage_may_tell_it() -> None:
    monitor = named(render("monitoring.podMonitor=true"), "PodMonitor", "feddiff-stages")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (kept,) = endpoint["metricRelabelings"]
    assert "honorLabels" not in endpoint  # it cannot speak for another namespace
    assert (kept["action"], kept["sourceLabels"]) == ("keep", ["__name__"])
    told = {metric.name for metric in told_by(Stage.TRAIN_SHARED)}
    metrics = Metrics()
    own = {family.name for family in metrics.registry.collect()} | {"feddiff_privacy_epsilon_spent", "ALERTS"}
    assert all(re.fullmatch(kept["regex"], name) for name in told)
    others = own | {"feddiff_trainer_of_my_own"}
    assert not [name for name in others if re.fullmatch(kept["regex"], name)]
    assert len(told) <= monitor["spec"]["sampleLimit"] <= 2 * len(told)


def alerts(*settings: str) -> dict[str, Object]:
    rule = named(render("monitoring.prometheusRule=true", *settings), "PrometheusRule", "feddiff")
    return {each["alert"]: each for group in rule["spec"]["groups"] for each in group["rules"]}


def test_the_rule_has_the_alerts_as_they_are_tested_and_a_page_for_each() -> None:
    tested = yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]
    expected = {each["alert"]: each for group in tested for each in group["rules"]}
    made = alerts()
    pages = {alert: each["annotations"].pop("runbook_url") for alert, each in copy.deepcopy(made).items()}
    for each in made.values():
        assert (ROOT / each["annotations"]["runbook_url"]).is_file()
        without = {key: text for key, text in each["annotations"].items() if key != "runbook_url"}
        assert {**each, "annotations": without} == expected[each["alert"]]
    assert pages == {alert: f"docs/runbooks/{alert}.md" for alert in expected}
    made = alerts("monitoring.runbookUrl=https://wiki.example/feddiff")
    assert made["FeddiffNoLeader"]["annotations"]["runbook_url"] == "https://wiki.example/feddiff/FeddiffNoLeader.md"


def test_severities_are_the_installations_own_and_none_leaves_an_alert_out() -> None:
    changed = ("FeddiffNoLeader=warning", "FeddiffRefusals=none")
    made = alerts(*(f"monitoring.severities.{each}" for each in changed), "monitoring.labels.release=prometheus")
    assert made["FeddiffNoLeader"]["labels"] == {"severity": "warning"}
    assert alerts().keys() - made.keys() == {"FeddiffRefusals"}
    rule = named(render("monitoring.prometheusRule=true", "monitoring.labels.release=x"), "PrometheusRule", "feddiff")
    assert rule["metadata"]["labels"]["release"] == "x"


def test_commands_in_alerts_name_the_namespace_of_the_installation() -> None:
    done = helm("template", "feddiff", CHART, "--namespace", "elsewhere", "--set", "monitoring.prometheusRule=true")
    assert "--namespace elsewhere" in done.stdout and "feddiff-system" not in done.stdout


def test_dashboards_are_found_by_grafanas_sidecar() -> None:
    on = "monitoring.dashboards.enabled=true"
    made = [each for each in of_kind(render(on), "ConfigMap") if "dashboard" in each["metadata"]["name"]]
    shipped = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
    assert {key: json.loads(text) for each in made for key, text in each["data"].items()} == {
        f"feddiff-{name}": content for name, content in shipped.items()
    }
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in made)
    assert all("annotations" not in each["metadata"] for each in made)
    own = ["labels.team=a", "folder=feddiff", "annotations.example=b"]
    each = named(render(on, *(f"monitoring.dashboards.{x}" for x in own)), "ConfigMap", "feddiff-dashboard-fleet")
    assert each["metadata"]["annotations"] == {"grafana_folder": "feddiff", "example": "b"}
    assert each["metadata"]["labels"]["team"] == "a" and each["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_no_object_is_made_twice() -> None:
    for scope in (CLUSTER, NAMESPACES):
        names = [identity(each) for each in render(*scope, *(f"{toggle}=true" for toggle in TOGGLES))]
        assert len(names) == len(set(names))


def test_a_namespace_of_both_kinds_gets_both_roles_and_the_operator_serves_it_once() -> None:
    objects = render("scope=namespaces", "jobNamespaces={lab}", "ownerNamespaces={lab}")
    roles = {each["metadata"]["name"] for each in of_kind(objects, "Role") if each["metadata"]["namespace"] == "lab"}
    assert roles == {"feddiff-job-namespace", "feddiff-owner-namespace"}
    assert settings_of(objects).namespaces == ("lab",)


# ---- kinds -----------------------------------------------------------------------------------------------------


def test_the_chart_installs_the_generated_kinds_and_keeps_them() -> None:
    installed = {each["metadata"]["name"]: each for each in of_kind(render(), "CustomResourceDefinition")}
    generated = [yaml.safe_load(path.read_text()) for path in (ROOT / "crds").glob("*.yaml")]
    assert installed.keys() == {each["metadata"]["name"] for each in generated} and len(generated) == 3
    for each in generated:
        ours = installed[each["metadata"]["name"]]
        assert ours["spec"] == each["spec"]
        assert ours["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_packaged_chart_carries_the_kinds(tmp_path: Path) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    done = helm("template", "feddiff", package, "--namespace", "feddiff-system")
    assert documents(done.stdout) == render()


def test_what_helm_keeps_is_the_kinds_the_policies_and_their_parameters() -> None:
    kept = {
        identity(each).replace("//", " ")
        for each in render(*CLUSTER)
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    policies = {"feddiff-ledger", "feddiff-definitions", "feddiff-caps", "feddiff-images", "feddiff-operator-jobs"}
    assert kept == {
        *(f"CustomResourceDefinition {plural}.feddiff.dev" for plural in OURS),
        *(f"ValidatingAdmissionPolicy {name}" for name in policies),
        *(f"ValidatingAdmissionPolicyBinding {name}" for name in policies),
        "ConfigMap/feddiff-system/feddiff-caps",
    }


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("operator.replica=3", "replica"),
        ("operators.replicas=3", "operators"),
        ("operator.replicas=two", "/operator/replicas"),
        ("operator.livenessSeconds=10", "/operator/livenessSeconds"),
        ("operator.resources.limit.memory=1Gi", "limit"),
        ("operator.resources.limits.memory=1gb", "/operator/resources/limits/memory"),
        ("crd.enabled=false", "crd"),
        ("crds.enable=false", "enable"),
        ("scope=Cluster", "/scope"),
        ("jobNamespaces=research", "/jobNamespaces"),
        ("jobNamespaces={Research}", "/jobNamespaces/0"),
        ("image.tag=a b", "/image/tag"),
        ("image.digest=sha256:abc", "/image/digest"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("admission.caps.maxEpsilon=ten", "/admission/caps/maxEpsilon"),
        ("admission.caps.epsilon=10", "epsilon"),
        ("admission.caps.buckets={clinic-a}", "/admission/caps/buckets/0"),
        ("admission.caps.buckets={s3://clinic-a/}", "/admission/caps/buckets/0"),
        ("admission.caps.imageRegistries={https://registry.example}", "/admission/caps/imageRegistries/0"),
        ("networkPolicy.store.ports={http}", "/networkPolicy/store/ports/0"),
        ("networkPolicy.store.to[0].ipblock.cidr=10.0.0.0/8", "ipblock"),
        ("networkPolicy.store.ports=null", "ports"),  # a list whose entries are all commented out would open everything
        ("networkPolicy.store.to=null", "to"),
        ("networkPolicy.apiServer.cidrs=null", "cidrs"),
        ("networkPolicy.dns=null", "dns"),
        ("monitoring.podmonitor=true", "podmonitor"),
        ("monitoring.interval=soon", "/monitoring/interval"),
        ("monitoring.severities.FeddiffNoLeader=panic", "/monitoring/severities/FeddiffNoLeader"),
        ("monitoring.runbookUrl=https://wiki.example/", "/monitoring/runbookUrl"),
        ("monitoring.dashboards.enable=true", "enable"),
    ],
)
def test_the_schema_refuses_a_typo_and_names_it(setting: str, word: str) -> None:
    done = helm("template", "feddiff", CHART, "--set", setting)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr
    assert word in done.stderr


def test_the_schema_knows_every_value_and_closes_every_object() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert list(open_objects(schema)) == [
        ".operator.affinity.nodeAffinity",  # Kubernetes checks these three itself
        ".operator.affinity.podAffinity",
        ".operator.affinity.podAntiAffinity",
    ]
    assert unknown_values(schema, values) == []
    assert unknown_values(schema, {**values, "scopes": "cluster"}) == ["scopes"]
    del schema["properties"]["operator"]["additionalProperties"]
    assert ".operator" in list(open_objects(schema))


def open_objects(schema: Object, path: str = "") -> Iterator[str]:
    """Paths of objects that take keys which nobody named or typed."""
    if schema.get("type") == "object" and "additionalProperties" not in schema and "maxProperties" not in schema:
        yield path
    for key, below in {**schema.get("properties", {}), **schema.get("definitions", {})}.items():
        yield from open_objects(below, f"{path}.{key}")
    if isinstance(schema.get("items"), dict):
        yield from open_objects(schema["items"], f"{path}[]")


def unknown_values(schema: Object, values: Object, path: str = "") -> list[str]:
    properties = schema.get("properties", {})
    missing = [path + key for key in values.keys() ^ (properties.keys() - {"global"})]
    for key in values.keys() & properties.keys():
        if isinstance(values[key], dict) and "properties" in properties[key] and values[key]:
            missing += unknown_values(properties[key], values[key], f"{path}{key}.")
    return missing


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["scope=namespaces"], "scope: namespaces needs jobNamespaces"),
        (["monitoring.severities.FeddiffLeader=none"], "expected names of alerts (FeddiffLedgerMismatch"),
        (["operator.apiBurst=5"], "operator.apiBurst: expected at least operator.apiQps, 50, found 5"),
    ],
)
def test_values_that_contradict_each_other_are_refused_in_words(settings: list[str], words: str) -> None:
    done = helm("template", "feddiff", CHART, *(part for each in settings for part in ("--set", each)))
    assert done.returncode != 0 and words in done.stderr


# ---- the operator's pod ----------------------------------------------------------------------------------------


def pods_of(objects: list[Object]) -> dict[str, Object]:
    found = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Pod")}
    made = of_kind(objects, "Deployment", "Job")
    return found | {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in made}


def settings_of(objects: list[Object]) -> Settings:
    return parse_settings(pods_of(objects)["feddiff-operator"]["containers"][0]["args"])


def test_the_operator_understands_the_command_line_that_it_gets() -> None:
    settings = settings_of(render())
    assert settings == Settings(trainer_image="localhost/feddiff-trainer:0.1.0")
    assert settings_of(render(*NAMESPACES)).namespaces == ("clinic-a", "clinic-b", "research")
    changed = ["leaseSeconds=3", "workers=4", "apiQps=20", "apiBurst=70", "resyncSeconds=5", "livenessSeconds=150"]
    changed.append("progressSeconds=0")
    settings = settings_of(render(*(f"operator.{each}" for each in changed)))
    numbers = (settings.lease_seconds, settings.workers, settings.api_qps, settings.api_burst)
    assert numbers == (3, 4, 20, 70) and (settings.resync_seconds, settings.liveness_seconds) == (5, 150)
    assert settings.progress_seconds == 0


def test_the_drain_is_told_the_same_lease_and_namespaces_as_the_operator() -> None:
    for scope in (CLUSTER, NAMESPACES):
        objects = render(*scope)
        (container,) = pods_of(objects)["feddiff-drain"]["containers"]
        assert container["command"] == ["python3", "-m", "feddiff_operator.drain"]
        told, operator = parse_arguments(container["args"]), settings_of(objects)
        assert (told.lease_namespace, told.lease_name) == (operator.lease_namespace, operator.lease_name)
        assert tuple(told.namespaces) == operator.namespaces
        job = named(objects, "Job", "feddiff-drain")
        assert told.timeout_seconds < job["spec"]["activeDeadlineSeconds"] < 300  # helm's own patience


def test_what_drains_is_there_only_while_helm_uninstalls() -> None:
    hooks = {
        identity(each): each["metadata"]["annotations"].get("helm.sh/hook")
        for each in render(*CLUSTER)
        if "helm.sh/hook" in each["metadata"].get("annotations", {})
    }
    place = "feddiff-system/feddiff"
    assert hooks == {
        f"Job/{place}-drain": "pre-delete",
        f"NetworkPolicy/{place}-drain": "pre-delete",
        f"Pod/{place}-test": "test",
    }


def test_a_digest_wins_over_a_tag() -> None:
    digest = f"sha256:{'a' * 64}"
    for setting in ("image", "trainerImage"):
        text = json.dumps(render(f"{setting}.tag=1.2", f"{setting}.repository=reg.example/x"))
        assert "reg.example/x:1.2" in text
        text = json.dumps(
            render(f"{setting}.tag=1.2", f"{setting}.repository=reg.example/x", f"{setting}.digest={digest}")
        )
        assert f"reg.example/x@{digest}" in text and "x:1.2" not in text


def unrestricted(pod: Object) -> list[str]:
    """What Pod Security "restricted" and our own rules would say against `pod`."""
    wrong = []
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
        wrong.append("may run as root")
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        wrong.append("no seccomp profile")
    wrong += [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    wrong += ["a volume of the host" for volume in pod.get("volumes", []) if "hostPath" in volume]
    for container in pod["containers"]:
        mine = container.get("securityContext", {})
        wrong += ["may gain privileges"] if mine.get("allowPrivilegeEscalation") is not False else []
        wrong += ["may write to its root"] if not mine.get("readOnlyRootFilesystem") else []
        wrong += ["keeps capabilities"] if mine.get("capabilities", {}).get("drop") != ["ALL"] else []
        wrong += ["no memory limit"] if "memory" not in container.get("resources", {}).get("limits", {}) else []
    return wrong


def test_pods_are_restricted_and_only_operator_and_drain_hold_a_token() -> None:
    pods = pods_of(render())
    assert pods.keys() == {"feddiff-operator", "feddiff-drain", "feddiff-test"}
    for name, pod in pods.items():
        assert unrestricted(pod) == []
        assert pod["automountServiceAccountToken"] is (name != "feddiff-test")
    assert named(render(), "ServiceAccount", "feddiff-operator")["automountServiceAccountToken"] is False


def test_a_pod_made_less_restricted_is_noticed() -> None:
    pod = pods_of(render())["feddiff-operator"]
    del pod["containers"][0]["securityContext"]["capabilities"]
    pod["securityContext"]["runAsNonRoot"] = False
    assert unrestricted(pod) == ["may run as root", "keeps capabilities"]


# ---- rights ----------------------------------------------------------------------------------------------------


def rules_of(objects: list[Object], *kinds: str) -> Iterator[tuple[str, str, str, str]]:
    """(role, group, resource, verb) of every right in these kinds of role."""
    for role in of_kind(objects, *kinds):
        for rule in role.get("rules") or []:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    yield from ((role["metadata"]["name"], group, resource, verb) for verb in rule["verbs"])


@pytest.mark.parametrize("scope", [CLUSTER, NAMESPACES], ids=["cluster", "namespaces"])
def test_no_role_reads_secrets_or_has_a_wildcard(scope: list[str]) -> None:
    rights = list(rules_of(render(*scope), "Role", "ClusterRole"))
    assert rights
    assert not [right for right in rights if "secrets" in right[2] or "*" in right or "impersonate" in right]
    assert not [right for right in rights if right[2] in {"pods/exec", "nodes/proxy", "serviceaccounts/token"}]


def test_scope_namespaces_gives_the_operator_no_cluster_wide_rule() -> None:
    objects = render(*NAMESPACES)
    assert of_kind(objects, "ClusterRoleBinding") == []
    assert {each["metadata"]["name"] for each in of_kind(objects, "ClusterRole")} == {
        "feddiff-platform-engineer",
        "feddiff-platform-engineer-rules",
        "feddiff-data-owner",
        "feddiff-data-owner-rules",
        "feddiff-researcher",
        "feddiff-researcher-rules",
        "feddiff-budget-reader",
    }
    assert of_kind(render(*NAMESPACES, "roles.enabled=false"), "ClusterRole") == []
    bound = {(each["metadata"]["namespace"], each["roleRef"]["name"]) for each in of_kind(objects, "RoleBinding")}
    assert bound == {
        ("feddiff-system", "feddiff-operator-lease"),
        ("research", "feddiff-job-namespace"),
        ("clinic-a", "feddiff-owner-namespace"),
        ("clinic-b", "feddiff-owner-namespace"),
    }


def test_scope_cluster_reads_everywhere_and_writes_nowhere_in_an_owners_namespace() -> None:
    objects = render(*CLUSTER)
    (binding,) = of_kind(objects, "ClusterRoleBinding")
    verbs = {verb for role, _, _, verb in rules_of(objects, "ClusterRole") if role == binding["roleRef"]["name"]}
    assert verbs == {"get", "list", "watch"}
    namespaces = {each["metadata"]["namespace"] for each in of_kind(objects, "RoleBinding")}
    assert namespaces == {"feddiff-system", "research"}  # an owner lets the operator in, not the chart


@pytest.mark.parametrize("scope", [CLUSTER, NAMESPACES], ids=["cluster", "namespaces"])
def test_the_operator_never_edits_what_an_owner_wrote_nor_deletes_an_entry(scope: list[str]) -> None:
    objects = render(*scope)
    mine = {"feddiff-operator", "feddiff-job-namespace", "feddiff-owner-namespace", "feddiff-operator-lease"}
    rights = {right[1:] for right in rules_of(objects, "Role", "ClusterRole") if right[0] in mine}
    writes = {right for right in rights if right[2] not in {"get", "list", "watch"}}
    assert {(resource, verb) for group, resource, verb in writes if group == "feddiff.dev"} == {
        ("federateddiffusionjobs", "patch"),
        ("federateddiffusionjobs", "delete"),
        ("federateddiffusionjobs/status", "update"),
        ("privatedatasets/status", "update"),
        ("privacyreleases", "create"),
        ("privacyreleases/status", "update"),
    }
    assert {resource for group, resource, _ in writes if group == ""} == {"configmaps", "services", "events"}
    assert {resource for group, resource, _ in writes if group not in {"", "feddiff.dev"}} == {"jobs", "leases"}


def test_the_lease_is_one_by_name() -> None:
    (rule,) = named(render(), "Role", "feddiff-operator-lease")["rules"]
    assert rule["resourceNames"] == ["feddiff-operator"] and rule["verbs"] == ["get", "patch"]


def test_no_role_of_ours_grows_the_built_in_ones() -> None:
    labels = [each["metadata"]["labels"] for each in of_kind(render(), "ClusterRole")]
    assert not [label for each in labels for label in each if label.startswith("rbac.authorization.k8s.io/")]


def test_only_the_operator_may_write_a_status() -> None:
    writers = {
        role
        for role, _, resource, verb in rules_of(render(*CLUSTER), "Role", "ClusterRole")
        if resource.endswith("/status") and verb not in {"get", "list", "watch"}
    }
    assert writers == {"feddiff-job-namespace", "feddiff-owner-namespace"}


# ---- what is generated -----------------------------------------------------------------------------------------


def test_the_readme_describes_every_value_as_the_values_do() -> None:
    text, values = (CHART / "README.md").read_text(), (CHART / "values.yaml").read_text()
    assert generate.readme(text, values) == text, "run `make manifests`"
    rows = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert {path for path, _ in leaves(yaml.safe_load(values))} == rows
    assert generate.readme(text, values.replace("replicas: 2", "replicas: 1")) != text


def leaves(values: Object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and key != "resources":
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_install_yaml_is_the_chart_with_its_defaults() -> None:
    assert generate.INSTALL.read_text() == generate.install_manifest(str(HELM)), "run `make manifests`"
    objects = documents(generate.INSTALL.read_text())
    assert identity(objects[0]) == "Namespace//feddiff-system"
    hooks = {f"{each}/feddiff-system/feddiff-drain" for each in ("Job", "NetworkPolicy")}
    hooks |= {"Pod/feddiff-system/feddiff-test"}
    assert {identity(each) for each in objects[1:]} == {identity(each) for each in render()} - hooks
