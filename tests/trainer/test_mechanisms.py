"""The mechanisms under attack: the best possible membership test succeeds exactly as often as was promised.

Scores are log-likelihood ratios scaled to noise 1 by the *promised* noise. `violations` is the one judge; every mutant
(noise 10 % too small, no clip, a forgotten √2, noise used twice) has to stand before it and lose.
"""

import inspect
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from feddiff_protocol import accountant
from feddiff_protocol.errors import DataInvalid, PrivacyRefusal
from feddiff_trainer import mechanisms
from feddiff_trainer.mechanisms import (
    Summary,
    centres,
    clip_l2,
    pack_symmetric,
    release_gaussian,
    release_gaussian_on_grid,
    release_summary,
    shuffled_order,
)
from feddiff_trainer.noise import Normals, from_grid, grid_step
from feddiff_trainer.pooling import unpacked
from feddiff_trainer.records import Records

NUM_TRIALS = 200_000
FPR = 0.01
CONFIDENCE = 1 - 1e-6  # seeds are fixed: an interval this wide is met by right code whatever the seed


def seeded(seed: int) -> Normals:
    return np.random.default_rng(seed).standard_normal


# ---- The judge -----------------------------------------------------------------------------------------------------


def violations(out: np.ndarray, inside: np.ndarray, mu: float, *, at_most: bool = False) -> list[str]:
    """Where the attack with these scores differs from μ: AUC by independent pairs, TPR at the measured 1 % FPR.

    Intervals are Clopper–Pearson's. The threshold is measured too, so its true FPR is known up to an interval, and the
    TPR may lie within what both intervals allow. at_most: only an attack that is too good counts.
    """
    found = []
    for name, wins, low, high in (
        ("auc", inside > out, *[stats.norm.cdf(mu / math.sqrt(2))] * 2),
        ("tpr", inside > np.quantile(out, 1 - FPR), *_tpr_range(mu, len(out))),
        ("fpr of the promised threshold", out > stats.norm.isf(FPR), FPR, FPR),
    ):
        interval = stats.binomtest(int(wins.sum()), len(wins)).proportion_ci(CONFIDENCE, "exact")
        if interval.low > high or (interval.high < low and not at_most):
            found.append(f"{name}: {wins.mean():.4f} for {low:.4f}..{high:.4f}")
    return found


def _tpr_range(mu: float, num_trials: int) -> list[float]:
    false_positives = stats.binomtest(round(FPR * num_trials), num_trials).proportion_ci(CONFIDENCE, "exact")
    return [float(stats.norm.cdf(mu + stats.norm.ppf(f))) for f in false_positives]


def scores(released_ND: np.ndarray, x_D: np.ndarray, other_D: np.ndarray, std: float) -> np.ndarray:
    """⟨released - x, x' - x⟩ / (std·‖x' - x‖): N(0, 1) under x, N(‖x' - x‖/std, 1) under x'."""
    direction_D = (other_D - x_D) / np.linalg.norm(other_D - x_D)
    return (released_ND - x_D) @ direction_D / std


# ---- gaussian ------------------------------------------------------------------------------------------------------

ALPHA, MU = 0.3, 2.0
CLIP = 1.5
Release = Callable[..., np.ndarray]


def attack_gaussian(
    x_D: np.ndarray, other_D: np.ndarray, *, non_negative: bool, s: float, normals: Normals, release: Release
) -> tuple[np.ndarray, np.ndarray]:
    """Scores under x and under x', all trials through the real function; images are given in [0, 1] units."""
    released = [
        release(
            np.tile(image_D, (NUM_TRIALS, 1)),
            clip_norm=CLIP,
            non_negative=non_negative,
            alpha=ALPHA,
            s=s,
            normals=normals,
        )
        for image_D in (x_D, other_D)
    ]
    clean = [expected_image(image_D, non_negative) for image_D in (x_D, other_D)]
    out, inside = (scores(r_ND, ALPHA * clean[0], ALPHA * clean[1], promised_s(non_negative)) for r_ND in released)
    return out, inside


def expected_image(pixels_D: np.ndarray, non_negative: bool) -> np.ndarray:
    """An oracle of the clip for one image, written the long way."""
    return 2 * clipped(pixels_D, CLIP) - 1 if non_negative else clipped(2 * pixels_D - 1, CLIP)


def clipped(v_D: np.ndarray, clip_norm: float) -> np.ndarray:
    return v_D * min(1.0, clip_norm / max(float(np.linalg.norm(v_D)), 1e-300))


