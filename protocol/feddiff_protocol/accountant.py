"""What noise buys: from noise to (ε, δ) and back, and whether one more release still fits a budget.

All but pure ε is μ-GDP (Dong, Roth & Su 2019): a release whose worst pair of neighbouring records lies μ noise standard
deviations apart. Releases compose as Σμ², which is what the ledger charges; ε is computed once, from the sum.
Neighbours differ in one record, replaced by any other of the same class.

Floats here carry a relative rounding error of about 1e-14, always on the safe side: ε comes out no smaller, μ no
larger than the truth. Symbols: a = ε/μ - μ/2 and b = ε/μ + μ/2 are the arguments of Balle & Wang's Theorem 8;
Q = 1 - Φ; R = Q/φ is the Mills ratio.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context, Decimal, Inexact, InvalidOperation, Overflow
from functools import reduce

from .schedule import Schedule

Exact = Decimal | str  # numbers that carry a promise: never through a float on the wire

# ---- (ε, δ) of μ, and back ----------------------------------------------------------------------------------


def delta_of(mu: float, epsilon: float) -> float:
    """Smallest δ such that μ-GDP implies (ε, δ), ε ≥ 0: δ = Φ(-a) - e^ε·Φ(-b). Balle & Wang 2018, Theorem 8."""
    return math.exp(log_delta_of(mu, epsilon))


def log_delta_of(mu: float, epsilon: float) -> float:
    """ln δ(ε), where δ itself would underflow; -inf once even that does (ε/μ above 1e150 or so)."""
    mu = _positive("mu", mu)
    epsilon = _positive("epsilon", epsilon) if epsilon != 0 else 0.0
    return _log_delta(_distance_to_tail(mu, epsilon), mu)


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest ε ≥ 0 such that μ-GDP implies (ε, δ); 0 where δ(0) ≤ δ already.

    Never below the truth. Solved for a at fixed μ, because ε = μ·a + μ²/2 stays exact at any size.
    """
    mu, delta = _positive("mu", mu), _share("delta", delta)
    if math.log(math.erf(mu / math.sqrt(8))) <= math.log(delta) - _log_delta_error(delta):  # δ(0) = erf(μ/√8)
        return 0.0
    # Too large, whatever the root: δ(a) ≤ Q(a) ≤ ½·exp(-a²/2), and δ(a) ≤ μ·φ(a) for a ≥ 0.
    start = math.sqrt(max(0.0, -2 * math.log(max(2 * delta, delta * math.sqrt(2 * math.pi) / mu))))
    a = _root(lambda a: _log_delta_and_slope_in_a(a, mu), delta, start)
    return max(0.0, mu * a + mu * mu / 2 + _ROUNDING * mu * (1 + abs(a) + mu))


def mu_of(epsilon: float, delta: float) -> float:
    """Largest μ such that μ-GDP implies (ε, δ), the inverse of `epsilon_of`. Never above the truth."""
    epsilon, delta = _positive("epsilon", epsilon), _share("delta", delta)
    largest_a = math.sqrt(max(0.0, -2 * math.log(2 * delta)))  # as in epsilon_of
    if epsilon >= 1:  # concave in a only from there on, but a large μ has no digits left to solve for it directly
        a = _root(lambda a: _log_delta_and_slope_in_a_at(epsilon, a), delta, largest_a)
        return _mu_at(epsilon, a) * (1 - _ROUNDING)
    start = max(_mu_at(epsilon, largest_a), delta * math.sqrt(2 * math.pi))  # too small: δ(ε) ≤ δ(0) ≤ μ/√(2π)
    log_ratio = _root(lambda x: _log_delta_and_slope_in_log_mu(start * math.exp(x), epsilon), delta, 0.0)
    return start * math.exp(log_ratio) * (1 - _ROUNDING)


def paper_epsilon(mu: float, delta: float) -> float:
    """ε by the paper's formula, ρ + 2√(ρ·ln(1/δ)) with ρ = μ²/2 (Bun & Steinke 2016): valid, not tight."""
    rho = _positive("mu", mu) ** 2 / 2
    return rho + 2 * math.sqrt(rho * -math.log(_share("delta", delta)))


def compose(mus: Iterable[float]) -> float:
    """μ of several releases together, √Σμ², also where each was chosen after seeing the others. 0 of none."""
    return math.hypot(*(_positive("mu", mu) for mu in mus))


