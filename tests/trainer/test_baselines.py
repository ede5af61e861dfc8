"""Baselines of an experiment: each sees the records that it claims to see, and is measured as a job is.

The data: two owners' 8×8 images of two classes, each rare at one of them; an owner's images have its own brightness.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.baselines import BaselineSpec, MeasureBaselineSpec, TrainBaselineSpec
from feddiff_protocol.errors import InputMissing, SpecInvalid
from feddiff_protocol.stages import ReleaseSpec
from feddiff_trainer import measure_baseline, release, train_baseline
from feddiff_trainer.batches import Batch, loss_of, records
from feddiff_trainer.denoisers import denoiser_bytes
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.stores import open_store
from feddiff_trainer.train_shared import EMA_WIDTH, SIGMA_DATA
from feddiff_trainer.training import World, train

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "0123456789abcdef"
COUNTS = {"a": (40, 5), "b": (5, 20)}
BRIGHTNESS = {"a": 0.25, "b": 0.75}
SIZE, BATCH, IMAGES = 8, 16, 64
LIKE = {
    "clients": [{"name": client, "dataset": {"name": f"data-{client}"}} for client in COUNTS],
    "privacy": {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2"},
    "diffusion": {"splitSigma": "0.5"},
    "network": {"baseWidth": 8},
    "shared": {"images": 48, "batch": BATCH, "replicas": 1},
    "personal": {"images": IMAGES, "batch": BATCH, "releaseShare": "0.5", "releaseSigma": "0.1"},
    "sampling": {"imagesPerClass": 3, "steps": 3, "sampler": "ddpm"},
}


def write_records(folder: Path) -> None:
    """Of the two classes one is bright below; a value in the first row says whose an image is."""
    for seed, (client, counts) in enumerate(COUNTS.items()):
        rng, labels_N = np.random.default_rng(seed), np.repeat([0, 1], counts)
        images_NHW = rng.uniform(0, 0.4, (len(labels_N), SIZE, SIZE))
        images_NHW[labels_N == 1, SIZE // 2 :] += 0.6
        images_NHW[:, 0] = BRIGHTNESS[client]
        (folder / client).mkdir(parents=True)
        np.savez(folder / client / "train.npz", images=images_NHW, labels=labels_N)
        np.savez(folder / client / "holdout.npz", images=images_NHW[::-1], labels=labels_N[::-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path)
    return tmp_path


def document(folder: Path, baseline: str, client: str, **changes: Any) -> dict[str, Any]:
    owners = [
        {
            "client": name,
            "source": {
                "format": "npz",
                "path": str(folder / name / "train.npz"),
                "holdoutPath": str(folder / name / "holdout.npz"),
            },
            "classes": {"count": 2, "records": counts},
        }
        for name, counts in COUNTS.items()
    ]
    return {
        "job": {"uid": UID, "name": "study", "namespace": "research"},
        "attempt": 1,
        "seed": 3,
        "baseline": baseline,
        "client": client,
        "owners": owners,
        "image": {"channels": 1, "height": SIZE, "width": SIZE},
        "like": LIKE,
        "store": (folder / "store").as_uri(),
    } | changes


def training(folder: Path, baseline: str, client: str = "", **changes: Any) -> TrainBaselineSpec:
    return parse(TrainBaselineSpec, document(folder, baseline, client, **changes), "spec")


def measuring(folder: Path, baseline: str, client: str = "a", **changes: Any) -> MeasureBaselineSpec:
    return parse(MeasureBaselineSpec, document(folder, baseline, client, **changes), "spec")


def seen(spec: TrainBaselineSpec) -> set[str]:
    """Whose images a network is trained on."""
    batch = train_baseline.source_of(spec, torch.device("cpu"))(2000, torch.Generator().manual_seed(0))
    marks = ((batch.y0_BCHW[:, 0, 0, 0] + 1) / 2).numpy()
    return {client for client, value in BRIGHTNESS.items() if (np.abs(marks - value) < 1e-5).any()}


def stored(spec: BaselineSpec, client: str = "") -> bytes:
    return open_store(spec.store).get(train_baseline.network_key(spec, client))


# ---- What they see ----------------------------------------------------------------------------------------------


def test_a_local_network_sees_its_owners_records_and_nobody_elses(folder: Path) -> None:
    assert seen(training(folder, "local", "a")) == {"a"}
    assert seen(training(folder, "local", "b")) == {"b"}


def test_the_central_network_sees_everybodys_records_as_often_as_there_are(folder: Path) -> None:
    spec = training(folder, "central")
    assert seen(spec) == {"a", "b"}
    batch = train_baseline.source_of(spec, torch.device("cpu"))(4000, torch.Generator().manual_seed(0))
    assert int((batch.label_B == 1).sum()) / 4000 == pytest.approx(25 / 70, abs=0.03)
    assert batch.sigma0_B.unique().tolist() == [0]
    assert batch.sigma_B.min() < 0.05 and batch.sigma_B.max() > 5  # every noise level, above the split and below


def test_all_records_are_central_ones(folder: Path) -> None:
    images_NCHW, label_N = train_baseline.clean_images(training(folder, "central"), list(COUNTS))
    assert len(images_NCHW) == len(label_N) == 70
    assert torch.bincount(label_N).tolist() == [45, 25]


# ---- How they are trained ---------------------------------------------------------------------------------------


def plain(spec: TrainBaselineSpec, client: str) -> bytes:
    """What `train` alone makes of one client's records."""
    images_NCHW, label_N = train_baseline.clean_images(spec, [client])
    sigmas = train_baseline.schedule_of(spec.like.diffusion).sigmas
    network = train(
        train_baseline.initial_network(spec),
        loss_of(records(images_NCHW, label_N, (sigmas[0], sigmas[-1])), SIGMA_DATA),
        world=World(0, 1, torch.device("cpu")),
        num_images=IMAGES,
        batch=BATCH,
        learning_rate=2e-3,
        ema_width=EMA_WIDTH,
        seed=3,
        on_progress=lambda progress: None,
    )
    return denoiser_bytes(network)


