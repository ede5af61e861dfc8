import json
from decimal import Decimal

import pytest

from feddiff_protocol.api import ClassesSpec, DiffusionSpec, ImageSpec, Mechanism, PrivacySpec, SourceSpec
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.manifest import GridSteps, Manifest, Seal, ShardReference, shard_name, spec_sha256
from feddiff_protocol.stages import JobReference, ReleaseSpec

RELEASE = "prl-" + "a" * 40


def shard(index: int = 0, **changes: object) -> dict[str, object]:
    return {"name": shard_name(index), "sha256": "0" * 64, "numBytes": 10} | changes


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "jobUid": "uid-12345678",
        "client": "a",
        "release": RELEASE,
        "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"},
        "diffusion": {},
        "image": {"channels": 1, "height": 8, "width": 8},
        "counts": [5, 7],
        "gridSteps": {"images": -8},
        "shards": [shard()],
    }
    return Manifest.model_validate(fields | changes)


def spec(**changes: object) -> ReleaseSpec:
    fields: dict[str, object] = {
        "job": JobReference(uid="uid-12345678", name="digits", namespace="research"),
        "attempt": 1,
        "client": "a",
        "release": RELEASE,
        "source": SourceSpec(format="npz", path="train.npz"),
        "image": ImageSpec(channels=1, height=8, width=8),
        "classes": ClassesSpec(count=2, records=(5, 7)),
        "privacy": PrivacySpec(
            mechanism=Mechanism.GAUSSIAN, epsilon=Decimal(10), delta=Decimal("1e-5"), clip_norm=Decimal("4.25")
        ),
        "diffusion": DiffusionSpec(),
        "owner_store": "file:///owner",
        "federation_store": "file:///federation",
    }
    return ReleaseSpec(**(fields | changes))


def test_equal_manifests_are_equal_bytes_and_come_back_from_them() -> None:
    data = manifest().to_bytes()
    assert data == manifest().to_bytes()
    assert Manifest.from_bytes(data, "a") == manifest()
    assert Manifest.from_bytes(data, "a").sha256 == manifest().sha256


def test_manifest_has_no_field_that_depends_on_the_records() -> None:
    allowed = {"format", "job_uid", "client", "release", "privacy", "diffusion", "image", "counts", "grid_steps"}
    assert set(Manifest.model_fields) == allowed | {"shards"}
    assert set(ShardReference.model_fields) == {"name", "sha256", "num_bytes"}
    assert set(GridSteps.model_fields) == {"images", "directions", "mean_sums", "moment_sums"}


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {"mechanism": "gaussian", "epsilon": "11", "delta": "1e-5", "clipNorm": "4.25"}},
        {"counts": [5, 8]},
        {"gridSteps": {"images": -7}},
        {"client": "b"},
        {"shards": [shard(sha256="1" * 64)]},
    ],
)
def test_any_change_changes_the_hash(changes: dict[str, object]) -> None:
    assert manifest(**changes).sha256 != manifest().sha256


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("no JSON", b"\x80\x04K\x01."),
        ("deep nesting", b"[" * 100_000),
        ("another type", b"[]"),
        ("NaN", b'{"format": NaN}'),
        ("spaces", json.dumps(manifest().to_wire(), sort_keys=True).encode()),
        ("a key twice", manifest().to_bytes().replace(b'"client":"a"', b'"client":"b","client":"a"')),
        ("unknown field", manifest().to_bytes().replace(b'"client"', b'"extra":1,"client"')),
        ("no shards", manifest().to_bytes()[:-1]),
        ("huge", b" " * (5 << 20)),
        ("path trick", manifest().to_bytes().replace(b"shard-00000.safetensors", b"../../x.safetensors")),
        ("absolute path", manifest().to_bytes().replace(b"shard-00000.safetensors", b"/etc/passwd")),
        ("pickle", manifest().to_bytes().replace(b"shard-00000.safetensors", b"shard-00000.pickle")),
        ("a million records per digit", manifest().to_bytes().replace(b"[5,7]", b"[1000000000,7]")),
        ("negative size", manifest().to_bytes().replace(b'"numBytes":10', b'"numBytes":-10')),
        ("another format", manifest().to_bytes().replace(b"feddiff.release/1", b"feddiff.release/2")),
    ],
)
def test_hostile_manifest_is_one_line_of_refusal(name: str, data: bytes) -> None:
    with pytest.raises(DataInvalid) as refusal:
        Manifest.from_bytes(data, "manifest of client a")
    assert str(refusal.value).startswith("manifest of client a: ")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("indices", [(1,), (0, 0), (0, 2), (1, 0)])
def test_shards_are_named_by_their_place(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at place"):
        manifest(shards=[shard(index) for index in indices])
    with pytest.raises(ValueError, match="at place"):
        Seal.model_validate(
            {
                "release": RELEASE,
                "attempt": "0" * 32,
                "specSha256": "0" * 64,
                "recordsSha256": "0" * 64,
                "shards": [shard(index) for index in indices],
            }
        )


def test_spec_hash_is_the_same_for_every_attempt_and_place() -> None:
    elsewhere = spec(
        attempt=7,
        owner_store="s3://owner/x",
        federation_store="s3://federation/x",
        source=SourceSpec(format="npz", path="/mnt/train.npz"),
        job=JobReference(uid="uid-12345678", name="renamed", namespace="elsewhere"),
    )
    assert spec_sha256(elsewhere) == spec_sha256(spec())


@pytest.mark.parametrize(
    "changes",
    [
        {"client": "b"},
        {"release": "prl-" + "b" * 40},
        {"job": JobReference(uid="uid-87654321", name="digits", namespace="research")},
        {"image": ImageSpec(channels=1, height=8, width=9)},
        {"classes": ClassesSpec(count=2, records=(5, 8))},
        {"diffusion": DiffusionSpec(steps=999)},
        {"privacy": spec().privacy.model_copy(update={"epsilon": Decimal(11)})},
        {"privacy": spec().privacy.model_copy(update={"clip_norm": Decimal("4.26")})},
    ],
)
def test_spec_hash_changes_with_what_is_released(changes: dict[str, object]) -> None:
    assert spec_sha256(spec(**changes)) != spec_sha256(spec())
