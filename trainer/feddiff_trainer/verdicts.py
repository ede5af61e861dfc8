"""From the scores of members and others to findings: how often an attack succeeded, between which limits, and whether
that is above its bound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from feddiff_protocol import accountant
from feddiff_protocol.promise import Promise

from .findings import CONFIDENCE, PROMISED, Estimate, Finding, OneRun, Target, Verdict
from .noise import Float64

ONE_RUN_CONFIDENCE = 0.95  # the paper's: its ε is far below the truth as it is
FALSE_POSITIVE_RATE = 0.01
FEWEST_OTHERS = 100  # non-members from which a true-positive rate at 1 % false positives can be told
GUESSED = 0.1  # of the canaries: the surest guesses on which an ε is based
FIRES = 0.8  # AUC of an attack on its control from which the attack counts as one that works


@dataclass(frozen=True)
class Bound:
    """What no attack can exceed: the area, and the true-positive rate at a false-positive rate."""

    auc: float
    tpr_at: Callable[[float], float]


def bound_of(promise: Promise) -> Bound:
    """Of a whole release, and of all that is computed from it."""
    return Bound(promise.attack_auc, promise.attack_tpr)


def bound_of_part(mu: float) -> Bound:
    """Of one part of a release that is charged μ² of the whole."""
    return Bound(accountant.attack_auc(mu), lambda rate: accountant.attack_tpr(mu, rate))


def bound_of_cap(probability: float) -> Bound:
    """Of whoever looks at nothing but whether a direction lies in an image's cap: with this probability it does where
    it is that image's, and otherwise never at best."""
    return Bound((1 + probability) / 2, lambda rate: probability)


def finding_of(
    target: Target,
    attack: str,
    members_N: Float64,
    others_N: Float64,
    bound: Bound,
    control_auc: float,
    group: Literal["all", "minority"] = "all",
) -> Finding:
    """What the scores of members and others say."""
    sizes = len(members_N), len(others_N)
    auc = area_interval(area_under_curve(members_N, others_N), *sizes)
    measured = [Measured(auc.low, area_interval(1.0, *sizes).low, bound.auc)]
    tpr, tpr_bound = None, None
    if found := found_at_one_percent(members_N, others_N):
        tpr, rate = found
        tpr_bound = bound.tpr_at(rate)
        measured.append(Measured(tpr.low, share_interval(sizes[0], sizes[0]).low, tpr_bound))
    return Finding(
        target=target,
        attack=attack,
        group=group,
        members=len(members_N),
        others=len(others_N),
        auc=auc,
        auc_bound=bound.auc,
        tpr=tpr,
        tpr_bound=tpr_bound,
        control_auc=control_auc,
        verdict=judge(measured if target in PROMISED else [], control_auc),
    )


def area_under_curve(members_N: Float64, others_N: Float64) -> float:
    """P(a member's score is larger) + ½·P(it is equal), over all pairs (Mann & Whitney 1947)."""
    ranks = stats.rankdata(np.concatenate([members_N, others_N]))
    num_members, num_others = len(members_N), len(others_N)
    wins = float(ranks[:num_members].sum()) - num_members * (num_members + 1) / 2
    return wins / (num_members * num_others)