def promised_s(non_negative: bool) -> float:
    """The noise for which the worst pair lies MU apart: 2√2·C·α/s, or 2·C·α/s."""
    return ALPHA * (2 * math.sqrt(2) if non_negative else 2.0) * CLIP / MU


ORTHOGONAL = np.array([1, 1, 1, 0, 0, 0.0]), np.array([0, 0, 0, 1, 1, 1.0])  # norm √3 > C: clipped
OPPOSITE = np.array([1, 0, 1.0, 0]), np.array([0, 1, 0, 1.0])  # ±1 in [-1, 1] units: norm 2 > C
WORST = [pytest.param(True, ORTHOGONAL, id="orthogonal, ≥ 0"), pytest.param(False, OPPOSITE, id="opposite, any sign")]


@pytest.mark.parametrize(("non_negative", "pair"), WORST)
def test_attack_on_a_noised_image_meets_the_promise_at_its_worst_pair(
    non_negative: bool, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    attack = attack_gaussian(
        *pair, non_negative=non_negative, s=promised_s(non_negative), normals=seeded(1), release=release_gaussian
    )
    assert violations(*attack, MU) == []


def test_the_accountant_and_these_tests_agree_on_what_the_noise_buys() -> None:
    for non_negative in (True, False):
        stretch = 2 if non_negative else 1  # a clip in [0, 1] units is stretched by the map to [-1, 1]
        sensitivity = stretch * accountant.gaussian_sensitivity(CLIP, non_negative=non_negative)
        assert sensitivity * ALPHA / promised_s(non_negative) == pytest.approx(MU, rel=1e-12)
    assert accountant.attack_auc(MU) == pytest.approx(stats.norm.cdf(MU / math.sqrt(2)), rel=1e-12)
    assert accountant.attack_tpr(MU, FPR) == pytest.approx(stats.norm.cdf(MU + stats.norm.ppf(FPR)), rel=1e-9)


def unclipped(pixels_ND: np.ndarray, **arguments: object) -> np.ndarray:
    return release_gaussian(pixels_ND, **{**arguments, "clip_norm": 1e9})  # type: ignore[arg-type]


def one_noise_for_all(normals: Normals) -> Normals:
    return lambda shape: np.broadcast_to(normals((1, *shape[1:])), shape).copy()


@pytest.mark.parametrize(("non_negative", "pair"), WORST)
@pytest.mark.parametrize(
    ("factor", "release", "reuse"),
    [
        (0.9, release_gaussian, False),
        (1.0, unclipped, False),
        (1 / math.sqrt(2), release_gaussian, False),
        (1.0, release_gaussian, True),
    ],
    ids=["noise 10 % too small", "clip skipped", "√2 forgotten in the sensitivity", "one noise for all records"],
)
def test_the_attack_exposes_a_broken_noised_image(
    non_negative: bool, pair: tuple[np.ndarray, np.ndarray], factor: float, release: Release, reuse: bool
) -> None:
    normals = one_noise_for_all(seeded(2)) if reuse else seeded(2)
    s = factor * promised_s(non_negative)
    attack = attack_gaussian(*pair, non_negative=non_negative, s=s, normals=normals, release=release)
    assert violations(*attack, MU)


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize("other", [(0.5, 0.25, 0, 0), (0.5, 0.5, 0.5, 0.5), (0.2, 0.9, 1, 1)])
def test_other_pairs_are_as_far_apart_as_their_clipped_images(non_negative: bool, other: tuple[float, ...]) -> None:
    x_D, other_D = np.array([0.5, 0.5, 0, 0.0]), np.array(other)
    distance = np.linalg.norm(expected_image(x_D, non_negative) - expected_image(other_D, non_negative))
    mu = ALPHA * float(distance) / promised_s(non_negative)
    attack = attack_gaussian(
        x_D, other_D, non_negative=non_negative, s=promised_s(non_negative), normals=seeded(3), release=release_gaussian
    )
    assert mu < MU
    assert violations(*attack, mu) == []
    assert violations(*attack, MU, at_most=True) == []


# ---- summary -------------------------------------------------------------------------------------------------------

MEAN_CLIP, MOMENT_CLIP, CENTRE, MEAN_SHARE = 0.8, 0.5, 0.5, 0.4
# (v, v') orthogonal, longer than C1; (u, u') = images minus the centre, orthogonal, longer than C2
MEAN_WORST = np.array([0.9, 0.0]), np.array([0.0, 1.0])
MOMENT_WORST = np.array([1.0, 0.5, 0.9]), np.array([0.5, 1.0, 0.5])


def summary_noise() -> tuple[float, float]:
    """(s1, s2) so that Δ1²/s1² is MEAN_SHARE of MU², 2·C2⁴/s2² the rest; written out, not the accountant's."""
    mean_std = math.sqrt(2) * MEAN_CLIP / (MU * math.sqrt(MEAN_SHARE))
    return mean_std, math.sqrt(2) * MOMENT_CLIP**2 / (MU * math.sqrt(1 - MEAN_SHARE))


MEAN_STD, MOMENT_STD = summary_noise()
MEAN_MU, MOMENT_MU = MU * math.sqrt(MEAN_SHARE), MU * math.sqrt(1 - MEAN_SHARE)


def summarise(images_ND: np.ndarray, labels_N: np.ndarray, normals: Normals, **changes: float) -> Summary:
    arguments = {
        "mean_clip_norm": MEAN_CLIP,
        "moment_clip_norm": MOMENT_CLIP,
        "centre": CENTRE,
        "mean_std": MEAN_STD,
        "moment_std": MOMENT_STD,
    }
    return release_summary(
        images_ND,
        labels_N,
        num_classes=int(labels_N.max()) + 1,
        normals=normals,
        **{**arguments, **changes},  # type: ignore[arg-type]
    )


def one_record_per_class(x_D: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(x_D, (num_classes, 1)), np.arange(num_classes)


def attack_summary(
    part: str, x_D: np.ndarray, other_D: np.ndarray, normals: Normals, num_trials: int, **changes: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores on S1 ("mean") or S2 ("moment") alone; every class is one trial with one record."""
    released = [summarise(*one_record_per_class(image_D, num_trials), normals, **changes) for image_D in (x_D, other_D)]
    if part == "mean":
        clean, std = [clipped(image_D, MEAN_CLIP) for image_D in (x_D, other_D)], MEAN_STD
        parts = [summary.mean_sums_KD for summary in released]
    else:
        clean = [moment_of(clipped(image_D - CENTRE, MOMENT_CLIP)) for image_D in (x_D, other_D)]
        std, parts = MOMENT_STD, [summary.moment_sums_KM for summary in released]
    out, inside = (scores(values_KD, clean[0], clean[1], std) for values_KD in parts)
    return out, inside


def moment_of(u_D: np.ndarray) -> np.ndarray:
    """uuᵀ as a vector whose Euclidean norm is the matrix's Frobenius norm, written the long way."""
    size = len(u_D)
    return np.array([u_D[i] * u_D[j] * (1.0 if i == j else math.sqrt(2)) for i in range(size) for j in range(i, size)])


PARTS = [pytest.param("mean", MEAN_WORST, MEAN_MU, id="S1"), pytest.param("moment", MOMENT_WORST, MOMENT_MU, id="S2")]


@pytest.mark.parametrize(("part", "pair", "mu"), PARTS)
def test_attack_on_a_summary_meets_its_share_of_the_promise_at_its_worst_pair(
    part: str, pair: tuple[np.ndarray, np.ndarray], mu: float
) -> None:
    assert violations(*attack_summary(part, *pair, seeded(4), NUM_TRIALS // 2), mu) == []


SUMMARY_MUTANTS = {
    "noise 10 % too small": {"mean_std": 0.9 * MEAN_STD, "moment_std": 0.9 * MOMENT_STD},
    "clip skipped": {"mean_clip_norm": 1e3, "moment_clip_norm": 1e3},
    "√2 forgotten in the sensitivity": {"mean_std": MEAN_STD / math.sqrt(2), "moment_std": MOMENT_STD / math.sqrt(2)},
    "one noise for all classes": {},
}


@pytest.mark.parametrize(("part", "pair", "mu"), PARTS)
@pytest.mark.parametrize("mutant", SUMMARY_MUTANTS)
def test_the_attack_exposes_a_broken_summary(
    part: str, pair: tuple[np.ndarray, np.ndarray], mu: float, mutant: str
) -> None:
    normals = one_noise_for_all(seeded(5)) if mutant.startswith("one noise") else seeded(5)
    assert violations(*attack_summary(part, *pair, normals, NUM_TRIALS // 5, **SUMMARY_MUTANTS[mutant]), mu)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_attack_exposes_a_second_moment_that_is_packed_with_another_scale(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """√2 off the diagonal is what makes the packed norm the matrix's."""

    def packed(S_DD: np.ndarray) -> np.ndarray:
        rows, columns = np.triu_indices(len(S_DD))
        return S_DD[rows, columns] * np.where(rows == columns, 1.0, scale)

    monkeypatch.setattr(mechanisms, "pack_symmetric", packed)
    assert violations(*attack_summary("moment", *MOMENT_WORST, seeded(5), NUM_TRIALS // 10), MOMENT_MU)


def test_the_accountant_draws_the_noise_that_these_tests_attack() -> None:
    sensitivity = accountant.gaussian_sensitivity(MEAN_CLIP, non_negative=True)
    noise = accountant.summary_noise(MU, sensitivity, MOMENT_CLIP, MEAN_SHARE)
    assert (noise.mean_std, noise.moment_std) == pytest.approx((MEAN_STD, MOMENT_STD), rel=1e-12)


PAIRS = {
    "nearly equal": ((0.5, 0.7), (0.5, 0.75)),
    "opposite about the centre": ((0.8, 0.9), (0.2, 0.1)),
    "orthogonal about the centre": ((0.9, 0.5), (0.5, 0.9)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_any_pair_in_a_summary_is_as_far_apart_as_its_own_sums(name: str) -> None:
    x_D, other_D = (np.array(image) for image in PAIRS[name])
    summaries = [
        summarise(*one_record_per_class(image_D, NUM_TRIALS // 4), seeded(6 + i))
        for i, image_D in enumerate((x_D, other_D))
    ]
    clean = [joint_scaled(image_D, np.full(2, CENTRE)) for image_D in (x_D, other_D)]
    released = [np.hstack([s.mean_sums_KD / MEAN_STD, s.moment_sums_KM / MOMENT_STD]) for s in summaries]
    out, inside = (scores(values_KD, clean[0], clean[1], 1.0) for values_KD in released)
    mu = float(np.linalg.norm(clean[0] - clean[1]))
    assert mu < MU
    assert violations(out, inside, mu) == []


def test_records_that_are_equal_after_the_clip_cannot_be_told_apart() -> None:
    x_D, other_D = np.array([0.5, 0.5]), np.array([0.5, 0.5])
    one, other = (summarise(*one_record_per_class(image_D, 100), seeded(7)) for image_D in (x_D, other_D))
    np.testing.assert_array_equal(one.mean_sums_KD, other.mean_sums_KD)
    np.testing.assert_array_equal(one.moment_sums_KM, other.moment_sums_KM)


def joint_scaled(x_D: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """What one record adds to (S1/s1, S2/s2), given the centre."""
    u_D = clipped(x_D - centre_D, MOMENT_CLIP)
    return np.hstack([clipped(x_D, MEAN_CLIP) / MEAN_STD, moment_of(u_D) / MOMENT_STD])


def test_attack_that_follows_the_noisy_centre_stays_within_the_promise() -> None:
    """Twenty records a class: the centre is S1/n, drawn anew in each trial; the attacker knows all other records."""
    num_classes, others_nD = 10_000, np.tile([0.3, 0.4], (19, 1))
    x_D, other_D = np.array([0.95, 0.1]), np.array([0.1, 0.95])
    statistics = []
    for seed, image_D in enumerate((x_D, other_D)):
        images_ND = np.tile(np.vstack([others_nD, image_D]), (num_classes, 1))
        summary = summarise(images_ND, np.repeat(np.arange(num_classes), 20), seeded(8 + seed))
        statistics.append(adaptive_scores(summary, others_nD, x_D, other_D))
    (out, _), (inside, mus_K) = statistics
    assert mus_K.max() <= MU
    assert violations(out, inside, float(mus_K.max()), at_most=True) == []
    assert violations(out, inside, 0.8 * float(mus_K.min()), at_most=True)  # nor is the attack weak


def adaptive_scores(
    summary: Summary, others_nD: np.ndarray, x_D: np.ndarray, other_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood ratios scaled to noise 1, and each trial's own μ, about the centres that the release implies."""
    centres_KD = centres(summary.mean_sums_KD, summary.counts_K, CENTRE)
    u, u_other, u_n = (clip_l2(v - centres_KD, MOMENT_CLIP) for v in (x_D, other_D, others_nD[0]))
    v, v_other = clipped(x_D, MEAN_CLIP), clipped(other_D, MEAN_CLIP)
    base_KM = len(others_nD) * _moments(u_n) + _moments(u)
    base_D = len(others_nD) * clipped(others_nD[0], MEAN_CLIP) + v
    step_KD = np.hstack(
        [np.tile((v_other - v) / MEAN_STD, (len(u), 1)), (_moments(u_other) - _moments(u)) / MOMENT_STD]
    )
    rest_KD = np.hstack([(summary.mean_sums_KD - base_D) / MEAN_STD, (summary.moment_sums_KM - base_KM) / MOMENT_STD])
    mus_K = np.linalg.norm(step_KD, axis=1)
    return (rest_KD * step_KD).sum(axis=1) / mus_K, mus_K


def _moments(u_KD: np.ndarray) -> np.ndarray:
    return np.array([moment_of(u_D) for u_D in u_KD])


# ---- No pair exceeds the charge ------------------------------------------------------------------------------------


def pair_mu_squared(x_ND: np.ndarray, other_ND: np.ndarray, centre_ND: np.ndarray) -> np.ndarray:
    """‖v - v'‖²/s1² + ‖uuᵀ - u'u'ᵀ‖²/s2² of each pair, through the real clip and packing."""
    v_ND, v_other_ND = clip_l2(x_ND, MEAN_CLIP), clip_l2(other_ND, MEAN_CLIP)
    u_ND, u_other_ND = clip_l2(x_ND - centre_ND, MOMENT_CLIP), clip_l2(other_ND - centre_ND, MOMENT_CLIP)
    moments = [np.array([pack_symmetric(np.outer(u, u)) for u in u_]) for u_ in (u_ND, u_other_ND)]
    mean_part = ((v_ND - v_other_ND) ** 2).sum(axis=1) / MEAN_STD**2
    return mean_part + ((moments[0] - moments[1]) ** 2).sum(axis=1) / MOMENT_STD**2


def largest_found(size: int) -> float:
    """Random starts, then local search: images of any norm, about any centre that a release could produce."""
    generator = np.random.default_rng(size)
    starts = generator.uniform(size=(400, 3 * size))
    starts[:200] = np.round(starts[:200])  # half of them in corners
    found = pair_mu_squared(*np.split(starts, 3, axis=1))
    climbs = [
        optimize.minimize(
            lambda p: -pair_mu_squared(*np.split(p[None], 3, axis=1))[0], start, bounds=[(0, 1)] * (3 * size)
        )
        for start in [*starts[np.argsort(found)[-3:]], *starts[-3:]]
    ]
    return max(float(found.max()), *(-float(climb.fun) for climb in climbs))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_no_pair_of_images_about_any_centre_exceeds_the_charge_and_one_reaches_it(size: int) -> None:
    found = largest_found(size)
    assert found <= MU**2 * (1 + 1e-9)
    assert size == 1 or found >= MU**2 * (1 - 1e-6)


@pytest.mark.parametrize("forgotten", ["mean", "moment"])
def test_the_search_exposes_a_sensitivity_without_its_factor(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{forgotten.upper()}_STD"
    monkeypatch.setitem(globals(), name, globals()[name] / math.sqrt(2))
    assert largest_found(2) > 1.2 * MU**2


def wide_search(size: int) -> float:
    """The largest μ² of 10⁵ pairs: every pattern of signs about the centre on either side, norms from nothing to beyond
    the clips, unequal; then of children of the worst ones, generation after generation."""
    generator = np.random.default_rng(100 + size)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=size)))
    patterns = np.array(list(itertools.product(range(len(signs)), repeat=2)))
    each = -(-100_000 // len(patterns))
    sign_ND, other_sign_ND = signs[np.repeat(patterns, each, axis=0)].swapaxes(0, 1)
    centre_ND = generator.beta(0.5, 0.5, size=sign_ND.shape)
    pair = [image_from(centre_ND, sign, generator) for sign in (sign_ND, other_sign_ND)]
    population = np.concatenate([*pair, centre_ND], axis=1)
    found = pairs_mu_squared(population)
    for generation in range(12):
        worst = np.repeat(population[np.argsort(found)[-200:]], 20, axis=0)
        children = np.clip(worst + 0.3 * 0.6**generation * generator.normal(size=worst.shape), 0, 1)
        population, found = np.concatenate([population, children]), np.append(found, pairs_mu_squared(children))
    return float(found.max())


def image_from(centre_ND: np.ndarray, sign_ND: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Images in [0, 1] whose values lie above or below the centre as the signs say, by any share of the room there."""
    room_ND = np.where(sign_ND > 0, 1 - centre_ND, centre_ND)
    length_N1 = generator.uniform(size=(len(sign_ND), 1)) ** 2
    return np.clip(centre_ND + sign_ND * room_ND * length_N1 * generator.beta(0.5, 0.5, size=sign_ND.shape), 0, 1)


def pairs_mu_squared(population: np.ndarray) -> np.ndarray:
    """`pair_mu_squared` for many pairs, ‖uuᵀ - u'u'ᵀ‖² as ‖u‖⁴ + ‖u'‖⁴ - 2⟨u,u'⟩²."""
    x_ND, other_ND, centre_ND = np.split(population, 3, axis=1)
    v_ND = mechanisms.clip_l2(x_ND, MEAN_CLIP) - mechanisms.clip_l2(other_ND, MEAN_CLIP)
    u_ND, w_ND = (mechanisms.clip_l2(image_ND - centre_ND, MOMENT_CLIP) for image_ND in (x_ND, other_ND))
    moment_N = (u_ND**2).sum(1) ** 2 + (w_ND**2).sum(1) ** 2 - 2 * (u_ND * w_ND).sum(1) ** 2
    return np.asarray((v_ND**2).sum(1) / MEAN_STD**2 + moment_N / MOMENT_STD**2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_pair_of_a_hundred_thousand_of_any_norms_and_signs_exceeds_the_charge(size: int) -> None:
    found = wide_search(size)
    assert found <= MU**2 * (1 + 1e-9)
    assert size == 1 or found >= 0.98 * MU**2


def test_many_pairs_at_once_lie_as_far_apart_as_each_alone() -> None:
    population = np.random.default_rng(9).uniform(size=(50, 12))
    expected = pair_mu_squared(*np.split(population, 3, axis=1))
    np.testing.assert_allclose(pairs_mu_squared(population), expected, rtol=1e-9)


SEARCH_MUTANTS = {
    "noise 10 % too small": {"MEAN_STD": 0.9 * MEAN_STD, "MOMENT_STD": 0.9 * MOMENT_STD},
    "noise for the norm, not its square": {"MOMENT_CLIP": 1.2, "MOMENT_STD": MOMENT_STD * 1.2 / MOMENT_CLIP**2},
    "second moment of one record, not two": {"MOMENT_STD": MOMENT_STD / math.sqrt(2)},
    "clip skipped": {"MEAN_CLIP": 1e3, "MOMENT_CLIP": 1e3},
}


@pytest.mark.parametrize("mutant", SEARCH_MUTANTS)
def test_the_wide_search_exposes_a_mechanism_that_charges_too_little(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SEARCH_MUTANTS[mutant].items():
        monkeypatch.setitem(globals(), name, value)
    assert wide_search(3) > 1.1 * MU**2


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_second_moments_of_any_signs_and_norms_stay_within_their_sensitivity(size: int) -> None:
    generator = np.random.default_rng(10 + size)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=size)))
    bound = math.sqrt(2) * MOMENT_CLIP**2
    for sign_D, other_sign_D in itertools.product(signs, signs):
        lengths = generator.uniform(0, 2 * MOMENT_CLIP, size=(2, 50, 1))
        u, other = (
            clip_l2(length * np.abs(generator.normal(size=(50, size))) * sign, MOMENT_CLIP)
            for length, sign in zip(lengths, (sign_D, other_sign_D), strict=True)
        )
        for a, b in zip(u, other, strict=True):
            assert np.linalg.norm(np.outer(a, a) - np.outer(b, b)) <= bound * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=8, max_size=8), st.floats(1e-3, 10))
def test_sums_of_pixels_stay_within_their_sensitivity(values: list[float], clip_norm: float) -> None:
    x, other = clip_l2(np.array(values).reshape(2, 4), clip_norm)
    assert np.linalg.norm(x - other) <= math.sqrt(2) * clip_norm * (1 + 1e-12)


# ---- The clip ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 64).flatmap(lambda d: st.lists(st.floats(-1e6, 1e6), min_size=d, max_size=d)),
    st.floats(1e-6, 1e6),
)
def test_clipped_norm_is_never_above_the_clip_norm(values: list[float], clip_norm: float) -> None:
    v_ND = np.array([values])
    clipped_ND = clip_l2(v_ND, clip_norm)
    exact = math.fsum(v * v for v in clipped_ND[0].tolist())
    assert exact <= clip_norm * clip_norm * (1 + 2e-15)
    expected = v_ND * min(1.0, clip_norm / max(float(np.linalg.norm(v_ND)), 1e-300))
    np.testing.assert_allclose(clipped_ND, expected, rtol=1e-12, atol=1e-300)


def test_rows_below_the_clip_norm_come_back_unchanged_in_a_fresh_array() -> None:
    v_ND = np.array([[0.1, 0.2], [0.0, 0.0]])
    clipped_ND = clip_l2(v_ND, 1.0)
    np.testing.assert_array_equal(clipped_ND, v_ND)
    assert not np.shares_memory(clipped_ND, v_ND)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_what_has_no_finite_norm_is_refused(bad: float) -> None:
    with np.errstate(over="ignore"), pytest.raises(DataInvalid, match="record 1: expected finite"):
        clip_l2(np.array([[0.0, 1.0], [bad, 0.0]]), 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_must_be_positive_and_finite(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clip_l2(np.zeros((1, 2)), clip_norm)


def test_a_clip_that_fails_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "clip_l2", clip_with_wrong_norms)
    with pytest.raises(PrivacyRefusal, match="nothing left"):
        release_gaussian(np.full((1, 4), 0.9), clip_norm=1.0, non_negative=True, alpha=1.0, s=1.0, normals=seeded(0))


def clip_with_wrong_norms(v_ND: np.ndarray, clip_norm: float) -> np.ndarray:
    mechanisms._check_clipped(v_ND, clip_norm)
    return v_ND


# ---- What each mechanism returns -----------------------------------------------------------------------------------


def no_noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


@pytest.mark.parametrize("non_negative", [True, False])
def test_without_noise_a_released_image_is_the_clipped_one_times_alpha(non_negative: bool) -> None:
    pixels_ND = np.random.default_rng(11).uniform(size=(20, 6))
    released_ND = release_gaussian(
        pixels_ND, clip_norm=CLIP, non_negative=non_negative, alpha=ALPHA, s=1.0, normals=no_noise
    )
    expected_ND = [ALPHA * expected_image(pixels_D, non_negative) for pixels_D in pixels_ND]
    np.testing.assert_allclose(released_ND, expected_ND, atol=1e-14)


@pytest.mark.parametrize("bad", [-1e-9, 1 + 1e-9, np.nan, np.inf])
def test_pixels_outside_the_range_are_never_noised(bad: float) -> None:
    pixels_ND = np.array([[0.5, bad]])
    with pytest.raises(DataInvalid, match=r"\[0, 1\]"):
        release_gaussian(pixels_ND, clip_norm=1.0, non_negative=True, alpha=1.0, s=1.0, normals=seeded(0))
    with pytest.raises(DataInvalid, match=r"\[0, 1\]"):
        summarise(pixels_ND, np.zeros(1, np.int64), seeded(0))


@pytest.mark.parametrize("s", [0.0, -1.0, math.nan])
def test_no_release_without_noise(s: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        release_gaussian(np.zeros((1, 2)), clip_norm=1.0, non_negative=True, alpha=1.0, s=s, normals=seeded(0))
    with pytest.raises(ValueError, match="positive finite"):
        summarise(np.zeros((1, 2)), np.zeros(1, np.int64), seeded(0), moment_std=s)


def test_batches_release_every_record_once_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "BATCH_VALUES", 12)
    pixels = np.random.default_rng(12).integers(0, 256, (10, 1, 2, 2), dtype=np.uint8)
    records, order_N = Records(pixels, np.zeros(10, np.int64)), shuffled_order(10)
    arguments = {"clip_norm": CLIP, "non_negative": True, "alpha": ALPHA, "s": 0.5}
    cells_ND = release_gaussian_on_grid(records, order_N, normals=seeded(13), **arguments)  # type: ignore[arg-type]
    whole_ND = release_gaussian(records[order_N], normals=seeded(13), **arguments)  # type: ignore[arg-type]
    assert cells_ND.dtype == np.int16
    assert np.abs(from_grid(cells_ND, grid_step(0.5)) - whole_ND).max() <= grid_step(0.5) / 2


def test_a_record_named_twice_is_not_released() -> None:
    with pytest.raises(ValueError, match="found one twice"):
        release_gaussian_on_grid(
            np.zeros((2, 2)),
            np.array([0, 0]),
            clip_norm=1.0,
            non_negative=True,
            alpha=1.0,
            s=1.0,
            normals=seeded(0),
        )


def test_order_is_a_fresh_permutation_without_bias() -> None:
    entropy = np.random.default_rng(14).bytes
    orders = np.array([shuffled_order(4, entropy) for _ in range(24_000)])
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-6
    assert sorted(shuffled_order(1000)) == list(range(1000))
    assert list(shuffled_order(1000)) != list(shuffled_order(1000))
    assert "seed" not in inspect.signature(shuffled_order).parameters


def test_without_noise_a_summary_is_the_classes_sums_and_centred_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "SUMMARY_ROWS", 7)  # classes straddle batches
    generator = np.random.default_rng(15)
    images_ND, labels_N = generator.uniform(size=(60, 3)), generator.permutation([0] * 30 + [2] * 19 + [3] * 11)
    summary = summarise(images_ND, labels_N, no_noise)
    np.testing.assert_array_equal(summary.counts_K, [30, 0, 19, 11])
    for k in (0, 2, 3):
        own_nD = images_ND[labels_N == k]
        expected_D = sum(clipped(x_D, MEAN_CLIP) for x_D in own_nD)
        centre_D = np.clip(summary.mean_sums_KD[k] / 30, 0, 1) if k == 0 else np.full(3, CENTRE)
        expected_M = sum(moment_of(clipped(x_D - centre_D, MOMENT_CLIP)) for x_D in own_nD)
        np.testing.assert_allclose(summary.mean_sums_KD[k], expected_D, atol=grid_step(MEAN_STD))
        np.testing.assert_allclose(summary.moment_sums_KM[k], expected_M, atol=grid_step(MOMENT_STD))
    assert not summary.mean_sums_KD[1].any() and not summary.moment_sums_KM[1].any()


def test_the_centre_comes_from_the_released_numbers_alone() -> None:
    """Anybody can redo it from what was written: S2 depends on the records only through u about that centre."""
    images_ND, labels_N = np.random.default_rng(16).uniform(size=(25, 3)), np.zeros(25, np.int64)
    summary = summarise(images_ND, labels_N, first_call_only(seeded(17)))
    centre_D = centres(summary.mean_sums_KD, summary.counts_K, CENTRE)[0]
    unrounded = summary.mean_sums_KD / grid_step(MEAN_STD)
    np.testing.assert_array_equal(unrounded, np.rint(unrounded))
    assert np.abs(centre_D - images_ND.mean(axis=0)).max() > 0.01  # the noise is in it
    expected_M = sum(moment_of(clipped(x_D - centre_D, MOMENT_CLIP)) for x_D in images_ND)
    np.testing.assert_allclose(summary.moment_sums_KM[0], expected_M, atol=0.51 * grid_step(MOMENT_STD))


def first_call_only(normals: Normals) -> Normals:
    calls = itertools.count()
    return lambda shape: normals(shape) if next(calls) == 0 else np.zeros(shape)


def test_sums_of_a_large_class_do_not_end_at_the_edge_of_the_grid() -> None:
    images_ND = np.full((60_000, 1), 0.5)
    summary = summarise(images_ND, np.zeros(60_000, np.int64), no_noise, mean_std=0.1, moment_std=0.1)
    assert summary.mean_sums_KD[0, 0] == pytest.approx(30_000, abs=1e-3)


@pytest.mark.parametrize("labels", [[0, -1], [0, 5], []])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(DataInvalid, match="labels: expected"):
        release_summary(
            np.zeros((len(labels), 2)),
            np.array(labels, np.int64),
            num_classes=5,
            mean_clip_norm=1.0,
            moment_clip_norm=1.0,
            centre=0.5,
            mean_std=1.0,
            moment_std=1.0,
            normals=seeded(0),
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_packing_keeps_distances_and_comes_back(size: int, seed: int) -> None:
    matrix_DD = np.random.default_rng(seed).normal(size=(size, size))
    matrix_DD = matrix_DD + matrix_DD.T
    values_M = pack_symmetric(matrix_DD)
    assert values_M.shape == (size * (size + 1) // 2,)
    assert np.linalg.norm(values_M) == pytest.approx(np.linalg.norm(matrix_DD), rel=1e-12)
    np.testing.assert_allclose(unpacked(torch.from_numpy(values_M), size).numpy(), matrix_DD, rtol=1e-14)
