"""The ledger on Kubernetes: no interleaving, crash, wipe or slow operator overspends; what is charged is counted."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any

import pytest

from cluster.kubernetes import ControlPlane
from fake_cluster import FakeCluster, Killed, Mortal, finished, no_sleep
from feddiff_operator import ledger as operator_ledger
from feddiff_operator.cluster import FDJ, PDS, PRL, Cluster, Unavailable
from feddiff_operator.ledger import ClusterLedger
from feddiff_protocol import ledger, ledger_objects
from feddiff_protocol.accountant import budget_mu_squared, total_charge
from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.errors import PrivacyRefusal
from feddiff_protocol.labels import ACKNOWLEDGE
from feddiff_protocol.ledger import Entry, Phase
from feddiff_protocol.ledger_objects import account_of, entry_of
from feddiff_protocol.plan import Hold

Object = dict[str, Any]
NAMESPACE, DATASET = "clinic-a", "scans"
BUDGET, DELTA = Decimal(20), Decimal("1e-5")
LIMIT = budget_mu_squared(BUDGET, DELTA)


def clock() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


def dataset_object(epsilon: str = "20", name: str = DATASET, **spec: object) -> Object:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "PrivateDataset",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "source": {"format": "npz", "path": "train.npz"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 1, "records": [9]},
            "budget": {"epsilon": epsilon, "delta": "1e-5"},
            "access": [{"namespace": "research"}],
            **spec,
        },
    }


def job_object(name: str, epsilon: str = "4", datasets: tuple[str, ...] = (DATASET,)) -> Object:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {"name": name, "namespace": "research"},
        "spec": {
            "clients": [
                {"name": f"c{index}", "dataset": {"namespace": NAMESPACE, "name": dataset}}
                for index, dataset in enumerate(datasets)
            ],
            "privacy": {
                "mechanism": "summary",
                "epsilon": epsilon,
                "delta": "1e-5",
                "clipNorm": "4.25",
                "momentClipNorm": "2",
            },
            "diffusion": {"splitSigma": "0.25"},
        },
    }


@dataclass
class World:
    """One owner with one dataset, and the jobs of researchers."""

    cluster: FakeCluster = field(default_factory=FakeCluster)

    def __post_init__(self) -> None:
        self.cluster.put(PDS, dataset_object())

    def book(self) -> ClusterLedger:
        return ClusterLedger(self.cluster, clock, no_sleep)

    def job(self, name: str, epsilon: str = "4") -> tuple[FederatedDiffusionJob, str]:
        found = self.cluster.put(FDJ, job_object(name, epsilon))
        return FederatedDiffusionJob.model_validate(found), found["metadata"]["uid"]

    def reserve(self, job: FederatedDiffusionJob, uid: str) -> str:
        refusal = finished(self.book().reserve(job, uid, "c0"))
        return refusal.message if refusal else ""

    def charge(self, job: FederatedDiffusionJob, uid: str) -> None:
        finished(self.book().charge(job, uid, "c0"))

    def give_back(self, job: FederatedDiffusionJob, uid: str) -> None:
        finished(self.book().give_back(job, uid, "c0"))

    def look(self, job: FederatedDiffusionJob, uid: str) -> operator_ledger.ClientLedger:
        return finished(self.book().look(job, uid, "c0"))

    def tend(self) -> None:
        finished(self.book().tend(NAMESPACE, DATASET))

    @property
    def dataset(self) -> Object:
        return self.cluster.objects[("PrivateDataset", NAMESPACE, DATASET)]

    @property
    def account(self) -> ledger.Account:
        account = account_of(self.dataset.get("status"))
        assert account is not None
        return account

    @property
    def entries(self) -> list[Entry]:
        return [entry_of(release) for release in self.cluster.peek(PRL)]

    def condition(self, kind: str) -> tuple[str, str, str]:
        found = next(each for each in self.dataset["status"]["conditions"] if each["type"] == kind)
        return found["status"], found["reason"], found["message"]

    def annotate(self, words: str) -> None:
        metadata = {**self.dataset["metadata"], "annotations": {ACKNOWLEDGE: words}}
        self.cluster.put(PDS, {**self.dataset, "metadata": metadata})

    def wipe(self) -> None:
        self.cluster.put(PDS, {key: value for key, value in self.dataset.items() if key != "status"})

    def recreate(self, epsilon: str = "20") -> None:
        self.cluster.remove(PDS, NAMESPACE, DATASET)
        self.cluster.put(PDS, dataset_object(epsilon))


@pytest.fixture
def world() -> World:
    return World()


# ---- The way of one client ---------------------------------------------------------------------------------------


def test_a_release_is_reserved_then_charged_then_named(world: World) -> None:
    job, uid = world.job("first")
    assert world.look(job, uid).hold is Hold.NONE
    assert world.reserve(job, uid) == ""
    seen = world.look(job, uid)
    assert seen.hold is Hold.RESERVED and seen.refusal == "" and seen.dataset is not None
    assert (world.account.num_entries, world.account.pending) == (1, ())
    world.charge(job, uid)
    assert world.look(job, uid).hold is Hold.CHARGED
    finished(world.book().record_manifest(job, uid, "c0", "a" * 64))
    assert world.entries[0].manifest_sha256 == "a" * 64
    with pytest.raises(PrivacyRefusal, match="a second release"):
        finished(world.book().record_manifest(job, uid, "c0", "b" * 64))


def test_doing_it_all_again_changes_nothing(world: World) -> None:
    job, uid = world.job("first")
    for _ in range(2):
        assert world.reserve(job, uid) == ""
        world.charge(job, uid)
        world.tend()
        world.give_back(job, uid)
    version = world.cluster.version
    world.reserve(job, uid), world.charge(job, uid), world.give_back(job, uid), world.tend()
    assert world.cluster.version == version
    assert [entry.phase for entry in world.entries] == [Phase.CHARGED]


def test_what_does_not_fit_is_refused_in_words_and_what_is_returned_fits_again(world: World) -> None:
    jobs = [world.job(f"job-{index}", "10") for index in range(4)]
    assert [world.reserve(*job) for job in jobs[:2]] == ["", ""]
    assert "15.4606 of 20" in world.reserve(*jobs[2]) and "20.1309" in world.look(*jobs[2]).refusal
    world.give_back(*jobs[0])
    assert world.look(*jobs[0]).hold is Hold.RETURNED
    assert world.reserve(*jobs[3]) == ""
    assert "given back" in world.reserve(*jobs[0])


def test_an_owner_that_withdraws_access_stops_a_charge_but_not_what_was_charged(world: World) -> None:
    (early, late) = world.job("early"), world.job("late")
    world.reserve(*early), world.charge(*early), world.reserve(*late)
    world.cluster.put(PDS, {**world.dataset, "spec": {**world.dataset["spec"], "access": []}})
    assert world.look(*early).refusal == ""
    assert "lets no job of namespace research" in world.look(*late).refusal
    with pytest.raises(PrivacyRefusal, match="lets no job"):
        world.charge(*late)


def test_nothing_is_charged_that_was_not_reserved(world: World) -> None:
    with pytest.raises(PrivacyRefusal, match="nothing is reserved"):
        world.charge(*world.job("first"))


def test_a_missing_dataset_admits_nothing_and_its_reservations_come_back(world: World) -> None:
    job = world.job("first")
    world.reserve(*job)
    world.cluster.remove(PDS, NAMESPACE, DATASET)
    seen = world.look(*job)
    assert seen.dataset is None and "does not exist" in seen.refusal and seen.hold is Hold.RESERVED
    assert "does not exist" in world.reserve(*world.job("second"))
    world.give_back(*job)
    assert world.entries[0].phase is Phase.RETURNED
    world.tend()


def test_a_spec_that_cannot_be_understood_admits_nothing_and_says_why(world: World) -> None:
    job = world.job("first")
    world.reserve(*job)
    world.tend()
    broken = {**world.dataset["spec"], "classes": {"count": 2, "records": [9]}}
    world.cluster.put(PDS, {**world.dataset, "spec": broken})
    world.tend()
    status, reason, message = world.condition("Ready")
    assert (status, reason) == ("False", "SpecInvalid") and "one number for each of 2 classes" in message
    assert world.condition("LedgerConsistent")[0] == "True"
    assert world.dataset["status"]["budget"]["reserved"] == "4"
    seen = world.look(*job)
    assert seen.dataset is None and "one number for each of 2 classes" in seen.refusal
    assert "one number for each" in world.reserve(*world.job("second"))
    with pytest.raises(PrivacyRefusal, match="one number for each"):
        world.charge(*job)
    world.give_back(*job)
    assert world.account.returned == world.account.total


# ---- Contradictions ----------------------------------------------------------------------------------------------


def spend(world: World, *epsilons: str) -> None:
    for index, epsilon in enumerate(epsilons):
        job = world.job(f"spent-{index}", epsilon)
        assert world.reserve(*job) == ""
        world.charge(*job)
    world.tend()


def test_an_entry_removed_behind_its_back_stops_everything_until_the_owner_acknowledges(world: World) -> None:
    spend(world, "10", "10")
    waiting = world.job("waiting", "1")
    world.reserve(*waiting)
    before = total_charge(world.account.charges)
    world.cluster.remove(PRL, NAMESPACE, world.entries[0].name)
    world.tend()
    status, _, message = world.condition("LedgerConsistent")
    assert status == "False" and "the account counts 3 entries, 2 exist" in message
    assert world.condition("Ready")[0] == "False"
    assert world.dataset["status"]["budget"]["remaining"] == "0"
    assert "contradicts itself" in world.reserve(*world.job("second", "1"))
    with pytest.raises(PrivacyRefusal, match="contradicts itself"):
        world.charge(*waiting)
    world.annotate("1: the account counts 4 entries, 2 exist")
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "False", "another contradiction than the one acknowledged"
    world.annotate("1: the account counts 3 entries, 2 exist")
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "True"
    assert total_charge(world.account.charges) == before, "what is gone stays counted"
    world.charge(*waiting)
    assert "of 20" in world.reserve(*world.job("third", "10"))


def test_an_old_acknowledgement_does_not_cover_a_new_contradiction(world: World) -> None:
    spend(world, "4", "4", "4")
    for num_removed in (1, 2):
        world.cluster.remove(PRL, NAMESPACE, world.entries[0].name)
        world.tend()
        assert world.condition("LedgerConsistent")[0] == "False"
        spelled = f"{num_removed}: the account counts {4 - num_removed} entries, {3 - num_removed} exist"
        world.annotate(spelled)
        world.tend()
        assert world.condition("LedgerConsistent")[0] == "True"
    assert world.account.lost.mu_squared == 2 * world.entries[0].charge.mu_squared


def test_an_account_that_makes_no_sense_admits_nothing_and_stays_as_evidence(world: World) -> None:
    spend(world, "4")
    garbled = {**world.dataset["status"], "account": {"numEntries": "one"}}
    world.cluster.put(PDS, {**world.dataset, "status": garbled})
    assert "cannot be understood" in world.reserve(*world.job("second"))
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "False"
    assert world.dataset["status"]["account"] == {"numEntries": "one"}
    world.annotate("1: status.account cannot be understood")
    world.tend()
    assert world.condition("Ready")[0] == "True"
    assert world.account.num_entries == 1 and world.account.total == world.entries[0].charge


def test_an_entry_that_cannot_be_understood_admits_nothing_and_cannot_be_acknowledged_away(world: World) -> None:
    spend(world, "4")
    release = world.cluster.peek(PRL)[0]
    world.cluster.put(PRL, {**release, "spec": {**release["spec"], "epsilon": "four"}})
    world.tend()
    status, _, message = world.condition("LedgerConsistent")
    assert status == "False" and 'found "four"' in message and "annotate" not in message
    assert 'found "four"' in world.reserve(*world.job("second"))


# ---- A past that comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wiped", "recreated"])
def test_a_dataset_without_an_account_adopts_all_entries_of_its_name(world: World, how: str) -> None:
    spend(world, "10", "10")
    returned = world.job("returned", "1")
    world.reserve(*returned), world.give_back(*returned)
    before = total_charge(world.account.charges)
    world.wipe() if how == "wiped" else world.recreate()
    world.tend()
    assert world.condition("Ready")[0] == "True"
    assert (world.account.num_entries, total_charge(world.account.charges)) == (3, before)
    assert "of 20" in world.reserve(*world.job("more", "10"))


@pytest.mark.parametrize("how", ["wiped", "recreated"])
def test_a_past_is_adopted_by_the_first_reservation_too(world: World, how: str) -> None:
    spend(world, "10", "10")
    world.wipe() if how == "wiped" else world.recreate()
    assert "of 20" in world.reserve(*world.job("more", "10"))
    assert world.reserve(*world.job("fits", "2")) == ""
    assert world.account.num_entries == 3


def test_a_recreated_dataset_is_another_release_for_a_job_that_goes_on(world: World) -> None:
    job = world.job("first")
    world.reserve(*job), world.charge(*job)
    world.recreate()
    assert world.look(*job).hold is Hold.NONE, "its records may be others: charged again, or not released"
    assert world.reserve(*job) == ""
    assert world.account.num_entries == 2


def test_a_past_larger_than_a_new_budget_lets_nothing_be_charged(world: World) -> None:
    spend(world, "10")
    open_job = world.job("open", "4")
    world.reserve(*open_job)
    world.recreate(epsilon="8")
    world.tend()
    assert world.condition("BudgetExhausted")[:2] == ("True", "BudgetExceeded")
    assert "of 8" in world.reserve(*open_job)


def test_an_entry_restored_without_its_phase_counts_for_good_and_releases_nothing(world: World) -> None:
    job = world.job("first")
    world.reserve(*job), world.charge(*job)
    release = world.cluster.peek(PRL)[0]
    world.cluster.put(PRL, {key: value for key, value in release.items() if key != "status"})
    world.wipe()
    world.cluster.remove(FDJ, "research", "first")
    world.tend()
    world.give_back(*job)
    assert world.entries[0].phase is Phase.UNKNOWN
    assert total_charge(world.account.charges) == world.entries[0].charge
    assert world.dataset["status"]["budget"]["spent"] == "4"
    seen = world.look(*job)
    assert seen.hold is Hold.NONE and "lost its phase" in seen.refusal
    with pytest.raises(PrivacyRefusal, match="lost its phase"):
        world.charge(*job)


# ---- Operators that die or are slow ------------------------------------------------------------------------------


async def reserve_and_charge(cluster: Any, jobs: list[tuple[FederatedDiffusionJob, str]], clients: list[str]) -> None:
    """An operator's whole way with every client of every job."""
    book = ClusterLedger(cluster, clock, no_sleep)
    for step in (book.reserve, book.charge):
        for job, uid in jobs:
            for client in clients:
                await step(job, uid, client)


