"""Every reason has a runbook page, no page is about a reason that is gone, and each page is complete."""

import re
from collections.abc import Iterable
from pathlib import Path

from feddiff_protocol.plan import Reason

RUNBOOKS = Path(__file__).parents[2] / "docs/runbooks"
PAGES = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md") if path.stem != "README"}


def differing(reasons: Iterable[str], pages: Iterable[str]) -> set[str]:
    return set(reasons) ^ set(pages)


def test_every_reason_has_a_page_and_no_other() -> None:
    reasons = [reason.value for reason in Reason]
    assert differing(reasons, PAGES) == set()
    assert differing([*reasons, "NewReason"], PAGES) == {"NewReason"}


def test_a_page_says_what_it_means_what_to_do_and_who() -> None:
    for reason, text in PAGES.items():
        title, meaning, *_ = text.split("\n\n")
        assert title == f"# {reason}" and not meaning.startswith("**")
        assert re.search(r"^\*\*Do\.\*\* \S", text, re.MULTILINE) and re.search(
            r"^\*\*Who\.\*\* \S", text, re.MULTILINE
        )


def test_the_index_links_every_page_once() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\)", index, re.MULTILINE)
    assert sorted(rows) == sorted((reason, reason) for reason in PAGES)


def test_the_index_has_every_reason_of_a_dataset() -> None:
    source = (Path(__file__).parents[2] / "protocol/feddiff_protocol/ledger_objects.py").read_text()
    reasons = re.findall(r'_condition\("\w+", "\w+", "(\w+)"', source)
    index = (RUNBOOKS / "README.md").read_text()
    assert reasons and all(f"`{reason}`" in index for reason in reasons)
