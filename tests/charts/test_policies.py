"""Who may do what, asked of a real API server: roles, the ledger's protection and the platform's caps.

Installed with `kubectl apply -f manifests/install.yaml`, as the documentation says; every user holds a certificate.
"""

import contextlib
import copy
import http.client
import json
import os
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.documents import RELEASE, changed
from cluster.kubernetes import PROGRAMS, CommandFailed, ControlPlane

ROOT = Path(__file__).parents[2]
API = "feddiff.dev/v1alpha1"
Object = dict[str, Any]

OPERATOR = "system:serviceaccount:feddiff-system:feddiff-operator"
# name → (user, groups)
PEOPLE = {
    "operator": (OPERATOR, ("system:serviceaccounts", "system:serviceaccounts:feddiff-system")),
    "owner": ("alice", ("clinic-a-owners",)),
    "researcher": ("rita", ("researchers",)),
    "engineer": ("paul", ("platform",)),
    "editor": ("eddy", ("editors",)),  # holds the built-in role `admin` everywhere, and nothing of ours
    "admin": ("admin", ("system:masters",)),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """feddiff as `install.yaml` installs it; clinic-a let the operator in, clinic-b did not."""
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as control_plane:
        control_plane.kubectl("apply", "-f", ROOT / "manifests/install.yaml")
        control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds")
        for name in ("research", "clinic-a", "clinic-b"):
            control_plane.kubectl("create", "namespace", name)
        bind(control_plane, "feddiff-researcher", "researchers", "research")
        bind(control_plane, "feddiff-data-owner", "clinic-a-owners", "clinic-a")
        bind(control_plane, "feddiff-platform-engineer", "platform")
        bind(control_plane, "admin", "editors")
        wait_until(
            lambda: allowed(control_plane, "owner", "create", "rolebindings.rbac.authorization.k8s.io", "clinic-a")
        )
        let_in(control_plane, "admin", "feddiff-job-namespace", "research")
        let_in(control_plane, "owner", "feddiff-owner-namespace", "clinic-a")
        everybody_reads = ("create", "rolebinding", "budgets", "-n", "clinic-a", "--clusterrole=feddiff-budget-reader")
        control_plane.kubectl(*everybody_reads, "--group=researchers", user=kubeconfig(control_plane, "owner"))
        wait_until(lambda: "created by the operator alone" in attempt(control_plane, "admin", entry("probe")))
        wait_until(lambda: "may not act" in attempt(control_plane, "admin", job("probe", "default")))
        wait_until(lambda: attempt(control_plane, "admin", job("probe")) == "")
        yield control_plane


def bind(cluster: ControlPlane, role: str, group: str, namespace: str = "") -> None:
    kind = (
        ("rolebinding", f"{group}-{role}", "-n", namespace) if namespace else ("clusterrolebinding", f"{group}-{role}")
    )
    cluster.kubectl("create", *kind, f"--clusterrole={role}", f"--group={group}")


def let_in(cluster: ControlPlane, who: str, role: str, namespace: str) -> None:
    """The RoleBinding by which the operator may act in `namespace`."""
    subject = "--serviceaccount=feddiff-system:feddiff-operator"
    command = ("create", "rolebinding", role, "-n", namespace, f"--clusterrole={role}", subject)
    cluster.kubectl(*command, user=kubeconfig(cluster, who))


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Roles aggregate and policies take hold a moment after they are stored."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.05)


def kubeconfig(cluster: ControlPlane, who: str) -> Path:
    return cluster.user(*PEOPLE[who])


def attempt(cluster: ControlPlane, who: str, each: Object) -> str:
    """What the API server says against `who` creating `each`; nothing when it would do it (a dry run)."""
    namespace, kind = each["metadata"]["namespace"], each["kind"].lower()
    path = f"/apis/{each['apiVersion']}/namespaces/{namespace}/{kind}s?dryRun=All"
    return answered(cluster, who, "POST", path, each)


def answered(cluster: ControlPlane, who: str, method: str, path: str, body: Object) -> str:
    """What the API server says against it; nothing where it does it."""
    context = ssl.create_default_context(cafile=cluster.authority.certificate_path)
    context.load_cert_chain(*cluster.authority.client(*PEOPLE[who]))
    connection = http.client.HTTPSConnection(cluster.address, 6443, context=context, timeout=60)
    with contextlib.closing(connection):
        kind = "merge-patch+json" if method == "PATCH" else "json"
        connection.request(method, path, json.dumps(body), {"Content-Type": f"application/{kind}"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    return "" if response.status in (200, 201) else str(answer["message"])


def attempt_command(cluster: ControlPlane, who: str, *argv: str) -> str:
    try:
        cluster.kubectl(*argv, user=kubeconfig(cluster, who))
    except CommandFailed as refused:
        return str(refused)
    return ""


# ---- objects ---------------------------------------------------------------------------------------------------


def job(name: str = "digits", namespace: str = "research", epsilon: str = "10", store: str = "") -> Object:
    spec: Object = {
        "clients": [{"name": "a", "dataset": {"namespace": "clinic-a", "name": "scans"}}],
        "privacy": {
            "mechanism": "summary",
            "epsilon": epsilon,
            "delta": "1e-5",
            "clipNorm": "4.25",
            "momentClipNorm": "1.75",
        },
        "diffusion": {"splitSigma": "1"},
    }
    if store:
        spec["store"] = {"uri": store}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": API, "kind": "FederatedDiffusionJob", "metadata": metadata, "spec": spec}


def dataset(name: str = "scans", store: str = "", federation: str = "", images: tuple[str, ...] = ()) -> Object:
    spec: Object = {
        "source": {"format": "npz", "path": "train.npz"},
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": 1, "records": [100]},
        "budget": {"epsilon": "20", "delta": "1e-5"},
        "images": list(images),
    }
    if store:
        spec["store"] = {"uri": store}
    if federation:
        spec["federation"] = {"uri": federation}
    metadata = {"name": name, "namespace": "clinic-a"}
    return {"apiVersion": API, "kind": "PrivateDataset", "metadata": metadata, "spec": spec}


def entry(name: str) -> Object:
    return changed(RELEASE, "metadata", {"name": name, "namespace": "clinic-a"})


def stage_job(image: str = "localhost/feddiff-trainer:0.1.0", **pod: Any) -> Object:
    labels = {"feddiff.dev/stage": "release", "app.kubernetes.io/managed-by": "feddiff"}
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [{"name": "stage", "image": image}],
            **pod,
        },
    }
    metadata = {"name": "fd-release-0123456789-1", "namespace": "clinic-a", "labels": labels}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


@pytest.fixture
def stored_entry(cluster: ControlPlane, request: pytest.FixtureRequest) -> str:
    """The name of an entry that the operator made."""
    name = f"prl-{abs(hash(request.node.name)) % 10**8}"
    operator = kubeconfig(cluster, "operator")
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(entry(name)), user=operator)
    return name


