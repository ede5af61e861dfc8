"""Parquet files as data sets are published in: a column `image` of PNG or JPEG files, and a column `label`.

An image is taken or refused as a file in a folder is (image_files); a message says file and row. Needs pyarrow, which
comes with feddiff[parquet].

Shapes: N images, n of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid

from .image_files import decode, stored_shape
from .stored import Pixels, Rows, readable

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE, LABEL = "image", "label"
BUFFER_BYTES = 1 << 20  # of a column, read at a time
BATCH_ROWS = 256  # decoded from their pages at a time


@dataclass(frozen=True)
class ParquetImages:
    """Rows of Parquet files, one file after the other; ends_F: the number of rows up to each file's end."""

    files: Sequence[Path]
    ends_F: Rows
    shape_CHW: tuple[int, int, int]

    def read(self, rows_n: Rows) -> Iterator[Pixels]:
        for row, content in zip(rows_n, self._contents(rows_n), strict=True):
            yield decode(content, self.name(row), self.shape_CHW)

    def name(self, row: int) -> str:
        file = int(np.searchsorted(self.ends_F, row, side="right"))
        return f"{self.files[file]}: row {row - self._start(file)}"

    def _contents(self, rows_n: Rows) -> Iterator[bytes]:
        for file, path in enumerate(self.files):
            start = self._start(file)
            mine = rows_n[(rows_n >= start) & (rows_n < self.ends_F[file])] - start
            if len(mine):
                yield from _contents(path, mine)

    def _start(self, file: int) -> int:
        return int(self.ends_F[file - 1]) if file else 0


def open_parquet(path: Path) -> tuple[list[Path], NDArray[np.int64], NDArray[Any]]:
    """The files (one, or those of a folder, sorted by name), ends_F of each, and the labels of all rows.

    Raises InputMissing, DataInvalid, and ConfigurationInvalid without pyarrow.
    """
    files = _files(path)
    labels = [_labels(file) for file in files]
    return files, np.cumsum([len(of_file) for of_file in labels]), np.concatenate(labels)


def parquet_shape(files: Sequence[Path], ends_F: Rows) -> tuple[int, int, int]:
    """Channels, height and width of the first image as its header says. Raises DataInvalid."""
    file = files[int(np.searchsorted(ends_F, 0, side="right"))]
    return stored_shape(next(_contents(file, np.array([0]))), f"{file}: row 0")


def _files(path: Path) -> list[Path]:
    with readable(path):
        if not path.resolve(strict=True).is_dir():
            return [path]
        files = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    for file in files:
        if file.suffix != ".parquet" or file.is_symlink() or not file.is_file():
            raise DataInvalid(f"{file}: expected only Parquet files here, found this; move it elsewhere")
    if not files:
        raise DataInvalid(f"{path}: expected at least one Parquet file, found none; check the path or the export")
    return files


def _labels(file: Path) -> NDArray[Any]:
    with _opened(file) as parquet:
        column = parquet.read(columns=[LABEL]).column(LABEL)
        if column.null_count:
            raise DataInvalid(f"{file}: expected a {LABEL} in every row, found {column.null_count} without; add them")
        labels: NDArray[Any] = column.to_numpy()
        return labels


def _contents(file: Path, rows_n: Rows) -> Iterator[bytes]:
    """The encoded image of each of these rows of one file, which ascend."""
    with _opened(file) as parquet:
        start = 0
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            mine = rows_n[(rows_n >= start) & (rows_n < end)]
            if len(mine):
                yield from _of_group(parquet, group, start, mine, file)
            start = end


def _of_group(parquet: "ParquetFile", group: int, start: int, rows_n: Rows, file: Path) -> Iterator[bytes]:
    """As _contents, of rows in one row group, whose first row is `start`; what follows the last of them is not read."""
    last = rows_n[-1]
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE]):
        column, end = batch.column(0), start + len(batch)
        for row in rows_n[(rows_n >= start) & (rows_n < end)]:
            value = column[int(row) - start].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise DataInvalid(
                    f"{file}: row {row}: expected the bytes of a PNG or JPEG file in column {IMAGE}, found"
                    f" {type(content).__name__}; store the images, not paths or pixels"
                )
            yield content
        if end > last:
            return
        start = end


@contextmanager
def _opened(file: Path) -> "Iterator[ParquetFile]":
    """The open file, which has both columns. What pyarrow says about bad bytes becomes DataInvalid."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigurationInvalid(
            "source.format: parquet needs the package pyarrow, found none; install feddiff[parquet]"
        ) from None
    with readable(file), file.open("rb") as stream:
        try:
            parquet = ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
            names = parquet.schema_arrow.names
            if missing := [name for name in (IMAGE, LABEL) if names.count(name) != 1]:
                raise DataInvalid(
                    f"{file}: expected one column {missing[0]}, found columns {', '.join(names[:9]) or 'none'};"
                    f" name them {IMAGE} and {LABEL}"
                )
            yield parquet
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = " ".join(str(error).split())[:200]
            raise DataInvalid(f"{file}: expected an intact Parquet file, found: {reason}; copy it again") from None
