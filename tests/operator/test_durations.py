"""How long an attempt waited and ran is told once, by its pods."""

from datetime import timedelta
from typing import Any

import pytest

from batch_objects import NOW, batch_job, pod, receipt
from feddiff_operator.durations import Ended, ended_now
from feddiff_operator.endings import record_of
from feddiff_protocol.stages import Stage

Object = dict[str, Any]
STARTED, FINISHED = NOW + timedelta(seconds=40), NOW + timedelta(hours=2)


def end(child: Object, *pods: Object) -> Ended | None:
    record = record_of(child, pods)
    assert record is not None
    return ended_now(child, pods, record)


def ran(child: Object, exit_code: int, **more: Any) -> Object:
    more = {"started": STARTED, "finished": FINISHED, **more}
    return pod(child, "Failed" if exit_code else "Succeeded", exit_code=exit_code, **more)


def test_it_waited_until_its_first_pod_ran_and_ran_until_the_last_had_ended() -> None:
    child = batch_job(Stage.TRAIN_SHARED)
    late = ran(child, 0, index=1, started=STARTED + timedelta(seconds=5), finished=FINISHED + timedelta(seconds=9))
    first = ran(child, 0, message=receipt(Stage.TRAIN_SHARED))
    assert end(child, late, first) == Ended("train-shared", "succeeded", 40, 7200 - 40 + 9)


@pytest.mark.parametrize(("code", "result"), [(75, "stopped"), (74, "failed"), (137, "failed"), (0, "failed")])
def test_how_it_ended_is_one_of_three(code: int, result: str) -> None:
    """0 without a receipt is a failure, too."""
    child = batch_job(Stage.SAMPLE, "a")
    found = end(child, ran(child, code))
    assert found is not None and found.result == result


def test_what_was_told_is_not_told_again() -> None:
    child = batch_job(Stage.RELEASE, "a")
    failed = ran(child, 74)
    told = batch_job(Stage.RELEASE, "a", annotations=record_of(child, [failed]))
    assert ended_now(told, [failed], {"feddiff.dev/receipt": "x"}) is None


def test_a_pod_that_never_ran_has_no_duration() -> None:
    child = batch_job(Stage.RELEASE, "a")
    assert end(child, pod(child, "Failed", pod_reason="Evicted", pod_message="the node was low on memory")) is None