@pytest.fixture
def caps(cluster: ControlPlane) -> Iterator[Callable[..., None]]:
    """Sets the platform's caps, as the platform engineer does."""

    def set_caps(**values: str) -> None:
        patch = json.dumps({"data": {"maxEpsilon": "", "imageRegistries": "", "buckets": "", **values}})
        command = ("patch", "configmap", "feddiff-caps", "-n", "feddiff-system", "--type=merge", "-p", patch)
        cluster.kubectl(*command, user=kubeconfig(cluster, "engineer"))

    yield set_caps
    set_caps()
    wait_until(lambda: attempt(cluster, "admin", job("probe", epsilon="1e9", store="s3://elsewhere/x")) == "")
    wait_until(lambda: attempt(cluster, "admin", stage_job("elsewhere.example/x:1")) == "")


# ---- roles -----------------------------------------------------------------------------------------------------


def allowed(cluster: ControlPlane, who: str, verb: str, what: str, namespace: str, name: str = "") -> bool:
    """`kubectl auth can-i`: `what` is resource.group or resource.group/subresource."""
    resource, _, subresource = what.partition("/")
    plural, _, group = resource.partition(".")
    user, groups = PEOPLE[who]
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": plural, "subresource": subresource}
    review = {"spec": {"user": user, "groups": groups, "resourceAttributes": {**attributes, "name": name}}}
    status, answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    assert status == 201, answer
    return bool(answer["status"]["allowed"])


