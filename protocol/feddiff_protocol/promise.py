"""What one release promises and how much noise that takes: the mechanisms' fields turned into numbers.

The planner prints these numbers and the release stage draws noise with them, so both call this.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from . import accountant, privunit
from .api import (
    DiffusionSpec,
    FederatedDiffusionJob,
    FederatedDiffusionJobSpec,
    ImageSpec,
    Mechanism,
    PrivacySpec,
    PrivateDataset,
)
from .errors import SpecInvalid
from .schedule import Schedule

LARGEST_MOMENTS = 2**28  # float64 values: 2 GiB
CENTRED_FROM = 20  # records of a class from which an owner's second moment is about its own noisy mean


@dataclass(frozen=True)
class Promise:
    """μ-GDP or pure ε per image, replace-one within a class, of one release. σ is in [-1, 1] units."""

    mechanism: Mechanism
    charge: accountant.Charge
    split_step: int
    split_sigma: float
    mu: float | None = None  # gaussian, summary: what is charged, and what the noise is drawn for
    mean_std: float | None = None  # summary: noise on the per-class sum of clipped images, [0, 1] units
    moment_std: float | None = None  # summary: noise on the per-class second moment, [0, 1] units
    step_mu: float | None = None  # gaussian: what the chosen step really gives, at most mu
    pixel_mu: float | None = None  # gaussian: the same of one pixel, of two images that are equal elsewhere

    @property
    def attack_auc(self) -> float:
        """Area under the curve of the best possible membership test on the release."""
        if self.mu is None:
            return accountant.pure_attack_auc(float(self.charge.pure_epsilon))
        return accountant.attack_auc(self.mu)

    def attack_tpr(self, false_positive_rate: float) -> float:
        """True-positive rate of the best possible membership test on the release."""
        if self.mu is None:
            return accountant.pure_attack_tpr(float(self.charge.pure_epsilon), false_positive_rate)
        return accountant.attack_tpr(self.mu, false_positive_rate)


def schedule_of(diffusion: DiffusionSpec) -> Schedule:
    """The job's noise schedule. Raises SpecInvalid for one that runs out of float64."""
    try:
        return Schedule(diffusion.steps, float(diffusion.beta_start), float(diffusion.beta_end))
    except ValueError as error:
        raise SpecInvalid(f"spec.diffusion: {error}") from None


def promise_of(privacy: PrivacySpec, diffusion: DiffusionSpec) -> Promise:
    """The promise a job makes to every client. Raises SpecInvalid when no split can keep it."""
    if privacy.mechanism is Mechanism.PRIVUNIT:
        return _privunit_promise(privacy, diffusion)
    mechanism = _summary_promise if privacy.mechanism is Mechanism.SUMMARY else _gaussian_promise
    try:
        mu_squared = accountant.charge_mu_squared(privacy.epsilon, privacy.delta_or_zero)
        return mechanism(privacy, diffusion, math.sqrt(mu_squared), mu_squared)
    except accountant.UnreachablePromise as error:
        reachable = accountant.epsilon_of(error.smallest_mu, float(privacy.delta_or_zero))
        raise SpecInvalid(f"spec.privacy.epsilon: {error}; the smallest ε in reach is {reachable:.4g}") from None
    except (ValueError, ArithmeticError) as error:
        raise SpecInvalid(f"spec.privacy: {error}") from None


def _gaussian_promise(privacy: PrivacySpec, diffusion: DiffusionSpec, mu: float, mu_squared: Decimal) -> Promise:
    schedule = schedule_of(diffusion)
    sensitivity = gaussian_sensitivity(privacy)
    step = accountant.split_for(mu, sensitivity, schedule)
    sigma = schedule.sigma(step)
    # Clipping brings no two images farther apart: one pixel in [-1, 1] moves an image by what it moves itself, at most.
    pixel_sensitivity = min(accountant.range_sensitivity(1, 1), sensitivity)
    return Promise(
        Mechanism.GAUSSIAN,
        accountant.Charge(mu_squared=mu_squared),
        step,
        sigma,
        mu,
        step_mu=sensitivity / sigma,
        pixel_mu=pixel_sensitivity / sigma,
    )


def gaussian_sensitivity(privacy: PrivacySpec) -> float:
    """Largest distance of two clipped images in [-1, 1] units; a clip in [0, 1] units is stretched by two."""
    sensitivity = accountant.gaussian_sensitivity(
        float(privacy.clip_norm), non_negative=privacy.clips_non_negative_pixels
    )
    return 2 * sensitivity if privacy.clips_non_negative_pixels else sensitivity


def clips_any(privacy: PrivacySpec, image: ImageSpec) -> bool:
    """Whether images exist that the clip would scale down: none is longer than √d, in [0, 1] and in [-1, 1] alike."""
    return float(privacy.clip_norm) < math.sqrt(image.dimensions)