# ---- What an attacker can do -----------------------------------------------------------------------------------


def attack_auc(mu: float) -> float:
    """Area under the curve of the best possible membership test, Φ(μ/√2)."""
    return 0.5 * math.erfc(-_positive("mu", mu) / 2)


def attack_tpr(mu: float, false_positive_rate: float) -> float:
    """True-positive rate of the best possible membership test, Φ(μ + Φ⁻¹(f))."""
    from statistics import NormalDist  # costs as much to import as the rest of this file

    quantile = NormalDist().inv_cdf(_share("false_positive_rate", false_positive_rate))
    return 0.5 * math.erfc(-(_positive("mu", mu) + quantile) / math.sqrt(2))


def pure_attack_auc(epsilon: float) -> float:
    """The same of pure ε: e^ε/(1 + e^ε), the area under `pure_attack_tpr`."""
    return 1 / (1 + math.exp(-_positive("epsilon", epsilon)))


def pure_attack_tpr(epsilon: float, false_positive_rate: float) -> float:
    """The same of pure ε, min(e^ε·f, 1 - e^-ε·(1 - f)): no test has more (Wasserman & Zhou 2010)."""
    less, rate = math.exp(-_positive("epsilon", epsilon)), _share("false_positive_rate", false_positive_rate)
    return min(rate / less, 1 - less * (1 - rate)) if less > 0 else 1.0


def signal_to_noise_db(clip_norm: float, sigma: float, dimensions: int) -> float:
    """Signal left per dimension of an image of norm `clip_norm` under noise σ, 10·log10(C²/(σ²·d)) in dB."""
    ratio = _positive("clip_norm", clip_norm) / _positive("sigma", sigma)
    return 20 * math.log10(ratio) - 10 * math.log10(_positive("dimensions", dimensions))


# ---- Sensitivities: how far apart two neighbours can be, in units of the clean image ---------------------------------


def gaussian_sensitivity(clip_norm: float, *, non_negative: bool) -> float:
    """Largest ‖x - x'‖ of two images clipped to norm C: √2·C where all coordinates are ≥ 0, else 2·C."""
    return (math.sqrt(2) if non_negative else 2.0) * _positive("clip_norm", clip_norm)


def range_sensitivity(half_range: float, dimensions: int) -> float:
    """Largest ‖x - x'‖ of two unclipped images with d coordinates in [-c, c]: 2c√d; one pixel is d = 1."""
    return 2 * _positive("half_range", half_range) * math.sqrt(_positive("dimensions", dimensions))


def second_moment_sensitivity(clip_norm: float) -> float:
    """Largest ‖uuᵀ - u'u'ᵀ‖_F of two vectors clipped to norm C2: √(‖u‖⁴ + ‖u'‖⁴ - 2⟨u,u'⟩²) ≤ √2·C2²."""
    return math.sqrt(2) * _positive("clip_norm", clip_norm) ** 2


# ---- Noise for a promise ---------------------------------------------------------------------------------------


class UnreachablePromise(ValueError):
    """No step of the schedule adds enough noise for μ."""

    def __init__(self, mu: float, sensitivity: float, schedule: Schedule) -> None:
        sigma = schedule.sigmas[-1]
        self.smallest_mu = sensitivity / sigma
        self.largest_sensitivity = mu * sigma
        super().__init__(
            f"expected sensitivity/σ ≤ μ = {mu:.4g}, which needs σ ≥ {sensitivity / mu:.4g};"
            f" found at most σ = {sigma:.4g} at step {schedule.steps}, which gives μ = {self.smallest_mu:.4g};"
            f" raise epsilon or delta until μ ≥ {self.smallest_mu:.4g}, multiply the clip norm by at most"
            f" {self.largest_sensitivity / sensitivity:.3g}, or take a schedule that ends above that σ"
            " (more steps, larger betaEnd)"
        )


def split_for(mu: float, sensitivity: float, schedule: Schedule) -> int:
    """First step t0 at which one noised image is μ-GDP, sensitivity/σ_t0 ≤ μ. Raises UnreachablePromise."""
    mu, sensitivity = _positive("mu", mu), _positive("sensitivity", sensitivity)
    index = bisect_left(schedule.sigmas, True, key=lambda sigma: sensitivity / sigma <= mu)
    if index == schedule.steps:
        raise UnreachablePromise(mu, sensitivity, schedule)
    return index + 1


