"""The release mechanisms as pure functions: pixels in, noised numbers out. Clipping and noise are float64 throughout.

What each promises, in σ and μ, is the accountant's business; here the sensitivity it counts on becomes true of every
array. Neighbours differ in one record, replaced by another of the same class.

Shapes: N records, D values of one image, K classes, M = D·(D + 1)/2 packed values of a symmetric matrix.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol.errors import DataInvalid, PrivacyRefusal
from feddiff_protocol.promise import CENTRED_FROM

from .noise import Float64, Normals, from_grid, grid_step, round_to_grid
from .records import Records

Int64 = NDArray[np.int64]
Pixels = Records | Float64  # rows of either are float64 pixels_ND in [0, 1]

BATCH_VALUES = 65_536  # pixels noised at a time: a batch stays in the second-level cache
SUMMARY_ROWS = 4096  # records at a time in a summary: memory stays far below N×D float64


# ---- gaussian: every image, clipped and noised once ------------------------------------------------------------------


def release_gaussian(
    pixels_ND: Float64, *, clip_norm: float, non_negative: bool, alpha: float, s: float, normals: Normals
) -> Float64:
    """x̃_ND = α·clip(x) + s·z in [-1, 1] units, one fresh z per record. PFDM (arXiv 2504.00952), docs/method.md.

    pixels_ND in [0, 1]. non_negative: clip to norm C in [0, 1] units, then map to [-1, 1]: two images then differ by at
    most 2√2·C. Otherwise map first and clip in [-1, 1] units: at most 2C. Raises DataInvalid for pixels that are not in
    [0, 1].
    """
    check_pixels(pixels_ND)
    _check_scales(alpha=alpha, s=s)
    x_ND = _clipped_image(pixels_ND, clip_norm, non_negative)
    noised_ND = normals(x_ND.shape)
    noised_ND *= s
    x_ND *= alpha
    noised_ND += x_ND
    return noised_ND


def release_gaussian_on_grid(
    pixels: Pixels,
    order_N: Int64,
    *,
    clip_norm: float,
    non_negative: bool,
    alpha: float,
    s: float,
    normals: Normals,
) -> NDArray[np.int16]:
    """cells_ND of `release_gaussian` on the grid of step grid_step(s), records in the given order."""

    def noised(pixels_ND: Float64) -> Float64:
        return release_gaussian(
            pixels_ND, clip_norm=clip_norm, non_negative=non_negative, alpha=alpha, s=s, normals=normals
        )

    return released_on_grid(noised, pixels, order_N, grid_step(s))


def released_on_grid(
    release: Callable[[Float64], Float64], pixels: Pixels, order_N: Int64, step: float
) -> NDArray[np.int16]:
    """cells_ND of what `release` makes of the pixels_ND, records in the given order, batch by batch.

    order_N: see `shuffled_order`; a record named twice would be released twice and raises ValueError.
    """
    if len(np.unique(order_N)) != len(order_N):
        raise ValueError("order_N: expected every record at most once, found one twice; draw it by shuffled_order")
    width = pixels[order_N[:1]].shape[1]
    cells_ND = np.empty((len(order_N), width), np.int16)
    batch = max(1, BATCH_VALUES // width)
    for start in range(0, len(order_N), batch):
        rows = slice(start, start + batch)
        cells_ND[rows] = round_to_grid(release(pixels[order_N[rows]]), step)
    return cells_ND


def shuffled_order(num_records: int, entropy: Callable[[int], bytes] = os.urandom) -> Int64:
    """order_N, a uniformly random permutation: the stored order lies outside ε, so it must not leave the owner."""
    keys_N = np.frombuffer(entropy(8 * num_records), np.uint64)
    return np.argsort(keys_N, kind="stable")  # equal keys, the only bias, meet with a chance of N²/2⁶⁵


def _clipped_image(pixels_ND: Float64, clip_norm: float, non_negative: bool) -> Float64:
    """The images in [-1, 1] units, a fresh array, after the clip in the units where `non_negative` wants it."""
    if non_negative:
        return _to_minus_one_to_one(clip_l2(pixels_ND, clip_norm))
    return clip_l2(_to_minus_one_to_one(pixels_ND), clip_norm)


def _to_minus_one_to_one(pixels_ND: Float64) -> Float64:
    x_ND = pixels_ND * 2
    x_ND -= 1
    return x_ND


# ---- The clip --------------------------------------------------------------------------------------------------------


def clip_l2(v_ND: Float64, clip_norm: float) -> Float64:
    """v·min(1, C/‖v‖) of every row, as a fresh array, whose norm is at most C, not at most C and a rounding error.

    Rows that floating point cannot tell from norm C are scaled too, to C·(1 - (D + 16)·2⁻⁵²): squares, sums, root and
    product err by less than that together. Raises DataInvalid for rows without a finite norm, ValueError for C ≤ 0.
    """
    _check_scales(clip_norm=clip_norm)
    norm_N = norms(v_ND)
    if not np.isfinite(norm_N).all():
        row = int((~np.isfinite(norm_N)).argmax())
        raise DataInvalid(
            f"record {row}: expected finite pixels, found NaN, infinity or a norm beyond float64; mend it"
        )
    safe_norm = clip_norm * (1 - (v_ND.shape[1] + 16) * 2.0**-52)
    scale_N = np.divide(safe_norm, norm_N, out=np.ones_like(norm_N), where=norm_N > safe_norm)
    clipped_ND: Float64 = v_ND * scale_N[:, None]
    _check_clipped(clipped_ND, clip_norm)
    return clipped_ND


def _check_clipped(clipped_ND: Float64, clip_norm: float) -> None:
    """Not an assertion: python -O must not switch off what the promise rests on."""
    longest = norms(clipped_ND).max(initial=0.0)
    if not longest <= clip_norm:
        raise PrivacyRefusal(
            f"expected norms of at most {clip_norm!r} after the clip, found {longest!r}; nothing left, report this"
        )


def norms(v_ND: Float64) -> Float64:
    norms_N: Float64 = np.sqrt(np.einsum("nd,nd->n", v_ND, v_ND))
    return norms_N


# ---- summary: per class one noisy sum and one noisy second moment ----------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What leaves the owner, float64 in [0, 1] units, on the public grids: exactly the numbers that are written.

    mean_sums_KD: Σ of clipped images + N(0, mean_std²), a multiple of grid_step(mean_std) in int32.
    moment_sums_KM: Σ of packed uuᵀ, u = P(x - m̃), + N(0, moment_std²), likewise. counts_K: the public numbers of
    records; a class without any has rows of zeros.
    """

    mean_sums_KD: Float64
    moment_sums_KM: Float64
    counts_K: Int64


