"""The samplers and both timelines on a Gaussian whose denoiser is known, and where the hand-over happens."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from feddiff_protocol.schedule import Schedule
from feddiff_trainer.denoising import ClassGaussian, Denoise
from feddiff_trainer.sampler import (
    ddpm_ancestral,
    dpm_solver,
    hand_over,
    heun,
    karras_sigmas,
    levels_from,
    restarted,
    sampling_sigmas,
)

SCHEDULE = Schedule(1000, 1e-4, 0.02)
SHAPE = (1, 1, 3)
COUNT = 20_000
SPLIT_STEP = SCHEDULE.step_at_least(0.25)
assert SPLIT_STEP is not None
SPLIT = SCHEDULE.sigma(SPLIT_STEP)
TOLERANCE = 0.02  # on means and covariances of order 0.1 to 1, from 20,000 samples: about four standard errors
MEAN = torch.tensor([0.4, -0.3, 0.1])
COVARIANCE = torch.tensor([[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.10]])


def gaussian(scale: float = 1.0, extra: float = 0.0) -> ClassGaussian:
    """The denoiser of scale·x0 + √extra·z, x0 ~ N(MEAN, COVARIANCE)."""
    covariance_DD = scale**2 * COVARIANCE + extra * torch.eye(3)
    return ClassGaussian(scale * MEAN[None].double(), covariance_DD[None].double())


def starting_noise(shape: tuple[int, ...], sigma: float, generator: torch.Generator) -> Tensor:
    """y_BCHW = σ·z: at a σ far above the data's spread, all that is left of an image."""
    return sigma * torch.randn(*shape, generator=generator)


def deviation(x_BCHW: Tensor) -> float:
    """Largest error of the samples' mean and covariance."""
    x_BD = x_BCHW.flatten(1).double()
    error_D, error_DD = x_BD.mean(0) - MEAN, x_BD.T.cov() - COVARIANCE
    return max(error_D.abs().max().item(), error_DD.abs().max().item())


def sample(sampler: Callable[..., Tensor], denoise: Denoise, sigmas_N: Tensor) -> Tensor:
    y_BCHW = starting_noise((COUNT, *SHAPE), float(sigmas_N[0]), torch.Generator().manual_seed(1))
    return sampler(denoise, y_BCHW, sigmas_N, torch.zeros(COUNT, dtype=torch.long))


def ancestral() -> Callable[..., Tensor]:
    return partial(ddpm_ancestral, generator=torch.Generator().manual_seed(2))


def test_heun_reproduces_mean_and_covariance_in_40_steps() -> None:
    assert deviation(sample(heun, gaussian(), sampling_sigmas(SCHEDULE.sigmas, 40))) < TOLERANCE


def test_heun_carries_each_start_where_the_exact_flow_ends() -> None:
    """For N(m, λ) the probability flow is y → m + √(λ/(λ + σ²))·(y - m) along every eigenvector."""
    denoise, sigmas_N = gaussian(), sampling_sigmas(SCHEDULE.sigmas, 80)
    y_BCHW = float(sigmas_N[0]) * torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    x_BCHW = heun(denoise, y_BCHW, sigmas_N, torch.zeros(50, dtype=torch.long))
    shrink_D = (denoise.eigenvalues_KD[0] / (denoise.eigenvalues_KD[0] + sigmas_N[0] ** 2)).sqrt()
    vectors_DD = denoise.eigenvectors_KDD[0]
    exact_BD = MEAN + ((y_BCHW.flatten(1) - MEAN) @ vectors_DD * shrink_D) @ vectors_DD.T
    torch.testing.assert_close(x_BCHW.flatten(1), exact_BD, atol=0.01, rtol=0)


def test_ddpm_reproduces_mean_and_covariance() -> None:
    assert deviation(sample(ancestral(), gaussian(), sampling_sigmas(SCHEDULE.sigmas, 250))) < TOLERANCE


def test_a_denoiser_of_other_data_is_noticed() -> None:
    """Mutants of the two tests above: 10 % too wide, and a network that forgets the mean's sign."""
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 40)
    assert deviation(sample(heun, gaussian(scale=1.1), sigmas_N)) > TOLERANCE
    assert deviation(sample(ancestral(), gaussian(scale=-1.0), sigmas_N)) > TOLERANCE


