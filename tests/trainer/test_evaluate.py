"""The evaluation of one owner's job: from its records, a real release and stored samples to the two objects it leaves.

The data: four classes of 8×8 images, a bright column at a class's own place, two of them rare.
"""

import hashlib
import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_protocol.stages import EvaluateSpec, ReleaseSpec
from feddiff_trainer import evaluate, release
from feddiff_trainer.evaluation import Evaluation
from feddiff_trainer.metrics import frechet_distance
from feddiff_trainer.pooling import OwnerSummary, packed, unmapped
from feddiff_trainer.stores import open_store

Uint8 = np.ndarray[Any, np.dtype[np.uint8]]

COUNTS = (40, 40, 6, 6)
PRIVACY = {
    "summary": {"mechanism": "summary", "clipNorm": "3", "momentClipNorm": "2"},
    "gaussian": {"mechanism": "gaussian", "clipNorm": "3"},
    "privunit": {"mechanism": "privunit", "clipNorm": "3", "delta": "0"},
}
DIFFUSION = {"summary": {"splitSigma": "0.25"}, "gaussian": {}, "privunit": {"splitSigma": "0.25"}}


def images_of(label: int, num: int, seed: int) -> Uint8:
    rng = np.random.default_rng([label, seed])
    x_NCHW = rng.integers(0, 60, (num, 1, 8, 8), dtype=np.uint8)
    x_NCHW[..., 2 * label] += rng.integers(120, 190, (num, 1, 8), dtype=np.uint8)
    return x_NCHW


def dataset(counts: tuple[int, ...], seed: int) -> tuple[Uint8, np.ndarray[Any, np.dtype[np.int64]]]:
    labels_N = np.repeat(np.arange(len(counts)), counts)
    return np.concatenate([images_of(label, count, seed) for label, count in enumerate(counts)]), labels_N


def document(folder: Path, mechanism: str, uid: str, **changes: Any) -> dict[str, Any]:
    """What release and evaluate are both told."""
    return {
        "job": {"uid": uid, "name": mechanism, "namespace": "research"},
        "attempt": 1,
        "client": "a",
        "source": {"format": "npz", "path": str(folder / "train.npz"), "holdoutPath": str(folder / "holdout.npz")},
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": 4, "records": list(COUNTS)},
        "privacy": {"epsilon": "10", "delta": "1e-5"} | PRIVACY[mechanism],
        "diffusion": DIFFUSION[mechanism],
        "ownerStore": (folder / "owner").as_uri(),
        "federationStore": (folder / "federation").as_uri(),
    } | changes


def prepared(folder: Path, mechanism: str = "summary", uid: str = "uid-00000001", **changes: Any) -> EvaluateSpec:
    """The spec of an evaluation whose records, release and samples are in their places.

    `both` is drawn like the records, `personal` holds the owner's own records again and again, `shared` is noise.
    """
    write_records(folder)
    name = layout.release_name(uid, "a", "dataset")
    release_spec = parse(ReleaseSpec, document(folder, mechanism, uid) | {"release": name}, "release")
    released = release.body(release_spec)["manifest"]
    own, own_labels_N = dataset(COUNTS, seed=0)
    both, labels_N = dataset((30,) * 4, seed=2)
    personal = np.concatenate([np.resize(own[own_labels_N == label], (30, 1, 8, 8)) for label in range(4)])
    noise = np.random.default_rng(3).integers(0, 256, both.shape, dtype=np.uint8)
    samples = {"both": both, "shared": noise, "personal": personal, "labels": labels_N}
    store = open_store((folder / "owner").as_uri())
    store.put(layout.samples(uid, "a"), safetensors.numpy.save(samples))
    more = {"network": {}, "shared": {}, "personal": {}, "sampling": {"imagesPerClass": 30}}
    releases = [{"client": "a", "manifestSha256": released}]
    return parse(EvaluateSpec, document(folder, mechanism, uid, **changes) | more | {"releases": releases}, "spec")


def write_records(folder: Path) -> None:
    for name, counts, seed in (("train", COUNTS, 0), ("holdout", (25,) * 4, 1)):
        images, labels = dataset(counts, seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)


