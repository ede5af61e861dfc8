"""Membership attacks as pure functions: one score per image, the larger the more it looks like a training record.

Nothing here reads, writes or judges. Denoisers are asked in VE form, y_σ = x0 + σ·z, where the papers' noise
prediction is ε̂(y, σ) = (y - x̂0)/σ, x_t = α_t·y_σ, and a step of DDIM is y' = y + (σ' - σ)·ε̂.

Shapes: N images, C channels, H height, W width, D = C·H·W values of one image, T trials.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .denoising import Denoise, edm_weight
from .metrics import nearest_distance
from .noise import Float64

CHUNK = 1024  # images asked about at once


def matched_filter(released_TD: Float64, x_D: Float64, other_D: Float64, std: float) -> Float64:
    """scores_T = ⟨x̃ - x, x' - x⟩/(std·‖x' - x‖): N(0, 1) under x, N(‖x' - x‖/std, 1) under x'.

    The log-likelihood ratio of x' against x for Gaussian noise, scaled to noise 1: by Neyman & Pearson no test of a
    release does better. x_D, other_D: what the two images add to it without noise; they differ.
    """
    direction_D = (other_D - x_D) / np.linalg.norm(other_D - x_D)
    scores_T: Float64 = (released_TD - x_D) @ direction_D / std
    return scores_T


@torch.no_grad()
def loss_scores(
    denoise: Denoise, x0_NCHW: Tensor, label_N: Tensor, levels: Sequence[float], num_draws: int, seed: int
) -> Float64:
    """scores_N = -loss, the training loss w(σ)·mean (x̂0 - x0)² averaged over noise levels and draws.

    The loss threshold of Yeom et al. 2018 (adversary 1) for denoisers (Carlini et al. 2023, section 5). All images
    meet the same noise, so that what differs between two scores is the images.
    """
    generator = torch.Generator().manual_seed(seed)
    losses_N = torch.zeros(len(x0_NCHW), dtype=torch.float64)
    for sigma in levels:
        weight = edm_weight(torch.tensor(sigma, dtype=torch.float64))
        for _ in range(num_draws):
            z_CHW = torch.randn(x0_NCHW.shape[1:], generator=generator)
            error_NCHW = _asked(denoise, x0_NCHW + sigma * z_CHW, sigma, label_N) - x0_NCHW
            losses_N += weight * error_NCHW.double().square().mean(dim=(1, 2, 3)) / (len(levels) * num_draws)
    scores_N: Float64 = -losses_N.numpy()
    return scores_N


@torch.no_grad()
def pia_scores(denoise: Denoise, x0_NCHW: Tensor, label_N: Tensor, first: float, level: float) -> Float64:
    """scores_N = -R_{t,4} = -‖ε̂(x0, 0) - ε̂(x_t, t)‖_4 for x_t = √ᾱ_t·x0 + √(1 - ᾱ_t)·ε̂(x0, 0), which is y_σ = x0 +
    σ·ε̂(x0, 0): proximal initialisation (PIA, Kong et al., ICLR 2024).

    first: σ that stands for t = 0, the lowest one that the denoiser was trained for; level: σ of the papers' t = 200.
    """
    at_zero_NCHW = _noise_in(denoise, x0_NCHW, first, label_N)
    at_level_NCHW = _noise_in(denoise, x0_NCHW + level * at_zero_NCHW, level, label_N)
    distance_N = torch.linalg.vector_norm((at_zero_NCHW - at_level_NCHW).double(), 4, dim=(1, 2, 3))
    scores_N: Float64 = -distance_N.numpy()
    return scores_N


@torch.no_grad()
def secmi_scores(denoise: Denoise, x0_NCHW: Tensor, label_N: Tensor, levels: Sequence[float]) -> Float64:
    """scores_N = -t-error = -‖ψ(φ(x̃_t, t), t) - x̃_t‖² (SecMI, Duan et al., ICML 2023): how far one deterministic step
    up and one back miss x̃_t, to which deterministic steps led from x0.

    levels: rising σ, the last but one that of t_SEC, neighbours k steps apart. The first is the lowest that the
    denoiser was trained for: it is asked there for the step that leaves σ = 0, too.
    """
    *below, _ = levels
    y_NCHW = x0_NCHW + below[0] * _noise_in(denoise, x0_NCHW, below[0], label_N)
    for sigma, following in pairwise(below):
        y_NCHW = y_NCHW + (following - sigma) * _noise_in(denoise, y_NCHW, sigma, label_N)
    level, above = levels[-2:]
    up_NCHW = y_NCHW + (above - level) * _noise_in(denoise, y_NCHW, level, label_N)
    back_NCHW = up_NCHW + (level - above) * _noise_in(denoise, up_NCHW, above, label_N)
    scores_N: Float64 = -(back_NCHW - y_NCHW).double().square().mean(dim=(1, 2, 3)).numpy()
    return scores_N


def nearest_scores(x_ND: Float64, label_N: np.ndarray, samples_ND: Float64, sampled_N: np.ndarray) -> Float64:
    """scores_N = -distance to the nearest sample of the image's class (Chen et al. 2020, GAN-Leaks, full black box)."""
    scores_N = np.empty(len(x_ND))
    for label in np.unique(label_N):
        rows = label_N == label
        scores_N[rows] = -nearest_distance(x_ND[rows], samples_ND[sampled_N == label])
    return scores_N


def _noise_in(denoise: Denoise, y_NCHW: Tensor, sigma: float, label_N: Tensor) -> Tensor:
    """ε̂(y, σ)."""
    return (y_NCHW - _asked(denoise, y_NCHW, sigma, label_N)) / sigma


def _asked(denoise: Denoise, y_NCHW: Tensor, sigma: float, label_N: Tensor) -> Tensor:
    parts = [
        denoise(y_BCHW, torch.full((len(y_BCHW),), sigma), label_B)
        for y_BCHW, label_B in zip(torch.split(y_NCHW, CHUNK), torch.split(label_N, CHUNK), strict=True)
    ]
    return torch.cat(parts)
