"""A small run of one owner as its stages leave it, for what asks about finished runs: audits and exports.

The data: four classes of 8×8 images, a bright column at a class's own place, two of them rare.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.stages import ReleaseSpec, SampleSpec
from feddiff_trainer import audit, evaluate, release
from feddiff_trainer.denoisers import denoiser_bytes
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.stores import open_store

COUNTS, HELD_OUT = (40, 40, 12, 12), (40,) * 4
UID, CLIENT = "uid-00000001", "a"


def made_up_release(side: int, privacy: dict[str, Any], diffusion: dict[str, Any]) -> ReleaseSpec:
    """Of one record of either class; nothing of it is read or written."""
    document = {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "client": CLIENT,
        "release": f"prl-{'0' * 40}",
        "source": {"format": "npz", "path": "not-read.npz"},
        "image": {"channels": 1, "height": side, "width": side},
        "classes": {"count": 2, "records": [1, 1]},
        "privacy": privacy,
        "diffusion": diffusion,
        "ownerStore": "file:///not-there",
        "federationStore": "file:///not-there",
    }
    return parse(ReleaseSpec, document, "spec")


def images_of(label: int, num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([label, seed])
    x_NCHW = rng.integers(0, 120, (num, 1, 8, 8), dtype=np.uint8)
    x_NCHW[..., 2 * label] += rng.integers(60, 130, (num, 1, 8), dtype=np.uint8)
    return x_NCHW


def dataset(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels_N = np.repeat(np.arange(len(counts)), counts)
    return np.concatenate([images_of(label, count, seed) for label, count in enumerate(counts)]), labels_N


def the_distribution() -> ClassGaussian:
    """Mean and covariance of each class, from images that are nobody's."""
    means, covariances = [], []
    for label in range(4):
        x_ND = torch.from_numpy(images_of(label, 4000, 9).reshape(4000, -1) / 127.5 - 1)
        means.append(x_ND.mean(dim=0))
        covariances.append(torch.cov(x_ND.T))
    return ClassGaussian(torch.stack(means), torch.stack(covariances))


def prepared(folder: Path, **source: Any) -> SampleSpec:
    """The spec of a run's samples, with all that the run left: a real release, both denoisers, samples, a report.

    Both denoisers know the distribution alone, and all samples are fresh draws of it.
    """
    for name, counts, seed in (("train", COUNTS, 0), ("holdout", HELD_OUT, 1)):
        images, labels = dataset(counts, seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    document = {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "client": CLIENT,
        "source": {
            "format": "npz",
            "path": str(folder / "train.npz"),
            "holdoutPath": str(folder / "holdout.npz"),
            **source,
        },
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": 4, "records": list(COUNTS)},
        "privacy": {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "3", "momentClipNorm": "2"},
        "diffusion": {"splitSigma": "0.25"},
        "ownerStore": (folder / "owner").as_uri(),
        "federationStore": (folder / "federation").as_uri(),
    }
    name = layout.release_name(UID, CLIENT, "dataset")
    released = release.body(parse(ReleaseSpec, document | {"release": name}, "release"))["manifest"]
    weights, (drawn, labels) = denoiser_bytes(the_distribution()), dataset(HELD_OUT, 2)
    open_store((folder / "federation").as_uri()).put(layout.shared_denoiser(UID), weights)
    owner_store = open_store((folder / "owner").as_uri())
    owner_store.put(layout.personal_denoiser(UID, CLIENT), weights)
    put_samples(folder, {"both": drawn, "shared": drawn, "personal": drawn, "labels": labels})
    more = {
        "network": {"baseWidth": 16},
        "shared": {"denoiser": "closedForm"},
        "personal": {"learningRate": "6e-3"},
        "sampling": {"imagesPerClass": 40, "steps": 20},
        "releases": [{"client": CLIENT, "manifestSha256": released}],
        "sharedDenoiserSha256": hashlib.sha256(weights).hexdigest(),
    }
    spec = parse(SampleSpec, document | more, "spec")
    evaluate.body(audit.evaluate_spec_of(spec))
    return spec


def put_samples(folder: Path, samples: dict[str, np.ndarray]) -> None:
    key = layout.samples(UID, CLIENT)
    open_store((folder / "owner").as_uri()).put(key, safetensors.numpy.save(samples))
