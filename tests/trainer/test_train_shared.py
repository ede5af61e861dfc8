"""The stage `train-shared` on real releases of two small owners: what it leaves, and that it sees nothing but releases.

The data: 4×4 images of two classes, each with a bright half of its own; what owner a has much of, b has little of.
Run as a script, this file is one of two ranks (see two_ranks).
"""

import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn

from feddiff_protocol import layout
from feddiff_protocol.api import ComputeSpec, parse
from feddiff_protocol.errors import DataInvalid, FeddiffError, Interrupted
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_protocol.stages import ReleaseSpec, Stage, TrainSharedSpec
from feddiff_protocol.telemetry import told_by
from feddiff_trainer import released as reading
from feddiff_trainer import shards, train_shared, training
from feddiff_trainer.batches import Source
from feddiff_trainer.denoisers import denoiser_from_bytes
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.network import Denoiser, run_blocks, run_blocks_twice
from feddiff_trainer.pictures import read_samples
from feddiff_trainer.pooling import largest_trace, pool
from feddiff_trainer.release import release
from feddiff_trainer.stores import FolderStore, open_store
from feddiff_trainer.telemetry import telling
from feddiff_trainer.train_shared import network_config, owners_of, pool_of, pooled_of, releases_of
from feddiff_trainer.training import BatchLoss, World
from two_ranks import run_two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "uid-00000001"
COUNTS = {"a": (120, 30), "b": (30, 120)}
SUMMARY = {"mechanism": "summary", "clipNorm": "4", "momentClipNorm": "2"}, {"splitSigma": "0.25"}
PRIVUNIT = {"mechanism": "privunit", "clipNorm": "2"}, {"splitSigma": "0.25"}
JOBS = {
    "summary": SUMMARY,
    "privunit": PRIVUNIT,
    "closedForm": SUMMARY,
    "continued": ({"mechanism": "gaussian", "clipNorm": "1"}, {"timeline": "continued"}),
    "restarted": ({"mechanism": "gaussian", "clipNorm": "1"}, {"timeline": "restarted"}),
}
TRAINED = [job for job in JOBS if job != "closedForm"]
STEPS, BATCH = 60, 32


