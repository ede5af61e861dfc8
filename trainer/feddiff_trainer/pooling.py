"""From every owner's release to one Gaussian per class: post-processing of what is public already.

An owner for whom a class is rare learns it from owners for whom it is common: every owner counts by the precision of
what it released. All in float64; releases in [0, 1] units of pixels, the result in [-1, 1] units.

Shapes: K classes, D values of one image, M = D·(D + 1)/2 packed values of a symmetric matrix, J owners.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import fmean

import torch
from torch import Tensor

from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.promise import CENTRED_FROM

TRACE_FLOOR = 0.01  # smallest total variance of a class, as a share of what the public guess would give
ROWS = 4096  # images at a time in a second moment: memory stays far below N×D float64
TINY = 1e-9  # of the mean eigenvalue: at own_weight 1 even an axis without variance keeps its own


@dataclass(frozen=True)
class OwnerSummary:
    """What one owner released (docs/method.md, `summary`), [0, 1] units, float64, and the public constants behind it.

    mean_sums_KD: sums of clipped images plus N(0, mean_std²). moment_sums_KM: packed sums of (x - m̃)(x - m̃)ᵀ clipped
    to moment_clip_norm, plus N(0, moment_std²). counts_K: the public numbers of records. centre: what stood for m̃
    where a class has fewer than CENTRED_FROM records. map_DD: the public symmetric map P that x - m̃ went through before
    its clip, the same at all owners, so that moment_sums_KM are of P(x - m̃); None: none.
    """

    mean_sums_KD: Tensor
    moment_sums_KM: Tensor
    counts_K: Tensor
    mean_std: float
    moment_std: float
    moment_clip_norm: float
    centre: float
    map_DD: Tensor | None = None


@dataclass(frozen=True)
class OwnerMoments:
    """What one owner's noised images say of each class (docs/method.md, `privunit`), [0, 1] units, float64: means_KD
    and packed covariances_KM without bias, zeros where there are too few records for them; counts_K: the public
    numbers.

    noise_std: of the white noise in each value of one image; the covariances are without it. largest_trace: what a
    class's variances add up to at most, a public fact: C² of images that were all scaled to norm C.
    """

    means_KD: Tensor
    covariances_KM: Tensor
    counts_K: Tensor
    noise_std: float
    largest_trace: float = inf


Owner = OwnerSummary | OwnerMoments


def pool(
    owners: Sequence[Owner],
    variance_guess: float,
    own_covariance_weight: float = 0.5,
    *,
    at_home: Mapping[int, Owner] | None = None,
) -> tuple[Tensor, Tensor]:
    """means_KD and covariances_KDD of every class, [-1, 1] units, positive semi-definite.

    variance_guess τ: a public guess of one pixel's variance; own_covariance_weight: how much of a class's covariance is
    its own, in an average entry, where it is known as well as the other classes' from the releases. at_home: by
    position in `owners`, exact sums that stand for that owner's release (see exact); the result is then as private
    as its records. Raises DataInvalid for a class without records, or if nobody's release speaks of a covariance.
    """
    _check_every_class_has_records(owners)
    classes = range(len(owners[0].counts_K))
    released_precision = fmean(_pool_class(owners, k, variance_guess)[2] for k in classes)
    if released_precision == 0:
        raise DataInvalid("releases: expected two records of one class at one owner at least, found none; add records")
    known = [(at_home or {}).get(position, owner) for position, owner in enumerate(owners)]
    pooled = [_pool_class(known, k, variance_guess) for k in classes]
    means_KD = torch.stack([mean_D for mean_D, _, _ in pooled])
    own_KDD = torch.stack([covariance_DD for _, covariance_DD, _ in pooled])
    precision_K = torch.tensor([precision for _, _, precision in pooled], dtype=torch.float64)
    traces = TRACE_FLOOR * variance_guess * means_KD.shape[1], largest_trace(known)
    shrunk_KDD = shrink_to_shared(own_KDD, precision_K, own_covariance_weight, released_precision, *traces)
    projected_KDD = torch.stack([project_keeping_trace(c_DD, *traces) for c_DD in shrunk_KDD])
    covariances_KDD = unmapped(projected_KDD, owners[0])  # until here as mapped, where their noise is white
    # A mean of pixels lies in [0, 1]; clipping to a convex set that holds the truth only brings it closer.
    return 2 * means_KD.clamp(0, 1) - 1, 4 * covariances_KDD


def unmapped(covariances_KDD: Tensor, owner: Owner) -> Tensor:
    """P⁻¹·Σ·P⁻¹: covariances of images, from those of the mapped ones that the owners released."""
    if isinstance(owner, OwnerMoments) or owner.map_DD is None:
        return covariances_KDD
    inverse_DD: Tensor = torch.linalg.inv(owner.map_DD)
    images_KDD: Tensor = inverse_DD @ covariances_KDD @ inverse_DD
    return images_KDD


def mapped(x_nD: Tensor, owner: OwnerSummary) -> Tensor:
    """P·x of every row."""
    return x_nD if owner.map_DD is None else x_nD @ owner.map_DD


def largest_trace(owners: Iterable[Owner]) -> float:
    """What the variances of a class can add up to at all owners; infinite where one does not say."""
    return max(owner.largest_trace if isinstance(owner, OwnerMoments) else inf for owner in owners)


def exact(x_ND: Tensor, label_N: Tensor, released: Owner) -> Owner:
    """An owner's own moments without clip and noise, in the form of what it released. x_ND: its records in [0, 1].

    For its personal denoiser, which has seen the records anyway. They never leave the owner.
    """
    if isinstance(released, OwnerMoments):
        return moments_of(x_ND, label_N, len(released.counts_K), noise_std=0.0)
    return exact_summary(x_ND, label_N, released)


def moments_of(
    images_ND: Tensor, label_N: Tensor, num_classes: int, noise_std: float, largest_trace: float = inf
) -> OwnerMoments:
    """Means and covariances of every class, without the white noise of this standard deviation in each value.

    x̃ = x + noise of E[noise | x] = 0 and Cov(noise | x) = s²·I has the mean of x and the covariance Σ + s²·I, so the
    sample covariance, over n - 1, less s²·I has the expectation Σ.
    """
    classes = [_moments_of_class(images_ND[label_N == k], noise_std) for k in range(num_classes)]
    means, covariances = zip(*classes, strict=True)
    counts_K = torch.bincount(label_N, minlength=num_classes)
    return OwnerMoments(torch.stack(means), torch.stack(covariances), counts_K, noise_std, largest_trace)


def _moments_of_class(images_nD: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Mean and packed covariance; zeros of no image, and a covariance of zeros of one."""
    count, num_values = images_nD.shape
    batches = [images_nD[start : start + ROWS] for start in range(0, count, ROWS)]
    mean_D, square_DD = (torch.zeros(shape, dtype=torch.float64) for shape in (num_values, (num_values, num_values)))
    for rows_nD in batches:
        mean_D += rows_nD.double().sum(dim=0) / count
    for rows_nD in batches:
        centred_nD = rows_nD.double() - mean_D
        square_DD += centred_nD.T @ centred_nD
    if count >= 2:
        square_DD = square_DD / (count - 1) - noise_std**2 * torch.eye(num_values, dtype=torch.float64)
    return mean_D, packed(square_DD)


