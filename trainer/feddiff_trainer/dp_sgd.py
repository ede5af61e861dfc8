"""DP-SGD of a diffusion model: a baseline whose network keeps (ε, δ) (Abadi et al. 2016, algorithm 1).

With DPDM's recipe (Dockhorn et al. 2023, arXiv 2210.09929): the gradient of a record is the mean over several noise
levels, taken before the clip; batches are Poisson samples; no augmentation; a moving average of the weights, and Adam.

Batches and noise are the operating system's, as a release's noise is. Drawn from (seed, step), as `train` draws, they
would protect nothing: whoever knows a seed takes the noise off again. Nor may a step that is repeated after a crash
have the noise it had: it begins anew with another batch, and two outcomes with one noise differ by records alone.

A run that goes on is charged for all its steps: whatever it stores, and what it ends with, is the outcome of one chain
of at most num_steps steps from the first weights, each with a batch and noise of its own, and that chain is accounted.
Steps behind the last checkpoint that a crash undoes were seen by nobody. Checkpoints stay where the records are.

Shapes: N records, B of a batch, K noise levels of a record, P weights, C channels, H height, W width.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from feddiff_protocol.accountant import mu_of
from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, Interrupted, PrivacyRefusal, SpecInvalid

from .checkpoints import Checkpoints
from .denoising import denoising_loss, log_normal_sigmas
from .network import UNCLIPPED
from .noise import Float64, Normals, from_grid, grid_step, os_entropy_normals, round_to_grid
from .training import DIVERGED, Run, caught_signals, ema_exponent, schedule

M = TypeVar("M", bound=nn.Module)

CLIP_NORM = 1.0  # of a record's gradient: DPDM's in all its experiments
LEAST_NOISE = 0.1  # times the clip norm; less makes the accountant's grids large, and protects nobody
GRID = 1e-4  # of privacy losses, times ε: the accountant's roundings all add to ε
ACCURACY = 1e-3  # relative, of the noise that suffices
GRADIENT_VALUES, IMAGES = 2**25, 1024  # at a time

RecordGradients = Callable[[nn.Module, Tensor], Iterable[Sequence[Tensor]]]
"""gradients(model, index_B): of each record that is named, by weight, 1 + the weight's dimensions; in chunks."""


def dp_sgd(
    model: M,
    gradients: RecordGradients,
    *,
    num_records: int,
    epsilon: float,
    delta: float,
    device: torch.device,
    num_images: int,
    batch: int,
    learning_rate: float,
    ema_width: float,
    on_progress: Callable[[int, int], None],
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    normals: Normals | None = None,
) -> M:
    """A copy of `model` with the moving average of its weights, in evaluation mode, that is (ε, δ)-differentially
    private where one of the num_records records is replaced by any other. The initial weights must know of no record.

    `batch` is the mean size of a batch, num_images that of all of them together, rounded up to whole batches; both and
    the number of records are public. Only tests bring `normals`. The other arguments are those of train.

    Raises SpecInvalid for a batch larger than there are records, Interrupted after SIGTERM or SIGINT with a checkpoint
    stored, DataInvalid if gradients or weights stop being finite, ConfigurationInvalid without dp-accounting.
    """
    num_steps, gamma, rate = math.ceil(num_images / batch), ema_exponent(ema_width), sampling_rate(batch, num_records)
    noise = noise_multiplier(epsilon, delta, rate, num_steps)
    settings: dict[str, object] = {"num_images": num_images, "batch": batch, "learning_rate": learning_rate}
    settings |= {"ema_width": ema_width, "num_records": num_records, "noise_multiplier": noise, "clip_norm": CLIP_NORM}
    ema = copy.deepcopy(model.to(device)).requires_grad_(False).eval()
    run = Run(copy.deepcopy(model).train(), ema, {name: repr(value) for name, value in settings.items()})
    normals = normals or os_entropy_normals()
    saved_at = clock()
    with caught_signals() as signals:
        if checkpoints is not None and (newest := checkpoints.newest()) is not None:
            run.load(newest, checkpoints.place)
        while run.step < num_steps:
            index_B = torch.from_numpy(poisson_sample(num_records, rate)).to(device)
            total_P = clipped_sum(gradients(run.model, index_B), run.weights)
            # An empty batch is a step like any other: leaving it out would tell that it was empty.
            noised_P = with_noise(total_P.cpu().numpy(), noise * CLIP_NORM, normals)
            set_gradients(run.weights, torch.from_numpy(noised_P / batch).to(device))
            run.advance(learning_rate * schedule(run.step, num_steps), gamma)
            images = min(run.step * batch, num_images)
            on_progress(images, num_images)
            if checkpoints is not None and (signals or clock() - saved_at >= checkpoint_seconds):
                checkpoints.save(run.checkpoint())
                saved_at = clock()
            if signals:
                raise Interrupted(f"stopped on request after {images} images; run again to go on")
        last = run.checkpoint()
        if checkpoints is not None:
            checkpoints.save(last)
    return ema