JOBS, DATASETS, RELEASES = (
    f"{plural}.feddiff.dev" for plural in ("federateddiffusionjobs", "privatedatasets", "privacyreleases")
)
CHILDREN, READ = "jobs.batch", ("get", "list", "watch")
BINDINGS, ROLES = "rolebindings.rbac.authorization.k8s.io", "clusterroles.rbac.authorization.k8s.io"
# who, verbs, what, where it is allowed, where it is not
TABLE: list[tuple[str, tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = [
    ("operator", READ, JOBS, ("research", "clinic-a", "default", ""), ()),
    ("operator", READ, DATASETS, ("research", "clinic-a", "clinic-b", ""), ()),
    ("operator", READ, RELEASES, ("research", "clinic-a", "clinic-b", ""), ()),
    ("operator", ("list", "watch"), CHILDREN, ("research", "clinic-a", "clinic-b", ""), ()),
    ("operator", ("list", "watch"), "pods", ("research", "clinic-a", "clinic-b", ""), ()),
    ("operator", ("update",), f"{JOBS}/status", ("research",), ("clinic-a", "clinic-b", "default", "")),
    ("operator", ("patch", "delete"), JOBS, ("research",), ("clinic-a", "clinic-b", "default", "")),
    ("operator", ("create", "update", "deletecollection"), JOBS, (), ("research", "clinic-a")),
    ("operator", ("update",), f"{DATASETS}/status", ("clinic-a",), ("research", "clinic-b", "")),
    ("operator", ("create", "update", "patch", "delete"), DATASETS, (), ("research", "clinic-a", "clinic-b", "")),
    ("operator", ("create",), RELEASES, ("clinic-a",), ("research", "clinic-b", "")),
    ("operator", ("update",), f"{RELEASES}/status", ("clinic-a",), ("research", "clinic-b", "")),
    ("operator", ("update", "patch", "delete", "deletecollection"), RELEASES, (), ("clinic-a", "clinic-b", "")),
    ("operator", ("create", "patch", "delete"), CHILDREN, ("research", "clinic-a"), ("clinic-b", "default", "")),
    ("operator", ("create", "list", "delete"), "configmaps", ("research", "clinic-a"), ("clinic-b", "feddiff-system")),
    ("operator", ("get", "update", "patch", "watch"), "configmaps", (), ("research", "clinic-a", "feddiff-system", "")),
    ("operator", ("create", "delete"), "services", ("research",), ("clinic-a", "clinic-b", "")),
    ("operator", ("get", "create", "patch"), "events", ("research", "clinic-a"), ("clinic-b", "default", "")),
    ("operator", READ, "secrets", (), ("research", "clinic-a", "feddiff-system", "")),
    ("operator", ("create", "delete", "patch"), "pods", (), ("research", "clinic-a", "")),
    ("operator", ("create",), "pods/exec", (), ("research", "clinic-a", "")),
    ("operator", ("get",), "pods/log", (), ("research", "clinic-a", "")),
    ("operator", ("create", "bind", "escalate"), ROLES, (), ("clinic-a", "")),
    ("operator", ("create",), BINDINGS, (), ("clinic-a", "research", "")),
    ("operator", ("create",), "serviceaccounts/token", (), ("clinic-a", "feddiff-system")),
    ("operator", ("create",), "leases.coordination.k8s.io", (), ("feddiff-system", "")),
    ("owner", (*READ, "create", "update", "patch", "delete"), DATASETS, ("clinic-a",), ("clinic-b", "research", "")),
    ("owner", (*READ, "update", "patch", "delete"), RELEASES, ("clinic-a",), ("clinic-b", "research", "")),
    ("owner", ("create", "deletecollection"), RELEASES, (), ("clinic-a", "clinic-b")),
    ("owner", ("update", "patch"), f"{DATASETS}/status", (), ("clinic-a", "clinic-b")),
    ("owner", ("update", "patch"), f"{RELEASES}/status", (), ("clinic-a", "clinic-b")),
    ("owner", ("create", "update", "delete"), JOBS, (), ("clinic-a", "research")),
    ("owner", ("create", "delete"), BINDINGS, ("clinic-a",), ("clinic-b", "research", "")),
    ("owner", READ, "pods/log", ("clinic-a",), ("clinic-b", "research", "")),
    ("owner", READ, "secrets", (), ("clinic-a", "clinic-b", "")),
    ("researcher", (*READ, "create", "update", "patch", "delete"), JOBS, ("research",), ("clinic-a", "default", "")),
    ("researcher", ("update", "patch"), f"{JOBS}/status", (), ("research", "clinic-a")),
    ("researcher", READ, DATASETS, ("research", "clinic-a"), ("clinic-b", "")),
    ("researcher", ("create", "update", "patch", "delete"), DATASETS, (), ("research", "clinic-a")),
    ("researcher", ("update", "patch"), f"{DATASETS}/status", (), ("research", "clinic-a")),
    ("researcher", (*READ, "create", "update", "patch", "delete"), RELEASES, (), ("research", "clinic-a")),
    ("researcher", READ, "pods/log", ("research",), ("clinic-a", "clinic-b", "")),
    ("researcher", ("create",), "pods/exec", (), ("research", "clinic-a")),
    ("researcher", READ, "secrets", (), ("research", "clinic-a")),
    ("researcher", ("create",), BINDINGS, (), ("research", "clinic-a")),
    ("engineer", READ, JOBS, ("research", "clinic-a", ""), ()),
    ("engineer", READ, DATASETS, ("clinic-a", "clinic-b", ""), ()),
    ("engineer", READ, RELEASES, ("clinic-a", "clinic-b", ""), ()),
    ("engineer", ("create", "update", "patch", "delete"), DATASETS, (), ("clinic-a", "")),
    ("engineer", ("create", "update", "patch", "delete"), RELEASES, (), ("clinic-a", "")),
    ("engineer", ("create", "update", "patch", "delete"), JOBS, (), ("research", "")),
    ("engineer", ("update", "patch"), f"{DATASETS}/status", (), ("clinic-a", "")),
    ("engineer", READ, "pods/log", (), ("clinic-a", "research", "")),
    ("engineer", READ, "secrets", (), ("clinic-a", "feddiff-system", "")),
    ("editor", ("get", "update", "patch", "delete"), RELEASES, (), ("clinic-a", "research", "")),
    ("editor", ("update", "patch"), f"{DATASETS}/status", (), ("clinic-a", "research", "")),
    ("editor", ("create", "update", "delete"), DATASETS, (), ("clinic-a", "")),
    ("editor", ("create", "update", "delete"), JOBS, (), ("research", "")),
]


@pytest.mark.parametrize(
    ("who", "verbs", "what", "yes", "no"), TABLE, ids=[f"{each[0]}-{'-'.join(each[1])}-{each[2]}" for each in TABLE]
)
def test_a_role_allows_this_and_forbids_that(
    cluster: ControlPlane, who: str, verbs: tuple[str, ...], what: str, yes: tuple[str, ...], no: tuple[str, ...]
) -> None:
    answers = {(verb, place): allowed(cluster, who, verb, what, place) for verb in verbs for place in (*yes, *no)}
    assert answers == {(verb, place): place in yes for verb in verbs for place in (*yes, *no)}


def test_rights_by_name_reach_that_name_alone(cluster: ControlPlane) -> None:
    lease = "leases.coordination.k8s.io"
    for name, expected in (("feddiff-operator", True), ("other", False), ("", False)):
        assert allowed(cluster, "operator", "patch", lease, "feddiff-system", name) is expected
    for name, expected in (("feddiff-caps", True), ("other", False), ("", False)):
        assert allowed(cluster, "engineer", "patch", "configmaps", "feddiff-system", name) is expected
    for name, expected in (
        ("feddiff-owner-namespace", True),
        ("feddiff-job-namespace", False),
        ("cluster-admin", False),
    ):
        assert allowed(cluster, "owner", "bind", ROLES, "clinic-a", name) is expected


def test_an_owner_lets_in_the_operator_and_nobody_more_powerful(cluster: ControlPlane) -> None:
    command = ("create", "rolebinding", "x", "-n", "clinic-a", "--dry-run=server", "--user=alice")
    assert "attempting to grant RBAC permissions" in attempt_command(cluster, "owner", *command, "--clusterrole=edit")
    assert attempt_command(cluster, "owner", *command, "--clusterrole=feddiff-owner-namespace") == ""


def test_a_role_grows_by_a_label(cluster: ControlPlane) -> None:
    assert not allowed(cluster, "researcher", "get", "persistentvolumeclaims", "research")
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "volumes-too", "labels": {"feddiff.dev/aggregate-to-researcher": "true"}},
        "rules": [{"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get"]}],
    }
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(role))
    wait_until(lambda: allowed(cluster, "researcher", "get", "persistentvolumeclaims", "research"))