def exact_summary(x_ND: Tensor, label_N: Tensor, released: OwnerSummary) -> OwnerSummary:
    """See exact."""
    mean_sums, moment_sums = [], []
    for k in range(len(released.counts_K)):
        x_nD = x_ND[label_N == k].double()
        centre_D = x_nD.mean(dim=0) if len(x_nD) >= CENTRED_FROM else torch.full_like(x_ND[0], released.centre)
        u_nD = mapped(x_nD - centre_D.double(), released)
        mean_sums.append(x_nD.sum(dim=0))
        moment_sums.append(packed(u_nD.T @ u_nD))
    return replace(
        released,
        mean_sums_KD=torch.stack(mean_sums),
        moment_sums_KM=torch.stack(moment_sums),
        mean_std=0.0,
        moment_std=0.0,
    )


def _check_every_class_has_records(owners: Sequence[Owner]) -> None:
    total_K = torch.stack([owner.counts_K for owner in owners]).sum(dim=0)
    if missing := (total_K == 0).nonzero().flatten().tolist():
        raise DataInvalid(
            f"classes {missing}: expected records at one owner at least, found none; remove the class or add an owner"
        )


def _pool_class(owners: Sequence[Owner], k: int, variance_guess: float) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and the covariance's precision of one class, [0, 1] units, neither projected nor shrunk."""
    said = [said_of_class(owner, k, variance_guess) for owner in owners if owner.counts_K[k] > 0]
    weights_J = normalised(_precisions(each.mean_noise + variance_guess / each.count for each in said))
    mean_D = sum((w * each.mean_D for w, each in zip(weights_J, said, strict=True)), torch.tensor(0.0))
    noise = sum(float(w) ** 2 * each.mean_noise for w, each in zip(weights_J, said, strict=True))
    sampling = sum(float(w) ** 2 / each.count for w, each in zip(weights_J, said, strict=True))
    mean = PooledMean(mean_D, noise, sampling)
    precision_J = _precisions(each.covariance_error for each in said)
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for weight, each in zip(normalised(precision_J), said, strict=True):
        if weight > 0:
            covariance_DD += weight * each.covariance(mean)
    return mean_D, covariance_DD, float(precision_J.sum())


