"""From every owner's release to one Gaussian per class: post-processing of what is public already.

An owner for whom a class is rare learns it from owners for whom it is common: every owner counts by the precision of
what it released. Owners come one at a time and only sums are kept, so memory does not grow with their number. All in
float64; releases in [0, 1] units of pixels, the result in [-1, 1] units.

Shapes: K classes, D values of one image, M = D·(D + 1)/2 packed values of a symmetric matrix.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

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
    owners: Iterable[Owner],
    variance_guess: float,
    own_covariance_weight: float = 0.5,
    *,
    at_home: Mapping[int, Callable[[Owner], Owner]] | None = None,
) -> tuple[Tensor, Tensor]:
    """means_KD and covariances_KDD of every class, [-1, 1] units, positive semi-definite.

    variance_guess τ: a public guess of one pixel's variance; own_covariance_weight: how much of a class's covariance is
    its own, in an average entry, where it is known as well as the other classes' from the releases. at_home: by
    position in `owners`, what makes of that owner's release the exact sums that stand for it (see exact); the result is
    then as private as its records. Raises DataInvalid for a class without records, or if nobody's release speaks of a
    covariance.
    """
    classes: list[PooledClass] = []
    released_precision, most, map_DD = 0.0, 0.0, None
    for position, released in enumerate(owners):
        known = at_home[position](released) if at_home and position in at_home else released
        classes = classes or [PooledClass(num_values(released)) for _ in released.counts_K]
        for k, pooled in enumerate(classes):
            said = said_of_class(released, k, variance_guess)
            released_precision += said.precision / len(classes)
            pooled.add(said if known is released else said_of_class(known, k, variance_guess), variance_guess)
        most = max(most, largest_trace(known))
        map_DD = released.map_DD if isinstance(released, OwnerSummary) else None  # the same at all owners
    _check_every_class_has_records(classes)
    if released_precision == 0:
        raise DataInvalid("releases: expected two records of one class at one owner at least, found none; add records")
    means_KD = torch.stack([pooled.mean().mean_D for pooled in classes])
    own_KDD = torch.stack([pooled.covariance(map_DD) for pooled in classes])
    precision_K = torch.tensor([pooled.precision for pooled in classes], dtype=torch.float64)
    traces = TRACE_FLOOR * variance_guess * means_KD.shape[1], most
    shrunk_KDD = shrink_to_shared(own_KDD, precision_K, own_covariance_weight, released_precision, *traces)
    projected_KDD = torch.stack([project_keeping_trace(c_DD, *traces) for c_DD in shrunk_KDD])
    covariances_KDD = unmapped(projected_KDD, map_DD)  # until here as mapped, where their noise is white
    # A mean of pixels lies in [0, 1]; clipping to a convex set that holds the truth only brings it closer.
    return 2 * means_KD.clamp(0, 1) - 1, 4 * covariances_KDD


def largest_trace(owner: Owner) -> float:
    """What the variances of a class can add up to; infinite where the owner does not say."""
    return owner.largest_trace if isinstance(owner, OwnerMoments) else inf


def num_values(owner: Owner) -> int:
    return (owner.means_KD if isinstance(owner, OwnerMoments) else owner.mean_sums_KD).shape[1]


def unmapped(covariances_KDD: Tensor, map_DD: Tensor | None) -> Tensor:
    """P⁻¹·Σ·P⁻¹: covariances of images, from those of the mapped ones that the owners released."""
    if map_DD is None:
        return covariances_KDD
    inverse_DD: Tensor = torch.linalg.inv(map_DD)
    images_KDD: Tensor = inverse_DD @ covariances_KDD @ inverse_DD
    return images_KDD


def mapped(x_nD: Tensor, map_DD: Tensor | None) -> Tensor:
    """P·x of every row."""
    return x_nD if map_DD is None else x_nD @ map_DD


def mapped_twice(matrix_DD: Tensor, map_DD: Tensor | None) -> Tensor:
    """P·A·P of a symmetric A."""
    return mapped(mapped(matrix_DD, map_DD).T, map_DD)


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
        u_nD = mapped(x_nD - centre_D.double(), released.map_DD)
        mean_sums.append(x_nD.sum(dim=0))
        moment_sums.append(packed(u_nD.T @ u_nD))
    return replace(
        released,
        mean_sums_KD=torch.stack(mean_sums),
        moment_sums_KM=torch.stack(moment_sums),
        mean_std=0.0,
        moment_std=0.0,
    )


def _check_every_class_has_records(classes: Sequence["PooledClass"]) -> None:
    if missing := [k for k, pooled in enumerate(classes) if pooled.count == 0]:
        raise DataInvalid(
            f"classes {missing}: expected records at one owner at least, found none; remove the class or add an owner"
        )


@dataclass(frozen=True)
class Said:
    """What one owner's release says of one class.

    count: its number of records n; mean_D: their mean, mean_noise: the noise's variance in a value of it.
    moment_M: their second moment about a centre, packed, of mapped images, over n, or, of noised images, over n - 1.
    centre_std: the standard deviation of the noise in that centre, which was their mean; None: it was `centre`.
    lost_share: what the moment's expectation lacks of the covariance; None: as much as the pooled mean takes from it.
    precision: one over the variance, of noise and sampling, in an entry of the moment.
    """

    count: float
    mean_D: Tensor
    mean_noise: float
    moment_M: Tensor
    centre: float
    centre_std: float | None
    lost_share: float | None
    precision: float


def said_of_class(owner: Owner, k: int, variance_guess: float) -> Said:
    """A summary's sums carry noise once, so it goes down with n², noised images carry it n times, so with n.

    An entry's variance: s2²/n² + 2τ·C2²/(d·n) of a summary; of noised images (τ + s²)²/(n - 1), as for independent
    values of variance τ + s², and infinite for one image. An owner without records says nothing.
    """
    count = float(owner.counts_K[k])
    if isinstance(owner, OwnerMoments):
        noise = owner.noise_std**2
        precision = max(count - 1, 0) / (variance_guess + noise) ** 2
        mean_noise = noise / max(count, 1)
        return Said(count, owner.means_KD[k], mean_noise, owner.covariances_KM[k], 0.0, 0.0, 0.0, precision)
    own_centre, n = count >= CENTRED_FROM, max(count, 1)
    sampling = 2 * variance_guess * owner.moment_clip_norm**2 / (owner.mean_sums_KD.shape[1] * n)
    return Said(
        count=count,
        mean_D=owner.mean_sums_KD[k] / n,
        mean_noise=(owner.mean_std / n) ** 2,
        moment_M=owner.moment_sums_KM[k] / n,
        centre=owner.centre,
        centre_std=owner.mean_std / n if own_centre else None,
        lost_share=1 / n if own_centre else None,
        precision=1 / ((owner.moment_std / n) ** 2 + sampling) if count else 0.0,
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


class PooledClass:
    """What all owners say of one class, each counting by its precision: sums, as large for a thousand as for one.

    For n records x with mean x̄, S2/n = (1/n)Σ(x - x̄)(x - x̄)ᵀ + (x̄ - m̃)(x̄ - m̃)ᵀ + noise, up to the clip.
    - m̃ = clip(S1/n, 0, 1): the first term has expectation (1 - 1/n)·Σ, the second that of the noise in m̃, which
      expected_centre_error knows in closed form. What the noise really was is not used: the owner's x̄ - m̃ is
      unknown, and the pooled mean minus m̃ contains m̃ itself, so squaring it would add more error than it removes.
    - m̃ = c, a constant: E[S2/n] = Σ + (m - c)(m - c)ᵀ for the class's mean m. The pooled mean m* stands for it
      (constant_centre_error), which leaves (1 - sampling_share)·Σ.
    Either way the last factor is divided out; for one record in all it is 0 and says nothing of Σ: it stops at ½.
    """

    def __init__(self, size: int) -> None:
        self.count, self.precision = 0.0, 0.0
        self._mean_weight, self._mean_D = 0.0, torch.zeros(size, dtype=torch.float64)
        self._noise_variance, self._sampling_share = 0.0, 0.0
        self._about_means_M, self._about_constants_M = torch.zeros(2, size * (size + 1) // 2, dtype=torch.float64)
        self._mean_centres: list[tuple[float, float]] = []  # weight, standard deviation
        self._constant_centres: list[tuple[float, float]] = []  # weight, constant

    def add(self, said: Said, variance_guess: float) -> None:
        """One more owner. Its mean counts by 1/(noise + τ/n)."""
        if said.count == 0:
            return
        weight = 1 / (said.mean_noise + variance_guess / said.count)
        self.count += said.count
        self._mean_weight += weight
        self._mean_D += weight * said.mean_D
        self._noise_variance += weight**2 * said.mean_noise
        self._sampling_share += weight**2 / said.count
        self.precision += said.precision
        if said.centre_std is None or said.lost_share is None:
            self._about_constants_M.add_(said.moment_M, alpha=said.precision)
            self._constant_centres.append((said.precision, said.centre))
        else:
            share = said.precision / _left(said.lost_share)
            self._about_means_M.add_(said.moment_M, alpha=share)
            self._mean_centres.append((share, said.centre_std))

    def mean(self) -> PooledMean:
        weight = self._mean_weight
        return PooledMean(self._mean_D / weight, self._noise_variance / weight**2, self._sampling_share / weight**2)

    def covariance(self, map_DD: Tensor | None) -> Tensor:
        """Unbiased, of mapped images, neither projected nor shrunk; zeros if no owner says anything of it."""
        mean = self.mean()
        size = len(mean.mean_D)
        mean_errors_DD, constant_errors_DD = torch.zeros(2, size, size, dtype=torch.float64)
        for weight, std in self._mean_centres:
            if std > 0:  # not of an owner's own exact sums, nor of noised images
                mean_errors_DD += weight * expected_centre_error(mean.mean_D.clamp(0, 1), std)
        for weight, centre in self._constant_centres:
            constant_errors_DD += weight * constant_centre_error(mean, centre)
        about_means_DD = unpacked(self._about_means_M, size) - mapped_twice(mean_errors_DD, map_DD)
        about_constants_DD = unpacked(self._about_constants_M, size) - mapped_twice(constant_errors_DD, map_DD)
        total_DD: Tensor = about_means_DD + about_constants_DD / _left(mean.sampling_share)
        return total_DD / self.precision if self.precision else total_DD


def _left(lost_share: float) -> float:
    return max(1 - lost_share, 0.5)


def constant_centre_error(pooled: PooledMean, centre: float) -> Tensor:
    """An unbiased estimate of (m - c)(m - c)ᵀ, less sampling_share·Σ, from the pooled mean m* of the class's mean m:
    E[(m* - c)(m* - c)ᵀ] = (m - c)(m - c)ᵀ + noise_variance·I + sampling_share·Σ.
    """
    offset_D = pooled.mean_D - centre
    identity_DD = torch.eye(len(offset_D), dtype=torch.float64)
    return torch.outer(offset_D, offset_D) - pooled.noise_variance * identity_DD


def expected_centre_error(mean_D: Tensor, std: float) -> Tensor:
    """E[(m̃ - m)(m̃ - m)ᵀ] for m̃ = clip(m + std·z, 0, 1): independent values, so b·bᵀ off the diagonal, b their bias.

    Without the clip it would be std²·I; at a pixel that is always black the clip halves it.
    """
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
