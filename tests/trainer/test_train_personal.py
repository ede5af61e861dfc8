"""The stage `train-personal` on real releases: what an owner's denoiser learns from, and that nothing of it leaves.

The data: 4×4 images of two classes; owner b's release is the other one in the federation store.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import ComputeSpec, PrivacySpec, parse
from feddiff_protocol.errors import DataInvalid, PrivacyRefusal
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_protocol.stages import ReleaseSpec, TrainPersonalSpec
from feddiff_trainer import train_personal, train_shared, training
from feddiff_trainer.batches import Batch
from feddiff_trainer.denoisers import denoiser_from_bytes
from feddiff_trainer.denoising import in_blocks
from feddiff_trainer.mechanisms import clip_l2
from feddiff_trainer.network import CLIPPED, UNCLIPPED, Denoiser, run_blocks_twice
from feddiff_trainer.records import of_blocks, read_source
from feddiff_trainer.release import release
from feddiff_trainer.released import Releases
from feddiff_trainer.stage import report_progress, run_stage
from feddiff_trainer.stores import open_store
from feddiff_trainer.telemetry import telling
from feddiff_trainer.train_personal import clipped_images, images_of, personal_pool, source_of
from feddiff_trainer.train_shared import pool_of, releases_of

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "uid-00000001"
COUNTS = {"a": (60, 20), "b": (20, 60)}
JOBS = {
    "summary": ({"mechanism": "summary", "clipNorm": "4", "momentClipNorm": "2"}, {"splitSigma": "0.25"}),
    "privunit": ({"mechanism": "privunit", "clipNorm": "2"}, {"splitSigma": "0.25"}),
    "squares": (
        {"mechanism": "summary", "clipNorm": "2", "momentClipNorm": "1", "blockSide": 2},
        {"splitSigma": "2"},
    ),
    "continued": ({"mechanism": "gaussian", "clipNorm": "1"}, {"timeline": "continued"}),
    "restarted": ({"mechanism": "gaussian", "clipNorm": "1"}, {"timeline": "restarted"}),
}
STEPS, BATCH, DRAWN = 10, 16, 3000
PROGRESS_FIELDS = {"event", "level", "timestamp", "stage", "done", "total", "unit"}


def write_records(path: Path, counts: tuple[int, ...], seed: int) -> None:
    rng, labels_N = np.random.default_rng(seed), np.repeat(np.arange(len(counts)), counts)
    images_NCHW = rng.uniform(0.0, 0.3, (len(labels_N), 1, 4, 4))
    images_NCHW[labels_N == 1, :, 2:] += 0.6
    np.savez(path, images=images_NCHW, labels=labels_N)


def prepared(folder: Path, job: str, **personal: Any) -> TrainPersonalSpec:
    """The spec of owner a, both owners having released."""
    documents = {client: owners_document(folder, job, client) for client in COUNTS}
    more = {
        "releases": [released(folder, client, document) for client, document in documents.items()],
        "network": {"baseWidth": 8},
        "shared": {},
        "personal": {"images": STEPS * BATCH, "batch": BATCH} | personal,
    }
    return parse(TrainPersonalSpec, documents["a"] | more, "spec")


def owners_document(folder: Path, job: str, client: str) -> dict[str, Any]:
    privacy, diffusion = JOBS[job]
    return {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "client": client,
        "source": {"format": "npz", "path": str(folder / f"owner-{client}" / "records.npz")},
        "image": {"channels": 1, "height": 4, "width": 4},
        "classes": {"count": 2, "records": COUNTS[client]},
        "privacy": privacy | {"epsilon": "10"} | ({} if job == "privunit" else {"delta": "1e-5"}),
        "diffusion": diffusion,
        "ownerStore": (folder / f"owner-{client}" / "store").as_uri(),
        "federationStore": (folder / "federation").as_uri(),
    }


def released(folder: Path, client: str, document: dict[str, Any]) -> dict[str, str]:
    (folder / f"owner-{client}").mkdir(parents=True)
    write_records(folder / f"owner-{client}" / "records.npz", COUNTS[client], seed=ord(client))
    spec = parse(ReleaseSpec, document | {"release": layout.release_name(UID, client, "dataset")}, "release")
    sha256 = release(
        spec,
        owner_store=open_store(spec.owner_store),
        federation_store=open_store(spec.federation_store),
        normals=np.random.default_rng(ord(client)).standard_normal,
    )
    return {"client": client, "manifestSha256": sha256}


def own_images(spec: TrainPersonalSpec) -> tuple[Tensor, Tensor]:
    return images_of(read_source(spec.source, spec.image, spec.classes), spec.image)


def test_it_computes_as_the_job_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def spy(model: Denoiser, batch_loss: training.BatchLoss, **how: Any) -> Denoiser:
        asked.append(how | {"run": model.unet.run})
        return model

    monkeypatch.setattr(train_personal, "train", spy)
    spec = prepared(tmp_path, "summary", accumulation=4)
    compute = ComputeSpec(precision="float32", gradient_checkpointing=True, compile=True)
    train_personal.body(spec.model_copy(update={"compute": compute}))
    found = [asked[0][name] for name in ("accumulation", "bfloat16", "compiled", "run")]
    assert found == [4, False, True, run_blocks_twice]


def batch_of(spec: TrainPersonalSpec) -> Batch:
    return batch_drawn(spec, releases_of(spec, open_store(spec.federation_store), 2))


def batch_drawn(spec: TrainPersonalSpec, releases: Releases) -> Batch:
    source = source_of(spec, read_source(spec.source, spec.image, spec.classes), releases, torch.device("cpu"))
    return source(DRAWN, torch.Generator().manual_seed(1))


def own_rows(spec: TrainPersonalSpec, batch: Batch) -> Tensor:
    """Which images of a batch are the owner's own records, under their own label."""
    images_NCHW, label_N = own_images(spec)
    known = {(x.numpy().tobytes(), int(k)) for x, k in zip(images_NCHW, label_N, strict=True)}
    pairs = zip(batch.y0_BCHW, batch.label_B, strict=True)
    return torch.tensor([(x.numpy().tobytes(), int(k)) in known for x, k in pairs])


