"""A folder of images: which files are records, of which class, and one message with its name for every odd file."""

import io
import itertools
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feddiff_protocol.errors import DataInvalid, FeddiffError, InputMissing
from feddiff_trainer import image_files
from feddiff_trainer.image_files import decode
from feddiff_trainer.records import Records, check_declared, digest_records, read_records

HEIGHT, WIDTH, NUM_CLASSES = 4, 5, 3
GREY = np.random.default_rng(0).integers(0, 256, (6, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = [0, 0, 1, 1, 2, 2]
ODD = "odd.png"


def read(root: Path, labels_path: Path | None = None, channels: int = 1, names: tuple[str, ...] = ()) -> Records:
    return read_records(
        "folder",
        root,
        labels_path=labels_path,
        channels=channels,
        height=HEIGHT,
        width=WIDTH,
        num_classes=NUM_CLASSES,
        class_names=names,
    )


def write_folder(root: Path, images: np.ndarray = GREY) -> Path:
    for row, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        (root / f"class-{label}").mkdir(exist_ok=True, parents=True)
        (root / f"class-{label}" / f"{row}.png").write_bytes(encoded(image))
    return root


def write_table(root: Path, *changes: tuple[str, str]) -> Path:
    """The images of `write_folder` in one folder, and labels.csv beside them, with lines replaced as `changes` say."""
    root.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(GREY):
        (root / f"{row}.png").write_bytes(encoded(image))
    text = "\n".join(["file,label", *(f"{row}.png,{label}" for row, label in enumerate(LABELS))])
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (root / "labels.csv").write_text(text)
    return root / "labels.csv"


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "L") -> Image.Image:
    return Image.fromarray(GREY[0]).convert(mode)


def turned(kind: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), kind, exif=exif)


