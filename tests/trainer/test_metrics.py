import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
from sklearn.datasets import load_digits

from feddiff_trainer.classifier import train_classifier
from feddiff_trainer.metrics import (
    Quality,
    copies,
    coverage,
    density,
    distances,
    frechet_distance,
    frechet_distance_of_gaussians,
    kernel_distance,
    measure_quality,
    minority_classes,
    recall_per_class,
    two_sample_accuracy,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(seed: int, num_rows: int, num_columns: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, num_columns))


def random_covariance(seed: int, size: int, rank: int) -> np.ndarray:
    factor = normal(seed, size, rank)
    return factor @ factor.T


# Fréchet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    a_D, b_D = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 2.0])
    mean_a_D, mean_b_D = np.array([1.0, 0.0, 0.0]), np.array([0.0, 2.0, 0.0])
    expected = 1 + 4 + np.square(np.sqrt(a_D) - np.sqrt(b_D)).sum()
    found = frechet_distance_of_gaussians(mean_a_D, np.diag(a_D), mean_b_D, np.diag(b_D))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_is_that_of_scipys_matrix_square_root(seed):
    mean_a_D, mean_b_D = normal(seed, 2, 12)
    a_DD, b_DD = random_covariance(seed + 10, 12, 20), random_covariance(seed + 20, 12, 20)
    root_DD = scipy.linalg.sqrtm(a_DD @ b_DD).real
    expected = np.square(mean_a_D - mean_b_D).sum() + np.trace(a_DD + b_DD - 2 * root_DD)
    assert frechet_distance_of_gaussians(mean_a_D, a_DD, mean_b_D, b_DD) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_between_singular_gaussians_on_orthogonal_planes_is_the_sum_of_their_traces():
    a_DD, b_DD = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 4.0])
    turn_DD = scipy.linalg.qr(normal(0, 4, 4))[0]
    zero_D = np.zeros(4)
    found = frechet_distance_of_gaussians(zero_D, turn_DD @ a_DD @ turn_DD.T, zero_D, turn_DD @ b_DD @ turn_DD.T)
    assert found == pytest.approx(10, abs=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_rows_than_features():
    few_ND = normal(0, 5, 20)
    assert 0 <= frechet_distance(few_ND, few_ND) < 1e-6


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    set_ND = normal(0, 30)
    assert frechet_distance(set_ND, set_ND + 3) == pytest.approx(4 * 9, rel=1e-9)


def test_frechet_distance_of_large_samples_approaches_that_of_their_gaussians():
    a_DD, b_DD = random_covariance(1, 4, 8), random_covariance(2, 4, 8)
    a_ND = normal(3, 200_000) @ np.linalg.cholesky(a_DD).T
    b_ND = normal(4, 200_000) @ np.linalg.cholesky(b_DD).T + 1
    expected = frechet_distance_of_gaussians(np.zeros(4), a_DD, np.ones(4), b_DD)
    assert frechet_distance(a_ND, b_ND) == pytest.approx(expected, rel=0.02)


# Kernel distance


def kernel_distance_by_loops(a_ND: np.ndarray, b_ND: np.ndarray, *, biased: bool = False) -> float:
    def mean_kernel(x_ND: np.ndarray, y_ND: np.ndarray, skip_equal: bool) -> float:
        pairs = itertools.product(enumerate(x_ND), enumerate(y_ND))
        return float(
            np.mean([(x_D @ y_D / len(x_D) + 1) ** 3 for (i, x_D), (j, y_D) in pairs if not (skip_equal and i == j)])
        )

    within = mean_kernel(a_ND, a_ND, not biased) + mean_kernel(b_ND, b_ND, not biased)
    return within - 2 * mean_kernel(a_ND, b_ND, False)


def test_kernel_distance_is_the_unbiased_estimate_by_loops():
    a_ND, b_ND = normal(0, 7), normal(1, 11) + 0.5
    assert kernel_distance(a_ND, b_ND) == pytest.approx(kernel_distance_by_loops(a_ND, b_ND), rel=1e-12)


def test_kernel_distance_of_equal_distributions_is_zero_on_average_and_a_biased_estimate_is_not():
    draws = [(normal(2 * seed, 10), normal(2 * seed + 1, 10)) for seed in range(400)]

    def z_score(estimates: list[float]) -> float:
        return float(np.mean(estimates) / (np.std(estimates) / math.sqrt(len(estimates))))

    assert abs(z_score([kernel_distance(a_ND, b_ND) for a_ND, b_ND in draws])) < 3
    assert z_score([kernel_distance_by_loops(a_ND, b_ND, biased=True) for a_ND, b_ND in draws[:60]]) > 3


# Coverage and density


def coverage_and_density_by_loops(real_ND: np.ndarray, generated_ND: np.ndarray, k: int) -> tuple[float, float]:
    covered, inside = 0, 0
    for i, real_D in enumerate(real_ND):
        radius = sorted(math.dist(real_D, other_D) for j, other_D in enumerate(real_ND) if j != i)[k - 1]
        hits = sum(math.dist(real_D, generated_D) < radius for generated_D in generated_ND)
        covered += hits > 0
        inside += hits
    return covered / len(real_ND), inside / (k * len(generated_ND))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_coverage_and_density_are_their_definitions(k):
    real_ND, generated_ND = normal(0, 40), 1.3 * normal(1, 30)
    expected = coverage_and_density_by_loops(real_ND, generated_ND, k)
    assert (coverage(real_ND, generated_ND, k), density(real_ND, generated_ND, k)) == expected


def test_distances_are_scipys_and_vanish_between_equal_images():
    x_ND, y_ND = np.random.default_rng(0).uniform(-1, 1, (2, 30, 784))
    assert np.allclose(distances(x_ND, y_ND), scipy.spatial.distance.cdist(x_ND, y_ND), rtol=1e-12)
    assert np.diag(distances(x_ND, x_ND)).max() < 1e-6


def test_a_set_covers_itself_with_density_one():
    real_ND = normal(0, 50)
    assert (coverage(real_ND, real_ND), density(real_ND, real_ND)) == (1.0, 1.0)


@pytest.mark.parametrize("num_generated", [20, 40, 80])
def test_equal_distributions_have_the_expected_coverage_and_density_one(num_generated):
    num_real, k = 40, 5
    missed = math.prod((num_real - i) / (num_generated + num_real - i) for i in range(1, k + 1))
    pairs = [(normal(2 * seed, num_real), normal(2 * seed + 1, num_generated)) for seed in range(300)]
    assert np.mean([coverage(*pair, k) for pair in pairs]) == pytest.approx(1 - missed, abs=0.01)
    assert np.mean([density(*pair, k) for pair in pairs]) == pytest.approx(1, abs=0.04)


def test_far_images_cover_nothing():
    real_ND = normal(0, 50)
    assert (coverage(real_ND, real_ND + 100), density(real_ND, real_ND + 100)) == (0.0, 0.0)


def test_a_generator_of_one_typical_image_has_density_but_no_coverage():
    real_ND = normal(0, 200)
    same_ND = np.repeat(real_ND[np.linalg.norm(real_ND, axis=1).argmin()][None], 200, axis=0)
    assert coverage(real_ND, same_ND) < 0.3
    assert density(real_ND, same_ND) > 0.5


def test_sets_larger_than_a_block_give_the_same_measures(monkeypatch):
    real_ND, generated_ND = normal(0, 50), normal(1, 35)

    def measures() -> list[float]:
        return [
            pytest.approx(kernel_distance(real_ND, generated_ND), rel=1e-12),
            coverage(real_ND, generated_ND),
            density(real_ND, generated_ND),
            copies(generated_ND, real_ND[:20], real_ND[20:], 0.5),
            two_sample_accuracy(real_ND, generated_ND, 0),
        ]

    whole = measures()
    monkeypatch.setattr("feddiff_trainer.metrics.BLOCK_ROWS", 8)
    assert measures() == whole


# Copies


def test_training_images_are_copies_and_fresh_draws_are_not():
    own_ND, held_out_ND, fresh_ND = normal(0, 50, 30), normal(1, 50, 30), normal(2, 200, 30)
    assert copies(own_ND, own_ND, held_out_ND, 1 / 3) == 1.0
    assert copies(fresh_ND, own_ND, held_out_ND, 1 / 2) == 0.0
    assert copies(held_out_ND, own_ND, held_out_ND, 1 / 2) == 0.0


def test_the_ratio_is_that_of_the_two_distances():
    own_ND, held_out_ND = np.array([[0.0, 0.0]]), np.array([[3.0, 0.0]])
    generated_ND = np.array([[0.7, 0.0], [0.9, 0.0], [1.1, 0.0], [0.0, 9.0]])  # 1/3 of the way is 0.75, 1/2 is 1.0
    assert copies(generated_ND, own_ND, held_out_ND, 1 / 2) == 0.5
    assert copies(generated_ND, own_ND, held_out_ND, 1 / 3) == 0.25


def test_an_image_both_trained_on_and_held_out_is_no_copy():
    both_ND = normal(0, 10)
    assert copies(both_ND, both_ND, both_ND, 1 / 2) == 0.0


def test_without_own_images_nothing_is_copied():
    assert copies(normal(0, 10), normal(1, 0), normal(2, 10), 1 / 2) == 0.0


# Recall, two-sample test, groups


def test_recall_of_a_perfect_and_of_a_constant_predictor():
    labels_N = np.array([0, 0, 1, 1, 1, 3])
    assert recall_per_class(labels_N, labels_N, 4) == (1.0, 1.0, None, 1.0)
    assert recall_per_class(np.ones_like(labels_N), labels_N, 4) == (0.0, 1.0, None, 0.0)
    assert recall_per_class(np.array([0, 1, 1, 1, 0, 3]), labels_N, 4) == (0.5, pytest.approx(2 / 3), None, 1.0)


def test_two_sample_accuracy_is_half_for_equal_one_for_far_and_none_for_copied_sets():
    real_ND = normal(0, 400)
    equal = [two_sample_accuracy(normal(2 * seed, 100), normal(2 * seed + 1, 300), seed) for seed in range(40)]
    assert np.mean(equal) == pytest.approx(0.5, abs=0.02)
    assert two_sample_accuracy(real_ND, normal(1, 300) + 50, 0) == 1.0
    assert two_sample_accuracy(real_ND, real_ND, 0) == 0.0


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([112, 5, 5, 118, 5], {1, 2, 4}),
        ([100, 50, 49, 0], {2, 3}),
        ([7, 7, 7], set()),
        ([0, 0], set()),
    ],
    ids=["most classes rare", "half of the largest is no minority", "equal counts", "no records"],
)
def test_minority_is_less_than_half_of_the_largest_class(counts, expected):
    assert minority_classes(counts) == expected


