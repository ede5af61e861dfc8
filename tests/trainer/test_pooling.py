"""Pooling against the Gaussian behind the summaries: unbiased, weighed by precision, positive with its trace kept."""

import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, sqrt

import pytest
import torch
from torch import Tensor

from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import CENTRED_FROM
from feddiff_trainer import pooling
from feddiff_trainer.pooling import (
    TRACE_FLOOR,
    OwnerSummary,
    PooledClass,
    exact,
    exact_summary,
    expected_centre_error,
    moments_of,
    on_simplex,
    packed,
    pool,
    project_keeping_trace,
    said_of_class,
    shrink_to_shared,
    unpacked,
)

MEAN = torch.tensor([0.05, 0.5, 0.8], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.02, 0.01, 0.00], [0.01, 0.04, -0.02], [0.00, -0.02, 0.03]], dtype=torch.float64)
VALUES = 3
CENTRE = 0.5


def summary_of(
    classes: Sequence[Tensor], mean_std: float, moment_std: float, generator: torch.Generator
) -> OwnerSummary:
    """What an owner of these records releases, by docs/method.md without the clips."""
    mean_sums, moment_sums = [], []
    for x_ND in classes:
        mean_sum_D = x_ND.sum(0) + mean_std * noise(VALUES, generator)
        noisy_centre = len(x_ND) >= CENTRED_FROM
        centre_D = (mean_sum_D / len(x_ND)).clamp(0, 1) if noisy_centre else torch.full_like(MEAN, CENTRE)
        u_ND = x_ND - centre_D
        mean_sums.append(mean_sum_D)
        moment_sums.append(packed(u_ND.T @ u_ND) + moment_std * noise(VALUES * (VALUES + 1) // 2, generator))
    counts_K = torch.tensor([len(x_ND) for x_ND in classes])
    return OwnerSummary(torch.stack(mean_sums), torch.stack(moment_sums), counts_K, mean_std, moment_std, 1.0, CENTRE)


def noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float64)


def records(
    count: int, generator: torch.Generator, mean_D: Tensor = MEAN, covariance_DD: Tensor = COVARIANCE
) -> Tensor:
    root_DD = torch.linalg.cholesky(covariance_DD)
    return mean_D + torch.randn(count, VALUES, generator=generator, dtype=torch.float64) @ root_DD.T


def test_without_noise_and_with_many_records_the_pool_is_the_true_gaussian() -> None:
    generator = torch.Generator().manual_seed(1)
    other_D = torch.tensor([0.6, 0.2, 0.4], dtype=torch.float64)
    classes = [records(200_000, generator), records(200_000, generator, other_D, 2 * COVARIANCE)]
    means_KD, covariances_KDD = pool([summary_of(classes, 1e-9, 1e-9, generator)], 0.03, own_covariance_weight=1.0)
    torch.testing.assert_close(means_KD, 2 * torch.stack([MEAN, other_D]) - 1, atol=0.003, rtol=0)
    torch.testing.assert_close(covariances_KDD, 4 * torch.stack([COVARIANCE, 2 * COVARIANCE]), atol=0.003, rtol=0)


@pytest.mark.parametrize("counts", [(40, 60), (5, 8), (40, 5), (100,)])
def test_pooled_mean_and_owners_covariances_are_unbiased(counts: tuple[int, ...]) -> None:
    """Over 800 draws of records and noise, both kinds of centre; large noise, so that its own share would show."""
    deviation, standard_error = covariance_bias(counts)
    assert deviation < 4.5 * standard_error


@pytest.mark.parametrize("counts", [(40, 60), (5, 8), (40, 5), (100,)])
def test_taking_the_second_moment_for_the_covariance_is_biased(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: S2/n as it is, without correction for its centre."""
    nothing_DD = torch.zeros(VALUES, VALUES, dtype=torch.float64)
    for correction in ("expected_centre_error", "constant_centre_error"):
        monkeypatch.setattr(pooling, correction, lambda *known: nothing_DD)
    deviation, standard_error = covariance_bias(counts)
    assert deviation > 4.5 * standard_error


def covariance_bias(counts: tuple[int, ...]) -> tuple[float, float]:
    """Largest bias of the pooled covariance of one class over many draws, and the standard error of that entry."""
    generator = torch.Generator().manual_seed(2)
    middle_D = torch.tensor([0.4, 0.6, 0.5], dtype=torch.float64)  # far from 0 and 1: the mean's clip is tested apart
    estimates = []
    for _ in range(800):
        pooled = PooledClass(VALUES)
        for n in counts:
            owner = summary_of([records(n, generator, middle_D)], 4.0, 0.5, generator)
            pooled.add(said_of_class(owner, 0, 0.03), 0.03)
        estimates.append(pooled.covariance(None))
    stacked = torch.stack(estimates)
    deviation_DD = (stacked.mean(0) - COVARIANCE).abs()
    worst = int((deviation_DD / stacked.std(0)).argmax())
    return deviation_DD.flatten()[worst].item(), stacked.std(0).flatten()[worst].item() / sqrt(len(stacked))


def test_expected_centre_error_equals_monte_carlo_at_the_border_and_inside() -> None:
    generator = torch.Generator().manual_seed(3)
    mean_D, std = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64), 0.2
    z_ND = torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    error_ND = (mean_D + std * z_ND).clamp(0, 1) - mean_D
    expected = expected_centre_error(mean_D, std)
    torch.testing.assert_close(error_ND.T @ error_ND / len(z_ND), expected, atol=3e-4, rtol=0)
    assert expected[0, 0].item() == pytest.approx(std**2 / 2, rel=1e-5)  # a black pixel: the clip takes half
    inside = expected_centre_error(torch.full((2,), 0.5, dtype=torch.float64), 0.02)
    torch.testing.assert_close(inside, 0.02**2 * torch.eye(2, dtype=torch.float64))


def test_precision_weights_beat_weights_by_number_of_records() -> None:
    """Two owners of as many records, one with ten times the noise: by n both count the same."""
    generator = torch.Generator().manual_seed(4)
    ours, by_number = [], []
    for _ in range(300):
        owners = [summary_of([records(60, generator)], std, std / 4, generator) for std in (2.0, 20.0)]
        means_KD, covariances_KDD = pool(owners, 0.03)
        naive_D = 2 * sum(o.mean_sums_KD[0] for o in owners) / 120 - 1
        naive_DD = project_keeping_trace(4 * sum(unpacked(o.moment_sums_KM[0], VALUES) for o in owners) / 120, 0.01)
        ours.append(((means_KD[0] - 2 * MEAN + 1).square().sum(), (covariances_KDD[0] - 4 * COVARIANCE).square().sum()))
        by_number.append(((naive_D - 2 * MEAN + 1).square().sum(), (naive_DD - 4 * COVARIANCE).square().sum()))
    ours_mean, ours_covariance = torch.tensor(ours).mean(0)
    naive_mean, naive_covariance = torch.tensor(by_number).mean(0)
    assert ours_mean < naive_mean / 3 and ours_covariance < naive_covariance / 3


def test_an_owner_without_records_of_a_class_counts_for_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    holder = summary_of([records(50, generator)], 1.0, 1.0, generator)
    garbage = torch.full_like(holder.mean_sums_KD, 1e6), torch.full_like(holder.moment_sums_KM, 1e6)
    empty = OwnerSummary(*garbage, torch.tensor([0]), 1.0, 1.0, 1.0, CENTRE)
    for alone, both in zip(pool([holder], 0.03), pool([empty, holder], 0.03), strict=True):
        assert torch.equal(alone, both)


def test_no_more_than_one_owner_is_held_at_a_time() -> None:
    generator, seen = torch.Generator().manual_seed(24), []

    def owners() -> Iterator[OwnerSummary]:
        for number in range(20):
            assert sum(owner() is not None for owner in seen) <= 1, f"earlier ones before owner {number}"
            owner = summary_of([records(20 + number, generator)], 1.0, 1.0, generator)
            seen.append(weakref.ref(owner))
            yield owner
            del owner

    pool(owners(), 0.03)
    with pytest.raises(AssertionError, match="earlier ones before owner 2"):  # mutant: all of them in a list
        seen.clear()
        pool(list(owners()), 0.03)


PEAKS = """
import resource, torch
from feddiff_trainer.pooling import OwnerSummary, pool

def owners(count):
    for number in range(count):
        n = torch.tensor([5 + number % 2 * 40])  # about the constant and about the class's own mean
        yield OwnerSummary(torch.rand(1, 600).double(), torch.rand(1, 180_300).double(), n, 1.0, 1.0, 1.0, 0.5)

for count in (4, 204):
    pool(owners(count), 0.05)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_two_hundred_owners_more_take_no_more_memory() -> None:
    """Their sums alone would be 275 MiB, a matrix for each in float64 twice that."""
    run = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    few, many = (int(line) >> 10 for line in run.stdout.split())
    assert many - few < 100, f"{few} and {many} MiB"


def test_a_class_that_nobody_has_is_refused() -> None:
    generator = torch.Generator().manual_seed(6)
    owner = summary_of([records(50, generator), records(50, generator)], 1.0, 1.0, generator)
    empty = OwnerSummary(owner.mean_sums_KD, owner.moment_sums_KM, torch.tensor([50, 0]), 1.0, 1.0, 1.0, CENTRE)
    with pytest.raises(DataInvalid, match=r"classes \[1\]: expected records at one owner"):
        pool([empty, empty], 0.03)


def random_symmetric(size: int, seed: int) -> Tensor:
    matrix_DD = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix_DD + matrix_DD.T + 0.3 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_projection_keeps_the_trace_and_removes_negative_eigenvalues(seed: int) -> None:
    symmetric_DD = random_symmetric(12, seed)
    symmetric_DD += (1 - symmetric_DD.trace() / 12) * torch.eye(12, dtype=torch.float64)
    projected_DD = project_keeping_trace(symmetric_DD, 0.01)
    assert projected_DD.trace().item() == pytest.approx(12, rel=1e-12)
    assert torch.linalg.eigvalsh(projected_DD).min() > -1e-12
    clipped_trace = torch.linalg.eigvalsh(symmetric_DD).clamp(min=0).sum()
    assert clipped_trace > 12.5  # mutant: clipping at zero alone does not keep it


def test_projection_is_the_nearest_such_matrix() -> None:
    """No random positive matrix of the same trace is nearer, and what is positive already stays."""
    symmetric_DD = random_symmetric(4, 9) + 2 * torch.eye(4, dtype=torch.float64)
    projected_DD = project_keeping_trace(symmetric_DD, 0.01)
    distance = (projected_DD - symmetric_DD).norm()
    generator = torch.Generator().manual_seed(10)
    for _ in range(500):
        step_DD = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        other_DD = projected_DD + 0.05 * step_DD @ step_DD.T
        other_DD *= projected_DD.trace() / other_DD.trace()
        assert (other_DD - symmetric_DD).norm() >= distance
    torch.testing.assert_close(project_keeping_trace(COVARIANCE, 0.0), COVARIANCE)


def test_a_trace_lost_in_noise_is_replaced_by_the_floor() -> None:
    assert project_keeping_trace(-torch.eye(4, dtype=torch.float64), 0.2).trace().item() == pytest.approx(0.2)
    generator = torch.Generator().manual_seed(11)
    owner = summary_of([records(50, generator)], 1.0, 1.0, generator)
    lost = OwnerSummary(owner.mean_sums_KD, owner.moment_sums_KM - 100, owner.counts_K, 1.0, 1.0, 1.0, CENTRE)
    _, covariances_KDD = pool([lost], 0.03)
    assert covariances_KDD[0].trace().item() == pytest.approx(4 * TRACE_FLOOR * 0.03 * VALUES)


def test_simplex_projection_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(on_simplex(values, 3.0), torch.tensor([2.5, 0.5, 0.0], dtype=torch.float64))


def test_classes_known_equally_well_keep_the_weight_asked_for_in_an_average_entry() -> None:
    """By hand: the mean one is diag(3, 1), so entries count 9/4, 3/4 and 1/4 of the average one."""
    own_KDD = torch.tensor([[[4.0, 0.5], [0.5, 1.0]], [[2.0, -0.5], [-0.5, 1.0]]], dtype=torch.float64)
    shrunk_KDD = shrink_to_shared(own_KDD, precision(1, 1), 0.6, 1.0, 0.01)
    large, crossed = 0.6 * 9 / 4, 0.6 * 3 / 4
    assert shrunk_KDD[0, 0, 0].item() == pytest.approx(3 + large / (large + 0.4))
    assert shrunk_KDD[0, 0, 1].item() == pytest.approx(0.5 * crossed / (crossed + 0.4))
    isotropic_KDD = torch.stack([0.5 * torch.eye(2, dtype=torch.float64), 1.5 * torch.eye(2, dtype=torch.float64)])
    expected_KDD = 0.6 * isotropic_KDD + 0.4 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(shrink_to_shared(isotropic_KDD, precision(1, 1), 0.6, 1.0, 0.01), expected_KDD)


def precision(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_class_rare_everywhere_takes_the_covariance_of_the_others() -> None:
    own_KDD = torch.stack([COVARIANCE, 1e3 * COVARIANCE])
    shrunk_KDD = shrink_to_shared(own_KDD, precision(1.0, 1e-9), 0.5, 0.5, 0.001)
    assert (shrunk_KDD[1] - COVARIANCE).norm() < 1e-3 * COVARIANCE.norm()


def test_weights_along_the_axes_beat_one_weight_for_all_entries() -> None:
    """Classes that differ where they vary, as covariances of few records of one Gaussian, under equal noise."""
    generator, size = torch.Generator().manual_seed(13), 8
    root_D = 0.5 ** torch.arange(size, dtype=torch.float64)
    ours, one_weight = 0.0, 0.0
    for _ in range(40):
        x_KND = root_D * torch.randn(10, 6, size, generator=generator, dtype=torch.float64)
        true_KDD = x_KND.mT @ x_KND / 6
        noise_KM = 0.2 * torch.randn(10, size * (size + 1) // 2, generator=generator, dtype=torch.float64)
        own_KDD = true_KDD + torch.stack([unpacked(noise_M, size) for noise_M in noise_KM])
        shrunk_KDD = shrink_to_shared(own_KDD, torch.ones(10, dtype=torch.float64), 0.5, 1.0, 0.01)
        ours += float((shrunk_KDD - true_KDD).square().sum())
        one_weight += float((0.5 * own_KDD + 0.5 * own_KDD.mean(dim=0) - true_KDD).square().sum())
    assert ours < 0.8 * one_weight


def test_own_sums_stand_exact_for_the_release_at_home_and_help_the_classes_that_are_rare_there() -> None:
    """The owner knows class 0; class 1 is another owner's, of nearly the same covariance, and very noisy."""
    generator = torch.Generator().manual_seed(14)
    released, at_home = [], []
    for _ in range(60):
        mine = [records(150, generator), records(5, generator)]
        theirs = [records(5, generator), records(150, generator)]
        owners = [summary_of(x, 3.0, 6.0, generator) for x in (mine, theirs)]
        label_N = torch.tensor([0] * 150 + [1] * 5)
        exact = exact_summary(torch.cat(mine), label_N, owners[0])
        for found, home in ((released, None), (at_home, {0: lambda _, own=exact: own})):
            means_KD, covariances_KDD = pool(owners, 0.03, at_home=home)
            errors = (means_KD[0] - 2 * MEAN + 1).norm(), *(covariances_KDD - 4 * COVARIANCE).norm(dim=(1, 2))
            found.append([float(error) for error in errors])
    noisy, better = torch.tensor(released).mean(0), torch.tensor(at_home).mean(0)
    assert better[0] < 0.7 * noisy[0] and better[1] < 0.5 * noisy[1] and better[2] < 0.9 * noisy[2]


MAP = torch.tensor([[0.6, -0.1, 0.0], [-0.1, 1.5, 0.2], [0.0, 0.2, 2.0]], dtype=torch.float64)


def mapped_summary_of(x_ND: Tensor, moment_std: float, generator: torch.Generator) -> OwnerSummary:
    """The same of one class, by a map P and next to no noise on the mean."""
    plain = summary_of([x_ND], 1e-9, 1e-9, generator)
    moment_M = packed(MAP @ unpacked(plain.moment_sums_KM[0], VALUES) @ MAP)
    noised_M = moment_M + moment_std * noise(len(moment_M), generator)
    return replace(plain, moment_sums_KM=noised_M[None], moment_std=moment_std, map_DD=MAP)


@pytest.mark.parametrize("count", [10, 60])
def test_what_was_mapped_before_its_release_pools_to_the_images_own_moments(count: int) -> None:
    """About the constant and about the class's own mean."""
    generator = torch.Generator().manual_seed(16)
    x_ND = records(count, generator)
    plain, through_map = summary_of([x_ND], 1e-9, 1e-9, generator), mapped_summary_of(x_ND, 1e-9, generator)
    for expected, found in zip(pool([plain], 0.03), pool([through_map], 0.03), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    forgotten = pool([replace(through_map, map_DD=None)], 0.03)[1]  # mutant: as if it had not been mapped
    assert (forgotten - pool([plain], 0.03)[1]).norm() > 0.02


def test_noise_is_smaller_where_the_map_is_larger() -> None:
    generator = torch.Generator().manual_seed(17)
    x_ND = records(60, generator)
    truth_DD, found = 4 * torch.cov(x_ND.T), {"plain": [], "mapped": []}
    for _ in range(200):
        noised = summary_of([x_ND], 1e-9, 0.4, generator), mapped_summary_of(x_ND, 0.4, generator)
        for name, owner in zip(found, noised, strict=True):
            found[name].append((pool([owner], 0.03)[1][0] - truth_DD).square())
    plain_DD, mapped_DD = (torch.stack(errors).mean(0) for errors in found.values())
    assert mapped_DD[2, 2] < 0.5 * plain_DD[2, 2] and mapped_DD[0, 0] > 1.5 * plain_DD[0, 0]


def test_an_owners_own_sums_are_mapped_as_its_release_is() -> None:
    x_ND = records(60, torch.Generator().manual_seed(18))
    released = mapped_summary_of(x_ND, 3.0, torch.Generator().manual_seed(19))
    exact = exact_summary(x_ND, torch.zeros(60, dtype=torch.long), released)
    torch.testing.assert_close(pool([released], 0.03, at_home={0: lambda _: exact})[1][0] / 4, torch.cov(x_ND.T))


def test_exact_sums_of_one_owner_alone_give_the_moments_of_its_records() -> None:
    generator = torch.Generator().manual_seed(15)
    x_ND = records(60, generator)
    noisy = summary_of([x_ND], 3.0, 3.0, generator)
    exact = exact_summary(x_ND, torch.zeros(60, dtype=torch.long), noisy)
    means_KD, covariances_KDD = pool([noisy], 0.03, at_home={0: lambda _: exact})
    torch.testing.assert_close((means_KD[0] + 1) / 2, x_ND.mean(dim=0))
    torch.testing.assert_close(covariances_KDD[0] / 4, torch.cov(x_ND.T))
    assert (pool([noisy], 0.03)[0] - means_KD).norm() > 0.01  # mutant: the release itself


# ---- Noised images -----------------------------------------------------------------------------------------------


def noised(x_ND: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return x_ND + std * torch.randn(x_ND.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("counts", [(40, 2), (3, 3), (2, 1)])
def test_moments_of_noised_images_are_unbiased(counts: tuple[int, ...]) -> None:
    assert not moments_are_biased(counts, told=0.4)


def test_moments_of_images_whose_noise_is_not_taken_off_are_biased() -> None:
    assert moments_are_biased((40, 2), told=0.0)


def moments_are_biased(counts: tuple[int, ...], told: float) -> bool:
    """By more than five standard errors, of any class's mean or, from two images on, covariance."""
    generator, found = torch.Generator().manual_seed(16), []
    label_N = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    for _ in range(3000):
        x_ND = noised(records(len(label_N), generator), 0.4, generator)
        moments = moments_of(x_ND, label_N, len(counts), told)
        assert moments.counts_K.tolist() == list(counts)
        kept = [k for k, count in enumerate(counts) if count >= 2]
        found.append(torch.cat([(moments.means_KD - MEAN).flatten(), *(off(moments.covariances_KM[k]) for k in kept)]))
    errors = torch.stack(found)
    return bool((errors.mean(0).abs() > 5 * errors.std(0) / sqrt(len(errors))).any())


def off(covariance_M: Tensor) -> Tensor:
    return (unpacked(covariance_M, VALUES) - COVARIANCE).flatten()


@pytest.mark.parametrize("epsilon", [0.001, 0.5, 2.0])
def test_images_of_one_norm_vary_by_no_more_than_its_square_however_loud_the_noise(epsilon: float) -> None:
    """PrivUnit at small ε: what is left of the noise can be many times what images of norm C can vary by."""
    generator, norm, std = torch.Generator().manual_seed(22), 2.0, best_cap(epsilon, 16).noise_std(2.0)
    label_N, bounded, unbounded = torch.arange(120) % 3, [], []
    for _ in range(10):
        x_ND = torch.rand(120, 16, generator=generator, dtype=torch.float64) ** 4
        x_ND *= norm / x_ND.norm(dim=1, keepdim=True)
        true_DD = 4 * sum(torch.cov(x_ND[label_N == k].T) for k in range(3)) / 3
        noised_ND = noised(x_ND, std, generator)
        for found, largest in ((bounded, norm**2), (unbounded, inf)):
            _, covariances_KDD = pool([moments_of(noised_ND, label_N, 3, std, largest)], 0.03)
            traces_K = covariances_KDD.diagonal(dim1=1, dim2=2).sum(1)
            found.append((float(traces_K.max()), float((covariances_KDD - true_DD).norm())))
    (most, error), (loose_most, loose_error) = (torch.tensor(each).amax(0) for each in (bounded, unbounded))
    assert most <= 4 * norm**2 * (1 + 1e-12)
    assert error <= loose_error
    assert epsilon > 0.5 or (loose_most > 40 * norm**2 and error < loose_error / 5)  # mutant: the trace as it is


def test_an_owners_own_images_are_of_any_norm() -> None:
    generator, label_N = torch.Generator().manual_seed(23), torch.zeros(40, dtype=torch.long)
    x_ND = records(40, generator)
    released = moments_of(x_ND, label_N, 1, 0.1, largest_trace=1e-3)
    _, covariances_KDD = pool([released], 0.03, at_home={0: partial(exact, x_ND, label_N)})
    torch.testing.assert_close(covariances_KDD[0] / 4, torch.cov(x_ND.T))


def test_images_in_batches_have_the_moments_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, label_N = torch.Generator().manual_seed(17), torch.arange(50) % 2
    x_ND = records(50, generator)
    whole = moments_of(x_ND, label_N, 2, 0.1)
    monkeypatch.setattr("feddiff_trainer.pooling.ROWS", 7)
    parts = moments_of(x_ND, label_N, 2, 0.1)
    torch.testing.assert_close(parts.means_KD, whole.means_KD)
    torch.testing.assert_close(parts.covariances_KM, whole.covariances_KM)
    expected = torch.cov(x_ND[label_N == 1].T) - 0.01 * torch.eye(VALUES, dtype=torch.float64)
    torch.testing.assert_close(unpacked(whole.covariances_KM[1], VALUES), expected)


def test_noised_images_of_many_owners_pool_to_the_true_gaussian() -> None:
    generator, label_N = torch.Generator().manual_seed(18), torch.zeros(20_000, dtype=torch.long)
    owners = [moments_of(noised(records(20_000, generator), std, generator), label_N, 1, std) for std in (0.1, 0.5)]
    means_KD, covariances_KDD = pool(owners, 0.03)
    torch.testing.assert_close(means_KD[0], 2 * MEAN - 1, atol=0.01, rtol=0)
    torch.testing.assert_close(covariances_KDD[0], 4 * COVARIANCE, atol=0.01, rtol=0)


def test_an_owner_of_noised_images_counts_by_what_it_knows() -> None:
    """A class of five images here and of two hundred there: near the latter's own, not the average."""
    generator = torch.Generator().manual_seed(19)
    few, many = (
        moments_of(noised(records(n, generator), 0.3, generator), torch.zeros(n, dtype=torch.long), 1, 0.3)
        for n in (5, 200)
    )
    means_KD, _ = pool([few, many], 0.03)
    shares = [float((means_KD[0] - 2 * each.means_KD[0] + 1).norm()) for each in (few, many)]
    assert shares[1] / sum(shares) == pytest.approx(5 / 205, rel=1e-6)  # equal noise: weights are those of the counts


def test_one_noised_image_says_nothing_of_a_covariance() -> None:
    generator = torch.Generator().manual_seed(20)
    labels = torch.tensor([0] * 30 + [1])
    moments = moments_of(noised(records(31, generator), 0.1, generator), labels, 2, 0.1)
    _, covariances_KDD = pool([moments], 0.03)
    torch.testing.assert_close(covariances_KDD[1], covariances_KDD[0], rtol=0.5, atol=0.02)  # that of the other class
    alone = moments_of(records(2, generator), torch.tensor([0, 1]), 2, 0.1)
    with pytest.raises(DataInvalid, match="two records of one class"):
        pool([alone], 0.03)


def test_an_owners_own_images_stand_exact_for_its_noised_ones_at_home() -> None:
    generator, label_N = torch.Generator().manual_seed(21), torch.zeros(60, dtype=torch.long)
    x_ND = records(60, generator)
    released = moments_of(noised(x_ND, 2.0, generator), label_N, 1, 2.0)
    means_KD, covariances_KDD = pool([released], 0.03, at_home={0: partial(exact, x_ND, label_N)})
    torch.testing.assert_close((means_KD[0] + 1) / 2, x_ND.mean(dim=0))
    torch.testing.assert_close(covariances_KDD[0] / 4, torch.cov(x_ND.T))
    assert (pool([released], 0.03)[0] - means_KD).norm() > 0.01  # mutant: the release itself


def test_packing_keeps_the_frobenius_norm_and_unpacks_to_the_same_bits() -> None:
    symmetric_DD = random_symmetric(5, 12)
    assert packed(symmetric_DD).norm().item() == pytest.approx(symmetric_DD.norm().item(), rel=1e-14)
    torch.testing.assert_close(unpacked(packed(symmetric_DD), 5), symmetric_DD, atol=1e-15, rtol=1e-15)
