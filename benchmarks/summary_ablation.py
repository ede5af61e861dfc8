"""What one owner's numbers can say of a class at one promise: which sums to release besides a mean and a second moment.

    python benchmarks/summary_ablation.py OUT.jsonl [--epsilons 10 1] [--seeds 0 1 2] [--candidates NAME ...]

Fashion-MNIST (Debian's dataset-fashion-mnist), averaged to 14×14, ten classes of 5,000 images at one owner and 50 at
the other. No network: what was released becomes one Gaussian mixture per class, whose denoiser is known in closed form,
and that is asked for held-out images at several noise levels; with `--draws`, its draws are compared with them, too.
Every candidate spends the same μ, replace-one within a class (see `Parts`). One row per seed, ε and candidate; those
that OUT already holds are not computed again. `--table OUT.jsonl` prints mean ± standard deviation over seeds.

The noise here comes from a seed, so that rows can be computed again. A release never does that.

Shapes: n records of a class, D values of an image, R axes, J cells, K classes, B images of a batch. [0, 1] units until
a mixture is made, [-1, 1] from there.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feddiff.experiment import commit
from feddiff_protocol.accountant import mu_of
from feddiff_trainer.clipped_gaussian import ClippedGaussian
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.mechanisms import release_summary
from feddiff_trainer.metrics import coverage, density, frechet_distance, frechet_distance_of_gaussians
from feddiff_trainer.pooling import OwnerSummary, exact_summary, expected_centre_error, pool, project_keeping_trace

DATA = Path("/usr/share/datasets/fashion-mnist")
DELTA, CLASSES, COMMON, RARE = 1e-5, 10, 5000, 50
SIDE = 14
SIZE = SIDE * SIDE
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
HELD_OUT = 100  # images a class that are denoised
DRAWN = 1000  # images a class that are drawn, and compared with as many held-out ones
VARIANCE_GUESS = 0.05
MEAN_CLIP, MOMENT_CLIP = SIDE * 3 / 7, SIDE * 2 / 7  # 6 and 4, as `feddiff split` has them: no image was looked at
LLOYD = 2  # noisy steps of k-means
TINY = 1e-12


# ---- The promise -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Shares of μ² of a release's parts, which compose adaptively: Σ Δ²/s² = μ².

    `mean`: sum of clipped images v ≥ 0. Δ = √2·C1, and no more than √D, the diameter of [0, 1]^D: reached by two images
      that are white where the other one is black. C1 = √D clips nothing.
    `moment`: second moment of clipped u about the noisy mean. Δ = √2·C2².
    `axes`: where the cells are, by LLOYD noisy steps of k-means. Every record falls into one cell of J, by its
      projection y on the R first axes of what was released before: that depends on public numbers and on this record
      alone. Of each cell R0 times its number, and its sum of y, ‖y‖ ≤ R0. A replaced record that stays in its cell
      moves that by ‖y - y'‖ ≤ 2·R0; one that changes cells by √(‖y‖² + ‖y'‖² + 2·R0²) ≤ 2·R0. Δ = 2·R0, reached by
      both.
    `cells`: of each cell the second moment of w = (c, u), u = clip(x - its centre), c constant: number, sum and second
      moment at once. ‖w‖² ≤ c² + C², and records of different cells are orthogonal: ‖wwᵀ - w'w'ᵀ‖² =
      ‖w‖⁴ + ‖w'‖⁴ - 2·⟨w,w'⟩² (the last term in one cell only), at most 2·(c² + C²)². Δ = √2·(c² + C²), reached by u
      and u' of norm C in different cells. Where the block uuᵀ is released as its sum over cells (`tied`), the square is
      at most 2c⁴ + 2c²·(‖u‖² + ‖u'‖²) + ‖u‖⁴ + ‖u'‖⁴ - 2⟨u,u'⟩²: the same Δ, reached where ⟨u,u'⟩ = 0.
    """

    mean: float
    moment: float
    axes: float = 0.0
    cells: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A way to spend μ. `mean_clip`, `moment_clip`: C1, C2; `cell_clip`: C over the norm that the released covariance
    lets expect. `whiten`: power p of Σ^-p, of the owner's first mean covariance, that u is multiplied by in the cells.
    `smooth`: power of frequency by which u's cosine transform is multiplied before the clip of the second moment, the
    same for all data. `weight`: how much of an average covariance is its own (pooling.pool); None where that is
    estimated from what was released. `tied`: cells share their block uuᵀ.
    """

    parts: Parts
    num_cells: int = 1
    mean_clip: float = MEAN_CLIP
    moment_clip: float = MOMENT_CLIP
    cell_clip: float = 1.4
    num_axes: int = 10
    whiten: float = 0.0
    smooth: float = 0.0
    weight: float | None = None
    tied: bool = False


def mean_sensitivity(how: Candidate) -> float:
    return min(sqrt(2) * how.mean_clip, sqrt(SIZE))


# ---- The release of one class ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class First:
    """A class's noisy mean_D, and its covariance_DD as `basis_DD` maps it, with noise of `std` in every entry."""

    count: int
    mean_D: Tensor
    covariance_DD: Tensor
    std: float


