"""Records: three formats read to the same pixels, and one message for everything that can be wrong with them."""

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feddiff_protocol.api import ClassesSpec, ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, FeddiffError, InputMissing
from feddiff_trainer.records import (
    Records,
    check_declared,
    digest_records,
    of_blocks,
    read_holdout,
    read_records,
    read_source,
)

HEIGHT, WIDTH, NUM_CLASSES = 4, 5, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (6, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = np.array([0, 0, 1, 1, 2, 2], np.uint8)


def read(source_format: str, path: Path, labels_path: Path | None = None, channels: int = 1, **more: object) -> Records:
    return read_records(
        source_format,
        path,
        labels_path=labels_path,
        channels=channels,
        height=HEIGHT,
        width=WIDTH,
        num_classes=NUM_CLASSES,
        **more,  # type: ignore[arg-type]
    )


def test_means_of_squares_are_those_of_the_pixels_as_a_release_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    images_NCHW = np.random.default_rng(1).integers(0, 256, (7, 3, 6, 4), dtype=np.uint8)
    records = Records(images_NCHW, np.arange(7), told.append)
    monkeypatch.setattr("feddiff_trainer.records.READ_VALUES", 2 * 72)  # two images at a time
    rows = np.array([5, 0, 6])
    expected_ND = records[rows].reshape(3, 3, 3, 2, 2, 2).mean(axis=(3, 5)).reshape(3, -1)
    told.clear()
    np.testing.assert_allclose(of_blocks(records, 2)[rows], expected_ND, rtol=1e-15)
    assert told == [2, 1] and of_blocks(records, 2)[:0].shape == (0, 18)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 7]))
def test_means_of_squares_lie_in_the_range_of_pixels(seed: int, side: int) -> None:
    """A sensitivity counts on it: of pixels that are, or nearly are, the largest, too."""
    rng = np.random.default_rng(seed)
    largest = np.array([1.0, np.nextafter(1.0, 0), 1 - 1e-9, 0.1, 0.0])
    pixels_NCHW = rng.choice(largest, (3, 2, 2 * side, side), p=[0.5, 0.3, 0.1, 0.05, 0.05])
    means_ND = of_blocks(Records(pixels_NCHW, np.arange(3)), side)[:]
    assert means_ND.shape == (3, 4) and 0 <= means_ND.min() <= means_ND.max() <= 1
    np.testing.assert_allclose(means_ND[0, 1], pixels_NCHW[0, 0, side:].mean())


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder: Path, images: bytes | None = None, labels: bytes | None = None) -> tuple[Path, Path]:
    (folder / "images").write_bytes(idx_bytes(IMAGES) if images is None else images)
    (folder / "labels").write_bytes(idx_bytes(LABELS) if labels is None else labels)
    return folder / "images", folder / "labels"


def write_npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "records.npz", **{"images": IMAGES, "labels": LABELS, **arrays})  # type: ignore[arg-type]
    return folder / "records.npz"


def write_folder(root: Path, images: np.ndarray = IMAGES) -> Path:
    for row, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        folder = root / f"class-{label}"
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    return root


# ---- What is read ----------------------------------------------------------------------------------------------------


