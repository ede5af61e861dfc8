"""All arms on Gaussians whose denoisers are known: what comes out, and who is asked at which noise level."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from feddiff_protocol.api import DiffusionSpec, ImageSpec, PrivacySpec, SamplingSpec, parse
from feddiff_trainer import pictures
from feddiff_trainer.denoising import ClassGaussian, Denoise
from feddiff_trainer.drawing import (
    Drawing,
    draw_alone,
    draw_both,
    draw_shared,
    drawing_of,
    labels_of,
    pack,
    save_npz,
    to_pixels,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CLASS = 4_000
# Of means in standard deviations and of covariances in variances. Four standard errors of a variance from 4,000 images
# are 4·√(2/4,000) = 0.09, the samplers' own error is below 0.02.
TOLERANCE = 0.1
MEANS_KD = torch.tensor([[0.4, -0.3, 0.1], [-0.5, 0.2, 0.0]], dtype=torch.float64)
COVARIANCES_KDD = torch.tensor(
    [
        [[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.10]],
        [[0.10, 0.00, 0.04], [0.00, 0.15, 0.00], [0.04, 0.00, 0.25]],
    ],
    dtype=torch.float64,
)
EYE_DD = torch.eye(3, dtype=torch.float64)
JOBS = {
    "summary": ({"mechanism": "summary", "clipNorm": "1", "momentClipNorm": "1"}, {"splitSigma": "0.25"}),
    "continued": ({"mechanism": "gaussian", "clipNorm": "0.4"}, {"timeline": "continued"}),
    "restarted": ({"mechanism": "gaussian", "clipNorm": "0.4"}, {"timeline": "restarted"}),
}
SAMPLERS = {
    "heun": 40,
    "ddpm": 150,
    "dpm": 60,
}  # with the number of steps that keeps their own error below the tolerance
Moments = tuple[Tensor, Tensor]


def drawing(job: str, sampler: str = "heun") -> Drawing:
    privacy, diffusion = JOBS[job]
    promised = privacy | {"epsilon": "10", "delta": "1e-5"}
    return drawing_of(
        parse(PrivacySpec, promised, "privacy"),
        parse(DiffusionSpec, diffusion, "diffusion"),
        SamplingSpec(steps=SAMPLERS[sampler], sampler=sampler),
    )


def shared_oracle(d: Drawing) -> ClassGaussian:
    """What perfect training gives: E[x0 | y_σ], or, restarted, the denoiser of x̃ = α·x0 + s·z, s = α·split."""
    if not d.restarts:
        return personal_oracle()
    noised_KDD = d.split_alpha**2 * (COVARIANCES_KDD + d.split_sigma**2 * EYE_DD)
    return ClassGaussian(d.split_alpha * MEANS_KD, noised_KDD)


def personal_oracle() -> ClassGaussian:
    return ClassGaussian(MEANS_KD, COVARIANCES_KDD)


def trained(oracle: Denoise, where: Callable[[Tensor], Tensor]) -> Denoise:
    """The oracle at the levels that training covered, nonsense elsewhere."""

    def denoise(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        return torch.where(where(sigma_B)[:, None, None, None], oracle(y_BCHW, sigma_B, label_B), 0.0)

    return denoise


def both(d: Drawing, trained_for: Drawing) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    """draw_both as `d` has it, of denoisers that know what `trained_for` taught them."""
    split, lowest = trained_for.split_sigma, -1.0 if d.restarts else trained_for.split_sigma
    shared = trained(shared_oracle(trained_for), lambda sigma_B: sigma_B > lowest)
    personal = trained(personal_oracle(), lambda sigma_B: sigma_B <= split)
    return partial(draw_both, d, shared, personal)


def deviation(draw: Callable[[Tensor, Tensor, torch.Generator], Tensor], expected: Moments) -> float:
    """Largest error of any class's mean and covariance, in standard deviations and variances of its widest pixel."""
    label_N, generator = labels_of(2, PER_CLASS), torch.Generator().manual_seed(1)
    x_NCHW = draw(torch.randn(2 * PER_CLASS, 1, 1, 3, generator=generator), label_N, generator)
    errors = []
    for k in range(2):
        x_ND, variance = x_NCHW[label_N == k].flatten(1).double(), expected[1][k].diagonal().max()
        errors += [(x_ND.mean(0) - expected[0][k]) / variance.sqrt(), (x_ND.T.cov() - expected[1][k]) / variance]
    return max(float(error.abs().max()) for error in errors)


