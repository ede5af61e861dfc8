"""Attacks against oracles: Gaussians whose best test is known, a denoiser that knows its records by heart, and one that
knows nothing but the distribution they came from."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from feddiff_trainer.attacks import loss_scores, matched_filter, nearest_scores, pia_scores, secmi_scores
from feddiff_trainer.denoising import ClassGaussian, Denoise
from feddiff_trainer.verdicts import FIRES, area_interval, area_under_curve

NUM, SIZE, VARIANCE = 40, 4, 0.09
LEVELS = (0.1, 0.3, 0.6, 1.0)
CLIMB = tuple(float(level) for level in np.geomspace(0.02, 0.4, 11))


def images(seed: int, num: int = NUM) -> Tensor:
    """Draws of one Gaussian: nothing but their values tells members from others."""
    return math.sqrt(VARIANCE) * torch.randn(num, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


LABELS = torch.zeros(NUM, dtype=torch.int64)
MEMBERS, OTHERS = images(1), images(2)


def by_heart(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
    """E[x0 | y] where x0 is one of the members: what training without end on them leads to."""
    distance_BN = torch.cdist(y_BCHW.flatten(1), MEMBERS.flatten(1)).square()
    weight_BN = (-distance_BN / (2 * sigma_B.float()[:, None].square())).softmax(dim=1)
    return (weight_BN @ MEMBERS.flatten(1)).view_as(y_BCHW)


def by_distribution() -> Denoise:
    return ClassGaussian(torch.zeros(1, SIZE * SIZE), VARIANCE * torch.eye(SIZE * SIZE)[None])


ATTACKS: dict[str, Callable[[Denoise, Tensor, Tensor], np.ndarray]] = {
    "loss threshold": lambda denoise, x, label: loss_scores(denoise, x, label, LEVELS, 2, 0),
    "PIA": lambda denoise, x, label: pia_scores(denoise, x, label, 0.02, 0.7),
    "SecMI": lambda denoise, x, label: secmi_scores(denoise, x, label, CLIMB),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_finds_what_a_denoiser_knows_by_heart(name: str) -> None:
    members, others = (ATTACKS[name](by_heart, x, LABELS) for x in (MEMBERS, OTHERS))
    assert area_under_curve(members, others) > 0.95
    assert area_under_curve(-members, -others) < FIRES  # a wrong sign would be a control that is silent


def test_far_above_the_records_distance_secmi_finds_nothing_in_what_is_known_by_heart() -> None:
    """There a denoiser bends most at the records themselves: theirs is the larger t-error."""
    levels = tuple(float(level) for level in np.geomspace(6.4, 9.0, 7))
    members, others = (secmi_scores(by_heart, x, LABELS, levels) for x in (MEMBERS, OTHERS))
    assert area_under_curve(members, others) < 0.4


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_finds_nothing_in_a_denoiser_that_knows_only_the_distribution(name: str) -> None:
    labels = torch.zeros(400, dtype=torch.int64)
    members, others = (ATTACKS[name](by_distribution(), images(seed, 400), labels) for seed in (3, 4))
    found = area_interval(area_under_curve(members, others), 400, 400)
    assert found.low < 0.5 < found.high


def test_the_loss_of_a_gaussian_is_what_it_is_on_paper() -> None:
    """E(x̂0 - x0)² of the shrinkage λ/(λ + σ²) at x0 = 0 is σ²·(λ/(λ + σ²))², and the weight is the training's."""
    sigma, x0 = 0.5, torch.zeros(1, 1, SIZE, SIZE)
    (score,) = loss_scores(by_distribution(), x0, LABELS[:1], [sigma], 1000, 0)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert -score == pytest.approx(weight * sigma**2 * (VARIANCE / (VARIANCE + sigma**2)) ** 2, rel=0.05)


def test_proximal_initialisation_of_a_gaussian_is_what_it_is_on_paper() -> None:
    """ε̂(y, σ) = y·σ/(λ + σ²) there, so both noises are multiples of the image."""
    first, level, x0 = 0.1, 0.7, MEMBERS[:1]
    slope_first, slope_level = (sigma / (VARIANCE + sigma**2) for sigma in (first, level))
    factor = slope_first - (1 + level * slope_first) * slope_level
    (score,) = pia_scores(by_distribution(), x0, LABELS[:1], first, level)
    assert -score == pytest.approx(abs(factor) * float(x0.double().flatten().norm(4)), rel=1e-4)


def test_one_step_up_and_back_misses_by_what_it_does_on_paper() -> None:
    low, high, above, x0 = 0.1, 0.2, 0.3, MEMBERS[:1]
    slopes = {sigma: sigma / (VARIANCE + sigma**2) for sigma in (low, high, above)}
    reached = (1 + low * slopes[low]) * (1 + (high - low) * slopes[low])
    up = reached * (1 + (above - high) * slopes[high])
    back = up * (1 + (high - above) * slopes[above])
    (score,) = secmi_scores(by_distribution(), x0, LABELS[:1], [low, high, above])
    assert -score == pytest.approx(float(((back - reached) * x0).square().mean()), rel=1e-3)


def test_the_matched_filter_tells_gaussians_apart_as_well_as_can_be() -> None:
    rng, mu, num = np.random.default_rng(5), 1.5, 20_000
    x_D, other_D = np.zeros(3), np.array([0.3, 0.4, 0.0])
    std = 0.5 / mu  # ‖x' - x‖ = 0.5
    outside, inside = (
        matched_filter(each_D + std * rng.standard_normal((num, 3)), x_D, other_D, std) for each_D in (x_D, other_D)
    )
    found = area_interval(area_under_curve(inside, outside), num, num)
    assert found.low < stats.norm.cdf(mu / math.sqrt(2)) < found.high
    assert outside.std() == pytest.approx(1, rel=0.03) and inside.mean() == pytest.approx(mu, rel=0.03)


def test_the_nearest_sample_is_looked_for_in_the_images_own_class() -> None:
    x_ND, samples_ND = np.array([[0.0], [0.0]]), np.array([[3.0], [1.0], [0.0]])
    scores = nearest_scores(x_ND, np.array([0, 1]), samples_ND, np.array([0, 0, 1]))
    assert scores == pytest.approx([-1.0, 0.0], abs=1e-6)
