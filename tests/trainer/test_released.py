import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feddiff_protocol import layout
from feddiff_protocol.api import ClassesSpec, DiffusionSpec, ImageSpec, Mechanism, PrivacySpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_protocol.manifest import Manifest
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_protocol.stages import JobReference, ReleaseReference, ReleaseSpec
from feddiff_trainer import released, shards
from feddiff_trainer.fetching import AT_ONCE
from feddiff_trainer.frequencies import frequency_weighing
from feddiff_trainer.mechanisms import centres, pack_symmetric
from feddiff_trainer.pooling import OwnerSummary
from feddiff_trainer.release import release
from feddiff_trainer.released import GaussianRelease, PrivunitRelease, Release, Terms, read_releases
from feddiff_trainer.stores import FolderStore

UID, CLIENT = "uid-12345678", "a"
IMAGE = ImageSpec(channels=1, height=4, width=4)
COUNTS = (30, 7)
FIRST = "shard-00000.safetensors"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16 * (2 * 16 + 4))  # 37 images make shards of 16, 16 and 5


def privacy(mechanism: str, **changes: Any) -> PrivacySpec:
    fields: dict[str, Any] = {"epsilon": Decimal(10), "clip_norm": Decimal(2)}
    if mechanism != "privunit":
        fields["delta"] = Decimal("1e-5")
    if mechanism == "summary":
        fields["moment_clip_norm"] = Decimal("1.5")
    return PrivacySpec(mechanism=Mechanism(mechanism), **(fields | changes))


def diffusion(mechanism: str) -> DiffusionSpec:
    return DiffusionSpec(split_sigma=None if mechanism == "gaussian" else Decimal("0.25"))


