"""What an audit says of scores: areas and shares with limits that hold, and verdicts that no wish can bend."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from feddiff_protocol import accountant
from feddiff_protocol.stages import JobReference
from feddiff_trainer.findings import CONFIDENCE, Audit, Copies, Estimate, Finding, Target, Verdict, export_refusals
from feddiff_trainer.verdicts import (
    Bound,
    Measured,
    area_interval,
    area_under_curve,
    bound_of_part,
    finding_of,
    found_at_one_percent,
    judge,
    one_run_epsilon,
    one_run_of,
    share_interval,
)

BOUND = bound_of_part(1.0)


def gaussians(mu: float, num_members: int, num_others: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return mu + rng.standard_normal(num_members), rng.standard_normal(num_others)


def estimate(value: float, half: float = 0.0) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


# ---- Estimates -------------------------------------------------------------------------------------------------


def test_the_area_is_mann_and_whitneys_statistic_with_ties_as_halves() -> None:
    members, others = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.5])
    statistic = stats.mannwhitneyu(members, others).statistic
    assert area_under_curve(members, others) == statistic / 12 == (1 + 1 + 1 + 0.5 * 2 + 1 + 1 + 1) / 12


@pytest.mark.parametrize(("mu", "num"), [(0.0, 30), (1.0, 30), (1.0, 250), (2.5, 40)])
def test_the_interval_of_an_area_covers_the_true_one(mu: float, num: int) -> None:
    """At 95 %: of 400 repetitions at least 92 %, four standard errors below."""
    truth, covered = stats.norm.cdf(mu / math.sqrt(2)), 0
    for seed in range(400):
        area = area_under_curve(*gaussians(mu, num, num, seed))
        found = area_interval(area, num, num, confidence=0.95)
        covered += found.low <= truth <= found.high
    assert covered >= 0.906 * 400


def test_the_interval_of_a_perfect_area_is_no_point() -> None:
    assert area_interval(1.0, 20, 20).low < 0.85 and area_interval(1.0, 20, 20).high == 1.0
    assert area_interval(0.0, 20, 20).high == pytest.approx(1 - area_interval(1.0, 20, 20).low)


def test_the_interval_of_a_share_is_the_exact_one() -> None:
    found, tail = share_interval(3, 40), (1 - CONFIDENCE) / 2
    assert stats.binom.sf(2, 40, found.low) == pytest.approx(tail) == stats.binom.cdf(3, 40, found.high)


def test_what_is_found_at_one_percent_is_counted_above_the_threshold_of_the_others() -> None:
    others, members = np.arange(200.0), np.array([150.0, 198.0, 198.5, 250.0])
    found, false_positive_rate = found_at_one_percent(members, others) or (None, 0.0)
    assert found is not None and found.value == 3 / 4  # above 197, the third largest of the others
    assert false_positive_rate == share_interval(2, 200).high
    assert found_at_one_percent(members, others[:99]) is None


# ---- Verdicts --------------------------------------------------------------------------------------------------


def test_scores_at_the_bound_are_within_it_and_less_noise_than_promised_is_above() -> None:
    within = finding_of(Target.UPLOAD, "a", *gaussians(1.0, 20_000, 20_000, 1), BOUND, 1.0)
    above = finding_of(Target.UPLOAD, "a", *gaussians(1.0 / 0.9, 20_000, 20_000, 1), BOUND, 1.0)
    assert (within.verdict, above.verdict) == (Verdict.WITHIN, Verdict.ABOVE)
    assert within.auc_bound == accountant.attack_auc(1.0) and within.tpr is not None and within.tpr_bound is not None
    assert within.tpr.low < accountant.attack_tpr(1.0, 0.01) < within.tpr_bound


def test_an_attack_that_finds_only_a_few_for_sure_is_seen_by_the_rate_at_one_percent() -> None:
    rng = np.random.default_rng(2)
    members, others = rng.standard_normal(2000), rng.standard_normal(2000)
    members[:400] = 10
    found = finding_of(Target.SHARED, "a", members, others, BOUND, 1.0)
    assert found.auc.low < BOUND.auc and found.verdict is Verdict.ABOVE


@pytest.mark.parametrize(
    ("auc", "tpr", "bound", "control", "verdict"),
    [
        (0.7, None, 0.75, 0.9, Verdict.WITHIN),
        (0.7, None, 0.65, 0.9, Verdict.ABOVE),
        (0.7, None, 0.65, 0.5, Verdict.ABOVE),  # a silent control excuses nothing
        (0.5, None, 0.75, 0.79, Verdict.SILENT),
        (0.99, None, None, 0.9, Verdict.NO_PROMISE),
        (0.99, None, None, 0.79, Verdict.SILENT),
        (0.6, 0.3, 0.75, 0.9, Verdict.ABOVE),  # bound of the rate: 0.2
        (0.7, None, 0.95, 0.9, Verdict.OUT_OF_REACH),  # always right is a lower limit of 0.9
        (0.7, 0.1, 0.95, 0.9, Verdict.WITHIN),  # but the rate could exceed its bound
        (0.7, None, 0.95, 0.5, Verdict.SILENT),
    ],
)
def test_verdicts(auc: float, tpr: float | None, bound: float | None, control: float, verdict: Verdict) -> None:
    measured = [] if bound is None else [Measured(auc, 0.9, bound)]
    assert judge(measured + ([] if tpr is None else [Measured(tpr, 0.9, 0.2)]), control) is verdict


@pytest.mark.parametrize(("num", "verdict"), [(20, Verdict.OUT_OF_REACH), (400, Verdict.WITHIN)])
def test_so_few_records_that_no_attack_could_be_above_the_bound_say_nothing(num: int, verdict: Verdict) -> None:
    """At AUC 0.92 even twenty members whose every score is above the others' are not above it for sure."""
    scores = np.arange(float(num))
    assert finding_of(Target.SHARED, "a", scores, scores, bound_of_part(2.0), 1.0).verdict is verdict
    right = finding_of(Target.SHARED, "a", scores + num, scores, bound_of_part(2.0), 1.0).verdict
    assert (right is Verdict.ABOVE) == (verdict is Verdict.WITHIN)