def test_dpm_reproduces_mean_and_covariance_in_as_many_calls_as_heun() -> None:
    assert deviation(sample(dpm_solver, gaussian(), sampling_sigmas(SCHEDULE.sigmas, 80))) < TOLERANCE


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers beside numpy 2
def test_dpm_takes_the_steps_of_diffusers_own() -> None:
    """Its x is α·y, α = 1/√(1 + σ²)."""
    theirs = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, prediction_type="sample", use_karras_sigmas=True
    )
    theirs.set_timesteps(10)
    sigmas_N, label_B = theirs.sigmas, torch.zeros(50, dtype=torch.long)
    y_BCHW = float(sigmas_N[0]) * torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(3))
    x_BCHW = y_BCHW / (1 + sigmas_N[0] ** 2).sqrt()
    for sigma, step in zip(sigmas_N, theirs.timesteps, strict=False):  # the last level, 0, has no step
        x0_BCHW = gaussian()(x_BCHW * (1 + sigma**2).sqrt(), sigma.expand(50), label_B).float()
        x_BCHW = theirs.step(x0_BCHW, step, x_BCHW).prev_sample
    torch.testing.assert_close(dpm_solver(gaussian(), y_BCHW, sigmas_N, label_B).float(), x_BCHW, atol=1e-4, rtol=0)


def test_dpm_draws_no_slope_from_one_denoiser_to_the_other() -> None:
    """Denoisers that know one image each, and no more: what is left of the noise has to lie around the second's."""

    def shared(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return torch.full_like(y_BCHW, -1.0)

    def personal(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return torch.full_like(y_BCHW, 1.0)

    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 40, split_sigma=SPLIT)[:-1]
    last, denoise = float(sigmas_N[-1]), hand_over(shared, personal, SPLIT)
    exact = -1 * last / SPLIT + (1 - last / SPLIT)  # y = x0 + (σ/σ_before)·(y_before - x0), from y_before = x0 = -1
    for split_sigma, right in ((SPLIT, True), (None, False)):
        y_BCHW, label_B = torch.full((1, *SHAPE), -1.0).double(), torch.zeros(1, dtype=torch.long)
        found_BCHW = dpm_solver(denoise, y_BCHW, sigmas_N, label_B, split_sigma)
        assert torch.allclose(found_BCHW, torch.tensor(exact).double(), atol=1e-9) == right


@pytest.mark.parametrize(
    "sampler, num_steps", [(heun, 40), (ancestral(), 250), (partial(dpm_solver, split_sigma=SPLIT), 80)]
)
def test_continued_timeline_hands_over_without_a_seam(sampler: Callable[..., Tensor], num_steps: int) -> None:
    """The split moves nothing where both denoisers know the data."""
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, num_steps, split_sigma=SPLIT)
    assert deviation(sample(sampler, hand_over(gaussian(), gaussian(), SPLIT), sigmas_N)) < TOLERANCE


def test_continued_timeline_without_the_ambient_identity_is_noticed() -> None:
    """Mutant: a shared denoiser that predicts y0 = x̃/α_t0 where x0 is due, E[y0 | y] = κ·E[x0 | y] + (1 - κ)·y."""

    def shared(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        kappa_B111 = 1 - (SPLIT / sigma_B[:, None, None, None]) ** 2
        return kappa_B111 * gaussian()(y_BCHW, sigma_B, label_B) + (1 - kappa_B111) * y_BCHW

    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 40, split_sigma=SPLIT)
    assert deviation(sample(heun, hand_over(shared, gaussian(), SPLIT), sigmas_N)) > TOLERANCE


def test_continued_timeline_with_the_wrong_split_is_noticed() -> None:
    """Mutant: the shared half walks to 0.25, the personal half starts as if at 0.35 or at 0.18."""
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 40, split_sigma=SPLIT)
    for claimed in (1.4 * SPLIT, SPLIT / 1.4):
        y_BCHW = sample(heun, gaussian(), sigmas_N[sigmas_N >= SPLIT])
        rest_N = torch.cat([torch.tensor([claimed]).double(), sigmas_N[sigmas_N < claimed]])
        assert deviation(heun(gaussian(), y_BCHW, rest_N, torch.zeros(COUNT, dtype=torch.long))) > TOLERANCE


