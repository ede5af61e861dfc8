"""What one look at one job costs, without a network: a JSON row per number of clients.

    python benchmarks/operator_look.py [--clients 10 1000] [--profile]

The operator runs against an API server in memory. A whole job of so many owners is carried out and its requests are
counted, reads apart; and milliseconds of CPU are measured for one look at it while nothing changes: while the releases
run, and while all owners train. The API server in memory is part of the time, a tenth of it or less.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import many_jobs
from feddiff_operator.cluster import FDJ, PDS
from many_jobs import Hospital, Operator

Object = dict[str, Any]
LOOKS = 5


class Counting:
    """The API server, its requests counted by verb and kind."""

    def __init__(self, hospital: Hospital) -> None:
        self.hospital, self.requests = hospital, Counter[str]()

    def __getattr__(self, verb: str) -> Any:
        async def request(kind: Any, *arguments: Any, **more: Any) -> Any:
            self.requests[f"{verb} {kind.name}"] += 1
            return await getattr(self.hospital, verb)(kind, *arguments, **more)

        return request

    @property
    def num_reads(self) -> int:
        return sum(count for what, count in self.requests.items() if what.startswith(("get", "list")))


def hospital(num_clients: int) -> Hospital:
    """One job of so many owners, each with a dataset of its own."""
    place = Hospital(0, num_datasets=0)
    place.ends = lambda child, spec: 0 if spec["stage"] in place.ending else None  # type: ignore[attr-defined]
    place.ending = ()  # type: ignore[attr-defined]
    names = [f"c{number}" for number in range(num_clients)]
    for name in names:
        place.put(PDS, many_jobs.dataset(name, 0))
    clients = [{"name": name, "dataset": {"namespace": f"clinic-{name}-0", "name": "scans"}} for name in names]
    job = many_jobs.job(0, 0)
    place.put(FDJ, {**job, "spec": {**job["spec"], "clients": clients}})
    return place


async def settled(operator: Operator) -> None:
    """The job has gone as far as its pods let it."""
    version = -1
    while version != operator.hospital.version:
        version = operator.hospital.version
        await operator.one_round()
        operator.hospital.live(operator.hospital.now)
        operator.seen.deliver()


async def milliseconds(operator: Operator, profile: cProfile.Profile | None) -> float:
    """CPU of one look at a job about which there is nothing new; of a few, the least."""
    spent = []
    for _ in range(LOOKS):
        began = time.process_time()
        if profile:
            profile.enable()
        await operator.reconciler.job("research", "job-0", operator.seen)
        if profile:
            profile.disable()
        spent.append(time.process_time() - began)
    return round(1000 * min(spent), 2)


async def measure(num_clients: int, profile: cProfile.Profile | None) -> Object:
    place = hospital(num_clients)
    counting = Counting(place)
    operator = Operator(place, counting)
    await settled(operator)
    assert place.phases() == {"Releasing": 1}, place.phases()
    row: Object = {"clients": num_clients, "releasing_ms": await milliseconds(operator, profile)}
    place.ending = ("release",)  # type: ignore[attr-defined]
    await settled(operator)
    assert place.phases() == {"Training": 1}, place.phases()
    row["training_ms"] = await milliseconds(operator, profile)
    place.ending = tuple(many_jobs.STAGES)  # type: ignore[attr-defined]
    await settled(operator)
    assert place.phases() == {"Complete": 1}, place.phases()
    requests, reads = sum(counting.requests.values()), counting.num_reads
    return {**row, "requests": requests, "reads": reads, "by": dict(counting.requests.most_common())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--profile", action="store_true", help="what the time goes to, on standard error")
    arguments = parser.parse_args()
    for num_clients in arguments.clients:
        profile = cProfile.Profile() if arguments.profile else None
        print(json.dumps(asyncio.run(measure(num_clients, profile))), flush=True)
        if profile:
            pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(35)


if __name__ == "__main__":
    main()
