"""A folder of PNG and JPEG files as records: which files they are, in which order, of which class, and their pixels.

A file is taken as it is or refused by its name; nothing is converted, turned or resized, since every way to do so is a
choice that nobody would see afterwards. docs/formats.md says of every odd kind why, and how to convert it.

Shapes: N images, C channels, H height, W width, K classes.
"""

import csv
import io
import os
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from feddiff_protocol.errors import DataInvalid

from .stored import Pixels, Rows, readable

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # by the suffix of a file's name
LARGEST_FILE_BYTES = 64 << 20  # 512×512×4 values are a megabyte; the rest would be metadata
BAD_BYTES = (  # what Pillow raises for them
    OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error, Image.DecompressionBombError
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"
# x, y, Δx and Δy of the passes of an interlaced PNG.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
JUNK = b"\xaa" * 512
START_OF_SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"  # markers, which cannot stand in a scan's own bytes
LABELS_HEADER = ["file", "label"]


@dataclass(frozen=True)
class ImageFiles:
    """Files below `root`, one image in each."""

    root: Path
    files: Sequence[str]
    shape_CHW: tuple[int, int, int]

    def read(self, rows_n: Rows) -> Iterator[Pixels]:
        for row in rows_n:
            path = self.name(row)
            yield decode(_content(path), path, self.shape_CHW, FORMATS[os.path.splitext(path)[1].lower()])

    def name(self, row: int) -> str:
        return f"{self.root}/{self.files[row]}"


# ---- Which files, and their classes ----------------------------------------------------------------------------------


def files_by_folder(root: Path, num_classes: int, class_names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Files of one folder per class, sorted by class and name, and their labels_N.

    Class index by `class_names`, a class that has a name but no folder is empty; else by the folders' sorted names.
    Raises DataInvalid for folders that are not the classes, and for anything among the images that is none.
    """
    found = folder_names(root)
    expected = list(class_names) or found
    if len(expected) != num_classes or not set(found) <= set(expected):
        described = f"folders {', '.join(class_names)}" if class_names else f"{num_classes} folders, one per class"
        raise DataInvalid(
            f"{root}: expected {described}, found {', '.join(found[:10]) or 'none'}"
            f"{' …' if len(found) > 10 else ''}; correct the folders or `classes`"
        )
    files_K = [_image_files(root, name) if name in found else [] for name in expected]
    labels_N = np.repeat(np.arange(num_classes), [len(files) for files in files_K])
    return [file for files in files_K for file in files], labels_N


def files_by_table(
    root: Path, table: Path, num_classes: int, class_names: Sequence[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """All images at any depth below `root`, sorted by name, and their labels_N by the rows of a CSV file.

    Its columns are `file`, relative to root, and `label`: the class's name where classes have names, else its index.
    Raises DataInvalid unless every image has one row and every row an image.
    """
    labels = _labels_by_file(table, num_classes, class_names)
    files = sorted(_files_below(root, table))
    for file in files:
        if file not in labels:
            raise DataInvalid(f"{root}/{file}: expected a row of this file in {table}, found none; add it")
    if len(labels) != len(files):
        there = set(files)
        gone = next(file for file in labels if file not in there)
        raise DataInvalid(f"{table}: expected files below {root}, found no {gone}; remove its row or bring the file")
    return files, np.array([labels[file] for file in files], np.int64)


def folder_names(root: Path) -> list[str]:
    """The folders below `root`, sorted. Raises DataInvalid for anything else there: nobody would miss it."""
    entries = _entries(root)
    for entry in entries:
        if not entry.is_dir():
            raise DataInvalid(
                f"{entry.path}: expected nothing but folders here, one per class, found this; move it elsewhere, or"
                " name it where it is the table of labels"
            )
    return [entry.name for entry in entries]


def label_names(table: Path) -> list[str]:
    """The labels in a CSV file that are no indices of classes, sorted; none where all are."""
    found = {label for _, _, label in _rows_of(table)}
    return [] if all(label.isascii() and label.isdecimal() for label in found) else sorted(found)


def _labels_by_file(table: Path, num_classes: int, class_names: Sequence[str]) -> dict[str, int]:
    classes: Mapping[str, int] = {name: k for k, name in enumerate(class_names or map(str, range(num_classes)))}
    known = "a name in classes.names" if class_names else f"0 to {num_classes - 1}"
    labels: dict[str, int] = {}
    for where, file, label in _rows_of(table):
        if label not in classes:
            raise DataInvalid(f"{where}: {file}: expected label {known}, found {label[:80]!r}; correct it")
        if file in labels:
            raise DataInvalid(f"{where}: {file}: expected one row for each file, found two; remove one")
        labels[file] = classes[label]
    return labels


def _rows_of(table: Path) -> Iterator[tuple[str, str, str]]:
    """Words that name the row, its file and its label."""
    with readable(table), open(table, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        try:
            if (header := next(rows, [])) != LABELS_HEADER:
                found = ascii(",".join(header))[:80]
                raise DataInvalid(f"{table}: expected a first line `file,label`, found {found}; correct the table")
            for row in rows:
                where = f"{table}: line {rows.line_num}"
                if len(row) != 2:
                    raise DataInvalid(f"{where}: expected a file and a label, found {len(row)} values; correct it")
                file, label = row
                yield where, _on_one_line(where, file), label
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataInvalid(f"{table}: expected a CSV file in UTF-8, found: {error}; export it again") from None


def _image_files(root: Path, folder: str) -> list[str]:
    return [f"{folder}/{entry.name}" for entry in _entries(root / folder) if _is_image(entry)]


def _files_below(root: Path, table: Path) -> Iterator[str]:
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in _entries(root / folder):
            path = f"{folder}{entry.name}"
            if entry.is_dir():
                folders.append(f"{path}/")
            elif root / path != table and _is_image(entry):
                yield path


def _is_image(entry: "os.DirEntry[str]") -> bool:
    """True; raises DataInvalid for what is no image, since nobody would miss a record that was passed over."""
    if os.path.splitext(entry.name)[1].lower() not in FORMATS or not entry.is_file():
        raise DataInvalid(f"{entry.path}: expected only PNG and JPEG files here, found this; move it elsewhere")
    return True


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    """What is in a folder, sorted by name; hidden files (of desktops and file systems) are not records.

    A symbolic link could reach outside the dataset, or count one image twice, which the promise does not cover.
    """
    with readable(folder), os.scandir(folder) as found:
        entries = sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)
    for entry in entries:
        _on_one_line(str(folder), entry.name)
        if entry.is_symlink():
            raise DataInvalid(
                f"{entry.path}: expected files and folders, found a symbolic link; put the file itself there"
            )
    return entries


def _on_one_line(where: str, name: str) -> str:
    """The name; raises DataInvalid for one that would end the line of a message, or hide what it says."""
    if any(unicodedata.category(each) in ("Cc", "Zl", "Zp") for each in name):
        raise DataInvalid(f"{where}: expected names without control characters, found {ascii(name)[:80]}; rename it")
    return name


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def decode(content: bytes, where: str, shape_CHW: tuple[int, int, int], expected_format: str | None = None) -> Pixels:
    """One image as C×H×W. Raises DataInvalid, beginning with `where`, for all but one upright, opaque image of 8 bits,
    grey or RGB, of exactly this size, in a PNG or JPEG file that is intact to its end.

    Kind, size and mode are checked before a pixel is decoded.
    """
    if len(content) > LARGEST_FILE_BYTES:
        raise DataInvalid(f"{where}: expected at most {LARGEST_FILE_BYTES >> 20} MiB, found more; shrink or remove it")
    with _mendable(where, content):
        _check_to_the_end(content)
        with _opened(content) as image:
            _check_kind(image, where, expected_format)
            _check_shape(image, where, shape_CHW)
            pixels = np.asarray(image, np.uint8)
            _check_whole(content, image, pixels)
            _check_upright(image, where)
    channels, height, width = shape_CHW
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def stored_shape(content: bytes, where: str) -> tuple[int, int, int]:
    """Channels, height and width of an image as its header says. Raises DataInvalid."""
    with _mendable(where, content), _opened(content) as image:
        return len(image.getbands()), image.height, image.width


def first_shape(root: Path, files: Sequence[str]) -> tuple[int, int, int]:
    """As `stored_shape`, of the first file. Raises DataInvalid, also where there is none."""
    if not files:
        raise DataInvalid(f"{root}: expected at least one image, found none; check the path or the export")
    path = f"{root}/{files[0]}"
    return stored_shape(_content(path), path)


def _content(path: str) -> bytes:
    with readable(path), open(path, "rb") as file:
        return file.read(LARGEST_FILE_BYTES + 1)


def _check_to_the_end(content: bytes) -> None:
    """Decoding stops at the last pixel. Of PNG, every checksum up to the last chunk; of JPEG, its closing marker."""
    if content.startswith(PNG):
        with _opened(content) as image:
            image.verify()
    elif content.rfind(END_OF_JPEG) < content.rfind(START_OF_SCAN):
        raise ValueError("no end of the image")


def _check_whole(content: bytes, image: ImageFile.ImageFile, pixels: NDArray[np.uint8]) -> None:
    """Where pixels are missing, Pillow took others for them. Of PNG, every row; of JPEG, which counts nothing, most
    scans that end too early: what follows a whole one makes no difference."""
    if image.format == "PNG":
        expected = _num_filtered_bytes(image)
        if len(zlib.decompressobj().decompress(_png_data(content), expected)) < expected:
            raise ValueError("rows of the image are missing")
    else:
        end = content.rfind(END_OF_JPEG)
        with _opened(content[:end] + JUNK + content[end:]) as padded:
            if not np.array_equal(pixels, np.asarray(padded)):
                raise ValueError("the end of the image is missing")


def _png_data(content: bytes) -> bytes:
    """What a PNG file has compressed, in one piece; its chunks are whole."""
    parts, start = [], len(PNG)
    while start < len(content):
        (length,), kind = struct.unpack_from(">I", content, start), content[start + 4 : start + 8]
        if kind == b"IDAT":
            parts.append(content[start + 8 : start + 8 + length])
        start += 12 + length
    return b"".join(parts)


def _num_filtered_bytes(image: ImageFile.ImageFile) -> int:
    """Of a PNG image of 8 bits: a filter's byte and the values of each row of each pass (PNG 3rd edition, 8.1)."""
    passes = ADAM7 if image.info.get("interlace") else ((0, 0, 1, 1),)
    sizes = [(-(-(image.width - x) // dx), -(-(image.height - y) // dy)) for x, y, dx, dy in passes]
    return sum(rows * (1 + columns * len(image.getbands())) for columns, rows in sizes if columns > 0 and rows > 0)


def _opened(content: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))


def _check_kind(image: ImageFile.ImageFile, where: str, expected_format: str | None) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames != 1 or image.format not in FORMATS.values():
        raise DataInvalid(f"{where}: expected one image, found {frames} (animated, or a burst); keep one of them")
    if expected_format not in (None, image.format):
        raise DataInvalid(f"{where}: expected {expected_format} as its name says, found {image.format}; rename it")


def _check_shape(image: ImageFile.ImageFile, where: str, shape_CHW: tuple[int, int, int]) -> None:
    channels, height, width = shape_CHW
    mode = {1: "L", 3: "RGB"}.get(channels, f"(no file has {channels} channels)")
    found = _stored_mode(image)
    if found != mode or image.size != (width, height):
        raise DataInvalid(
            f"{where}: expected mode {mode}, {width} wide and {height} high, found mode {found}, {image.width} wide"
            f" and {image.height} high; convert it to 8 bits, grey (L) or RGB, of that size"
        )


def _stored_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's mode, marked where it hides something: it reads 16-bit RGB as 8 bits, transparency as opaque."""
    if "transparency" in image.info:
        return f"{image.mode} with transparency"
    raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else image.mode
    return image.mode if raw_mode == image.mode else f"{image.mode} from {raw_mode}"


def _check_upright(image: ImageFile.ImageFile, where: str) -> None:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        raise DataInvalid(
            f"{where}: expected pixels that stand upright, found EXIF orientation {orientation}, by which viewers turn"
            " them; turn the pixels themselves and remove the tag"
        )


@contextmanager
def _mendable(where: str, content: bytes) -> Iterator[None]:
    """Turns what Pillow says about bad bytes into DataInvalid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except UnidentifiedImageError:
        found = "neither" if content else "an empty file"
        raise DataInvalid(f"{where}: expected an intact PNG or JPEG, found {found}; replace or remove it") from None
    except (*BAD_BYTES, Warning) as error:
        raise DataInvalid(f"{where}: expected an intact PNG or JPEG, found: {error}; replace or remove it") from None