async def carry_on(cluster: Any, jobs: list[tuple[FederatedDiffusionJob, str]], clients: list[str]) -> None:
    """The next operator's way: it asks only for what the ledger does not hold yet."""
    book = ClusterLedger(cluster, clock, no_sleep)
    for job, uid in jobs:
        for client in clients:
            if (await book.look(job, uid, client)).hold is Hold.NONE:
                assert await book.reserve(job, uid, client) is None
            if (await book.look(job, uid, client)).hold is Hold.RESERVED:
                await book.charge(job, uid, client)


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it took effect"])
@pytest.mark.parametrize("job_goes_on", [True, False], ids=["job goes on", "job is deleted"])
def test_an_operator_may_die_at_any_call(after: bool, job_goes_on: bool) -> None:
    num_deaths = 0
    for dies_at in range(1, 100):
        world = World()
        world.cluster.put(PDS, dataset_object(name="more-scans"))
        found = world.cluster.put(FDJ, job_object("first", datasets=(DATASET, "more-scans")))
        jobs = [(FederatedDiffusionJob.model_validate(found), found["metadata"]["uid"])]
        mortal = Mortal(world.cluster, dies_at, after)
        try:
            finished(reserve_and_charge(mortal, jobs, ["c0", "c1"]))
        except Killed:
            num_deaths += 1
        else:
            break
        if job_goes_on:
            finished(carry_on(world.cluster, jobs, ["c0", "c1"]))
        else:
            world.cluster.remove(FDJ, "research", "first")
        for name in (DATASET, "more-scans"):
            for _ in range(2):  # what a crash left takes one round, and the second finds nothing to do
                version = world.cluster.version
                finished(world.book().tend(NAMESPACE, name))
            assert world.cluster.version == version
            in_order(world.cluster, name, all_charged=job_goes_on)
    assert num_deaths == NUM_CALLS