def own_only(spec: TrainPersonalSpec) -> bool:
    """Nothing but clean records of the owner, at every noise level from the lowest to above any split."""
    batch, sigmas = batch_of(spec), schedule_of(spec.diffusion).sigmas
    spread = float(batch.sigma_B.min()) < 2 * sigmas[0] and float(batch.sigma_B.max()) > 5
    return spread and bool(own_rows(spec, batch).all()) and batch.sigma0_B.unique().tolist() == [0.0]


def test_own_images_are_the_records_in_minus_one_to_one(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "summary")
    images_NCHW, label_N = own_images(spec)
    with np.load(spec.source.path) as stored:
        np.testing.assert_allclose(images_NCHW.numpy(), 2 * stored["images"] - 1, atol=1e-6)
        assert label_N.tolist() == stored["labels"].tolist()
    assert images_NCHW.dtype == torch.float32


@pytest.mark.parametrize("job", ["summary", "privunit", "continued"])
def test_own_records_at_all_noise_levels_and_releases_from_where_they_say_something(tmp_path: Path, job: str) -> None:
    """Below the split a noised image says nothing: there is no less noise in it."""
    spec = prepared(tmp_path, job, releaseShare="0.25")
    batch, split = batch_of(spec), promise_of(spec.privacy, spec.diffusion).split_sigma
    own_B, lowest = own_rows(spec, batch), split if job == "continued" else 0.1
    assert int(own_B.sum()) == 0.75 * DRAWN
    assert batch.sigma_B[own_B].min() < 0.05 < split < batch.sigma_B[own_B].max()
    assert lowest - 1e-6 <= batch.sigma_B[~own_B].min() < 1.1 * lowest and batch.sigma_B[~own_B].max() > 5
    assert batch.sigma0_B[own_B].unique().tolist() == [0.0]
    noised_for_ever = split if job == "continued" else 0.0  # draws from the pooled Gaussian are clean
    assert batch.sigma0_B[~own_B].unique().tolist() == pytest.approx([noised_for_ever])


@pytest.mark.parametrize("job", ["summary", "privunit"])
def test_draws_begin_where_asked(tmp_path: Path, job: str) -> None:
    spec = prepared(tmp_path, job, releaseShare="0.25", releaseSigma="1")
    batch = batch_of(spec)
    assert 1 - 1e-6 <= batch.sigma_B[~own_rows(spec, batch)].min() < 1.1


def test_draws_of_squares_have_one_colour_in_each_and_the_classes_colours(tmp_path: Path) -> None:
    """Class 1 is bright below; of class 0 the owner has 60 records and of class 1 only 20, so that one is filled up."""
    spec = prepared(tmp_path, "squares", releaseShare="0.25", releaseSigma="1")
    batch = batch_of(spec)
    drawn_BCHW = batch.y0_BCHW[~own_rows(spec, batch)]
    assert torch.equal(in_blocks(drawn_BCHW[:, :, ::2, ::2], 2), drawn_BCHW)
    above, below = (float(half.mean()) for half in drawn_BCHW.split(2, dim=2))
    assert above == pytest.approx(2 * 0.15 - 1, abs=0.05) and below == pytest.approx(2 * 0.75 - 1, abs=0.05)


