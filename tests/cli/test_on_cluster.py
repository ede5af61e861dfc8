"""The commands on a real API server, each as a user with the rights that the chart gives to a role.

ada is a researcher, olga and oskar are the owners of clinics a and b, pete is a platform engineer. What the operator
would have written is made by its own pure functions, so a word that only one side changes is found here. There is no
node; where a log is read, a server of the test plays the kubelet.
"""

import dataclasses
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes import CommandFailed, ControlPlane
from feddiff import main as command
from feddiff_operator import workloads
from feddiff_operator.status import job_status
from feddiff_operator.waiting import waiting
from feddiff_protocol import labels, ledger
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, parse
from feddiff_protocol.ledger import Account, Entry, Phase
from feddiff_protocol.ledger_objects import Books, dataset_status, release_object, with_status_of
from feddiff_protocol.plan import ClientObserved, Hold, Observed, Reason, StageKey, StageObserved, StagePhase, plan
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import Receipt, ReleaseReference, Stage, release_spec, train_shared_spec

Object = dict[str, Any]
Answer = tuple[int, str, str]
CHART = Path(__file__).parents[2] / "charts" / "feddiff"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
IMAGE = "trainer:test"
UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
DIGEST = "ab" * 32


@dataclasses.dataclass
class World:
    """Three namespaces, four users, and what the operator has written so far."""

    control_plane: ControlPlane
    research: str
    a: str
    b: str
    users: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    entries: dict[str, list[Entry]] = dataclasses.field(default_factory=dict)

    def create(self, path: str, obj: Object) -> Object:
        status, answer = self.control_plane.request("POST", path, obj)
        assert status == 201, answer
        created: Object = answer
        return created

    def set_status(self, path: str, change: Callable[[Object], Object]) -> None:
        """Replaces the status with what `change` makes of the object, again where somebody else wrote first."""
        while True:
            _, found = self.control_plane.request("GET", path)
            status, answer = self.control_plane.request("PUT", f"{path}/status", {**found, "status": change(found)})
            if status == 200:
                return
            assert status == 409, answer

    def wait_for(self, what: str, ready: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (found := ready()):
            assert time.monotonic() < deadline, what
            time.sleep(0.05)
        return found

    # -- owners and researchers

    def add_dataset(self, namespace: str, name: str = "scans", **spec: Any) -> PrivateDataset:
        document = {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "PrivateDataset",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
                "image": {"channels": 1, "height": 8, "width": 8},
                "classes": {"count": 2, "records": [100, 5]},
                "budget": {"epsilon": "20", "delta": "1e-5"},
                "access": [{"namespace": self.research, "maxEpsilon": "10"}],
                "store": {"uri": "s3://own/feddiff", "secretName": "own-store"},
                "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
                **spec,
            },
        }
        created = self.create(self.pds(namespace), document)
        self.entries[f"{namespace}/{name}"] = []
        self.write_books(namespace, name)
        return parse(PrivateDataset, created, name)

    def add_job(self, name: str, epsilon: str = "4", dataset: str = "scans") -> FederatedDiffusionJob:
        clients = [{"name": n, "dataset": {"namespace": c, "name": dataset}} for n, c in (("a", self.a), ("b", self.b))]
        privacy = {"mechanism": "summary", "epsilon": epsilon, "delta": "1e-5"}
        document = {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "FederatedDiffusionJob",
            "metadata": {"name": name, "namespace": self.research},
            "spec": {
                "clients": clients,
                "privacy": {**privacy, "clipNorm": "4.25", "momentClipNorm": "2"},
                "diffusion": {"splitSigma": "1"},
                "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
            },
        }
        return parse(FederatedDiffusionJob, self.create(self.fdj(), document), name)

    # -- the operator

    def fdj(self) -> str:
        return f"/apis/feddiff.dev/v1alpha1/namespaces/{self.research}/federateddiffusionjobs"

    def pds(self, namespace: str) -> str:
        return f"/apis/feddiff.dev/v1alpha1/namespaces/{namespace}/privatedatasets"

    def prl(self, namespace: str) -> str:
        return f"/apis/feddiff.dev/v1alpha1/namespaces/{namespace}/privacyreleases"

    def charge(self, job: FederatedDiffusionJob, namespace: str, client: str, phase: Phase = Phase.CHARGED) -> Entry:
        entry = Entry(
            name=f"prl-{job.metadata.name}-{client}",
            dataset_uid="d",
            job_namespace=self.research,
            job_name=job.metadata.name,
            job_uid=job.metadata.uid,
            client=client,
            mechanism="summary",
            unit="image",
            epsilon=job.spec.privacy.epsilon,
            delta=job.spec.privacy.delta,
            charge=promise_of(job.spec.privacy, job.spec.diffusion).charge,
            reserved_at="2026-01-01T00:00:00Z",
            phase=phase,
            manifest_sha256=DIGEST if phase is Phase.CHARGED else "",
        )
        created = self.create(self.prl(namespace), release_object(namespace, "scans", entry))
        self.set_status(f"{self.prl(namespace)}/{entry.name}", lambda _: with_status_of(created, entry)["status"])
        self.entries[f"{namespace}/scans"].append(entry)
        self.write_books(namespace, "scans")
        return entry

    def write_books(self, namespace: str, name: str, account: Account | None = None) -> None:
        entries = tuple(self.entries[f"{namespace}/{name}"])
        kept = account or ledger.adopt(entries)

        def status(found: Object) -> Object:
            dataset = parse(PrivateDataset, found, name)
            words = ledger.contradiction(kept, entries)
            return dataset_status(found, Books(kept, entries, dataset.spec.budget, contradiction=words), NOW)

        self.set_status(f"{self.pds(namespace)}/{name}", status)

    def publish(self, job: FederatedDiffusionJob, observed: Observed) -> None:
        decided = plan(job, observed).status
        self.set_status(
            f"{self.fdj()}/{job.metadata.name}",
            lambda found: job_status(found, decided, now=NOW, stages=observed.stages),
        )

    def start(self, job: FederatedDiffusionJob, stage: Stage, client: str, annotations: Mapping[str, str]) -> Object:
        """The attempt's batch Job; suspended where it is over, so that the Job controller leaves it alone."""
        names = {"a": self.a, "b": self.b}
        datasets = {each: self.dataset(namespace) for each, namespace in names.items()}
        places = workloads.places(job, datasets)
        uid, setting = job.metadata.uid, workloads.Setting(IMAGE)
        if client:
            spec: Any = release_spec(job, uid, client, datasets[client], places, 1)
        else:
            spec = train_shared_spec(
                job, uid, datasets["a"], (ReleaseReference(client="a", manifest_sha256=DIGEST),), places, 1
            )
        batch = workloads.stage_objects(setting, job, uid, datasets[client] if client else None, spec)[-1]
        assert workloads.child_name(uid, stage, client, 1) == batch["metadata"]["name"]
        batch["metadata"]["annotations"] = dict(annotations)
        batch["spec"]["suspend"] = bool(annotations)
        return self.create(f"/apis/batch/v1/namespaces/{batch['metadata']['namespace']}/jobs", batch)

    def dataset(self, namespace: str, name: str = "scans") -> PrivateDataset:
        return parse(PrivateDataset, self.control_plane.request("GET", f"{self.pds(namespace)}/{name}")[1], name)

    # -- the platform

    def pods(self, batch: Object, count: int = 1) -> list[Object]:
        """The pods that the Job controller has made for it."""
        namespace, name = batch["metadata"]["namespace"], batch["metadata"]["name"]
        path = f"/api/v1/namespaces/{namespace}/pods?labelSelector=batch.kubernetes.io/job-name%3D{name}"

        def all_of_them() -> list[Object]:
            items: list[Object] = self.control_plane.request("GET", path)[1]["items"]
            return items if len(items) == count else []

        found: list[Object] = self.wait_for("pods", all_of_them)
        return found

    def set_pod_status(self, pod: Object, status: Object) -> None:
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        self.set_status(path, lambda found: {**found["status"], **status})

    # -- the commands

    def run(self, capsys: pytest.CaptureFixture[str], user: str, *arguments: str) -> Answer:
        """Exit code, stdout and stderr of the command as that user."""
        line = [*arguments, "--kubeconfig", str(self.users[user])]
        code = command._exit_code(lambda: command.app(line))
        said = capsys.readouterr()
        return code, said.out, said.err