def _precisions(variances: Iterable[float]) -> Tensor:
    return torch.tensor([1 / variance for variance in variances], dtype=torch.float64)


@dataclass(frozen=True)
class Said:
    """What one owner's release says of one class: its number of records, the mean and the noise's variance in a value
    of it, the covariance given the pooled mean, and the variance, of noise and sampling, in an entry of that."""

    count: float
    mean_D: Tensor
    mean_noise: float
    covariance: Callable[["PooledMean"], Tensor]
    covariance_error: float


def said_of_class(owner: Owner, k: int, variance_guess: float) -> Said:
    """A summary's sums carry noise once, so it goes down with n², noised images carry it n times, so with n.

    An entry's error: s2²/n² + 2τ·C2²/(d·n) of a summary; of noised images (τ + s²)²/(n - 1), as for independent values
    of variance τ + s², and infinite for one image.
    """
    count = float(owner.counts_K[k])
    if isinstance(owner, OwnerMoments):
        mean_D, values_M, noise = owner.means_KD[k], owner.covariances_KM[k], owner.noise_std**2
        error = (variance_guess + noise) ** 2 / (count - 1) if count >= 2 else inf
        return Said(count, mean_D, noise / count, lambda pooled: unpacked(values_M, len(mean_D)), error)
    mean_D = owner.mean_sums_KD[k] / count
    sampling = 2 * variance_guess * owner.moment_clip_norm**2 / (len(mean_D) * count)
    return Said(
        count,
        mean_D,
        (owner.mean_std / count) ** 2,
        lambda pooled: owner_covariance(owner, k, pooled),
        (owner.moment_std / count) ** 2 + sampling,
    )


def normalised(weights: Tensor) -> Tensor:
    """Weights of sum 1, or of 0 where there are none."""
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


@dataclass(frozen=True)
class PooledMean:
    """A class's pooled mean and what is known of its error: noise variance per value, and Σ w²/n of the sampling."""

    mean_D: Tensor
    noise_variance: float
    sampling_share: float


def owner_covariance(owner: OwnerSummary, k: int, pooled: PooledMean) -> Tensor:
    """One owner's estimate of a class's covariance Σ from S2/n, whose centre was not the class's mean. [0, 1] units.

    Both are of images as mapped: PΣP, and every term below between P and P.

    For n records x with mean x̄, S2/n = (1/n)Σ(x - x̄)(x - x̄)ᵀ + (x̄ - m̃)(x̄ - m̃)ᵀ + noise, up to the clip.
    - m̃ = clip(S1/n, 0, 1): the first term has expectation (1 - 1/n)·Σ, the second that of the noise in m̃, which
      expected_centre_error knows in closed form. What the noise really was is not used: the owner's x̄ - m̃ is
      unknown, and the pooled mean minus m̃ contains m̃ itself, so squaring it would add more error than it removes.
    - m̃ = c, a constant: E[S2/n] = Σ + (m - c)(m - c)ᵀ for the class's mean m. The pooled mean m* stands for it, with
      E[(m* - c)(m* - c)ᵀ] = (m - c)(m - c)ᵀ + noise_variance·I + sampling_share·Σ. Subtracting it and adding
      noise_variance·I leaves (1 - sampling_share)·Σ.
    Either way the last factor is divided out; for one record in all it is 0 and says nothing of Σ: it stops at ½.
    """
    count = float(owner.counts_K[k])
    moment_DD = unpacked(owner.moment_sums_KM[k] / count, len(pooled.mean_D))
    if count >= CENTRED_FROM:
        error_DD, share = expected_centre_error(pooled.mean_D.clamp(0, 1), owner.mean_std / count), 1 / count
    else:
        offset_D = pooled.mean_D - owner.centre
        error_DD = torch.outer(offset_D, offset_D) - pooled.noise_variance * torch.eye(
            len(offset_D), dtype=torch.float64
        )
        share = pooled.sampling_share
    return (moment_DD - mapped(mapped(error_DD, owner).T, owner)) / max(1 - share, 0.5)


def expected_centre_error(mean_D: Tensor, std: float) -> Tensor:
    """E[(m̃ - m)(m̃ - m)ᵀ] for m̃ = clip(m + std·z, 0, 1): independent values, so b·bᵀ off the diagonal, b their bias.

    Without the clip it would be std²·I; at a pixel that is always black the clip halves it.
    """
    if std == 0:  # an owner's own exact sums
        return torch.zeros(len(mean_D), len(mean_D), dtype=mean_D.dtype)
    first_D, second_D = clip_error(mean_D, torch.full_like(mean_D, std))
    return torch.outer(first_D, first_D) - first_D.square().diag() + second_D.diag()


