"""The stage `train-personal`: an owner's denoiser, on its clean records at every noise level and, from
personal.releaseSigma or the split up, on what everybody released. It is not private for its owner's records and never
leaves the owner's store."""

import sys

import numpy as np
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import ComputeSpec, ImageSpec, Mechanism, PrivacySpec, Timeline
from feddiff_protocol.promise import schedule_of
from feddiff_protocol.stages import OwnerStageSpec, TrainPersonalSpec

from .batches import Source, all_clipped, clip_mixed, filling_draws, loss_of, mixed, records
from .checkpoints import Checkpoints
from .denoisers import denoiser_bytes
from .denoising import ClassGaussian
from .network import Denoiser
from .pooling import Owner, exact
from .records import Records, of_blocks, read_source
from .released import Releases
from .stage import report_progress, run_stage
from .stores import open_store
from .train_shared import (
    EMA_WIDTH,
    SIGMA_DATA,
    image_shape,
    in_bfloat16,
    network_config,
    new_denoiser,
    noised_source,
    pool_of,
    pooled_images,
    releases_of,
)
from .training import Progress, distributed, train


def body(spec: TrainPersonalSpec) -> dict[str, str]:
    own = read_source(spec.source, spec.image, spec.classes)
    releases = releases_of(spec, open_store(spec.federation_store, "federation"), spec.classes.count)
    owner_store = open_store(spec.owner_store, "owner")
    with distributed() as world:
        denoiser = train(
            initial_denoiser(spec, spec.compute),
            loss_of(source_of(spec, own, releases, world.device), SIGMA_DATA),
            world=world,
            num_images=spec.personal.images,
            batch=spec.personal.batch,
            learning_rate=float(spec.personal.learning_rate),
            ema_width=EMA_WIDTH,
            seed=spec.seed_or_zero,
            on_progress=show_progress,
            checkpoints=Checkpoints(owner_store, layout.personal_checkpoints(spec.job.uid, spec.client)),
            accumulation=spec.personal.accumulation,
            bfloat16=in_bfloat16(spec.compute),
            compiled=spec.compute.compile,
        )
    owner_store.put(layout.personal_denoiser(spec.job.uid, spec.client), denoiser_bytes(denoiser))
    return {}


def initial_denoiser(spec: OwnerStageSpec, compute: ComputeSpec | None = None) -> Denoiser:
    torch.manual_seed(spec.seed_or_zero)  # initial weights only
    config = network_config(spec.network, spec.image, spec.classes.count, SIGMA_DATA)
    return new_denoiser(config, compute or ComputeSpec())


def source_of(
    spec: TrainPersonalSpec,
    own: Records,
    releases: Releases,
    device: torch.device,
) -> Source:
    """Own records at every noise level; with them, at high noise, the releases, unless the paper's timeline is
    asked for, whose personal denoisers see clean records only."""
    sigmas = schedule_of(spec.diffusion).sigmas
    images_NCHW, label_N = images_of(own, spec.image)
    source = records(images_NCHW.to(device), label_N.to(device), (sigmas[0], sigmas[-1]))
    if spec.personal.clip_mix:
        source = clip_mixed(source, lambda x_BCHW: clipped_images(x_BCHW, spec.privacy))
    if spec.personal.release_share == 0 or spec.diffusion.timeline is Timeline.RESTARTED:
        return source
    if spec.privacy.mechanism is not Mechanism.GAUSSIAN:
        lowest = float(spec.personal.release_sigma_or_default)
        pool = personal_pool(spec, own, releases).to(device)
        counts_K = torch.bincount(label_N, minlength=spec.classes.count).to(device)
        released = filling_draws(pool, image_shape(spec.image), (lowest, sigmas[-1]), counts_K)
    else:
        released = noised_source(spec, pooled_images(releases), device)
        released = all_clipped(released) if spec.personal.clip_mix else released
    return mixed(source, released, float(spec.personal.release_share))


def personal_pool(spec: TrainPersonalSpec, own: Records, releases: Releases) -> ClassGaussian:
    """The pool with the owner's own sums exact in place of its release: as private as its records, it stays here."""
    blocks_ND = of_blocks(own, spec.privacy.block_side_or_one)

    def exactly(released: Owner) -> Owner:
        return exact(torch.from_numpy(blocks_ND[:]), torch.from_numpy(own.labels_N), released)

    positions = [number for number, reference in enumerate(spec.releases) if reference.client == spec.client]
    return pool_of(releases, spec, at_home=dict.fromkeys(positions, exactly))


def images_of(own: Records, image: ImageSpec) -> tuple[Tensor, Tensor]:
    """x0_NCHW in [-1, 1], float32, and label_N of an owner's records."""
    images_NCHW = np.float32(2 * own[:] - 1).reshape(len(own), *image_shape(image))
    return torch.from_numpy(images_NCHW), torch.from_numpy(own.labels_N)


def clipped_images(x_BCHW: Tensor, privacy: PrivacySpec) -> Tensor:
    """Images as the release clips them, [-1, 1] units in and out; nothing private hangs on this copy of the clip."""
    non_negative = privacy.clips_non_negative_pixels
    v_BCHW = (x_BCHW + 1) / 2 if non_negative else x_BCHW
    norm_B = v_BCHW.flatten(1).norm(dim=1).clamp(min=1e-12)
    scale_B = float(privacy.clip_norm) / norm_B
    if privacy.mechanism is not Mechanism.PRIVUNIT:  # which scales shorter images up, too
        scale_B = scale_B.clamp(max=1)
    v_BCHW = v_BCHW * scale_B[:, None, None, None]
    clipped_BCHW: Tensor = 2 * v_BCHW - 1 if non_negative else v_BCHW
    return clipped_BCHW


def show_progress(progress: Progress) -> None:
    """Step and percent only: loss and speed depend on private records."""
    report_progress(progress.images, progress.num_images, "images")


if __name__ == "__main__":
    sys.exit(run_stage(TrainPersonalSpec, body))
