"""The mechanism `privunit`: of every image the direction leaves, drawn anew from a cap of the sphere or from the rest.

What ε that is, and why, stands in feddiff_protocol.privunit; here the directions are drawn, in float64, with the
operating system's entropy: the coin and the height ⟨z, u⟩ from 64 bits each, the rest of z from Gaussians.

Shapes: N records, D values of one image.
"""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from feddiff_protocol.errors import PrivacyRefusal
from feddiff_protocol.privunit import Cap

from .mechanisms import Int64, Pixels, check_pixels, norms, released_on_grid
from .noise import Float64, Normals

STEP = 2.0**-14  # of the public grid: all of [-1, 1] fits int16, and a value of z is 1/√D or so, far above it
TOLERANCE = 1e-9  # of lengths and heights in float64, far above their rounding errors and far below the grid

Entropy = Callable[[int], bytes]  # as many bytes as asked for, which nobody can predict


def release_privunit_on_grid(
    pixels: Pixels, order_N: Int64, *, cap: Cap, normals: Normals, entropy: Entropy = os.urandom
) -> NDArray[np.int16]:
    """cells_ND of `release_privunit` on the grid of step STEP, which depends on nothing; records in the given order."""
    return released_on_grid(lambda pixels_ND: release_privunit(pixels_ND, cap, normals, entropy), pixels, order_N, STEP)


def release_privunit(pixels_ND: Float64, cap: Cap, normals: Normals, entropy: Entropy = os.urandom) -> Float64:
    """z_ND on the unit sphere, one fresh draw per record (Bhowmick et al. 2018, Algorithm 1; docs/method.md).

    z = t·u + √(1 - t²)·w: given t, PrivUnit is symmetric about u, so w is uniform among unit vectors orthogonal to u,
    a Gaussian vector less its part along u. pixels_ND in [0, 1], else DataInvalid; ValueError for another size's cap.
    """
    check_pixels(pixels_ND)
    if pixels_ND.shape[1] != cap.dimensions:
        raise ValueError(f"pixels_ND: expected {cap.dimensions} values as the cap has, found {pixels_ND.shape[1]}")
    u_ND = directions(pixels_ND)
    height_N = draw_heights(len(u_ND), cap, entropy)
    z_ND = normals(u_ND.shape)
    z_ND -= _dot(z_ND, u_ND)[:, None] * u_ND
    z_ND *= (np.sqrt((1 - height_N) * (1 + height_N)) / norms(z_ND))[:, None]
    z_ND += height_N[:, None] * u_ND
    _check_drawn(z_ND, u_ND, height_N)
    return z_ND


def directions(pixels_ND: Float64) -> Float64:
    """u_ND = x/‖x‖; an image that is black everywhere has the direction of a grey one, a public constant."""
    largest_N = pixels_ND.max(axis=1, keepdims=True)
    # By the largest value first: the squares of a nearly black image could vanish.
    u_ND: Float64 = np.divide(pixels_ND, largest_N, out=np.ones_like(pixels_ND), where=largest_N > 0)
    u_ND /= norms(u_ND)[:, None]
    return u_ND


def draw_heights(count: int, cap: Cap, entropy: Entropy) -> Float64:
    """⟨z, u⟩ of `count` draws: in the cap with its probability, exactly, and there and elsewhere as for uniform z."""
    coin_N, place_N = np.frombuffer(entropy(16 * count), np.uint64).reshape(2, count)
    in_cap_N = coin_N < np.uint64(int(cap.probability * 2**64))  # p is a double below 1: the product is exact
    height_N: Float64 = np.where(in_cap_N, heights_inside(place_N, cap), heights_outside(place_N, cap))
    return height_N


def heights_inside(place_N: NDArray[np.uint64], cap: Cap) -> Float64:
    """t from its law for uniform z given t ≥ γ: P(T ≥ t) is uniform in (0, q]."""
    return np.maximum(_upper_quantile(cap.share * _uniform(place_N), cap), cap.height)


def heights_outside(place_N: NDArray[np.uint64], cap: Cap) -> Float64:
    """t from its law for uniform z given t < γ: P(T < t) is uniform in (0, 1 - q].

    By the smaller one of P(T < t) and P(T ≥ t), so that both tails are as fine as the smallest numbers.
    """
    below_N = (1 - cap.share) * _uniform(place_N)
    above_N = cap.share + (1 - cap.share) * _uniform(~place_N)
    low_N = -_upper_quantile(np.minimum(below_N, 0.5), cap)
    high_N = _upper_quantile(np.minimum(above_N, 0.5), cap)
    return np.minimum(np.where(below_N < 0.5, low_N, high_N), cap.height)


def _uniform(bits_N: NDArray[np.uint64]) -> Float64:
    """(n + ½)/2⁶⁴ in (0, 1], rounded to 53 bits of its own size: small ones are as fine as large ones."""
    uniform_N: Float64 = (bits_N.astype(np.float64) + 0.5) * 2.0**-64
    return uniform_N


def _upper_quantile(tail_N: Float64, cap: Cap) -> Float64:
    """t ≥ 0 with P(T ≥ t) = tail ≤ ½: (1 - T)/2 is Beta(h, h) with h = (d - 1)/2."""
    half = (cap.dimensions - 1) / 2
    quantile_N: Float64 = 1 - 2 * special.betaincinv(half, half, tail_N)
    return quantile_N


def _dot(a_ND: Float64, b_ND: Float64) -> Float64:
    dot_N: Float64 = np.einsum("nd,nd->n", a_ND, b_ND)
    return dot_N


def _check_drawn(z_ND: Float64, u_ND: Float64, height_N: Float64) -> None:
    """Not an assertion: python -O must not switch off what the promise rests on. NaN fails it too."""
    lengths = np.abs(norms(np.concatenate([u_ND, z_ND])) - 1)
    heights = np.abs(_dot(z_ND, u_ND) - height_N)
    worst = max(float(lengths.max(initial=0)), float(heights.max(initial=0)))
    if not (worst <= TOLERANCE and np.isfinite(z_ND).all()):
        raise PrivacyRefusal(
            f"expected directions of length 1 at the heights that were drawn, found them off by {worst!r};"
            " nothing left, report this"
        )