def release_summary(
    pixels: Pixels,
    labels_N: Int64,
    *,
    num_classes: int,
    mean_clip_norm: float,
    moment_clip_norm: float,
    centre: float,
    mean_std: float,
    moment_std: float,
    normals: Normals,
    min_records_for_centre: int = CENTRED_FROM,
    map_DD: Float64 | None = None,
) -> Summary:
    """The noisy sums S1 and second moments S2 of every class. docs/method.md, `summary`.

    The centre of S2 is computed from S1 after its rounding, that is from the released numbers alone: S2 is a Gaussian
    mechanism with a public parameter, and the two compose adaptively to μ² = 2·C1²/s1² + 2·C2⁴/s2². map_DD: a public
    symmetric map P that x - m̃ goes through before its clip (frequencies.py); the clip comes last, so nothing changes.
    Raises DataInvalid for pixels outside [0, 1] or labels outside the classes, ValueError for a norm or noise that is
    not positive.
    """
    _check_scales(
        mean_clip_norm=mean_clip_norm, moment_clip_norm=moment_clip_norm, mean_std=mean_std, moment_std=moment_std
    )
    counts_K = _counts(labels_N, num_classes)
    mean_sums_KD = _with_noise(_mean_sums(pixels, labels_N, num_classes, mean_clip_norm), mean_std, counts_K, normals)
    centres_KD = centres(mean_sums_KD, counts_K, centre, min_records_for_centre)
    moment_sums_KM = _moment_sums(pixels, labels_N, centres_KD, moment_clip_norm, map_DD)
    return Summary(mean_sums_KD, _with_noise(moment_sums_KM, moment_std, counts_K, normals), counts_K)


def centres(
    mean_sums_KD: Float64, counts_K: Int64, centre: float, min_records_for_centre: int = CENTRED_FROM
) -> Float64:
    """m̃_KD, about which the second moments are: S1/n clipped to [0, 1], the public constant for n below the minimum."""
    means_KD = np.clip(mean_sums_KD / np.maximum(counts_K, 1)[:, None], 0, 1)
    return np.where(counts_K[:, None] >= min_records_for_centre, means_KD, centre)


