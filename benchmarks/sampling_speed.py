"""Sampling by our Heun and DDPM beside diffusers' DDIM and DPM-Solver++: the same network, equally many calls of it.

    pip install diffusers && python benchmarks/sampling_speed.py speed [--size 28] [--base-width 32] [--images 64]
    python benchmarks/sampling_speed.py quality [--seeds 3]

`speed`: images per second and memory, samplers in turn, run after run, each run in a process of its own; *calls alone*
is the network without a sampler. `quality`: how far images come out from what they should be, on a Gaussian whose
denoiser is known, moments against moments, and on the 8×8 digits with a trained network, Fréchet distance to held-out
digits in the features of a classifier of them. One JSON row per sampler, number of calls and, of digits, seed.

diffusers' state is x = α·y with α = 1/√(1 + σ²), and its schedulers take an estimate of x0 (prediction_type "sample"),
so the denoiser is asked for D(x/α, σ) at the scheduler's own σ: the same network at the same noise levels, exactly.
The schedule of both is the linear one, 1e-4 to 0.02 in 1,000 steps. DDIM's steps are `trailing`: they begin at pure
noise, as the others do. DPM-Solver++ is of second order (2M), at Karras' levels.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from statistics import median

# One core is the claim: the libraries read this when they are imported, so it stands before them.
os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from measuring import in_a_process
from time_to_quality import digits
from torch import Tensor

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.schedule import Schedule
from feddiff_trainer.batches import loss_of, records
from feddiff_trainer.classifier import train_classifier
from feddiff_trainer.denoising import ClassGaussian, Denoise
from feddiff_trainer.metrics import frechet_distance, frechet_distance_of_gaussians
from feddiff_trainer.network import Denoiser, NetworkConfig
from feddiff_trainer.sampler import ddpm_ancestral, dpm_solver, heun, sampling_sigmas
from feddiff_trainer.training import World, train

CLASSES = 10
SCHEDULE = Schedule(1000, 1e-4, 0.02)
CALLS = (5, 25, 125)  # odd ones, as Heun's method has them, that divide DDIM's thousand steps
TRAINING_IMAGES, BATCH, LEARNING_RATE = 200_000, 256, 2e-3
SAMPLES_PER_CLASS = 200
GAUSSIAN_DRAWS = 200_000

Sampler = Callable[[Denoise, Tensor, Tensor, int], Tensor]  # denoise, unit noise, label_B, calls to x0_BCHW


# ---- The samplers --------------------------------------------------------------------------------------------------


def our_heun(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    levels = levels_for((calls + 1) // 2)
    return heun(denoise, levels[0].float() * noise_BCHW, levels, label_B)


def our_ddpm(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    levels, generator = levels_for(calls), torch.Generator().manual_seed(1)
    return ddpm_ancestral(denoise, levels[0].float() * noise_BCHW, levels, label_B, generator)


def our_dpm(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    levels = levels_for(calls)
    return dpm_solver(denoise, levels[0].float() * noise_BCHW, levels, label_B)


def levels_for(num_levels: int) -> Tensor:
    """So many levels and 0: more are asked for where the schedule is coarser than Karras' spacing."""
    return next(
        levels
        for asked in range(num_levels, 2 * num_levels)
        if len(levels := sampling_sigmas(SCHEDULE.sigmas, asked)) == num_levels + 1
    )


