"""Every reason and every alert has a runbook page, no page is about one that is gone, and each page is complete."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from feddiff_protocol.plan import Reason

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "docs/runbooks"
PAGES = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md") if path.stem != "README"}


ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((ROOT / "charts/feddiff/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]


def differing(names: Iterable[str], pages: Iterable[str]) -> set[str]:
    return set(names) ^ set(pages)


def test_every_reason_and_alert_has_a_page_and_nothing_else_has() -> None:
    names = [*(reason.value for reason in Reason), *ALERTS]
    assert differing(names, PAGES) == set()
    assert differing([*names, "NewReason"], PAGES) == {"NewReason"}


def test_a_page_says_what_it_means_what_to_do_and_who() -> None:
    for reason, text in PAGES.items():
        title, meaning, *_ = text.split("\n\n")
        assert title == f"# {reason}" and not meaning.startswith("**")
        assert re.search(r"^\*\*Do\.\*\* \S", text, re.MULTILINE) and re.search(
            r"^\*\*Who\.\*\* \S", text, re.MULTILINE
        )


def test_the_page_of_an_alert_says_what_makes_it_worse() -> None:
    assert all(re.search(r"^\*\*Do not\.\*\* \S", PAGES[alert], re.MULTILINE) for alert in ALERTS)


def test_the_index_links_every_page_once() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\)", index, re.MULTILINE)
    assert sorted(rows) == sorted((reason, reason) for reason in PAGES)


def test_the_index_has_every_reason_of_a_dataset() -> None:
    source = (ROOT / "protocol/feddiff_protocol/ledger_objects.py").read_text()
    reasons = re.findall(r'_condition\("\w+", "\w+", "(\w+)"', source)
    index = (RUNBOOKS / "README.md").read_text()
    assert reasons and all(f"`{reason}`" in index for reason in reasons)