def test_all_formats_give_the_same_records(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    write_idx(packed, gzip.compress(idx_bytes(IMAGES)), gzip.compress(idx_bytes(LABELS)))
    all_records = [
        read("idx", *write_idx(tmp_path)),
        read("idx", packed / "images", packed / "labels"),
        read("npz", write_npz(tmp_path)),
        read("folder", write_folder(tmp_path / "folder")),
    ]
    assert len({digest_records(records) for records in all_records}) == 1
    for records in all_records:
        assert records.pixels_NCHW.dtype == np.uint8  # an eighth of float64
        np.testing.assert_array_equal(records[:], IMAGES.reshape(6, -1) / 255)
        assert records[np.array([], np.int64)].shape == (0, HEIGHT * WIDTH)
        np.testing.assert_array_equal(records.labels_N, LABELS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_floats_stay_as_they_were_stored_and_come_out_as_float64(tmp_path: Path, dtype: str) -> None:
    images = (IMAGES / 255).astype(dtype)
    records = read("npz", write_npz(tmp_path, images=images))
    assert records.pixels_NCHW.dtype == np.dtype(dtype)
    assert records[2:4].dtype == np.float64
    np.testing.assert_array_equal(records[2:4], images[2:4].reshape(2, -1).astype(np.float64))


def test_channels_come_first_whatever_their_place_in_the_file(tmp_path: Path) -> None:
    first = np.random.default_rng(1).integers(0, 256, (6, 3, HEIGHT, WIDTH), dtype=np.uint8)
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    all_records = [
        read("npz", write_npz(tmp_path, images=first), channels=3),
        read("npz", write_npz(tmp_path, images=last), channels=3),
        read("folder", write_folder(tmp_path / "rgb", last), channels=3),
    ]
    for records in all_records:
        np.testing.assert_array_equal(records.pixels_NCHW[:], first)
        np.testing.assert_array_equal(records[:], first.reshape(6, -1) / 255)


def test_rows_come_in_the_order_asked_for_as_a_fresh_array() -> None:
    records = Records(np.full((3, 1, 1, 1), 0.5) * np.arange(3).reshape(3, 1, 1, 1), np.zeros(3, np.int64))
    rows_ND = records[np.array([2, 0])]
    assert rows_ND.tolist() == [[1.0], [0.0]]
    assert not np.shares_memory(rows_ND, records.pixels_NCHW)


def test_source_and_holdout_of_a_dataset_are_read_by_its_own_words(tmp_path: Path) -> None:
    path = str(write_npz(tmp_path))
    image = ImageSpec(channels=1, height=HEIGHT, width=WIDTH)
    classes = ClassesSpec(count=NUM_CLASSES, records=(2, 2, 2))
    source = SourceSpec.model_validate({"format": "npz", "path": path, "holdoutPath": path})
    assert len(read_source(source, image, classes)) == 6
    assert read_holdout(source.model_copy(update={"holdout_path": None}), image, classes) is None
    holdout = read_holdout(source, image, ClassesSpec(count=NUM_CLASSES, records=(9, 9, 9)))  # counts not declared
    assert holdout is not None and len(holdout) == 6
    with pytest.raises(DataInvalid, match="expected 9 records of class 0 as declared, found 2"):
        read_source(source, image, ClassesSpec(count=NUM_CLASSES, records=(9, 9, 9)))


# ---- Digest and declaration ------------------------------------------------------------------------------------------


def test_digest_changes_with_every_pixel_label_order_shape_and_type() -> None:
    records = Records(IMAGES[:, None], LABELS.astype(np.int64))
    one_pixel = IMAGES[:, None].copy()
    one_pixel[3, 0, 1, 2] ^= 1
    changed = [
        Records(one_pixel, records.labels_N),
        Records(records.pixels_NCHW, np.roll(records.labels_N, 1)),
        Records(records.pixels_NCHW[::-1], records.labels_N[::-1]),
        Records(records.pixels_NCHW.reshape(6, 1, WIDTH, HEIGHT), records.labels_N),
        Records(records.pixels_NCHW.astype(np.float32), records.labels_N),
        Records(records.pixels_NCHW[:5], records.labels_N[:5]),
    ]
    assert len({digest_records(r) for r in [records, *changed]}) == 7


def test_digest_does_not_depend_on_memory_layout_or_byte_order() -> None:
    pixels = (IMAGES[:, None] / 255).astype(np.float32)
    strided = np.repeat(pixels, 2, axis=0)[::2]
    digests = {digest_records(Records(p, LABELS.astype(np.int64))) for p in (pixels, strided, pixels.astype(">f4"))}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ((2, 2, 3), "expected 3 records of class 2 as declared, found 2"),
        ((2, 2, 2, 1), "expected 1 records of class 3 as declared, found 0"),
        ((2, 2), "expected 0 records of class 2 as declared, found 2"),
        ((0, 2, 2), "expected 0 records of class 0 as declared, found 2"),
    ],
    ids=["one missing", "empty class", "undeclared class", "declared empty"],
)
def test_counts_that_differ_from_the_declaration_are_refused(declared: tuple[int, ...], message: str) -> None:
    records = Records(IMAGES[:, None], LABELS.astype(np.int64))
    check_declared(records, (2, 2, 2))
    check_declared(records, (2, 2, 2, 0))
    with pytest.raises(DataInvalid, match=message):
        check_declared(records, declared)


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for source_format in ("npz", "folder"):
        with pytest.raises(InputMissing, match=r"nowhere: .*No such file"):
            read(source_format, tmp_path / "nowhere")
    images, _ = write_idx(tmp_path)
    with pytest.raises(InputMissing, match=r"nowhere: .*No such file"):
        read("idx", images, tmp_path / "nowhere")


