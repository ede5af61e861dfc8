"""Images from trained denoisers: the shared one alone, a personal one alone, and both with a hand-over at the split.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from feddiff_protocol.api import DiffusionSpec, PrivacySpec, SamplingSpec, Timeline
from feddiff_protocol.promise import promise_of, schedule_of

from .denoising import Denoise
from .sampler import Sampler, ddpm_ancestral, dpm_solver, hand_over, heun, levels_from, restarted, sampling_sigmas

CHUNK = 1024  # images carried through a sampler at once


@dataclass(frozen=True)
class Drawing:
    """How a job's images are drawn: where the split is, which levels are passed, by which sampler."""

    split_sigma: float
    split_alpha: float
    restarts: bool  # the shared denoiser makes noised images by a schedule of its own (the paper's timeline)
    schedule_sigmas: tuple[float, ...]
    steps: int  # from pure noise to an image
    sampler: str  # heun, ddpm or dpm

    def levels(self, split: bool) -> Tensor:
        return sampling_sigmas(self.schedule_sigmas, self.steps, split_sigma=self.split_sigma if split else None)

    def solver(self, generator: torch.Generator, hand_over_at: float | None = None) -> Sampler:
        match self.sampler:
            case "ddpm":
                return lambda denoise, y, sigmas, label: ddpm_ancestral(denoise, y, sigmas, label, generator)
            case "dpm":
                return lambda denoise, y, sigmas, label: dpm_solver(denoise, y, sigmas, label, hand_over_at)
            case _:
                return heun


def drawing_of(privacy: PrivacySpec, diffusion: DiffusionSpec, sampling: SamplingSpec) -> Drawing:
    promise, schedule = promise_of(privacy, diffusion), schedule_of(diffusion)
    return Drawing(
        split_sigma=promise.split_sigma,
        split_alpha=schedule.alpha(promise.split_step),
        restarts=diffusion.timeline is Timeline.RESTARTED,
        schedule_sigmas=schedule.sigmas,
        steps=sampling.steps,
        sampler=sampling.sampler,
    )


def draw_both(
    drawing: Drawing, shared: Denoise, personal: Denoise, y_NCHW: Tensor, label_N: Tensor, generator: torch.Generator
) -> Tensor:
    """x0_NCHW by the shared denoiser from noise to the split and the personal one from there; y is unit noise."""
    split, levels = drawing.split_sigma, drawing.levels(split=True)
    if drawing.restarts:
        solver, own, below = drawing.solver(generator), drawing.levels(split=False), levels_from(levels, split)
        return restarted(solver, shared, personal, own[0] * y_NCHW, own, below, drawing.split_alpha, label_N)
    solver = drawing.solver(generator, hand_over_at=split)
    return solver(hand_over(shared, personal, split), levels[0] * y_NCHW, levels, label_N)


def draw_shared(
    drawing: Drawing, shared: Denoise, y_NCHW: Tensor, label_N: Tensor, generator: torch.Generator
) -> Tensor:
    """What the shared denoiser makes alone: its estimate of x0 at the split, or, restarted, noised images."""
    solver = drawing.solver(generator)
    if drawing.restarts:
        own = drawing.levels(split=False)
        return solver(shared, own[0] * y_NCHW, own, label_N) / drawing.split_alpha
    levels = drawing.levels(split=True)
    to_the_split = torch.cat([levels[levels >= drawing.split_sigma], levels.new_zeros(1)])
    return solver(shared, levels[0] * y_NCHW, to_the_split, label_N)


def draw_alone(
    drawing: Drawing, denoise: Denoise, y_NCHW: Tensor, label_N: Tensor, generator: torch.Generator
) -> Tensor:
    """x0_NCHW by one denoiser from pure noise to the end."""
    levels = drawing.levels(split=False)
    return drawing.solver(generator)(denoise, levels[0] * y_NCHW, levels, label_N)


def draw_from_split(
    drawing: Drawing, personal: Denoise, y_NCHW: Tensor, label_N: Tensor, generator: torch.Generator
) -> Tensor:
    """x0_NCHW by a personal denoiser from the split alone, begun there with σ·z, which holds no image: a control."""
    below = levels_from(drawing.levels(split=True), drawing.split_sigma)
    return drawing.solver(generator)(personal, below[0] * y_NCHW, below, label_N)


def labels_of(num_classes: int, images_per_class: int) -> Tensor:
    """label_N: every class equally often, class after class."""
    return torch.arange(num_classes).repeat_interleave(images_per_class)


def to_pixels(x0_NCHW: Tensor) -> Tensor:
    """uint8 pixels from images in [-1, 1]; what lies outside is cut off."""
    return ((x0_NCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def pack(images: Mapping[str, Tensor], label_N: Tensor) -> bytes:
    """Safetensors of uint8 images N×C×H×W by name, and their labels."""
    return safetensors.torch.save({**images, "labels": label_N.to(torch.int64).cpu()})


def save_npz(path: str, images: Mapping[str, Tensor], label_N: Tensor) -> None:
    arrays: dict[str, Any] = {name: image.numpy() for name, image in images.items()}
    np.savez_compressed(path, **arrays, labels=label_N.numpy())
