"""The stage `release`: what leaves an owner, drawn once, sealed, then copied.

A second noisy copy of a record is a second release. So whatever happens to an attempt (a crash, a zombie, a full
disk), all that is ever sent is what the one seal in the owner's store names, byte for byte. On any doubt: 77.

There is no seed. Noise is an argument, `normals`, that no spec can reach.
"""

import hashlib
import math
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol import layout
from feddiff_protocol.api import Mechanism
from feddiff_protocol.errors import DataInvalid, FeddiffError, InputMissing, PrivacyRefusal, SpecInvalid
from feddiff_protocol.manifest import Manifest, Seal, ShardReference, shard_name, spec_sha256
from feddiff_protocol.promise import Promise, cap_of, check_size, promise_of, released_image, schedule_of
from feddiff_protocol.stages import ReleaseSpec

from .frequencies import frequency_map
from .mechanisms import Int64, release_gaussian_on_grid, release_summary, shuffled_order
from .noise import Float64, Normals, os_entropy_normals
from .privunit import release_privunit_on_grid
from .records import Records, digest_records, of_blocks, read_source
from .shards import Integers, encode, grid_steps, images_name, layouts
from .stage import report_progress, run_stage
from .stores import FAILURES, Store, check_creates_once, open_store


def body(spec: ReleaseSpec) -> dict[str, str]:
    """The receipt's outputs of a release from the spec's own stores, with the operating system's noise."""
    owner_store, federation_store = (
        open_store(spec.owner_store, "owner"),
        open_store(spec.federation_store, "federation"),
    )
    normals = os_entropy_normals()
    return {"manifest": release(spec, owner_store=owner_store, federation_store=federation_store, normals=normals)}


def release(spec: ReleaseSpec, *, owner_store: Store, federation_store: Store, normals: Normals) -> str:
    """SHA-256 of the manifest that now lies in the federation store: the same for every attempt.

    Raises SpecInvalid, DataInvalid, InputMissing before anything is drawn, PrivacyRefusal before anything is sent,
    and the stores' errors anywhere; another attempt then goes on from what this one left.
    """
    promise = promise_of(spec.privacy, spec.diffusion)
    _check_reach(spec, promise)
    check_size(spec.privacy, spec.image, spec.classes.count)
    progress = _Progress(spec)
    records = read_source(spec.source, spec.image, spec.classes, progress.read)
    records_sha256 = digest_records(records)
    check_creates_once(owner_store, layout.release_prefix(spec.release))
    check_creates_once(federation_store, layout.client_prefix(spec.job.uid, spec.client))
    # In this order: a seal exists before anything is sent, so what is seen here has one that is seen next.
    sent = _sent(federation_store, spec)
    seal = _read_seal(owner_store, spec.release)
    if seal is None:
        _refuse_if_sent(sent, federation_store)
        seal = _draw_and_seal(spec, promise, records, records_sha256, owner_store, normals)
    _check_seal(seal, spec, records_sha256)
    for shard in seal.shards:
        _sealed_bytes(owner_store, seal, shard)
    _delete_losing_attempts(owner_store, seal)
    progress.finished()
    return _send(spec, promise, seal, owner_store, federation_store)


