"""How much of an image comes back from what was released of it, to somebody who knows every other record and how such
images are distributed; and how much without the release.

Shapes: N images, K classes, D values of one image.
"""

import math

import numpy as np
import torch
from scipy import ndimage

from feddiff_protocol import accountant
from feddiff_protocol.api import Mechanism
from feddiff_protocol.promise import Promise, cap_of, promise_of, schedule_of
from feddiff_protocol.stages import ReleaseSpec

from .denoising import ClassGaussian
from .metrics import ImageSet
from .noise import Float64, Normals
from .trials import released_values

RIDGE = 0.01  # of the mean variance, on every axis of the prior
WINDOW, RADIUS = 1.5, 5  # pixels, of the local moments of SSIM, as published


def reconstructed(
    spec: ReleaseSpec, prior: ClassGaussian, images: ImageSet, normals: Normals, share: float = 1.0
) -> tuple[Float64, Float64]:
    """x̃_ND, what one fresh release says of each image, and x̂_ND = E[x | x̃] by its own class's prior; in [-1, 1] units.

    Who knows all other records takes them off a sum, so of `summary` each image's own clipped values with the noise of
    the first sum are left. share: of the promised noise, where less of it is drawn.
    """
    y_ND, sigma = _observed(spec, (images.pixels_ND + 1) / 2, lambda shape: share * normals(shape))
    sigma_N, label_N = torch.full((len(y_ND),), share * sigma), torch.from_numpy(images.labels_N)
    estimate_ND: Float64 = prior(torch.from_numpy(y_ND)[:, :, None, None], sigma_N, label_N).flatten(1).double().numpy()
    return y_ND, estimate_ND


def _observed(spec: ReleaseSpec, pixels_ND: Float64, normals: Normals) -> tuple[Float64, float]:
    """x + σ·z in [-1, 1] units, up to the clip, and the σ that was promised."""
    promise, schedule = promise_of(spec.privacy, spec.diffusion), schedule_of(spec.diffusion)
    if promise.mechanism is Mechanism.GAUSSIAN:
        (values_ND,) = released_values(spec, spec.image, ["images"], pixels_ND, normals)
        return values_ND / schedule.alpha(promise.split_step), promise.split_sigma
    if promise.mechanism is Mechanism.SUMMARY:
        assert promise.mean_std is not None
        (sums_ND,) = released_values(spec, spec.image, ["mean_sums"], pixels_ND, normals)
        return 2 * sums_ND - 1, 2 * promise.mean_std
    cap, norm = cap_of(spec.privacy, spec.image), float(spec.privacy.clip_norm)
    (z_ND,) = released_values(spec, spec.image, ["directions"], pixels_ND, normals)
    return 2 * norm / cap.mean * z_ND - 1, 2 * cap.noise_std(norm)


def prior_of(images: ImageSet, num_classes: int) -> ClassGaussian:
    """What everybody may know of such images: each class's mean, and the covariance within classes."""
    x_ND = images.pixels_ND
    means_KD = np.stack(
        [
            x_ND[images.labels_N == k].mean(axis=0) if k in images.labels_N else x_ND.mean(axis=0)
            for k in range(num_classes)
        ]
    )
    centred_ND = x_ND - means_KD[images.labels_N]
    covariance_DD = centred_ND.T @ centred_ND / len(x_ND)
    covariance_DD += RIDGE * np.trace(covariance_DD) / len(covariance_DD) * np.eye(len(covariance_DD))
    return ClassGaussian(torch.from_numpy(means_KD), torch.from_numpy(covariance_DD).expand(num_classes, -1, -1))


def nearer_bound(spec: ReleaseSpec, promise: Promise) -> float:
    """How often what was released may be nearer to its image than to another of the class: as often as the best test
    with equal chances of both errors is right, Φ(μ/2), or e^ε/(1 + e^ε)."""
    if promise.mu is None:
        return accountant.pure_attack_auc(float(promise.charge.pure_epsilon))
    share = float(spec.privacy.mean_share_or_default) if promise.mechanism is Mechanism.SUMMARY else 1.0
    return accountant.attack_auc(promise.mu * math.sqrt(share / 2))  # Φ(μ/2) = Φ((μ/√2)/√2)


def gain_db(estimate_ND: Float64, guess_ND: Float64, x_ND: Float64) -> float:
    """By how many dB the peak signal-to-noise ratio of the estimates exceeds that of guesses without a release."""
    return 10 * math.log10(np.square(guess_ND - x_ND).mean() / np.square(estimate_ND - x_ND).mean())


def structural_similarity(a_NCHW: Float64, b_NCHW: Float64) -> float:
    """Mean SSIM of pairs of images in [-1, 1]: 1 for equal ones (Wang, Bovik, Sheikh & Simoncelli 2004, equation 13).

    Means, variances and covariance are those under a Gaussian window about each pixel; beyond an edge images go on as
    in a mirror, so that images smaller than the window have a value too.
    """

    def local(x_NCHW: Float64) -> Float64:
        mean_NCHW: Float64 = ndimage.gaussian_filter(x_NCHW, (0, 0, WINDOW, WINDOW), radius=(0, 0, RADIUS, RADIUS))
        return mean_NCHW

    mean_a, mean_b = local(a_NCHW), local(b_NCHW)
    variances = local(a_NCHW**2) - mean_a**2 + local(b_NCHW**2) - mean_b**2
    covariance = local(a_NCHW * b_NCHW) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return float(similarity.mean())
