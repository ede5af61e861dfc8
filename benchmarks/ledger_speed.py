"""How many reservations a second the ledger takes on a real API server: one JSON row.

    python benchmarks/ledger_speed.py [--owners 20] [--rounds 10]

A real etcd, API server and controller-manager, and one process with one ClusterLedger, no operator around it. `owners`
datasets, each in a namespace of its own, take `rounds` reservations each: all of them are asked for at once; then all
are charged at once. `one_owner` is the same number of reservations, at most 100, with one dataset, one after the other:
they cannot overlap, since each is a compare-and-swap of one object. A reservation is whole: the account's swap, the
entry, its phase, and the fold. Reads are real reads, so a ledger of many entries is slower than a young one.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Iterable
from datetime import UTC, datetime

from control_plane import Object, connection, control_plane, job, namespaces, print_row, with_datasets

from cluster.kubernetes import ControlPlane
from feddiff_operator.ledger import ClusterLedger
from feddiff_protocol.api import FederatedDiffusionJob

RESEARCH, CLIENT = "research", "c0"
SHORT = {"steps": 50, "betaStart": "0.002", "betaEnd": "0.4"}  # a schedule that is quickly computed
MOST_IN_A_ROW = 100


async def measure(plane: ControlPlane, arguments: argparse.Namespace) -> Object:
    async with connection(plane) as cluster:
        alone, *clinics = await namespaces(cluster, "clinic", 1 + arguments.owners)
        await with_datasets(cluster, [alone, *clinics], RESEARCH)
        book = ClusterLedger(cluster, lambda: datetime.now(UTC))
        asked = [
            (request(number, each), f"uid-of-{number}-{each}") for number in range(arguments.rounds) for each in clinics
        ]
        in_a_row = [(request(each, alone), f"uid-of-{each}-alone") for each in range(min(len(asked), MOST_IN_A_ROW))]
        one = await seconds_of(one_after_the_other(book, in_a_row))
        reserved = await seconds_of(asyncio.gather(*(reserve(book, *each) for each in asked)))
        charged = await seconds_of(asyncio.gather(*(book.charge(*each, CLIENT) for each in asked)))
    return {
        "reservations_per_s": round(len(asked) / reserved, 1),
        "charges_per_s": round(len(asked) / charged, 1),
        "reserved_and_charged_per_s": round(len(asked) / (reserved + charged), 1),
        "one_owner_reservations_per_s": round(len(in_a_row) / one, 1),
    }


def request(number: int, clinic: str) -> FederatedDiffusionJob:
    return FederatedDiffusionJob.model_validate(job(number, RESEARCH, [clinic], diffusion=SHORT))


async def reserve(book: ClusterLedger, asked: FederatedDiffusionJob, uid: str) -> None:
    refusal = await book.reserve(asked, uid, CLIENT)
    assert refusal is None, refusal


async def one_after_the_other(book: ClusterLedger, asked: Iterable[tuple[FederatedDiffusionJob, str]]) -> None:
    for each in asked:
        await reserve(book, *each)


async def seconds_of(work: Awaitable[object]) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with control_plane() as plane:
        print_row(plane, benchmark="ledger_speed", **vars(arguments), **asyncio.run(measure(plane, arguments)))


if __name__ == "__main__":
    main()
