"""CPU time to equal Fréchet distance: our U-Net beside diffusers' UNet2DModel at equal parameters, in one run.

    pip install diffusers && python benchmarks/time_to_quality.py [--seeds 3]

Both learn scikit-learn's 8×8 digits through the same preconditioning, loss, optimizer, schedule, moving average, batch
and sampler, in float32. Each length of training is a run of its own, with its own schedule, and is tried at each
learning rate; the better one counts. The Fréchet distance is taken to held-out digits in the first 20 principal
components of the training digits. One JSON row per run; time is the process's own, so a busy machine does not count.
"""

import argparse
import json
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from unet_speed import CLASSES, num_parameters, of_equal_size

from feddiff.experiment import commit, cpu_model
from feddiff_trainer.batches import loss_of, records
from feddiff_trainer.metrics import frechet_distance
from feddiff_trainer.network import Denoiser, NetworkConfig
from feddiff_trainer.sampler import heun, karras_sigmas
from feddiff_trainer.training import World, train

LENGTHS = {"feddiff": (25_000, 50_000, 100_000, 200_000, 400_000), "diffusers": (12_500, 25_000, 50_000, 100_000)}
LEARNING_RATES = (2e-3, 4e-3)
BATCH, SAMPLING_STEPS, COMPONENTS = 256, 20, 20
SIGMAS = (0.02, 80.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)
    for seed in range(parser.parse_args().seeds):
        for name, lengths in LENGTHS.items():
            for num_images in lengths:
                for learning_rate in LEARNING_RATES:
                    print_row(name, num_images, learning_rate, seed)


def print_row(name: str, num_images: int, learning_rate: float, seed: int) -> None:
    x0_NCHW, label_N, held_out_NCHW = digits(seed)
    torch.manual_seed(seed)
    ours = Denoiser(NetworkConfig(1, 8, 8, CLASSES, base_width=16))
    model: nn.Module = ours if name == "feddiff" else of_equal_size(8, num_parameters(ours))
    source = records(x0_NCHW, label_N, SIGMAS)
    began = time.process_time()
    trained = train(
        model,
        loss_of(source, 0.5),
        world=World(0, 1, torch.device("cpu")),
        num_images=num_images,
        batch=BATCH,
        learning_rate=learning_rate,
        ema_width=0.1,
        seed=seed,
        on_progress=lambda progress: None,
    )
    seconds = time.process_time() - began
    distance = frechet_pca(samples(trained, seed), held_out_NCHW, x0_NCHW)
    row = {"network": name, "parameters": num_parameters(model), "images": num_images, "learningRate": learning_rate}
    row |= {"seed": seed, "cpuSeconds": round(seconds, 2), "frechetPca20": round(distance, 4), "batch": BATCH}
    row |= {"precision": "float32", "device": cpu_model(), "torch": torch.__version__, "commit": commit()}
    print(json.dumps(row), flush=True)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two thirds of the digits to train on, with their labels, and a third held out, in [-1, 1] units."""
    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    x_NCHW = torch.tensor(found.images[order, None] / 8 - 1, dtype=torch.float32)
    label_N = torch.tensor(found.target[order])
    return x_NCHW[:1200], label_N[:1200], x_NCHW[1200:]


@torch.no_grad()
def samples(model: nn.Module, seed: int) -> Tensor:
    """Two hundred of each class, by Heun's method."""
    label_B = torch.arange(CLASSES).repeat_interleave(200)
    flag_B = torch.zeros_like(label_B)
    sigmas_N = torch.tensor([*karras_sigmas(SAMPLING_STEPS, *SIGMAS), 0.0], dtype=torch.float64)
    noise = torch.randn(len(label_B), 1, 8, 8, generator=torch.Generator().manual_seed(seed + 1000))
    start_BCHW = sigmas_N[0].float() * noise
    return heun(lambda y, sigma, label: model(y.float(), sigma.float(), label, flag_B), start_BCHW, sigmas_N, label_B)


def frechet_pca(made_NCHW: Tensor, real_NCHW: Tensor, basis_NCHW: Tensor) -> float:
    made_ND, real_ND, basis_ND = (x.flatten(1).double().numpy() for x in (made_NCHW, real_NCHW, basis_NCHW))
    centre_D = basis_ND.mean(axis=0)
    axes_KD = np.linalg.svd(basis_ND - centre_D, full_matrices=False)[2][:COMPONENTS]
    return frechet_distance((made_ND - centre_D) @ axes_KD.T, (real_ND - centre_D) @ axes_KD.T)


if __name__ == "__main__":
    main()
