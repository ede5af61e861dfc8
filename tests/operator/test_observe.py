"""Real-world Jobs and pods, read: every way in which an attempt can end, wait, or leave no trace."""

import copy
import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_objects import (
    NOW,
    SHA,
    UID,
    batch_job,
    complete,
    disruption,
    failed,
    job,
    pod,
    receipt,
    stopped,
    text,
    unscheduled,
    with_condition,
)
from feddiff_operator.endings import MEANING, is_over, record_of
from feddiff_operator.observe import (
    Deadline,
    children_of,
    deadlines,
    releasing_since,
    retry_at,
    stages_observed,
    with_recorded_release,
)
from feddiff_operator.waiting import waiting
from feddiff_protocol import errors
from feddiff_protocol.labels import EXIT_CODE, LOST, MESSAGE, RECEIPT, STOPPED, STOPPED_BECAUSE, UNKNOWN
from feddiff_protocol.plan import Reason, StageObserved, StagePhase
from feddiff_protocol.stages import RECEIPT_BYTES, Stage

Object = dict[str, Any]
RELEASE = (Stage.RELEASE, "a")
SHARED = (Stage.TRAIN_SHARED, "")


def release(attempt: int = 1, **more: Any) -> Object:
    return batch_job(Stage.RELEASE, "a", attempt, **more)


def observed(jobs: list[Object] | Object, pods: list[Object] | None = None, at: int = 0) -> StageObserved:
    jobs = jobs if isinstance(jobs, list) else [jobs]
    (seen,) = stages_observed(jobs, pods or [], NOW + timedelta(seconds=at)).values()
    return seen


def recorded(child: Object, pods: list[Object]) -> Object:
    """The Job after its record was written, and its pods are gone."""
    result = copy.deepcopy(child)
    result["metadata"]["annotations"] |= record_of(child, pods) or {}
    return result


def both(child: Object, pods: list[Object], at: int = 0) -> StageObserved:
    """What is observed while the pods are there; the same must be observed once only the record is left."""
    seen = observed(child, pods, at)
    assert observed(recorded(child, pods), [], at) == seen
    return seen


# ---- Success -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(Stage))
def test_a_pod_that_ended_with_its_receipt_is_a_success(stage: Stage) -> None:
    client = "" if stage in (Stage.TRAIN_SHARED, Stage.REPORT) else "a"
    child = batch_job(stage, client)
    seen = both(child, [pod(child, "Succeeded", exit_code=0, message=receipt(stage, client))])
    assert (seen.phase, seen.attempt, seen.num_failures) == (StagePhase.SUCCEEDED, 1, 0)
    assert seen.receipt is not None and seen.receipt.milliseconds == 1000


def test_a_recorded_receipt_counts_though_the_job_was_stopped_or_failed_afterwards() -> None:
    child = release(annotations={RECEIPT: receipt(*RELEASE)})
    assert observed(stopped(child)).phase is StagePhase.SUCCEEDED
    assert observed(failed(child)).phase is StagePhase.SUCCEEDED
    assert record_of(child, [pod(child, "Failed", exit_code=1)]) is None


def test_of_several_ranks_the_first_writes_the_receipt() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    second = pod(child, "Succeeded", index=1, exit_code=0)
    assert record_of(child, [second]) is None
    first = pod(child, "Succeeded", index=0, exit_code=0, message=receipt(Stage.TRAIN_SHARED))
    assert set(record_of(child, [second, first]) or {}) == {RECEIPT}


@pytest.mark.parametrize(
    ("story", "message", "words"),
    [
        ("no word at all", "", "receipt missing"),
        ("no JSON", "done!", "receipt malformed"),
        ("not a receipt", "{}", "receipt malformed"),
        ("cut off", receipt(*RELEASE)[:50], "receipt malformed"),
        ("an unknown field", receipt(*RELEASE)[:-1] + ',"loss":3}', "receipt malformed"),
        ("a release without a manifest", receipt(*RELEASE, outputs={}), "receipt malformed"),
        ("too long", receipt(*RELEASE) + " " * RECEIPT_BYTES, "receipt malformed"),
        ("nested too deeply", "[" * 4000, "receipt malformed"),
        ("another stage's", receipt(Stage.SAMPLE, "a"), "receipt of another stage"),
        ("another job's", receipt(*RELEASE, job_uid="another-job"), "receipt of another stage"),
        ("another client's", receipt(Stage.RELEASE, "b"), "receipt of another stage"),
        ("another attempt's", receipt(*RELEASE, attempt=2), "receipt of another stage"),
    ],
)
def test_a_bad_receipt_is_a_failure_and_is_not_repeated(story: str, message: str, words: str) -> None:
    child = release()
    seen = both(complete(child), [pod(child, "Succeeded", exit_code=0, message=message)])
    assert (seen.phase, seen.exit_code) == (StagePhase.FAILED, 0), story
    assert seen.message.startswith(words)
    assert "done!" not in seen.message and "loss" not in seen.message


