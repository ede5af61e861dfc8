"""PrivUnit under attack: the likelihood-ratio test on what is released succeeds as often as was promised, not more.

`violations` is the one judge; every mutant (a wrong cap probability, a wrong cap height, noise used twice, a wrong
scale) has to stand before a test of this file and lose. Clopper–Pearson intervals as in test_mechanisms; seeds are
fixed.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from feddiff_protocol import accountant
from feddiff_protocol.errors import DataInvalid, PrivacyRefusal
from feddiff_protocol.privunit import Cap, best_cap, share_and_moment
from feddiff_trainer import mechanisms, privunit
from feddiff_trainer.noise import Normals
from feddiff_trainer.privunit import (
    STEP,
    directions,
    draw_heights,
    heights_inside,
    heights_outside,
    release_privunit,
    release_privunit_on_grid,
)

NUM_TRIALS = 100_000
CONFIDENCE = 1 - 1e-6  # seeds are fixed: an interval this wide is met by right code whatever the seed
EPSILON, SIZE = 3.0, 16
CAP = best_cap(EPSILON, SIZE)
# Two images without a pixel in common: the farthest apart that images can be, for their pixels are not negative.
ONE, OTHER = np.repeat([0.9, 0.0], 8), np.repeat([0.0, 0.4], 8)
Release = Callable[..., np.ndarray]


def seeded(seed: int) -> Normals:
    return np.random.default_rng(seed).standard_normal


def released(image_D: np.ndarray, cap: Cap, seed: int, *, normals: Normals | None = None) -> np.ndarray:
    """z_ND of many trials with the same image, as it is released: on the grid."""
    entropy = np.random.default_rng([seed, 1]).bytes
    pixels_ND = np.broadcast_to(image_D, (NUM_TRIALS, len(image_D)))
    cells_ND = release_privunit_on_grid(
        pixels_ND, np.arange(NUM_TRIALS), cap=cap, normals=normals or seeded(seed), entropy=entropy
    )
    return cells_ND * STEP


def inside(z_ND: np.ndarray, image_D: np.ndarray) -> np.ndarray:
    return z_ND @ (image_D / np.linalg.norm(image_D)) >= CAP.height


def interval(hits: np.ndarray) -> tuple[float, float]:
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE, "exact")
    return float(found.low), float(found.high)


# ---- The judge -------------------------------------------------------------------------------------------------------


def expected_rates(cap: Cap, both: float) -> dict[str, tuple[float, float]]:
    """By kind of outcome, how often it comes under ONE and under OTHER; `both`: share of the sphere in both caps.

    The likelihood ratio has three values: in ONE's cap alone it is e^-ε, in OTHER's alone e^ε, elsewhere 1.
    """
    p, q = cap.probability, cap.share
    own, others = p * (1 - both / q), (1 - p) * (q - both) / (1 - q)
    return {"ONE's cap alone": (own, others), "OTHER's cap alone": (others, own)}


def share_of_both_caps(cap: Cap) -> float:
    """P(⟨Z,u⟩ ≥ γ and ⟨Z,u'⟩ ≥ γ) for orthogonal u, u': given the first, the rest of Z is uniform on its own sphere."""
    with mpmath.workdps(20):
        d, height = cap.dimensions, mpmath.mpf(cap.height)
        scale = mpmath.gamma(mpmath.mpf(d) / 2) / (mpmath.sqrt(mpmath.pi) * mpmath.gamma(mpmath.mpf(d - 1) / 2))

        def integrand(t: mpmath.mpf) -> mpmath.mpf:
            remaining = 1 - t * t
            tail = mpmath.betainc(
                mpmath.mpf(d - 2) / 2, mpmath.mpf(1) / 2, 0, 1 - height**2 / remaining, regularized=True
            )
            return scale * remaining ** (mpmath.mpf(d - 3) / 2) * tail / 2

        return float(mpmath.quad(integrand, [height, mpmath.sqrt(1 - height**2)]))


BOTH = share_of_both_caps(CAP)


def violations(one_ND: np.ndarray, other_ND: np.ndarray) -> list[str]:
    """Where the attack on draws for ONE and for OTHER differs from what ε allows, or from what this cap says."""
    found = []
    for name, rates in expected_rates(CAP, BOTH).items():
        first = name.startswith("ONE")
        for image, z_ND, rate in zip(("ONE", "OTHER"), (one_ND, other_ND), rates, strict=True):
            mine, others = inside(z_ND, ONE), inside(z_ND, OTHER)
            low, high = interval(mine & ~others if first else others & ~mine)
            if not low <= rate <= high:
                found.append(f"{name} under {image}: {low:.4f} to {high:.4f}, not {rate:.4f}")
    false_low, false_high = interval(inside(one_ND, OTHER) & ~inside(one_ND, ONE))
    true_low, _ = interval(inside(other_ND, OTHER) & ~inside(other_ND, ONE))
    if true_low > accountant.pure_attack_tpr(EPSILON, false_high):
        found.append(f"finds {true_low:.4f} at {false_low:.4f} to {false_high:.4f} false alarms, more than ε allows")
    scores = [inside(z_ND, OTHER).astype(int) - inside(z_ND, ONE) for z_ND in (one_ND, other_ND)]
    ties = np.random.default_rng(0).random(NUM_TRIALS) < 0.5
    area_low, _ = interval((scores[1] > scores[0]) | ((scores[1] == scores[0]) & ties))
    if area_low > accountant.pure_attack_auc(EPSILON):
        found.append(f"area under the curve at least {area_low:.4f}, more than ε allows")
    return found


def test_the_attack_meets_the_promise_at_the_worst_pair() -> None:
    assert violations(released(ONE, CAP, 1), released(OTHER, CAP, 2)) == []


def test_the_worst_ratio_of_what_is_expected_is_what_is_charged() -> None:
    own, others = expected_rates(CAP, BOTH)["ONE's cap alone"]
    assert math.log(own / others) == pytest.approx(EPSILON, abs=2e-9)
    assert math.log(own / others) <= EPSILON
    assert own == pytest.approx(accountant.pure_attack_tpr(EPSILON, others), rel=1e-8)  # the bound is reached there


def higher(more: float) -> Cap:
    """A cap that is higher, drawn from with the probability of the right one."""
    height = CAP.height + more
    return replace(CAP, height=height, share=share_and_moment(height, SIZE)[0])


@pytest.mark.parametrize(
    "cap",
    [
        replace(CAP, probability=CAP.probability + 0.02),
        replace(CAP, probability=CAP.probability - 0.02),
        higher(0.03),
        best_cap(1.1 * EPSILON, SIZE),
    ],
    ids=["cap probability", "lower cap probability", "cap height", "ε 10 % too large"],
)
def test_the_attack_exposes_a_wrong_cap(cap: Cap) -> None:
    assert violations(released(ONE, cap, 3), released(OTHER, cap, 4))


@pytest.mark.parametrize("reused", ["the draw", "its height", "its direction about the image"])
def test_the_attack_exposes_one_draw_for_all_records(reused: str) -> None:
    def entropy(seed: int) -> Callable[[int], bytes]:
        fresh, once = np.random.default_rng(seed), np.random.default_rng(seed).bytes(16)
        coin, place = once[:8], once[8:]
        return fresh.bytes if "direction" in reused else lambda count: (count // 16) * coin + (count // 16) * place

    def normals(seed: int) -> Normals:
        fresh = seeded(seed)
        if "height" in reused:
            return fresh
        return lambda shape: np.broadcast_to(fresh((1, shape[1])), shape).copy()

    draws = [
        release_privunit(np.broadcast_to(image_D, (NUM_TRIALS, SIZE)), CAP, normals(seed), entropy(seed))
        for seed, image_D in ((5, ONE), (6, OTHER))
    ]
    assert violations(*draws)


@pytest.mark.parametrize("other", ["the same", "near", "black"])
def test_other_pairs_are_never_told_apart_better_than_was_promised(other: str) -> None:
    image_D = {"the same": ONE, "near": np.clip(ONE + 0.05, 0, 1), "black": np.zeros(SIZE)}[other]
    one_ND, other_ND = released(ONE, CAP, 7), released(image_D, CAP, 8)
    u_D, v_D = (directions(each_D[None])[0] for each_D in (ONE, image_D))
    for alone in (False, True):  # in the other's cap; in the other's cap alone
        found, alarms = (inside(z_ND, v_D) & ~(alone & inside(z_ND, u_D)) for z_ND in (other_ND, one_ND))
        false_high = min(interval(alarms)[1], 1 - 1e-12)
        assert interval(found)[0] <= accountant.pure_attack_tpr(EPSILON, false_high)


# ---- The moments -----------------------------------------------------------------------------------------------------


def mean_problem(z_ND: np.ndarray, norm: float, cap: Cap) -> bool:
    """Whether the mean of (C/m)·z differs from C·u by more than six standard errors in some value."""
    x_ND = norm / cap.mean * z_ND
    errors_D = x_ND.std(axis=0) / math.sqrt(len(x_ND))
    return bool((np.abs(x_ND.mean(axis=0) - norm * directions(ONE[None])[0]) > 6 * errors_D).any())


def moment_problem(z_ND: np.ndarray, cap: Cap) -> bool:
    """Whether E[zzᵀ] differs from a·uuᵀ + b·I by more than six standard errors in some entry."""
    u_D = directions(ONE[None])[0]
    expected_DD = cap.along * np.outer(u_D, u_D) + cap.around * np.eye(SIZE)
    found_DD = z_ND.T @ z_ND / len(z_ND)
    square_DD = (z_ND**2).T @ z_ND**2 / len(z_ND)
    errors_DD = np.sqrt(np.maximum(square_DD - found_DD**2, 0) / len(z_ND))
    return bool((np.abs(found_DD - expected_DD) > 6 * errors_DD).any())


def test_a_release_is_unbiased_and_its_second_moment_is_as_stated() -> None:
    z_ND = released(ONE, CAP, 9)
    assert not mean_problem(z_ND, 2.5, CAP)
    assert not moment_problem(z_ND, CAP)


@pytest.mark.parametrize(
    "cap",
    [
        replace(CAP, probability=CAP.probability - 0.05),
        higher(0.1),
        replace(CAP, share=0.8 * CAP.share),
    ],
    ids=["cap probability", "cap height", "share of the sphere"],
)
def test_a_wrong_cap_is_biased(cap: Cap) -> None:
    z_ND = released(ONE, cap, 10)
    assert mean_problem(z_ND, 2.5, CAP) and moment_problem(z_ND, CAP)


def test_a_wrong_scale_is_biased() -> None:
    z_ND = released(ONE, CAP, 11)
    assert mean_problem(z_ND, 2.5, replace(CAP, mean=0.95 * CAP.mean))
    assert moment_problem(z_ND, replace(CAP, mean=0.9 * CAP.mean))


def test_every_release_has_length_one_and_no_part_of_it_but_the_height_depends_on_the_image() -> None:
    z_ND = release_privunit(np.broadcast_to(ONE, (50_000, SIZE)), CAP, seeded(12), np.random.default_rng(12).bytes)
    assert np.abs(np.linalg.norm(z_ND, axis=1) - 1).max() < 1e-12
    u_D = directions(ONE[None])[0]
    across_ND = z_ND - np.outer(z_ND @ u_D, u_D)
    across_ND /= np.linalg.norm(across_ND, axis=1)[:, None]
    # A value of a uniform direction among the D - 1 that are left, squared, is Beta(½, (D - 2)/2).
    axis_D = np.zeros(SIZE)
    axis_D[:2] = 1 / math.sqrt(2), -1 / math.sqrt(2)  # orthogonal to u, whose first two values are equal
    assert stats.kstest((across_ND @ axis_D) ** 2, stats.beta(0.5, (SIZE - 2) / 2).cdf).pvalue > 1e-6
    correlation = np.corrcoef(np.abs(across_ND @ axis_D), z_ND @ u_D)[0, 1]
    assert abs(correlation) < 6 / math.sqrt(50_000)


# ---- The heights -----------------------------------------------------------------------------------------------------


def uniform_law(heights_N: np.ndarray, cap: Cap) -> np.ndarray:
    """P(T ≥ t) of each height for uniform directions."""
    half = (cap.dimensions - 1) / 2
    return special.betainc(half, half, (1 - heights_N) / 2)


@pytest.mark.parametrize(("epsilon", "dimensions"), [(0.5, 16), (4.0, 784), (30.0, 64), (100.0, 3072)])
def test_heights_follow_the_uniform_law_on_either_side_of_the_cap(epsilon: float, dimensions: int) -> None:
    cap, count = best_cap(epsilon, dimensions), 50_000
    words_N = np.frombuffer(np.random.default_rng(13).bytes(8 * count), np.uint64)
    tail_N = uniform_law(heights_inside(words_N, cap), cap)
    assert stats.kstest(tail_N / cap.share, "uniform").pvalue > 1e-6
    tail_N = uniform_law(heights_outside(words_N, cap), cap)
    assert stats.kstest((tail_N - cap.share) / (1 - cap.share), "uniform").pvalue > 1e-6


@pytest.mark.parametrize(("epsilon", "dimensions"), [(0.001, 16), (4.0, 64), (10.0, 784), (100.0, 3072)])
def test_the_rarest_words_stay_inside_the_sphere_and_on_their_side(epsilon: float, dimensions: int) -> None:
    """The ends of the range never give ±u itself, which would name the image."""
    cap = best_cap(epsilon, dimensions)
    words_N = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
    inner_N, outer_N = heights_inside(words_N, cap), heights_outside(words_N, cap)
    assert (inner_N >= cap.height).all() and (inner_N < 1).all()
    assert (outer_N <= cap.height).all() and (outer_N > -1).all()


@pytest.mark.parametrize("tail", [0.4999, 1e-3, 1e-12, 1e-30])
@pytest.mark.parametrize("dimensions", [16, 784, 3072])
def test_heights_far_out_are_exact(tail: float, dimensions: int) -> None:
    found = float(privunit._upper_quantile(np.array([tail]), best_cap(1.0, dimensions))[0])
    with mpmath.workdps(40):
        half = mpmath.mpf(dimensions - 1) / 2
        reached = mpmath.betainc(half, half, 0, (1 - mpmath.mpf(found)) / 2, regularized=True)
        assert float(reached / tail) == pytest.approx(1, rel=1e-10)


def test_the_coin_is_the_caps_probability_to_the_last_bit() -> None:
    threshold = int(CAP.probability * 2**64)
    assert threshold == CAP.probability * 2.0**64
    for coin, expected in ((threshold - 1, True), (threshold, False)):
        words = np.array([coin, 2**63], np.uint64).tobytes()
        assert (draw_heights(1, CAP, lambda count, words=words: words)[0] >= CAP.height) is np.bool_(expected)


def test_coin_and_height_come_from_bits_of_their_own() -> None:
    heights_N = draw_heights(100_000, CAP, np.random.default_rng(14).bytes)
    tail_N = uniform_law(heights_N[heights_N >= CAP.height], CAP) / CAP.share
    assert stats.kstest(tail_N, "uniform").pvalue > 1e-6
    twice = draw_heights(100_000, CAP, lambda count: 2 * np.random.default_rng(14).bytes(count // 2))
    tail_N = uniform_law(twice[twice >= CAP.height], CAP) / CAP.share
    assert stats.kstest(tail_N, "uniform").pvalue < 1e-6  # mutant: one word for both


# ---- What is refused, and what depends on nothing --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1e-9, 1 + 1e-9, np.nan, np.inf])
def test_pixels_outside_the_range_are_never_drawn_from(bad: float) -> None:
    with pytest.raises(DataInvalid, match=r"\[0, 1\]"):
        release_privunit(np.array([[0.5, bad]]), best_cap(1.0, 16), seeded(0))


def test_a_cap_for_images_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 64 values as the cap has, found 16"):
        release_privunit(ONE[None], best_cap(EPSILON, 64), seeded(0))


def test_a_black_image_and_one_almost_black_have_directions_too() -> None:
    pixels_ND = np.zeros((3, SIZE))
    pixels_ND[1, 3], pixels_ND[2, :2] = 1e-300, 5e-324
    u_ND = directions(pixels_ND)
    np.testing.assert_allclose(u_ND[0], 0.25)
    np.testing.assert_array_equal(u_ND[1], np.eye(SIZE)[3])
    np.testing.assert_allclose(u_ND[2, :2], math.sqrt(0.5))
    np.testing.assert_allclose(np.linalg.norm(u_ND, axis=1), 1, rtol=1e-15)


def test_only_the_direction_of_an_image_counts() -> None:
    bright, dark = (
        release_privunit(factor * ONE[None], CAP, seeded(15), np.random.default_rng(15).bytes) for factor in (1, 2**-7)
    )
    np.testing.assert_array_equal(bright, dark)


def test_a_direction_that_is_not_of_length_one_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privunit, "directions", lambda pixels_ND: 1.001 * directions(pixels_ND))
    with pytest.raises(PrivacyRefusal, match="nothing left"):
        release_privunit(ONE[None], CAP, seeded(16))


def test_normals_that_fail_leave_nothing() -> None:
    with np.errstate(all="ignore"), pytest.raises(PrivacyRefusal, match="nothing left"):
        release_privunit(ONE[None], CAP, np.zeros)


def test_the_grid_holds_every_direction_and_depends_on_nothing() -> None:
    pixels_ND = np.eye(SIZE)
    cells_ND = release_privunit_on_grid(pixels_ND, np.arange(SIZE), cap=best_cap(100.0, SIZE), normals=seeded(17))
    assert cells_ND.dtype == np.int16
    assert np.abs(np.linalg.norm(cells_ND * STEP, axis=1) - 1).max() < STEP * math.sqrt(SIZE)
    assert np.iinfo(np.int16).max >= 1 / STEP
    assert math.log2(STEP) == int(math.log2(STEP))


def test_a_record_named_twice_is_not_released() -> None:
    with pytest.raises(ValueError, match="found one twice"):
        release_privunit_on_grid(np.eye(SIZE), np.array([0, 0]), cap=CAP, normals=seeded(0))


def test_batches_are_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "BATCH_VALUES", 2 * SIZE)
    cells_ND = release_privunit_on_grid(np.tile(ONE, (9, 1)), np.arange(9), cap=CAP, normals=seeded(18))
    assert len(np.unique(cells_ND, axis=0)) == 9


def test_nothing_of_the_mechanism_is_a_seed() -> None:
    for function in (release_privunit_on_grid, release_privunit, draw_heights):
        assert "seed" not in inspect.signature(function).parameters
