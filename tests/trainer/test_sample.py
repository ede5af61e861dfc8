"""The stage `sample` on known denoisers: whose images lie where, and which shared denoiser may have drawn them.

The shared denoiser makes dark images, the personal one bright ones, both a little brighter in class 1.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import SampleSpec
from feddiff_trainer import sample
from feddiff_trainer.denoisers import denoiser_bytes
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.network import Denoiser, NetworkConfig
from feddiff_trainer.pictures import LabelledImages, read_samples
from feddiff_trainer.stores import open_store

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANCE = 0.001
UID, CLIENT, ARMS = "uid-00000001", "a", ("both", "shared", "personal")
PRIVACY = {
    "summary": {"mechanism": "summary", "clipNorm": "3", "momentClipNorm": "2"},
    "gaussian": {"mechanism": "gaussian", "clipNorm": "3"},
}


def gaussian(level: float) -> ClassGaussian:
    means_KD = torch.full((2, 16), level) + torch.tensor([[0.0], [0.2]])
    return ClassGaussian(means_KD, VARIANCE * torch.eye(16).expand(2, 16, 16))


def prepared(folder: Path, mechanism: str = "summary", **changes: Any) -> SampleSpec:
    """A spec with both denoisers in their stores."""
    shared = denoiser_bytes(gaussian(-0.6))
    open_store((folder / "federation").as_uri()).put(layout.shared_denoiser(UID), shared)
    personal = denoiser_bytes(gaussian(0.4))
    open_store((folder / "owner").as_uri()).put(layout.personal_denoiser(UID, CLIENT), personal)
    document = {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "client": CLIENT,
        "source": {"format": "npz", "path": "not-read.npz"},
        "image": {"channels": 1, "height": 4, "width": 4},
        "classes": {"count": 2, "records": [30, 30]},
        "privacy": PRIVACY[mechanism] | {"epsilon": "10", "delta": "1e-5"},
        "diffusion": {"splitSigma": "0.25"} if mechanism == "summary" else {},
        "network": {},
        "shared": {},
        "personal": {},
        "sampling": {"imagesPerClass": 5, "steps": 10},
        "releases": [{"client": CLIENT, "manifestSha256": "0" * 64}],
        "ownerStore": (folder / "owner").as_uri(),
        "federationStore": (folder / "federation").as_uri(),
        "sharedDenoiserSha256": hashlib.sha256(shared).hexdigest(),
    }
    return parse(SampleSpec, document | changes, "spec")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(spec: SampleSpec) -> LabelledImages:
    assert sample.body(spec) == {}  # nothing of it is public
    data = open_store(spec.owner_store).get(layout.samples(UID, CLIENT))
    return read_samples(data, "samples", ARMS, spec.image, 2)


def further(spec: SampleSpec, path: Path) -> dict[str, Any]:
    """Arrays of the .npz that one more call writes."""
    assert sample.body(spec.model_copy(update={"output": str(path)})) == {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("mechanism", PRIVACY)
def test_every_arm_has_the_same_labels_and_its_own_hand_in_the_images(tmp_path: Path, mechanism: str) -> None:
    """From the split on the personal denoiser takes y to m + √(λ/(λ + σ²))·(y - m): that is `kept` of shared's hand."""
    spec = prepared(tmp_path, mechanism)
    images, split_sigma = drawn(spec), promise_of(spec.privacy, spec.diffusion).split_sigma
    kept = (VARIANCE / (VARIANCE + split_sigma**2)) ** 0.5
    assert kept < 0.2
    assert images.labels_N.tolist() == [0] * 5 + [1] * 5
    assert all(images.images[arm].shape == (10, 1, 4, 4) for arm in ARMS)
    for k in range(2):
        level = {arm: images.images[arm][images.labels_N == k].mean() / 127.5 - 1 for arm in ARMS}
        assert level["shared"] == pytest.approx(-0.6 + 0.2 * k, abs=0.05)
        assert level["personal"] == pytest.approx(0.4 + 0.2 * k, abs=0.05)
        assert level["both"] == pytest.approx(
            level["personal"] + kept * (level["shared"] - level["personal"]), abs=0.05
        )