def test_a_folder_in_place_of_a_file_and_the_reverse_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="Is a directory"):
        read("npz", tmp_path)
    with pytest.raises(InputMissing, match="Not a directory"):
        read("folder", write_npz(tmp_path))


@pytest.mark.parametrize("source_format", ["idx", "npz", "folder"])
def test_an_unreadable_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_format: str) -> None:
    images, labels = write_idx(tmp_path)
    path = {"idx": images, "npz": write_npz(tmp_path), "folder": write_folder(tmp_path / "folder")}[source_format]

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("open", "read_bytes"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputMissing, match="Permission denied; check path and permissions"):
        read(source_format, path, labels if source_format == "idx" else None)


BAD_IDX = {
    "empty file": ((b"", None), "magic .* found an empty file"),
    "wrong magic": ((b"\x89PNG\r\n", None), "magic .* found 89 50 4e 47"),
    "floats": ((bytes([0, 0, 13, 3]) + bytes(99), None), "magic .* found 00 00 0d 03"),
    "truncated header": ((idx_bytes(IMAGES)[:9], None), "truncated"),
    "truncated": ((idx_bytes(IMAGES)[:-1], None), "expected 136 bytes for 6×4×5, found 135"),
    "too long": ((idx_bytes(IMAGES) + b"x", None), "expected 136 bytes for 6×4×5, found 137"),
    "truncated gzip": ((gzip.compress(idx_bytes(IMAGES))[:-9], None), "complete gzip"),
    "damaged gzip": ((b"\x1f\x8b" + bytes(40), None), "complete gzip"),
    "labels for images": ((idx_bytes(LABELS), None), "expected images of 1×4×5"),
    "images for labels": ((None, idx_bytes(IMAGES)), "expected labels as a list of integers"),
    "one label less": ((None, idx_bytes(LABELS[:-1])), "found 6 images and 5 labels"),
    "label beyond the classes": ((None, idx_bytes(LABELS + 1)), "expected labels from 0 to 2, found 3"),
    "other size": ((idx_bytes(IMAGES.reshape(6, 5, 4)), None), "expected images of 1×4×5 .*, found 5×4"),
    "no records": ((idx_bytes(IMAGES[:0]), idx_bytes(LABELS[:0])), "at least one record, found none"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_gives_one_message(tmp_path: Path, case: str) -> None:
    (images, labels), message = BAD_IDX[case]
    with pytest.raises(DataInvalid, match=message):
        read("idx", *write_idx(tmp_path, images, labels))


def with_pixel(value: float, dtype: type = np.float32) -> np.ndarray:
    images = (IMAGES / 255).astype(dtype)
    images[4, 1, 2] = value
    return images


BAD_NPZ = {
    "NaN": ({"images": with_pixel(np.nan)}, r"in \[0, 1\], found nan in record 4"),
    "infinity": ({"images": with_pixel(np.inf)}, r"in \[0, 1\], found inf in record 4"),
    "minus infinity": ({"images": with_pixel(-np.inf)}, r"in \[0, 1\], found -inf in record 4"),
    "above 1": ({"images": with_pixel(1.5, np.float64)}, r"in \[0, 1\], found 1.5 in record 4"),
    "below 0": ({"images": with_pixel(-0.25)}, r"in \[0, 1\], found -0.25 in record 4"),
    "16 bits": ({"images": IMAGES.astype(np.uint16)}, "uint8 in 0..255 or float32/float64"),
    "half floats": ({"images": (IMAGES / 255).astype(np.float16)}, "uint8 in 0..255 or float32/float64"),
    "text": ({"images": IMAGES.astype(str)}, "uint8 in 0..255 or float32/float64"),
    "other size": ({"images": IMAGES[:, :3]}, "expected images of 1×4×5 .*, found 3×5"),
    "flat": ({"images": IMAGES.reshape(6, -1)}, "expected images of 1×4×5 .*, found 20"),
    "one label more": ({"labels": np.append(LABELS, 0)}, "found 6 images and 7 labels"),
    "label beyond the classes": ({"labels": LABELS + 5}, "expected labels from 0 to 2, found 7"),
    "negative label": ({"labels": LABELS.astype(int) - 1}, "expected labels from 0 to 2, found -1"),
    "huge label": ({"labels": LABELS.astype(np.uint64) + 2**63}, "expected labels from 0 to 2, found 9223"),
    "float labels": ({"labels": LABELS.astype(float)}, "labels as a list of integers, found float64"),
    "boolean labels": ({"labels": LABELS > 0}, "labels as a list of integers, found bool"),
    "labels in a column": ({"labels": LABELS[:, None]}, "labels as a list of integers"),
    "no records": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one record, found none"),
    "objects": ({"images": np.array([{"a": 1}] * 6)}, "expected images as a plain array .* store it without objects"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_gives_one_message(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_NPZ[case]
    with pytest.raises(DataInvalid, match=message):
        read("npz", write_npz(tmp_path, **arrays))


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Exploit:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os._exit, (42,)


BAD_ARCHIVES = {
    "no zip": (b"not a zip at all", "expected a .npz archive, found another format"),
    "pickle": (pickle.dumps(Exploit()), "expected a .npz archive, found another format"),
    "zip of a pickle": (zip_of(images=pickle.dumps(Exploit()), labels=b""), "found raw bytes"),
    "zip of other files": (zip_of(readme=b"hello"), "arrays named images and labels, found readme"),
    "empty zip": (zip_of(), "arrays named images and labels, found none"),
    "huge header": (
        zip_of(**{"images.npy": b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, "
                  b"'shape': (9999999999999, 28, 28)}".ljust(117) + b"\n", "labels.npy": b""}),
        "expected images as a plain array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_what_is_no_archive_of_arrays_gives_one_message_and_runs_nothing(tmp_path: Path, case: str) -> None:
    content, message = BAD_ARCHIVES[case]
    (tmp_path / "records.npz").write_bytes(content)
    with pytest.raises(DataInvalid, match=message):
        read("npz", tmp_path / "records.npz")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source_format = data.draw(st.sampled_from(["idx", "npz", "folder"]))
    images, labels = write_idx(folder)
    path = {"idx": images, "npz": write_npz(folder), "folder": write_folder(folder / "folder")}[source_format]
    file = path / "class-1" / "2.png" if source_format == "folder" else path
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        records = read(source_format, path, labels if source_format == "idx" else None)
    except FeddiffError as error:
        assert "expected" in str(error) and "found" in str(error)
    else:
        assert records[:].shape == (6, HEIGHT * WIDTH)


def test_an_unknown_format_and_idx_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="expected idx, npz, folder or parquet, found 'tar'"):
        read("tar", tmp_path)
    with pytest.raises(DataInvalid, match="labelsPath"):
        read("idx", write_idx(tmp_path)[0])