# ---- the ledger ------------------------------------------------------------------------------------------------


def test_nobody_but_the_operator_creates_an_entry(cluster: ControlPlane) -> None:
    assert "created by the operator alone, found admin" in attempt(cluster, "admin", entry("prl-x"))
    assert "privacyreleases.feddiff.dev is forbidden" in attempt(cluster, "owner", entry("prl-x"))
    assert attempt(cluster, "operator", entry("prl-x")) == ""


@pytest.mark.parametrize("kind", ["job", "dataset", "release"])
def test_nobody_but_the_operator_writes_a_status(cluster: ControlPlane, kind: str, stored_entry: str) -> None:
    each = {"job": job(f"status-{kind}"), "dataset": dataset(f"status-{kind}"), "release": entry(stored_entry)}[kind]
    if kind != "release":
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(each))
    name, namespace = each["metadata"]["name"], each["metadata"]["namespace"]
    command = ("patch", each["kind"].lower(), name, "-n", namespace, "--subresource=status", "--type=merge")
    change = ("-p", '{"status":{"phase":"Charged"}}')
    for who in ("owner", "researcher", "engineer", "editor"):
        assert "forbidden" in attempt_command(cluster, who, *command, *change).lower()
    assert "is written by the operator alone, found admin" in attempt_command(cluster, "admin", *command, *change)
    written = json.loads(cluster.kubectl("get", each["kind"].lower(), name, "-n", namespace, "-o", "json"))
    replaced = json.dumps({**written, "status": {"phase": "Charged"}})
    operator = kubeconfig(cluster, "operator")
    cluster.kubectl("replace", "--subresource=status", "-f", "-", stdin=replaced, user=operator)


