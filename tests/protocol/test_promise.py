"""What a job promises: the mechanisms' fields become the noise that the accountant's formulas demand."""

import math

import pytest

from feddiff_protocol import accountant
from feddiff_protocol.api import DiffusionSpec, ImageSpec, PrivacySpec
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.promise import check_size, promise_of, schedule_of

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


def test_an_unreachable_promise_says_what_would_reach_it() -> None:
    with pytest.raises(SpecInvalid, match=r"spec\.privacy\.epsilon"):
        promise_of(gaussian(epsilon="0.01", clipNorm="1000"), LINEAR)


def test_a_split_beyond_the_last_step_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="splitSigma"):
        promise_of(summary(), DiffusionSpec.model_validate({"splitSigma": "1000"}))


def test_a_summary_that_would_not_fit_into_memory_is_refused() -> None:
    check_size(summary(), ImageSpec(channels=3, height=32, width=32), 10)
    with pytest.raises(SpecInvalid, match="smaller images"):
        check_size(summary(), ImageSpec(channels=3, height=512, width=512), 2)
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
