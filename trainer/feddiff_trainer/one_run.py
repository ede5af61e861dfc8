"""The audit in one run (Steinke, Nasr & Jagielski 2023) of the upload and of the shared denoiser: made-up images, each
one of the worst pair by a fair coin, go through the job's own code; what the surest guesses say of its ε.

Shapes: N canaries, C channels, H height, W width, D values of one image.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from feddiff_protocol import accountant
from feddiff_protocol.api import ClassesSpec, Mechanism, SourceSpec, Timeline
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import ReleaseReference, ReleaseSpec, SampleSpec, TrainSharedSpec

from .attacks import loss_scores
from .findings import OneRun, Target
from .noise import Float64, Normals
from .release import release
from .released import read_releases
from .stores import open_store
from .train_shared import image_shape, pooled_of, shared_denoiser, terms_of
from .training import distributed
from .trials import LARGEST_RELEASE, MOST_VALUES, Part, canaries, parts_of, without_privacy
from .verdicts import area_under_curve, one_run_of

FEWEST_CANARIES = 50  # of fewer no guesses show an ε worth the name
TRAINED_IMAGES, TRAINED_BATCH = 16_000, 64  # of the shared denoiser of canaries: each is seen 16 times
LOST = 10.0  # σ at which an image in [-1, 1] is lost in noise: a denoiser says what it knows by the label
DRAWS, SEED = 8, 0  # of the attack's own noise, in which nothing is protected

Coins = npt.NDArray[np.bool_]
Report = Callable[[float], None]  # told the share of the work that is done


def one_run_of_upload(released: ReleaseSpec, normals: Normals) -> list[OneRun]:
    """Each part of a release of a thousand canaries, under the best test of it."""
    promise, delta, audits = promise_of(released.privacy, released.diffusion), float(released.privacy.delta_or_zero), []
    careless, share = without_privacy(released, promise)
    for part, open_part in zip(parts_of(released), parts_of(careless), strict=True):
        if part.probability is not None or part.known:
            continue  # a share of trials shows no ε; a class of one record all that one of twenty does
        second_N = coins(LARGEST_RELEASE)
        scores_N = canaries(released, part, second_N, normals)
        control_N = canaries(careless, open_part, second_N, lambda shape: share * normals(shape))
        epsilon = float(released.privacy.epsilon) if part.mu is None else accountant.epsilon_of(part.mu, delta)
        control_auc = area_under_curve(control_N[second_N], control_N[~second_N])
        audits.append(one_run_of(Target.UPLOAD, part.attack, scores_N, second_N, epsilon, delta, control_auc))
    return audits


def one_run_of_shared(spec: SampleSpec, released: ReleaseSpec, normals: Normals, report: Report) -> list[OneRun]:
    """A shared denoiser of the job's network that was trained on one release of canaries alone, each a class of its
    own: guessed is the image at which its loss is lower. Nothing where images are too large for enough of them, and on
    the timeline restarted, where the shared denoiser has no noise level of an image."""
    (part, *_), promise = parts_of(released), promise_of(released.privacy, released.diffusion)
    num = num_canaries(part, promise.mechanism)
    if num < FEWEST_CANARIES or spec.diffusion.timeline is Timeline.RESTARTED:
        return []
    second_N = coins(num)
    careless, share = without_privacy(released, promise)

    def scores(asked: ReleaseSpec, noise: Normals, begin: float) -> Float64:
        return shared_scores(spec, asked, part, second_N, noise, lambda done: report(begin + done / 2))

    control_N = scores(careless, lambda shape: share * normals(shape), 0.0)
    scores_N = scores(released, normals, 0.5)
    epsilon, delta = float(spec.privacy.epsilon), float(spec.privacy.delta_or_zero)
    control_auc = area_under_curve(control_N[second_N], control_N[~second_N])
    return [one_run_of(Target.SHARED, "difference of losses", scores_N, second_N, epsilon, delta, control_auc)]


def coins(num: int) -> Coins:
    thrown_N: Coins = np.frombuffer(os.urandom(num), np.uint8) % 2 == 1
    return thrown_N


def num_canaries(part: Part, mechanism: Mechanism) -> int:
    """One class is not a canary's; a pooled covariance of every class has to fit into memory."""
    values = part.image.dimensions ** (1 if mechanism is Mechanism.GAUSSIAN else 2)
    return min(LARGEST_RELEASE - 1, MOST_VALUES // values)


def shared_scores(
    spec: SampleSpec, released: ReleaseSpec, part: Part, second_N: Coins, normals: Normals, report: Report
) -> Float64:
    """scores_N, the larger the more a canary looks like the second image. Release and training are the stages' own
    code, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        asked, trained = federation_of(spec, released, part, second_N, Path(name))
        stores = open_store(asked.owner_store, "owner"), open_store(asked.federation_store, "federation")
        manifest = release(asked, owner_store=stores[0], federation_store=stores[1], normals=normals)
        reference = ReleaseReference(client=asked.client, manifest_sha256=manifest)
        terms = terms_of(trained, trained.num_classes)
        pooled = pooled_of(trained, read_releases(stores[1], [reference], terms))
    with distributed() as world:
        denoiser = shared_denoiser(trained, pooled, world, lambda progress: report(progress.images / TRAINED_IMAGES))
        denoiser = denoiser.cpu().eval().requires_grad_(False)
    label_N = torch.arange(len(second_N))
    level = max(promise_of(released.privacy, released.diffusion).split_sigma, LOST)

    def fits(pixels_D: Float64) -> Float64:
        x0_CHW: Tensor = torch.from_numpy(2 * pixels_D - 1).float().view(image_shape(part.image))
        return loss_scores(denoiser, x0_CHW.expand(len(label_N), -1, -1, -1), label_N, [level], DRAWS, SEED)

    first_D, second_D = part.pair
    scores_N: Float64 = fits(second_D) - fits(first_D)
    return scores_N


def federation_of(
    spec: SampleSpec, released: ReleaseSpec, part: Part, second_N: Coins, folder: Path
) -> tuple[ReleaseSpec, TrainSharedSpec]:
    """The release and the training of one owner whose records are canaries, in this folder. A last class holds both
    images of the pair: a covariance takes two records of one class."""
    first_D, second_D = part.pair
    pixels_ND = np.concatenate([np.where(second_N[:, None], second_D, first_D), part.pair])
    image, num_classes = part.image, len(second_N) + 1
    labels_N = np.append(np.arange(num_classes), num_classes - 1)
    pixels_NHWC = (255 * pixels_ND).astype(np.uint8).reshape(-1, image.channels, image.height, image.width)
    np.savez(folder / "canaries.npz", images=pixels_NHWC.transpose(0, 2, 3, 1).squeeze(), labels=labels_N)
    privacy = released.privacy.model_copy(update={"block_side": None})  # the pair's values are what is clipped
    asked = released.model_copy(
        update={
            "source": SourceSpec(format="npz", path=str(folder / "canaries.npz")),
            "image": image,
            "classes": ClassesSpec(count=num_classes, records=(1,) * len(second_N) + (2,)),
            "privacy": privacy,
            "owner_store": (folder / "owner").as_uri(),
            "federation_store": (folder / "federation").as_uri(),
        }
    )
    trained = TrainSharedSpec(
        job=asked.job,
        attempt=asked.attempt,
        seed=SEED,
        releases=spec.releases,
        image=image,
        num_classes=num_classes,
        privacy=asked.privacy,
        diffusion=asked.diffusion,
        federation_store=asked.federation_store,
        network=spec.network,
        shared=spec.shared.model_copy(update={"images": TRAINED_IMAGES, "batch": TRAINED_BATCH, "accumulation": 1}),
        sampling=spec.sampling,
    )
    return asked, trained