BINDINGS = {  # who may what, where; as the pages about roles say
    "ada": [("feddiff-researcher-rules", "research"), ("feddiff-budget-reader", "a")],
    "olga": [("feddiff-data-owner-rules", "a")],
    "oskar": [("feddiff-data-owner-rules", "b")],
    "pete": [("feddiff-platform-engineer-rules", "")],
    "eve": [],
}


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane) -> World:
    names = {"research": control_plane.namespace("research"), "a": control_plane.namespace("clinic-a")}
    names["b"] = control_plane.namespace("clinic-b")
    users = {name: control_plane.user(name) for name in BINDINGS}
    made = World(control_plane, **names, users=users)
    roles = control_plane.helm("template", "feddiff", CHART, "-n", "feddiff-system", "-s", "templates/roles.yaml")
    control_plane.kubectl("apply", "-f", "-", stdin=roles)
    for name, bound in BINDINGS.items():
        for role, where in bound:
            kind = ["rolebinding", "-n", names[where]] if where else ["clusterrolebinding"]
            control_plane.kubectl(
                "create", *kind, f"{name}-{role}-{names['a']}", f"--clusterrole={role}", f"--user={name}"
            )
    asked = {"ada": ("fdj", "research"), "olga": ("prl", "a"), "oskar": ("prl", "b"), "pete": ("fdj", "b")}
    for name, (kind_of, where) in asked.items():

        def admitted(name: str = name, kind_of: str = kind_of, where: str = where) -> bool:
            try:
                return bool(
                    control_plane.kubectl("get", kind_of, "-n", names[where], "-o", "name", user=users[name]) or 1
                )
            except CommandFailed:
                return False

        made.wait_for(f"the rights of {name}", admitted)
    made.add_dataset(made.a)
    made.add_dataset(made.b)
    return made


