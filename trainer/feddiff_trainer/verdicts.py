"""What an audit says: how often each attack succeeded, between which limits, and what that is held against.

An attack on what left the owner has a bound, from the release's charge; above it, a result is a bug. The personal
denoiser has no promise. A result below a bound means something only if the same attack finds the records of a model
that memorised them: its control.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy import optimize, stats

from feddiff_protocol import accountant
from feddiff_protocol.api import Name, Wire
from feddiff_protocol.promise import Promise
from feddiff_protocol.stages import JobReference, Sha256

from .noise import Float64

ONE_RUN_CONFIDENCE = 0.95  # the paper's: its ε is far below the truth as it is
CONFIDENCE = 0.999  # of every interval: of fifty together, all hold in 95 audits of a hundred and more
FALSE_POSITIVE_RATE = 0.01
FEWEST_OTHERS = 100  # non-members from which a true-positive rate at 1 % false positives can be told
GUESSED = 0.1  # of the canaries: the surest guesses on which an ε is based
FIRES = 0.8  # AUC of an attack on its control from which the attack counts as one that works


class Target(StrEnum):
    UPLOAD = "upload"
    SHARED = "shared"
    PERSONAL = "personal"
    BOTH = "both"


TITLES = {
    Target.UPLOAD: "upload",
    Target.SHARED: "shared denoiser",
    Target.PERSONAL: "personal denoiser",
    Target.BOTH: "shared and personal",
}
PROMISED = frozenset({Target.UPLOAD, Target.SHARED})  # what left the owner, and what was made of that alone


class Verdict(StrEnum):
    WITHIN = "within its bound"
    ABOVE = "above its bound"
    NO_PROMISE = "no promise"
    SILENT = "control silent"


class Estimate(Wire):
    """A value in [0, 1] and the limits of its interval."""

    value: float
    low: float
    high: float


class Finding(Wire):
    """One attack on one target. `members` were released or trained on, `others` were not. The bounds are those of the
    release's charge, also where nothing was promised: for the reader to compare."""

    target: Target
    attack: str
    group: Literal["all", "minority"] = "all"
    members: int
    others: int
    auc: Estimate
    auc_bound: float
    tpr: Estimate | None = None  # at 1 % false positives; None: too few others to tell
    tpr_bound: float | None = None
    control_auc: float
    verdict: Verdict


class Copies(Wire):
    """Of one target's samples: the share nearer to a training record than ⅓, or ½, of the way to any held-out one."""

    target: Target
    third: Estimate
    half: Estimate


class OneRun(Wire):
    """Canaries, each one of two images by a fair coin, in one release: how many of the surest guesses were right, and
    the ε that so many take. `ceiling`: the most that so many guesses could have shown."""

    attack: str
    canaries: int
    guesses: int
    correct: int
    epsilon_low: float
    ceiling: float
    epsilon_bound: float
    delta: float
    verdict: Verdict


class Reconstruction(Wire):
    """Images and what is released of each: how often that is nearer to its image than to another one of the class, by
    how many dB an estimate from it beats a guess without the release, and how alike (SSIM) estimate and guess are to
    the image. `control…`: with next to no noise."""

    records: int
    nearer: Estimate
    nearer_bound: float
    gain_db: float
    ssim: float
    guess_ssim: float
    control_nearer: float
    control_gain_db: float
    control_ssim: float
    verdict: Verdict


class Audit(Wire):
    """One owner's audit of one job. Depends on the owner's records: it stays in the owner's store."""

    format: Literal["feddiff.audit/1"] = "feddiff.audit/1"
    job: JobReference
    client: Name
    records_sha256: Sha256
    personal_sha256: Sha256  # of the denoiser that was attacked, as it lies in the store
    samples_sha256: Sha256
    finished_at: str  # UTC, ISO 8601
    confidence: float = CONFIDENCE
    findings: tuple[Finding, ...]
    one_run: tuple[OneRun, ...] = ()
    reconstruction: Reconstruction | None = None  # None: no held-out records, or images too large for it
    copies: tuple[Copies, ...] = ()
    blind: Estimate | None = None  # AUC of a denoiser that was trained on nothing; 0.5 unless the held-out ones differ
    notes: tuple[Annotated[str, Field(max_length=500)], ...] = ()

    @property
    def above(self) -> list[str]:
        """The attacks that did better than the release's charge allows."""
        runs = [
            f"{TITLES[Target.UPLOAD]}, one run, {each.attack}" for each in self.one_run if each.verdict is Verdict.ABOVE
        ]
        if self.reconstruction is not None and self.reconstruction.verdict is Verdict.ABOVE:
            runs.append(f"{TITLES[Target.UPLOAD]}, reconstruction")
        return [named(finding) for finding in self.findings if finding.verdict is Verdict.ABOVE] + runs