def recorded(denoise: Denoise, seen: list[float]) -> Denoise:
    def spy(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        seen.extend(sigma_B.tolist())
        return denoise(y_BCHW, sigma_B, label_B)

    return spy


def test_split_and_timeline_are_the_ones_promised() -> None:
    for job in JOBS:
        d = drawing(job)
        assert d.split_sigma in d.schedule_sigmas and d.restarts == (job == "restarted")
        assert d.split_alpha == pytest.approx((1 + d.split_sigma**2) ** -0.5)  # α² + s² = 1
    assert drawing("summary").split_sigma == pytest.approx(0.25, rel=0.02)
    assert 0.4 < drawing("continued").split_sigma < 2  # where a wrong hand-over shows in data of variance 0.1 to 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("job", JOBS)
def test_both_reproduce_every_class(job: str, sampler: str) -> None:
    """Each denoiser knows its own side of the split only, so neither may be asked beyond it."""
    d = drawing(job, sampler)
    assert deviation(both(d, trained_for=d), (MEANS_KD, COVARIANCES_KDD)) < TOLERANCE


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_split_is_noticed(job: str, sampler: str, factor: float) -> None:
    """Mutants of the test above: drawn with another split than the denoisers were trained for."""
    d = drawing(job, sampler)
    other = min(d.schedule_sigmas, key=lambda sigma: abs(sigma - factor * d.split_sigma))
    wrong = replace(d, split_sigma=other, split_alpha=(1 + other**2) ** -0.5)
    assert deviation(both(wrong, trained_for=d), (MEANS_KD, COVARIANCES_KDD)) > 1.5 * TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_denoiser_alone_reproduces_every_class(sampler: str) -> None:
    draw = partial(draw_alone, drawing("continued", sampler), personal_oracle())
    assert deviation(draw, (MEANS_KD, COVARIANCES_KDD)) < TOLERANCE


def moments_of_shared(d: Drawing) -> Moments:
    """y at the split where images are noised; else of E[x0 | y_split], which spreads Σ(Σ + σ²I)⁻¹Σ."""
    noised_KDD = COVARIANCES_KDD + d.split_sigma**2 * EYE_DD
    if d.restarts:
        return MEANS_KD, noised_KDD
    return MEANS_KD, COVARIANCES_KDD @ torch.linalg.inv(noised_KDD) @ COVARIANCES_KDD


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("job", JOBS)
def test_shared_alone_stops_at_the_split(job: str, sampler: str) -> None:
    d = drawing(job, sampler)
    draw = partial(draw_shared, d, shared_oracle(d))
    assert deviation(draw, moments_of_shared(d)) < TOLERANCE
    if job != "summary":  # there the split is so low that the estimate is nearly the image itself
        assert deviation(draw, (MEANS_KD, COVARIANCES_KDD)) > 1.5 * TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("job", JOBS)
def test_hand_over_happens_at_the_split(job: str, sampler: str) -> None:
    d, above, below = drawing(job, sampler), list[float](), list[float]()
    arms = recorded(shared_oracle(d), above), recorded(personal_oracle(), below)
    draw_both(d, *arms, torch.zeros(1, 1, 1, 3), labels_of(1, 1), torch.Generator())
    assert max(below) == d.split_sigma and min(below) > 0
    if d.restarts:  # the shared denoiser walks the whole of a schedule of its own
        assert set(above) == set(d.levels(split=False).tolist()) - {0.0}
    else:
        assert min(above) > d.split_sigma
        assert {*above, *below, 0.0} == set(d.levels(split=True).tolist())


@pytest.mark.parametrize("job", ["summary", "continued"])
def test_shared_alone_is_never_asked_below_the_split(job: str) -> None:
    d, seen = drawing(job), list[float]()
    draw_shared(d, recorded(shared_oracle(d), seen), torch.zeros(1, 1, 1, 3), labels_of(1, 1), torch.Generator())
    assert min(seen) == d.split_sigma


@pytest.mark.parametrize("job", JOBS)
def test_ddpm_draws_its_noise_from_the_generator_alone(job: str) -> None:
    d, y_NCHW, label_N = drawing(job, "ddpm"), torch.ones(4, 1, 1, 3), labels_of(2, 2)
    once, again, other = (
        draw_both(d, shared_oracle(d), personal_oracle(), y_NCHW, label_N, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_labels_hold_every_class_equally_often() -> None:
    assert labels_of(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_pixels_are_those_that_were_stored_and_what_lies_outside_is_cut_off() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_pixels(2 * stored.float() / 255 - 1), stored)
    assert to_pixels(torch.tensor([-1e9, -1.001, 1.001, 1e9])).tolist() == [0, 0, 255, 255]


def test_pixels_are_rounded_to_the_nearest() -> None:
    x_N = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64)
    assert to_pixels(x_N).tolist() == pictures.to_pixels((x_N.numpy() + 1) / 2).tolist()


def test_packed_images_are_read_back_by_the_reports() -> None:
    label_N = labels_of(2, 3)
    images = {name: torch.full((6, 1, 4, 4), value, dtype=torch.uint8) for name, value in (("both", 7), ("shared", 9))}
    shape = ImageSpec(channels=1, height=4, width=4)
    read = pictures.read_samples(pack(images, label_N), "samples", ["both", "shared"], shape, 2)
    assert read.labels_N.tolist() == label_N.tolist()
    assert all(np.array_equal(read.images[name], images[name].numpy()) for name in images)


def test_images_saved_for_the_owner_are_plain_arrays(tmp_path: object) -> None:
    path = f"{tmp_path}/more.npz"
    save_npz(path, {"both": torch.ones(2, 1, 4, 4, dtype=torch.uint8)}, labels_of(2, 1))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["both"].shape == (2, 1, 4, 4) and arrays["both"].dtype == np.uint8
        assert arrays["labels"].tolist() == [0, 1]
