"""The stage `train-shared`: one denoiser for high noise, trained by all ranks on the releases that count."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from feddiff_protocol import layout
from feddiff_protocol.api import ComputeSpec, ImageSpec, Mechanism, NetworkSpec, Timeline
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_protocol.stages import OwnerStageSpec, TrainSharedSpec
from feddiff_protocol.telemetry import CHECKPOINT, DATA_WAIT, GPU_MEMORY, IMAGES, LOSS, PROGRESS, STEPS

from .batches import Source, loss_of, noised_images, pool_draws, records
from .checkpoints import Checkpoints
from .denoisers import denoiser_bytes
from .denoising import ClassGaussian
from .drawing import draw_shared, drawing_of, labels_of, pack, to_pixels
from .fetching import ALONE
from .network import Denoiser, NetworkConfig
from .pooling import Owner, OwnerSummary, moments_of, pool
from .released import GaussianRelease, PrivunitRelease, Release, Releases, Terms, read_releases
from .stage import report_progress, run_stage
from .stores import Store, open_store
from .telemetry import tell, time_told
from .training import BatchLoss, Progress, World, distributed, train


@dataclass(frozen=True)
class NoisedImages:
    """The noised images of all owners: D̃/α, or, on the restarted timeline, D̃ itself. images_NCHW: float32, [-1, 1]
    units; labels_N: int64."""

    images_NCHW: Tensor
    labels_N: Tensor


Pooled = ClassGaussian | NoisedImages
"""What all releases say together."""

EMA_WIDTH = 0.1  # of the run: the average reaches over about the last fifth of the training
SIGMA_DATA = 0.5  # of clean images in [-1, 1]
REPORTED_PER_CLASS = 10


def body(spec: TrainSharedSpec) -> dict[str, str]:
    store = open_store(spec.federation_store, "federation")
    with distributed() as world:
        with time_told(DATA_WAIT):
            pooled = pooled_of(spec, releases_of(spec, store, spec.num_classes, world))
        tell_gpu_memory(world.device)
        checkpoints = Checkpoints(store, layout.shared_checkpoints(spec.job.uid))
        show = partial(show_progress_and_loss, batch=spec.shared.batch)
        denoiser = shared_denoiser(spec, pooled, world, show, checkpoints)
        if world.rank != 0:
            return {}
        weights = denoiser_bytes(denoiser)
        store.put(layout.shared_samples(spec.job.uid), shared_samples(spec, denoiser, world.device))
        store.put(layout.shared_denoiser(spec.job.uid), weights)
        return {"denoiser": hashlib.sha256(weights).hexdigest()}


def shared_denoiser(
    spec: TrainSharedSpec,
    pooled: Pooled,
    world: World,
    on_progress: Callable[[Progress], None],
    checkpoints: Checkpoints | None = None,
) -> nn.Module:
    """The shared denoiser: trained, or the pooled Gaussian's own where the job asks for the closed form."""
    if spec.shared.denoiser == "closedForm":
        assert isinstance(pooled, ClassGaussian), "noised images are nobody's Gaussian"
        return pooled.to(world.device)
    torch.manual_seed(spec.seed_or_zero)  # initial weights, equal on all ranks; nothing private depends on them
    config = network_config(spec.network, spec.image, spec.num_classes, sigma_data_of(spec))
    return train(
        new_denoiser(config, spec.compute),
        shared_loss(spec, pooled, config.sigma_data, world.device),
        world=world,
        num_images=spec.shared.images,
        batch=spec.shared.batch,
        learning_rate=float(spec.shared.learning_rate),
        ema_width=EMA_WIDTH,
        seed=spec.seed_or_zero,
        on_progress=on_progress,
        on_checkpoint=lambda: tell(CHECKPOINT, time.time()),
        checkpoints=checkpoints,
        accumulation=spec.shared.accumulation,
        bfloat16=in_bfloat16(spec.compute),
        compiled=spec.compute.compile,
    )


def new_denoiser(config: NetworkConfig, compute: ComputeSpec) -> Denoiser:
    """Untrained, its weights drawn by torch's global generator, to be trained as `compute` says."""
    denoiser = Denoiser(config)
    if compute.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    return denoiser


def in_bfloat16(compute: ComputeSpec) -> bool | None:
    """As `train` takes it."""
    return None if compute.precision == "auto" else compute.precision == "bfloat16"


def shared_loss(spec: TrainSharedSpec, pooled: Pooled, sigma_data: float, device: torch.device) -> BatchLoss:
    """On what was pooled ordinary diffusion above the split on draws; on noised images one of the two timelines."""
    schedule, promise = schedule_of(spec.diffusion), promise_of(spec.privacy, spec.diffusion)
    if isinstance(pooled, ClassGaussian):
        sigmas = promise.split_sigma, schedule.sigmas[-1]
        source = pool_draws(pooled.to(device), image_shape(spec.image), sigmas)
    elif spec.diffusion.timeline is Timeline.RESTARTED:
        sigmas = schedule.sigmas[0], schedule.sigmas[-1]  # the released images themselves play the clean ones
        source = records(pooled.images_NCHW.to(device), pooled.labels_N.to(device), sigmas)
    else:
        source = noised_source(spec, pooled, device)
    return loss_of(source, sigma_data)


def noised_source(spec: TrainSharedSpec | OwnerStageSpec, pooled: NoisedImages, device: torch.device) -> Source:
    """Training data from noised images: above the split, below which they say nothing."""
    sigmas = promise_of(spec.privacy, spec.diffusion).split_sigma, schedule_of(spec.diffusion).sigmas[-1]
    return noised_images(pooled.images_NCHW.to(device), pooled.labels_N.to(device), *sigmas)


