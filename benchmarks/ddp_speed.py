"""How fast the shared denoiser is trained by one process, by two independent ones and by two ranks of one job.

    python benchmarks/ddp_speed.py [--size 8] [--base-width 16] [--mechanism summary] [--seconds 15] [--runs 5]

The stage itself, `feddiff_trainer.train_shared`, started by `feddiff_trainer.ranks` as a pod does it, one thread a
process, on releases of three small owners. The ranks of one job share a batch of 256 images; an independent process has
half of it, so that both do equal work between two steps; one process alone has all of it. Speeds are taken between the
progress lines that the stages write, while all processes of a measurement train, and are in images per second of all of
them together. Efficiency is the two ranks' speed over the two independent processes'. On a busy machine ranks wait for
each other's lost time; what the two ranks' work costs, cpu_milliseconds_per_image of all processes together, does not
depend on that. Each run measures all three in turn. One JSON row.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import spread

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.api import ImageSpec, parse
from feddiff_protocol.errors import Interrupted
from feddiff_protocol.layout import release_name
from feddiff_protocol.stages import JobReference, NetworkSpec, ReleaseSpec, TrainSharedSpec
from feddiff_trainer.network import Denoiser
from feddiff_trainer.release import body as release
from feddiff_trainer.train_shared import SIGMA_DATA, network_config

CLASSES, RECORDS, BATCH = 10, 40, 256  # records of each class and owner
UID = "uid-00000001"
MECHANISMS: dict[str, Any] = {
    "summary": ({"clipNorm": "4.25", "momentClipNorm": "1.75"}, {"splitSigma": "2"}),
    "gaussian": ({"clipNorm": "4.25"}, {"timeline": "continued"}),
}
WAYS = {  # processes and batch of each job
    "one process": [(1, BATCH)],
    "two independent": [(1, BATCH // 2)] * 2,
    "two ranks": [(2, BATCH)],
}
Moment = tuple[float, int]  # when a progress line came, and how many images it names


class Training:
    """A job that has been started: `num_processes` ranks, and when they had seen how many images."""

    def __init__(self, folder: Path, spec: TrainSharedSpec, num_processes: int) -> None:
        (folder / "spec.json").write_text(json.dumps(spec.to_wire()))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "feddiff_trainer.ranks", str(num_processes), "feddiff_trainer.train_shared"]
        self.moments: list[Moment] = []
        self._process = subprocess.Popen(
            [*command, str(folder / "spec.json")],
            env={**os.environ, **world, "OMP_NUM_THREADS": "1", "FEDDIFF_TERMINATION_LOG": str(folder / "receipt")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "progress":
                self.moments.append((time.perf_counter(), event["done"]))
            else:
                print(line, end="", file=sys.stderr)

    def cpu_seconds(self) -> float:
        """Of its ranks, so far."""
        ranks = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        fields = [Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split() for rank in ranks]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.terminate()
        self._reader.join()
        if (code := self._process.wait()) != Interrupted.exit_code:
            print(f"a training that was stopped ended with {code}, expected {Interrupted.exit_code}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--base-width", type=int, default=16)
    parser.add_argument("--mechanism", choices=MECHANISMS, default="summary")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        spec = released(Path(name), arguments)
        found: dict[str, list[tuple[float, float]]] = {each: [] for each in WAYS}
        for _ in range(arguments.runs):
            for way, jobs in WAYS.items():
                found[way].append(measured(spec, arguments.seconds, jobs))
    print_row(spec, found, arguments)


def released(folder: Path, arguments: argparse.Namespace) -> TrainSharedSpec:
    """The spec of a job whose three owners have released noise-like images."""
    privacy, diffusion = MECHANISMS[arguments.mechanism]
    common = {
        "job": JobReference(uid=UID, name="speed", namespace="research").to_wire(),
        "attempt": 1,
        "image": ImageSpec(channels=1, height=arguments.size, width=arguments.size).to_wire(),
        "privacy": {"mechanism": arguments.mechanism, "epsilon": "10", "delta": "1e-5", **privacy},
        "diffusion": diffusion,
        "federationStore": (folder / "federation").as_uri(),
    }
    document = common | {
        "releases": [owner_releases(folder, client, common, arguments.size) for client in ("a", "b", "c")],
        "numClasses": CLASSES,
        "network": {"baseWidth": arguments.base_width},
        "shared": {"images": 10**9, "batch": BATCH},
        "sampling": {},
    }
    return parse(TrainSharedSpec, document, "spec")


def owner_releases(folder: Path, client: str, common: dict[str, Any], size: int) -> dict[str, str]:
    labels_N = np.repeat(np.arange(CLASSES), RECORDS)
    images_NCHW = np.random.default_rng(0).uniform(0, 1, (len(labels_N), 1, size, size))
    np.savez(folder / f"{client}.npz", images=images_NCHW, labels=labels_N)
    document = common | {
        "client": client,
        "release": release_name(UID, client, "scans"),
        "source": {"format": "npz", "path": str(folder / f"{client}.npz")},
        "classes": {"count": CLASSES, "records": [RECORDS] * CLASSES},
        "ownerStore": (folder / "owner").as_uri(),
    }
    return {"client": client, "manifestSha256": release(parse(ReleaseSpec, document, "spec"))["manifest"]}


# ---- Measuring -----------------------------------------------------------------------------------------------


def measured(spec: TrainSharedSpec, seconds: float, jobs: list[tuple[int, int]]) -> tuple[float, float]:
    """Images per second of jobs of so many processes and such a batch, all at once for so many seconds, and
    milliseconds of CPU per image."""
    with contextlib.ExitStack() as stack:
        trainings = [stack.enter_context(training(spec, *job)) for job in jobs]
        while not all(each.moments for each in trainings):
            time.sleep(0.1)
        since, before = time.perf_counter(), sum(each.cpu_seconds() for each in trainings)
        time.sleep(seconds)
        cpu = (sum(each.cpu_seconds() for each in trainings) - before) / (time.perf_counter() - since)
        moments = [list(each.moments) for each in trainings]
    began, ended = max(each[0][0] for each in moments), min(each[-1][0] for each in moments)
    speed = sum(between(each, began, ended) for each in moments)
    return speed, 1000 * cpu / speed


@contextlib.contextmanager
def training(spec: TrainSharedSpec, num_processes: int, batch: int) -> Iterator[Training]:
    with tempfile.TemporaryDirectory() as name:
        # A store of its own, or a training would go on from another one's checkpoint.
        store = Path(name) / "federation"
        subprocess.run(["cp", "-r", spec.federation_store.removeprefix("file://"), store], check=True)
        shared = spec.shared.model_copy(update={"batch": batch})
        own = spec.model_copy(update={"shared": shared, "federation_store": store.as_uri()})
        started = Training(Path(name), own, num_processes)
        try:
            yield started
        finally:
            started.stop()


def between(moments: list[Moment], began: float, ended: float) -> float:
    """Images per second of one job, between its first and last progress lines of that time."""
    inside = [each for each in moments if began <= each[0] <= ended]
    (first, seen_first), (last, seen_last) = inside[0], inside[-1]
    return (seen_last - seen_first) / (last - first)


def print_row(
    spec: TrainSharedSpec, found: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace
) -> None:
    config = network_config(NetworkSpec(base_width=arguments.base_width), spec.image, CLASSES, SIGMA_DATA)
    row = {
        "benchmark": "ddp_speed",
        "size": arguments.size,
        "mechanism": arguments.mechanism,
        "parameters": sum(weight.numel() for weight in Denoiser(config).parameters()),
        "batch": BATCH,
        **speeds_in_words({way: [speed for speed, _ in each] for way, each in found.items()}),
        "cpu_milliseconds_per_image": {way: spread([cpu for _, cpu in each]) for way, each in found.items()},
        "runs": arguments.runs,
        "seconds": arguments.seconds,
        "threads": 1,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


def speeds_in_words(found: dict[str, list[float]]) -> dict[str, Any]:
    """Of images per second in each run of each of the WAYS."""
    ranks, independent, alone = (found[each] for each in ("two ranks", "two independent", "one process"))
    return {
        "images_per_second": {way: spread(each) for way, each in found.items()},
        "efficiency": spread([a / b for a, b in zip(ranks, independent, strict=True)]),
        "speed_up_over_one": spread([a / b for a, b in zip(ranks, alone, strict=True)]),
    }


if __name__ == "__main__":
    main()