@dataclass(frozen=True)
class SummaryNoise:
    """Noise of the mechanism `summary` per class, in the units of the clip norms."""

    mean_std: float  # s1, on every coordinate of the sum of clipped images
    moment_std: float  # s2, on every coordinate of the second moment's upper triangle, off-diagonals times √2


def summary_noise(mu: float, mean_sensitivity: float, moment_clip_norm: float, mean_share: float) -> SummaryNoise:
    """The noise for which Δ1²/s1² + 2·C2⁴/s2² = μ², the mean's term being `mean_share` of it."""
    mu, share = _positive("mu", mu), _share("mean_share", mean_share)
    return SummaryNoise(
        mean_std=_positive("mean_sensitivity", mean_sensitivity) / (mu * math.sqrt(share)),
        moment_std=second_moment_sensitivity(moment_clip_norm) / (mu * math.sqrt(1 - share)),
    )


# ---- Charges and the filter ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Charge:
    """What one release costs: μ² of a Gaussian mechanism, or ε of a pure one."""

    mu_squared: Decimal = Decimal(0)
    pure_epsilon: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        for name in ("mu_squared", "pure_epsilon"):
            _non_negative_decimal(name, getattr(self, name))


@dataclass(frozen=True)
class Admission:
    """The filter's answer; the excess is what lacks in the budget, zero where it suffices."""

    admitted: bool
    excess_mu_squared: Decimal
    excess_pure_epsilon: Decimal


def charge_mu_squared(epsilon: Exact, delta: Exact) -> Decimal:
    """μ² that a promise of (ε, δ) charges, and for which its noise has to be drawn: 12 digits, rounded down.

    Rounded down means more noise than was asked for: what is charged is exactly what the noise gives. A budget is
    rounded by the same function, so it admits one job of its own ε. The guard of 1e-12 leaves room for the rounding
    of everybody who computes with μ as a float: what was spent never shows above the budget.
    """
    mu = mu_of(float_below("epsilon", epsilon), float_below("delta", delta))
    return _TWELVE_DIGITS_DOWN.create_decimal_from_float(mu * mu * (1 - 1e-12))


def budget_mu_squared(epsilon: Exact, delta: Exact, pure_epsilon: Exact = Decimal(0)) -> Decimal:
    """M, the largest Σμ² that a budget admits: ε(√M, δ) = ε_B - E, rounded down. 0 if all is set aside as pure."""
    whole, pure = _decimal("epsilon", epsilon), _non_negative_decimal("pure_epsilon", _decimal("", pure_epsilon))
    gaussian = _EXACT.subtract(whole, pure)
    if gaussian < 0:
        raise ValueError(f"pure_epsilon: expected at most epsilon = {whole}, found {pure}; lower it")
    if gaussian == 0 and pure > 0:
        return Decimal(0)
    return charge_mu_squared(gaussian, delta)


def admits(budget_mu_squared: Decimal, pure_epsilon: Decimal, charges: Iterable[Charge], new: Charge) -> Admission:
    """Whether all `charges` (reserved ones too) and the new one stay within Σμ² ≤ M and Σε ≤ E.

    Valid for jobs chosen after seeing earlier releases: pure composition, and the Gaussian filter (Smith & Thakurta
    2022). Sums are exact; one that could not be raises decimal.Inexact.
    """
    spent = total_charge([*charges, new])
    excess_mu_squared = _excess(spent.mu_squared, _non_negative_decimal("budget_mu_squared", budget_mu_squared))
    excess_pure_epsilon = _excess(spent.pure_epsilon, _non_negative_decimal("pure_epsilon", pure_epsilon))
    return Admission(not excess_mu_squared and not excess_pure_epsilon, excess_mu_squared, excess_pure_epsilon)


def spent_epsilon(charges: Iterable[Charge], delta: Exact) -> float:
    """ε that all charges together amount to at δ: Σε of the pure ones plus ε(√Σμ², δ) of the Gaussian ones."""
    spent = total_charge(charges)
    gaussian = epsilon_of(math.sqrt(spent.mu_squared), float_below("delta", delta)) if spent.mu_squared else 0.0
    return float(_EXACT.add(spent.pure_epsilon, Decimal(gaussian)))