def releases_of(
    spec: TrainSharedSpec | OwnerStageSpec, store: Store, num_classes: int, world: World = ALONE
) -> Releases:
    """Every release that counts, in the order of the job's clients, on every rank."""
    return read_releases(store, spec.releases, terms_of(spec, num_classes), world)


def terms_of(spec: TrainSharedSpec | OwnerStageSpec, num_classes: int) -> Terms:
    """What the job says of every release."""
    return Terms(spec.job.uid, spec.image, num_classes, spec.privacy, spec.diffusion)


def pooled_of(spec: TrainSharedSpec, releases: Releases) -> Pooled:
    if spec.privacy.mechanism is not Mechanism.GAUSSIAN:
        return pool_of(releases, spec)
    restarted, step = spec.diffusion.timeline is Timeline.RESTARTED, promise_of(spec.privacy, spec.diffusion).split_step
    return pooled_images(releases, scale=schedule_of(spec.diffusion).alpha(step) if restarted else 1.0)


def pool_of(
    releases: Releases,
    spec: TrainSharedSpec | OwnerStageSpec,
    at_home: Mapping[int, Callable[[Owner], Owner]] | None = None,
) -> ClassGaussian:
    """The pooled Gaussian of all owners' releases: post-processing, everybody computes the same. at_home: see pool."""
    variance_guess, own_weight = spec.privacy.variance_guess_or_default, spec.shared.own_covariance_weight
    gaussians = pool(owners_of(releases), float(variance_guess), float(own_weight), at_home=at_home)
    return ClassGaussian(*gaussians, spec.privacy.block_side_or_one)


def owners_of(releases: Iterable[Release]) -> Iterator[Owner]:
    """What can be pooled of every release, in their order: summaries as they are, of privunit the classes' moments."""
    for release in releases:
        if isinstance(release, OwnerSummary):
            yield release
        elif isinstance(release, PrivunitRelease):
            images_ND, largest_trace = release.images_NCHW.flatten(1), release.norm**2
            yield moments_of(images_ND, release.labels_N, release.num_classes, release.noise_std, largest_trace)


def pooled_images(releases: Releases, scale: float = 1.0) -> NoisedImages:
    """scale·D̃/α in the order of the owners; beside all images there are those of one owner at a time."""
    images_NCHW, labels_N, start = torch.empty(0), torch.empty(releases.num_records, dtype=torch.int64), 0
    for release in releases:
        assert isinstance(release, GaussianRelease), "one job, one mechanism"
        if start == 0:
            images_NCHW = torch.empty(releases.num_records, *release.images_NCHW.shape[1:])
        end = start + len(release.images_NCHW)
        torch.mul(release.images_NCHW, scale, out=images_NCHW[start:end])
        labels_N[start:end] = release.labels_N
        start = end
    return NoisedImages(images_NCHW, labels_N)


def sigma_data_of(spec: TrainSharedSpec | OwnerStageSpec) -> float:
    """Standard deviation of what plays the clean image: images, or, restarted, x̃ = α·x + s·z."""
    if spec.diffusion.timeline is not Timeline.RESTARTED:
        return SIGMA_DATA
    schedule, step = schedule_of(spec.diffusion), promise_of(spec.privacy, spec.diffusion).split_step
    return math.hypot(schedule.alpha(step) * SIGMA_DATA, schedule.s(step))


def shared_samples(spec: TrainSharedSpec, denoiser: nn.Module, device: torch.device) -> bytes:
    """What the shared denoiser alone makes of a few labels: public, for the job report."""
    generator = torch.Generator(device).manual_seed(0)
    label_N = labels_of(spec.num_classes, REPORTED_PER_CLASS).to(device)
    noise_NCHW = torch.randn(len(label_N), *image_shape(spec.image), generator=generator, device=device)
    drawing = drawing_of(spec.privacy, spec.diffusion, spec.sampling)
    x0_NCHW = draw_shared(drawing, denoiser, noise_NCHW, label_N, generator)
    return pack({"images": to_pixels(x0_NCHW)}, label_N)


def network_config(network: NetworkSpec, image: ImageSpec, num_classes: int, sigma_data: float) -> NetworkConfig:
    return NetworkConfig(
        image_channels=image.channels,
        image_height=image.height,
        image_width=image.width,
        num_classes=num_classes,
        **asdict(network.size),
        backbone=network.backbone,
        sigma_data=sigma_data,
    )


def image_shape(image: ImageSpec) -> tuple[int, int, int]:
    return image.channels, image.height, image.width


def show_progress_and_loss(progress: Progress, batch: int) -> None:
    """The shared denoiser sees released data only, so its loss may be shown."""
    tell(STEPS, math.ceil(progress.images / batch))
    tell(IMAGES, progress.images)
    tell(LOSS, progress.loss)
    tell(PROGRESS, progress.images / progress.num_images)
    report_progress(
        progress.images,
        progress.num_images,
        "images",
        loss=round(progress.loss, 5),
        images_per_second=round(progress.images_per_second, 1),
    )


def tell_gpu_memory(device: torch.device) -> None:
    if device.type == "cuda":
        tell(GPU_MEMORY, lambda: float(torch.cuda.memory_reserved(device)))


if __name__ == "__main__":
    sys.exit(run_stage(TrainSharedSpec, body))