def test_a_forged_annotation_is_no_receipt() -> None:
    child = release(annotations={RECEIPT: receipt(Stage.RELEASE, "b")})
    assert observed(complete(child)).message == "receipt of another stage"


# ---- Failure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 2, 64, 65, 66, 69, 73, 74, 77, 78, 137, 143])
def test_an_exit_code_is_a_failure_with_its_meaning_and_the_command_to_read_the_log(code: int) -> None:
    child = release()
    seen = both(failed(child), [pod(child, "Failed", exit_code=code, message="patient 17 has a tumour")])
    assert (seen.phase, seen.exit_code, seen.num_failures) == (StagePhase.FAILED, code, 1)
    assert MEANING.get(code, "no code of ours") in seen.message
    assert f"kubectl logs -n clinic-a job/{child['metadata']['name']}" in seen.message
    assert "patient" not in seen.message


def test_every_exit_code_of_ours_has_a_meaning() -> None:
    codes = {
        error.exit_code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "exit_code")
    }
    assert codes <= MEANING.keys()


def test_out_of_memory_is_named_and_counts() -> None:
    child = release()
    seen = both(failed(child), [pod(child, "Failed", exit_code=137, reason="OOMKilled")])
    assert (seen.phase, seen.num_failures) == (StagePhase.FAILED, 1)
    assert "OOMKilled" in seen.message


def test_a_pod_over_its_own_storage_limit_is_its_own_failure() -> None:
    child = release()
    words = 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi".'
    seen = both(failed(child), [pod(child, "Failed", exit_code=137, pod_reason="Evicted", pod_message=words)])
    assert (seen.phase, seen.num_failures) == (StagePhase.FAILED, 1)
    assert words in seen.message


def test_a_failed_job_without_a_pod_or_a_word_is_a_failure_that_says_so() -> None:
    seen = observed(failed(release()))
    assert (seen.phase, seen.exit_code) == (StagePhase.FAILED, None)
    assert "neither receipt nor exit code" in seen.message


def test_a_pod_that_the_kubelet_refused_has_the_kubelets_words() -> None:
    child = release()
    seen = both(failed(child), [pod(child, "Failed", pod_reason="OutOfcpu", pod_message="Pod was rejected")])
    assert (seen.phase, seen.exit_code, seen.message) == (StagePhase.FAILED, None, "OutOfcpu: Pod was rejected")
    assert (record_of(child, [pod(child, "Failed")]) or {})[EXIT_CODE] == UNKNOWN


@pytest.mark.parametrize(
    ("story", "codes", "telling"),
    [
        ("one rank refuses, the other is told to stop", (75, 65), 65),
        ("one rank loses the other", (74, 137), 74),
        ("one rank is out of a store", (69, 143), 69),
        ("both are interrupted", (75, 75), 75),
    ],
)
def test_of_several_ranks_the_one_that_explains_is_recorded(story: str, codes: tuple[int, int], telling: int) -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    pods = [pod(child, "Failed", index=index, exit_code=code) for index, code in enumerate(codes)]
    assert (record_of(child, pods) or {})[EXIT_CODE] == str(telling), story


def test_a_rank_that_ran_out_of_memory_explains_the_rank_that_lost_it() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    killed = pod(child, "Failed", exit_code=137, reason="OOMKilled", finished=NOW)
    lost_it = pod(child, "Failed", index=1, exit_code=74, finished=NOW + timedelta(seconds=1))
    assert "OOMKilled" in (record_of(child, [lost_it, killed]) or {})[MESSAGE]