def test_a_status_cannot_be_smuggled_in_with_the_object(cluster: ControlPlane) -> None:
    smuggled = {**dataset("smuggled"), "status": {"budget": {"spent": "0"}}}
    stored = json.loads(cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(smuggled)))
    assert "status" not in stored


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"labels": {"team": "x"}}},
        {"metadata": {"annotations": {"note": "x"}}},
        {"metadata": {"finalizers": ["x.example/y"]}},
        {"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "y"}]}},
        {"metadata": {"annotations": {"feddiff.dev/delete-reason": "sent to nobody"}, "labels": {"team": "x"}}},
    ],
)
def test_an_entry_changes_in_nothing_but_the_reason(cluster: ControlPlane, stored_entry: str, change: Object) -> None:
    command = ("patch", "prl", stored_entry, "-n", "clinic-a", "--type=merge", "-p", json.dumps(change))
    for who in ("owner", "admin"):
        assert "an entry of the ledger cannot change" in attempt_command(cluster, who, *command)


def test_an_entrys_charge_cannot_change_whoever_asks(cluster: ControlPlane, stored_entry: str) -> None:
    command = ("patch", "prl", stored_entry, "-n", "clinic-a", "--type=merge", "-p", '{"spec":{"epsilon":"1"}}')
    for who in ("owner", "admin"):
        assert "cannot change" in attempt_command(cluster, who, *command)
    assert "forbidden" in attempt_command(cluster, "operator", *command)


def test_an_entry_goes_only_after_its_owner_said_why(cluster: ControlPlane, stored_entry: str) -> None:
    delete = ("delete", "prl", stored_entry, "-n", "clinic-a", "--wait=false")
    annotate = ("annotate", "--overwrite", "prl", stored_entry, "-n", "clinic-a")
    for who in ("owner", "admin"):
        assert "deleted only after somebody says why" in attempt_command(cluster, who, *delete)
    assert attempt_command(cluster, "owner", *annotate, "feddiff.dev/delete-reason=too short") == ""  # 9 characters
    assert "deleted only after somebody says why" in attempt_command(cluster, "owner", *delete)
    assert attempt_command(cluster, "owner", *annotate, "feddiff.dev/delete-reason=             ") == ""
    assert "deleted only after somebody says why" in attempt_command(cluster, "owner", *delete)
    assert attempt_command(cluster, "owner", *annotate, "feddiff.dev/delete-reason=a rehearsal, no data was real") == ""
    assert "forbidden" in attempt_command(cluster, "researcher", *delete)
    assert attempt_command(cluster, "owner", *delete) == ""


def test_the_operator_neither_deletes_nor_gives_a_reason_even_with_every_right(
    cluster: ControlPlane, stored_entry: str
) -> None:
    almighty = cluster.user(OPERATOR, ["system:masters"])
    annotate = ("annotate", "prl", stored_entry, "-n", "clinic-a", "feddiff.dev/delete-reason=because I can do it")
    with pytest.raises(CommandFailed, match="the operator never says why"):
        cluster.kubectl(*annotate, user=almighty)
    cluster.kubectl(*annotate)
    with pytest.raises(CommandFailed, match="the operator never deletes an entry"):
        cluster.kubectl("delete", "prl", stored_entry, "-n", "clinic-a", user=almighty)


def test_deleting_all_entries_at_once_deletes_none(cluster: ControlPlane, stored_entry: str) -> None:
    status, answer = cluster.request("DELETE", f"/apis/{API}/namespaces/clinic-a/privacyreleases")
    assert status == 403 and "deleted only after somebody says why" in answer["message"]
    assert stored_entry in cluster.kubectl("get", "prl", "-n", "clinic-a", "-o", "name")