# The whole, on digits


class Digits:
    """An owner with many scans of classes 0..3 and three of each other class, held-out scans, and fresh scans: what a
    perfect generator would make."""

    majority, minority = frozenset(range(4)), frozenset(range(4, 10))

    def __init__(self) -> None:
        data = load_digits()
        order_N = np.random.default_rng(0).permutation(len(data.target))  # the last scans are other writers'
        images_NCHW = (data.images[order_N, None] / 8 - 1).astype(np.float32)
        by_class = [images_NCHW[data.target[order_N] == label] for label in range(10)]
        self.own = stacked([x_NCHW[: 60 if label < 4 else 3] for label, x_NCHW in enumerate(by_class)])
        self.held_out = stacked([x_NCHW[60:110] for x_NCHW in by_class])
        self.fresh = stacked([x_NCHW[110:160] for x_NCHW in by_class])
        self.feature_classifier = train_classifier(*self.own_and_fresh(), 10, seed=0)

    def own_and_fresh(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.own[0], self.fresh[0]]), np.concatenate([self.own[1], self.fresh[1]])

    def quality(self, generated: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Quality:
        return measure_quality(
            *generated,
            *self.held_out,
            *self.own,
            feature_classifier=self.feature_classifier,
            majority=self.majority,
            minority=self.minority,
            seed=seed,
        )


def stacked(by_class: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(by_class), np.repeat(np.arange(len(by_class)), [len(x_NCHW) for x_NCHW in by_class])


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def perfect(digits: Digits) -> Quality:
    return digits.quality(digits.fresh)


def test_fresh_real_images_are_good_by_every_measure(perfect):
    assert perfect.coverage > 0.9 and perfect.density == pytest.approx(1, abs=0.2)
    assert perfect.two_sample_accuracy == pytest.approx(0.5, abs=0.1)
    assert perfect.overall.recall > 0.9 and perfect.minority.recall > 0.9
    assert perfect.minority.copies_half < 0.05 and perfect.majority.copies_half < 0.05
    assert perfect.missing == perfect.overall.missing == {}


def test_a_generator_that_repeats_the_owners_few_images_is_found_out(digits, perfect):
    rng = np.random.default_rng(0)
    own_NCHW, own_N = digits.own
    repeated = stacked([rng.choice(own_NCHW[own_N == label], 50) for label in range(10)])
    found = digits.quality(repeated)
    assert found.minority.copies_half > 0.95 and found.minority.copies_third > 0.95
    assert found.minority.coverage < 0.6 * perfect.minority.coverage
    assert found.minority.frechet > 2 * perfect.minority.frechet
    assert found.minority.recall < perfect.minority.recall - 0.05


def test_a_generator_that_lacks_a_class_is_found_out(digits, perfect):
    fresh_NCHW, fresh_N = digits.fresh
    found = digits.quality((fresh_NCHW[fresh_N != 7], fresh_N[fresh_N != 7]))
    lacking = found.classes[7]
    assert found.coverage < perfect.coverage - 0.05 and found.frechet > perfect.frechet
    assert lacking.recall == lacking.coverage == 0.0
    assert found.minority.recall < perfect.minority.recall - 0.1
    assert lacking.frechet is None and lacking.missing["frechet"] == "needs more than 16 images of each kind, has 0"
    assert found.minority.copies_half is None
    assert found.minority.missing["copies_half"] == "class 7: no generated image of this class"
    assert found.majority.missing == {}


def test_a_generator_that_confuses_labels_looks_good_pooled_and_bad_per_class(digits, perfect):
    fresh_NCHW, fresh_N = digits.fresh
    found = digits.quality((fresh_NCHW, (fresh_N + 1) % 10))
    assert found.frechet == perfect.frechet and found.coverage == perfect.coverage
    assert found.overall.recall < 0.1 and found.overall.coverage < 0.1
    assert found.overall.frechet > 5 * perfect.overall.frechet


def test_a_generator_that_adds_noise_is_found_out(digits, perfect):
    fresh_NCHW, fresh_N = digits.fresh
    noise_NCHW = 0.3 * np.random.default_rng(0).standard_normal(fresh_NCHW.shape)
    found = digits.quality((fresh_NCHW + noise_NCHW, fresh_N))
    assert found.density < 0.5 * perfect.density and found.coverage < 0.6 * perfect.coverage
    assert found.frechet > 2 * perfect.frechet and found.kernel_distance > perfect.kernel_distance


def test_pooled_measures_of_pairs_look_at_a_bounded_number_of_images(digits, monkeypatch):
    """Coverage says how many were looked at: it is the less, the more real images there are for each generated one."""
    few_NCHW, few_N = (part[:: len(part) // 100][:100] for part in digits.fresh)
    of_all = digits.quality((few_NCHW, few_N))
    monkeypatch.setattr("feddiff_trainer.metrics.MOST_PAIRED", 100)
    thinned = digits.quality((few_NCHW, few_N))
    assert of_all.coverage < thinned.coverage - 0.1
    assert (thinned.frechet, thinned.num_held_out) == (of_all.frechet, of_all.num_held_out)
    assert thinned.classes == of_all.classes


def test_the_groups_are_means_of_their_classes(perfect):
    for group, labels in [(perfect.majority, range(4)), (perfect.minority, range(4, 10)), (perfect.overall, range(10))]:
        assert group.num_classes == len(labels)
        for measure in ("frechet", "recall", "coverage", "density", "copies_half", "copies_third"):
            values = [getattr(perfect.classes[label], measure) for label in labels]
            assert getattr(group, measure) == pytest.approx(np.mean(values), rel=1e-12)


def test_the_same_seed_measures_the_same(digits, perfect):
    assert digits.quality(digits.fresh) == perfect


def test_quality_survives_json(perfect):
    read = json.loads(json.dumps(asdict(perfect), allow_nan=False))
    assert read["minority"]["recall"] == perfect.minority.recall
    assert read["classes"][9]["num_own_train"] == 3
    assert read["feature_space"] == "16 features of a small classifier"


def test_too_few_images_give_a_reason_and_no_number(digits):
    held_NCHW, held_N = digits.held_out
    few = np.isin(held_N, (0, 1)) | (np.arange(500) % 50 < 3)  # three held-out images of classes 2..9
    few &= held_N != 9  # and none of class 9
    found = measure_quality(
        *digits.fresh,
        held_NCHW[few],
        held_N[few],
        digits.own[0][:0],
        digits.own[1][:0],
        feature_classifier=digits.feature_classifier,
        majority=frozenset({0, 1}),
        minority=frozenset({9}),
        seed=0,
    )
    assert found.majority.missing == {} and found.majority.copies_half == 0.0
    assert found.classes[2].coverage is found.classes[2].density is found.classes[2].frechet is None
    assert found.classes[2].missing["coverage"] == "needs more than 5 held-out images, has 3"
    assert found.classes[2].group is None
    assert found.classes[9].missing["recall"] == "no held-out image of this class"
    assert found.overall.num_classes == 9 and found.overall.recall > 0.8
    assert found.overall.frechet is None and "class 2: needs more than 16" in found.overall.missing["frechet"]
    assert found.minority.num_classes == 0
    assert found.minority.missing["recall"] == "no class of this group has held-out images"


def test_a_single_generated_image_is_measured_without_nonsense(digits):
    found = digits.quality((digits.fresh[0][:1], digits.fresh[1][:1]))
    assert found.frechet is None and found.kernel_distance is None
    assert found.missing["kernel_distance"] == "needs at least 2 images of each kind, has 1"
    json.dumps(asdict(found), allow_nan=False)


def test_groups_that_overlap_or_do_not_exist_and_diverged_images_are_refused(digits):
    def measure(generated_NCHW: np.ndarray, majority: set[int], minority: set[int]) -> Quality:
        return measure_quality(
            generated_NCHW,
            digits.fresh[1],
            *digits.held_out,
            *digits.own,
            feature_classifier=digits.feature_classifier,
            majority=frozenset(majority),
            minority=frozenset(minority),
            seed=0,
        )

    with pytest.raises(ValueError, match=r"apart, found \[1\] in both"):
        measure(digits.fresh[0], {0, 1}, {1, 2})
    with pytest.raises(ValueError, match=r"labels 0\.\.9"):
        measure(digits.fresh[0], {0}, {10})
    with pytest.raises(ValueError, match="has a denoiser diverged"):
        measure(np.full_like(digits.fresh[0], np.nan), {0}, {1})
