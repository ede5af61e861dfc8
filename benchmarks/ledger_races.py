"""Whether a budget for seven is ever given to an eighth: one JSON row per kind of race.

    python benchmarks/ledger_races.py [--ledgers 200] [--leader-freezes 20] [--both-lead 20] [--side-by-side 4]

The races of tests/operator/test_races.py, as many as asked for, on a real etcd, API server and controller-manager. In
each of them a hundred jobs want a dataset that holds seven. `ledgers`: two processes with a ledger each, half of the
jobs in either. `leader-freezes`: two operator processes with one Lease of 3 s; the leader is frozen while it admits,
until the other has taken over and gone on, and later that one, too. `both-lead`: two operator processes with a Lease
each. Operators decide some races side by side, then the next ones. A row says what was wrong, or nothing: exactly seven
charged entries, an account that sums to them exactly, and with operators 93 jobs Failed with PrivacyBudgetExceeded.
"""

import argparse
import asyncio
import time

from control_plane import control_plane, print_row

from cluster.kubernetes import ControlPlane
from races import race_ledgers, race_operators


def race(plane: ControlPlane, kind: str, num_races: int, side_by_side: int) -> None:
    """Prints the row of so many races of a kind."""
    began, fault, num_raced = time.monotonic(), "", 0
    while num_raced < num_races and not fault:
        if kind == "ledgers":
            num_now = num_races
            fault = asyncio.run(race_ledgers(plane, num_now))
        else:
            num_now = min(side_by_side, num_races - num_raced)
            folder = plane.directory / "bench"
            fault = asyncio.run(race_operators(plane, folder, num_now, all_lead=kind == "both-lead"))
        num_raced += num_now
    seconds = round(time.monotonic() - began, 1)
    print_row(plane, benchmark="ledger_races", kind=kind, races=num_raced, fault=fault, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledgers", type=int, default=200)
    parser.add_argument("--leader-freezes", type=int, default=20)
    parser.add_argument("--both-lead", type=int, default=20)
    parser.add_argument("--side-by-side", type=int, default=4, help="races that two operators decide at once")
    arguments = parser.parse_args()
    with control_plane() as plane:
        for kind in ("ledgers", "leader-freezes", "both-lead"):
            race(plane, kind, getattr(arguments, kind.replace("-", "_")), arguments.side_by_side)


if __name__ == "__main__":
    main()
