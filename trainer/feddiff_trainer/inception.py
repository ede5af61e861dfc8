"""FID and KID, by the Inception network that a data owner names; without it neither is measured, nor is anything else
called so.

The file is TorchScript as StyleGAN's authors publish it: called with images N×3×H×W in 0..255 and return_features=True
it gives N×F features, and resizes images itself. TorchScript is a program: it runs where the owner's records are, so
nobody but their owner names it, and nothing is ever downloaded.

Shapes: N images, B of a batch, C channels, H height, W width, F features.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feddiff_protocol.api import ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, InputMissing

from .classifier import Features
from .metrics import MOST_PAIRED, Found, chosen_rows, frechet_distance, kernel_distance
from .pictures import Pixels

BATCH = 64
COLOURS = (1, 3)  # channels that it can be shown; grey is shown as equal red, green and blue


@dataclass(frozen=True)
class Inception:
    """The network, and the words by which a report says which one it is."""

    apply: Callable[..., Tensor]
    described: str

    def features(self, pixels_NCHW: Pixels) -> Features:
        """features_NF, float64. Raises DataInvalid where the network is none that gives features of such images."""
        parts = []
        for start in range(0, len(pixels_NCHW), BATCH):
            x_BCHW = torch.from_numpy(pixels_NCHW[start : start + BATCH])
            parts.append(self._features_of(x_BCHW.expand(-1, 3, -1, -1)))
        return np.concatenate(parts)

    def _features_of(self, x_BCHW: Tensor) -> Features:
        try:
            with torch.no_grad():
                features_BF = self.apply(x_BCHW, return_features=True)
        except RuntimeError as error:
            raise DataInvalid(f"{self.described}: {NO_FEATURES}, found: {_first_line(error)}; {ANOTHER}") from None
        if not isinstance(features_BF, Tensor) or features_BF.ndim != 2 or len(features_BF) != len(x_BCHW):
            found = tuple(features_BF.shape) if isinstance(features_BF, Tensor) else type(features_BF).__name__
            raise DataInvalid(f"{self.described}: {NO_FEATURES}, found {found}; {ANOTHER}")
        values: Features = features_BF.double().numpy()
        if not np.isfinite(values).all():
            raise DataInvalid(f"{self.described}: {NO_FEATURES}, found NaN or infinity; {ANOTHER}")
        return values


NO_FEATURES = "expected one row of features for each image"
ANOTHER = "name StyleGAN's inception-2015-12-05.pt, or leave spec.source.inceptionPath out"


def read_inception(source: SourceSpec, image: ImageSpec) -> Inception | None:
    """The network of a dataset, or None. Its file is not run unless its SHA-256 is the one the dataset states, if any.

    Raises InputMissing, or DataInvalid for another hash, for what is no TorchScript, and for images that are neither
    grey nor colour.
    """
    if source.inception_path is None:
        return None
    path = Path(source.inception_path)
    if image.channels not in COLOURS:
        raise DataInvalid(
            f"spec.source.inceptionPath: expected images of 1 or 3 channels, found {image.channels}; leave it out"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputMissing(f"{path}: cannot be read: {error.strerror or error}; check path and permissions") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if source.inception_sha256 not in (None, sha256):
        raise DataInvalid(f"{path}: expected SHA-256 {source.inception_sha256}, found {sha256}; it was not run")
    verified = "as the dataset states" if source.inception_sha256 else "which the dataset does not state: not verified"
    return Inception(_loaded(path, data), f"{path.name}, SHA-256 {sha256}, {verified}")


def _loaded(path: Path, data: bytes) -> Callable[..., Tensor]:
    try:
        with warnings.catch_warnings():  # deprecated, but it is how these files are published
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, EOFError) as error:
        raise DataInvalid(f"{path}: expected TorchScript, found: {_first_line(error)}; {ANOTHER}") from None
    evaluating: Callable[..., Tensor] = network.eval()
    return evaluating


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def inception_distances(generated_NF: Features, held_out_NF: Features, seed: int) -> Found:
    """FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018), or why there is none. KID is one estimate of at most
    MOST_PAIRED images of each kind, drawn by chance with `seed`, not a mean over small subsets."""
    fewest, num_features = min(len(generated_NF), len(held_out_NF)), held_out_NF.shape[1]
    thinned = [x_NF[chosen_rows(len(x_NF), MOST_PAIRED, seed)] for x_NF in (generated_NF, held_out_NF)]
    return {
        "fid": f"needs more than {num_features:,} images of each kind, has {fewest:,}"
        if fewest <= num_features
        else frechet_distance(generated_NF, held_out_NF),
        "kid": f"needs at least 2 images of each kind, has {fewest}" if fewest < 2 else kernel_distance(*thinned),
    }