class Released:
    """One release in a folder, and what its reader was told."""

    def __init__(self, folder: Path, mechanism: str, normals: Callable[[tuple[int, ...]], Any], **changes: Any) -> None:
        generator = np.random.default_rng(0)
        self.images_ND, self.labels_N = generator.uniform(0, 1, (37, 16)), np.repeat([0, 1], COUNTS)
        np.savez(folder / "train.npz", images=self.images_ND.reshape(37, 4, 4), labels=self.labels_N)
        self.privacy, self.diffusion = privacy(mechanism, **changes), diffusion(mechanism)
        self.promise = promise_of(self.privacy, self.diffusion)
        owner, self.store = FolderStore(f"file://{folder}/owner"), FolderStore(f"file://{folder}/federation")
        spec = ReleaseSpec(
            job=JobReference(uid=UID, name="digits", namespace="research"),
            attempt=1,
            client=CLIENT,
            release=layout.release_name(UID, CLIENT, "dataset"),
            source=SourceSpec(format="npz", path=str(folder / "train.npz")),
            image=IMAGE,
            classes=ClassesSpec(count=2, records=COUNTS),
            privacy=self.privacy,
            diffusion=self.diffusion,
            owner_store=owner.uri,
            federation_store=self.store.uri,
        )
        self.sha256 = release(spec, owner_store=owner, federation_store=self.store, normals=normals)

    @property
    def reference(self) -> ReleaseReference:
        return ReleaseReference(client=CLIENT, manifest_sha256=self.sha256)

    def terms(self, **changes: Any) -> Terms:
        told: dict[str, Any] = {
            "job_uid": UID,
            "image": IMAGE,
            "num_classes": 2,
            "privacy": self.privacy,
            "diffusion": self.diffusion,
        }
        return Terms(**(told | changes))

    def read(self, **changes: Any) -> Release:
        reference = changes.pop("reference", self.reference)
        (read,) = read_releases(self.store, [reference], self.terms(**changes))
        return read

    def replace_manifest(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """A manifest that its author changed before the planner heard of it."""
        document = json.loads(self.store.get(layout.manifest(UID, CLIENT)))
        change(document)
        data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        self.store.put(layout.manifest(UID, CLIENT), data)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def replace_shard(self, data: bytes) -> None:
        """A first shard that its author made, with a manifest that agrees."""
        self.store.put(layout.released_shard(UID, CLIENT, FIRST), data)

        def describe(document: dict[str, Any]) -> None:
            document["shards"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "numBytes": len(data)}

        self.replace_manifest(describe)

    def shard(self) -> bytes:
        return self.store.get(shard_key(FIRST))


def shard_key(name: str) -> str:
    return layout.released_shard(UID, CLIENT, name)


@pytest.fixture
def gaussian(tmp_path: Path) -> Released:
    return Released(tmp_path, "gaussian", np.random.default_rng(1).standard_normal)


@pytest.fixture
def summary(tmp_path: Path) -> Released:
    return Released(tmp_path, "summary", np.random.default_rng(1).standard_normal)


def clipped(x_ND: Any, norm: float) -> Any:
    return x_ND * np.minimum(1, norm / np.linalg.norm(x_ND, axis=1))[:, None]


# ---- What comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["gaussian", "summary"])
def test_releases_are_fetched_as_they_are_used_so_that_no_memory_has_to_hold_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    one, fetched = Released(tmp_path, mechanism, np.random.default_rng(1).standard_normal), []
    fetch = released._shard_bytes
    monkeypatch.setattr(released, "_shard_bytes", lambda *what: fetched.append(what) or fetch(*what))
    releases = read_releases(one.store, [one.reference] * 20, one.terms())
    assert releases.num_records == 20 * 37 and not fetched
    num_shards, num_used = 3 if mechanism == "gaussian" else 1, 0
    for _ in releases:
        num_used += num_shards
        assert len(fetched) <= num_used + AT_ONCE
    assert len(fetched) == 20 * num_shards


def test_noised_images_come_back_in_signal_units_with_their_labels(tmp_path: Path) -> None:
    noiseless = Released(tmp_path, "gaussian", np.zeros)
    read = noiseless.read()
    assert isinstance(read, GaussianRelease)
    assert (read.images_NCHW.dtype, read.images_NCHW.shape) == (torch.float32, (37, 1, 4, 4))
    assert read.labels_N.dtype == torch.int64
    expected_ND = 2 * clipped(noiseless.images_ND, 2.0) - 1
    distance_NN = np.abs(read.images_NCHW.numpy().reshape(37, 1, 16) - expected_ND[None]).max(axis=2)
    # Rounding to the grid moves a value by half a step, at most σ/512 after dividing by α.
    assert distance_NN.min(axis=1).max() <= read.split_sigma / 512 * 1.01
    assert sorted(distance_NN.argmin(axis=1)) == list(range(37))
    assert (noiseless.labels_N[distance_NN.argmin(axis=1)] == read.labels_N.numpy()).all()


def test_noise_that_comes_back_has_the_splits_standard_deviation(gaussian: Released) -> None:
    read = gaussian.read()
    assert isinstance(read, GaussianRelease)
    assert (read.split_step, read.split_sigma) == (gaussian.promise.split_step, gaussian.promise.split_sigma)
    assert read.split_sigma == schedule_of(gaussian.diffusion).sigma(read.split_step)
    # Images lie within ±1 and σ is above 2: of 592 numbers the deviation is within 10 % with 3.4 standard errors.
    residual = read.images_NCHW.double().numpy() - (2 * clipped(gaussian.images_ND, 2.0) - 1).mean()
    assert np.std(residual) == pytest.approx(np.hypot(read.split_sigma, 0.35), rel=0.1)


def test_summary_comes_back_with_its_public_constants(tmp_path: Path) -> None:
    noiseless = Released(tmp_path, "summary", np.zeros)
    read = noiseless.read()
    assert isinstance(read, OwnerSummary)
    assert (read.mean_std, read.moment_std) == (noiseless.promise.mean_std, noiseless.promise.moment_std)
    assert (read.moment_clip_norm, read.centre, read.counts_K.tolist()) == (1.5, 0.5, list(COUNTS))
    assert read.mean_sums_KD.dtype == read.moment_sums_KM.dtype == torch.float64
    sums_KD = np.stack([clipped(noiseless.images_ND[noiseless.labels_N == k], 2.0).sum(axis=0) for k in range(2)])
    np.testing.assert_allclose(read.mean_sums_KD, sums_KD, atol=read.mean_std / 512)
    # The centre is that of the numbers released, so that S2 given S1 is one mechanism.
    centres_KD = centres(read.mean_sums_KD.numpy(), np.array(COUNTS), 0.5)
    for k in range(2):
        u_ND = clipped(noiseless.images_ND[noiseless.labels_N == k] - centres_KD[k], 1.5)
        np.testing.assert_allclose(read.moment_sums_KM[k], pack_symmetric(u_ND.T @ u_ND), atol=read.moment_std / 512)


def test_a_summary_that_was_mapped_comes_back_with_its_map(tmp_path: Path) -> None:
    """The clip comes last, so that what is noised has norm 1.5 at most."""
    weighed = Released(tmp_path, "summary", np.zeros, frequency_power=Decimal("0.5"))
    read = weighed.read()
    assert isinstance(read, OwnerSummary) and read.map_DD is not None
    map_DD = frequency_weighing(0.5, 1, 4, 4)
    np.testing.assert_array_equal(read.map_DD, map_DD)
    centres_KD = centres(read.mean_sums_KD.numpy(), np.array(COUNTS), 0.5)
    for k in range(2):
        u_ND = clipped((weighed.images_ND[weighed.labels_N == k] - centres_KD[k]) @ map_DD, 1.5)
        np.testing.assert_allclose(read.moment_sums_KM[k], pack_symmetric(u_ND.T @ u_ND), atol=read.moment_std / 512)


def test_a_summary_of_squares_is_that_of_their_means(tmp_path: Path) -> None:
    """Norms, centre and noise are of the four means; nothing of an image is released but through them."""
    coarse = Released(tmp_path, "summary", np.zeros, block_side=2, clip_norm=Decimal("1.2"))
    read = coarse.read()
    assert isinstance(read, OwnerSummary)
    squares_ND = coarse.images_ND.reshape(37, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(37, 4)
    sums_KD = np.stack([clipped(squares_ND[coarse.labels_N == k], 1.2).sum(axis=0) for k in range(2)])
    np.testing.assert_allclose(read.mean_sums_KD, sums_KD, atol=read.mean_std / 512)
    centres_KD = centres(read.mean_sums_KD.numpy(), np.array(COUNTS), 0.5)
    for k in range(2):
        u_ND = clipped(squares_ND[coarse.labels_N == k] - centres_KD[k], 1.5)
        np.testing.assert_allclose(read.moment_sums_KM[k], pack_symmetric(u_ND.T @ u_ND), atol=read.moment_std / 512)


def test_summary_lies_on_its_public_grid(summary: Released) -> None:
    read = summary.read()
    assert isinstance(read, OwnerSummary)
    steps = Manifest.from_bytes(summary.store.get(layout.manifest(UID, CLIENT)), "manifest").grid_steps
    assert steps.mean_sums is not None and steps.moment_sums is not None
    for released_values, exponent in ((read.mean_sums_KD, steps.mean_sums), (read.moment_sums_KM, steps.moment_sums)):
        cells = np.ldexp(released_values.numpy(), -exponent)
        assert (np.rint(cells) == cells).all()


def test_directions_come_back_as_images_of_the_public_norm_without_bias(tmp_path: Path) -> None:
    directed = Released(tmp_path, "privunit", np.random.default_rng(2).standard_normal)
    read = directed.read()
    assert isinstance(read, PrivunitRelease)
    cap = best_cap(10.0, 16)
    assert (read.images_NCHW.dtype, read.images_NCHW.shape) == (torch.float32, (37, 1, 4, 4))
    assert read.noise_std == cap.noise_std(2.0) and read.num_classes == 2
    assert sorted(read.labels_N.tolist()) == directed.labels_N.tolist()
    norms_N = read.images_NCHW.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms_N, torch.full_like(norms_N, 2 / cap.mean), rtol=1e-3, atol=0)
    # White noise of this deviation about images of norm 2: the mean of all is within five standard errors.
    u_ND = directed.images_ND / np.linalg.norm(directed.images_ND, axis=1)[:, None]
    apart_D = read.images_NCHW.flatten(1).double().numpy().mean(axis=0) - 2 * u_ND.mean(axis=0)
    assert np.abs(apart_D).max() < 5 * read.noise_std / np.sqrt(37)


# ---- Not the release that counts -----------------------------------------------------------------------------


def test_manifest_with_another_hash_is_refused(gaussian: Released) -> None:
    with pytest.raises(DataInvalid, match="release of client a: expected a manifest with SHA-256"):
        gaussian.read(reference=ReleaseReference(client=CLIENT, manifest_sha256="0" * 64))


def test_mutant_that_does_not_compare_the_hash_is_found(gaussian: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "read_hashed", lambda store, key, _: (store.get(key), "0" * 64))
    monkeypatch.setattr(released, "_shard_bytes", lambda store, manifest, shard: store.get(shard_key(shard.name)))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_manifest_with_another_hash_is_refused(gaussian)


def test_release_that_is_not_there_is_input_missing(gaussian: Released) -> None:
    with pytest.raises(InputMissing):
        gaussian.read(reference=ReleaseReference(client="b", manifest_sha256="0" * 64))
    gaussian.store.delete(layout.released_shard(UID, CLIENT, "shard-00002.safetensors"))
    with pytest.raises(InputMissing, match="shard-00002"):
        gaussian.read()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("image", {"image": ImageSpec(channels=1, height=4, width=8)}),
        ("number of classes", {"num_classes": 3}),
        ("privacy", {"privacy": privacy("gaussian", epsilon=Decimal(11))}),
        ("privacy", {"privacy": privacy("gaussian", clip_norm=Decimal(3))}),
        ("diffusion", {"diffusion": DiffusionSpec(steps=2000)}),
        ("privacy", {"privacy": privacy("summary"), "diffusion": diffusion("summary")}),
        ("privacy", {"privacy": privacy("privunit"), "diffusion": diffusion("privunit")}),
    ],
)
def test_release_that_differs_from_the_job_is_refused(gaussian: Released, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DataInvalid, match=f"release of client a: {name}: expected .* as the job says"):
        gaussian.read(**changes)


