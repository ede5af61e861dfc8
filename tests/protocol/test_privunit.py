"""PrivUnit's cap against its own definition: integrals by mpmath, the ratio of densities, the best choice among all."""

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from feddiff_protocol.privunit import (
    EPSILON_GUARD,
    LARGEST_EPSILON,
    SMALLEST_EPSILON,
    Cap,
    best_cap,
    share_and_moment,
)

DIMENSIONS = (16, 64, 784, 3072)
EPSILONS = (SMALLEST_EPSILON, 0.5, 1.0, 4.0, 10.0, 30.0, LARGEST_EPSILON)
CASES = [pytest.param(epsilon, size, id=f"ε {epsilon:g}, d {size}") for epsilon in EPSILONS for size in DIMENSIONS]


def ratio_of(cap: Cap) -> float:
    """ln of the largest ratio of the densities of z for two directions: z in the cap of one, outside the other's."""
    with mpmath.workdps(40):
        p, q = mpmath.mpf(cap.probability), exact_share(cap.height, cap.dimensions)
        return float(mpmath.log(p / q) - mpmath.log((1 - p) / (1 - q)))


def exact_share(height: float, dimensions: int) -> mpmath.mpf:
    """P(T ≥ γ) by ½·I_{1-γ²}((d-1)/2, ½), written as METHOD has it."""
    half = mpmath.mpf(dimensions - 1) / 2
    return mpmath.betainc(half, mpmath.mpf(1) / 2, 0, 1 - mpmath.mpf(height) ** 2, regularized=True) / 2


def mean_power(cap: Cap, power: int) -> float:
    """E⟨z,u⟩^power by integrating the density of T in the cap and outside."""
    with mpmath.workdps(30):
        d = mpmath.mpf(cap.dimensions)
        scale = mpmath.gamma(d / 2) / (mpmath.sqrt(mpmath.pi) * mpmath.gamma((d - 1) / 2))
        width = 1 / mpmath.sqrt(d)
        points = [min(1, max(-1, cap.height + step * width)) for step in (-60, -20, -8, -3, 0)]
        above = [cap.height, *(cap.height + (1 - cap.height) * part for part in (0.01, 0.05, 0.2)), 1]

        def part(ends: list[float]) -> mpmath.mpf:
            ends = sorted(set(ends))
            return mpmath.quad(lambda t: t**power * scale * (1 - t * t) ** ((d - 3) / 2), ends)

        p, q = mpmath.mpf(cap.probability), exact_share(cap.height, cap.dimensions)
        return float(p / q * part(above) + (1 - p) / (1 - q) * part([-1, *points, cap.height]))


# ---- The promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "dimensions"), CASES)
def test_the_worst_ratio_is_what_is_charged_and_never_above(epsilon: float, dimensions: int) -> None:
    found = ratio_of(best_cap(epsilon, dimensions))
    assert epsilon - 2 * EPSILON_GUARD <= found <= epsilon


@settings(max_examples=60, deadline=None)
@given(st.floats(SMALLEST_EPSILON, LARGEST_EPSILON), st.integers(16, 3072))
def test_no_promise_is_ever_exceeded(epsilon: float, dimensions: int) -> None:
    assert epsilon - 2 * EPSILON_GUARD <= ratio_of(best_cap(epsilon, dimensions)) <= epsilon


@pytest.mark.parametrize("wrong", ["probability", "height"])
def test_a_wrong_cap_is_caught_by_the_same_ratio(wrong: str) -> None:
    cap = best_cap(4.0, 64)
    assert ratio_of(replace(cap, **{wrong: 1.01 * getattr(cap, wrong)})) > 4.0


