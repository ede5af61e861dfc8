"""What `feddiff check` tells an owner: counts, ranges, norms and clips, computed by hand here."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feddiff_protocol.errors import InputMissing
from feddiff_trainer import check as module
from feddiff_trainer.check import CheckSpec, check


def spec(tmp_path: Path, images: np.ndarray, labels: list[int], **changes: Any) -> CheckSpec:
    np.savez(tmp_path / "train.npz", images=images, labels=np.array(labels))
    return CheckSpec.model_validate(
        {
            "source": {"format": "npz", "path": str(tmp_path / "train.npz")},
            "image": {"channels": 1, "height": 4, "width": 4},
            "classes": {"count": 2, "records": [2, 1]},
            **changes,
        }
    )


def images_of_norm(*norms: float) -> np.ndarray:
    """4×4 images whose 16 equal pixels give these Euclidean norms."""
    return np.stack([np.full((4, 4), norm / 4) for norm in norms])


def summary(**fields: str) -> dict[str, str]:
    return {
        "mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "2.5", "momentClipNorm": "0.9", **fields
    }  # fmt: skip


def test_counts_are_compared_with_what_is_declared(tmp_path: Path) -> None:
    answer = check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 1, 1]))
    assert answer["records"] == 3
    assert [(each["declared"], each["found"]) for each in answer["classes"]] == [(2, 1), (1, 2)]


def test_range_and_quantiles_of_norms(tmp_path: Path) -> None:
    answer = check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1]))
    assert answer["pixelRange"] == [0.25, 0.75]
    quantiles = answer["normQuantiles"]
    assert (quantiles["min"], quantiles["50 %"], quantiles["max"]) == pytest.approx((1, 2, 3))


def test_a_summarys_clips_count_images_and_images_minus_the_centre(tmp_path: Path) -> None:
    """Classes of fewer than 20 records are centred by the constant 0.5, which has norm 2 here."""
    answer = check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1], privacy=summary()))
    assert [(each["field"], each["touched"]) for each in answer["clips"]] == [("clipNorm", 1), ("momentClipNorm", 2)]


def test_a_large_class_is_centred_by_its_own_mean(tmp_path: Path) -> None:
    images, labels = images_of_norm(*[3.0] * 19, 3.6), [0] * 20
    classes = {"count": 1, "records": [20]}
    answer = check(spec(tmp_path, images, labels, classes=classes, privacy=summary(momentClipNorm="0.5")))
    assert answer["clips"][1]["touched"] == 1  # the mean has norm 3.03: all lie within 0.03 of it but one, 0.57 away


def test_a_summarys_clip_is_tried_as_the_map_leaves_images(tmp_path: Path) -> None:
    """A flat image has norm 2 about the constant; where fine detail counts more, a flat one counts less."""
    answer = check(spec(tmp_path, images_of_norm(0, 4), [0, 1], privacy=summary(momentClipNorm="1.9")))
    weighed = check(
        spec(tmp_path, images_of_norm(0, 4), [0, 1], privacy=summary(momentClipNorm="1.9", frequencyPower="0.5"))
    )
    assert (answer["clips"][1]["touched"], weighed["clips"][1]["touched"]) == (2, 0)


def test_a_summarys_clips_are_tried_on_the_means_of_squares(tmp_path: Path) -> None:
    """A flat image of norm 4 has 16 pixels of 1, and 4 squares of mean 1: norm 2."""
    asked = summary(clipNorm="2.5", momentClipNorm="0.9", blockSide=2)
    answer = check(spec(tmp_path, images_of_norm(0, 4), [0, 1], privacy=asked))
    assert [each["touched"] for each in answer["clips"]] == [0, 2]  # about 0.5 the four are 1 long
    assert answer["released"]["tensors"] == {"mean_sums": [2, 4], "moment_sums": [2, 10]}


def test_a_clip_in_minus_one_to_one_units_is_tried_in_those_units(tmp_path: Path) -> None:
    privacy = {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "1", "pixels": "minusOneToOne"}
    answer = check(spec(tmp_path, images_of_norm(0, 2, 4), [0, 0, 1], privacy=privacy))
    assert answer["clips"] == [{"field": "clipNorm", "norm": "1", "touched": 2}]  # norms 4, 0 and 4


def test_privunit_scales_shorter_images_up_too(tmp_path: Path) -> None:
    privacy = {"mechanism": "privunit", "epsilon": "2", "clipNorm": "2"}
    answer = check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1], privacy=privacy))
    assert answer["clips"] == [{"field": "clipNorm", "norm": "2", "touched": 1, "raised": 1}]


@pytest.mark.parametrize(
    ("privacy", "tensors"),
    [
        (summary(), {"mean_sums": [2, 16], "moment_sums": [2, 136]}),
        (
            {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "1"},
            {"images": [3, 1, 4, 4], "labels": [3]},
        ),
        (
            {"mechanism": "privunit", "epsilon": "2", "clipNorm": "1"},
            {"directions": [3, 1, 4, 4], "labels": [3]},
        ),
    ],
)
def test_shapes_of_what_would_be_released(tmp_path: Path, privacy: Any, tensors: Any) -> None:
    assert check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1], privacy=privacy))["released"]["tensors"] == tensors


def test_the_process_prints_json_or_one_line_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1]).to_wire()))
    monkeypatch.setattr(sys, "argv", ["check", str(path)])
    assert module.main() == 0
    assert json.loads(capsys.readouterr().out)["records"] == 3
    (tmp_path / "train.npz").unlink()
    assert module.main() == 66
    assert capsys.readouterr().err.startswith("feddiff: ")
    path.unlink()
    assert module.main() == 66


def test_a_network_for_fid_is_tried_on_a_record_of_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[np.ndarray] = []

    class Stub:
        described = "inception.pt, SHA-256 01, as the dataset states"
        features = asked.append

    monkeypatch.setattr(module, "read_inception", lambda source, image: Stub)
    answer = check(spec(tmp_path, images_of_norm(4, 2, 3), [0, 0, 1]))
    assert answer["inception"] == Stub.described
    assert [x_NCHW.tolist() for x_NCHW in asked] == [[[[[255] * 4] * 4]]]


def test_a_network_for_fid_that_is_not_there_ends_the_check(tmp_path: Path) -> None:
    source = {"format": "npz", "path": str(tmp_path / "train.npz"), "holdoutPath": "h.npz", "inceptionPath": "none.pt"}
    with pytest.raises(InputMissing, match=r"none\.pt: cannot be read"):
        check(spec(tmp_path, images_of_norm(1, 2, 3), [0, 0, 1], source=source))