# ---- What it costs -----------------------------------------------------------------------------------------------


def sampling_rate(batch: int, num_records: int) -> float:
    """q, the chance of every record to be in a batch. Raises SpecInvalid for a batch larger than there are records."""
    if not 1 <= batch <= num_records:
        raise SpecInvalid(f"batch: expected 1 to {num_records}, the records of an owner, found {batch}; lower it")
    return batch / num_records


def epsilon_of_steps(
    noise_multiplier: float, sampling_rate: float, num_steps: int, delta: float, interval: float = 1e-3
) -> float:
    """ε at δ of num_steps noisy sums, each record in each of them with chance q = sampling_rate: it moves a sum by at
    most C, the noise has standard deviation noise_multiplier·C, and one record is replaced by any other. Never below
    the truth; `interval` is the grid of privacy losses, and the coarser it is, the more ε comes out.

    No pair of records is worse in a step than two whose gradients are opposite and as long as the clip allows,
    (1 - q)·N(0, s²) + q·N(±C, s²): docs/decisions/0016 has the proof. Steps compose by their privacy loss
    distributions (Zhu, Dong & Wang 2022, theorem 10), rounded by connecting the dots (Doroshenko et al. 2022).
    """
    try:
        from dp_accounting import NeighboringRelation
        from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    except ImportError:
        raise ConfigurationInvalid(
            "baseline dp-sgd needs the package dp-accounting, found none; pip install 'feddiff[experiment]'"
        ) from None
    # The library's sensitivity is that of one record's being added; the relation makes it twice as much.
    step = from_gaussian_mechanism(
        noise_multiplier,
        sensitivity=1.0,
        sampling_prob=sampling_rate,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )
    return float(step.self_compose(num_steps).get_epsilon_for_delta(delta))


def noise_multiplier(epsilon: float, delta: float, sampling_rate: float, num_steps: int) -> float:
    """Standard deviation of a sum's noise over the clip norm, for which num_steps steps keep (ε, δ); at most a
    thousandth more than is needed, and never less than LEAST_NOISE."""

    def suffices(noise: float) -> bool:
        return epsilon_of_steps(noise, sampling_rate, num_steps, delta, GRID * epsilon) <= epsilon

    # Enough where every record is in every sum: then a replaced one moves each by 2·C, and μ = 2·√num_steps/noise.
    enough = max(LEAST_NOISE, 2 * math.sqrt(num_steps) / mu_of(epsilon, delta))
    while not suffices(enough):
        enough *= 1.01
    while (less := max(LEAST_NOISE, enough / 2)) < enough and suffices(less):
        enough = less
    while enough > less * (1 + ACCURACY):
        middle = math.sqrt(enough * less)
        enough, less = (middle, less) if suffices(middle) else (enough, middle)
    return enough


# ---- What keeps it -----------------------------------------------------------------------------------------------


def poisson_sample(num_records: int, rate: float, entropy: Callable[[int], bytes] = os.urandom) -> NDArray[np.int64]:
    """index_B: every record with chance `rate`, whatever becomes of the others. Nobody may guess who was taken."""
    draw_N = np.frombuffer(entropy(8 * num_records), np.uint64) >> np.uint64(11)
    return np.flatnonzero(draw_N < rate * 2.0**53)