NUM_CALLS = (
    2 * 9
)  # of reserve (get, list, put account, create, put phase, put account) and charge (get, list, put phase)


def in_order(cluster: FakeCluster, name: str, all_charged: bool) -> None:
    """One dataset's books after everything was tended."""
    dataset = cluster.objects[("PrivateDataset", NAMESPACE, name)]
    entries = [entry_of(each) for each in cluster.peek(PRL) if each["spec"]["dataset"]["name"] == name]
    account = account_of(dataset["status"])
    assert account is not None and not account.pending and len(entries) <= 1
    assert ledger.inconsistency(account, entries) is None
    assert all(entry.phase in (Phase.CHARGED, Phase.RETURNED) for entry in entries)
    charged = total_charge(entry.charge for entry in entries if entry.phase is Phase.CHARGED)
    assert total_charge(account.charges) == charged
    assert not all_charged or [entry.phase for entry in entries] == [Phase.CHARGED]


def stalled(coroutine: Coroutine[None, None, Any], until: Callable[[], bool]) -> Coroutine[None, None, Any]:
    """A coroutine that ran until something was so, and then stopped for a while."""
    while not until():
        coroutine.send(None)
    return coroutine


def test_a_slow_operator_of_a_deleted_job_meets_a_returned_entry(world: World) -> None:
    job, uid = world.job("slow", "10")
    slow = stalled(world.book().reserve(job, uid, "c0"), lambda: bool(account_of(world.dataset.get("status"))))
    assert world.account.pending and not world.entries
    world.cluster.remove(FDJ, "research", "slow")
    world.tend()
    assert [entry.phase for entry in world.entries] == [Phase.RETURNED]
    spend(world, "10", "10")
    finished(slow)
    with pytest.raises(PrivacyRefusal, match="given back"):
        world.charge(job, uid)
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "True"
    assert sum(entry.phase is Phase.CHARGED for entry in world.entries) == 2


