"""The files a release is made of: safetensors of integers on public grids, their shapes known before any is read.

Shapes: N images, C channels, H height, W width, K classes, D = C·H·W, M = D·(D + 1)/2 packed second moments.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from feddiff_protocol.api import ImageSpec, Mechanism
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.manifest import GridSteps
from feddiff_protocol.promise import Promise
from feddiff_protocol.schedule import Schedule

from .noise import grid_step
from .privunit import STEP

SHARD_BYTES = 64 << 20  # of a shard of images; a smaller one is never cut for the sake of evenness
HEADER_BYTES = 4096  # several times what the names, types and shapes of two tensors take

Integers = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Layout:
    """Name, type and shape of every tensor in one shard."""

    tensors: Mapping[str, tuple[type[np.signedinteger[Any]], tuple[int, ...]]]

    @property
    def values_bytes(self) -> int:
        return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.tensors.values())


def layouts(mechanism: Mechanism, image: ImageSpec, counts: Sequence[int]) -> list[Layout]:
    """What every shard of a release holds, in order; it follows from public facts alone."""
    if mechanism is Mechanism.SUMMARY:
        size = image.dimensions
        sums = {"mean_sums": size, "moment_sums": size * (size + 1) // 2}
        return [Layout({name: (np.int32, (len(counts), length)) for name, length in sums.items()})]
    num_images, rows, name = sum(counts), images_per_shard(image), images_name(mechanism)
    return [_images_layout(name, image, min(rows, num_images - start)) for start in range(0, num_images, rows)]


def num_shards(mechanism: Mechanism, image: ImageSpec, counts: Sequence[int]) -> int:
    """How many `layouts` there are, without making them: the counts may be a hostile author's."""
    return 1 if mechanism is Mechanism.SUMMARY else -(-sum(counts) // images_per_shard(image))


def images_per_shard(image: ImageSpec) -> int:
    return SHARD_BYTES // (2 * image.dimensions + 4)


def images_name(mechanism: Mechanism) -> str:
    """What the tensor of a mechanism that releases every image is called, in shards and grids."""
    return "directions" if mechanism is Mechanism.PRIVUNIT else "images"


def _images_layout(name: str, image: ImageSpec, rows: int) -> Layout:
    shape = (rows, image.channels, image.height, image.width)
    return Layout({name: (np.int16, shape), "labels": (np.int32, (rows,))})


def grid_steps(promise: Promise, schedule: Schedule) -> GridSteps:
    """The public grids of a release, which follow from its mechanism and noise alone."""
    if promise.mechanism is Mechanism.GAUSSIAN:
        return GridSteps(images=_exponent(grid_step(schedule.s(promise.split_step))))
    if promise.mechanism is Mechanism.PRIVUNIT:
        return GridSteps(directions=_exponent(STEP))
    assert promise.mean_std is not None and promise.moment_std is not None
    return GridSteps(
        mean_sums=_exponent(grid_step(promise.mean_std)), moment_sums=_exponent(grid_step(promise.moment_std))
    )


def _exponent(step: float) -> int:
    mantissa, exponent = math.frexp(step)
    assert mantissa == 0.5  # a power of two
    return exponent - 1


def encode(layout: Layout, tensors: Mapping[str, Integers]) -> bytes:
    """The bytes of one shard: equal tensors, equal bytes."""
    assert {name: (t.dtype.type, t.shape) for name, t in tensors.items()} == dict(layout.tensors)
    return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def decode(layout: Layout, data: bytes, where: str) -> dict[str, Integers]:
    """The tensors of a shard, read-only views of `data`. Raises DataInvalid unless it holds exactly the layout's.

    Read by hand and not by safetensors: every size is compared with what is expected before anything is allocated.
    """
    header, values = _split(data, where)
    if set(header) != set(layout.tensors):
        found = ", ".join(sorted(ascii(name)[:32] for name in header)[:5]) or "none"
        raise _invalid(where, f"tensors {', '.join(sorted(layout.tensors))}", found)
    if len(values) != layout.values_bytes:
        raise _invalid(where, f"{layout.values_bytes} bytes of values", f"{len(values)}")
    tensors, ranges = {}, []
    for name, (dtype, shape) in layout.tensors.items():
        begin, end = _byte_range(header[name], dtype, shape, f"{where}: {name}")
        ranges.append((begin, end))
        tensors[name] = np.frombuffer(values[begin:end], np.dtype(dtype).newbyteorder("<")).reshape(shape)
    begins, ends = zip(*sorted(ranges), strict=True)
    if (0, *ends) != (*begins, len(values)):
        raise _invalid(where, "tensors that follow each other", "tensors that overlap or leave gaps")
    return tensors


def _split(data: bytes, where: str) -> tuple[dict[str, Any], memoryview]:
    """Header and values: eight bytes of length, JSON, values."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(HEADER_BYTES, len(data) - 8):
        raise _invalid(where, f"a header of 2 to {HEADER_BYTES} bytes", f"{length} in a file of {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise _invalid(where, "a header of JSON", "bytes that are none") from None
    if not isinstance(header, dict):
        raise _invalid(where, "a header that names tensors", type(header).__name__)
    return header, memoryview(data)[8 + length :]


def _byte_range(entry: object, dtype: type[Any], shape: tuple[int, ...], where: str) -> tuple[int, int]:
    """Where a tensor's values lie, if its entry in the header says what is expected of it."""
    kind = f"I{8 * np.dtype(dtype).itemsize}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(where, "dtype, shape and data_offsets", ascii(entry)[:80])
    if entry["dtype"] != kind or entry["shape"] != list(shape):
        raise _invalid(where, f"{kind} of shape {list(shape)}", ascii((entry["dtype"], entry["shape"]))[:80])
    match entry["data_offsets"]:
        case [int(begin), int(end)] if begin >= 0 and end - begin == np.dtype(dtype).itemsize * math.prod(shape):
            return begin, end
    raise _invalid(where, "offsets of as many bytes as the shape takes", ascii(entry["data_offsets"])[:80])


def _invalid(where: str, expected: str, found: str) -> DataInvalid:
    return DataInvalid(f"{where}: expected {expected}, found {found}; do not use this release")
