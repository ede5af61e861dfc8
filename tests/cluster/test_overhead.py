"""What counts as added by the operator: all but the stages on the longest path."""

import pytest

from cluster.overhead import Ran, added_seconds, longest_path, pod_start_seconds, stages_that_ran
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Receipt, Stage

UID = "0d9f3a10-0000-4000-8000-000000000000"
SECONDS: dict[StageKey, float] = {
    (Stage.RELEASE, "a"): 3,
    (Stage.RELEASE, "b"): 5,
    (Stage.TRAIN_SHARED, ""): 60,
    (Stage.TRAIN_PERSONAL, "a"): 90,
    (Stage.TRAIN_PERSONAL, "b"): 40,
    (Stage.SAMPLE, "a"): 10,
    (Stage.SAMPLE, "b"): 30,
    (Stage.EVALUATE, "a"): 7,
    (Stage.EVALUATE, "b"): 20,
    (Stage.REPORT, ""): 2,
}


def test_clients_go_their_own_ways_between_the_releases_and_the_report() -> None:
    assert longest_path(SECONDS) == 5 + (60 + 30 + 20) + 2
    slower = SECONDS | {(Stage.TRAIN_PERSONAL, "a"): 100}
    assert longest_path(slower) == 5 + (100 + 10 + 7) + 2


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ((Stage.RELEASE, "b"), True),
        ((Stage.RELEASE, "a"), False),
        ((Stage.TRAIN_SHARED, ""), True),
        ((Stage.TRAIN_PERSONAL, "a"), False),
        ((Stage.SAMPLE, "b"), True),
        ((Stage.SAMPLE, "a"), False),
        ((Stage.EVALUATE, "b"), True),
        ((Stage.REPORT, ""), True),
    ],
)
def test_a_second_more_of_a_stage_counts_where_the_others_wait_for_it(key: StageKey, counts: bool) -> None:
    assert longest_path(SECONDS | {key: SECONDS[key] + 1}) == longest_path(SECONDS) + counts


def test_what_is_not_a_stages_own_is_added_and_the_start_of_pods_is_told_apart() -> None:
    """Here a stage's Job comes 3 s after what it waited for, its container 4 s later; the end is seen 6 s late."""
    ran, moment = {}, 1000.0
    for key in ((Stage.RELEASE, "a"), (Stage.TRAIN_SHARED, ""), (Stage.SAMPLE, "a"), (Stage.EVALUATE, "a")):
        ran[key] = Ran(moment + 3, moment + 7, moment + 7 + SECONDS[key], SECONDS[key] - 2)
        moment = ran[key].finished
    ran[Stage.TRAIN_PERSONAL, "a"] = Ran(1013, 1017, 1018, 1)
    ran[Stage.REPORT, ""] = Ran(moment + 3, moment + 7, moment + 9, 1)
    assert added_seconds(1000, moment + 9 + 6, ran) == 5 * 3 + 6
    assert pod_start_seconds(ran) == 5 * 4


def test_a_stage_lasts_from_its_first_container_to_its_last_ones_end() -> None:
    receipt = Receipt(stage=Stage.TRAIN_SHARED, job_uid=UID, attempt=1, milliseconds=4500)
    metadata = {"name": "fd-1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    job = {"metadata": {**metadata, "annotations": {"feddiff.dev/receipt": receipt.to_line()}}}
    pods = [pod("fd-1", 2, 8), pod("fd-1", 3, 9), pod("fd-2", 0, 50)]
    (key, ran), *others = stages_that_ran([job], pods).items()
    assert (key, others) == ((Stage.TRAIN_SHARED, ""), [])
    assert (ran.pod_seconds, ran.process_seconds, ran.own_seconds) == (9, 7, 4.5)
    with pytest.raises(AssertionError, match="more than one attempt"):
        stages_that_ran([job, job], pods)


def pod(job: str, started: int, finished: int) -> dict[str, object]:
    moments = {"startedAt": f"2026-01-01T00:00:{started:02}Z", "finishedAt": f"2026-01-01T00:00:{finished:02}Z"}
    status = {"containerStatuses": [{"state": {"terminated": moments}}]}
    return {"metadata": {"labels": {"batch.kubernetes.io/job-name": job}}, "status": status}
