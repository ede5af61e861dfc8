"""A whole federation on the tests' node: images, an S3 server with an identity per party, the chart, data owners, jobs.

    with federation(folder, ["clinic-a", "clinic-b"]) as world:
        world.install()                                   # the chart by helm, scope `cluster`
        for owner in world.owners:
            world.onboard(owner, records / owner, owner_file(owner, spec))
        with world.submit(job) as watch:                  # a FederatedDiffusionJob in namespace `research`
            watch.until(phase("Training"), 120)
            world.kill(world.pods(watch.uid, Stage.TRAIN_SHARED)[0])
            watch.until(phase("Complete"), 300)

`world.node` is a cluster.kubernetes.Node (kill, start and restart of each component; down and up are a reboot),
`world.store` a cluster.weed.Weed (stop and start keep what it holds, its address and its keys).
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from cluster.kubernetes import NODE_ADDRESS, PROGRAMS, RUN, CommandFailed, Node
from cluster.weed import ADMINISTRATOR, Weed, client_of, environment_in, federation_of
from feddiff_protocol.stages import Receipt, Stage

ROOT = Path(__file__).parents[2]
IMAGES = Path(os.environ.get("FEDDIFF_IMAGES", Path.home() / ".cache/feddiff/images"))
SYSTEM, RESEARCH = "feddiff-system", "research"
OPERATORS = ("-n", SYSTEM, "-l", "app.kubernetes.io/component=operator")
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
ENDED = ("Complete", "Failed")
Object = dict[str, Any]


# ---- What can be asked of a federation, and done to it


@dataclass
class Federation:
    """A node, an S3 server whose keys lie in `folder`/s3, and a namespace per owner beside the researcher's."""

    folder: Path
    node: Node
    owners: tuple[str, ...]

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (RESEARCH, *self.owners)

    def get(self, kinds: str, *flags: str) -> list[Object]:
        return json.loads(self.node.kubectl("get", kinds, "-o", "json", *flags))["items"]

    def apply(self, *documents: Object) -> None:
        """As JSON: PyYAML writes the text "1e-5" as what kubectl reads as a number."""
        everything = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.node.kubectl("apply", "-f", "-", stdin=json.dumps(everything))

    # ---- a job

    def job(self, name: str) -> Object:
        return json.loads(self.node.kubectl("get", "fdj", name, "-n", RESEARCH, "-o", "json"))

    def children(self, uid: str, kinds: str) -> list[Object]:
        """What the operator has made for a job, in every namespace."""
        return self.get(kinds, "--all-namespaces", "-l", f"feddiff.dev/job-uid={uid}")

    def receipts(self, uid: str) -> list[Receipt]:
        """What the job's finished stages said, in no order."""
        said = (job["metadata"].get("annotations", {}).get("feddiff.dev/receipt") for job in self.children(uid, "jobs"))
        return [Receipt.model_validate_json(each) for each in said if each]

    def pods(self, uid: str, stage: Stage, client: str = "") -> list[Object]:
        """A stage's pods, ranks in order."""
        chosen = {"feddiff.dev/stage": stage.value} | ({"feddiff.dev/client": client} if client else {})
        pods = [each for each in self.children(uid, "pods") if chosen.items() <= each["metadata"]["labels"].items()]
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    def events(self, name: str) -> list[Object]:
        return [each for each in self.get("events", "-n", RESEARCH) if each["involvedObject"]["name"] == name]

    def entries(self) -> list[Object]:
        """The ledger of all owners."""
        return self.get("prl", "--all-namespaces")

    # ---- pods as processes

    def processes(self, pod: Object) -> list[int]:
        """Of a pod's containers on this machine, without the one that holds its network."""
        containers = [each.get("containerID", "") for each in pod["status"].get("containerStatuses", ())]
        names = [name for each in containers if (name := each.rpartition("/")[2])]
        return [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and any(name in _cgroups(process) for name in names)
        ]

    def kill(self, pod: Object) -> list[int]:
        """The pod's processes are gone, as by kill -9; which they were. None if it runs none, or not yet."""
        processes = self.processes(pod)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return processes

    # ---- the store

    def keys_file(self, identity: str) -> Path:
        """An env file: of `trainer`, of an owner, of `federation-<owner>`, of the administrator."""
        return self.folder / f"s3/{identity}.env"

    def s3(self, identity: str = ADMINISTRATOR) -> Any:
        return client_of(environment_in(self.keys_file(identity)))

    def keys(self, bucket: str) -> list[str]:
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def object(self, identity: str, bucket: str, key: str) -> bytes:
        return self.s3(identity).get_object(Bucket=bucket, Key=key)["Body"].read()

    # ---- when something went wrong

    def what_went_wrong(self) -> str:
        """What a person would ask for first; what cannot be had is left out."""
        parts = []
        for question in (
            "get fdj,pds,jobs,pods -A -o wide",
            f"describe fdj -n {RESEARCH}",
            "get events -A --sort-by=.lastTimestamp",
            f"logs {' '.join(OPERATORS)} --tail=40",
            *(f"logs -n {namespace} -l feddiff.dev/stage --tail=20 --prefix" for namespace in self.namespaces),
        ):
            with contextlib.suppress(CommandFailed):
                parts.append(f"$ kubectl {question}\n{self.node.kubectl(*question.split())[-6000:]}")
        return "\n".join(parts)