def area_interval(area: float, num_members: int, num_others: int, confidence: float = CONFIDENCE) -> Estimate:
    """The areas θ that are not rejected: |area - θ| ≤ z·√V(θ) (Newcombe 2006, method 5).

    V(θ) = θ(1 - θ)/(mn)·[1 + (N - 1)·((1 - θ)/(2 - θ) + θ/(1 + θ))], N = (m + n)/2, is Hanley & McNeil's variance with
    both sizes' mean in it. Unlike an interval about the estimate it does not shrink to a point at an area of 1.
    """
    mean_size, z = (num_members + num_others) / 2, stats.norm.isf((1 - confidence) / 2)

    def beyond(theta: float) -> float:
        shape = 1 + (mean_size - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(area - theta) - float(z) * math.sqrt(theta * (1 - theta) * shape / (num_members * num_others))

    beside = 1e-9  # V vanishes at 0 and 1, where an estimate is not beyond itself
    low = optimize.brentq(beyond, 0.0, area * (1 - beside)) if area > 0 else 0.0
    high = optimize.brentq(beyond, 1.0, 1 - (1 - area) * (1 - beside)) if area < 1 else 1.0
    return Estimate(value=area, low=float(low), high=float(high))


def share_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> Estimate:
    """hits/total with the exact interval of Clopper & Pearson 1934."""
    limits = stats.binomtest(hits, total).proportion_ci(confidence, "exact")
    return Estimate(value=hits / total, low=float(limits.low), high=float(limits.high))


def found_at_one_percent(members_N: Float64, others_N: Float64) -> tuple[Estimate, float] | None:
    """The true-positive rate where at most 1 % of the others are false positives, and the upper limit of the
    false-positive rate of that threshold: it was measured, too. None where there are too few others."""
    if len(others_N) < FEWEST_OTHERS:
        return None
    allowed = int(FALSE_POSITIVE_RATE * len(others_N))
    threshold = np.sort(others_N)[-1 - allowed]
    false_positives = share_interval(int((others_N > threshold).sum()), len(others_N))
    return share_interval(int((members_N > threshold).sum()), len(members_N)), false_positives.high


@dataclass(frozen=True)
class Measured:
    """Lower limits of what an attack achieved and of what it would have if it were always right, and its bound."""

    low: float
    always_low: float
    bound: float


def judge(measured: Sequence[Measured], control_auc: float) -> Verdict:
    """Above its bound once a lower limit is; otherwise it takes a control that fires, and a bound that an attack which
    is always right would be seen to exceed, to say anything. Nothing measured: nothing was promised."""
    if any(each.low > each.bound for each in measured):
        return Verdict.ABOVE
    if control_auc < FIRES:
        return Verdict.SILENT
    if not measured:
        return Verdict.NO_PROMISE
    return Verdict.WITHIN if any(each.always_low > each.bound for each in measured) else Verdict.OUT_OF_REACH


# ---- One run -----------------------------------------------------------------------------------------------------


def one_run_of(
    target: Literal[Target.UPLOAD, Target.SHARED],
    attack: str,
    scores_N: Float64,
    second_N: np.ndarray,
    epsilon: float,
    delta: float,
    control_auc: float,
) -> OneRun:
    """What the guesses on one release show. The surest GUESSED of them count, the others abstain: about the middle of
    all scores, the half above is guessed to be the second image."""
    centred_N = scores_N - np.median(scores_N)
    surest = np.argsort(-np.abs(centred_N), kind="stable")[: max(1, round(GUESSED * len(scores_N)))]
    correct, size = int(((centred_N > 0) == second_N)[surest].sum()), len(scores_N)
    low, ceiling = (one_run_epsilon(size, len(surest), right, delta) for right in (correct, len(surest)))
    return OneRun(
        target=target,
        attack=attack,
        canaries=size,
        guesses=len(surest),
        correct=correct,
        epsilon_low=low,
        ceiling=ceiling,
        epsilon_bound=epsilon,
        delta=delta,
        control_auc=control_auc,
        verdict=judge([Measured(low, ceiling, epsilon)], control_auc),
    )


def one_run_epsilon(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = ONE_RUN_CONFIDENCE
) -> float:
    """The largest ε that so many correct guesses refute at δ, 0 if none (Steinke, Nasr & Jagielski 2023)."""

    def excess(epsilon: float) -> float:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high))


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper limit of P(at least so many correct guesses) under (ε, δ): β + 2·m·δ·α, with β = P(V ≥ v) for
    V ~ Bin(r, e^ε/(1 + e^ε)) and α = max over i ≥ 1 of P(v - i ≤ V < v)/i."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, accuracy))
    below_i = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    alpha = float((below_i / np.arange(1, correct + 1)).max(initial=0.0))
    return min(beta + 2 * canaries * delta * alpha, 1.0)
