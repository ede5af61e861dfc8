"""What one job moves between each owner and the federation, beside what FedAvg would move for the same network.

    python benchmarks/bytes_moved.py [--clients 10 32 128] [--image-steps 2560]

The jobs of examples/digits, with its three owners or with so many clients to whom `feddiff split` deals all 1,797
digits; every stage run once, in this process. Each object that an owner's stages hand to the federation's store or take
from it is counted each time it crosses; what stays between an owner and its own store is not. The length of training
moves nothing, so it is cut. FedAvg sends the network's float32 weights to every client and takes them back, once a
round. One JSON row per number of clients and mechanism.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from feddiff.documents import LocalJob, load_job
from feddiff.experiment import commit
from feddiff.split import split_data
from feddiff_protocol import layout
from feddiff_protocol.api import PrivateDataset
from feddiff_protocol.stages import (
    Places,
    ReleaseReference,
    Stage,
    owner_stage_spec,
    release_spec,
    train_shared_spec,
)
from feddiff_trainer import evaluate, release, sample, train_personal, train_shared
from feddiff_trainer.network import Denoiser
from feddiff_trainer.stores import FolderStore, Store
from feddiff_trainer.train_shared import network_config

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
from make_digits import main as make_digits

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
UID = "uid-00000001"
MECHANISMS = ("summary", "gaussian")
STAGES = (release, train_shared, train_personal, sample, evaluate)
# FedAvg on Fashion-MNIST with 12 clients of 3 local epochs: Tun et al., "Federated Learning with Diffusion Models for
# Privacy-Sensitive Vision Tasks", ATC 2023; "rounds" in diffusion_fedavg.ipynb of YLTun/federated_diffusion_model.
PUBLISHED_ROUNDS = 300


class Traffic:
    """Bytes that crossed to and from the federation's store, by who moved them and what they were."""

    def __init__(self, federation: str) -> None:
        self.federation, self.whose = federation, ""
        self.sent: dict[str, Counter[str]] = {}
        self.fetched: dict[str, Counter[str]] = {}

    def open_store(self, uri: str, _: object = None) -> Store:
        return CountedStore(uri, self) if uri == self.federation else FolderStore(uri)

    def add(self, moved: dict[str, Counter[str]], key: str, num_bytes: int) -> None:
        moved.setdefault(self.whose, Counter())[kind_of(key)] += num_bytes


class CountedStore(FolderStore):
    def __init__(self, uri: str, traffic: Traffic) -> None:
        super().__init__(uri)
        self.traffic = traffic

    def get(self, key: str) -> bytes:
        data = super().get(key)
        self.traffic.add(self.traffic.fetched, key, len(data))
        return data

    def stream(self, key: str) -> Iterator[bytes]:
        for piece in super().stream(key):
            self.traffic.add(self.traffic.fetched, key, len(piece))
            yield piece

    def put(self, key: str, data: bytes) -> None:
        self.traffic.add(self.traffic.sent, key, len(data))
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.traffic.add(self.traffic.sent, key, len(data))  # also where something was there first
        return super().create(key, data)


def kind_of(key: str) -> str:
    name = key.rpartition("/")[2]
    named = {"manifest.json": "manifest", "denoiser.safetensors": "shared denoiser"}
    if name.startswith(layout.PROBE):
        return "probe"
    return named.get(name, "shards" if "/shards/" in key else "checkpoints and samples")


# ---- One job -------------------------------------------------------------------------------------------------


def traffic_of(job: LocalJob, folder: Path) -> Traffic:
    """What the job moved: every stage but the report, one after the other."""
    datasets = {name: created(dataset.document, f"uid-{name}") for name, dataset in job.datasets.items()}
    places = Places(
        federation_store=(folder / "federation").as_uri(),
        owner_stores={name: (folder / name).as_uri() for name in datasets},
        sources={name: dataset.source for name, dataset in job.datasets.items()},
    )
    traffic = Traffic(places.federation_store)
    for module in STAGES:
        module.open_store = traffic.open_store  # type: ignore[attr-defined]
    releases = []
    for client, dataset in datasets.items():
        traffic.whose = client
        outputs = release.body(release_spec(job.document, UID, client, dataset, places, 1))
        releases.append(ReleaseReference(client=client, manifest_sha256=outputs["manifest"]))
    counted, (first, *_) = tuple(releases), datasets.values()
    traffic.whose = "shared"
    shared = train_shared.body(train_shared_spec(job.document, UID, first, counted, places, 1))["denoiser"]
    for stage, module in ((Stage.TRAIN_PERSONAL, train_personal), (Stage.SAMPLE, sample), (Stage.EVALUATE, evaluate)):
        for client, dataset in datasets.items():
            traffic.whose = client
            spec: Any = owner_stage_spec(stage, job.document, UID, client, dataset, counted, shared, places, 1)
            module.body(spec)
    return traffic


