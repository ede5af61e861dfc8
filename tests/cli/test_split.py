"""`feddiff split` writes what `feddiff plan` and `feddiff run` take, for as many clients as a study has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from feddiff import scaffold
from feddiff.documents import load_job
from feddiff.main import _exit_code, app
from feddiff.split import block_side, clip_norm, job_text
from feddiff_protocol.api import Mechanism


@pytest.fixture
def feddiff(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = _exit_code(lambda: app([str(argument) for argument in arguments]))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def data(folder: Path, per_class: int = 700) -> Path:
    labels_N = np.arange(10 * per_class) % 10
    np.savez(folder / "all.npz", images=np.zeros((len(labels_N), 8, 8), np.uint8), labels=labels_N)
    return folder / "all.npz"


def test_128_clients_with_five_common_classes_give_a_plan(feddiff: Any, tmp_path: Path) -> None:
    out = tmp_path / "study"
    asked = ("--clients", 128, "--majority", 5, "--minority-records", 4, "--dirichlet", "0.3", "--out", out)
    code, said, err = feddiff("split", data(tmp_path), *asked)
    assert (code, err) == (0, "")
    assert "128 clients with " in said and "700 held out for all" in said and f"wrote {out / 'split.html'}" in said
    assert f"next: feddiff plan {out / 'owners.yaml'} {out / 'job.yaml'}" in said
    code, said, err = feddiff("plan", out / "owners.yaml", out / "job.yaml", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(said)["clients"]) == 128


def test_records_that_nobody_gets_are_counted(feddiff: Any, tmp_path: Path) -> None:
    asked = ("--clients", 2, "--majority", 2, "--minority-records", 3, "--holdout", "0.1")
    _, said, _ = feddiff("split", data(tmp_path, 30), *asked, "--out", tmp_path / "a")
    assert "126 records with nobody: their classes are no client's majority" in said
    _, said, _ = feddiff("split", data(tmp_path, 30), *asked, "--out", tmp_path / "b", "--json")
    answer = json.loads(said)
    held = sum(sum(counts) for counts in answer["records"].values())
    assert (answer["undealt"], held + answer["holdout"] + answer["undealt"]) == (6 * (27 - 2 * 3), 300)


def test_the_datasets_declare_what_their_files_hold(feddiff: Any, tmp_path: Path) -> None:
    out = tmp_path / "study"
    _, said, _ = feddiff("split", data(tmp_path, 30), "--clients", 3, "--holdout", "0", "--out", out, "--json")
    job = load_job([out / "owners.yaml", out / "job.yaml"])
    assert list(job.datasets) == ["client-0", "client-1", "client-2"]
    for client, dataset in job.datasets.items():
        with np.load(dataset.source.path) as arrays:
            found = np.bincount(arrays["labels"], minlength=10).tolist()
        assert found == list(dataset.document.spec.classes.records) == json.loads(said)["records"][client]
        assert dataset.source.holdout_path is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("all.npz", "--clients", 1, "--out", "new"), 64, "--clients: expected 2 to 1000, found 1"),
        (("all.bin", "--clients", 2, "--out", "new"), 64, "expected a folder of images, a .npz or .parquet file"),
        (("all.npz", "--clients", 2, "--out", "."), 73, "expected a new or an empty folder"),
        (("gone.npz", "--clients", 2, "--out", "new"), 66, "gone.npz: expected a readable source"),
        (("all.npz", "--clients", 2, "--out", "new", "--dirichlet", "x"), 65, "dirichlet: expected a decimal number"),
        (
            ("all.npz", "--clients", 2, "--out", "new", "--minority-records", 99),
            64,
            "expected at most 13 for 2 clients",
        ),
    ],
)
def test_a_mistake_is_one_line_and_its_code(
    feddiff: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    data(tmp_path, 30)
    monkeypatch.chdir(tmp_path)
    found, _, err = feddiff("split", *arguments)
    assert (found, len(err.splitlines())) == (code, 1), err
    assert message in err


def job_for(channels: int, height: int, width: int) -> dict[str, Any]:
    image = {"channels": channels, "height": height, "width": width}
    answer = {"image": image, "classes": {"count": 10, "names": []}, "records": {"a": [2], "b": [2]}, "holdout": 0}
    spec: dict[str, Any] = yaml.safe_load(job_text(answer))["spec"]
    return spec


def test_of_large_images_squares_are_summarised() -> None:
    spec = job_for(3, 64, 64)
    assert (spec["privacy"]["mechanism"], spec["privacy"]["blockSide"]) == ("summary", 4)
    assert (spec["privacy"]["clipNorm"], spec["personal"]["releaseSigma"]) == (clip_norm(768, 5), "1")
    assert [block_side(*shape) for shape in ((1, 28, 28), (3, 32, 32), (1, 112, 112), (1, 60, 42))] == [1, 2, 4, 2]
    small = job_for(1, 28, 28)
    assert "blockSide" not in small["privacy"] and "releaseSigma" not in small["personal"]


def test_images_whose_second_moments_are_too_many_and_that_no_squares_divide_get_the_papers_mechanism() -> None:
    spec = job_for(3, 61, 67)
    assert (spec["privacy"]["mechanism"], "diffusion" in spec) == (Mechanism.GAUSSIAN, False)


def test_clip_norms_are_those_of_init_at_28_by_28() -> None:
    privacy = list(yaml.safe_load_all(scaffold.job_text(2)))[-1]["spec"]["privacy"]
    assert (privacy["clipNorm"], privacy["momentClipNorm"]) == (clip_norm(784, 5), clip_norm(784, 2))
    answer = {"classes": {"count": 10, "names": []}, "records": {"a": [2], "b": [2]}, "holdout": 0}
    summary = job_text(answer | {"image": {"channels": 1, "height": 28, "width": 28}})
    assert 'clipNorm: "20"' in summary and 'momentClipNorm: "8"' in summary


def test_what_is_noised_once_an_image_is_clipped_lower() -> None:
    answer = {"classes": {"count": 10, "names": []}, "records": {"a": [2], "b": [2]}, "holdout": 0}
    gaussian = job_text(answer | {"image": {"channels": 1, "height": 113, "width": 113}})
    assert f"mechanism: {Mechanism.GAUSSIAN}" in gaussian and 'clipNorm: "48.43"' in gaussian
