"""An operator that is thrown away with hundreds of jobs in flight: the next one finds everything, makes nothing twice
and pays nothing twice."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from fake_cluster import Killed
from feddiff_operator import reconcile, workloads
from feddiff_operator.cluster import CONFIG_MAP, JOB, Kind
from many_jobs import STAGES, Hospital, Object, Operator, books_in_order, made_twice

NUM_JOBS = 200
CHILDREN_OF_A_JOB = sum(STAGES.values())


class Mortal:
    """The hospital's API server for an operator that is killed after its n-th ConfigMap: the Job is still to come."""

    def __init__(self, hospital: Hospital, num_made: int) -> None:
        self.hospital, self.left = hospital, num_made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hospital, name)

    async def create(self, kind: Kind, obj: Object, rehearsal: bool = False) -> Object:
        created = await self.hospital.create(kind, obj, rehearsal)
        self.left -= kind == CONFIG_MAP and not rehearsal
        if self.left <= 0:
            raise Killed
        return created


async def restarted(hospital: Hospital, lives: Iterator[int]) -> int:
    """How many operators died, each after as many ConfigMaps as `lives` says, before all jobs had ended or something
    was made twice."""

    def ended() -> bool:
        return hospital.phases().keys() <= {"Complete", "Failed"} or made_twice(hospital) != []

    for num_deaths in itertools.count():
        made = next(lives, None)
        try:
            await Operator(hospital, Mortal(hospital, made) if made else None).go_on(ended)
            return num_deaths
        except Killed:
            continue
    raise AssertionError


def test_restarts_with_200_jobs_in_flight_make_no_child_twice_and_every_job_completes() -> None:
    hospital = Hospital(NUM_JOBS, num_datasets=10)
    quarter = NUM_JOBS * CHILDREN_OF_A_JOB // 4
    num_deaths = asyncio.run(restarted(hospital, iter([quarter - 1, quarter, quarter])))
    assert num_deaths == 3
    assert made_twice(hospital) == []
    assert hospital.phases() == {"Complete": NUM_JOBS}
    ranks = Counter({"train-shared": 2})  # pods of one attempt
    started = Counter((stage, attempt) for stage, _, attempt in hospital.started)
    assert started == {(stage, 1): NUM_JOBS * number * (ranks[stage] or 1) for stage, number in STAGES.items()}
    books_in_order(hospital, 2 * NUM_JOBS)


def test_names_that_do_not_follow_from_the_attempt_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the same restarts, and something in every child's name that each operator has drawn for itself."""
    hospital, named = Hospital(20), workloads.child_name
    monkeypatch.setattr(workloads, "child_name", lambda *key: f"{named(*key)}-{hospital.num_lives}")
    monkeypatch.setattr(reconcile, "children_of", lambda job, uid, children: list(children))  # known by their labels
    asyncio.run(restarted(hospital, iter([49, 50])))
    assert made_twice(hospital) != []


def test_an_operator_that_begins_anew_writes_nothing_to_jobs_that_wait_for_their_pods() -> None:
    async def story() -> None:
        hospital = Hospital(20, outcome=lambda child, spec: 0 if spec["stage"] == "release" else None)
        first = Operator(hospital)
        await first.go_on(lambda: len(hospital.peek(JOB)) == 20 * 5)  # two releases, three trainings
        await first.one_round()
        version = hospital.version
        await Operator(hospital).one_round()
        assert hospital.version == version

    asyncio.run(story())
