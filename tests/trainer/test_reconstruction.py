"""Reconstruction against Gaussians: what comes back, and how often it is the right image, is known on paper."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from audited_run import made_up_release
from feddiff_protocol.promise import cap_of, promise_of
from feddiff_protocol.stages import ReleaseSpec
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.findings import Estimate
from feddiff_trainer.metrics import ImageSet
from feddiff_trainer.noise import Normals
from feddiff_trainer.reconstruction import RIDGE, gain_db, nearer_bound, prior_of, reconstructed
from feddiff_trainer.verdicts import share_interval

NUM, SIDE, STD = 1000, 4, 0.1
RELEASES = 16  # privunit draws from the system's entropy: one release's gain spreads by 4 %, sixteen's by 1 %
PRIVACY = {
    "gaussian": {"mechanism": "gaussian", "epsilon": "1000", "delta": "1e-5", "clipNorm": "3"},
    "summary": {"mechanism": "summary", "epsilon": "1000", "delta": "1e-5", "clipNorm": "3", "momentClipNorm": "2"},
    "privunit": {"mechanism": "privunit", "epsilon": "20", "clipNorm": "2"},
}


def spec_of(mechanism: str, **privacy: Any) -> ReleaseSpec:
    return made_up_release(SIDE, PRIVACY[mechanism] | privacy, {} if mechanism == "gaussian" else {"splitSigma": "2"})


def seeded(scale: float = 1.0) -> Normals:
    rng = np.random.default_rng(0)
    return lambda shape: scale * rng.standard_normal(shape)


def grey_images(norm: float | None = None) -> ImageSet:
    """Independent pixels about grey, one class; all of one norm where that is given."""
    pixels_ND = np.random.default_rng(1).normal(0.5, STD, (NUM, SIDE * SIDE)).clip(0, 1)
    if norm is not None:
        pixels_ND *= norm / np.linalg.norm(pixels_ND, axis=1, keepdims=True)
    return ImageSet((2 * pixels_ND - 1).reshape(NUM, 1, SIDE, SIDE), np.zeros(NUM, np.int64))


@pytest.mark.parametrize("mechanism", PRIVACY)
def test_what_comes_back_of_a_gaussian_is_what_does_on_paper(mechanism: str) -> None:
    """λ·σ²/(λ + σ²) of an axis' variance λ is left as error, so the gain is (λ + σ²)/σ²."""
    spec, images = spec_of(mechanism), grey_images(norm=2.0 if mechanism == "privunit" else None)
    promise = promise_of(spec.privacy, spec.diffusion)
    sigma = {"gaussian": promise.split_sigma, "summary": 2 * (promise.mean_std or 0)}.get(mechanism)
    if sigma is None:
        sigma = 2 * cap_of(spec.privacy, spec.image).noise_std(2.0)
    prior, normals = prior_of(images, 1), seeded()
    estimate_ND = np.concatenate([reconstructed(spec, prior, images, normals)[1] for _ in range(RELEASES)])
    guess_ND = np.broadcast_to(prior.means_KD.numpy(), estimate_ND.shape)
    found = gain_db(estimate_ND, guess_ND, np.tile(images.pixels_ND, (RELEASES, 1)))
    assert found == pytest.approx(10 * math.log10(((2 * STD) ** 2 + sigma**2) / sigma**2), rel=0.1)


def test_the_prior_is_the_classes_means_and_their_common_covariance() -> None:
    images = grey_images()
    prior = prior_of(ImageSet(images.images_NCHW, np.arange(NUM) % 2), 3)
    assert torch.allclose(prior.means_KD[2], torch.from_numpy(images.pixels_ND.mean(axis=0)))  # a class nobody knows
    expected = (1 + RIDGE) * (2 * STD) ** 2
    assert prior.covariances_KDD[0].diagonal().mean().item() == pytest.approx(expected, rel=0.05)


def nearer(spec: ReleaseSpec, normals: Normals) -> Estimate:
    """At the worst pair."""
    first_D = np.repeat([1.0, 0.0], SIDE * SIDE // 2)
    pair = [2 * x_D - 1 for x_D in (first_D, 1 - first_D)]
    flat = ClassGaussian(torch.zeros(1, SIDE * SIDE).double(), torch.eye(SIDE * SIDE).double()[None])
    images = ImageSet(np.tile(pair[0], (NUM, 1)).reshape(NUM, 1, SIDE, SIDE), np.zeros(NUM, np.int64))
    released_ND, _ = reconstructed(spec, flat, images, normals)
    own_N, other_N = (np.linalg.norm(released_ND - x_D, axis=1) for x_D in pair)
    return share_interval(int((own_N < other_N).sum()), NUM)


@pytest.mark.parametrize("mechanism", ["gaussian", "summary"])
def test_at_the_worst_pair_a_release_is_as_often_nearer_to_its_image_as_the_bound_says(mechanism: str) -> None:
    """Both images are of the clip norm: √8 where a pair is two halves of 16 pixels."""
    spec = spec_of(mechanism, epsilon="10", clipNorm="2.8284")
    bound = nearer_bound(spec, promise_of(spec.privacy, spec.diffusion))
    mu = 2.0004 * math.sqrt(0.5 if mechanism == "summary" else 1)
    assert bound == pytest.approx(stats.norm.cdf(mu / 2), abs=1e-3)
    found = nearer(spec, seeded())
    assert found.low < bound < found.high
    assert nearer(spec, seeded(0.5)).low > bound
