"""Entries and accounts as Kubernetes objects: exact both ways, refused where they make no sense, shown in ε."""

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddiff_protocol import ledger
from feddiff_protocol.accountant import Charge, charge_mu_squared, spent_epsilon
from feddiff_protocol.api import BudgetSpec
from feddiff_protocol.crd import definitions
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.ledger import Account, Entry, Phase
from feddiff_protocol.ledger_objects import (
    Books,
    account_object,
    account_of,
    dataset_status,
    entry_of,
    release_object,
    with_status_of,
)

Object = dict[str, Any]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 1, 2, tzinfo=UTC)
BUDGET = BudgetSpec(epsilon=Decimal(20), delta=Decimal("1e-5"))


def entry(job: str = "job-1", epsilon: str = "10", **changes: Any) -> Entry:
    made = Entry(
        name=f"prl-{job}",
        dataset_uid="uid-of-scans",
        job_namespace="research",
        job_name=job,
        job_uid=f"uid-of-{job}",
        client="a",
        mechanism="summary",
        unit="image",
        epsilon=Decimal(epsilon),
        delta=Decimal("1e-5"),
        charge=Charge(charge_mu_squared(epsilon, "1e-5")),
        reserved_at="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **changes)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


# ---- Entries -----------------------------------------------------------------------------------------------------

decimals = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(0, 10**12 - 1), st.integers(0, 40)
)
positive = decimals.filter(bool)
small = st.builds(lambda digits, places: Decimal(digits).scaleb(-places), st.integers(1, 999), st.integers(3, 40))


@given(positive, small, decimals)
def test_an_entry_comes_back_as_it_went(epsilon: Decimal, delta: Decimal, mu_squared: Decimal) -> None:
    went = replace(entry(), epsilon=epsilon, delta=delta, charge=Charge(mu_squared))
    came = entry_of(through_json(with_status_of(release_object("clinic-a", "scans", went), went)))
    assert came == went
    assert str(came.charge.mu_squared) == str(went.charge.mu_squared)


@pytest.mark.parametrize("phase", Phase)
def test_phase_and_manifest_are_the_status(phase: Phase) -> None:
    went = entry(phase=phase, manifest_sha256="a" * 64)
    release = with_status_of(release_object("clinic-a", "scans", went), went)
    assert release["status"] == {"phase": phase.value, "manifestSha256": "a" * 64}
    assert entry_of(release) == went


@pytest.mark.parametrize("status", [None, {}, {"phase": "Resreved"}, {"phase": 3}])
def test_an_entry_without_a_phase_is_unknown(status: Object | None) -> None:
    assert entry_of({**release_object("clinic-a", "scans", entry()), "status": status}).phase is Phase.UNKNOWN


def test_a_release_says_whose_it_is_and_is_owned_by_nobody() -> None:
    release = release_object("clinic-a", "scans", entry())
    assert release["spec"]["dataset"] == {"name": "scans", "uid": "uid-of-scans"}
    assert release["metadata"]["labels"]["feddiff.dev/job-uid"] == "uid-of-job-1"
    assert "ownerReferences" not in release["metadata"]


@pytest.mark.parametrize(
    "changes",
    [{"charge": Charge(Decimal("1e-120"))}, {"charge": Charge(Decimal("0." + "1" * 30))}, {"unit": "person"}],
)
def test_an_entry_that_the_api_cannot_hold_is_refused_before_anything_is_reserved(changes: Object) -> None:
    with pytest.raises(SpecInvalid):
        release_object("clinic-a", "scans", entry(**changes))


@pytest.mark.parametrize(
    ("path", "value"), [(("spec", "epsilon"), 10), (("spec", "charge"), None), (("status",), "Charged")]
)
def test_a_release_that_makes_no_sense_is_refused_by_name(path: tuple[str, ...], value: object) -> None:
    release = copy.deepcopy(release_object("clinic-a", "scans", entry()))
    target = release
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(SpecInvalid, match="PrivacyRelease clinic-a/prl-job-1"):
        entry_of(release)


# ---- The account -------------------------------------------------------------------------------------------------

charges = st.builds(Charge, decimals, decimals)


@given(charges, charges, st.lists(st.sampled_from(["1", "4", "10"]), max_size=3), st.integers(0, 10**6))
def test_an_account_comes_back_as_it_went(one: Charge, two: Charge, pending: list[str], count: int) -> None:
    account = Account(
        num_entries=count,
        total=ledger.total_charge([one, two]),
        returned=two,
        pending=tuple(entry(f"job-{index}", epsilon) for index, epsilon in enumerate(pending)),
        lost=one,
        num_acknowledged=count,
    )
    status = {"account": account_object("scans", account)}
    assert account_of(through_json(status)) == account


