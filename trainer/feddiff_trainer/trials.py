"""The mechanisms under attack at their worst pairs: fresh releases of two made-up images, by the code, the clip norms
and the noise of a job, and what the best test makes of them. No record of anybody is in here.

Shapes: T trials, D values of one image, M = D·(D + 1)/2 packed values of a symmetric matrix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np

from feddiff_protocol.api import ClassesSpec, ImageSpec, Mechanism
from feddiff_protocol.promise import CENTRED_FROM, Promise, cap_of, promise_of, released_image, schedule_of
from feddiff_protocol.stages import ReleaseSpec

from .attacks import matched_filter
from .frequencies import finest_waves, frequency_map
from .mechanisms import clip_l2, pack_symmetric
from .noise import Float64, Normals
from .privunit import directions
from .records import Records, over_blocks
from .release import shards_of
from .shards import decode, grid_steps, layouts
from .verdicts import Bound, bound_of, bound_of_cap, bound_of_part

TRIALS = 10_000  # of either image: noise that is 10 % too small shows at ε = 10
MOST_VALUES = 1 << 26  # drawn for one image: fewer trials where images are large
LARGEST_RELEASE = 1000  # images, each of a class of its own: the most classes there may be
MATCHED_FILTER = "matched filter"

GREY = 0.5  # the pixels of a class's other records, which whoever attacks knows

Score = Callable[..., Float64]  # of each tensor the released values of T trials, to scores_T


@dataclass(frozen=True)
class Part:
    """One part of a release under attack: the tensors that it is, the pair of images (pixels_D) that are as far apart
    in them as such images can be, and the best test of the second one against the first. `mu`: what this part is
    charged, None where the promise is pure ε. `probability`: that a direction lies in its own image's cap, where the
    test looks at nothing else. `known`: grey records of the same class."""

    attack: str
    tensors: Sequence[str]
    image: ImageSpec
    pair: tuple[Float64, Float64]
    score: Score
    mu: float | None
    probability: float | None = None
    known: int = 0

    def bound(self, promise: Promise) -> Bound:
        if self.probability is not None:
            return bound_of_cap(self.probability)
        return bound_of(promise) if self.mu is None else bound_of_part(self.mu)


def parts_of(spec: ReleaseSpec) -> list[Part]:
    """The parts of a release of this job."""
    promise = promise_of(spec.privacy, spec.diffusion)
    if promise.mechanism is Mechanism.GAUSSIAN:
        return [_images(spec, promise)]
    if promise.mechanism is Mechanism.PRIVUNIT:
        return _directions(spec)
    sums = _mean_sums(spec, promise), _moment_sums(spec, promise)
    return [*sums, *_of_full_class(spec, promise, *sums)]


def _images(spec: ReleaseSpec, promise: Promise) -> Part:
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
    s = schedule.s(t0)
    return Part(
        MATCHED_FILTER, ["images"], image, pair, lambda x_TD: matched_filter(x_TD, clean_D, other_D, s), promise.mu
    )


def _mean_sums(spec: ReleaseSpec, promise: Promise) -> Part:
    """The first sum of `summary` alone, against its share of the charge: orthogonal images of norm C1."""
    assert promise.mu is not None and promise.mean_std is not None
    clip_norm, std = float(spec.privacy.clip_norm), promise.mean_std
    image = _image_of(2 * clip_norm**2, released_image(spec.privacy, spec.image))
    pair = _halves(image.dimensions)
    clean_D, other_D = (clip_l2(x_D[None], clip_norm)[0] for x_D in pair)
    return Part(
        f"{MATCHED_FILTER}, sums",
        ["mean_sums"],
        image,
        pair,
        lambda x_TD: matched_filter(x_TD, clean_D, other_D, std),
        promise.mu * math.sqrt(spec.privacy.mean_share_or_default),
    )


def _moment_sums(spec: ReleaseSpec, promise: Promise) -> Part:
    """The second moment alone: one record is fewer than a centre of its own takes, so u = P(x - c), c the constant."""
    assert promise.mu is not None and promise.moment_std is not None and spec.privacy.moment_clip_norm is not None
    clip_norm, std = float(spec.privacy.moment_clip_norm), promise.moment_std
    centre = float(spec.privacy.centre_or_default)
    farthest = 1.0 if centre <= 0.5 else 0.0
    image = _image_of(2 * (clip_norm / (farthest - centre)) ** 2, released_image(spec.privacy, spec.image))
    map_DD = frequency_map(spec.privacy, image)
    if map_DD is None or centre in (0, 1):  # no wave has room about black: halves, as mapped not quite orthogonal
        apart = [(farthest - centre) * half_D for half_D in _halves(image.dimensions)]
    else:
        apart = [min(centre, 1 - centre) * wave_D for wave_D in finest_waves(image)]
    clean_M, other_M = (_moment(x_D, map_DD, clip_norm) for x_D in apart)
    return Part(
        f"{MATCHED_FILTER}, second moments",
        ["moment_sums"],
        image,
        (centre + apart[0], centre + apart[1]),
        lambda x_TM: matched_filter(x_TM, clean_M, other_M, std),
        promise.mu * math.sqrt(1 - spec.privacy.mean_share_or_default),
    )


def _of_full_class(spec: ReleaseSpec, promise: Promise, mean: Part, moments: Part) -> list[Part]:
    """The two sums of a class that has a centre of its own: who knows all but one of its records takes these off, and
    follows the centre, which the first sum says. The pair of the second is no longer the farthest apart there."""
    assert promise.mean_std is not None and promise.moment_std is not None and spec.privacy.moment_clip_norm is not None
    clip_norm, std, known = float(spec.privacy.moment_clip_norm), promise.moment_std, CENTRED_FROM - 1
    map_DD = frequency_map(spec.privacy, moments.image)
    grey_D = np.full(moments.image.dimensions, GREY)
    of_grey_D = clip_l2(np.full((1, mean.image.dimensions), GREY), float(spec.privacy.clip_norm))[0]

    def score_moments(sums_TD: Float64, moments_TM: Float64) -> Float64:
        scores_T = np.empty(len(sums_TD))
        for t, centre_D in enumerate(np.clip(sums_TD / CENTRED_FROM, 0, 1)):
            clean_M, other_M, of_grey_M = (
                _moment(x_D - centre_D, map_DD, clip_norm) for x_D in (*moments.pair, grey_D)
            )
            scores_T[t] = matched_filter(moments_TM[t : t + 1] - known * of_grey_M, clean_M, other_M, std)[0]
        return scores_T

    of_class = f" of a class of {CENTRED_FROM}"
    return [
        replace(
            mean,
            attack=mean.attack + of_class,
            score=lambda sums_TD: mean.score(sums_TD - known * of_grey_D),
            known=known,
        ),
        replace(
            moments,
            attack=moments.attack + of_class,
            tensors=["mean_sums", "moment_sums"],
            score=score_moments,
            known=known,
        ),
    ]


def _moment(apart_D: Float64, map_DD: Float64 | None, clip_norm: float) -> Float64:
    """What an image that is so far apart from its centre adds to the packed second moment."""
    (u_D,) = clip_l2((apart_D if map_DD is None else apart_D @ map_DD)[None], clip_norm)
    return pack_symmetric(np.outer(u_D, u_D))


def _directions(spec: ReleaseSpec) -> list[Part]:
    """Directions of `privunit`: the log-likelihood ratio is ε times in one image's cap less in the other's. At a large
    ε its bound is out of reach of so many trials, so it is looked at how often z lies in its own cap, too."""
    pair, cap = _halves(spec.image.dimensions), cap_of(spec.privacy, spec.image)
    u_D, other_D = (directions(x_D[None])[0] for x_D in pair)

    def score(z_TD: Float64) -> Float64:
        scores_T: Float64 = (z_TD @ other_D >= cap.height).astype(np.float64) - (z_TD @ u_D >= cap.height)
        return scores_T

    def score_in_own(z_TD: Float64) -> Float64:
        scores_T: Float64 = (z_TD @ other_D >= cap.height).astype(np.float64)
        return scores_T

    return [
        Part("likelihood ratio", ["directions"], spec.image, pair, score, None),
        Part("own cap", ["directions"], spec.image, pair, score_in_own, None, cap.probability),
    ]


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


# ---- Released again and again ----------------------------------------------------------------------------------------


def without_privacy(
    spec: ReleaseSpec, promise: Promise, mu: float = 10, epsilon: int = 20
) -> tuple[ReleaseSpec, float]:
    """The same mechanism without privacy to speak of, and the share of its noise that is drawn: for this μ or, of
    `privunit`, whose cap is for this ε, all of it."""
    if promise.mu is None:
        privacy = spec.privacy.model_copy(update={"epsilon": Decimal(epsilon)})
        return spec.model_copy(update={"privacy": privacy}), 1.0
    return spec, min(1.0, promise.mu / mu)


def trials(spec: ReleaseSpec, part: Part, normals: Normals) -> tuple[Float64, Float64]:
    """Scores where the second image was released, and where the first was, as many of each."""
    (layout,) = layouts(spec.privacy.mechanism, part.image, (1 + part.known, 1))
    num_releases = max(1, min(TRIALS, MOST_VALUES // layout.values_bytes) // LARGEST_RELEASE)
    inside_T, outside_T = (
        np.concatenate([canaries(spec, part, chosen_T, normals) for _ in range(num_releases)])
        for chosen_T in (np.ones(LARGEST_RELEASE, np.bool_), np.zeros(LARGEST_RELEASE, np.bool_))
    )
    return inside_T, outside_T


def canaries(spec: ReleaseSpec, part: Part, second_N: np.ndarray, normals: Normals) -> Float64:
    """scores_N of one release of at most LARGEST_RELEASE images: the second of the pair where `second_N` says so, else
    the first."""
    first_D, second_D = part.pair
    pixels_ND = np.where(second_N[:, None], second_D, first_D)
    return part.score(*released_values(spec, part.image, part.tensors, pixels_ND, normals, part.known))


def released_values(
    spec: ReleaseSpec,
    image: ImageSpec,
    wanted: Sequence[str],
    pixels_ND: Float64,
    normals: Normals,
    known: int = 0,
) -> list[Float64]:
    """What leaves of each image (D or M values of each tensor that is wanted, in order), by the very function that
    writes a release's shards; each is a class of its own, with so many grey ones, so LARGEST_RELEASE are the most.
    Where a job releases the means of squares, pixels_ND are these and the images have such squares in one colour.
    Nothing is written."""
    promise, num, side = promise_of(spec.privacy, spec.diffusion), len(pixels_ND), spec.privacy.block_side_or_one
    whole = image.model_copy(update={"height": side * image.height, "width": side * image.width})
    counts = (1 + known,) * num
    trial = spec.model_copy(update={"image": whole, "classes": ClassesSpec(count=num, records=counts)})
    all_ND = np.concatenate([pixels_ND, np.full((known * num, pixels_ND.shape[1]), GREY)])
    pixels_NChw = all_ND.reshape(-1, image.channels, image.height, image.width)
    records = Records(over_blocks(pixels_NChw, side), np.tile(np.arange(num), 1 + known))
    steps = grid_steps(promise, schedule_of(spec.diffusion))
    parts, rows = dict[str, list[Float64]](), []
    shards = shards_of(trial, promise, records, normals)
    for layout, data in zip(layouts(promise.mechanism, image, counts), shards, strict=True):
        tensors = decode(layout, data, "trial")
        rows.append(tensors.get("labels", np.arange(num)))  # images leave in another order, under their own labels
        for name in wanted:
            step = math.ldexp(1.0, getattr(steps, name))
            parts.setdefault(name, []).append(tensors[name].reshape(len(rows[-1]), -1).astype(np.float64) * step)
    order_N = np.argsort(np.concatenate(rows))
    return [np.concatenate(parts[name])[order_N] for name in wanted]