def written(spec: EvaluateSpec) -> tuple[Evaluation, str]:
    assert evaluate.body(spec) == {}  # nothing of it is public
    store = open_store(spec.owner_store)
    evaluation = Evaluation.model_validate_json(store.get(layout.evaluation(spec.job.uid, "a")))
    return evaluation, store.get(layout.owner_report(spec.job.uid, "a")).decode()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, str]:
    return written(prepared(tmp_path_factory.mktemp("measured")))


def test_good_images_measure_better_than_noise_and_copies_are_found(measured: tuple[Evaluation, str]) -> None:
    groups = {arm: quality.groups for arm, quality in measured[0].arms.items()}
    assert groups["both"]["all"]["recall"] > 0.95 > groups["shared"]["all"]["recall"]
    assert groups["both"]["pooled"]["frechet"] < groups["shared"]["pooled"]["frechet"]
    assert groups["both"]["all"]["coverage"] > 0.8 and groups["shared"]["all"]["coverage"] == 0
    assert groups["personal"]["minority"]["copies_half"] == 1 and groups["both"]["minority"]["copies_half"] < 0.2


def test_real_records_are_a_reference_without_copies_of_themselves(measured: tuple[Evaluation, str]) -> None:
    real = measured[0].arms["real"]
    assert "copies_half" not in real.groups["all"] and real.groups["all"]["recall"] > 0.95
    assert all("copies" not in reason.lower() for reason in real.missing)


def test_what_was_too_few_to_measure_is_said(measured: tuple[Evaluation, str]) -> None:
    evaluation, page = measured
    assert evaluation.arms["real"].per_class[2]["frechet"] is None
    assert "Fréchet distance needs more than 16 images of each kind, has 6 (class 2, class 3)" in page


def test_the_evaluation_says_how_it_was_measured(measured: tuple[Evaluation, str]) -> None:
    how = measured[0].measured
    assert how is not None
    assert (how.num_samples, how.num_train, how.num_holdout, how.resize) == (120, 92, 100, "none")
    assert "class 2, class 3" in measured[1]


def test_the_same_evaluation_again_gives_the_same_figures(measured: tuple[Evaluation, str], tmp_path: Path) -> None:
    again, _ = written(prepared(tmp_path))
    assert again.arms == measured[0].arms and again.picture == measured[0].picture


def test_nothing_is_written_to_the_federation(tmp_path: Path) -> None:
    spec = unmeasured(tmp_path, "summary", "uid-00000001")
    before = contents(tmp_path / "federation")
    evaluate.body(spec)
    assert contents(tmp_path / "federation") == before


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("mechanism", PRIVACY)
def test_an_owner_with_no_record_of_a_class_is_measured_and_sees_no_picture_of_it(
    tmp_path: Path, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As most owners of a hundred, among whom few records are dealt."""
    monkeypatch.setattr(sys.modules[__name__], "COUNTS", (40, 40, 12, 0))
    evaluation, page = written(prepared(tmp_path, mechanism))
    assert evaluation.arms["both"].groups["pooled"]["frechet"] is not None
    assert evaluation.arms["both"].groups["all"]["recall"] is not None
    said = [f"{arm}, class {label}" in page for arm, label in (("real", 2), ("both", 3), ("real", 3))]
    assert said == [True, True, False]


def test_without_a_holdout_nothing_is_measured_and_the_page_says_what_to_add(tmp_path: Path) -> None:
    source = {"format": "npz", "path": str(tmp_path / "train.npz")}
    evaluation, page = written(prepared(tmp_path, source=source))
    assert evaluation.measured is None and evaluation.arms == {}
    assert "spec.source.holdoutPath" in page and page.count("<img") == 5 * 4


# ---- FID and KID -------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Stands in for Inception: the mean of each row."""

    def forward(self, x_BCHW: Tensor, return_features: bool = False) -> Tensor:
        return x_BCHW.float().mean((1, 3))


def with_inception(folder: Path, **changes: Any) -> EvaluateSpec:
    path = folder / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Rows()).save(str(path))
    source = document(folder, "summary", "uid-00000001")["source"]
    return prepared(folder, source=source | {"inceptionPath": str(path)} | changes)