def test_a_local_network_is_plain_training_with_the_jobs_network_steps_and_rate(folder: Path) -> None:
    spec = training(folder, "local", "a")
    assert train_baseline.body(spec) == {}  # nothing of it is public
    assert stored(spec, "a") == plain(spec, "a")


def test_another_seed_gives_another_network(folder: Path) -> None:
    one, other = (training(folder, "local", "a", seed=seed) for seed in (3, 4))
    train_baseline.body(one)
    before = stored(one, "a")
    open_store(one.store)  # the same store: checkpoints of the first would be refused
    other = training(folder, "local", "a", seed=4, store=(folder / "other").as_uri())
    train_baseline.body(other)
    assert stored(other, "a") != before


# ---- How they are measured --------------------------------------------------------------------------------------


def figures(spec: MeasureBaselineSpec) -> dict[str, Any]:
    assert measure_baseline.body(spec) == {}
    data = open_store(spec.store).get(layout.measured_baseline(UID, spec.client))
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.mark.parametrize(("baseline", "client"), [("local", "a"), ("central", "")])
def test_an_owners_figures_are_of_samples_of_its_arms_network(folder: Path, baseline: str, client: str) -> None:
    train_baseline.body(training(folder, baseline, client))
    found = figures(measuring(folder, baseline, "a"))
    assert (found["client"], found["measured"]["numSamples"], found["measured"]["seed"]) == ("a", 6, 3)
    assert found["quality"]["groups"].keys() == {"pooled", "all", "majority", "minority"}
    assert found["measured"]["numTrain"] == 45


def test_the_same_seed_draws_the_same_samples(folder: Path) -> None:
    train_baseline.body(training(folder, "central"))
    one, same, other = (
        measuring(folder, "central", client, seed=seed) for client, seed in (("a", 3), ("b", 3), ("a", 4))
    )
    images, label_N = measure_baseline.samples_of(one)
    assert images.shape == (6, 1, SIZE, SIZE) and label_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(images, measure_baseline.samples_of(same)[0])
    assert not torch.equal(images, measure_baseline.samples_of(other)[0])


def test_without_held_out_records_nothing_is_measured(folder: Path) -> None:
    spec = document(folder, "central", "a")
    del spec["owners"][0]["source"]["holdoutPath"]
    with pytest.raises(InputMissing, match=r"client a: expected source\.holdoutPath"):
        measure_baseline.body(parse(MeasureBaselineSpec, spec, "spec"))


# ---- FedAvg -----------------------------------------------------------------------------------------------------


def test_federated_averaging_with_one_owner_is_its_local_network(folder: Path) -> None:
    alone = document(folder, "fedavg", "")["owners"][:1]
    train_baseline.body(training(folder, "fedavg", owners=alone, rounds=2))
    assert stored(training(folder, "fedavg")) == plain(training(folder, "local", "a"), "a")