@pytest.mark.parametrize(("field", "value", "name"), [("jobUid", "uid-87654321", "job"), ("client", "b", "client")])
def test_manifest_of_another_job_or_client_is_refused(gaussian: Released, field: str, value: str, name: str) -> None:
    gaussian.replace_manifest(lambda document: document.update({field: value}))
    with pytest.raises(DataInvalid, match=f"release of client a: {name}: expected"):
        gaussian.read()


# ---- Hostile authors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("coarse grid", lambda d: d["gridSteps"].update(images=5), "grid of images"),
        ("other grid", lambda d: d["gridSteps"].update(meanSums=-5), "grid of mean_sums"),
        ("another mechanism's grid", lambda d: d["gridSteps"].update(directions=-14), "grid of directions"),
        ("no grid", lambda d: d["gridSteps"].clear(), "grid of images"),
        ("one shard fewer", lambda d: d["shards"].pop(), "number of shards"),
        ("more images", lambda d: d.update(counts=[10**8, 7]), "number of shards"),
        ("other counts", lambda d: d.update(counts=[29, 8]), "images per class"),
        ("huge shard", lambda d: d["shards"][0].update(numBytes=1 << 30), "bytes of values"),
        ("path trick", lambda d: d["shards"][0].update(name="../../b/shards/shard-00000.safetensors"), "manifest"),
        ("absolute path", lambda d: d["shards"][0].update(name="/etc/passwd"), "manifest"),
        ("look-alike", lambda d: d["shards"][0].update(name="shard-0000٠.safetensors"), "manifest"),
        ("two dots that are one", lambda d: d["shards"][0].update(name="\u2025/shard-00000.safetensors"), "manifest"),
        ("hidden by a null", lambda d: d["shards"][0].update(name="shard-00000.safetensors\0"), "manifest"),
        ("name and a line more", lambda d: d["shards"][0].update(name=f"{FIRST}\n"), "manifest"),
        ("client elsewhere", lambda d: d.update(client="../b"), "manifest"),
        ("unknown field", lambda d: d.update(extra=1), "manifest"),
        ("forged line in a field", lambda d: d.update({"\nfeddiff: all is well": 1}), "manifest"),
        ("not a number", lambda d: d["gridSteps"].update(images=float("nan")), "manifest"),
        ("number of many digits", lambda d: d["shards"][0].update(numBytes=10**4000), "manifest"),
    ],
)
def test_hostile_manifest_is_refused_with_the_clients_name(
    gaussian: Released, name: str, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    gaussian.replace_manifest(change)
    refused_without_a_trace(gaussian, says)


def refused_without_a_trace(hostile: Released, says: str) -> None:
    """Exit code 65 and one short line that names the client; the store is as it was."""
    before = {key: hostile.store.get(key) for key in hostile.store.list(f"{UID}/")}
    with pytest.raises(DataInvalid, match=f"release of client a: .*{says}") as refusal:
        hostile.read()
    assert refusal.value.exit_code == 65
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000
    assert {key: hostile.store.get(key) for key in hostile.store.list(f"{UID}/")} == before


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("pickle", pickle.dumps({"jobUid": UID}), "expected JSON"),
        ("nothing", b"", "expected JSON"),
        ("nested too deep", b"[" * 100_000, "expected JSON"),
        ("UTF-16", '{"jobUid": "x"}'.encode("utf-16"), "manifest"),
        ("longer than any manifest", b"[" + b" " * (5 << 20) + b"]", "found more"),
    ],
)
def test_manifest_of_other_bytes_is_refused(gaussian: Released, name: str, data: bytes, says: str) -> None:
    gaussian.store.put(layout.manifest(UID, CLIENT), data)
    gaussian.sha256 = hashlib.sha256(data).hexdigest()
    refused_without_a_trace(gaussian, says)


