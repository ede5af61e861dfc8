"""A mixture of Gaussians, whose denoiser is known and not affine: both timelines, the hand-over from clipped images to
unclipped ones, and the pooled closed form, each against exact draws of what should come out.

Where both denoisers know the images, these should come out. Where the shared half knows others, the ancestral sampler
draws from p(x | y) for the y that it ends with, of a mixture a mixture again; Heun's carries y along a flow, which has
that law only for y of the images' own.

Shapes: J components, B images, D values of one image, F features.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from feddiff_protocol.schedule import Schedule
from feddiff_trainer.denoising import ClassGaussian, Denoise
from feddiff_trainer.drawing import Drawing, draw_both
from feddiff_trainer.mechanisms import clip_l2, release_summary
from feddiff_trainer.pooling import OwnerSummary, pool

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = Schedule(1000, 1e-4, 0.02)
SPLIT_STEP = SCHEDULE.step_at_least(0.5)
assert SPLIT_STEP is not None
SPLIT = SCHEDULE.sigma(SPLIT_STEP)  # the components are 1.2 apart: which one it is is decided on both sides of it
SHAPE = (1, 1, 3)
COUNT, EXACT = 10_000, 100_000
# Of the features' means, in standard deviations: five standard errors of COUNT against EXACT draws are 0.052, the
# samplers' own error is below 0.02.
TOLERANCE = 0.07
SAMPLERS = {"heun": 40, "ddpm": 150, "dpm": 60}
CLIP = 0.3  # about half the length of the components' means


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """Σ w_j·N(m_j, Σ_j), [-1, 1] units, with its denoiser."""

    weights_J: Tensor
    means_JD: Tensor
    covariances_JDD: Tensor

    def posterior(self, y_BD: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights BJ, means BJD and covariances JDD of p(x | y_σ), a mixture again."""
        total_JDD = self.covariances_JDD + sigma**2 * torch.eye(3, dtype=torch.float64)
        gain_JDD = self.covariances_JDD @ torch.linalg.inv(total_JDD)
        noisy = torch.distributions.MultivariateNormal(self.means_JD, total_JDD)
        weights_BJ = (self.weights_J.log() + noisy.log_prob(y_BD[:, None, :])).softmax(dim=1)
        means_BJD = self.means_JD + torch.einsum("jde,bje->bjd", gain_JDD, y_BD[:, None, :] - self.means_JD)
        return weights_BJ, means_BJD, self.covariances_JDD - gain_JDD @ self.covariances_JDD

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """E[x0 | y_σ]; samplers ask at one level at a time."""
        sigma = float(sigma_B[0])
        weights_BJ, means_BJD, _ = self.posterior(y_BCHW.flatten(1).double(), sigma)
        return (weights_BJ[..., None] * means_BJD).sum(dim=1).view_as(y_BCHW)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        component_B = torch.multinomial(self.weights_J, count, replacement=True, generator=generator)
        return self.means_JD[component_B] + coloured(self.covariances_JDD[component_B], generator)

    def continue_from(self, y_BD: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """x_BD ~ p(x | y_σ): what a perfect sampler makes of y at σ."""
        weights_BJ, means_BJD, covariances_JDD = self.posterior(y_BD, sigma)
        component_B = torch.multinomial(weights_BJ, 1, generator=generator).flatten()
        return means_BJD[torch.arange(len(y_BD)), component_B] + coloured(covariances_JDD[component_B], generator)

    @property
    def mean_D(self) -> Tensor:
        return self.weights_J @ self.means_JD

    @property
    def covariance_DD(self) -> Tensor:
        apart_JD = self.means_JD - self.mean_D
        return torch.einsum(
            "j,jde->de", self.weights_J, self.covariances_JDD + apart_JD[:, :, None] * apart_JD[:, None]
        )


def coloured(covariances_BDD: Tensor, generator: torch.Generator) -> Tensor:
    z_BD = torch.randn(len(covariances_BDD), 3, generator=generator, dtype=torch.float64)
    return (torch.linalg.cholesky(covariances_BDD) @ z_BD[..., None])[..., 0]


IMAGES = Mixture(
    double(0.35, 0.65),
    double([0.5, -0.4, 0.2], [-0.4, 0.3, 0.0]),
    double(
        [[0.020, 0.008, 0.000], [0.008, 0.015, -0.004], [0.000, -0.004, 0.010]],
        [[0.012, 0.000, 0.004], [0.000, 0.016, 0.000], [0.004, 0.000, 0.020]],
    ),
)


def released(step: int) -> Mixture:
    """The mixture of x̃ = α·x + s·z."""
    alpha, s = SCHEDULE.alpha(step), SCHEDULE.s(step)
    covariances_JDD = alpha**2 * IMAGES.covariances_JDD + s**2 * torch.eye(3, dtype=torch.float64)
    return Mixture(IMAGES.weights_J, alpha * IMAGES.means_JD, covariances_JDD)


def features(x_BD: Tensor) -> Tensor:
    """Moments to the third, the share of the first component, and what is in it, BF."""
    height_B = x_BD @ (IMAGES.means_JD[0] - IMAGES.means_JD[1])
    first_B = (height_B > 0).double()
    squares_BF = x_BD[:, [0, 0, 0, 1, 1, 2]] * x_BD[:, [0, 1, 2, 1, 2, 2]]
    more_BF = torch.stack([height_B**3, first_B, first_B * x_BD.norm(dim=1)], dim=1)
    return torch.cat([x_BD, squares_BF, more_BF], dim=1)


def apart(found_BD: Tensor, expected_BD: Tensor) -> float:
    """How far the features' means lie apart at most, in standard deviations."""
    found_BF, expected_BF = features(found_BD), features(expected_BD)
    return float(((found_BF.mean(0) - expected_BF.mean(0)).abs() / expected_BF.std(0)).max())


def drawn(
    shared: Denoise, personal: Denoise, sampler: str = "heun", restarts: bool = False, step: int = SPLIT_STEP
) -> Tensor:
    """Images by the code that draws a job's, x_BD."""
    split = SCHEDULE.sigma(step), SCHEDULE.alpha(step)
    how = Drawing(*split, restarts, SCHEDULE.sigmas, SAMPLERS[sampler], sampler)
    generator = torch.Generator().manual_seed(1)
    noise_BCHW = torch.randn(COUNT, *SHAPE, generator=generator, dtype=torch.float64)
    return draw_both(how, shared, personal, noise_BCHW, torch.zeros(COUNT, dtype=torch.long), generator).flatten(1)


def exact_images() -> Tensor:
    return IMAGES.draw(EXACT, torch.Generator().manual_seed(2))


def continued_from(y_BD: Tensor) -> Tensor:
    return IMAGES.continue_from(y_BD, SPLIT, torch.Generator().manual_seed(3))


def noised(x_BD: Tensor, sigma: float) -> Tensor:
    return x_BD + sigma * torch.randn(x_BD.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# ---- The oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0])
def test_the_oracle_is_the_mean_of_what_gave_y(sigma: float) -> None:
    """Bayes' rule by importance sampling, and the draws of the posterior besides."""
    x_ND = exact_images()
    for y_D in (double(0.1, -0.2, 0.1), double(-0.5, 0.4, 0.3)):
        weights_N = (-((y_D - x_ND) ** 2).sum(1) / (2 * sigma**2)).softmax(0)
        found = IMAGES(y_D.view(1, *SHAPE), torch.tensor([sigma]), torch.zeros(1)).flatten()
        torch.testing.assert_close(found, weights_N @ x_ND, atol=0.02, rtol=0)
        again_ND = IMAGES.continue_from(y_D.expand(EXACT, 3), sigma, torch.Generator().manual_seed(5))
        torch.testing.assert_close(again_ND.mean(0), found, atol=0.01, rtol=0)


def test_continuing_from_noised_images_gives_the_images_again() -> None:
    assert apart(continued_from(noised(exact_images(), SPLIT)), exact_images()) < TOLERANCE / 3


# ---- Both timelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_continued_timeline_draws_the_mixture(sampler: str) -> None:
    assert apart(drawn(IMAGES, IMAGES, sampler), exact_images()) < TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_restarted_timeline_draws_the_mixture(sampler: str) -> None:
    assert apart(drawn(released(SPLIT_STEP), IMAGES, sampler, restarts=True), exact_images()) < TOLERANCE


def test_a_shared_denoiser_that_predicts_what_was_released_is_noticed() -> None:
    def shared(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        kappa = 1 - (SPLIT / float(sigma_B[0])) ** 2
        return kappa * IMAGES(y_BCHW, sigma_B, label_B) + (1 - kappa) * y_BCHW

    assert apart(drawn(shared, IMAGES), exact_images()) > 2 * TOLERANCE


def test_a_restart_that_is_handed_over_at_another_step_is_noticed() -> None:
    for step in (SPLIT_STEP - 60, SPLIT_STEP + 100):
        assert apart(drawn(released(SPLIT_STEP), IMAGES, restarts=True, step=step), exact_images()) > TOLERANCE


def test_components_mixed_up_by_one_of_the_denoisers_are_noticed() -> None:
    other = Mixture(IMAGES.weights_J.flip(0), IMAGES.means_JD, IMAGES.covariances_JDD)
    assert apart(drawn(other, IMAGES), exact_images()) > 2 * TOLERANCE
    assert apart(drawn(IMAGES, other), exact_images()) > TOLERANCE


# ---- From clipped images to unclipped ones ---------------------------------------------------------------------------


def clipped(x_BD: Tensor) -> Tensor:
    return torch.from_numpy(clip_l2(x_BD.numpy(), CLIP))


class Atoms:
    """The denoiser of finitely many images: what perfect training on clipped ones above the split comes to."""

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND = x_ND

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """softmax of -‖y - x‖²/(2σ²), of which ‖y‖² is the same for all x."""
        fit_BN = y_BCHW.flatten(1) @ self.x_ND.T - self.x_ND.square().sum(dim=1) / 2
        return ((fit_BN / float(sigma_B[0]) ** 2).softmax(dim=1) @ self.x_ND).view_as(y_BCHW)


def atoms() -> Tensor:
    """A hundred images, and no others: the clip is no map of mixtures to mixtures, so these stand for its law."""
    return IMAGES.draw(100, torch.Generator().manual_seed(6))


def test_the_personal_denoiser_goes_on_from_clipped_images_as_its_own_posterior_says() -> None:
    many_BD = clipped(atoms()).repeat(EXACT // 100, 1)
    expected_BD = continued_from(noised(many_BD, SPLIT))
    found_BD = drawn(Atoms(clipped(atoms())), IMAGES, "ddpm")
    assert apart(found_BD, expected_BD) < TOLERANCE
    assert apart(found_BD, many_BD) > 2 * TOLERANCE, "they are not clipped any more"


def test_a_personal_denoiser_that_is_told_that_its_images_are_clipped_is_noticed() -> None:
    known = Atoms(clipped(atoms()))
    expected_BD = continued_from(noised(clipped(atoms()).repeat(EXACT // 100, 1), SPLIT))
    assert apart(drawn(known, known), expected_BD) > 2 * TOLERANCE


# ---- The pooled closed form ------------------------------------------------------------------------------------------


def pooled(num_records: int = 40_000) -> ClassGaussian:
    """The Gaussian of two real releases of the mixture's images, with hardly any noise."""
    summaries = []
    for seed in (7, 8):
        pixels_ND = (IMAGES.draw(num_records, torch.Generator().manual_seed(seed)).clamp(-1, 1) + 1) / 2
        summary = release_summary(
            pixels_ND.numpy(),
            np.zeros(num_records, np.int64),
            num_classes=1,
            mean_clip_norm=3.0,
            moment_clip_norm=3.0,
            centre=0.5,
            mean_std=0.05,
            moment_std=0.05,
            normals=np.random.default_rng(seed).standard_normal,
        )
        sums, moments = torch.from_numpy(summary.mean_sums_KD), torch.from_numpy(summary.moment_sums_KM)
        summaries.append(OwnerSummary(sums, moments, torch.tensor([num_records]), 0.05, 0.05, 3.0, 0.5))
    return ClassGaussian(*pool(summaries, 0.05))


def test_the_pool_has_the_mixtures_mean_and_covariance() -> None:
    found = pooled()
    torch.testing.assert_close(found.means_KD[0], IMAGES.mean_D, atol=0.01, rtol=0)
    torch.testing.assert_close(found.covariances_KDD[0], IMAGES.covariance_DD, atol=0.01, rtol=0)


def squared_error(denoise: Denoise, sigma: float) -> float:
    x_BD = exact_images()
    y_BCHW = noised(x_BD, sigma).view(-1, *SHAPE)
    sigma_B, label_B = torch.full((len(x_BD),), sigma, dtype=torch.float64), torch.zeros(len(x_BD), dtype=torch.long)
    return float((denoise(y_BCHW, sigma_B, label_B).flatten(1) - x_BD).square().sum(1).mean())


@pytest.mark.parametrize(
    ("sigma", "least", "most"), [(0.25, 0.4, 0.9), (SPLIT, 0.1, 0.6), (2.0, 0, 0.01), (10.0, 0, 0.01)]
)
def test_the_closed_form_is_the_best_affine_denoiser_and_loses_to_the_oracle_below_the_components_distance_alone(
    sigma: float, least: float, most: float
) -> None:
    covariance_DD = IMAGES.covariance_DD
    total_DD = covariance_DD + sigma**2 * torch.eye(3, dtype=torch.float64)
    affine = float((covariance_DD - covariance_DD @ torch.linalg.solve(total_DD, covariance_DD)).trace())
    found, best = squared_error(pooled(), sigma), squared_error(IMAGES, sigma)
    assert found == pytest.approx(affine, rel=0.015)
    assert least - 1e-3 < found / best - 1 < most


def test_the_closed_form_hands_over_a_gaussian_and_the_personal_denoiser_makes_images_of_it() -> None:
    noise = torch.Generator().manual_seed(9)
    total_DD = IMAGES.covariance_DD + SPLIT**2 * torch.eye(3, dtype=torch.float64)
    expected_BD = continued_from(IMAGES.mean_D + coloured(total_DD.expand(EXACT, 3, 3), noise))
    found_BD = drawn(pooled(), IMAGES, "ddpm")
    assert apart(found_BD, expected_BD) < TOLERANCE


def test_a_closed_form_of_the_pixels_alone_is_noticed() -> None:
    expected_BD = exact_images()
    diagonal = ClassGaussian(IMAGES.mean_D[None], IMAGES.covariance_DD.diagonal().diag()[None])
    assert apart(drawn(diagonal, IMAGES), expected_BD) > apart(drawn(pooled(), IMAGES), expected_BD) + TOLERANCE
