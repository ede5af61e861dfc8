import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddiff_protocol.schedule import Schedule

DDPM = Schedule(1000, 1e-4, 0.02)


def alpha_bar_by_the_product(schedule: Schedule, t: int) -> float:
    """ᾱ_t as its definition says, with betas spread as numpy.linspace does."""
    width = (schedule.beta_end - schedule.beta_start) / max(schedule.steps - 1, 1)
    return math.prod(1 - (schedule.beta_start + width * index) for index in range(t))


def test_steps_count_from_one_as_in_the_published_table() -> None:
    assert DDPM.alpha_bar(500) == pytest.approx(0.078587, abs=5e-7)
    assert DDPM.alpha_bar(501) == pytest.approx(0.077797, abs=5e-7), "what a 0-based index would give"
    assert DDPM.beta(1) == 1e-4
    assert DDPM.beta(1000) == 0.02


def test_off_by_one_schedule_would_be_noticed() -> None:
    class OffByOne(Schedule):
        def alpha_bar(self, t: int) -> float:
            return super().alpha_bar(t + 1)

    assert OffByOne(1000, 1e-4, 0.02).alpha_bar(500) != pytest.approx(0.078587, abs=5e-7)


@pytest.mark.parametrize("t", [1, 2, 100, 500, 999, 1000])
def test_alpha_bar_is_the_product_of_one_minus_beta(t: int) -> None:
    assert DDPM.alpha_bar(t) == pytest.approx(alpha_bar_by_the_product(DDPM, t), rel=1e-12)


def test_clean_image_is_step_zero() -> None:
    assert (DDPM.alpha_bar(0), DDPM.alpha(0), DDPM.s(0), DDPM.sigma(0)) == (1, 1, 0, 0)


def test_schedule_of_one_step_adds_beta_start() -> None:
    assert Schedule(1, 0.1, 0.5).alpha_bar(1) == pytest.approx(0.9)


@settings(deadline=None)
@given(t=st.integers(1, 1000))
def test_signal_and_noise_share_the_variance(t: int) -> None:
    alpha, s = DDPM.alpha(t), DDPM.s(t)
    assert alpha**2 + s**2 == pytest.approx(1, rel=1e-14)
    assert DDPM.sigma(t) == pytest.approx(s / alpha, rel=1e-14)
    assert DDPM.sigmas[t - 1] == DDPM.sigma(t)


@settings(deadline=None)
@given(
    steps=st.integers(2, 300),
    betas=st.lists(st.floats(1e-6, 0.5), min_size=2, max_size=2).map(sorted),
    share=st.floats(0, 1.5),
)
def test_step_at_least_is_the_first_that_suffices(steps: int, betas: list[float], share: float) -> None:
    schedule = Schedule(steps, *betas)
    sigma = share * schedule.sigmas[-1]
    assert all(low < high for low, high in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    step = schedule.step_at_least(sigma)
    if step is None:
        assert schedule.sigmas[-1] < sigma
    else:
        assert schedule.sigma(step) >= sigma
        assert step == 1 or schedule.sigma(step - 1) < sigma


def test_sigma_of_a_step_finds_that_step_again() -> None:
    assert [DDPM.step_at_least(sigma) for sigma in DDPM.sigmas] == list(range(1, 1001))


@pytest.mark.parametrize(
    ("steps", "beta_start", "beta_end", "message"),
    [
        (0, 1e-4, 0.02, "steps: expected at least 1, found 0"),
        (10, 0.0, 0.02, "found 0.0 and 0.02"),
        (10, 0.02, 1e-4, "found 0.02 and 0.0001"),
        (10, 1e-4, 1.0, "found 0.0001 and 1.0"),
        (10, math.nan, 0.02, "found nan and 0.02"),
        (10_000, 0.1, 0.9, "lower steps or betaEnd"),
    ],
)
def test_impossible_schedule_is_refused(steps: int, beta_start: float, beta_end: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(steps, beta_start, beta_end)


def test_step_outside_the_schedule_is_refused() -> None:
    for t in (-1, 1001):
        with pytest.raises(ValueError, match=rf"t: expected a step in 0\.\.1000, found {t}"):
            DDPM.alpha_bar(t)
    with pytest.raises(ValueError, match=r"expected a step in 1\.\.1000, found 0"):
        DDPM.beta(0)
    with pytest.raises(ValueError, match="sigma: expected a number of at least 0, found nan"):
        DDPM.step_at_least(math.nan)
