"""What a denoiser learns from: losses on clean and on noised images, training noise levels, and the pooled Gaussian
whose denoiser needs no training.

Everything is in VE form, y_σ = x0 + σ·z with z ~ N(0, I), in [-1, 1] units: x_t = α_t·y_σ for σ = s_t/α_t.

Shapes: B images, C channels, H height, W width, K classes, D = C·H·W values of one image.
"""

from collections.abc import Iterator
from math import log
from typing import Protocol

import torch
from torch import Tensor, nn

from .network import per_image


class Denoise(Protocol):
    """x0_BCHW, an estimate of E[x0 | y_σ] for every image at its own noise level, of its own class."""

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, /) -> Tensor: ...


class DenoiseFlagged(Protocol):
    """The same, told by flag which images were clipped (network.CLIPPED) and which were not."""

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, flag_B: Tensor, /) -> Tensor: ...


def denoising_loss(
    denoise: DenoiseFlagged,
    x0_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    flag_B: Tensor,
    noise_BCHW: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """loss_B = w(σ)·mean over values of (x̂0 - x0)² for clean x0 (Karras et al. 2022, equation 2).

    Also what the `restarted` timeline needs: there released images play the clean ones, with their own sigma_data.
    """
    estimate_BCHW = denoise(x0_BCHW + per_image(sigma_B) * noise_BCHW, sigma_B, label_B, flag_B)
    return edm_weight(sigma_B, sigma_data) * (estimate_BCHW - x0_BCHW).square().mean(dim=(1, 2, 3))


def edm_weight(sigma_B: Tensor, sigma_data: float = 0.5) -> Tensor:
    """w(σ) = (σ² + σ_data²)/(σ·σ_data)² = 1/c_out²: loss 1 before training at every σ (Karras et al. 2022, table 1)."""
    return (sigma_B.square() + sigma_data**2) / (sigma_B * sigma_data).square()


def ambient_loss(
    denoise: DenoiseFlagged,
    y0_BCHW: Tensor,
    sigma0_B: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    flag_B: Tensor,
    noise_BCHW: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """loss_B that makes `denoise` E[x0 | y_σ] for σ ≥ σ0, from images y0 = x̃/α_t0 = x0 + σ0·z noised for ever.

    Daras et al. (ambient diffusion): for x_t = r·x̃ + ν·n, r = α_t/α_t0, ν² = s_t² - r²·s_t0²,
    E[x̃ | x_t] = [(ν²/s_t²)(α_t·E[x0 | x_t] - x_t) + x_t]/r. Divided by α_t0, with r·α_t0 = α_t and
    ν²/s_t² = 1 - σ0²/σ² = κ, that is for y_σ = y0 + √(σ² - σ0²)·n = y0 + σ·√κ·n

        E[y0 | y_σ] = κ·E[x0 | y_σ] + (1 - κ)·y_σ.

    The estimate ŷ0 on the right has to predict y0. Its error, κ·(x̂0 - y_σ) + σ·√κ·n, vanishes as √κ when σ → σ0, and
    so does its expected square before training, κ·(κ·c_out² + σ0²). Divided by that (see ambient_weight), the loss is
    about 1 and its gradients are bounded at every σ, σ = σ0 included; √κ is cancelled before it could divide.
    σ0 = 0 is denoising_loss.
    """
    kappa_B = 1 - (sigma0_B / sigma_B).square()
    y_BCHW = y0_BCHW + per_image(sigma_B * kappa_B.sqrt()) * noise_BCHW
    estimate_BCHW = denoise(y_BCHW, sigma_B, label_B, flag_B)
    error_BCHW = per_image(kappa_B.sqrt()) * (estimate_BCHW - y_BCHW) + per_image(sigma_B) * noise_BCHW
    return ambient_weight(sigma0_B, sigma_B, sigma_data) * error_BCHW.square().mean(dim=(1, 2, 3))


def ambient_weight(sigma0_B: Tensor, sigma_B: Tensor, sigma_data: float = 0.5) -> Tensor:
    """κ·w(σ) = 1/(κ·c_out² + σ0²), the weight of (ŷ0 - y0)²/κ, with 1/c_out² = edm_weight(σ); at most 1/σ0²."""
    return 1 / ((1 - (sigma0_B / sigma_B).square()) / edm_weight(sigma_B, sigma_data) + sigma0_B.square())


def log_normal_sigmas(
    count: int, low: float, high: float, generator: torch.Generator, mean: float = -1.2, std: float = 1.2
) -> Tensor:
    """sigma_B with ln σ ~ N(mean, std²) between ln low and ln high (Karras et al. 2022, table 1), float32.

    For an owner's own records: most of the work is where images take shape, σ of 0.1 to 1.
    """
    ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64).log() - mean) / std)
    first, last = ends.tolist()
    uniform_B = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    sigma_B: Tensor = (mean + std * torch.special.ndtri(first + uniform_B * (last - first))).exp()
    return sigma_B.clamp(low, high).float()  # ndtri of a rounded end could be infinite


