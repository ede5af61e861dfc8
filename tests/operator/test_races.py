"""A hundred jobs race for seven places on a real API server, and whoever admits is a process of its own.

Two hundred races of ledgers and twenty of operators are run by hand: benchmarks/ledger_races.py.
"""

import asyncio
from pathlib import Path

from cluster.kubernetes import ControlPlane
from races import race_ledgers, race_operators

NUM_LEDGER_RACES, NUM_OPERATOR_RACES = 20, 2


def test_two_processes_admit_exactly_seven_of_a_hundred(control_plane: ControlPlane) -> None:
    assert asyncio.run(race_ledgers(control_plane, NUM_LEDGER_RACES)) == ""


def test_two_processes_that_compare_no_versions_are_found_out(control_plane: ControlPlane) -> None:
    assert asyncio.run(race_ledgers(control_plane, NUM_LEDGER_RACES, careless=True)) != ""


def test_operators_whose_leader_freezes_in_its_work_admit_exactly_seven(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    assert asyncio.run(race_operators(control_plane, tmp_path, NUM_OPERATOR_RACES)) == ""


def test_operators_that_both_lead_admit_exactly_seven(control_plane: ControlPlane, tmp_path: Path) -> None:
    assert asyncio.run(race_operators(control_plane, tmp_path, NUM_OPERATOR_RACES, all_lead=True)) == ""
