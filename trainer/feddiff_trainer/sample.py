"""The stage `sample`: images from the shared denoiser alone, the owner's personal one alone, and both with a hand-over.

All three start from the same noise. Images that a personal denoiser had a part in stay in the owner's store.
"""

import os
import sys

import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.stages import SampleSpec

from .denoisers import denoiser_from_bytes, most_bytes
from .denoising import Denoise
from .drawing import (
    CHUNK,
    Drawing,
    draw_alone,
    draw_both,
    draw_shared,
    drawing_of,
    labels_of,
    pack,
    save_npz,
    to_pixels,
)
from .network import NetworkConfig
from .stage import report_progress, run_stage
from .stores import Store, get_verified, open_store
from .train_shared import SIGMA_DATA, image_shape, network_config, sigma_data_of


def body(spec: SampleSpec) -> dict[str, str]:
    owner_store = open_store(spec.owner_store, "owner")
    images, label_N = draw_arms(spec, read_shared(spec), read_personal(spec, owner_store), generator_of(spec))
    if spec.output is not None:
        save_npz(spec.output, images, label_N)
    else:
        owner_store.put(layout.samples(spec.job.uid, spec.client), pack(images, label_N))
    return {}


def read_personal(spec: SampleSpec, owner_store: Store) -> Denoise:
    key = layout.personal_denoiser(spec.job.uid, spec.client)
    return denoiser_from_bytes(owner_store.get(key), key, network_of(spec, SIGMA_DATA))


def read_shared(spec: SampleSpec) -> Denoise:
    """The shared denoiser that the planner heard of. It is another party's: its size follows from the job alone."""
    store, key = open_store(spec.federation_store, "federation"), layout.shared_denoiser(spec.job.uid)
    config = network_of(spec, sigma_data_of(spec))
    side = spec.privacy.block_side_or_one
    most = most_bytes("gaussian" if spec.shared.denoiser == "closedForm" else "unet", config, side)
    return denoiser_from_bytes(get_verified(store, key, spec.shared_denoiser_sha256, most), key, config, side)


def network_of(spec: SampleSpec, sigma_data: float) -> NetworkConfig:
    return network_config(spec.network, spec.image, spec.classes.count, sigma_data)


def generator_of(spec: SampleSpec) -> torch.Generator:
    """The run's own samples are the same at every attempt; further ones are new whenever they are asked for."""
    seed = spec.seed_or_zero if spec.output is None else int.from_bytes(os.urandom(8), "big")
    return torch.Generator().manual_seed(seed)


def draw_arms(
    spec: SampleSpec, shared: Denoise, personal: Denoise, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """uint8 images N×C×H×W by arm (`both`, `shared`, `personal`) and their labels."""
    drawing = drawing_of(spec.privacy, spec.diffusion, spec.sampling)
    label_N = labels_of(spec.classes.count, spec.sampling.images_per_class)
    parts: dict[str, list[Tensor]] = {"both": [], "shared": [], "personal": []}
    for start in range(0, len(label_N), CHUNK):
        label_B = label_N[start : start + CHUNK]
        noise_BCHW = torch.randn(len(label_B), *image_shape(spec.image), generator=generator)
        for arm, x0_BCHW in _arms(drawing, shared, personal, noise_BCHW, label_B, generator).items():
            parts[arm].append(to_pixels(x0_BCHW))
        report_progress(start + len(label_B), len(label_N), "images")
    return {arm: torch.cat(images) for arm, images in parts.items()}, label_N


def _arms(
    drawing: Drawing,
    shared: Denoise,
    personal: Denoise,
    noise_BCHW: Tensor,
    label_B: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    return {
        "both": draw_both(drawing, shared, personal, noise_BCHW, label_B, generator),
        "shared": draw_shared(drawing, shared, noise_BCHW, label_B, generator),
        "personal": draw_alone(drawing, personal, noise_BCHW, label_B, generator),
    }


if __name__ == "__main__":
    sys.exit(run_stage(SampleSpec, body))