@pytest.mark.parametrize("job", ["summary", "privunit", "squares"])
def test_the_pool_at_home_has_the_owners_own_moments_exact(tmp_path: Path, job: str) -> None:
    """Class means from a stronger hand than its release's noise: the owner's own records."""
    spec = prepared(tmp_path, job, **({"releaseSigma": "1"} if job == "squares" else {}))
    own = read_source(spec.source, spec.image, spec.classes)
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    at_home, public = personal_pool(spec, own, releases), pool_of(releases, spec)
    common = max(range(2), key=lambda k: COUNTS["a"][k])
    known = of_blocks(own, spec.privacy.block_side_or_one)
    mean_D = 2 * known[:][own.labels_N == common].mean(axis=0) - 1
    error, public_error = (np.abs(each.means_KD[common].numpy() - mean_D).mean() for each in (at_home, public))
    assert error < public_error / 2


def test_releases_of_all_owners_are_learnt_from(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "continued", releaseShare="0.5")
    batch, known = batch_of(spec), dict[bytes, str]()
    for reference, y in zip(spec.releases, releases_of(spec, open_store(spec.federation_store), 2), strict=True):
        known |= {x.numpy().tobytes(): reference.client for x in y.images_NCHW}
    foreign = batch.y0_BCHW[~own_rows(spec, batch)]
    assert {known[x.numpy().tobytes()] for x in foreign} == {"a", "b"}


def test_without_a_share_of_releases_and_in_the_papers_timeline_own_records_are_all(tmp_path: Path) -> None:
    assert own_only(prepared(tmp_path / "none", "summary", releaseShare="0"))
    assert own_only(prepared(tmp_path / "noised", "continued", releaseShare="0"))
    assert own_only(prepared(tmp_path / "paper", "restarted", releaseShare="0.5"))
    assert not own_only(prepared(tmp_path / "mutant", "continued", releaseShare="0.01"))


def privacy_of(pixels: str, clip_norm: str) -> PrivacySpec:
    document = {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": clip_norm, "pixels": pixels}
    return parse(PrivacySpec, document, "privacy")


def released_clip(x_BCHW: Tensor, pixels: str, clip_norm: float) -> Tensor:
    """The release's own clip, in the units in which it clips, as the oracle."""
    x_ND = x_BCHW.flatten(1).double().numpy()
    v_ND = (x_ND + 1) / 2 if pixels == "zeroToOne" else x_ND
    clipped_ND = clip_l2(v_ND, clip_norm)
    images_ND = 2 * clipped_ND - 1 if pixels == "zeroToOne" else clipped_ND
    return torch.from_numpy(images_ND).view_as(x_BCHW).float()


@pytest.mark.parametrize("clip_norm", ["1.5", "2.3", "100"])
@pytest.mark.parametrize(("pixels", "other"), [("zeroToOne", "minusOneToOne"), ("minusOneToOne", "zeroToOne")])
def test_images_are_clipped_as_for_the_release(pixels: str, other: str, clip_norm: str) -> None:
    x_BCHW = 2 * torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(3)) - 1
    x_BCHW[0], x_BCHW[1] = -1, 0  # all black in one range, all zero in the other: nothing is divided by zero
    found = clipped_images(x_BCHW, privacy_of(pixels, clip_norm))
    torch.testing.assert_close(found, released_clip(x_BCHW, pixels, float(clip_norm)), atol=1e-6, rtol=0)
    if clip_norm != "100":  # the mutant: clipped in the other range
        assert not torch.allclose(found, released_clip(x_BCHW, other, float(clip_norm)), atol=1e-2)


def test_images_are_scaled_to_the_public_norm_as_for_a_release_of_directions() -> None:
    x_BCHW = 2 * torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(4)) - 1
    privacy = parse(PrivacySpec, {"mechanism": "privunit", "epsilon": "10", "clipNorm": "2.3"}, "privacy")
    norms_B = ((clipped_images(x_BCHW, privacy) + 1) / 2).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms_B, torch.full_like(norms_B, 2.3))