def clipped_sum(chunks: Iterable[Sequence[Tensor]], weights: Sequence[Tensor]) -> Tensor:
    """total_P = Σ g·min(1, C/‖g‖) over records, in float64, weight after weight; C = CLIP_NORM.

    As mechanisms.clip_l2: what floating point cannot tell from C is scaled, too. Raises DataInvalid for gradients that
    are not finite.
    """
    num_values = sum(weight.numel() for weight in weights)
    safe_norm = CLIP_NORM * (1 - (num_values + 16) * 2.0**-52)
    total_P = torch.zeros(num_values, dtype=torch.float64, device=weights[0].device)
    for chunk in chunks:
        rows = [each.flatten(1).double() for each in chunk]
        norm_B = norms(rows)
        if not bool(norm_B.isfinite().all()):
            raise DataInvalid(f"expected finite gradients, found NaN or infinity; {DIVERGED}")
        scale_B = (safe_norm / norm_B).clamp(max=1)
        clipped = [each.mul_(scale_B[:, None]) for each in rows]
        _check_clipped(norms(clipped))
        total_P += torch.cat([each.sum(dim=0) for each in clipped])
    return total_P


def norms(rows: Sequence[Tensor]) -> Tensor:
    """norm_B over all weights of a record together."""
    norm_B: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(each, dim=1) for each in rows]), dim=0
    )
    return norm_B


def _check_clipped(norm_B: Tensor) -> None:
    """Not an assertion: python -O must not switch off what the promise rests on."""
    if not bool((norm_B <= CLIP_NORM).all()):
        raise PrivacyRefusal(
            f"expected gradients of at most {CLIP_NORM!r} after the clip, found {float(norm_B.max())!r}; report this"
        )


def with_noise(total_P: Float64, std: float, normals: Normals) -> Float64:
    """total_P + std·z, z of independent standard normals, on the public grid of that std."""
    noised_P = std * normals(total_P.shape)
    noised_P += total_P
    step = grid_step(std)
    return from_grid(round_to_grid(noised_P, step, np.int32), step).astype(np.float64, copy=False)


def set_gradients(weights: Sequence[Tensor], gradient_P: Tensor) -> None:
    parts = torch.split_with_sizes(gradient_P, [weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight).to(weight.dtype)


# ---- Of a denoiser -----------------------------------------------------------------------------------------------


def denoiser_gradients(
    x0_NCHW: Tensor, label_N: Tensor, *, sigmas: tuple[float, float], multiplicity: int, sigma_data: float
) -> RecordGradients:
    """Of clean records: the gradient of the mean denoising loss over `multiplicity` noise levels, log-normal between
    `sigmas` as for `records`, each with noise of its own (DPDM's noise multiplicity). In float32.

    Noise levels and noise are drawn anew for every step and record by a generator that the operating system seeds. It
    need not be secret, since the clip holds for any of them, but it may not be known: the draws of others then depend
    on whether a record was taken, though their distribution, all that counts, does not.
    """
    generator = torch.Generator(x0_NCHW.device).manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)

    def gradients(model: nn.Module, index_B: Tensor) -> Iterator[Sequence[Tensor]]:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def loss(weights: dict[str, Tensor], x0_CHW: Tensor, label: Tensor, sigma_K: Tensor, noise: Tensor) -> Tensor:
            def denoise(*arguments: Tensor) -> Tensor:
                estimate: Tensor = functional_call(model, weights, arguments)
                return estimate

            label_K = label.expand(multiplicity)
            flag_K = torch.full_like(label_K, UNCLIPPED)
            x0_KCHW = x0_CHW.expand(multiplicity, *x0_CHW.shape)
            return denoising_loss(denoise, x0_KCHW, sigma_K, label_K, flag_K, noise, sigma_data).mean()

        of_records = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))
        num_values = sum(weight.numel() for weight in weights.values())
        size = max(1, min(GRADIENT_VALUES // num_values, IMAGES // multiplicity))
        for start in range(0, len(index_B), size):
            rows = index_B[start : start + size]
            shape = (len(rows), multiplicity)
            sigma_BK = log_normal_sigmas(math.prod(shape), *sigmas, generator).view(shape)
            noise_BKCHW = torch.randn(*shape, *x0_NCHW.shape[1:], generator=generator, device=generator.device)
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the CPU's fused attention
                of_chunk = of_records(weights, x0_NCHW[rows], label_N[rows], sigma_BK, noise_BKCHW)
            yield list(of_chunk.values())

    return gradients