# ---- One run -----------------------------------------------------------------------------------------------------


def test_without_delta_one_run_is_the_binomial_test_of_randomised_response() -> None:
    low = one_run_epsilon(1000, 200, 190, 0.0)
    assert stats.binom.sf(189, 200, 1 / (1 + math.exp(-low))) == pytest.approx(0.05)
    assert one_run_epsilon(1000, 200, 190, 1e-5) < low
    assert one_run_epsilon(1000, 200, 100, 0.0) == 0.0


def test_a_thousand_guesses_that_are_all_right_show_the_ceiling_that_is_known() -> None:
    """e^ε/(1 + e^ε) = 0.05^(1/1000)."""
    assert one_run_epsilon(1000, 1000, 1000, 0.0) == pytest.approx(5.81, abs=0.01)


def test_one_run_of_a_gaussian_mechanism_stays_below_its_epsilon_and_without_noise_reaches_the_ceiling() -> None:
    rng, mu = np.random.default_rng(3), 2.0
    second_N = rng.integers(0, 2, 1000) == 1
    noised = one_run_of(Target.UPLOAD, "a", mu / 2 * second_N + rng.standard_normal(1000), second_N, 3.4, 1e-5, 1.0)
    assert 0 < noised.epsilon_low < noised.epsilon_bound < noised.ceiling and noised.verdict is Verdict.WITHIN
    larger = one_run_of(Target.UPLOAD, "a", mu * second_N + rng.standard_normal(1000), second_N, 10.0, 1e-5, 1.0)
    assert larger.ceiling < larger.epsilon_bound and larger.verdict is Verdict.OUT_OF_REACH
    clean = one_run_of(Target.UPLOAD, "a", second_N + 1e-9 * rng.standard_normal(1000), second_N, 1.0, 1e-5, 0.5)
    assert clean.epsilon_low == clean.ceiling and clean.verdict is Verdict.ABOVE
    wrong = one_run_of(Target.UPLOAD, "a", -mu * second_N + rng.standard_normal(1000), second_N, 10.0, 1e-5, 0.79)
    assert wrong.epsilon_low == 0 and wrong.verdict is Verdict.SILENT  # a wrong sign shows nothing, on the control too


