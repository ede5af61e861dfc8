"""The ledger's transitions: what is admitted, what is refused in which words, and that no interleaving overspends."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddiff_protocol import ledger
from feddiff_protocol.accountant import Charge, charge_mu_squared, spent_epsilon, total_charge
from feddiff_protocol.api import AccessRule, BudgetSpec, FederatedDiffusionJob, PrivateDataset
from feddiff_protocol.errors import PrivacyRefusal
from feddiff_protocol.ledger import Account, Entry, Phase, Refusal

BUDGET = BudgetSpec(epsilon=Decimal(20), delta=Decimal("1e-5"))
CHARGES = {epsilon: charge_mu_squared(epsilon, "1e-5") for epsilon in ("1", "2", "4", "8", "10")}


def entry(job: str = "job-1", epsilon: str = "10", delta: str = "1e-5", unit: str = "image") -> Entry:
    return Entry(
        name=f"prl-{job}",
        dataset_uid="dataset",
        job_namespace="research",
        job_name=job,
        job_uid=job,
        client="a",
        mechanism="summary",
        unit=unit,
        epsilon=Decimal(epsilon),
        delta=Decimal(delta),
        charge=Charge(mu_squared=CHARGES[epsilon]),
        reserved_at="2025-01-01T00:00:00+00:00",
    )


def admitted(answer: Account | Refusal) -> Account:
    assert isinstance(answer, Account), answer
    return answer


def refused(answer: Account | Refusal) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.message


def after(*entries: Entry) -> tuple[Account, list[Entry]]:
    """Account and entries once all of these are reserved, created and folded."""
    account, made = Account(), list[Entry]()
    for each in entries:
        account = admitted(ledger.reserve(BUDGET, account, made, each))
        made.append(each)
        account = ledger.fold(account, each)
    return account, made


def _dropped(account: Account, name: str) -> Account:
    """The account as somebody leaves it who takes a reservation without an entry out of it."""
    return replace(account, pending=tuple(each for each in account.pending if each.name != name))


# ---- Reserve -----------------------------------------------------------------------------------------------------


def test_two_releases_of_ten_fit_twenty_and_a_third_is_refused_with_the_arithmetic() -> None:
    account, entries = after(entry("1"), entry("2"))
    assert spent_epsilon(account.charges, BUDGET.delta) == pytest.approx(15.4606, abs=5e-5)
    words = refused(ledger.reserve(BUDGET, account, entries, entry("3")))
    for part in ("15.4606 of 20", "per image", "δ = 0.00001", "20.1309", "> 11.887211, too much by 0.118137)"):
        assert part in words
    assert words.endswith("raise the budget or lower the job's ε to 9.8172")


@given(st.lists(st.sampled_from(sorted(CHARGES)), max_size=8), st.sampled_from(["1e-5", "1e-6", "1e-9"]))
def test_what_a_refusal_says_would_fit_is_admitted_and_a_little_more_is_not(spent: list[str], delta: str) -> None:
    account, entries = after(*(entry(f"{index}", epsilon) for index, epsilon in enumerate(spent) if index < 2))
    wanted = replace(entry("new"), epsilon=Decimal(30), delta=Decimal(delta))
    words = refused(ledger.reserve(BUDGET, account, entries, asking_for(wanted, "30")))
    fits = words.rpartition(" to ")[2]
    admitted(ledger.reserve(BUDGET, account, entries, asking_for(wanted, fits)))
    refused(ledger.reserve(BUDGET, account, entries, asking_for(wanted, str(Decimal(fits) + Decimal("1e-4")))))


def asking_for(request: Entry, epsilon: str) -> Entry:
    charge = Charge(mu_squared=charge_mu_squared(epsilon, request.delta))
    return replace(request, epsilon=Decimal(epsilon), charge=charge)


def test_a_budget_admits_one_release_of_its_own_epsilon() -> None:
    for epsilon in ("1", "2", "4", "8", "10"):
        budget = BudgetSpec(epsilon=Decimal(epsilon), delta=Decimal("1e-5"))
        admitted(ledger.reserve(budget, Account(), [], entry(epsilon=epsilon)))


def test_asking_again_for_what_is_held_changes_nothing() -> None:
    pending = admitted(ledger.reserve(BUDGET, Account(), [], entry()))
    assert ledger.reserve(BUDGET, pending, [], entry()) == pending
    account, entries = after(entry())
    assert ledger.reserve(BUDGET, account, entries, entry()) == account
    assert ledger.reserve(BUDGET, account, [ledger.charge(account, entries, entries[0])], entry()) == account


def test_asking_again_with_another_promise_is_refused() -> None:
    account, entries = after(entry(epsilon="4"))
    assert "another promise" in refused(ledger.reserve(BUDGET, account, entries, entry(epsilon="8")))


def test_what_was_given_back_cannot_be_taken_again() -> None:
    account, entries = after(entry())
    returned = ledger.give_back(entries[0])
    account = ledger.fold_returns(account, [returned])
    assert "given back" in refused(ledger.reserve(BUDGET, account, [returned], entry()))


def test_a_larger_delta_or_another_unit_than_the_budgets_is_refused() -> None:
    assert "δ can be at most" in refused(ledger.reserve(BUDGET, Account(), [], entry(delta="1e-4")))
    assert "per pixel" in refused(ledger.reserve(BUDGET, Account(), [], entry(unit="pixel")))


def test_pending_reservations_count_against_the_budget() -> None:
    account = admitted(ledger.reserve(BUDGET, Account(), [], entry("1")))
    account = admitted(ledger.reserve(BUDGET, account, [], entry("2")))
    refused(ledger.reserve(BUDGET, account, [], entry("3")))


@pytest.mark.parametrize("tampered", ["deleted", "cheaper", "returned"])
def test_a_ledger_that_contradicts_itself_admits_nothing(tampered: str) -> None:
    account, entries = after(entry("1", "4"))
    if tampered == "deleted":
        entries = []
    elif tampered == "cheaper":
        entries = [replace(entries[0], charge=Charge(CHARGES["1"]))]
    else:
        account = replace(account, returned=entries[0].charge)
    assert "contradicts itself" in refused(ledger.reserve(BUDGET, account, entries, entry("2", "1")))


# ---- Access ------------------------------------------------------------------------------------------------------


def dataset(*rules: AccessRule, federation: str = "") -> PrivateDataset:
    return PrivateDataset.model_validate(
        {
            "metadata": {"name": "scans", "namespace": "clinic-a"},
            "spec": {
                "source": {"format": "npz", "path": "train.npz"},
                "image": {"channels": 1, "height": 8, "width": 8},
                "classes": {"count": 1, "records": [9]},
                "budget": {"epsilon": "20", "delta": "1e-5"},
                "access": [rule.to_wire() for rule in rules],
                **({"federation": {"uri": federation}} if federation else {}),
            },
        }
    )


def job(namespace: str, epsilon: object, store: str = "") -> FederatedDiffusionJob:
    return FederatedDiffusionJob.model_validate(
        {
            "metadata": {"name": "digits", "namespace": namespace},
            "spec": {
                "clients": [{"name": "a", "dataset": {"name": "scans", "namespace": "clinic-a"}}],
                "privacy": {"mechanism": "gaussian", "epsilon": str(epsilon), "delta": "1e-5", "clipNorm": "4"},
                **({"store": {"uri": store}} if store else {}),
            },
        }
    )


def test_nobody_may_use_a_dataset_by_default() -> None:
    refusal = ledger.access_refusal(dataset(), job("research", 1))
    assert refusal is not None and "lets no job of namespace research" in refusal.message


def test_the_most_generous_rule_of_a_namespace_decides() -> None:
    rules = [AccessRule(namespace="research", max_epsilon=Decimal(most)) for most in (2, 5)]
    assert ledger.access_refusal(dataset(*rules), job("research", 5)) is None
    refusal = ledger.access_refusal(dataset(*rules), job("research", "5.01"))
    assert refusal is not None and "ε ≤ 5, this one asks 5.01" in refusal.message
    assert ledger.access_refusal(dataset(*rules), job("elsewhere", 1)) is not None
    assert ledger.access_refusal(dataset(AccessRule(namespace="research")), job("research", 99)) is None


def test_the_largest_epsilon_of_a_rule_holds_for_pure_epsilon_too() -> None:
    document = job("research", 5).to_wire()
    document["spec"]["privacy"] = {"mechanism": "privunit", "epsilon": "5", "clipNorm": "4"}
    document["spec"]["diffusion"]["splitSigma"] = "0.25"
    asking = FederatedDiffusionJob.model_validate(document)
    refusal = ledger.access_refusal(dataset(AccessRule(namespace="research", max_epsilon=Decimal("4.99"))), asking)
    assert refusal is not None and "ask for ε ≤ 4.99, this one asks 5" in refusal.message
    rule = AccessRule(namespace="research", max_epsilon=Decimal(5))
    assert ledger.access_refusal(dataset(rule), asking) is None


def test_a_release_goes_to_no_store_but_the_one_its_owner_names() -> None:
    rule, theirs = AccessRule(namespace="research"), "s3://federation/jobs"
    named = dataset(rule, federation=theirs)
    for store in (theirs, f"{theirs}/", ""):  # a run on one machine has a folder of its own
        assert ledger.access_refusal(named, job("research", 1, store)) is None
    for store in ("s3://elsewhere/jobs", "s3://federation", "s3://federation/jobs/x", "s3://federation/jobs2"):
        refusal = ledger.access_refusal(named, job("research", 1, store))
        assert refusal is not None and f"releases to spec.federation.uri = {theirs} alone" in refusal.message
    assert ledger.access_refusal(dataset(rule), job("research", 1, "s3://elsewhere/jobs")) is None


# ---- Charge, give back, manifest ---------------------------------------------------------------------------------


def test_charged_never_comes_back() -> None:
    account, entries = after(entry())
    charged = ledger.charge(account, entries, entries[0])
    assert ledger.give_back(charged) == charged
    assert ledger.charge(account, [charged], charged) == charged


def test_what_was_given_back_frees_the_budget_and_cannot_be_charged() -> None:
    account, entries = after(entry("1"), entry("2"))
    returned = ledger.give_back(entries[0])
    account = ledger.fold_returns(account, [returned, entries[1]])
    assert ledger.fold_returns(account, [returned, entries[1]]) == account
    admitted(ledger.reserve(BUDGET, account, [returned, entries[1]], entry("3")))
    with pytest.raises(PrivacyRefusal, match="given back"):
        ledger.charge(account, [returned, entries[1]], returned)


def test_an_entry_whose_reservation_was_dropped_cannot_be_charged() -> None:
    """A planner drops the reservation of a job it believes gone; a zombie of that job then creates the entry."""
    account = admitted(ledger.reserve(BUDGET, Account(), [], entry("zombie")))
    account = _dropped(account, entry("zombie").name)
    account = ledger.fold(account, entry("zombie"))
    with pytest.raises(PrivacyRefusal, match="contradicts itself"):
        ledger.charge(account, [entry("zombie")], entry("zombie"))


def test_an_entry_that_is_not_folded_cannot_be_charged() -> None:
    account = admitted(ledger.reserve(BUDGET, Account(), [], entry()))
    with pytest.raises(PrivacyRefusal, match="fold it"):
        ledger.charge(account, [entry()], entry())


def test_folding_twice_changes_nothing() -> None:
    account, entries = after(entry())
    assert ledger.fold(account, entries[0]) == account


def test_one_entry_holds_one_manifest() -> None:
    account, entries = after(entry())
    with pytest.raises(PrivacyRefusal, match="without a charge"):
        ledger.record_manifest(entries[0], "0" * 64)
    once = ledger.record_manifest(ledger.charge(account, entries, entries[0]), "0" * 64)
    assert ledger.record_manifest(once, "0" * 64) == once
    with pytest.raises(PrivacyRefusal, match="a second release"):
        ledger.record_manifest(once, "1" * 64)


# ---- A past, and contradictions ----------------------------------------------------------------------------------


def net(account: Account) -> Decimal:
    return total_charge(account.charges).mu_squared


def test_an_entry_that_lost_its_phase_counts_for_good_and_releases_nothing() -> None:
    account, entries = after(entry())
    lost = replace(entries[0], phase=Phase.UNKNOWN)
    assert ledger.give_back(lost) == lost
    assert ledger.settled(account, [lost]) == account
    assert "lost its phase" in refused(ledger.reserve(BUDGET, account, [lost], entry()))
    with pytest.raises(PrivacyRefusal, match="lost its phase"):
        ledger.charge(account, [lost], lost)
    with pytest.raises(PrivacyRefusal, match="without a charge"):
        ledger.record_manifest(lost, "0" * 64)


def test_a_past_is_adopted_as_it_was_counted() -> None:
    account, entries = after(entry("1"), entry("2", "4"))
    entries = [ledger.charge(account, entries, entries[0]), ledger.give_back(entries[1])]
    account = ledger.settled(account, entries)
    assert ledger.adopt(entries) == account
    assert ledger.adopt([]) == Account()


def test_settling_folds_what_exists_and_takes_off_what_was_given_back() -> None:
    account = admitted(ledger.reserve(BUDGET, Account(), [], entry("1")))
    account = admitted(ledger.reserve(BUDGET, account, [], entry("2", "4")))
    made = [ledger.give_back(entry("1")), replace(entry("2", "4"), phase=Phase.UNKNOWN)]
    settled = ledger.settled(account, made)
    assert [each.name for each in settled.pending] == ["prl-2"], "an entry at its birth is not counted twice"
    assert net(settled) == CHARGES["4"]
    assert ledger.settled(settled, made) == settled


def test_a_reservation_whose_entry_promises_something_else_is_a_contradiction() -> None:
    account = admitted(ledger.reserve(BUDGET, Account(), [], entry("1", "10")))
    cheaper = entry("1", "1")
    assert "promises something else" in (ledger.inconsistency(account, [cheaper]) or "")
    assert ledger.settled(account, [cheaper]) == account


def test_an_entry_nobody_counted_heals_only_once_it_counts_for_nothing() -> None:
    account, entries = after(entry("1"), entry("2"))
    stranger = entry("3", "4")
    assert ledger.settled(account, [*entries, stranger]) == account
    healed = ledger.settled(account, [*entries, ledger.give_back(stranger)])
    assert healed.num_entries == 3 and net(healed) == net(account)
    assert ledger.inconsistency(healed, [*entries, ledger.give_back(stranger)]) is None


def test_a_return_never_takes_off_what_was_not_counted() -> None:
    """The mutant of settling: folding a stranger's return without counting the stranger frees somebody's budget."""
    account, entries = after(entry("1"), entry("2"))
    seen = [*entries, ledger.give_back(entry("3", "4"))]
    assert net(ledger.settled(account, seen)) == net(account)
    assert net(ledger.fold_returns(account, seen)) < net(account)


def test_what_was_acknowledged_is_the_larger_of_both_sums() -> None:
    account, entries = after(entry("1", "8"), entry("2", "4"))
    for seen in ([entries[0]], [*entries, entry("3", "1")], [replace(entries[0], charge=Charge(CHARGES["1"]))], []):
        assert ledger.contradiction(account, seen).startswith("1: the account")
        rebuilt = ledger.acknowledge(account, seen)
        assert ledger.contradiction(rebuilt, seen) == ""
        assert net(rebuilt) == max(net(account), total_charge(each.charge for each in seen).mu_squared)


@given(st.data())
def test_neither_settling_nor_acknowledging_ever_forgets_what_counts(data: st.DataObject) -> None:
    """Whatever was deleted, added or given back: the sum falls by what was given back and counted, by nothing else."""
    account, entries = after(entry("1", "8"), entry("2", "4"), entry("3", "4"), entry("4", "1"))
    phases = st.sampled_from([Phase.RESERVED, Phase.CHARGED, Phase.RETURNED, Phase.UNKNOWN])
    candidates = [*entries, entry("5", "2"), entry("6", "4")]
    seen = [replace(each, phase=data.draw(phases)) for each in candidates if data.draw(st.booleans())]
    counting = total_charge(each.charge for each in seen if each.phase is not Phase.RETURNED).mu_squared
    given_back = total_charge(each.charge for each in seen if each.phase is Phase.RETURNED).mu_squared
    assert net(ledger.settled(account, seen)) >= net(account) - given_back
    if ledger.contradiction(ledger.settled(account, seen), seen):
        assert ledger.settled(account, seen) == account
        assert net(ledger.acknowledge(account, seen)) == max(net(account), counting)
    else:
        assert net(ledger.settled(account, seen)) >= counting


def test_an_old_acknowledgement_never_covers_a_new_contradiction() -> None:
    account, entries = after(entry("1", "1"), entry("2", "1"))
    first = ledger.contradiction(account, entries[:1])
    account = ledger.acknowledge(account, entries[:1])
    again = ledger.fold(admitted(ledger.reserve(BUDGET, account, entries[:1], entry("3", "1"))), entry("3", "1"))
    second = ledger.contradiction(again, entries[:1])
    assert first.removeprefix("1: ") == second.removeprefix("2: ") and first != second


def test_what_exceeds_a_smaller_budget_is_said_in_words() -> None:
    account, _ = after(entry("1", "8"))
    assert ledger.excess(BUDGET, account) == ""
    smaller = BudgetSpec(epsilon=Decimal(4), delta=Decimal("1e-5"))
    assert "ε = 8.0000 of 4" in ledger.excess(smaller, account)


MIXED = BudgetSpec(epsilon=Decimal(12), delta=Decimal("1e-5"), pure_epsilon=Decimal(2))


def pure(job: str, epsilon: str) -> Entry:
    charge = Charge(pure_epsilon=Decimal(epsilon))
    return replace(entry(job, "1"), mechanism="privunit", epsilon=Decimal(epsilon), delta=Decimal(0), charge=charge)


def test_pure_epsilon_comes_from_the_part_of_the_budget_set_aside_for_it() -> None:
    refusal = refused(ledger.reserve(BUDGET, Account(), [], pure("1", "0.5")))
    assert "pure ε: 0 + 0.5 > 0, too much by 0.5" in refusal and refusal.endswith("nothing is left of it")
    account = admitted(ledger.reserve(MIXED, Account(), [], pure("1", "1.25")))
    refusal = refused(ledger.reserve(MIXED, account, [], pure("2", "1")))
    assert "pure ε: 1.25 + 1 > 2, too much by 0.25" in refusal and "raise the budget" not in refusal
    assert refusal.endswith("lower the job's ε to 0.75")
    account = admitted(ledger.reserve(MIXED, account, [], pure("3", "0.75")))
    assert "pure ε: 2.00 + 1e-3" in refused(ledger.reserve(MIXED, account, [], pure("4", "1e-3"))).replace(
        "0.001", "1e-3"
    )
    account = admitted(ledger.reserve(MIXED, account, [], entry("5", "10")))  # the other part is untouched
    refusal = refused(ledger.reserve(MIXED, account, [], entry("6", "1")))
    assert "μ²: 4.001783 + 0.071851 > 4.001783 once pureEpsilon = 2 is set aside, too much by 0.0718514" in refusal
    assert refusal.endswith("nothing is left; raise the budget")


@pytest.mark.parametrize("budget", [BUDGET, MIXED])
def test_what_remains_of_pure_epsilon_is_what_one_more_release_may_ask_for(budget: BudgetSpec) -> None:
    account, left = Account(), budget.pure_epsilon
    for index, epsilon in enumerate(("0.3", "1.7", "0.1")):
        answer = ledger.reserve(budget, account, [], pure(f"job-{index}", epsilon))
        assert isinstance(answer, Account) == (Decimal(epsilon) <= left)
        account = answer if isinstance(answer, Account) else account
        left = ledger.remaining_pure_epsilon(budget, account.charges)
        assert left == budget.pure_epsilon - sum(charge.pure_epsilon for charge in account.charges)


def test_a_pure_charge_that_was_changed_is_named() -> None:
    account = admitted(ledger.reserve(MIXED, Account(), [], pure("1", "1")))
    account = ledger.fold(account, pure("1", "1"))
    assert ledger.inconsistency(account, [pure("1", "1")]) is None
    found = ledger.inconsistency(account, [pure("1", "0.5")])
    assert found == "the account sums to μ² = 0 and pure ε = 1, its entries to 0 and pure ε = 0.5"


@given(st.lists(st.sampled_from(sorted(CHARGES)), max_size=12))
def test_remaining_epsilon_is_what_one_more_release_may_ask_for(asked: list[str]) -> None:
    account, entries = Account(), list[Entry]()
    for index, epsilon in enumerate(asked):
        request = entry(f"job-{index}", epsilon)
        left = ledger.remaining_epsilon(BUDGET, account.charges)
        answer = ledger.reserve(BUDGET, account, entries, request)
        assert isinstance(answer, Account) == (float(epsilon) <= left + 1e-9)
        if isinstance(answer, Account):
            entries.append(request)
            account = ledger.fold(answer, request)
    assert ledger.remaining_epsilon(BUDGET, account.charges) <= 20


# ---- Races -------------------------------------------------------------------------------------------------------


class Conflict(Exception):
    """Somebody else wrote first."""


@dataclass
class Cluster:
    """An API server: single objects, each with a version, changed by compare-and-swap only."""

    account: Account = field(default_factory=Account)
    version: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)

    def swap(self, version: int, account: Account) -> None:
        if version != self.version:
            raise Conflict
        self.account, self.version = account, version + 1

    def charged(self) -> tuple[Charge, ...]:
        """What may have left, cheapest first."""
        charges = (each.charge for each in self.entries.values() if each.phase is Phase.CHARGED)
        return tuple(sorted(charges, key=lambda charge: charge.mu_squared))


def actor(cluster: Cluster, request: Entry, reserves: bool, gives_up: bool) -> Iterator[None]:
    """One planner's way to a release; yields wherever another may come in between. A mutant has `reserves` False."""
    while True:
        account, version = cluster.account, cluster.version
        yield
        entries = tuple(cluster.entries.values())
        yield
        answer = ledger.reserve(BUDGET, account, entries, request)
        if not reserves:  # the filter sees what is spent already, not what others have reserved
            counted = [each for each in entries if not account.is_pending(each.name)]
            answer = ledger.reserve(BUDGET, replace(account, pending=()), counted, request)
        if isinstance(answer, Refusal):
            return
        pending = account.pending if account.is_pending(request.name) else (*account.pending, request)
        try:
            cluster.swap(version, answer if reserves else replace(account, pending=pending))
            break
        except Conflict:
            continue
    yield
    cluster.entries.setdefault(request.name, request)
    yield
    yield from swapped(cluster, lambda account, entries: ledger.fold(account, request))
    if gives_up:
        cluster.entries[request.name] = ledger.give_back(cluster.entries[request.name])
        yield
        yield from swapped(cluster, ledger.fold_returns)
        return
    account = cluster.account
    yield
    entries = tuple(cluster.entries.values())
    yield
    # Two engines of one job do the same things; the entry itself changes by compare-and-swap.
    try:
        cluster.entries[request.name] = ledger.charge(account, entries, cluster.entries[request.name])
    except PrivacyRefusal:
        return


