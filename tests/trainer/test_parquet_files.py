"""Parquet files are read as the folders they were made of, row by row, whatever their groups and files."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, InputMissing
from feddiff_trainer import parquet_files
from feddiff_trainer.records import Records, described, digest_records, read_records

SHAPE = (3, 4, 5)
PIXELS = np.random.default_rng(0).integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(23) % 3


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: slice = slice(None), **columns: Any) -> pa.Table:
    images = pa.array([{"bytes": png(pixels), "path": "x.png"} for pixels in PIXELS[rows]])
    return pa.table({"image": images, "label": LABELS[rows], **columns})


def write(path: Path, content: pa.Table, group: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=group)
    return path


def read(path: Path) -> Records:
    channels, height, width = SHAPE
    shape = {"channels": channels, "height": height, "width": width, "num_classes": 3}
    return read_records("parquet", path, labels_path=None, **shape)


def in_memory() -> Records:
    return Records(np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)), LABELS)


@pytest.mark.parametrize("group", [1, 5, 100])
def test_a_file_gives_the_records_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 3)
    records = read(write(tmp_path / "all.parquet", table(), group))
    assert digest_records(records) == digest_records(in_memory())
    rows = np.array([22, 0, 7, 7, 6])
    np.testing.assert_array_equal(records[rows], in_memory()[rows])


def test_files_of_a_folder_follow_each_other_by_name(tmp_path: Path) -> None:
    for name, rows in (("b", slice(9, 10)), ("a", slice(0, 9)), ("c", slice(10, 23))):
        write(tmp_path / "all" / f"{name}.parquet", table(rows))
    (tmp_path / "all" / ".cache").mkdir()
    records = read(tmp_path / "all")
    assert digest_records(records) == digest_records(in_memory())
    np.testing.assert_array_equal(records[8:11], in_memory()[8:11])


def test_images_may_be_bare_bytes_and_what_they_are_is_seen(tmp_path: Path) -> None:
    bare = pa.array([png(pixels) for pixels in PIXELS], pa.large_binary())
    path = write(tmp_path / "all.parquet", pa.table({"image": bare, "label": pa.array(LABELS, pa.uint8())}))
    assert digest_records(read(path)) == digest_records(in_memory())
    assert described("parquet", path, None) == (SHAPE, 3, ())
    write(tmp_path / "0.parquet", table(slice(0, 0)))
    assert described("parquet", tmp_path, None) == (SHAPE, 3, ())


ODD: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "no column image": (lambda: table().rename_columns(["img", "label"]), "one column image, found columns img, label"),
    "no column label": (lambda: table().drop_columns("label"), "expected one column label, found columns image"),
    "no rows": (lambda: table(slice(0, 0)), "expected at least one record, found none"),
    "labels as text": (lambda: table(label=LABELS.astype(str)), "expected labels as a list of integers"),
    "a label missing": (lambda: table(label=[None, *LABELS[1:].tolist()]), "a label in every row, found 1 without"),
    "a label too large": (lambda: table(label=LABELS + 1), "expected labels from 0 to 2, found 3"),
    "paths": (lambda: table(image=[f"{row}.png" for row in range(23)]), "row 0: expected the bytes of a PNG"),
    "an image missing": (lambda: table(image=[*map(png, PIXELS[:22]), None]), "row 22: .*found NoneType"),
    "a corrupt image": (lambda: table(image=[*map(png, PIXELS[:22]), b"x"]), "all.parquet: row 22: expected an intact"),
    "a grey image": (
        lambda: table(image=[*map(png, PIXELS[:7]), png(PIXELS[7, ..., 0]), *map(png, PIXELS[8:])]),
        "all.parquet: row 7: expected mode RGB, .* found mode L",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_or_row_is_named_and_refused(tmp_path: Path, case: str) -> None:
    make, message = ODD[case]
    with pytest.raises(DataInvalid, match=message):
        read(write(tmp_path / "all.parquet", make()))


def test_a_row_is_named_by_its_place_in_its_own_file(tmp_path: Path) -> None:
    write(tmp_path / "all" / "a.parquet", table(slice(0, 9)))
    write(tmp_path / "all" / "b.parquet", pa.table({"image": [png(PIXELS[0]), b""], "label": [0, 1]}))
    with pytest.raises(DataInvalid, match=r"b\.parquet: row 1: expected an intact PNG or JPEG, found an empty file"):
        read(tmp_path / "all")


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1 and no more PAR1"])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "all.parquet").write_bytes(damage)
    with pytest.raises(DataInvalid, match=r"all\.parquet: expected an intact Parquet file"):
        read(tmp_path / "all.parquet")


def test_a_truncated_file_is_refused_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "all.parquet", table())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataInvalid, match="expected an intact Parquet file"):
        read(path)
    with pytest.raises(InputMissing, match="No such file"):
        read(tmp_path / "gone.parquet")


def test_other_files_and_links_among_them_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "all" / "a.parquet", table())
    for odd in ("notes.txt", "b.parquet"):
        (tmp_path / "all" / odd).symlink_to(path)
        with pytest.raises(DataInvalid, match=rf"{odd}: expected only Parquet files"):
            read(tmp_path / "all")
        (tmp_path / "all" / odd).unlink()
    path.unlink()
    with pytest.raises(DataInvalid, match="expected at least one Parquet file"):
        read(tmp_path / "all")


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "all.parquet", table())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigurationInvalid, match=r"needs the package pyarrow, found none; install feddiff\[parquet\]"
    ):
        read(path)
