"""What the operator's benchmarks share: a real etcd, API server and controller-manager, the operator's own process,
what both say afterwards, and where it all ran.

Needs the programs of tests/cluster/build.sh.
"""

import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import batch_objects
from cluster.kubernetes import ControlPlane
from feddiff.experiment import commit, cpu_model
from feddiff_operator.cluster import FDJ, JOB, PDS, Cluster, Kind

Object = dict[str, Any]
ROOT = Path(__file__).parents[1]
LANES = 16  # requests of ours under way at once
NAMESPACE, SERVICE_ACCOUNT = Kind("v1", "Namespace", "namespaces"), Kind("v1", "ServiceAccount", "serviceaccounts")


@contextlib.contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """A control plane with our three kinds, and a folder `bench` in its directory for logs."""
    with tempfile.TemporaryDirectory() as name, ControlPlane(Path(name) / "kubernetes") as plane:
        plane.kubectl("apply", "-f", ROOT / "crds")
        plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds")
        while plane.request("GET", FDJ.path("default"))[0] != 200:  # the API server takes a moment to learn of a kind
            time.sleep(0.1)
        (plane.directory / "bench").mkdir()
        yield plane


@contextlib.asynccontextmanager
async def connection(plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.from_kubeconfig(str(plane.kubeconfig), 10_000, 10_000) as cluster:
        yield cluster


async def side_by_side(calls: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    """Every call is made, so many at once."""
    rest = iter(calls)

    async def lane() -> None:
        for call in rest:
            await call()

    await asyncio.gather(*(lane() for _ in range(LANES)))


async def namespaces(cluster: Cluster, prefix: str, count: int) -> list[str]:
    """New namespaces, ready for pods."""
    names = [f"{prefix}-{number}" for number in range(count)]
    await side_by_side([lambda name=name: _namespace(cluster, name) for name in names])
    return names


async def _namespace(cluster: Cluster, name: str) -> None:
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    (await cluster._call("POST", NAMESPACE.path(None), {}, body)).object()
    while await cluster.get(SERVICE_ACCOUNT, name, "default") is None:
        await asyncio.sleep(0.1)


# ---- objects


def dataset(namespace: str, research: str) -> Object:
    """A dataset with a budget for everything."""
    budget, image = {"epsilon": "100000", "delta": "1e-3"}, {"channels": 1, "height": 8, "width": 8}
    spec = batch_objects.dataset(budget=budget, access=[{"namespace": research}], image=image).spec
    return _document("PrivateDataset", namespace, "scans", spec)


def job(number: int, namespace: str, clinics: Iterable[str], **spec: Any) -> Object:
    """A job with a client in each of these namespaces."""
    clients = [
        {"name": f"c{index}", "dataset": {"namespace": each, "name": "scans"}} for index, each in enumerate(clinics)
    ]
    return _document("FederatedDiffusionJob", namespace, f"job-{number}", batch_objects.job(clients, **spec).spec)


def _document(kind: str, namespace: str, name: str, spec: Any) -> Object:
    dumped = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": "feddiff.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": dumped}


async def with_datasets(cluster: Cluster, clinics: Iterable[str], research: str) -> None:
    await side_by_side([lambda each=each: cluster.create(PDS, dataset(each, research)) for each in clinics])


# ---- the operator


class Operator:
    """The operator's process, and what its log and its metrics say."""

    def __init__(self, process: "subprocess.Popen[bytes]", user: str, log: Path) -> None:
        self.process, self.user, self.log = process, user, log

    def lines(self, event: str) -> list[Object]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    async def leading(self) -> float:
        """When it began to lead, in seconds since the epoch."""
        while not (found := self.lines("leading")):
            self.check()
            await asyncio.sleep(0.1)
        return datetime.fromisoformat(found[0]["timestamp"]).timestamp()

    def check(self) -> None:
        """Raises AssertionError when it has ended."""
        assert self.process.poll() is None, self.log.read_text()[-3000:]

    async def metric(self, pattern: str) -> float:
        """The sum of all series whose name and labels match the regular expression."""
        (pages,) = self.lines("pages")
        page = await asyncio.to_thread(_read, f"http://127.0.0.1:{pages['port']}/metrics")
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if re.match(pattern, line))

    async def at_rest(self, seconds: float) -> None:
        """Returns when nothing has waited for a worker and nothing was written for so long."""
        written = r'feddiff_api_requests_total\{.*resource="(?!leases)[^"]*",verb="(create|update|patch|delete)"'
        since, last = time.monotonic(), -1.0
        while time.monotonic() - since < seconds:
            self.check()
            now = await self.metric(written) + await self.metric("feddiff_reconcile_queue_depth ")
            if now != last:
                since, last = time.monotonic(), now
            await asyncio.sleep(0.25)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def rss(self) -> Object:
        """Resident memory now, and at its highest."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        now, peak = (int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return {"operator_rss_mb": round(now, 1), "operator_peak_rss_mb": round(peak, 1)}


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as page:
        return str(page.read().decode())


@contextlib.contextmanager
def operator(plane: ControlPlane, lease_namespace: str, *flags: str, user: str = "operator") -> Iterator[Operator]:
    """An operator with its default settings but for `flags`, known to the API server as `user`."""
    command = [sys.executable, "-m", "feddiff_operator", "--trainer-image=trainer:load", "--port=0"]
    environment = {**os.environ, "KUBECONFIG": str(plane.user(user, ["system:masters"]))}
    path = plane.directory / "bench" / f"{user}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--lease-namespace={lease_namespace}", *flags], env=environment, stderr=log
        )
    try:
        yield Operator(process, user, path)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


# ---- what the API server has noted


def events_of(plane: ControlPlane) -> list[Object]:
    """The audit log: every request about an object."""
    lines = plane.audit_log.read_text().splitlines()
    return [event for line in lines if "resource" in ((event := json.loads(line)).get("objectRef") or {})]


def requests_of(events: Iterable[Object], user: str) -> Counter[str]:
    """A user's requests by verb and resource, watches and the election left out; rehearsals apart."""
    found = Counter[str]()
    for event in events:
        about = event["objectRef"]
        if event["user"]["username"] == user and event["verb"] != "watch" and about["resource"] != "leases":
            rehearsed = "rehearse " if "dryRun" in event["requestURI"] else ""
            found[
                rehearsed + f"{event['verb']} {'/'.join(filter(None, (about['resource'], about.get('subresource'))))}"
            ] += 1
    return found


def moment(event: Object) -> float:
    return datetime.fromisoformat(event["stageTimestamp"]).timestamp()


async def made_twice(cluster: Cluster) -> int:
    """Attempts, by their labels, that have more than one batch Job."""
    named = ("job-uid", "stage", "client", "attempt")
    jobs = await cluster.list(JOB, None, "feddiff.dev/job-uid")
    made = Counter(tuple(each["metadata"]["labels"].get(f"feddiff.dev/{name}", "") for name in named) for each in jobs)
    return sum(times > 1 for times in made.values())


# ---- the row


def print_row(plane: ControlPlane, **row: Any) -> None:
    """One JSON line: what was measured, and where."""
    print(json.dumps({**row, **_machine(plane)}), flush=True)


def _machine(plane: ControlPlane) -> Object:
    kubernetes = plane.request("GET", "/version")[1]["gitVersion"]
    versions = {"python": platform.python_version(), "kubernetes": kubernetes, "kopf": version("kopf")}
    return {"commit": commit(), "cpu": cpu_model(), "cores": os.cpu_count(), "versions": versions}
