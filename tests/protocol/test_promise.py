"""What a job promises: the mechanisms' fields become the noise that the accountant's formulas demand."""

import math
from decimal import Decimal

import pytest

from feddiff_protocol import accountant
from feddiff_protocol.api import DiffusionSpec, FederatedDiffusionJobSpec, ImageSpec, PrivacySpec
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import (
    cap_of,
    check_size,
    promise_of,
    released_image,
    schedule_of,
    signal_to_noise_db,
)

LINEAR = DiffusionSpec()


def gaussian(**fields: str) -> PrivacySpec:
    return PrivacySpec.model_validate(
        {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "10", **fields}
    )


def summary(**fields: str) -> PrivacySpec:
    return PrivacySpec.model_validate(
        {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2", **fields}
    )


def test_the_papers_image_clip_of_ten_needs_split_675_exactly() -> None:
    promise = promise_of(gaussian(pixels="minusOneToOne"), LINEAR)
    assert promise.split_step == 675
    assert promise.step_mu is not None and promise.step_mu <= promise.mu
    assert promise.mu == pytest.approx(2.000446, abs=1e-6)


def test_the_split_is_the_first_step_that_suffices() -> None:
    promise = promise_of(gaussian(pixels="minusOneToOne"), LINEAR)
    earlier = schedule_of(LINEAR).sigma(promise.split_step - 1)
    assert 2 * 10 / earlier > promise.mu >= 2 * 10 / promise.split_sigma


def test_a_clip_in_zero_to_one_units_is_stretched_by_two_and_saves_root_two() -> None:
    promise = promise_of(gaussian(clipNorm="4.25"), LINEAR)
    needed = 2 * math.sqrt(2) * 4.25 / promise.mu
    assert promise.split_sigma >= needed
    assert schedule_of(LINEAR).sigma(promise.split_step - 1) < needed


def test_the_two_parts_of_a_summary_compose_to_what_is_charged() -> None:
    promise = promise_of(summary(), DiffusionSpec.model_validate({"splitSigma": "0.25"}))
    assert promise.mean_std is not None and promise.moment_std is not None
    mean_part = 2 * 4.25**2 / promise.mean_std**2
    moment_part = 2 * 2.0**4 / promise.moment_std**2
    charged = float(promise.charge.mu_squared)
    assert mean_part + moment_part == pytest.approx(charged, rel=1e-12)
    assert mean_part == pytest.approx(charged / 2, rel=1e-12)
    assert accountant.epsilon_of(math.sqrt(charged), 1e-5) <= 10 * (1 + 1e-9)


def test_the_split_of_a_summary_does_not_depend_on_epsilon() -> None:
    diffusion = DiffusionSpec.model_validate({"splitSigma": "0.25"})
    splits = {promise_of(summary(epsilon=epsilon), diffusion).split_step for epsilon in ("0.1", "10", "1000")}
    assert len(splits) == 1


def privunit(**fields: str) -> PrivacySpec:
    return PrivacySpec.model_validate({"mechanism": "privunit", "epsilon": "4", "clipNorm": "3", **fields})


SPLIT = DiffusionSpec.model_validate({"splitSigma": "0.25"})
IMAGE = ImageSpec(channels=1, height=8, width=8)


def test_privunit_charges_its_epsilon_and_no_delta() -> None:
    promise = promise_of(privunit(epsilon="4.00"), SPLIT)
    assert promise.charge == accountant.Charge(pure_epsilon=Decimal("4.00"))
    assert promise.mu is None and promise.mean_std is None
    assert promise.split_sigma == promise_of(summary(), SPLIT).split_sigma
    assert promise.attack_auc == pytest.approx(math.exp(4) / (1 + math.exp(4)))
    assert promise.attack_tpr(0.01) == pytest.approx(0.01 * math.exp(4))
    assert promise.attack_tpr(0.5) == pytest.approx(1 - 0.5 * math.exp(-4))


def test_the_attacks_on_gaussian_noise_are_the_accountants() -> None:
    promise = promise_of(summary(), SPLIT)
    assert promise.mu is not None
    assert promise.attack_auc == accountant.attack_auc(promise.mu)
    assert promise.attack_tpr(0.01) == accountant.attack_tpr(promise.mu, 0.01)


@pytest.mark.parametrize("delta", [{}, {"delta": "0"}, {"delta": "0.00"}])
def test_privunit_has_no_delta_or_zero(delta: dict[str, str]) -> None:
    assert privunit(**delta).delta_or_zero == 0


def test_a_cap_is_drawn_for_no_more_than_the_decimal_number() -> None:
    """0.1 as a double lies above 0.1; the cap is for the double below."""
    assert Decimal.from_float(0.1) > Decimal("0.1")
    assert cap_of(privunit(epsilon="0.1"), IMAGE) == best_cap(math.nextafter(0.1, 0), 64)


def test_signal_of_privunit_is_that_of_a_classes_mean() -> None:
    document = {
        "clients": [{"name": "a", "dataset": {"name": "scans"}}],
        "privacy": privunit().to_wire(),
        "diffusion": SPLIT.to_wire(),
    }
    spec = FederatedDiffusionJobSpec.model_validate(document)
    promise, noise = promise_of(spec.privacy, spec.diffusion), best_cap(4.0, 64).noise_std(3.0)
    expected = 10 * math.log10(3.0**2 / 64 / (noise**2 / 50))
    assert signal_to_noise_db(spec, promise, IMAGE, 50) == pytest.approx(expected)


def test_an_unreachable_promise_says_what_would_reach_it() -> None:
    with pytest.raises(SpecInvalid, match=r"spec\.privacy\.epsilon"):
        promise_of(gaussian(epsilon="0.01", clipNorm="1000"), LINEAR)


def test_a_split_beyond_the_last_step_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="splitSigma"):
        promise_of(summary(), DiffusionSpec.model_validate({"splitSigma": "1000"}))


def test_squares_have_to_divide_an_image() -> None:
    image = ImageSpec(channels=3, height=12, width=8)
    found = released_image(summary(blockSide=4), image)
    assert (found.channels, found.height, found.width) == (3, 3, 2)
    assert released_image(summary(), image) == image
    with pytest.raises(SpecInvalid, match="expected a divisor of the image's height 12 and width 8, found 3; change"):
        released_image(summary(blockSide=3), image)


def test_a_summary_that_would_not_fit_into_memory_is_refused() -> None:
    check_size(summary(), ImageSpec(channels=3, height=32, width=32), 10)
    with pytest.raises(SpecInvalid, match="smaller images"):
        check_size(summary(), ImageSpec(channels=3, height=512, width=512), 2)
    with pytest.raises(SpecInvalid, match="mechanism privunit, found"):
        check_size(privunit(), ImageSpec(channels=3, height=512, width=512), 2)
    check_size(summary(blockSide=16), ImageSpec(channels=3, height=512, width=512), 2)
    check_size(gaussian(), ImageSpec(channels=3, height=512, width=512), 2)


@pytest.mark.parametrize(
    "diffusion", [{"steps": 10_000, "betaStart": "0.1", "betaEnd": "0.9"}, {"betaStart": "1e-90", "betaEnd": "1e-80"}]
)
def test_a_schedule_beyond_float64_is_refused_in_words(diffusion: dict[str, object]) -> None:
    with pytest.raises(SpecInvalid, match="spec"):
        promise_of(gaussian(), DiffusionSpec.model_validate(diffusion))


def test_numbers_survive_their_way_through_json() -> None:
    privacy = gaussian(epsilon="1e1", clipNorm="1.50")
    assert PrivacySpec.model_validate(privacy.to_wire()) == privacy