def png(width: int, height: int, bits: int, colours: int, rows: bytes, interlaced: bool = False) -> bytes:
    """A PNG file written by hand: of kinds that Pillow can read but not write, or that lie about their size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


# ---- Which files, in which order, of which class ---------------------------------------------------------------------


def test_jpeg_is_read_too(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "class-0" / "z.JPG").write_bytes(encoded(GREY[0], "JPEG"))
    assert len(read(tmp_path)) == 7


def test_class_names_set_the_order_of_the_classes(tmp_path: Path) -> None:
    records = read(write_folder(tmp_path), names=("class-2", "class-0", "class-1"))
    np.testing.assert_array_equal(records[:2], GREY[4:].reshape(2, -1) / 255)


def test_a_table_of_labels_gives_the_records_that_folders_give(tmp_path: Path) -> None:
    by_folder, by_table = read(write_folder(tmp_path / "a")), read(tmp_path / "b", write_table(tmp_path / "b"))
    assert digest_records(by_folder) == digest_records(by_table)


def test_the_order_of_a_tables_rows_and_where_it_lies_change_nothing(tmp_path: Path) -> None:
    before = digest_records(read(tmp_path, write_table(tmp_path)))
    first, *rows = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").unlink()
    (tmp_path.parent / "elsewhere.csv").write_text("\r\n".join(["\ufeff" + first, *reversed(rows), ""]), "utf-8")
    assert digest_records(read(tmp_path, tmp_path.parent / "elsewhere.csv")) == before


def test_a_table_names_classes_where_they_have_names_and_files_in_folders(tmp_path: Path) -> None:
    names = ("ill", "healthy", "unclear")
    table = write_table(tmp_path, *((f".png,{k}", f".png,{name}") for k, name in enumerate(names)))
    (tmp_path / "more").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "more/0.png")
    table.write_text(table.read_text().replace("0.png", "more/0.png"))
    assert read(tmp_path, table, names=names).labels_N.tolist() == [0, 1, 1, 2, 2, 0]  # more/ comes after the digits


BAD_TABLES = {
    "no header": (("file,label\n", ""), "expected a first line `file,label`, found '0.png,0'"),
    "other columns": (("file,label", "label,file"), "expected a first line `file,label`, found 'label,file'"),
    "label beyond the classes": (("4.png,2", "4.png,3"), "line 6: 4.png: expected label 0 to 2, found '3'"),
    "a name without names": (("4.png,2", "4.png,ill"), "line 6: 4.png: expected label 0 to 2, found 'ill'"),
    "two rows": (("4.png,2", "3.png,2"), "line 6: 3.png: expected one row for each file, found two"),
    "three values": (("4.png,2", "4.png,2,1"), "line 6: expected a file and a label, found 3 values"),
    "no row": (("\n4.png,2", ""), r"4\.png: expected a row of this file in .*labels.csv, found none"),
    "no file": (("4.png,2", "4.png,2\n9.png,2"), r"labels.csv: expected files below .*, found no 9\.png"),
    "a file outside": (
        ("4.png,2", "4.png,2\n../x.png,2"),
        r"labels.csv: expected files below .*, found no \.\./x\.png",
    ),
    "a quote too many": (("4.png,2", '"4.png"x,2'), "expected a CSV file in UTF-8"),
    "empty": (("\n".join(["file,label", *(f"{n}.png,{k}" for n, k in enumerate(LABELS))]), ""), "found ''"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_mislabelled_file_is_named(tmp_path: Path, case: str) -> None:
    change, message = BAD_TABLES[case]
    table = write_table(tmp_path / "data", change)
    with pytest.raises(DataInvalid, match=message):
        read(tmp_path / "data", table)


def test_a_table_that_is_no_text_is_refused_and_one_that_is_not_there_is_missing(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    table.write_bytes(b"file,label\n\xff\xfe,0\n")
    with pytest.raises(DataInvalid, match="expected a CSV file in UTF-8"):
        read(tmp_path, table)
    with pytest.raises(InputMissing, match="No such file"):
        read(tmp_path, tmp_path / "gone.csv")


def test_a_symbolic_link_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root")
    (tmp_path / "outside.png").write_bytes(encoded(GREY[0]))
    for place, target in (
        (root / "class-1" / "out.png", tmp_path / "outside.png"),
        (root / "class-1" / "twice.png", root / "class-1" / "2.png"),
        (root / "class-3", tmp_path),
    ):
        place.symlink_to(target)
        with pytest.raises(DataInvalid, match=rf"{place.name}: .*symbolic link"):
            read(root)
        place.unlink()
    assert len(read(root)) == 6


def test_the_dataset_itself_may_stand_behind_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "root")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert len(read(tmp_path / "link")) == 6


@pytest.mark.parametrize("with_table", [False, True], ids=["folders", "table"])
def test_other_files_among_the_images_are_refused_and_hidden_ones_are_not_records(
    tmp_path: Path, with_table: bool
) -> None:
    table = write_table(tmp_path) if with_table else None
    folder = tmp_path if with_table else write_folder(tmp_path) / "class-1"
    (folder / ".DS_Store").write_text("x")
    assert len(read(tmp_path, table)) == 6
    (folder / "notes.txt").write_text("x")
    with pytest.raises(DataInvalid, match=r"notes\.txt: expected only PNG and JPEG"):
        read(tmp_path, table)


def test_what_lies_beside_the_folders_of_classes_is_refused(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "loose.png").write_bytes(encoded(GREY[0]))
    with pytest.raises(DataInvalid, match=r"loose\.png: expected nothing but folders here, one per class"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["two\nlines.png", "\x1b[2Jcleared.png", "para\u2029graph.png"], ids=ascii)
def test_a_name_that_would_break_a_message_is_refused(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path) / "class-1" / name).write_bytes(b"")
    with pytest.raises(DataInvalid) as caught:
        read(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/class-1: expected names without control characters, found {ascii(name)[:15]}")
    with pytest.raises(DataInvalid, match="line 8: expected names without control characters"):
        read(tmp_path / "b", write_table(tmp_path / "b", ("5.png,2", '"5\n.png",2')))


@pytest.mark.parametrize("place", ["labels.csv", "class-1/odd.png"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, place: str) -> None:
    os.mkfifo(write_folder(tmp_path) / place)
    with pytest.raises(DataInvalid, match=r"a pipe or a device|expected only PNG and JPEG files here"):
        read(tmp_path, tmp_path / "labels.csv" if place == "labels.csv" else None)


def test_folders_may_be_as_deep_as_the_system_lets_them(tmp_path: Path) -> None:
    table, folder = write_table(tmp_path), "d/" * 1200
    deepest = tmp_path
    for _ in range(1200):
        deepest = deepest / "d"
        os.mkdir(deepest)
    (deepest / "7.png").write_bytes(encoded(GREY[0]))
    table.write_text(table.read_text() + f"\n{folder}7.png,2\n")
    assert len(read(tmp_path, table)) == 7
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own way goes down by recursion


def test_folders_and_classes_must_match(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(DataInvalid, match="expected folders a, b, c, found class-0, class-1, class-2"):
        read(tmp_path, names=("a", "b", "c"))
    (tmp_path / "class-3").mkdir()
    with pytest.raises(DataInvalid, match="expected 3 folders, one per class, found class-0"):
        read(tmp_path)


def test_a_named_class_without_a_folder_is_empty_and_fails_its_declaration(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for file in (tmp_path / "class-1").iterdir():
        file.unlink()
    (tmp_path / "class-1").rmdir()
    records = read(tmp_path, names=("class-0", "class-1", "class-2"))
    check_declared(records, (2, 0, 2))
    with pytest.raises(DataInvalid, match="expected 2 records of class 1 as declared, found 0"):
        check_declared(records, (2, 2, 2))


def test_folders_without_images_are_no_records(tmp_path: Path) -> None:
    for k in range(NUM_CLASSES):
        (tmp_path / str(k)).mkdir()
    with pytest.raises(DataInvalid, match="at least one record, found none"):
        read(tmp_path)


# ---- Odd files -------------------------------------------------------------------------------------------------------

ODD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "expected an intact PNG or JPEG, found an empty file"),
    "text": (lambda: b"no image", "expected an intact PNG or JPEG, found neither"),
    "a GIF": (lambda: encoded(GREY[0], "GIF"), "expected an intact PNG or JPEG, found neither"),
    "truncated": (lambda: encoded(GREY[0])[:-30], "expected an intact PNG or JPEG"),
    "truncated after the last pixel": (lambda: encoded(GREY[0])[:-8], "expected an intact PNG or JPEG"),
    "a flipped bit": (lambda: flipped(encoded(GREY[0]), -22), "expected an intact PNG or JPEG"),
    "a wrong checksum": (lambda: flipped(encoded(GREY[0]), -14), "expected an intact PNG or JPEG"),
    "a JPEG by another name": (lambda: encoded(GREY[0], "JPEG"), "expected PNG as its name says, found JPEG"),
    "16 bits": (lambda: encoded(GREY[0].astype(np.uint16)), "mode I;16"),
    "2 bits": (lambda: png(WIDTH, HEIGHT, 2, 0, HEIGHT * bytes(3)), "found mode L from L;2"),
    "palette": (lambda: encoded(picture("P")), "found mode P"),
    "alpha": (lambda: encoded(picture("LA")), "found mode LA"),
    "a transparent grey": (lambda: encoded(GREY[0], transparency=0), "found mode L with transparency"),
    "black and white": (lambda: encoded(picture("1")), "found mode 1"),
    "colour": (lambda: encoded(picture("RGB")), "expected mode L, .* found mode RGB"),
    "other size": (lambda: encoded(GREY[0].T), "5 wide and 4 high, found mode L, 4 wide and 5 high"),
    "turned by EXIF": (lambda: turned("PNG"), "expected pixels that stand upright, found EXIF orientation 6"),
    "animated": (
        lambda: encoded(GREY[0], save_all=True, append_images=[picture().rotate(180)]),
        "expected one image, found 2",
    ),
    "a decompression bomb": (lambda: png(50_000, 50_000, 8, 0, b""), "decompression bomb"),
    "large beyond the shape": (lambda: png(5000, 5000, 8, 0, b""), "found mode L, 5000 wide and 5000 high"),
    "a row missing": (lambda: png(WIDTH, HEIGHT, 8, 0, bytes((HEIGHT - 1) * (1 + WIDTH))), "rows .* are missing"),
    "large beyond its header": (lambda: png(WIDTH, HEIGHT, 8, 0, bytes(2_000_000))[:-9], "expected an intact PNG"),
}
ODD_JPEGS: dict[str, tuple[Callable[[], bytes], str]] = {
    "turned by EXIF": (lambda: turned("JPEG", 3), "expected pixels that stand upright, found EXIF orientation 3"),
    "truncated": (lambda: encoded(GREY[0], "JPEG")[:-2], "expected an intact PNG or JPEG"),
    "a burst": (lambda: encoded(GREY[0], "MPO", save_all=True, append_images=[picture()]), "expected one image"),
    "print colours": (lambda: encoded(picture("RGB").convert("CMYK"), "JPEG"), "found mode CMYK"),
}
ODD_COLOURS: dict[str, tuple[Callable[[], bytes], str]] = {
    "16 bits": (lambda: png(WIDTH, HEIGHT, 16, 2, HEIGHT * bytes(1 + 6 * WIDTH)), "found mode RGB from RGB;16B"),
    "grey": (lambda: encoded(GREY[0]), "expected mode RGB, .* found mode L"),
    "palette": (lambda: encoded(picture("RGB").convert("P")), "found mode P"),
    "palette with alpha": (lambda: encoded(picture("P"), transparency=0), "found mode P with transparency"),
    "alpha": (lambda: encoded(picture("RGBA")), "found mode RGBA"),
    "a transparent colour": (lambda: encoded(picture("RGB"), transparency=(1, 2, 3)), "RGB with transparency"),
}


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("case", ODD_FILES)
def test_an_odd_file_is_named_and_refused(tmp_path: Path, case: str) -> None:
    make, message = ODD_FILES[case]
    (write_folder(tmp_path) / "class-1" / ODD).write_bytes(make())
    with pytest.raises(DataInvalid, match=rf"class-1/odd\.png: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize("case", ODD_JPEGS)
def test_an_odd_jpeg_is_named_and_refused(tmp_path: Path, case: str) -> None:
    make, message = ODD_JPEGS[case]
    (write_folder(tmp_path) / "class-1" / "odd.jpg").write_bytes(make())
    with pytest.raises(DataInvalid, match=rf"class-1/odd\.jpg: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize("case", ODD_COLOURS)
def test_an_odd_file_among_colour_images_is_named_and_refused(tmp_path: Path, case: str) -> None:
    make, message = ODD_COLOURS[case]
    root = write_folder(tmp_path, np.repeat(GREY[..., None], 3, axis=-1))
    assert len(read(root, channels=3)) == 6
    (root / "class-1" / ODD).write_bytes(make())
    with pytest.raises(DataInvalid, match=rf"class-1/odd\.png: .*{message}"):
        read(root, channels=3)


def test_a_jpeg_that_ends_too_early_is_refused_although_somebody_closed_it() -> None:
    """Pillow fills what is missing with grey. A whole one is never taken for cut, progressive or not."""
    generator, num_cut, num_refused = np.random.default_rng(0), 0, 0
    for quality, progressive, channels in itertools.product((5, 50, 95), (False, True), (1, 3)):
        pixels = generator.integers(0, 256, (24, 20, channels), dtype=np.uint8).squeeze()
        whole, shape_CHW = encoded(pixels, "JPEG", quality=quality, progressive=progressive), (channels, 24, 20)
        kept = decode(whole, "a.jpg", shape_CHW)
        start = whole.rfind(image_files.START_OF_SCAN) + 12
        for end in np.linspace(start, len(whole) - 4, 8).astype(int):
            closed = whole[:end] + image_files.END_OF_JPEG
            try:
                changed = not np.array_equal(decode(closed, "a.jpg", shape_CHW), kept)
            except DataInvalid:
                changed, num_refused = True, num_refused + 1
            num_cut += changed
    assert num_refused > 0.85 * num_cut > 60


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 8), (17, 5)])
def test_an_interlaced_png_has_all_its_rows(size: tuple[int, int]) -> None:
    """By hand: a grey image of one value, whose passes are lines of that value."""
    width, height = size
    rows = b""
    for x, y, dx, dy in image_files.ADAM7:
        columns, lines = len(range(x, width, dx)), len(range(y, height, dy))
        rows += lines * (b"\0" + columns * b"\x07") if columns else b""
    content = png(width, height, 8, 0, rows, interlaced=True)
    assert (decode(content, "a.png", (1, height, width)) == 7).all()
    with pytest.raises(DataInvalid, match="intact PNG"):
        decode(png(width, height, 8, 0, rows[:-1], interlaced=True), "a.png", (1, height, width))


def test_orientation_1_is_upright(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "class-1" / ODD).write_bytes(turned("PNG", 1))
    assert len(read(tmp_path)) == 7


def test_a_file_too_large_to_be_an_image_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "LARGEST_FILE_BYTES", 1 << 20)
    with (write_folder(tmp_path) / "class-1" / ODD).open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(DataInvalid, match=r"odd\.png: expected at most 1 MiB, found more"):
        read(tmp_path)


def test_an_unreadable_image_is_missing_rather_than_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: str, *_: object) -> None:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(image_files, "open", failing, raising=False)
    with pytest.raises(InputMissing, match=r"0\.png: .*Input/output error"):
        read(write_folder(tmp_path))


def test_bytes_damaged_anywhere_give_an_image_or_a_message_with_the_files_name() -> None:
    """Whatever Pillow raises for them; three kinds of file, their headers and EXIF data above all."""
    generator = random.Random(0)
    shape_CHW = (1, HEIGHT, WIDTH)
    for original in (encoded(GREY[0]), turned("PNG", 1), turned("JPEG", 1)):
        for _ in range(400):
            content = bytearray(original)
            for _ in range(generator.randint(1, 3)):
                content[generator.randrange(len(content))] = generator.randrange(256)
            try:
                image_CHW = decode(bytes(content), "some.png", shape_CHW)
            except FeddiffError as error:
                assert str(error).startswith("some.png: expected ") and ", found" in str(error)
            else:
                assert image_CHW.shape == shape_CHW


def test_a_name_that_is_no_text_is_read_too(tmp_path: Path) -> None:
    folder = os.fsencode(write_folder(tmp_path)) + b"/class-1/"
    with open(folder + b"\xff.png", "wb") as file:
        file.write(encoded(GREY[0]))
    assert len(read(tmp_path)) == 7