@dataclass(frozen=True)
class Finished:
    """One job's undisturbed run. losses: of every step, the network's and its own before training."""

    spec: TrainSharedSpec
    listed_before: set[str]
    weights: bytes
    samples: bytes
    losses: list[tuple[float, float]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    @cache
    def run(job: str) -> Finished:
        spec, losses = prepared(tmp_path_factory.mktemp(job), job), list[tuple[float, float]]()
        before = set(open_store(spec.federation_store).list(f"{UID}/"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch_losses(monkeypatch, lambda *pair: losses.append(pair))
            return Finished(spec, before, *result(spec), losses)

    return run


def denoiser_of(run: Finished) -> Denoiser | ClassGaussian:
    spec = run.spec
    config = network_config(spec.network, spec.image, spec.num_classes, train_shared.sigma_data_of(spec))
    return denoiser_from_bytes(run.weights, "shared", config)


def write_records(path: Path, counts: tuple[int, ...], seed: int) -> None:
    rng, labels_N = np.random.default_rng(seed), np.repeat(np.arange(len(counts)), counts)
    images_NCHW = rng.uniform(0.0, 0.3, (len(labels_N), 1, 4, 4))
    for label in range(len(counts)):
        images_NCHW[labels_N == label, :, 2 * label : 2 * label + 2] += 0.6
    np.savez(path, images=images_NCHW, labels=labels_N)


def prepared(folder: Path, job: str, noise: int = 0) -> TrainSharedSpec:
    """The spec of a job whose two owners have released, with noise of this seed."""
    privacy, diffusion = JOBS[job]
    common = {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "image": {"channels": 1, "height": 4, "width": 4},
        "privacy": privacy | {"epsilon": "10"} | ({} if job == "privunit" else {"delta": "1e-5"}),
        "diffusion": diffusion,
        "federationStore": (folder / "federation").as_uri(),
    }
    document = common | {
        "releases": [released(folder, client, common, noise) for client in COUNTS],
        "numClasses": 2,
        "network": {"baseWidth": 8},
        "shared": {"denoiser": "closedForm" if job == "closedForm" else "trained"}
        | {"images": STEPS * BATCH, "batch": BATCH},
        "sampling": {"steps": 8},
    }
    return parse(TrainSharedSpec, document, "spec")


def released(folder: Path, client: str, common: dict[str, Any], noise: int) -> dict[str, str]:
    owner = folder / f"owner-{client}"
    owner.mkdir(parents=True)
    write_records(owner / "records.npz", COUNTS[client], seed=ord(client))
    document = common | {
        "client": client,
        "release": layout.release_name(UID, client, "dataset"),
        "source": {"format": "npz", "path": str(owner / "records.npz")},
        "classes": {"count": 2, "records": COUNTS[client]},
        "ownerStore": (owner / "store").as_uri(),
    }
    spec = parse(ReleaseSpec, document, "release")
    sha256 = release(
        spec,
        owner_store=open_store(spec.owner_store),
        federation_store=open_store(spec.federation_store),
        normals=np.random.default_rng([noise, ord(client)]).standard_normal,
    )
    return {"client": client, "manifestSha256": sha256}


def result(spec: TrainSharedSpec) -> tuple[bytes, bytes]:
    """Denoiser and samples that the stage left, the receipt having named the denoiser."""
    outputs = train_shared.body(spec)
    store = open_store(spec.federation_store)
    data = store.get(layout.shared_denoiser(UID))
    assert outputs == {"denoiser": hashlib.sha256(data).hexdigest()}
    return data, store.get(layout.shared_samples(UID))


def test_it_computes_as_the_job_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def spy(model: Denoiser, batch_loss: BatchLoss, **how: Any) -> Denoiser:
        asked.append(how | {"run": model.unet.run})
        return model

    monkeypatch.setattr(train_shared, "train", spy)
    spec = prepared(tmp_path, "summary")
    compute = ComputeSpec(precision="bfloat16", gradient_checkpointing=True, compile=True)
    shared = spec.shared.model_copy(update={"accumulation": 4})
    train_shared.body(spec.model_copy(update={"compute": compute, "shared": shared}))
    train_shared.body(spec)
    found = [[each[name] for name in ("accumulation", "bfloat16", "compiled", "run")] for each in asked]
    assert found == [[4, True, True, run_blocks_twice], [1, None, False, run_blocks]]


def test_what_the_training_tells_is_what_it_did(tmp_path: Path) -> None:
    """One scrape at its end: the counts are the spec's, and nothing is said of a GPU that is not there."""
    spec = prepared(tmp_path, "summary")
    began = time.time()
    with telling(spec) as told:
        train_shared.body(spec)
    families = text_string_to_metric_families(told.exposition().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert found["feddiff_trainer_steps_total"] == STEPS and found["feddiff_trainer_images_total"] == STEPS * BATCH
    assert found["feddiff_trainer_progress_ratio"] == found["feddiff_stage_progress_ratio"] == 1
    assert began <= found["feddiff_trainer_checkpoint_timestamp_seconds"] <= time.time()
    assert found["feddiff_trainer_loss"] > 0 and found["feddiff_trainer_data_wait_seconds_total"] > 0
    assert "feddiff_trainer_gpu_memory_bytes" not in found or torch.cuda.is_available()
    assert found.keys() <= {metric.name for metric in told_by(Stage.TRAIN_SHARED)}


def watch_losses(monkeypatch: pytest.MonkeyPatch, act: Callable[[float, float], None]) -> None:
    """Calls act(loss, loss of the network of the first step) in every step, both on the same batch."""
    original = train_shared.loss_of

    def loss_of(source: Source, sigma_data: float) -> BatchLoss:
        batch_loss, first = original(source, sigma_data), list[nn.Module]()

        def loss(model: nn.Module, generator: torch.Generator, count: int, mine: slice) -> Tensor:
            first.extend([] if first else [copy.deepcopy(model)])
            twin = generator.clone_state()
            value = batch_loss(model, generator, count, mine)
            with torch.no_grad():
                act(value.item(), batch_loss(first[0], twin, count, mine).item())
            return value

        return loss

    monkeypatch.setattr(train_shared, "loss_of", loss_of)


def checkpoints_of(spec: TrainSharedSpec) -> list[str]:
    return open_store(spec.federation_store).list(layout.shared_checkpoints(UID))


@pytest.mark.parametrize("job", JOBS)
def test_denoiser_and_samples_are_in_the_federation_store(finished: Callable[[str], Finished], job: str) -> None:
    run = finished(job)
    after = set(open_store(run.spec.federation_store).list(f"{UID}/"))
    new = after - run.listed_before - set(checkpoints_of(run.spec))
    assert new == {layout.shared_denoiser(UID), layout.shared_samples(UID)}
    assert len(checkpoints_of(run.spec)) == (0 if job == "closedForm" else 1)
    assert isinstance(denoiser_of(run), ClassGaussian if job == "closedForm" else Denoiser)
    images = read_samples(run.samples, "samples", ["images"], run.spec.image, 2)
    assert images.labels_N.tolist() == [0] * 10 + [1] * 10 and images.images["images"].std() > 0


def test_closed_form_is_the_denoiser_of_the_pool(finished: Callable[[str], Finished]) -> None:
    spec, found = finished("closedForm").spec, denoiser_of(finished("closedForm"))
    y_BCHW, label_B = (
        torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double(),
        torch.arange(20) % 2,
    )
    expected, others = (pool_of_all(spec, weight) for weight in (0.5, 0.9))
    for sigma in (0.3, 3.0, 70.0):
        sigma_B = torch.full((20,), sigma, dtype=torch.float64)
        torch.testing.assert_close(found(y_BCHW, sigma_B, label_B), expected(y_BCHW, sigma_B, label_B))
    sigma_B = torch.full((20,), 0.3, dtype=torch.float64)
    assert not torch.allclose(found(y_BCHW, sigma_B, label_B), others(y_BCHW, sigma_B, label_B), atol=1e-3)


def test_the_pool_of_directions_has_the_means_of_images_of_the_public_norm(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "privunit")
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    assert {largest_trace(owner) for owner in owners_of(releases)} == {2.0**2}
    found = pool_of(releases, spec)
    x_ND, labels_N = all_records(tmp_path)
    scaled_ND = 2 * x_ND / np.linalg.norm(x_ND, axis=1)[:, None]
    noise = best_cap(10.0, 16).noise_std(2.0)
    for k in range(2):
        mean_D = scaled_ND[labels_N == k].mean(axis=0)
        apart_D = (found.means_KD[k].numpy() + 1) / 2 - mean_D
        assert np.abs(apart_D).max() < 5 * noise / np.sqrt((labels_N == k).sum())


def all_records(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    stored = [np.load(folder / f"owner-{client}" / "records.npz") for client in COUNTS]
    images_ND = np.concatenate([each["images"].reshape(len(each["images"]), -1) for each in stored])
    return images_ND, np.concatenate([each["labels"] for each in stored])


def pool_of_all(spec: TrainSharedSpec, own_covariance_weight: float) -> ClassGaussian:
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    return ClassGaussian(*pool(releases, 0.05, own_covariance_weight))


def test_closed_form_shows_each_class_as_it_is(finished: Callable[[str], Finished]) -> None:
    """The data's own means, 2·pixel - 1, are what noise far above the split is answered with.

    Up to five standard errors of 120 and 30 records' noisy sums, and of the means of 150 uniforms of width 0.6.
    """
    run = finished("closedForm")
    mean_std = promise_of(run.spec.privacy, run.spec.diffusion).mean_std
    assert mean_std is not None
    error = math.hypot(2 * mean_std / math.hypot(120, 30), 0.6 / math.sqrt(12 * 150))
    found = denoiser_of(finished("closedForm"))
    label_B = torch.arange(2)
    x0_BHW = found(torch.zeros(2, 1, 4, 4), torch.full((2,), 1000.0), label_B)[:, 0]
    bright, dark = 2 * 0.75 - 1, 2 * 0.15 - 1
    expected_BHW = torch.full((2, 4, 4), dark)
    expected_BHW[0, :2] = expected_BHW[1, 2:] = bright
    assert (x0_BHW - expected_BHW).abs().max() < 5 * error


def test_closed_form_goes_where_the_samples_are_drawn(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "closedForm")
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    denoiser = train_shared.shared_denoiser(spec, pooled_of(spec, releases), World(0, 1, torch.device("meta")), print)
    assert {buffer.device.type for buffer in denoiser.buffers()} == {"meta"}


@pytest.mark.parametrize("job", TRAINED)
def test_loss_falls(finished: Callable[[str], Finished], job: str) -> None:
    """Below that of the untrained network on the very same batches, in the last third of the steps.

    By little where images are noise for the most part (restarted), but from the same batches: nothing else differs.
    """
    losses, untrained = (sum(values[-STEPS // 3 :]) for values in zip(*finished(job).losses, strict=True))
    assert len(finished(job).losses) == STEPS and losses < 0.98 * untrained


def test_trained_on_summaries_it_comes_near_the_closed_form(finished: Callable[[str], Finished]) -> None:
    """Above the split, where it was trained. Untrained, the estimate is c_skip·y, nearly zero at these levels."""
    run = finished("summary")
    found, exact = denoiser_of(run), pool_of_all(run.spec, 0.5)
    generator, label_B = torch.Generator().manual_seed(2), torch.arange(200) % 2
    sigma_B = torch.full((200,), 2.0)
    y_BCHW = exact.draw(label_B, (1, 4, 4), generator).float() + 2 * torch.randn(200, 1, 4, 4, generator=generator)
    expected = exact(y_BCHW, sigma_B, label_B)
    untrained = 0.25 / (4 + 0.25) * y_BCHW
    assert (found(y_BCHW, sigma_B, label_B) - expected).norm() < 0.5 * (untrained - expected).norm()


def source_of(spec: TrainSharedSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, float]:
    """What the training draws from, and its sigma_data."""
    seen = []
    monkeypatch.setattr(train_shared, "loss_of", lambda *arguments: seen.append(arguments))
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    config_sigma_data = train_shared.sigma_data_of(spec)
    train_shared.shared_loss(spec, pooled_of(spec, releases), config_sigma_data, torch.device("cpu"))
    return seen[0]


@pytest.mark.parametrize("job", ["summary", "privunit"])
def test_on_what_is_pooled_clean_draws_above_the_split_are_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    spec = prepared(tmp_path, job)
    source, sigma_data = source_of(spec, monkeypatch)
    batch, split = source(2000, torch.Generator().manual_seed(1)), promise_of(spec.privacy, spec.diffusion).split_sigma
    assert split - 1e-6 <= batch.sigma_B.min() < 1.1 * split and batch.sigma_B.max() > 100
    assert batch.sigma0_B.unique().tolist() == [0.0] and sigma_data == 0.5


def test_continued_trains_above_the_split_on_what_is_noised_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = prepared(tmp_path, "continued")
    source, sigma_data = source_of(spec, monkeypatch)
    batch, split = source(2000, torch.Generator().manual_seed(1)), promise_of(spec.privacy, spec.diffusion).split_sigma
    assert batch.sigma_B.min() >= split - 1e-6 and batch.sigma_B.max() > 100
    assert batch.sigma0_B.unique().tolist() == pytest.approx([split])
    assert float(batch.y0_BCHW.var()) == pytest.approx(split**2 + 0.07, rel=0.03)  # 0.07: of clipped images
    assert sigma_data == 0.5


def test_restarted_trains_at_all_levels_on_released_images_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = prepared(tmp_path, "restarted")
    source, sigma_data = source_of(spec, monkeypatch)
    batch, promise = source(2000, torch.Generator().manual_seed(1)), promise_of(spec.privacy, spec.diffusion)
    assert batch.sigma_B.min() < 0.1 and batch.sigma0_B.unique().tolist() == [0.0]
    alpha = schedule_of(spec.diffusion).alpha(promise.split_step)
    releases = releases_of(spec, open_store(spec.federation_store), 2)
    known = {x.numpy().tobytes() for release in releases for x in alpha * release.images_NCHW}
    assert {x.numpy().tobytes() for x in batch.y0_BCHW} <= known
    assert float(batch.y0_BCHW.std()) == pytest.approx(sigma_data, rel=0.1)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    spec = prepared(tmp_path, "continued")
    key, store = layout.manifest(UID, "b"), open_store(spec.federation_store)
    store.put(key, store.get(key).replace(b'"client":"b"', b'"client":"c"'))
    with pytest.raises(DataInvalid, match="client b: expected a manifest with SHA-256"):
        train_shared.body(spec)
    assert not store.exists(layout.shared_denoiser(UID)) and store.list(layout.shared_checkpoints(UID)) == []


@pytest.mark.parametrize("job", JOBS)
def test_released_bytes_alone_decide_the_result(finished: Callable[[str], Finished], tmp_path: Path, job: str) -> None:
    """The releases in another place, without the owners, give the same; other noise on the same records does not."""
    run = finished(job)
    for reference in run.spec.releases:
        copy_release(run.spec, reference.client, tmp_path / "federation")
    torch.manual_seed(7)  # nor does the process's own generator count
    moved = {"federation_store": (tmp_path / "federation").as_uri()}
    weights, samples = result(run.spec.model_copy(update=moved))
    assert weights == run.weights and samples == run.samples
    if job == "closedForm":
        assert result(prepared(tmp_path / "other", job, noise=1))[0] != weights


def copy_release(spec: TrainSharedSpec, client: str, folder: Path) -> None:
    store, place = open_store(spec.federation_store), open_store(folder.as_uri())
    for key in store.list(layout.client_prefix(UID, client)):
        place.put(key, store.get(key))


@pytest.mark.parametrize("job", TRAINED)
def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(
    finished: Callable[[str], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    run, losses = finished(job), list[float]()
    moved = {"federation_store": (tmp_path / "federation").as_uri()}
    spec, store = run.spec.model_copy(update=moved), open_store(moved["federation_store"])
    for reference in spec.releases:
        copy_release(run.spec, reference.client, tmp_path / "federation")

    def act(loss: float, _: float) -> None:
        losses.append(loss)
        if len(losses) == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    watch_losses(monkeypatch, act)
    with pytest.raises(Interrupted) as stopped:
        train_shared.body(spec)
    assert stopped.value.exit_code == 75
    assert not store.exists(layout.shared_denoiser(UID)) and not store.exists(layout.shared_samples(UID))
    weights, samples = result(spec)
    assert weights == run.weights and samples == run.samples
    assert losses == [loss for loss, _ in run.losses]  # step by step, none of them twice


def test_the_public_loss_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr(training, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(train_shared, "report_progress", lambda *line, **public: lines.append((line, public)))
    train_shared.body(prepared(tmp_path, "summary"))
    assert lines[-1][0] == (STEPS * BATCH, STEPS * BATCH, "images")
    assert all(set(public) == {"loss", "images_per_second"} for _, public in lines)


# -- two ranks --------------------------------------------------------------------------------------------------

SHARD_BYTES = 40 * (2 * 16 + 4)  # 150 images of each owner make shards of 40, 40, 40 and 30
FEW_STEPS = 5
TOLERANCE = 1e-6  # of all weights together, float32, after these steps; measured: 1e-8


class Watched(FolderStore):
    """Notes what it was asked for, and when: "step" stands for a training step."""

    calls: list[tuple[str, str]] = []  # noqa: RUF012

    def stream(self, key: str) -> Iterator[bytes]:
        self.calls.append(("stream", key))
        return super().stream(key)

    def get(self, key: str) -> bytes:
        self.calls.append(("get", key))
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self.calls.append(("put", key))
        super().put(key, data)

    def list(self, prefix: str) -> list[str]:
        self.calls.append(("list", prefix))
        return super().list(prefix)


@dataclass(frozen=True)
class Ranks:
    """What two ranks left of each story: of every rank its calls and how it ended."""

    folder: Path
    log: list[str]
    alone: bytes

    def calls(self, story: str) -> list[list[tuple[str, str]]]:
        return [[(what, key) for what, key in self._left(story, rank)["calls"]] for rank in range(2)]

    def ends(self, story: str) -> list[str]:
        return [self._left(story, rank)["end"] for rank in range(2)]

    def _left(self, story: str, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / f"{story}-{rank}.json").read_text())

    def released(self, story: str) -> set[str]:
        store = open_store((self.folder / story).as_uri())
        return {key for client in COUNTS for key in store.list(layout.client_prefix(UID, client))}

    def denoiser(self, story: str) -> bytes:
        return open_store((self.folder / story).as_uri()).get(layout.shared_denoiser(UID))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Both ranks carry out the stage once for each story, on a store of its own."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
        spec = prepared(folder, "continued")
        shorter = spec.shared.model_copy(update={"images": FEW_STEPS * BATCH})
        spec = spec.model_copy(update={"shared": shorter})
        for story in ("honest", "everybody", "damaged", "alone"):
            for client in COUNTS:
                copy_release(spec, client, folder / story)
        damage(folder / "damaged", layout.released_shard(UID, "b", "shard-00001.safetensors"))
        alone, _ = result(at(spec, folder / "alone"))
    (folder / "spec.json").write_text(json.dumps(spec.to_wire()))
    return Ranks(folder, [log for _, log in run_two_ranks(__file__, folder)], alone)


def at(spec: TrainSharedSpec, folder: Path) -> TrainSharedSpec:
    return spec.model_copy(update={"federation_store": folder.as_uri()})


def damage(folder: Path, key: str) -> None:
    data = bytearray((folder / key).read_bytes())
    data[-1] ^= 1
    (folder / key).write_bytes(data)


def test_the_store_sends_every_object_once_to_both_ranks_together(two_ranks: Ranks) -> None:
    first, second = ([key for what, key in calls if what == "stream"] for calls in two_ranks.calls("honest"))
    assert Counter(first + second) == dict.fromkeys(two_ranks.released("honest"), 1), two_ranks.log
    assert len(two_ranks.released("honest")) == 2 + 8 and (len(first), len(second)) == (5, 5)
    everybody = Counter(key for calls in two_ranks.calls("everybody") for what, key in calls if what == "stream")
    assert set(everybody.values()) == {2}, "the mutant: every rank reads everything"


def test_no_rank_asks_the_store_for_anything_while_it_trains(two_ranks: Ranks) -> None:
    """Up to the last step: shorter than a minute, this run has its first checkpoint at its end."""
    for rank, calls in enumerate(two_ranks.calls("honest")):
        first, last = (pick(i for i, (what, _) in enumerate(calls) if what == "step") for pick in (min, max))
        assert [what for what, _ in calls[first : last + 1]] == ["step"] * FEW_STEPS
        after = {key.removeprefix(layout.shared_checkpoints(UID))[:12] for what, key in calls[last:] if what == "put"}
        own = {f"{FEW_STEPS:012d}", layout.shared_denoiser(UID)[:12], layout.shared_samples(UID)[:12]}
        assert after == (own if rank == 0 else set())


def test_two_ranks_make_the_denoiser_of_one(two_ranks: Ranks) -> None:
    found, expected = (flat(data) for data in (two_ranks.denoiser("honest"), two_ranks.alone))
    assert two_ranks.ends("honest") == ["done"] * 2
    assert (found - expected).norm() / expected.norm() < TOLERANCE


def flat(data: bytes) -> Tensor:
    return torch.cat([weight.flatten() for _, weight in sorted(safetensors.torch.load(data).items())])


def test_what_one_rank_finds_wrong_every_rank_says(two_ranks: Ranks) -> None:
    first, second = two_ranks.ends("damaged")
    assert first == second
    assert first.startswith("65: release of client b: shard-00001.safetensors: expected")
    assert not (two_ranks.folder / "damaged" / layout.shared_denoiser(UID)).exists()


def be_a_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    shards.SHARD_BYTES = SHARD_BYTES
    spec = parse(TrainSharedSpec, json.loads((folder / "spec.json").read_text()), "spec")
    train_shared.open_store = lambda uri, _: Watched(uri)
    with pytest.MonkeyPatch.context() as monkeypatch, training.distributed(threads=1, timeout_seconds=120) as world:
        monkeypatch.setattr(train_shared, "distributed", lambda: nullcontext(world))
        tell(folder, "damaged", spec, world)
        watch_losses(monkeypatch, lambda *_: Watched.calls.append(("step", "")))
        tell(folder, "honest", spec, world)
        monkeypatch.setattr(reading, "fetched_once", lambda fetches, _: (fetch() for fetch in fetches))
        tell(folder, "everybody", spec, world)


def tell(folder: Path, story: str, spec: TrainSharedSpec, world: World) -> None:
    Watched.calls.clear()
    try:
        train_shared.body(at(spec, folder / story))
        end = "done"
    except FeddiffError as error:
        end = f"{error.exit_code}: {error}"
    (folder / f"{story}-{world.rank}.json").write_text(json.dumps({"end": end, "calls": Watched.calls}))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