def test_federated_averaging_gives_each_owner_its_own_records_and_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def noticed(network: Any, losses: Any, num_records: Any, **settings: Any) -> Any:
        told.update(settings, num_records=num_records, losses=len(losses))
        return network

    monkeypatch.setattr(train_baseline, "fedavg", noticed)
    train_baseline.body(training(folder, "fedavg", rounds=3))
    assert (told["num_records"], told["losses"], told["rounds"], told["num_images"]) == ([45, 25], 2, 3, IMAGES)
    assert train_baseline.network_key(training(folder, "fedavg"), "") == layout.shared_denoiser(UID)


def test_federated_averaging_is_measured_with_the_network_in_common(folder: Path) -> None:
    train_baseline.body(training(folder, "fedavg", rounds=2))
    assert figures(measuring(folder, "fedavg", "b"))["client"] == "b"


# ---- DP-SGD -----------------------------------------------------------------------------------------------------


def test_dp_sgd_trains_on_its_owners_records_alone_at_the_jobs_promise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def of_records(images_NCHW: Tensor, label_N: Tensor, **settings: Any) -> str:
        told.update(settings, marks=((images_NCHW[:, 0, 0, 0] + 1) / 2).unique().tolist())
        return "gradients"

    def noticed(network: Any, gradients: Any, **settings: Any) -> Any:
        told.update(settings, gradients=gradients)
        return network

    monkeypatch.setattr(train_baseline, "denoiser_gradients", of_records)
    monkeypatch.setattr(train_baseline, "dp_sgd", noticed)
    train_baseline.body(training(folder, "dp-sgd", "b", noiseMultiplicity=5))
    assert told["marks"] == pytest.approx([BRIGHTNESS["b"]]) and told["gradients"] == "gradients"
    assert (told["num_records"], told["epsilon"], told["multiplicity"]) == (25, 10, 5)
    assert told["delta"] == pytest.approx(1e-5) and told["delta"] <= 1e-5
    assert (told["num_images"], told["batch"]) == (IMAGES, BATCH)
    assert "seed" not in told  # of the initial weights only: who knows it knows no noise


def test_dp_sgd_learns_and_is_measured_and_its_noise_follows_no_seed(folder: Path) -> None:
    like = LIKE | {"compute": {"gradientCheckpointing": True}, "privacy": LIKE["privacy"] | {"epsilon": "1000"}}
    found = []
    for store in ("one", "other"):
        given = {"like": like, "store": (folder / store).as_uri(), "noiseMultiplicity": 2}
        train_baseline.body(training(folder, "dp-sgd", "a", **given))
        found.append(stored(training(folder, "dp-sgd", "a", **given), "a"))
    assert figures(measuring(folder, "dp-sgd", "a", **given))["client"] == "a"
    assert found[0] != found[1]


# ---- The oracle -------------------------------------------------------------------------------------------------

SPLIT, LOWEST = 0.5, 0.1


def batch_of(spec: TrainBaselineSpec, count: int = 4000) -> Batch:
    return train_baseline.source_of(spec, torch.device("cpu"))(count, torch.Generator().manual_seed(0))


def test_the_oracles_shared_denoiser_sees_everybodys_clean_records_above_the_split_alone(folder: Path) -> None:
    spec = training(folder, "oracle")
    batch = batch_of(spec)
    assert seen(spec) == {"a", "b"}
    assert batch.sigma0_B.unique().tolist() == [0]
    assert SPLIT <= float(batch.sigma_B.min()) < SPLIT + 0.05
    assert train_baseline.training_of(spec) is spec.like.shared


def test_the_oracles_personal_denoiser_fills_its_rare_class_with_everybodys_records(folder: Path) -> None:
    spec = training(folder, "oracle", "a")  # 40 records of the first class, 5 of the second
    batch = batch_of(spec)
    others_B = (batch.y0_BCHW[:, 0, 0, 0] + 1) / 2 > 0.5
    assert float(others_B.float().mean()) == pytest.approx(0.5 * 20 / 25, abs=0.03)  # of half the batch, b's share
    assert batch.label_B[others_B].unique().tolist() == [1]
    assert LOWEST <= float(batch.sigma_B[others_B].min()) < LOWEST + 0.05
    assert float(batch.sigma_B.min()) < 0.05  # own records at every noise level
    assert train_baseline.training_of(spec) is spec.like.personal


def test_an_oracle_draws_with_both_of_its_networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(measure_baseline, "read_network", lambda spec, client: asked.append(client) or gaussian(0.0))
    measure_baseline.samples_of(measuring(folder, "oracle", "b"))
    assert asked == ["", "b"]


# ---- Controls of a run ------------------------------------------------------------------------------------------

RUN = "fedcba9876543210"
VARIANCE = 0.001


def gaussian(level: float) -> ClassGaussian:
    """A denoiser of images of one brightness."""
    return ClassGaussian(torch.full((2, SIZE**2), level), VARIANCE * torch.eye(SIZE**2).expand(2, -1, -1))