def _summary_promise(privacy: PrivacySpec, diffusion: DiffusionSpec, mu: float, mu_squared: Decimal) -> Promise:
    assert privacy.moment_clip_norm is not None  # the types' validators saw to it
    step, sigma = _split_asked_for(diffusion)
    noise = accountant.summary_noise(
        mu,
        accountant.gaussian_sensitivity(float(privacy.clip_norm), non_negative=True),
        float(privacy.moment_clip_norm),
        float(privacy.mean_share_or_default),
    )
    charge = accountant.Charge(mu_squared=mu_squared)
    return Promise(Mechanism.SUMMARY, charge, step, sigma, mu, mean_std=noise.mean_std, moment_std=noise.moment_std)


def _privunit_promise(privacy: PrivacySpec, diffusion: DiffusionSpec) -> Promise:
    """Every record is in one release once, so it costs the ε that was asked for, and no δ."""
    return Promise(Mechanism.PRIVUNIT, accountant.Charge(pure_epsilon=privacy.epsilon), *_split_asked_for(diffusion))


def released_image(privacy: PrivacySpec, image: ImageSpec) -> ImageSpec:
    """What a release is of: the image itself, or the means of its squares. Raises SpecInvalid unless squares fit."""
    side = privacy.block_side_or_one
    if image.height % side or image.width % side:
        raise SpecInvalid(
            f"spec.privacy.blockSide: expected a divisor of the image's height {image.height} and width {image.width},"
            f" found {side}; change it"
        )
    return image.model_copy(update={"height": image.height // side, "width": image.width // side})


def cap_of(privacy: PrivacySpec, image: ImageSpec) -> privunit.Cap:
    """privunit: what the directions of such images are drawn from, so that ε holds."""
    return privunit.best_cap(accountant.float_below("epsilon", privacy.epsilon), image.dimensions)


def _split_asked_for(diffusion: DiffusionSpec) -> tuple[int, float]:
    """Step and σ of diffusion.splitSigma, where the split does not follow from ε."""
    assert diffusion.split_sigma is not None  # the types' validators saw to it
    schedule = schedule_of(diffusion)
    step = schedule.step_at_least(float(diffusion.split_sigma))
    if step is None:
        raise SpecInvalid(
            f"spec.diffusion.splitSigma: expected at most σ = {schedule.sigma(diffusion.steps):.4g} of the last step,"
            f" found {diffusion.split_sigma}; lower it"
        )
    return step, schedule.sigma(step)


def check_datasets(job: FederatedDiffusionJob, datasets: Mapping[str, PrivateDataset]) -> None:
    """Raises SpecInvalid unless the clients' datasets share image shape, number and names of classes (they train one
    network), and what they would release fits into memory."""
    (first, expected), *others = datasets.items()
    check_size(job.spec.privacy, expected.spec.image, expected.spec.classes.count)
    for client, dataset in others:
        for what, found, wanted in (
            ("image", dataset.spec.image, expected.spec.image),
            ("classes.count", dataset.spec.classes.count, expected.spec.classes.count),
            ("classes.names", dataset.spec.classes.names, expected.spec.classes.names),
        ):
            if found != wanted:
                name = f"{dataset.metadata.namespace}/{dataset.metadata.name}"
                raise SpecInvalid(
                    f"job {job.metadata.name}: clients {first} and {client} must agree on {what}:"
                    f" expected {wanted or 'none'}, found {found or 'none'} in dataset {name}"
                )


def check_size(privacy: PrivacySpec, image: ImageSpec, num_classes: int) -> None:
    """Raises SpecInvalid where the classes' second moments would not fit into memory."""
    image = released_image(privacy, image)
    num_values = num_classes * image.dimensions * (image.dimensions + 1) // 2
    if privacy.mechanism is not Mechanism.GAUSSIAN and num_values > LARGEST_MOMENTS:
        raise SpecInvalid(
            f"spec.image: expected at most {LARGEST_MOMENTS} second moments for mechanism {privacy.mechanism}, found"
            f" {num_values} ({num_classes} classes of {image.dimensions} values); with mechanism summary set"
            " privacy.blockSide, or use smaller images or mechanism gaussian"
        )


def signal_to_noise_db(spec: FederatedDiffusionJobSpec, promise: Promise, image: ImageSpec, num_records: int) -> float:
    """Signal left per dimension in dB: of one image (gaussian), else of a class's mean over `num_records`."""
    clip_norm, num_records = float(spec.privacy.clip_norm), max(num_records, 1)
    image = released_image(spec.privacy, image)
    if promise.mechanism is Mechanism.GAUSSIAN:
        scale = 2 if spec.privacy.clips_non_negative_pixels else 1
        return accountant.signal_to_noise_db(scale * clip_norm, promise.split_sigma, image.dimensions)
    if promise.mean_std is not None:
        return accountant.signal_to_noise_db(clip_norm, promise.mean_std / num_records, image.dimensions)
    noise = cap_of(spec.privacy, image).noise_std(clip_norm) / math.sqrt(num_records)
    return accountant.signal_to_noise_db(clip_norm, noise, image.dimensions)


NOT_COVERED = (
    "labels, the number of records per class, image size and class names: public by declaration",
    "an owner's personal denoiser, its samples and the owner report: not private, they stay in the owner's store",
    "several images of one person: the unit of the promise is the image",
    "that an owner took part, when it did, and how long its stages ran",
    "clip norms, centre, frequency power, block side and variance guess, if somebody chose them by looking at the data",
)
