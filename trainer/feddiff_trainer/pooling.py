"""From every owner's noisy summary to one Gaussian per class: post-processing of what is public already.

An owner for whom a class is rare learns it from owners for whom it is common: every owner counts by the precision of
what it released. All in float64; summaries in [0, 1] units of pixels, the result in [-1, 1] units.

Shapes: K classes, D values of one image, M = D·(D + 1)/2 packed values of a symmetric matrix, J owners.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from feddiff_protocol.errors import DataInvalid

CENTRED_FROM = 20  # records of a class from which an owner's second moment is about its own noisy mean
TRACE_FLOOR = 0.01  # smallest total variance of a class, as a share of what the public guess would give


@dataclass(frozen=True)
class OwnerSummary:
    """What one owner released (docs/method.md, `summary`), [0, 1] units, float64, and the public constants behind it.

    mean_sums_KD: sums of clipped images plus N(0, mean_std²). moment_sums_KM: packed sums of (x - m̃)(x - m̃)ᵀ clipped
    to moment_clip_norm, plus N(0, moment_std²). counts_K: the public numbers of records. centre: what stood for m̃
    where a class has fewer than CENTRED_FROM records.
    """

    mean_sums_KD: Tensor
    moment_sums_KM: Tensor
    counts_K: Tensor
    mean_std: float
    moment_std: float
    moment_clip_norm: float
    centre: float


def pool(
    owners: Sequence[OwnerSummary], variance_guess: float, own_covariance_weight: float = 0.5
) -> tuple[Tensor, Tensor]:
    """means_KD and covariances_KDD of every class, [-1, 1] units, positive semi-definite.

    variance_guess τ: a public guess of one pixel's variance; own_covariance_weight: how much of a class's covariance is
    its own where it is known as well as the other classes'. Raises DataInvalid for a class without records.
    """
    _check_every_class_has_records(owners)
    pooled = [_pool_class(owners, k, variance_guess) for k in range(len(owners[0].counts_K))]
    means_KD = torch.stack([mean_D for mean_D, _, _ in pooled])
    own_KDD = torch.stack([covariance_DD for _, covariance_DD, _ in pooled])
    precision_K = torch.tensor([precision for _, _, precision in pooled], dtype=torch.float64)
    shrunk_KDD = shrink_to_shared(own_KDD, precision_K, own_covariance_weight)
    floor = TRACE_FLOOR * variance_guess * means_KD.shape[1]
    covariances_KDD = torch.stack([project_keeping_trace(c_DD, floor) for c_DD in shrunk_KDD])
    # A mean of pixels lies in [0, 1]; clipping to a convex set that holds the truth only brings it closer.
    return 2 * means_KD.clamp(0, 1) - 1, 4 * covariances_KDD


def _check_every_class_has_records(owners: Sequence[OwnerSummary]) -> None:
    total_K = torch.stack([owner.counts_K for owner in owners]).sum(dim=0)
    if missing := (total_K == 0).nonzero().flatten().tolist():
        raise DataInvalid(
            f"classes {missing}: expected records at one owner at least, found none; remove the class or add an owner"
        )


def _pool_class(owners: Sequence[OwnerSummary], k: int, variance_guess: float) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and the covariance's precision of one class, [0, 1] units, neither projected nor shrunk."""
    holders = [owner for owner in owners if owner.counts_K[k] > 0]
    counts_J = torch.tensor([float(owner.counts_K[k]) for owner in holders], dtype=torch.float64)
    weights_J = normalised(_mean_precisions(holders, counts_J, variance_guess))
    mean_D = sum(
        (w * o.mean_sums_KD[k] / n for w, o, n in zip(weights_J, holders, counts_J, strict=True)), torch.tensor(0.0)
    )
    precision_J = _covariance_precisions(holders, counts_J, variance_guess, mean_D.numel())
    noise = sum(float(w * o.mean_std / n) ** 2 for w, o, n in zip(weights_J, holders, counts_J, strict=True))
    mean = PooledMean(mean_D, noise, float((weights_J.square() / counts_J).sum()))
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for weight, owner in zip(normalised(precision_J), holders, strict=True):
        covariance_DD += weight * owner_covariance(owner, k, mean)
    return mean_D, covariance_DD, float(precision_J.sum())


