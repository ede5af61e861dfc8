"""Releases as they are read back, by whoever trains on them: checked against the hash that the planner handed over.

Whoever wrote them may be hostile: nothing is used before it is what the job says it must be. Shapes: N images, C
channels, H height, W width, K classes, D = C·H·W, M = D·(D + 1)/2 packed second moments.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import DiffusionSpec, ImageSpec, Mechanism, PrivacySpec
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.manifest import Manifest, ShardReference
from feddiff_protocol.promise import Promise, promise_of, schedule_of
from feddiff_protocol.stages import ReleaseReference

from .noise import from_grid
from .pooling import OwnerSummary
from .shards import HEADER_BYTES, Integers, Layout, decode, grid_steps, layouts, num_shards
from .stores import Store


@dataclass(frozen=True)
class GaussianRelease:
    """Noised images x̃/α_t0 = clip(x) + σ·z. images_NCHW: float32, [-1, 1] units; labels_N: int64 in 0..K-1;
    split_sigma: σ_t0, the standard deviation of the noise in images_NCHW."""

    images_NCHW: Tensor
    labels_N: Tensor
    split_step: int
    split_sigma: float


def read_release(
    store: Store,
    job_uid: str,
    reference: ReleaseReference,
    *,
    image: ImageSpec,
    num_classes: int,
    privacy: PrivacySpec,
    diffusion: DiffusionSpec,
) -> GaussianRelease | OwnerSummary:
    """What one client released under this job. Raises InputMissing if it is not there, DataInvalid, with the client's
    name, unless it is the very release that counts and everything it says of itself is what the job says."""
    who = f"release of client {reference.client}"
    promise = promise_of(privacy, diffusion)
    manifest = _manifest(store, job_uid, reference, who)
    _check_equal(who, "job", job_uid, manifest.job_uid)
    _check_equal(who, "client", reference.client, manifest.client)
    _check_equal(who, "privacy", privacy, manifest.privacy)
    _check_equal(who, "diffusion", diffusion, manifest.diffusion)
    _check_equal(who, "image", image, manifest.image)
    _check_equal(who, "number of classes", num_classes, len(manifest.counts))
    _check_grid(who, promise, diffusion, manifest)
    shards = _shards(store, manifest, who)
    if promise.mechanism is Mechanism.SUMMARY:
        return _summary(manifest, promise, shards)
    return _gaussian(manifest, promise, shards, who)


# ---- The manifest --------------------------------------------------------------------------------------------


def _manifest(store: Store, job_uid: str, reference: ReleaseReference, who: str) -> Manifest:
    key = layout.manifest(job_uid, reference.client)
    data = store.get(key)
    found = hashlib.sha256(data).hexdigest()
    if found != reference.manifest_sha256:
        raise DataInvalid(
            f"{who}: expected a manifest with SHA-256 {reference.manifest_sha256}, found {found};"
            " it was changed after its release, do not use it"
        )
    return Manifest.from_bytes(data, f"{who}: manifest")


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


# ---- The shards ----------------------------------------------------------------------------------------------


def _shards(store: Store, manifest: Manifest, who: str) -> list[dict[str, Integers]]:
    facts = manifest.privacy.mechanism, manifest.image, manifest.counts
    _check_equal(who, "number of shards", num_shards(*facts), len(manifest.shards))
    expected = layouts(*facts)
    for shard_layout, shard in zip(expected, manifest.shards, strict=True):
        _check_size(shard_layout, shard, who)
    return [_shard(store, manifest, *pair, who) for pair in zip(expected, manifest.shards, strict=True)]


def _shard(
    store: Store, manifest: Manifest, shard_layout: Layout, shard: ShardReference, who: str
) -> dict[str, Integers]:
    data = store.get(layout.released_shard(manifest.job_uid, manifest.client, shard.name))
    return decode(shard_layout, _verified(data, shard, who), f"{who}: {shard.name}")


def _check_size(shard_layout: Layout, shard: ShardReference, who: str) -> None:
    """Refuses before a single byte is fetched."""
    least = shard_layout.values_bytes
    if not least < shard.num_bytes <= least + 8 + HEADER_BYTES:
        raise DataInvalid(
            f"{who}: {shard.name}: expected {least} bytes of values and a header, found {shard.num_bytes} in all;"
            " do not use it"
        )


def _verified(data: bytes, shard: ShardReference, who: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if len(data) != shard.num_bytes or found != shard.sha256:
        raise DataInvalid(
            f"{who}: {shard.name}: expected {shard.num_bytes} bytes with SHA-256 {shard.sha256}, found {len(data)} with"
            f" {found}; it was damaged or changed, do not use it"
        )
    return data


# ---- What they hold ------------------------------------------------------------------------------------------


def _gaussian(manifest: Manifest, promise: Promise, shards: Sequence[dict[str, Integers]], who: str) -> GaussianRelease:
    labels_N = np.concatenate([shard["labels"] for shard in shards]).astype(np.int64)
    if labels_N.min(initial=0) < 0 or labels_N.max(initial=0) >= len(manifest.counts):
        raise DataInvalid(f"{who}: expected labels in 0..{len(manifest.counts) - 1}, found others; do not use it")
    found = tuple(np.bincount(labels_N, minlength=len(manifest.counts)).tolist())
    _check_equal(who, "images per class", manifest.counts, found)
    alpha = np.float32(schedule_of(manifest.diffusion).alpha(promise.split_step))
    images_NCHW = np.concatenate([_values(shard["images"], manifest.grid_steps.images) for shard in shards])
    images_NCHW /= alpha
    return GaussianRelease(
        torch.from_numpy(images_NCHW), torch.from_numpy(labels_N), promise.split_step, promise.split_sigma
    )


def _summary(manifest: Manifest, promise: Promise, shards: Sequence[dict[str, Integers]]) -> OwnerSummary:
    (sums,) = shards
    privacy, steps = manifest.privacy, manifest.grid_steps
    assert promise.mean_std is not None and promise.moment_std is not None and privacy.moment_clip_norm is not None
    return OwnerSummary(
        mean_sums_KD=torch.from_numpy(_values(sums["mean_sums"], steps.mean_sums)),
        moment_sums_KM=torch.from_numpy(_values(sums["moment_sums"], steps.moment_sums)),
        counts_K=torch.tensor(manifest.counts),
        mean_std=promise.mean_std,
        moment_std=promise.moment_std,
        moment_clip_norm=float(privacy.moment_clip_norm),
        centre=float(privacy.centre_or_default),
    )


def _values(cells: Integers, exponent: int | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.float64]]:
    assert exponent is not None
    return from_grid(cells, math.ldexp(1.0, exponent))
