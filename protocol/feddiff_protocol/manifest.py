"""What a release is, in writing: the seal that its owner keeps and the manifest that everybody reads.

Both are canonical JSON, so equal contents are equal bytes and a hash of the bytes is a hash of the contents. The
manifest holds public facts alone; the digest of the records stays in the seal, in the owner's store.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from .api import DiffusionSpec, ImageSpec, Name, PrivacySpec, Wire
from .errors import DataInvalid
from .stages import ReleaseSpec, Sha256

DOCUMENT_BYTES = 4 << 20  # far above 1000 classes and 10,000 shards
MAX_SHARDS = 10_000
MAX_SHARD_BYTES = 1 << 36

ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5}\.safetensors$")]


def shard_name(index: int) -> str:
    """Name of the shard that comes at `index`, counted from 0."""
    assert 0 <= index < MAX_SHARDS
    return f"shard-{index:05d}.safetensors"


class Document(Wire):
    """Base of what is hashed: one value, one text."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: ASCII, keys sorted, no spaces."""
        return canonical_json(self.to_wire())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """The document in `data`. Raises DataInvalid unless `data` is its canonical form, byte for byte."""
        if len(data) > DOCUMENT_BYTES:
            raise DataInvalid(f"{where}: expected at most {DOCUMENT_BYTES} bytes, found {len(data)}; do not use it")
        try:
            document = cls.model_validate(json.loads(data))
        except ValidationError as error:
            raise DataInvalid(f"{where}: not a {cls.__name__.lower()}: {_faults(error)}; do not use it") from None
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataInvalid(f"{where}: expected JSON, found bytes that are none ({reason}); do not use it") from None
        if document.to_bytes() != data:
            raise DataInvalid(f"{where}: expected canonical JSON, found another spelling of it; do not use it")
        return document


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value, as bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _faults(error: ValidationError) -> str:
    # The values themselves are left out: whoever wrote them may be hostile, and the line goes to a log.
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    lines = [f"{'.'.join(_printed(part) for part in fault['loc'])}: {fault['msg'][:200]}" for fault in faults[:5]]
    return ", ".join(lines)


def _printed(part: str | int) -> str:
    """A field's name as the author spelt it, but never as a line of its own."""
    return str(part)[:64].encode("unicode_escape").decode()


class ShardReference(Wire):
    """One file of released values: `name` below the client's shards, with the hash and size of its bytes."""

    name: ShardName
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=1, le=MAX_SHARD_BYTES)]


Shards = Annotated[tuple[ShardReference, ...], Field(min_length=1, max_length=MAX_SHARDS)]


def _check_names(shards: Sequence[ShardReference]) -> None:
    for index, shard in enumerate(shards):
        if shard.name != shard_name(index):
            raise ValueError(f"shards: expected {shard_name(index)} at place {index}, found {shard.name}")


class Seal(Document):
    """The attempt whose bytes are the release, for good. Lies in the owner's store and never leaves it."""

    format: Literal["feddiff.seal/1"] = "feddiff.seal/1"
    release: Annotated[str, Field(pattern=r"^prl-[0-9a-f]{40}$")]
    attempt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    spec_sha256: Sha256
    records_sha256: Sha256
    shards: Shards

    @model_validator(mode="after")
    def _shards_are_in_order(self) -> Self:
        _check_names(self.shards)
        return self


class GridSteps(Wire):
    """Base-2 exponents of the public grids: a released value is its integer times 2**exponent."""

    images: Annotated[int, Field(ge=-64, le=64)] | None = None  # gaussian: [-1, 1] units
    directions: Annotated[int, Field(ge=-64, le=64)] | None = None  # privunit: of the unit sphere
    mean_sums: Annotated[int, Field(ge=-64, le=64)] | None = None  # summary: [0, 1] units
    moment_sums: Annotated[int, Field(ge=-64, le=64)] | None = None  # summary: squared [0, 1] units


class Manifest(Document):
    """All that a release says about itself, every part of it known before the records were read."""

    format: Literal["feddiff.release/1"] = "feddiff.release/1"
    job_uid: Annotated[str, Field(pattern=r"^[a-z0-9-]{8,64}$")]
    client: Name
    release: Annotated[str, Field(pattern=r"^prl-[0-9a-f]{40}$")]
    privacy: PrivacySpec
    diffusion: DiffusionSpec
    image: ImageSpec
    counts: Annotated[tuple[Annotated[int, Field(ge=0, le=10**8)], ...], Field(min_length=1, max_length=1000)]
    grid_steps: GridSteps
    shards: Shards

    @model_validator(mode="after")
    def _shards_are_in_order(self) -> Self:
        _check_names(self.shards)
        return self


def spec_sha256(spec: ReleaseSpec) -> str:
    """Hash over what decides which values are released: the same for every attempt, wherever the stores are."""
    return hashlib.sha256(
        canonical_json(
            {
                "format": "feddiff.spec/1",
                "jobUid": spec.job.uid,
                "client": spec.client,
                "release": spec.release,
                "image": spec.image.to_wire(),
                "counts": list(spec.classes.records),
                "privacy": spec.privacy.to_wire(),
                "diffusion": spec.diffusion.to_wire(),
            }
        )
    ).hexdigest()