@pytest.fixture(scope="module")
def waiting_job(world: World) -> FederatedDiffusionJob:
    """Both clients are charged and a has released; the pod of b's release finds no node, as the scheduler says."""
    job = world.add_job("waits")
    for client, namespace in (("a", world.a), ("b", world.b)):
        world.charge(job, namespace, client)
    receipt = Receipt(
        stage=Stage.RELEASE,
        job_uid=job.metadata.uid,
        client="a",
        attempt=1,
        outputs={"manifest": DIGEST},
        milliseconds=1,
    )
    world.start(job, Stage.RELEASE, "a", {labels.RECEIPT: receipt.to_line()})
    batch = world.start(job, Stage.RELEASE, "b", {})
    (pod,) = world.pods(batch)
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}
    world.set_pod_status(pod, {"phase": "Pending", "conditions": [scheduled]})
    stages: dict[StageKey, StageObserved] = {
        (Stage.RELEASE, "a"): StageObserved(StagePhase.SUCCEEDED, 1, receipt=receipt),
        (Stage.RELEASE, "b"): StageObserved(StagePhase.RUNNING, 1),
    }
    pods = world.pods(batch)
    words = tuple(waiting([batch], pods, NOW))
    assert words == (f"release of b: Unschedulable: {UNSCHEDULABLE}",)
    clients = {"a": ClientObserved(Hold.CHARGED), "b": ClientObserved(Hold.CHARGED)}
    world.publish(job, Observed(clients, stages, waiting=words))
    return job