def test_a_namespace_with_a_ledger_does_not_go(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "namespace", "leaving")
    let_in(cluster, "admin", "feddiff-owner-namespace", "leaving")
    kept = entry("prl-kept")
    kept["metadata"]["namespace"] = "leaving"
    wait_until(lambda: attempt(cluster, "operator", kept) == "")
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(kept), user=kubeconfig(cluster, "operator"))
    cluster.kubectl("delete", "namespace", "leaving", "--wait=false")

    def why() -> str:
        return cluster.kubectl("get", "namespace", "leaving", "-o", "jsonpath={.status.conditions[*].message}")

    wait_until(lambda: "deleted only after somebody says why" in why())
    assert "prl-kept" in cluster.kubectl("get", "prl", "-n", "leaving", "-o", "name")
    cluster.kubectl("annotate", "prl", "prl-kept", "-n", "leaving", "feddiff.dev/delete-reason=the clinic has closed")
    wait_until(lambda: "leaving" not in cluster.kubectl("get", "namespace", "-o", "name"), seconds=60)


def test_a_definition_goes_only_after_somebody_said_why(cluster: ControlPlane) -> None:
    name = "privacyreleases.feddiff.dev"
    delete = ("delete", "crd", name, "--dry-run=server")
    assert "the ledgers of all data owners among them" in attempt_command(cluster, "admin", *delete)
    assert "the ledgers of all data owners" in attempt_command(
        cluster, "admin", "delete", "crd", "--all", "--dry-run=server"
    )
    cluster.kubectl("annotate", "crd", name, "feddiff.dev/delete-reason=backed up, cluster retires")
    assert attempt_command(cluster, "admin", *delete) == ""
    cluster.kubectl("annotate", "crd", name, "feddiff.dev/delete-reason-")


def test_a_backup_is_restored_as_the_documentation_says(cluster: ControlPlane, tmp_path: Path) -> None:
    cluster.kubectl("create", "namespace", "clinic-c")
    let_in(cluster, "admin", "feddiff-owner-namespace", "clinic-c")
    before = {"prl-kept": "Reserved", "prl-lost": "Reserved", "prl-returned": "Returned", "prl-behind": "Charged"}
    for name, phase in before.items():
        store_entry(cluster, name, "clinic-c", phase)
    backup = cluster.kubectl("get", "prl,pds", "-n", "clinic-c", "-o", "json")
    (tmp_path / "ledger-clinic-a.json").write_text(backup)
    store_entry(cluster, "prl-kept", "clinic-c", "Charged")  # after the backup
    store_entry(cluster, "prl-behind", "clinic-c", "Reserved")  # as an older snapshot of etcd has it
    for name in ("prl-lost", "prl-returned"):
        cluster.kubectl("annotate", "prl", name, "-n", "clinic-c", "feddiff.dev/delete-reason=rehearsing a loss")
        cluster.kubectl("delete", "prl", name, "-n", "clinic-c")

    page = (ROOT / "docs/ledger-backup.md").read_text()
    (commands,) = [each for each in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "missing.json" in each]
    programs = f"{PROGRAMS}:{os.environ['PATH']}"
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "PATH": programs}
    script = "set -e\n" + commands.replace("--namespace clinic-a", "--namespace clinic-c")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    restored = json.loads(cluster.kubectl("get", "prl", "-n", "clinic-c", "-o", "json"))["items"]
    assert {each["metadata"]["name"]: each["status"]["phase"] for each in restored} == {
        "prl-kept": "Charged",  # what it says is newer than the backup
        "prl-lost": "Charged",  # it may have been, after the backup
        "prl-returned": "Returned",
        "prl-behind": "Charged",  # charged in either is charged
    }
    written = {each["metadata"]["name"]: each["spec"] for each in json.loads(backup)["items"]}
    assert {each["metadata"]["name"]: each["spec"] for each in restored} == written


def store_entry(cluster: ControlPlane, name: str, namespace: str, phase: str) -> None:
    """An entry with its phase, written by the operator."""
    operator = cluster.user(OPERATOR, ["system:masters"])
    each = entry(name)
    each["metadata"]["namespace"] = namespace
    with contextlib.suppress(CommandFailed):
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(each), user=operator)
    changed = json.dumps({**each, "status": {"phase": phase}})
    cluster.kubectl("replace", "--subresource=status", "-f", "-", stdin=changed, user=operator)


# ---- caps ------------------------------------------------------------------------------------------------------


def test_a_job_above_the_largest_epsilon_is_refused(cluster: ControlPlane, caps: Callable[..., None]) -> None:
    caps(maxEpsilon="10")
    wait_until(lambda: attempt(cluster, "researcher", job(epsilon="10.001")) != "")
    refused = attempt(cluster, "researcher", job(epsilon="10.001"))
    assert "spec.privacy.epsilon: 10.001 is above 10, the most that the platform allows one job" in refused
    assert attempt(cluster, "researcher", job(epsilon="10")) == ""
    assert attempt(cluster, "researcher", job(epsilon="1e1")) == ""
    assert "is above 10" in attempt(cluster, "researcher", job(epsilon="1e2"))
    pure = job(epsilon="10.001")
    pure["spec"]["privacy"] = {"mechanism": "privunit", "epsilon": "10.001", "clipNorm": "4.25"}
    assert "spec.privacy.epsilon: 10.001 is above 10" in attempt(cluster, "researcher", pure)
    pure["spec"]["privacy"]["epsilon"] = "10"
    assert attempt(cluster, "researcher", pure) == ""