def _mean_precisions(holders: Sequence[OwnerSummary], counts_J: Tensor, variance_guess: float) -> Tensor:
    """1/(s1²/n² + τ/n): one over a value's variance in S1/n, noise and sampling."""
    std_J = torch.tensor([owner.mean_std for owner in holders], dtype=torch.float64)
    return 1 / ((std_J / counts_J).square() + variance_guess / counts_J)


def _covariance_precisions(
    holders: Sequence[OwnerSummary], counts_J: Tensor, variance_guess: float, values: int
) -> Tensor:
    """1/(s2²/n² + 2τ·C2²/(d·n)): one over an entry's variance in S2/n, noise and sampling."""
    std_J = torch.tensor([owner.moment_std for owner in holders], dtype=torch.float64)
    clip_J = torch.tensor([owner.moment_clip_norm for owner in holders], dtype=torch.float64)
    return 1 / ((std_J / counts_J).square() + 2 * variance_guess * clip_J.square() / (values * counts_J))


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()


@dataclass(frozen=True)
class PooledMean:
    """A class's pooled mean and what is known of its error: noise variance per value, and Σ w²/n of the sampling."""

    mean_D: Tensor
    noise_variance: float
    sampling_share: float


def owner_covariance(owner: OwnerSummary, k: int, pooled: PooledMean) -> Tensor:
    """One owner's estimate of a class's covariance Σ from S2/n, whose centre was not the class's mean. [0, 1] units.

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
    return (moment_DD - error_DD) / max(1 - share, 0.5)


def expected_centre_error(mean_D: Tensor, std: float) -> Tensor:
    """E[(m̃ - m)(m̃ - m)ᵀ] for m̃ = clip(m + std·z, 0, 1): independent values, so b·bᵀ off the diagonal, b their bias.

    Without the clip it would be std²·I; at a pixel that is always black the clip halves it.
    """
    low_D, high_D = -mean_D / std, (1 - mean_D) / std
    below_D, above_D = torch.special.ndtr(low_D), torch.special.ndtr(-high_D)
    between_D = 1 - below_D - above_D
    first_D: Tensor = std * (low_D * below_D + high_D * above_D + _pdf(low_D) - _pdf(high_D))
    middle_D = between_D + low_D * _pdf(low_D) - high_D * _pdf(high_D)
    second_D: Tensor = std**2 * (low_D.square() * below_D + high_D.square() * above_D + middle_D)
    return torch.outer(first_D, first_D) - first_D.square().diag() + second_D.diag()


def _pdf(z_D: Tensor) -> Tensor:
    density_D: Tensor = (-z_D.square() / 2).exp() / sqrt(2 * torch.pi)
    return density_D


def shrink_to_shared(own_KDD: Tensor, precision_K: Tensor, own_weight: float) -> Tensor:
    """Each class's covariance averaged with the classes' mean one (docs/method.md).

    Classes count by precision p, in the mean one and in their own weight: own_weight = B/(B + 1/p̄) fixes how much
    classes differ, B, at the classes' mean precision p̄; then a class's own weight is B/(B + 1/p). A class known
    as well as the others gets own_weight, one that is rare everywhere takes the others' covariance.
    """
    shared_DD = (normalised(precision_K)[:, None, None] * own_KDD).sum(dim=0)
    relative_K = own_weight * precision_K
    weight_K11 = (relative_K / (relative_K + (1 - own_weight) * precision_K.mean()))[:, None, None]
    return weight_K11 * own_KDD + (1 - weight_K11) * shared_DD


def project_keeping_trace(symmetric_DD: Tensor, floor: float) -> Tensor:
    """The nearest positive semi-definite matrix of the same trace, or of trace `floor` if that is larger.

    Noise spreads eigenvalues both ways; one threshold θ taken off all before clipping at zero keeps their sum, where
    clipping alone would add the noise's positive half to the variance.
    """
    eigenvalues_D, eigenvectors_DD = torch.linalg.eigh(symmetric_DD)
    kept_D = on_simplex(eigenvalues_D, max(float(eigenvalues_D.sum()), floor))
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