@pytest.fixture(scope="module")
def failed_job(world: World) -> FederatedDiffusionJob:
    """The records of b are not what their description says."""
    job = world.add_job("broke", epsilon="2")
    for client, namespace in (("a", world.a), ("b", world.b)):
        world.charge(job, namespace, client)
    message = "spec or data invalid; its log: kubectl logs …"
    world.start(job, Stage.RELEASE, "b", {labels.EXIT_CODE: "65", labels.MESSAGE: message})
    stages: dict[StageKey, StageObserved] = {
        (Stage.RELEASE, "b"): StageObserved(StagePhase.FAILED, 1, 1, exit_code=65, message=message)
    }
    clients = {"a": ClientObserved(Hold.CHARGED), "b": ClientObserved(Hold.CHARGED)}
    world.publish(job, Observed(clients, stages))
    return job


# ---- status ------------------------------------------------------------------------------------------------------


def test_a_researcher_sees_the_jobs_of_a_namespace(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, err = world.run(capsys, "ada", "status", "-n", world.research)
    assert (code, err) == (0, "")
    where, header, *rows = out.splitlines()
    assert where == f"context test, namespace {world.research}"
    assert header.split() == ["namespace", "job", "phase", "clients", "progress", "ε", "trainer", "age"]
    (row,) = [each.split() for each in rows if " waits " in each]
    assert row[:6] == [world.research, "waits", "Releasing", "1/2", "10", "%"]
    code, out, _ = world.run(capsys, "ada", "status", "-n", world.research, "--json")
    (found,) = [each for each in json.loads(out)["jobs"] if each["name"] == "waits"]
    assert (code, found["phase"], found["epsilon"], found["clients"]) == (0, "Releasing", "4", "1/2")


def test_one_job_shows_conditions_and_stages_and_where_to_ask_why(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "ada", "status", "waits", "-n", world.research)
    assert code == 0
    assert f"Job {world.research}/waits: Releasing" in out
    assert ["release", "1", "1", "0", "0"] in [line.split() for line in out.splitlines()]
    assert ["BudgetReserved", "yes", "BudgetReserved"] in [line.split() for line in out.splitlines()]
    assert f"next: feddiff why waits --kubeconfig {world.users['ada']} -n {world.research}" in out
    document = json.loads(world.run(capsys, "ada", "status", f"{world.research}/waits", "--json")[1])
    assert (document["uid"], document["upToDate"]) == (waiting_job.metadata.uid, True)
    assert {each["type"]: each["status"] for each in document["conditions"]}["BudgetReserved"] is True


def test_all_namespaces_are_for_who_may_read_all(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "pete", "status", "-A", "--json")
    assert code == 0
    assert (world.research, "waits") in [(each["namespace"], each["name"]) for each in json.loads(out)["jobs"]]
    code, out, err = world.run(capsys, "ada", "status", "-A")
    assert (code, out) == (78, "")
    assert "federateddiffusionjobs in all namespaces: not yours to read" in err


def test_a_job_that_no_operator_has_seen_says_so(world: World, capsys: Any) -> None:
    world.add_job("unseen")
    code, out, _ = world.run(capsys, "ada", "why", "unseen", "-n", world.research)
    assert code == 0
    assert "no operator has looked at it" in out
    assert "platform: see above" in out
    assert "unseen by an operator" in world.run(capsys, "ada", "status", "unseen", "-n", world.research)[1]


# ---- why ---------------------------------------------------------------------------------------------------------


def test_a_researcher_learns_the_schedulers_words_though_the_pod_is_the_owners(
    world: World, waiting_job: Any, capsys: Any
) -> None:
    code, out, _ = world.run(capsys, "ada", "why", "waits", "-n", world.research, "--json")
    answer = json.loads(out)
    assert (code, answer["phase"], answer["reason"]) == (0, "Releasing", "Waiting")
    assert UNSCHEDULABLE in answer["message"]
    assert answer["runbook"] == "docs/runbooks/Waiting.md"
    assert "platform" in {step["who"] for step in answer["next"]}
    assert {each["client"]: each["hold"] for each in answer["clients"]} == {"a": "Hidden", "b": "Hidden"}
    hidden = {(each["namespace"], each["what"]) for each in answer["unreadable"]}
    assert {(world.a, "jobs"), (world.b, "privatedatasets"), (world.a, "privacyreleases")} <= hidden
    assert (world.a, "privatedatasets") not in hidden


def test_a_platform_engineer_sees_the_pods_words_and_every_hold(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "pete", "why", "waits", "-n", world.research, "--json")
    answer = json.loads(out)
    assert (code, answer["unreadable"]) == (0, [])
    assert {each["client"]: each["hold"] for each in answer["clients"]} == {"a": "Charged", "b": "Charged"}
    attempts = {each["client"]: each for each in answer["attempts"]}
    assert attempts["a"]["phase"] == "Succeeded"
    assert (attempts["b"]["phase"], attempts["b"]["says"]) == ("Waiting", f"Unschedulable: {UNSCHEDULABLE}")
    text = world.run(capsys, "pete", "why", "waits", "-n", world.research)[1]
    assert f"release of b, attempt 1 in {world.b}: Waiting: Unschedulable: {UNSCHEDULABLE}" in text
    assert "more: docs/runbooks/Waiting.md" in text


def test_an_owner_sees_its_own_part_of_a_job_that_it_may_not_read(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, err = world.run(capsys, "oskar", "why", "waits", "-n", world.b)
    assert (code, err) == (0, "")
    assert f"Job {world.research}/waits" in out
    assert f"release of b, attempt 1 in {world.b}: Waiting: Unschedulable" in out
    assert "where you may not read jobs" in out
    assert "owner: the same for the pods in your namespace" in out


def test_a_failure_names_the_exit_code_whose_it_is_and_the_command_for_its_log(
    world: World, failed_job: Any, capsys: Any
) -> None:
    code, out, _ = world.run(capsys, "pete", "why", "broke", "-n", world.research)
    assert code == 0
    assert f"release of b, attempt 1 in {world.b}: Failed, exit code 65" in out
    assert "owner of client b: release of b, attempt 1: correct the records" in out
    assert "next: feddiff logs broke --client b --stage release" in out
    assert "charges again" in out


def test_a_budget_that_does_not_hold_a_job_is_said_with_its_arithmetic(world: World, capsys: Any) -> None:
    world.add_dataset(world.a, "small", budget={"epsilon": "3", "delta": "1e-5"})
    job = world.add_job("dear", dataset="small")
    refusal = "spent so far ε = 0.0000 of 3"
    clients = {"a": ClientObserved(Hold.NONE, refusal), "b": ClientObserved(Hold.NONE, "", Reason.DATASET_MISSING)}
    world.publish(job, Observed(clients))
    answer = json.loads(world.run(capsys, "pete", "why", "dear", "-n", world.research, "--json")[1])
    a, b = answer["clients"]
    assert answer["reason"] == "PrivacyBudgetExceeded"
    assert (a["hold"], b["hold"]) == ("None", "None")
    assert refusal in a["says"]
    assert b["says"] == f"there is no dataset {world.b}/small"
    assert {step["who"] for step in answer["next"]} == {"owner", "researcher"}


# ---- budget ------------------------------------------------------------------------------------------------------


def test_an_owner_sees_every_entry_and_the_accountants_own_sum(
    world: World, waiting_job: Any, failed_job: Any, capsys: Any
) -> None:
    code, out, _ = world.run(capsys, "olga", "budget", "scans", "-n", world.a, "--json")
    (answer,) = json.loads(out)["datasets"]
    assert (code, answer["contradiction"], answer["steady"]) == (0, "", True)
    assert (answer["limitEpsilon"], answer["delta"], answer["unit"]) == ("20", "1e-5", "image")
    assert {each["job"]["name"] for each in answer["entries"]} == {"waits", "broke"}
    total = Decimal(answer["spentEpsilon"]) + Decimal(answer["reservedEpsilon"])
    assert Decimal(answer["composedEpsilon"]) == total
    assert 4 < total < 6  # of ε = 4 and ε = 2: more than the larger, less than both
    text = world.run(capsys, "olga", "budget", "scans", "-n", world.a)[1]
    assert DIGEST[:12] in text
    assert f"composed by the accountant: ε = {answer['composedEpsilon']} (per image, δ = 1e-5" in text


def test_a_researcher_with_leave_sees_the_budget_and_no_entry(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "ada", "budget", "scans", "-n", world.a)
    assert code == 0
    assert "its entries are for its owner to see" in out
    assert DIGEST[:12] not in out
    (answer,) = json.loads(world.run(capsys, "ada", "budget", "-n", world.a, "--json")[1])["datasets"][:1]
    assert answer["entries"] is None
    assert answer["composedEpsilon"]


def test_without_the_owners_leave_a_budget_is_no_business_of_a_researcher(world: World, capsys: Any) -> None:
    code, out, err = world.run(capsys, "ada", "budget", "-n", world.b)
    assert (code, out) == (78, "")
    assert "feddiff-budget-reader" in err
    assert "Traceback" not in err


def test_an_entry_removed_behind_the_ledgers_back_is_said(world: World, capsys: Any) -> None:
    """The status still looks well; the command finds it out by itself."""
    world.add_dataset(world.a, "robbed")
    job = world.add_job("thief", dataset="robbed")
    entry = dataclasses.replace(
        world.entries[f"{world.a}/scans"][0] if world.entries[f"{world.a}/scans"] else world.charge(job, world.a, "a"),
        name="prl-gone",
    )
    world.entries[f"{world.a}/robbed"] = [entry]
    world.write_books(world.a, "robbed")
    code, out, _ = world.run(capsys, "olga", "budget", "robbed", "-n", world.a)
    assert code == 0
    assert "DOES NOT ADD UP: the account counts 1 entries, 0 exist" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith(f"{world.a}/robbed ")]
    assert row[4] == "-", "nobody may count on what remains"


# ---- logs --------------------------------------------------------------------------------------------------------


class FakeKubelet(http.server.BaseHTTPRequestHandler):
    """Answers for every container with one line that names it."""

    def do_GET(self) -> None:
        _, kind, namespace, _pod, container = self.path.partition("?")[0].split("/")
        body = f"{kind} of {namespace}, {container}: done 100 %\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def fake_node(world: World) -> Iterator[str]:
    """The name of a node whose kubelet is this test."""
    certificate, key = world.control_plane.authority.server("fake-kubelet", ["127.0.0.1"])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeKubelet)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    name = f"node-{world.research}"
    world.create("/api/v1/nodes", {"metadata": {"name": name}})
    port = {"kubeletEndpoint": {"Port": server.server_address[1]}}
    addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
    world.set_status(f"/api/v1/nodes/{name}", lambda _: {"addresses": addresses, "daemonEndpoints": port})
    yield name
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def running_job(world: World, fake_node: str) -> FederatedDiffusionJob:
    """The shared trainer's two ranks and b's release run on the node."""
    job = world.add_job("runs")
    for batch, count in (
        (world.start(job, Stage.TRAIN_SHARED, "", {}), 2),
        (world.start(job, Stage.RELEASE, "b", {}), 1),
    ):
        for pod in world.pods(batch, count):
            namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
            binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": fake_node}}
            world.create(f"/api/v1/namespaces/{namespace}/pods/{name}/binding", binding)
            started = {"name": "stage", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
            whole = {"ready": True, "restartCount": 0, "image": IMAGE, "imageID": "", "started": True}
            world.set_pod_status(pod, {"phase": "Running", "containerStatuses": [{**started, **whole}]})
    return job


def test_a_researcher_reads_the_log_of_every_rank(world: World, running_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "ada", "logs", "runs", "-n", world.research)
    assert code == 0
    headers = [line for line in out.splitlines() if line.startswith("==> fd-train-shared-")]
    assert len(headers) == 2
    assert "-1-0-" in headers[0] and "-1-1-" in headers[1]
    assert out.count(f"containerLogs of {world.research}, stage: done 100 %") == 2


def test_an_owners_log_is_the_owners_to_read_and_a_researcher_is_told_how(
    world: World, running_job: Any, capsys: Any
) -> None:
    asked = ["logs", "runs", "--client", "b", "--stage", "release"]
    code, out, err = world.run(capsys, "ada", *asked, "-n", world.research)
    assert (code, out) == (78, "")
    advised = f"feddiff logs {world.research}/runs -n {world.b} --client b --stage release"
    assert f"stay in {world.b}, where you may not read them; its owner can: {advised}" in err
    code, out, err = world.run(capsys, "oskar", *advised.split()[1:])
    assert (code, out, err) == (0, f"containerLogs of {world.b}, stage: done 100 %\n", "")


def test_logs_as_json_name_the_pod(world: World, running_job: Any, capsys: Any) -> None:
    code, out, _ = world.run(capsys, "oskar", "logs", "runs", "-n", world.b, "--json")
    (pod,) = json.loads(out)["pods"]
    assert (code, pod["stage"], pod["client"], pod["attempt"]) == (0, "release", "b", "1")
    assert pod["lines"] == [f"containerLogs of {world.b}, stage: done 100 %"]


def test_pods_without_logs_are_readable_for_a_platform_engineer_and_no_more(
    world: World, running_job: Any, capsys: Any
) -> None:
    code, out, err = world.run(capsys, "pete", "logs", "runs", "-n", world.research)
    assert (code, out) == (78, "")
    assert "pods/log" in err


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (["--client", "c"], 64, "has no such client; it has a, b"),
        (["--stage", "release"], 64, "name one with --client: a, b"),
        (["--stage", "released"], 64, "expected one of release, train-shared"),
        (["--client", "a", "--stage", "report"], 64, "is of the whole job"),
        (["--stage", "report"], 66, "no attempt of report has been started"),
    ],
)
def test_a_log_that_is_not_meant_or_not_there_is_said(
    world: World, running_job: Any, capsys: Any, arguments: list[str], expected: int, words: str
) -> None:
    code, out, err = world.run(capsys, "ada", "logs", "runs", "-n", world.research, *arguments)
    assert (code, out) == (expected, "")
    assert words in err