@pytest.mark.parametrize("pixels", ["zeroToOne", "minusOneToOne"])
def test_every_other_own_image_is_clipped_and_flagged(tmp_path: Path, pixels: str) -> None:
    """Against the same draw without the clip."""
    spec = prepared(tmp_path, "continued", releaseShare="0").model_copy(update={"privacy": privacy_of(pixels, "1")})
    mixing = spec.personal.model_copy(update={"clip_mix": True})
    plain, found = batch_drawn(spec, []), batch_drawn(spec.model_copy(update={"personal": mixing}), [])
    clipped_B = found.flag_B == CLIPPED
    assert plain.flag_B.unique().tolist() == [UNCLIPPED] and found.flag_B.unique().tolist() == [UNCLIPPED, CLIPPED]
    assert int(clipped_B.sum()) == DRAWN // 2
    assert torch.equal(found.y0_BCHW[~clipped_B], plain.y0_BCHW[~clipped_B])
    expected = released_clip(plain.y0_BCHW[clipped_B], pixels, 1.0)
    torch.testing.assert_close(found.y0_BCHW[clipped_B], expected, atol=1e-6, rtol=0)
    assert not torch.allclose(found.y0_BCHW[clipped_B], plain.y0_BCHW[clipped_B], atol=0.1)


def test_released_images_are_flagged_as_clipped_where_flags_tell(tmp_path: Path) -> None:
    """Samples are drawn as unclipped: what is clipped must not teach that flag its scale."""
    batch = batch_of(prepared(tmp_path, "continued", clipMix=True, releaseShare="0.25"))
    assert set(batch.flag_B[batch.sigma0_B > 0].tolist()) == {CLIPPED}
    plain = batch_of(prepared(tmp_path / "plain", "continued", releaseShare="0.25"))
    assert set(plain.flag_B.tolist()) == {UNCLIPPED}
    assert set(batch.flag_B[batch.sigma0_B == 0].tolist()) == {CLIPPED, UNCLIPPED}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("job", JOBS)
def test_the_denoiser_lies_in_the_owners_store_alone(tmp_path: Path, job: str) -> None:
    spec = prepared(tmp_path, job)
    before = files(tmp_path)
    assert train_personal.body(spec) == {}  # not even its hash is public
    after = files(tmp_path)
    checkpoints = f"owner-a/store/{layout.personal_checkpoints(UID, 'a')}"
    new = {name for name in set(after) - set(before) if not name.startswith(checkpoints)}
    assert len(after) == len(before) + len(new) + 1, "and a checkpoint"
    assert new == {f"owner-a/store/{layout.personal_denoiser(UID, 'a')}"}
    assert all(after[name] == data for name, data in before.items())
    config = train_personal.initial_denoiser(spec).config
    assert isinstance(denoiser_from_bytes(after[new.pop()], "personal", config), Denoiser)


def test_another_release_than_the_planners_is_refused(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "continued")
    store = open_store(spec.federation_store)
    key = layout.manifest(UID, "b")
    store.put(key, store.get(key) + b" ")
    with pytest.raises(DataInvalid, match="client b: expected a manifest with SHA-256"):
        train_personal.body(spec)
    assert not open_store(spec.owner_store).exists(layout.personal_denoiser(UID, "a"))


@pytest.fixture
def stage_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[TrainPersonalSpec], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs the stage as the engine does and gives its receipt and the lines on stderr."""

    def run(spec: TrainPersonalSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path = tmp_path / "SPEC.json"
        path.write_text(json.dumps(spec.to_wire()))
        monkeypatch.setattr(sys, "argv", ["stage", str(path)])
        monkeypatch.setenv("FEDDIFF_TERMINATION_LOG", str(tmp_path / "termination-log"))
        monkeypatch.setattr(training, "PROGRESS_SECONDS", 0.0)
        assert run_stage(TrainPersonalSpec, train_personal.body) == 0
        out, err = capfd.readouterr()
        return json.loads(out), [json.loads(line) for line in err.splitlines()]

    return run


def test_all_that_is_said_is_how_far_it_got(
    stage_output: Callable[[TrainPersonalSpec], tuple[dict[str, Any], list[dict[str, Any]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and speed depend on private records. Mutants: lines that show them, and the shared denoiser's progress,
    which tells them as metrics, too: there the stage is stopped."""
    receipt, lines = stage_output(prepared(tmp_path / "run", "summary"))
    assert receipt["outputs"] == {}
    assert lines[-1]["done"] == lines[-1]["total"] == STEPS * BATCH
    assert all(set(line) == PROGRESS_FIELDS and line["unit"] == "images" for line in lines)
    monkeypatch.setattr(
        train_personal,
        "show_progress",
        lambda progress: report_progress(progress.images, progress.num_images, "images", loss=progress.loss),
    )
    _, lines = stage_output(prepared(tmp_path / "mutant", "summary"))
    assert any(set(line) > PROGRESS_FIELDS for line in lines)
    monkeypatch.setattr(
        train_personal, "show_progress", lambda progress: train_shared.show_progress_and_loss(progress, BATCH)
    )
    spec = prepared(tmp_path / "stopped", "summary")
    with telling(spec) as told, pytest.raises(PrivacyRefusal):
        train_personal.body(spec)
    assert "feddiff_trainer" not in told.exposition().decode()
