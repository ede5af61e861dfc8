"""What a training step draws: clean records, draws from the pooled Gaussian or noised images, and noise levels.

Every source gives images y0 that are clean (σ0 = 0) or noised for ever (σ0 = split); one loss fits both, because
denoising_loss is ambient_loss at σ0 = 0.

Shapes: N records, B images of a batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .clipped_gaussian import ClippedGaussian
from .denoising import ClassGaussian, ambient_loss, log_normal_sigmas, log_uniform_sigmas
from .network import CLIPPED, UNCLIPPED
from .training import BatchLoss


@dataclass(frozen=True)
class Batch:
    y0_BCHW: Tensor
    sigma0_B: Tensor
    sigma_B: Tensor
    label_B: Tensor
    flag_B: Tensor

    def of(self, mine: slice) -> "Batch":
        return Batch(self.y0_BCHW[mine], self.sigma0_B[mine], self.sigma_B[mine], self.label_B[mine], self.flag_B[mine])


Source = Callable[[int, torch.Generator], Batch]
"""source(count, generator): `count` images with their noise levels, drawn from the generator alone."""


def records(x0_NCHW: Tensor, label_N: Tensor, sigmas: tuple[float, float]) -> Source:
    """Clean records, uniform with replacement: classes come as they are (balancing them makes a denoiser copy the
    rare ones). σ is log-normal between `sigmas`."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        index_B = torch.randint(len(x0_NCHW), (count,), generator=generator, device=generator.device)
        sigma_B = log_normal_sigmas(count, *sigmas, generator)
        return _batch(x0_NCHW[index_B], label_N[index_B], 0.0, sigma_B)

    return draw


def clip_mixed(source: Source, clip: Callable[[Tensor], Tensor]) -> Source:
    """`source` with every other image clipped as for a release and flagged so (PFDM, CVPR 2026)."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        batch = source(count, generator)
        flag_B = torch.arange(count, device=generator.device) % 2 * CLIPPED
        clipped_B = (flag_B == CLIPPED)[:, None, None, None]
        y0_BCHW = torch.where(clipped_B, clip(batch.y0_BCHW), batch.y0_BCHW)
        return Batch(y0_BCHW, batch.sigma0_B, batch.sigma_B, batch.label_B, flag_B)

    return draw


def all_clipped(source: Source) -> Source:
    """`source`, every image flagged as clipped: no other leaves an owner."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        batch = source(count, generator)
        return replace(batch, flag_B=torch.full_like(batch.flag_B, CLIPPED))

    return draw


def pool_draws(pool: ClassGaussian, image_shape: tuple[int, int, int], sigmas: tuple[float, float]) -> Source:
    """Images with the pool's mean and covariance, classes uniform: public, so everybody may train on as many as they
    like."""
    num_classes, images = len(pool.means_KD), ClippedGaussian(pool)

    def draw(count: int, generator: torch.Generator) -> Batch:
        label_B = torch.randint(num_classes, (count,), generator=generator, device=generator.device)
        sigma_B = log_uniform_sigmas(count, *sigmas, generator)
        return _batch(images.draw(label_B, image_shape, generator).float(), label_B, 0.0, sigma_B)

    return draw


def filling_draws(
    pool: ClassGaussian, image_shape: tuple[int, int, int], sigmas: tuple[float, float], counts_K: Tensor
) -> Source:
    """Images with the pool's mean and covariance that fill every class up to the owner's most frequent one.

    A class comes by how many records it is short of, all alike where none is: common classes are best learnt from
    records, and rare ones would be copied from a handful. σ is log-normal as for records, between `sigmas`.
    """
    images, missing_K = ClippedGaussian(pool), (counts_K.max() - counts_K).double()
    weight_K = missing_K if bool(missing_K.any()) else torch.ones_like(missing_K)

    def draw(count: int, generator: torch.Generator) -> Batch:
        label_B = torch.multinomial(weight_K, count, replacement=True, generator=generator)
        sigma_B = log_normal_sigmas(count, *sigmas, generator)
        return _batch(images.draw(label_B, image_shape, generator).float(), label_B, 0.0, sigma_B)

    return draw


def filling_records(x0_NCHW: Tensor, label_N: Tensor, sigmas: tuple[float, float], counts_K: Tensor) -> Source:
    """What filling_draws is, with images that are there in place of draws."""
    missing_K = (counts_K.max() - counts_K).double()
    weight_K = missing_K if bool(missing_K.any()) else torch.ones_like(missing_K)
    # A class comes by what it is short of, however many images of it there are.
    num_K = torch.bincount(label_N, minlength=len(counts_K)).clamp(min=1)
    weight_N = (weight_K / num_K)[label_N]

    def draw(count: int, generator: torch.Generator) -> Batch:
        index_B = torch.multinomial(weight_N, count, replacement=True, generator=generator)
        return _batch(x0_NCHW[index_B], label_N[index_B], 0.0, log_normal_sigmas(count, *sigmas, generator))

    return draw


def noised_images(y_NCHW: Tensor, label_N: Tensor, split_sigma: float, highest_sigma: float) -> Source:
    """Released images y = x̃/α at the split's noise level, to be noised further: σ above the split only."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        index_B = torch.randint(len(y_NCHW), (count,), generator=generator, device=generator.device)
        sigma_B = log_uniform_sigmas(count, split_sigma, highest_sigma, generator)
        return _batch(y_NCHW[index_B], label_N[index_B], split_sigma, sigma_B)

    return draw


def mixed(own: Source, released: Source, released_share: float) -> Source:
    """A fixed share of every batch from `released`, the rest from `own`, interleaved so that ranks get equal parts."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        num_released = round(released_share * count)
        if num_released == 0:
            return own(count, generator)
        parts = [own(count - num_released, generator), released(num_released, generator)]
        order_B = torch.randperm(count, generator=generator, device=generator.device)
        fields = ("y0_BCHW", "sigma0_B", "sigma_B", "label_B", "flag_B")
        return Batch(*(torch.cat([getattr(part, name) for part in parts])[order_B] for name in fields))

    return draw


def loss_of(source: Source, sigma_data: float) -> BatchLoss:
    """The training loop's loss: a whole batch is drawn, this rank's slice goes through the model."""

    def batch_loss(model: nn.Module, generator: torch.Generator, count: int, mine: slice) -> Tensor:
        drawn = source(count, generator)
        noise_BCHW = torch.randn(drawn.y0_BCHW.shape, generator=generator, device=generator.device)[mine]
        b = drawn.of(mine)
        loss_B = ambient_loss(model, b.y0_BCHW, b.sigma0_B, b.sigma_B, b.label_B, b.flag_B, noise_BCHW, sigma_data)
        return loss_B.mean()

    return batch_loss


def _batch(y0_BCHW: Tensor, label_B: Tensor, sigma0: float, sigma_B: Tensor) -> Batch:
    flag_B = torch.full_like(label_B, UNCLIPPED)
    return Batch(y0_BCHW, torch.full_like(sigma_B, sigma0), sigma_B, label_B, flag_B)
