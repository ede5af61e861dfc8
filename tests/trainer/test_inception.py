"""FID and KID by a network that the owner names: a tiny scripted module stands in for Inception."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feddiff_protocol.api import ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_trainer import inception
from feddiff_trainer.inception import inception_distances, read_inception
from feddiff_trainer.metrics import frechet_distance_of_gaussians, kernel_distance

COLOUR = ImageSpec(channels=3, height=8, width=8)


class Means(nn.Module):
    """Mean of each channel, in 0..255: 3 features."""

    def forward(self, x_BCHW: Tensor, return_features: bool = False) -> Tensor:
        means_BC = x_BCHW.float().mean((2, 3))
        return means_BC if return_features else means_BC[:, :1]


class WithoutFeatures(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.float().mean((2, 3))


class OfThePixels(nn.Module):
    def forward(self, x_BCHW: Tensor, return_features: bool = False) -> Tensor:
        return x_BCHW.float()


class Infinite(nn.Module):
    def forward(self, x_BCHW: Tensor, return_features: bool = False) -> Tensor:
        return x_BCHW.float().mean((2, 3)) / 0.0


@pytest.fixture(autouse=True)
def scripting_is_deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(script|save)", DeprecationWarning)
        yield


def scripted(folder: Path, network: nn.Module) -> Path:
    path = folder / "inception.pt"
    torch.jit.script(network).save(str(path))
    return path


def source(path: Path, sha256: str | None = None) -> SourceSpec:
    return SourceSpec(
        format="npz", path="train.npz", holdout_path="holdout.npz", inception_path=str(path), inception_sha256=sha256
    )


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_file_there_is_no_network() -> None:
    assert read_inception(SourceSpec(format="npz", path="train.npz", holdout_path="holdout.npz"), COLOUR) is None


def test_features_are_of_the_8_bit_pixels_and_grey_counts_as_three_equal_channels(tmp_path: Path) -> None:
    path = scripted(tmp_path, Means())
    x_NCHW = np.random.default_rng(0).integers(0, 256, (inception.BATCH + 3, 3, 8, 8), dtype=np.uint8)
    network = read_inception(source(path), COLOUR)
    assert network is not None
    np.testing.assert_allclose(network.features(x_NCHW), x_NCHW.mean((2, 3)), rtol=1e-6)
    grey = read_inception(source(path), COLOUR.model_copy(update={"channels": 1}))
    assert grey is not None
    np.testing.assert_allclose(grey.features(x_NCHW[:, :1]), np.repeat(x_NCHW[:, :1].mean((2, 3)), 3, 1), rtol=1e-6)


def test_a_file_of_another_hash_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scripted(tmp_path, Means())
    right = sha256_of(path)
    verified = read_inception(source(path, right), COLOUR)
    assert verified is not None and verified.described == f"inception.pt, SHA-256 {right}, as the dataset states"
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(DataInvalid, match=rf"expected SHA-256 {right}, found {sha256_of(path)}; it was not run"):
        read_inception(source(path, right), COLOUR)


def test_a_file_without_a_stated_hash_is_called_not_verified(tmp_path: Path) -> None:
    path = scripted(tmp_path, Means())
    network = read_inception(source(path), COLOUR)
    assert network is not None
    assert (
        network.described == f"inception.pt, SHA-256 {sha256_of(path)}, which the dataset does not state: not verified"
    )


def test_a_file_that_is_missing_or_no_torchscript_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"none\.pt: cannot be read: No such file"):
        read_inception(source(tmp_path / "none.pt"), COLOUR)
    weights = io.BytesIO()
    torch.save(nn.Linear(2, 2).state_dict(), weights)
    for data in (b"", b"no archive", weights.getvalue()):
        (tmp_path / "other.pt").write_bytes(data)
        with pytest.raises(DataInvalid, match=r"other\.pt: expected TorchScript, found: .*; name StyleGAN's"):
            read_inception(source(tmp_path / "other.pt"), COLOUR)


def test_images_of_two_or_four_channels_are_refused(tmp_path: Path) -> None:
    for channels in (2, 4):
        with pytest.raises(DataInvalid, match=f"expected images of 1 or 3 channels, found {channels}"):
            read_inception(source(tmp_path / "inception.pt"), COLOUR.model_copy(update={"channels": channels}))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (WithoutFeatures(), "found: forward"),
        (OfThePixels(), r"found \(2, 3, 8, 8\)"),
        (Infinite(), "found NaN or infinity"),
    ],
)
def test_a_network_that_gives_no_features_is_named(tmp_path: Path, network: nn.Module, found: str) -> None:
    loaded = read_inception(source(scripted(tmp_path, network)), COLOUR)
    assert loaded is not None
    with pytest.raises(DataInvalid, match=f"expected one row of features for each image, {found}"):
        loaded.features(np.full((2, 3, 8, 8), 9, np.uint8))


def test_the_distances_are_those_of_the_features() -> None:
    a_NF, b_NF = (np.random.default_rng(seed).normal(seed, 1, (40, 3)) for seed in (0, 1))
    found = inception_distances(a_NF, b_NF, seed=0)
    moments = [(x_NF.mean(axis=0), np.cov(x_NF.T)) for x_NF in (a_NF, b_NF)]
    assert found["fid"] == pytest.approx(frechet_distance_of_gaussians(*moments[0], *moments[1]))
    assert found["kid"] == kernel_distance(a_NF, b_NF)


def test_an_fid_of_fewer_images_than_features_is_none() -> None:
    a_NF = np.random.default_rng(0).normal(size=(2048, 2048))
    found = inception_distances(a_NF[:1], a_NF, seed=0)
    assert found == {
        "fid": "needs more than 2,048 images of each kind, has 1",
        "kid": "needs at least 2 images of each kind, has 1",
    }
    assert isinstance(inception_distances(a_NF[:40], a_NF[:50], seed=0)["kid"], float)


def test_kid_pairs_so_many_images_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "MOST_PAIRED", 10)
    a_NF = np.random.default_rng(0).normal(size=(30, 2))
    rows = inception.chosen_rows(30, 10, 7)
    assert inception_distances(a_NF, a_NF[:10], seed=7)["kid"] == kernel_distance(a_NF[rows], a_NF[:10])
