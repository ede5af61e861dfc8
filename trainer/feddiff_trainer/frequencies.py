"""How fine detail is made to count more before a second moment is clipped and noised, and less again afterwards.

Images vary far less in fine detail than in coarse shapes, and the noise of a release is the same in every direction: it
drowns the detail first. A public linear map takes part of that difference away, the same for all records of all owners.

Shapes: C channels, H height, W width, D = C·H·W values of one image.
"""

import numpy as np

from feddiff_protocol.api import ImageSpec, PrivacySpec

from .noise import Float64


def frequency_map(privacy: PrivacySpec, image: ImageSpec) -> Float64 | None:
    """P_DD of a job's frequencyPower; None where that is 0: pixels count alike."""
    power = float(privacy.frequency_power_or_default)
    return frequency_weighing(power, image.channels, image.height, image.width) if power else None


def frequency_weighing(power: float, channels: int, height: int, width: int) -> Float64:
    """P_DD, symmetric and positive: the (i, j) cosine of every channel is multiplied by s·(1 + √(i² + j²))^power.

    s is such that images whose variance falls as (1 + f)⁻², as that of natural ones does (Field 1987), keep their
    squared norm on average: a clip norm means about the same with and without.
    """
    frequency_HW = 1 + np.hypot(np.arange(height)[:, None], np.arange(width))
    variance_HW = frequency_HW**-2.0
    scale = np.sqrt(variance_HW.sum() / (variance_HW * frequency_HW ** (2 * power)).sum())
    cosines = np.kron(_cosines(height), _cosines(width))
    one_channel = cosines.T @ (scale * frequency_HW.reshape(-1, 1) ** power * cosines)
    weighing_DD: Float64 = np.kron(np.eye(channels), one_channel)
    return weighing_DD


def finest_waves(image: ImageSpec) -> tuple[Float64, Float64]:
    """The finest cosine across and the finest one down, in [-1, 1]: orthogonal, and as mapped still, and longer."""
    across_W, down_H = (_cosines(size)[-1] for size in (image.width, image.height))
    waves = (np.tile(across_W, (image.height, 1)), np.tile(down_H[:, None], (1, image.width)))
    first_D, second_D = (np.tile(wave.ravel() / np.abs(wave).max(), image.channels) for wave in waves)
    return first_D, second_D


def _cosines(size: int) -> Float64:
    """The orthonormal cosine transform (DCT-II), one row a frequency."""
    i = np.arange(size)
    rows = np.cos(np.pi * i[:, None] * (i + 0.5) / size)
    orthonormal: Float64 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return orthonormal