def total_charge(charges: Iterable[Charge]) -> Charge:
    """The exact sum of all charges. Raises decimal.Inexact rather than round."""
    charges = tuple(charges)
    return Charge(
        reduce(_EXACT.add, (charge.mu_squared for charge in charges), Decimal(0)),
        reduce(_EXACT.add, (charge.pure_epsilon for charge in charges), Decimal(0)),
    )


def difference(charge: Charge, less: Charge) -> Charge:
    """The exact `charge - less`. Raises ValueError if that is negative."""
    return Charge(
        _EXACT.subtract(charge.mu_squared, less.mu_squared), _EXACT.subtract(charge.pure_epsilon, less.pure_epsilon)
    )


_TWELVE_DIGITS_DOWN = Context(prec=12, rounding=ROUND_DOWN)
# Charges lie between 1e-250 and 1e130 with at most some 30 digits: a thousand digits hold any sum of them.
_EXACT = Context(prec=1000, traps=[Inexact, InvalidOperation, Overflow])


def _excess(spent: Decimal, limit: Decimal) -> Decimal:
    return _EXACT.subtract(spent, limit) if spent > limit else Decimal(0)


# ---- The parts of δ, without cancellation --------------------------------------------------------------------------

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_ROUNDING = 2.0**-49  # a few units in the last place, added outwards to what was solved


def _distance_to_tail(mu: float, epsilon: float) -> float:
    """a = (2ε - μ²)/(2μ), with μ² exact in two parts (Dekker 1971): at μ = 800 it would lose three digits."""
    scaled = mu * 134217729.0  # 2²⁷ + 1
    high = scaled - (scaled - mu)
    low = mu - high
    return (2 * epsilon - high * high - 2 * high * low - low * low) / (2 * mu)


def _log_delta(a: float, mu: float) -> float:
    """ln δ with δ = φ(a)·(R(a) - R(a+μ)), which is Theorem 8 after e^ε·φ(b) = φ(a); a ≥ -μ/2.

    For a < 0, R(a) = R(|a|) + erf(|a|/√2)/φ(a) keeps all terms positive.
    """
    log_density = -0.5 * a * a - _LOG_SQRT_2PI
    if a >= 0:
        fall = _mills_fall(a, mu)
        return log_density + math.log(fall) if fall > 0 else -math.inf
    fall = _mills_fall(-a, max(0.0, mu + 2 * a))
    return math.log(min(1.0, math.exp(log_density) * fall + math.erf(-a / math.sqrt(2))))


def _mills(x: float) -> float:
    """R(x) = Q(x)/φ(x), x ≥ 0: by erfc, further out by Laplace's continued fraction 1/(x + 1/(x + 2/(x + ...)))."""
    if x < 2.5:
        return math.sqrt(math.pi / 2) * math.exp(0.5 * x * x) * math.erfc(x / math.sqrt(2))
    num_terms = 8 + int(280 / (x * x))
    ratio = _mills_tail(x, num_terms)
    for k in range(num_terms, 0, -1):
        ratio = k / (x + ratio)
    return 1 / (x + ratio)


def _mills_fall(x: float, width: float) -> float:
    """R(x) - R(x + width) for x, width ≥ 0, to full relative accuracy also where the two are nearly equal."""
    if x < 2.5 and width <= 0.5:
        return _mills_fall_near_zero(x, width)
    if x >= 2.5 and width <= x / 8:
        return _mills_fall_far_out(x, width)
    return _mills(x) - _mills(x + width)


def _mills_fall_far_out(x: float, width: float) -> float:
    """R(x) - R(x + w) = Σ_{k≥1} -(-w)^k/k!·I_k with I_k = ∫_0^∞ t^k·exp(-t²/2 - xt) dt, x ≥ 2.5, w ≤ x/8.

    I_0 = R(x), and r_k = I_k/I_{k-1} = k/(x + r_{k+1}) is the continued fraction's tail: Horner's rule on the way up.
    """
    num_terms = 20 + int(240 / (x * x))
    ratio, horner = _mills_tail(x, num_terms), 0.0
    for k in range(num_terms, 0, -1):
        ratio = k / (x + ratio)
        horner = width * ratio / k * (1 - horner)
    return horner / (x + ratio)


def _mills_tail(x: float, k: int) -> float:
    """What follows after k terms of the continued fraction, from r² + x·r = k + 1: saves half of the terms."""
    return 0.5 * (math.sqrt(x * x + 4 * (k + 1)) - x)