# ---- May it be passed on? ----------------------------------------------------------------------------------------


def finding(target: Target = Target.PERSONAL, auc: Estimate | None = None, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "target": target,
        "attack": "loss threshold",
        "members": 250,
        "others": 250,
        "auc": auc or estimate(0.55, 0.08),
        "auc_bound": 0.92,
        "tpr": estimate(0.02, 0.01),
        "tpr_bound": 0.4,
        "control_auc": 1.0,
        "verdict": Verdict.NO_PROMISE,
    }
    return Finding(**(fields | changes))


def audit_of(*findings: Finding, **changes: Any) -> Audit:
    fields: dict[str, Any] = {
        "job": JobReference(uid="0123abcd", name="digits", namespace="research"),
        "client": "a",
        "records_sha256": "a" * 64,
        "personal_sha256": "b" * 64,
        "samples_sha256": "c" * 64,
        "finished_at": "2026-01-02T03:04:05+00:00",
        "findings": findings,
        "blind": estimate(0.5, 0.1),
    }
    return Audit(**(fields | changes))


def test_a_personal_denoiser_passes_where_no_attack_does_better_than_the_release_allows() -> None:
    copies = Copies(target=Target.PERSONAL, third=estimate(0.0), half=estimate(0.01))
    assert export_refusals(audit_of(finding(), copies=(copies,))) == []


@pytest.mark.parametrize(
    ("findings", "changes", "words"),
    [
        ((), {}, "was not attacked"),
        ((finding(Target.SHARED),), {}, "was not attacked"),
        ((finding(), finding(Target.UPLOAD, verdict=Verdict.ABOVE)), {}, "upload, loss threshold: above its bound"),
        ((finding(verdict=Verdict.SILENT),), {}, "it says nothing"),
        ((finding(auc=estimate(0.85, 0.1)),), {}, "AUC up to 0.950, where 0.920 is the most"),
        ((finding(auc=estimate(0.9, 0.06), auc_bound=0.99995),), {}, "AUC up to 0.960, where 0.950 is the most"),
        ((finding(tpr=estimate(0.6, 0.05), tpr_bound=0.99),), {}, "finds 60.0% at 1% false alarms, where 50.1%"),
        ((finding(tpr=estimate(0.6, 0.1)),), {}, "finds 60.0% at 1% false alarms"),
        ((finding(),), {"blind": estimate(0.7, 0.1)}, "differ in themselves"),
        ((finding(),), {"blind": estimate(0.3, 0.1)}, "differ in themselves"),
        (
            (finding(),),
            {"copies": (Copies(target=Target.BOTH, third=estimate(0.002), half=estimate(0.1)),)},
            "shared and personal: 0.2% of its samples are copies",
        ),
    ],
)
def test_whatever_is_wrong_or_unknown_keeps_it_with_its_owner(
    findings: tuple[Finding, ...], changes: dict[str, Any], words: str
) -> None:
    (reason,) = export_refusals(audit_of(*findings, **changes))
    assert words in reason


def test_copies_among_public_samples_are_no_reason() -> None:
    copies = Copies(target=Target.SHARED, third=estimate(0.5), half=estimate(0.9))
    assert export_refusals(audit_of(finding(), copies=(copies,))) == []


def test_a_bound_of_part_of_a_release_is_that_of_its_share() -> None:
    assert isinstance(BOUND, Bound) and BOUND.tpr_at(0.05) == accountant.attack_tpr(1.0, 0.05)
