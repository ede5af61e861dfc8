"""The page that `make chaos` writes: a row of each fault, and a wrong one is found."""

import pytest

from cluster.chaos import FAULTS, RELEASE_A, Outcome
from cluster.evidence import Evidence
from cluster.federation import ROOT
from cluster.reliability import page

NOTHING = Evidence("", {}, [], {}, {}, [], [])


def faults_of(text: str) -> list[str]:
    """What is wrong with a page."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    expected = [each.name for each in FAULTS]
    missing = [f"no row of {name}" for name in expected if name not in [row[0] for row in rows]]
    unknown = [f"a row of {row[0]}" for row in rows if row[0] not in expected]
    return [*missing, *unknown, *(f"{row[0]}: {row[-1]}" for row in rows if row[-1] != "well")]


def test_the_page_has_every_fault_and_all_went_well() -> None:
    assert faults_of((ROOT / "docs/reliability.md").read_text()) == []


def outcome(number: int, *wrongs: str) -> Outcome:
    return Outcome(FAULTS[number], ("kill -9",), 12.4, 20.6, 61.0, {RELEASE_A: 2}, wrongs, NOTHING)


def test_a_row_says_when_what_and_how_often() -> None:
    text = page([outcome(2)])
    row = f"| {FAULTS[2].name} | kill -9 | 12 s | 21 s | Complete, 61 s | 2 × release clinic-a | well |"
    assert text.splitlines()[-1] == row


@pytest.mark.parametrize(
    "outcomes",
    [
        [outcome(number) for number in range(len(FAULTS) - 1)],
        [outcome(number, *["a second release"] * (number == 3)) for number in range(len(FAULTS))],
    ],
    ids=["a fault left out", "one that went wrong"],
)
def test_a_page_that_is_wrong_would_be_found(outcomes: list[Outcome]) -> None:
    assert len(faults_of(page(outcomes))) == 1
