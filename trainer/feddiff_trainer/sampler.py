"""From noise to images: plain functions of (denoise, y, sigmas, label).

`sigmas` are noise levels that fall, usually to 0. Two denoisers compose into one by hand_over.

Shapes: B images, C channels, H height, W width, N noise levels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log

import torch
from torch import Tensor

from .denoising import Denoise
from .network import per_image

Sampler = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def heun(denoise: Denoise, y_BCHW: Tensor, sigmas_N: Tensor, label_B: Tensor) -> Tensor:
    """y_BCHW carried from noise level sigmas[0] to sigmas[-1] along dy/dσ = (y - x0(y, σ))/σ.

    Heun's second-order steps, an Euler step into 0 (Karras et al. 2022, algorithm 1): 2·(N - 1) - 1 calls.
    """
    for sigma, following in _steps(sigmas_N, y_BCHW):
        slope_BCHW = (y_BCHW - denoise(y_BCHW, sigma.expand(len(y_BCHW)), label_B)) / sigma
        euler_BCHW = y_BCHW + (following - sigma) * slope_BCHW
        if following > 0:
            x0_BCHW = denoise(euler_BCHW, following.expand(len(y_BCHW)), label_B)
            slope_BCHW = (slope_BCHW + (euler_BCHW - x0_BCHW) / following) / 2
        y_BCHW = y_BCHW + (following - sigma) * slope_BCHW
    return y_BCHW


@torch.no_grad()
def ddpm_ancestral(
    denoise: Denoise, y_BCHW: Tensor, sigmas_N: Tensor, label_B: Tensor, generator: torch.Generator
) -> Tensor:
    """y_BCHW carried from noise level sigmas[0] to sigmas[-1] by draws from q(y_following | y, x0), N - 1 calls.

    Ho et al. 2020, equations 6 and 7, divided by α: with ρ = σ_following²/σ² the mean is x0 + ρ·(y - x0) and the
    variance σ_following²·(1 - ρ).
    """
    for sigma, following in _steps(sigmas_N, y_BCHW):
        rho = (following / sigma) ** 2
        x0_BCHW = denoise(y_BCHW, sigma.expand(len(y_BCHW)), label_B)
        noise_BCHW = torch.randn(y_BCHW.shape, generator=generator, dtype=y_BCHW.dtype, device=y_BCHW.device)
        y_BCHW = x0_BCHW + rho * (y_BCHW - x0_BCHW) + following * (1 - rho).sqrt() * noise_BCHW
    return y_BCHW


@torch.no_grad()
def dpm_solver(
    denoise: Denoise, y_BCHW: Tensor, sigmas_N: Tensor, label_B: Tensor, split_sigma: float | None = None
) -> Tensor:
    """y_BCHW carried from noise level sigmas[0] to sigmas[-1] by DPM-Solver++(2M), N - 1 calls.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with α = 1 and so λ = -log σ: a step h takes y toward
    x0 + h/(2·h_before)·(x0 - x0_before). The first step has nothing before it, the one into 0 takes x0 itself, and at
    split_sigma the estimate before is another denoiser's, whose difference is no slope: these are of first order.
    """
    before: tuple[Tensor, Tensor] | None = None
    for sigma, following in _steps(sigmas_N, y_BCHW):
        x0_BCHW = denoise(y_BCHW, sigma.expand(len(y_BCHW)), label_B)
        toward_BCHW = x0_BCHW
        if before is not None and following > 0 and sigma != split_sigma:
            sigma_before, x0_before_BCHW = before
            ratio = (sigma / following).log() / (sigma_before / sigma).log()
            toward_BCHW = x0_BCHW + ratio / 2 * (x0_BCHW - x0_before_BCHW)
        y_BCHW = toward_BCHW + following / sigma * (y_BCHW - toward_BCHW)
        before = sigma, x0_BCHW
    return y_BCHW


def _steps(sigmas_N: Tensor, y_BCHW: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    sigmas_N = sigmas_N.to(y_BCHW.device)
    return pairwise(sigmas_N)


def restarted(
    sampler: Sampler,
    shared: Denoise,
    personal: Denoise,
    y_BCHW: Tensor,
    shared_sigmas_N: Tensor,
    personal_sigmas_N: Tensor,
    split_alpha: float,
    label_B: Tensor,
) -> Tensor:
    """Images by the paper's timeline: `shared` makes a released image x̃ by its own whole schedule, `personal` goes on.

    x̃ = α_t0·x0 + s_t0·z, so x̃/α_t0 is y at σ_t0, where personal_sigmas has to start.
    """
    released_BCHW = sampler(shared, y_BCHW, shared_sigmas_N, label_B)
    return sampler(personal, released_BCHW / split_alpha, personal_sigmas_N, label_B)


def hand_over(shared: Denoise, personal: Denoise, split_sigma: float) -> Denoise:
    """One denoiser that is `shared` above the split and `personal` at and below it.

    The split has to be one of the sampler's levels (sampling_sigmas sees to it), or one step would carry shared's
    slope below it.
    """

    def denoise(y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        above_B = sigma_B > split_sigma
        if above_B.all():
            return shared(y_BCHW, sigma_B, label_B)
        if not above_B.any():
            return personal(y_BCHW, sigma_B, label_B)
        return torch.where(per_image(above_B), shared(y_BCHW, sigma_B, label_B), personal(y_BCHW, sigma_B, label_B))

    return denoise


def sampling_sigmas(
    schedule_sigmas: Sequence[float],
    num_steps: int,
    low: float = 0.02,
    high: float = 80.0,
    split_sigma: float | None = None,
) -> Tensor:
    """sigmas_N: noise levels of the schedule that fall from about `high` to about `low`, and a last 0; float64.

    Spaced as Karras et al. 2022, equation 5 (ρ = 7), and moved to the nearest level of the schedule, so that a list
    shorter than num_steps comes back where the schedule is coarser than that. split_sigma, a level of the schedule
    too, is added if it is not there, and where none lies above it the schedule's highest one.
    """
    ideal = karras_sigmas(num_steps, low, high)
    chosen = {min(schedule_sigmas, key=lambda sigma: abs(log(sigma / level))) for level in ideal}
    if split_sigma is not None:
        chosen |= {split_sigma} if split_sigma < max(chosen) else {split_sigma, max(schedule_sigmas)}
    return torch.tensor([*sorted(chosen, reverse=True), 0.0], dtype=torch.float64)


def karras_sigmas(num_steps: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """σ_i = (high^(1/ρ) + i/(n - 1)·(low^(1/ρ) - high^(1/ρ)))^ρ, i = 0..n - 1 (Karras et al. 2022, equation 5)."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + i / (num_steps - 1) * (last - first)) ** rho for i in range(num_steps)]


def levels_from(sigmas_N: Tensor, split_sigma: float) -> Tensor:
    """The part of the list that a personal denoiser walks: from the split, itself included, to 0."""
    return sigmas_N[sigmas_N <= split_sigma]