# ---- Lost with the platform --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("story", "more"),
    [
        ("drained", {"conditions": disruption("EvictionByEvictionAPI")}),
        ("preempted by the scheduler", {"conditions": disruption("PreemptionByScheduler")}),
        ("its node was lost", {"conditions": disruption("DeletionByTaintManager")}),
        ("its node was removed", {"conditions": disruption("DeletionByPodGC")}),
        ("the node is short of memory", {"conditions": disruption("TerminationByKubelet"), "pod_reason": "Evicted"}),
        ("evicted", {"pod_reason": "Evicted", "pod_message": "The node was low on resource: memory."}),
        ("preempted by the kubelet", {"pod_reason": "Preempting"}),
        ("node lost", {"pod_reason": "NodeLost"}),
        ("node shut down", {"pod_reason": "Terminated", "pod_message": "Pod was terminated in response to shutdown"}),
    ],
)
def test_what_the_platform_takes_away_is_no_failure(story: str, more: dict[str, Any]) -> None:
    child = release()
    for code in (None, 75, 137, 143, 69):
        seen = both(failed(child), [pod(child, "Failed", exit_code=code, **more)])
        assert (seen.phase, seen.num_failures) == (StagePhase.STOPPED, 0), story
        assert "was taken away" in seen.message


def test_one_rank_taken_away_explains_the_other_ranks_error() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    pods = [pod(child, "Failed", exit_code=74), pod(child, "Failed", index=1, exit_code=143, conditions=disruption())]
    assert both(failed(child), pods).phase is StagePhase.STOPPED


def test_a_pod_deleted_while_it_ran_is_no_failure() -> None:
    child = release()
    ended = pod(child, "Failed", exit_code=137, deleted=NOW, finished=NOW + timedelta(seconds=60))
    seen = both(failed(child), [ended])
    assert (seen.phase, seen.num_failures) == (StagePhase.STOPPED, 0)
    assert "was deleted while it ran" in seen.message


def test_a_pod_deleted_after_it_failed_has_failed() -> None:
    child = release()
    ended = pod(child, "Failed", exit_code=69, finished=NOW, deleted=NOW + timedelta(seconds=5))
    assert both(failed(child), [ended]).exit_code == 69


def test_a_privacy_refusal_stays_one_though_the_pod_was_deleted_meanwhile() -> None:
    child = release()
    ended = pod(child, "Failed", exit_code=77, deleted=NOW, finished=NOW + timedelta(seconds=1))
    assert both(failed(child), [ended]).exit_code == 77


def test_ranks_that_the_job_controller_deletes_after_a_failure_do_not_hide_it() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    first = pod(child, "Failed", exit_code=69, finished=NOW)
    swept = pod(child, "Failed", index=1, exit_code=75, deleted=NOW, finished=NOW + timedelta(seconds=2))
    assert both(failed(child), [swept, first]).exit_code == 69


def test_a_rank_that_fails_after_another_was_deleted_is_a_consequence() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    swept = pod(child, "Failed", exit_code=137, deleted=NOW, finished=NOW + timedelta(seconds=2))
    after = pod(child, "Failed", index=1, exit_code=74, finished=NOW + timedelta(seconds=3))
    assert both(failed(child), [swept, after]).phase is StagePhase.STOPPED


def test_exit_75_is_continued_and_not_held_against_the_stage() -> None:
    child = release()
    seen = both(failed(child), [pod(child, "Failed", exit_code=75)])
    assert (seen.phase, seen.exit_code, seen.num_failures) == (StagePhase.STOPPED, 75, 0)


def test_a_pod_stuck_on_a_lost_node_is_waited_for_only_so_long() -> None:
    child = with_condition(release(), "FailureTarget", NOW)
    stuck = pod(child, deleted=NOW, conditions=disruption("DeletionByTaintManager"))
    assert observed(child, [stuck], at=100).phase is StagePhase.RUNNING
    assert observed(child, [stuck], at=121).phase is StagePhase.STOPPED


# ---- Running, waiting, stopped -----------------------------------------------------------------------------------


def test_a_job_without_an_end_runs() -> None:
    child = release()
    assert observed(child).phase is StagePhase.RUNNING
    assert observed(child, [pod(child)]).phase is StagePhase.RUNNING
    assert observed(child, [pod(child, "Failed", exit_code=69)]).phase is StagePhase.RUNNING, "its controller decides"
    assert observed(failed(child), [pod(child)]).phase is StagePhase.RUNNING, "a pod still runs"


