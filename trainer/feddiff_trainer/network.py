"""The network that shared and personal denoisers have in common: a class-conditional U-Net and its preconditioning.

Small images on two cores and larger ones on a GPU take the same path. The stem folds 2 × 2 pixels into channels
(at full resolution a convolution costs most and learns least), each level halves the grid until at most 4 × 4
cells are left, and there a fully connected block sees the whole image, at the speed of a matrix product.

Shapes: B images, C channels, H height, W width, E embedding, D = all values of one image's coarsest grid.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from feddiff_protocol.errors import ConfigurationInvalid

COARSEST_GRID = 4
DIFFUSERS_COARSEST_GRID = 7
WIDEST_LEVEL = 4  # a level has at most this many times base_width channels
DENSE_BLOCKS = 2
UNCLIPPED, CLIPPED = 0, 1
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class NetworkConfig:
    """What the two denoisers must agree on to be built again from their weights.

    Grids of at most attention_cells a side have self-attention: the coarsest among the fully connected blocks, others
    after their convolutions.

    sigma_data is the standard deviation of the clean images around zero, in the images' own units: 0.5 for pixels
    in [-1, 1] (Karras et al. 2022, table 1), about 1 for released images α·v + s·z that play the clean image.
    """

    image_channels: int
    image_height: int
    image_width: int
    num_classes: int
    base_width: int = 32
    num_blocks: int = 1
    attention_cells: int = 0
    backbone: str = "unet"  # or "diffusers"
    sigma_data: float = 0.5


class Denoiser(nn.Module):
    """E[x0 | y_σ] for y_σ = x0 + σ·z, by a U-Net with the preconditioning of Karras et al. 2022, equation 7.

    Raises ConfigurationInvalid for diffusers' U-Net without diffusers.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.unet: UNet | DiffusersUNet = DiffusersUNet(config) if config.backbone == "diffusers" else UNet(config)

    def checkpoint_gradients(self) -> None:
        """From now on backward passes compute each block's activations again instead of keeping them."""
        self.unet.checkpoint_gradients()

    def forward(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, flag_B: Tensor | None = None) -> Tensor:
        """x0_BCHW, the estimated clean images, float32. σ > 0; flag 0 asks for unclipped images, 1 for clipped."""
        sigma_B = sigma_B.float()
        c_skip_B, c_out_B, c_in_B, c_noise_B = preconditioning(sigma_B, self.config.sigma_data)
        flag_B = torch.full_like(label_B, UNCLIPPED) if flag_B is None else flag_B
        f_BCHW: Tensor = self.unet(per_image(c_in_B) * y_BCHW.float(), c_noise_B, label_B, flag_B)
        return per_image(c_skip_B) * y_BCHW.float() + per_image(c_out_B) * f_BCHW.float()


