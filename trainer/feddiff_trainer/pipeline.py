"""Images of a feddiff job's shared denoiser, with torch and safetensors; a diffusers pipeline where there is diffusers.

    pipeline = load(FOLDER)
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)  # the same, by diffusers
    images = pipeline([0, 1, 2], generator=torch.Generator().manual_seed(0)).images

FOLDER holds README.md, which says what may be expected and what was promised to whom.

Shapes: B or N images, C channels, H height, W width, E embedding, K classes, D values of an image.
"""

# `feddiff export shared` writes this module with what it takes from its siblings (standalone.py). Nothing in feddiff
# imports it.
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from feddiff_protocol.schedule import Schedule

from .denoising import ClassGaussian
from .drawing import Drawing, draw_shared, to_pixels
from .network import Denoiser, NetworkConfig

try:
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
    from diffusers.configuration_utils import register_to_config
except ImportError:
    ConfigMixin, ModelMixin, register_to_config = object, nn.Module, lambda init: init

    class DiffusionPipeline:  # type: ignore[no-redef]
        def register_modules(self, **modules: nn.Module) -> None:
            vars(self).update(modules)


class SharedDenoiser(ModelMixin, ConfigMixin):
    """E[x0 | y_σ] of images in [-1, 1], and how its job draws with it. The arguments are what config.json says."""

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        kind: str,
        network: dict[str, Any],
        schedule: dict[str, Any],
        split_step: int,
        block_side: int,
        sampling: dict[str, Any],
    ) -> None:
        super().__init__()
        config, noise = NetworkConfig(**network), Schedule(**schedule)
        self.num_classes = config.num_classes
        self.image_shape = (config.image_channels, config.image_height, config.image_width)
        split = noise.sigma(split_step), noise.alpha(split_step)
        self.drawing = Drawing(*split, schedule_sigmas=noise.sigmas, **sampling)
        if kind == "unet":
            self.denoise: nn.Module = Denoiser(config)
        else:
            num_values = torch.Size(self.image_shape).numel() // block_side**2
            self.denoise = ClassGaussian.to_be_loaded(config.num_classes, num_values, block_side)

    def forward(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        x0_BCHW: Tensor = self.denoise(y_BCHW, sigma_B, label_B)
        return x0_BCHW


@dataclass(frozen=True)
class SharedImages:
    """What a pipeline gives back, as diffusers' own do."""

    images: Any


class SharedDenoiserPipeline(DiffusionPipeline):
    """Draws what the shared denoiser makes alone: its estimate of the image at the split."""

    denoiser: SharedDenoiser

    def __init__(self, denoiser: ModelMixin) -> None:  # diffusers loads this module twice: SharedDenoiser is another
        super().__init__()
        self.register_modules(denoiser=denoiser)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> SharedImages:
        """One image for every label, in the job's own number of steps unless said. The generator has to be on the
        denoiser's device. output_type: pil; pt, N×C×H×W in [0, 1]; latent, the estimates themselves, in [-1, 1].

        Raises ValueError for a label that is none, and for another output_type.
        """
        how, device = self.denoiser.drawing, next(iter(self.denoiser.state_dict().values())).device
        if not all(0 <= label < self.denoiser.num_classes for label in class_labels):
            raise ValueError(f"class_labels: expected 0 to {self.denoiser.num_classes - 1}, found {list(class_labels)}")
        if num_inference_steps is not None:
            how = replace(how, steps=num_inference_steps)
        if generator is None:
            generator = torch.Generator(device)
            generator.seed()
        label_N = torch.tensor(class_labels, device=device)
        noise_NCHW = torch.randn(len(label_N), *self.denoiser.image_shape, generator=generator, device=device)
        return SharedImages(_as_asked(draw_shared(how, self.denoiser, noise_NCHW, label_N, generator), output_type))


def _as_asked(x0_NCHW: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return x0_NCHW
    if output_type == "pt":
        return (x0_NCHW.clamp(-1, 1) + 1) / 2
    if output_type != "pil":
        raise ValueError(f"output_type: expected pil, pt or latent, found {output_type!r}")
    from PIL import Image

    pixels_NHWC = to_pixels(x0_NCHW).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels_NHWC]


def load(folder: str | Path) -> SharedDenoiserPipeline:
    """The pipeline of an exported folder, on the CPU, by torch and safetensors alone."""
    place = Path(folder) / "denoiser"
    config = json.loads((place / "config.json").read_text())
    denoiser = SharedDenoiser(**{name: value for name, value in config.items() if not name.startswith("_")})
    denoiser.load_state_dict(safetensors.torch.load_file(place / "diffusion_pytorch_model.safetensors"))
    return SharedDenoiserPipeline(denoiser.eval().requires_grad_(False))
