"""Colour images of 32×32 and 64×64 through every stage that makes images: a folder is released, each denoiser trained
for one step, a sample of each class drawn. What comes of one step is noise; that it fits is what is tested.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.stages import ReleaseSpec, SampleSpec, TrainPersonalSpec, TrainSharedSpec
from feddiff_trainer import release, sample, train_personal, train_shared
from feddiff_trainer.network import levels
from feddiff_trainer.pictures import read_samples
from feddiff_trainer.stores import open_store
from feddiff_trainer.train_shared import network_config

pytestmark = pytest.mark.usefixtures("one_thread")

UID, CLIENT, COUNTS, BATCH = "uid-00000001", "a", (5, 3), 4
NETWORKS = {32: {"baseWidth": 8}, 64: {"preset": "large", "baseWidth": 8}}


def write_folder(root: Path, side: int) -> Path:
    generator = np.random.default_rng(0)
    for label, count in enumerate(COUNTS):
        (root / str(label)).mkdir(parents=True)
        for row in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{row}.png")
    return root


def document_of(folder: Path, side: int) -> dict[str, Any]:
    """What the specs of all stages have in common."""
    return {
        "job": {"uid": UID, "name": "colour", "namespace": "research"},
        "attempt": 1,
        "image": {"channels": 3, "height": side, "width": side},
        "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "20"},
        "diffusion": {},
        "federationStore": (folder / "federation").as_uri(),
    }


@pytest.mark.parametrize("side", NETWORKS)
def test_a_folder_of_colour_images_becomes_samples(tmp_path: Path, side: int) -> None:
    common = document_of(tmp_path, side)
    owner = common | {
        "client": CLIENT,
        "source": {"format": "folder", "path": str(write_folder(tmp_path / "scans", side))},
        "classes": {"count": 2, "records": COUNTS},
        "ownerStore": (tmp_path / "owner").as_uri(),
    }
    name = layout.release_name(UID, CLIENT, "dataset")
    manifest = release.body(parse(ReleaseSpec, owner | {"release": name}, "release"))["manifest"]
    training = {
        "releases": [{"client": CLIENT, "manifestSha256": manifest}],
        "network": NETWORKS[side],
        "shared": {"images": BATCH, "batch": BATCH},
        "sampling": {"imagesPerClass": 1, "steps": 2},
    }
    shared = parse(TrainSharedSpec, common | training | {"numClasses": 2}, "shared")
    denoiser = train_shared.body(shared)["denoiser"]
    own = owner | training | {"personal": {"images": BATCH, "batch": BATCH}}
    train_personal.body(parse(TrainPersonalSpec, {k: v for k, v in own.items() if k != "sampling"}, "personal"))
    spec = parse(SampleSpec, own | {"sharedDenoiserSha256": denoiser}, "sample")
    sample.body(spec)
    samples = open_store(spec.owner_store).get(layout.samples(UID, CLIENT))
    images = read_samples(samples, "samples", ("both", "shared", "personal"), spec.image, 2).images
    assert {image.shape for image in images.values()} == {(2, 3, side, side)}
    grids, widths = levels(network_config(shared.network, shared.image, 2, 0.5))
    assert grids[-1] == (4, 4) and widths[-1] <= 32  # the coarsest grid, whatever the size
