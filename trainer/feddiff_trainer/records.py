"""An owner's records as the release stage and the personal denoiser read them: checked once, kept as they were stored.

What is wrong with them is said before anything is drawn, charged or sent: DataInvalid or InputMissing, one message with
what was expected, what was found and what to do.

Shapes: N records, C channels, H height, W width, D = C·H·W values of one image (C order), K classes.
"""

import gzip
import hashlib
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from feddiff_protocol.api import ClassesSpec, ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, InputMissing

ROWS = 1024  # records at a time in passes over all of them
IMAGE_SUFFIXES, IMAGE_FORMATS = frozenset({".png", ".jpg", ".jpeg"}), ("PNG", "JPEG")


@dataclass(frozen=True)
class Records:
    """Checked records. pixels_NCHW: uint8 0..255, or float32/float64 in [0, 1]. labels_N: int64 in 0..K-1."""

    pixels_NCHW: NDArray[Any]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """pixels_ND of the rows, float64 in [0, 1], a fresh array; always two-dimensional."""
        picked = self.pixels_NCHW[rows]
        flat = picked.reshape(len(picked), -1)
        return flat / 255.0 if flat.dtype == np.uint8 else flat.astype(np.float64)


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
    uint8 or floats in [0, 1]; and labels) or `folder` (one folder of PNG and JPEG files per class; class index by
    `class_names`, else by sorted name). Raises InputMissing, DataInvalid.
    """
    shape_CHW = (channels, height, width)
    images: NDArray[Any]
    labels: NDArray[Any]
    if source_format == "folder":
        images, labels = _read_folder(path, shape_CHW, num_classes, class_names)
    elif source_format == "npz":
        images, labels = _read_npz(path)
    elif source_format == "idx":
        if labels_path is None:
            raise DataInvalid("labelsPath: expected the file of labels beside format idx, found none; add it")
        images, labels = _read_idx(path), _read_idx(labels_path)
    else:
        raise DataInvalid(f"source.format: expected idx, npz or folder, found {source_format!r}; change it")
    labels_N = _checked_labels(labels, num_classes, labels_path or path)
    pixels_NCHW = _checked_images(images, shape_CHW, path)
    if len(pixels_NCHW) != len(labels_N):
        raise DataInvalid(
            f"{path}: expected as many labels as images, found {len(pixels_NCHW)} images and {len(labels_N)} labels;"
            " export both from the same records"
        )
    return Records(pixels_NCHW, labels_N)


def read_source(source: SourceSpec, image: ImageSpec, classes: ClassesSpec) -> Records:
    """The records of a dataset, as many of each class as declared. Raises InputMissing, DataInvalid."""
    labels_path = Path(source.labels_path) if source.labels_path else None
    records = _read(source, image, classes, Path(source.path), labels_path)
    check_declared(records, classes.records)
    return records


def read_holdout(source: SourceSpec, image: ImageSpec, classes: ClassesSpec) -> Records | None:
    """The records that a dataset keeps out of training, or None. Raises InputMissing, DataInvalid."""
    if source.holdout_path is None:
        return None
    labels_path = Path(source.holdout_labels_path) if source.holdout_labels_path else None
    return _read(source, image, classes, Path(source.holdout_path), labels_path)


def _read(source: SourceSpec, image: ImageSpec, classes: ClassesSpec, path: Path, labels_path: Path | None) -> Records:
    return read_records(
        source.format.value,
        path,
        labels_path=labels_path,
        channels=image.channels,
        height=image.height,
        width=image.width,
        num_classes=classes.count,
        class_names=classes.names,
    )


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
    digest = hashlib.sha256(f"feddiff records 1|{pixels_NCHW.dtype.name}|{pixels_NCHW.shape}|".encode())
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


def _checked_images(images: NDArray[Any], shape_CHW: tuple[int, int, int], path: Path) -> NDArray[Any]:
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


def _with_shape(images: NDArray[Any], shape_CHW: tuple[int, int, int], path: Path) -> NDArray[Any]:
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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the file system says about `path` into InputMissing."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputMissing(f"{path}: expected a readable source, found: {reason}; check path and permissions") from None


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
    with _readable(path):
        content = path.read_bytes()
        if content[:2] != b"\x1f\x8b":
            return content
        try:
            return gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataInvalid(f"{path}: expected a complete gzip file, found: {error}; copy it again") from None


# ---- npz -----------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    with _readable(path), path.open("rb") as file:
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


# ---- folder --------------------------------------------------------------------------------------------------------


def _read_folder(
    root: Path, shape_CHW: tuple[int, int, int], num_classes: int, class_names: Sequence[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with _readable(root):
        files_K = [
            _image_files(folder) for folder in _class_folders(root.resolve(strict=True), num_classes, class_names)
        ]
        labels_N = np.repeat(np.arange(len(files_K)), [len(files) for files in files_K])
        pixels_NCHW = np.empty((len(labels_N), *shape_CHW), np.uint8)
        for row, file in enumerate(file for files in files_K for file in files):
            pixels_NCHW[row] = _read_image(file, shape_CHW)
    return pixels_NCHW, labels_N


def _class_folders(root: Path, num_classes: int, class_names: Sequence[str]) -> list[Path]:
    """One folder per class, by class index; a class that has a name but no folder is empty."""
    found = [entry.name for entry in _entries(root) if entry.is_dir()]
    expected = list(class_names) or found
    if len(expected) != num_classes or not set(found) <= set(expected):
        described = f"folders {', '.join(class_names)}" if class_names else f"{num_classes} folders, one per class"
        raise DataInvalid(
            f"{root}: expected {described}, found {', '.join(found[:10]) or 'none'}"
            f"{' …' if len(found) > 10 else ''}; correct the folders or `classes`"
        )
    return [root / name for name in expected]


def _image_files(folder: Path) -> list[Path]:
    files = _entries(folder) if folder.exists() else []
    for file in files:
        if file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            raise DataInvalid(f"{file}: expected only PNG and JPEG files here, found this; move it elsewhere")
    return files


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name; hidden files (of desktops and file systems) are not records.

    A symbolic link could reach outside the dataset, or count one image twice, which the promise does not cover.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_symlink():
            raise DataInvalid(f"{entry}: expected files and folders, found a symbolic link; put the file itself there")
    return entries


def _read_image(file: Path, shape_CHW: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One image as C×H×W. Size and mode are checked before a pixel is decoded; nothing is converted or resized."""
    channels, height, width = shape_CHW
    mode = {1: "L", 3: "RGB"}.get(channels, f"(no file has {channels} channels)")
    with (
        _readable(file),
        file.open("rb") as stream,
        _mendable(file),
        Image.open(stream, formats=IMAGE_FORMATS) as image,
    ):
        found = _stored_mode(image)
        if found != mode or image.size != (width, height):
            raise DataInvalid(
                f"{file}: expected mode {mode}, {width} wide and {height} high, found mode {found}, {image.width} wide"
                f" and {image.height} high; convert it to 8 bits, grey (L) or RGB, of that size"
            )
        return np.asarray(image, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def _stored_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's mode, marked where it hides something: it reads 16-bit RGB as 8 bits, transparency as opaque."""
    if "transparency" in image.info:
        return f"{image.mode} with transparency"
    raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else image.mode
    return image.mode if raw_mode == image.mode else f"{image.mode} from {raw_mode}"


@contextmanager
def _mendable(file: Path) -> Iterator[None]:
    """Turns what Pillow says about bad bytes into DataInvalid; errors of the file system carry a number and pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError, Warning) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataInvalid(f"{file}: expected an intact PNG or JPEG, found: {error}; replace or remove it") from None
