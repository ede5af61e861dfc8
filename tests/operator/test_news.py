"""What a data owner is told of its ledger, and that it is told once."""

from typing import Any

from fake_cluster import FakeCluster, finished, no_sleep
from feddiff_operator.cluster import PDS, PRL
from feddiff_operator.ledger import ClusterLedger
from feddiff_operator.news import _spent, news
from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.labels import ACKNOWLEDGE
from many_jobs import START, dataset, job

Object = dict[str, Any]
PLACE = ("clinic-a-0", "scans")


class World:
    """One owner's ledger, and all that its owner is told."""

    def __init__(self, epsilon: str = "20") -> None:
        self.cluster, self.told, self.warnings = FakeCluster(), list[tuple[str, str]](), set[str]()
        self.epsilon = epsilon
        self.create()
        self.ledger = ClusterLedger(self.cluster, lambda: START, no_sleep, tell=self.tell)

    def create(self, **spec: Any) -> None:
        found = dataset("a", 0)
        budget = {"epsilon": self.epsilon, "delta": "1e-5"}
        self.cluster.put(PDS, {**found, "spec": {**found["spec"], "budget": budget, **spec}})

    def tell(self, before: Object, after: Object) -> None:
        for each in news(before, after):
            self.told.append((each.reason, each.message))
            self.warnings |= {each.reason} if each.warning else set()

    @property
    def found(self) -> Object:
        return self.cluster.objects[PDS.name, *PLACE]

    def spend(self, number: int) -> None:
        """One release of ε = 10, all the way."""
        uid = f"uid-of-job-{number}"
        asked = FederatedDiffusionJob.model_validate(job(number, 0))
        assert finished(self.ledger.reserve(asked, uid, "a")) is None
        finished(self.ledger.charge(asked, uid, "a"))
        self.tend()

    def tend(self) -> list[tuple[str, str]]:
        """What was told since the last time."""
        finished(self.ledger.tend(*PLACE))
        finished(self.ledger.tend(*PLACE))  # nothing is told twice
        told, self.told = self.told, []
        return told

    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.tend()]


def test_a_charge_is_told_with_what_is_spent_and_left_and_a_reservation_is_not() -> None:
    world = World()
    assert world.reasons() == []
    asked = FederatedDiffusionJob.model_validate(job(0, 0))
    assert finished(world.ledger.reserve(asked, "uid-of-job-0", "a")) is None
    finished(world.ledger.charge(asked, "uid-of-job-0", "a"))
    ((reason, message),) = world.tend()
    assert reason == "Charged" and message.startswith("ε = 10 of 20 is spent, ") and message.endswith(" remains")
    assert world.warnings == set()


def test_what_is_left_of_pure_epsilon_is_told_where_some_was_set_aside() -> None:
    dataset = {"spec": {"budget": {"epsilon": "20"}}, "status": {"budget": {"spent": "2", "remaining": "15"}}}
    assert _spent(dataset) == "ε = 2 of 20 is spent, 15 remains"
    dataset["status"]["budget"]["remainingPure"] = "3"
    assert _spent(dataset) == "ε = 2 of 20 is spent, 15 remains, of pure ε 3"


def test_a_budget_that_is_spent_is_told_and_that_it_was_raised() -> None:
    world = World("10")
    world.spend(0)
    assert world.warnings == {"BudgetExhausted"}
    world.cluster.put(
        PDS, {**world.found, "spec": {**world.found["spec"], "budget": {"epsilon": "30", "delta": "1e-5"}}}
    )
    assert world.reasons() == ["BudgetLeft"]


def test_a_mismatch_is_told_with_the_way_out_and_its_acknowledgement_too() -> None:
    world = World()
    world.spend(0)
    (entry,) = world.cluster.peek(PRL)
    world.cluster.remove(PRL, entry["metadata"]["namespace"], entry["metadata"]["name"])
    ((reason, message),) = world.tend()
    assert reason == "LedgerMismatch" and f"annotate --overwrite pds scans {ACKNOWLEDGE}=" in message
    assert world.warnings == {"LedgerMismatch"}
    words = message.split(f"{ACKNOWLEDGE}='")[1].rstrip("'")
    world.cluster.put(
        PDS, {**world.found, "metadata": {**world.found["metadata"], "annotations": {ACKNOWLEDGE: words}}}
    )
    ((reason, message),) = world.tend()
    assert reason == "LedgerAcknowledged" and "ε = 10 of 20 is spent" in message


def test_an_adopted_past_is_told() -> None:
    world = World()
    world.spend(0)
    world.cluster.remove(PDS, *PLACE)
    world.create()
    ((reason, message),) = world.tend()
    assert reason == "PastAdopted" and message.startswith("1 earlier entries") and "ε = 10 of 20 is spent" in message


def test_a_spec_that_cannot_be_understood_is_told_once() -> None:
    world = World()
    world.cluster.put(PDS, {**world.found, "spec": {**world.found["spec"], "classes": {"count": 2, "records": [1]}}})
    assert world.reasons() == ["SpecInvalid"]
    assert world.warnings == {"SpecInvalid"}


def test_a_teller_that_compared_nothing_would_repeat_itself() -> None:
    """The mutant: every status is news."""
    world = World("10")
    world.spend(0)
    found = world.found
    assert news(found, found) == []
    assert news({**found, "status": {}}, found) != []