def _cgroups(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cgroup").read_text()
    return ""


# ---- A job, seen as it goes


@dataclass
class Watch:
    """Every status of a job that a watch brings, in order, until the job has ended or the watch is left. An API server
    that goes away is asked again; what was written meanwhile is not seen."""

    world: Federation
    name: str
    on_status: Callable[[Object], None] = lambda status: None
    seen: list[tuple[float, Object]] = field(default_factory=list)  # when it came, in seconds of time.time()
    _news: threading.Condition = field(default_factory=threading.Condition)
    _left: threading.Event = field(default_factory=threading.Event)
    _kubectl: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        threading.Thread(target=self._follow, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._kubectl is not None:
            self._kubectl.kill()

    @property
    def uid(self) -> str:
        return self.world.job(self.name)["metadata"]["uid"]

    @property
    def statuses(self) -> list[Object]:
        return [status for _, status in self.seen]

    def until(self, good: Callable[[Object], bool], seconds: float) -> Object:
        """The first status since the job was applied that is good. Fails with all that is known when none comes in
        time, or when the job ends before."""
        with self._news:
            self._news.wait_for(lambda: any(good(each) or each["phase"] in ENDED for each in self.statuses), seconds)
            found = next((each for each in self.statuses if good(each)), None)
        if found is None:
            last = self.statuses[-1] if self.seen else "no status"
            pytest.fail(f"not within {seconds} s; last: {last}\n{self.world.what_went_wrong()}", pytrace=False)
        return found

    def has_ended(self, seconds: float) -> bool:
        """Whether the job has, now or within so many seconds."""
        with self._news:
            return self._news.wait_for(lambda: any(each["phase"] in ENDED for each in self.statuses), seconds)

    def _follow(self) -> None:
        kubeconfig = ["--kubeconfig", str(self.world.node.kubeconfig)]
        what = ["get", "fdj", "--field-selector", f"metadata.name={self.name}", "-n", RESEARCH, "--watch"]
        command = [PROGRAMS / "kubectl", *kubeconfig, *what, "-o", "json", "--output-watch-events"]
        while not self._left.is_set():
            with subprocess.Popen(command, stdout=-1, stderr=subprocess.DEVNULL, text=True) as kubectl:
                self._kubectl = kubectl
                assert kubectl.stdout
                for event in _documents(kubectl.stdout):
                    if self._left.is_set() or self._hear(event["object"].get("status")):
                        return kubectl.kill()
            self._left.wait(0.2)  # the API server is away

    def _hear(self, status: Object | str | None) -> bool:
        if not isinstance(status, dict) or "phase" not in status:  # an error has a word as its status
            return False
        if status not in self.statuses:
            with self._news:
                self.seen.append((time.time(), status))
                self._news.notify_all()
            self.on_status(status)
        return status["phase"] in ENDED


def phase(name: str) -> Callable[[Object], bool]:
    return lambda status: status["phase"] == name


def _documents(lines: Iterable[str]) -> Iterator[Object]:
    text = ""
    for line in lines:
        text += line
        with contextlib.suppress(ValueError):  # it goes on
            yield json.loads(text)
            text = ""


# ---- One that the tests start themselves


@dataclass
class OwnFederation(Federation):
    """A federation whose node and S3 server this process has started, and can break."""

    store: Weed

    def install(self, *flags: str) -> None:
        """The chart, by helm, in its default scope; the researcher's namespace lets the operator in."""
        for name in (SYSTEM, RESEARCH):
            metadata = {"name": name, "labels": RESTRICTED}
            self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        self.secret(RESEARCH, "federation-trainer", "trainer")
        chart = ("install", "feddiff", ROOT / "charts/feddiff", "--namespace", SYSTEM, "--wait", "--timeout", "3m")
        self.node.helm(*chart, "--set", f"jobNamespaces={{{RESEARCH}}}", *flags)

    def onboard(self, owner: str, records: Path, file: Path) -> None:
        """What an owner does: applies its file, and brings the records and the keys of both stores."""
        self.node.kubectl("apply", "-f", file)
        self.apply(*volume(owner, records))
        self.secret(owner, "own-store", owner)
        self.secret(owner, "federation-store", f"federation-{owner}")

    def secret(self, namespace: str, name: str, identity: str) -> None:
        keys = f"--from-env-file={self.keys_file(identity)}"
        self.node.kubectl("create", "secret", "generic", name, "-n", namespace, keys)

    def submit(self, job: Path | Object, on_status: Callable[[Object], None] = lambda status: None) -> Watch:
        """Applies the job, a file or an object; entering what comes back begins the watch."""
        document = yaml.safe_load(job.read_text()) if isinstance(job, Path) else job
        if isinstance(job, Path):
            self.node.kubectl("apply", "-f", job)
        else:
            self.apply(job)
        return Watch(self, document["metadata"]["name"], on_status)

    def operators(self) -> list[Object]:
        return self.get("pods", *OPERATORS)


@contextlib.contextmanager
def federation(
    folder: Path, owners: Sequence[str], clients: Mapping[str, str] | None = None
) -> Iterator[OwnFederation]:
    """A node with the images loaded and an S3 server beside it, one at a time on this machine; both end with it.

    `clients` says what an owner is called in the job, where it is not its own name.
    """
    need_node()
    with RUN.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Node(folder / "node") as node:
            node.load(IMAGES / "operator.tar", IMAGES / "trainer.tar")
            may = federation_of(owners, clients)
            with Weed(folder / "s3", may, ["federation", *owners], NODE_ADDRESS) as store:
                store.write_keys()
                yield OwnFederation(folder, node, tuple(owners), store)


def need_node() -> None:
    """Fails where no node with our images can run, and says what is missing."""
    if os.geteuid():
        pytest.fail("tests that run pods need root; `make test-local` leaves them out", pytrace=False)
    for missing in (path for path in (PROGRAMS / "kube", IMAGES / "trainer.tar") if not path.exists()):
        pytest.fail(f"{missing} is missing: run `make kube images`", pytrace=False)


# ---- What an owner writes


def owner_file(file: Path, owner: str, spec: Object, *argv: str) -> Path:
    """`file` holds what `feddiff owner init` prints, with the owner's own spec where it says CHANGE, and the address of
    the tests' store. The same file goes to `kubectl apply` and, lying beside the records, to `feddiff run`."""
    init = ["owner", "init", "--namespace", owner, "--research", RESEARCH, "--dataset", "scans", *argv]
    command = [sys.executable, "-m", "feddiff.main", *init]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    documents = [each for each in yaml.safe_load_all(printed) if each]
    for document in documents:
        if document["kind"] == "PrivateDataset":
            document["spec"] |= spec
    texts = (json.dumps(each, indent=1) for each in documents)  # with quotes: bare, 1e-5 is a number to kubectl
    file.write_text("".join(f"---\n{text}\n" for text in texts))
    return file


def volume(owner: str, records: Path) -> tuple[Object, Object]:
    """The folder as the owner's claim `scans`, on a cluster that provisions no volumes."""
    size, readers = {"storage": "1Gi"}, {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    there = {
        "capacity": size,
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": str(records.resolve()), "type": "Directory"},
        "claimRef": {"namespace": owner, "name": "scans"},
    }
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "scans", "namespace": owner}}
    kind = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{owner}-scans"}}
    return {**kind, "spec": there | readers}, {**claim, "spec": {"resources": {"requests": size}} | readers}
