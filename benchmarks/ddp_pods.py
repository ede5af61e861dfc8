"""How fast the shared denoiser is trained by one pod, by the pods of two independent jobs and by one job's two pods.

    python benchmarks/ddp_pods.py [--size 8] [--base-width 16] [--seconds 15] [--runs 3]

As benchmarks/ddp_speed.py, which measures processes, but on the tests' node: the chart by helm, one owner with random
images, jobs by `gaussian`, a SeaweedFS beside the node, one thread a pod. The ranks of one job share a batch of 256
images; an independent job has half of it. Speeds are taken between the progress lines in the logs of the jobs'
first ranks, while all of them train, and are in images per second of all pods together. Each run measures all
three ways in turn. One JSON row. Needs root and `make kube images`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from ddp_speed import BATCH, CLASSES, RECORDS, WAYS, Moment, between, speeds_in_words

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.federation import RESEARCH, OwnFederation, federation, owner_file
from feddiff.experiment import commit, cpu_model
from feddiff_protocol.stages import Stage

OWNER = "clinic"
ONE_THREAD = {"spec": {"containers": [{"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--base-width", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, federation(Path(name), [OWNER]) as world:
        world.install()
        onboard(world, arguments.size)
        found: dict[str, list[float]] = {each: [] for each in WAYS}
        for run in range(arguments.runs):
            for way, jobs in WAYS.items():
                names = {f"{way.replace(' ', '-')}-{run}-{number}": job for number, job in enumerate(jobs)}
                found[way].append(measured(world, names, arguments))
                print(f"{way}: {found[way][-1]:.0f} images/s", file=sys.stderr)
    row = {
        "benchmark": "ddp_pods",
        "size": arguments.size,
        "base_width": arguments.base_width,
        "mechanism": "gaussian",
        "batch": BATCH,
        **speeds_in_words(found),
        "runs": arguments.runs,
        "seconds": arguments.seconds,
        "threads": 1,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


def onboard(world: OwnFederation, size: int) -> None:
    labels_N = np.repeat(np.arange(CLASSES), RECORDS)
    records = world.folder / OWNER
    records.mkdir()
    images_NCHW = np.random.default_rng(0).uniform(0, 1, (len(labels_N), 1, size, size))
    np.savez(records / "train.npz", images=images_NCHW, labels=labels_N)
    spec = {
        "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
        "image": {"channels": 1, "height": size, "width": size},
        "classes": {"count": CLASSES, "records": [RECORDS] * CLASSES},
        "budget": {"epsilon": "1000", "delta": "0.00001", "unit": "image"},
        "access": [{"namespace": RESEARCH, "maxEpsilon": "10"}],
        "store": {"uri": f"s3://{OWNER}/feddiff", "secretName": "own-store"},
        "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
        "podTemplate": ONE_THREAD,
    }
    world.onboard(OWNER, records, owner_file(world.folder / "owner.yaml", OWNER, spec))


def measured(world: OwnFederation, jobs: dict[str, tuple[int, int]], arguments: argparse.Namespace) -> float:
    """Images per second of jobs with so many pods and such a batch, all at once for so many seconds."""
    world.apply(*(job_document(name, *job, arguments) for name, job in jobs.items()))
    uids = [world.job(name)["metadata"]["uid"] for name in jobs]
    while not all(progress(world, uid) and has_personal(world, uid) for uid in uids):
        time.sleep(1)
    began = time.time()
    time.sleep(arguments.seconds)
    moments = [progress(world, uid) for uid in uids]
    ended = min(each[-1][0] for each in moments)
    world.node.kubectl("delete", "fdj", "-n", RESEARCH, "--wait=false", *jobs)
    while any(world.children(uid, "pods") for uid in uids):
        time.sleep(1)
    return sum(between(each, began, ended) for each in moments)


def has_personal(world: OwnFederation, uid: str) -> bool:
    """Whether the owner's personal denoiser, which would take a core meanwhile, is trained."""
    return Stage.TRAIN_PERSONAL in {receipt.stage for receipt in world.receipts(uid)}


def progress(world: OwnFederation, uid: str) -> list[Moment]:
    """What the job's first rank has said, nothing before it trains."""
    pods = world.pods(uid, Stage.TRAIN_SHARED)
    if not pods or pods[0]["status"]["phase"] != "Running":
        return []
    found = []
    for line in world.node.kubectl("logs", "-n", RESEARCH, "--timestamps", pods[0]["metadata"]["name"]).splitlines():
        moment, _, text = line.partition(" ")
        event = json.loads(text) if text.startswith("{") else {}
        if event.get("event") == "progress":
            found.append((datetime.fromisoformat(moment).timestamp(), event["done"]))
    return found


def job_document(name: str, replicas: int, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {"name": name, "namespace": RESEARCH},
        "spec": {
            "clients": [{"name": OWNER, "dataset": {"namespace": OWNER, "name": "scans"}}],
            "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "0.00001", "clipNorm": "4.25"},
            "diffusion": {"timeline": "continued"},
            "network": {"baseWidth": arguments.base_width},
            "shared": {"images": 10**9, "batch": batch, "replicas": replicas, "podTemplate": ONE_THREAD},
            "personal": {"images": 256, "batch": 256},
            "sampling": {"imagesPerClass": 4, "steps": 4},
            "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
        },
    }


if __name__ == "__main__":
    main()
