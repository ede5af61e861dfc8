"""Every fault that a job must survive: when it strikes, what it does, and how the job ends.

A fault is a function of an `Experiment`, one job under way on a federation that may be broken. It waits for its moment,
by what can be seen, strikes, and takes the cause away again; then `carry_out` waits for the end and looks at
everything.
"""

import http.client
import json
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from cluster.evidence import Evidence, gather, wrongs
from cluster.federation import RESEARCH, SYSTEM, OwnFederation, owner_file
from cluster.gate import Gate, Held
from cluster.kubernetes import CommandFailed
from cluster.weed import Weed
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import METRICS_PORT_VARIABLE

T = TypeVar("T")
Object = dict[str, Any]

OWNERS = ("clinic-a", "clinic-b")
DIGITS = 4  # of ten: every stage is short
LOOK_SECONDS = 0.2
BATCH = 64
PATIENCE_SECONDS = 900.0
SHORT, SLOW = 32_000, 2_000.0  # images of a training, and images per second
JOBS = "/apis/feddiff.dev/v1alpha1/namespaces/research/federateddiffusionjobs"


# ---- A federation to break


@dataclass
class Laboratory:
    """A federation, the gate between its pods and the S3 server, a disk of 4 MB for clinic-a's second dataset, and how
    fast this machine trains."""

    world: OwnFederation
    gate: Gate
    disk: Path
    images_per_second: float = 0.0  # while the shared denoiser is trained


def onboard(laboratory: Laboratory, records: Path) -> None:
    """Both owners have declared their records; their pods reach the S3 server through the gate."""
    world = laboratory.world
    for owner in OWNERS:
        spec = dataset_spec(owner, _write_records(records, owner))
        world.onboard(owner, records / owner, owner_file(world.folder / f"{owner}.yaml", owner, spec))
        if owner == "clinic-a":
            world.apply(*on_a_disk(owner, spec, laboratory.disk))
    secrets = [(RESEARCH, "federation-trainer")]
    secrets += [(owner, name) for owner in OWNERS for name in ("own-store", "federation-store")]
    address = json.dumps({"stringData": {"AWS_ENDPOINT_URL": laboratory.gate.endpoint}})
    for namespace, name in secrets:
        world.node.kubectl("patch", "secret", name, "-n", namespace, "-p", address)


def _write_records(records: Path, owner: str) -> list[int]:
    """The first digits of the owner's scans; how many it has of each."""
    for name in ("holdout", "train"):
        file = records / owner / f"{name}.npz"
        with np.load(file) as scans:
            few = scans["labels"] < DIGITS
            images, labels = scans["images"][few], scans["labels"][few]
        np.savez(file, images=images, labels=labels)
    return [int(count) for count in np.bincount(labels, minlength=DIGITS)]


def dataset_spec(owner: str, counts: list[int]) -> Object:
    threads = [{"name": "OMP_NUM_THREADS", "value": "1"}]
    return {
        "source": {"format": "npz", "path": "train.npz", "holdoutPath": "holdout.npz", "volumeClaim": "scans"},
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": DIGITS, "records": counts},
        "budget": {"epsilon": "50", "delta": "0.00001", "unit": "image"},
        "access": [{"namespace": RESEARCH, "maxEpsilon": "10"}],
        "store": {"uri": f"s3://{owner}/feddiff", "secretName": "own-store"},
        "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
        "podTemplate": {"spec": {"containers": [{"env": threads}]}},
    }