@pytest.mark.parametrize("epsilon", [0.0, SMALLEST_EPSILON / 2, 1.01 * LARGEST_EPSILON, math.inf, math.nan, -1.0])
def test_an_epsilon_out_of_range_has_no_cap(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon: expected 0\.001 to 100"):
        best_cap(epsilon, 64)


# ---- The moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("height", [0.0, 1e-6, 0.01, 0.1, 0.5, 0.9])
def test_share_of_the_sphere_is_exact(height: float, dimensions: int) -> None:
    share, moment = share_and_moment(height, dimensions)
    with mpmath.workdps(40):
        half = mpmath.mpf(dimensions - 1) / 2
        scale = mpmath.gamma(half + 0.5) / (mpmath.sqrt(mpmath.pi) * mpmath.gamma(half))
        expected = scale * (1 - mpmath.mpf(height) ** 2) ** half / (2 * half)
        assert share == pytest.approx(float(exact_share(height, dimensions)), rel=5e-12)
        assert moment == pytest.approx(float(expected), rel=5e-12)


@pytest.mark.parametrize(("epsilon", "dimensions"), [(0.5, 16), (4.0, 16), (4.0, 64), (10.0, 64), (10.0, 784)])
def test_mean_and_second_moment_are_those_of_the_density(epsilon: float, dimensions: int) -> None:
    cap = best_cap(epsilon, dimensions)
    assert cap.mean == pytest.approx(mean_power(cap, 1), rel=1e-9)
    second = mean_power(cap, 2)  # E⟨z,u⟩² = a + b, and the trace of E[zzᵀ] is 1
    assert cap.along + cap.around == pytest.approx(second, rel=1e-9)
    assert cap.along + dimensions * cap.around == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("epsilon", "dimensions"), CASES)
def test_the_noise_of_the_best_cap_is_white(epsilon: float, dimensions: int) -> None:
    """a = m²: nothing of the covariance of z/m is along u that is not in u·uᵀ."""
    cap = best_cap(epsilon, dimensions)
    assert cap.height == pytest.approx(cap.mean, rel=1e-9)
    assert cap.noise_std(3.0) == pytest.approx(3 * math.sqrt((1 / cap.mean**2 - 1) / dimensions), rel=1e-8)


def test_another_cap_of_the_same_promise_is_not_white() -> None:
    cap = best_cap(4.0, 64)
    assert lower(cap, 0.8).along != pytest.approx(lower(cap, 0.8).mean ** 2, rel=0.05)


@pytest.mark.parametrize("factor", [0.3, 0.9, 0.99, 1.01, 1.1, 2.0])
@pytest.mark.parametrize(("epsilon", "dimensions"), [(0.5, 16), (4.0, 64), (10.0, 784)])
def test_no_other_height_has_less_variance(epsilon: float, dimensions: int, factor: float) -> None:
    """The variance of a release is C²·(1/m² - 1) in all, so the largest m is the best."""
    cap = best_cap(epsilon, dimensions)
    assert lower(cap, factor).mean < cap.mean


@pytest.mark.parametrize(("epsilon", "dimensions"), [(0.5, 16), (4.0, 64), (10.0, 784)])
def test_no_density_of_the_height_that_varies_by_no_more_has_a_larger_mean(epsilon: float, dimensions: int) -> None:
    """Asi, Feldman & Talwar 2022 without their theorem: the linear program itself, for densities that are constant in
    each of 400 intervals of T. The best of them loses to the cap what the intervals cost, and gains nothing."""
    half = (dimensions - 1) / 2
    tail_E = np.concatenate([np.linspace(1, 0.01, 150, endpoint=False), np.geomspace(0.01, 1e-8, 250), [0.0]])
    ends = 1 - 2 * special.betaincinv(half, half, tail_E)
    mass_K, count = -np.diff(tail_E), len(tail_E) - 1
    moments = [share_and_moment(abs(end), dimensions)[1] if abs(end) < 1 else 0.0 for end in ends]
    mean_K = -np.diff(moments)  # E[T·1{T in the interval}]; E[T·1{T ≥ -t}] is that of t
    at_most = [np.append(row, -math.exp(epsilon)) for row in np.eye(count)]
    at_least = [np.append(-row, 1.0) for row in np.eye(count)]
    best = optimize.linprog(
        -np.append(mean_K, 0.0),
        A_ub=np.array([*at_most, *at_least]),
        b_ub=np.zeros(2 * count),
        A_eq=[np.append(mass_K, 0.0)],
        b_eq=[1.0],
    )
    cap = best_cap(epsilon, dimensions)
    assert 0.995 * cap.mean <= -best.fun <= cap.mean * (1 + 1e-4)  # the solver's own tolerance
    assert -best.fun > lower(cap, 0.7).mean


def lower(cap: Cap, factor: float) -> Cap:
    """A cap of another height at the same ε."""
    share, moment = share_and_moment(factor * cap.height, cap.dimensions)
    odds = cap.probability / (1 - cap.probability) * (1 - cap.share) / cap.share * share / (1 - share)
    p = odds / (1 + odds)
    mean = moment * (p / share - (1 - p) / (1 - share))
    return Cap(cap.dimensions, factor * cap.height, share, p, mean)


def test_more_epsilon_is_less_noise() -> None:
    found = [best_cap(epsilon, 784).noise_std(1.0) for epsilon in EPSILONS]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