def test_a_stopped_job_runs_until_its_pods_are_gone_and_is_no_failure() -> None:
    asked = release(annotations={STOPPED: "Suspended"}, suspend=True, active=1)
    assert observed(asked).phase is StagePhase.RUNNING, "its controller has not seen it"
    assert observed(stopped(release()), [pod(release())]).phase is StagePhase.RUNNING
    assert observed(stopped(release(terminating=1))).phase is StagePhase.RUNNING
    left = pod(release(), "Failed", exit_code=75, deleted=NOW)
    assert both(stopped(release()), [left]) == StageObserved(StagePhase.STOPPED, 1, message="stopped: Suspended")


def test_a_stopped_job_that_its_queue_lets_go_on_runs_until_its_controller_ends_it() -> None:
    let_go_on = release(annotations={STOPPED: "Suspended"}, suspend=False)
    assert observed(let_go_on).phase is StagePhase.RUNNING
    ends = with_condition(let_go_on, "FailureTarget", NOW)
    assert observed(ends, [pod(let_go_on)]).phase is StagePhase.RUNNING
    for each in (ends, failed(let_go_on)):
        assert observed(each) == StageObserved(StagePhase.STOPPED, 1, message="stopped: Suspended")


def test_a_stage_that_succeeded_while_it_was_stopped_has_succeeded() -> None:
    last = pod(release(), "Succeeded", exit_code=0, message=receipt(*RELEASE), deleted=NOW)
    assert both(stopped(release()), [last]).phase is StagePhase.SUCCEEDED


def test_what_its_queue_suspends_waits_and_its_lost_pods_say_nothing() -> None:
    child = release(suspend=True, conditions={"Suspended": NOW})
    left = pod(child, "Failed", exit_code=75, deleted=NOW)
    assert record_of(child, [left]) is None
    assert observed(child, [left]).phase is StagePhase.RUNNING


def test_a_stale_record_is_overwritten_by_the_run_that_ended() -> None:
    child = release(annotations={EXIT_CODE: LOST, MESSAGE: "taken by its queue"})
    assert both(failed(child), [pod(child, "Failed", exit_code=65)]).exit_code == 65


def test_pods_of_a_deleted_job_of_the_same_name_say_nothing() -> None:
    child = release()
    before = copy.deepcopy(child)
    before["metadata"]["uid"] = "earlier"
    assert record_of(child, [pod(before, "Failed", exit_code=77)]) is None


def test_a_deleted_job_is_simply_not_there() -> None:
    assert stages_observed([], [pod(release())], NOW) == {}


# ---- Several attempts --------------------------------------------------------------------------------------------


def test_failures_are_counted_over_attempts_and_the_newest_speaks() -> None:
    ends = [
        recorded(failed(release(number)), [pod(release(number), "Failed", exit_code=code)])
        for number, code in ((1, 69), (2, 75), (3, 74))
    ]
    seen = observed(ends)
    assert (seen.phase, seen.attempt, seen.num_failures, seen.exit_code) == (StagePhase.FAILED, 3, 2, 74)


def test_an_older_attempt_that_still_runs_forbids_a_second_beside_it() -> None:
    newer = recorded(failed(release(2)), [pod(release(2), "Failed", exit_code=69)])
    seen = observed([newer, release(1)])
    assert (seen.phase, seen.attempt, seen.num_failures) == (StagePhase.RUNNING, 2, 1)


def test_a_success_of_any_attempt_is_a_success() -> None:
    done = release(1, annotations={RECEIPT: receipt(*RELEASE)})
    newer = recorded(failed(release(2)), [pod(release(2), "Failed", exit_code=69)])
    assert observed([newer, done]).phase is StagePhase.SUCCEEDED


@pytest.mark.parametrize(("num_failures", "seconds"), [(1, 2), (2, 4), (8, 256), (9, 300), (50, 300)])
def test_the_next_attempt_waits_longer_after_every_failure(num_failures: int, seconds: int) -> None:
    ends = [failed(release(number), NOW + timedelta(seconds=number)) for number in range(1, num_failures + 1)]
    at = retry_at(ends, [], NOW)[RELEASE]
    assert at == NOW + timedelta(seconds=num_failures + seconds)


def test_losses_wait_too_but_what_we_stopped_goes_on_at_once() -> None:
    lost = recorded(failed(release()), [pod(release(), "Failed", conditions=disruption())])
    assert retry_at([lost], [], NOW) == {RELEASE: NOW + timedelta(seconds=2)}
    assert retry_at([stopped(release())], [], NOW) == {}
    assert retry_at([lost, stopped(release(2))], [], NOW) == {}


# ---- Deadlines ---------------------------------------------------------------------------------------------------

