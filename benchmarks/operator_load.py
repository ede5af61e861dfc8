"""How soon an operator under load reserves and starts: one JSON row.

    python benchmarks/operator_load.py [--jobs 200] [--clients 10] [--rate 2]

A real etcd, API server and controller-manager, the operator's own process with its default settings, and a kubelet that
answers at once for every pod. So many jobs a second are created, each of as many clients, each client with a namespace
and a budget for everything; the run ends when all jobs have. Seconds are counted from a job's creation: to the status
in which BudgetReserved is True, as a watch brings it, and to the creation of its first batch Job, as the audit log
says. All of it runs on one machine, so its cores are shared: the row says how many there are.

Needs the programs of tests/cluster/build.sh.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import batch_objects
from cluster.kubelet import Kubelet
from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, PDS, Cluster
from feddiff_operator.workloads import child_name
from feddiff_protocol.stages import Stage

Object = dict[str, Any]
ROOT = Path(__file__).parents[1]
USER = "operator"


class Seen:
    """When each job was first seen reserved, and which have ended: from a watch of its own, in a thread."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.reserved: dict[str, float] = {}
        self.phases: dict[str, str] = {}
        path = f"{FDJ.path(namespace)}?watch=1"
        self.thread = threading.Thread(target=self._watch, args=(plane, path), daemon=True)
        self.thread.start()

    def _watch(self, plane: ControlPlane, path: str) -> None:
        line = http.client.HTTPSConnection(plane.address, 6443, context=plane._administrator)
        line.request("GET", path, headers={"Accept": "application/json"})
        answer = line.getresponse()
        assert answer.status == 200, answer.read()
        with contextlib.suppress(OSError, http.client.HTTPException):  # the cluster is gone when the run is over
            while text := answer.readline():
                self._note(json.loads(text)["object"])

    def _note(self, job: Object) -> None:
        uid, status = job["metadata"]["uid"], job.get("status") or {}
        conditions = {each["type"]: each["status"] for each in status.get("conditions", ())}
        if conditions.get("BudgetReserved") == "True":
            self.reserved.setdefault(uid, time.time())
        self.phases[uid] = status.get("phase", "")

    @property
    def num_ended(self) -> int:
        return sum(phase in ("Complete", "Failed") for phase in self.phases.values())


def dataset(namespace: str, research: str) -> Object:
    spec = batch_objects.dataset(
        budget={"epsilon": "100000", "delta": "1e-3"}, access=[{"namespace": research}], image=IMAGE
    ).spec
    return document("PrivateDataset", namespace, "scans", spec)


def job(number: int, namespace: str, clinics: list[str]) -> Object:
    clients = [
        {"name": f"c{index}", "dataset": {"namespace": each, "name": "scans"}} for index, each in enumerate(clinics)
    ]
    return document("FederatedDiffusionJob", namespace, f"job-{number}", batch_objects.job(clients).spec)


IMAGE = {"channels": 1, "height": 8, "width": 8}


def document(kind: str, namespace: str, name: str, spec: Any) -> Object:
    dumped = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": "feddiff.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": dumped}


@contextlib.contextmanager
def operator(plane: ControlPlane, research: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "feddiff_operator", "--trainer-image=trainer:load", "--port=0"]
    environment = {**os.environ, "KUBECONFIG": str(plane.user(USER, ["system:masters"]))}
    with (folder / "operator.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--lease-namespace={research}"], env=environment, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


async def offer(cluster: Cluster, jobs: list[Object], rate: float) -> dict[str, str]:
    """Every job's name by its uid, once all are created, `rate` a second."""
    names: dict[str, str] = {}
    began = time.monotonic()
    for number, each in enumerate(jobs):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        names[(await cluster.create(FDJ, each))["metadata"]["uid"]] = each["metadata"]["name"]
    return names


