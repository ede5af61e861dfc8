"""Draws that are images: a Gaussian clipped to the range of pixels, of the mean and covariance that the pool knows.

A Gaussian with a black background's mean and variance puts half of its pixels below black. Cutting them off afterwards
brightens the background of every image and takes variance away; moments of clipped images have to be met by clipped
draws. So x = clip(y, 0, 1) with y Gaussian, and y is chosen so that x has the pooled moments (Cario & Nelson 1997,
"NORTA", with the two-limit normal of Tobit models for a pixel). That pixels lie in [0, 1] is public, and the moments
have been released: this is post-processing.

Shapes: K classes, D values of one image, T terms of a series, B images of a batch. [0, 1] units unless said.
"""

from collections.abc import Callable
from math import log, sqrt

import torch
from torch import Tensor

from .denoising import ClassGaussian
from .pooling import clip_error, density, project_keeping_trace

MEAN_MARGIN = 1e-4  # means stay so far from 0 and 1, where a pixel has no variance to match: 1/40 of a grey value
LARGEST_SPREAD = 0.9  # of mean·(1 - mean), a pixel's variance when it is only ever black or white
SMALLEST_VARIANCE = 1e-6  # a quarter of a grey value
SCALES = (1e-4, 1e2)  # of y: narrower than SMALLEST_VARIANCE needs, wider than LARGEST_SPREAD does
TERMS = 16
STEPS = 45  # halvings of an interval: relative error 3e-14


class ClippedGaussian:
    """Per class a Gaussian clipped to [-1, 1] whose draws have the mean and covariance of `pool`, [-1, 1] units.

    Variances that no pixel can have are lowered to what it can, keeping correlations. Made once, drawn from often.
    """

    def __init__(self, pool: ClassGaussian) -> None:
        means_KD = (pool.means_KD.double() + 1) / 2
        covariances_KDD = pool.covariances_KDD.double() / 4
        location_KD, scale_KD = latent_marginals(means_KD, covariances_KDD.diagonal(dim1=1, dim2=2))
        classes = zip(covariances_KDD, location_KD, scale_KD, strict=True)
        latent_KDD = torch.stack([latent_covariance(*one_class) for one_class in classes])
        dtype = pool.means_KD.dtype
        self._latent = ClassGaussian((2 * location_KD - 1).to(dtype), (4 * latent_KDD).to(dtype), pool.block_side)

    def draw(self, label_B: Tensor, image_shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """x0_BCHW in [-1, 1], independent draws of the labels' classes."""
        return self._latent.draw(label_B, image_shape, generator).clamp(-1, 1)


def latent_marginals(mean_KD: Tensor, variance_KD: Tensor) -> tuple[Tensor, Tensor]:
    """location_KD and scale_KD of y, with clip(y, 0, 1) of that mean and variance, as far as pixels can have them.

    At every scale one location gives the mean; along these the variance rises with the scale, because two such
    distribution functions cross once: a mean-preserving spread. Both are found by halving.
    """
    mean_KD = mean_KD.clamp(MEAN_MARGIN, 1 - MEAN_MARGIN)
    variance_KD = variance_KD.clamp(min=SMALLEST_VARIANCE).minimum(LARGEST_SPREAD * mean_KD * (1 - mean_KD))

    def location_KD(scale_KD: Tensor) -> Tensor:
        return root(
            lambda y_KD: y_KD + clip_error(y_KD, scale_KD)[0] - mean_KD, -10 * scale_KD, 1 + 10 * scale_KD
        )  # ten standard deviations from the other end, the mean is within 1e-20 of this one

    def excess_KD(log_scale_KD: Tensor) -> Tensor:
        scale_KD = log_scale_KD.exp()
        first_KD, second_KD = clip_error(location_KD(scale_KD), scale_KD)
        return second_KD - first_KD.square() - variance_KD

    low, high = (torch.full_like(mean_KD, log(scale)) for scale in SCALES)
    scale_KD = root(excess_KD, low, high).exp()
    return location_KD(scale_KD), scale_KD


def latent_covariance(covariance_DD: Tensor, location_D: Tensor, scale_D: Tensor) -> Tensor:
    """Covariance of y, of standard deviations scale_D, with clip(y) correlated as covariance_DD says.

    Found entry by entry, the correlations need not fit together. They are made to where an error shows, in clipped
    pixels: a black pixel's noise would otherwise count as much as a stroke.
    """
    series_DT = clipped_series(location_D, scale_D)
    std_D = series_DT.square().sum(dim=1).sqrt()
    fitting_DD = latent_correlation(covariance_DD, series_DT) * torch.outer(std_D, std_D)
    positive_DD = project_keeping_trace(fitting_DD, SMALLEST_VARIANCE)
    factor_D = scale_D / positive_DD.diagonal().clamp(min=SMALLEST_VARIANCE**2).sqrt()
    latent_DD: Tensor = positive_DD * torch.outer(factor_D, factor_D)
    return latent_DD


def clipped_series(location_D: Tensor, scale_D: Tensor) -> Tensor:
    """c_DT: clip(location + scale·z, 0, 1) = mean + Σ c_n·h_n(z) for n = 1..T, in Hermite polynomials h_n of norm 1.

    By parts, c_n = E[f·h_n] = E[f'·h_(n-1)]/√n, and f' is `scale` between the z of black and white, 0 elsewhere:
    c_1 = scale·(Φ(high) - Φ(low)), c_n = scale·[h_(n-2)·φ](low) - [h_(n-2)·φ](high), over √(n·(n-1)).
    """
    low_D, high_D = -location_D / scale_D, (1 - location_D) / scale_D
    ends_2D = torch.stack([low_D, high_D])
    before_2D, now_2D = torch.zeros_like(ends_2D), density(ends_2D)  # h_(n-1)·φ and h_n·φ from n = 0
    terms = [torch.special.ndtr(high_D) - torch.special.ndtr(low_D)]
    for n in range(TERMS - 1):
        terms.append((now_2D[0] - now_2D[1]) / sqrt((n + 1) * (n + 2)))
        before_2D, now_2D = now_2D, (ends_2D * now_2D - sqrt(n) * before_2D) / sqrt(n + 1)
    return scale_D[:, None] * torch.stack(terms, dim=1)


def latent_correlation(covariance_DD: Tensor, series_DT: Tensor) -> Tensor:
    """correlation_DD of y for which clip(y) is correlated as asked; ±1 where even that does not reach it.

    Mehler's formula: E[h_n(z)·h_m(z')] = ρⁿ for n = m, else 0, so Cov(clip(y_i), clip(y_j)) = Σ c_in·c_jn·ρⁿ, which
    rises with ρ because clipping does. The correlation is matched, not the covariance: variances may have been lowered.
    """
    std_D = covariance_DD.diagonal().clamp(min=SMALLEST_VARIANCE).sqrt()
    reached_D = series_DT.square().sum(dim=1).sqrt()
    wanted_DD = covariance_DD * torch.outer(reached_D / std_D, reached_D / std_D)

    def excess_DD(rho_DD: Tensor) -> Tensor:
        sum_DD = torch.zeros_like(rho_DD)
        for c_D in series_DT.T.flip(0):
            sum_DD = rho_DD * (sum_DD + torch.outer(c_D, c_D))
        return sum_DD - wanted_DD

    rho_DD = root(excess_DD, -torch.ones_like(wanted_DD), torch.ones_like(wanted_DD))
    return rho_DD - torch.diag_embed(rho_DD.diagonal() - 1)


def root(rising: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where every value of `rising` crosses zero, by STEPS halvings; the nearer end where it does not."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_below = rising(middle) < 0
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2