class _Progress:
    """Images done, of those declared: each is read to be checked, then once, or twice for a summary, to be noised."""

    def __init__(self, spec: ReleaseSpec) -> None:
        self._num_images = sum(spec.classes.records)
        self._passes = 3 if spec.privacy.mechanism is Mechanism.SUMMARY else 2
        self._num_read = 0

    def read(self, num_images: int) -> None:
        self._num_read += num_images
        report_progress(min(self._num_read // self._passes, self._num_images - 1), self._num_images, "images")

    def finished(self) -> None:
        report_progress(self._num_images, self._num_images, "images")


# ---- Before anything is drawn --------------------------------------------------------------------------------


def _check_reach(spec: ReleaseSpec, promise: Promise) -> None:
    """Refuses noise so small that the values would not fit the integers of its grid and be cut off without a word."""
    largest, steps = _largest_values(spec, promise), grid_steps(promise, schedule_of(spec.diffusion))
    for name, (value, std, limit) in largest.items():
        if value + 9 * std > limit * math.ldexp(1.0, getattr(steps, name)):
            raise SpecInvalid(
                f"spec.privacy.epsilon: expected noise that hides more than the last digits of {name}, found {std:.3g}"
                f" on values of up to {value:.3g} at epsilon = {spec.privacy.epsilon}; lower epsilon"
            )


def _largest_values(spec: ReleaseSpec, promise: Promise) -> dict[str, tuple[float, float, int]]:
    """For each released tensor: largest size of a value before noise, the noise, the largest integer it may become."""
    if promise.mechanism is Mechanism.GAUSSIAN:
        schedule = schedule_of(spec.diffusion)
        alpha, s = schedule.alpha(promise.split_step), schedule.s(promise.split_step)
        return {"images": (alpha, s, np.iinfo(np.int16).max)}
    if promise.mechanism is Mechanism.PRIVUNIT:
        return {"directions": (1.0, 0.0, np.iinfo(np.int16).max)}  # of length 1, whatever the noise
    assert promise.mean_std is not None and promise.moment_std is not None and spec.privacy.moment_clip_norm is not None
    num_records, limit = max(spec.classes.records), np.iinfo(np.int32).max
    return {
        "mean_sums": (num_records * min(1.0, float(spec.privacy.clip_norm)), promise.mean_std, limit),
        "moment_sums": (num_records * float(spec.privacy.moment_clip_norm) ** 2, promise.moment_std, limit),
    }


def _sent(federation_store: Store, spec: ReleaseSpec) -> set[str]:
    """Keys of what this client has in the federation store, apart from what a killed probe left there."""
    keys = federation_store.list(layout.client_prefix(spec.job.uid, spec.client))
    return {key for key in keys if not key.rpartition("/")[2].startswith(layout.PROBE)}


def _refuse_if_sent(sent: set[str], federation_store: Store) -> None:
    if sent:
        raise PrivacyRefusal(
            f"store {federation_store.uri}: expected nothing of a release that has no seal, found {min(sent)}; it was"
            " sent before and its seal is lost, so drawing it anew would release twice: restore the owner's store"
        )


# ---- Draw and seal -------------------------------------------------------------------------------------------


def _draw_and_seal(
    spec: ReleaseSpec, promise: Promise, records: Records, records_sha256: str, owner_store: Store, normals: Normals
) -> Seal:
    """The seal that counts: this attempt's, or that of another one that was faster."""
    attempt = secrets.token_hex(16)
    try:
        shards = _write_shards(spec, promise, records, attempt, owner_store, normals)
    except FeddiffError:
        _delete_attempt(owner_store, spec.release, attempt)  # makes room; no seal can name it
        raise
    seal = Seal(
        release=spec.release,
        attempt=attempt,
        spec_sha256=spec_sha256(spec),
        records_sha256=records_sha256,
        shards=shards,
    )
    # From here on the attempt may be sealed even if this call fails, so its shards stay.
    owner_store.create(layout.seal(spec.release), seal.to_bytes())
    sealed = _read_seal(owner_store, spec.release)
    if sealed is None:
        raise PrivacyRefusal(f"store {owner_store.uri}: expected the seal just written, found none; nothing was sent")
    return sealed


def _write_shards(
    spec: ReleaseSpec, promise: Promise, records: Records, attempt: str, owner_store: Store, normals: Normals
) -> tuple[ShardReference, ...]:
    references = []
    for index, data in enumerate(shards_of(spec, promise, records, normals)):
        name = shard_name(index)
        owner_store.put(layout.attempt_shard(spec.release, attempt, name), data)
        references.append(ShardReference(name=name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data)))
    return tuple(references)


def shards_of(spec: ReleaseSpec, promise: Promise, records: Records, normals: Normals) -> Iterator[bytes]:
    """The released bytes, shard by shard, so that memory holds one of them. Nothing is written: see `release`."""
    if promise.mechanism is Mechanism.SUMMARY:
        yield _summary_shard(spec, promise, records, normals)
        return
    order_N, start, name = shuffled_order(len(records)), 0, images_name(promise.mechanism)
    for shard_layout in layouts(promise.mechanism, spec.image, spec.classes.records):
        shape_NCHW = shard_layout.tensors[name][1]
        rows_N = order_N[start : start + shape_NCHW[0]]
        cells_ND = _released_images(spec, promise, records, rows_N, normals)
        labels_N = records.labels_N[rows_N].astype(np.int32)
        yield encode(shard_layout, {name: cells_ND.reshape(shape_NCHW), "labels": labels_N})
        start += shape_NCHW[0]


def _released_images(
    spec: ReleaseSpec, promise: Promise, records: Records, rows_N: Int64, normals: Normals
) -> NDArray[np.int16]:
    """cells_ND of the records in these rows."""
    records, rows_N = records.in_memory(rows_N)
    if promise.mechanism is Mechanism.PRIVUNIT:
        return release_privunit_on_grid(records, rows_N, cap=cap_of(spec.privacy, spec.image), normals=normals)
    schedule = schedule_of(spec.diffusion)
    return release_gaussian_on_grid(
        records,
        rows_N,
        clip_norm=float(spec.privacy.clip_norm),
        non_negative=spec.privacy.clips_non_negative_pixels,
        alpha=schedule.alpha(promise.split_step),
        s=schedule.s(promise.split_step),
        normals=normals,
    )


def _summary_shard(spec: ReleaseSpec, promise: Promise, records: Records, normals: Normals) -> bytes:
    assert promise.mean_std is not None and promise.moment_std is not None and spec.privacy.moment_clip_norm is not None
    image = released_image(spec.privacy, spec.image)
    summary = release_summary(
        of_blocks(records, spec.privacy.block_side_or_one),
        records.labels_N,
        num_classes=spec.classes.count,
        mean_clip_norm=float(spec.privacy.clip_norm),
        moment_clip_norm=float(spec.privacy.moment_clip_norm),
        centre=float(spec.privacy.centre_or_default),
        mean_std=promise.mean_std,
        moment_std=promise.moment_std,
        normals=normals,
        map_DD=frequency_map(spec.privacy, image),
    )
    steps = grid_steps(promise, schedule_of(spec.diffusion))
    (shard_layout,) = layouts(promise.mechanism, image, spec.classes.records)
    sums = {"mean_sums": summary.mean_sums_KD, "moment_sums": summary.moment_sums_KM}
    return encode(shard_layout, {name: _cells(values, getattr(steps, name)) for name, values in sums.items()})


def _cells(values: Float64, exponent: int) -> Integers:
    """values/2**exponent as integers: they lie on that grid already."""
    scaled = np.ldexp(values, -exponent)
    cells = scaled.astype(np.int32)
    if not np.array_equal(cells, scaled):
        raise PrivacyRefusal("expected values on their public grid, found others; nothing was sent, report this")
    return cells


def _delete_attempt(owner_store: Store, release_name: str, attempt: str) -> None:
    with suppress(*FAILURES):  # the failure that brought us here is the one to report
        for key in owner_store.list(f"{layout.attempts_prefix(release_name)}{attempt}/"):
            owner_store.delete(key)


# ---- What is sealed ------------------------------------------------------------------------------------------


def _read_seal(owner_store: Store, release_name: str) -> Seal | None:
    """The release's seal, durable, or None if nobody has sealed it yet."""
    key = layout.seal(release_name)
    try:
        data = owner_store.get(key)
    except InputMissing:
        return None
    owner_store.create(key, data)  # its author may have died before it was durable; create's answer comes after
    try:
        return Seal.from_bytes(data, f"{owner_store.uri}/{key}")
    except DataInvalid as error:
        raise PrivacyRefusal(f"{error}: the seal is damaged and nothing was sent; restore the owner's store") from None


def _check_seal(seal: Seal, spec: ReleaseSpec, records_sha256: str) -> None:
    if seal.release != spec.release or seal.spec_sha256 != spec_sha256(spec):
        raise PrivacyRefusal(
            f"release {spec.release}: expected the spec it was sealed with, found another (privacy, diffusion, image or"
            " counts differ); nothing was sent; start a new job, which is charged anew"
        )
    if seal.records_sha256 != records_sha256:
        raise PrivacyRefusal(
            f"release {spec.release}: expected the records it was sealed with, found changed ones; nothing was sent;"
            " restore the records, or start a new job, which is charged anew"
        )


def _sealed_bytes(owner_store: Store, seal: Seal, shard: ShardReference) -> bytes:
    """The bytes of a sealed shard, if they are still those that were sealed."""
    key = layout.attempt_shard(seal.release, seal.attempt, shard.name)
    try:
        data = owner_store.get(key)
    except InputMissing as error:
        raise PrivacyRefusal(f"{error}: a sealed shard is gone; nothing was sent; restore the owner's store") from None
    _check_hash(data, shard.sha256, f"{owner_store.uri}/{key}", "restore the owner's store")
    return data


def _check_hash(data: bytes, sha256: str, where: str, advice: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PrivacyRefusal(f"{where}: expected SHA-256 {sha256} as sealed, found {found}; nothing was sent; {advice}")


def _delete_losing_attempts(owner_store: Store, seal: Seal) -> None:
    """Nothing is left of other attempts. Safe at any time after the seal: none of them can win any more."""
    winner = f"{layout.attempts_prefix(seal.release)}{seal.attempt}/"
    for key in owner_store.list(layout.attempts_prefix(seal.release)):
        if not key.startswith(winner):
            owner_store.delete(key)


# ---- Send ----------------------------------------------------------------------------------------------------


def _send(spec: ReleaseSpec, promise: Promise, seal: Seal, owner_store: Store, federation_store: Store) -> str:
    """Hash of the manifest; it and the sealed bytes are now in the federation store, as they may have been before."""
    manifest = _manifest(spec, promise, seal)
    _check_sent(spec, manifest, federation_store)
    for shard in manifest.shards:
        key = layout.released_shard(spec.job.uid, spec.client, shard.name)
        _create_or_equal(federation_store, key, _sealed_bytes(owner_store, seal, shard))
    _create_or_equal(federation_store, layout.manifest(spec.job.uid, spec.client), manifest.to_bytes())
    return manifest.sha256


def _manifest(spec: ReleaseSpec, promise: Promise, seal: Seal) -> Manifest:
    return Manifest(
        job_uid=spec.job.uid,
        client=spec.client,
        release=spec.release,
        privacy=spec.privacy,
        diffusion=spec.diffusion,
        image=spec.image,
        counts=spec.classes.records,
        grid_steps=grid_steps(promise, schedule_of(spec.diffusion)),
        shards=seal.shards,
    )


def _check_sent(spec: ReleaseSpec, manifest: Manifest, federation_store: Store) -> None:
    """Refuses before the first copy if anything that is there already is not what would be sent."""
    hashes = {layout.released_shard(spec.job.uid, spec.client, shard.name): shard.sha256 for shard in manifest.shards}
    hashes[layout.manifest(spec.job.uid, spec.client)] = manifest.sha256
    for key in sorted(_sent(federation_store, spec)):
        where = f"{federation_store.uri}/{key}"
        if key not in hashes:
            raise PrivacyRefusal(
                f"{where}: expected sealed objects alone, found this; nothing was sent; look who wrote it"
            )
        _check_hash(federation_store.get(key), hashes[key], where, "look who wrote it")


def _create_or_equal(store: Store, key: str, data: bytes) -> None:
    if not store.create(key, data):
        _check_hash(store.get(key), hashlib.sha256(data).hexdigest(), f"{store.uri}/{key}", "look who wrote it")


if __name__ == "__main__":
    sys.exit(run_stage(ReleaseSpec, body))