def wake_too_late(world: World, how: str) -> tuple[FederatedDiffusionJob, str]:
    """An operator whose reservation was lost with the account: others have the budget, and then it makes its entry."""
    job, uid = world.job("slow", "10")
    slow = stalled(world.book().reserve(job, uid, "c0"), lambda: bool(account_of(world.dataset.get("status"))))
    world.wipe() if how == "wiped" else world.recreate()
    spend(world, "10", "10")
    finished(slow)
    assert len(world.entries) == 3
    return job, uid


@pytest.mark.parametrize("how", ["wiped", "recreated"])
def test_an_entry_nobody_counted_cannot_be_charged_shows_and_heals(world: World, how: str) -> None:
    late = wake_too_late(world, how)
    with pytest.raises(PrivacyRefusal):
        world.charge(*late)
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "False"
    assert "contradicts itself" in world.reserve(*world.job("next", "1"))
    world.cluster.remove(FDJ, "research", "slow")
    world.tend()
    assert world.condition("LedgerConsistent")[0] == "True"
    assert world.account.num_entries == 3
    assert total_charge(world.account.charges).mu_squared <= LIMIT


def test_a_ledger_that_does_not_compare_its_books_charges_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    late = wake_too_late(world, "wiped")
    monkeypatch.setattr(ledger, "inconsistency", lambda account, entries: None)
    world.charge(*late)
    assert sum_of(world, Phase.CHARGED) > LIMIT