def _mean_sums(pixels: Pixels, labels_N: Int64, num_classes: int, clip_norm: float) -> Float64:
    """Σ v of every class, ‖v‖ ≤ C1; v ≥ 0, so a replaced record moves it by at most √2·C1."""
    sums_KD: Float64 | None = None
    for pixels_ND, starts, classes in _by_class(pixels, labels_N):
        check_pixels(pixels_ND)
        if sums_KD is None:
            sums_KD = np.zeros((num_classes, pixels_ND.shape[1]))
        sums_KD[classes] += np.add.reduceat(clip_l2(pixels_ND, clip_norm), starts)
    assert sums_KD is not None
    return sums_KD


def _moment_sums(
    pixels: Pixels, labels_N: Int64, centres_KD: Float64, clip_norm: float, map_DD: Float64 | None
) -> Float64:
    """Packed Σ uuᵀ of every class, u = P(x - m̃), ‖u‖ ≤ C2; a replaced record moves it by at most √2·C2²."""
    num_classes, width = centres_KD.shape
    sums_KM = np.zeros((num_classes, width * (width + 1) // 2))
    for pixels_ND, starts, classes in _by_class(pixels, labels_N):
        lengths = np.diff(starts, append=len(pixels_ND))
        apart_ND = pixels_ND - np.repeat(centres_KD[classes], lengths, axis=0)
        u_ND = clip_l2(apart_ND if map_DD is None else apart_ND @ map_DD, clip_norm)
        for k, start, length in zip(classes, starts, lengths, strict=True):
            u_nD = u_ND[start : start + length]
            sums_KM[k] += pack_symmetric(u_nD.T @ u_nD)
    return sums_KM


def _by_class(pixels: Pixels, labels_N: Int64) -> Iterator[tuple[Float64, Int64, Int64]]:
    """All records once, sorted by class, in batches: their pixels, where each class begins, which classes they are."""
    order_N = np.argsort(labels_N, kind="stable")
    for start in range(0, len(order_N), SUMMARY_ROWS):
        rows = order_N[start : start + SUMMARY_ROWS]
        classes, starts = np.unique(labels_N[rows], return_index=True)
        yield pixels[rows], starts, classes


def _with_noise(sums_K_: Float64, std: float, counts_K: Int64, normals: Normals) -> Float64:
    """The sums plus N(0, std²) on every number, rounded to the public grid; nothing for classes without records.

    Where there is no record there is nothing to protect, and the counts are public.
    """
    noised_K_ = normals(sums_K_.shape)
    noised_K_ *= std
    noised_K_ += sums_K_
    step = grid_step(std)
    released_K_ = from_grid(round_to_grid(noised_K_, step, np.int32), step).astype(np.float64, copy=False)
    released_K_[counts_K == 0] = 0
    return released_K_


def pack_symmetric(S_DD: Float64) -> Float64:
    """values_M: the upper triangle row by row, off-diagonals times √2: its Euclidean norm is the Frobenius norm."""
    rows, columns, scale_M = _triangle(len(S_DD))
    packed_M: Float64 = S_DD[rows, columns] * scale_M
    return packed_M


def _triangle(size: int) -> tuple[Int64, Int64, Float64]:
    rows, columns = np.triu_indices(size)
    return rows, columns, np.where(rows == columns, 1.0, math.sqrt(2))


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _counts(labels_N: Int64, num_classes: int) -> Int64:
    if len(labels_N) == 0 or labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise DataInvalid(
            f"labels: expected one or more from 0 to {num_classes - 1}, found {sorted(set(labels_N.tolist()))[:9]};"
            " correct the records or the number of classes"
        )
    return np.bincount(labels_N, minlength=num_classes)


def check_pixels(pixels_ND: Float64) -> None:
    """The sensitivities hold for pixels in [0, 1] alone, so nothing else is noised; NaN fails the comparison too."""
    low, high = pixels_ND.min(), pixels_ND.max()
    if not (low >= 0 and high <= 1):
        raise DataInvalid(f"pixels: expected finite numbers in [0, 1], found {low} to {high}; rescale the records")


def _check_scales(**scales: float) -> None:
    for name, value in scales.items():
        if not (value > 0 and np.isfinite(value)):
            raise ValueError(f"{name}: expected a positive finite number, found {value}")
