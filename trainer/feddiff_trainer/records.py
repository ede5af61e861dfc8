"""An owner's records as the release stage and the personal denoiser read them: checked once, kept as they were stored.

What is wrong with them is said before anything is drawn, charged or sent: DataInvalid or InputMissing, one message with
what was expected, what was found and what to do.

Shapes: N records, C channels, H height, W width, D = C·H·W values of one image (C order), K classes.
"""

import gzip
import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol.api import ClassesSpec, ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid

from .image_files import ImageFiles, files_by_folder, files_by_table, first_shape, folder_names, label_names
from .parquet_files import ParquetImages, open_parquet, parquet_shape
from .stored import StoredImages, Told, digest_header, readable, unheard

ROWS = 1024  # records at a time in passes over all of them
READ_VALUES = 2**26  # of images that are averaged, at a time
MOST_CLASSES, LONGEST_NAME = 1000, 63  # that a dataset may declare
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Records:
    """Checked records. pixels_NCHW: uint8 0..255, or float32/float64 in [0, 1]; of folders and Parquet files it stays
    there until asked for. labels_N: int64 in 0..K-1. `told` hears how many more images were read."""

    pixels_NCHW: NDArray[Any] | StoredImages
    labels_N: NDArray[np.int64]
    told: Told = unheard

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """pixels_ND of the rows, float64 in [0, 1], a fresh array; always two-dimensional."""
        picked = self.pixels_NCHW[rows]
        self.told(len(picked))
        flat = picked.reshape(len(picked), int(np.prod(picked.shape[1:])))  # -1 cannot be told where there are no rows
        return flat / 255.0 if flat.dtype == np.uint8 else flat.astype(np.float64)

    def in_memory(self, rows_n: NDArray[np.int64]) -> "tuple[Records, NDArray[np.int64]]":
        """Records and the rows among them that are these rows of all; what is in files is read in one pass over them,
        whatever the order of the rows."""
        if isinstance(self.pixels_NCHW, StoredImages):
            return Records(self.pixels_NCHW.read(rows_n, self.told), self.labels_N[rows_n]), np.arange(len(rows_n))
        return self, rows_n


