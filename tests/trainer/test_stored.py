"""Images in files are read when they are asked for, a batch at a time, and are always those of the first time."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from feddiff_protocol.errors import PrivacyRefusal
from feddiff_trainer import stored
from feddiff_trainer.records import Records, digest_records
from feddiff_trainer.stored import Pixels, Rows, StoredImages, unheard

SHAPE = (3, 4, 5)


class Source:
    """Images that are kept in memory, and remembers which were asked for."""

    def __init__(self, pixels_NCHW: Pixels) -> None:
        self.pixels_NCHW = pixels_NCHW
        self.asked: list[list[int]] = []

    def read(self, rows_n: Rows) -> Iterator[Pixels]:
        self.asked.append(rows_n.tolist())
        yield from (self.pixels_NCHW[row] for row in rows_n)

    def name(self, row: int) -> str:
        return f"image {row}"


def pixels(num_images: int, shape_CHW: tuple[int, int, int] = SHAPE) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (num_images, *shape_CHW), dtype=np.uint8)


def opened(pixels_NCHW: Pixels) -> tuple[Source, StoredImages]:
    source = Source(pixels_NCHW)
    images = StoredImages(source, pixels_NCHW.shape)
    images.read_through(unheard)
    return source, images


def test_rows_come_as_numpy_gives_them_by_one_ascending_pass() -> None:
    pixels_NCHW = pixels(9)
    source, images = opened(pixels_NCHW)
    for rows in (slice(2, 5), slice(None), slice(4, 2), np.array([7, 0, 3]), np.array([5, 5])):
        np.testing.assert_array_equal(images[rows], pixels_NCHW[rows])
    assert source.asked[1:] == [[2, 3, 4], list(range(9)), [], [0, 3, 7], [5, 5]]


def test_the_hash_is_that_of_the_same_records_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BATCH_BYTES", 150)  # two images and a half
    pixels_NCHW, labels_N = pixels(9), np.arange(9)
    _, images = opened(pixels_NCHW)
    assert digest_records(Records(images, labels_N)) == digest_records(Records(pixels_NCHW, labels_N))


def changes_noticed(pixels_NCHW: Pixels) -> bool:
    _, images = opened(pixels_NCHW)
    pixels_NCHW[3, 1, 2, 2] ^= 1
    assert images[:3].shape == (3, *SHAPE)  # the others are as they were
    try:
        return images[2:5] is None
    except PrivacyRefusal as error:
        return "image 3: expected the image that was read before, found another; nothing was sent" in str(error)


def test_an_image_that_changes_between_two_readings_is_named_and_refused() -> None:
    assert changes_noticed(pixels(9))


def test_mutant_that_does_not_look_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "fingerprint", lambda image_CHW: bytes(stored.FINGERPRINT_BYTES))
    assert not changes_noticed(pixels(9))


def test_every_image_read_is_told() -> None:
    images = StoredImages(Source(pixels(9)), (9, *SHAPE))
    told: list[int] = []
    images.read_through(told.append)
    assert sum(told) == 9
    Records(images, np.arange(9), told.append)[2:5]
    assert sum(told) == 12
    Records(images, np.arange(9), told.append).in_memory(np.array([8, 1]))
    assert sum(told) == 14


class Endless:
    """Images without any memory behind them."""

    def read(self, rows_n: Rows) -> Iterator[Pixels]:
        for row in rows_n:
            yield np.full((3, 64, 64), row % 251, np.uint8)

    def name(self, row: int) -> str:
        return f"image {row}"


def test_a_pass_over_all_images_takes_the_memory_of_a_batch() -> None:
    """6,000 images are 74 MB of pixels, and 0.6 GB as float64."""
    images = StoredImages(Endless(), (6000, 3, 64, 64))
    tracemalloc.start()
    images.read_through(unheard)
    records = Records(images, np.zeros(6000, np.int64))
    for start in range(0, 600, 100):
        records[start : start + 100]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 << 20
