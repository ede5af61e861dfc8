"""What Prometheus scrapes: bounded labels, and no series of what is gone."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from feddiff_operator.metrics import DatasetFacts, JobFacts, Metrics, dataset_facts, job_facts


def job(phase: str | None, namespace: str = "research", datasets: tuple[str, ...] = ()) -> JobFacts:
    clients = [{"name": name, "dataset": {"namespace": f"clinic-{name}", "name": "scans"}} for name in datasets]
    status = {} if phase is None else {"status": {"phase": phase}}
    return job_facts({"metadata": {"namespace": namespace, "name": "x"}, "spec": {"clients": clients}, **status})


def dataset(status: dict[str, Any] | None = None, **metadata: Any) -> DatasetFacts:
    body = {
        "metadata": {"namespace": "clinic-a", "name": "scans", "generation": 1, **metadata},
        "spec": {"budget": {"epsilon": "20", "delta": "1e-5", "unit": "image"}},
    }
    return dataset_facts({**body, "status": status} if status is not None else body)


BUDGET = {"spent": "10.0312", "reserved": "2.5", "remaining": "7.1"}


def scraped(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return scraped(metrics).get((name, frozenset(labels.items())))


@pytest.mark.parametrize(
    ("remaining", "pure", "shown"), [("0", "2", 2), ("7.1", "2", 7.1), ("0", "0", 0), ("7.1", None, 7.1)]
)
def test_a_budget_is_exhausted_once_neither_kind_of_release_fits(
    remaining: str, pure: str | None, shown: float
) -> None:
    metrics = Metrics()
    budget = {**BUDGET, "remaining": remaining} | ({"remainingPure": pure} if pure else {})
    metrics.states(list, lambda: [dataset({"budget": budget})], dict)
    labels = {"namespace": "clinic-a", "dataset": "scans", "unit": "image", "delta": "1e-5"}
    assert value(metrics, "feddiff_privacy_epsilon_remaining", **labels) == shown


def test_jobs_are_counted_by_namespace_and_phase_and_deleted_ones_leave_no_series() -> None:
    metrics = Metrics()
    jobs = [job("Training"), job("Training"), job("Failed"), job(None, "other")]
    metrics.states(lambda: jobs, list, dict)
    assert value(metrics, "feddiff_jobs", namespace="research", phase="Training") == 2
    assert value(metrics, "feddiff_jobs", namespace="other", phase="Pending") == 1
    jobs.clear()
    assert not [name for name, _ in scraped(metrics) if name == "feddiff_jobs"]


def test_a_budget_is_shown_as_its_dataset_tells_it_and_goes_with_it() -> None:
    metrics = Metrics()
    datasets = [dataset({"budget": BUDGET, "conditions": [{"type": "LedgerConsistent", "status": "True"}]})]
    metrics.states(list, lambda: datasets, dict)
    labels = {"namespace": "clinic-a", "dataset": "scans", "unit": "image", "delta": "1e-5"}
    assert value(metrics, "feddiff_privacy_epsilon_limit", **labels) == 20
    assert value(metrics, "feddiff_privacy_epsilon_reserved", **labels) == 2.5
    assert value(metrics, "feddiff_privacy_epsilon_spent", **labels) == 10.0312
    assert value(metrics, "feddiff_privacy_epsilon_remaining", **labels) == 7.1
    assert value(metrics, "feddiff_ledger_mismatch", namespace="clinic-a", dataset="scans") == 0
    datasets[0] = dataset({"conditions": [{"type": "LedgerConsistent", "status": "False"}]})
    assert value(metrics, "feddiff_ledger_mismatch", namespace="clinic-a", dataset="scans") == 1
    datasets.clear()
    assert not [name for name, _ in scraped(metrics) if "epsilon" in name or "mismatch" in name]


def test_an_odd_object_spoils_no_scrape() -> None:
    metrics = Metrics()
    odd = dataset_facts({"metadata": {"name": "x"}, "spec": {"budget": {"epsilon": "many"}}, "status": {"budget": {}}})
    metrics.states(lambda: [job_facts({"metadata": {}, "spec": None, "status": None})], lambda: [odd], dict)
    assert value(metrics, "feddiff_jobs", namespace="", phase="Pending") == 1


def test_how_long_a_watch_has_been_silent_is_the_worst_of_its_namespaces() -> None:
    metrics = Metrics()
    silent = {"/api/v1/namespaces/a/pods": 3.0, "/api/v1/namespaces/b/pods": 300.0}
    metrics.states(list, list, lambda: silent)
    assert value(metrics, "feddiff_watch_silent_seconds", resource="pods") == 300


def test_what_happens_is_counted_with_labels_that_cannot_grow() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.api_request("create", f"/apis/batch/v1/namespaces/n{number}/jobs", "201", 0.02)
        metrics.api_request(
            "update", f"/apis/feddiff.dev/v1alpha1/namespaces/a/privatedatasets/d{number}/status", "409", 1
        )
    metrics.reconciled("FederatedDiffusionJob", "success", 0.1, 1234.0)
    metrics.reconciled("FederatedDiffusionJob", "error", 0.1, 5678.0)
    metrics.watch_event("Pod", 99.0)
    metrics.led(True)
    metrics.refused("PrivacyBudgetExceeded")
    metrics.queue(lambda: 7, lambda: 0.5)
    assert value(metrics, "feddiff_api_requests_total", verb="create", resource="jobs", code="201") == 100
    conflicts = {"verb": "update", "resource": "privatedatasets/status", "code": "409"}
    assert value(metrics, "feddiff_api_requests_total", **conflicts) == 100
    assert value(metrics, "feddiff_api_request_duration_seconds_count", verb="create", resource="jobs") == 100
    kind = {"kind": "FederatedDiffusionJob"}
    assert value(metrics, "feddiff_reconcile_duration_seconds_count", result="error", **kind) == 1
    assert value(metrics, "feddiff_last_successful_reconcile_timestamp_seconds", **kind) == 1234
    assert value(metrics, "feddiff_watch_events_total", kind="Pod") == 1
    assert value(metrics, "feddiff_watch_last_event_timestamp_seconds", kind="Pod") == 99
    assert value(metrics, "feddiff_leader") == 1
    assert value(metrics, "feddiff_privacy_refusals_total", reason="PrivacyBudgetExceeded") == 1
    assert value(metrics, "feddiff_reconcile_queue_depth") == 7
    assert [dict(labels)["version"] for name, labels in scraped(metrics) if name == "feddiff_build_info"] == ["0.1.0"]


def test_two_operators_in_one_process_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.led(True)
    assert (value(first, "feddiff_leader"), value(second, "feddiff_leader")) == (1, 0)


def test_only_what_may_admit_a_waiting_job_wakes_it() -> None:
    before = dataset({"budget": BUDGET})
    assert not before.may_admit_more_than(before)
    assert not dataset({"budget": {**BUDGET, "remaining": "6.0"}}).may_admit_more_than(before)
    assert dataset({"budget": {**BUDGET, "remaining": "7.2"}}).may_admit_more_than(before)
    pure = dataset({"budget": {**BUDGET, "remainingPure": "1"}})
    assert dataset({"budget": {**BUDGET, "remaining": "6.0", "remainingPure": "1.5"}}).may_admit_more_than(pure)
    assert not dataset({"budget": {**BUDGET, "remainingPure": "0.5"}}).may_admit_more_than(pure)
    assert dataset({"budget": BUDGET}, generation=2).may_admit_more_than(before)
    acknowledged = {"feddiff.dev/acknowledge-ledger": "two entries restored"}
    assert dataset({"budget": BUDGET}, annotations=acknowledged).may_admit_more_than(before)
    contradicted = dataset({"budget": BUDGET, "conditions": [{"type": "LedgerConsistent", "status": "False"}]})
    assert before.may_admit_more_than(contradicted)


def test_the_first_refusal_is_a_rise_and_not_a_new_series() -> None:
    metrics = Metrics()
    assert value(metrics, "feddiff_privacy_refusals_total", reason="PrivacyBudgetExceeded") == 0
    metrics.refused("PrivacyBudgetExceeded")
    assert value(metrics, "feddiff_privacy_refusals_total", reason="PrivacyBudgetExceeded") == 1
