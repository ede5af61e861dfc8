"""How soon an operator that was killed is back at work with hundreds of jobs in flight: one JSON row.

    python benchmarks/operator_restart.py [--jobs 200] [--lease-seconds 15]

A real etcd, API server and controller-manager. The jobs have 2 to 10 clients each; a quarter of them waits in each of
four stages (release, shared and personal training, sampling, evaluation) for pods that never end. A first operator is
killed (-9) when half of the jobs are there, in the middle of its work, and a second one when all are and nothing moves;
both may make as many requests as they like. The third has the default settings and is measured, in seconds from the
moment at which its predecessor was killed and it was started: until it leads, which the Lease decides; until it has
looked at every job once; until no key waits for a worker. Its requests are counted by the API server's audit log, the
election and the watches left out: of a state that nobody changed it has to write nothing. `made_twice` counts attempts
of a stage that have two batch Jobs after all three lives.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Callable

from control_plane import (
    Object,
    Operator,
    connection,
    control_plane,
    events_of,
    job,
    made_twice,
    namespaces,
    operator,
    print_row,
    requests_of,
    side_by_side,
    with_datasets,
)

from cluster.kubelet import Kubelet
from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, JOB, Cluster

NUM_CLINICS, FEWEST_CLIENTS = 10, 2
STAGES = ("release", "train-shared", "sample", "evaluate")  # where a quarter of the jobs each waits
PHASES = {"release": "Releasing", "train-shared": "Training", "sample": "Sampling", "evaluate": "Evaluating"}
HURRY = ("--workers=32", "--api-qps=5000", "--api-burst=5000")
WRITES = ("create", "update", "patch", "delete")
REST_SECONDS = 5.0


def waits_at(name: str) -> str:
    """The stage that never ends in the job of this name."""
    return STAGES[int(name.rpartition("-")[2]) % len(STAGES)]


def outcome(pod: Object, spec: Object) -> int | None:
    """Exit code 0 at once, but for the stage at which the job waits."""
    waits = waits_at(pod["metadata"]["labels"]["feddiff.dev/job"])
    trains = waits == "train-shared" and spec["stage"] == "train-personal"
    return None if spec["stage"] == waits or trains else 0


async def measure(plane: ControlPlane, arguments: argparse.Namespace) -> Object:
    async with connection(plane) as cluster:
        (research,), clinics = (
            await namespaces(cluster, "research", 1),
            await namespaces(cluster, "clinic", NUM_CLINICS),
        )
        await with_datasets(cluster, clinics, research)
        numbers = range(FEWEST_CLIENTS, NUM_CLINICS + 1)
        jobs = [job(each, research, clinics[: numbers[each % len(numbers)]]) for each in range(arguments.jobs)]
        await side_by_side([lambda each=each: cluster.create(FDJ, each) for each in jobs])
        kubelet = asyncio.create_task(Kubelet(cluster, outcome).run())
        await in_flight(plane, cluster, research, arguments.jobs // 2, "first")
        await in_flight(plane, cluster, research, arguments.jobs, "second", REST_SECONDS)
        row = await restarted(plane, research, arguments)
        phases = Counter(each["status"]["phase"] for each in await cluster.list(FDJ, research))
        num_children = len(await cluster.list(JOB, None, "feddiff.dev/job-uid"))
        assert not kubelet.done(), kubelet.exception()
        kubelet.cancel()
        return {**row, "phases": phases, "children": num_children, "made_twice": await made_twice(cluster)}


async def in_flight(
    plane: ControlPlane, cluster: Cluster, research: str, wanted: int, life: str, rest: float = 0
) -> None:
    """So many jobs wait where they shall, nothing has moved for `rest` seconds, and the operator was killed."""
    with operator(plane, research, *HURRY, user=life) as process:
        await process.leading()
        while await num_there(cluster, research) < wanted:
            process.check()
            await asyncio.sleep(1)
        await process.at_rest(rest)
        process.kill()


async def num_there(cluster: Cluster, research: str) -> int:
    jobs = await cluster.list(FDJ, research)
    return sum((each.get("status") or {}).get("phase") == PHASES[waits_at(each["metadata"]["name"])] for each in jobs)


async def restarted(plane: ControlPlane, research: str, arguments: argparse.Namespace) -> Object:
    began = time.time()
    with operator(plane, research, f"--lease-seconds={arguments.lease_seconds}", user="third") as process:
        led = await process.leading()
        looked = await when(process, lambda looks, queued: looks >= arguments.jobs)
        empty = await when(process, lambda looks, queued: looks >= arguments.jobs and not queued)
        await process.at_rest(REST_SECONDS)  # what it writes late counts, too
        memory = process.rss()
    requests = requests_of(events_of(plane), process.user)
    return {
        "leads_after_s": round(led - began, 2),
        "all_looked_at_after_s": round(looked - began, 2),
        "queue_empty_after_s": round(empty - began, 2),
        "api_calls": dict(requests.most_common()),
        "writes": sum(count for what, count in requests.items() if what.split()[0] in WRITES),
        **memory,
    }


async def when(process: Operator, good: Callable[[float, float], bool]) -> float:
    """Seconds since the epoch when the number of looks at jobs and of keys that wait for a worker were as wanted. A
    key waits once at most, and behind all that came before it: so many looks as jobs are a look at every one."""
    looks = r'feddiff_reconcile_duration_seconds_count\{kind="FederatedDiffusionJob"'
    while not good(await process.metric(looks), await process.metric("feddiff_reconcile_queue_depth ")):
        process.check()
        await asyncio.sleep(0.1)
    return time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--lease-seconds", type=int, default=15, help="the third operator's, its default")
    arguments = parser.parse_args()
    with control_plane() as plane:
        print_row(plane, benchmark="operator_restart", **vars(arguments), **asyncio.run(measure(plane, arguments)))


if __name__ == "__main__":
    main()