# ---- Interleavings -----------------------------------------------------------------------------------------------


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand races ask for the same few numbers and read the same versions of objects again and again; what is
    shown to people but decides nothing is left out."""
    monkeypatch.setattr(ledger, "budget_mu_squared", cache(ledger.budget_mu_squared))
    monkeypatch.setattr(ledger, "spent_epsilon", cache(ledger.spent_epsilon))
    parsed, read = dict[Any, Any](), dict[Any, Entry]()
    parse, read_entry = operator_ledger.parse, operator_ledger.entry_of

    def parse_once(model: Any, value: Object, where: str) -> Any:
        if value["metadata"]["uid"] not in parsed:
            parsed[value["metadata"]["uid"]] = parse(model, value, where)
        return parsed[value["metadata"]["uid"]]

    def entry_once(release: Object) -> Entry:
        key = (release["metadata"]["name"], release["spec"]["epsilon"], (release.get("status") or {}).get("phase"))
        if key not in read:
            read[key] = read_entry(release)
        return read[key]

    def account_alone(dataset: Object, books: ledger_objects.Books, now: datetime) -> Object:
        assert books.account is not None
        return {"account": ledger_objects.account_object(DATASET, books.account)}

    monkeypatch.setattr(operator_ledger, "parse", parse_once)
    monkeypatch.setattr(operator_ledger, "entry_of", entry_once)
    monkeypatch.setattr(operator_ledger, "dataset_status", account_alone)


JOBS = {
    (index, epsilon): FederatedDiffusionJob.model_validate(job_object(f"job-{index}", epsilon))
    for index in range(5)
    for epsilon in ("1", "2", "4", "8", "10")
}


async def errand(world: World, job: FederatedDiffusionJob, uid: str, gives_up: bool) -> None:
    """One operator's way with one job."""
    book = world.book()
    try:
        if await book.reserve(job, uid, "c0") is None:
            await (book.give_back if gives_up else book.charge)(job, uid, "c0")
    except (PrivacyRefusal, Unavailable):
        return


