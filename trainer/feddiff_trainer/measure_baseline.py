"""One owner's figures of a baseline, in an experiment: its samples, measured as `evaluate` measures a job's."""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import ImageSpec, Wire
from feddiff_protocol.baselines import Baseline, MeasureBaselineSpec
from feddiff_protocol.errors import InputMissing, SpecInvalid
from feddiff_protocol.stages import JobReference, SampleSpec

from .clipped_gaussian import ClippedGaussian
from .denoisers import denoiser_from_bytes
from .denoising import ClassGaussian, Denoise
from .drawing import CHUNK, Drawing, draw_alone, draw_both, draw_from_split, drawing_of, labels_of, to_pixels
from .evaluate import inception_of, measure
from .evaluation import ArmQuality, Measured
from .pictures import LabelledImages
from .records import read_holdout, read_source
from .sample import read_personal
from .stage import run_stage
from .stores import open_store
from .train_baseline import config_of, network_key
from .train_shared import image_shape, pool_of, releases_of

Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""draw(noise_BCHW, label_B, generator): x0_BCHW, from noise of unit variance."""


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
    inception = inception_of(owner.source, spec.image)
    measured, arms = measure(spec, own, samples, held_out, inception, real=False)
    found = MeasuredBaseline(job=spec.job, client=spec.client, measured=measured, quality=arms[spec.baseline.value])
    key = layout.measured_baseline(spec.job.uid, spec.client)
    open_store(spec.store).put(key, found.model_dump_json(by_alias=True).encode())
    return {}


def samples_of(spec: MeasureBaselineSpec) -> tuple[Tensor, Tensor]:
    """uint8 images N×C×H×W and their labels, as many of each class as the job draws, by its sampler."""
    generator = torch.Generator().manual_seed(spec.seed_or_zero)
    label_N = labels_of(spec.classes.count, spec.like.sampling.images_per_class)
    draw, drawn = drawer_of(spec), []
    for start in range(0, len(label_N), CHUNK):
        label_B = label_N[start : start + CHUNK]
        noise_BCHW = torch.randn(len(label_B), *image_shape(spec.image), generator=generator)
        drawn.append(to_pixels(draw(noise_BCHW, label_B, generator)))
    return torch.cat(drawn), label_N


def drawer_of(spec: MeasureBaselineSpec) -> Draw:
    """How the arm makes images. Raises InputMissing where a network, or what a run left, is not there."""
    # An oracle releases nothing, so there is nothing to restart from.
    diffusion = spec.like.diffusion.model_copy(update={"timeline": None})
    drawing = drawing_of(spec.like.privacy, diffusion, spec.like.sampling)
    match spec.baseline:
        case Baseline.LOCAL | Baseline.DP_SGD:
            return partial(draw_alone, drawing, read_network(spec, spec.client))
        case Baseline.CENTRAL | Baseline.FEDAVG:
            return partial(draw_alone, drawing, read_network(spec, ""))
        case Baseline.ORACLE:
            return partial(draw_both, drawing, read_network(spec, ""), read_network(spec, spec.client))
    return drawer_of_run(spec.baseline, drawing, spec.run, spec.image)


def drawer_of_run(baseline: Baseline, drawing: Drawing, run: SampleSpec | None, image: ImageSpec) -> Draw:
    """How an arm makes images of what a job's run has left."""
    if run is None:
        raise SpecInvalid(f"run: baseline {baseline} takes the run of a job, none was given; name one")
    if baseline is Baseline.DRAWS:
        gaussian = ClippedGaussian(pool_of_run(run))
        return lambda noise_BCHW, label_B, generator: gaussian.draw(label_B, image_shape(image), generator).float()
    personal = read_personal(run, open_store(run.owner_store, "owner"))
    if baseline is Baseline.FROM_NOISE:
        return partial(draw_from_split, drawing, personal)
    assert baseline is Baseline.CLOSED_FORM, f"{baseline} is read from the run's own evaluation"
    return partial(draw_both, drawing, pool_of_run(run), personal)


def pool_of_run(run: SampleSpec) -> ClassGaussian:
    """Of all that was released in the run."""
    return pool_of(releases_of(run, open_store(run.federation_store, "federation"), run.classes.count), run)


def read_network(spec: MeasureBaselineSpec, client: str) -> Denoise:
    key = network_key(spec, client)
    return denoiser_from_bytes(open_store(spec.store).get(key), key, config_of(spec))


if __name__ == "__main__":
    sys.exit(run_stage(MeasureBaselineSpec, body))
