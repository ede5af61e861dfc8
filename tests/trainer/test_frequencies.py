"""The map that makes fine detail count more is the same for all records, and what it does can be undone."""

import numpy as np
import pytest

from feddiff_protocol.api import ImageSpec, PrivacySpec
from feddiff_trainer.frequencies import finest_waves, frequency_map, frequency_weighing

IMAGE = ImageSpec(channels=2, height=6, width=5)


def summary(power: str | None) -> PrivacySpec:
    said = {} if power is None else {"frequencyPower": power}
    common = {"epsilon": "10", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2"}
    return PrivacySpec.model_validate({"mechanism": "summary", **common, **said})


@pytest.mark.parametrize("power", [None, "0"])
def test_without_a_power_there_is_no_map(power: str | None) -> None:
    assert frequency_map(summary(power), IMAGE) is None


def test_a_wave_is_multiplied_by_a_power_of_its_frequency() -> None:
    map_DD = frequency_map(summary("0.5"), IMAGE)
    assert map_DD is not None
    flat_D, (across_D, down_D) = np.ones(60), finest_waves(IMAGE)
    factors = [float((map_DD @ wave_D / wave_D)[0]) for wave_D in (flat_D, across_D, down_D)]
    for wave_D, factor in zip((flat_D, across_D, down_D), factors, strict=True):
        np.testing.assert_allclose(map_DD @ wave_D, factor * wave_D, atol=1e-12)
    assert factors[1] / factors[0] == pytest.approx((1 + 4) ** 0.5)
    assert factors[2] / factors[0] == pytest.approx((1 + 5) ** 0.5)


def test_channels_are_mapped_one_by_one_and_the_map_is_symmetric() -> None:
    map_DD = frequency_weighing(0.5, 2, 6, 5)
    np.testing.assert_array_equal(map_DD[:30, 30:], 0)
    np.testing.assert_allclose(map_DD, map_DD.T, atol=1e-14)


def test_images_whose_variance_falls_as_natural_ones_keep_their_squared_norm() -> None:
    map_DD, one_DD = frequency_weighing(0.5, 1, 6, 5), frequency_weighing(1.0, 1, 6, 5)
    natural_DD = np.linalg.inv(one_DD @ one_DD)  # frequency to the power -2, up to a factor
    assert np.trace(map_DD @ natural_DD @ map_DD) == pytest.approx(np.trace(natural_DD))


def test_the_finest_waves_are_orthogonal_and_as_bright_as_pixels_go() -> None:
    across_D, down_D = finest_waves(IMAGE)
    assert across_D @ down_D == pytest.approx(0, abs=1e-12)
    assert max(np.abs(across_D).max(), np.abs(down_D).max()) == 1
