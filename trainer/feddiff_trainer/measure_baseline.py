"""One owner's figures of a baseline, in an experiment: its samples, measured as `evaluate` measures a job's."""

import sys

import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import Wire
from feddiff_protocol.baselines import MeasureBaselineSpec
from feddiff_protocol.errors import InputMissing
from feddiff_protocol.stages import JobReference

from .denoisers import denoiser_from_bytes
from .denoising import Denoise
from .drawing import CHUNK, draw_alone, drawing_of, labels_of, to_pixels
from .evaluate import measure
from .evaluation import ArmQuality, Measured
from .pictures import LabelledImages
from .records import read_holdout, read_source
from .stage import run_stage
from .stores import open_store
from .train_baseline import config_of, network_key
from .train_shared import image_shape


class MeasuredBaseline(Wire):
    """One owner's figures of one arm."""

    job: JobReference
    client: str
    measured: Measured
    quality: ArmQuality


def body(spec: MeasureBaselineSpec) -> dict[str, str]:
    owner = spec.owner(spec.client)
    own = read_source(owner.source, spec.image, owner.classes)
    held_out = read_holdout(owner.source, spec.image, owner.classes)
    if held_out is None:
        raise InputMissing(f"client {spec.client}: expected source.holdoutPath, found none; add held-out records")
    images, label_N = samples_of(spec)
    samples = LabelledImages({spec.baseline.value: images.numpy()}, label_N.numpy())
    measured, arms = measure(spec, own, samples, held_out, real=False)
    found = MeasuredBaseline(job=spec.job, client=spec.client, measured=measured, quality=arms[spec.baseline.value])
    key = layout.measured_baseline(spec.job.uid, spec.client)
    open_store(spec.store).put(key, found.model_dump_json(by_alias=True).encode())
    return {}


def samples_of(spec: MeasureBaselineSpec) -> tuple[Tensor, Tensor]:
    """uint8 images N×C×H×W and their labels, as many of each class as the job draws, by its sampler."""
    generator = torch.Generator().manual_seed(spec.seed_or_zero)
    label_N = labels_of(spec.classes.count, spec.like.sampling.images_per_class)
    drawn, network = [], read_network(spec, spec.network)
    for start in range(0, len(label_N), CHUNK):
        label_B = label_N[start : start + CHUNK]
        drawn.append(to_pixels(draw(spec, network, label_B, generator)))
    return torch.cat(drawn), label_N


def draw(spec: MeasureBaselineSpec, network: Denoise, label_B: Tensor, generator: torch.Generator) -> Tensor:
    """x0_BCHW from pure noise to the end."""
    drawing = drawing_of(spec.like.privacy, spec.like.diffusion, spec.like.sampling)
    noise_BCHW = torch.randn(len(label_B), *image_shape(spec.image), generator=generator)
    return draw_alone(drawing, network, noise_BCHW, label_B, generator)


def read_network(spec: MeasureBaselineSpec, client: str) -> Denoise:
    key = network_key(spec, client)
    return denoiser_from_bytes(open_store(spec.store).get(key), key, config_of(spec))


if __name__ == "__main__":
    sys.exit(run_stage(MeasureBaselineSpec, body))