LIMITS = {"startSeconds": 100, "stageSeconds": 50, "trainShared": {"stageSeconds": 500}}


def overdue(child: Object, pods: list[Object], now: datetime) -> list[Deadline]:
    return [each for each in deadlines(job(deadlines=LIMITS), [child], pods) if each.at <= now]


def late(child: Object, pods: list[Object], at: int) -> list[Reason]:
    return [each.reason for each in overdue(child, pods, NOW + timedelta(seconds=at))]


def test_an_attempt_that_runs_too_long_is_overdue() -> None:
    child = release()
    assert late(child, [pod(child, started=NOW + timedelta(seconds=10))], 59) == []
    assert late(child, [pod(child, started=NOW + timedelta(seconds=10))], 60) == [Reason.STAGE_DEADLINE_EXCEEDED]


def test_an_attempt_that_waits_too_long_is_overdue_with_the_schedulers_words() -> None:
    child = release()
    waits = pod(child, "Pending", conditions=unscheduled())
    assert late(child, [waits], 99) == []
    (deadline,) = overdue(child, [waits], NOW + timedelta(seconds=100))
    assert deadline.reason is Reason.START_DEADLINE_EXCEEDED
    assert "deadlines.startSeconds = 100: Unschedulable: 0/3 nodes" in deadline.message
    assert late(child, [], 100) == [Reason.START_DEADLINE_EXCEEDED], "no pod could even be created"


def test_ranks_run_when_the_last_of_them_does_and_a_stage_has_its_own_limit() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    first, second = pod(child), pod(child, index=1, started=NOW + timedelta(seconds=90))
    assert late(child, [first], 100) == [Reason.START_DEADLINE_EXCEEDED]
    assert late(child, [first, second], 589) == []
    assert late(child, [first, second], 590) == [Reason.STAGE_DEADLINE_EXCEEDED]


def test_time_in_a_queue_or_after_the_end_does_not_count() -> None:
    ended, child = NOW + timedelta(days=9), release()
    spoken = release(annotations={RECEIPT: receipt(*RELEASE)})
    for each in (
        release(suspend=True),
        stopped(child),
        failed(child),
        complete(child),
        release(startTime=None),
        spoken,
    ):
        assert overdue(each, [], ended) == []
    assert overdue(child, [pod(child, "Failed", exit_code=69)], ended) == []
    assert deadlines(job(), [child], [pod(child)]) == []


def test_releasing_begins_when_the_first_release_runs_and_not_when_its_job_is_made() -> None:
    a, b, shared = release(), batch_job(Stage.RELEASE, "b"), batch_job(Stage.TRAIN_SHARED)
    queued = release(suspend=True, startTime=None)
    unplaced = pod(b, "Pending", conditions=unscheduled())
    assert releasing_since([queued, b], [unplaced]) is None
    assert releasing_since([shared], [pod(shared), pod(shared, index=1)]) is None, "that is no release"
    later, last = NOW + timedelta(seconds=70), NOW + timedelta(seconds=90)
    assert releasing_since([queued, b], [pod(b, started=later)]) == later
    assert releasing_since([a, b], [pod(a, started=last), pod(b, started=later)]) == later


@pytest.mark.parametrize("record", [{RECEIPT: receipt(*RELEASE)}, {EXIT_CODE: "69"}])
def test_a_release_whose_pod_is_gone_began_when_its_job_was_let_start(record: dict[str, str]) -> None:
    admitted = text(NOW + timedelta(seconds=50))
    child = release(annotations=record, startTime=admitted)
    assert releasing_since([child], []) == NOW + timedelta(seconds=50)
    assert releasing_since([release(startTime=admitted)], []) is None, "its pod is still to come"


def test_an_attempt_stopped_at_its_deadline_has_failed_with_that_reason() -> None:
    child = release()
    (deadline,) = overdue(child, [pod(child)], NOW + timedelta(seconds=50))
    end = stopped(child, **deadline.annotations)
    end["metadata"]["annotations"] |= deadline.annotations
    left = pod(child, "Failed", exit_code=75, deleted=NOW)
    seen = both(end, [left])
    assert (seen.phase, seen.reason, seen.num_failures) == (StagePhase.FAILED, Reason.STAGE_DEADLINE_EXCEEDED, 1)
    assert (
        seen.message == end["metadata"]["annotations"][STOPPED_BECAUSE] == "ran longer than deadlines.stageSeconds = 50"
    )
    assert retry_at([end], [left], NOW) == {RELEASE: NOW + timedelta(seconds=2)}


