"""Which fields of batch Jobs and pods say what, and what it means that one is missing."""

from datetime import timedelta
from typing import Any

import pytest

from batch_objects import NOW, batch_job, complete, failed, pod, stopped
from feddiff_operator import batch
from feddiff_protocol.stages import Stage

Object = dict[str, Any]


def release(**more: Any) -> Object:
    return batch_job(Stage.RELEASE, "a", **more)


def test_a_job_says_whose_attempt_it_is() -> None:
    assert batch.key_of(release()) == (Stage.RELEASE, "a")
    assert batch.key_of(batch_job(Stage.TRAIN_SHARED)) == (Stage.TRAIN_SHARED, "")


def test_a_job_is_finished_when_its_controller_says_so_and_not_when_it_is_stopped() -> None:
    assert batch.is_finished(complete(release())) and batch.is_finished(failed(release()))
    assert not batch.is_finished(release()) and not batch.is_finished(stopped(release()))
    assert batch.is_suspended(stopped(release())) and not batch.is_suspended(release())


def test_a_condition_counts_only_with_the_status_that_is_asked_for() -> None:
    untrue = {"status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}}
    assert batch.condition_of(untrue, "PodScheduled") is None
    assert (batch.condition_of(untrue, "PodScheduled", status="False") or {})["reason"] == "Unschedulable"


@pytest.mark.parametrize("thing", [{}, {"status": None}, {"status": {}}, {"status": {"conditions": None}}])
def test_what_has_no_conditions_fulfils_none(thing: Object) -> None:
    assert batch.condition_of(thing, "Complete") is None


def test_pods_of_an_earlier_job_of_the_same_name_are_not_the_jobs() -> None:
    own, other = pod(release()), pod(batch_job(Stage.SAMPLE, "a"))
    earlier = {**own, "metadata": {**own["metadata"], "labels": {**own["metadata"]["labels"]}}}
    earlier["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] = "another"
    assert batch.pods_of(release(), [earlier, other, own]) == [own]


def test_what_only_bears_a_jobs_labels_is_no_pod_of_it() -> None:
    """Anybody can write them in another namespace; the Job controller says which Job it made a pod for."""
    metadata = (own := pod(release()))["metadata"]
    labels = {name: value for name, value in metadata["labels"].items() if not name.endswith("controller-uid")}
    forged = [{**own, "metadata": {**metadata, **other}} for other in ({"namespace": "elsewhere"}, {"labels": labels})]
    assert batch.pods_of(release(), [*forged, own]) == [own]


def test_a_pod_that_says_nothing_yet_is_pending_and_has_no_exit_code() -> None:
    silent: Object = {"metadata": {"name": "p"}}
    assert batch.phase_of(silent) == "Pending" and batch.exit_code_of(silent) is None
    assert not batch.is_terminated(silent) and batch.started_at(silent) is None
    assert batch.is_first(silent), "without an index there is only one"


def test_only_the_stages_own_container_speaks() -> None:
    ended = pod(release(), "Failed", exit_code=77)
    sidecar = {"name": "sidecar", "state": {"terminated": {"exitCode": 1}}}
    ended["status"]["containerStatuses"].insert(0, sidecar)
    assert batch.exit_code_of(ended) == 77


def test_an_attempt_runs_since_its_last_pod_began() -> None:
    shared = batch_job(Stage.TRAIN_SHARED)
    late = NOW + timedelta(seconds=9)
    first, second = pod(shared, index=0), pod(shared, index=1, started=late)
    assert batch.running_since(shared, [first]) is None
    assert batch.running_since(shared, [first, second]) == late


def test_a_deletion_counts_from_when_it_was_asked_for_not_from_the_end_of_its_grace() -> None:
    asked = NOW + timedelta(seconds=10)
    ended_before = pod(release(), "Failed", exit_code=1, finished=NOW, deleted=asked)
    ended_after = pod(release(), "Failed", exit_code=75, finished=asked + timedelta(seconds=5), deleted=asked)
    assert batch.deletion_of(ended_after) == asked
    assert batch.was_deleted_first(ended_after) and not batch.was_deleted_first(ended_before)
    assert batch.was_deleted_first(pod(release(), deleted=asked))