def log_uniform_sigmas(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """sigma_B with ln σ uniform between ln low and ln high, float32, on the generator's device.

    For what was released, above the split: all of that range is the releases' to teach.
    """
    uniform_B = torch.rand(count, generator=generator, device=generator.device)
    return (log(low) + uniform_B * (log(high) - log(low))).exp().clamp(low, high)


class ClassGaussian(nn.Module):
    """The pooled Gaussian: per class N(m_k, Σ_k), with its denoiser in closed form, for any σ, without training.

    means_KD and covariances_KDD in [-1, 1] units (pooling.pool), float32 or float64: the precision it computes in.
    block_side p: they are of the means of squares of p × p pixels, and its images have such squares in one colour.
    """

    means_KD: Tensor
    eigenvalues_KD: Tensor
    eigenvectors_KDD: Tensor

    def __init__(self, means_KD: Tensor, covariances_KDD: Tensor, block_side: int = 1) -> None:
        super().__init__()
        self.block_side = block_side
        eigenvalues_KD, eigenvectors_KDD = torch.linalg.eigh(covariances_KDD)
        self.register_buffer("means_KD", means_KD)
        self.register_buffer("eigenvalues_KD", eigenvalues_KD.clamp(min=0))  # rounding leaves -1e-17 for a true 0
        self.register_buffer("eigenvectors_KDD", eigenvectors_KDD)

    @classmethod
    def to_be_loaded(cls, num_classes: int, num_values: int, block_side: int = 1) -> "ClassGaussian":
        """One that waits for its state, in float64: no decomposition of what is thrown away."""
        empty = torch.zeros(0, num_values, dtype=torch.float64)
        gaussian = cls(empty, empty[:, None].expand(0, num_values, num_values), block_side)
        for name, buffer in gaussian.named_buffers():
            gaussian.register_buffer(name, buffer.new_zeros(num_classes, *buffer.shape[1:]))
        return gaussian

    @property
    def covariances_KDD(self) -> Tensor:
        return (self.eigenvectors_KDD * self.eigenvalues_KD[:, None, :]) @ self.eigenvectors_KDD.mT

    def forward(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """E[x0 | y_σ] = m + Σ(Σ + σ²I)⁻¹(y_σ - m) (docs/method.md, the shared denoiser), of y's shape and precision.

        Of squares in one colour their means say all that y_σ does, with noise of σ/p.
        """
        if self.block_side > 1:
            means_Bchw = block_means(y_BCHW, self.block_side)
            return in_blocks(self._estimate(means_Bchw, sigma_B / self.block_side, label_B), self.block_side)
        return self._estimate(y_BCHW, sigma_B, label_B)

    def _estimate(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        y_BD = y_BCHW.flatten(1).to(self.means_KD.dtype)
        x0_BD = torch.empty_like(y_BD)
        for k, rows in rows_of_classes(label_B, len(self.means_KD)):
            shrink_BD = shrinkage(self.eigenvalues_KD[k], sigma_B[rows])
            centred_BD = (y_BD[rows] - self.means_KD[k]) @ self.eigenvectors_KDD[k]
            x0_BD[rows] = self.means_KD[k] + (shrink_BD * centred_BD) @ self.eigenvectors_KDD[k].T
        return x0_BD.view_as(y_BCHW).to(y_BCHW.dtype)

    def draw(self, label_B: Tensor, image_shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """x0_BCHW ~ N(m_label, Σ_label), independent draws."""
        z_BD = torch.randn(
            len(label_B),
            self.means_KD.shape[1],
            generator=generator,
            dtype=self.means_KD.dtype,
            device=generator.device,
        )
        x0_BD = torch.empty_like(z_BD)
        for k, rows in rows_of_classes(label_B, len(self.means_KD)):
            scaled_BD = z_BD[rows] * self.eigenvalues_KD[k].sqrt()
            x0_BD[rows] = self.means_KD[k] + scaled_BD @ self.eigenvectors_KDD[k].T
        channels, height, width = image_shape
        means_Bchw = x0_BD.view(-1, channels, height // self.block_side, width // self.block_side)
        return in_blocks(means_Bchw, self.block_side)


def block_means(x_BCHW: Tensor, side: int) -> Tensor:
    """Means of squares of `side` × `side` pixels, a divisor of height and width."""
    return nn.functional.avg_pool2d(x_BCHW, side)


def in_blocks(x_BCHW: Tensor, side: int) -> Tensor:
    """Every pixel as a square of `side` × `side` pixels."""
    return x_BCHW.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3) if side > 1 else x_BCHW


def rows_of_classes(label_B: Tensor, num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """(k, indices of its images) for every class: one matrix product per class instead of one per image."""
    for k in range(num_classes):
        yield k, (label_B == k).nonzero().flatten()


def shrinkage(eigenvalues_D: Tensor, sigma_B: Tensor) -> Tensor:
    """λ/(λ + σ²) for every noise level and eigenvalue, BD."""
    return eigenvalues_D / (eigenvalues_D + sigma_B.to(eigenvalues_D.dtype).square()[:, None])