@torch.no_grad()
def ddim(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="sample", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(calls)
    x_BCHW = noise_BCHW
    for step in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[step]
        x0_BCHW = as_diffusers_asks(denoise, x_BCHW, ((1 - alpha_bar) / alpha_bar).sqrt(), label_B)
        x_BCHW = scheduler.step(x0_BCHW, step, x_BCHW).prev_sample
    return x_BCHW


@torch.no_grad()
def their_dpm(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, prediction_type="sample", use_karras_sigmas=True
    )
    scheduler.set_timesteps(calls)
    x_BCHW = noise_BCHW
    for sigma, step in zip(scheduler.sigmas, scheduler.timesteps, strict=False):  # the last level, 0, has no step
        x_BCHW = scheduler.step(as_diffusers_asks(denoise, x_BCHW, sigma, label_B), step, x_BCHW).prev_sample
    return x_BCHW


def as_diffusers_asks(denoise: Denoise, x_BCHW: Tensor, sigma: Tensor, label_B: Tensor) -> Tensor:
    """x0_BCHW from x = α·y, α = 1/√(1 + σ²)."""
    return denoise(x_BCHW * (1 + sigma**2).sqrt(), sigma.expand(len(x_BCHW)), label_B)


@torch.no_grad()
def calls_alone(denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    for sigma in torch.linspace(80, 0.02, calls):
        denoise(noise_BCHW, sigma.expand(len(noise_BCHW)), label_B)
    return noise_BCHW


SAMPLERS: dict[str, Sampler] = {
    "feddiff, Heun": our_heun,
    "feddiff, DDPM": our_ddpm,
    "feddiff, DPM-Solver++": our_dpm,
    "diffusers, DDIM": ddim,
    "diffusers, DPM-Solver++": their_dpm,
}


class Counted:
    """A denoiser that knows how often it was asked."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        self.calls += 1
        return self.denoise(y_BCHW, sigma_B, label_B)


def drawn(sampler: Sampler, denoise: Denoise, noise_BCHW: Tensor, label_B: Tensor, calls: int) -> Tensor:
    counted = Counted(denoise)
    x0_BCHW = sampler(counted, noise_BCHW, label_B, calls)
    assert counted.calls == calls
    return x0_BCHW


# ---- Speed ---------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> None:
    size, images, calls = arguments.size, arguments.images, arguments.calls
    torch.manual_seed(0)
    network = Denoiser(NetworkConfig(1, size, size, CLASSES, base_width=arguments.base_width)).eval()
    noise_BCHW = torch.randn(images, 1, size, size, generator=torch.Generator().manual_seed(0))
    label_B = torch.arange(images) % CLASSES
    samplers = SAMPLERS | {"calls alone": calls_alone}
    for sampler in samplers.values():
        drawn(sampler, network, noise_BCHW[:2], label_B[:2], calls)  # warm-up

    def timed(sampler: Sampler) -> tuple[float, float, int]:
        return in_a_process(lambda: lambda: drawn(sampler, network, noise_BCHW, label_B, calls))

    runs = [{name: timed(sampler) for name, sampler in samplers.items()} for _ in range(arguments.runs)]
    for name in samplers:
        wall, cpu, peaks = zip(*(run[name] for run in runs), strict=True)
        print_row(
            {
                "benchmark": "sampling_speed",
                "sampler": name,
                "calls": calls,
                "size": size,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "images": images,
                "images_per_second": per_second(images, wall),
                "images_per_cpu_second": per_second(images, cpu),
                "peak_mebibytes": max(peaks) >> 20,
                "runs": len(runs),
            }
        )


def per_second(images: int, seconds: tuple[float, ...]) -> dict[str, float]:
    return {
        "min": round(images / max(seconds), 1),
        "median": round(images / median(seconds), 1),
        "max": round(images / min(seconds), 1),
    }


# ---- Quality -------------------------------------------------------------------------------------------------------


def quality(arguments: argparse.Namespace) -> None:
    for calls in CALLS:
        for name, sampler in SAMPLERS.items():
            found = gaussian_errors(sampler, calls)
            print_row({"benchmark": "sampling_quality", "data": "Gaussian", "sampler": name, "calls": calls, **found})
    for seed in range(arguments.seeds):
        distance_of = digits_distance(seed)
        for calls in CALLS:
            for name, sampler in SAMPLERS.items():
                found = {"seed": seed, "frechet": round(distance_of(sampler, calls), 4)}
                print_row({"benchmark": "sampling_quality", "data": "digits", "sampler": name, "calls": calls, **found})


def gaussian_errors(sampler: Sampler, calls: int) -> dict[str, float]:
    """The largest error of a value's mean, that of a standard deviation as a share of it, and the Fréchet distance.

    Eight independent values with standard deviations from 0.03 to 0.8. The noise has mean 0 and covariance 1 exactly,
    and every step is an affine map: samplers that draw nothing more come out with the moments of endlessly many draws.
    """
    mean_D, std_D = torch.linspace(-0.5, 0.5, 8).double(), torch.from_numpy(np.geomspace(0.03, 0.8, 8))
    denoise = ClassGaussian(mean_D[None], (std_D**2).diag()[None])
    noise_ND = torch.randn(GAUSSIAN_DRAWS, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise_ND -= noise_ND.mean(dim=0)
    noise_ND = torch.linalg.solve_triangular(torch.linalg.cholesky(noise_ND.T.cov()), noise_ND.T, upper=False).T
    noise_NCHW, label_N = noise_ND.reshape(-1, 1, 1, 8), torch.zeros(GAUSSIAN_DRAWS, dtype=torch.long)
    x_ND = drawn(sampler, denoise, noise_NCHW, label_N, calls).flatten(1)
    error_D, relative_D = (x_ND.mean(0) - mean_D).abs(), (x_ND.std(0) / std_D - 1).abs()
    expected = mean_D.numpy(), (std_D**2).diag().numpy()
    distance = frechet_distance_of_gaussians(*expected, x_ND.mean(0).numpy(), x_ND.T.cov().numpy())
    return {
        "mean_error": round(float(error_D.max()), 5),
        "std_error": round(float(relative_D.max()), 5),
        "frechet": round(distance, 6),
    }


def digits_distance(seed: int) -> Callable[[Sampler, int], float]:
    """Of a sampler and its number of calls the Fréchet distance, all with one network, trained here."""
    x0_NCHW, label_N, held_out_NCHW, held_out_N = digits(seed)
    torch.manual_seed(seed)
    network = train(
        Denoiser(NetworkConfig(1, 8, 8, CLASSES, base_width=16)),
        loss_of(records(x0_NCHW, label_N, (SCHEDULE.sigma(1), SCHEDULE.sigmas[-1])), 0.5),
        world=World(0, 1, torch.device("cpu")),
        num_images=TRAINING_IMAGES,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        ema_width=0.1,
        seed=seed,
        on_progress=lambda progress: None,
    )
    classifier = train_classifier(held_out_NCHW.numpy(), held_out_N.numpy(), CLASSES, seed)
    label_B = torch.arange(CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    noise_BCHW = torch.randn(len(label_B), 1, 8, 8, generator=torch.Generator().manual_seed(seed + 1000))

    def distance(sampler: Sampler, calls: int) -> float:
        made_BCHW = drawn(sampler, network, noise_BCHW, label_B, calls).float().clamp(-1, 1)
        return frechet_distance(*(classifier.features(each.numpy()) for each in (made_BCHW, held_out_NCHW)))

    return distance


def print_row(row: dict[str, object]) -> None:
    about = {
        "threads": 1,
        "precision": "float32",
        "cpu": cpu_model(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row | about), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("speed")
    timing.set_defaults(measure=speed)
    for name, default in (("size", 28), ("base-width", 32), ("images", 64), ("calls", 25), ("runs", 5)):
        timing.add_argument(f"--{name}", type=int, default=default)
    judging = commands.add_parser("quality")
    judging.set_defaults(measure=quality)
    judging.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
