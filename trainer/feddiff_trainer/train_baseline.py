"""One network of a baseline, in an experiment: what a job is compared with, trained as long and at the same rate.

`local` learns from its owner's clean records, `central` from everybody's. Nothing here promises anything.
"""

import sys

import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.baselines import Baseline, BaselineSpec, TrainBaselineSpec
from feddiff_protocol.promise import schedule_of

from .batches import Source, loss_of, records
from .checkpoints import Checkpoints
from .denoisers import denoiser_bytes
from .network import Denoiser, NetworkConfig
from .records import read_source
from .stage import run_stage
from .stores import open_store
from .train_personal import images_of, show_progress
from .train_shared import EMA_WIDTH, SIGMA_DATA, network_config
from .training import distributed, train


def body(spec: TrainBaselineSpec) -> dict[str, str]:
    store, training = open_store(spec.store), spec.like.personal
    with distributed() as world:
        denoiser = train(
            initial_network(spec),
            loss_of(source_of(spec, world.device), SIGMA_DATA),
            world=world,
            num_images=training.images,
            batch=training.batch,
            learning_rate=float(training.learning_rate),
            ema_width=EMA_WIDTH,
            seed=spec.seed_or_zero,
            on_progress=show_progress,
            checkpoints=Checkpoints(store, checkpoints_key(spec)),
        )
    store.put(network_key(spec, spec.client), denoiser_bytes(denoiser))
    return {}


def initial_network(spec: BaselineSpec) -> Denoiser:
    torch.manual_seed(spec.seed_or_zero)  # initial weights only
    return Denoiser(config_of(spec))


def config_of(spec: BaselineSpec) -> NetworkConfig:
    """The network of the job: the same for every arm."""
    return network_config(spec.like.network, spec.image, spec.owners[0].classes.count, SIGMA_DATA)


def network_key(spec: BaselineSpec, client: str) -> str:
    """Of the network of one client, or of the one in common."""
    return layout.personal_denoiser(spec.job.uid, client) if client else layout.shared_denoiser(spec.job.uid)


def checkpoints_key(spec: BaselineSpec) -> str:
    uid = spec.job.uid
    return layout.personal_checkpoints(uid, spec.client) if spec.client else layout.shared_checkpoints(uid)


def source_of(spec: TrainBaselineSpec, device: torch.device) -> Source:
    """Clean records at every noise level, classes as they come: of the client, or of everybody."""
    clients = [spec.client] if spec.baseline is Baseline.LOCAL else [owner.client for owner in spec.owners]
    images_NCHW, label_N = clean_images(spec, clients)
    sigmas = schedule_of(spec.like.diffusion).sigmas
    return records(images_NCHW.to(device), label_N.to(device), (sigmas[0], sigmas[-1]))


def clean_images(spec: BaselineSpec, clients: list[str]) -> tuple[Tensor, Tensor]:
    """x0_NCHW in [-1, 1] and label_N of some clients' records, one client after the other."""
    owners = [spec.owner(client) for client in clients]
    read = [images_of(read_source(owner.source, spec.image, owner.classes), spec.image) for owner in owners]
    return torch.cat([images for images, _ in read]), torch.cat([labels for _, labels in read])


if __name__ == "__main__":
    sys.exit(run_stage(TrainBaselineSpec, body))