def test_the_log_of_a_pod_without_a_node_is_not_there_yet(world: World, waiting_job: Any, capsys: Any) -> None:
    code, out, err = world.run(capsys, "oskar", "logs", "waits", "-n", world.b)
    assert (code, out) == (66, "")
    assert "it has no log yet" in err


def test_the_log_of_a_pod_that_is_gone_says_what_it_left(world: World, failed_job: Any, capsys: Any) -> None:
    code, _, err = world.run(capsys, "oskar", "logs", "broke", "-n", world.b)
    assert code == 66
    assert "it has no pods; what is known: spec or data invalid" in err


# ---- how a cluster is found, and what is said when it is not ------------------------------------------------------


@pytest.mark.parametrize("arguments", [["status"], ["why"], ["budget"], ["logs"]])
def test_what_does_not_exist_ends_with_66(world: World, capsys: Any, arguments: list[str]) -> None:
    where = world.a if arguments == ["budget"] else world.research
    user = "olga" if arguments == ["budget"] else "ada"
    code, out, err = world.run(capsys, user, *arguments, "nowhere", "-n", where)
    assert (code, out) == (66, "")
    assert f"{where}/nowhere" in err
    assert "context test" in err


@pytest.mark.parametrize("arguments", [["status"], ["why", "waits"], ["budget"], ["logs", "waits"]])
def test_who_may_nothing_is_told_so_with_78(world: World, capsys: Any, arguments: list[str]) -> None:
    code, out, err = world.run(capsys, "eve", *arguments, "-n", world.research)
    assert (code, out) == (78, "")
    assert 'User "eve" cannot' in err
    assert len(err.splitlines()) == 1


