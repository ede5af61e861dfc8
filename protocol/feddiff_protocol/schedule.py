"""The noise schedule: how much of an image and how much noise is left after t steps.

Steps count from 1, so ᾱ_t is `alphas_cumprod[t - 1]` of a 0-based library; t = 0 is the clean image.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

_LARGEST_LOG = 700.0  # σ² = 1/ᾱ - 1 is the largest number derived from a schedule; a double ends at e^709


@dataclass(frozen=True)
class Schedule:
    """Linear betas of DDPM: β_1 = beta_start to β_T = beta_end, both ends included (Ho et al. 2020, section 4).

    Raises ValueError unless steps ≥ 1, 0 < beta_start ≤ beta_end < 1 and the last ᾱ is a usable double.

    >>> round(Schedule(1000, 1e-4, 0.02).alpha_bar(500), 6)
    0.078587
    """

    steps: int
    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, found {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betaStart, betaEnd: expected 0 < betaStart ≤ betaEnd < 1, found {self.beta_start} and {self.beta_end}"
            )
        if self._minus_log_alpha_bars[-1] > _LARGEST_LOG:
            raise ValueError(
                f"steps, betaStart, betaEnd: expected a last ᾱ of at least e^-{_LARGEST_LOG:.0f},"
                f" found e^-{self._minus_log_alpha_bars[-1]:.0f}; lower steps or betaEnd"
            )

    def beta(self, t: int) -> float:
        """β_t, the variance that step t adds; t in 1..T."""
        self._check_step(t, first=1)
        return self._beta(t)

    def alpha_bar(self, t: int) -> float:
        """ᾱ_t = Π_{s≤t} (1 - β_s), the share of the image's variance that is left; 1 at t = 0."""
        return math.exp(-self._minus_log_alpha_bar(t))

    def alpha(self, t: int) -> float:
        """α_t = √ᾱ_t, the factor on the image in x_t = α_t·x + s_t·z."""
        return math.exp(-0.5 * self._minus_log_alpha_bar(t))

    def s(self, t: int) -> float:
        """s_t = √(1 - ᾱ_t), the standard deviation of the noise in x_t = α_t·x + s_t·z."""
        return math.sqrt(-math.expm1(-self._minus_log_alpha_bar(t)))

    def sigma(self, t: int) -> float:
        """σ_t = s_t/α_t, the noise-to-signal ratio; 0 at t = 0, strictly rising."""
        return math.sqrt(math.expm1(self._minus_log_alpha_bar(t)))

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """σ_1, ..., σ_T; σ_t is `sigmas[t - 1]`."""
        return tuple(self.sigma(t) for t in range(1, self.steps + 1))

    def step_at_least(self, sigma: float) -> int | None:
        """The first step t with σ_t ≥ sigma, None if even σ_T is smaller."""
        if not sigma >= 0:
            raise ValueError(f"sigma: expected a number of at least 0, found {sigma}")
        index = bisect_left(self.sigmas, sigma)
        return index + 1 if index < self.steps else None

    def _beta(self, t: int) -> float:
        if t == self.steps:
            return self.beta_end if self.steps > 1 else self.beta_start
        return self.beta_start + (self.beta_end - self.beta_start) * (t - 1) / (self.steps - 1)

    @cached_property
    def _minus_log_alpha_bars(self) -> tuple[float, ...]:
        # Kept as a logarithm: 1 - ᾱ_1 = 1e-4 would lose four digits as a difference.
        return tuple(accumulate(-math.log1p(-self._beta(t)) for t in range(1, self.steps + 1)))

    def _minus_log_alpha_bar(self, t: int) -> float:
        self._check_step(t, first=0)
        return self._minus_log_alpha_bars[t - 1] if t else 0.0

    def _check_step(self, t: int, first: int) -> None:
        if not first <= t <= self.steps:
            raise ValueError(f"t: expected a step in {first}..{self.steps}, found {t}")
