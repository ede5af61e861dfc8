"""What is shown of a cluster's budgets: no ledger is believed that its entries contradict."""

import copy
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_objects import books, entry, shown
from feddiff import cluster_budgets
from feddiff.cluster_budgets import Books, budget_document, print_budgets
from feddiff_protocol import ledger, ledger_objects
from feddiff_protocol.accountant import compose, epsilon_of, mu_of
from feddiff_protocol.ledger import Phase


def test_the_composed_epsilon_is_that_of_the_root_of_the_sum_of_squares() -> None:
    document = budget_document(books([entry(1, "4"), entry(2, "2"), entry(3, "5", Phase.RETURNED)]))
    expected = epsilon_of(compose([mu_of(4, 1e-5), mu_of(2, 1e-5)]), 1e-5)
    assert float(document["composedEpsilon"]) == pytest.approx(expected, abs=2e-4)
    assert float(document["composedEpsilon"]) >= expected - 1e-9, "rounded up"
    assert document["contradiction"] == ""
    assert [each["phase"] for each in document["entries"]] == ["Charged", "Charged", "Returned"]


EPSILONS = st.lists(st.tuples(st.sampled_from(["0.5", "1", "2.25", "4"]), st.sampled_from(list(Phase))), max_size=6)


@given(EPSILONS)
def test_books_as_the_operator_writes_them_never_look_contradictory(drawn: list[tuple[str, Phase]]) -> None:
    entries = [entry(number, epsilon, phase) for number, (epsilon, phase) in enumerate(drawn)]
    for readable in (True, False):
        document = budget_document(books(entries, limit="50", readable=readable))
        assert document["contradiction"] == ""
        total = Decimal(document["spentEpsilon"]) + Decimal(document["reservedEpsilon"])
        assert Decimal(document["composedEpsilon"]) == total
        assert (document["entries"] is None) == (not readable)


def tampered(given: Books, how: str) -> Books:
    dataset, releases = copy.deepcopy(given.dataset), copy.deepcopy(list(given.releases or ()))
    match how:
        case "an entry is gone":
            del releases[0]
        case "an entry is new":
            releases.append(ledger_objects.release_object("clinic-a", "scans", entry(9, "1")))
        case "an entry costs less":
            releases[0]["spec"]["charge"]["muSquared"] = "0.001"
        case "an entry makes no sense":
            releases[0]["spec"]["epsilon"] = "much"
        case "the account counts less":
            dataset["status"]["account"]["total"]["muSquared"] = "0.001"
        case "the account makes no sense":
            dataset["status"]["account"]["numEntries"] = -1
        case "the status shows less":
            dataset["status"]["budget"]["spent"] = "0.1"
        case "the account is gone":
            del dataset["status"]["account"]
    return Books(dataset, releases)


@pytest.mark.parametrize(
    "how",
    [
        "an entry is gone",
        "an entry is new",
        "an entry costs less",
        "an entry makes no sense",
        "the account counts less",
        "the account makes no sense",
        "the status shows less",
        "the account is gone",
    ],
)
def test_books_that_were_tampered_with_do_not_add_up(how: str) -> None:
    good = books([entry(1, "4"), entry(2, "2")])
    assert budget_document(good)["contradiction"] == ""
    document = budget_document(tampered(good, how))
    assert document["contradiction"] != ""
    text = shown(print_budgets, [document])
    assert "DOES NOT ADD UP" in text
    assert text.splitlines()[1].split()[4] == "-", "nobody may count on what remains"


def test_pure_epsilon_is_shown_beside_what_remains_where_some_was_set_aside() -> None:
    good = books([entry(1, "4")])
    assert "pure" not in shown(print_budgets, [budget_document(good)])
    dataset = copy.deepcopy(good.dataset)
    dataset["status"]["budget"]["remainingPure"] = "3"
    document = budget_document(Books(dataset, good.releases))
    assert document["remainingPureEpsilon"] == "3"
    assert f"{document['remainingEpsilon']}, pure 3" in shown(print_budgets, [document])


def test_tampering_is_found_by_the_check_and_not_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison with the entries, the same books would pass."""
    monkeypatch.setattr(ledger, "inconsistency", lambda account, entries: None)
    robbed = tampered(books([entry(1, "4"), entry(2, "2")]), "an entry is gone")
    monkeypatch.setattr(cluster_budgets, "_differs", lambda books, composed: "")
    assert budget_document(robbed)["contradiction"] == ""


def test_what_the_operator_says_about_its_ledger_is_said_even_without_entries() -> None:
    given = books([], readable=False)
    (condition,) = [each for each in given.dataset["status"]["conditions"] if each["type"] == "LedgerConsistent"]
    condition |= {"status": "False", "message": "1: an entry is gone"}
    assert budget_document(given)["contradiction"] == "1: an entry is gone"
    readable = Books(given.dataset, [ledger_objects.release_object("clinic-a", "scans", entry(1, "1"))])
    assert budget_document(readable)["contradiction"] == "1: an entry is gone", "the operator's words say what to do"


def test_a_ledger_that_changed_while_it_was_read_says_so() -> None:
    given = books([entry(1, "1")])
    assert "it changed while" in shown(print_budgets, [budget_document(Books(given.dataset, given.releases, False))])


def test_entries_of_another_dataset_of_the_namespace_are_not_counted() -> None:
    given = books([entry(1, "4")])
    other = ledger_objects.release_object("clinic-a", "other", entry(2, "9"))
    document = budget_document(Books(given.dataset, [*(given.releases or ()), other]))
    assert [each["name"] for each in document["entries"]] == ["prl-1"]
    assert document["contradiction"] == ""