def swapped(cluster: Cluster, change: object) -> Iterator[None]:
    while True:
        account, version = cluster.account, cluster.version
        yield
        entries = tuple(cluster.entries.values())
        yield
        try:
            cluster.swap(version, change(account, entries))  # type: ignore[operator]
            return
        except Conflict:
            continue


def dropper(cluster: Cluster, name: str) -> Iterator[None]:
    """A planner that takes a job for gone: it drops a reservation that it saw without an entry."""
    account, version = cluster.account, cluster.version
    yield
    if name not in cluster.entries and account.is_pending(name):
        yield
        try:
            cluster.swap(version, _dropped(account, name))
        except Conflict:
            return


def race(draw: random.Random, reserves: bool = True) -> float:
    """ε of all that was charged after planners of several jobs raced, crashed, and were started again."""
    cluster, running = Cluster(), list[Iterator[None]]()
    requests = [entry(f"job-{index}", draw.choice(list(CHARGES))) for index in range(draw.randint(2, 5))]
    gives_up = {request.name: draw.random() < 0.2 for request in requests}
    for request in requests:
        for _ in range(draw.randint(1, 2)):
            running.append(actor(cluster, request, reserves, gives_up[request.name]))
    running += [dropper(cluster, draw.choice(requests).name) for _ in range(draw.randint(0, 2))]
    restarts = 4
    while running:
        mover = draw.choice(running)
        if draw.random() < 0.04:  # a crash: this planner never moves again; perhaps another takes over
            running.remove(mover)
            if restarts:
                restarts -= 1
                request = draw.choice(requests)
                running.append(actor(cluster, request, reserves, gives_up[request.name]))
            continue
        if next(mover, "ended") == "ended":
            running.remove(mover)
    return ledger.spent_epsilon(cluster.charged(), BUDGET.delta)


NUM_RACES = 10_000


@pytest.fixture
def remembered_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand races ask the accountant for the same few numbers."""
    monkeypatch.setattr(ledger, "budget_mu_squared", cache(ledger.budget_mu_squared))
    monkeypatch.setattr(ledger, "spent_epsilon", cache(ledger.spent_epsilon))


@pytest.mark.usefixtures("remembered_arithmetic")
def test_no_interleaving_of_racing_and_crashing_planners_overspends() -> None:
    draw = random.Random(0)
    spent = [race(draw) for _ in range(NUM_RACES)]
    assert max(spent) <= 20
    assert sum(each > 10 for each in spent) > NUM_RACES / 10, "the races must come near the limit"


@pytest.mark.usefixtures("remembered_arithmetic")
def test_planners_that_do_not_reserve_are_caught_overspending() -> None:
    draw = random.Random(0)
    assert max(race(draw, reserves=False) for _ in range(1000)) > 20