def test_all_arms_start_from_the_same_noise(tmp_path: Path) -> None:
    spec, starts = prepared(tmp_path), list[torch.Tensor]()

    def spy(y_BCHW: torch.Tensor, sigma_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        if float(sigma_B[0]) > 70:
            starts.append(y_BCHW)
        return torch.zeros_like(y_BCHW)

    sample.draw_arms(spec, spy, spy, sample.generator_of(spec))
    assert len(starts) == 3 and torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


def test_another_shared_denoiser_than_the_planners_is_refused(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    store = open_store(spec.federation_store)
    store.put(layout.shared_denoiser(UID), denoiser_bytes(gaussian(-0.5)))
    before = files(tmp_path)
    with pytest.raises(DataInvalid, match=f"expected SHA-256 {spec.shared_denoiser_sha256}, found"):
        sample.body(spec)
    assert files(tmp_path) == before


def with_shared(spec: SampleSpec, data: bytes) -> SampleSpec:
    """The spec of a job whose own trainer is hostile: the hash is that of what it made."""
    open_store(spec.federation_store).put(layout.shared_denoiser(UID), data)
    return spec.model_copy(update={"shared_denoiser_sha256": hashlib.sha256(data).hexdigest()})


def of_width(width: int) -> bytes:
    return denoiser_bytes(Denoiser(NetworkConfig(1, 4, 4, num_classes=2, base_width=width)))


def test_a_shared_denoiser_of_the_jobs_network_is_taken(tmp_path: Path) -> None:
    spec = prepared(tmp_path, network={"baseWidth": 16})
    assert isinstance(sample.read_shared(with_shared(spec, of_width(16))), Denoiser)


@pytest.mark.parametrize("width", [8, 20])
def test_a_shared_denoiser_of_another_size_than_the_jobs_ends_the_stage_with_65(tmp_path: Path, width: int) -> None:
    spec = with_shared(prepared(tmp_path, network={"baseWidth": 16}), of_width(width))
    before = files(tmp_path)
    with pytest.raises(DataInvalid, match=f"base_width {width} where the job says 16") as refusal:
        sample.body(spec)
    assert refusal.value.exit_code == 65 and files(tmp_path) == before


def test_a_shared_denoiser_is_not_read_to_its_end_if_it_is_larger_than_the_jobs_can_be(tmp_path: Path) -> None:
    spec = with_shared(prepared(tmp_path, network={"baseWidth": 16}), bytes(16 << 20))
    with pytest.raises(DataInvalid, match=r"shared/denoiser\.safetensors: expected at most [0-9]+ bytes, found more"):
        sample.read_shared(spec)


def test_a_reader_without_a_limit_would_read_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what is wrong is found when everything is in memory."""
    monkeypatch.setattr(sample, "most_bytes", lambda kind, config, block_side: 1 << 40)
    spec = with_shared(prepared(tmp_path, network={"baseWidth": 16}), bytes(16 << 20))
    with pytest.raises(DataInvalid, match="expected a denoiser of format"):
        sample.read_shared(spec)


@pytest.mark.parametrize("store", ["owner", "federation"])
def test_a_missing_denoiser_is_named(tmp_path: Path, store: str) -> None:
    spec = prepared(tmp_path)
    key = layout.personal_denoiser(UID, CLIENT) if store == "owner" else layout.shared_denoiser(UID)
    open_store((tmp_path / store).as_uri()).delete(key)
    with pytest.raises(InputMissing, match=key):
        sample.body(spec)


def test_images_lie_in_the_owners_store_alone(tmp_path: Path) -> None:
    spec = prepared(tmp_path)
    before = files(tmp_path)
    sample.body(spec)
    assert set(files(tmp_path)) - set(before) == {f"owner/{layout.samples(UID, CLIENT)}"}
    assert all(files(tmp_path)[name] == data for name, data in before.items())


@pytest.mark.parametrize("sampler", ["heun", "ddpm", "dpm"])
def test_another_attempt_gives_the_same_bytes(tmp_path: Path, sampler: str) -> None:
    first = prepared(tmp_path, sampling={"imagesPerClass": 5, "steps": 10, "sampler": sampler})
    key, results = layout.samples(UID, CLIENT), []
    for attempt in (1, 2):
        sample.body(first.model_copy(update={"attempt": attempt}))
        results.append(open_store(first.owner_store).get(key))
    assert results[0] == results[1]


def test_further_samples_are_a_file_and_leave_the_stores_alone(tmp_path: Path) -> None:
    spec = prepared(tmp_path / "stores")
    before = files(tmp_path / "stores")
    arrays = further(spec, tmp_path / "more.npz")
    assert files(tmp_path / "stores") == before
    assert set(arrays) == {*ARMS, "labels"} and arrays["labels"].tolist() == [0] * 5 + [1] * 5
    assert all(arrays[arm].shape == (10, 1, 4, 4) and arrays[arm].dtype == np.uint8 for arm in ARMS)


def repeats(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The arms that share an image."""
    return [arm for arm in ARMS if {x.tobytes() for x in first[arm]} & {x.tobytes() for x in second[arm]}]


def test_further_samples_are_new_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = prepared(tmp_path)
    own = drawn(spec).images
    first, second = (further(spec, tmp_path / f"{name}.npz") for name in ("first", "second"))
    assert repeats(first, second) == [] and repeats(first, own) == [] and repeats(second, own) == []
    monkeypatch.setattr(os, "urandom", lambda count: b"\7" * count)  # mutant: randomness that comes back
    assert repeats(*(further(spec, tmp_path / f"{name}.npz") for name in ("third", "fourth"))) == list(ARMS)


@pytest.mark.parametrize("chunk", [1, 3, 10, 1024])
def test_images_carried_in_parts_stay_with_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(sample, "CHUNK", chunk)
    sizes = list[int]()
    spec, personal = prepared(tmp_path), gaussian(0.4)

    def shared(y_BCHW: torch.Tensor, sigma_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        sizes.append(len(y_BCHW))
        return torch.zeros_like(y_BCHW) + label_B[:, None, None, None] / 2

    images, label_N = sample.draw_arms(spec, shared, personal, sample.generator_of(spec))
    assert label_N.tolist() == [0] * 5 + [1] * 5 and max(sizes) == min(chunk, 10)
    assert all(len(images[arm]) == 10 for arm in ARMS)
    assert images["shared"].flatten(1).float().mean(1).tolist() == [128.0] * 5 + [191.0] * 5
