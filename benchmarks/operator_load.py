"""How soon an operator under load reserves and starts: one JSON row.

    python benchmarks/operator_load.py [--jobs 200] [--clients 10] [--rate 2]
    python benchmarks/operator_load.py --jobs 1 --clients 1000 --until released --api-qps 400

A real etcd, API server and controller-manager, the operator's own process with its default settings (but for
--api-qps), and a kubelet that answers at once for every pod. So many jobs a second are created, each of as many
clients, each client with a namespace and a budget for everything. The run ends when all jobs have, or with `--until
released` when every release of every job has been started; then no pod runs. Seconds are counted from a job's creation:
to the status in which BudgetReserved is True, as a watch brings it; to the creation of its first batch Job, and of its
last release's, as the audit log says. Requests to the API server are counted by the same log, the election and the
watches left out. All of it runs on one machine, so its cores are shared: the row says how many there are.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import statistics
import threading
import time
from collections import Counter

from control_plane import (
    Object,
    Operator,
    connection,
    control_plane,
    events_of,
    job,
    moment,
    namespaces,
    operator,
    print_row,
    requests_of,
    with_datasets,
)

from cluster.kubelet import Kubelet
from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, JOB, Cluster
from feddiff_operator.workloads import child_name
from feddiff_protocol.stages import Stage


class Seen:
    """When each job was first seen reserved, and which have ended: from a watch of its own, in a thread."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.reserved: dict[str, float] = {}
        self.phases: dict[str, str] = {}
        path = f"{FDJ.path(namespace)}?watch=1"
        self.thread = threading.Thread(target=self._watch, args=(plane, path), daemon=True)
        self.thread.start()

    def _watch(self, plane: ControlPlane, path: str) -> None:
        line = http.client.HTTPSConnection(plane.address, 6443, context=plane.administrator)
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


async def offer(cluster: Cluster, jobs: list[Object], rate: float) -> dict[str, str]:
    """Every job's name by its uid, once all are created, `rate` a second."""
    names: dict[str, str] = {}
    began = time.monotonic()
    for number, each in enumerate(jobs):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        names[(await cluster.create(FDJ, each))["metadata"]["uid"]] = each["metadata"]["name"]
    return names


async def measure(plane: ControlPlane, arguments: argparse.Namespace) -> Object:
    released = arguments.until == "released"
    async with connection(plane) as cluster:
        (research,), clinics = (
            await namespaces(cluster, "research", 1),
            await namespaces(cluster, "clinic", arguments.clients),
        )
        await with_datasets(cluster, clinics, research)
        seen = Seen(plane, research)
        kubelet = asyncio.create_task(asyncio.Event().wait() if released else Kubelet(cluster).run())
        flags = [f"--api-qps={arguments.api_qps:g}", f"--api-burst={2 * arguments.api_qps:.0f}"]
        with operator(plane, research, *flags) as process:
            await process.leading()
            began = time.monotonic()
            names = await offer(
                cluster, [job(each, research, clinics) for each in range(arguments.jobs)], arguments.rate
            )
            while not (await all_released(cluster, names, clinics) if released else seen.num_ended == len(names)):
                process.check()
                assert not kubelet.done(), kubelet.exception()
                assert seen.thread.is_alive(), "the watch has ended"
                await asyncio.sleep(0.2)
            seconds = time.monotonic() - began
            memory = process.rss()
        kubelet.cancel()
    phases = {"phases": Counter(seen.phases.values()), "seconds": round(seconds, 1)}
    return {**latencies(events_of(plane), seen, names, process, arguments.clients), **memory, **phases}


async def all_released(cluster: Cluster, names: dict[str, str], clinics: list[str]) -> bool:
    """Whether every release has a batch Job. They are started one after the other, so the last ones are asked for."""
    lasts = [child_name(uid, Stage.RELEASE, f"c{len(clinics) - 1}", 1) for uid in names]
    if not all([await cluster.get(JOB, clinics[-1], last) for last in lasts]):
        return False
    jobs = await cluster.list(JOB, None, "feddiff.dev/stage=release")
    return len(jobs) == len(names) * len(clinics)


def latencies(events: list[Object], seen: Seen, names: dict[str, str], process: Operator, num_clients: int) -> Object:
    created = dict[tuple[str, str], float]()
    for event in events:
        about = event["objectRef"]
        if event["verb"] == "create" and event["responseStatus"]["code"] == 201 and "dryRun" not in event["requestURI"]:
            created.setdefault((about["resource"], about.get("name", "")), moment(event))
    reserved, first, last = [], [], []
    for uid, name in names.items():
        offered = created["federateddiffusionjobs", name]
        children = [child_name(uid, Stage.RELEASE, f"c{index}", 1) for index in range(num_clients)]
        begun = [created["jobs", each] for each in children if ("jobs", each) in created]
        first += [min(begun) - offered] if begun else []
        last += [max(begun) - offered] if len(begun) == num_clients else []
        reserved += [seen.reserved[uid] - offered] if uid in seen.reserved else []
    requests = requests_of(events, process.user)
    return {
        **quantiles("reserved", reserved),
        **quantiles("first_job", first),
        **quantiles("last_release", last),
        "api_calls_per_job": round(requests.total() / len(names), 1),
        "api_calls": {what: round(number / len(names), 2) for what, number in requests.most_common()},
    }


def quantiles(name: str, seconds: list[float]) -> Object:
    """Median and 99th percentile; of a single job its own."""
    if not seconds:
        return {f"{name}_p50_s": None, f"{name}_p99_s": None}
    cuts = statistics.quantiles(seconds * 2, n=100, method="inclusive")
    return {f"{name}_p50_s": round(statistics.median(seconds), 3), f"{name}_p99_s": round(cuts[98], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2.0, help="jobs created per second")
    parser.add_argument("--until", choices=["ended", "released"], default="ended")
    parser.add_argument("--api-qps", type=float, default=50.0, help="the operator's, its default unless said otherwise")
    arguments = parser.parse_args()
    with control_plane() as plane:
        print_row(plane, benchmark="operator_load", **vars(arguments), **asyncio.run(measure(plane, arguments)))


if __name__ == "__main__":
    main()