# ---- Waiting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"conditions": unscheduled()}, "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        ({"waits": ("ImagePullBackOff", 'Back-off pulling image "x"')}, 'ImagePullBackOff: Back-off pulling image "x"'),
        (
            {"waits": ("CreateContainerConfigError", 'secret "clinic-a-store" not found')},
            'CreateContainerConfigError: secret "clinic-a-store" not found',
        ),
    ],
)
def test_the_schedulers_and_the_kubelets_words_are_passed_on(more: dict[str, Any], words: str) -> None:
    child = release()
    assert waiting([child], [pod(child, "Pending", **more)]) == [f"release of a: {words}"]


def test_ordinary_preparation_is_worth_a_word_only_when_it_takes_long() -> None:
    child, later = release(), NOW + timedelta(seconds=61)
    preparing = pod(child, "Pending", waits=("ContainerCreating", ""))
    assert waiting([child], [preparing], NOW) == waiting([child], [], NOW) == []
    assert waiting([child], [preparing], later) == ["release of a: its pod is still being prepared (ContainerCreating)"]
    assert waiting([child], [], later)[0].startswith("release of a: no pod yet: kubectl describe job -n clinic-a fd-")


def test_a_queue_that_has_not_admitted_is_named() -> None:
    child = batch_job(Stage.TRAIN_SHARED, asked=job(queueName="gpus"), suspend=True)
    assert waiting([child], []) == ["train-shared: queue gpus has not admitted it"]
    assert waiting([release(suspend=True)], []) == ["release of a: something other than feddiff suspended its Job"]


def test_what_runs_has_ended_or_was_stopped_waits_for_nothing() -> None:
    child, later = release(), NOW + timedelta(days=1)
    assert waiting([child], [pod(child)], later) == []
    assert waiting([failed(child), stopped(child), complete(child)], [], later) == []


def test_equal_words_of_many_clients_are_said_once_and_long_ones_cut() -> None:
    asked = job("abcdefgh")
    children = [batch_job(Stage.RELEASE, name, asked=asked) for name in "abcdefgh"]
    (words,) = waiting(children, [pod(child, "Pending", conditions=unscheduled("x" * 999)) for child in children])
    assert words.startswith("release of ") and "and 3 more: Unschedulable: xxx" in words
    assert len(words) < 400


# ---- Which Jobs are ours -----------------------------------------------------------------------------------------


def forged(**changes: Any) -> Object:
    child = release()
    child["metadata"] |= {key: value for key, value in changes.items() if key in ("namespace", "name")}
    child["metadata"]["labels"] |= {f"feddiff.dev/{key.replace('_', '-')}": value for key, value in changes.items()
                                    if key not in ("namespace", "name")}  # fmt: skip
    return child


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "research"},
        {"name": "fd-release-0000000000-1"},
        {"stage": "sample"},
        {"stage": "steal"},
        {"client": "b"},
        {"client": "z"},
        {"attempt": "2"},
        {"attempt": "one"},
        {"attempt": "0"},
        {"job_uid": "another"},
    ],
)
def test_a_job_whose_labels_name_and_namespace_disagree_is_not_ours(changes: dict[str, str]) -> None:
    assert children_of(job(), UID, [forged(**changes)]) == []
    assert len(children_of(job(), UID, [forged(), batch_job(Stage.TRAIN_SHARED), batch_job(Stage.REPORT)])) == 3


# ---- What was recorded, and what stops -----------------------------------------------------------------------------


def test_a_release_that_the_ledger_has_recorded_is_done_though_its_job_was_deleted() -> None:
    seen = with_recorded_release({}, UID, "a", SHA)[RELEASE]
    assert seen.phase is StagePhase.SUCCEEDED
    assert seen.receipt is not None and json.loads(seen.receipt.to_line())["outputs"] == {"manifest": SHA}
    assert with_recorded_release({}, UID, "a", "") == {}


def test_a_job_is_over_when_it_has_ended_or_stays_stopped() -> None:
    assert is_over(complete(release())) and is_over(failed(release())) and is_over(stopped(release()))
    assert not is_over(release()) and not is_over(release(suspend=True))
    let_go_on = release(annotations={STOPPED: "Suspended"}, suspend=False)  # its queue admitted it again
    assert not is_over(let_go_on), "it has time left"
    let_go_on["spec"] |= {"activeDeadlineSeconds": 0}
    assert is_over(let_go_on)