def kubeconfig(tmp_path: Path, user: Path, **changed: Any) -> Path:
    document = json.loads(user.read_text())
    document["clusters"][0]["cluster"].update(changed)
    path = tmp_path / "config"
    path.write_text(json.dumps(document))
    return path


def test_an_api_server_that_does_not_answer_ends_with_69(world: World, tmp_path: Path, capsys: Any) -> None:
    path = kubeconfig(tmp_path, world.users["ada"], server="https://127.0.0.1:1")
    code = command._exit_code(lambda: command.app(["status", "--kubeconfig", str(path)]))
    said = capsys.readouterr()
    assert (code, said.out) == (69, "")
    assert said.err.startswith("feddiff: https://127.0.0.1:1 does not answer")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "arguments", "expected", "words"),
    [
        ("", [], 78, "file is empty"),
        ("{]", [], 78, ""),
        ("[]", [], 78, ""),
        (None, ["--context", "other"], 64, "--context other: the kubeconfig has test"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_one_line(
    world: World, tmp_path: Path, capsys: Any, text: str | None, arguments: list[str], expected: int, words: str
) -> None:
    path = tmp_path / "config"
    path.write_text(world.users["ada"].read_text() if text is None else text)
    code = command._exit_code(lambda: command.app(["status", "--kubeconfig", str(path), *arguments]))
    said = capsys.readouterr()
    assert (code, said.out) == (expected, "")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_a_cluster_without_feddiff_is_told_from_one_without_the_job(world: World, capsys: Any) -> None:
    from feddiff.on_cluster import Kind, connect

    unknown = Kind("apis/feddiff.dev/v1alpha1", "unheardofs", "")
    with (
        connect(world.control_plane.kubeconfig, None, None) as cluster,
        pytest.raises(Exception, match="install feddiff"),
    ):
        cluster.get(unknown, "default", "any")


def test_without_the_kubernetes_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['kubernetes'] = None; sys.argv = ['feddiff', 'why', 'job']\n"
        "import feddiff.main; feddiff.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "feddiff: a cluster needs one more package: pip install 'feddiff[operator]'\n"


def test_status_of_a_name_alone_means_a_folder_and_says_how_to_mean_a_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command._exit_code(lambda: command.app(["status", "first"])) == 66
    err = capsys.readouterr().err
    assert "a job on a cluster: feddiff status first -n NAMESPACE" in err


def test_status_alone_means_a_cluster_and_says_how_to_mean_a_folder() -> None:
    script = (
        "import sys; sys.modules['kubernetes'] = None; sys.argv = ['feddiff', 'status']\n"
        "import feddiff.main; feddiff.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines()[-1] == "feddiff: a run on this machine: feddiff status DIR"


def test_kubectl_feddiff_always_means_a_cluster(world: World, waiting_job: Any, tmp_path: Path) -> None:
    """Through kubectl itself, which runs an executable `kubectl-feddiff` on the path."""
    plugin = tmp_path / "kubectl-feddiff"
    plugin.write_text(f"#!{sys.executable}\nfrom feddiff.main import kubectl_plugin\nkubectl_plugin()\n")
    plugin.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KUBECONFIG": str(world.users["ada"]),
    }
    program = str(world.control_plane.programs / "kubectl")
    asked = [program, "feddiff", "status", f"{world.research}/waits"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Job {world.research}/waits: Releasing" in done.stdout
    usage = subprocess.run([program, "feddiff", "status", "-h"], capture_output=True, text=True, env=environment)
    assert usage.stdout.startswith("Usage: kubectl feddiff status")


def test_all_namespaces_with_a_job_is_a_contradiction(world: World, capsys: Any) -> None:
    code, _, err = world.run(capsys, "ada", "status", "waits", "-A")
    assert code == 64
    assert "leave one out" in err


def test_nothing_is_ever_written(
    world: World, waiting_job: Any, failed_job: Any, running_job: Any, capsys: Any
) -> None:
    """By the API server's own audit log: the users of these commands have only ever read."""
    who = {"ada", "olga", "oskar", "pete", "eve"}
    verbs = set()
    for line in world.control_plane.audit_log.read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] in who and event["userAgent"].startswith("OpenAPI-Generator"):
            verbs.add(event["verb"])
    assert verbs == {"get", "list"}


def test_the_roles_bound_here_are_the_charts() -> None:
    text = (CHART / "templates" / "roles.yaml").read_text()
    for role in {role for bound in BINDINGS.values() for role, _ in bound}:
        assert f"name: {role}\n" in text
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["name"] == "feddiff"