@pytest.mark.parametrize("status", [None, {}, {"budget": {}}, {"account": None}])
def test_a_dataset_without_an_account_has_none(status: Object | None) -> None:
    assert account_of(status) is None


@pytest.mark.parametrize(
    "change",
    [
        {"numEntries": "1"},
        {"numEntries": -1},
        {"numEntries": True},
        {"total": {"muSquared": 4.0, "pureEpsilon": "0"}},
        {"total": {"muSquared": "NaN", "pureEpsilon": "0"}},
        {"total": {"muSquared": "-1", "pureEpsilon": "0"}},
        {"total": {"muSquared": "4"}},
        {"returned": {"muSquared": "1000000", "pureEpsilon": "0"}},
        {"pending": [{"name": "prl-1"}]},
        {"pending": None},
        {"lost": None},
    ],
)
def test_an_account_that_makes_no_sense_is_refused(change: Object) -> None:
    sound = account_object("scans", Account(1, Charge(Decimal(4)), pending=(entry(),)))
    assert account_of({"account": sound}) is not None
    with pytest.raises(SpecInvalid, match="cannot be understood"):
        account_of({"account": {**sound, **change}})


@pytest.mark.parametrize("account", ["mine", 7, []])
def test_an_account_that_is_no_mapping_is_refused(account: object) -> None:
    with pytest.raises(SpecInvalid, match="cannot be understood"):
        account_of({"account": account})


# ---- The status --------------------------------------------------------------------------------------------------


def dataset(status: Object | None = None) -> Object:
    metadata = {"name": "scans", "namespace": "clinic-a", "generation": 3}
    return {"metadata": metadata, **({} if status is None else {"status": status})}


def books(*entries: Entry, pending: tuple[Entry, ...] = (), **more: Any) -> Books:
    account = replace(ledger.adopt(entries), pending=pending)
    return Books(**{"account": account, "entries": entries, "budget": BUDGET, **more})


def conditions(status: Object) -> dict[str, str]:
    return {each["type"]: f"{each['status']} {each['reason']}" for each in status["conditions"]}


def test_a_fresh_dataset_is_ready_with_all_of_its_budget() -> None:
    status = dataset_status(dataset(), books(), NOW)
    charged = {"chargedMuSquared": "0", "chargedPureEpsilon": "0"}
    assert status["budget"] == {"spent": "0", "reserved": "0", "remaining": "20", "remainingPure": "0", **charged}
    assert conditions(status) == {
        "Ready": "True Ready",
        "LedgerConsistent": "True Consistent",
        "BudgetExhausted": "False BudgetLeft",
    }
    assert status["observedGeneration"] == 3 and status["numReleases"] == 0


def test_spent_is_rounded_up_remaining_down_and_reserved_is_the_rest() -> None:
    charged, open_one, waiting = entry("1", phase=Phase.CHARGED), entry("2"), entry("3", "1")
    status = dataset_status(dataset(), books(charged, open_one, pending=(waiting,)), NOW)
    budget = {key: Decimal(value) for key, value in status["budget"].items()}
    everything = spent_epsilon([charged.charge, open_one.charge, waiting.charge], BUDGET.delta)
    assert budget["spent"] == 10 and budget["chargedMuSquared"] == charged.charge.mu_squared
    assert everything <= budget["spent"] + budget["reserved"] <= Decimal(everything) + Decimal("1e-4")
    left = ledger.remaining_epsilon(BUDGET, [charged.charge, open_one.charge, waiting.charge])
    assert Decimal(left) - Decimal("1e-4") <= budget["remaining"] <= left + 1e-9
    assert status["numReleases"] == 2


def test_what_was_given_back_is_neither_spent_nor_reserved_and_what_lost_its_phase_is_spent() -> None:
    status = dataset_status(dataset(), books(entry("1", phase=Phase.RETURNED), entry("2", phase=Phase.UNKNOWN)), NOW)
    assert (status["budget"]["spent"], status["budget"]["reserved"]) == ("10", "0")
    assert status["numReleases"] == 1


def test_nothing_reserved_is_a_plain_0_whatever_is_spent() -> None:
    status = dataset_status(dataset(), books(entry("1", "0.1234", phase=Phase.CHARGED)), NOW)
    assert "." in status["budget"]["spent"]
    assert status["budget"]["reserved"] == "0"


def test_a_budget_that_is_spent_says_so() -> None:
    small = BudgetSpec(epsilon=Decimal(10), delta=Decimal("1e-5"))
    status = dataset_status(dataset(), books(entry("1", phase=Phase.CHARGED), budget=small), NOW)
    assert conditions(status)["BudgetExhausted"] == "True BudgetSpent" and status["budget"]["remaining"] == "0"
    smaller = BudgetSpec(epsilon=Decimal(4), delta=Decimal("1e-5"))
    status = dataset_status(dataset(), books(entry("1", phase=Phase.CHARGED), budget=smaller), NOW)
    assert conditions(status)["BudgetExhausted"] == "True BudgetExceeded"


