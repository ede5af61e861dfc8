"""PrivUnit's cap: what an image's direction is drawn from at a pure ε, and what the draws say on average.

For a direction u in d dimensions, z is uniform on the cap {⟨z, u⟩ ≥ γ} of the unit sphere with probability p, else
uniform on the rest of it (Bhowmick et al. 2018, Algorithm 1). No two directions make any z more than
p·(1 - q)/((1 - p)·q) = e^ε times as likely: pure ε, δ = 0, whatever the image was replaced by.

Symbols: T = ⟨Z, u⟩ for uniform Z, of density f(t) = c·(1 - t²)^((d-3)/2), c = Γ(d/2)/(√π·Γ((d-1)/2)); q = P(T ≥ γ), the
cap's share of the sphere; M = E[T·1{T ≥ γ}] = c·(1 - γ²)^((d-1)/2)/(d - 1); m = E⟨z, u⟩.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

SMALLEST_EPSILON = 1e-3  # below, the noise is a thousand times what it protects and more
LARGEST_EPSILON = 100.0  # beyond, e^ε promises nothing; nor could float64 tell a cap so small from a point
# Taken off ε before p is computed: room for the rounding of q, of p, and of directions that are drawn in float64.
EPSILON_GUARD = 1e-9


@dataclass(frozen=True)
class Cap:
    """Where z lies: in the cap of this height and share of the sphere with this probability."""

    dimensions: int  # d
    height: float  # γ
    share: float  # q
    probability: float  # p
    mean: float  # m: E[z] = m·u, so (C/m)·z is unbiased for C·u

    @property
    def along(self) -> float:
        """a = γ·m in E[zzᵀ] = a·uuᵀ + b·I. With A = E⟨z,u⟩², by parts: A = (1 + (d-1)·γ·m)/d and a = A - b."""
        return self.height * self.mean

    @property
    def around(self) -> float:
        """b = (1 - A)/(d - 1) = (1 - γ·m)/d."""
        return (1 - self.height * self.mean) / self.dimensions

    def noise_std(self, norm: float) -> float:
        """Standard deviation s of the noise in each value of (C/m)·z, whose covariance is s²·I + C²·(a/m² - 1)·uuᵀ.

        In the best cap γ = m, so a = m² and the noise is white: s² = C²·(1/m² - 1)/d.
        """
        return norm * math.sqrt(self.around) / self.mean


@lru_cache(maxsize=256)
def best_cap(epsilon: float, dimensions: int) -> Cap:
    """The cap of least variance at ε. Raises ValueError for an ε out of range.

    Of all densities of z that depend on ⟨z, u⟩ alone and vary by at most e^ε, none has a larger m: m is linear in the
    density, so it is at its upper end where T is above a threshold, at its lower end elsewhere. Asi, Feldman & Talwar
    2022 (arXiv 2205.02466) show this cap optimal "among a large family of locally private randomizers".
    With k = e^ε - 1, m(γ) = k·M/(1 + k·q). From M' = -γ·f and q' = -f its maximum lies where γ·(1 + k·q) = k·M, that is
    where γ = m; the left side less the right one rises in γ, so halving an interval finds it.
    """
    if not math.nextafter(SMALLEST_EPSILON, 0) <= epsilon <= LARGEST_EPSILON:  # "0.001", rounded down, is there too
        raise ValueError(
            f"epsilon: expected {SMALLEST_EPSILON:g} to {LARGEST_EPSILON:g} for mechanism privunit, found {epsilon:g}"
        )
    promised = epsilon - EPSILON_GUARD
    low, high = 0.0, 1.0
    for _ in range(64):
        height = (low + high) / 2
        share, mass = share_and_moment(height, dimensions)
        if height * (1 / math.expm1(promised) + share) < mass:
            low = height
        else:
            high = height
    share, mass = share_and_moment(low, dimensions)
    odds = math.exp(promised) * share / (1 - share)
    probability = odds / (1 + odds)
    mean = mass * (probability / share - (1 - probability) / (1 - share))
    return Cap(dimensions, low, share, probability, mean)


def share_and_moment(height: float, dimensions: int) -> tuple[float, float]:
    """q = P(T ≥ γ) and M = E[T·1{T ≥ γ}] for 0 ≤ γ < 1.

    (1 + T)/2 is Beta(h, h) with h = (d - 1)/2, so q is the incomplete beta function at (1 - γ)/2; what stands before
    its continued fraction (DLMF 8.17.22) is M.
    """
    half = (dimensions - 1) / 2
    log_c = math.lgamma(half + 0.5) - math.lgamma(half) - 0.5 * math.log(math.pi)
    moment = math.exp(log_c + half * math.log1p(-height * height)) / (2 * half)
    return moment * _continued_fraction(half, (1 - height) / 2), moment


def _continued_fraction(half: float, x: float) -> float:
    """1/(1 + d1/(1 + d2/(1 + ...))) of the incomplete beta function I_x(h, h), x ≤ ½, by Lentz's method."""
    value, fraction, ratio = 1.0, 1.0, 0.0  # what it has come to, and Lentz's C and D
    for n in range(1, 10_000):
        m = n // 2
        if n % 2:
            term = -(half + m) * (2 * half + m) * x / ((half + 2 * m) * (half + 2 * m + 1))
        else:
            term = m * (half - m) * x / ((half + 2 * m - 1) * (half + 2 * m))
        ratio = 1 / (1 + term * ratio)
        fraction = 1 + term / fraction
        step = fraction * ratio
        value *= step
        if abs(step - 1) < 2e-16:
            return 1 / value
    raise AssertionError("the continued fraction converges in some √d steps")