def race(draw: random.Random, compares: bool = True, tampers: bool = False) -> tuple[World, Decimal]:
    """Operators of three jobs that raced, stalled, crashed and were started again, while jobs were deleted (and
    with `tampers` the status wiped or the dataset recreated); and the most μ² ever held by charges and reservations."""
    world, most = World(FakeCluster(compares)), Decimal(0)
    errands = []
    for index in range(3):
        job, uid = JOBS[(index, draw.choice(["8", "10", "10"]))], f"uid-of-job-{index}"
        stored = job_object(job.metadata.name)
        world.cluster.put(FDJ, {**stored, "metadata": {**stored["metadata"], "uid": uid}})
        errands.append((world, job, uid, draw.random() < 0.15))
    running = [errand(*each) for each in errands]
    running += [errand(*draw.choice(errands))] if draw.random() < 0.5 else [world.book().tend(NAMESPACE, DATASET)]
    while running:
        mover, dice = draw.choice(running), draw.random()
        if dice < 0.02:  # kill -9, and another takes over
            running.remove(mover)
            mover.close()
            running.append(errand(*draw.choice(errands)))
        elif dice < 0.03:
            world.cluster.remove(FDJ, "research", draw.choice(errands)[1].metadata.name)
        elif dice < 0.04 and tampers:
            world.wipe() if draw.random() < 0.5 else world.recreate()
        elif moved(mover) is False:
            running.remove(mover)
        most = max(most, sum_of(world, Phase.RESERVED, Phase.CHARGED, Phase.UNKNOWN))
    return world, most