def created(dataset: PrivateDataset, uid: str) -> PrivateDataset:
    return dataset.model_copy(update={"metadata": dataset.metadata.model_copy(update={"uid": uid})})


def shortened(job: LocalJob, image_steps: int) -> LocalJob:
    spec = job.document.spec
    shared, personal = (each.model_copy(update={"images": image_steps}) for each in (spec.shared, spec.personal))
    sampling = spec.sampling.model_copy(update={"images_per_class": 10, "steps": 5})
    cut = spec.model_copy(update={"shared": shared, "personal": personal, "sampling": sampling})
    return LocalJob(job.document.model_copy(update={"spec": cut}), job.datasets, job.promise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[3])
    parser.add_argument("--image-steps", type=int, default=2560)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for clients in arguments.clients:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_digits(folder)
            (folder / "owners.yaml").write_bytes((EXAMPLE / "owners.yaml").read_bytes())
            jobs = {name: load_job([folder / "owners.yaml", EXAMPLE / f"{name}.yaml"]) for name in MECHANISMS}
            dealt = deal(folder, clients) if clients != 3 else None
            for mechanism, job in jobs.items():
                job = shortened(job if dealt is None else among(dealt, job), arguments.image_steps)
                print_row(mechanism, job, traffic_of(job, folder / mechanism))


def deal(folder: Path, clients: int) -> LocalJob:
    """A job of so many clients."""
    make_digits(folder / "all.npz")
    split_data(
        folder / "all.npz",
        folder / "split",
        num_clients=clients,
        labels=None,
        majority=None,
        minority_records=0,
        dirichlet=None,
        holdout="0",  # measuring quality moves nothing and takes long
        seed=0,
    )
    return load_job([folder / "split/owners.yaml", folder / "split/job.yaml"])


def among(dealt: LocalJob, job: LocalJob) -> LocalJob:
    """The job, for the clients of the other one."""
    spec = job.document.spec.model_copy(update={"clients": dealt.document.spec.clients})
    return LocalJob(job.document.model_copy(update={"spec": spec}), dealt.datasets, job.promise)


def print_row(mechanism: str, job: LocalJob, traffic: Traffic) -> None:
    spec, image = job.document.spec, job.first_dataset.document.spec.image
    network = Denoiser(network_config(spec.network, image, job.first_dataset.document.spec.classes.count, 0.5))
    parameters = sum(weight.numel() for weight in network.parameters())
    totals = [traffic.sent[client].total() + traffic.fetched[client].total() for client in job.datasets]
    per_round = 2 * 4 * parameters
    row = {
        "benchmark": "bytes_moved",
        "mechanism": mechanism,
        "clients": len(job.datasets),
        "sent": kinds_of(traffic.sent, job),
        "fetched": kinds_of(traffic.fetched, job),
        "bytes_per_client": [min(totals), max(totals)],
        "shared_training": {"sent": dict(traffic.sent["shared"]), "fetched": dict(traffic.fetched["shared"])},
        "parameters": parameters,
        "fedavg_bytes_per_round": per_round,
        "break_even_rounds": [round(each / per_round, 3) for each in (min(totals), max(totals))],
        "published_rounds": PUBLISHED_ROUNDS,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


def kinds_of(moved: dict[str, Counter[str]], job: LocalJob) -> dict[str, list[int]]:
    """Bytes of each kind, of the client with the fewest of them and of that with the most."""
    kinds = {kind for client in job.datasets for kind in moved[client]}
    return {
        kind: [choice(moved[client][kind] for client in job.datasets) for choice in (min, max)]
        for kind in sorted(kinds)
    }


if __name__ == "__main__":
    main()