@dataclass(frozen=True)
class Cells:
    """J cells of a class: noisy counts_J, the means' offsets_JD from centres_JD and covariances_JDD, both as `basis`
    maps them; std: of the noise in an entry of a sum."""

    centres_JD: Tensor
    counts_J: Tensor
    offsets_JD: Tensor
    offset_variance_J: Tensor
    covariances_JDD: Tensor
    covariance_variance_J: Tensor
    tied_variance: float


def first_release(x_nD: Tensor, how: Candidate, mu: float, basis_DD: Tensor, noise: torch.Generator) -> First:
    n, clips = len(x_nD), isfinite(mu)
    s1 = mean_sensitivity(how) / (mu * sqrt(how.parts.mean)) if clips else 0.0
    s2 = sqrt(2) * how.moment_clip**2 / (mu * sqrt(how.parts.moment)) if clips else 0.0
    v_nD = clipped(x_nD, how.mean_clip) if clips else x_nD
    mean_D = ((v_nD.sum(0) + s1 * normal(SIZE, noise)) / n).clamp(0, 1)
    u_nD = (x_nD - mean_D) @ basis_DD
    u_nD = clipped(u_nD, how.moment_clip) if clips else u_nD
    covariance_DD = (u_nD.T @ u_nD + s2 * symmetric_noise(SIZE, noise)) / n
    error_DD = basis_DD @ expected_centre_error(mean_D, s1 / n) @ basis_DD
    return First(n, mean_D, covariance_DD - error_DD, s2 / n)


