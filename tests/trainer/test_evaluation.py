"""Comparing two arms: direction, tolerance, and words that do not cheer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddiff_trainer.evaluation import MEASURES, ArmQuality, Change, compare, verdict

BY_KEY = {measure.key: measure for measure in MEASURES}


@pytest.mark.parametrize(
    ("key", "value", "baseline", "change"),
    [
        ("recall", 0.92, 0.85, Change.BETTER),
        ("recall", 0.85, 0.92, Change.WORSE),
        ("recall", 0.85, 0.86, Change.SAME),
        ("frechet", 1.2, 1.9, Change.BETTER),
        ("frechet", 1.9, 1.2, Change.WORSE),
        ("frechet", 1.95, 1.93, Change.SAME),
        ("copies_half", 0.0, 0.09, Change.BETTER),
        ("copies_half", 0.09, 0.0, Change.WORSE),
        ("kernel_distance", -0.01, 0.05, Change.BETTER),
        ("density", 0.6, 1.0, Change.WORSE),
        ("density", 1.6, 1.0, Change.SAME),
        ("two_sample_accuracy", 0.55, 0.9, Change.BETTER),
        ("two_sample_accuracy", 0.1, 0.55, Change.WORSE),
        ("two_sample_accuracy", 0.45, 0.55, Change.SAME),
        ("recall", None, 0.5, None),
        ("recall", 0.5, None, None),
    ],
)
def test_better_and_worse_follow_the_measures_direction(
    key: str, value: float | None, baseline: float | None, change: Change | None
) -> None:
    assert compare(BY_KEY[key], value, baseline) is change


@given(st.sampled_from(MEASURES), st.floats(0, 5), st.floats(0, 5))
def test_whoever_gains_one_way_loses_the_other_way(measure: object, a: float, b: float) -> None:
    opposite = {Change.BETTER: Change.WORSE, Change.WORSE: Change.BETTER, Change.SAME: Change.SAME}
    there, back = compare(measure, a, b), compare(measure, b, a)  # type: ignore[arg-type]
    assert there is not None and back is opposite[there]


def arm(**values: float | None) -> ArmQuality:
    return ArmQuality(groups={"all": values}, per_class=())


def test_a_verdict_names_losses_as_plainly_as_gains() -> None:
    arms = {
        "both": arm(recall=0.9, frechet=2.5, kernel_distance=0.1),
        "personal": arm(recall=0.8, frechet=1.5, kernel_distance=0.1),
    }
    expected = (
        "better in recall (80.0% → 90.0%); worse in Fréchet distance (1.5 → 2.5); about the same in kernel distance"
    )
    assert verdict(arms, "both", "all") == expected


def test_an_arm_that_gains_nothing_is_said_to_gain_nothing() -> None:
    arms = {"both": arm(recall=0.8), "personal": arm(recall=0.8)}
    assert verdict(arms, "both", "all") == "about the same in recall"
    assert verdict({"both": arm(), "personal": arm(recall=0.8)}, "both", "all") == "nothing could be measured"