def clip_error(mean_D: Tensor, std_D: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment of clip(y, 0, 1) - mean, for y = mean + std·z: integrals of a normal over three parts."""
    low_D, high_D = -mean_D / std_D, (1 - mean_D) / std_D
    below_D, above_D = torch.special.ndtr(low_D), torch.special.ndtr(-high_D)
    first_D = std_D * (low_D * below_D + high_D * above_D + density(low_D) - density(high_D))
    middle_D = 1 - below_D - above_D + low_D * density(low_D) - high_D * density(high_D)
    second_D = std_D**2 * (low_D.square() * below_D + high_D.square() * above_D + middle_D)
    return first_D, second_D


def density(z_D: Tensor) -> Tensor:
    density_D: Tensor = (-z_D.square() / 2).exp() / sqrt(2 * torch.pi)
    return density_D


def shrink_to_shared(
    own_KDD: Tensor,
    precision_K: Tensor,
    own_weight: float,
    released_precision: float,
    floor: float,
    ceiling: float = inf,
) -> Tensor:
    """Each class's covariance averaged with the classes' mean one, entry by entry, along the mean one's own axes.

    Classes differ from their mean M as covariances of a few records of it would: in M's eigenbasis, entry (i, j) has
    variance B·λ_i·λ_j over the mean λ_i·λ_j (Wishart). The noise of a release is the same in every basis, so the
    linear estimate of least error (Wiener) gives a class's own entry the weight b/(b + 1/p) for its precision p and
    that variance b: along axes where no class varies, what is left is noise, and goes. In M classes count by
    1/(B + 1/p).
    own_weight = B/(B + 1/p̄) fixes B at p̄, the classes' mean precision in the releases: a class known as well as that
    keeps that weight in an average entry, one that is rare everywhere takes the others' covariance.
    """
    own_K, others = own_weight * precision_K, (1 - own_weight) * released_precision
    shared_DD = (normalised(precision_K / (own_K + others))[:, None, None] * own_KDD).sum(dim=0)
    shared_DD = project_keeping_trace(shared_DD, floor, ceiling)
    eigenvalues_D, axes_DD = torch.linalg.eigh(shared_DD)
    scale_D = (eigenvalues_D / eigenvalues_D.mean()).clamp(min=TINY)
    relative_KDD = own_K[:, None, None] * torch.outer(scale_D, scale_D)
    apart_KDD = axes_DD.T @ (own_KDD - shared_DD) @ axes_DD
    shrunk_KDD: Tensor = shared_DD + axes_DD @ (relative_KDD / (relative_KDD + others) * apart_KDD) @ axes_DD.T
    return shrunk_KDD


def project_keeping_trace(symmetric_DD: Tensor, floor: float, ceiling: float = inf) -> Tensor:
    """The nearest positive semi-definite matrix of the same trace, or of trace `floor` if that is larger, or of trace
    `ceiling` if that is smaller: the nearest one, then, of all that the truth can be.

    Noise spreads eigenvalues both ways; one threshold θ taken off all before clipping at zero keeps their sum, where
    clipping alone would add the noise's positive half to the variance.
    """
    eigenvalues_D, eigenvectors_DD = torch.linalg.eigh(symmetric_DD)
    kept_D = on_simplex(eigenvalues_D, max(min(float(eigenvalues_D.sum()), ceiling), floor))
    projected_DD: Tensor = (eigenvectors_DD * kept_D) @ eigenvectors_DD.T
    return projected_DD


def on_simplex(values_D: Tensor, total: float) -> Tensor:
    """max(values - θ, 0) with the θ that makes them add up to `total` > 0 (Duchi et al. 2008, figure 1)."""
    falling_D = values_D.sort(descending=True).values
    theta_D = (falling_D.cumsum(0) - total) / torch.arange(1, len(falling_D) + 1, dtype=falling_D.dtype)
    kept = int((falling_D > theta_D).sum())
    return (values_D - theta_D[kept - 1]).clamp(min=0)


def packed(symmetric_DD: Tensor) -> Tensor:
    """values_M: upper triangle row by row, off-diagonals times √2, so that its norm is the matrix's Frobenius norm."""
    rows, columns = torch.triu_indices(*symmetric_DD.shape)
    return symmetric_DD[rows, columns] * _scale(rows, columns)


def unpacked(values_M: Tensor, size: int) -> Tensor:
    """symmetric_DD of the given size: undoes packed."""
    rows, columns = torch.triu_indices(size, size)
    matrix_DD = torch.zeros(size, size, dtype=values_M.dtype)
    matrix_DD[rows, columns] = matrix_DD[columns, rows] = values_M / _scale(rows, columns)
    return matrix_DD


def _scale(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.where(rows == columns, torch.tensor(1.0, dtype=torch.float64), sqrt(2))
