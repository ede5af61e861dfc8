"""What a data owner should know about its records before it offers them: `python -m feddiff_trainer.check SPEC.json`.

The answer, one JSON object on stdout, is computed from the records without noise: it is private to their owner.

Shapes: N records, D values of one image, K classes.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol.api import ClassesSpec, ImageSpec, Mechanism, PrivacySpec, SourceSpec, Wire
from feddiff_protocol.promise import CENTRED_FROM, released_image

from .answering import answered
from .frequencies import frequency_map
from .inception import read_inception
from .pictures import to_pixels
from .records import Records, of_blocks, read_records
from .shards import layouts

ROWS = 1024  # records at a time
QUANTILES = {"min": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "99 %": 0.99, "max": 1.0}


class CheckSpec(Wire):
    """A dataset's description, and the promise whose clip norms should be tried."""

    source: SourceSpec
    image: ImageSpec
    classes: ClassesSpec
    privacy: PrivacySpec | None = None


def check(spec: CheckSpec) -> dict[str, Any]:
    """Records per class against the declaration, pixel range, norms, and what a job's clip norms would touch.

    Raises DataInvalid or InputMissing when the records cannot be read as described, or an Inception network that the
    dataset names cannot be had or gives no features.
    """
    records = _read(spec)
    found_K = np.bincount(records.labels_N, minlength=spec.classes.count)
    norms_N, pixel_range = _norms_and_range(records)
    answer: dict[str, Any] = {
        "records": len(records),
        "classes": [
            {"class": k, "declared": declared, "found": int(found_K[k])}
            for k, declared in enumerate(spec.classes.records)
        ],
        "pixelRange": pixel_range,
        "normQuantiles": {name: float(np.quantile(norms_N, share)) for name, share in QUANTILES.items()},
        "clips": [],
    }
    if spec.privacy is not None:
        answer |= {
            "clips": _clips(records, norms_N, spec.privacy, spec.image),
            "released": _released(spec, spec.privacy),
        }
    if (inception := read_inception(spec.source, spec.image)) is not None:
        shape_CHW = (spec.image.channels, spec.image.height, spec.image.width)
        inception.features(to_pixels(records[:1]).reshape(-1, *shape_CHW))
        answer["inception"] = inception.described
    return answer


def _read(spec: CheckSpec) -> Records:
    source = spec.source
    return read_records(
        source.format.value,
        Path(source.path),
        labels_path=Path(source.labels_path) if source.labels_path else None,
        channels=spec.image.channels,
        height=spec.image.height,
        width=spec.image.width,
        num_classes=spec.classes.count,
        class_names=spec.classes.names,
    )


def _batches(records: Records) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Rows and their pixels_ND in [0, 1]."""
    for start in range(0, len(records), ROWS):
        rows = slice(start, min(start + ROWS, len(records)))
        yield rows, records[rows]


def _norms_and_range(records: Records) -> tuple[NDArray[np.float64], list[float]]:
    """In one pass, since files are read anew in each."""
    norms, low, high = [], math.inf, -math.inf
    for _, pixels_ND in _batches(records):
        norms.append(np.linalg.norm(pixels_ND, axis=1))
        low, high = min(low, float(pixels_ND.min())), max(high, float(pixels_ND.max()))
    return np.concatenate(norms), [low, high]


def _clips(
    records: Records, norms_N: NDArray[np.float64], privacy: PrivacySpec, image: ImageSpec
) -> list[dict[str, Any]]:
    """How many images each of the job's clip norms would scale down; privunit scales the others up."""
    clipped_N, image = norms_N, released_image(privacy, image)
    if privacy.block_side is not None:
        records = of_blocks(records, privacy.block_side)
        clipped_N, _ = _norms_and_range(records)
    if not privacy.clips_non_negative_pixels:
        clipped_N = np.concatenate([np.linalg.norm(2 * pixels_ND - 1, axis=1) for _, pixels_ND in _batches(records)])
    clips = [_clip("clipNorm", str(privacy.clip_norm), clipped_N)]
    if privacy.mechanism is Mechanism.PRIVUNIT:
        clips[0]["raised"] = int((clipped_N < float(privacy.clip_norm)).sum())
    if privacy.moment_clip_norm is not None:
        centre, map_DD = float(privacy.centre_or_default), frequency_map(privacy, image)
        clips.append(_clip("momentClipNorm", str(privacy.moment_clip_norm), _centred_norms(records, centre, map_DD)))
    return clips


def _clip(field: str, norm: str, norms_N: NDArray[np.float64]) -> dict[str, Any]:
    return {"field": field, "norm": norm, "touched": int((norms_N > float(norm)).sum())}


def _centred_norms(records: Records, centre: float, map_DD: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Norms of images minus their class's mean, mapped as before the clip; without the noise that the release's own
    mean carries."""
    num_classes = int(records.labels_N.max()) + 1
    counts_K = np.bincount(records.labels_N, minlength=num_classes)
    sums_KD = np.zeros((num_classes, records[:1].shape[1]))
    for rows, pixels_ND in _batches(records):
        np.add.at(sums_KD, records.labels_N[rows], pixels_ND)
    means_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
    means_KD[counts_K < CENTRED_FROM] = centre
    apart = (x_ND - means_KD[records.labels_N[rows]] for rows, x_ND in _batches(records))
    return np.concatenate([np.linalg.norm(u if map_DD is None else u @ map_DD, axis=1) for u in apart])


def _released(spec: CheckSpec, privacy: PrivacySpec) -> dict[str, Any]:
    """Shapes and bytes of a release, from public facts alone. Shards of one release are shown as one."""
    shards = layouts(privacy.mechanism, released_image(privacy, spec.image), spec.classes.records)
    names = shards[0].tensors
    rows = {name: sum(shard.tensors[name][1][0] for shard in shards) for name in names}
    keep_rows = privacy.mechanism is Mechanism.SUMMARY
    tensors = {name: list(shape) if keep_rows else [rows[name], *shape[1:]] for name, (_, shape) in names.items()}
    return {"tensors": tensors, "bytes": sum(shard.values_bytes for shard in shards)}


def main() -> int:
    return answered(CheckSpec, check)


if __name__ == "__main__":
    sys.exit(main())
