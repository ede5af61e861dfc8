"""docs/monitoring.md lists exactly the metrics that operator and stages serve, with their types, labels and texts."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from feddiff_operator.metrics import Metrics, dataset_facts, job_facts
from feddiff_protocol.telemetry import OF_EVERY_STAGE, OF_SHARED_TRAINING

PAGE = (Path(__file__).parents[1] / "docs/monitoring.md").read_text()
Row = tuple[str, str, tuple[str, ...], str]


def rows(page: str) -> set[Row]:
    found = re.findall(r"^\| `(feddiff_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.*) \|$", page, re.MULTILINE)
    return {(name, kind, tuple(sorted(re.findall(r"\w+", labels))), text) for name, kind, labels, text in found}


def served_by_operator() -> set[Row]:
    """Every family of an operator to which everything has happened once."""
    metrics = Metrics()
    clients = [{"name": "a", "dataset": {"namespace": "clinic", "name": "scans"}}]
    status = {"phase": "Training", "stages": [{"stage": "release", "percent": 100}]}
    job = {"metadata": {"namespace": "r", "name": "j"}, "spec": {"clients": clients}, "status": status}
    dataset = {"metadata": {"namespace": "c", "name": "d"}, "spec": {"budget": {"epsilon": "1", "delta": "1e-5"}}}
    watched = "/api/v1/pods"
    metrics.states(
        lambda: [job_facts(job)], lambda: [dataset_facts(dataset)], lambda: {watched: 1.0}, lambda: {watched: 1}
    )
    metrics.queue(lambda: 0, lambda: 0.0)
    metrics.resync(600)
    metrics.reconciled("FederatedDiffusionJob", "success", 1.0, 1.0)
    metrics.api_request("get", watched, "200", 1.0)
    metrics.watch_event("Pod", 1.0)
    metrics.led(True)
    metrics.refused("PrivacyBudgetExceeded")
    metrics.charged()
    metrics.stage_ended("release", "succeeded", 1.0, 1.0)
    return {row for family in text_string_to_metric_families(metrics.exposition().decode()) if (row := _row(family))}


def _row(family: object) -> Row | None:
    name, kind = family.name + ("_total" if family.type == "counter" else ""), family.type  # type: ignore[attr-defined]
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}  # type: ignore[attr-defined]
    created = name.endswith("_created")  # when a series began, beside every counter and histogram
    return None if created else (name, kind, tuple(sorted(labels)), family.documentation)  # type: ignore[attr-defined]


def served() -> set[Row]:
    of_stages = (*OF_EVERY_STAGE, *OF_SHARED_TRAINING)
    return served_by_operator() | {(each.name, each.kind, tuple(sorted(each.labels)), each.text) for each in of_stages}


def test_the_page_lists_what_is_served_and_nothing_else() -> None:
    assert rows(PAGE) == served()


def test_a_metric_that_the_page_forgot_or_invented_is_noticed() -> None:
    assert rows(PAGE.replace("`feddiff_leader`", "`feddiff_follower`")) != served()
    assert rows(PAGE.replace("| namespace, phase |", "| namespace |")) != served()