def test_with_a_network_fid_and_kid_are_measured_and_the_rest_is_as_without(
    measured: tuple[Evaluation, str], tmp_path: Path
) -> None:
    evaluation, page = written(with_inception(tmp_path))
    for arm, quality in evaluation.arms.items():
        without = measured[0].arms[arm]
        found = {key: quality.groups["pooled"][key] for key in ("fid", "kid")}
        assert quality.groups == without.groups | {"pooled": {**without.groups["pooled"], **found}}
        assert quality.missing == without.missing
    both, noise = (evaluation.arms[arm].groups["pooled"] for arm in ("both", "shared"))
    assert both["fid"] < noise["fid"] and both["kid"] < noise["kid"]
    held_out_NCHW, own_NCHW = (dataset(counts, seed)[0] for counts, seed in (((25,) * 4, 1), (COUNTS, 0)))
    features = [x_NCHW.mean((1, 3)) for x_NCHW in (own_NCHW, held_out_NCHW)]
    assert evaluation.arms["real"].groups["pooled"]["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert evaluation.measured is not None and evaluation.measured.inception is not None
    assert f"FID and KID: {evaluation.measured.inception}" in page and "not verified" in page


def test_without_a_network_nothing_is_called_fid(measured: tuple[Evaluation, str]) -> None:
    evaluation, page = measured
    assert all("fid" not in quality.groups["pooled"] for quality in evaluation.arms.values())
    assert re.findall(r"\b[FK]ID\b", page.replace("published FID", "")) == []


def test_a_network_that_cannot_be_had_costs_fid_and_kid_and_the_page_says_why(tmp_path: Path) -> None:
    evaluation, page = written(with_inception(tmp_path, inceptionSha256="0" * 64))
    pooled = evaluation.arms["both"].groups["pooled"]
    assert pooled["fid"] is None and pooled["kid"] is None and pooled["frechet"] is not None
    assert evaluation.measured is not None and evaluation.measured.inception is None
    assert f"inception.pt: expected SHA-256 {'0' * 64}, found" in page


# ---- Jobs beside each other --------------------------------------------------------------------------------------


def unmeasured(folder: Path, mechanism: str, uid: str) -> EvaluateSpec:
    return prepared(folder, mechanism, uid, source={"format": "npz", "path": str(folder / "train.npz")})


def test_an_earlier_job_on_the_same_records_stands_beside_this_one(tmp_path: Path) -> None:
    written(unmeasured(tmp_path, "gaussian", "uid-00000001"))
    _, page = written(unmeasured(tmp_path, "summary", "uid-00000002"))
    assert "2 releases and ε = 15.46 per image" in page
    assert 'alt="One sample of each class, job gaussian"' in page


def test_the_same_job_evaluated_twice_stands_there_once(tmp_path: Path) -> None:
    spec = unmeasured(tmp_path, "summary", "uid-00000001")
    written(spec)
    assert "Jobs beside each other" not in written(spec)[1]


def test_pure_epsilon_of_an_earlier_job_is_added_as_it_is(tmp_path: Path) -> None:
    written(unmeasured(tmp_path, "privunit", "uid-00000001"))
    _, page = written(unmeasured(tmp_path, "summary", "uid-00000002"))
    assert "2 releases and ε = 20.00 per image at δ = 1e-5" in page


def test_pure_epsilon_after_another_job_is_combined_at_that_ones_delta(tmp_path: Path) -> None:
    written(unmeasured(tmp_path, "summary", "uid-00000001"))
    evaluation, page = written(unmeasured(tmp_path, "privunit", "uid-00000002"))
    assert (evaluation.delta, evaluation.pure_epsilon, evaluation.mu_squared) == (0, 10, 0)
    assert "2 releases and ε = 20.00 per image at δ = 1e-5" in page
    assert "ε = 10 per image, δ = 0, by the mechanism privunit" in page


@pytest.mark.parametrize("fault", ["other records", "damaged", "another version"])
def test_evaluations_that_do_not_belong_or_cannot_be_read_are_left_out(tmp_path: Path, fault: str) -> None:
    evaluation, _ = written(unmeasured(tmp_path, "gaussian", "uid-00000001"))
    changed = evaluation.to_wire()
    if fault == "other records":
        changed["recordsSha256"] = "0" * 64
    elif fault == "another version":
        changed["format"] = "feddiff.evaluation/0"
    data = b"{" if fault == "damaged" else json.dumps(changed).encode()
    open_store((tmp_path / "owner").as_uri()).put(layout.evaluation("uid-00000001", "a"), data)
    assert "Jobs beside each other" not in written(unmeasured(tmp_path, "summary", "uid-00000002"))[1]


# ---- What the server saw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", list(PRIVACY))
def test_the_released_column_comes_from_the_release_alone(tmp_path: Path, mechanism: str) -> None:
    spec = prepared(tmp_path, mechanism)
    own = evaluate.own_release(open_store(spec.federation_store), spec)
    pictures, note = evaluate.released_pictures(own, (1, 8, 8), 4)
    sizes = {"gaussian": [8, 8, 6, 6], "summary": [8] * 4, "privunit": [8, 8, 7, 7]}  # a mean, and all images there are
    assert [len(picture) for picture in pictures] == sizes[mechanism]
    assert ("your images with their noise" in note) is (mechanism != "summary")
    if mechanism == "privunit":
        mean_D = own.images_NCHW[own.labels_N == 0].mean(dim=0).numpy()  # type: ignore[union-attr]
        np.testing.assert_array_equal(pictures[0][0], np.rint(255 * mean_D.clip(0, 1)))
    if mechanism == "summary":
        mean_D = own.mean_sums_KD[0].numpy() / COUNTS[0]  # type: ignore[union-attr]
        np.testing.assert_array_equal(pictures[0][0].ravel(), np.rint(255 * mean_D.clip(0, 1)))


def test_without_noise_a_summary_gives_back_the_covariance_of_its_class() -> None:
    counts = (30, 7)  # about its own mean, and about the public centre
    x_KND = [torch.rand(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for count in counts]
    centres = [x_KND[0].mean(dim=0), torch.full((5,), 0.4, dtype=torch.float64)]
    moments = [(x_ND - centre).T @ (x_ND - centre) for x_ND, centre in zip(x_KND, centres, strict=True)]
    summary = OwnerSummary(
        mean_sums_KD=torch.stack([x_ND.sum(dim=0) for x_ND in x_KND]),
        moment_sums_KM=torch.stack([packed(moment_DD) for moment_DD in moments]),
        counts_K=torch.tensor(counts),
        mean_std=1.0,
        moment_std=1.0,
        moment_clip_norm=2.0,
        centre=0.4,
    )
    for label, x_ND in enumerate(x_KND):
        expected_DD = torch.cov(x_ND.T, correction=0)
        torch.testing.assert_close(evaluate.noisy_covariance(summary, label), expected_DD)
    map_DD = torch.diag(torch.tensor([0.5, 1.0, 1.0, 1.5, 2.0], dtype=torch.float64))
    through_map = replace(
        summary,
        moment_sums_KM=torch.stack([packed(map_DD @ moment_DD @ map_DD) for moment_DD in moments]),
        map_DD=map_DD,
    )
    for label, x_ND in enumerate(x_KND):
        found_DD = unmapped(evaluate.noisy_covariance(through_map, label), map_DD)
        torch.testing.assert_close(found_DD, torch.cov(x_ND.T, correction=0))


def test_the_released_column_is_the_same_every_time(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    own = evaluate.own_release(open_store(spec.federation_store), spec)
    drawn, again = (evaluate.released_pictures(own, (1, 8, 8), 4)[0] for _ in range(2))
    for one, other in zip(drawn, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_release_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    key = layout.released_shard(spec.job.uid, "a", "shard-00000.safetensors")
    path = tmp_path / "federation" / key
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataInvalid, match="client a"):
        evaluate.body(spec)


def test_a_client_that_does_not_count_is_not_evaluated(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    others = [reference.model_copy(update={"client": "b"}) for reference in spec.releases]
    with pytest.raises(DataInvalid, match="expected one of client a, found none"):
        evaluate.own_release(open_store(spec.federation_store), spec.model_copy(update={"releases": tuple(others)}))


def test_missing_samples_are_said_to_be_missing(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    open_store(spec.owner_store).delete(layout.samples(spec.job.uid, "a"))
    with pytest.raises(InputMissing, match="samples"):
        evaluate.body(spec)


def test_a_large_image_is_shown_by_its_mean_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = prepared(tmp_path)
    monkeypatch.setattr(evaluate, "LARGEST_DRAWN", 63)
    own = evaluate.own_release(open_store(spec.federation_store), spec)
    assert [len(picture) for picture in evaluate.released_pictures(own, (1, 8, 8), 4)[0]] == [1] * 4
