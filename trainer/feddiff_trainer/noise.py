"""Noise that nobody can draw again, and the public grid on which released numbers lie.

The operating system's entropy keys an AES-256 counter-mode stream, the stream becomes uniforms, the uniforms become
Gaussians in float64. There is no seed: whoever knew one would get every image back exactly. Tests bring their own
`Normals` as an argument of the mechanisms, which no spec can reach.
"""

import math
import os
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Float64: TypeAlias = NDArray[np.float64]
Cells: TypeAlias = NDArray[np.int16] | NDArray[np.int32]
Normals: TypeAlias = Callable[[tuple[int, ...]], Float64]  # shape -> independent N(0, 1), float64
Keystream: TypeAlias = Callable[[memoryview], None]  # overwrites its argument with bytes nobody can predict

BLOCK = 16_384  # normals at a time: stream, uniforms and results stay in the second-level cache


def os_entropy_normals() -> Normals:
    """A source of standard normals, keyed by the operating system; every source and every call gives fresh ones."""
    return normals_from(os_entropy_keystream())


def os_entropy_keystream() -> Keystream:
    """A stream of AES-256-CTR under a key from os.urandom that lives in this closure alone.

    A forked process would go on with its parent's stream and draw the same noise, so it takes a new key first.
    """
    zeros = memoryview(bytes(8 * BLOCK))
    update_into, owner = _keyed(), os.getpid()

    def keystream(into: memoryview) -> None:
        nonlocal update_into, owner
        if os.getpid() != owner:
            update_into, owner = _keyed(), os.getpid()
        update_into(zeros[: len(into)], into)

    return keystream


def _keyed() -> Callable[[memoryview, memoryview], int]:
    return Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor().update_into


def normals_from(keystream: Keystream) -> Normals:
    """Standard normals out of a keystream; apart from `os_entropy_normals` only tests bring one."""

    def normals(shape: tuple[int, ...]) -> Float64:
        z = np.empty(math.prod(shape))
        size = min(BLOCK, z.size + 1)
        # Buffers of this call alone: two threads that shared them could see the same noise.
        stream, uniforms, block = memoryview(bytearray(8 * size)), np.empty(size), np.empty(size)
        for start in range(0, z.size, BLOCK):
            wanted = min(BLOCK, z.size - start)
            drawn = wanted + wanted % 2  # they come in pairs
            keystream(stream[: 8 * drawn])
            _box_muller(np.frombuffer(stream[: 8 * drawn], np.uint64), uniforms[:drawn], block[:drawn])
            z[start : start + wanted] = block[:wanted]
        return z.reshape(shape)

    return normals


def _box_muller(bits: NDArray[np.uint64], uniforms: Float64, z: Float64) -> None:
    """Fills z with √(-2·ln u)·(cos 2πv, sin 2πv), u in (0, 1] and v in [0, 1), of 53 bits each (Box & Muller 1958).

    u is never 0, so z is finite; the largest possible |z|, √(2·53·ln 2) = 8.57, is passed by chance once in 1e17.
    With t = tan πv: cos 2πv = (1 - t²)/(1 + t²) and sin 2πv = 2t/(1 + t²), a third faster than cos and sin.
    """
    half = len(z) // 2
    np.copyto(uniforms, (bits >> np.uint64(11)).view(np.int64))  # < 2⁵³: exact
    radius, tangent, cosine, sine = uniforms[:half], uniforms[half:], z[:half], z[half:]
    radius += 1
    radius *= 2.0**-53
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    tangent *= math.pi * 2.0**-53
    np.tan(tangent, out=tangent)
    np.multiply(tangent, tangent, out=sine)
    np.subtract(1, sine, out=cosine)
    sine += 1
    radius /= sine
    cosine *= radius
    radius *= 2
    np.multiply(tangent, radius, out=sine)


# ---- The grid ----------------------------------------------------------------------------------------------------


def grid_step(std: float) -> float:
    """The largest power of two ≤ std/256: it depends on public numbers alone and adds 1e-6 to the noise's variance."""
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std: expected a positive finite number, found {std}; noise without a scale protects nothing")
    return math.ldexp(1.0, math.frexp(std / 256)[1] - 1)


def round_to_grid(x: Float64, step: float, dtype: type[np.int16] | type[np.int32] = np.int16) -> Cells:
    """x/step to the nearest integer, or the end of the integer range where it does not fit: post-processing of x.

    int16 reaches at least 64 std to either side, enough for a noised image; sums of many need int32. Raises ValueError
    for NaN. Dividing by a power of two is exact.
    """
    limits = np.iinfo(dtype)
    cells = x / step
    np.rint(cells, out=cells)
    np.clip(cells, limits.min, limits.max, out=cells)
    if np.isnan(cells.min(initial=0)):
        raise ValueError("expected numbers to round, found NaN; it must have been refused before noise was added")
    return cells.astype(np.int16) if dtype is np.int16 else cells.astype(np.int32)


def from_grid(cells: Cells, step: float) -> NDArray[np.float32] | Float64:
    """cells·step, exactly: float32 for int16, float64 for int32."""
    if cells.dtype == np.int16:
        return np.multiply(cells, step, dtype=np.float32)
    return np.multiply(cells, step, dtype=np.float64)