async def measure(plane: ControlPlane, arguments: argparse.Namespace, folder: Path) -> Object:
    research = plane.namespace("research")
    clinics = [plane.namespace("clinic") for _ in range(arguments.clients)]
    while plane.request("GET", FDJ.path(research))[0] != 200:  # the API server takes a moment to learn of a kind
        await asyncio.sleep(0.1)
    seen = Seen(plane, research)
    async with await Cluster.from_kubeconfig(str(plane.kubeconfig), 1000, 1000) as cluster:
        for each in clinics:
            await cluster.create(PDS, dataset(each, research))
        kubelet = asyncio.create_task(Kubelet(cluster).run())
        with operator(plane, research, folder) as process:
            await leading(folder)
            began = time.monotonic()
            jobs = [job(number, research, clinics) for number in range(arguments.jobs)]
            names = await offer(cluster, jobs, arguments.rate)
            while seen.num_ended < len(jobs):
                assert process.poll() is None, (folder / "operator.log").read_text()[-2000:]
                assert not kubelet.done(), kubelet.exception()
                assert seen.thread.is_alive(), "the watch has ended"
                await asyncio.sleep(0.2)
            seconds = time.monotonic() - began
            memory = largest_rss(process.pid)
        kubelet.cancel()
    return {**latencies(plane.audit_log, seen, names, arguments.clients), **memory} | {
        "phases": Counter(seen.phases.values()),
        "seconds": round(seconds, 1),
    }


async def leading(folder: Path) -> None:
    while '"leading"' not in (folder / "operator.log").read_text():
        await asyncio.sleep(0.1)


def largest_rss(pid: int) -> Object:
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmHWM")]
    return {"operator_rss_mb": round(int(line.split()[1]) / 1024, 1)}


def latencies(audit_log: Path, seen: Seen, names: dict[str, str], num_clients: int) -> Object:
    events = [json.loads(line) for line in audit_log.read_text().splitlines()]
    created, calls = dict[tuple[str, str], float](), Counter[str]()
    for event in events:
        about = event.get("objectRef") or {}
        if "resource" not in about:
            continue  # the version, the discovery
        if event["verb"] == "create" and event["responseStatus"]["code"] == 201 and "dryRun" not in event["requestURI"]:
            created.setdefault((about["resource"], about.get("name", "")), moment(event))
        if event["user"]["username"] == USER and event["verb"] != "watch" and about["resource"] != "leases":
            calls[f"{event['verb']} {'/'.join(filter(None, (about['resource'], about.get('subresource'))))}"] += 1
    reserved, started = [], []
    for uid, name in names.items():
        offered = created["federateddiffusionjobs", name]
        firsts = [child_name(uid, Stage.RELEASE, f"c{index}", 1) for index in range(num_clients)]
        begun = [created["jobs", each] for each in firsts if ("jobs", each) in created]
        started += [min(begun) - offered] if begun else []
        reserved += [seen.reserved[uid] - offered] if uid in seen.reserved else []
    per_job = {what: round(number / len(names), 2) for what, number in calls.most_common()}
    return {
        **quantiles("reserved", reserved),
        **quantiles("first_job", started),
        "api_calls_per_job": round(calls.total() / len(names), 1),
        "api_calls": per_job,
    }


def moment(event: Object) -> float:
    return datetime.fromisoformat(event["stageTimestamp"]).timestamp()


def quantiles(name: str, seconds: list[float]) -> Object:
    if len(seconds) < 2:
        return {f"{name}_p50_s": None, f"{name}_p99_s": None}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p50_s": round(cuts[49], 3), f"{name}_p99_s": round(cuts[98], 3)}


def commit_name() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2.0, help="jobs created per second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ControlPlane(Path(name) / "kubernetes") as plane:
        plane.kubectl("apply", "-f", ROOT / "crds")
        plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds")
        row = asyncio.run(measure(plane, arguments, Path(name)))
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "commit": commit_name()}
    print(json.dumps({**vars(arguments), **row, **machine}))


if __name__ == "__main__":
    main()