def test_manifest_of_another_release_is_refused_with_its_own_hash(gaussian: Released, tmp_path: Path) -> None:
    """The client's own manifest of an earlier job, which the planner was told of for this one."""
    gaussian.replace_manifest(lambda document: document.update(jobUid="uid-00000000"))
    refused_without_a_trace(gaussian, "job: expected uid-12345678")


def test_object_longer_than_its_manifest_says_is_not_read_to_its_end(
    gaussian: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = iter(range(10**6))
    stream = gaussian.store.stream

    def endless(key: str) -> Iterator[bytes]:
        yield from stream(key)
        for _ in pieces if key.endswith(FIRST) else ():
            yield bytes(100)

    monkeypatch.setattr(gaussian.store, "stream", endless)
    refused_without_a_trace(gaussian, f"{FIRST}: expected at most .* bytes, found more")
    assert next(pieces) < 10


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def swapped(header: dict[str, Any]) -> None:
    header["images"], header["labels"] = header["labels"], header["images"]


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("header longer than the file", lambda d: (1 << 60).to_bytes(8, "little") + d[8:], "a header of 2 to 4096"),
        ("header of no length", lambda d: bytes(8) + d[8:], "a header of 2 to 4096"),
        ("header that is no JSON", lambda d: d[:8] + b"\xff" * int.from_bytes(d[:8], "little") + d[-576:], "JSON"),
        ("header that is a list", lambda d: (2).to_bytes(8, "little") + b"[]" + d[-576:], "names tensors"),
        ("nested header", lambda d: (4096).to_bytes(8, "little") + b"[" * 4096 + d[-576:], "JSON"),
        ("tensor too many", lambda d: with_header(d, lambda h: h.update(more=h["labels"])), "tensors images, labels"),
        ("metadata", lambda d: with_header(d, lambda h: h.update(__metadata__={})), "tensors images, labels"),
        ("tensor missing", lambda d: with_header(d, lambda h: h.pop("labels")), "tensors images, labels"),
        ("tensors swapped", lambda d: with_header(d, swapped), "of shape"),
        ("other dtype", lambda d: with_header(d, lambda h: h["images"].update(dtype="F16")), "I16 of shape"),
        ("other shape", lambda d: with_header(d, lambda h: h["images"].update(shape=[16, 1, 2, 8])), "I16 of shape"),
        ("forged line in a name", lambda d: with_header(d, lambda h: h.update({"\n\x1b[2Kok": {}})), "tensors images"),
        ("half a character", lambda d: with_header(d, lambda h: h.update({"\ud800": {}})), "tensors images"),
        ("forged line in a type", lambda d: with_header(d, lambda h: h["images"].update(dtype="\nok")), "I16 of shape"),
        ("size of many digits", lambda d: with_header(d, lambda h: h["images"].update(shape=[10**3000])), "I16 of"),
        ("huge shape", lambda d: with_header(d, lambda h: h["images"].update(shape=[1 << 62])), "I16 of shape"),
        ("overlap", lambda d: with_header(d, lambda h: h["images"].update(data_offsets=[0, 512])), "follow each other"),
        ("negative", lambda d: with_header(d, lambda h: h["images"].update(data_offsets=[-512, 0])), "offsets"),
        ("no numbers", lambda d: with_header(d, lambda h: h["images"].update(data_offsets="x")), "offsets"),
        ("entry that is none", lambda d: with_header(d, lambda h: h.update(images=5)), "dtype, shape and data_offsets"),
        ("bytes too many", lambda d: d + b"x", "576 bytes of values"),
        ("pickle", lambda d: b"\x80\x04\x95" + d, "a header of 2 to 4096"),
        ("pickle that torch.load would run", lambda d: pickle.dumps(list(d)[:600]).ljust(len(d), b"."), "a header of"),
        ("empty", lambda d: b"x", "bytes of values and a header"),
        ("label outside", lambda d: d[:-576] + np.full(16, 2, "<i4").tobytes() + d[-512:], "labels in 0..1"),
    ],
)
def test_hostile_shard_is_refused_with_the_clients_name(
    gaussian: Released, name: str, make: Callable[[bytes], bytes], says: str
) -> None:
    gaussian.replace_shard(make(gaussian.shard()))
    refused_without_a_trace(gaussian, says)