def preconditioning(sigma_B: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1: network in and out have unit variance at any σ."""
    total_B = sigma_B.square() + sigma_data**2
    return sigma_data**2 / total_B, sigma_B * sigma_data / total_B.sqrt(), total_B.rsqrt(), sigma_B.log() / 4


def per_image(value_B: Tensor) -> Tensor:
    """value_B111, one number per image, ready to multiply images with."""
    return value_B[:, None, None, None]


class UNet(nn.Module):
    """F(x; noise level, class, flag) of the same shape as x; exactly zero before the first training step."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        grids, widths = levels(config)
        embedding = 4 * config.base_width
        pixels = 4 * config.image_channels
        self.embed = Embedding(config.num_classes, embedding)
        self.stem = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.encode = nn.ModuleList(_blocks(config, *level, embedding) for level in zip(grids, widths, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        self.middle = _middle(grids[-1], widths[-1], embedding, config)
        self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in widths)
        self.decode = nn.ModuleList(_blocks(config, *level, embedding) for level in zip(grids, widths, strict=True))
        self.up = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairwise(widths))
        self.out = zeroed(nn.Conv2d(widths[0], pixels, 3, padding=1))
        self.run = run_blocks

    def checkpoint_gradients(self) -> None:
        self.run = run_blocks_twice

    def forward(self, x_BCHW: Tensor, noise_level_B: Tensor, label_B: Tensor, flag_B: Tensor) -> Tensor:
        e_BE = self.embed(noise_level_B, label_B, flag_B)
        h_BCHW = self.stem(fold(x_BCHW))
        skips = []
        for level, blocks in enumerate(self.encode):
            if level > 0:
                h_BCHW = self.down[level - 1](fold(h_BCHW))
            h_BCHW = self.run(blocks, h_BCHW, e_BE)
            skips.append(h_BCHW)
        h_BCHW = self.run(self.middle, h_BCHW, e_BE)
        for level in reversed(range(len(skips))):
            if level < len(skips) - 1:
                h_BCHW = unfold(self.up[level](h_BCHW), skips[level])
            h_BCHW = self.merge[level](torch.cat([h_BCHW, skips[level]], dim=1))
            h_BCHW = self.run(self.decode[level], h_BCHW, e_BE)
        return unfold(self.out(F.silu(rms_norm(h_BCHW))), x_BCHW)


def levels(config: NetworkConfig) -> tuple[list[tuple[int, int]], list[int]]:
    """Grid (height, width) and number of channels of every level, finest first."""
    grids = [_halved((config.image_height, config.image_width))]
    while max(grids[-1]) > COARSEST_GRID:
        grids.append(_halved(grids[-1]))
    return grids, [config.base_width * min(2**level, WIDEST_LEVEL) for level in range(len(grids))]


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def fold(x_BCHW: Tensor) -> Tensor:
    """Half the grid, four times the channels; an odd edge is repeated first."""
    odd_height, odd_width = x_BCHW.shape[-2] % 2, x_BCHW.shape[-1] % 2
    if odd_height or odd_width:
        x_BCHW = F.pad(x_BCHW, (0, odd_width, 0, odd_height), mode="replicate")
    return F.pixel_unshuffle(x_BCHW, 2)


def unfold(h_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Twice the grid, a quarter of the channels, cut to the grid of `like`: undoes fold."""
    return F.pixel_shuffle(h_BCHW, 2)[..., : like_BCHW.shape[-2], : like_BCHW.shape[-1]]


class Embedding(nn.Module):
    """e_BE from noise level, class and flag: Fourier features of the level plus learned vectors, then one layer."""

    frequencies: Tensor

    def __init__(self, num_classes: int, embedding: int) -> None:
        super().__init__()
        # Octaves of c_noise = ln(σ)/4, which spans about [-1.2, 1.3] for σ in [0.01, 157].
        octaves = torch.tensor([0.5 * math.pi * 2.0**octave for octave in range(6)])
        self.register_buffer("frequencies", octaves, persistent=False)
        self.noise = nn.Linear(13, embedding)
        self.label = vectors(num_classes, embedding)
        self.flag = zeroed(vectors(2, embedding))
        self.mix = nn.Linear(embedding, embedding)

    def forward(self, noise_level_B: Tensor, label_B: Tensor, flag_B: Tensor) -> Tensor:
        phase_BF = noise_level_B[:, None] * self.frequencies
        features_BF = torch.cat([noise_level_B[:, None], phase_BF.sin(), phase_BF.cos()], dim=1)
        e_BE: Tensor = self.noise(features_BF) + self.label(label_B) + self.flag(flag_B)
        mixed_BE: Tensor = self.mix(F.silu(e_BE))
        return F.silu(mixed_BE)


def vectors(count: int, width: int) -> nn.Embedding:
    """Learned vectors as nn.Embedding draws them; none on the device "meta", where drawing takes two seconds to import
    torch.compile: as long as some of our processes run."""
    table = nn.Embedding(count, width, _weight=torch.empty(count, width))
    if not table.weight.is_meta:
        nn.init.normal_(table.weight)
    return table


class ConvBlock(nn.Module):
    """Residual block of two 3 × 3 convolutions; the embedding scales and shifts between them."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.second = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
        h_BCHW = rms_norm(self.first(F.silu(rms_norm(x_BCHW))))
        scale_BC, shift_BC = self.modulate(e_BE).chunk(2, dim=1)
        h_BCHW = h_BCHW * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
        change_BCHW: Tensor = self.second(F.silu(h_BCHW))
        return x_BCHW + change_BCHW


class DenseBlock(nn.Module):
    """Residual block in which every value of the coarsest grid sees every other: a two-layer perceptron."""

    def __init__(self, values: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(values, hidden)
        self.modulate = nn.Linear(embedding, 2 * hidden)
        self.second = zeroed(nn.Linear(hidden, values))

    def forward(self, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
        x_BD = x_BCHW.flatten(1)
        scale_BD, shift_BD = self.modulate(e_BE).chunk(2, dim=1)
        h_BD = self.first(F.rms_norm(x_BD, x_BD.shape[1:])) * (1 + scale_BD) + shift_BD
        change_BD: Tensor = self.second(F.silu(h_BD))
        return x_BCHW + change_BD.view_as(x_BCHW)


class AttentionBlock(nn.Module):
    """Residual self-attention among the cells of one grid (Vaswani et al. 2017, equation 1)."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.heads = width // 32 if width % 32 == 0 else 1
        self.modulate = nn.Linear(embedding, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.project = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
        batch, width, height, across = x_BCHW.shape
        h_BCHW = rms_norm(x_BCHW) * (1 + self.modulate(e_BE)[:, :, None, None])
        qkv = self.qkv(h_BCHW).view(batch, 3, self.heads, width // self.heads, height * across).transpose(-1, -2)
        q, k, v = qkv.unbind(1)
        a_BCHW = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x_BCHW.shape)
        change_BCHW: Tensor = self.project(a_BCHW)
        return x_BCHW + change_BCHW


class DiffusersUNet(nn.Module):
    """UNet2DModel of diffusers in the place of UNet: the same arguments, sizes and conditions, grids one level finer.

    An image that does not halve often enough is padded by its edges. Clipped images are further classes.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ConfigurationInvalid(
                "network.backbone: diffusers needs the package diffusers, found none; install it, pip install"
                " 'feddiff[diffusers]', or use unet"
            ) from None
        grids, widths = diffusers_levels(config)
        attends = [max(grid) <= config.attention_cells for grid in grids]
        self.num_classes, self.multiple = config.num_classes, 2 ** (len(grids) - 1)
        self.unet = UNet2DModel(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            layers_per_block=config.num_blocks,
            block_out_channels=widths,
            down_block_types=["AttnDownBlock2D" if each else "DownBlock2D" for each in attends],
            up_block_types=["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
            add_attention=attends[-1],
            attention_head_dim=math.gcd(32, config.base_width),
            norm_num_groups=math.gcd(32, config.base_width),
            num_class_embeds=2 * config.num_classes,
        )
        zeroed(self.unet.conv_out)

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def forward(self, x_BCHW: Tensor, noise_level_B: Tensor, label_B: Tensor, flag_B: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        padded_BCHW = F.pad(x_BCHW, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        class_B = label_B + self.num_classes * flag_B
        # Its sinusoids are made for steps of 0 to 1000; c_noise spans about [-1.2, 1.3].
        f_BCHW: Tensor = self.unet(padded_BCHW, 1000 * noise_level_B, class_B).sample
        return f_BCHW[..., :height, :width]


def diffusers_levels(config: NetworkConfig) -> tuple[list[tuple[int, int]], list[int]]:
    """As `levels`, from the whole image until at most 7 cells are left: 28 halves twice without a remainder."""
    grids = [(config.image_height, config.image_width)]
    while max(grids[-1]) > DIFFUSERS_COARSEST_GRID:
        grids.append(_halved(grids[-1]))
    return grids, [config.base_width * min(2**level, WIDEST_LEVEL) for level in range(len(grids))]


def rms_norm(x_BCHW: Tensor) -> Tensor:
    """x with unit mean square over the channels of each cell.

    Not GroupNorm: in torch 2.13 its CPU backward crashes the process on channels_last input without gradient.
    """
    if torch._C._are_functorch_transforms_active():  # dp_sgd's, which take no function with a gradient of its own
        return x_BCHW * inverse_rms(x_BCHW)
    y_BCHW: Tensor = _RmsNorm.apply(x_BCHW)  # type: ignore[no-untyped-call]
    return y_BCHW


def inverse_rms(x_BCHW: Tensor) -> Tensor:
    return torch.rsqrt(x_BCHW.square().mean(dim=1, keepdim=True) + 1e-5)


class _RmsNorm(torch.autograd.Function):
    """y = x/r with r² = mean x² + 1e-5, and dL/dx = (g - y·mean(g·y))/r for g = dL/dy, in a third of the passes over
    memory that autograd's derivative takes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BCHW: Tensor) -> Tensor:
        inverse_B1HW = inverse_rms(x_BCHW)
        y_BCHW = x_BCHW * inverse_B1HW
        ctx.save_for_backward(y_BCHW, inverse_B1HW)
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BCHW: Tensor) -> Tensor:
        y_BCHW, inverse_B1HW = ctx.saved_tensors
        dx_BCHW: Tensor = (g_BCHW - y_BCHW * (g_BCHW * y_BCHW).mean(dim=1, keepdim=True)) * inverse_B1HW
        return dx_BCHW


def zeroed(module: M) -> M:
    """The module with all parameters zero: its residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def run_blocks(blocks: nn.Module, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
    for block in blocks.children():
        x_BCHW = block(x_BCHW, e_BE)
    return x_BCHW


def run_blocks_twice(blocks: nn.Module, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
    """The same; where gradients are asked for, nothing inside of a block is kept for them (Chen et al. 2016)."""
    for block in blocks.children():
        x_BCHW = checkpoint(block, x_BCHW, e_BE, use_reentrant=False)
    return x_BCHW


def _blocks(config: NetworkConfig, grid: tuple[int, int], width: int, embedding: int) -> nn.ModuleList:
    blocks: list[nn.Module] = [ConvBlock(width, embedding) for _ in range(config.num_blocks)]
    if COARSEST_GRID < max(grid) <= config.attention_cells:
        blocks.append(AttentionBlock(width, embedding))
    return nn.ModuleList(blocks)


def _middle(grid: tuple[int, int], width: int, embedding: int, config: NetworkConfig) -> nn.ModuleList:
    values, hidden = grid[0] * grid[1] * width, 16 * config.base_width
    blocks: list[nn.Module] = [DenseBlock(values, embedding, hidden) for _ in range(DENSE_BLOCKS)]
    if max(grid) <= config.attention_cells:
        blocks.insert(1, AttentionBlock(width, embedding))
    return nn.ModuleList(blocks)
