"""One network of a baseline, in an experiment: what a job is compared with, trained as long and at the same rate.

`local` learns from its owner's clean records, `central` from everybody's; of `fedavg` every owner's weights do, and are
averaged; of `oracle` everybody's records stand in for what a job would release. None of them promises anything.
`dp-sgd` alone does: its owner's clean records again, and a network that keeps the job's ε and δ.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.accountant import float_below
from feddiff_protocol.api import ComputeSpec, Mechanism, PersonalSpec, SharedSpec
from feddiff_protocol.baselines import Baseline, BaselineSpec, TrainBaselineSpec
from feddiff_protocol.promise import promise_of, schedule_of

from .batches import Source, filling_records, loss_of, mixed, records
from .checkpoints import Checkpoints
from .denoisers import denoiser_bytes
from .dp_sgd import denoiser_gradients, dp_sgd
from .fedavg import fedavg
from .network import Denoiser, NetworkConfig
from .records import read_source
from .stage import report_progress, run_stage
from .stores import open_store
from .train_personal import images_of, show_progress
from .train_shared import EMA_WIDTH, SIGMA_DATA, in_bfloat16, network_config, new_denoiser
from .training import distributed, train


def body(spec: TrainBaselineSpec) -> dict[str, str]:
    store = open_store(spec.store)
    denoiser = trained(spec, Checkpoints(store, checkpoints_key(spec)))
    store.put(network_key(spec, spec.client), denoiser_bytes(denoiser))
    return {}


def trained(spec: TrainBaselineSpec, checkpoints: Checkpoints) -> Denoiser:
    """The network after as many image-steps as the job's own have; of fedavg each client's."""
    network, training = initial_network(spec), training_of(spec)
    settings: dict[str, Any] = {
        "num_images": training.images,
        "batch": training.batch,
        "learning_rate": float(training.learning_rate),
        "ema_width": EMA_WIDTH,
        "checkpoints": checkpoints,
    }
    with distributed() as world:
        if spec.baseline is Baseline.DP_SGD:
            return private(spec, network, world.device, settings)
        settings |= {"seed": spec.seed_or_zero, "bfloat16": in_bfloat16(spec.like.compute)}
        if spec.baseline is not Baseline.FEDAVG:
            loss = loss_of(source_of(spec, world.device), SIGMA_DATA)
            return train(
                network,
                loss,
                world=world,
                on_progress=show_progress,
                accumulation=training.accumulation,
                compiled=spec.like.compute.compile,
                **settings,
            )
        sources = [clean_source(spec, [owner.client], world.device) for owner in spec.owners]
        return fedavg(
            network,
            [loss_of(source, SIGMA_DATA) for source in sources],
            [sum(owner.classes.records) for owner in spec.owners],
            rounds=spec.rounds,
            device=world.device,
            on_progress=lambda done, total: report_progress(done, total, "images"),
            **settings,
        )


def private(spec: TrainBaselineSpec, network: Denoiser, device: torch.device, settings: Mapping[str, Any]) -> Denoiser:
    """The network of one client by DP-SGD at the job's ε and δ."""
    privacy, sigmas = spec.like.privacy, schedule_of(spec.like.diffusion).sigmas
    images_NCHW, label_N = (each.to(device) for each in clean_images(spec, [spec.client]))
    gradients = denoiser_gradients(
        images_NCHW,
        label_N,
        sigmas=(sigmas[0], sigmas[-1]),
        multiplicity=spec.noise_multiplicity,
        sigma_data=SIGMA_DATA,
    )
    return dp_sgd(
        network,
        gradients,
        num_records=len(label_N),
        epsilon=float_below("epsilon", privacy.epsilon),
        delta=float_below("delta", privacy.delta_or_zero),
        device=device,
        on_progress=lambda done, total: report_progress(done, total, "images"),
        **settings,
    )


def training_of(spec: TrainBaselineSpec) -> SharedSpec | PersonalSpec:
    """Length, batch and rate: the oracle's network in common is a shared denoiser, every other one a personal one."""
    return spec.like.shared if spec.baseline is Baseline.ORACLE and not spec.client else spec.like.personal


def initial_network(spec: BaselineSpec) -> Denoiser:
    torch.manual_seed(spec.seed_or_zero)  # initial weights only
    # torch.func, which takes a gradient for each record, knows no checkpoints of activations.
    compute = ComputeSpec() if spec.baseline is Baseline.DP_SGD else spec.like.compute
    return new_denoiser(config_of(spec), compute)


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
    """What one network is trained on: the client's clean records, or everybody's."""
    everybody = [owner.client for owner in spec.owners]
    if spec.baseline is Baseline.ORACLE:
        return oracle_source(spec, everybody, device)
    return clean_source(spec, [spec.client] if spec.client else everybody, device)


def oracle_source(spec: TrainBaselineSpec, everybody: list[str], device: torch.device) -> Source:
    """Of the shared denoiser everybody's records above the split; of a personal one the owner's own and, from where the
    job would take releases, everybody's, which fill its rare classes."""
    privacy, diffusion, personal = spec.like.privacy, spec.like.diffusion, spec.like.personal
    split, highest = promise_of(privacy, diffusion).split_sigma, schedule_of(diffusion).sigmas[-1]
    images_NCHW, label_N = (each.to(device) for each in clean_images(spec, everybody))
    if not spec.client:
        return records(images_NCHW, label_N, (split, highest))
    counts_K = torch.tensor(spec.classes.records, device=device)
    lowest = split if privacy.mechanism is Mechanism.GAUSSIAN else float(personal.release_sigma_or_default)
    filling = filling_records(images_NCHW, label_N, (lowest, highest), counts_K)
    return mixed(clean_source(spec, [spec.client], device), filling, float(personal.release_share))


def clean_source(spec: TrainBaselineSpec, clients: list[str], device: torch.device) -> Source:
    """Clean records of these clients at every noise level, classes as they come."""
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