def restart(split_step: int, claimed_step: int) -> Tensor:
    """Samples by the restarted timeline: released at one step, handed over as if it had been another."""
    alpha, s = SCHEDULE.alpha(split_step), SCHEDULE.s(split_step)
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 40, split_sigma=SCHEDULE.sigma(claimed_step))
    personal_sigmas_N = levels_from(sigmas_N, SCHEDULE.sigma(claimed_step))
    y_BCHW = starting_noise((COUNT, *SHAPE), float(sigmas_N[0]), torch.Generator().manual_seed(4))
    label_B = torch.zeros(COUNT, dtype=torch.long)
    released = gaussian(scale=alpha, extra=s**2)
    claimed_alpha = SCHEDULE.alpha(claimed_step)
    return restarted(heun, released, gaussian(), y_BCHW, sigmas_N, personal_sigmas_N, claimed_alpha, label_B)


def test_restarted_timeline_reproduces_mean_and_covariance() -> None:
    assert deviation(restart(400, 400)) < TOLERANCE


def test_restarted_timeline_with_the_wrong_split_is_noticed() -> None:
    assert deviation(restart(400, 300)) > TOLERANCE
    assert deviation(restart(400, 500)) > TOLERANCE


def test_hand_over_asks_shared_above_the_split_and_personal_at_and_below_it() -> None:
    def shared(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return torch.full_like(y_BCHW, 1.0)

    def personal(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return torch.full_like(y_BCHW, 2.0)

    denoise = hand_over(shared, personal, SPLIT)
    above = SCHEDULE.sigma(SPLIT_STEP + 1)
    y_BCHW, label_B = torch.zeros(3, *SHAPE), torch.zeros(3, dtype=torch.long)
    for sigma_B, expected in (
        ([above] * 3, [1.0] * 3),
        ([SPLIT] * 3, [2.0] * 3),
        ([above, SPLIT, 0.1], [1.0, 2.0, 2.0]),
    ):
        for dtype in (torch.float32, torch.float64):
            x_BCHW = denoise(y_BCHW, torch.tensor(sigma_B, dtype=dtype), label_B)
            assert x_BCHW[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("num_steps", [10, 20, 50, 1000])
def test_sampling_levels_fall_through_the_split_to_zero_on_the_schedule(num_steps: int) -> None:
    sigmas = sampling_sigmas(SCHEDULE.sigmas, num_steps, split_sigma=SPLIT).tolist()
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert sigmas[-1] == 0 and set(sigmas[:-1]) <= set(SCHEDULE.sigmas) and SPLIT in sigmas
    assert len(sigmas) <= num_steps + 2
    assert sigmas[0] == pytest.approx(80, rel=0.02) and sigmas[-2] == pytest.approx(0.02, rel=0.2)


def test_above_a_split_at_the_highest_level_of_sampling_the_shared_denoiser_is_asked_too() -> None:
    split = min(sigma for sigma in SCHEDULE.sigmas if sigma > 81)
    sigmas = sampling_sigmas(SCHEDULE.sigmas, 20, split_sigma=split).tolist()
    assert sigmas[:2] == [max(SCHEDULE.sigmas), split]
    highest = max(SCHEDULE.sigmas)
    assert sampling_sigmas(SCHEDULE.sigmas, 20, split_sigma=highest).tolist()[0] == highest


def test_levels_are_spaced_as_published() -> None:
    """Ends exact; the middle by hand: ((80^(1/7) + 0.02^(1/7))/2)^7."""
    low, middle, high = sorted(karras_sigmas(3, 0.02, 80))
    assert (low, high) == (pytest.approx(0.02), pytest.approx(80))
    assert middle == pytest.approx(((80 ** (1 / 7) + 0.02 ** (1 / 7)) / 2) ** 7)


def test_personal_levels_start_at_the_split() -> None:
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 20, split_sigma=SPLIT)
    personal = levels_from(sigmas_N, SPLIT).tolist()
    assert personal[0] == SPLIT and personal[-1] == 0 and len(personal) < len(sigmas_N)


def test_the_same_seed_gives_the_same_images() -> None:
    sigmas_N = sampling_sigmas(SCHEDULE.sigmas, 10)
    first, second = (sample(ancestral(), gaussian(), sigmas_N) for _ in range(2))
    assert torch.equal(first, second)