def test_a_lowered_cap_lets_a_job_be_stopped(cluster: ControlPlane, caps: Callable[..., None]) -> None:
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(job("older", store="s3://elsewhere/jobs")))
    caps(maxEpsilon="5", buckets="s3://federation")
    wait_until(lambda: attempt(cluster, "researcher", job()) != "")
    command = ("patch", "fdj", "older", "-n", "research", "--type=merge", "-p")
    assert attempt_command(cluster, "researcher", *command, '{"spec":{"suspend":true}}') == ""
    assert attempt_command(cluster, "operator", *command, '{"metadata":{"finalizers":["feddiff.dev/stop-pods"]}}') == ""
    assert attempt_command(cluster, "operator", *command, '{"metadata":{"finalizers":[]}}') == ""


@pytest.mark.parametrize(
    ("store", "fits"),
    [
        ("s3://federation", True),
        ("s3://federation/jobs/a..b", True),
        ("s3://clinic-a/feddiff", True),
        ("s3://clinic-a/feddiff/deeper", True),
        ("s3://clinic-a", False),
        ("s3://clinic-a/feddiff-evil", False),
        ("s3://federation-evil/jobs", False),
        ("s3://clinic-a/feddiff/../seals", False),
        ("s3://clinic-a/feddiff/..", False),
        ("s3://clinic-a/feddiff/%2e%2e/seals", False),
        ("file:///data", False),
    ],
)
def test_stores_lie_in_the_allowed_buckets(
    cluster: ControlPlane, caps: Callable[..., None], store: str, fits: bool
) -> None:
    caps(buckets="s3://federation\ns3://clinic-a/feddiff")
    wait_until(lambda: attempt(cluster, "researcher", job(store="s3://no")) != "")
    for each, who in (
        (job(store=store), "researcher"),
        (dataset("new", store=store), "owner"),
        (dataset("new", federation=store), "owner"),
    ):
        refused = attempt(cluster, who, each)
        assert (refused == "") is fits
        assert fits or f"store {store} lies in none of the allowed buckets" in refused


def test_images_come_from_the_allowed_registries(cluster: ControlPlane, caps: Callable[..., None]) -> None:
    caps(imageRegistries="registry.example/feddiff\nlocalhost")
    wait_until(lambda: attempt(cluster, "operator", stage_job("busybox")) != "")
    for image in ("localhost/feddiff-trainer:1", "registry.example/feddiff/trainer@sha256:" + "a" * 64):
        assert attempt(cluster, "operator", stage_job(image)) == ""
        assert attempt(cluster, "owner", dataset("new", images=(image,))) == ""
    for image in ("busybox", "registry.example/feddiff-evil/x", "localhost.evil/x", "localhost:5000/x"):
        words = f"{image} comes from none of the allowed registries registry.example/feddiff, localhost"
        assert words in attempt(cluster, "operator", stage_job(image))
        assert words in attempt(cluster, "editor", stage_job(image))
        assert words in attempt(cluster, "owner", dataset("new", images=("localhost/x", image)))
    smuggled = stage_job(initContainers=[{"name": "first", "image": "busybox"}])
    assert "busybox comes from none" in attempt(cluster, "operator", smuggled)
    other = stage_job("busybox")
    other["metadata"]["labels"] = {"app": "another"}  # without any, a Job takes those of its pods
    assert attempt(cluster, "editor", other) == ""  # other people's Jobs are not feddiff's business


def test_without_its_parameters_nothing_is_admitted(cluster: ControlPlane, caps: Callable[..., None]) -> None:
    command = ("patch", "configmap", "feddiff-caps", "-n", "feddiff-system", "--type=json", "-p")
    cluster.kubectl(*command, '[{"op":"remove","path":"/data/maxEpsilon"}]')
    wait_until(lambda: "no such key: maxEpsilon" in attempt(cluster, "researcher", job()))