def test_pure_epsilon_is_shown_apart_and_keeps_a_budget_from_being_spent() -> None:
    mixed = BudgetSpec(epsilon=Decimal(12), delta=Decimal("1e-5"), pure_epsilon=Decimal(2))
    pure = entry("2", "1.5", charge=Charge(pure_epsilon=Decimal("1.5")), delta=Decimal(0), phase=Phase.CHARGED)
    charged = (entry("1", phase=Phase.CHARGED), pure)
    status = dataset_status(dataset(), books(*charged, budget=mixed), NOW)
    budget = status["budget"]
    assert (budget["spent"], budget["chargedPureEpsilon"]) == ("11.5", "1.5")
    assert (budget["remaining"], budget["remainingPure"]) == ("0", "0.5")
    assert conditions(status)["BudgetExhausted"] == "False BudgetLeft"
    last = entry("3", "0.5", charge=Charge(pure_epsilon=Decimal("0.5")), delta=Decimal(0), phase=Phase.CHARGED)
    status = dataset_status(dataset(), books(*charged, last, budget=mixed), NOW)
    assert status["budget"]["remainingPure"] == "0"
    assert conditions(status)["BudgetExhausted"] == "True BudgetSpent"
    status = dataset_status(dataset(), books(pure, budget=mixed, contradiction="1: they differ"), NOW)
    assert status["budget"]["remainingPure"] == "0"


def test_a_contradiction_says_how_to_accept_it_where_that_is_possible() -> None:
    status = dataset_status(dataset(), books(contradiction="1: they differ"), NOW)
    assert conditions(status)["LedgerConsistent"] == "False LedgerMismatch"
    assert conditions(status)["Ready"] == "False LedgerMismatch"
    assert status["budget"]["remaining"] == "0"
    words = status["conditions"][1]["message"]
    assert "annotate --overwrite pds scans feddiff.dev/acknowledge-ledger='1: they differ'" in words
    status = dataset_status(dataset(), books(contradiction="unreadable", acknowledgeable=False), NOW)
    assert "annotate" not in status["conditions"][1]["message"]


def test_a_spec_that_cannot_be_understood_keeps_the_last_budget() -> None:
    before = dataset_status(dataset(), books(entry("1", phase=Phase.CHARGED)), NOW)
    status = dataset_status(dataset(before), books(budget=None, spec_problem="spec.classes: no"), LATER)
    assert status["budget"] == before["budget"]
    assert conditions(status)["Ready"] == "False SpecInvalid"
    assert conditions(status)["BudgetExhausted"] == "Unknown NotReady"
    assert status["conditions"][0]["message"] == "spec.classes: no"


def test_an_account_that_cannot_be_understood_stays_as_it_is() -> None:
    before = {"account": {"numEntries": "one"}, "conditions": ["garbage"]}
    status = dataset_status(dataset(before), books(account=None, contradiction="1: no sense"), NOW)
    assert status["account"] == before["account"] and "budget" not in status


def test_the_same_books_are_the_same_status_and_a_condition_keeps_its_time() -> None:
    before = dataset_status(dataset(), books(), NOW)
    assert dataset_status(dataset(through_json(before)), books(), LATER) == before
    changed = dataset_status(dataset(before), books(contradiction="1: they differ"), LATER)
    times = {each["type"]: each["lastTransitionTime"] for each in changed["conditions"]}
    assert times["LedgerConsistent"] == "2026-01-02T00:00:00Z"
    assert times["BudgetExhausted"] == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("status", ["garbage", 3, []])
def test_a_status_that_is_no_mapping_is_replaced(status: object) -> None:
    found = {**dataset(), "status": status}
    assert conditions(dataset_status(found, books(), NOW))["Ready"] == "True Ready"


def test_kubectl_explains_every_field_of_a_status() -> None:
    def fields(plural: str) -> Object:
        (version,) = definitions()[plural]["spec"]["versions"]
        return dict(version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"])

    status, known = dataset_status(dataset(), books(entry()), NOW), fields("privatedatasets")
    assert set(status) == set(known) and set(status["budget"]) == set(known["budget"]["properties"])
    assert all(set(each) == set(known["conditions"]["items"]["properties"]) for each in status["conditions"])
    charged = replace(entry(), phase=Phase.CHARGED, manifest_sha256="ab")
    assert set(with_status_of({}, charged)["status"]) == set(fields("privacyreleases"))
