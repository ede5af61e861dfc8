"""Grids hold the very pixels they were given, and charts show the promise's own curve."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from feddiff_protocol import accountant
from feddiff_protocol.api import ImageSpec
from feddiff_protocol.errors import DataInvalid
from feddiff_trainer.pictures import Picture, bar, grid, image, read_samples, roc_bound, to_pixels

SHAPE = ImageSpec(channels=1, height=4, width=5)


def pixels_of(picture: Picture) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(picture.png)))


def random_images(num: int, channels: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(num).integers(0, 256, (num, channels, 4, 5), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_unchanged_with_transparent_gaps(channels: int) -> None:
    x_NCHW = random_images(5, channels)
    sheet = pixels_of(grid(x_NCHW, 3))
    assert sheet.shape == (2 * 5 - 1, 3 * 6 - 1, 4)
    for index in range(5):
        top, left = index // 3 * 5, index % 3 * 6
        shown = np.moveaxis(sheet[top : top + 4, left : left + 5, :3], -1, 0)
        np.testing.assert_array_equal(shown, np.broadcast_to(x_NCHW[index], (3, 4, 5)))
    assert (sheet[4, :, 3] == 0).all() and (sheet[:, 5, 3] == 0).all()


def test_a_grid_of_few_images_is_no_wider_than_they_are() -> None:
    assert grid(random_images(2), 8).width == 2 * 6 - 1


def test_a_grid_without_images_is_a_transparent_pixel() -> None:
    assert (pixels_of(grid(random_images(0), 4)) == 0).all()


def test_pixels_beyond_black_and_white_are_cut_off() -> None:
    assert to_pixels(np.array([-3.0, 0.0, 0.5, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


def test_an_image_is_enlarged_by_a_whole_factor_and_says_what_it_shows() -> None:
    picture = grid(random_images(2), 2)
    tag = image(picture, "two samples, class <b>", fit=60)
    assert f'width="{picture.width * 5}" height="{picture.height * 5}"' in tag
    assert 'alt="two samples, class &lt;b&gt;"' in tag
    data = re.search(r'src="data:image/png;base64,([^"]+)"', tag)
    assert data and base64.b64decode(data[1]) == picture.png


def test_a_bar_stays_within_its_track() -> None:
    assert 'width="0.00"' in bar(-1) and 'width="25.00"' in bar(0.25) and 'width="100.00"' in bar(3)


def test_the_chart_of_the_attack_bound_passes_through_the_best_tests() -> None:
    mu = 2.000446
    svg = roc_bound(lambda rate: 1.0 if rate >= 1 else accountant.attack_tpr(mu, rate), accountant.attack_auc(mu))
    points = re.search(r'<polyline [^>]*points="([^"]+)"', svg)
    assert points
    xy = np.array([[float(part) for part in point.split(",")] for point in points[1].split()])
    fpr, tpr = (xy[:, 0] - xy[0, 0]) / 240, (xy[0, 1] - xy[:, 1]) / 240
    assert np.trapezoid(tpr, fpr) == pytest.approx(accountant.attack_auc(mu), abs=2e-3)
    assert "37.2% found at 1% false alarms" in svg


# ---- Samples ---------------------------------------------------------------------------------------------------


def stored(**changes: Any) -> bytes:
    tensors = {"both": random_images(6), "labels": np.arange(6, dtype=np.int64) % 2} | changes
    return safetensors.numpy.save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_samples_are_read_back_as_they_were_stored() -> None:
    samples = read_samples(stored(), "samples", ["both"], SHAPE, 2)
    np.testing.assert_array_equal(samples.images["both"], random_images(6))
    assert samples.labels_N.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not safetensors at all", "expected a safetensors file"),
        (stored(both=None), "expected both as uint8 of shape (6, 1, 4, 5), found none"),
        (stored(both=random_images(5)), "found uint8 of shape (5, 1, 4, 5)"),
        (stored(both=random_images(6).astype(np.float32)), "found float32"),
        (stored(labels=None), "expected labels"),
        (stored(labels=np.full(6, 2, np.int64)), "expected labels as int64 in 0..1"),
        (stored(labels=np.full(6, -1, np.int64)), "expected labels as int64 in 0..1"),
    ],
    ids=["no file", "no set", "one too few", "floats", "no labels", "class too high", "class below 0"],
)
def test_samples_of_another_shape_are_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(DataInvalid) as error:
        read_samples(data, "samples", ["both"], SHAPE, 2)
    assert words in str(error.value)
