"""Releases as they are read back, by whoever trains on them: checked against the hash that the planner handed over.

Whoever wrote them may be hostile: nothing is used before it is what the job says it must be. Shapes: N images, C
channels, H height, W width, K classes, D = C·H·W, M = D·(D + 1)/2 packed second moments.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import DiffusionSpec, ImageSpec, Mechanism, PrivacySpec
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.manifest import DOCUMENT_BYTES, Manifest, ShardReference
from feddiff_protocol.promise import Promise, cap_of, promise_of, released_image, schedule_of
from feddiff_protocol.stages import ReleaseReference

from .fetching import ALONE, fetched_once
from .frequencies import frequency_map
from .noise import from_grid
from .pooling import OwnerSummary
from .shards import HEADER_BYTES, Integers, Layout, decode, grid_steps, layouts, num_shards
from .stores import Store, read_hashed
from .training import World


@dataclass(frozen=True)
class GaussianRelease:
    """Noised images x̃/α_t0 = clip(x) + σ·z. images_NCHW: float32, [-1, 1] units; labels_N: int64 in 0..K-1;
    split_sigma: σ_t0, the standard deviation of the noise in images_NCHW."""

    images_NCHW: Tensor
    labels_N: Tensor
    split_step: int
    split_sigma: float


@dataclass(frozen=True)
class PrivunitRelease:
    """Noised images x̃ = (C/m)·z, whose mean is the image scaled to norm C. images_NCHW: float32, [0, 1] units;
    labels_N: int64 in 0..K-1; noise_std: of the white noise in each value; norm: C."""

    images_NCHW: Tensor
    labels_N: Tensor
    num_classes: int
    noise_std: float
    norm: float


Release = GaussianRelease | OwnerSummary | PrivunitRelease


@dataclass(frozen=True)
class Terms:
    """What the job says of every release."""

    job_uid: str
    image: ImageSpec
    num_classes: int
    privacy: PrivacySpec
    diffusion: DiffusionSpec


@dataclass(frozen=True)
class Releases:
    """What clients released under a job. Iterated, it fetches them one after the other, in order and on every rank;
    the store sends every object once, whatever the number of ranks. Raises as read_releases does."""

    manifests: Sequence[Manifest]
    store: Store
    world: World

    @property
    def num_records(self) -> int:
        return sum(sum(manifest.counts) for manifest in self.manifests)

    def __iter__(self) -> Iterator[Release]:
        wanted = [(manifest, shard) for manifest in self.manifests for shard in manifest.shards]
        contents = fetched_once([partial(_shard_bytes, self.store, *each) for each in wanted], self.world)
        for manifest in self.manifests:
            yield _release(manifest, contents)


def read_releases(store: Store, references: Sequence[ReleaseReference], terms: Terms, world: World = ALONE) -> Releases:
    """What clients released under this job, in the order of `references`. No shard is fetched before all manifests are
    what they must be.

    Raises InputMissing if something is not there, DataInvalid, with the client's name, unless it is the very release
    that counts and everything it says of itself is what the job says.
    """
    return Releases(read_manifests(store, references, terms, world), store, world)


def read_manifests(
    store: Store, references: Sequence[ReleaseReference], terms: Terms, world: World = ALONE
) -> list[Manifest]:
    """What the releases say of themselves, in the order of `references`; raises as read_releases does."""
    fetches = [partial(_manifest_bytes, store, terms.job_uid, reference) for reference in references]
    pairs = zip(references, fetched_once(fetches, world), strict=True)
    return [_manifest(data, reference, terms) for reference, data in pairs]


def _release(manifest: Manifest, contents: Iterator[bytes]) -> Release:
    """The release of one manifest, its shards being the next of `contents`."""
    promise = promise_of(manifest.privacy, manifest.diffusion)
    shards = (
        decode(shard_layout, next(contents), f"{_who(manifest.client)}: {shard.name}")
        for shard_layout, shard in zip(_layouts(manifest), manifest.shards, strict=True)
    )
    if promise.mechanism is Mechanism.SUMMARY:
        return _summary(manifest, promise, shards)
    if promise.mechanism is Mechanism.PRIVUNIT:
        return _privunit(manifest, shards)
    return _gaussian(manifest, promise, shards)


def _who(client: str) -> str:
    return f"release of client {client}"


# ---- The manifest --------------------------------------------------------------------------------------------


def _manifest_bytes(store: Store, job_uid: str, reference: ReleaseReference) -> bytes:
    """The manifest that the planner heard of, whatever it says."""
    data, found = _read(store, layout.manifest(job_uid, reference.client), DOCUMENT_BYTES, reference.client)
    if found != reference.manifest_sha256:
        raise DataInvalid(
            f"{_who(reference.client)}: expected a manifest with SHA-256 {reference.manifest_sha256}, found {found};"
            " it was changed after its release, do not use it"
        )
    return data


def _manifest(data: bytes, reference: ReleaseReference, terms: Terms) -> Manifest:
    who = _who(reference.client)
    manifest = Manifest.from_bytes(data, f"{who}: manifest")
    _check_equal(who, "job", terms.job_uid, manifest.job_uid)
    _check_equal(who, "client", reference.client, manifest.client)
    _check_equal(who, "privacy", terms.privacy, manifest.privacy)
    _check_equal(who, "diffusion", terms.diffusion, manifest.diffusion)
    _check_equal(who, "image", terms.image, manifest.image)
    _check_equal(who, "number of classes", terms.num_classes, len(manifest.counts))
    _check_grid(who, promise_of(terms.privacy, terms.diffusion), terms.diffusion, manifest)
    _check_shards(who, manifest)
    return manifest


def _check_equal(who: str, name: str, expected: object, found: object) -> None:
    if expected != found:
        raise DataInvalid(
            f"{who}: {name}: expected {str(expected)[:200]} as the job says, found {str(found)[:200]};"
            " it belongs to something else, do not use it"
        )


def _check_grid(who: str, promise: Promise, diffusion: DiffusionSpec, manifest: Manifest) -> None:
    expected, found = grid_steps(promise, schedule_of(diffusion)), manifest.grid_steps
    for name in type(expected).model_fields:
        ours, theirs = getattr(expected, name), getattr(found, name)
        # One apart: another machine's last digit of the noise may lie beyond a power of two.
        if (ours is None) != (theirs is None) or (ours is not None and abs(ours - theirs) > 1):
            _check_equal(who, f"grid of {name}", ours, theirs)


def _check_shards(who: str, manifest: Manifest) -> None:
    """Refuses before a single byte of them is fetched."""
    image = released_image(manifest.privacy, manifest.image)
    expected = num_shards(manifest.privacy.mechanism, image, manifest.counts)
    _check_equal(who, "number of shards", expected, len(manifest.shards))
    for shard_layout, shard in zip(_layouts(manifest), manifest.shards, strict=True):
        _check_size(shard_layout, shard, who)


def _layouts(manifest: Manifest) -> list[Layout]:
    return layouts(manifest.privacy.mechanism, released_image(manifest.privacy, manifest.image), manifest.counts)


def _check_size(shard_layout: Layout, shard: ShardReference, who: str) -> None:
    least = shard_layout.values_bytes
    if not least < shard.num_bytes <= least + 8 + HEADER_BYTES:
        raise DataInvalid(
            f"{who}: {shard.name}: expected {least} bytes of values and a header, found {shard.num_bytes} in all;"
            " do not use it"
        )


# ---- The shards ----------------------------------------------------------------------------------------------


def _shard_bytes(store: Store, manifest: Manifest, shard: ShardReference) -> bytes:
    """The bytes that the manifest speaks of, and no others."""
    key = layout.released_shard(manifest.job_uid, manifest.client, shard.name)
    data, found = _read(store, key, shard.num_bytes, manifest.client)
    if len(data) != shard.num_bytes or found != shard.sha256:
        raise DataInvalid(
            f"{_who(manifest.client)}: {shard.name}: expected {shard.num_bytes} bytes with SHA-256 {shard.sha256},"
            f" found {len(data)} with {found}; it was damaged or changed, do not use it"
        )
    return data


def _read(store: Store, key: str, most_bytes: int, client: str) -> tuple[bytes, str]:
    try:
        return read_hashed(store, key, most_bytes)
    except DataInvalid as error:
        raise DataInvalid(f"{_who(client)}: {error}") from None


# ---- What they hold ------------------------------------------------------------------------------------------


def _gaussian(manifest: Manifest, promise: Promise, shards: Iterable[dict[str, Integers]]) -> GaussianRelease:
    images_NCHW, labels_N = _images(manifest, shards, "images", manifest.grid_steps.images)
    images_NCHW /= np.float32(schedule_of(manifest.diffusion).alpha(promise.split_step))
    return GaussianRelease(torch.from_numpy(images_NCHW), labels_N, promise.split_step, promise.split_sigma)


def _privunit(manifest: Manifest, shards: Iterable[dict[str, Integers]]) -> PrivunitRelease:
    images_NCHW, labels_N = _images(manifest, shards, "directions", manifest.grid_steps.directions)
    cap, norm = cap_of(manifest.privacy, manifest.image), float(manifest.privacy.clip_norm)
    images_NCHW *= np.float32(norm / cap.mean)
    return PrivunitRelease(torch.from_numpy(images_NCHW), labels_N, len(manifest.counts), cap.noise_std(norm), norm)


def _images(
    manifest: Manifest, shards: Iterable[dict[str, Integers]], name: str, exponent: int | None
) -> tuple[NDArray[np.float32], Tensor]:
    """images_NCHW and labels_N of all shards, which come one after the other."""
    image = released_image(manifest.privacy, manifest.image)
    shape = (sum(manifest.counts), image.channels, image.height, image.width)
    images_NCHW, labels, start = np.empty(shape, np.float32), [], 0
    for shard in shards:
        end = start + len(shard["labels"])
        images_NCHW[start:end] = _values(shard[name], exponent)
        labels.append(shard["labels"])
        start = end
    return images_NCHW, _labels(manifest, np.concatenate(labels).astype(np.int64))


def _labels(manifest: Manifest, labels_N: NDArray[np.int64]) -> Tensor:
    who = _who(manifest.client)
    if labels_N.min(initial=0) < 0 or labels_N.max(initial=0) >= len(manifest.counts):
        raise DataInvalid(f"{who}: expected labels in 0..{len(manifest.counts) - 1}, found others; do not use it")
    found = tuple(np.bincount(labels_N, minlength=len(manifest.counts)).tolist())
    _check_equal(who, "images per class", manifest.counts, found)
    return torch.from_numpy(labels_N)


def _summary(manifest: Manifest, promise: Promise, shards: Iterable[dict[str, Integers]]) -> OwnerSummary:
    (sums,) = shards
    privacy, steps = manifest.privacy, manifest.grid_steps
    assert promise.mean_std is not None and promise.moment_std is not None and privacy.moment_clip_norm is not None
    map_DD = frequency_map(privacy, released_image(privacy, manifest.image))
    return OwnerSummary(
        mean_sums_KD=torch.from_numpy(_values(sums["mean_sums"], steps.mean_sums)),
        moment_sums_KM=torch.from_numpy(_values(sums["moment_sums"], steps.moment_sums)),
        counts_K=torch.tensor(manifest.counts),
        mean_std=promise.mean_std,
        moment_std=promise.moment_std,
        moment_clip_norm=float(privacy.moment_clip_norm),
        centre=float(privacy.centre_or_default),
        map_DD=None if map_DD is None else torch.from_numpy(map_DD),
    )


def _values(cells: Integers, exponent: int | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.float64]]:
    assert exponent is not None
    return from_grid(cells, math.ldexp(1.0, exponent))