# ---- the operator's own Jobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda each: each["metadata"].update(labels={"app": "another"}), "carry the label feddiff.dev/stage"),
        (lambda each: each["spec"]["template"].pop("metadata"), "carry the label feddiff.dev/stage"),
        (
            lambda each: each["spec"]["template"]["metadata"].update(labels={"feddiff.dev/stage": "sample"}),
            "carry the label feddiff.dev/stage",
        ),
        (
            lambda each: each["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
            "mount no service-account token",
        ),
        (lambda each: each["spec"]["template"]["spec"].update(hostNetwork=True), "share nothing with the host"),
        (
            lambda each: each["spec"]["template"]["spec"]["containers"][0].update(securityContext={"privileged": True}),
            "share nothing with the host",
        ),
        (
            lambda each: each["spec"]["template"]["spec"].update(
                initContainers=[{"name": "x", "image": "localhost/x", "securityContext": {"privileged": True}}]
            ),
            "share nothing with the host",
        ),
    ],
)
def test_the_operator_makes_no_other_job_than_a_stages(
    cluster: ControlPlane, spoil: Callable[[Object], Any], words: str
) -> None:
    each = stage_job()
    assert attempt(cluster, "operator", each) == ""
    spoil(each)
    assert words in attempt(cluster, "operator", each)
    assert words not in attempt(cluster, "editor", each)  # others answer to Pod Security


def test_the_operator_takes_no_label_off_a_job_that_waits(cluster: ControlPlane) -> None:
    """A suspended Job's pod template may still change: without the label no NetworkPolicy would select the pod."""
    each = stage_job()
    each["metadata"]["name"], each["spec"]["suspend"] = "waits", True
    cluster.kubectl("create", "-f", "-", user=kubeconfig(cluster, "operator"), stdin=json.dumps(each))
    path = "/apis/batch/v1/namespaces/clinic-a/jobs/waits"
    off = {"spec": {"template": {"metadata": {"labels": {"feddiff.dev/stage": None}}}}}
    assert "carry the label feddiff.dev/stage" in answered(cluster, "operator", "PATCH", path, off)
    said = {"metadata": {"annotations": {"feddiff.dev/stopped": "Suspended"}}, "spec": {"activeDeadlineSeconds": 0}}
    assert answered(cluster, "operator", "PATCH", path, said) == ""
    assert answered(cluster, "admin", "PATCH", path, off) == "", "the API server itself would let it"
    cluster.kubectl("delete", "job", "waits", "-n", "clinic-a")


def test_a_job_where_the_operator_may_not_act_is_refused_with_the_way_out(cluster: ControlPlane) -> None:
    refused = attempt(cluster, "admin", job(namespace="clinic-b"))
    assert (
        "the operator may not act in namespace clinic-b; let it in: kubectl create rolebinding -n clinic-b" in refused
    )
    assert "--serviceaccount=feddiff-system:feddiff-operator" in refused


def test_the_operator_pods_are_admitted_where_only_restricted_pods_are(cluster: ControlPlane) -> None:
    path = "/api/v1/namespaces/feddiff-system/pods"
    wait_until(lambda: len(cluster.request("GET", path)[1]["items"]) == 2)


@pytest.mark.parametrize("sample", sorted(path.name for path in (ROOT / "manifests/samples").glob("*.yaml")))
def test_a_sample_is_accepted_as_it_stands(cluster: ControlPlane, sample: str) -> None:
    cluster.kubectl("apply", "-f", ROOT / "manifests/samples" / sample)
    for each in yaml.safe_load_all((ROOT / "manifests/samples" / sample).read_text()):
        if each["kind"] == "FederatedDiffusionJob":
            cluster.kubectl("delete", "fdj", each["metadata"]["name"], "-n", each["metadata"]["namespace"])


# ---- mutants: without its policy, each of these refusals is gone -------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "who", "each"),
    [
        ("feddiff-ledger", "admin", entry("prl-mutant")),
        ("feddiff-caps", "researcher", job(epsilon="11")),
        ("feddiff-images", "operator", stage_job("busybox")),
        ("feddiff-operator-jobs", "operator", stage_job(hostNetwork=True)),
        ("feddiff-reach", "admin", job(namespace="clinic-b")),
    ],
)
def test_it_is_the_policy_that_refuses(
    cluster: ControlPlane, caps: Callable[..., None], policy: str, who: str, each: Object
) -> None:
    caps(maxEpsilon="10", imageRegistries="localhost")
    wait_until(lambda: policy in attempt(cluster, who, each))
    binding = cluster.kubectl("get", "validatingadmissionpolicybinding", policy, "-o", "json")
    cluster.kubectl("delete", "validatingadmissionpolicybinding", policy)
    wait_until(lambda: attempt(cluster, who, each) == "")
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(without_server_fields(json.loads(binding))))
    wait_until(lambda: policy in attempt(cluster, who, each))


def without_server_fields(each: Object) -> Object:
    """The object as it can be created again."""
    written = copy.deepcopy(each)
    for key in ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"):
        written["metadata"].pop(key, None)
    return written
