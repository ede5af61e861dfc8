"""Images that stay in their files until they are asked for, so that memory holds a batch of them and not all.

Files can change between two readings. An image that is not the one that was read first is refused: what is noised is
what was checked and hashed.

Shapes: N images, n of them, C channels, H height, W width.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol.errors import DataInvalid, InputMissing, PrivacyRefusal

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]
Told = Callable[[int], None]  # called with how many more images were read

BATCH_BYTES = 4 << 20  # of pixels, in a pass over all images
FINGERPRINT_BYTES = 16  # of an image: 1.6 MB for 100,000 of them


def unheard(num_images: int) -> None: ...


class ImageSource(Protocol):
    """Files that hold images, in a fixed order."""

    def read(self, rows_n: Rows) -> Iterator[Pixels]:
        """Each image C×H×W of these rows, which ascend. Raises DataInvalid or InputMissing, naming the file."""

    def name(self, row: int) -> str:
        """What the image is called in a message to its owner."""


class StoredImages:
    """N×C×H×W uint8 that is indexed along N as an array is; whatever is asked for is read from its files anew."""

    dtype = np.dtype(np.uint8)

    def __init__(self, source: ImageSource, shape_NCHW: tuple[int, int, int, int]) -> None:
        self.shape = shape_NCHW
        self._source = source
        self._fingerprints = np.empty((len(self), FINGERPRINT_BYTES), np.uint8)
        self._digest: hashlib._Hash | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Rows) -> Pixels:
        """As `read`."""
        return self.read(np.arange(len(self))[rows], unheard)

    def read(self, rows_n: Rows, told: Told) -> Pixels:
        """The images of the rows, in their order, by one pass over the files. Raises PrivacyRefusal for one that has
        changed since `read_through`, which comes first; DataInvalid or InputMissing for what cannot be read any more.
        """
        assert self._digest is not None
        order_n = np.argsort(rows_n, kind="stable")
        pixels_nCHW = np.empty((len(rows_n), *self.shape[1:]), np.uint8)
        for position, image_CHW in zip(order_n, self._source.read(rows_n[order_n]), strict=True):
            row = int(rows_n[position])
            if fingerprint(image_CHW) != self._fingerprints[row].tobytes():
                raise PrivacyRefusal(
                    f"{self._source.name(row)}: expected the image that was read before, found another; nothing was"
                    " sent; let nothing write here while records are read, then start again"
                )
            pixels_nCHW[position] = image_CHW
            told(1)
        return pixels_nCHW

    def read_through(self, told: Told) -> None:
        """Every image once, checked and remembered; `told` hears of each batch. Raises DataInvalid, InputMissing."""
        digest = hashlib.sha256(digest_header(self.dtype, self.shape))
        batch = max(1, BATCH_BYTES // int(np.prod(self.shape[1:])))
        for start in range(0, len(self), batch):
            rows_n = np.arange(start, min(start + batch, len(self)))
            for row, image_CHW in zip(rows_n, self._source.read(rows_n), strict=True):
                self._fingerprints[row] = np.frombuffer(fingerprint(image_CHW), np.uint8)
                digest.update(np.ascontiguousarray(image_CHW).data)
            told(len(rows_n))
        self._digest = digest

    def digest(self) -> "hashlib._Hash":
        """SHA-256 over type, shape and all pixels as `read_through` found them, to go on with."""
        assert self._digest is not None
        return self._digest.copy()


def fingerprint(image_CHW: Pixels) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image_CHW).data, digest_size=FINGERPRINT_BYTES).digest()


def digest_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    """What the hash of records begins with."""
    return f"feddiff records 1|{dtype.name}|{shape}|".encode()


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turns what the file system says about `path` into InputMissing. Raises DataInvalid for a pipe or a device, which
    would be waited for without an end."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DataInvalid(f"{path}: expected a file or a folder, found a pipe or a device; name what holds records")
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputMissing(f"{path}: expected a readable source, found: {reason}; check path and permissions") from None
