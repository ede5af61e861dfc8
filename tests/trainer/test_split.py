"""A split gives every record to one client at most, as many of each class as was asked for, and always the same."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feddiff_protocol.errors import DataInvalid, OutputFailed, UsageInvalid
from feddiff_trainer import split as module
from feddiff_trainer.records import read_records
from feddiff_trainer.split import SplitSpec, divide, majority_classes, split
from feddiff_trainer.split_page import split_page


def spec(num_clients: int, path: Path = Path("x"), **fields: Any) -> SplitSpec:
    document = {
        "source": {"format": "npz", "path": str(path)},
        "clients": [f"client-{i}" for i in range(num_clients)],
        "holdout": "0.1",
        "output": str(path.parent / "out"),
    }
    return SplitSpec.model_validate(document | fields)


def counts_of(labels_N: np.ndarray, num_classes: int, asked: SplitSpec) -> np.ndarray:
    """Records of every client and class."""
    clients = divide(labels_N, num_classes, asked).clients
    return np.array([np.bincount(labels_N[rows], minlength=num_classes) for rows in clients])


def duplicates(labels_N: np.ndarray, num_classes: int, asked: SplitSpec) -> int:
    """Records that two have."""
    divided = divide(labels_N, num_classes, asked)
    given = np.concatenate([*divided.clients, divided.holdout])
    return len(given) - len(np.unique(given))


# ---- Who gets what ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_clients=st.integers(2, 9),
    num_classes=st.integers(1, 7),
    majority=st.none() | st.integers(1, 7),
    minority_records=st.integers(2, 4),
    dirichlet=st.none() | st.sampled_from(["0.05", "1", "100"]),
    seed=st.integers(0, 2**32),
)
def test_every_record_has_one_holder_at_most_and_every_client_the_fewest_asked_for(
    num_clients: int, num_classes: int, majority: int | None, minority_records: int, dirichlet: str | None, seed: int
) -> None:
    labels_N = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), 60))
    majority = min(majority, num_classes) if majority else None
    fields = {"majority": majority, "minorityRecords": minority_records, "dirichlet": dirichlet, "seed": seed}
    asked = spec(num_clients, **fields)
    assert duplicates(labels_N, num_classes, asked) == 0
    counts = counts_of(labels_N, num_classes, asked)
    assert counts.min() >= minority_records
    for client, of_client in enumerate(counts):
        minority = set(range(num_classes)) - set(majority_classes(client, num_classes, majority))
        assert all(of_client[k] == minority_records for k in minority)


def test_mutant_that_deals_a_record_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_divide_class", lambda rows, *_: 4 * [rows])
    assert duplicates(np.repeat(np.arange(3), 60), 3, spec(4)) > 0


def test_equal_shares_differ_by_one_at_most_and_leave_nothing() -> None:
    labels_N = np.repeat(np.arange(4), [103, 97, 100, 50])
    counts = counts_of(labels_N, 4, spec(6, holdout="0"))
    assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 1
    assert counts.sum(axis=0).tolist() == [103, 97, 100, 50]


def test_clients_beyond_the_records_of_a_class_get_as_many_in_all() -> None:
    counts = counts_of(np.repeat(np.arange(10), 120), 10, spec(128, holdout="0"))
    assert counts.max() == 1 and set(counts.sum(axis=1)) == {9, 10}


def test_majority_classes_cross_as_in_a_study_of_two_groups() -> None:
    """Ten classes, five of them common at each client: every class is common at half of the clients."""
    counts = counts_of(np.repeat(np.arange(10), 100), 10, spec(4, majority=5, minorityRecords=2, holdout="0.08"))
    assert counts.tolist() == 2 * [5 * [44] + 5 * [2], 5 * [2] + 5 * [44]]


@pytest.mark.parametrize(("clients", "classes", "majority"), [(128, 10, 5), (3, 10, 4), (7, 10, 3), (5, 2, 1)])
def test_every_class_is_common_as_often_as_any_other_or_once_less(clients: int, classes: int, majority: int) -> None:
    dealt = [k for client in range(clients) for k in majority_classes(client, classes, majority)]
    often = np.bincount(dealt, minlength=classes)
    assert often.max() - often.min() <= 1 and often.sum() == clients * majority


def test_proportions_are_dirichlets() -> None:
    """Shares by Dir(α) over M clients have mean 1/M and variance (1/M)(1 - 1/M)/(αM + 1)."""
    num_classes, per_class, num_clients, alpha = 400, 1000, 5, 0.5
    labels_N = np.repeat(np.arange(num_classes), per_class)
    shares = counts_of(labels_N, num_classes, spec(num_clients, dirichlet=str(alpha), holdout="0")) / per_class
    expected = (1 / num_clients) * (1 - 1 / num_clients) / (alpha * num_clients + 1)
    assert shares.var(axis=1).mean() == pytest.approx(expected, rel=0.05)
    np.testing.assert_allclose(shares.mean(axis=1), 1 / num_clients, rtol=0.15)


def test_another_seed_is_another_split_and_the_holdout_is_a_share_of_each_class() -> None:
    labels_N = np.repeat(np.arange(3), [50, 100, 30])
    first, again, other = (divide(labels_N, 3, spec(4, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.clients[0], again.clients[0])
    assert not np.array_equal(first.clients[0], other.clients[0])
    assert np.bincount(labels_N[first.holdout]).tolist() == [5, 10, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"minorityRecords": 20},
            "expected at most 13 for 4 clients, since class 1 has 54 records that are not held out",
        ),
        ({"dirichlet": "0.001"}, "client client-0: expected at least 2 records, found 0; raise --dirichlet"),
    ],
)
def test_a_split_that_the_records_do_not_allow_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageInvalid, match=message):
        divide(np.repeat([0, 1], [100, 60]), 2, spec(4, **fields))


# ---- The files -------------------------------------------------------------------------------------------------------


def write_npz(folder: Path, shape: tuple[int, ...] = (8, 8)) -> Path:
    labels_N = np.arange(90) % 3
    images = np.random.default_rng(0).integers(0, 256, (90, *shape), dtype=np.uint8)
    np.savez(folder / "all.npz", images=images, labels=labels_N)
    return folder / "all.npz"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_spec_gives_the_same_files(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    outputs = [str(tmp_path / name) for name in "ab"]
    answers = [split(spec(4, path, output=output, majority=1, minorityRecords=3)) for output in outputs]
    assert answers[0] == answers[1]
    first, again = (hashes(Path(output)) for output in outputs)
    assert first == again and set(first) == {*(f"client-{i}/train.npz" for i in range(4)), "holdout.npz", "split.html"}


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8), (8, 8, 3), (1, 8, 8)], ids=str)
def test_what_is_written_are_the_records_as_declared(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_npz(tmp_path, shape)
    answer = split(spec(2, path, holdout="0"))
    channels = 3 if 3 in shape else 1
    assert answer["image"] == {"channels": channels, "height": 8, "width": 8}
    source = read("npz", path, channels)
    held = [read("npz", tmp_path / f"out/client-{i}/train.npz", channels) for i in range(2)]
    assert sorted(image.tobytes() for part in held for image in part[:]) == sorted(row.tobytes() for row in source[:])
    for part, counts in zip(held, answer["records"].values(), strict=True):
        assert np.bincount(part.labels_N).tolist() == counts


def read(source_format: str, path: Path, channels: int) -> Any:
    shape = {"channels": channels, "height": 8, "width": 8, "num_classes": 3}
    return read_records(source_format, path, labels_path=None, **shape)


@pytest.mark.parametrize("with_table", [False, True], ids=["folders", "table"])
def test_a_folder_names_its_classes(tmp_path: Path, with_table: bool) -> None:
    rows = ["file,label"]
    for row, name in enumerate(10 * ["healthy", "ill"]):
        file = f"{row}.png" if with_table else f"{name}/{row}.png"
        (tmp_path / "all" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 6, 3), row, np.uint8)).save(tmp_path / "all" / file)
        rows.append(f"{file},{name}")
    source = {"format": "folder", "path": str(tmp_path / "all")}
    if with_table:
        (tmp_path / "all/labels.csv").write_text("\n".join(rows))
        source["labelsPath"] = str(tmp_path / "all/labels.csv")
    answer = split(spec(2, source=source, output=str(tmp_path / "out"), holdout="0.2"))
    assert answer["classes"] == {"count": 2, "names": ["healthy", "ill"]}
    assert answer["image"] == {"channels": 3, "height": 8, "width": 6}
    assert answer["records"] == {"client-0": [4, 4], "client-1": [4, 4]} and answer["holdout"] == 4


@pytest.mark.parametrize("name", [64 * "a", os.fsdecode(b"\xff"), "\x7f"], ids=["long", "no text", "control"])
def test_a_class_whose_name_no_dataset_could_have_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    for folder in ("ill", name):
        (tmp_path / "all" / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "all" / folder / "0.png")
    with pytest.raises(DataInvalid, match=r"classes called by 1 to 63 characters|without control characters"):
        split(spec(2, source={"format": "folder", "path": str(tmp_path / "all")}, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(8,), (2, 8, 8), (1, 1, 8, 8)], ids=str)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataInvalid, match="expected images as N×H×W"):
        split(spec(2, write_npz(tmp_path, shape)))


def test_a_mistake_is_one_line_and_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec(2, write_npz(tmp_path), majority=4).to_wire()))
    monkeypatch.setattr(sys, "argv", ["split", str(tmp_path / "spec.json")])
    assert module.main() == 64
    assert capsys.readouterr().err == "feddiff: --majority: expected at most the number of classes, 3, found 4\n"


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed, match=r"file/out: cannot be written: Not a directory"):
        split(spec(2, write_npz(tmp_path), output=str(tmp_path / "file/out")))


# ---- The page --------------------------------------------------------------------------------------------------------


def test_the_page_has_a_circle_for_every_share_and_escapes_names() -> None:
    page = split_page(["a", "b"], ["<i>", "x" * 63], [[4, 0], [1, 16]], 3, 24).decode()
    assert page.count("<circle") == 3
    for words in ("a, &lt;i&gt;: 4 records", 'r="4.00"', 'r="2.00"', 'r="8.00"', f"{15 * 'x'}…"):
        assert words in page
    assert "<i>" not in page