@pytest.mark.parametrize("index", [0, 8, 200, -1])
def test_changed_byte_is_refused(gaussian: Released, index: int) -> None:
    data = bytearray(gaussian.shard())
    data[index] ^= 1
    gaussian.store.put(layout.released_shard(UID, CLIENT, FIRST), bytes(data))
    with pytest.raises(DataInvalid, match=r"release of client a: shard-00000\.safetensors: .* damaged or changed"):
        gaussian.read()


def test_truncated_shard_is_refused(gaussian: Released) -> None:
    gaussian.store.put(layout.released_shard(UID, CLIENT, FIRST), gaussian.shard()[:-1])
    with pytest.raises(DataInvalid, match="damaged or changed"):
        gaussian.read()


def test_oversized_shard_is_refused_before_it_is_fetched(gaussian: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    gaussian.replace_manifest(lambda document: document["shards"][2].update(numBytes=1 << 35))
    fetched: list[str] = []
    stream = gaussian.store.stream
    monkeypatch.setattr(gaussian.store, "stream", lambda key: (fetched.append(key), stream(key))[1])
    with pytest.raises(DataInvalid, match="shard-00002"):
        gaussian.read()
    assert fetched == [layout.manifest(UID, CLIENT)]


def test_shard_written_by_safetensors_itself_is_read(gaussian: Released) -> None:
    import safetensors.numpy

    tensors = safetensors.numpy.load(gaussian.shard())
    gaussian.replace_shard(safetensors.numpy.save(dict(reversed(tensors.items()))))
    gaussian.read()
