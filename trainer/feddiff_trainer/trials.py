"""The mechanisms under attack at their worst pairs: fresh releases of two made-up images, by the code, the clip norms
and the noise of a job, and what the best test makes of them. No record of anybody is in here.

Shapes: T trials, D values of one image, M = D·(D + 1)/2 packed values of a symmetric matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feddiff_protocol.api import ClassesSpec, ImageSpec, Mechanism
from feddiff_protocol.promise import Promise, cap_of, promise_of, schedule_of
from feddiff_protocol.stages import ReleaseSpec

from .attacks import matched_filter
from .mechanisms import clip_l2, pack_symmetric
from .noise import Float64, Normals
from .privunit import directions
from .records import Records
from .release import shards_of
from .shards import decode, grid_steps, layouts

TRIALS = 10_000  # of either image: noise that is 10 % too small shows at ε = 10
MOST_VALUES = 1 << 26  # drawn for one image: fewer trials where images are large
LARGEST_RELEASE = 1000  # images, each of a class of its own: the most classes there may be
MATCHED_FILTER = "matched filter"

Score = Callable[[Float64], Float64]  # released values of T trials to scores_T


@dataclass(frozen=True)
class Trials:
    """Scores of the best test where the second image of a pair was released (`inside_T`) and where the first was
    (`outside_T`). `mu`: what this part of a release is charged, None where the promise is pure ε."""

    attack: str
    inside_T: Float64
    outside_T: Float64
    mu: float | None


def upload_trials(spec: ReleaseSpec, normals: Normals) -> list[Trials]:
    """The matched filter on every part of a release of this job, each at the worst pair that such images can make."""
    promise = promise_of(spec.privacy, spec.diffusion)
    if promise.mechanism is Mechanism.GAUSSIAN:
        return [_images(spec, promise, normals)]
    if promise.mechanism is Mechanism.PRIVUNIT:
        return [_directions(spec, promise, normals)]
    return [_mean_sums(spec, promise, normals), _moment_sums(spec, promise, normals)]


def _images(spec: ReleaseSpec, promise: Promise, normals: Normals) -> Trials:
    """Noised images: where pixels count from 0, the farthest apart are orthogonal; from -1, opposite."""
    clip_norm, non_negative = float(spec.privacy.clip_norm), spec.privacy.clips_non_negative_pixels
    schedule, t0 = schedule_of(spec.diffusion), promise.split_step
    image = _image_of((2 if non_negative else 1) * clip_norm**2, spec.image)
    size = image.dimensions
    pair = _halves(size) if non_negative else (np.zeros(size), np.ones(size))
    clipped = [
        2 * clip_l2(x_D[None], clip_norm)[0] - 1 if non_negative else clip_l2(2 * x_D[None] - 1, clip_norm)[0]
        for x_D in pair
    ]
    clean_D, other_D = (schedule.alpha(t0) * each_D for each_D in clipped)
    inside_T, outside_T = _attacked(
        spec, promise, image, pair, lambda x_TD: matched_filter(x_TD, clean_D, other_D, schedule.s(t0)), normals
    )
    return Trials(MATCHED_FILTER, inside_T, outside_T, promise.mu)


def _mean_sums(spec: ReleaseSpec, promise: Promise, normals: Normals) -> Trials:
    """The first sum of `summary` alone, against its share of the charge: orthogonal images of norm C1."""
    assert promise.mu is not None and promise.mean_std is not None
    clip_norm, std = float(spec.privacy.clip_norm), promise.mean_std
    image = _image_of(2 * clip_norm**2, spec.image)
    pair = _halves(image.dimensions)
    clean_D, other_D = (clip_l2(x_D[None], clip_norm)[0] for x_D in pair)
    inside_T, outside_T = _attacked(
        spec, promise, image, pair, lambda x_TD: matched_filter(x_TD, clean_D, other_D, std), normals
    )
    share = float(spec.privacy.mean_share_or_default)
    return Trials(f"{MATCHED_FILTER}, sums", inside_T, outside_T, promise.mu * math.sqrt(share))


def _moment_sums(spec: ReleaseSpec, promise: Promise, normals: Normals) -> Trials:
    """The second moment alone: one record is fewer than a centre of its own takes, so u = x - c, c the constant."""
    assert promise.mu is not None and promise.moment_std is not None and spec.privacy.moment_clip_norm is not None
    clip_norm, std = float(spec.privacy.moment_clip_norm), promise.moment_std
    centre = float(spec.privacy.centre_or_default)
    farthest = 1.0 if centre <= 0.5 else 0.0
    image = _image_of(2 * (clip_norm / (farthest - centre)) ** 2, spec.image)
    first_D, second_D = (np.where(half_D > 0, farthest, centre) for half_D in _halves(image.dimensions))
    moved = [clip_l2(x_D[None] - centre, clip_norm)[0] for x_D in (first_D, second_D)]
    clean_M, other_M = (pack_symmetric(np.outer(u_D, u_D)) for u_D in moved)
    inside_T, outside_T = _attacked(
        spec,
        promise,
        image,
        (first_D, second_D),
        lambda x_TM: matched_filter(x_TM, clean_M, other_M, std),
        normals,
        tensor="moment_sums",
    )
    share = 1 - float(spec.privacy.mean_share_or_default)
    return Trials(f"{MATCHED_FILTER}, second moments", inside_T, outside_T, promise.mu * math.sqrt(share))


def _directions(spec: ReleaseSpec, promise: Promise, normals: Normals) -> Trials:
    """Directions of `privunit`: the log-likelihood ratio is ε times in one image's cap less in the other's."""
    pair, cap = _halves(spec.image.dimensions), cap_of(spec.privacy, spec.image)
    u_D, other_D = (directions(x_D[None])[0] for x_D in pair)

    def score(z_TD: Float64) -> Float64:
        scores_T: Float64 = (z_TD @ other_D >= cap.height).astype(np.float64) - (z_TD @ u_D >= cap.height)
        return scores_T

    inside_T, outside_T = _attacked(spec, promise, spec.image, pair, score, normals)
    return Trials("likelihood ratio", inside_T, outside_T, None)


# ---- One image, released again and again -----------------------------------------------------------------------------


def _attacked(
    spec: ReleaseSpec,
    promise: Promise,
    image: ImageSpec,
    pair: tuple[Float64, Float64],
    score: Score,
    normals: Normals,
    tensor: str = "",
) -> tuple[Float64, Float64]:
    """Scores of releases of the second image, and of the first."""
    first_D, second_D = pair
    inside_T, outside_T = (_scores(spec, promise, image, x_D, score, normals, tensor) for x_D in (second_D, first_D))
    return inside_T, outside_T


def _scores(
    spec: ReleaseSpec, promise: Promise, image: ImageSpec, x_D: Float64, score: Score, normals: Normals, tensor: str
) -> Float64:
    """scores_T of releases of one image, by the very function that writes a release's shards."""
    (layout,) = layouts(promise.mechanism, image, (1, 1))
    name = tensor or next(iter(layout.tensors))
    step = math.ldexp(1.0, getattr(grid_steps(promise, schedule_of(spec.diffusion)), name))
    trials, scores = min(TRIALS, MOST_VALUES // layout.values_bytes), []
    for count in [LARGEST_RELEASE] * max(1, trials // LARGEST_RELEASE):
        classes = ClassesSpec(count=count, records=(1,) * count)
        trial = spec.model_copy(update={"image": image, "classes": classes})
        shape = (count, image.channels, image.height, image.width)
        records = Records(np.broadcast_to(x_D.reshape(shape[1:]), shape), np.arange(count))
        for each, data in zip(
            layouts(promise.mechanism, image, classes.records), shards_of(trial, promise, records, normals), strict=True
        ):
            cells = decode(each, data, "trial")[name]
            scores.append(score(cells.reshape(len(cells), -1).astype(np.float64) * step))
    return np.concatenate(scores)


def _halves(size: int) -> tuple[Float64, Float64]:
    """Two images without a bright pixel in common: as orthogonal as images get, and as long."""
    first_D = (np.arange(size) < size // 2).astype(np.float64)
    return first_D, 1 - first_D


def _image_of(num_values: float, image: ImageSpec) -> ImageSpec:
    """A grey image with at least so many values, or the job's own where that is no larger.

    A promise by a norm holds in any dimension: the smallest image in which a pair can be that far apart is as good.
    """
    height = max(4, math.ceil(num_values / 512))
    width = max(4, math.ceil(num_values / height))
    return image if image.dimensions <= height * width else ImageSpec(channels=1, height=height, width=width)
