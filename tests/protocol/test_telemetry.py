"""What a stage may tell: of records nothing, of progress what fits, and no more of a hostile pod's words."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feddiff_protocol import telemetry
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import LOSS, PROGRESS_BYTES, Metric, StageProgress, shown_progress, told_by

TOUCH_RECORDS = (Stage.RELEASE, Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)
HARMLESS = {"feddiff_stage_info", "feddiff_stage_progress_ratio", "feddiff_stage_step"}
LARGEST = 2**53


def over_told(told: Callable[[Stage], tuple[Metric, ...]]) -> set[str]:
    """The names that a stage which touches records may tell, beyond stage, step and percent."""
    return {metric.name for stage in TOUCH_RECORDS for metric in told(stage)} - HARMLESS


def test_a_stage_that_touches_records_tells_stage_step_and_percent() -> None:
    assert over_told(told_by) == set()
    assert {metric.name for metric in told_by(Stage.REPORT)} == HARMLESS
    assert LOSS in told_by(Stage.TRAIN_SHARED)


@pytest.mark.parametrize("metric", telemetry.OF_SHARED_TRAINING)
def test_any_other_metric_of_an_owners_stage_is_noticed(metric: Metric) -> None:
    assert over_told(lambda stage: (*told_by(stage), metric)) == {metric.name}


def test_names_and_labels_are_prometheus_own_and_bounded() -> None:
    for metric in told_by(Stage.TRAIN_SHARED):
        assert metric.name.startswith("feddiff_") and metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.labels in ((), ("stage",)) or metric is telemetry.STAGE_INFO


# ---- progress --------------------------------------------------------------------------------------------------

counts = st.integers(1, LARGEST).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(counts)
def test_an_owners_count_is_the_smallest_of_its_whole_percent(count: tuple[int, int]) -> None:
    done, total = count
    shown = shown_progress(Stage.RELEASE, done, total)
    assert shown.percent == 100 * done // total and shown.done <= done
    assert shown.done == 0 or 100 * (shown.done - 1) // total < shown.percent
    assert shown_progress(Stage.TRAIN_SHARED, done, total).done == done


def test_an_owners_progress_has_a_hundred_and_one_values_and_never_goes_back() -> None:
    shown = [shown_progress(Stage.SAMPLE, done, 12_345).done for done in range(12_346)]
    assert len(set(shown)) == 101 and shown == sorted(shown) and (shown[0], shown[-1]) == (0, 12_345)
    exact = [shown_progress(Stage.TRAIN_SHARED, done, 12_345).done for done in range(12_346)]
    assert len(set(exact)) == 12_346, "what the rounding takes away"


@pytest.mark.parametrize(
    "said",
    [
        {"stage": "release", "done": 5, "total": 4},
        {"stage": "release", "done": -1, "total": 4},
        {"stage": "release", "done": 0, "total": 0},
        {"stage": "release", "done": 1.5, "total": 4},
        {"stage": "release", "done": "1", "total": 4},
        {"stage": "release", "done": True, "total": 4},
        {"stage": "release", "done": 1, "total": LARGEST + 1},
        {"stage": "release", "done": 10**400, "total": 10**401},
        {"stage": "release", "done": float("nan"), "total": 4},
        {"stage": "all", "done": 1, "total": 4},
        {"stage": "release", "done": 1},
        {"stage": "release", "done": 1, "total": 4, "loss": 0.5},
        ["release", 1, 4],
        None,
    ],
)
def test_what_cannot_be_is_no_progress(said: Any) -> None:
    with pytest.raises(ValidationError):
        StageProgress.model_validate_json(json.dumps(said))


def test_the_longest_progress_fits() -> None:
    longest = StageProgress(stage=Stage.TRAIN_PERSONAL, done=LARGEST, total=LARGEST)
    assert len(longest.model_dump_json()) < PROGRESS_BYTES