def _mills_fall_near_zero(x: float, width: float) -> float:
    """The same sum with I_{k+1} = k·I_{k-1} - x·I_k upwards: unstable only after the terms have vanished."""
    before, now = _mills(x), 1 - x * _mills(x)
    factor, total = width, width * now
    for k in range(1, 20):
        before, now = now, k * before - x * now
        factor *= -width / (k + 1)
        total += factor * now
    return total


# ---- Solving --------------------------------------------------------------------------------------------------


def _root(log_delta_and_slope: Callable[[float], tuple[float, float]], delta: float, start: float) -> float:
    """Where a monotone, concave ln δ(x) meets ln δ, by Newton's method from a `start` at which it is too small.

    The tangent of a concave function lies above it, so no step crosses the root and δ(x) ≤ δ holds all the way.
    """
    error = _log_delta_error(delta)
    x, highest = start, math.log(delta) - error
    for _ in range(200):
        log_delta, slope = log_delta_and_slope(x)
        if log_delta >= highest - error:
            return x
        x += (highest - log_delta) / slope
    raise AssertionError(f"Newton's method did not arrive from {start} at δ = {delta}")


def _log_delta_and_slope_in_a(a: float, mu: float) -> tuple[float, float]:
    """At fixed μ, ∂δ/∂a = -μ·φ(a)·R(b). Concave: δ is the tail of a log-concave density."""
    log_delta = _log_delta(a, mu)
    return log_delta, -mu * _mills(a + mu) * math.exp(-0.5 * a * a - _LOG_SQRT_2PI - log_delta)


def _log_delta_and_slope_in_a_at(epsilon: float, a: float) -> tuple[float, float]:
    """At fixed ε, ∂δ/∂a = -φ(a)·μ/b. Concave for ε ≥ 1: the curvature of ln φ is -1, that of ln(μ/b) at most 0.2/ε."""
    mu = _mu_at(epsilon, a)
    log_delta = _log_delta(a, mu)
    return log_delta, -mu / (a + mu) * math.exp(-0.5 * a * a - _LOG_SQRT_2PI - log_delta)


def _mu_at(epsilon: float, a: float) -> float:
    """μ = b - a with b = √(a² + 2ε), the inverse of a = ε/μ - μ/2."""
    b = math.hypot(a, math.sqrt(2 * epsilon))
    return 2 * epsilon / (a + b) if a > 0 else b - a


def _log_delta_and_slope_in_log_mu(mu: float, epsilon: float) -> tuple[float, float]:
    """At fixed ε, ∂δ/∂ln μ = μ·φ(a). Concave: μ·φ(ε/μ - μ/2) is log-concave in ln μ, and so is its integral."""
    a = _distance_to_tail(mu, epsilon)
    log_delta = _log_delta(a, mu)
    return log_delta, mu * math.exp(-0.5 * a * a - _LOG_SQRT_2PI - log_delta)


def _log_delta_error(delta: float) -> float:
    """More than `_log_delta` can err near ln δ; what is solved keeps that distance on the safe side."""
    return 2.0**-45 - 2.0**-51 * math.log(delta)


# ---- Checks of arguments ---------------------------------------------------------------------------------------


def _positive(name: str, value: float) -> float:
    # Wider than what a spec can express, and squares of it are still finite and above 0.
    if not 1e-120 <= value <= 1e120:
        raise ValueError(f"{name}: expected a finite number above 0 (1e-120 to 1e120), found {value}")
    return float(value)


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number above 0 and below 1, found {value}")
    return float(value)


def _decimal(name: str, value: Exact) -> Decimal:
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ValueError(f'{name}: expected a decimal number like "10" or "1e-5", found {value!r}') from None
    if not number.is_finite():
        raise ValueError(f"{name}: expected a finite number, found {value}")
    return number


def _non_negative_decimal(name: str, value: Decimal) -> Decimal:
    if not isinstance(value, Decimal) or not value.is_finite() or value < 0:
        raise ValueError(f"{name}: expected a finite Decimal of at least 0, found {value!r}")
    return value


def float_below(name: str, value: Exact) -> float:
    """The largest double that is not above `value`: a promise is never weakened by conversion."""
    number = _decimal(name, value)
    nearest = float(number)
    return math.nextafter(nearest, -math.inf) if Decimal(nearest) > number else nearest