@dataclass(frozen=True)
class BlockMeans(Records):
    """Records of which every pixel is the mean of a square of `side` × `side`: in [0, 1] as they are, rounded sums of n
    numbers up to 1 being at most n. Of images so large few are in memory at a time, and never as float64."""

    side: int = 1

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        rows_n = np.arange(len(self))[rows]
        at_a_time = max(1, READ_VALUES // int(np.prod(self.pixels_NCHW.shape[1:])))
        starts = range(0, max(len(rows_n), 1), at_a_time)
        return np.concatenate([self._means(rows_n[start : start + at_a_time]) for start in starts])

    def _means(self, rows_n: NDArray[np.int64]) -> NDArray[np.float64]:
        picked = self.pixels_NCHW[rows_n]
        self.told(len(picked))
        channels, height, width = picked.shape[1:]
        squares = picked.reshape(-1, channels, height // self.side, self.side, width // self.side, self.side)
        white, dtype = (255, np.uint32) if picked.dtype == np.uint8 else (1, np.float64)
        sums_ND = squares.sum(axis=(3, 5), dtype=dtype).reshape(len(picked), channels * height * width // self.side**2)
        means_ND: NDArray[np.float64] = sums_ND / (white * self.side**2)
        return means_ND


def of_blocks(records: Records, side: int) -> Records:
    """What a release of squares' means is of; the records themselves where squares are pixels."""
    return BlockMeans(records.pixels_NCHW, records.labels_N, records.told, side) if side > 1 else records


def over_blocks(x_NChw: NDArray[Any], side: int) -> NDArray[Any]:
    """Images of which every value fills a square: what has x_NChw for its means."""
    return x_NChw.repeat(side, axis=2).repeat(side, axis=3)


def read_records(
    source_format: str,
    path: Path,
    *,
    labels_path: Path | None,
    channels: int,
    height: int,
    width: int,
    num_classes: int,
    class_names: Sequence[str] = (),
) -> Records:
    """All records of a source, in stored order, after every check that does not need the declared counts.

    source_format: `idx` (MNIST's, .gz or not, with a file of labels), `npz` (arrays images: N×H×W, N×C×H×W or N×H×W×C,
    uint8 or floats in [0, 1]; and labels) or `folder` (PNG and JPEG files: one folder of them per class, class index by
    `class_names`, else by sorted name; or, with a table of labels, any folders) or `parquet` (a column image of such
    files, a column label). Raises InputMissing, DataInvalid.
    """
    records = _opened(source_format, path, labels_path, (channels, height, width), num_classes, class_names)
    _read_through(records)
    return records


def read_source(source: SourceSpec, image: ImageSpec, classes: ClassesSpec, told: Told = unheard) -> Records:
    """The records of a dataset, as many of each class as declared; `told` hears of every image that is read, here and
    later. Raises InputMissing, DataInvalid, for wrong numbers before an image is looked at."""
    labels_path = Path(source.labels_path) if source.labels_path else None
    records = _of_dataset(source, image, classes, Path(source.path), labels_path)
    check_declared(records, classes.records)
    _read_through(records, told)
    return replace(records, told=told)


def read_holdout(source: SourceSpec, image: ImageSpec, classes: ClassesSpec) -> Records | None:
    """The records that a dataset keeps out of training, or None. Raises InputMissing, DataInvalid."""
    if source.holdout_path is None:
        return None
    labels_path = Path(source.holdout_labels_path) if source.holdout_labels_path else None
    records = _of_dataset(source, image, classes, Path(source.holdout_path), labels_path)
    _read_through(records)
    return records


def _of_dataset(
    source: SourceSpec, image: ImageSpec, classes: ClassesSpec, path: Path, labels_path: Path | None
) -> Records:
    shape_CHW = (image.channels, image.height, image.width)
    return _opened(source.format.value, path, labels_path, shape_CHW, classes.count, classes.names)


def _opened(
    source_format: str,
    path: Path,
    labels_path: Path | None,
    shape_CHW: Shape,
    num_classes: int,
    class_names: Sequence[str],
) -> Records:
    """The records of a source; images that stay in their files are not looked at yet."""
    images: NDArray[Any] | StoredImages
    labels: NDArray[Any]
    if source_format == "folder":
        images, labels = _open_folder(path, labels_path, shape_CHW, num_classes, class_names)
    elif source_format == "parquet":
        files, ends_F, labels = open_parquet(path)
        images = StoredImages(ParquetImages(files, ends_F, shape_CHW), (len(labels), *shape_CHW))
    else:
        images, labels = _read_arrays(source_format, path, labels_path)
    labels_N = _checked_labels(labels, num_classes, labels_path or path)
    pixels_NCHW = images if isinstance(images, StoredImages) else _checked_images(images, shape_CHW, path)
    if len(pixels_NCHW) != len(labels_N):
        raise DataInvalid(
            f"{path}: expected as many labels as images, found {len(pixels_NCHW)} images and {len(labels_N)} labels;"
            " export both from the same records"
        )
    return Records(pixels_NCHW, labels_N)


def _read_arrays(source_format: str, path: Path, labels_path: Path | None) -> tuple[NDArray[Any], NDArray[Any]]:
    if source_format == "npz":
        return _read_npz(path)
    if source_format != "idx":
        raise DataInvalid(f"source.format: expected idx, npz, folder or parquet, found {source_format!r}; change it")
    if labels_path is None:
        raise DataInvalid("labelsPath: expected the file of labels beside format idx, found none; add it")
    return _read_idx(path), _read_idx(labels_path)


def _open_folder(
    path: Path, labels_path: Path | None, shape_CHW: Shape, num_classes: int, class_names: Sequence[str]
) -> tuple[StoredImages, NDArray[np.int64]]:
    root = _resolved(path)
    if labels_path is None:
        files, labels_N = files_by_folder(root, num_classes, class_names)
    else:
        files, labels_N = files_by_table(root, labels_path.resolve(), num_classes, class_names)
    return StoredImages(ImageFiles(root, files, shape_CHW), (len(files), *shape_CHW)), labels_N


def _resolved(path: Path) -> Path:
    """The folder itself may stand behind a link; nothing in it may."""
    with readable(path):
        return path.resolve(strict=True)


def _read_through(records: Records, told: Told = unheard) -> None:
    """Images that stay in their files are checked; `told` hears of images that were read, these or those in memory."""
    if isinstance(records.pixels_NCHW, StoredImages):
        records.pixels_NCHW.read_through(told)
    else:
        told(len(records))


def described(source_format: str, path: Path, labels_path: Path | None) -> tuple[Shape, int, tuple[str, ...]]:
    """Channels, height and width of the images, the number of classes, and their names where they have any: as the
    records show them, for data that nobody has described. Raises InputMissing, DataInvalid."""
    if source_format == "folder":
        shape, num_classes, names = _described_folder(path, labels_path)
        return shape, _few_enough(num_classes, path), _short_enough(names, path)
    if source_format == "parquet":
        files, ends_F, labels = open_parquet(path)
        labels_N = _checked_labels(labels, MOST_CLASSES, path)
        return parquet_shape(files, ends_F), int(labels_N.max()) + 1, ()
    images, labels = _read_arrays(source_format, path, labels_path)
    labels_N = _checked_labels(labels, MOST_CLASSES, labels_path or path)
    return _shape_of(images, path), int(labels_N.max()) + 1, ()


def _few_enough(num_classes: int, path: Path) -> int:
    if num_classes > MOST_CLASSES:
        raise DataInvalid(f"{path}: expected at most {MOST_CLASSES} classes, found {num_classes}; merge some")
    return num_classes


def _short_enough(names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    for name in names:
        if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
            raise DataInvalid(
                f"{path}: expected classes called by 1 to {LONGEST_NAME} characters that can be printed, found"
                f" {ascii(name)[:80]}; rename it"
            )
    return names


def _described_folder(path: Path, labels_path: Path | None) -> tuple[Shape, int, tuple[str, ...]]:
    root = _resolved(path)
    if labels_path is None:
        names = folder_names(root)
        if not names:
            raise DataInvalid(
                f"{root}: expected one folder per class, found none; name a table of labels, or make them"
            )
        files, _ = files_by_folder(root, len(names), names)
        return first_shape(root, files), len(names), tuple(names)
    names = label_names(labels_path)
    files, labels_N = files_by_table(root, labels_path.resolve(), len(names) or MOST_CLASSES, names)
    return first_shape(root, files), len(names) or int(labels_N.max()) + 1, tuple(names)


def _shape_of(images: NDArray[Any], path: Path) -> Shape:
    """Grey or colour, channels first or last, whichever it can be."""
    match images.shape:
        case (_, height, width) | (_, 1, height, width) | (_, height, width, 1):
            return 1, height, width
        case (_, 3, height, width) | (_, height, width, 3):
            return 3, height, width
    found = "×".join(map(str, images.shape))
    raise DataInvalid(f"{path}: expected images as N×H×W, N×C×H×W or N×H×W×C, C 1 or 3, found {found}; reshape them")


def check_declared(records: Records, declared_counts: Sequence[int]) -> None:
    """Raises DataInvalid unless each class holds exactly as many records as is publicly declared."""
    found = np.bincount(records.labels_N, minlength=len(declared_counts)).tolist()
    if list(declared_counts) == found:
        return
    k = next((k for k, (n, m) in enumerate(zip(declared_counts, found, strict=False)) if n != m), len(declared_counts))
    expected = declared_counts[k] if k < len(declared_counts) else 0
    raise DataInvalid(
        f"classes.records: expected {expected} records of class {k} as declared, found {found[k]};"
        " correct the declaration (it is published and part of every average) or the data"
    )


def digest_records(records: Records) -> str:
    """SHA-256 in hexadecimal over type, shape, pixels, labels and their order: two reads agree iff all of it does."""
    pixels_NCHW, labels_N = records.pixels_NCHW, records.labels_N
    if isinstance(pixels_NCHW, StoredImages):
        digest = pixels_NCHW.digest()
    else:
        digest = hashlib.sha256(digest_header(pixels_NCHW.dtype, pixels_NCHW.shape))
        little_endian = pixels_NCHW.dtype.newbyteorder("<")
        for start in range(0, len(labels_N), ROWS):
            digest.update(np.ascontiguousarray(pixels_NCHW[start : start + ROWS], little_endian).data)
    digest.update(np.ascontiguousarray(labels_N, "<i8").data)
    return digest.hexdigest()


# ---- Checks that all formats share ---------------------------------------------------------------------------------


def _checked_labels(labels: NDArray[Any], num_classes: int, path: Path) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataInvalid(
            f"{path}: expected labels as a list of integers, found {labels.dtype} of shape {labels.shape};"
            " store the class index of every record"
        )
    if len(labels) == 0:
        raise DataInvalid(f"{path}: expected at least one record, found none; check the path or the export")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise DataInvalid(
            f"{path}: expected labels from 0 to {num_classes - 1}, found {lowest if lowest < 0 else highest};"
            " correct the labels or classes.count"
        )
    return labels.astype(np.int64)


def _checked_images(images: NDArray[Any], shape_CHW: Shape, path: Path) -> NDArray[Any]:
    pixels_NCHW = _with_shape(images, shape_CHW, path)
    if pixels_NCHW.dtype.kind == "f" and pixels_NCHW.dtype.itemsize in (4, 8):
        for start in range(0, len(pixels_NCHW), ROWS):
            _check_range(pixels_NCHW[start : start + ROWS], start, path)
    elif pixels_NCHW.dtype != np.uint8:
        raise DataInvalid(
            f"{path}: expected pixels as uint8 in 0..255 or float32/float64 in [0, 1], found {images.dtype};"
            " convert them (16-bit images: divide by 65535)"
        )
    return pixels_NCHW


def _with_shape(images: NDArray[Any], shape_CHW: Shape, path: Path) -> NDArray[Any]:
    """N×C×H×W seen in N×H×W, N×C×H×W or N×H×W×C, whichever fits the declared shape; channels first if both do."""
    channels, height, width = shape_CHW
    if images.ndim == 3 and channels == 1 and images.shape[1:] == (height, width):
        return images[:, None]
    if images.ndim == 4 and images.shape[1:] == shape_CHW:
        return images
    if images.ndim == 4 and images.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    found = "×".join(map(str, images.shape[1:])) or "no image"
    raise DataInvalid(
        f"{path}: expected images of {channels}×{height}×{width} (channels×height×width), found {found};"
        " correct `image` in the dataset or resize the records"
    )


def _check_range(pixels_NCHW: NDArray[Any], start: int, path: Path) -> None:
    low_N, high_N = pixels_NCHW.min(axis=(1, 2, 3)), pixels_NCHW.max(axis=(1, 2, 3))
    bad_N = ~((low_N >= 0) & (high_N <= 1))  # also true for NaN
    if bad_N.any():
        row = int(bad_N.argmax())
        worst = high_N[row] if low_N[row] >= 0 else low_N[row]
        raise DataInvalid(
            f"{path}: expected float pixels in [0, 1], found {worst} in record {start + row};"
            " rescale them, and leave out or mend what is not a number"
        )


# ---- idx -----------------------------------------------------------------------------------------------------------

IDX_UINT8 = 8  # the only element type of MNIST and its relatives


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of an IDX file (LeCun, Cortes & Burges): 0, 0, type, rank, big-endian sizes, then the elements."""
    content = _unpacked(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != IDX_UINT8 or content[3] not in (1, 3, 4):
        raise DataInvalid(
            f"{path}: expected an IDX file of bytes (magic 00 00 08 and 1, 3 or 4 dimensions), found"
            f" {content[:4].hex(' ') or 'an empty file'}; check the path or the export"
        )
    header = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DataInvalid(
            f"{path}: expected {expected} bytes for {'×'.join(map(str, shape))}, found {len(content)};"
            " the file is truncated or damaged, copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _unpacked(path: Path) -> bytes:
    with readable(path):
        content = path.read_bytes()
        if content[:2] != b"\x1f\x8b":
            return content
        try:
            return gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataInvalid(f"{path}: expected a complete gzip file, found: {error}; copy it again") from None


# ---- npz -----------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    with readable(path), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise DataInvalid(f"{path}: expected a .npz archive, found another format; write it with numpy.savez")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                return _npz_array(archive, "images", path), _npz_array(archive, "labels", path)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise DataInvalid(f"{path}: expected an intact .npz archive, found: {error}; copy it again") from None


def _npz_array(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> NDArray[Any]:
    if name not in archive:
        raise DataInvalid(
            f"{path}: expected arrays named images and labels, found {', '.join(archive.files) or 'none'}; rename them"
        )
    try:
        array = archive[name]
    except (ValueError, MemoryError) as error:  # object arrays would be unpickled, which runs what the file says
        raise DataInvalid(
            f"{path}: expected {name} as a plain array of numbers, found: {error}; store it without objects"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataInvalid(f"{path}: expected {name} as an array, found raw bytes; write it with numpy.savez")
    return array