def moved(coroutine: Coroutine[None, None, Any]) -> bool:
    """One step further, unless it has ended."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    return True


def sum_of(world: World, *phases: Phase) -> Decimal:
    """μ² of the entries in these phases, read without parsing: this is asked after every call."""
    wanted = [phase.value for phase in phases]
    return sum(
        (
            Decimal(release["spec"]["charge"]["muSquared"])
            for release in world.cluster.peek(PRL)
            if (release.get("status") or {}).get("phase", "Unknown") in wanted
        ),
        Decimal(0),
    )


def charges_are_counted(world: World) -> bool:
    charged = total_charge(entry.charge for entry in world.entries if entry.phase is Phase.CHARGED)
    return charged.mu_squared <= total_charge(world.account.charges).mu_squared


NUM_RACES = (
    2_000  # 10,000 take two minutes and were run by hand; the transitions alone race 10,000 times in test_ledger
)
NUM_TAMPERED = 500


@pytest.mark.usefixtures("remembered")
def test_no_interleaving_overspends_and_every_charge_is_counted() -> None:
    draw, near = random.Random(4), 0
    for _ in range(NUM_RACES):
        world, most = race(draw)
        assert most <= LIMIT
        world.tend()
        assert charges_are_counted(world)
        assert ledger.inconsistency(world.account, world.entries) is None
        near += sum_of(world, Phase.CHARGED) > LIMIT / 2
    assert near > NUM_RACES / 10, "the races must come near the limit"


@pytest.mark.usefixtures("remembered")
def test_no_interleaving_overspends_while_the_account_is_wiped_and_recreated() -> None:
    draw, near = random.Random(5), 0
    for _ in range(NUM_TAMPERED):
        world, _ = race(draw, tampers=True)
        assert sum_of(world, Phase.CHARGED) <= LIMIT
        world.tend()
        assert charges_are_counted(world) or ledger.inconsistency(world.account, world.entries)
        near += sum_of(world, Phase.CHARGED) > LIMIT / 2
    assert near > NUM_TAMPERED / 10, "the races must come near the limit"


@pytest.mark.usefixtures("remembered")
def test_without_the_version_in_a_write_the_same_races_overspend() -> None:
    draw = random.Random(4)
    assert any(race(draw, compares=False)[1] > LIMIT for _ in range(300))


# ---- A real API server -------------------------------------------------------------------------------------------

JOB_EPSILON = "1"


@asynccontextmanager
async def operators(control_plane: ControlPlane, count: int) -> AsyncIterator[list[Cluster]]:
    """As many operators as asked for, each with connections of its own."""
    async with AsyncExitStack() as stack:
        kubeconfig = str(control_plane.kubeconfig)
        clusters = [await Cluster.from_kubeconfig(kubeconfig, qps=5000, burst=5000) for _ in range(count)]
        yield [await stack.enter_async_context(cluster) for cluster in clusters]


def job_with(namespace: str, name: str, datasets: tuple[str, ...] = (DATASET,)) -> FederatedDiffusionJob:
    document = job_object(name, JOB_EPSILON, datasets)
    for client in document["spec"]["clients"]:
        client["dataset"]["namespace"] = namespace
    return FederatedDiffusionJob.model_validate(document)


async def books_of(cluster: Cluster, namespace: str, name: str = DATASET) -> tuple[ledger.Account, list[Entry]]:
    dataset = await cluster.get(PDS, namespace, name)
    assert dataset is not None
    account = account_of(dataset["status"])
    assert account is not None
    releases = [each for each in await cluster.list(PRL, namespace) if each["spec"]["dataset"]["name"] == name]
    return account, [entry_of(each) for each in releases]


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it took effect"])
def test_an_operator_may_die_at_any_call_to_a_real_api_server(control_plane: ControlPlane, after: bool) -> None:
    async def die_everywhere() -> int:
        async with operators(control_plane, 1) as (cluster,):
            return len([dies_at for dies_at in range(1, NUM_CALLS + 2) if await died(cluster, dies_at)])

    async def died(cluster: Cluster, dies_at: int) -> bool:
        names = (f"scans-{dies_at}", f"more-scans-{dies_at}")
        for name in names:
            document = dataset_object(name=name)
            await cluster.create(PDS, {**document, "metadata": {"name": name, "namespace": namespace}})
        jobs = [(job_with(namespace, "first", names), f"uid-of-job-{dies_at}")]
        try:
            await reserve_and_charge(Mortal(cluster, dies_at, after), jobs, ["c0", "c1"])
        except Killed:
            await carry_on(cluster, jobs, ["c0", "c1"])
            await check(cluster, names)
            return True
        return False

    async def check(cluster: Cluster, names: tuple[str, ...]) -> None:
        for name in names:
            await ClusterLedger(cluster, clock).tend(namespace, name)
            account, entries = await books_of(cluster, namespace, name)
            assert [entry.phase for entry in entries] == [Phase.CHARGED]
            assert account.pending == () and account.charges[0] == entries[0].charge

    namespace = control_plane.namespace("clinic")
    assert asyncio.run(die_everywhere()) == NUM_CALLS


def test_a_real_ledger_is_shown_in_epsilon_and_adopted_when_recreated(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace("clinic")

    async def story() -> None:
        async with operators(control_plane, 1) as (cluster,):
            book, job = ClusterLedger(cluster, clock), job_with(namespace, "first")
            document = dataset_object("2")
            document["metadata"]["namespace"] = namespace
            await cluster.create(PDS, document)
            assert await book.reserve(job, "uid-1", "c0") is None
            await book.charge(job, "uid-1", "c0")
            await book.record_manifest(job, "uid-1", "c0", "a" * 64)
            await cluster.delete(PDS, namespace, DATASET)
            await cluster.create(PDS, document)
            await book.tend(namespace, DATASET)
            seen = await book.look(job, "uid-1", "c0")
            assert seen.hold is Hold.NONE and seen.refusal == ""

    asyncio.run(story())
    spent = control_plane.kubectl("get", "pds", "-n", namespace, "-o", "jsonpath={.items[0].status.budget.spent}")
    assert spent == "1"
    columns = control_plane.kubectl("get", "prl", "-n", namespace)
    assert "Charged" in columns and "summary" in columns