def finished_run(folder: Path, client: str = "a") -> dict[str, Any]:
    """The spec with which a run drew its samples: releases that are real, a personal denoiser of bright images, and no
    shared one, which no control needs."""
    releases, documents = [], {}
    for owner in document(folder, "draws", client)["owners"]:
        name = owner["client"]
        documents[name] = {
            "job": {"uid": RUN, "name": "study", "namespace": "research"},
            "attempt": 1,
            "client": name,
            "source": owner["source"],
            "image": {"channels": 1, "height": SIZE, "width": SIZE},
            "classes": owner["classes"],
            "privacy": LIKE["privacy"],
            "diffusion": LIKE["diffusion"],
            "ownerStore": (folder / name / "store").as_uri(),
            "federationStore": (folder / "federation").as_uri(),
        }
        asked = documents[name] | {"release": layout.release_name(RUN, name, "dataset")}
        releases.append({"client": name, "manifestSha256": release.body(parse(ReleaseSpec, asked, name))["manifest"]})
    key = layout.personal_denoiser(RUN, client)
    open_store(documents[client]["ownerStore"]).put(key, denoiser_bytes(gaussian(0.4)))
    more = {name: LIKE[name] for name in ("network", "shared", "personal", "sampling")}
    return documents[client] | more | {"releases": releases, "sharedDenoiserSha256": "0" * 64, "stage": "sample"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    write_records(folder)
    return folder, finished_run(folder)


def control(run: tuple[Path, dict[str, Any]], baseline: str, images_per_class: int = 3) -> MeasureBaselineSpec:
    sampling = LIKE["sampling"] | {"imagesPerClass": images_per_class}
    return measuring(run[0], baseline, "a", run=run[1], like=LIKE | {"sampling": sampling})


class Recorded:
    """A denoiser that remembers what it was asked."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, []

    def __call__(self, y_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        self.calls.append((float(sigma_B[0]), float(y_BCHW.std())))
        return self.inner(y_BCHW, sigma_B, label_B)


def test_from_noise_walks_from_the_split_with_nothing_but_noise(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    personal = Recorded(gaussian(0.4))
    monkeypatch.setattr(measure_baseline, "read_personal", lambda *told: personal)
    images, _ = measure_baseline.samples_of(control(run, "from-noise", 20))
    sigmas = [sigma for sigma, _ in personal.calls]
    assert sigmas[0] == max(sigmas) == pytest.approx(SPLIT, abs=0.01)
    assert personal.calls[0][1] == pytest.approx(sigmas[0], rel=0.05)  # an image of brightness 0.4 would add to it
    assert float(images.float().mean()) / 127.5 - 1 == pytest.approx(0.4, abs=0.05)


def test_closed_form_is_the_pool_down_to_the_split_and_the_personal_denoiser_from_there(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, personal = Recorded(gaussian(-0.5)), Recorded(gaussian(0.4))
    monkeypatch.setattr(measure_baseline, "pool_of_run", lambda spec: pool)
    monkeypatch.setattr(measure_baseline, "read_personal", lambda *told: personal)
    measure_baseline.samples_of(control(run, "closed-form"))
    assert min(sigma for sigma, _ in pool.calls) > max(sigma for sigma, _ in personal.calls) >= SPLIT


def test_closed_form_needs_no_shared_denoiser(run: Any) -> None:
    images, _ = measure_baseline.samples_of(control(run, "closed-form"))
    assert float(images.float().mean()) / 127.5 - 1 == pytest.approx(0.4, abs=0.1)  # the personal one's, from the split


def test_draws_have_the_pools_means_and_need_no_denoiser(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_baseline, "read_personal", None)
    spec = control(run, "draws", 400)
    images, label_N = measure_baseline.samples_of(spec)
    assert spec.run is not None
    pool = measure_baseline.pool_of_run(spec.run)
    for k in range(2):
        found_D = (images[label_N == k].double() / 127.5 - 1).mean(dim=0).flatten()
        torch.testing.assert_close(found_D, pool.means_KD[k].double(), atol=0.15, rtol=0)


def test_a_control_without_its_run_is_refused(folder: Path) -> None:
    with pytest.raises(SpecInvalid, match="run: baseline draws takes the run of a job, none was given"):
        measure_baseline.samples_of(measuring(folder, "draws"))


def test_a_controls_figures_are_measured_on_its_owner(run: Any) -> None:
    found = figures(control(run, "draws"))
    assert (found["client"], found["measured"]["numTrain"]) == ("a", 45)