def cell_release(
    x_nD: Tensor, first: First, sigma_DD: Tensor, basis_DD: Tensor, how: Candidate, mu: float, noise: torch.Generator
) -> Cells:
    """sigma_DD: the class's covariance, public by now; its axes and size are all that is used of it."""
    clips = isfinite(mu)
    found = find_cells(x_nD, first, sigma_DD, how, mu, noise)
    centres_JD = first.mean_D + found.offsets_JR @ found.axes_DR.T
    nearest_n = cell_of(x_nD, first, centres_JD, sigma_DD, how)
    largest = how.cell_clip * float((basis_DD @ sigma_DD @ basis_DD).trace()) ** 0.5
    c = largest / 2
    s = sqrt(2) * (c**2 + largest**2) / (mu * sqrt(how.parts.cells)) if clips else 0.0
    u_nD = (x_nD - centres_JD[nearest_n]) @ basis_DD
    u_nD = clipped(u_nD, largest) if clips else u_nD
    counts, offsets, moments = [], [], []
    for j in range(how.num_cells):
        u_iD = u_nD[nearest_n == j]
        counts.append(len(u_iD) + s / c**2 * float(normal(1, noise)))
        offsets.append(u_iD.sum(0) + s / (sqrt(2) * c) * normal(SIZE, noise))
        moments.append(u_iD.T @ u_iD)
    counts_J = torch.tensor(counts, dtype=torch.float64).clamp(min=first.count / (10 * how.num_cells))
    offsets_JD = torch.stack(offsets) / counts_J[:, None]
    variance_J = (s / (sqrt(2) * c * counts_J)) ** 2
    eye_DD = torch.eye(SIZE, dtype=torch.float64)
    between_JDD = offsets_JD[:, :, None] * offsets_JD[:, None] - variance_J[:, None, None] * eye_DD
    if how.tied:
        total = counts_J.sum()
        tied_DD = (torch.stack(moments).sum(0) + s * symmetric_noise(SIZE, noise)) / total
        tied_DD = tied_DD - torch.einsum("j,jde->de", counts_J / total, between_JDD)
        covariances_JDD = tied_DD.expand(how.num_cells, SIZE, SIZE)
        return Cells(
            centres_JD, counts_J, offsets_JD, variance_J, covariances_JDD, torch.zeros_like(counts_J),
            (s / float(total)) ** 2,
        )  # fmt: skip
    noised = [m_DD + s * symmetric_noise(SIZE, noise) for m_DD in moments]
    covariances_JDD = torch.stack(noised) / counts_J[:, None, None] - between_JDD
    tied_variance = how.num_cells * (s / float(counts_J.sum())) ** 2
    return Cells(
        centres_JD, counts_J, offsets_JD, variance_J, covariances_JDD, (s / counts_J) ** 2, tied_variance
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Cells as the last step of k-means left them: offsets_JR from the mean along the first axes_DR, the noisy numbers
    of records that gave them, the variance of the noise in a value of an offset."""

    axes_DR: Tensor
    offsets_JR: Tensor
    numbers_J: Tensor
    variance_J: Tensor


def find_cells(
    x_nD: Tensor, first: First, sigma_DD: Tensor, how: Candidate, mu: float, noise: torch.Generator
) -> Found:
    """k-means on draws of the released Gaussian, then LLOYD noisy steps on records."""
    axes_DR, scale_R = first_axes(sigma_DD, how.num_axes)
    if how.num_cells == 1:
        zero_1 = torch.zeros(1, dtype=torch.float64)
        return Found(axes_DR, torch.zeros(1, how.num_axes, dtype=torch.float64), zero_1 + first.count, zero_1)
    public = torch.Generator().manual_seed(0)
    drawn_nR = torch.randn(5000, how.num_axes, generator=public, dtype=torch.float64) * scale_R
    offsets_JR = drawn_nR[: how.num_cells]
    for _ in range(20):
        offsets_JR, numbers_J = lloyd(drawn_nR, offsets_JR, 0.0, 1.0, noise)
    if not how.parts.axes and isfinite(mu):
        return Found(axes_DR, offsets_JR, numbers_J * first.count / 5000, torch.zeros_like(numbers_J))
    radius, steps = (how.moment_clip, LLOYD) if isfinite(mu) else (inf, 20)
    std = 2 * radius * sqrt(steps) / (mu * sqrt(how.parts.axes)) if isfinite(mu) else 0.0
    y_nR = clipped((x_nD - first.mean_D) @ axes_DR, radius)
    for _ in range(steps):
        offsets_JR, numbers_J = lloyd(y_nR, offsets_JR, std, radius, noise)
    return Found(axes_DR, offsets_JR, numbers_J, (std / numbers_J) ** 2)


def lloyd(y_nR: Tensor, offsets_JR: Tensor, std: float, radius: float, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means and numbers of the cells, from R0·numbers and sums with noise; a cell that seems nearly empty stays where
    it is, as one of a tenth of the average."""
    num_cells = len(offsets_JR)
    nearest_n = torch.cdist(y_nR, offsets_JR).argmin(dim=1)
    numbers_J = torch.bincount(nearest_n, minlength=num_cells).double() + std / radius * normal(num_cells, noise)
    sums_JR = torch.zeros_like(offsets_JR).index_add_(0, nearest_n, y_nR)
    sums_JR += std * torch.randn(sums_JR.shape, generator=noise, dtype=torch.float64)
    least = len(y_nR) / (10 * num_cells)
    enough_J = numbers_J > max(least, 3 * std / radius)
    numbers_J = numbers_J.clamp(min=least)
    return torch.where(enough_J[:, None], sums_JR / numbers_J[:, None], offsets_JR), numbers_J


def cell_of(x_nD: Tensor, first: First, centres_JD: Tensor, sigma_DD: Tensor, how: Candidate) -> Tensor:
    axes_DR, _ = first_axes(sigma_DD, how.num_axes)
    return torch.cdist((x_nD - first.mean_D) @ axes_DR, (centres_JD - first.mean_D) @ axes_DR).argmin(dim=1)


def first_axes(sigma_DD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    values_D, axes_DD = torch.linalg.eigh(sigma_DD)
    return axes_DD[:, -num:], values_D[-num:].clamp(min=0).sqrt()


def clipped(v_nD: Tensor, norm: float) -> Tensor:
    return v_nD * (norm / v_nD.norm(dim=1, keepdim=True).clamp(min=TINY)).clamp(max=1)


def normal(num: int, noise: torch.Generator) -> Tensor:
    return torch.randn(num, generator=noise, dtype=torch.float64)


def symmetric_noise(size: int, noise: torch.Generator) -> Tensor:
    """N(0, 1) in the isometric packing: variance 1 on the diagonal, ½ off it."""
    z_DD = torch.randn(size, size, generator=noise, dtype=torch.float64)
    return (z_DD + z_DD.T) / 2


# ---- From what was released to mixtures ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """One class, [-1, 1] units."""

    weights_J: Tensor
    means_JD: Tensor
    covariances_JDD: Tensor


def mixtures(owners: "Owners", how: Candidate, mu: float, noise: torch.Generator) -> list[Mixture]:
    """Every class by the owner who has most of it: what the other one's 50 images add is of weight 10⁻⁴."""
    found: dict[int, Mixture] = {}
    for classes in owners.common:
        records = [owners.common_images(k) for k in classes]
        found |= dict(zip(classes, owners_mixtures(records, how, mu, noise), strict=True))
    return [found[k] for k in range(CLASSES)]


def owners_mixtures(records: list[Tensor], how: Candidate, mu: float, noise: torch.Generator) -> list[Mixture]:
    basis_DD = smooth_basis(how.smooth)
    firsts = [first_release(x_nD, how, mu, basis_DD, noise) for x_nD in records]
    mapped_KDD = torch.stack([first.covariance_DD for first in firsts])
    variance_K = torch.tensor([first.std**2 for first in firsts], dtype=torch.float64)
    counts_K = torch.tensor([first.count for first in firsts], dtype=torch.float64)
    mapped_KDD, _ = shrink(mapped_KDD, variance_K, counts_K, how.weight)
    sigma_KDD = unmapped(mapped_KDD, basis_DD)
    if how.num_cells > 1 and not how.parts.cells:
        return [
            within_the_covariance(first, sigma_DD, find_cells(x_nD, first, sigma_DD, how, mu, noise))
            for x_nD, first, sigma_DD in zip(records, firsts, sigma_KDD, strict=True)
        ]
    if not how.parts.cells:
        return [
            in_pixels(torch.ones(1, dtype=torch.float64), first.mean_D[None], sigma_DD[None])
            for first, sigma_DD in zip(firsts, sigma_KDD, strict=True)
        ]
    if how.whiten:
        values_D, axes_DD = torch.linalg.eigh(sigma_KDD.mean(0))
        basis_DD = (axes_DD * values_D.clamp(min=1e-3 * float(values_D.mean())) ** -how.whiten) @ axes_DD.T
    cells = [
        cell_release(x_nD, first, sigma_DD, basis_DD, how, mu, noise)
        for x_nD, first, sigma_DD in zip(records, firsts, sigma_KDD, strict=True)
    ]
    weights = [each.counts_J / each.counts_J.sum() for each in cells]
    within = [torch.einsum("j,jde->de", w_J, each.covariances_JDD) for w_J, each in zip(weights, cells, strict=True)]
    tied_K = torch.tensor([each.tied_variance for each in cells], dtype=torch.float64)
    within_KDD, _ = shrink(torch.stack(within), tied_K, counts_K, how.weight)
    found = []
    for w_J, each, within_DD in zip(weights, cells, within_KDD, strict=True):
        covariances_JDD = within_DD.expand(how.num_cells, SIZE, SIZE)
        if not how.tied and how.num_cells > 1:
            covariances_JDD, _ = shrink(
                each.covariances_JDD, each.covariance_variance_J, each.counts_J, how.weight, within_DD
            )
        means_JD = each.centres_JD + shrunk_offsets(each, within_DD, w_J) @ torch.linalg.inv(basis_DD)
        found.append(in_pixels(w_J, means_JD, unmapped(covariances_JDD, basis_DD)))
    return found


def within_the_covariance(first: First, sigma_DD: Tensor, found: Found) -> Mixture:
    """Cells that share one covariance: what the class's whole one leaves beside the scatter of their means. The mixture
    has the mean and covariance that were released, so no second moment is needed of any cell."""
    weights_J = found.numbers_J / found.numbers_J.sum()
    offsets_JR = found.offsets_JR - weights_J @ found.offsets_JR
    raw_R = (weights_J[:, None] * (offsets_JR.square() - found.variance_J[:, None])).sum(0).clamp(min=0)
    offsets_JR = offsets_JR * raw_R / (raw_R + found.variance_J[:, None]).clamp(min=TINY)
    offsets_JD = offsets_JR @ found.axes_DR.T
    rest_DD = sigma_DD - torch.einsum("j,jd,je->de", weights_J, offsets_JD, offsets_JD)
    values_D, axes_DD = torch.linalg.eigh(rest_DD)
    least = float(values_D.clamp(min=0).median())
    rest_DD = (axes_DD * values_D.clamp(min=least * 0.1)) @ axes_DD.T
    means_JD = first.mean_D + offsets_JD
    return Mixture(weights_J, 2 * means_JD - 1, 4 * rest_DD.expand(len(weights_J), SIZE, SIZE))


def shrink(
    own_JDD: Tensor, variance_J: Tensor, counts_J: Tensor, weight: float | None, shared_DD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """pooling.shrink_to_shared, projected; without a weight, the classes' variance B about the shared covariance is
    estimated from what was released: E‖own - shared‖² = Σ_ij B·λ_i·λ_j + noise."""
    precision_J = 1 / (variance_J + (own_JDD.diagonal(dim1=1, dim2=2).mean(1) ** 2 / counts_J))
    floor = 0.01 * VARIANCE_GUESS * SIZE
    if shared_DD is None:
        shared_DD = torch.einsum("j,jde->de", precision_J / precision_J.sum(), own_JDD)
        shared_DD = project_keeping_trace(shared_DD, floor)
    values_D, axes_DD = torch.linalg.eigh(shared_DD)
    expected_DD = torch.outer(values_D, values_D).clamp(min=TINY)
    apart_JDD = axes_DD.T @ (own_JDD - shared_DD) @ axes_DD
    entries_DD = (1 + torch.eye(SIZE, dtype=torch.float64)) / 2  # the noise's variance off the diagonal is half
    if weight is None:
        noise_J = variance_J * entries_DD.sum()
        spread_J = (apart_JDD.square().sum(dim=(1, 2)) - noise_J) / expected_DD.sum()
        relative = float((spread_J - 1 / counts_J).mean().clamp(min=1e-3))
    else:
        mean_square = float(values_D.mean()) ** 2
        relative = weight / (1 - weight) / float(precision_J.mean()) / mean_square
    signal_DD = relative * expected_DD
    error_JDD = variance_J[:, None, None] * entries_DD + expected_DD / counts_J[:, None, None]
    shrunk_JDD = shared_DD + axes_DD @ (signal_DD / (signal_DD + error_JDD) * apart_JDD) @ axes_DD.T
    return torch.stack([project_keeping_trace(c_DD, floor) for c_DD in shrunk_JDD]), shared_DD


def shrunk_offsets(cells: Cells, within_DD: Tensor, weights_J: Tensor) -> Tensor:
    """Means that were moved by noise, back towards their centres, along each axis as far as it is noise."""
    _, axes_DD = torch.linalg.eigh(within_DD)
    offsets_JD = cells.offsets_JD @ axes_DD
    spread_D = (weights_J[:, None] * (offsets_JD.square() - cells.offset_variance_J[:, None])).sum(0).clamp(min=0)
    kept_JD = spread_D / (spread_D + cells.offset_variance_J[:, None]).clamp(min=TINY)
    return kept_JD * offsets_JD @ axes_DD.T


def smooth_basis(power: float) -> Tensor:
    """What multiplies the cosine transform's coefficient of frequency f by (1 + f)^power, scaled such that images whose
    variance falls as (1 + f)^-2 keep their norm."""
    i = torch.arange(SIDE, dtype=torch.float64)
    dct = torch.cos(torch.pi * (i + 0.5) * i[:, None] / SIDE)
    dct = dct / dct.norm(dim=1, keepdim=True)
    both_DD = torch.kron(dct, dct)
    frequency_D = 1 + (i[:, None] ** 2 + i**2).sqrt().flatten()
    weight_D = frequency_D**power
    weight_D = weight_D * ((frequency_D**-2).sum() / (weight_D.square() * frequency_D**-2).sum()).sqrt()
    return both_DD.T @ (weight_D[:, None] * both_DD)


def unmapped(mapped_JDD: Tensor, basis_DD: Tensor) -> Tensor:
    inverse_DD = torch.linalg.inv(basis_DD)
    return inverse_DD @ mapped_JDD @ inverse_DD


def in_pixels(weights_J: Tensor, means_JD: Tensor, covariances_JDD: Tensor) -> Mixture:
    return Mixture(weights_J, 2 * means_JD.clamp(0, 1) - 1, 4 * covariances_JDD)


# ---- What there is, and what is not private --------------------------------------------------------------------------


def as_it_is(owners: "Owners", mu: float, noise: torch.Generator, how: Candidate) -> list[Mixture]:
    """Both owners' releases by the package's own pool."""
    s1 = mean_sensitivity(how) / (mu * sqrt(how.parts.mean))
    s2 = sqrt(2) * how.moment_clip**2 / (mu * sqrt(how.parts.moment))

    def normals(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return torch.randn(shape, generator=noise, dtype=torch.float64).numpy()

    summaries = []
    for owner in (0, 1):
        x_ND, label_N = owners.records(owner)
        s = release_summary(
            x_ND.numpy(),
            label_N.numpy(),
            num_classes=CLASSES,
            mean_clip_norm=how.mean_clip,
            moment_clip_norm=how.moment_clip,
            centre=0.5,
            mean_std=s1,
            moment_std=s2,
            normals=normals,
        )
        sums = (torch.from_numpy(a) for a in (s.mean_sums_KD, s.moment_sums_KM, s.counts_K))
        summaries.append(OwnerSummary(*sums, s1, s2, how.moment_clip, 0.5))
    assert how.weight is not None
    return gaussians(*pool(summaries, VARIANCE_GUESS, how.weight))


def gaussians(means_KD: Tensor, covariances_KDD: Tensor) -> list[Mixture]:
    one = torch.ones(1, dtype=torch.float64)
    return [Mixture(one, m_D[None], c_DD[None]) for m_D, c_DD in zip(means_KD, covariances_KDD, strict=True)]


def own_gaussians(owners: "Owners", owner: int) -> list[Mixture]:
    """An owner without anybody's release: its few images' mean, their covariance drawn to that of its other classes."""
    x_ND, label_N = owners.records(owner)
    empty = torch.zeros(CLASSES, 1)
    nothing = OwnerSummary(empty, empty, torch.bincount(label_N, minlength=CLASSES), 0.0, 0.0, MOMENT_CLIP, 0.5)
    return gaussians(*pool([exact_summary(x_ND, label_N, nothing)], VARIANCE_GUESS))


# ---- The records -----------------------------------------------------------------------------------------------------


class Owners:
    """Two owners' records, [0, 1] units, by a seed: which classes are common where, and which images are whose."""

    def __init__(self, seed: int) -> None:
        pixels_ND, label_N = images_of("train")
        self.held_ND, self.held_label_N = images_of("t10k")
        order = torch.Generator().manual_seed(seed)
        classes = torch.randperm(CLASSES, generator=order).tolist()
        self.common = sorted(classes[:5]), sorted(classes[5:])
        self.pixels_ND, self.rows = pixels_ND, {}
        for k in range(CLASSES):
            of_class = (label_N == k).nonzero().flatten()
            of_class = of_class[torch.randperm(len(of_class), generator=order)]
            self.rows[k] = of_class[:COMMON], of_class[COMMON : COMMON + RARE], of_class[COMMON + RARE :]

    def common_images(self, k: int) -> Tensor:
        return self.pixels_ND[self.rows[k][0]]

    def rare_images(self, k: int) -> Tensor:
        return self.pixels_ND[self.rows[k][1]]

    def unused_images(self, k: int) -> Tensor:
        return self.pixels_ND[self.rows[k][2]]

    def all_images(self, k: int) -> Tensor:
        return torch.cat([self.common_images(k), self.rare_images(k)])

    def held(self, k: int, num: int) -> Tensor:
        return self.held_ND[self.held_label_N == k][:num]

    def records(self, owner: int) -> tuple[Tensor, Tensor]:
        of_class = [self.common_images(k) if k in self.common[owner] else self.rare_images(k) for k in range(CLASSES)]
        counts = torch.tensor([len(x_nD) for x_nD in of_class])
        return torch.cat(of_class), torch.arange(CLASSES).repeat_interleave(counts)


def images_of(part: str) -> tuple[Tensor, Tensor]:
    """pixels_ND in [0, 1], each the mean of 2×2, and label_N."""
    with gzip.open(DATA / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIDE, 2, SIDE, 2)
    with gzip.open(DATA / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels.mean(axis=(2, 4)).reshape(-1, SIZE) / 255), torch.from_numpy(labels)


# ---- How good it is --------------------------------------------------------------------------------------------------


Denoise = Callable[[Tensor, float], Tensor]


def of_mixture(mixture: Mixture) -> Denoise:
    """E[x | x + σ·z = y]: each component's own affine one, weighted by how well it explains y."""
    components = [
        (weight.log(), m_D, *torch.linalg.eigh(c_DD))
        for weight, m_D, c_DD in zip(mixture.weights_J, mixture.means_JD, mixture.covariances_JDD, strict=True)
    ]

    def denoise(y_BD: Tensor, sigma: float) -> Tensor:
        logits, estimates = [], []
        for log_weight, m_D, values_D, axes_DD in components:
            total_D = values_D.clamp(min=0) + sigma**2
            apart_BD = (y_BD - m_D) @ axes_DD
            logits.append(log_weight - (apart_BD.square() / total_D).sum(1) / 2 - total_D.log().sum() / 2)
            estimates.append(m_D + (apart_BD * (1 - sigma**2 / total_D)) @ axes_DD.T)
        return torch.einsum("bj,jbd->bd", torch.stack(logits, dim=1).softmax(dim=1), torch.stack(estimates))

    return denoise


def of_images(x_ND: Tensor) -> Denoise:
    """The denoiser of these images and no others, [-1, 1] units: what training by heart comes to."""

    def denoise(y_BD: Tensor, sigma: float) -> Tensor:
        fit_BN = y_BD @ x_ND.T - x_ND.square().sum(dim=1) / 2
        return (fit_BN / sigma**2).softmax(dim=1) @ x_ND

    return denoise


def errors(owners: Owners, denoise_of: Callable[[int], Denoise]) -> dict[str, list[float]]:
    """By σ, of every class, the mean square error of a value of a held-out image. All see the same noise."""
    found: dict[str, list[float]] = {str(sigma): [] for sigma in SIGMAS}
    for k in range(CLASSES):
        x_BD, denoise = 2 * owners.held(k, HELD_OUT) - 1, denoise_of(k)
        z_BD = torch.randn(x_BD.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for sigma in SIGMAS:
            found[str(sigma)].append(float((denoise(x_BD + sigma * z_BD, sigma) - x_BD).square().mean()))
    return found


def moments_apart(owners: Owners, found: list[Mixture]) -> float:
    """Fréchet distance of every class's moments, without a draw, in the axes of `likeness`; the mean over classes."""
    axes_DR, apart = principal_axes(owners), []
    for k, mixture in enumerate(found):
        mean_D = mixture.weights_J @ mixture.means_JD
        offsets_JD = mixture.means_JD - mean_D
        between_JDD = offsets_JD[:, :, None] * offsets_JD[:, None]
        covariance_DD = torch.einsum("j,jde->de", mixture.weights_J, mixture.covariances_JDD + between_JDD)
        held_ND = 2 * owners.held(k, DRAWN) - 1
        moments = (mean_D, covariance_DD), (held_ND.mean(0), torch.cov(held_ND.T))
        seen = [((m_D @ axes_DR).numpy(), (axes_DR.T @ c_DD @ axes_DR).numpy()) for m_D, c_DD in moments]
        apart.append(frechet_distance_of_gaussians(*seen[0], *seen[1]))
    return mean(apart)


def principal_axes(owners: Owners) -> Tensor:
    """axes_DR of held-out images in [-1, 1]: the 20 of most variance."""
    held_ND = 2 * torch.cat([owners.held(k, DRAWN) for k in range(CLASSES)]) - 1
    return torch.linalg.eigh(torch.cov(held_ND.T))[1][:, -20:]


def draws(found: list[Mixture], seed: int) -> list[Tensor]:
    """DRAWN images of every class, [0, 1] units, of components that are clipped Gaussians with these moments."""
    drawn, noise = [], torch.Generator().manual_seed(seed)
    for mixture in found:
        images = ClippedGaussian(ClassGaussian(mixture.means_JD, mixture.covariances_JDD))
        component_B = torch.multinomial(mixture.weights_J, DRAWN, replacement=True, generator=noise)
        drawn.append((images.draw(component_B, (1, SIDE, SIDE), noise).flatten(1) + 1) / 2)
    return drawn


def likeness(owners: Owners, drawn: list[Tensor]) -> dict[str, float]:
    """Fréchet distance in the first 20 principal components of held-out images ([-1, 1] units), pooled and mean over
    classes; coverage and density of the first 200 of a class, of all classes together."""
    held, axes_DR = [owners.held(k, DRAWN) for k in range(CLASSES)], principal_axes(owners)

    def seen(images: list[Tensor]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        return [((2 * x_nD - 1) @ axes_DR).numpy() for x_nD in images]

    real, made = seen(held), seen(drawn)
    few = [np.concatenate([x_nD[:200].numpy() for x_nD in images]) for images in (held, drawn)]
    return {
        "frechet": frechet_distance(np.concatenate(made), np.concatenate(real)),
        "frechet_classes": mean(frechet_distance(m, r) for m, r in zip(made, real, strict=True)),
        "coverage": coverage(few[0], few[1]),
        "density": density(few[0], few[1]),
    }


# ---- The table -------------------------------------------------------------------------------------------------------

NOW = Candidate(Parts(0.5, 0.5), weight=0.5)
ONE = Candidate(Parts(0.2, 0.8), mean_clip=float(SIDE))
CELLS = replace(ONE, parts=Parts(0.1, 0.3, 0.1, 0.5), num_cells=8, tied=True)
MEANS = replace(ONE, parts=Parts(0.15, 0.7, 0.15), num_cells=8, smooth=0.5)
CANDIDATES = {
    "as it is": NOW,
    "as it is, C1 = 10": replace(NOW, mean_clip=10.0),
    "as it is, mean unclipped": replace(ONE, weight=0.5),
    "one": ONE,
    "one, C2 = 3": replace(ONE, moment_clip=3.0),
    "one, C2 = 5": replace(ONE, moment_clip=5.0),
    "one, smooth 0.5": replace(ONE, smooth=0.5),
    "one, smooth 1": replace(ONE, smooth=1.0),
    "one, smooth 0.5, weight 0.5": replace(ONE, smooth=0.5, weight=0.5),
    "one, twice, whitened": replace(CELLS, parts=Parts(0.1, 0.3, 0.0, 0.6), num_cells=1, whiten=0.25, cell_clip=2.0),
    "8 cells": replace(CELLS, tied=False),
    "8 cells, tied": CELLS,
    "8 cells, tied, smooth 0.5": replace(CELLS, smooth=0.5),
    "8 cells, tied, whitened": replace(CELLS, whiten=0.25, cell_clip=2.0),
    "8 means, smooth 0.5": MEANS,
    "16 means, smooth 0.5": replace(MEANS, num_cells=16),
    "32 means, smooth 0.5": replace(MEANS, num_cells=32),
    "32 means, pixels": replace(MEANS, num_cells=32, smooth=0.0),
    "32 means, smooth 0.5, 20 axes": replace(MEANS, num_cells=32, num_axes=20),
    "32 means, smooth 0.5, no k-means": replace(MEANS, num_cells=32, parts=Parts(0.2, 0.8)),
}
EXACT = {
    "exact, one": ONE,
    "exact, 8 cells": replace(CELLS, tied=False),
    "exact, 8 cells, tied": CELLS,
    "exact, 8 means": MEANS,
    "exact, 32 means": replace(MEANS, num_cells=32),
    "exact, 32 cells": replace(CELLS, tied=False, num_cells=32),
}


def measured(owners: Owners, name: str, epsilon: float | None, seed: int, *, with_draws: bool) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(10_000 + seed)
    if name == "own 50 images":
        return {"errors": errors(owners, lambda k: of_images(2 * owners.rare_images(k) - 1))}
    if name == "all 5,050 images":
        return {"errors": errors(owners, lambda k: of_images(2 * owners.all_images(k) - 1))}
    if name == "other images":
        return likeness(owners, [owners.unused_images(k)[:DRAWN] for k in range(CLASSES)])
    if name == "own Gaussian":
        by_owner = own_gaussians(owners, 0), own_gaussians(owners, 1)
        found = [by_owner[k in owners.common[0]][k] for k in range(CLASSES)]
    elif epsilon is None:
        found = mixtures(owners, EXACT[name], inf, noise)
    elif name.startswith("as it is"):
        found = as_it_is(owners, mu_of(epsilon, DELTA), noise, CANDIDATES[name])
    else:
        found = mixtures(owners, CANDIDATES[name], mu_of(epsilon, DELTA), noise)
    measures = {
        "errors": errors(owners, lambda k: of_mixture(found[k])),
        "frechet_moments": moments_apart(owners, found),
    }
    return measures | (likeness(owners, draws(found, seed)) if with_draws else {})


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    out = Path(args.out)
    done = {(r["seed"], r["epsilon"], r["name"]) for r in map(json.loads, out.open())} if out.exists() else set()
    begun_at = commit()
    for seed in args.seeds:
        owners = Owners(seed)
        for name, epsilon in asked(args):
            if (seed, epsilon, name) in done:
                continue
            began = time.monotonic()
            row = {"commit": begun_at, "seed": seed, "epsilon": epsilon, "name": name}
            row |= measured(owners, name, epsilon, seed, with_draws=args.draws)
            row["seconds"] = round(time.monotonic() - began, 1)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)


def asked(args: argparse.Namespace) -> Iterator[tuple[str, float | None]]:
    for name in ("own 50 images", "own Gaussian", *EXACT, "all 5,050 images", "other images"):
        if not args.candidates or name in args.candidates:
            yield name, None
    for epsilon in args.epsilons:
        for name in args.candidates or CANDIDATES:
            if name in CANDIDATES:
                yield name, epsilon


def line(row: dict[str, Any]) -> str:
    cells = [f"{mean(row['errors'][str(s)]):.4f}" for s in SIGMAS] if "errors" in row else []
    cells += [f"{row[name]:.3f}" for name in MEASURES if name in row]
    return f"{row['seed']} {row['epsilon']} {row['name']:30} {' '.join(cells)} {row['seconds']} s"


MEASURES = "frechet_moments", "frechet", "frechet_classes", "coverage", "density"


def table(out: Path) -> str:
    """Markdown: per ε and candidate mean ± standard deviation over seeds of what every row has."""
    rows = [json.loads(text) for text in out.open()]
    lines = [f"| ε | what | {' | '.join(map(str, SIGMAS))} | {' | '.join(MEASURES)} |", "|---" * (2 + 5 + 5) + "|"]
    for epsilon, name in dict.fromkeys((row["epsilon"], row["name"]) for row in rows):
        same = [row for row in rows if (row["epsilon"], row["name"]) == (epsilon, name)]
        errors = [[mean(row["errors"][str(s)]) for row in same if "errors" in row] for s in SIGMAS]
        cells = [spread(values, 4) for values in errors]
        cells += [spread([row[measure] for row in same if measure in row], 3) for measure in MEASURES]
        lines.append(f"| {epsilon or '–'} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", nargs="+")
    parser.add_argument("--draws", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(Path(args.out)))
    else:
        run(args)
