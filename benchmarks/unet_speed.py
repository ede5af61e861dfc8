"""Training speed of our U-Net beside diffusers' UNet2DModel at equal parameters, precision and batch, in one run.

    pip install diffusers && python benchmarks/unet_speed.py [--size 28] [--base-width 32] [--batch 128] [--steps 20]
    python benchmarks/unet_speed.py --preset base

Both are class-conditional, take the same loss and the same optimizer, and are timed in turn, run after run. diffusers'
widths are chosen so that its number of parameters comes within 5 % of ours; with --preset both backbones have that
preset's widths, at its resolution. One JSON row per network.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.api import ImageSpec, NetworkSpec
from feddiff_trainer.denoising import denoising_loss, log_normal_sigmas
from feddiff_trainer.network import Denoiser, NetworkConfig, per_image, preconditioning
from feddiff_trainer.train_shared import network_config

CLASSES = 10
MADE_FOR = {"tiny": (1, 8), "small": (1, 28), "base": (3, 32), "large": (3, 64)}  # channels, size


class DiffusersDenoiser(nn.Module):
    """UNet2DModel behind the same preconditioning and signature as ours."""

    def __init__(self, size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            num_class_embeds=CLASSES,
            norm_num_groups=8,
        )

    def forward(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, flag_B: Tensor) -> Tensor:
        c_skip_B, c_out_B, c_in_B, c_noise_B = preconditioning(sigma_B, 0.5)
        f_BCHW = self.unet(per_image(c_in_B) * y_BCHW, 1000 * c_noise_B, label_B).sample
        return per_image(c_skip_B) * y_BCHW + per_image(c_out_B) * f_BCHW


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def of_equal_size(size: int, wanted: int) -> DiffusersDenoiser:
    """diffusers' U-Net over the same grids as ours, down to 7 or fewer cells, with about `wanted` parameters."""
    levels = 2 if size <= 8 else 3
    candidates = []
    for base in range(8, 257, 8):
        for last in (base, 2 * base):
            widths = (base, *(last,) * (levels - 1))
            with torch.device("meta"):
                candidates.append((abs(num_parameters(DiffusersDenoiser(size, widths)) / wanted - 1), widths))
    difference, widths = min(candidates)
    if difference > 0.05:
        raise SystemExit(f"expected widths within 5 % of {wanted} parameters, nearest {widths}: {difference:.1%}")
    return DiffusersDenoiser(size, widths)


def of_preset(preset: str) -> dict[str, nn.Module]:
    """Both backbones."""
    channels, size = MADE_FOR[preset]
    image = ImageSpec(channels=channels, height=size, width=size)
    specs = {"feddiff": NetworkSpec(preset=preset), "diffusers": NetworkSpec(preset=preset, backbone="diffusers")}
    return {name: Denoiser(network_config(spec, image, CLASSES, 0.5)) for name, spec in specs.items()}


def of_size(size: int, base_width: int) -> dict[str, nn.Module]:
    """Ours and one of diffusers with as many parameters, for grey images."""
    ours = Denoiser(NetworkConfig(1, size, size, CLASSES, base_width=base_width))
    return {"feddiff": ours, "diffusers": of_equal_size(size, num_parameters(ours))}


def step_of(model: nn.Module, channels: int, size: int, batch: int, device: torch.device) -> Callable[[], None]:
    """One step of training on random images; equal for both networks."""
    generator = torch.Generator(device).manual_seed(0)
    x0 = torch.rand(batch, channels, size, size, generator=generator, device=device) * 2 - 1
    label = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    flag = torch.zeros_like(label)
    adam = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        sigma = log_normal_sigmas(batch, 0.01, 80.0, generator)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = denoising_loss(model, x0, sigma, label, flag, noise).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return step


def seconds_of(step: Callable[[], None], steps: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=MADE_FOR)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--base-width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels, size = MADE_FOR[args.preset] if args.preset else (1, args.size)
    models = of_preset(args.preset) if args.preset else of_size(size, args.base_width)
    steps = {name: step_of(model.to(device), channels, size, args.batch, device) for name, model in models.items()}
    for step in steps.values():
        step()  # warm-up
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.runs):
        for name, step in steps.items():
            speeds[name].append(args.steps * args.batch / seconds_of(step, args.steps, device))
    settings = ({"preset": args.preset} if args.preset else {}) | {
        "channels": channels,
        "size": size,
        "batch": args.batch,
        "threads": args.threads,
        "precision": "bf16" if device.type == "cuda" else "float32",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for name, model in models.items():
        speed = {"min": min(speeds[name]), "median": median(speeds[name]), "max": max(speeds[name])}
        rounded = {key: round(value, 1) for key, value in speed.items()}
        print(json.dumps({"network": name, "parameters": num_parameters(model), "images/s": rounded, **settings}))


if __name__ == "__main__":
    main()