def on_a_disk(owner: str, spec: Object, disk: Path) -> tuple[Object, ...]:
    """The same records as a dataset `on-disk`, whose store is a volume of limited size."""
    size, modes = {"storage": "4Mi"}, {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    there = {
        "capacity": size,
        "hostPath": {"path": str(disk), "type": "Directory"},
        "claimRef": {"namespace": owner, "name": "disk"},
    }
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk", "namespace": owner}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{owner}-disk"}}
    (container,) = spec["podTemplate"]["spec"]["containers"]
    mounted = {**container, "volumeMounts": [{"name": "disk", "mountPath": "/store"}]}
    pod = {"containers": [mounted], "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}]}
    dataset = {**spec, "store": {"uri": "file:///store"}, "podTemplate": {"spec": pod}}
    return (
        {**volume, "spec": there | modes},
        {**claim, "spec": {"resources": {"requests": size}} | modes},
        {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "PrivateDataset",
            "metadata": {"name": "on-disk", "namespace": owner},
            "spec": dataset,
        },
    )


# ---- One job under way


@dataclass(frozen=True)
class Fault:
    """`strike` waits for its moment, breaks something and mends it. The job then ends as `end` says, "" if it is gone
    by then. `attempts` are expected of the stages that it hit; of all others one, unless `any_attempts`."""

    name: str
    strike: Callable[["Experiment"], None]
    attempts: Mapping[StageKey, int] = field(default_factory=dict)
    any_attempts: bool = False
    end: str = "Complete"
    trains_for: float = 0.0  # seconds of the shared denoiser, at least; as short as can be otherwise
    dataset_a: str = "scans"
    in_ci: bool = False


@dataclass
class Experiment:
    laboratory: Laboratory
    fault: Fault
    name: str
    uid: str
    struck: list[float] = field(default_factory=list)
    hit: set[StageKey] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def world(self) -> OwnFederation:
        return self.laboratory.world

    # -- seeing

    def ask(self, path: str, **query: str) -> Any:
        """The API server's answer, None where nothing is."""
        asked = "&".join(f"{key}={value}" for key, value in query.items())
        status, answer = self.world.node.request("GET", f"{path}?{asked}" if asked else path)
        if status == 404:
            return None
        if status != 200:
            raise ConnectionError(f"{path}: {status}")
        return answer

    def wait(self, what: str, good: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
        """What `good` returns, once that is something. An API server that does not answer is asked again."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError, http.client.HTTPException):
                if found := good():
                    return found
                if self.fault.end != "Failed" and self.phase() == "Failed":
                    pytest.fail(f"the job failed, waiting for {what}\n{self.world.what_went_wrong()}", pytrace=False)
            if time.monotonic() > deadline:
                pytest.fail(f"not in {seconds} s: {what}\n{self.world.what_went_wrong()}", pytrace=False)
            time.sleep(LOOK_SECONDS)

    def job(self) -> Object | None:
        return self.ask(f"{JOBS}/{self.name}")

    def phase(self) -> str:
        """The job's; "" before it has one, and once it is gone."""
        return ((self.job() or {}).get("status") or {}).get("phase", "")

    def jobs(self) -> list[Object]:
        return self.ask("/apis/batch/v1/jobs", labelSelector=f"feddiff.dev/job-uid={self.uid}")["items"]

    def pods(self, stage: Stage, client: str = "") -> list[Object]:
        """The stage's pods whose container runs, ranks in order."""
        wanted = {"job-uid": self.uid, "stage": stage.value} | ({"client": client} if client else {})
        labels = ",".join(f"feddiff.dev/{key}={value}" for key, value in wanted.items())
        pods = self.ask("/api/v1/pods", labelSelector=labels)["items"]
        return sorted((each for each in pods if _runs(each)), key=lambda pod: pod["metadata"]["name"])

    def attempts(self) -> dict[StageKey, int]:
        found: dict[StageKey, int] = defaultdict(int)
        for job in self.jobs():
            found[_key(job)] += 1
        return found

    def done(self) -> set[StageKey]:
        return {_key(job) for job in self.jobs() if "feddiff.dev/receipt" in job["metadata"].get("annotations", {})}

    def log(self, pod: Object) -> str:
        with suppress(CommandFailed):  # it is gone, or the API server is
            return self.world.node.kubectl("logs", "-n", pod["metadata"]["namespace"], pod["metadata"]["name"])
        return ""

    def one(self, stage: Stage, client: str = "") -> Object:
        """The stage's pod, once it runs."""
        return self.wait(f"{stage} of {client or 'the job'} runs", lambda: self.pods(stage, client))[0]

    def ranks(self, known: Collection[str] = ()) -> list[Object]:
        """The pods of train-shared, once they train; others than the `known` ones."""

        def training() -> list[Object]:
            pods = [pod for pod in self.pods(Stage.TRAIN_SHARED) if pod["metadata"]["name"] not in known]
            return pods if len(pods) == 2 and self.progress(pods[0]) else []

        return self.wait("two ranks train", training)

    def progress(self, rank_0: Object) -> list[int]:
        """How many images it had seen, whenever it said so."""
        return [event["done"] for event in self.events(rank_0)]

    def events(self, rank_0: Object) -> list[Object]:
        """What it said of its progress."""
        return [json.loads(line) for line in self.log(rank_0).splitlines() if '"event": "progress"' in line]

    def here(self, held: Held) -> None:
        """The request that was to be kept is at the gate."""
        self.wait(held.pattern.pattern, lambda: held.wait(0))

    # -- doing

    def strikes(self, what: str) -> None:
        """This is about to happen, and to hit the stages that run."""
        self.struck.append(time.monotonic())
        self.notes.append(what)
        self.hit |= {_key(job) for job in self.jobs() if job.get("status", {}).get("active")} - self.done()

    def kill(self, pod: Object) -> None:
        assert self.world.kill(pod), f"{pod['metadata']['name']} runs no process"

    def patch(self, **spec: Any) -> None:
        self.world.node.kubectl(
            "patch", "fdj", self.name, "-n", RESEARCH, "--type=merge", "-p", json.dumps({"spec": spec})
        )

    def hold(self, what: str, answered: bool = False, most: int = 1) -> Held:
        """Keeps a PUT: `what` follows the bucket, {uid} stands for the job's."""
        return self.laboratory.gate.hold(f"PUT {what.format(uid=self.uid)}", most, answered)


def _runs(pod: Object) -> bool:
    states = [each.get("state") or {} for each in pod["status"].get("containerStatuses") or []]
    return any("running" in each for each in states)


def _key(job: Object) -> StageKey:
    labels = job["metadata"]["labels"]
    return Stage(labels["feddiff.dev/stage"]), labels.get("feddiff.dev/client", "")


# ---- The faults

SEAL, ATTEMPT = "/%s/feddiff/releases/[^/]+/seal.json", "/%s/feddiff/releases/[^/]+/attempts/"
SHARD, MANIFEST = "/federation/jobs/{uid}/clients/%s/shards/", "/federation/jobs/{uid}/clients/%s/manifest.json"
RELEASE_A, RELEASE_B = (Stage.RELEASE, "clinic-a"), (Stage.RELEASE, "clinic-b")
SHARED: StageKey = (Stage.TRAIN_SHARED, "")


def nothing(x: Experiment) -> None:
    """For comparison; how fast this machine trains is seen on the way."""
    rank_0, _ = x.ranks()
    half = x.wait("half of the training", lambda: [each for each in x.events(rank_0) if each["done"] > SHORT // 2])
    x.laboratory.images_per_second = half[0]["images_per_second"]


def clients_killed_during_upload(x: Experiment) -> None:
    """One before the server has seen its shard, which then comes late; one whose manifest is there, but who never
    hears of it."""
    shard, manifest = x.hold(SHARD % "clinic-a"), x.hold(MANIFEST % "clinic-b", answered=True)
    x.here(shard)
    x.here(manifest)
    x.strikes(
        "kill -9 of both client pods, one while its shard is on its way, one while its manifest is being answered"
    )
    for owner in OWNERS:
        x.kill(x.one(Stage.RELEASE, owner))
    x.wait("the second attempts have released", lambda: {RELEASE_A, RELEASE_B} <= x.done())
    shard.let_go()
    manifest.let_go()


def one_rank_killed(x: Experiment) -> None:
    _, rank_1 = x.ranks()
    x.strikes("kill -9 of rank 1")
    x.kill(rank_1)


def both_ranks_killed(x: Experiment) -> None:
    """Once a checkpoint is in the store, from which their successors go on."""
    ranks, prefix = x.ranks(), f"jobs/{x.uid}/shared/checkpoints/"
    kept = x.wait("a checkpoint", lambda: [key for key in x.world.keys("federation") if key.startswith(prefix)])
    images = BATCH * max(int(key.removeprefix(prefix).partition("-")[0]) for key in kept)
    x.strikes(f"kill -9 of both ranks, a checkpoint of {images:,} images in the store")
    for pod in ranks:
        x.kill(pod)
    again = x.ranks(known={pod["metadata"]["name"] for pod in ranks})
    first = x.progress(again[0])[0]
    x.notes.append(f"the next attempt goes on: its first word is of image {first:,}")
    assert first >= images


def operator_killed(x: Experiment, times: int = 20) -> None:
    """The one that leads, and its pod with it: the kubelet would let a container wait longer after each death."""
    dead: set[str] = set()
    for number in range(times):
        leader = x.wait("an operator leads", lambda: _leader(x, dead))
        moment = random.uniform(0, 3)
        time.sleep(moment)
        x.strikes(f"kill -9 of the leading operator, {moment:.1f} s after it began")
        assert x.phase() not in ("Complete", "Failed", ""), f"the job had ended before death {number + 1}"
        x.kill(leader)
        dead.add(leader["metadata"]["name"])
        x.world.node.kubectl("delete", "pod", leader["metadata"]["name"], "-n", SYSTEM, "--force", "--grace-period=0")
    x.notes[-times:] = [f"kill -9 of the leading operator, {times} times, up to 3 s after it began to lead"]


def _leader(x: Experiment, dead: set[str]) -> Object | None:
    lease = x.ask(f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/feddiff-operator")
    name = lease["spec"].get("holderIdentity", "").rpartition("-")[0]
    pod = x.ask(f"/api/v1/namespaces/{SYSTEM}/pods/{name}") if name and name not in dead else None
    return pod if pod and _runs(pod) else None


def api_server_killed(x: Experiment) -> None:
    for phase in ("Releasing", "Training", "Sampling"):
        x.wait(phase, lambda phase=phase: x.phase() == phase)
        x.strikes(f"kill -9 of the API server while {phase.lower()}, gone for 5 s")
        x.world.node.kill("kube-apiserver")
        time.sleep(5)
        x.world.node.start("kube-apiserver")
        x.wait("the API server", x.job)


def store_gone_for_a_minute(x: Experiment) -> None:
    shard = x.hold(SHARD % "clinic-a")
    x.here(shard)
    x.strikes("kill -9 of SeaweedFS during an upload, gone for 60 s")
    with _gone(x.world.store):
        shard.let_go()


@contextmanager
def _gone(store: Weed) -> Iterator[None]:
    """For a minute, and for what is done meanwhile."""
    back = time.monotonic() + 60
    store.stop()
    yield
    time.sleep(max(0.0, back - time.monotonic()))
    store.start()


def full_disk(x: Experiment) -> None:
    """Full from the beginning, so that the release finds no room for its shard; room comes after the first attempt."""
    ballast = x.laboratory.disk / "ballast"
    x.struck.append(time.monotonic())
    x.notes.append("the volume that holds clinic-a's store is full when the release begins")
    x.hit.add(RELEASE_A)
    with suppress(OSError):
        ballast.write_bytes(bytes(8 << 20))
    x.wait("the first attempt has failed", lambda: x.attempts()[RELEASE_A] == 2)
    ballast.unlink()


def ranks_cut_off(x: Experiment) -> None:
    """Rank 1's packets to and from rank 0 are dropped in its own network namespace."""
    rank_0, rank_1 = x.ranks()
    x.strikes("all packets between the ranks dropped for 30 s")
    with _cut_off(min(x.world.processes(rank_1)), rank_0["status"]["podIP"]):
        time.sleep(2)
        before = x.progress(rank_0)[-1]
        time.sleep(28)
        after = x.progress(rank_0)[-1]
    assert after == before, "the cut did not stop the training"


@contextmanager
def _cut_off(process: int, other: str) -> Iterator[None]:
    rules = (["INPUT", "-s", other, "-j", "DROP"], ["OUTPUT", "-d", other, "-j", "DROP"])
    for action in ("-A", "-D"):
        for rule in rules:
            subprocess.run(["nsenter", "-t", str(process), "-n", "iptables", action, *rule], check=True)
        if action == "-A":
            yield


def rebooted(x: Experiment) -> None:
    """Once in the middle of an upload, once in the middle of training: every process of node and S3 server."""
    shard = x.hold(SHARD % "clinic-a")
    x.here(shard)
    x.strikes("every process of the node killed during an upload, started again")
    _reboot(x.laboratory)
    shard.let_go()
    x.ranks()
    x.strikes("and again while the ranks train")
    _reboot(x.laboratory)


def _reboot(laboratory: Laboratory) -> None:
    laboratory.world.store.stop()
    laboratory.world.node.down()
    laboratory.world.node.up()
    laboratory.world.store.start()


def zombie(x: Experiment) -> None:
    """The pod is deleted by force, and its process lives on where no kubelet finds it: about to write its seal, which
    it does once the next attempt has released."""
    _zombie(x, x.hold(SEAL % "clinic-b", most=2))


def _zombie(x: Experiment, seals: Held) -> None:
    x.here(seals)
    pod = x.one(Stage.RELEASE, "clinic-b")
    with _lives_on(min(x.world.processes(pod)), x.world.folder / "zombie.log") as twin:
        x.wait("the zombie is about to seal", lambda: seals.wait(0, num=2))
        x.strikes("client pod deleted by force; its process lives on, and seals when its successor has released")
        name = pod["metadata"]["name"]
        x.world.node.kubectl("delete", "pod", name, "-n", "clinic-b", "--force", "--grace-period=0")
        x.wait("the next attempt has released", lambda: RELEASE_B in x.done())
        seals.let_go()
        code = twin.wait(120)
    assert code == 0, f"a zombie that loses sends what won, which is there; found {code}"
    x.notes.append("the zombie lost, and ended with 0")


def _lives_on(process: int, log: Path) -> "subprocess.Popen[bytes]":
    """The container's process once more: its files, its user, its secrets, outside of what the kubelet ends."""
    folder = Path(f"/proc/{process}")
    command = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    environment = dict(each.split(b"=", 1) for each in (folder / "environ").read_bytes().split(b"\0") if each)
    del environment[METRICS_PORT_VARIABLE.encode()]  # this machine's port may be taken
    enter = [b"nsenter", b"-t", str(process).encode(), b"-m", b"-S", b"65532", b"-G", b"65532"]
    with log.open("wb") as file:
        return subprocess.Popen([*enter, *command], env=environment, stdout=file, stderr=file)


def deleted_in_training(x: Experiment) -> None:
    x.ranks()
    x.strikes("job deleted while the ranks train")
    _delete(x)


def deleted_during_upload(x: Experiment) -> None:
    shard = x.hold(SHARD % "clinic-a")
    x.here(shard)
    x.strikes("job deleted while a shard is on its way, which then comes late")
    _delete(x)
    shard.let_go()


def _delete(x: Experiment) -> None:
    x.world.node.kubectl("delete", "fdj", x.name, "-n", RESEARCH, "--wait=false")
    x.wait("the job is gone", lambda: x.job() is None)
    left = ("jobs,pods,configmaps,services", "--all-namespaces", "-l", f"feddiff.dev/job-uid={x.uid}")
    x.wait("its children are gone", lambda: not x.world.get(*left))


def suspended_at_every_stage(x: Experiment) -> None:
    for stage in (Stage.RELEASE, Stage.TRAIN_SHARED, Stage.SAMPLE, Stage.EVALUATE, Stage.REPORT):
        x.one(stage)
        x.strikes(f"suspended in {stage.value}")
        x.patch(suspend=True)
        # A report that was nearly done ends the job all the same.
        x.wait("a stop", lambda: x.phase() in ("Suspended", "Complete") and not any(map(_active, x.jobs())))
        x.patch(suspend=False)
        x.wait("resumed", lambda: x.phase() != "Suspended")


def _active(job: Object) -> int:
    return job.get("status", {}).get("active", 0) + job.get("status", {}).get("terminating", 0)


def five_at_once(x: Experiment) -> None:
    """Client killed during upload, zombie, one rank killed, store gone for a minute, operator killed five times."""
    shard, seals = x.hold(SHARD % "clinic-a"), x.hold(SEAL % "clinic-b", most=2)
    x.here(shard)
    x.strikes("kill -9 of a client pod while its shard is on its way")
    x.kill(x.one(Stage.RELEASE, "clinic-a"))
    _zombie(x, seals)
    shard.let_go()
    ranks = x.ranks()
    x.strikes("kill -9 of rank 1")
    x.kill(ranks[1])
    x.ranks(known={pod["metadata"]["name"] for pod in ranks})
    x.strikes("kill -9 of SeaweedFS while the next attempt trains, gone for 60 s")
    with _gone(x.world.store):
        operator_killed(x, 5)


def never_reports(x: Experiment) -> None:
    """Every attempt of clinic-b dies before it has sealed anything."""
    for _ in range(4):
        shard = x.hold(ATTEMPT % "clinic-b")
        x.here(shard)
        x.strikes("kill -9 of the client pod before it seals")
        x.kill(x.one(Stage.RELEASE, "clinic-b"))
        shard.let_go()
        if len(x.struck) < 4:
            number = len(x.struck) + 1
            x.wait("the next attempt", lambda number=number: x.attempts()[RELEASE_B] == number)
    x.notes[:] = ["kill -9 of the client pod in all of its four attempts, before it seals"]


FAULTS = (
    Fault("nothing, for comparison", nothing),
    Fault("five at once", five_at_once, any_attempts=True, in_ci=True),
    Fault("client pods killed during upload", clients_killed_during_upload, {RELEASE_A: 2, RELEASE_B: 2}),
    Fault("one rank killed", one_rank_killed, {SHARED: 2}),
    Fault("both ranks killed", both_ranks_killed, {SHARED: 2}, trains_for=150),
    Fault("operator killed 20 times", operator_killed, trains_for=400),
    Fault("API server killed", api_server_killed),
    Fault("object store gone for a minute", store_gone_for_a_minute, any_attempts=True),
    Fault("full disk", full_disk, {RELEASE_A: 2}, dataset_a="on-disk"),
    Fault("network cut between ranks", ranks_cut_off, trains_for=90),
    Fault("node rebooted", rebooted, any_attempts=True, trains_for=60),
    Fault("zombie pod", zombie, {RELEASE_B: 2}),
    Fault("job deleted in training", deleted_in_training, end=""),
    Fault("job deleted during upload", deleted_during_upload, end=""),
    Fault("suspended and resumed at every stage", suspended_at_every_stage, any_attempts=True),
    Fault("client that never reports", never_reports, {RELEASE_B: 4}, end="Failed"),
)


# ---- Carrying one out


@dataclass(frozen=True)
class Outcome:
    """What became of a fault's job; seconds count from its creation."""

    fault: Fault
    notes: tuple[str, ...]
    struck: float | None  # for the first time
    recovered: float | None  # when all stages that were hit were done
    ended: float
    attempts: Mapping[StageKey, int]
    wrongs: tuple[str, ...]
    evidence: Evidence


def carry_out(laboratory: Laboratory, fault: Fault, number: int) -> Outcome:
    """A fresh job, the fault in it, and what is to be seen afterwards."""
    began = time.monotonic()
    name = f"chaos-{number}"
    laboratory.world.apply(job_document(name, fault, shared_images(fault, laboratory.images_per_second)))
    uid = laboratory.world.job(name)["metadata"]["uid"]
    x = Experiment(laboratory, fault, name, uid)
    fault.strike(x)
    attempts: dict[StageKey, int] = {}
    recovered = None
    if fault.end:
        if x.hit and fault.end == "Complete":
            x.wait("all that was hit is done", lambda: x.hit <= x.done())
            recovered = time.monotonic() - began
        x.wait(fault.end, lambda: x.phase() == fault.end)
        attempts = dict(x.attempts())
    ended = time.monotonic() - began
    datasets = {"clinic-a": fault.dataset_a, "clinic-b": "scans"}
    folders = {"clinic-a": laboratory.disk}
    evidence = gather(laboratory.world, uid, datasets, folders, laboratory.gate.writes)
    found = [*wrongs(evidence, fault.end == "Complete"), *_of_attempts(fault, attempts)]
    struck = x.struck[0] - began if x.struck else None
    return Outcome(fault, tuple(x.notes), struck, recovered, ended, attempts, tuple(found), evidence)


def _of_attempts(fault: Fault, attempts: Mapping[StageKey, int]) -> list[str]:
    if fault.any_attempts or not fault.end:
        return []
    return [
        f"{stage.value} of {client or 'the job'} took {number} attempts, expected {expected}"
        for (stage, client), number in attempts.items()
        if number != (expected := fault.attempts.get((stage, client), 1))
    ]


def shared_images(fault: Fault, images_per_second: float) -> int:
    """How many the shared denoiser sees; a machine that has not trained yet counts as a slow one."""
    return max(SHORT, round(fault.trains_for * (images_per_second or SLOW)))


def job_document(name: str, fault: Fault, images: int = SHORT) -> Object:
    """As short as a job can be, and long enough in the shared training to be struck there."""
    threads = [{"name": "OMP_NUM_THREADS", "value": "1"}]
    clients = {"clinic-a": fault.dataset_a, "clinic-b": "scans"}
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {"name": name, "namespace": RESEARCH},
        "spec": {
            "clients": [{"name": o, "dataset": {"namespace": o, "name": d}} for o, d in clients.items()],
            "privacy": {
                "mechanism": "summary",
                "epsilon": "1",
                "delta": "0.00001",
                "clipNorm": "4.25",
                "momentClipNorm": "1.75",
            },
            "diffusion": {"splitSigma": "1"},
            "network": {"baseWidth": 8},
            "shared": {
                "images": images,
                "batch": BATCH,
                "learningRate": "1e-3",
                "replicas": 2,
                "podTemplate": {"spec": {"containers": [{"env": threads}]}},
            },
            "personal": {"images": 6400, "batch": BATCH, "learningRate": "1e-3", "releaseSigma": "0.25"},
            "sampling": {"imagesPerClass": 4, "steps": 4},
            "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
        },
    }