# ---- Scores to findings ----------------------------------------------------------------------------------------


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
    auc = area_interval(area_under_curve(members_N, others_N), len(members_N), len(others_N))
    tpr, tpr_bound = None, None
    if found := found_at_one_percent(members_N, others_N):
        tpr, rate = found
        tpr_bound = bound.tpr_at(rate)
    promised = target in PROMISED
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
        verdict=judge(auc, tpr, bound.auc if promised else None, tpr_bound if promised else None, control_auc),
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


def judge(
    auc: Estimate, tpr: Estimate | None, auc_bound: float | None, tpr_bound: float | None, control_auc: float
) -> Verdict:
    """Above its bound once a lower limit is; otherwise it takes a control that fires to say anything."""
    for estimate, bound in ((auc, auc_bound), (tpr, tpr_bound)):
        if estimate is not None and bound is not None and estimate.low > bound:
            return Verdict.ABOVE
    if control_auc < FIRES:
        return Verdict.SILENT
    return Verdict.NO_PROMISE if auc_bound is None else Verdict.WITHIN


# ---- One run -----------------------------------------------------------------------------------------------------


def one_run_of(attack: str, scores_N: Float64, second_N: np.ndarray, epsilon: float, delta: float) -> OneRun:
    """What the guesses on one release show. The surest GUESSED of them count, the others abstain: about the middle of
    all scores, the half above is guessed to be the second image."""
    centred_N = scores_N - np.median(scores_N)
    surest = np.argsort(-np.abs(centred_N), kind="stable")[: max(1, round(GUESSED * len(scores_N)))]
    correct, size = int(((centred_N > 0) == second_N)[surest].sum()), len(scores_N)
    low = one_run_epsilon(size, len(surest), correct, delta)
    return OneRun(
        attack=attack,
        canaries=size,
        guesses=len(surest),
        correct=correct,
        epsilon_low=low,
        ceiling=one_run_epsilon(size, len(surest), len(surest), delta),
        epsilon_bound=epsilon,
        delta=delta,
        verdict=Verdict.ABOVE if low > epsilon else Verdict.WITHIN,
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


# ---- May it be passed on? ----------------------------------------------------------------------------------------


class Export(Wire):
    """A copy of a personal denoiser, or of its samples, that left the owner's store."""

    format: Literal["feddiff.export/1"] = "feddiff.export/1"
    what: Literal["denoiser", "samples"]
    sha256: Sha256  # of what was copied, as it lies in the store
    exported_at: str  # UTC, ISO 8601
    refusals: tuple[str, ...] = ()  # what spoke against it
    override: str = ""  # why the owner did it all the same


def export_refusals(audit: Audit) -> list[str]:
    """Why the personal denoiser and its samples should not leave the owner; empty where the audit passed.

    Nothing was promised for them. They pass where every attack on them has been shown to find no more than the best
    attack on the release could: upper limits of the area below its bound, with controls that fire.
    """
    own = [finding for finding in audit.findings if finding.target not in PROMISED]
    reasons = [] if own else ["the personal denoiser was not attacked"]
    reasons += [f"{each}: above its bound" for each in audit.above]
    for finding in own:
        if finding.verdict is Verdict.SILENT:
            reasons.append(f"{named(finding)}: finds nothing in a model that memorised its records, so it says nothing")
        elif finding.auc.high > finding.auc_bound:
            reasons.append(
                f"{named(finding)}: AUC up to {finding.auc.high:.3f}, where the release allows {finding.auc_bound:.3f}"
            )
        elif finding.tpr is not None and finding.tpr_bound is not None and finding.tpr.low > finding.tpr_bound:
            reasons.append(
                f"{named(finding)}: finds {finding.tpr.value:.1%} at 1% false alarms, where the release allows"
                f" {finding.tpr_bound:.1%}"
            )
    for copies in audit.copies:
        if copies.target not in PROMISED and copies.third.value > 0:
            reasons.append(f"{TITLES[copies.target]}: {copies.third.value:.1%} of its samples are copies")
    if audit.blind is not None and not audit.blind.low <= 0.5 <= audit.blind.high:
        reasons.append("training and held-out records differ in themselves, so attacks on models say nothing")
    return reasons


def named(finding: Finding) -> str:
    """ "shared denoiser, loss threshold"."""
    rare = ", minority classes" if finding.group == "minority" else ""
    return f"{TITLES[finding.target]}, {finding.attack}{rare}"
