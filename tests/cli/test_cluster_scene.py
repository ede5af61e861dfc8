"""Which attempt is meant, which is the newest, and which pods are its own."""

import pytest

from cluster_objects import attempt, pod
from feddiff.cluster_scene import SHARED_STAGES, attempt_to_read, newest_attempts, pods_of
from feddiff_protocol.errors import InputMissing, UsageInvalid
from feddiff_protocol.stages import Stage


def test_only_the_newest_attempt_of_each_stage_counts_and_stages_come_in_their_order() -> None:
    found = [
        attempt("report"),
        attempt("release", "b", 10),
        attempt("release", "b", 9),
        attempt("release", "a"),
        attempt("x"),
    ]
    assert [each["metadata"]["name"] for each in newest_attempts(found)] == [
        "fd-release-a-1",
        "fd-release-b-10",
        "fd-report--1",
    ]


def test_the_newest_attempt_that_fits_is_read() -> None:
    found = [
        attempt("release", "a", 1),
        attempt("release", "a", 2),
        attempt("train-personal", "a", 3),
        attempt("report"),
    ]
    assert attempt_to_read(found, "a", None, "job")["metadata"]["name"] == "fd-train-personal-a-3"
    assert attempt_to_read(found, "a", "release", "job")["metadata"]["name"] == "fd-release-a-2"
    assert attempt_to_read(found, "", None, "job")["metadata"]["name"] == "fd-report--1"


def test_where_no_attempt_or_too_many_fit_nothing_is_guessed() -> None:
    found = [attempt("release", "a"), attempt("release", "b")]
    with pytest.raises(InputMissing, match="name it with --client"):
        attempt_to_read(found, "", None, "job")
    with pytest.raises(InputMissing, match="no attempt of sample of client a has been started"):
        attempt_to_read(found, "a", "sample", "job")
    with pytest.raises(UsageInvalid, match="stages of a, b fit"):
        attempt_to_read(found, None, "release", "job")


def test_pods_of_an_attempt_come_by_rank_and_not_from_another_namespace() -> None:
    batch = attempt("train-shared")
    pods = [pod(batch, index=each) for each in (10, 2, 0)]
    stranger = pod(batch)
    stranger["metadata"]["namespace"] = "elsewhere"
    assert [each["metadata"]["name"][-2:] for each in pods_of(batch, [*pods, stranger])] == ["-0", "-2", "10"]


def test_every_stage_name_is_known() -> None:
    assert {stage.value for stage in SHARED_STAGES} < {stage.value for stage in Stage}
