"""Clipped draws have the pooled moments, where cutting a Gaussian's draws off does not; each series has its oracle."""

from math import factorial, sqrt

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from feddiff_trainer.clipped_gaussian import (
    LARGEST_SPREAD,
    ClippedGaussian,
    clipped_series,
    latent_correlation,
    latent_covariance,
    latent_marginals,
    root,
)
from feddiff_trainer.denoising import ClassGaussian

COUNT = 200_000


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def black_and_grey() -> ClassGaussian:
    """Two classes of 2×2 images, [-1, 1]: nearly black pixels beside grey ones, correlated."""
    means_KD = torch.stack([double(-0.95, -0.8, 0.1, 0.9), double(-0.5, 0.0, 0.5, -0.9)])
    std_KD = torch.stack([double(0.1, 0.3, 0.5, 0.15), double(0.4, 0.5, 0.4, 0.2)])
    rho_DD = torch.eye(4, dtype=torch.float64) * 0.6 + 0.4
    rho_DD[0, 2] = rho_DD[2, 0] = -0.1
    return ClassGaussian(means_KD, std_KD[:, :, None] * rho_DD * std_KD[:, None, :])


def moments(x0_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = x0_BCHW.flatten(1)
    return x_ND.mean(dim=0), torch.cov(x_ND.T)


def draws(source: ClassGaussian | ClippedGaussian, label: int) -> Tensor:
    generator = torch.Generator().manual_seed(label)
    return source.draw(torch.full((COUNT,), label), (1, 2, 2), generator)


@pytest.mark.parametrize("label", [0, 1])
def test_draws_are_pixels_with_the_pools_mean_and_covariance(label: int) -> None:
    pool = black_and_grey()
    x0_BCHW = draws(ClippedGaussian(pool), label)
    mean_D, covariance_DD = moments(x0_BCHW)
    assert x0_BCHW.min() == -1 and x0_BCHW.max() == 1
    torch.testing.assert_close(mean_D, pool.means_KD[label], atol=0.006, rtol=0)
    torch.testing.assert_close(covariance_DD, pool.covariances_KDD[label], atol=0.004, rtol=0)


def test_cutting_off_a_gaussians_draws_brightens_black_and_loses_variance() -> None:
    """Mutant: the pooled Gaussian itself, cut off afterwards."""
    pool = black_and_grey()
    mean_D, covariance_DD = moments(draws(pool, 0).clamp(-1, 1))
    assert mean_D[1] - pool.means_KD[0, 1] > 0.02
    assert covariance_DD[1, 1] < 0.8 * pool.covariances_KDD[0, 1, 1]


def test_marginals_have_the_moments_asked_for_by_numerical_integration() -> None:
    mean_D, variance_D = double(0.003, 0.1, 0.5, 0.5, 0.97), double(0.0005, 0.03, 1e-4, 0.2, 0.02)
    for location, scale, mean, variance in zip(*latent_marginals(mean_D, variance_D), mean_D, variance_D, strict=True):
        first, second = (
            clipped_moment(float(location), float(scale), 1),
            clipped_moment(float(location), float(scale), 2),
        )
        assert first == pytest.approx(float(mean), abs=1e-8)
        assert second - first**2 == pytest.approx(float(variance), abs=1e-8)


def clipped_moment(location: float, scale: float, power: int) -> float:
    inside, _ = integrate.quad(lambda y: y**power * stats.norm.pdf(y, location, scale), 0, 1, epsabs=1e-12)
    return float(inside + stats.norm.sf(1, location, scale))


def test_a_variance_that_no_pixel_can_have_is_lowered() -> None:
    location_D, scale_D = latent_marginals(double(0.1, 0.0), double(0.5, 0.1))
    first = clipped_moment(float(location_D[0]), float(scale_D[0]), 1)
    second = clipped_moment(float(location_D[0]), float(scale_D[0]), 2)
    assert first == pytest.approx(0.1, abs=1e-6)
    assert second - first**2 == pytest.approx(LARGEST_SPREAD * 0.09, rel=1e-4)
    assert location_D.isfinite().all() and scale_D.isfinite().all()


def test_series_equals_quadrature() -> None:
    location_D, scale_D = double(-0.2, 0.5, 0.9), double(0.4, 0.3, 2.0)
    z = np.linspace(-12, 12, 240_001)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    found = clipped_series(location_D, scale_D)
    for d, (location, scale) in enumerate(zip(location_D.tolist(), scale_D.tolist(), strict=True)):
        for n in range(1, 9):
            hermite = np.polynomial.hermite_e.hermeval(z, [0.0] * n + [1.0]) / sqrt(factorial(n))
            expected = float((np.clip(location + scale * z, 0, 1) * hermite * weight).sum())
            assert float(found[d, n - 1]) == pytest.approx(expected, abs=1e-7)


def test_where_nothing_is_clipped_the_correlation_is_the_covariances_own() -> None:
    covariance_DD = torch.tensor([[4e-4, 1e-4], [1e-4, 1e-4]], dtype=torch.float64)
    series_DT = clipped_series(double(0.5, 0.4), double(0.02, 0.01))
    expected = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(latent_correlation(covariance_DD, series_DT), expected)


def test_correlations_that_do_not_fit_together_become_a_covariance_of_the_same_scales() -> None:
    rho_DD = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]], dtype=torch.float64)
    scale_D = double(0.02, 0.01, 0.03)
    latent_DD = latent_covariance(torch.outer(scale_D, scale_D) * rho_DD, double(0.5, 0.5, 0.5), scale_D)
    assert torch.linalg.eigvalsh(latent_DD).min() > -1e-12
    torch.testing.assert_close(latent_DD.diagonal(), scale_D.square(), atol=0, rtol=0.02)
    assert torch.linalg.eigvalsh(rho_DD).min() < -0.5  # mutant: entry by entry alone


def test_root_stops_at_the_nearer_end_where_there_is_none() -> None:
    low, high = double(0.0, 0.0, 0.0), double(1.0, 1.0, 1.0)
    target = double(0.25, 2.0, -1.0)
    torch.testing.assert_close(root(lambda x: x - target, low, high), double(0.25, 1.0, 0.0))
